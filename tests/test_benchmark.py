"""benchmark.sh: the list, runs side by side, failures, Ctrl-C. Most of it runs in this process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
from conftest import ENVIRONMENT, ROOT, write_set

import common
from common import UserError

sys.path.append(str(ROOT / "benchmarks"))
import run_all  # noqa: E402

SHORT = ["--steps", 4, "--batch-size", 4, "--eval-every", 0, "--device", "cpu", "--feature-dim", 8, "--hidden-dim", 8]
# To the list an algorithm with bc.py's flags, which fails as soon as it runs.
BAD = """import sys
if __name__ == "__main__":
    sys.exit("no good")
from bc import QUICK, TUNED, Args
"""
# Stands in for report.py: notes its words, and that no other one begins before its end.
REPORT = """import sys, time
for word in ("begin", "end"):
    with open("report.txt", "a") as file:
        print(word, *sys.argv[1:], file=file)
    time.sleep(0.5)
"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A checkout of what benchmark.sh needs, with the algorithms bc and bad, to which run_all in this process belongs.
    The signals that it handles are given back."""
    path, numbers = tmp_path / "repo", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    (path / "algos").mkdir(parents=True)
    for name in ("common.py", "benchmark.sh", "algos/bc.py"):
        shutil.copy(ROOT / name, path / name)
    shutil.copytree(ROOT / "benchmarks", path / "benchmarks")
    (path / "data").symlink_to(ROOT / "data")
    (path / "algos" / "bad.py").write_text(BAD)
    (path / "report.py").write_text(REPORT)
    monkeypatch.setattr(run_all, "ROOT", path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # bc.py puts this checkout there, with its report.py
    monkeypatch.chdir(path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "CLEANPIXELS_DATA", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    handlers = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield path
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture
def own(tmp_path) -> Path:
    """A set of one's own, of no task that could be evaluated in."""
    return write_set(tmp_path / "own", (60, 40), 21)


@pytest.fixture
def benchmark(repo, capfd):
    """./benchmark.sh <words>, in this process. Returns its status and the lines it prints."""

    def call(*words) -> tuple[int, list[str]]:
        capfd.readouterr()
        status = run_all.main([str(word) for word in words])
        return status, capfd.readouterr().out.splitlines()

    return call


def interrupt_when(condition) -> None:
    """Ctrl-C as soon as the condition holds, within a minute, while the test goes on."""

    def wait() -> None:
        for _ in range(3000):
            if condition():
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)

    threading.Thread(target=wait).start()


# ---- the list ----


def test_the_whole_table(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "ROOT", ROOT)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CLEANPIXELS_DATA", str(tmp_path))
    _, lines = benchmark("--dry-run", "--runs-dir", tmp_path / "runs")
    files = len(list((ROOT / "algos").glob("*.py")))
    runs = [line for line in lines if line.startswith("python algos/")]
    sets = [line for line in lines if line.startswith("python data/collect.py")]
    assert lines == [*sets, *runs, f"# {len(runs)} runs: {len(runs)} to do; {len(sets)} sets to make"]
    assert len(runs) == files * 3 * 5 * 6
    assert len(set(sets)) == len(sets) == 3 * 5 * 2  # each once, at 84 and at 64 px
    line = f"python algos/drq_bc.py --task cheetah-run --dataset medexp --seed 5 --runs-dir {tmp_path / 'runs'}"
    assert line in runs and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, ends", [
    ("--seeds 3,11, --quick", ["--seed 3 --quick", "--seed 11 --quick"]),
    ("--seeds 1 --tag a -- --lr 3e-4", ["--seed 0 --tag a --lr 3e-4"]),
    ("--seeds 1 --source vd4rl",
     ["--seed 0 --source vd4rl  # impossible: the official files are not there; import them with data/vd4rl.py"]),
])  # fmt: skip
def test_filters(benchmark, words, ends):
    filters = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random", *words.split()]
    lines = [line.removeprefix("# ") for line in benchmark("--dry-run", *filters)[1] if "algos/" in line]
    assert lines == ["python algos/bc.py --task walker-walk --dataset random " + end for end in ends]


MISTAKES = {
    "--algos ,": "name no run",
    "--algos nope": "no algos/nope.py; there are bad, bc",
    "--seeds 0": "--seeds 0 --jobs None: at least 1",
    "--seeds 3-5": "--seeds 3-5",
    "--seeds 3,11,3": "which seeds, each once: 3,4 or 3,",
    "-- --overwrite": "--overwrite behind --",
    "-- --seed=3": "--seed=3 behind --",
    "--gpus 9": "--gpus 9: a number of GPUs, or ids: 0,2. There are: none",
    "--gpus x": "--gpus x: a number of GPUs",
    "--gpus 1 --slurm": "--gpus: under --slurm each run has its own",
    "--datasets exprt": "--datasets exprt: neither one of random, mixed, medium, medexp, expert, ranexp, demos",
    "--tasks walker_walk": "--task walker_walk: no such task (meant walker-walk?)",
    "--tasks juggling": "no such task. There are: acrobot-swingup, ",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(benchmark, words):
    with pytest.raises(UserError, match=re.escape(MISTAKES[words])):
        benchmark("--dry-run", *words.split())


def test_where_a_run_stands(benchmark, own, tmp_path):
    """Finished is what has the same flags and data; the folder is as a run by hand leaves it."""
    bc, run = run_all.load("bc"), tmp_path / "runs" / "bc" / "own" / "own" / "seed0"
    run.mkdir(parents=True)
    by_hand = ["--dataset", f"{own}/", "--runs-dir", str(tmp_path / "runs"), "--log-every", "7", "--lr", "0.5"]
    config = {"algo": "bc", "script": "", "args": {}, "dataset": {"hash": common.Dataset(own).hash}, "resumed": []}
    config["typed"] = common.typed_args(bc.Args, bc.TUNED, bc.QUICK, by_hand).typed

    def state(*words, config=config) -> str:
        (run / "config.json").write_text(json.dumps(config))
        flags = ["--algos", "bc", "--seeds", 1, "--datasets", own, "--runs-dir", tmp_path / "runs"]
        return benchmark("--dry-run", *flags, "--", *words)[1][-1].partition(": ")[2].partition(";")[0]

    assert state("--lr", 0.5) == "1 to continue"
    with filelock.FileLock(run / ".lock"):
        assert state("--lr", 0.5) == "1 running elsewhere"
    (run / "finished.json").write_text("{}")
    assert state("--lr", 0.5) == "1 finished"
    assert state() == state("--lr", 0.25) == state("--lr", 0.5, "--steps", 9) == "1 to continue"
    assert state("--lr", 0.5, config=config | {"dataset": {"hash": "of another set"}}) == "1 to continue"
    assert state("--lr", 0.5, config="damaged") == "1 to do"


# ---- on this machine ----


def test_gpus_take_turns_and_render(repo, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,8")
    known = subprocess.CompletedProcess([], 0), subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda words, env, **_: known[env["MUJOCO_EGL_DEVICE_ID"] == "7"])
    names = ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID", "CLEANPIXELS_RUNS_PER_GPU")

    def places(**flags) -> list[tuple]:
        return [tuple(map(place.get, names)) for place in run_all.places_of(run_all.Args(**flags))]

    assert places(gpus="2", jobs=3) == [("4", "4", "2"), ("7", None, "2"), ("4", "4", "2")]
    assert places(gpus="8,4") == [("8", "8", "1"), ("4", "4", "1")]
    assert places(gpus="0", jobs=2) == [("", None, None)] * 2
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")  # the user's stays
    assert places(gpus="7,8") == [("7", "1", "1"), ("8", "1", "1")]


def test_sets_are_made_failures_named_and_the_rest_goes_on(repo, benchmark, monkeypatch, tmp_path):
    """The runs read a copy of the set; hopper-hop has no policy; the second call leaves alone what has finished."""
    monkeypatch.setenv("NODE", str(tmp_path / "node"))
    words = ["--algos", "bad,bc", "--tasks", "walker-walk,hopper-hop", "--datasets", "medium", "--seeds", 1]
    words += ["--runs-dir", tmp_path / "runs", "--stage-dir", "$NODE/a b"]
    words += ["--", *SHORT, "--transitions", 500, "--data-dir", tmp_path / "data"]
    status, lines = benchmark(*words)
    text, place = "\n".join(lines), "walker-walk/medium-84px-500"
    assert status == 1, text
    assert lines[0] == "# 4 runs: 2 to do, 2 impossible; 1 sets to make" and text.count("making a set: ") == 1
    run, log = tmp_path / "runs" / "bc" / place / "seed0", tmp_path / "runs" / "bad" / place / "seed0.log"
    assert f"started {run}\n" in text and f"finished {run}; 0 running, 0 waiting" in text
    assert json.loads((run / "config.json").read_text())["args"]["data_dir"] == str(tmp_path / "node" / "a b")
    assert f": the end of {log}:\n        no good\n" in text
    assert sum(line.startswith("impossible: ") and "hopper-hop" in line.rpartition(": ")[2] for line in lines) == 2
    assert lines[-1] == "4 runs: 1 failed, 1 finished, 2 impossible"
    assert (repo / "report.txt").read_text().startswith(f"begin --runs-dir {tmp_path / 'runs'}\n")
    assert benchmark(*words)[1][0] == "# 4 runs: 1 to do, 1 finished, 2 impossible; 0 sets to make"


def test_a_set_that_cannot_be_made(benchmark, monkeypatch, tmp_path):
    script = tmp_path / "make.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(common, "standard_set", lambda args, _: (tmp_path / args.dataset, [str(script), args.dataset]))
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random,medium", "--seeds", 1]
    status, lines = benchmark(*words, "--runs-dir", tmp_path / "runs")
    assert status == 1 and lines[-1] == "2 runs: 2 failed"
    assert sum(line.endswith(": its set could not be made, see above") for line in lines) == 2


def rows(run: Path) -> int:
    """How many updates are in train.csv."""
    file = run / "train.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


def test_stopping_leaves_checkpoints_and_the_next_call_continues(benchmark, own, monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "PROGRESS_SECONDS", 0.5)
    words = ["--algos", "bc", "--datasets", own, "--seeds", 3, "--jobs", 2, "--runs-dir", tmp_path / "runs"]
    words += ["--", *SHORT, "--steps", 100_000, "--log-every", 1]
    runs, before = [tmp_path / "runs" / "bc" / "own" / "own" / f"seed{seed}" for seed in range(3)], [0, 0]
    for _ in range(2):
        interrupt_when(lambda before=before: all(rows(run) > n + 20 for run, n in zip(runs, before)))
        status, lines = benchmark(*words)
        assert status == 130 and lines[-1] == "3 runs: 2 to continue, 1 to do" and not runs[2].exists()
        assert any(re.fullmatch(rf"    (starting|step \d+/100000)  {runs[0]}", line) for line in lines)
        logs = [Path(f"{run}.log").read_text() for run in runs[:2]]
        assert all("with a checkpoint" in log and ("continuing" in log) == (before != [0, 0]) for log in logs)
        before = [rows(run) for run in runs[:2]]


def test_two_equal_ones_at_once(repo, own, tmp_path):
    """Each run is made once, none is called failed, the reports do not collide. A mistake is one line, and status 1."""
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # `python` is this one
    words = ["--algos", "bc", "--datasets", own, "--seeds", 2, "--runs-dir", tmp_path / "runs", "--", *SHORT]
    command, flags = [repo / "benchmark.sh", *map(str, words)], {"cwd": tmp_path, "env": environment, "text": True}
    both = [subprocess.Popen([*command, "--steps", "300"], stdout=subprocess.PIPE, **flags) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert not any("failed" in output for output in outputs)
    logs = [log.read_text() for log in tmp_path.glob("runs/bc/own/own/*.log")]
    assert len(logs) == 2 and all(log.count("\nfinished: ") == 1 for log in logs)
    assert [line.split()[0] for line in (tmp_path / "report.txt").read_text().splitlines()] == ["begin", "end"] * 2
    done = subprocess.run([*command, "--seed", "1"], capture_output=True, **flags)
    assert done.returncode == 1 and re.fullmatch("error: --seed behind --.*\n", done.stderr)
