"""The whole table: every algorithm x task x set x seed, on this machine or as a Slurm array.

    ./benchmark.sh --dry-run                                       # what would be run, one command per line
    ./benchmark.sh --quick --algos bc --tasks walker-walk --datasets expert --seeds 2        # on CPU cores
    ./benchmark.sh --algos drq_bc,cql --datasets medium,expert --seeds 3 --gpus 2 --jobs 4   # two runs per GPU
    ./benchmark.sh --algos drq_bc --tag alpha1 -- --bc-alpha 1     # words after -- go to every run
    ./benchmark.sh --slurm --slurm-args='--partition=gpu --gres=gpu:1 --cpus-per-task=8' --stage-dir '$TMPDIR'

Missing sets are made first. Finished runs are left alone and stopped ones continue, so call it again after an
interruption. Ctrl-C stops every run with a checkpoint; a second Ctrl-C stops at once. What a run prints is in
<its folder>.log. At the end, report.py writes report/ and failures are named. Several calls at once share the work. The
status is 0 if every run that is possible has finished, or is running elsewhere.

Nothing here is known by an algorithm's name: your algos/my_idea.py is a row like any other."""

import collections
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
import collect  # noqa: E402
import slurm  # noqa: E402

import common  # noqa: E402
from common import NAMED_SETS, STANDARD_SETS, Dataset, UserError  # noqa: E402

PROGRESS_SECONDS = 60  # how often it is said how far the runs are


@dataclass
class Args:
    algos: str = ""  # files in algos/ without .py, separated by commas; empty: all
    tasks: str = "walker-walk,cheetah-run,humanoid-walk"  # domain-task, or metaworld-..., separated by commas
    datasets: str = ",".join(STANDARD_SETS)  # names or folders of sets, separated by commas
    seeds: str = "6"  # how many, from 0; or which, with commas: 3,4 or, for one, 3,
    source: str = ""  # as in every algorithm
    tag: str = ""  # as in every algorithm
    quick: bool = False  # as in every algorithm
    runs_dir: str = ""  # as in every algorithm
    jobs: int | None = None  # runs at a time; None: one per GPU, or one. Under --slurm: array tasks at a time
    gpus: str | None = None  # how many of the visible ones, jobs in turn; or ids: 0,2. None: all; 0: none
    stage_dir: str = ""  # copy the set there first; variables are looked up where the run is: '$TMPDIR'
    slurm: bool = False  # submit: one job that makes the missing sets, then an array that waits for it
    slurm_args: str = ""  # of both jobs, as given to sbatch
    dry_run: bool = False  # print the commands, with where each run stands, and stop


@dataclass
class Row:
    run: Path  # its folder
    log: Path  # what it prints, appended
    data: Path  # the folder of its set
    typed: dict  # its flags, before anything is worked out
    make: str  # the command that makes the set; empty where it is there
    command: str  # as one would type it
    words: list[str]  # the same for this Python, with --stage-dir behind stage.py
    state: str = ""  # see state_of; or impossible, failed
    why: str = ""  # it is impossible, or has failed


# ==== The list ====


def list_rows(table: Args, extra: list[str]) -> list[Row]:
    """All rows of the table, their states as they are now. Raises UserError for a name that does not exist."""
    modules, rows = {}, []
    for algo in names_in(table.algos) if table.algos else sorted(file.stem for file in (ROOT / "algos").glob("*.py")):
        try:
            modules[algo] = load(algo)
        except UserError as error:
            if table.algos:
                raise
            print(f"# left out: {error}")
    tasks, datasets = names_in(table.tasks), names_in(table.datasets)
    named = [name for name in datasets if name in NAMED_SETS]
    for task in tasks if named else ():  # those of manipulation.py are known where they are made
        if not task.startswith(common.MANIPULATION) and not (collect.POLICIES / task).is_dir():
            common.make_env(task, size=None)  # raises
    places = [(task, name) for task in tasks for name in named]
    places += [(Dataset(path).task, path) for path in datasets if path not in named]  # its own, whatever --tasks says
    flags = {"--source": table.source, "--tag": table.tag, "--runs-dir": table.runs_dir}
    words = [word for flag, value in flags.items() if value for word in (flag, value)] + ["--quick"] * table.quick
    for task, dataset in places:
        for algo, module in modules.items():
            rows += rows_of(table, algo, module, task, dataset, words + extra)
    return rows


def here(name: str) -> str:
    """A file of this checkout, from the current folder."""
    return os.path.relpath(ROOT / name)


def names_in(text: str) -> list[str]:
    """The names that commas separate, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def load(algo: str):
    """The module algos/<algo>.py. Raises UserError if it is no algorithm."""
    script = ROOT / "algos" / f"{algo}.py"
    if not script.is_file():
        known = ", ".join(sorted(file.stem for file in script.parent.glob("*.py")))
        raise UserError(f"--algos {algo}: there is no algos/{algo}.py; there are {known}")
    name = f"algos_{algo}"  # dataclasses look their module up by its name
    spec = importlib.util.spec_from_file_location(name, script)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a script under way may raise
        raise UserError(f"algos/{algo}.py cannot be imported ({type(error).__name__}: {error})") from None
    missing = [part for part in ("Args", "TUNED", "QUICK", "SIZE") if not hasattr(module, part)]
    if missing and not (missing == ["SIZE"] and hasattr(module.Args, "image_size")):
        raise UserError(f"algos/{algo}.py is no algorithm: it has no {', '.join(missing)}")
    return module


def rows_of(table: Args, algo: str, module, task: str, dataset: str, tail: list[str]):
    """The rows of one algorithm, task and set; tail: the words of every run."""
    head = ["--task", task, "--dataset", dataset]
    try:
        args = common.typed_args(module.Args, module.TUNED, module.QUICK, [*head, *tail])
    except SystemExit:  # tyro has printed what is wrong
        raise UserError(f"algos/{algo}.py does not take these flags: {shlex.join(tail)}; see --algos") from None
    make, why, source, stage = "", "", args.source, []
    if dataset in NAMED_SETS:
        size = getattr(args, "image_size", None) or module.SIZE  # world models have one size
        folder, recipe = common.standard_set(args, size)
        stage = [here("benchmarks/stage.py"), str(folder.absolute()), table.stage_dir] if table.stage_dir else []
        make = "" if (folder / "meta.json").exists() else shlex.join(["python", here(recipe[0]), *recipe[1:]])
        if make and source == "made":
            names = ("task", "dataset", "transitions", "data_dir", "distraction", "shifted", "bodies")
            flags = {name: getattr(args, name) for name in names}
            why = collect.problem_of(collect.Args(**flags, size=size, seed=args.data_seed))
        elif make:
            why = "the official files are not there; import them with data/vd4rl.py"
    else:
        folder, source = Path(dataset), Dataset(dataset).source
        if (size := Dataset(dataset).size) != getattr(module, "SIZE", size):
            why = f"{folder} has images of {size} px; algos/{algo}.py needs {module.SIZE}"
    for seed in range(int(table.seeds)) if table.seeds.isdigit() else map(int, names_in(table.seeds)):
        args.seed = args.typed["seed"] = seed
        run = common.run_folder(args, algo, folder.name, source).absolute()
        words = [here(f"algos/{algo}.py"), *head, "--seed", str(seed), *tail]
        typed, command = dict(args.typed), shlex.join(["python", *words])
        row = Row(run, Path(f"{run}.log"), folder, typed, make, command, [*stage, *words])
        row.state = state_of(row)
        if why and row.state != "finished":
            row.state, row.why = "impossible", why
        yield row


def state_of(row: Row) -> str:
    """Where a run stands: to do, running elsewhere, finished, to continue. One that has finished with other flags or
    data is "to continue": its command says what differs."""
    if not row.run.exists():
        return "to do"
    try:
        with filelock.FileLock(row.run / ".lock", timeout=0):
            config = common.read(row.run / "config.json")
    except filelock.Timeout:
        return "running elsewhere"
    except UserError:
        return "to do"
    typed = json.loads(json.dumps(row.typed))  # tuples are lists in the file
    same = all(config["typed"].get(name) == typed[name] for name in typed if name not in common.FREE_FLAGS)
    with contextlib.suppress(UserError):  # the set is gone, or damaged
        same = same and Dataset(row.data).hash == config["dataset"]["hash"]
    return "finished" if same and (row.run / "finished.json").exists() else "to continue"


def to_do(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.state in ("to do", "to continue")]


def summary(rows: list[Row]) -> str:
    counts = collections.Counter(row.state for row in rows)
    return f"{len(rows)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())


# ==== On this machine ====


class Processes:
    """What this program has started. Ctrl-C, SIGTERM or SIGHUP: nothing new begins, what runs is asked for a checkpoint
    and .signal is the signal's number. Ctrl-C after that: what runs is killed."""

    def __init__(self):
        self.started, self.signal = [], 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self.stop)

    def stop(self, number: int, _) -> None:
        if self.signal and number != signal.SIGINT:  # schedulers and terminals repeat the others
            return
        text = "killing what runs" if self.signal else "stopping what runs, with a checkpoint (Ctrl-C: at once)"
        os.write(2, f"\n{text}\n".encode())  # print may be mid-line
        for process in self.started:
            process.kill() if self.signal else process.terminate()
        self.signal = self.signal or number

    def start(self, words: list[str], **kwargs) -> subprocess.Popen:
        # a session of its own: Ctrl-C reaches this program alone, which then asks each process once
        kwargs |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
        self.started.append(process := subprocess.Popen([sys.executable, *words], **kwargs))
        if self.signal:  # it came meanwhile
            process.terminate()
        return process


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def visible_gpus(wanted: str | None) -> list[str]:
    """The ids that --gpus means. Raises UserError for one that is not there."""
    there = names_in(os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count()))))
    if wanted is None:
        return there
    chosen = there[: int(wanted)] if wanted.isdigit() else names_in(wanted)
    if len(chosen) < (int(wanted) if wanted.isdigit() else 1) or not set(chosen) <= set(there):
        raise UserError(f"--gpus {wanted}: a number of GPUs, or ids: 0,2. There are: {', '.join(there) or 'none'}")
    return chosen


def places_of(args: Args) -> list[dict]:
    """The environment variables of each of the runs at a time: its share of the cores, its GPU, which also renders.
    Raises UserError for a GPU that is not there."""
    gpus, places = visible_gpus(args.gpus), []
    jobs = args.jobs or max(1, len(gpus))
    defaults = {"OMP_NUM_THREADS": str(max(1, common.cores() // jobs))} if jobs > 1 else {}  # else each takes all
    for gpu in gpus:
        variables = {"CUDA_VISIBLE_DEVICES": gpu, "CLEANPIXELS_RUNS_PER_GPU": str(-(-jobs // len(gpus)))}
        egl = {"MUJOCO_EGL_DEVICE_ID": gpu}
        probe = [sys.executable, "-c", "from mujoco.egl import GLContext; GLContext(8, 8).free()"]
        if subprocess.run(probe, env=os.environ | {"MUJOCO_GL": "off"} | egl, capture_output=True).returncode:
            egl = {}  # in containers EGL often knows fewer GPUs than CUDA
        places.append(defaults | egl | os.environ | variables)
    if not gpus:
        places = [defaults | os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.gpus == "0" else {})]
    return [places[k % len(places)] for k in range(jobs)]


def make_sets(rows: list[Row], processes: Processes) -> None:
    """Makes what is missing, one set after another (each uses all cores). Rows whose set fails have failed."""
    for make in dict.fromkeys(row.make for row in rows if row.make):
        if processes.signal:
            return
        say(f"making a set: {make}")
        if processes.start(shlex.split(make)[1:]).wait() and not processes.signal:
            for row in rows:
                if row.make == make:
                    row.state, row.why = "failed", "its set could not be made, see above"


def run_rows(rows: list[Row], places: list[dict], processes: Processes) -> None:
    """Runs them, one in each place at a time. Says what begins, what ends and how far the others are."""
    waiting, running, looked = collections.deque(rows), {}, time.monotonic()
    while running or waiting and not processes.signal:
        for k, variables in enumerate(places):
            if waiting and k not in running and not processes.signal:
                row = waiting.popleft()
                say(f"started {row.run}")
                with open(row.log, "ab") as log:
                    running[k] = row, processes.start(row.words, stdout=log, stderr=log, env=variables)
        time.sleep(0.2)
        for k, (row, process) in list(running.items()):
            if process.poll() is not None:
                del running[k]
                row.state = "finished" if process.returncode == 0 else state_of(row)
                if to_do([row]) and not processes.signal:
                    end = "\n".join(f"        {line}" for line in newest_lines(row.log)[-5:])
                    row.state, row.why = "failed", f"the end of {row.log}:\n{end}"
                say(f"{row.state} {row.run}; {len(running)} running, {len(waiting)} waiting")
        if time.monotonic() - looked > PROGRESS_SECONDS:
            looked = time.monotonic()
            say(f"{len(running)} running, {len(waiting)} waiting")
            for row, _ in running.values():
                bars = re.findall(r"\| (\d+/\d+) \[", "\n".join(newest_lines(row.log)))
                print(f"    step {bars[-1]}  {row.run}" if bars else f"    starting  {row.run}", flush=True)


def newest_lines(log: Path) -> list[str]:
    """The last lines of a log that are not empty; each state of a progress bar is one."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        text = file.read().decode(errors="replace")
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()]


def run_here(rows: list[Row], args: Args) -> int:
    """Makes the sets, runs what is to be done, writes the report. Returns the status of the whole."""
    places, processes, reported = places_of(args), Processes(), 0
    for row in to_do(rows):  # before sets are made: whether one may write there
        row.log.parent.mkdir(parents=True, exist_ok=True)
    make_sets(to_do(rows), processes)
    run_rows(to_do(rows), places, processes)
    if not processes.signal and any(row.state == "finished" for row in rows):
        Path("report").mkdir(exist_ok=True)
        with filelock.FileLock("report/.lock"):  # another benchmark.sh may be as far
            words = [sys.executable, here("report.py"), *(["--runs-dir", args.runs_dir] if args.runs_dir else [])]
            reported = subprocess.run(words).returncode
    for row in rows:
        if row.why:
            print(f"{row.state}: {row.command}: {row.why}")
    print(summary(rows))
    if processes.signal:
        return 128 + processes.signal
    return int(reported != 0 or any(row.state == "failed" for row in rows))


# ==== The command line ====


def parse(argv: list[str]) -> tuple[Args, list[str]]:
    """benchmark.sh's flags, with absolute paths, and the words behind --. Raises UserError."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = tyro.cli(Args, args=argv[:cut], prog="benchmark.sh", description=__doc__), argv[cut + 1 :]
    own = "--task|--dataset|--seed|--source|--tag|--quick|--runs-dir|--overwrite|--evaluate|--help"
    if wrong := [word for word in extra if re.fullmatch(f"({own})(=.*)?", word.replace("_", "-"))]:
        raise UserError(f"{wrong[0]} behind --: each run has its own, or it is a flag of benchmark.sh; see --help")
    seeds, twice = r"[1-9]\d{,3}|(\d{1,9},)+(\d{1,9})?", re.search(r"\b(\d+),(.*,)?\1\b", args.seeds)
    if twice or not re.fullmatch(seeds, args.seeds) or args.jobs is not None and args.jobs < 1:
        raise UserError(f"--seeds {args.seeds} --jobs {args.jobs}: at least 1; which seeds, each once: 3,4 or 3,")
    if args.slurm and args.gpus:
        raise UserError("--gpus: under --slurm each run has its own, --slurm-args='--gres=gpu:1'")
    visible_gpus(args.gpus)  # raises
    names = names_in(args.datasets)
    paths = {name: Path(name).expanduser().resolve() for name in names if name not in NAMED_SETS}
    if wrong := [name for name, path in paths.items() if not path.is_dir()]:
        raise UserError(f"--datasets {wrong[0]}: neither one of {', '.join(NAMED_SETS)} nor a folder")
    args.datasets = ",".join(str(paths.get(name, name)) for name in names)
    return args, extra


def main(argv: list[str]) -> int:
    """Returns the status of the process."""
    args, extra = parse(argv)
    rows = list_rows(args, extra)
    if not rows:
        raise UserError("--algos, --tasks and --datasets name no run")
    if same := [run for run, count in collections.Counter(row.run for row in rows).items() if count > 1]:
        raise UserError(f"--datasets: two sets of one name would share {same[0]}; rename one, or run it with a --tag")
    sets = list(dict.fromkeys(row.make for row in to_do(rows) if row.make))
    if args.dry_run:
        for make in sets:
            print(make)
        for row in rows:
            note = f"  # {row.state}: {row.why}" if row.why else f"  # {row.state}" * (row.state != "to do")
            print("# " * bool(row.why) + row.command + note)
    print(f"# {summary(rows)}; {len(sets)} sets to make", flush=True)
    if args.dry_run:
        return 0
    if not args.slurm:
        return run_here(rows, args)
    if todo := to_do(rows):
        logs = Path(args.runs_dir or ROOT / "runs", "slurm").expanduser().absolute()
        slurm.submit(sets, todo, logs, args.jobs, args.slurm_args)
    return 0


if __name__ == "__main__":
    sys.excepthook = common.one_line_errors
    sys.exit(main(sys.argv[1:]))
