"""benchmark.sh on a cluster: sets copied to the node's disk, what Slurm is asked for, a real Slurm."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_set
from test_benchmark import rows

import common

sys.path.append(str(ROOT / "benchmarks"))
import run_all  # noqa: E402
import stage  # noqa: E402

PYTHON, JOB = sys.executable, str(ROOT / "benchmarks" / "slurm_job.sh")


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sets_are_staged_whole(tmp_path):
    path, copy = tmp_path / "data/made/own/random-21px", tmp_path / "node/made/own/random-21px"
    write_set(path, (6,), 21)
    copy.with_name("random-21px.partial").mkdir(parents=True)  # a copy that was killed
    for _ in range(2):
        stage.stage(path, tmp_path / "node")
        assert common.Dataset(copy).num_transitions == 6
        (copy / "mine").touch()  # would be gone if it were copied again
    assert (copy / "mine").exists()
    shutil.rmtree(path)
    write_set(path, (8,), 21, seed=5)  # the set was made anew
    stage.stage(path, tmp_path / "node")
    assert common.Dataset(copy).num_transitions == 8
    write_set(tmp_path / "theirs/made/own/random-21px", (6,), 21)
    with pytest.raises(OSError, match="is another set, and no copy"):
        stage.stage(path, tmp_path / "theirs")
    for to, text in (("$UNSET_HERE", "$UNSET_HERE: it names a variable"), (path / "meta.json", "Not a directory")):
        done = subprocess.run([sys.executable, stage.__file__, path, to], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: --stage-dir ") and text in done.stderr


@pytest.fixture
def scheduler(tmp_path, monkeypatch) -> Path:
    """sbatch and scontrol that write down their words, a call a line. Returns the folder of sbatch.calls and so on."""
    for name in ("sbatch", "scontrol"):
        calls = tmp_path / f"{name}.calls"
        note = f"for word; do printf '%s\\t' \"$word\"; done >> {calls}; echo >> {calls}"
        (tmp_path / name).write_text(f"#!/bin/sh\n{note}; echo 7\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_what_slurm_is_asked_for(scheduler, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = "--algos bc --tasks walker-walk --datasets random,medium --seeds 2 --slurm --jobs 3 --stage-dir $TMPDIR"
    words = [*flags.split(), "--slurm-args=--partition=gpu --comment='two words'", "--runs-dir", "my runs"]
    words += ["--", "--data-dir", f"{tmp_path}/data"]
    assert run_all.main(words) == 0
    assert re.search(r"^job 7 makes 2 sets: .*\narray 7: 4 runs\.", capsys.readouterr().out, re.M)
    sets, array = (line.split("\t")[:-1] for line in (scheduler / "sbatch.calls").read_text().splitlines())
    for call in (sets, array):
        flags = {"--requeue", "--signal=B:USR1@120", "--open-mode=append", "--partition=gpu", "--comment=two words"}
        assert flags < set(call[: call.index(JOB)])
    assert "--array=1-4%3" in array and "--dependency=afterany:7" in array and "--dependency" not in " ".join(sets)
    makes, runs = sets[sets.index(JOB) + 1 :], array[array.index(JOB) + 1 :]
    assert len(makes) == 2 and len(runs) == 4
    make, copy, algo = map(run_all.here, ("data/collect.py", "benchmarks/stage.py", "algos/bc.py"))
    assert makes[1].startswith(f"{PYTHON} {make} --task walker-walk --dataset medium --size 84")
    copied = f"{PYTHON} {copy} {tmp_path}/data/made/walker-walk/random-84px '$TMPDIR' {algo} "
    assert runs[1].startswith(copied + "--task walker-walk --dataset random --seed 1 ")
    assert runs[1].endswith(f" >> '{tmp_path}/my runs/bc/walker-walk/random-84px/seed1.log' 2>&1")


def test_a_job_queues_again_before_its_time_limit(scheduler, tmp_path):
    """What runs is asked to stop, what comes after it does not begin; a task of an array runs one line alone."""
    asked = "trap : TERM; touch asked; sleep 0.5; exit 143"  # to write a checkpoint takes a while
    slow = f"bash -c 'trap \"{asked}\" TERM; touch begun; while :; do sleep 0.05; done'"
    for variables, job in (({}, "31"), ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "29"}, "29_2")):
        environment = os.environ | {"SLURM_JOB_ID": "31"} | variables
        with subprocess.Popen([JOB, "false", slow, "touch third"], cwd=tmp_path, env=environment,
                              stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
            for number, file in ((signal.SIGUSR1, "begun"), (signal.SIGTERM, "asked")):
                wait_until((tmp_path / file).exists)
                process.send_signal(number)
                (tmp_path / file).unlink()
            lines = process.communicate(timeout=20)[0].splitlines()
        assert process.returncode == 143 and lines == [*["false", slow][bool(variables) :], "7"]  # scontrol's answer
        assert (scheduler / "scontrol.calls").read_text().splitlines()[-1] == f"requeue\t{job}\t"
        assert not (tmp_path / "third").exists()
    done = subprocess.run([JOB, "false", "true"], capture_output=True, env=os.environ | {"SLURM_JOB_ID": "31"})
    assert done.returncode == 1 and done.stdout == b"false\ntrue\n"  # one that fails does not keep others from running


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([ROOT / "tests" / "slurm.sh", "start", folder], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    subprocess.run(["scancel", "--user=root"], check=False)
    with contextlib.suppress(AssertionError, subprocess.CalledProcessError):
        wait_until(lambda: not queue(), 30)  # else their steps would outlive the daemons
    subprocess.run([ROOT / "tests" / "slurm.sh", "stop", folder], check=False)


def queue() -> dict[str, str]:
    """job or array_task -> state, of what is not over."""
    text = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout
    return dict(map(str.split, text.splitlines()))


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("sbatch", "slurmd", "slurmctld", "munged"))),
    reason="needs root and Debian's slurm-wlm and munge",
)
def test_slurm_array(slurm, capsys, monkeypatch, tmp_path):
    """Three runs, two at a time, behind a job that makes their set. One reaches its time limit, one is requeued by the
    scheduler; both continue from their checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = f"""--algos bc --tasks walker-walk --datasets random --seeds 3 --slurm --jobs 2 --runs-dir {tmp_path}/runs
        --stage-dir {tmp_path}/$SLURM_JOB_PARTITION -- --steps 1500 --log-every 1 --batch-size 2 --eval-every 0
        --device cpu --feature-dim 8 --hidden-dim 8 --transitions 500 --data-dir {tmp_path}/data"""
    words = ["--slurm-args=--partition=test --time=10", *flags.split()]
    assert run_all.main(words) == 0
    array = re.search(r"^job \d+ makes 1 sets: .*\narray (\d+): 3 runs\.", capsys.readouterr().out, re.M)[1]
    assert [state for task, state in queue().items() if task.startswith(f"{array}_")] == ["PENDING"] * 3
    runs = [tmp_path / "runs" / "bc" / "walker-walk" / "random-84px-500" / f"seed{seed}" for seed in range(3)]
    wait_until(lambda: min(rows(runs[0]), rows(runs[1])) > 20, 240)
    # What Slurm sends before the time limit. scancel itself goes on asking, for the job is soon no longer running.
    asking = subprocess.Popen(["scancel", "--batch", "--signal=USR1", f"{array}_1"], stderr=subprocess.DEVNULL)
    subprocess.run(["scontrol", "requeue", f"{array}_2"], check=True)  # what preemption does
    wait_until(lambda: all(queue().get(f"{array}_{task}") == "PENDING" for task in (1, 2)), 60)
    asking.kill()  # else it would signal the continued run too
    asking.wait()
    time.sleep(2)  # a job that starts again in the second of its end has no valid credential
    for task, run in enumerate(runs[:2], 1):
        assert "with a checkpoint; the same command" in Path(f"{run}.log").read_text()
        assert rows(run) < 1500
        # Slurm lets requeued jobs wait for two minutes
        subprocess.run(["scontrol", "update", f"JobId={array}_{task}", "StartTime=now"], check=True)
    wait_until(lambda: not queue(), 300)
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        assert config["args"]["data_dir"] == f"{tmp_path}/test"  # staged, the name looked up in the job
        assert (run / "finished.json").exists() and rows(run) == 1500
        assert ("continuing" in Path(f"{run}.log").read_text()) == (run != runs[2])
    assert run_all.main(words) == 0 and "# 3 runs: 3 finished; 0 sets to make\n" in capsys.readouterr().out
