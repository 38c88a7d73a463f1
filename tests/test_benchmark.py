"""benchmark.sh: the list, runs side by side, failures, Ctrl-C, staging, and a real Slurm."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bc
import pytest
from conftest import ENVIRONMENT, ROOT, write_set

import common
from common import UserError

sys.path.append(str(ROOT / "benchmarks"))
import run_all  # noqa: E402

# The second algorithm of most tests: bc.py, which says on which GPU it is and ends there.
SABOTAGE = "    step = run.load_checkpoint(agent=agent, buffer=buffer)"
BAD = """    import os
    import common
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    print("share of the GPU's memory", common.BUFFER_SHARE)
    raise RuntimeError(f"no good on {gpu}")
"""
HIDDEN = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "CLEANPIXELS_DATA")  # of this test run
CLEAN = {name: value for name, value in ENVIRONMENT.items() if name not in HIDDEN}
CLEAN["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `python` is this one
SHORT = ["--steps", 4, "--batch-size", 8, "--eval-every", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A copy of what benchmark.sh needs, with algos/bad.py and without a repository, runs or sets."""
    path = tmp_path_factory.mktemp("repo")
    for name in ("algos", "benchmarks", "data", "results"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "benchmark.sh", "report.py"):
        shutil.copy(ROOT / name, path)
    text = (ROOT / "algos" / "bc.py").read_text()
    assert text.count(SABOTAGE) == 1
    (path / "algos" / "bad.py").write_text(re.sub(re.escape(SABOTAGE) + ".*", lambda _: BAD, text))
    return path


def benchmark(repo: Path, *words, **environment) -> subprocess.CompletedProcess:
    """./benchmark.sh <words>, output and errors together in stdout."""
    command = ["./benchmark.sh", *map(str, words)]
    return subprocess.run(command, cwd=repo, env=CLEAN | environment, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


# ---- the list ----


def test_the_whole_table(repo):
    result = benchmark(repo, "--dry-run")
    assert result.returncode == 0, result.stdout
    assert not (repo / "runs").exists()
    lines = result.stdout.splitlines()
    runs = [line for line in lines if line.startswith("python algos/")]
    impossible = [line for line in lines if line.startswith("# python algos/")]
    files = len(list((repo / "algos").glob("*.py")))
    assert len(runs) + len(impossible) == files * 3 * 5 * 6
    assert len(impossible) == sum("no policy is shipped" in line for line in impossible)
    made = [line for line in lines if line.startswith("python data/collect.py")]
    assert len(made) == len(set(made)) == 2 * len(runs) / files / 6  # each set once, at 84 and at 64 px
    assert lines[: len(made)] == made  # before the runs
    assert "python algos/drq_bc.py --task cheetah-run --dataset medexp --seed 5" in runs


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--seeds 2", ["--seed 0", "--seed 1"]),
        ("--seeds 3,11", ["--seed 3", "--seed 11"]),
        ("--seeds 1 --quick", ["--seed 0 --quick"]),
        ("--seeds 1 --tag a --source vd4rl", None),
        ("--seeds 1 --tag a -- --lr 3e-4", ["--seed 0 --tag a --lr 3e-4"]),
    ],
)
def test_filters(repo, words, expected):
    words = ["--dry-run", "--algos", "bc", "--tasks", "walker-walk", "--datasets", "random", *words.split()]
    result = benchmark(repo, *words)
    assert result.returncode == 0, result.stdout
    runs = [line for line in result.stdout.splitlines() if "algos/" in line]
    head = "python algos/bc.py --task walker-walk --dataset random "
    if expected:
        assert runs == [head + tail for tail in expected]
    else:
        assert "import the official files with data/vd4rl.py" in runs[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--algos", "nope"], "no algos/nope.py; there are bad, bc, cql, drq_bc, lompo, moto, offline_dv2"),
        (["--seeds", "0"], "--seeds 0 --jobs None: at least 1"),
        (["--seeds", "3-5"], "--seeds 3-5"),
        (["--jobs", "0"], "--jobs 0"),
        (["--", "--overwrite"], "--overwrite behind --"),
        (["--", "--seed=3"], "--seed=3 behind --"),
        (["--gpus", "99"], "--gpus 99: "),
        (["--gpus", "0,"], "--gpus 0,: names, separated by commas"),
        (["--gpus", "1", "--slurm"], "--gpus: under --slurm each run has its own"),
        (["--slurm-args", "--comment='it is"], "--slurm-args --comment='it is: No closing quotation"),
        (["--datasets", "/nowhere"], "/nowhere does not exist"),
        (["--tasks", "waker-walk"], "--task waker-walk: no such dm_control task. There are: "),
        (["--tasks", "walker-walk,"], "--tasks walker-walk,: names, separated by commas"),
    ],
)
def test_mistakes_are_one_line(repo, words, message):
    result = benchmark(repo, "--algos", "bc", *words) if words[0] != "--algos" else benchmark(repo, *words)
    assert result.returncode == 1
    assert message in result.stdout and result.stdout.startswith("error: ") and result.stdout.count("\n") == 1


def test_files_that_are_no_algorithm(repo, tmp_path):
    """They leave the rest of the table as it is; asked for by name they are an error."""
    other = tmp_path / "repo"
    shutil.copytree(repo, other)
    (other / "algos" / "helper.py").write_text("def half(x):\n    return x / 2\n")
    (other / "algos" / "broken.py").write_text("import nothing_of_this_name\n")
    (other / "algos" / "program.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    text = (other / "algos" / "bc.py").read_text()
    assert text.count("open_dataset(args, size=84)") == 1
    (other / "algos" / "named.py").write_text(text.replace("size=84)", "size=PIXELS)") + "\nPIXELS = 84\n")
    words = ["--dry-run", "--tasks", "walker-walk", "--datasets", "random", "--seeds", 1]
    lines = benchmark(other, *words).stdout.splitlines()
    assert "# left out: algos/helper.py is no algorithm: it has no Args, TUNED, QUICK" in lines
    for name, error in (("broken", "ModuleNotFoundError"), ("program", "SystemExit")):
        assert any(line.startswith(f"# left out: algos/{name}.py cannot be imported ({error}") for line in lines)
    assert "python algos/named.py --task walker-walk --dataset random --seed 0" in lines
    result = benchmark(other, "--algos", "helper", *words)
    assert result.returncode == 1 and result.stdout.startswith("error: algos/helper.py is no algorithm")


def test_what_runs_and_what_has_other_data_is_told_apart(repo, tiny_set, tmp_path):
    words = ["--algos", "bc", "--datasets", tiny_set, "--seeds", 1, "--runs-dir", tmp_path / "runs", "--dry-run"]
    run = tmp_path / "runs" / "bc" / "walker-walk" / tiny_set.name / "seed0"
    run.mkdir(parents=True)
    with common.lock_file(run / ".lock"):
        assert benchmark(repo, *words).stdout.strip().endswith("# running")
        done = benchmark(repo, *words[:-1])
        assert "skipped python algos/bc.py" in done.stdout and "another process runs it" in done.stdout
    args = common.typed_args(bc.Args, bc.TUNED, bc.QUICK, ["--dataset", str(tiny_set), "--seed", "0"])
    args.task = "walker-walk"
    data = common.Dataset(tiny_set).facts()
    for text, state in ((data, "  # finished"), (data | {"hash": "of another set"}, "")):
        (run / "config.json").write_text(json.dumps({"args": vars(args), "dataset": text, "command": "algos/bc.py"}))
        (run / "finished.json").write_text("{}")
        shutil.copy(ROOT / "algos" / "bc.py", run)
        line = benchmark(repo, *words).stdout.strip()
        assert line.partition("my runs")[0].endswith(f"{tmp_path / 'runs'}{state}"), line


def test_from_another_folder(repo, tiny_set, tmp_path):
    """A relative set is the caller's; other relative paths are the repository's, there as in the runs."""
    words = ["--algos", "bc", "--datasets", tiny_set.name, "--seeds", "1", "--runs-dir", "my runs", "--dry-run"]
    done = subprocess.run(
        [repo / "benchmark.sh", *words], cwd=tiny_set.parent, env=CLEAN, capture_output=True, text=True
    )
    command = f"python algos/bc.py --task walker-walk --dataset {tiny_set} --seed 0 --runs-dir 'my runs'\n"
    assert done.stdout == command, done.stderr


def test_an_unknown_flag_is_named(repo):
    result = benchmark(repo, "--lr", "1e-3")
    assert result.returncode == 2 and "--lr" in result.stdout


def test_a_set_of_ones_own_is_one_row_whatever_the_tasks(repo, tmp_path):
    own = write_set(tmp_path / "own", (6,), 21)
    lines = benchmark(repo, "--dry-run", "--algos", "bc", "--datasets", own, "--seeds", 2).stdout.splitlines()
    assert len(lines) == 2


def test_a_finished_run_with_other_flags_is_not_skipped(repo, tiny_set, tmp_path):
    flags = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", tiny_set, "--seeds", 1]
    flags += ["--runs-dir", tmp_path]
    extra = SHORT
    assert benchmark(repo, *flags, "--", *extra).returncode == 0
    finished = benchmark(repo, *flags, "--dry-run", "--", *extra).stdout
    assert finished.endswith("  # finished\n")
    assert "# finished" not in benchmark(repo, *flags, "--dry-run", "--", *extra, "--lr", 1).stdout
    result = benchmark(repo, *flags, "--", *extra, "--lr", 1)
    assert result.returncode == 1
    assert "--lr 0.0001 -> 1.0" in result.stdout and "--tag" in result.stdout
    for flag in ("--steps", "--eval-every"):  # a short or unevaluated run is not the paper's
        without = [word for i, word in enumerate(extra) if flag not in (word, extra[i - 1])]
        assert len(without) == len(extra) - 2
        assert "# finished" not in benchmark(repo, *flags, "--dry-run", "--", *without).stdout
    script = repo / "algos" / "bc.py"
    text = script.read_text()
    try:
        script.write_text(text.replace("F.mse_loss", "F.l1_loss"))  # results of the old file are not the new one's
        result = benchmark(repo, *flags, "--", *extra)
    finally:
        script.write_text(text)
    assert result.returncode == 1 and "bc.py has changed since" in result.stdout


# ---- on this machine ----


def test_sets_are_made_runs_share_gpus_failures_are_named_and_the_rest_goes_on(repo, tmp_path):
    words = ["--algos", "bc,bad", "--tasks", "walker-walk,humanoid-walk", "--datasets", "medium", "--seeds", 2]
    words += ["--jobs", 2, "--gpus", "3,5", "--runs-dir", tmp_path / "runs"]
    words += ["--", *SHORT, "--transitions", 500, "--data-dir", tmp_path / "data"]
    shutil.rmtree(repo / "data" / "policies" / "humanoid-walk", ignore_errors=True)  # so that its set cannot be made
    result = benchmark(repo, *words)
    assert result.returncode == 1, result.stdout
    assert result.stdout.count("making a set: ") == 1
    last = "{} finished, {} finished before, 4 skipped, 0 stopped or not begun, 2 failed"
    assert result.stdout.splitlines()[-1] == last.format(2, 0)
    folder = "walker-walk/medium-84px-500"
    for seed in (0, 1):
        assert (tmp_path / "runs" / "bc" / folder / f"seed{seed}" / "finished.json").exists()
        log = tmp_path / "runs" / "bad" / folder / f"seed{seed}.log"
        assert f"failed  {log.with_suffix('')}, the end of {log}:" in result.stdout
        assert re.search(r"^        RuntimeError: no good on [35]$", result.stdout, re.M)
    skipped = re.findall(r"^skipped python algos/(\w+).py --task humanoid-walk --dataset medium .*: .*no policy is "
                         r"shipped for humanoid-walk", result.stdout, re.M)  # fmt: skip
    assert sorted(skipped) == ["bad", "bad", "bc", "bc"]
    again = benchmark(repo, *words)
    assert "making a set" not in again.stdout
    assert again.stdout.splitlines()[-1] == last.format(0, 2)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_from_a_clean_clone_to_a_finished_report(tmp_path):
    """The README's command, over all files: sets are made, runs end, the report has their rows. --quick is cut down."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    files = sorted((clone / "algos").glob("*.py"))
    for file in files:
        text, end = file.read_text(), 'if __name__ == "__main__":'
        phases = {"steps": 2, "model_steps": 2, "agent_steps": 2, "offline_steps": 2, "model_first": 1}
        tiny = {name: value for name, value in phases.items() if f"\n    {name}: int" in text}
        tiny |= {"transitions": 1_000, "batch_size": 2, "eval_every": 2, "eval_episodes": 1}
        assert text.count(end) == 1
        file.write_text(text.replace(end, f"QUICK |= {tiny}\n{end}"))
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", clone, *author, "commit", "-qam", "A shorter --quick"], check=True)
    filters = ["--tasks", "walker-walk", "--datasets", "medexp"]
    command = ["./benchmark.sh", "--quick", "--seeds", "2", "--jobs", "2", *filters]
    result = subprocess.run(command, cwd=clone, env=CLEAN, text=True, timeout=1_200, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{2 * len(files)} finished, 0 finished before, 0 skipped" in result.stdout
    with (clone / "report" / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"].endswith("-1000")]
    assert sorted(row["algo"] for row in rows) == [file.stem for file in files], rows
    assert all(row["seeds"] == "2" and row["quick"] == "True" for row in rows)
    assert (clone / "report" / "index.html").stat().st_size > 100_000


def test_jobs_take_turns_on_the_gpus(repo, tiny_set, tmp_path):
    words = ["--algos", "bad", "--datasets", tiny_set, "--seeds", 3, "--jobs", 3, "--gpus", 2]
    benchmark(repo, *words, "--runs-dir", tmp_path, "--", *SHORT, CUDA_VISIBLE_DEVICES="4,7,8")
    gpus = [re.search("Error: no good on (.)", log.read_text())[1] for log in tmp_path.glob("bad/*/*/*.log")]
    assert sorted(gpus) == ["4", "4", "7"]  # two of those that are visible; the third job shares the first
    assert all("share of the GPU's memory 0.3\n" in log.read_text() for log in tmp_path.glob("bad/*/*/*.log"))


def test_a_set_whose_making_fails_skips_its_rows(repo, tmp_path):
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random", "--seeds", 2]
    result = benchmark(repo, *words, "--runs-dir", tmp_path, "--", "--transitions", 100, "--data-dir", tmp_path)
    assert result.returncode == 1  # unlike a set for which there is no policy
    assert result.stdout.count("error: --transitions 100: at least one episode") == 3  # when it fails, and per row
    assert "0 finished, 0 finished before, 2 skipped" in result.stdout


def test_the_report_of_the_runs_is_written_at_the_end(repo, tiny_set, tmp_path):
    shutil.rmtree(repo / "report", ignore_errors=True)
    words = ["--algos", "bc", "--datasets", tiny_set, "--seeds", 1, "--runs-dir", tmp_path / "my runs", "--", *SHORT]
    evaluated = [word if word != 0 else 4 for word in words] + ["--eval-episodes", 1]  # --eval-every 4
    result = benchmark(repo, *evaluated)
    assert result.returncode == 0, result.stdout
    committed = len((ROOT / "results" / "summary.csv").read_text().splitlines()) - 1
    assert f"{committed + 1} runs in " in result.stdout
    assert tiny_set.name in (repo / "report" / "table.csv").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_stopping_stops_all_runs_with_a_checkpoint_and_the_next_call_continues(repo, tmp_path, number):
    own, runs = write_set(tmp_path / "own", (60, 40), 21), tmp_path / "runs"
    flags = ["--algos", "bc", "--datasets", own, "--tasks", "own", "--seeds", "3", "--jobs", "2"]
    flags += [
        "--runs-dir",
        str(runs),
        "--",
        "--steps",
        "1500",
        "--batch-size",
        "4",
        "--eval-every",
        "0",
        "--log-every",
        "1",
    ]
    flags += ["--feature-dim", "8", "--hidden-dim", "8", "--device", "cpu"]
    folder = runs / "bc" / "own" / "own"
    with subprocess.Popen(["./benchmark.sh", *map(str, flags)], cwd=repo, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CLEAN,
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not all(rows(folder / f"seed{seed}") > 20 for seed in (0, 1)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number)  # as a terminal does
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert output.splitlines()[-1].startswith("0 finished, 0 finished before, 0 skipped, 3 stopped or not begun")
    for seed in (0, 1):
        assert list((folder / f"seed{seed}").glob("checkpoint-*"))
        assert "with a checkpoint; the same command continues" in (folder / f"seed{seed}.log").read_text()
        common.lock_file(folder / f"seed{seed}" / ".lock").close()  # nobody holds it: the run has ended
    assert not (folder / "seed2").exists()
    dry = benchmark(repo, "--dry-run", *flags).stdout.splitlines()
    assert [bool(re.search(r"  # step \d+$", line)) for line in dry] == [True, True, False]
    result = benchmark(repo, *flags)
    assert result.returncode == 0, result.stdout
    assert "3 finished" in result.stdout
    for seed in (0, 1, 2):
        assert rows(folder / f"seed{seed}") == 1500
        assert ("continuing" in (folder / f"seed{seed}.log").read_text()) == (seed < 2)


def test_stopping_while_a_set_is_made_begins_no_run(repo, tmp_path):
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random,medium", "--seeds", "1"]
    words += ["--runs-dir", tmp_path / "runs", "--", "--data-dir", tmp_path / "data"]  # two full sets
    with subprocess.Popen(["./benchmark.sh", *map(str, words)], cwd=repo, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CLEAN,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
        folder, deadline = tmp_path / "data" / "made" / "walker-walk" / "random-84px", time.monotonic() + 60
        while not (folder / "image.npy").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert output.count("making a set") == 1
    assert "0 skipped, 2 stopped or not begun, 0 failed" in output.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    common.lock_file(folder / ".lock").close()  # the collector has ended


def test_what_nohup_ignores_does_not_stop_it(repo, tiny_set, tmp_path):
    words = ["--algos", "bc", "--datasets", tiny_set, "--seeds", "1", "--runs-dir", tmp_path, "--", *SHORT]
    with subprocess.Popen(["./benchmark.sh", *map(str, words)], cwd=repo, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CLEAN,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:  # fmt: skip
        for line in process.stdout:
            if "1 runs, 1 at a time" in line:
                break
        os.killpg(process.pid, signal.SIGHUP)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "1 finished" in output


def rows(run: Path) -> int:
    """Rows of train.csv, each step once."""
    if not (run / "train.csv").exists():
        return 0
    with open(run / "train.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert len(steps) == len(set(steps))
    return len(steps)


def test_sets_are_staged_whole_with_their_parts(tmp_path):
    task = tmp_path / "data" / "made" / "own"
    parts = [write_set(task / name, (6,), 21, seed=seed) for seed, name in enumerate(("medium-21px", "expert-21px"))]
    (task / "medexp-21px").mkdir()
    meta = {"format": 1, "name": "medexp", "parts": ["../medium-21px", "../expert-21px"]}
    (task / "medexp-21px" / "meta.json").write_text(json.dumps(meta))
    node = tmp_path / "node"
    (node / "made" / "own" / "expert-21px.partial").mkdir(parents=True)  # a copy that was killed
    for _ in range(2):
        assert run_all.stage(task / "medexp-21px", node) == node
        dataset = common.Dataset(node / "made" / "own" / "medexp-21px")
        assert dataset.num_transitions == 12
        for part, copy in zip(parts, dataset.parts):
            assert copy.path.is_relative_to(node)
            assert (part / "image.npy").read_bytes() == (copy.path / "image.npy").read_bytes()
        (node / "made" / "own" / "medium-21px" / "mine").touch()  # would be gone if it were copied again
    assert (node / "made" / "own" / "medium-21px" / "mine").exists()
    shutil.rmtree(parts[0])
    write_set(parts[0], (8,), 21, seed=5)  # the set was made anew
    run_all.stage(task / "medexp-21px", node)
    assert common.Dataset(node / "made" / "own" / "medexp-21px").num_transitions == 14
    with pytest.raises(UserError, match="a variable that is not set"):
        run_all.stage(task / "medexp-21px", Path("/nowhere/$UNSET"))


def test_runs_read_the_staged_set(repo, tiny_set, tmp_path):
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random", "--seeds", 1]
    words += ["--stage-dir", "$NODE/a b", "--runs-dir", tmp_path / "runs"]
    extra = [*SHORT, "--transitions", 1000, "--data-dir", tiny_set.parents[2]]
    result = benchmark(repo, *words, "--", *extra, NODE=str(tmp_path / "node"))
    assert result.returncode == 0, result.stdout
    run = tmp_path / "runs" / "bc" / "walker-walk" / tiny_set.name / "seed0"
    assert json.loads((run / "config.json").read_text())["args"]["data_dir"] == str(tmp_path / "node" / "a b")
    assert "making it" not in Path(f"{run}.log").read_text()  # it is the copy


def test_a_variable_that_is_not_set_stages_nothing(repo, tiny_set, tmp_path):
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", "random", "--seeds", 1]
    words += ["--stage-dir", "$UNSET_HERE", "--runs-dir", tmp_path / "runs"]
    result = benchmark(repo, *words, "--", *SHORT, "--transitions", 1000, "--data-dir", tiny_set.parents[2])
    assert result.returncode == 1
    assert "error: --stage-dir $UNSET_HERE: it names a variable that is not set here" in result.stdout


# ---- Slurm ----


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """sbatch, squeue and scontrol that write down what they are asked. Returns a function: the calls of one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (("sbatch", "echo 7"), ("squeue", ":"), ("scontrol", "exit $SCONTROL_STATUS")):
        calls = folder / f"{name}.calls"
        script = f'echo "{name} $*" >> {calls}; cat > {folder}/{name}.$(wc -l < {calls}); {answer}'
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setitem(CLEAN, "PATH", f"{folder}:{CLEAN['PATH']}")
    monkeypatch.setitem(CLEAN, "SCONTROL_STATUS", "0")
    return folder


def test_what_slurm_is_asked_for(repo, tiny_set, tmp_path, scheduler):
    words = ["--algos", "bc", "--tasks", "walker-walk", "--datasets", f"random,{tiny_set}", "--seeds", 2, "--slurm"]
    words += ["--jobs", 3, "--slurm-args", "--partition=gpu --comment='two words'", "--runs-dir", tmp_path / "runs"]
    result = benchmark(repo, *words, "--", "--data-dir", tmp_path / "data", "--transitions", 500)
    assert result.returncode == 0 and "array 7: 4 runs" in result.stdout, result.stdout
    sets, array = (scheduler / "sbatch.calls").read_text().splitlines()
    for call in (sets, array):
        assert call.endswith("--partition=gpu --comment=two words")
        assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} < set(call.split())
    assert "--array=1-4%3 " in array and "--dependency=afterany:7" in array and "--dependency" not in sets
    for number in (1, 2):
        subprocess.run(["bash", "-n", scheduler / f"sbatch.{number}"], check=True)
    script = (scheduler / "sbatch.2").read_text()
    listed = [json.loads(line) for line in script.splitlines() if line.startswith("{")]
    assert [bool(row["make"]) for row in listed] == [True, True, False, False]
    shown = subprocess.run(["bash", "-c", re.sub(r"\nexec .*", '\nprintf %s "$row"', script)], text=True,
                           env=CLEAN | {"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, check=True)  # fmt: skip
    assert json.loads(shown.stdout) == listed[1]
    failed = subprocess.run([sys.executable, "benchmarks/run_all.py", "--row", json.dumps(listed[0])], cwd=repo,
                            env=CLEAN, capture_output=True, text=True)  # fmt: skip
    assert failed.returncode == 1 and "random-84px-500 is missing; the log of the job that makes" in failed.stdout


def test_making_sets_is_queued_again_at_the_time_limit(tmp_path, scheduler):
    """What makes a set is asked to stop, what comes after it does not begin."""
    make = "bash -c 'trap \"touch asked; exit 1\" TERM; touch begun; while :; do sleep 0.05; done'"
    script = run_all.SETS.format(sets=f"{make}\ntouch second")
    with subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=CLEAN | {"SLURM_JOB_ID": "31"}) as job:
        wait_until((tmp_path / "begun").exists, 20)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 1
    assert (tmp_path / "asked").exists() and not (tmp_path / "second").exists()
    assert (scheduler / "scontrol.calls").read_text() == "scontrol requeue 31\n"


@pytest.mark.parametrize("status", [0, 1])
def test_repeated_signals_leave_the_checkpoint_whole(repo, tmp_path, scheduler, monkeypatch, status):
    """USR1 before the time limit, then what Slurm sends at it: the run is not killed, and is queued again."""
    own, runs = write_set(tmp_path / "own", (60, 40), 21), tmp_path / "runs"
    command = f"python algos/bc.py --dataset {own} --steps 100000 --batch-size 4 --eval-every 0 --log-every 1 "
    command += f"--feature-dim 8 --hidden-dim 8 --device cpu --runs-dir {runs}"
    run = runs / "bc" / "own" / "own" / "seed0"
    row = run_all.Row(str(run), str(own), "", command, "new", False)
    words = [sys.executable, "benchmarks/run_all.py", "--row", json.dumps(vars(row))]
    environment = CLEAN | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SCONTROL_STATUS": str(status)}
    with subprocess.Popen(words, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True) as task:
        wait_until(lambda: rows(run) > 20, 60)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            task.send_signal(number)
        output = task.communicate(timeout=60)[0]
    assert list(run.glob("checkpoint-*")) and "with a checkpoint" in row.log.read_text()
    assert (scheduler / "scontrol.calls").read_text() == "scontrol requeue 7_3\n"
    assert ("it is not queued again" in output) == bool(status)


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


def queue() -> dict[str, tuple[str, str]]:
    """array_task -> (job id, state) of what is not over."""
    text = subprocess.run(["squeue", "-h", "-r", "-o", "%i %A %T"], capture_output=True, text=True, check=True).stdout
    return {task: (job, state) for task, job, state in map(str.split, text.splitlines())}


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, queue() if shutil.which("squeue") else ""
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("sbatch", "slurmd", "slurmctld", "munged"))),
    reason="needs root and Debian's slurm-wlm and munge",
)
def test_slurm_array(repo, slurm, tmp_path):
    """Eight runs, two at a time: sets first, one algorithm fails; one run reaches its time limit's signal, one is
    requeued by the scheduler; both continue from their checkpoints."""
    runs, data = tmp_path / "runs", tmp_path / "data"
    words = [
        "--algos",
        "bc,bad",
        "--tasks",
        "walker-walk",
        "--datasets",
        "random",
        "--seeds",
        4,
        "--slurm",
        "--jobs",
        2,
    ]
    words += ["--slurm-args", "--partition=test --time=10 --export=ALL", "--runs-dir", runs]
    words += ["--stage-dir", f"{tmp_path}/$SLURM_JOB_PARTITION", "--"]
    words += ["--steps", 1500, "--batch-size", 2, "--eval-every", 0, "--log-every", 1, "--device", "cpu"]
    words += ["--feature-dim", 8, "--hidden-dim", 8, "--transitions", 500, "--data-dir", data]
    environment = {"SLURM_CONF": os.environ["SLURM_CONF"]}
    result = benchmark(repo, *words, **environment)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^job \d+ makes 1 sets\narray \d+: 8 runs", result.stdout, re.M), result.stdout
    states = queue()
    array = re.search(r"array (\d+):", result.stdout)[1]
    assert [state for task, (_, state) in states.items() if task.startswith(f"{array}_")] == ["PENDING"] * 8
    folder = runs / "bc" / "walker-walk" / "random-84px-500"
    wait_until(lambda: all(rows(folder / f"seed{seed}") > 20 for seed in (0, 1)), 120)
    # What Slurm sends before the time limit. scancel itself goes on asking, for the job is soon no longer running.
    asking = subprocess.Popen(["scancel", "--batch", "--signal=USR1", f"{array}_1"], stderr=subprocess.DEVNULL)
    subprocess.run(["scontrol", "requeue", f"{array}_2"], check=True)  # what preemption does
    wait_until(lambda: all(queue().get(f"{array}_{task}", ("", ""))[1] == "PENDING" for task in (1, 2)), 60)
    asking.kill()  # else it would signal the continued run too
    asking.wait()
    for task in (1, 2):  # Slurm lets requeued jobs wait for two minutes
        subprocess.run(["scontrol", "update", f"JobId={array}_{task}", "StartTime=now"], check=True)
    for seed in (0, 1):
        assert "with a checkpoint; the same command continues" in (folder / f"seed{seed}.log").read_text()
        assert rows(folder / f"seed{seed}") < 1500
    wait_until(lambda: not queue(), 240)
    for seed in range(4):
        assert (folder / f"seed{seed}" / "finished.json").exists()
        assert rows(folder / f"seed{seed}") == 1500
        assert ("continuing" in (folder / f"seed{seed}.log").read_text()) == (seed < 2)
        config = json.loads((folder / f"seed{seed}" / "config.json").read_text())
        assert config["args"]["data_dir"] == f"{tmp_path}/test"  # staged, the name looked up in the job
    logs = [path.read_text() for path in (repo / "runs" / "slurm").glob(f"{array}_*.log")]
    assert sum("RuntimeError: no good" in log and log.startswith("failed ") for log in logs) == 4
    again = benchmark(repo, *words, **environment)
    assert "4 finished before, 0 skipped" in again.stdout and ": 4 runs." in again.stdout
    shutil.rmtree(repo / "runs")
