"""Runs of all six algorithm files: what they leave, killed, continued, refused, evaluated.

Most run in this process (conftest.run_main), with networks of a few units and an environment of four steps."""

import csv
import errno
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import imageio.v2 as imageio
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, FourStepsPool, run_main, run_python, write_set

import common
import report

# Twelve updates each; of moto's 16, 5 are of the model alone, 3 offline, and 4 follow each of two episodes.
FREE = "--feature-dim 4 --hidden-dim 8 --batch-size 4 --steps 12"
WORLD = "--cnn-depth 1 --stoch 3 --deter 4 --hidden 4 --units 4 --ensemble 2 --batch-size 2 --window 5 --horizon 2"
FLAGS = {"bc": FREE, "drq_bc": FREE, "cql": FREE} | {
    "offline_dv2": f"{WORLD} --classes 3 --target-every 3 --model-steps 6 --agent-steps 6",
    "lompo": f"{WORLD} --agent-batch-size 4 --rollout-every 2 --model-steps 6 --agent-steps 6",
    "moto": f"{WORLD} --classes 3 --target-every 3 --bc-quantile 0.2 --model-first 5 --offline-steps 8"
    " --online-episodes 2 --updates-per-episode 4",
}
COMMON = "--eval-every 4 --eval-episodes 2 --log-every 1 --device cpu --precision fp32"
MODULES = {algo: importlib.import_module(algo) for algo in FLAGS}
PARTS = {algo: ["train"] if flags is FREE else ["model", "agent"] for algo, flags in FLAGS.items()}  # its metrics
PARTS["moto"] = ["model", "offline", "online"]
EACH = pytest.mark.parametrize("algo", FLAGS)
ALONE = {name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", "CLEANPIXELS_DATA")}


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> dict[str, Path]:
    """One set for the model-free files and one for the world models, of the size their decoders give."""
    folder = tmp_path_factory.mktemp("sets")
    small = write_set(folder / "set", lengths=(30, 25), size=21, task="walker-walk")
    large = write_set(folder / "large" / "set", lengths=(12, 9), size=64, task="walker-walk")
    return {algo: small if flags is FREE else large for algo, flags in FLAGS.items()}


def words_of(algo: str, sets: dict, runs: Path, *flags) -> list[str]:
    words = ["--dataset", sets[algo], "--runs-dir", runs, *FLAGS[algo].split(), *COMMON.split(), *flags]
    return [str(word) for word in words]


@pytest.fixture
def train(sets, tmp_path):
    """train(algo, *flags) is `python algos/<algo>.py <its flags above> <flags>` in this process, see run_main."""

    def call(algo, *flags, **kwargs):
        return run_main(MODULES[algo], words_of(algo, sets, tmp_path / "runs", *flags), pool=FourStepsPool, **kwargs)

    call.folder = lambda algo, name="seed0": tmp_path / "runs" / algo / "walker-walk" / "set" / name
    return call


@pytest.fixture(scope="session")
def whole(sets, tmp_path_factory):
    """whole(algo): the folder of a run that nothing interrupted."""
    runs = tmp_path_factory.mktemp("whole")

    def folder(algo: str) -> Path:
        path = runs / algo / "walker-walk" / "set" / "seed0"
        if not path.exists():
            assert run_main(MODULES[algo], words_of(algo, sets, runs), pool=FourStepsPool) is None
        return path

    return folder


def metrics_of(run: Path) -> dict[str, list[dict]]:
    """The rows of every CSV as text, without the time they took."""
    found = {}
    for file in run.glob("*.csv"):
        with open(file, newline="") as lines:
            found[file.name] = [{key: row[key] for key in row if key != "wall_s"} for row in csv.DictReader(lines)]
    return found


def read_config(run: Path) -> dict:
    return common.read(run / "config.json")


def steps_of(run: Path, part: str = "train") -> list[int]:
    return [int(row["step"]) for row in metrics_of(run)[f"{part}.csv"]]


def checkpoint_of(run: Path) -> int:
    """The step of its checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]  # refuses anything but data


def equal_weights(one: Path, two: Path) -> bool:
    ours, theirs = (torch.load(run / "weights.pt", weights_only=True) for run in (one, two))
    ours.pop("_extra_state"), theirs.pop("_extra_state")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(one: Path, two: Path) -> None:
    assert metrics_of(one) == metrics_of(two)
    assert equal_weights(one, two)
    files = [{path.name for path in run.iterdir()} for run in (one, two)]
    assert files[0] == files[1]


def line_of(error, capsys) -> str:
    """The one line with which an error ends a process."""
    capsys.readouterr()
    common.one_line_errors(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# ---- as processes ----


@EACH
def test_two_files_in_a_folder_are_enough(algo, sets, tmp_path):
    """Under another name. BC is evaluated in a real environment; the others find no simulator installed."""
    shutil.copy(ROOT / "algos" / f"{algo}.py", tmp_path / "my_idea.py")
    shutil.copy(ROOT / "common.py", tmp_path)
    words = words_of(algo, sets, tmp_path / "runs", "--eval-every", 0)
    words += ["--online-episodes", 0] if algo == "moto" else []
    if algo == "bc":
        words += ["--dataset", write_set(tmp_path / "set", (20, 20), 24, action_dim=6, task="walker-walk")]
        words += ["--eval-every", 12, "--eval-episodes", 1]
    for name in ("mujoco", "dm_control") if algo != "bc" else ():
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')")
    result = run_python("my_idea.py", *words, cwd=tmp_path, env=ALONE)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "my_idea" / "walker-walk" / "set" / "seed0"
    assert f"in {run}" in result.stdout and (run / "my_idea.py").exists()
    config = read_config(run)
    assert config["commit"] == "" and config["command"].startswith("my_idea.py --dataset ")  # there is no repository
    if algo == "bc":
        (row,) = metrics_of(run)["eval.csv"]
        assert row["step"] == "12" and 0 < float(row["score"]) == float(row["return_0"]) / 10 < 100


def test_a_mistake_ends_the_process_with_one_line_and_status_1(tmp_path):
    result = run_python(ROOT / "algos" / "bc.py", "--dataset", "expret", cwd=tmp_path, env=ALONE)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: --dataset expret: neither one of .*expert.* nor a folder\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


CHILD = "import conftest, test_runs, sys; conftest.run_main(test_runs.MODULES[sys.argv[1]], sys.argv[2:], pool=conftest"


LONGER = {"drq_bc": "--steps 80", "lompo": "--agent-steps 80", "moto": "--online-episodes 20"}


@pytest.mark.parametrize("algo", LONGER)
def test_kill_9(algo, sets, tmp_path, train):
    """A process is killed while it trains; what this one continues ends with the same bits."""
    flags, run = f"{LONGER[algo]} --eval-every 8".split(), tmp_path / "killed" / algo / "walker-walk" / "set" / "seed0"
    words = words_of(algo, sets, tmp_path / "killed", *flags)
    child = ["-c", f"{CHILD}.FourStepsPool)", algo, *words]
    env = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen([sys.executable, *child], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "eval.csv").exists() or len((run / "eval.csv").read_text().splitlines()) < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (run / "finished.json").exists()
    assert run_main(MODULES[algo], words, pool=FourStepsPool) is None
    assert train(algo, *flags) is None
    assert metrics_of(run) == metrics_of(train.folder(algo)) and equal_weights(run, train.folder(algo))


# ---- what a run leaves ----


@EACH
def test_a_run_leaves_its_files(algo, whole, sets):
    run, config = whole(algo), read_config(whole(algo))
    names = {"config.json", f"{algo}.py", "common.py", "finished.json", "weights.pt", "evaluation.mp4", ".lock"}
    names |= {f"{part}.csv" for part in [*PARTS[algo], "eval"]}
    names |= {"episodes.csv", "online", "offline.pt"} if algo == "moto" else set()
    assert {path.name for path in run.iterdir()} == names
    updates, steps = [step for part in PARTS[algo] for step in steps_of(run, part)], 16 if algo == "moto" else 12
    assert updates == list(range(1, steps + 1)) and steps_of(run, "eval")[-1] == steps
    assert json.loads((run / "finished.json").read_text()).keys() == {"steps", "wall_s"}
    for name in (f"algos/{algo}.py", "common.py"):
        assert (run / Path(name).name).read_bytes() == (ROOT / name).read_bytes()
    for row in metrics_of(run)["eval.csv"]:
        assert float(row["score"]) == pytest.approx((float(row["return_0"]) + float(row["return_1"])) / 2 / 10)
    assert config["algo"] == algo and config["resumed"] == []
    assert config["args"].keys() == config["typed"].keys() == vars(MODULES[algo].Args()).keys()
    assert config["dataset"] == common.Dataset(sets[algo]).facts()
    assert config["versions"].keys() >= {"python", "torch", "numpy", "mujoco", "dm_control"}
    assert "cores of" in config["hardware"] and "--eval-every 4" in config["command"]
    assert re.fullmatch(r"([0-9a-f]{12}(-dirty)?)?", config["commit"])


def test_another_seed_gives_other_weights(train, whole):
    assert train("bc", "--seed", 1) is None
    assert not equal_weights(train.folder("bc", "seed1"), whole("bc"))


@EACH
def test_evaluating_never_changes_the_weights(algo, train, whole):
    assert train(algo, "--eval-every", 0) is None
    assert not (train.folder(algo) / "eval.csv").exists()
    assert equal_weights(train.folder(algo), whole(algo))


@EACH
def test_evaluate_scores_a_finished_run_and_writes_a_video(algo, train, whole, tmp_path, capsys):
    shutil.copytree(whole(algo), tmp_path / "run")
    (tmp_path / "run" / "evaluation.mp4").unlink()
    assert train(algo, "--evaluate", tmp_path / "run") is None
    score = float(re.search(r"score (\S+),", capsys.readouterr().out)[1])
    expected = metrics_of(whole(algo))["eval.csv"][-1]["score"]  # the same weights on the same episodes
    assert score == pytest.approx(float(expected), abs=0.051)
    report.add_weights(tmp_path / "run", tmp_path)  # those that act, in half precision; NaN in place of the others
    acting, every = (torch.load(tmp_path / name / "weights.pt") for name in (f"runs/{algo}", "run"))
    others = {name: value * torch.nan for name, value in every.items() if name not in {*acting, "_extra_state"}}
    torch.save(acting | others, tmp_path / "runs" / algo / "weights.pt")
    assert run_main(MODULES[algo], ["--evaluate", str(tmp_path / "runs" / algo)], pool=FourStepsPool) is None
    assert float(re.search(r"score (\S+),", capsys.readouterr().out)[1]) == pytest.approx(score, abs=0.051)
    assert "--seed would change nothing" in line_of(train(algo, "--evaluate", tmp_path / "run", "--seed", 7), capsys)
    with imageio.get_reader(tmp_path / "run" / "evaluation.mp4") as video:
        assert video.count_frames() in (4, 5)  # moto's also shows the last state


def test_evaluate_of_what_is_no_finished_run(train, whole, tmp_path, capsys):
    for algo in ("cql", "moto"):  # moto has other flags
        assert f"is a run of bc.py, not of {algo}.py" in line_of(train(algo, "--evaluate", whole("bc")), capsys)
    train("bc", crash=6)
    run = train.folder("bc")
    assert "weights.pt is missing or damaged" in line_of(train("bc", "--evaluate", run), capsys)
    (run / "weights.pt").write_bytes(b"half")
    assert "weights.pt is missing or damaged" in line_of(train("bc", "--evaluate", run), capsys)
    (run / "config.json").write_text('{"algo": "bc"')
    for name in (run, tmp_path):
        assert "config.json is missing or damaged" in line_of(train("bc", "--evaluate", name), capsys)


# ---- killed and continued ----

# A checkpoint is at every fourth update. Each row dies before an update, twice in the same phase.
DEATHS = [("bc", 3), ("bc", 7), ("drq_bc", 7), ("cql", 7)]  # 3: before there is one
DEATHS += [(algo, first) for algo in ("offline_dv2", "lompo") for first in (6, 8, 11)]  # model, model to agent, agent
DEATHS += [("moto", first) for first in (5, 7, 9, 11, 15)]  # model, offline, right after an episode, in its updates


@pytest.mark.parametrize("algo, first", DEATHS)
def test_a_killed_run_continues_bit_by_bit(algo, first, train, whole):
    for crash in (first, 2):
        assert isinstance(train(algo, crash=crash), KeyboardInterrupt)
    assert train(algo) is None
    assert_same_run(train.folder(algo), whole(algo))


def writes(patch, at: int, name: str = "", full: bool = False) -> None:
    """What happens to the at-th file that is opened for writing in a run's folder (of those whose name begins so): it
    is killed while it is written; if `full`, there is no room for it and for all later ones."""
    original, count = open, 0

    def counted(file, mode="r", *args, **kwargs):
        nonlocal count
        if set(mode) & set("wax+") and "/runs/" in str(file) and Path(file).name.startswith(name):
            count += 1
            if count >= at and full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            if count == at:
                with original(file, mode, *args, **kwargs) as half:
                    half.write(b"half" if "b" in mode else "1,2")
                raise KeyboardInterrupt
        return original(file, mode, *args, **kwargs)

    patch.setattr("builtins.open", counted)


def test_killed_while_any_file_is_written(train, tmp_path, monkeypatch):
    """Copies of the code, configuration, rows, checkpoints, weights, the end: after each kill the run continues."""
    flags = ["--steps", 8, "--log-every", 4, "--tag"]
    assert train("bc", *flags, "whole") is None
    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            writes(patch, number)
            ended = train("bc", *flags, number)
        if ended is None:
            break
        assert train("bc", *flags, number) is None
        assert_same_run(train.folder("bc", f"{number}-seed0"), train.folder("bc", "whole-seed0"))
    assert number > 3 + 4 + 1 + 2  # begin(), rows, one checkpoint, the end


DISK = [("common.py", 1, None), ("train.csv", 6, 4), ("checkpoint.pt", 2, 4), ("weights.pt", 1, 8), ("finished", 1, 8)]


@pytest.mark.parametrize("name, at, kept", DISK)
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(name, at, kept, train, whole, monkeypatch, capsys):
    run = train.folder("bc")
    with monkeypatch.context() as patch:
        writes(patch, at, name, full=True)
        line = line_of(train("bc"), capsys)
    assert "No space left on device" in line and str(run / name) in line
    assert (checkpoint_of(run) if (run / "checkpoint.pt").exists() else None) == kept
    assert train("bc") is None
    assert_same_run(run, whole("bc"))


@pytest.mark.parametrize("algo, number", [("bc", signal.SIGINT), *((algo, signal.SIGTERM) for algo in FLAGS)])
def test_a_signal_leaves_a_checkpoint_of_that_very_step(algo, number, train, whole, capsys):
    """Between two rows of metrics, too."""

    def update(original, count, *args):
        if count == 7:
            os.kill(os.getpid(), number)
        return original(*args)

    stopped = train(algo, "--log-every", 100, update=update)
    assert isinstance(stopped, SystemExit) and stopped.code == 128 + number
    assert "stopped at step 7 with a checkpoint; the same command (without --overwrite)" in capsys.readouterr().out
    run = train.folder(algo)
    assert checkpoint_of(run) == 7
    assert max(step for part in PARTS[algo] if (run / f"{part}.csv").exists() for step in steps_of(run, part)) == 7
    assert train(algo) is None
    assert equal_weights(run, whole(algo))


def test_a_damaged_checkpoint_is_one_line(train, whole, capsys):
    train("bc", crash=6)
    file = train.folder("bc") / "checkpoint.pt"
    content = file.read_bytes()
    for damaged in (content[:1000], b"", b"no zip"):
        file.write_bytes(damaged)
        assert f"{file} is missing or damaged (" in line_of(train("bc"), capsys)
    file.write_bytes(content)  # nothing else was lost
    assert train("bc") is None
    assert_same_run(train.folder("bc"), whole("bc"))


# ---- numbers that are not finite ----


NOT_FINITE = [(algo, every, 8, 4) for algo in FLAGS for every in (1, 100)] + [("bc", 1, 6, 4), ("bc", 100, 12, 8)]


@pytest.mark.parametrize("algo, every, bad, kept", NOT_FINITE)
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_term(algo, every, bad, kept, train, capsys):
    """At every row, and where there is none before every checkpoint and the end."""
    name = "critic/loss" if algo in ("drq_bc", "cql") else "actor/loss"

    def update(original, count, *args):
        metrics = original(*args)
        return metrics | {name: torch.tensor(float("nan"))} if count == bad else metrics

    line = line_of(train(algo, "--log-every", every, update=update), capsys)
    run = train.folder(algo)
    assert f"{name} not finite at step {bad}; {run} keeps the checkpoint before" in line
    assert checkpoint_of(run) == kept and not (run / "weights.pt").exists()
    assert train(algo, "--log-every", every) is None  # the same command continues from there


# ---- the same folder ----


@EACH
def test_a_finished_run_says_so(algo, train, whole, sets, monkeypatch, capsys):
    """Also to those who write the path of its set in another way."""
    shutil.copytree(whole(algo), train.folder(algo))
    before = {path: path.read_bytes() for path in train.folder(algo).glob("*.*")}
    monkeypatch.chdir(sets[algo].parent)
    for name in (sets[algo], f"{sets[algo]}/", "set", "./set/"):
        ended = train(algo, "--dataset", name)
        assert isinstance(ended, SystemExit) and ended.code == 0
        assert f"{train.folder(algo)} is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in train.folder(algo).glob("*.*")} == before


REFUSED = [
    ("bc", "--lr 0.01", "--lr 0.0001 -> 0.01"),
    ("bc", "--batch-size 5 --bc-noise", "--batch-size 4 -> 5, --bc-noise False -> True"),
    ("bc", "--steps 11", "--steps 12 -> 11"),
    ("bc", "--eval-every 0", "--eval-every 4 -> 0"),
    ("offline_dv2", "--model-steps 7", "--model-steps 6 -> 7"),
    ("moto", "--bc-filter all", "--bc-filter return -> all"),
]


@pytest.mark.parametrize("algo, flags, named", REFUSED)
def test_other_flags_are_refused_and_named(algo, flags, named, train, capsys):
    train(algo, crash=6)
    before = {path: path.read_bytes() for path in train.folder(algo).glob("*.*")}
    line = line_of(train(algo, *flags.split()), capsys)
    assert f"holds another run: {named}. Give this one a --tag, or --overwrite" in line
    assert {path: path.read_bytes() for path in train.folder(algo).glob("*.*")} == before


def test_other_data_and_a_changed_script_are_refused(train, tmp_path, capsys):
    train("bc", crash=6)
    other = write_set(tmp_path / "other" / "set", lengths=(30, 25), size=21, seed=1, task="walker-walk")
    assert " data " in line_of(train("bc", "--dataset", other), capsys)
    config = read_config(train.folder("bc")) | {"script": "0123456789ab"}
    (train.folder("bc") / "config.json").write_text(json.dumps(config))
    assert "bc.py (diff it with the copy there) 0123456789ab -> " in line_of(train("bc"), capsys)


def test_flags_that_change_no_number_may_differ(train, whole, tmp_path):
    train("bc", crash=6)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    flags = ["--runs-dir", tmp_path / "moved", "--data-dir", tmp_path, "--log-every", 2, "--buffer-device", "cpu"]
    assert train("bc", *flags) is None
    run = tmp_path / "moved" / train.folder("bc").relative_to(tmp_path / "runs")
    assert steps_of(run) == [1, 2, 3, 4, 6, 8, 10, 12]
    assert equal_weights(run, whole("bc"))


def test_steps_may_grow_while_the_run_is_unfinished(train, capsys):
    assert train("drq_bc", "--steps", 16, "--tag", "whole") is None
    train("drq_bc", crash=6)
    assert train("drq_bc", "--steps", 16) is None
    assert_same_run(train.folder("drq_bc"), train.folder("drq_bc", "whole-seed0"))
    assert "--steps 16 -> 20" in line_of(train("drq_bc", "--steps", 20), capsys)  # optimisers are gone


def test_overwrite_starts_anew(train):
    assert train("bc") is None
    (train.folder("bc") / "open-loop.mp4").touch()
    assert train("bc", "--steps", 8, "--lr", "0.01", "--overwrite") is None
    assert steps_of(train.folder("bc")) == list(range(1, 9))
    assert read_config(train.folder("bc"))["args"]["lr"] == 0.01
    assert not (train.folder("bc") / "open-loop.mp4").exists()


def test_a_folder_in_use_is_refused(train, capsys):
    train.folder("bc").mkdir(parents=True)
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); input()"
    words = [sys.executable, "-c", hold, train.folder("bc") / ".lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        assert "is in use by another process" in line_of(train("bc"), capsys)
        holder.communicate("\n")
    assert not (train.folder("bc") / "config.json").exists()
    assert train("bc") is None
    filelock.FileLock(train.folder("bc") / ".lock").acquire(timeout=0)  # given back at the end


# ---- flags ----


RANGES = """bc --hidden-dim 0; bc --batch-size 0; bc --log-every 0; bc --eval-episodes 0; bc --eval-every -1;
bc --seed -1; bc --lr nan; bc --lr -1; bc --transitions 0; drq_bc --gamma 5; drq_bc --gamma -1; drq_bc --gamma nan;
drq_bc --tau 1.5; drq_bc --nstep 0; cql --cql-samples 0; cql --cql-alpha -1; offline_dv2 --horizon 1;
offline_dv2 --ensemble 0; lompo --agent-batch-size 1; lompo --rollout-noise -1; moto --kl-balance 1.1; moto --window 1;
moto --bc-quantile 2; cql --image-size 14"""
MISTAKES = [
    ("bc", "--steps 0", "no updates are asked for"),
    ("bc", "--tag ../../x", "--tag ../../x: letters, digits, - and _"),
    ("bc", "--tag .x", "--tag .x: letters"),
    ("bc", "--transitions 50", "--transitions, --data-seed, --distraction, --shifted, --bodies: only standard sets"),
    ("bc", "--dataset .", ". is no whole set"),
    ("bc", "--evaluate=", "--evaluate: no folder is named"),
    ("bc", "--buffer-device cuda", "there is no CUDA device here"),
    ("bc", "--dataset expert --source vd4rl --data-dir /nowhere", "vd4rl.py import --help"),
    ("drq_bc", "--nstep 31", "no episode is long enough for --nstep 31"),
    ("offline_dv2", "--window 14", "no episode is long enough for --window 14"),
]
MISTAKES += [(*line.split(maxsplit=1), ": from ") for line in RANGES.split(";")]
MISTAKES += [] if torch.cuda.is_available() else [("bc", "--device cuda", "there is no CUDA device here")]


@pytest.mark.parametrize("algo, flags, message", MISTAKES)
def test_bad_flags_are_one_line(algo, flags, message, train, tmp_path, capsys):
    line = line_of(train(algo, *flags.split()), capsys)
    assert message in line and (message != ": from " or line.startswith(f"error: {flags}"))
    assert not list(tmp_path.rglob("config.json"))


def test_an_unknown_task_is_one_line(train, tmp_path, capfd):
    """Of the command that would make its set, whose status is handed on."""
    ended = train("bc", "--task", "walker-fly", "--dataset", "random", "--data-dir", tmp_path)
    assert isinstance(ended, SystemExit) and ended.code == 1
    assert re.search(r"^error: --task walker-fly: .*walker-walk.*$", capfd.readouterr().err, re.M)
    assert not list(tmp_path.rglob("seed0"))


def test_sets_that_one_cannot_evaluate_on(train, tmp_path, capsys):
    """A task that is not there, other actions than the task's, a task without an end; then the correction works."""
    for task, action_dim, pool in (("own", 2, None), ("walker-walk", 3, None), ("lqr-lqr_2_1", 1, common.EnvPool)):
        name = write_set(tmp_path / task, (20, 20), 21, action_dim, task=task)
        words = ["--dataset", name, "--runs-dir", tmp_path / "runs", *FREE.split(), "--device", "cpu", "--eval-every"]
        line = line_of(run_main(MODULES["bc"], [*words, 4], pool=pool or FourStepsPool), capsys)
        assert re.search(f"is of task {task} with {action_dim} action.*--eval-every 0|lqr_2_1: it has no end", line)
        assert run_main(MODULES["bc"], [*words, 0]) is None


TUNED = {
    ("walker-walk", "expert"): {"lr": 0.4},
    ("walker-walk", "*"): {"lr": 0.3, "batch_size": 512},
    ("walker-*", "*"): {"lr": 0.25, "nstep": 2},
    ("*", "expert"): {"lr": 0.2, "batch_size": 64},
    ("*", "*"): {"lr": 0.1},
}
QUICK = {("*", "*"): {"batch_size": 32, "steps": 100}, ("walker-walk", "*"): {"steps": 50}}


MERGED = [
    ("", 0.1, 256, None),
    ("--task walker-run", 0.25, 256, None),
    ("--task walker-walk", 0.3, 512, None),
    ("--dataset expert", 0.2, 64, None),
    ("--dataset=expert --task=walker-walk", 0.4, 512, None),  # the most exact entry wins, the others add
    ("--lr 0.5 --task walker-walk --dataset expert", 0.5, 512, None),  # what was typed wins, wherever it stands
    ("--quick", 0.1, 32, 100),
    ("--quick --task walker-walk", 0.3, 32, 50),  # over the tuned value
    ("--batch-size 8 --quick --steps 7", 0.1, 8, 7),
    ("--quick --batch_size 256", 0.1, 256, 100),  # also where it is the default
]


@pytest.mark.parametrize("line, lr, batch_size, steps", MERGED)
def test_tuned_and_quick_values_are_merged_and_typed_flags_win(line, lr, batch_size, steps):
    args = common.typed_args(MODULES["cql"].Args, TUNED, QUICK, line.split())
    assert (args.lr, args.batch_size, args.steps) == (lr, batch_size, steps)
    assert args.nstep == (2 if args.task.startswith("walker") else 3)
    assert (args.typed["lr"], args.typed["steps"], args.typed["device"]) == (lr, steps, "auto")


@EACH
def test_every_tuned_and_quick_name_is_a_flag(algo):
    module = MODULES[algo]
    for table in (module.TUNED, module.QUICK):
        assert all(len(key) == 2 and entry.keys() <= vars(module.Args()).keys() for key, entry in table.items())
