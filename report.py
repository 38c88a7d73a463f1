"""What finished runs have shown: results/summary.csv, a page to look at, two variants side by side.

    python report.py --add runs/drq_bc/walker-walk/medium-84px/seed*   # rows, curves, flags, a video each: to results/
    python report.py                                                   # results/ and runs/ -> report/index.html
    python report.py --compare drq_bc my_idea                          # or drq_bc:tag; the interval of the difference
    python report.py --add RUN --weights                               # and the policy itself: to results/runs/ALGO
    python report.py --docs                                            # tables of README, docs/; results/*.png, *.gif

A run reports its last evaluation and the mean of the last max(2, 10 %), never the best one, which is chosen by the test
set. Runs are averaged over seeds alone, see Group. Intervals are 95 %: of a mean over seeds Student's, of a difference
Welch's, of aggregates a bootstrap stratified by row (arXiv:2108.13264).

--docs fills what stands between two marks of a page. Before the = is a column of TABLE, behind it the values that are
wanted, with commas between them: * stands for any text, nothing for an empty column. rows=12: the first twelve alone.

    <!-- results algo=bc,cql dataset=medium* tag= quick=True rows=12 -->
    <!-- speed part=update about=cql -->            of results/throughput*.json: one part, lines that begin with cql
    <!-- varied -->                                 rows on other looks and bodies, see benchmarks/tables.py
    <!-- end -->                                    ends each of them"""

import base64
import csv
import functools
import io
import json
import math
import re
import shlex
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import scipy.stats

import common
from benchmarks.figures import color_of, film, looks, mean_curve, plot_curves, plot_scores, plot_shifts
from benchmarks.tables import speed, varied_table
from common import HERE, MANIPULATION, UserError, write_atomically

KEY = ("algo", "task", "dataset", "source", "tag", "seed", "quick")  # one row of summary.csv per run
COLUMNS = ("algo", "task", "dataset", "source", "data_hash", "data_mean", "render", "tag", "seed", "steps", "quick",
           "score_last", "score_late_mean", "success_last", "success_late_mean", "env_steps", "episodes", "wall_s",
           "hardware", "versions", "commit", "command")  # fmt: skip
CELL = ("task", "dataset", "source", "data_hash", "quick")
TABLE = (*CELL, "algo", "tag", "steps", "env_steps", "data_mean", "data_score", "seeds", "score_last", "score_last_low",
         "score_last_high", "score_late_mean", "score_late_mean_low", "score_late_mean_high", "success_last",
         "success_late_mean", "paper_mean", "paper_std", "wall_s", "hardware", "commits", "notes")  # fmt: skip
SCORES = ("score_last", "score_late_mean")
MIN_SEEDS = 3  # of a row that counts in an aggregate
PAGES = [HERE / "README.md", HERE / "data" / "README.md", *sorted((HERE / "docs").glob("*.md"))]
PAGE_BYTES = 19_500_000  # of index.html, its videos included
# flags that leave the algorithm's setting as it is: they name the row, or change no more than rounding
NEUTRAL = common.FREE_FLAGS | {"task", "dataset", "source", "transitions", "data_seed", "seed", "tag", "quick",
                               "device", "precision", "accelerate", "eval_every", "eval_episodes"}  # fmt: skip
ACTING = ("encoder.", "actor.", "model.encoder.", "model.rssm.")  # beginnings of the weights that act() uses
Row = dict[str, str]


@dataclass
class Args:
    add: tuple[str, ...] | None = None  # folders of finished runs: write what they have shown under results/ and stop
    weights: bool = False  # beside --add: what --evaluate needs of one run, in half precision, to results/runs/ALGO
    compare: tuple[str, str] | None = None  # two variants, ALGO or ALGO:TAG: print their difference and stop
    docs: bool = False  # fill the tables of README and docs/ from results/, draw its pictures and stop
    results_dir: str | None = None  # where summary.csv and curves/ are; None: results/ beside this file
    runs_dir: str | None = None  # where run folders are; None: runs/ beside this file
    out: str = "report"  # where the page goes


# ==== Runs and results/ ====


@dataclass
class Result:
    """A finished run, from its folder (own) or from results/."""

    row: Row  # COLUMNS
    evaluations: list[Row]  # of eval.csv
    args: dict  # the flags that say what it computed
    video: Path
    own: bool

    def __post_init__(self):
        self.points = points_of(self.evaluations)

    @property
    def name(self) -> str:
        return f"{self.row['algo']}:{self.row['tag']}" if self.row["tag"] else self.row["algo"]


def points_of(evaluations: list[Row]) -> list[tuple[int, float]]:
    """Gradient updates and score of each evaluation; percent of successes where they are counted. Of a run that also
    collects: steps in the environment, from the end of its offline phase on."""
    name = "success" if "success" in evaluations[-1] else "score"
    clock = "env_steps" if int(evaluations[-1].get("env_steps") or 0) else "step"
    return list({int(row[clock]): float(row[name]) for row in evaluations}.items())  # of several at 0 steps the last


def read_csv(file: Path) -> list[Row]:
    """Raises ValueError where a row is not as long as the header."""
    with open(file, newline="") as handle:
        rows = list(csv.DictReader(handle))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{file.name} has a row that is not as long as its header")
    return rows


def read_run(folder: Path) -> Result:
    """A finished run from its folder. Raises UserError where there is no whole run."""
    needed = {"config.json": "no config.json, this is no run", "finished.json": "not finished; its command continues",
              "eval.csv": "never evaluated (--eval-every 0), so there is no score"}  # fmt: skip
    for name, problem in needed.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {problem}")
    try:
        config, finished = (json.loads((folder / name).read_text()) for name in ("config.json", "finished.json"))
        evaluations = read_csv(folder / "eval.csv")
        args = {name: portable(value) for name, value in config["args"].items() if name not in common.FREE_FLAGS}
        row = row_of(config, finished, evaluations)
        return Result(row, evaluations, args, folder / "evaluation.mp4", own=True)
    except (LookupError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{folder}: malformed ({problem}); --overwrite makes the run again") from None


def row_of(config: dict, finished: dict, evaluations: list[Row]) -> Row:
    """Raises LookupError, TypeError or ValueError where something is missing or does not fit."""
    if not evaluations or int(evaluations[-1]["step"]) != finished["steps"]:
        raise ValueError(f"eval.csv does not end with the run's last step, {finished['steps']}")
    args, facts, last = config["args"], config["dataset"], evaluations[-1]
    row = {"algo": config["algo"], "task": args["task"], "dataset": facts["set"], "source": facts["source"]}
    row |= {"data_hash": facts["hash"], "data_mean": round(facts["mean_return"], 2), "render": facts["render"]}
    row |= {name: args[name] for name in ("tag", "seed", "quick")}
    for name in ("score", "success") if "success" in last else ("score",):
        values = [float(evaluation[name]) for evaluation in evaluations]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"eval.csv: a {name} is not finite")
        row |= {f"{name}_last": round(values[-1], 2), f"{name}_late_mean": round(late_mean(values), 2)}
    row |= {"steps": finished["steps"], "wall_s": float(finished["wall_s"])}
    row |= {name: last.get(name) for name in ("env_steps", "episodes")}  # of runs that also collect
    parts = [config, *config["resumed"]]  # each process that trained a part of the run
    row |= {"command": command_of(parts[-1]["command"], common.FREE_FLAGS)}
    row["commit"] = " ".join(dict.fromkeys(part["commit"] for part in parts))
    machines = " + ".join(dict.fromkeys(part["hardware"] for part in parts))
    row["hardware"] = f"{machines}, {args['precision']}, {args['accelerate']}"
    row["versions"] = "; ".join(f"{name} {version}" for name, version in config["versions"].items())
    return {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}


def late_mean(values: list[float]) -> float:
    """Mean of the last max(2, 10 %) evaluations."""
    return statistics.fmean(values[-max(2, round(len(values) / 10)) :])


def flags_of(command: str) -> dict[str, list[str]]:
    """Name of a flag -> its words in a command, the flag itself first; under "" the script."""
    found, name = defaultdict(list), ""
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        found[name].append(word)
    return found


def command_of(command: str, left_out: set[str]) -> str:
    words = [word for name, words in flags_of(command).items() if name not in left_out for word in words]
    return shlex.join(map(portable, words))


def portable(value):
    """Of a path out of the checkout, which no other machine has, the last two parts; other values as they are."""
    flag, equals, path = value.rpartition("=") if str(value).startswith("--") else ("", "", value)
    return value if not str(path).startswith(("/", "../")) else flag + equals + "/".join(Path(path).parts[-2:])


def read_summary(file: Path) -> list[Row]:
    try:
        rows = read_csv(file) if file.exists() else []
    except ValueError:
        rows = [{}]
    if any(tuple(row) != COLUMNS for row in rows) or file.exists() and not rows:
        raise UserError(f"{file}: its columns are not {', '.join(COLUMNS)}; mend it or move it away")
    return rows


def identity(row: Row) -> tuple:
    """Names a run and orders the rows; seed 2 comes before seed 10."""
    return tuple((len(row[name]), row[name]) if name == "seed" else row[name] for name in KEY)


def csv_bytes(columns: tuple[str, ...], rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# what results/ keeps of a run beside its row; metrics: the last that were logged, of each file
KINDS = {"curves": ".csv", "configs": ".json", "metrics": ".json", "videos": ".mp4"}


def file_of(results: Path, row: Row, kind: str) -> Path:
    """Below results/<kind>/ the folders are those of runs/."""
    names = {name: row[name] for name in ("task", "tag", "seed")} | {"quick": row["quick"] == "True"}
    args = SimpleNamespace(runs_dir=results / kind, **names)
    run = common.run_folder(args, row["algo"], row["dataset"], row["source"])
    return run.with_name(run.name + KINDS[kind])


def add(folders: list[Path], results: Path) -> None:
    runs = [read_run(folder) for folder in folders]  # all are read before anything is written
    results.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(results / ".lock"):
        rows = {identity(row): row for row in read_summary(results / "summary.csv")}
        for folder, run in zip(folders, runs):
            files = [file for file in sorted(folder.glob("*.csv")) if file.stem not in ("eval", "episodes")]
            metrics = {file.stem: last for file in files for last in read_csv(file)[-1:]}
            contents = {"curves": (folder / "eval.csv").read_bytes()}
            contents["configs"] = json.dumps(run.args, indent=1).encode()
            contents["metrics"] = json.dumps(metrics, indent=1).encode()
            video = file_of(results, run.row, "videos")
            kept = set(video.parent.glob(re.sub(r"\d+\.mp4$", "*.mp4", video.name)))
            if run.video.exists() and kept <= {video}:  # one seed of a row has its video there
                contents["videos"] = run.video.read_bytes()
            for kind, content in contents.items():
                file = file_of(results, run.row, kind)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, content)
            verb = "replaced" if identity(run.row) in rows else "added"
            rows[identity(run.row)] = run.row
            scores = ", ".join(f"{name} {run.row[name]}" for name in SCORES)
            print(f"{verb} {file_of(results, run.row, 'curves')}: {scores}")
        write_atomically(results / "summary.csv", csv_bytes(COLUMNS, [rows[key] for key in sorted(rows)]))


def add_weights(folder: Path, results: Path) -> None:
    run, config, weights = read_run(folder), *(common.read(folder / name) for name in ("config.json", "weights.pt"))
    config = {name: config[name] for name in ("algo", "script", "dataset")} | {"typed": {}, "resumed": []}
    config |= {"args": run.args, "video": str(file_of(results, run.row, "videos").relative_to(results))}
    acting = {k: v.half() for k, v in weights.items() if k.startswith(ACTING) and ".priors." not in k}
    for name, content in (("config.json", json.dumps(config, indent=1).encode()), ("weights.pt", acting)):
        file = results / "runs" / run.row["algo"] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)


def gather(results: Path, runs: Path | None) -> tuple[list[Result], dict[str, list[Path]]]:
    """Every finished run (its folder is preferred to its row in results/), and what was left out: reason -> places."""
    found, problems = [], defaultdict(list)
    for row in read_summary(results / "summary.csv"):
        curve, config, video = (file_of(results, row, kind) for kind in ("curves", "configs", "videos"))
        try:
            for name in ("steps", "data_mean", *SCORES, "wall_s"):
                float(row[name])
            args = dict(json.loads(config.read_text()))
            found.append(Result(row, read_csv(curve), args, video, own=False))
        except (OSError, LookupError, TypeError, ValueError) as error:
            problems[f"broken, or its row in summary.csv, or its configuration ({error})"].append(curve)
    files = [file for name in ("config.json", "eval.csv") for file in (runs.rglob(name) if runs else ())]
    for folder in sorted({file.parent for file in files}):
        try:
            found.append(read_run(folder))
        except UserError as error:
            problems[str(error).removeprefix(f"{folder}: ")].append(folder)
    unique = {(*identity(run.row), run.row["data_hash"], run.row["steps"]): run for run in found}
    return [unique[key] for key in sorted(unique)], problems


# ==== Groups: the rows of every table ====


class Group:
    """The seeds of one variant (algorithm and tag) on the same data, of equal length: a row of the tables. Nothing else
    is ever averaged. table: TABLE, numbers, None where there is none."""

    def __init__(self, runs: list[Result]):
        self.runs, self.row, self.name, self.steps = runs, runs[0].row, runs[0].name, int(runs[0].row["steps"])
        self.own, self.quick = any(run.own for run in runs), self.row["quick"] == "True"
        # the standard set's name (random, ...) at any image size; None for a smaller set, or another seed's
        name = re.fullmatch(r"([a-z]+)-\d+px", self.row["dataset"])
        standard = name and name[1] in common.STANDARD_SETS and self.row["source"] in ("made", "vd4rl")
        standard = standard and not self.row["task"].startswith(MANIPULATION)
        self.set = name[1] if standard else None
        self.paper = published().get((self.row["task"], self.row["dataset"].split("-")[0], self.row["algo"]))
        # variants can be compared where this is equal
        data = (self.set, self.row["data_mean"]) if self.set else (self.row["dataset"], self.row["data_hash"])
        self.place = (self.row["task"], data[0], self.row["source"], data[1], self.quick)
        flags = [run.args | {"seed": None, "device": None, "typed": own_flags(run.row)} for run in runs]
        self.mixed, self.enough = any(one != flags[0] for one in flags), len(runs) >= MIN_SEEDS
        self.table, last = self.table_row(), runs[0].evaluations[-1]
        self.parts = {
            name: statistics.fmean(late_mean([float(line[name]) for line in run.evaluations]) for run in runs)
            for name in last
            if name.startswith("score_")
        }  # of an evaluation in other looks or bodies too
        kind = "-quick" * self.quick + "-online" * bool(self.table["env_steps"])
        self.chart = "-".join(map(str, self.place[:4])) + kind  # names a chart: rows that share it have the same axes

    def scores(self, name: str) -> list[float]:
        return [float(run.row[name]) for run in self.runs]

    def text(self, name: str) -> str:
        """A score, its interval, and where the task counts them the successes."""
        success = self.table[name.replace("score", "success")]
        text = number(*(self.table[name + end] for end in ("", "_low", "_high")))
        if name == "score_late_mean":
            text += "".join(f", {part.removeprefix('score_')} {score:.1f}" for part, score in self.parts.items())
        return text if success is None else f"{text} (success {success:.0f} %)"

    def table_row(self) -> dict:
        row = {name: self.row[name] for name in (*CELL, "algo", "tag")} | {"steps": self.steps, "seeds": len(self.runs)}
        scale = 1 if row["task"].startswith(MANIPULATION) else 0.1
        row |= {"data_mean": self.scores("data_mean")[0], "data_score": round(scale * self.scores("data_mean")[0], 2)}
        for name in ("success_last", "success_late_mean", "env_steps"):
            values = [float(run.row[name]) for run in self.runs if run.row[name]]
            row[name] = round(statistics.fmean(values), 1) if values else None
        for name in SCORES:
            values = (value if value is None else round(value, 2) for value in interval(self.scores(name)))
            row |= zip((name, f"{name}_low", f"{name}_high"), values)
        row["paper_mean"], row["paper_std"] = self.paper if self.set and self.paper else (None, None)
        row["wall_s"] = round(statistics.median(self.scores("wall_s")), 1)
        row["hardware"] = " + ".join(dict.fromkeys(run.row["hardware"] for run in self.runs))
        row["commits"] = " ".join(dict.fromkeys(run.row["commit"] for run in self.runs))
        few = f"{len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"
        notes = {"quick": self.quick, few: not self.enough, "own flags": own_flags(self.row),
                 "uncommitted code": "-dirty" in row["commits"], "mixed flags": self.mixed}  # fmt: skip
        row["notes"] = ", ".join(note for note, holds in notes.items() if holds)
        return {name: row[name] for name in TABLE}


def groups_of(runs: list[Result]) -> list[Group]:
    """The user's own rows first; then full runs before quick ones, tasks and sets in the paper's order."""
    groups = defaultdict(list)
    for run in runs:
        groups[(*(run.row[name] for name in CELL), run.name, int(run.row["steps"]))].append(run)
    made = [Group(groups[key]) for key in sorted(groups)]
    return sorted(made, key=lambda group: (not group.own, *order(group.place)))


def order(place: tuple) -> tuple:
    tasks, (task, dataset, *_, quick) = ("walker-walk", "cheetah-run", "humanoid-walk"), place
    name = dataset.split("-")[0]
    task_number = tasks.index(task) if task in tasks else 99
    return quick, task_number, common.STANDARD_SETS.index(name) if name in common.STANDARD_SETS else 99, place


def own_flags(row: Row) -> dict[str, list[str]]:
    """What was typed that makes a run another than the algorithm's own setting."""
    return {name: words for name, words in flags_of(row["command"]).items() if name and name not in NEUTRAL}


@functools.cache
def published() -> dict[tuple, tuple[float, float]]:
    """(task, set, algo) -> mean, deviation over six seeds (V-D4RL Table 1, official data)."""
    rows = read_csv(HERE / "results" / "published.csv")
    return {(row["task"], row["dataset"], row["algo"]): (float(row["mean"]), float(row["std"])) for row in rows}


# ==== Statistics ====


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean and Student's 95 % interval of it; None where there is one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def difference(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float | None, float | None]:
    """Mean over the pairs (a, b) of mean(b) - mean(a), and its 95 % interval: Welch's, with Satterthwaite's degrees of
    freedom where there are several pairs; None where one of them is a single value."""
    gap = statistics.fmean(statistics.fmean(b) - statistics.fmean(a) for a, b in pairs)
    samples = [values for pair in pairs for values in pair]
    if min(map(len, samples)) < 2:
        return gap, None, None
    variances = [statistics.variance(values) / len(values) / len(pairs) ** 2 for values in samples]
    if not any(variances):
        return gap, gap, gap
    freedom = sum(variances) ** 2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, samples))
    half = float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(sum(variances))
    return gap, gap - half, gap + half


def number(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if low is None else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def iqm(scores: np.ndarray) -> tuple[float, float, float]:
    """scores (rows, seeds) -> mean of the middle half of all values, and its 95 % percentile interval over 2,000
    bootstrap samples, in which the seeds of each row are drawn anew with replacement."""
    index = np.random.default_rng(0).integers(scores.shape[1], size=(2000, *scores.shape))
    samples = np.take_along_axis(scores[None], index, axis=2).reshape(2000, -1)
    low, high = np.percentile(scipy.stats.trim_mean(samples, 0.25, axis=1), [2.5, 97.5])
    return float(scipy.stats.trim_mean(scores, 0.25, axis=None)), float(low), float(high)


def aggregate(groups: list[Group]) -> tuple[list[str], list[dict]]:
    """IQM per algorithm over the rows that all of them share: names of those rows, and one dict per algorithm.

    Counted are full runs on standard sets, of MIN_SEEDS seeds or more, in the algorithm's own setting, without a tag.
    An algorithm with less than half as many such rows as another is left out: an idea under way does not shrink the
    rest. All rows weigh the same: of each count as many seeds as the shortest row of its algorithm has."""
    algos = defaultdict(dict)  # algo -> place -> scores
    for group in sorted(groups, key=lambda group: (group.name, group.steps)):  # of several lengths the longest
        special = group.quick or group.mixed or group.row["tag"] or own_flags(group.row)
        if group.set and group.enough and not special:
            algos[group.name][group.place] = group.scores("score_last")
    most = max(map(len, algos.values()), default=0)
    algos = {name: rows for name, rows in algos.items() if 2 * len(rows) >= most}
    shared = [group.place for group in groups if algos and all(group.place in rows for rows in algos.values())]
    shared, methods = list(dict.fromkeys(shared)), []
    for name, rows in algos.items() if shared else ():
        count = min(len(rows[place]) for place in shared)
        mean, low, high = iqm(np.array([rows[place][:count] for place in shared]))
        methods.append({"name": name, "iqm": mean, "low": low, "high": high, "color": color_of(name)})
    return [" ".join(place[:3]) for place in shared], methods


def variant(name: str, groups: list[Group]) -> list[Group]:
    """The groups of a variant; ALGO alone names also the only tag there is of it."""
    known = sorted({group.name for group in groups})
    matches = [one for one in known if one == name] or [one for one in known if one.startswith(f"{name}:")]
    if len(matches) != 1:
        raise UserError(f"--compare {name}: no finished run of that name; there are {', '.join(known) or 'none'}")
    return [group for group in groups if group.name == matches[0]]


def compare(names: tuple[str, ...], groups: list[Group]) -> str:
    """Two variants on the rows they share, and the interval of their difference (second minus first)."""
    one, two = (variant(name, groups) for name in names)
    rows = []  # title, both groups
    for place in dict.fromkeys(a.place for a in one):
        pairs = [(a, b) for a in one for b in two if a.place == b.place == place]
        if pairs:  # runs of equal length and enough seeds, if there are any; the longest
            a, b = max(pairs, key=lambda ab: (ab[0].steps == ab[1].steps, ab[0].enough and ab[1].enough, ab[0].steps))
            lengths = " and ".join(f"{steps:,}" for steps in dict.fromkeys((a.steps, b.steps)))
            rows.append((f"{' '.join(place[:3])} {lengths} steps{' quick' * a.quick}", a, b))
    full = [(a, b) for _, a, b in rows if a.steps == b.steps and a.enough and b.enough]
    full = [(a, b) for a, b in full if not (a.quick or a.mixed or b.mixed)]
    mean_title = f"mean of the {len(full)} full rows of {MIN_SEEDS} or more seeds and equal length"
    width = max([len(title) for title, *_ in rows] + [len(mean_title)])
    lines = [] if rows else ["no row in common: task, set, source, data and quick must be equal"]
    for score, what in zip(SCORES, ("last score", "mean of the late evaluations")) if rows else ():
        lines += [f"{what}: mean over seeds (their number), difference with its 95 % interval"]
        lines += [f"{'':{width}}{one[0].name:>20}{two[0].name:>20}   difference"]
        for title, a, b in rows:
            pair = a.scores(score), b.scores(score)
            means = [f"{statistics.fmean(values):.1f} ({len(values)})" for values in pair]
            lines.append(f"{title:{width}}{means[0]:>20}{means[1]:>20}   {number(*difference([pair]), '+')}")
        if len(full) > 1:
            pairs = [(a.scores(score), b.scores(score)) for a, b in full]
            lines.append(f"{mean_title:{width + 40}}   {number(*difference(pairs), '+')}")
        lines.append("")
    for mine, other in ((one, two), (two, one)):
        places = dict.fromkeys(a.place for a in mine if all(a.place != b.place for b in other))
        lines += [f"only {mine[0].name}: {' '.join(place[:3])}, data {place[3]}" for place in places]
    return "\n".join(lines).strip()


# ==== Tables ====


def markdown(groups: list[Group]) -> str:
    """The table of results that --docs writes."""
    names = "command", "updates", "seeds", "data: source, score", "last score", "late mean", "paper", "wall clock"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for group in groups:
        row, command = group.table, command_of(group.row["command"], common.FREE_FLAGS | {"seed"})
        steps = f"{row['steps']:,}" + (f"; {row['env_steps']:,.0f} steps online" if row["env_steps"] else "")
        notes = [note for note in row["notes"].split(", ") if note and "seed" not in note]
        paper = "" if row["paper_mean"] is None else f"{row['paper_mean']:.1f} ± {row['paper_std']:.1f}"
        clock = f"{row['wall_s'] / 3600:.1f} h" if row["wall_s"] >= 3600 else f"{row['wall_s'] / 60:.0f} min"
        cells = [f"`{command.removeprefix('algos/')}`", steps, ", ".join([str(row["seeds"]), *notes])]
        cells += [f"{row['source']}, {row['data_score']:.1f}", *map(group.text, SCORES), paper]
        lines.append(f"| {' | '.join(cells)} | {clock}, {row['hardware']} |")
    return "\n".join(lines)


def fill_docs(results: Path, pages: list[Path]) -> dict[Path, str]:
    """The pages' new texts, see the head of this file. Raises UserError for a mark that names no column."""
    groups = groups_of(gather(results, None)[0])

    def fits(group: Group, name: str, patterns: str) -> bool:
        value = "" if group.table[name] is None else str(group.table[name])
        return any(fnmatchcase(value, pattern) for pattern in patterns.split(","))

    def table(found: re.Match) -> str:
        wanted = dict(word.split("=", 1) for word in found[2].split())
        count = int(wanted.pop("rows", len(groups)))
        if unknown := wanted.keys() - ({"part", "about"} if found[1] == "speed" else set(TABLE)):
            raise UserError(f"<!-- {found[1]}{found[2]} -->: there is no {', '.join(unknown)}; see report.py's head")
        if found[1] == "speed":
            text = speed(results, **wanted)
        elif found[1] == "varied":
            text = varied_table(groups)
        else:
            chosen = [group for group in groups if all(fits(group, *item) for item in wanted.items())]
            text = markdown(chosen[:count]) if chosen else ""
        return f"<!-- {found[1]}{found[2]} -->\n{text or 'Nothing has been measured yet.'}\n<!-- end -->"

    mark = r"<!-- (results|speed|varied)((?: \w+=\S*)*) -->\n.*?<!-- end -->"
    return {page: re.sub(mark, table, page.read_text("utf-8"), flags=re.S) for page in pages}


# ==== The page ====


def page_data(groups: list[Group], problems: dict[str, list[Path]]) -> dict:
    """What benchmarks/report.html shows. A video that does not fit into PAGE_BYTES is added to the problems."""
    (shared, methods), rows, look = aggregate(groups), [], looks(groups)
    for group in groups:
        row = group.table | {"name": group.name, "own": group.own, "set": group.place[1], "chart": group.chart}
        row |= {"text": {name: group.text(name) for name in SCORES}, "mean": mean_curve(group.runs)}
        row["color"], row["dashes"] = look[group.name]
        row["runs"] = [run.row | {"curve": run.points, "config": run.args} for run in group.runs]
        rows.append(row)
    data = {"rows": rows, "methods": methods, "shared": shared}
    room = PAGE_BYTES - len(json.dumps(data))
    for row, group in zip(rows, groups):
        run = next((run for run in group.runs if run.video.exists()), None)
        video = base64.b64encode(run.video.read_bytes()).decode() if run else ""
        if len(video) > room:
            problems[f"no room for the video in a page of {PAGE_BYTES / 1e6:.1f} MB"].append(run.video)
        elif run:
            room -= len(video)
            row |= {"video": f"data:video/mp4;base64,{video}", "video_of": f"seed {run.row['seed']}"}
    return data | {"problems": {reason: list(map(str, places)) for reason, places in problems.items()}}


def write_report(results: Path, runs: Path | None, out: Path) -> None:
    found, problems = gather(results, runs)
    groups = groups_of(found)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.csv", csv_bytes(TABLE, [group.table for group in groups]))
    for chart in {group.chart for group in groups}:
        members = [group for group in groups if group.chart == chart]
        plot_curves(members, looks(groups)).savefig(out / f"curves-{chart}.png", dpi=120)
    if shifts := plot_shifts(groups):
        shifts.savefig(out / "shifts.png", dpi=120)
    data = json.dumps(page_data(groups, problems)).replace("<", "\\u003c")
    page = (HERE / "benchmarks" / "report.html").read_text("utf-8").replace("/*DATA*/null", data).encode()
    write_atomically(out / "index.html", page)
    for reason, places in problems.items():
        print(f"left out: {places[0] if len(places) == 1 else f'{len(places)} (listed in the page)'}: {reason}")
    print(f"{len(found)} runs in {len(groups)} rows: {out / 'index.html'}, {len(page) / 1e6:.1f} MB, table.csv, curves")


def main(args: Args) -> None:
    results = Path(args.results_dir or HERE / "results").expanduser()
    runs = Path(args.runs_dir or HERE / "runs").expanduser()
    for typed, folder in ((args.results_dir, results), (args.runs_dir, runs)):
        if typed and args.add is None and not folder.is_dir():  # --add makes the one and needs no other
            raise UserError(f"--results-dir or --runs-dir {folder}: no such folder")
    if args.add is not None:
        folders = [Path(path) for path in args.add if not path.endswith(".log")]  # seed* finds benchmark.sh's logs, too
        if not folders:
            raise UserError("--add: name run folders")
        add(folders, results)
        for folder in folders if args.weights else ():
            add_weights(folder, results)
    elif args.compare:
        print(compare(args.compare, groups_of(gather(results, runs)[0])))
    elif args.docs:
        for page, text in fill_docs(results, PAGES).items():
            if text != page.read_text("utf-8"):
                write_atomically(page, text.encode())
                print(f"filled {page}")
        groups = groups_of(gather(results, None)[0])
        plot_scores(groups).savefig(results / "scores.png", dpi=110)
        if shifts := plot_shifts(groups):
            shifts.savefig(results / "shifts.png", dpi=110)
        policies = map(common.read, sorted(results.glob("runs/*/config.json")))
        if videos := {policy["algo"]: results / policy["video"] for policy in policies}:
            write_atomically(results / "policies.gif", film(videos))
    else:
        write_report(results, runs, Path(args.out).expanduser())


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    main(tyro.cli(Args))
