"""The rows of the table, for benchmark.sh: every algorithm x task x set x seed, with where each one stands.

    python benchmarks/rows.py --algos drq_bc cql --tasks walker-walk --datasets medium expert --seeds 0 1 2
    python benchmarks/rows.py --stage datasets/made/walker-walk/medexp-84px /tmp/node    # the set and its parts

A row is one line of five fields, separated by the character 0x1F:
    state     new; "step N" where a checkpoint is; finished; "impossible: why"
    run       the run's folder
    set       the set's folder
    make      the command that makes the set, empty where it is there
    command   the run's command, from the repository's root
Words after `--` go to every command. Nothing here is known by an algorithm's name: a file's own Args, TUNED and QUICK
are read, so a user's own algos/my_idea.py is a row like any other."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from collect import PARTS, policy_file  # noqa: E402

from common import (  # noqa: E402
    FREE_FLAGS,
    STANDARD_SETS,
    UserError,
    collect_flags,
    lock_file,
    one_line_errors,
    read_meta,
    run_folder,
    set_folder,
    typed_args,
)

TASKS = ("walker-walk", "cheetah-run", "humanoid-walk")


@dataclass
class Args:
    algos: tuple[str, ...] = ()  # files in algos/ without .py; none: all
    tasks: tuple[str, ...] = TASKS  # dm_control domain-task
    datasets: tuple[str, ...] = STANDARD_SETS  # or paths of sets
    seeds: tuple[int, ...] = tuple(range(6))
    stage: tuple[str, ...] = ()  # SET FOLDER: copy the set and its parts to FOLDER, print the --data-dir to use


def module_of(algo: str):
    path = ROOT / "algos" / f"{algo}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "algos").glob("*.py")))
        raise UserError(f"--algos {algo}: there is no {path.relative_to(ROOT)}; there are {known}")
    spec = importlib.util.spec_from_file_location(algo, path)
    module = sys.modules[algo] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_of(algo: str, task: str, dataset: str, seeds: tuple[int, ...], extra: list[str]):
    """Yields (state, run, set, make, command) of each seed."""
    module = module_of(algo)
    words = ["--task", task, "--dataset", dataset]
    args = typed_args(module.Args, module.TUNED, module.QUICK, [*words, *extra])
    make, problem, source = "", "", args.source
    if dataset in STANDARD_SETS:
        size = re.search(r"open_dataset\(args, size=(\d+)", Path(module.__file__).read_text())
        if not size:
            raise UserError(f"algos/{algo}.py has no open_dataset(args, size=N) to read the size of its images from")
        size = int(size[1])
        folder = set_folder(args.data_dir, source, task, dataset, size, args.transitions, args.data_seed)
        if not (folder / "meta.json").exists():
            make, problem = how_to_make(args, size, folder)
    else:
        folder = Path(dataset)
        meta = read_meta(folder)
        meta = read_meta(folder / meta["parts"][0]) if "parts" in meta else meta
        args.task, source = meta["task"], meta["source"]
    for seed in seeds:
        args.seed = seed
        run = run_folder(args, algo, folder.name, source)
        command = shlex.join(["python", f"algos/{algo}.py", *words, "--seed", str(seed), *extra])
        state = state_of(run, args)
        yield f"impossible: {problem}" if problem and state != "finished" else state, run, folder, make, command


def how_to_make(args, size: int, folder: Path) -> tuple[str, str]:
    """The command that makes a standard set, or why there is none."""
    if args.source != "made":
        return "", f"{folder} does not exist; import the official files with data/vd4rl.py"
    try:
        for name in PARTS if args.dataset == "medexp" else (args.dataset,):
            if name != "random":
                policy_file(args.task, name)
    except UserError as error:
        return "", str(error)
    return shlex.join(["python", "data/collect.py", *collect_flags(args, size)]), ""


def state_of(run: Path, args) -> str:
    if (run / "finished.json").exists():
        had = json.loads((run / "config.json").read_text())["args"]
        asked = {name: value for name, value in vars(args).items() if value not in (None, "auto")}
        if all(had.get(name) == value for name, value in asked.items() if name not in FREE_FLAGS):
            return "finished"
        return "new"  # with other flags: the command says which
    steps = [int(path.name.split("-")[1]) for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    return f"step {max(steps)}" if steps else "new"


def stage(folder: Path, to: Path) -> Path:
    """Copies a set and its parts to `to`/<source>/<task>/, each whole or not at all. Returns `to`."""
    folder = folder.resolve()
    parts = [(folder / part).resolve() for part in read_meta(folder).get("parts", [])]
    for path in [*parts, folder]:
        target = to / path.parent.parent.name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.parent / f".{target.name}.lock", wait=f"another process copies {path.name}; waiting"):
            if not target.exists():
                partial = target.with_name(f"{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(path, partial, ignore=shutil.ignore_patterns(".lock"))
                os.replace(partial, target)
    return to


def main(args: Args, extra: list[str]) -> None:
    if args.stage:
        print(stage(Path(args.stage[0]), Path(args.stage[1])))
        return
    algos = args.algos or tuple(sorted(file.stem for file in (ROOT / "algos").glob("*.py")))
    seen = set()  # a set that is given by its path has one task, whatever --tasks says
    for task, dataset, algo in itertools.product(args.tasks, args.datasets, algos):
        for state, run, *rest in rows_of(algo, task, dataset, args.seeds, extra):
            if run not in seen:
                print(state, run, *rest, sep="\x1f")
            seen.add(run)


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
