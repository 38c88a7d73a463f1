"""Whole runs through the command line: killed, stopped, continued, refused. Most train a small network on 21 px frames.

A run that is meant to be real is a process of its own; what only needs main() runs in this one, which saves imports."""

import contextlib
import csv
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bc
import cql
import drq_bc
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run_main, run_python, synthetic_episode, write_set

import common
from common import UserError

ALGOS = {"bc": bc, "drq_bc": drq_bc, "cql": cql}
EACH = pytest.mark.parametrize("algo", ALGOS)
EVERY_STEP = ["--device", "cpu", "--log-every", 1]
SMALL = ["--hidden-dim", 16, "--feature-dim", 8, "--batch-size", 4, "--eval-every", 0, *EVERY_STEP]
TINY = ["--task", "walker-walk", "--dataset", "random", "--transitions", 1000, "--batch-size", 8, *EVERY_STEP]
CHILD = {name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", "CLEANPIXELS_DATA")}


@pytest.fixture(scope="session")
def own_set(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("own") / "robot", lengths=(30, 25), size=21)


@pytest.fixture
def train(own_set, tmp_path):
    """train(algo, *flags) is `python algos/<algo>.py --dataset <own_set> --runs-dir <tmp>/runs <SMALL> <flags>`, here:
    see run_main."""

    def call(algo, *flags, crash=None, update=None):
        words = ["--dataset", own_set, "--runs-dir", tmp_path / "runs", *SMALL, *flags]
        return run_main(ALGOS[algo], words, crash=crash, update=update)

    call.folder = lambda algo, name="seed0": tmp_path / "runs" / algo / "own" / "robot" / name
    return call


def column(path: Path, name: str) -> list[str]:
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def steps_of(run: Path, part: str = "train") -> list[int]:
    return [int(step) for step in column(run / f"{part}.csv", "step")]


def metrics_of(run: Path) -> list[dict]:
    """The rows of train.csv as text, without the time they took."""
    with open(run / "train.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "wall_s"} for row in csv.DictReader(file)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    weights = torch.load(run / "weights.pt", weights_only=True)
    return {name: value for name, value in weights.items() if name != "_extra_state"}


def equal_weights(one: Path, two: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint*"))


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """It failed with a single line on stderr that holds the words."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# ---- from the command line, with rendered data and evaluations ----


@pytest.fixture(scope="module")
def evaluated(tiny_set, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """DrQ+BC as published but for 6 steps and 3 evaluations, started from another working directory."""
    runs, elsewhere = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("elsewhere")
    flags = ["--steps", 6, "--eval-every", 2, "--eval-episodes", 2, "--runs-dir", runs]
    script = ROOT / "algos" / "drq_bc.py"
    result = run_python(script, *TINY, *flags, "--data-dir", tiny_set.parents[2], cwd=elsewhere, env=CHILD)
    assert result.returncode == 0, result.stderr
    assert list(elsewhere.iterdir()) == []
    return runs / "drq_bc" / "walker-walk" / "random-84px-1000" / "seed0", result


def test_a_run_leaves_its_files(evaluated):
    run, result = evaluated
    names = {"config.json", "drq_bc.py", "common.py", "finished.json", "weights.pt", "tensorboard", "evaluation.mp4"}
    assert {path.name for path in run.iterdir()} == names | {"train.csv", "eval.csv", ".lock"}
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert steps_of(run, "eval") == [2, 4, 6]
    scores = [float(score) for score in column(run / "eval.csv", "score")]
    returns = np.array([[float(x) for x in column(run / "eval.csv", f"return_{i}")] for i in range(2)])
    np.testing.assert_allclose(scores, returns.mean(0) / 10)
    assert all(0 < score < 20 for score in scores)
    finished = json.loads((run / "finished.json").read_text())
    assert finished["steps"] == 6
    assert finished["score_last"] == round(scores[-1], 2)
    assert finished["score_late_mean"] == round((scores[-2] + scores[-1]) / 2, 2)  # the last two, of three
    assert list((run / "tensorboard").iterdir())
    assert "finished: " in result.stdout
    assert (run / "drq_bc.py").read_text() == (ROOT / "algos" / "drq_bc.py").read_text()
    count = sum(value.numel() for value in weights_of(run).values())
    assert count == 30_368 + 3_068_124 + 2 * 4_178_136


def test_config_says_what_ran(evaluated, tiny_set):
    run, _ = evaluated
    config = json.loads((run / "config.json").read_text())
    assert config["algo"] == "drq_bc"
    assert config["args"]["batch_size"] == 8
    assert config["args"]["bc_alpha"] == 2.5  # flags that were not typed, too
    assert config["args"]["precision"] in ("fp32", "bf16")  # auto is resolved
    assert config["args"].keys() == vars(drq_bc.Args()).keys()
    assert config["versions"]["torch"] == torch.__version__
    optional = {"metaworld", "gymnasium", "gymnasium-robotics"}  # where they are installed
    assert config["versions"].keys() - optional == {"python", "torch", "numpy", "mujoco", "dm_control"}
    assert "cores of" in config["hardware"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|sha256:[0-9a-f]{12}", config["commit"])
    assert "--eval-every 2" in config["command"]
    dataset = config["dataset"]
    assert dataset["hash"] == common.Dataset(tiny_set).hash
    assert re.fullmatch(r"[0-9a-f]{16}", dataset["hash"])
    assert (dataset["source"], dataset["set"], dataset["task"]) == ("made", "random-84px-1000", "walker-walk")
    assert (dataset["num_transitions"], dataset["num_episodes"], dataset["action_dim"]) == (1000, 2, 6)


def test_evaluating_never_changes_the_weights(evaluated, tiny_set, tmp_path):
    run, _ = evaluated
    flags = ["--steps", 6, "--eval-every", 0, "--runs-dir", tmp_path, "--data-dir", tiny_set.parents[2]]
    result = run_python(ROOT / "algos" / "drq_bc.py", *TINY, *flags, env=CHILD)
    assert result.returncode == 0, result.stderr
    plain = tmp_path / "drq_bc" / "walker-walk" / "random-84px-1000" / "seed0"
    assert not (plain / "eval.csv").exists()
    assert equal_weights(run, plain)
    assert metrics_of(run) == metrics_of(plain)


def test_evaluate_scores_a_finished_run_and_writes_a_video(evaluated, tmp_path):
    run, _ = evaluated
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation.mp4").unlink()
    flags = ["--eval-episodes", 1, "--eval-every", 0]  # the latter is for training: this command evaluates
    result = run_python(ROOT / "algos" / "drq_bc.py", "--evaluate", "run", *flags, cwd=tmp_path, env=CHILD)
    assert result.returncode == 0, result.stderr
    score, returned = map(float, re.search(r"score (\S+), returns \[(\S+)\]", result.stdout).groups())
    expected = float(column(run / "eval.csv", "return_0")[-1])  # the same weights on the same episode
    assert returned == pytest.approx(expected, abs=0.051)
    assert score == pytest.approx(expected / 10, abs=0.0051)
    import imageio.v2 as imageio

    with imageio.get_reader(tmp_path / "run" / "evaluation.mp4") as video:
        assert video.count_frames() == 500
        assert video.get_data(0).shape == (336, 336, 3)


@EACH
def test_two_files_in_a_folder_are_enough(algo, tiny_set, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    for file in (ROOT / "algos" / f"{algo}.py", ROOT / "common.py"):
        shutil.copy(file, folder)
    evaluations = ["--eval-every", 2, "--eval-episodes", 1] if algo == "bc" else ["--eval-every", 0]
    flags = [*TINY, "--steps", 2, *evaluations, "--data-dir", tiny_set.parents[2]]
    result = run_python(f"{algo}.py", *flags, cwd=folder, env=CHILD)
    assert result.returncode == 0, result.stderr
    run = folder / "runs" / algo / "walker-walk" / "random-84px-1000" / "seed0"  # runs/ beside common.py
    assert steps_of(run) == [1, 2]
    assert (run / "evaluation.mp4").exists() == (algo == "bc")
    config = json.loads((run / "config.json").read_text())
    assert config["commit"].startswith("sha256:")  # there is no repository


BLOCKED = """
import runpy, sys
for name in ("mujoco", "dm_control", "tensorboard", "torch.utils.tensorboard", "tqdm"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@EACH
def test_own_data_needs_no_simulator_nor_tensorboard_nor_tqdm(algo, own_set, tmp_path):
    script = ROOT / "algos" / f"{algo}.py"
    flags = ["--dataset", own_set, "--steps", 6, "--runs-dir", tmp_path, *SMALL]
    result = run_python("-c", BLOCKED, script, *flags, env=CHILD)
    assert result.returncode == 0, result.stderr
    assert "note: tensorboard is not installed" in result.stdout
    assert "note: tqdm is not installed" in result.stdout
    run = tmp_path / algo / "own" / "robot" / "seed0"
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert (run / "finished.json").exists()
    assert not (run / "tensorboard").exists()


# ---- killed and continued ----


def start(algo: str, own_set: Path, runs: Path, steps: int) -> subprocess.Popen:
    script = ROOT / "algos" / f"{algo}.py"
    words = [sys.executable, script, "--dataset", own_set, "--runs-dir", runs, "--steps", steps, *SMALL]
    return subprocess.Popen(
        [str(word) for word in words], env=CHILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_row(process: subprocess.Popen, run: Path, row: int) -> None:
    """Until train.csv has so many rows."""
    deadline = time.monotonic() + 120
    while not (run / "train.csv").exists() or (run / "train.csv").read_text().count("\n") <= row:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("algo", [pytest.param("bc", marks=pytest.mark.slow), "drq_bc"])
def test_a_run_killed_at_any_moment_continues_bit_by_bit(algo, own_set, tmp_path, train):
    steps, run = 400, tmp_path / "killed" / algo / "own" / "robot" / "seed0"
    for low, high in ((5, 100), (130, 230)):  # far from the end: on a busy machine the kill may come late
        row = random.SystemRandom().randint(low, high)
        process = start(algo, own_set, tmp_path / "killed", steps)
        wait_for_row(process, run, row)
        time.sleep(random.SystemRandom().uniform(0, 0.01))
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"killed at row {row}: {output}"
        assert not (run / "finished.json").exists()
    process = start(algo, own_set, tmp_path / "killed", steps)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"continuing {run} at step " in output
    assert train(algo, "--steps", steps) is None  # the same without a kill
    assert steps_of(run) == list(range(1, steps + 1))
    assert metrics_of(run) == metrics_of(train.folder(algo))
    assert equal_weights(run, train.folder(algo))
    assert checkpoints(run) == []
    wall = [float(seconds) for seconds in column(run / "train.csv", "wall_s")]
    assert wall == sorted(wall)  # counted over all three processes


@pytest.mark.parametrize("algo", ["bc", pytest.param("drq_bc", marks=pytest.mark.slow)])
def test_sigterm_leaves_a_checkpoint_of_that_very_step(algo, own_set, tmp_path, train):
    steps, run = 400, tmp_path / "stopped" / algo / "own" / "robot" / "seed0"
    process = start(algo, own_set, tmp_path / "stopped", steps)
    wait_for_row(process, run, 101)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    stopped = int(re.search(r"stopped at step (\d+) with a checkpoint", output)[1])
    assert 100 < stopped < steps
    assert steps_of(run)[-1] == stopped
    assert checkpoints(run)[-1] == f"checkpoint-{stopped:09d}"
    process = start(algo, own_set, tmp_path / "stopped", steps)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"continuing {run} at step {stopped}" in output
    assert train(algo, "--steps", steps) is None
    assert steps_of(run) == list(range(1, steps + 1))
    assert metrics_of(run) == metrics_of(train.folder(algo))
    assert equal_weights(run, train.folder(algo))


@EACH
def test_three_and_three_updates_equal_six(algo, train):
    assert train(algo, "--steps", 6, "--tag", "whole") is None
    assert isinstance(train(algo, "--steps", 6, crash=4), KeyboardInterrupt)
    run = train.folder(algo)
    assert checkpoints(run) == ["checkpoint-000000002", "checkpoint-000000003"]  # the newest two
    assert train(algo, "--steps", 6) is None
    assert equal_weights(run, train.folder(algo, "whole-seed0"))
    assert metrics_of(run) == metrics_of(train.folder(algo, "whole-seed0"))


def test_another_seed_gives_other_weights(train):
    assert train("bc", "--steps", 2) is None
    assert train("bc", "--steps", 2, "--seed", 1) is None
    assert not equal_weights(train.folder("bc"), train.folder("bc", "seed1"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_rows_still_ends_in_a_checkpoint(number, train):
    """--log-every 100: the step at which the signal comes is logged and saved all the same."""

    def update(original, count, *args):
        if count == 7:
            os.kill(os.getpid(), number)
        return original(*args)

    flags = ["--steps", 400, "--log-every", 100]
    stopped = train("bc", *flags, update=update)
    assert isinstance(stopped, SystemExit)
    assert stopped.code == 128 + number
    assert checkpoints(train.folder("bc")) == ["checkpoint-000000007"]
    assert steps_of(train.folder("bc")) == [7]


@EACH
def test_checkpoints_hold_plain_tensors(algo, train):
    train(algo, "--steps", 40, crash=21)
    for name in checkpoints(train.folder(algo)):
        state = torch.load(train.folder(algo) / name / "state.pt", weights_only=True)  # refuses anything but data
        assert state["step"] == int(name.split("-")[1])
        assert state["objects"].keys() == {"agent", "buffer"}
        assert state["generators"].keys() >= {"torch", "numpy"}
        optimizers = state["objects"]["agent"]["_extra_state"]
        assert optimizers.keys() == ({"actor"} if algo == "bc" else {"critic", "actor"})
        for optimizer in optimizers.values():
            assert all(entry["step"] == state["step"] for entry in optimizer["state"].values())


# ---- damage ----


def damage_truncate(folder: Path) -> None:
    with open(folder / "state.pt", "r+b") as file:
        file.truncate(1000)


def damage_flip(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def damage_hash(folder: Path) -> None:
    (folder / "sha256").unlink()


def damage_remove(folder: Path) -> None:
    (folder / "state.pt").unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_hash, damage_remove])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, train, capsys):
    train("bc", "--steps", 40, "--tag", "whole")
    train("bc", "--steps", 40, crash=26)
    run = train.folder("bc")
    assert checkpoints(run) == ["checkpoint-000000022", "checkpoint-000000024"]
    damage(run / "checkpoint-000000024")
    capsys.readouterr()
    assert train("bc", "--steps", 40) is None
    output = capsys.readouterr().out
    assert f"{run}/checkpoint-000000024 is damaged" in output
    assert f"continuing {run} at step 22" in output
    assert steps_of(run) == list(range(1, 41))
    assert equal_weights(run, train.folder("bc", "whole-seed0"))


def test_without_a_whole_checkpoint_it_starts_anew(train, capsys):
    train("bc", "--steps", 40, "--tag", "whole")
    train("bc", "--steps", 40, crash=26)
    run = train.folder("bc")
    for name in checkpoints(run):
        damage_truncate(run / name)
    (run / "checkpoint.tmp").mkdir()  # of a kill amid saving
    (run / "checkpoint.tmp" / "state.pt").write_bytes(b"half")
    assert train("bc", "--steps", 40) is None
    assert steps_of(run) == list(range(1, 41))
    assert equal_weights(run, train.folder("bc", "whole-seed0"))
    assert checkpoints(run) == []


@pytest.mark.parametrize("left", ["", "step,wal", "step,wall_s,actor/loss\n1,0.1"])
def test_a_row_cut_in_the_middle_is_no_obstacle(left, train):
    """A kill may leave train.csv empty, with half a header or with half a row."""
    train("bc", "--steps", 40, crash=2)  # before the first checkpoint
    run = train.folder("bc")
    assert checkpoints(run) == []
    (run / "train.csv").write_text(left)
    assert train("bc", "--steps", 40) is None
    assert steps_of(run) == list(range(1, 41))
    assert all(float(loss) > 0 for loss in column(run / "train.csv", "actor/loss"))


def test_rows_after_the_checkpoint_are_cut(train):
    train("bc", "--steps", 40, crash=26)
    run = train.folder("bc")
    assert steps_of(run) == list(range(1, 26))  # 25 was logged, 24 saved
    with open(run / "train.csv", "a") as file:
        file.write("26,0.")
    train("bc", "--steps", 40, crash=1)
    assert steps_of(run) == list(range(1, 25))


def test_a_resume_is_written_down_beside_what_began_the_run(train, monkeypatch):
    train("bc", "--steps", 40, crash=26)
    first = json.loads((train.folder("bc") / "config.json").read_text())
    assert first["resumed"] == []
    monkeypatch.setattr(common, "commit_of", lambda *files: "0123456789ab")
    monkeypatch.setattr(common, "hardware", lambda device: "another machine")
    assert train("bc", "--steps", 60) is None
    config = json.loads((train.folder("bc") / "config.json").read_text())
    assert [part["commit"] for part in config["resumed"]] == ["0123456789ab"]
    assert config["resumed"][0]["hardware"] == "another machine"
    assert {name: config[name] for name in ("commit", "hardware", "command", "versions")} == {
        name: first[name] for name in ("commit", "hardware", "command", "versions")
    }
    assert config["args"] == first["args"] | {"steps": 60}


# ---- disks ----


def refuse_writes(monkeypatch, run: Path, number: int) -> None:
    """From here on no file below `run` opens for writing, as on a full (ENOSPC) or read-only (EROFS) disk."""
    original = open

    def refusing(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and str(file).startswith(str(run)):
            raise OSError(number, os.strerror(number))
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_under_a_run_is_one_line_and_keeps_the_checkpoints(number, train, monkeypatch):
    run = train.folder("bc")

    def update(original, count, *args):
        if count == 23:
            refuse_writes(monkeypatch, run, number)
        return original(*args)

    error = train("bc", "--steps", 40, update=update)
    assert isinstance(error, UserError)
    assert str(error) == f"{run}: {os.strerror(number)}; what was complete before is kept"
    assert checkpoints(run) == ["checkpoint-000000020", "checkpoint-000000022"]
    monkeypatch.undo()
    assert steps_of(run) == list(range(1, 23))


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(train, monkeypatch):
    """Small files still fit: the metrics of step 24 are written, its checkpoint is not, and the run continues."""
    run, original = train.folder("bc"), common._save

    def full(state, path):
        if state["step"] == 24:
            path.write_bytes(b"the first half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(state, path)

    monkeypatch.setattr(common, "_save", full)
    error = train("bc", "--steps", 40)
    assert isinstance(error, UserError)
    assert "No space left on device" in str(error)
    assert checkpoints(run) == ["checkpoint-000000020", "checkpoint-000000022", "checkpoint.tmp"]
    monkeypatch.setattr(common, "_save", original)
    assert train("bc", "--steps", 40) is None
    assert train("bc", "--steps", 40, "--tag", "whole") is None
    assert metrics_of(run) == metrics_of(train.folder("bc", "whole-seed0"))
    assert equal_weights(run, train.folder("bc", "whole-seed0"))


def test_a_folder_that_cannot_be_made_is_one_line(own_set, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    flags = ["--dataset", own_set, "--steps", 6, "--runs-dir", tmp_path / "runs", *SMALL]
    assert_one_line(run_python(ROOT / "algos" / "bc.py", *flags, env=CHILD), str(tmp_path / "runs"))


# ---- numbers that are not finite ----


def test_nan_in_the_rewards_is_named(own_set, tmp_path, train):
    broken = tmp_path / "broken"
    shutil.copytree(own_set, broken)
    rewards = np.load(broken / "reward.npy")
    rewards[17] = np.nan
    np.save(broken / "reward.npy", rewards)
    error = train("drq_bc", "--dataset", broken, "--steps", 6)
    assert isinstance(error, UserError)
    assert "reward.npy: row 17 is nan" in str(error)


@pytest.mark.parametrize("algo, term", [("bc", "actor/loss"), ("drq_bc", "critic/loss"), ("drq_bc", "actor/q")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_term(algo, term, train):
    def update(original, count, *args):
        metrics = original(*args)
        return metrics | {term: torch.tensor(float("nan"))} if count == 26 else metrics

    error = train(algo, "--steps", 40, update=update)
    run = train.folder(algo)
    assert isinstance(error, UserError)
    assert f"{term} not finite at step 26" in str(error)
    assert "checkpoint-000000024" in str(error)
    assert checkpoints(run) == ["checkpoint-000000022", "checkpoint-000000024"]
    assert steps_of(run) == list(range(1, 26))  # the bad row is not written
    assert train(algo, "--steps", 40) is None  # the same command continues from there
    assert steps_of(run) == list(range(1, 41))


def test_what_is_not_finite_is_told_when_other_metrics_follow(tmp_path):
    run = common.Run.__new__(common.Run)
    run.path, run.watched = tmp_path, None
    for step, (a, b) in enumerate([(1.0, 2.0), (math.inf, 2.0), (math.nan, math.nan)], start=1):
        run._watch(step, {"first/a": torch.tensor(a), "first/b": torch.tensor(b)})
    with pytest.raises(UserError, match="^first/a not finite at step 2; .* keeps no checkpoint$"):
        run._watch(4, {"second/a": torch.tensor(1.0)})


@pytest.mark.parametrize("steps, kept", [(40, "checkpoint-000000024"), (26, "checkpoint-000000024")])
def test_weights_that_are_not_finite_are_not_saved(steps, kept, train):
    def update(original, count, agent, *args):
        metrics = original(agent, *args)
        if count == 26:  # a step that saves; of the shorter run the last one
            with torch.no_grad():
                agent.actor.policy[0].weight[0, 0] = float("inf")
        return metrics

    error = train("bc", "--steps", steps, update=update)
    run = train.folder("bc")
    assert isinstance(error, UserError)
    assert "step 26" in str(error)
    assert "actor.policy.0.weight" in str(error)
    assert checkpoints(run)[-1] == kept
    assert not (run / "weights.pt").exists()


# ---- flags ----


@EACH
def test_a_finished_run_says_so(algo, train, capsys):
    assert train(algo, "--steps", 6) is None
    before = {path: path.read_bytes() for path in train.folder(algo).glob("*.*") if path.is_file()}
    capsys.readouterr()
    ended = train(algo, "--steps", 6)
    assert isinstance(ended, SystemExit)
    assert ended.code == 0
    assert f"{train.folder(algo)} is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in train.folder(algo).glob("*.*") if path.is_file()} == before
    longer = train(algo, "--steps", 8)  # optimisers are gone
    assert isinstance(longer, UserError)
    assert "--overwrite" in str(longer)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", "0.01"], "--lr 0.0001 -> 0.01"),
        (["--noise-clip", "0.5"], "--noise-clip 0.3 -> 0.5"),
        (["--batch-size", "5"], "--batch-size 4 -> 5"),
        (["--bc-noise"], "--bc-noise False -> True"),
        (["--steps", "30"], "--steps 40 -> 30"),
        (["--eval-every", "5"], "--eval-every 0 -> 5"),
    ],
)
def test_other_flags_are_refused(flags, named, train):
    train("bc", "--steps", 40, crash=26)
    run = train.folder("bc")

    def files() -> dict:  # TensorBoard's writer, which the crash has left open, writes when it likes
        kept = (path for path in run.glob("**/*") if path.is_file() and path.parent.name != "tensorboard")
        return {path: path.read_bytes() for path in kept if path.name != ".lock"}

    before = files()
    error = train("bc", "--steps", 40, *flags)
    assert isinstance(error, UserError)
    assert named in str(error)
    assert "--tag" in str(error)
    assert files() == before


def test_other_data_is_refused(own_set, tmp_path, train):
    train("bc", "--steps", 40, crash=26)
    other = write_set(tmp_path / "other" / "robot", lengths=(30, 25), size=21, seed=1)
    error = train("bc", "--steps", 40, "--dataset", other)
    assert isinstance(error, UserError)
    assert "dataset" in str(error)


def test_flags_that_change_no_number_may_differ(own_set, tmp_path, train):
    train("bc", "--steps", 40, "--tag", "whole")
    train("bc", "--steps", 40, crash=26)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    flags = ["--runs-dir", tmp_path / "moved", "--log-every", 2, "--data-dir", tmp_path, "--buffer-device", "cpu"]
    assert train("bc", "--steps", 40, *flags) is None
    run = tmp_path / "moved" / "bc" / "own" / "robot"
    assert steps_of(run / "seed0") == [*range(1, 25), *range(26, 41, 2)]
    assert equal_weights(run / "seed0", run / "whole-seed0")


def test_steps_may_grow_while_the_run_is_unfinished(train):
    train("drq_bc", "--steps", 60, "--tag", "whole")
    train("drq_bc", "--steps", 40, crash=26)
    assert train("drq_bc", "--steps", 60) is None
    run = train.folder("drq_bc")
    assert steps_of(run) == list(range(1, 61))
    assert json.loads((run / "finished.json").read_text())["steps"] == 60
    assert equal_weights(run, train.folder("drq_bc", "whole-seed0"))


def test_overwrite_starts_anew(train):
    train("bc", "--steps", 6)
    run = train.folder("bc")
    (run / "notes.txt").write_text("old")
    assert train("bc", "--steps", 4, "--lr", "0.01", "--overwrite") is None
    assert steps_of(run) == [1, 2, 3, 4]
    assert json.loads((run / "config.json").read_text())["args"]["lr"] == 0.01
    assert not (run / "notes.txt").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval-every", 5], "names no task to evaluate in; train on it with --eval-every 0"),
        (["--accelerate", "graph"], "--accelerate graph needs --device cuda"),
        (["--batch-size", 0], "--batch-size 0: at least 1"),
    ],
)
def test_a_wrong_flag_overwrites_nothing(flags, message, train):
    assert train("bc", "--steps", 4) is None
    files = [path for path in train.folder("bc").glob("**/*") if path.is_file() and path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    error = train("bc", "--steps", 4, "--overwrite", *flags)
    assert isinstance(error, UserError) and message in str(error)
    assert [path.read_bytes() for path in files] == before


def test_what_continues_a_run_that_was_begun_with_overwrite(train, capsys):
    def stop(original, count, agent, *args):
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(agent, *args)

    ended = train("bc", "--steps", 40, "--overwrite", update=stop)
    assert isinstance(ended, SystemExit) and "the same command without --overwrite continues" in capsys.readouterr().out


def test_tag_and_quick_name_other_folders(train, tmp_path):
    assert train("bc", "--steps", 2) is None
    assert train("bc", "--steps", 2, "--tag", "wide", "--noise-clip", "0.5") is None
    assert train("bc", "--steps", 2, "--quick") is None
    folders = {str(path.parent.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("weights.pt")}
    assert folders == {"bc/own/robot/seed0", "bc/own/robot/wide-seed0", "quick/bc/own/robot/seed0"}
    config = json.loads((tmp_path / "runs" / "quick/bc/own/robot/seed0/config.json").read_text())
    assert config["args"]["lr"] == bc.QUICK["lr"]
    assert config["args"]["batch_size"] == 4  # typed


def test_a_command_that_failed_at_the_start_may_be_corrected(own_set, train):
    """Own data without --eval-every 0: the message says what to type, and typing it works."""
    flags = ["--steps", 40, "--eval-every", 20]
    error = train("bc", *flags)
    assert isinstance(error, UserError)
    assert "--eval-every 0" in str(error)
    assert train("bc", "--steps", 40, "--eval-every", 0) is None
    error = train("drq_bc", "--steps", 40, "--accelerate", "graph")
    assert "--device cuda" in str(error)
    assert train("drq_bc", "--steps", 4) is None


def test_evaluate_of_an_unfinished_run_says_so(train, tmp_path):
    train("bc", "--steps", 40, crash=26)
    error = train("bc", "--evaluate", train.folder("bc"))
    assert isinstance(error, UserError)
    assert "weights.pt is missing; is the run finished?" in str(error)
    assert "config.json is missing" in str(train("bc", "--evaluate", tmp_path / "nowhere"))


def test_a_folder_in_use_is_refused_with_its_holder(own_set, tmp_path):
    run = tmp_path / "bc" / "own" / "robot" / "seed0"
    run.mkdir(parents=True)
    with common.lock_file(run / ".lock"):
        flags = ["--dataset", own_set, "--steps", 6, "--runs-dir", tmp_path, *SMALL]
        result = run_python(ROOT / "algos" / "bc.py", *flags, env=CHILD)
    assert_one_line(result, str(run), f"in use by process {os.getpid()}")
    assert not (run / "config.json").exists()


def test_an_unknown_dataset_is_one_line(tiny_set):
    flags = ["--task", "walker-walk", "--dataset", "expret", "--data-dir", tiny_set.parents[2]]
    result = run_python(ROOT / "algos" / "bc.py", *flags, env=CHILD)
    assert_one_line(result, "--dataset expret", "expert", str(tiny_set))


def test_an_unknown_task_is_one_line(tmp_path):
    flags = ["--task", "walker-fly", "--dataset", "random", "--data-dir", tmp_path / "data", "--runs-dir", tmp_path]
    result = run_python(ROOT / "algos" / "drq_bc.py", *flags, env=CHILD)
    assert_one_line(result, "--task walker-fly", "walker-walk")


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--log-every", "--eval-episodes"])
def test_counts_below_one_are_refused(flag, train):
    assert str(train("bc", "--steps", 6, flag, 0)) == f"{flag} 0: at least 1"


def test_an_unknown_flag_is_named(tmp_path):
    result = run_python(ROOT / "algos" / "bc.py", "--learning-rate", "1", env=CHILD)
    assert result.returncode == 2
    assert "--learning-rate" in result.stderr
    assert "Traceback" not in result.stderr


# ---- parse_args ----


@dataclass
class Toy:
    task: str = "cheetah-run"
    dataset: str = "medexp"
    data_dir: str | None = None
    runs_dir: str | None = None
    quick: bool = False
    device: str = "cpu"
    accelerate: str = "auto"
    precision: str = "fp32"
    alpha: float = 0.0  # tuned
    steps: int | None = None
    batch_size: int = 256


TUNED = {
    ("walker-walk", "expert"): {"alpha": 4.0},
    ("walker-walk", "*"): {"alpha": 3.0, "batch_size": 512},
    ("*", "expert"): {"alpha": 2.0, "batch_size": 64},
    ("*", "*"): {"alpha": 1.0},
}
QUICK = {"batch_size": 32, "steps": 100}


@pytest.mark.parametrize(
    "line, alpha, batch_size, steps",
    [
        ("", 1.0, 256, None),
        ("--task walker-walk", 3.0, 512, None),
        ("--dataset expert", 2.0, 64, None),
        ("--task walker-walk --dataset expert", 4.0, 512, None),  # the most exact entry wins, the others add
        ("--dataset=expert --task=walker-walk", 4.0, 512, None),
        ("--task walker-walk --alpha 0.5", 0.5, 512, None),
        ("--alpha 0.5 --task walker-walk --dataset expert", 0.5, 512, None),
        ("--quick", 1.0, 32, 100),
        ("--quick --task walker-walk", 3.0, 32, 100),  # over the tuned value
        ("--batch-size 8 --quick --steps 7", 1.0, 8, 7),  # what was typed wins, wherever it stands
        ("--quick --batch_size 8", 1.0, 8, 100),
    ],
)
def test_tuned_and_quick_values_are_merged_and_typed_flags_win(line, alpha, batch_size, steps, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", *line.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    args = common.parse_args(Toy, TUNED, QUICK)
    assert (args.alpha, args.batch_size, args.steps) == (alpha, batch_size, steps)
    assert sys.excepthook is common.one_line_errors


@pytest.mark.parametrize(
    "line, transitions",
    [
        ("", 20_000),
        ("--source vd4rl", None),  # the official sets are used whole
        ("--dataset some/path", None),
        ("--task kitchen-mixed --dataset mixed", None),
        ("--transitions 1000", 1000),
    ],
)
def test_quick_cuts_sets_that_are_made_here(line, transitions):
    words = ["--quick", *line.split()]
    assert common.typed_args(bc.Args, bc.TUNED, bc.QUICK, words).transitions == transitions


def test_a_task_without_a_name_is_tyros_error(capsys):
    with pytest.raises(SystemExit):
        common.typed_args(bc.Args, bc.TUNED, bc.QUICK, ["--task", "--quick"])
    assert "--task" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "gpu"], "--device gpu: auto, cpu, cuda or cuda:N"),
        (["--seed", -1], "--seed -1: at least 0"),
        (["--eval-every", -1], "--eval-every -1: at least 0"),
        (["--transitions", 0], "--transitions 0: at least 1"),
        (["--transitions", 50], "--transitions 50: a set given by its path is used whole"),
    ],
)
def test_flags_out_of_range(flags, message, train, tmp_path):
    assert message in str(train("bc", "--steps", 4, *flags))
    assert not (tmp_path / "runs").exists()


def test_parse_args_resolves_folders_device_and_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--device", "auto", "--precision", "auto"])
    monkeypatch.delenv("CLEANPIXELS_DATA", raising=False)
    args = common.parse_args(Toy, {}, {})
    assert args.data_dir == str(ROOT / "datasets")
    assert args.runs_dir == str(ROOT / "runs")
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert args.precision == ("bf16" if common.has_bf16(args.device) else "fp32")
    assert args.accelerate == "eager"
    monkeypatch.setenv("CLEANPIXELS_DATA", str(tmp_path))
    assert common.parse_args(Toy, {}, {}).data_dir == str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--data-dir", "there"])
    assert common.parse_args(Toy, {}, {}).data_dir == "there"


@EACH
def test_every_tuned_and_quick_name_is_a_flag(algo):
    module = ALGOS[algo]
    flags = vars(module.Args()).keys()
    entries = [value for key, value in module.QUICK.items() if isinstance(key, tuple)]
    assert {key for key in module.QUICK if isinstance(key, str)} <= flags
    assert all(entry.keys() <= flags for entry in [*entries, *module.TUNED.values()])


def test_changed_code_is_noticed_and_changed_comments_are_not(train):
    assert isinstance(train("bc", "--steps", 6, crash=4), KeyboardInterrupt)  # leaves checkpoints up to step 3
    copy = train.folder("bc") / "bc.py"
    text = copy.read_text()
    copy.write_text(text + "\nUNUSED = 1\n")  # as if the script had lost this line since
    error = train("bc", "--steps", 6)
    assert "bc.py has changed since" in str(error) and "--tag" in str(error)
    copy.write_text(text + "\n# a remark\n")
    assert train("bc", "--steps", 6) is None
    assert steps_of(train.folder("bc")) == [1, 2, 3, 4, 5, 6]


def test_a_set_that_does_not_fit_its_task_is_named_before_training(tmp_path):
    with common.DatasetWriter(tmp_path / "set", size=21, action_dim=2, task="walker-walk") as writer:
        writer.add(*synthetic_episode(0, 30, 21, 2, np.random.default_rng(0)))
    flags = ["--dataset", tmp_path / "set", "--runs-dir", tmp_path / "runs", "--steps", 3, "--eval-episodes", 1]
    result = run_python("algos/bc.py", *flags, "--batch-size", 4, "--device", "cpu")
    assert_one_line(result, "2 action dimensions, walker-walk 6", "--eval-every 0")


def test_a_video_that_cannot_be_written_is_a_note(tmp_path, monkeypatch, capsys):
    import imageio.v2 as imageio

    def without_ffmpeg(*_, **__):
        raise ValueError("Could not find a backend")

    monkeypatch.setattr(imageio, "get_writer", without_ffmpeg)
    common.save_video(tmp_path / "evaluation.mp4", [np.zeros((3, 4, 4), np.uint8)])
    assert "evaluation.mp4 was not written (Could not find a backend)" in capsys.readouterr().out


def family(pid: int) -> list[int]:
    """A process and all that descend from it, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_signals_to_every_process_during_an_evaluation_leave_a_checkpoint(tiny_set, tmp_path):
    """As batch schedulers stop a job, and repeat it: the workers must live on until the evaluation ends."""
    flags = [*TINY, "--steps", 4, "--eval-every", 2, "--eval-episodes", 2, "--data-dir", tiny_set.parents[2]]
    words = [sys.executable, ROOT / "algos/bc.py", *flags, "--runs-dir", tmp_path]
    process = subprocess.Popen([*map(str, words)], env=ENVIRONMENT, start_new_session=True)
    run = tmp_path / "bc" / "walker-walk" / tiny_set.name / "seed0"
    wait_for_row(process, run, 2)
    time.sleep(1)  # the evaluation, of a thousand frames, has begun
    members = family(process.pid)
    assert len(members) >= 4  # itself, the fork server, two workers
    for _ in range(2):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert checkpoints(run) == ["checkpoint-000000002"] and steps_of(run, "eval") == [2]
    time.sleep(1)
    stats = [Path(f"/proc/{pid}/stat") for pid in members]
    assert all(not stat.exists() or ") Z " in stat.read_text() for stat in stats)  # gone, or waiting to be reaped
