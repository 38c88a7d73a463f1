"""report.py beyond --add: what is averaged, intervals, --compare, --docs, and the page in a real browser."""

import csv
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_python
from test_report import write_run

import report
from common import UserError, save_video


@pytest.fixture
def folders(tmp_path):
    """Empty results/ and runs/."""
    (tmp_path / "results").mkdir()
    (tmp_path / "runs").mkdir()
    return tmp_path


def write_seeds(folders, last_scores, algo="drq_bc", **kwargs) -> None:
    for seed, score in enumerate(last_scores):
        words = [
            algo,
            *(str(kwargs.get(name, "")) for name in ("task", "dataset", "tag", "source", "quick", "data_hash")),
        ]
        path = folders / "runs" / "-".join([*words, str(len(kwargs.get("extra", ()))), f"seed{seed}"])
        curve = (5.0, *kwargs.get("extra", ()), score - 2, score)
        write_run(path, curve, algo=algo, seed=seed, **{k: v for k, v in kwargs.items() if k != "extra"})


def table(folders) -> list[dict]:
    flags = {"results_dir": str(folders / "results"), "runs_dir": str(folders / "runs"), "out": str(folders / "report")}
    report.main(report.Args(**flags))
    with open(folders / "report" / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- statistics ----


def test_students_interval():
    """t(0.975, 2) = 4.3027; the values have standard deviation 2."""
    mean, low, high = report.interval([10.0, 12.0, 14.0])
    assert (mean, high - mean) == (12.0, pytest.approx(4.3027 * 2 / math.sqrt(3), rel=1e-4))
    assert mean - low == pytest.approx(high - mean)
    assert report.interval([7.0])[0] == 7.0 and all(map(math.isnan, report.interval([7.0])[1:]))


def test_welchs_interval():
    """Variances 4 / 3 and 16 / 3 of the means: 6.67 together, 2.94 degrees of freedom, t(0.975, 2.94) = 3.22."""
    gap, low, high = report.difference([([10.0, 12.0, 14.0], [20.0, 24.0, 28.0])])
    assert gap == 12.0
    assert high - gap == pytest.approx(gap - low) == pytest.approx(3.22 * math.sqrt(20 / 3), rel=2e-3)
    assert math.isnan(report.difference([([1.0], [2.0, 3.0])])[1])
    assert report.difference([([1.0, 1.0], [2.0, 2.0])]) == (1.0, 1.0, 1.0)


def test_interval_of_a_mean_of_differences():
    """Two pairs: the variances above add up to 40 / 3, a quarter of it is the mean's; twice the degrees of freedom,
    5.88: t(0.975, 5.88) = 2.459."""
    pair = [10.0, 12.0, 14.0], [20.0, 24.0, 28.0]
    gap, low, high = report.difference([pair, ([v + 50 for v in pair[0]], [v + 54 for v in pair[1]])])
    assert gap == 14.0
    assert high - gap == pytest.approx(gap - low) == pytest.approx(2.459 * math.sqrt(10 / 3), rel=2e-3)


def test_iqm_is_the_mean_of_the_middle_half():
    assert report.iqm(np.array([0.0, 100, 10, 20])) == 15.0
    assert report.iqm(np.arange(8.0)) == 3.5


def test_bootstrap_is_stratified_by_row():
    """By hand: rows {0, 4} and {8, 12}. A resample takes two of each row; sorted, the middle two of the four values
    average to 4 with probability 3/16, to 6 with 10/16, to 8 with 3/16. Not stratified, 0 and 12 would occur."""
    rows = [[0.0, 4.0], [8.0, 12.0]]
    pairs = [list(itertools.product(row, repeat=2)) for row in rows]
    by_hand = [np.mean(sorted(a + b)[1:3]) for a, b in itertools.product(*pairs)]
    assert [by_hand.count(value) for value in (4, 6, 8)] == [3, 10, 3]
    assert report.stratified_bootstrap(rows, report.iqm) == (4.0, 8.0)  # 2.5 % < 3/16
    assert report.stratified_bootstrap(rows, report.iqm, level=0.7) == (4.0, 8.0)  # 15 % < 3/16 = 18.75 %
    assert report.stratified_bootstrap(rows, report.iqm, level=0.6) == (6.0, 6.0)  # 20 % > 3/16
    assert report.stratified_bootstrap([[3.0], [5.0]], np.mean) == (4.0, 4.0)


# ---- what is averaged ----


def test_seeds_alone_are_averaged(folders):
    write_seeds(folders, [40, 44, 48])
    write_seeds(folders, [10], tag="x")
    write_seeds(folders, [20], source="vd4rl")
    write_run(folders / "runs" / "other-data", (5.0, 30.0, 30.0), seed=7, data_hash="f" * 16)
    write_seeds(folders, [50], quick=True)
    write_seeds(folders, [60], task="cheetah-run")
    write_seeds(folders, [70], algo="bc")
    write_seeds(folders, [80], dataset="medium-84px-20000")
    rows = table(folders)
    assert sorted(float(row["score_last"]) for row in rows) == [10, 20, 30, 44, 50, 60, 70, 80]
    (row,) = [row for row in rows if row["seeds"] == "3"]
    half = 4.3027 * 4 / math.sqrt(3)
    assert float(row["score_last_low"]) == pytest.approx(44 - half, abs=0.01)
    assert float(row["score_last_high"]) == pytest.approx(44 + half, abs=0.01)
    assert (row["score_late_mean"], row["paper_mean"], row["paper_std"]) == ("43.0", "46.8", "2.3")
    assert row["notes"] == "uncommitted code"  # write_run says abc-dirty
    by_score = {float(row["score_last"]): row for row in rows}
    assert by_score[50]["notes"] == "quick, 1 seed, uncommitted code"
    assert by_score[80]["paper_mean"] == ""  # a smaller set is not the paper's
    assert by_score[60]["paper_mean"] == "53.0"


def test_a_shorter_run_of_a_seed_does_not_displace_the_committed_one(folders):
    committed = write_run(folders / "elsewhere", (1.0, 2.0, 3.0, 4.0, 90.0))
    report.main(report.Args(add=(str(committed),), results_dir=str(folders / "results")))
    write_run(folders / "runs" / "short", (1.0, 2.0))
    assert [(row["steps"], row["score_last"]) for row in table(folders)] == [("200", "2.0"), ("500", "90.0")]


def test_a_broken_curve_in_results_is_listed(folders, capsys):
    run = write_run(folders / "runs" / "one")
    report.main(report.Args(add=(str(run),), results_dir=str(folders / "results")))
    shutil.rmtree(run)
    results, whole = folders / "results", table(folders)
    assert len(whole) == 1
    curve, config = (next(results.rglob(f"{kind}/**/*.*")) for kind in ("curves", "configs"))
    summary = results / "summary.csv"
    for file, text in (
        (curve, "step,score\n100"),
        (curve, "step,score\n"),
        (curve, ""),
        (config, "[1, 2]"),
        (summary, summary.read_text().replace(",400,", ",,")),
    ):
        before = file.read_text()
        assert before != text
        file.write_text(text)
        assert table(folders) == []
        assert "seed0.csv, its row in summary.csv or its configuration: " in capsys.readouterr().out
        file.write_text(before)
    assert table(folders) == whole


def test_runs_of_other_lengths_are_rows_of_their_own(folders):
    write_seeds(folders, [40])
    write_run(folders / "runs" / "longer", (1.0, 2.0, 3.0, 4.0, 90.0), seed=1)
    assert [(row["steps"], row["seeds"]) for row in table(folders)] == [("300", "1"), ("500", "1")]


def test_results_and_run_folders_are_one_run(folders):
    run = write_run(folders / "runs" / "one")
    report.main(report.Args(add=(str(run),), results_dir=str(folders / "results")))
    assert len(table(folders)) == 1
    shutil.rmtree(run)
    assert table(folders)[0]["score_last"] == "30.0"  # from results/ alone


def test_broken_and_unfinished_folders_are_listed_and_do_not_stop_the_report(folders, capsys):
    write_seeds(folders, [40, 44, 48])
    broken = [write_run(folders / "runs" / name, seed=seed) for seed, name in enumerate("abcd", 10)]
    (broken[0] / "config.json").write_text("{")
    (broken[1] / "finished.json").unlink()
    (broken[2] / "eval.csv").write_text("step,score\n1,")
    (broken[3] / "config.json").unlink()
    assert [row["seeds"] for row in table(folders)] == ["3"]
    output = capsys.readouterr().out
    assert f"left out: {broken[0]}: malformed" in output
    assert f"left out: {broken[1]}: not finished" in output
    assert f"left out: {broken[2]}: malformed" in output
    assert f"left out: {broken[3]}: no config.json" in output
    page = (folders / "report" / "index.html").read_text()
    assert all(str(path) in page for path in broken)


def aggregate_of(folders) -> tuple[list, list[dict]]:
    runs, _ = report.gather(folders / "results", folders / "runs")
    return report.aggregate(report.groups_of(runs))


def test_aggregates_count_shared_rows_of_enough_seeds_alone(folders):
    for algo, scores in (("bc", [10, 20, 30]), ("drq_bc", [40, 50, 60])):
        write_seeds(folders, scores, algo=algo)
        write_seeds(folders, scores, algo=algo, task="cheetah-run")
        write_seeds(folders, [99, 99], algo=algo, dataset="expert-84px")  # two seeds
        write_seeds(folders, [99, 99, 99], algo=algo, dataset="mixed-84px", quick=True)
    write_seeds(folders, [90, 90, 90], algo="bc", dataset="medexp-84px")  # drq_bc has no such row
    shared, methods = aggregate_of(folders)
    assert [row[:3] for row in shared] == [("walker-walk", "medium", "made"), ("cheetah-run", "medium", "made")]
    assert [(method["name"], method["iqm"], method["runs"]) for method in methods] == [("bc", 20, 6), ("drq_bc", 50, 6)]
    assert methods[0]["low"] < 20 < methods[0]["high"]


def test_ideas_under_way_and_tags_do_not_shrink_the_aggregate(folders):
    for task in ("walker-walk", "cheetah-run", "humanoid-walk"):
        write_seeds(folders, [10, 20, 30], algo="bc", task=task)
        write_seeds(folders, [50, 50, 50], algo="lompo", task=task, dataset="medium-64px")  # the same set at 64 px
    write_seeds(folders, [90, 90, 90], algo="my_idea")
    write_seeds(folders, [90, 90, 90], algo="bc", tag="x")
    shared, methods = aggregate_of(folders)
    assert len(shared) == 3
    assert [(method["name"], method["iqm"]) for method in methods] == [("bc", 20), ("lompo", 50)]


def test_rows_weigh_the_same_whatever_their_seeds(folders):
    for algo, counts in (("bc", (6, 3)), ("drq_bc", (3, 6))):
        for task, score, count in zip(("walker-walk", "cheetah-run"), (80, 20), counts):
            write_seeds(folders, [score] * count, algo=algo, task=task)
    assert [(method["iqm"], method["runs"]) for method in aggregate_of(folders)[1]] == [(50, 6), (50, 6)]


def test_runs_with_flags_of_their_own_are_marked_and_not_aggregated(folders):
    write_seeds(folders, [10, 20, 30], command="algos/bc.py --seed 0 --lr 0.1 --no-bc-noise --runs-dir 'a b'")
    assert "own flags" in table(folders)[0]["notes"]
    assert aggregate_of(folders) == ([], [])


def test_seeds_whose_commands_differ_are_marked_without_their_folders(folders):
    for seed, words in enumerate(("", " --lr 0.1", "")):
        run = write_run(folders / "elsewhere" / str(seed), seed=seed, command=f"algos/drq_bc.py{words} --seed {seed}")
        report.main(report.Args(add=(str(run),), results_dir=str(folders / "results")))
    assert "mixed flags" in table(folders)[0]["notes"]


def test_no_aggregate_without_enough_seeds(folders):
    write_seeds(folders, [10, 20])
    assert aggregate_of(folders) == ([], [])


def test_a_variant_counts_with_its_longest_runs_of_enough_seeds(folders):
    write_seeds(folders, [10, 10, 10])
    write_seeds(folders, [50, 50, 50], extra=(1.0, 2.0))
    write_seeds(folders, [90], extra=(1.0, 2.0, 3.0, 4.0))
    assert aggregate_of(folders)[1][0]["iqm"] == 50


def test_seeds_with_other_flags_are_marked_and_not_aggregated(folders):
    write_seeds(folders, [10, 20, 30])
    assert "mixed flags" not in table(folders)[0]["notes"]
    config = next((folders / "runs").glob("*seed2")) / "config.json"
    config.write_text(config.read_text().replace('"precision": "bf16"', '"precision": "bf16", "lr": 0.1'))
    assert "mixed flags" in table(folders)[0]["notes"]
    assert aggregate_of(folders) == ([], [])


def test_compare_takes_equal_lengths_where_there_are_some(folders, capsys):
    write_seeds(folders, [10, 10, 10])
    write_seeds(folders, [90, 90, 90], extra=(1.0, 2.0))
    write_seeds(folders, [20, 20, 20], algo="my_idea")
    flags = {"results_dir": str(folders / "results"), "runs_dir": str(folders / "runs")}
    report.main(report.Args(compare=("drq_bc", "my_idea"), **flags))
    row = " ".join(capsys.readouterr().out.splitlines()[2].split())
    assert row == "walker-walk medium made 300 steps 10.0 (3) 20.0 (3) +10.0 [+10.0, +10.0]"


def test_compare_over_image_sizes_and_over_rows(folders, capsys):
    for task, base in (("walker-walk", 10), ("cheetah-run", 20)):
        write_seeds(folders, [base, base + 2, base + 4], task=task)
        write_seeds(folders, [base + 10, base + 14, base + 18], algo="lompo", task=task, dataset="medium-64px",
                    data_hash="f" * 16)  # fmt: skip
    write_seeds(folders, [10, 10, 10], task="humanoid-walk")
    write_seeds(folders, [90, 90, 90], algo="lompo", task="humanoid-walk", extra=(1.0,))  # of another length
    flags = {"results_dir": str(folders / "results"), "runs_dir": str(folders / "runs")}
    report.main(report.Args(compare=("drq_bc", "lompo"), **flags))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == "walker-walk medium made 300 steps 12.0 (3) 24.0 (3) +12.0 [+3.7, +20.3]"
    assert lines[4].startswith("humanoid-walk medium made 300 and 400 steps 10.0 (3) 90.0 (3)")
    assert lines[5] == "mean of the 2 full rows of 3 or more seeds and equal length +12.0 [+7.5, +16.5]"


# ---- --compare and --docs ----


def test_compare(folders, capsys):
    write_seeds(folders, [10, 12, 14])
    write_seeds(folders, [20, 24, 28], algo="my_idea")  # no registration
    write_seeds(folders, [1], algo="my_idea", task="cheetah-run", tag="b")
    args = report.Args(results_dir=str(folders / "results"), runs_dir=str(folders / "runs"))
    args.compare = ("drq_bc", "my_idea")
    report.main(args)
    lines = capsys.readouterr().out.splitlines()
    row = " ".join(lines[2].split())
    assert row == "walker-walk medium made 300 steps 12.0 (3) 24.0 (3) +12.0 [+3.7, +20.3]"
    args.compare = ("my_idea", "my_idea:b")
    report.main(args)
    assert capsys.readouterr().out.startswith("no row in common")
    for names, message in ((("drq_bc",), "two variants"), (("drq_bc", "nope"), "there are drq_bc, my_idea, my_idea:b")):
        args.compare = names
        with pytest.raises(UserError, match=message):
            report.main(args)


def test_docs_are_filled_from_results_alone(folders):
    write_seeds(folders, [10, 12, 14])
    runs = sorted(map(str, (folders / "runs").iterdir()))
    report.main(report.Args(add=tuple(runs[:2]), results_dir=str(folders / "results")))
    page = folders / "page.md"
    page.write_text("above\n<!-- results algo=drq_bc quick=False -->\nold\n<!-- end -->\nbetween\n"
                    "<!-- results algo=cql -->\n<!-- end -->\nbelow\n")  # fmt: skip
    for _ in range(2):  # filling again changes nothing
        text = report.fill_docs(folders / "results", [page])[page]
        page.write_text(text)
        assert "old" not in text and text.startswith("above\n<!--") and text.endswith("<!-- end -->\nbelow\n")
        assert (
            "| 300 | 2, uncommitted code | made, 44.1 | 11.0 [-1.7, 23.7] | 10.0 [-2.7, 22.7] | 46.8 ± 2.3 | 0 min"
            in text
        )
        assert "<!-- results algo=cql -->\nNothing has been measured yet.\n<!-- end -->" in text


def test_speed_tables_come_from_what_throughput_wrote(tmp_path):
    names = "part", "what", "value", "unit", "per_second", "other", "ratio"
    table = [
        ("update", "cql, bf16, eager", 0.65, "s/update", 1.54, 4.53, 6.97),
        ("update", "my_idea, bf16, graph", 0.036, "s/update", 28, None, None),
        ("world", "lompo rollouts, 8 x 50, bf16, eager", 0.5, "s", 2.0, None, None),
        ("buffer", "256 transitions, cpu", 1.612, "ms/batch", 620.3, 5.4, 3.35),
        ("open", "Dataset", 0.004, "s", None, 3.0, 750.0),
    ]
    rows = [dict(zip(names, row)) for row in table]
    facts = {"hardware": "2 cores of X", "calibration_s": 0.339, "quick": False, "rows": rows}
    (tmp_path / "throughput-rehearsed.json").write_text(json.dumps(facts | {"quick": True}))
    (tmp_path / "throughput-x.json").write_text(json.dumps(facts))
    head = "| 2 cores of X, calibration 339 ms | here | other code |"
    cql, idea = "| cql, bf16 | 0.65 s | 4.53 s (7.0x) | 18.1 h |", "| my_idea, bf16, graph | 0.036 s |  | 1.0 h |"
    rollouts = "| lompo rollouts, 8 x 50, bf16 | 0.5 s |  |  |"
    assert report.speed(tmp_path, "world").splitlines()[2] == rollouts
    update = [f"{head} 100,000 updates |", "|---|---|---|---|", cql, idea]
    assert report.speed(tmp_path, "update").splitlines() == update
    batch = "| 256 transitions, cpu | 1.61 ms | 5.4 ms (3.4x) | 620 |"
    assert report.speed(tmp_path, "buffer").splitlines()[2] == batch
    assert report.speed(tmp_path, "open").splitlines()[2] == "| Dataset | 0.004 s | 3 s (750x) |  |"
    page = tmp_path / "page.md"
    page.write_text("<!-- speed part=update about=cql -->\n<!-- end -->\n<!-- speed part=none -->\n<!-- end -->\n")
    text = report.fill_docs(tmp_path, [page])[page]
    assert cql in text and "my_idea" not in text
    assert "part=none -->\nNothing has been measured yet.\n<!-- end -->" in text
    for broken in ('{"rows": [', "[]", '{"quick": false}'):
        (tmp_path / "throughput-y.json").write_text(broken)
        with pytest.raises(UserError, match="throughput-y.json is not what throughput.py --json writes"):
            report.speed(tmp_path, "update")


def test_the_figure_of_scores(folders, monkeypatch):
    """A line per data, also beyond 0 and 100; nothing else shares it but the algorithms, each with its longest runs."""
    from matplotlib import pyplot

    write_seeds(folders, [10, 12, 14])
    write_seeds(folders, [20], algo="my_idea")
    write_seeds(folders, [90], tag="x")
    write_seeds(folders, [30], source="vd4rl")
    write_seeds(folders, [40], dataset="medium-84px-20000", data_hash="f" * 16)
    write_seeds(folders, [50], quick=True)
    write_seeds(folders, [150, 120, 130], task="metaworld-drawer-open", dataset="demos-64px")
    write_seeds(folders, [-20], task="adroit-pen", dataset="mine")
    write_run(folders / "runs" / "short", (1.0, 5.0))
    groups = report.groups_of(report.gather(folders / "results", folders / "runs")[0])
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    report.plot_rows([report.table_row(key, runs, {}) for key, runs in groups.items()], folders / "scores.png")
    assert (folders / "scores.png").read_bytes().startswith(b"\x89PNG")
    axis = pyplot.gcf().axes[0]
    labels = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    assert labels == [
        "walker-walk medium, made", "walker-walk medium, vd4rl", "walker-walk medium-84px-20000, made",
        "adroit-pen mine, made", "metaworld-drawer-open demos-64px, made", "walker-walk medium, made, quick",
    ]  # fmt: skip
    points = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    shown = {(round(p.get_ydata()[0]), p.get_xdata()[0], p.get_fillstyle()) for p in points}
    assert shown == {(0, 12, "full"), (0, 20, "none"), (1, 30, "none"), (2, 40, "none"), (3, -20, "none"),
                     (4, 133.33, "full"), (5, 50, "none")}  # fmt: skip
    assert axis.get_xlim()[0] < -20 and axis.get_xlim()[1] > 133
    pyplot.gcf().clear()


def test_curves_below_0_and_above_100(folders, monkeypatch):
    """All panels of a task share one axis that shows every score, whichever panel comes last."""
    from matplotlib import pyplot

    write_seeds(folders, [-20], task="adroit-pen", dataset="first", data_hash="a" * 16)
    write_seeds(folders, [130], task="adroit-pen", dataset="middle", data_hash="b" * 16)
    write_seeds(folders, [50], task="adroit-pen", dataset="third", data_hash="c" * 16)
    groups = report.groups_of(report.gather(folders / "results", folders / "runs")[0])
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    (file,) = report.plot_curves(groups, {}, folders)
    assert file.read_bytes().startswith(b"\x89PNG")
    axes = pyplot.gcf().axes
    ((low, high),) = {axis.get_ylim() for axis in axes}
    assert len(axes) == 3 and low <= -20 and high >= 130
    assert {axis.get_xlabel() for axis in axes} == {"gradient updates"}
    pyplot.gcf().clear()


def test_the_repositorys_pages_are_filled():
    """python report.py --docs has been run since results/ or a linked file changed."""
    assert report.fill_docs(ROOT / "results", report.PAGES) == {page: page.read_text() for page in report.PAGES}


# ---- the page ----


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map(e => e.innerText)")


def test_the_page_in_a_browser(folders, browser):
    for algo, base in (("bc", 10), ("drq_bc", 40)):
        write_seeds(folders, [base, base + 5, base + 10], algo=algo)
        write_seeds(folders, [base], algo=algo, task="cheetah-run", dataset="expert-84px")
    write_seeds(folders, [33], algo="bc", dataset="medium-84px-20000-seed123456", quick=True, tag="</script>")
    video = next((folders / "runs").glob("bc-*-seed0")) / "evaluation.mp4"
    save_video(video, list(np.random.default_rng(0).integers(0, 256, (30, 3, 84, 84), np.uint8)))
    rows = table(folders)
    page = folders / "report" / "index.html"
    for width in (1440, 390):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
        cut = "return [...document.querySelectorAll('td')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert browser.execute_script(cut) == 0  # nor over its neighbour
        label = "return document.querySelector('#cards svg text').getBoundingClientRect().height"
        assert browser.execute_script(label) > 10  # pixels: readable
        shown = browser.execute_script(
            "return [...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        assert len(shown) == len(rows) == 5
        for cells, row in zip(shown, rows):
            task, dataset, name, seeds, last, late, paper, data, steps, clock = (cell.split("\n") for cell in cells)
            assert (task, dataset, seeds) == ([row["task"]], [row["dataset"]], [row["seeds"]])
            assert name[0] == row["algo"] + (f":{row['tag']}" if row["tag"] else "")
            for cell, column in ((last, "score_last"), (late, "score_late_mean")):
                ends = [row[f"{column}_{end}"] for end in ("low", "high")]
                assert cell[0] == f"{float(row[column]):.1f}"
                assert cell[1:] == ([f"[{float(ends[0]):.1f}, {float(ends[1]):.1f}]"] if ends[0] else [])
            assert paper == [
                f"{float(row['paper_mean']):.1f} ± {float(row['paper_std']):.1f}" if row["paper_mean"] else ""
            ]
            assert data == [f"{row['source']}, {float(row['data_score']):.1f}"]
            assert steps == [f"{int(row['steps']):,}"]
            assert clock == ["0 min", row["hardware"]]
            assert all(note in "".join(name) for note in row["notes"].split(", "))
    assert len(texts(browser, "#cards section")) == 3
    assert "bc" in texts(browser, "#aggregate")[0] and "1 rows" in texts(browser, "#aggregate")[0]

    def choose(name, value):
        browser.execute_script(f"const s = document.querySelector('[name={name}]'); s.value = {json.dumps(value)};"
                               "s.dispatchEvent(new Event('change'))")  # fmt: skip
        return len(texts(browser, "#table tbody tr")), len(texts(browser, "#cards section"))

    assert choose("task", "cheetah-run") == (2, 1)
    assert choose("algo", "bc") == (1, 1)
    assert choose("set", "medium") == (0, 0)
    assert browser.execute_script("return !document.getElementById('none').hidden")
    assert choose("task", "") == (1, 1)
    assert [choose(name, "") for name in ("algo", "set")][-1] == (5, 3)
    browser.execute_script("document.querySelector('[name=quick]').click()")
    assert len(texts(browser, "#table tbody tr")) == 4
    browser.execute_script("""
        const chart = document.querySelector('#cards svg'), box = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 10, clientY: box.top + 5}))""")
    assert texts(browser, ".reading")[0] == "drq_bc, 300 updates, at 300: seed 0 40.0, seed 1 45.0, seed 2 50.0"
    assert browser.execute_script("return document.querySelectorAll('.variant.on .seed').length") == 3
    played = browser.execute_async_script("""
        const done = arguments[arguments.length - 1], video = document.querySelector('video');
        video.muted = true;
        video.ontimeupdate = () => { if (video.currentTime > 0.2) done(video.videoWidth); };
        video.onerror = () => done(String(video.error && video.error.message));
        video.play().catch(error => done(String(error)))""")
    assert played == 168
    browser.execute_script("document.querySelector('details').open = true")
    assert any("algos/drq_bc.py" in text and "precision" in text for text in texts(browser, "pre"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_videos_are_left_out_where_the_page_would_grow_too_large(folders, monkeypatch, capsys):
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 3, 84, 84), np.uint8))
    for seed, algo in enumerate(("bc", "cql", "drq_bc")):
        save_video(write_run(folders / "runs" / algo, algo=algo, seed=seed) / "evaluation.mp4", frames)
    table(folders)
    whole = (folders / "report" / "index.html").stat().st_size
    template = (ROOT / "benchmarks" / "report.html").stat().st_size
    monkeypatch.setattr(report, "PAGE_BYTES", whole - template - 500)  # room for two of them
    table(folders)
    assert (folders / "report" / "index.html").read_text().count("data:video/mp4") == 2
    assert capsys.readouterr().out.count("evaluation.mp4: left out, the page would exceed 20 MB") == 1


def test_the_command_line(folders):
    write_seeds(folders, [40, 44, 48])
    flags = ["--results-dir", folders / "results", "--runs-dir", folders / "runs", "--out", folders / "page"]
    result = run_python(ROOT / "report.py", *flags, cwd=folders)
    assert result.returncode == 0, result.stderr
    assert "3 runs in 1 rows" in result.stdout
    names = {path.name for path in (folders / "page").iterdir()}
    assert names == {"index.html", "table.csv", "curves-walker-walk.png", "videos"}
    assert (folders / "page" / "curves-walker-walk.png").read_bytes().startswith(b"\x89PNG")
