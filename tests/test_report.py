"""report.py on small hand-written run folders. The page: test_page.py."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import report
from benchmarks import figures
from benchmarks.tables import varied_table
from common import UserError


def write_run(path: Path, scores=(10.0, 80.0, 20.0, 30.0), algo="drq_bc", source="made", dataset="medium-84px",
              data_hash="0123456789abcdef", command="algos/drq_bc.py", columns=None, **args) -> Path:  # fmt: skip
    """A finished run folder as common.Run leaves it, evaluated every 100 steps. columns: more ones of eval.csv."""
    args = {"task": "walker-walk", "tag": "", "seed": 0, "quick": False, "precision": "bf16"} | args
    facts = {"set": dataset, "source": source, "hash": data_hash, "mean_return": 441.2345, "render": "fast"}
    config = {"algo": algo, "args": args | {"accelerate": "eager"}, "dataset": facts, "resumed": [], "command": command}
    config |= {"versions": {"torch": "2.13.0", "numpy": "2.3.5"}, "hardware": "2 cores of X, Y", "commit": "abc-dirty"}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    table = {"step": [100 * (i + 1) for i in range(len(scores))], "wall_s": scores, "score": scores} | (columns or {})
    rows = [",".join(map(str, row)) for row in [table, *zip(*table.values())]]
    (path / "eval.csv").write_text("\n".join(rows) + "\n")
    (path / "finished.json").write_text(json.dumps({"steps": table["step"][-1], "wall_s": 12.5}))
    return path


def write_seeds(folder: Path, last_scores, extra=(), **kwargs) -> list[Path]:
    """A run per seed that ends with score - 2, score, under folder/runs; extra: earlier evaluations."""
    names = [str(kwargs.get(name, "")) for name in ("algo", "task", "dataset", "tag", "source", "quick", "data_hash")]
    paths = [folder / "runs" / "-".join([*names, str(len(extra))]) / f"seed{seed}" for seed in range(len(last_scores))]
    ends = ((5.0, *extra, score - 2, score) for score in last_scores)
    return [write_run(path, scores, seed=seed, **kwargs) for seed, (path, scores) in enumerate(zip(paths, ends))]


def call(folder: Path, **kwargs) -> None:
    places = {"results_dir": folder / "results", "runs_dir": folder / "runs", "out": folder / "report"}
    report.main(report.Args(**{name: str(path) for name, path in places.items()}, **kwargs))


def add(folder: Path, *runs: Path) -> list[dict]:
    call(folder, add=tuple(map(str, runs)))
    return read(folder / "results" / "summary.csv")


def read(file: Path) -> list[dict]:
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def groups_of(folder: Path) -> list[report.Group]:
    return report.groups_of(report.gather(folder / "results", folder / "runs")[0])


# ---- --add ----


def test_row_curve_flags_and_metrics(tmp_path):
    run = write_run(tmp_path / "run", command='algos/drq_bc.py --tag "a, b"')
    (run / "train.csv").write_text("step,loss\n200,0.75\n400,0.5\n")
    (row,) = add(tmp_path, run)
    assert row == dict.fromkeys(report.COLUMNS, "") | {
        "algo": "drq_bc", "task": "walker-walk", "dataset": "medium-84px", "source": "made", "quick": "False",
        "data_hash": "0123456789abcdef", "data_mean": "441.23", "render": "fast", "seed": "0", "steps": "400",
        "score_last": "30.0", "score_late_mean": "25.0", "wall_s": "12.5", "hardware": "2 cores of X, Y, bf16, eager",
        "versions": "torch 2.13.0; numpy 2.3.5", "commit": "abc-dirty", "command": "algos/drq_bc.py --tag 'a, b'",
    }  # fmt: skip
    place, found = "drq_bc/walker-walk/medium-84px/seed0", files(tmp_path / "results")
    curve, config, metrics = f"curves/{place}.csv", f"configs/{place}.json", f"metrics/{place}.json"
    assert set(found) == {"summary.csv", curve, config, metrics}  # nothing temporary is left
    assert json.loads(found[metrics]) == {"train": {"step": "400", "loss": "0.5"}}
    assert json.loads(found[config])["precision"] == "bf16" and found[curve] == (run / "eval.csv").read_bytes()


def test_paths_of_a_machine_stay_out_and_one_seed_keeps_its_video_as_it_is(tmp_path):
    command = "/home/me/clone/algos/bc.py --data-dir /home/me/data --dataset=../own/robot --runs-dir /home/me"
    flags = {"data_dir": "/home/me/data", "model_from": "/home/me/runs/seed0", "command": f"{command} --nstep 1"}
    runs = [write_run(tmp_path / f"s{seed}", seed=seed, **flags) for seed in range(2)]
    for run in runs:
        (run / "evaluation.mp4").write_bytes(run.name.encode())
    assert {row["command"] for row in add(tmp_path, *runs)} == {"algos/bc.py --dataset=own/robot --nstep 1"}
    add(tmp_path, *runs)
    found = files(tmp_path / "results")
    assert not any(b"/home/me" in content for content in found.values())
    assert [(Path(name).name, text) for name, text in found.items() if "videos" in name] == [("seed0.mp4", b"s0")]


def test_runs_that_collect(tmp_path):
    """Over steps in the environment, from the offline phase's last evaluation on; returns and successes as they are."""
    more = {"success": (0, 25, 50, 100), "env_steps": (0, 0, 2000, 4000), "episodes": (0, 0, 10, 20)}
    (row,) = add(tmp_path, write_run(tmp_path / "r", (10, 20, 30, 60), task="metaworld-drawer-open", columns=more))
    assert [row[name] for name in ("env_steps", "episodes", "success_last")] == ["4000", "20", "100.0"]
    group = report.Group(report.gather(tmp_path / "results", None)[0])
    assert group.runs[0].points == [(0, 25.0), (2000, 50.0), (4000, 100.0)]
    text = report.markdown([group])
    assert "| 60.0 (success 100 %) | 45.0 (success 75 %) |" in text and "; 4,000 steps online |" in text
    assert "made, 441.2" in text


def test_late_mean_is_of_the_last_tenth_and_at_least_two():
    cases = {(7,): 7, (1, 5): 3, (*[0] * 18, 10, 20): 15, (*[0] * 37, 1, 2, 3, 6): 3, (*[99] * 28, 3, 6): 36}
    assert {scores: report.late_mean(scores) for scores in cases} == cases


def test_rows_are_replaced_and_sorted_and_their_folders_are_those_of_runs(tmp_path):
    flags = [{"seed": 10}, {"seed": 2}, {"tag": "x"}, {"task": "cheetah-run", "quick": True, "source": "vd4rl"}]
    runs = [write_run(tmp_path / str(i), **one) for i, one in enumerate(flags)]
    rows, before = add(tmp_path, *runs), files(tmp_path / "results")
    assert [(row["task"], row["tag"], row["seed"]) for row in rows] == [
        ("cheetah-run", "", "0"), ("walker-walk", "", "2"), ("walker-walk", "", "10"), ("walker-walk", "x", "0")
    ]  # fmt: skip
    places = [f"drq_bc/walker-walk/medium-84px/{name}.csv" for name in ("seed10", "seed2", "x-seed0")]
    places.append("quick/drq_bc/cheetah-run/medium-84px-vd4rl/seed0.csv")
    assert [name for name in sorted(before) if name.startswith("curves")] == [f"curves/{place}" for place in places]
    add(tmp_path, runs[1])
    assert files(tmp_path / "results") == before  # the same run twice changes nothing
    rows = add(tmp_path, write_run(tmp_path / "again", scores=(1.0, 2.0, 3.0), seed=2))
    assert [row["score_last"] for row in rows] == ["30.0", "3.0", "30.0", "30.0"]


def edit(name: str, old: str, new: str):
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


BROKEN = {
    "no folder": (lambda run: [file.unlink() for file in run.iterdir()], "no config.json"),
    "unfinished": (lambda run: (run / "finished.json").unlink(), "not finished"),
    "without evaluations": (lambda run: (run / "eval.csv").unlink(), "never evaluated"),
    "broken json": (edit("config.json", "{", "["), "malformed"),
    "missing key": (edit("config.json", '"hash"', '"cash"'), "'hash' is missing"),
    "no score": (edit("eval.csv", "score", "other"), "'score' is missing"),
    "text for a number": (edit("eval.csv", "80.0", "eighty"), "eighty"),
    "not finite": (edit("eval.csv", "80.0", "nan"), "not finite"),
    "short row": (edit("eval.csv", "80.0,80.0", "80.0"), "as long as its header"),
    "last evaluation lost": (edit("eval.csv", "400,30.0,30.0\n", ""), "last step, 400"),
    "steps that are no number": (edit("eval.csv", "wall_s", "env_steps"), "'30.0'"),
    "binary": (lambda run: (run / "eval.csv").write_bytes(b"\xff\xfe\x00"), "malformed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_one_line_and_nothing_is_written(tmp_path, name):
    damage, message = BROKEN[name]
    good, bad = write_run(tmp_path / "good", seed=1), write_run(tmp_path / "bad")
    damage(bad)
    with pytest.raises(UserError, match=message) as error:
        add(tmp_path, good, bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()
    with pytest.raises(UserError, match="name run folders"):  # benchmark.sh's, which a shell's seed* finds, too
        add(tmp_path, tmp_path / "seed0.log")
    assert len(add(tmp_path, good, tmp_path / "seed0.log")) == 1


@pytest.mark.parametrize("text", ["algo,task\nbc,walker-walk\n", ",".join(report.COLUMNS) + "\nbc,walker-walk\n", ""])
def test_a_foreign_summary_is_kept(tmp_path, text):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "summary.csv").write_text(text)
    with pytest.raises(UserError, match="summary.csv: its columns are not"):
        add(tmp_path, write_run(tmp_path / "run"))
    assert files(tmp_path / "results") == {"summary.csv": text.encode()}


# ---- what is averaged, and how ----


def test_intervals():
    """Student: t(0.975, 2) = 4.3027, deviation 2. Welch: variances 4 / 3 and 16 / 3 of the means, 2.94 degrees of
    freedom, t = 3.22. Of two pairs the variances add up to 40 / 3, a quarter of it is the mean's; twice the degrees of
    freedom, 5.88: t = 2.459."""
    a, b = [10.0, 12.0, 14.0], [20.0, 24.0, 28.0]
    pairs = [(a, b), ([v + 50 for v in a], [v + 54 for v in b])]
    for found, mean, half in ((report.interval(a), 12.0, 4.3027 * 2 / math.sqrt(3)),
                              (report.difference(pairs[:1]), 12.0, 3.22 * math.sqrt(20 / 3)),
                              (report.difference(pairs), 14.0, 2.459 * math.sqrt(10 / 3))):  # fmt: skip
        assert found == (mean, pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    assert report.interval([7.0]) == (7.0, None, None) and report.difference([([1.0], [2.0, 3.0])])[1] is None
    assert report.difference([([1.0, 1.0], [2.0, 2.0])]) == (1.0, 1.0, 1.0)


def test_iqm_is_of_the_middle_half_and_its_bootstrap_is_stratified_by_row():
    """By hand: a resample takes two of each row; sorted, the middle two of the four values average to 4 with
    probability 3 / 16, which is more than 2.5 %, to 6 with 10 / 16, to 8 with 3 / 16. Not stratified, 0 would occur."""
    assert report.iqm(np.array([[0.0, 4.0], [8.0, 12.0]])) == (6.0, 4.0, 8.0)
    assert report.iqm(np.array([[0.0, 100, 10, 20]]))[0] == 15.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of many kinds: what each test below takes from them stands there."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "results").mkdir()
    for task, base in (("walker-walk", 10), ("cheetah-run", 20)):
        write_seeds(folder, [base, base + 2, base + 4], task=task)
        lompo = {"algo": "lompo", "task": task, "dataset": "medium-64px", "data_hash": "f" * 16}  # the set at 64 px
        write_seeds(folder, [base + 10, base + 14, base + 18], **lompo)
    write_seeds(folder, [90, 90, 90], extra=(1.0,), **lompo)  # of another length
    write_seeds(folder, [10, 10, 10], task="humanoid-walk")
    write_seeds(folder, [90, 90, 90, 90], algo="lompo", task="humanoid-walk", extra=(1.0,))
    write_seeds(folder, [99, 99, 99], algo="my_idea")  # one row alone
    smaller = {"dataset": "medium-84px-20000"}
    others = [{"tag": "x"}, {"source": "vd4rl"}, smaller, {"quick": True}, smaller | {"data_hash": "e"},
              {"algo": "bc", "tag": "wide"}]  # fmt: skip
    for score, other in zip((90, 30, 40, 50, 60, 8), others):
        write_seeds(folder, [score], **other)
    return folder


def test_seeds_alone_are_averaged(world):
    rows = {(group.row["task"], group.name, group.table["score_last"]): group.table for group in groups_of(world)}
    assert len(rows) == 14
    row, half = rows["walker-walk", "drq_bc", 12.0], 4.3027 * 2 / math.sqrt(3)
    assert row["score_last_low"] == pytest.approx(12 - half, abs=0.01)
    assert (row["score_late_mean"], row["paper_mean"], row["paper_std"]) == (11.0, 46.8, 2.3)
    notes = {("drq_bc", 12.0): "", ("drq_bc", 50.0): "quick, 1 seed, ", ("bc:wide", 8.0): "1 seed, "}
    for (name, score), note in notes.items():
        assert rows["walker-walk", name, score]["notes"] == note + "uncommitted code"  # write_run says abc-dirty
    assert rows["walker-walk", "drq_bc", 40.0]["paper_mean"] is None  # a smaller set is not the paper's


def test_a_run_in_both_places_is_one_and_own_rows_come_first(tmp_path):
    add(tmp_path, *write_seeds(tmp_path, [90], quick=True, extra=(1.0,)), *write_seeds(tmp_path, [50], algo="bc"))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    write_seeds(tmp_path, [20], algo="my_idea", quick=True)
    found = [(group.name, group.own) for group in groups_of(tmp_path)]
    assert found == [("my_idea", True), ("bc", False), ("drq_bc", False)]
    write_seeds(tmp_path, [90], quick=True, extra=(1.0,))  # the same run again
    write_seeds(tmp_path, [3], quick=True)  # a shorter one of that seed
    found = [(group.own, group.steps, len(group.runs)) for group in groups_of(tmp_path) if group.name == "drq_bc"]
    assert found == [(True, 300, 1), (True, 400, 1)]


def test_aggregates_are_over_shared_full_rows_of_the_longest_runs(world, tmp_path):
    shared, methods = report.aggregate(groups_of(world))
    assert shared == ["walker-walk medium made", "cheetah-run medium made", "humanoid-walk medium made"]
    assert [(method["name"], method["iqm"]) for method in methods] == [  # of nine values the five in the middle
        ("drq_bc", (10 + 10 + 12 + 14 + 20) / 5), ("lompo", (28 + 4 * 90) / 5)]  # fmt: skip
    assert all(method["low"] <= method["iqm"] <= method["high"] for method in methods)
    runs = write_seeds(tmp_path, [10, 20, 30])
    assert len(report.aggregate(groups_of(tmp_path))[0]) == 1
    for old, new in (('"accelerate"', '"lr": 0.1, "accelerate"'), ("drq_bc.py", "drq_bc.py --lr 0.1")):
        edit("config.json", old, new)(runs[2])
        groups = groups_of(tmp_path)
        assert "mixed flags" in groups[0].table["notes"] and report.aggregate(groups) == ([], [])
        edit("config.json", new, old)(runs[2])


def test_compare(world, capsys):
    def lines(*names):
        call(world, compare=names)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    found = lines("drq_bc", "lompo")
    assert found[2] == "walker-walk medium made 300 steps 12.0 (3) 24.0 (3) +12.0 [+3.7, +20.3]"
    assert found[3].startswith("cheetah-run medium made 300 steps 22.0 (3) 34.0 (3) +12.0")
    assert found[4].startswith("humanoid-walk medium made 300 and 400 steps 10.0 (3) 90.0 (4)")
    assert found[5] == "mean of the 2 full rows of 3 or more seeds and equal length +12.0 [+7.5, +16.5]"
    for name in ("bc:wide", "bc"):  # the only tag there is need not be named
        assert lines("drq_bc:x", name)[2] == "walker-walk medium made 300 steps 90.0 (1) 8.0 (1) -82.0"
    with pytest.raises(UserError, match="none/results: no such folder"):
        call(world / "none", docs=True)  # it would empty every table
    with pytest.raises(UserError, match="there are bc:wide, drq_bc, drq_bc:x, lompo, my_idea"):
        lines("bc", "no")


def test_the_repositorys_pages_are_filled():
    """python report.py --docs has been run since results/ changed, and to run it again changes nothing."""
    assert report.fill_docs(ROOT / "results", report.PAGES) == {page: page.read_text() for page in report.PAGES}


def test_the_figure_of_curves(world):
    groups = [group for group in groups_of(world) if group.place[:3] == ("cheetah-run", "medium", "made")]
    (axis,) = report.plot_curves(groups, figures.looks(groups)).axes
    means = {line.get_label(): list(line.get_ydata()) for line in axis.lines if line.get_linewidth() >= 2}
    assert means["the data's mean"] == [44.12, 44.12] and means["drq_bc, 300 updates (3)"] == [5, 20, 22]
    assert len(means) == 4 and means["lompo, 400 updates (3)"] == [5, 1, 88, 90]


def test_rows_on_other_looks_and_bodies_stand_beside_the_papers(tmp_path):
    sets = {"medexp-84px-low50": ("train", "test"), "medexp-84px-bodies": ("interpolation", "extrapolation")}
    for dataset, names in sets.items():
        for seed in range(2):
            parts = {f"score_{name}": [0, 0, 7.0 + seed, 9.0 + seed] for name in names}
            run = tmp_path / "runs" / dataset / f"seed{seed}"
            write_run(run, dataset=dataset, task="cheetah-run", seed=seed, columns=parts)
    groups = groups_of(tmp_path)
    assert varied_table(groups).splitlines()[2:] == [
        "| drq_bc | cheetah-run medexp | bodies | train 25.0, interpolation 8.5, extrapolation 8.5 | 44.1 "
        "| 71.6 / 65.1 / 43.2 | 2 |",
        "| drq_bc | cheetah-run medexp | low, 50 % shifted, procedural | original 25.0, train 8.5, test 8.5 | 44.1 "
        "| 72.3 / 82.2 / 8.5 | 2 |",
    ]
    (axis,) = figures.plot_shifts(groups).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[25.0], [8.5], [8.5]]
    assert not figures.plot_scores(groups).axes[0].lines  # no panel on the first screen
