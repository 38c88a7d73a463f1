"""report.py on small hand-written run folders; benchmarks/throughput.py as a rehearsal."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import common
import report
from common import UserError, save_video

ROOT = Path(__file__).resolve().parents[1]
STYLE = ("algo, task, dataset, source, data_hash, data_mean, render, tag, seed, steps, quick, score_last, "
         "score_late_mean, success_last, success_late_mean, env_steps, episodes, wall_s, hardware, versions, commit, "
         "command")  # fmt: skip


def write_run(path: Path, scores=(10.0, 80.0, 20.0, 30.0), success=None, finished=None, source="made", algo="drq_bc",
              dataset="medium-84px", data_hash="0123456789abcdef", command='algos/drq_bc.py --tag "a, b"',
              **args) -> Path:  # fmt: skip
    """A finished run folder as common.Run leaves it, evaluated every 100 steps."""
    args = {"task": "walker-walk", "tag": "", "seed": 0, "quick": False} | args
    facts = {"set": dataset, "source": source, "hash": data_hash, "mean_return": 441.2345}
    args |= {"precision": "bf16", "accelerate": "eager"}
    config = {"algo": algo, "args": args, "dataset": facts | {"render": "fast"}, "commit": "abc-dirty", "resumed": []}
    config |= {"versions": {"torch": "2.13.0", "numpy": "2.3.5"}, "hardware": "2 cores of X, Y"}
    config |= {"command": command}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    steps = [100 * (i + 1) for i in range(len(scores))]
    (path / "finished.json").write_text(json.dumps({"steps": steps[-1], "wall_s": 12.5} | (finished or {})))
    header = "step,wall_s,score,return_0,return_1" + (",success" if success else "")
    lines = [f"{t},{t / 10},{s},{10 * s - 1},{10 * s + 1}" for t, s in zip(steps, scores)]
    lines = [f"{line},{s}" for line, s in zip(lines, success)] if success else lines
    (path / "eval.csv").write_text("\n".join([header, *lines]) + "\n")
    return path


def add(results: Path, *runs: Path) -> list[dict]:
    report.main(report.Args(add=tuple(map(str, runs)), results_dir=str(results)))
    return read(results)


def read(results: Path) -> list[dict]:
    with open(results / "summary.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_row_and_curve(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "train.csv").write_text("step,loss\n200,0.75\n400,0.5\n")
    (row,) = add(tmp_path / "results", run)
    assert row == {
        "algo": "drq_bc", "task": "walker-walk", "dataset": "medium-84px", "source": "made",
        "data_hash": "0123456789abcdef", "data_mean": "441.23", "render": "fast", "tag": "", "seed": "0",
        "steps": "400", "quick": "False", "score_last": "30.0", "score_late_mean": "25.0", "success_last": "",
        "success_late_mean": "", "env_steps": "", "episodes": "", "wall_s": "12.5",
        "hardware": "2 cores of X, Y, bf16, eager",
        "versions": "torch 2.13.0; numpy 2.3.5", "commit": "abc-dirty", "command": "algos/drq_bc.py --tag 'a, b'",
    }  # fmt: skip
    assert (tmp_path / "results/summary.csv").read_text().splitlines()[0] == STYLE.replace(" ", "")
    place = "drq_bc/walker-walk/medium-84px/seed0"
    curve, config, metrics = f"curves/{place}.csv", f"configs/{place}.json", f"metrics/{place}.json"
    assert set(files(tmp_path / "results")) == {"summary.csv", curve, config, metrics}  # nothing temporary is left
    assert json.loads((tmp_path / "results" / metrics).read_text()) == {"train": {"step": "400", "loss": "0.5"}}
    assert json.loads((tmp_path / "results" / config).read_text())["precision"] == "bf16"
    assert (tmp_path / "results" / curve).read_bytes() == (run / "eval.csv").read_bytes()


def test_paths_of_a_machine_stay_out_and_one_seed_keeps_its_video(tmp_path):
    command = "/home/me/clone/algos/bc.py --data-dir /home/me/data --dataset=/home/me/own/robot --runs-dir /home/me"
    flags = {"data_dir": "/home/me/data", "model_from": "/home/me/runs/seed0", "command": f"{command} --nstep 1"}
    runs = [write_run(tmp_path / f"s{seed}", seed=seed, **flags) for seed in range(2)]
    for run in runs:
        save_video(run / "evaluation.mp4", [np.zeros((3, 84, 84), np.uint8)] * 3)
    add(tmp_path / "results", *runs)
    add(tmp_path / "results", *runs)
    assert not any(b"/home/me" in content for content in files(tmp_path / "results").values())
    assert {row["command"] for row in read(tmp_path / "results")} == {"algos/bc.py --dataset=own/robot --nstep 1"}
    assert [path.name for path in (tmp_path / "results" / "videos").rglob("*.mp4")] == ["seed0.mp4"]
    found, problems = report.gather(tmp_path / "results", None)
    assert problems == [] and [bool(run.video) for run in found] == [True, False]
    assert [run.args["seed"] for run in found] == [0, 1]  # configurations are in results/, too


def test_commands_of_before_quotes_were_kept():
    assert report.flags_of("algos/bc.py --runs-dir it's --lr 0.1") == [["algos/bc.py"], ["--runs-dir", "it's"],
                                                                       ["--lr", "0.1"]]  # fmt: skip


def test_runs_of_before_the_list_of_resumes(tmp_path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["resumed"]
    (run / "config.json").write_text(json.dumps(config))
    assert add(tmp_path / "results", run)[0]["commit"] == "abc-dirty"


def test_runs_that_collect(tmp_path):
    """Over steps in the environment, from the offline phase's last evaluation on; returns and successes as they are."""
    online = {"episodes": 20, "env_steps": 4000}
    run = write_run(tmp_path / "run", (10, 20, 30, 60), success=(0, 25, 50, 100), finished=online,
                    task="metaworld-drawer-open")  # fmt: skip
    lines = (run / "eval.csv").read_text().splitlines()
    ends = ("env_steps", "0", "0", "2000", "4000")
    (run / "eval.csv").write_text("".join(f"{line},{end}\n" for line, end in zip(lines, ends)))
    add(tmp_path / "results", run)
    groups = report.groups_of(report.gather(tmp_path / "results", None)[0])
    ((key, runs),) = groups.items()
    assert runs[0].curve == [(0, 20.0), (2000, 30.0), (4000, 60.0)]
    row = report.table_row(key, runs, {})
    assert (row["success_last"], row["success_late_mean"], row["env_steps"]) == (100, 75, 4000)
    assert row["data_score"] == row["data_mean"] == 441.23
    text = report.markdown([(row, runs)])
    assert "| 60.0 (success 100 %) | 45.0 (success 75 %) |" in text and "made, 441.2" in text
    assert "; 4,000 steps online |" in text


@pytest.mark.parametrize(
    ("scores", "late"),
    [([7], 7), ([1, 5], 3), ([0] * 18 + [10, 20], 15), ([0] * 37 + [1, 2, 3, 6], 3), ([99] * 28 + [3, 6], 36)],
)
def test_late_mean_is_of_the_last_tenth_and_at_least_two(tmp_path, scores, late):
    (row,) = add(tmp_path / "results", write_run(tmp_path / "run", scores))
    assert float(row["score_late_mean"]) == late and float(row["score_last"]) == scores[-1]


def test_late_mean_agrees_with_a_run_of_common(tmp_path):
    """finished.json and summary.csv must name the same numbers."""
    for count in (1, 2, 5, 14, 15, 20, 25, 35, 41):
        run = write_run(tmp_path / str(count), [1.37 * i % 11 for i in range(count)])
        fake = SimpleNamespace(path=run, _checkpoints=list, wall_s=lambda: 1.0, bar=SimpleNamespace(close=list))
        common.Run._finish(fake, 100 * count, {})
        finished = json.loads((run / "finished.json").read_text())
        (row,) = add(tmp_path / f"results{count}", run)
        assert float(row["score_last"]) == finished["score_last"]
        assert float(row["score_late_mean"]) == finished["score_late_mean"]


def test_success_and_collected_steps(tmp_path):
    run = write_run(tmp_path / "run", success=(0.0, 1.0, 0.5, 0.9), finished={"env_steps": 5000, "episodes": 10})
    (row,) = add(tmp_path / "results", run)
    assert (row["success_last"], row["success_late_mean"]) == ("0.9", "0.7")
    assert (row["env_steps"], row["episodes"]) == ("5000", "10")


def test_paths_of_curves(tmp_path):
    runs = [
        write_run(tmp_path / "a", quick=True),
        write_run(tmp_path / "b", source="vd4rl"),
        write_run(tmp_path / "c", tag="noaug", seed=3),
        write_run(tmp_path / "d", quick=True, source="vd4rl", tag="x"),
    ]
    assert len(add(tmp_path / "results", *runs)) == 4
    found = (path for path in files(tmp_path / "results") if not path.startswith(("configs/", "metrics/")))
    assert {path.removeprefix("curves/") for path in found} == {
        "summary.csv",
        "quick/drq_bc/walker-walk/medium-84px/seed0.csv",
        "drq_bc/walker-walk/medium-84px-vd4rl/seed0.csv",
        "drq_bc/walker-walk/medium-84px/noaug-seed3.csv",
        "quick/drq_bc/walker-walk/medium-84px-vd4rl/x-seed0.csv",
    }


def test_again_replaces_and_rows_stay_sorted(tmp_path):
    results = tmp_path / "results"
    add(results, *(write_run(tmp_path / f"s{seed}", seed=seed) for seed in (10, 2, 0)))
    add(results, write_run(tmp_path / "cheetah", task="cheetah-run"))
    before = files(results)
    assert [(row["task"], row["seed"]) for row in read(results)] == [
        ("cheetah-run", "0"), ("walker-walk", "0"), ("walker-walk", "2"), ("walker-walk", "10")
    ]  # fmt: skip
    add(results, tmp_path / "s2")
    assert files(results) == before  # the same run twice changes nothing
    again = write_run(tmp_path / "again", scores=(1.0, 2.0, 3.0), seed=2)
    rows = add(results, again)
    assert [row["score_last"] for row in rows] == ["30.0", "30.0", "3.0", "30.0"]
    curve = results / "curves/drq_bc/walker-walk/medium-84px/seed2.csv"
    assert curve.read_bytes() == (again / "eval.csv").read_bytes()


def break_json(run):
    (run / "config.json").write_text("{")


def drop_key(run):
    config = json.loads((run / "config.json").read_text())
    del config["dataset"]["hash"]
    (run / "config.json").write_text(json.dumps(config))


def edit_eval(old: str, new: str):
    return lambda run: (run / "eval.csv").write_text((run / "eval.csv").read_text().replace(old, new))


def add_column(name: str, value: str):
    def damage(run):
        header, *lines = (run / "eval.csv").read_text().splitlines()
        (run / "eval.csv").write_text("\n".join([f"{header},{name}", *(f"{line},{value}" for line in lines)]) + "\n")

    return damage


BROKEN = {
    "no folder": (lambda run: [file.unlink() for file in run.iterdir()], "no config.json"),
    "unfinished": (lambda run: (run / "finished.json").unlink(), "not finished"),
    "without evaluations": (lambda run: (run / "eval.csv").unlink(), "never evaluated"),
    "empty evaluations": (lambda run: (run / "eval.csv").write_text("step,wall_s,score\n"), "empty"),
    "broken json": (break_json, "malformed"),
    "a list": (lambda run: (run / "config.json").write_text("[]"), "malformed"),
    "missing key": (drop_key, "'hash' is missing"),
    "no score": (edit_eval("score", "other"), "'score' is missing"),
    "text for a number": (edit_eval("80.0", "eighty"), "eighty"),
    "not finite": (edit_eval(",80.0,", ",nan,"), "not finite"),
    "short row": (edit_eval(",199.0,201.0", ""), "as long as its header"),
    "last evaluation lost": (edit_eval("400,40.0,30.0,299.0,301.0\n", ""), "end with the run's last, 400"),
    "rows out of order": (edit_eval("\n200,", "\n50,"), "steps must rise"),
    "no number of steps": (edit_eval("step,", "env_steps,step,"), "as long as its header"),
    "steps that are no number": (add_column("env_steps", "4000.0"), "4000.0"),
    "binary": (lambda run: (run / "eval.csv").write_bytes(b"\xff\xfe\x00"), "malformed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_run_is_one_line_and_nothing_is_written(tmp_path, name):
    damage, message = BROKEN[name]
    results, good, bad = tmp_path / "results", write_run(tmp_path / "good", seed=1), write_run(tmp_path / "bad")
    damage(bad)
    with pytest.raises(UserError, match=message) as error:
        add(results, good, bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert not results.exists()
    add(results, good)
    before = files(results)
    with pytest.raises(UserError):
        add(results, bad)
    assert files(results) == before


@pytest.mark.parametrize("text", ["algo,task\nbc,walker-walk\n", ",".join(report.COLUMNS) + "\nbc,walker-walk\n", ""])
def test_foreign_summary_is_kept(tmp_path, text):
    results = tmp_path / "results"
    results.mkdir()
    (results / "summary.csv").write_text(text)
    run = write_run(tmp_path / "run")
    for _ in range(2):  # the first attempt leaves no lock that the second would wait for
        with pytest.raises(UserError, match="columns"):
            add(results, run)
    assert files(results) == {"summary.csv": text.encode()}


def run_script(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


def test_command_line(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    log = tmp_path / "s0.log"  # benchmark.sh leaves them beside the folders, where a shell's s* finds them
    done = run_script("report.py", "--add", *runs, log, "--results-dir", tmp_path / "results")
    assert done.returncode == 0 and done.stdout.count("added") == 2, done.stderr
    (runs[0] / "finished.json").unlink()
    failed = run_script("report.py", "--add", runs[0], "--results-dir", tmp_path / "results")
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: {runs[0]}") and failed.stderr.count("\n") == 1
    assert len(read(tmp_path / "results")) == 2
    failed = run_script("report.py", "--add", log, "--results-dir", tmp_path / "results")
    assert failed.returncode == 1 and failed.stderr == "error: --add: these are logs; name run folders\n"


def test_throughput_rehearsal(tmp_path):
    before = files(ROOT / "benchmarks")
    words = ["--quick", "--only", "buffer", "--device", "cpu", "--repeats", 2, "--json", tmp_path / "table.json"]
    done = run_script("-B", "benchmarks/throughput.py", *words)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    (row,) = table["rows"]
    assert row["unit"] == "ms/batch" and 0 < row["value"] < 10_000 and row["ratio"] is None
    assert row["per_second"] == pytest.approx(1e3 / row["value"])
    assert table["calibration_s"] > 0 and table["quick"] and table["versions"]["torch"] in done.stdout
    for text in ("REHEARSAL", "calibration:", "Zen 5", "torch threads"):
        assert text in done.stdout
    assert files(ROOT / "benchmarks") == before
