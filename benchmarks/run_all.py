"""The whole table: every algorithm x task x set x seed, on this machine or as a Slurm array.

    ./benchmark.sh --dry-run                                       # what would be run, one command per line
    ./benchmark.sh --quick --algos bc --tasks walker-walk --datasets expert --seeds 2        # on CPU cores
    ./benchmark.sh --algos drq_bc,cql --datasets medium,expert --seeds 3 --gpus 2 --jobs 4   # two runs per GPU
    ./benchmark.sh --algos drq_bc --tag alpha1 -- --bc-alpha 1     # words after -- go to every run
    ./benchmark.sh --slurm --slurm-args '--partition=gpu --gres=gpu:1 --cpus-per-task=8' --stage-dir '$TMPDIR'

Missing sets are made first. Finished runs are left alone and stopped ones continue, so call it again after an
interruption; Ctrl-C stops every run with a checkpoint. What a run prints is in <its folder>.log. At the end, report.py
writes report/ and failures are named. The status is 0 if every run that is possible, and that no other process runs,
has finished.

Nothing here is known by an algorithm's name: a file's own Args, TUNED and QUICK are read, so your algos/my_idea.py is a
row like any other."""

import collections
import contextlib
import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from collect import PARTS, POLICIES, policy_file  # noqa: E402

from common import (  # noqa: E402
    FREE_FLAGS,
    MANIPULATION,
    NAMED_SETS,
    STANDARD_SETS,
    Dataset,
    UserError,
    changed_code,
    collect_flags,
    cores,
    kitchen_problem,
    lock_file,
    make_env,
    one_line_errors,
    read_meta,
    run_folder,
    set_folder,
    typed_args,
)


@dataclass
class Args:
    algos: str = ""  # files in algos/ without .py, separated by commas; empty: all
    tasks: str = "walker-walk,cheetah-run,humanoid-walk"  # domain-task, or metaworld-..., separated by commas
    datasets: str = ",".join(STANDARD_SETS)  # names or folders of sets, separated by commas
    seeds: str = "6"  # how many, from 0; or several, separated by commas: 3,4
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
    row: str = ""  # what a task of the array runs; not for people


@dataclass
class Row:
    run: str  # folder of the run
    data: str  # folder of the set
    make: str  # the command that makes the set; empty where it is there
    command: str  # from the repository's root
    state: str  # new; "step N" where a checkpoint is; running; finished; "impossible: why"
    standard: bool  # the set is one of NAMED_SETS, not one's own

    @property
    def log(self) -> Path:
        return Path(f"{self.run}.log")

    @property
    def problem(self) -> str:
        """Why the run cannot be made; empty if it can."""
        return self.state.removeprefix("impossible: ") if self.state.startswith("impossible: ") else ""


# ==== The list ====


def list_rows(args: Args, extra: list[str]) -> list[Row]:
    if args.algos:
        modules = {algo: load(algo) for algo in names_in("algos", args.algos)}
    else:
        modules = {}
        for algo in sorted(file.stem for file in (ROOT / "algos").glob("*.py")):
            try:
                modules[algo] = load(algo)
            except UserError as error:
                print(f"# left out: {error}")
    seeds = range(int(args.seeds)) if args.seeds.isdigit() else [int(seed) for seed in args.seeds.split(",")]
    tasks, datasets, found = names_in("tasks", args.tasks), names_in("datasets", args.datasets), {}
    for task in tasks if any(dataset in NAMED_SETS for dataset in datasets) else ():
        if not task.startswith(MANIPULATION) and not (POLICIES / task).is_dir():
            make_env(task, size=None).close()  # names the tasks there are, if this is none
    for task, dataset, (algo, module) in itertools.product(tasks, datasets, modules.items()):
        for row in rows_of(algo, module, task, dataset, seeds, extra):
            found.setdefault(row.run, row)  # a set that is given by its path has one task, whatever --tasks says
    return list(found.values())


def names_in(flag: str, text: str) -> list[str]:
    """The names of a flag, which commas separate."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"--{flag} {text}: names, separated by commas")
    return names


def load(algo: str):
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
    if missing := [part for part in ("Args", "TUNED", "QUICK") if not hasattr(module, part)]:
        raise UserError(f"algos/{algo}.py is no algorithm: it has no {', '.join(missing)}")
    return module


def rows_of(algo: str, module, task: str, dataset: str, seeds, extra: list[str]):
    """The rows of one algorithm, task and set."""
    script, standard = Path(module.__file__), dataset in NAMED_SETS
    words = ["--task", task, "--dataset", dataset]
    args = typed_args(module.Args, module.TUNED, module.QUICK, [*words, *extra])
    make, problem, source = "", "", args.source
    if standard:
        size = re.search(r"open_dataset\(args, size=(\w+)", script.read_text())
        size = size and (int(size[1]) if size[1].isdigit() else getattr(module, size[1], None))
        if not isinstance(size, int):
            raise UserError(f"algos/{algo}.py has no open_dataset(args, size=N) to read the size of its images from")
        folder = set_folder(args.data_dir, source, task, dataset, size, args.transitions, args.data_seed).absolute()
        if not (folder / "meta.json").exists():
            make, problem = how_to_make(args, size, folder)
    else:
        folder = Path(dataset)
        meta = read_meta(folder)
        meta = read_meta(folder / meta["parts"][0]) if "parts" in meta else meta
        args.task, source = meta["task"], meta["source"]
    data_hash = Dataset(folder).hash if (folder / "meta.json").exists() else None
    for seed in seeds:
        args.seed = seed
        run = run_folder(args, algo, folder.name, source).absolute()
        state = state_of(run, args, script, data_hash)
        state = f"impossible: {problem}" if problem and state != "finished" else state
        command = shlex.join(["python", f"algos/{algo}.py", *words, "--seed", str(seed), *extra])
        yield Row(str(run), str(folder), make, command, state, standard)


def how_to_make(args, size: int, folder: Path) -> tuple[str, str]:
    """The command that makes a standard set, or why there is none."""
    if args.source != "made":
        return "", f"{folder} does not exist; import the official files with data/vd4rl.py"
    if problem := kitchen_problem(args, size):
        return "", problem
    try:
        for name in PARTS if args.dataset == "medexp" else (args.dataset,):
            if name == "demos" and not args.task.startswith("metaworld-"):
                raise UserError(
                    f"--dataset demos: there are scripted policies for metaworld-<task>, not for {args.task}"
                )
            if name not in ("random", "demos"):
                policy_file(args.task, name)
    except UserError as error:
        return "", str(error)
    return shlex.join(["python", "data/collect.py", *collect_flags(args, size)]), ""


def state_of(run: Path, args, script: Path, data_hash: str | None) -> str:
    """What cannot be read, or was finished with other flags, data or another script, is "new": its command says why."""
    if in_use(run):
        return "running"
    if (run / "finished.json").exists():
        with contextlib.suppress(OSError, ValueError, KeyError, SyntaxError):
            config = json.loads((run / "config.json").read_text())
            last = (config.get("resumed") or [config])[-1]["command"].split()
            typed = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in last if word[:2] == "--"}
            pairs = {name: (config["args"].get(name), value) for name, value in vars(args).items()}
            # with --offline-from these two are the donor's
            free = FREE_FLAGS | ({"offline_steps", "model_first"} if getattr(args, "offline_from", None) else set())
            # a value that the run works out itself is the same unless it was typed then
            same = all(was == now if now not in (None, "auto") else name not in typed
                       for name, (was, now) in pairs.items() if name not in free)  # fmt: skip
            same &= data_hash in (None, config["dataset"]["hash"])
            return "finished" if same and not changed_code(script, run) else "new"
        return "new"
    steps = [int(path.name[11:]) for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    return f"step {max(steps)}" if steps else "new"


def in_use(run: Path) -> bool:
    """Whether a process trains in this folder: it holds the lock."""
    with contextlib.suppress(FileNotFoundError), open(run / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ==== One row ====


class Stop:
    """A signal: no new run begins, those that run are asked for a checkpoint; once more: they are killed, unless
    `patient`: schedulers repeat their signals."""

    def __init__(self, patient: bool = False):
        self.number, self.children, self.patient = 0, set(), patient

    def __call__(self, number: int, _) -> None:
        if self.number and self.patient:
            return
        text = "killing what runs" if self.number else "stopping every run with a checkpoint (once more: at once)"
        os.write(2, f"\n{text}\n".encode())  # print may be mid-line
        for child in list(self.children):
            child.kill() if self.number else child.terminate()
        self.number = number

    def run(self, words: list[str], **kwargs) -> int:
        """The status of a command; 128 + the signal's number where one ended it."""
        if self.number:
            return 128 + self.number
        # a session of its own: Ctrl-C reaches this program alone, which then asks each run once
        child = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, **kwargs)
        self.children.add(child)
        if self.number:  # it came meanwhile
            child.terminate()
        status = child.wait()
        self.children.discard(child)
        return 128 - status if status < 0 else status


def run_row(row: Row, stage_dir: str, stop: Stop, gpu: str | None = None, sharing: int = 1) -> int:
    """The status of the run, one of `sharing` on its GPU; what it prints is appended to row.log."""
    row.log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(row.command)[1:]]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    environment |= {"CLEANPIXELS_RUNS_PER_GPU": str(sharing)} if sharing > 1 else {}
    with open(row.log, "ab") as log:
        if stage_dir and row.standard:  # a set of one's own is read where it is
            try:
                words += ["--data-dir", str(stage(Path(row.data), Path(os.path.expandvars(stage_dir)).resolve()))]
            except (UserError, OSError) as error:
                log.write(f"error: --stage-dir {stage_dir}: {error}\n".encode())
                return 1
        return stop.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def stage(folder: Path, to: Path) -> Path:
    """Copies a standard set and its parts to `to`/<source>/<task>/, each whole or not at all. Returns `to`."""
    if "$" in str(to):
        raise UserError("it names a variable that is not set here")
    parts = [Path(os.path.normpath(folder / part)) for part in read_meta(folder).get("parts", [])]
    for path in [*parts, folder]:
        target = to / path.parent.parent.name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.parent / f".{target.name}.lock", wait=f"another process copies {path.name}; waiting"):
            old = target / "meta.json"
            if old.exists() and old.read_bytes() == (path / "meta.json").read_bytes():
                continue
            partial = target.with_name(f"{target.name}.partial")
            for leftover in (partial, target):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.copytree(path, partial, ignore=shutil.ignore_patterns(".lock"))
            partial.replace(target)
    return to


def log_end(log: Path) -> str:
    """The last lines of a log, for people; a progress bar counts as its newest state."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.exists() else []
    return "\n".join(f"        {line}" for line in [line for line in lines if line.strip()][-5:])


def array_task(args: Args) -> int:
    """One row of a Slurm array. USR1, two minutes before the time limit: a checkpoint, and the same task once more."""
    stop, row = Stop(patient=True), Row(**json.loads(args.row))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    if row.make and not (Path(row.data) / "meta.json").exists():
        print(f"failed {row.run}: {row.data} is missing; the log of the job that makes the sets says why", flush=True)
        return 1
    status = run_row(row, args.stage_dir, stop)
    if stop.number and status:
        print(f"stopped {row.run}", flush=True)
        if stop.number == signal.SIGUSR1:
            task = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)  # $SLURM_JOB_ID may mean all
            if subprocess.run(["scontrol", "requeue", task]).returncode:
                print(f"it is not queued again: scontrol requeue {task} failed, see above", flush=True)
    else:
        print(f"{'failed' if status else 'finished'} {row.run}\n{log_end(row.log) if status else ''}", flush=True)
    return status


# ==== All rows ====


SETS = """again='' status=0
trap 'again=yes; kill -TERM "$child"' USR1   # two minutes are left
while read -r make; do
  eval "exec $make" & child=$!
  wait "$child" || status=1
  if [[ -n $again ]]; then wait "$child"; scontrol requeue "$SLURM_JOB_ID"; exit 1; fi
done <<"SETS"
{sets}
SETS
exit $status
"""


def here(command: str) -> str:
    """A command of the list, run by this Python."""
    return shlex.join([sys.executable, *shlex.split(command)[1:]])


def submit(rows: list[Row], args: Args) -> None:
    if waiting := queued():
        print(f"note: array {waiting} is in the queue; of a row in both, the later run ends at once: in use")
    logs = ROOT / "runs" / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    head = f"#!/usr/bin/env bash\ncd {shlex.quote(str(ROOT))}\n"
    after = []
    if sets := list(dict.fromkeys(row.make for row in rows if row.make)):
        flags = ["--job-name=cleanpixels-sets", f"--output={logs}/sets-%j.log", "--requeue", "--open-mode=append"]
        script = head + SETS.format(sets="\n".join(map(here, sets)))
        job = sbatch("a job that makes the sets", script, [*flags, "--signal=B:USR1@120"], args)
        after = [f"--dependency=afterany:{job}"]  # a task whose set is missing then fails at once
        print(f"job {job} makes {len(sets)} sets")
    tasks = "\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)  # Slurm keeps a copy, inside the script
    program = shlex.join([sys.executable, str(Path(__file__).resolve()), f"--stage-dir={args.stage_dir}", "--row"])
    body = f'row=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" <<"ROWS"\n{tasks}\nROWS\n)\nexec {program} "$row"\n'
    flags = [f"--array=1-{len(rows)}" + (f"%{args.jobs}" if args.jobs else ""), "--job-name=cleanpixels", *after]
    flags += ["--requeue", "--signal=B:USR1@120", "--open-mode=append", f"--output={logs}/%A_%a.log"]
    job = sbatch(f"an array of {len(rows)} runs", head + body, flags, args)
    print(f"array {job}: {len(rows)} runs. squeue shows them; {logs}/{job}_*.log and sacct say how they ended; the "
          "same command submits what is not finished once more")  # fmt: skip


def queued() -> str:
    """The user's arrays that Slurm has not finished, separated by commas."""
    words = ["squeue", "--me", "--name=cleanpixels", "--noheader", "--format=%A"]
    with contextlib.suppress(OSError):
        return ",".join(sorted(set(subprocess.run(words, capture_output=True, text=True).stdout.split())))
    return ""


def sbatch(what: str, script: str, flags: list[str], args: Args) -> str:
    """The id of the submitted job."""
    words = ["sbatch", "--parsable", *flags, *shlex.split(args.slurm_args)]
    try:
        done = subprocess.run(words, input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch on this machine") from None
    if done.returncode:
        raise UserError(f"--slurm, {what}: {done.stderr.strip()}")  # MaxArraySize may be 1001
    return done.stdout.strip().split(";")[0]


def visible_gpus(wanted: str | None) -> list[str]:
    if wanted and not wanted.isdigit():
        return names_in("gpus", wanted)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found = [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    else:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        except OSError:
            listed = ""
        found = re.findall(r"^GPU (\d+)", listed, re.M)
    if wanted and int(wanted) > len(found):
        raise UserError(f"--gpus {wanted}: {len(found)} are visible here")
    return found[: int(wanted)] if wanted else found


def show(stream: int, lines: collections.deque) -> None:
    """Copies what arrives to stderr at once, progress bars too, and appends its lines that are not empty."""
    text = b""
    while chunk := os.read(stream, 65536):
        os.write(2, chunk)
        *ended, text = (text + chunk).replace(b"\r", b"\n").split(b"\n")
        lines.extend(line.decode(errors="replace") for line in [*ended, text] if line.strip())
    os.close(stream)


def make_sets(rows: list[Row], stop: Stop) -> dict[str, str]:
    """Makes what is missing, one set after another (each uses all cores). Returns command -> why it failed."""
    failed = {}
    for make in dict.fromkeys(row.make for row in rows if row.make):
        print(f"making a set: {make}", flush=True)
        read, write = os.pipe()  # its progress is shown and its last line kept, the reason if it fails
        lines = collections.deque(maxlen=1)
        reader = threading.Thread(target=show, args=(read, lines))
        reader.start()
        status = stop.run([sys.executable, *shlex.split(make)[1:]], stderr=write)
        os.close(write)
        reader.join()
        if stop.number:
            break
        if status:
            failed[make] = lines[-1] if lines else f"status {status}"
    return failed


def run_here(todo: list[Row], before: int, skipped: list[str], args: Args) -> int:
    """Runs what is to be done; `before` runs were finished, `skipped` says what cannot be made and why."""
    stop, gpus = Stop(), visible_gpus(args.gpus)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    unmade = make_sets(todo, stop)
    skipped = skipped + [f"{row.command}: {unmade[row.make]}" for row in todo if row.make in unmade]
    todo = [row for row in todo if row.make not in unmade]
    jobs = args.jobs or max(1, len(gpus))
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))  # else each run takes all cores
    with_gpus = f" on GPUs {', '.join(gpus)}" if gpus else ""
    print(f"{len(todo)} runs, {jobs} at a time{with_gpus}; {before} finished before", flush=True)
    waiting, results = queue.SimpleQueue(), {}
    for row in todo:
        waiting.put(row)

    def worker(k: int) -> None:
        gpu = gpus[k % len(gpus)] if gpus else "" if args.gpus == "0" else None
        while not stop.number:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                status = run_row(row, args.stage_dir, stop, gpu, -(-jobs // len(gpus)) if gpus else 1)
            except OSError as error:  # its log cannot be written
                print(f"{row.log}: {error}", flush=True)
                status = 1
            results[row.run] = "finished" if not status else "stopped" if stop.number else "failed"
            print(f"{time.strftime('%H:%M:%S')} {results[row.run]} {row.run}", flush=True)

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(min(jobs, len(todo)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = collections.Counter(results.values())
    reported = 0
    if (counts["finished"] or before) and not stop.number:
        runs_dir = ["--runs-dir", args.runs_dir] if args.runs_dir else []
        reported = subprocess.run([sys.executable, "report.py", *runs_dir], cwd=ROOT).returncode
    for reason in skipped:
        print(f"skipped {reason}")
    for row in todo:
        if results.get(row.run) == "failed":
            print(f"failed  {row.run}, the end of {row.log}:\n{log_end(row.log)}")
    left = len(todo) - counts["finished"] - counts["failed"]
    print(f"{counts['finished']} finished, {before} finished before, {len(skipped)} skipped, {left} stopped or not "
          f"begun, {counts['failed']} failed")  # fmt: skip
    if stop.number:
        return 128 + stop.number
    return int(counts["finished"] < len(todo) or bool(unmade) or reported != 0)


def main(args: Args, extra: list[str]) -> int:
    if args.row:
        return array_task(args)
    own = ("--algos", "--task", "--dataset", "--seed", "--source", "--tag", "--quick", "--runs-dir", "--overwrite",
           "--evaluate")  # fmt: skip
    if wrong := [word for word in extra if word.split("=")[0].replace("_", "-") in own]:
        raise UserError(f"{wrong[0]} behind --: each run has its own, or it is a flag of benchmark.sh; see --help")
    if args.seeds == "0" or not re.fullmatch(r"\d+(,\d+)*", args.seeds) or (args.jobs is not None and args.jobs < 1):
        raise UserError(
            f"--seeds {args.seeds} --jobs {args.jobs}: at least 1; seeds are a number, or several with commas"
        )
    try:
        shlex.split(args.slurm_args)
    except ValueError as error:
        raise UserError(f"--slurm-args {args.slurm_args}: {error}") from None
    if args.slurm and args.gpus:
        raise UserError("--gpus: under --slurm each run has its own, --slurm-args '--gres=gpu:1'")
    datasets = names_in("datasets", args.datasets)
    args.datasets = ",".join(d if d in NAMED_SETS else str(Path(d).absolute()) for d in datasets)
    os.chdir(ROOT)  # where the runs begin: other relative paths mean the same here and there
    flags = {"--source": args.source, "--tag": args.tag, "--runs-dir": args.runs_dir}
    words = [word for flag, value in flags.items() if value for word in (flag, value)] + ["--quick"] * args.quick
    rows = list_rows(args, [*words, *extra])
    if args.dry_run:
        for make in dict.fromkeys(row.make for row in rows if row.make and row.state != "finished"):
            print(make)
        for row in rows:
            print("# " * bool(row.problem) + row.command + f"  # {row.state}" * (row.state != "new"))
        return 0
    before = sum(row.state == "finished" for row in rows)
    skipped = [f"{row.command}: {row.problem}" for row in rows if row.problem]
    skipped += [f"{row.command}: another process runs it" for row in rows if row.state == "running"]
    todo = [row for row in rows if row.state not in ("finished", "running") and not row.problem]
    if not args.slurm:
        return run_here(todo, before, skipped, args)
    for reason in skipped:
        print(f"skipped {reason}")
    print(f"{before} finished before, {len(skipped)} skipped")
    if todo:
        submit(todo, args)
    return 0


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    typed = sys.argv[1:cut]
    if "--slurm-args" in typed[:-1]:  # its value begins with --
        at = typed.index("--slurm-args")
        typed[at : at + 2] = [f"--slurm-args={typed[at + 1]}"]
    sys.exit(main(tyro.cli(Args, args=typed, prog="benchmark.sh", description=__doc__), sys.argv[cut + 1 :]))
