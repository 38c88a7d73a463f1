"""What finished runs have shown: results/summary.csv, a page to look at, two variants side by side.

    python report.py --add runs/drq_bc/walker-walk/medium-84px/seed*   # write rows and curves under results/
    python report.py                                                   # results/ and runs/ -> report/index.html
    python report.py --compare drq_bc my_idea                          # or drq_bc:tag; the interval of the difference
    python report.py --docs                                            # fills the tables of both READMEs and docs/

A run reports its last evaluation and the mean of the last max(2, 10 %), never the best one, which is chosen by the test
set. Runs are averaged over seeds alone: same algorithm, tag, task, set, source, data, steps and quick. Intervals are
95 %: of a mean over seeds Student's, of aggregates a bootstrap stratified by row (arXiv:2108.13264), for which quick
runs and rows of fewer than MIN_SEEDS seeds do not count."""

import ast
import base64
import csv
import hashlib
import io
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import (
    FREE_FLAGS,
    HERE,
    MANIPULATION,
    STANDARD_SETS,
    UserError,
    late_mean,
    lock_file,
    one_line_errors,
    write_atomically,
)

KEY = ("algo", "task", "dataset", "source", "tag", "seed", "quick")  # one row per run
COLUMNS = ("algo", "task", "dataset", "source", "data_hash", "data_mean", "render", "tag", "seed", "steps", "quick",
           "score_last", "score_late_mean", "success_last", "success_late_mean", "env_steps", "episodes", "wall_s",
           "hardware", "versions", "commit", "command")  # fmt: skip
CELL = ("task", "dataset", "source", "data_hash", "quick")  # variants with equal CELLs can be compared
TABLE = (*CELL, "algo", "tag", "steps", "env_steps", "data_mean", "data_score", "seeds", "score_last", "score_last_low",
         "score_last_high", "score_late_mean", "score_late_mean_low", "score_late_mean_high", "success_last",
         "success_late_mean", "paper_mean", "paper_std", "wall_s", "hardware", "commits", "notes")  # fmt: skip
SCORES = ("score_last", "score_late_mean")
MIN_SEEDS = 3  # of a row in an aggregate
PAGES = [HERE / "README.md", HERE / "data" / "README.md", *sorted((HERE / "docs").glob("*.md"))]
PAGE_BYTES = 19_500_000  # of the page, its videos included
# flags that leave the algorithm's setting as it is: they name the row, or change no more than rounding
NEUTRAL = FREE_FLAGS | {"task", "dataset", "source", "transitions", "data_seed", "seed", "tag", "quick", "device",
                        "precision", "accelerate", "eval_every", "eval_episodes"}  # fmt: skip
Row = dict[str, str]


@dataclass
class Args:
    add: tuple[str, ...] = ()  # folders of finished runs: write their rows and curves under results/ and stop
    compare: tuple[str, ...] = ()  # two variants, ALGO or ALGO:TAG: print their difference and stop
    docs: bool = False  # fill the tables of PAGES from results/ and stop
    results_dir: str | None = None  # where summary.csv and curves/ are; None: results/ beside this file
    runs_dir: str | None = None  # where run folders are; None: runs/ beside this file
    out: str = "report"  # where the page goes


# ==== Runs and results/ ====


def read_run(path: Path) -> tuple[Row, str]:
    """A finished run's row (COLUMNS) and the text of its eval.csv. Raises UserError where there is no whole run."""
    needed = {"config.json": "this is no run folder", "finished.json": "the run is not finished; its command continues"}
    needed |= {"eval.csv": "the run was never evaluated (--eval-every 0?), so there is no score"}
    for name, meaning in needed.items():
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}; {meaning}")
    try:
        config, finished = (json.loads((path / name).read_text()) for name in ("config.json", "finished.json"))
        curve = (path / "eval.csv").read_text()
        row = row_of(config, finished, list(csv.DictReader(io.StringIO(curve))))
        curve_of(curve)
        return row, curve
    except (KeyError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: malformed ({problem}); --overwrite makes the run again") from None


def row_of(config: dict, finished: dict, evaluations: list[Row]) -> Row:
    """Raises KeyError, TypeError or ValueError where something is missing or does not fit."""
    if not evaluations or any(None in row or None in row.values() for row in evaluations):
        raise ValueError("eval.csv is empty, or has a row that is not as long as its header")
    steps = [int(row["step"]) for row in evaluations]
    if steps != sorted(set(steps)) or steps[-1] != finished["steps"]:
        raise ValueError(f"eval.csv: steps must rise and end with the run's last, {finished['steps']}")
    args, facts = config["args"], config["dataset"]
    row = {"algo": config["algo"], "task": args["task"], "dataset": facts["set"], "source": facts["source"]}
    row |= {"data_hash": facts["hash"], "data_mean": round(facts["mean_return"], 2), "render": facts["render"]}
    row |= {name: args[name] for name in ("tag", "seed", "quick")}
    for name in ("score", "success"):  # tasks that count successes log them beside the score
        if name == "score" or name in evaluations[0]:
            values = [float(evaluation[name]) for evaluation in evaluations]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"eval.csv: a {name} is not finite")
            row |= {f"{name}_last": round(values[-1], 2), f"{name}_late_mean": round(late_mean(values), 2)}
    row |= {"steps": finished["steps"], "wall_s": float(finished["wall_s"])}
    row |= {name: finished.get(name) for name in ("env_steps", "episodes")}  # of runs that also collect
    parts = [config, *config.get("resumed", [])]  # each process that trained a part of the run
    words = [word for flag in flags_of(parts[-1]["command"]) if name_of(flag) not in FREE_FLAGS for word in flag]
    row |= {"command": shlex.join(map(portable, words))}
    row["commit"] = " ".join(dict.fromkeys(part["commit"] for part in parts))
    machines = " + ".join(dict.fromkeys(part["hardware"] for part in parts))
    row["hardware"] = f"{machines}, {args['precision']}, {args['accelerate']}"
    row["versions"] = "; ".join(f"{name} {version}" for name, version in config["versions"].items())
    return {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}


def portable(word: str) -> str:
    """A word of a command, or a flag's value; of an absolute path, which no other machine has, the last two parts."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + ("/".join(Path(value).parts[-2:]) if Path(value).is_absolute() else value)


def flags_kept(config: dict) -> dict:
    """The flags of a run that say what it computed."""
    kept = {name: value for name, value in config["args"].items() if name not in FREE_FLAGS}
    return {name: portable(value) if isinstance(value, str) else value for name, value in kept.items()}


def read_summary(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with open(file, newline="") as handle:
        reader = csv.DictReader(handle)
        rows, header = list(reader), list(reader.fieldnames or ())
    if header != list(COLUMNS) or any(None in row or None in row.values() for row in rows):
        raise UserError(f"{file}: its columns are not {', '.join(COLUMNS)}; mend it or move it away")
    return rows


def identity(row: Row) -> tuple:
    """Names a run and orders the rows; seed 2 comes before seed 10."""
    return tuple((len(row[name]), row[name]) if name == "seed" else row[name] for name in KEY)


# what results/ keeps of a run beside its row; metrics: the last that were logged, of each file
KINDS = {"curves": ".csv", "configs": ".json", "metrics": ".json", "videos": ".mp4"}


def file_of(results: Path, row: Row, kind: str = "curves") -> Path:
    """results/<kind>/[quick/]<algo>/<task>/<set>[-vd4rl]/[<tag>-]seed<k>.<suffix>"""
    base = results / kind / ("quick" if row["quick"] == "True" else "")
    set_name = row["dataset"] + ("-vd4rl" if row["source"] == "vd4rl" else "")
    name = f"{row['tag']}{'-' * bool(row['tag'])}seed{row['seed']}{KINDS[kind]}"
    return base / row["algo"] / row["task"] / set_name / name


def add(folders: Iterable[str], results: Path) -> None:
    runs = [(Path(path), *read_run(Path(path))) for path in folders]  # all are whole before anything is written
    results.mkdir(parents=True, exist_ok=True)
    with lock_file(results / ".lock", wait=f"another process is writing {results}; waiting for it"):
        rows = {identity(row): row for row in read_summary(results / "summary.csv")}
        for folder, row, curve in runs:
            file, verb = file_of(results, row), "replaced" if identity(row) in rows else "added"
            kept = flags_kept(json.loads((folder / "config.json").read_text()))
            texts = {"curves": curve, "configs": json.dumps(kept, indent=1)}
            texts["metrics"] = json.dumps(last_metrics(folder), indent=1)
            for kind, text in texts.items():
                file_of(results, row, kind).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file_of(results, row, kind), text)
            add_video(folder / "evaluation.mp4", results, row)
            rows[identity(row)] = row
            print(f"{verb} {file}: score_last {row['score_last']}, score_late_mean {row['score_late_mean']}")
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        write_atomically(results / "summary.csv", table.getvalue())


def last_metrics(run: Path) -> dict[str, Row]:
    """train, model, ... -> the last row of <name>.csv in a run folder."""
    found = {}
    for file in sorted(run.glob("*.csv")):
        with open(file, newline="") as handle:
            rows = list(csv.DictReader(handle))
        if rows and file.stem not in ("eval", "episodes"):  # one is the curve, the other is about episodes
            found[file.stem] = rows[-1]
    return found


def add_video(video: Path, results: Path, row: Row) -> None:
    """Keeps a small copy of an evaluation's video, one of the seeds of a row."""
    target = file_of(results, row, "videos")
    others = set(target.parent.glob(target.name.replace(f"seed{row['seed']}", "seed*"))) - {target}
    if not video.exists() or others:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        small_video(video, target)
    except (OSError, subprocess.CalledProcessError, ImportError, RuntimeError) as error:
        print(f"note: {video} was not added ({error})")


def small_video(path: Path, target: Path) -> None:
    """Re-encodes an evaluation's video at half its size."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-i", path, "-vf", "scale=168:168"]
    command += ["-c:v", "libx264", "-crf", "30", "-preset", "slow", "-pix_fmt", "yuv420p", "-movflags", "faststart"]
    partial = target.with_suffix(".partial.mp4")
    subprocess.run([*command, partial], check=True)
    partial.replace(target)


# ==== What there is ====


@dataclass
class Result:
    """A finished run, from results/ or from its folder."""

    row: Row  # COLUMNS
    curve: list[tuple[int, float]]  # step, score of each evaluation; see curve_of
    args: dict | None = None  # its flags
    video: Path | None = None
    whole_video: bool = False  # video is as the run wrote it, not small_video's

    @property
    def name(self) -> str:
        return self.row["algo"] + (f":{self.row['tag']}" if self.row["tag"] else "")


def curve_of(text: str) -> list[tuple[int, float]]:
    """Gradient updates and score of each evaluation; of a run that also collects, steps in the environment and score
    from the end of its offline phase on."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if int(rows[-1].get("env_steps") or 0):
        before = sum(int(row["env_steps"]) == 0 for row in rows)
        return [(int(row["env_steps"]), float(row["score"])) for row in rows[max(before - 1, 0) :]]
    return [(int(row["step"]), float(row["score"])) for row in rows]


def gather(results: Path, runs: Path | None) -> tuple[list[Result], list[str]]:
    """Every finished run (a run folder is preferred to its row in results/), and what could not be read, in words."""
    found, problems = {}, []

    def add_result(result: Result) -> None:
        row = result.row
        found[(*identity(row), row["data_hash"], row["steps"])] = result

    for row in read_summary(results / "summary.csv"):
        try:
            config, video = (file_of(results, row, kind) for kind in ("configs", "videos"))
            args = dict(json.loads(config.read_text())) if config.exists() else None
            curve = curve_of(file_of(results, row).read_text())
            for name in ("steps", "data_mean", *SCORES, "wall_s"):
                float(row[name])
            add_result(Result(row, curve, args, video if video.exists() else None))
        except (OSError, LookupError, TypeError, ValueError) as error:
            problems.append(f"{file_of(results, row)}, its row in summary.csv or its configuration: {error}")
    files = [
        file for name in ("config.json", "finished.json", "eval.csv") for file in (runs.rglob(name) if runs else ())
    ]
    for folder in sorted({file.parent for file in files}):
        if (folder / "config.json").exists() and not (folder / "finished.json").exists():
            problems.append(f"{folder}: not finished; its command continues")
            continue
        try:
            row, text = read_run(folder)
            args, video = flags_kept(json.loads((folder / "config.json").read_text())), folder / "evaluation.mp4"
            add_result(Result(row, curve_of(text), args, video if video.exists() else None, whole_video=True))
        except UserError as error:
            problems.append(str(error))
    return [found[key] for key in sorted(found)], problems


def groups_of(runs: list[Result]) -> dict[tuple, list[Result]]:
    """(CELL..., variant, steps) -> its seeds. Nothing else is ever averaged."""
    groups = defaultdict(list)
    for run in runs:
        groups[(*(run.row[name] for name in CELL), run.name, int(run.row["steps"]))].append(run)
    return dict(sorted(groups.items(), key=lambda item: order(item[0])))


def order(key: tuple) -> tuple:
    """Tasks and sets in the paper's order, quick runs last."""
    task, dataset, _, _, quick, *_ = key
    tasks, name = ("walker-walk", "cheetah-run", "humanoid-walk"), dataset.split("-")[0]
    places = (names.index(one) if one in names else 99 for names, one in ((tasks, task), (STANDARD_SETS, name)))
    return (quick == "True", *places, key)


def standard_set(row: Row) -> str | None:
    """random, mixed, ... where the set is the standard one at any image size, not a smaller one or another seed's."""
    found = re.fullmatch(r"([a-z]+)-\d+px", row["dataset"])
    ours = found and found[1] in STANDARD_SETS and not row["task"].startswith(MANIPULATION)
    return found[1] if ours else None


def place_of(row: Row) -> tuple:
    """Runs of two variants can be compared where this is equal: a standard set at any image size, or the same data."""
    name = standard_set(row)
    data = (name, row["source"], row["data_mean"]) if name else (row["dataset"], row["source"], row["data_hash"])
    return (row["task"], *data, row["quick"])


def flags_of(command: str) -> list[list[str]]:
    """The words of a command: the script, then each flag with its values."""
    found = []
    try:
        words = shlex.split(command)
    except ValueError:  # recorded before commands kept their quotes
        words = command.split()
    for word in words:
        if word.startswith("--") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def name_of(flag: list[str]) -> str:
    return flag[0].removeprefix("--").partition("=")[0].replace("-", "_")


def own_flags(row: Row) -> list[str]:
    """What was typed that makes a run another than the algorithm's own setting."""
    return sorted(shlex.join(flag) for flag in flags_of(row["command"])[1:] if name_of(flag) not in NEUTRAL)


def published() -> dict[tuple, tuple[float, float]]:
    """(task, set, algo) -> mean, deviation over six seeds (V-D4RL Table 1, official data)."""
    with open(HERE / "results" / "published.csv", newline="") as file:
        rows = csv.DictReader(file)
        return {(row["task"], row["dataset"], row["algo"]): (float(row["mean"]), float(row["std"])) for row in rows}


# ==== Statistics ====


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of it; nan where there is one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def difference(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float, float]:
    """Mean over the pairs (a, b) of mean(b) - mean(a), and its 95 % interval: Welch's, with Satterthwaite's degrees of
    freedom where there are several pairs; nan where one of them is a single value."""
    gap = statistics.fmean(statistics.fmean(b) - statistics.fmean(a) for a, b in pairs)
    samples = [values for pair in pairs for values in pair]
    if min(map(len, samples)) < 2:
        return gap, math.nan, math.nan
    variances = [statistics.variance(values) / len(values) / len(pairs) ** 2 for values in samples]
    if not any(variances):
        return gap, gap, gap
    from scipy.stats import t

    freedom = sum(variances) ** 2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, samples))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(sum(variances))
    return gap, gap - half, gap + half


def iqm(scores: np.ndarray) -> float:
    """Mean of the middle half of all values."""
    from scipy.stats import trim_mean

    return float(trim_mean(scores, 0.25, axis=None))


def stratified_bootstrap(rows: list[list[float]], statistic, draws: int = 2000, level: float = 0.95):
    """Percentile interval of statistic(all values), the seeds of each row drawn anew with replacement."""
    rng, values = np.random.default_rng(0), [np.asarray(row, float) for row in rows]
    samples = [
        statistic(np.concatenate([row[rng.integers(len(row), size=len(row))] for row in values])) for _ in range(draws)
    ]
    low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def mixed_flags(runs: list[Result]) -> bool:
    """Whether the seeds of a group were trained with different flags: typed ones, and all of them where
    the configurations are here."""
    kept = [{name: value for name, value in run.args.items() if name not in FREE_FLAGS | {"seed", "device"}}
            for run in runs if run.args]  # fmt: skip
    typed = [(own_flags(run.row), run.row["hardware"].split(", ")[-2:-1]) for run in runs]  # hardware, precision, ...
    return any(one != kept[0] for one in kept) or any(one != typed[0] for one in typed)


def aggregate(groups: dict[tuple, list[Result]]) -> tuple[list[tuple], list[dict]]:
    """IQM per variant over the rows that all of them share. Returns those rows (task, set, source, mean), and dicts.

    Counted are standard sets at any image size, full runs of MIN_SEEDS seeds or more in the algorithm's own setting,
    variants without a tag. A variant with less than half as many such rows as another is left out, so that an idea
    under way does not shrink the rest. All rows of a variant weigh the same: of each count its first seeds, as many as
    its shortest row has."""
    variants = defaultdict(dict)
    for key, runs in sorted(groups.items(), key=lambda item: item[0][-1]):  # by length: steps may have grown
        row = runs[0].row
        enough = len(runs) >= MIN_SEEDS and not mixed_flags(runs) and not own_flags(row)
        if enough and row["quick"] != "True" and not row["tag"] and standard_set(row):
            place = row["task"], standard_set(row), row["source"], row["data_mean"]
            variants[key[-2]][place] = [float(run.row["score_last"]) for run in runs]
    most = max(map(len, variants.values()), default=0)
    variants = {name: rows for name, rows in sorted(variants.items()) if 2 * len(rows) >= most}
    shared = [row for row in next(iter(variants.values()), ()) if all(row in rows for rows in variants.values())]
    found = []
    for name, by_row in variants.items() if shared else ():
        count = min(len(by_row[row]) for row in shared)
        rows = [by_row[row][:count] for row in shared]
        low, high = stratified_bootstrap(rows, iqm)
        found.append({"name": name, "iqm": iqm(np.concatenate(rows)), "low": low, "high": high,
                      "runs": sum(map(len, rows))})  # fmt: skip
    return shared, found


# ==== Tables ====


def table_row(key: tuple, runs: list[Result], paper: dict) -> dict:
    """TABLE of one group; numbers, None where there is none."""
    row = dict(zip(CELL, key)) | {"algo": runs[0].row["algo"], "tag": runs[0].row["tag"], "steps": key[-1]}
    row |= {"seeds": len(runs), "data_mean": float(runs[0].row["data_mean"])}
    row["data_score"] = round(row["data_mean"] * (1 if row["task"].startswith(MANIPULATION) else 0.1), 2)
    for name in ("success_last", "success_late_mean", "env_steps"):
        values = [float(run.row[name]) for run in runs if run.row[name]]
        row[name] = round(statistics.fmean(values), 1) if values else None
    for name in SCORES:
        values = interval([float(run.row[name]) for run in runs])
        row |= {name + end: round(v, 2) if math.isfinite(v) else None for end, v in zip(("", "_low", "_high"), values)}
    mean, std = paper.get((row["task"], standard_set(row), row["algo"]), (None, None))
    row |= {"paper_mean": mean, "paper_std": std}
    row["wall_s"] = round(statistics.median(float(run.row["wall_s"]) for run in runs), 1)
    row["hardware"] = " + ".join(dict.fromkeys(run.row["hardware"] for run in runs))
    row["commits"] = " ".join(dict.fromkeys(run.row["commit"] for run in runs))
    notes = ["quick"] if row["quick"] == "True" else []
    notes += [f"{len(runs)} seed" + "s" * (len(runs) > 1)] if len(runs) < MIN_SEEDS else []
    notes += ["own flags"] * bool(own_flags(runs[0].row))
    notes += ["uncommitted code"] * ("-dirty" in row["commits"]) + ["mixed flags"] * mixed_flags(runs)
    row["notes"] = ", ".join(notes)
    return {name: row[name] for name in TABLE}


def bracket(low: float | None, high: float | None, sign: str = "") -> str:
    return f" [{low:{sign}.1f}, {high:{sign}.1f}]" if low is not None and math.isfinite(low) else ""


def score_text(row: dict, name: str) -> list[str]:
    """A score; its interval, and where the task counts them the successes."""
    found = [f"{row[name]:.1f}", bracket(row[f"{name}_low"], row[f"{name}_high"]).strip()]
    success = row[name.replace("score", "success")]
    return [part for part in found if part] + ([] if success is None else [f"(success {success:.0f} %)"])


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def markdown(rows: list[tuple[dict, list[Result]]]) -> str:
    """The table that --docs writes."""
    names = "command", "updates", "seeds", "data: source, score", "last score", "late mean", "paper", "wall clock"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row, runs in rows:
        script, *flags = flags_of(runs[0].row["command"])
        words = shlex.join(
            [Path(script[0]).name, *(w for f in flags if name_of(f) not in FREE_FLAGS | {"seed"} for w in f)]
        )
        last, late = (" ".join(score_text(row, name)) for name in SCORES)
        paper = "" if row["paper_mean"] is None else f"{row['paper_mean']:.1f} ± {row['paper_std']:.1f}"
        data = f"{row['source']}, {row['data_score']:.1f}"
        clock = f"{duration(row['wall_s'])}, {row['hardware']}"
        notes = [note for note in row["notes"].split(", ") if note and "seed" not in note]
        seeds = ", ".join([str(row["seeds"]), *notes])
        steps = f"{row['steps']:,}" + (f"; {row['env_steps']:,.0f} steps online" if row["env_steps"] else "")
        lines.append(f"| `{words}` | {steps} | {seeds} | {data} | {last} | {late} | {paper} | {clock} |")
    return "\n".join(lines)


def lines_of(name: str, file: Path) -> str:
    """Where a function, class, Class.method, Class.field or constant is defined, as the end of a link: #L3-L9."""

    def defines(node, part: str) -> bool:
        assigned = [*getattr(node, "targets", []), getattr(node, "target", None)]
        return part in (getattr(node, "name", None), *(getattr(target, "id", None) for target in assigned))

    node = ast.parse(file.read_text())
    for part in name.split("."):
        node = next((one for one in getattr(node, "body", []) if defines(one, part)), None)
        if node is None:
            raise UserError(f"{file} defines no {name}, to which a page links")
    return f"#L{node.lineno}" + f"-L{node.end_lineno}" * (node.end_lineno > node.lineno)


def speed(results: Path, part: str, about: str = "") -> str:
    """One part's rows, of those that begin with `about`, of results/throughput*.json (throughput.py --json)."""
    tables = []
    for file in sorted(results.glob("throughput*.json")):
        updates, lines = part in ("update", "world"), []
        try:
            facts = json.loads(file.read_text())
            rows = [] if facts["quick"] else facts["rows"]  # a rehearsal's numbers mean nothing
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not what throughput.py --json writes; measure again") from None
        for row in rows:
            if row["part"] == part and row["what"].startswith(about):
                what, unit = row["what"].removesuffix(", eager"), row["unit"].split("/")[0]
                other = rate = ""
                if row["other"]:
                    other = f"{row['other']:.4g} {unit} ({row['ratio']:.{1 if row['ratio'] < 10 else 0}f}x)"
                if row["unit"] == "s/update":
                    rate = f"{row['value'] * 1e5 / 3600:.1f} h"
                elif row["per_second"] and not updates:  # LOMPO's rollouts are no updates
                    rate = f"{row['per_second']:.3g}"
                lines.append(f"| {what} | {row['value']:.3g} {unit} | {other} | {rate} |")
        if lines:
            machine = f"{facts['hardware']}, calibration {facts['calibration_s'] * 1e3:.0f} ms"
            last = "100,000 updates" if updates else "per second"
            tables.append("\n".join([f"| {machine} | here | other code | {last} |", "|---|---|---|---|", *lines]))
    return "\n\n".join(tables)


def fill_docs(results: Path, pages: list[Path]) -> dict[Path, str]:
    """The pages' new texts: the tables between `<!-- results algo=cql quick=False -->` (columns of TABLE filter) or
    `<!-- speed part=update about=cql -->` and `<!-- end -->`, and the line numbers of links whose text is code:
    [`Agent.update`](../algos/bc.py#L1)."""
    groups = groups_of(gather(results, None)[0])
    rows = [(table_row(key, runs, published()), runs) for key, runs in groups.items()]

    def table(found: re.Match) -> str:
        wanted = dict(word.split("=") for word in found[2].split())
        if found[1] == "speed":
            text = speed(results, **wanted)
        else:
            chosen = [(row, runs) for row, runs in rows if all(str(row[name]) == wanted[name] for name in wanted)]
            text = markdown(chosen) if chosen else ""
        return f"<!-- {found[1]}{found[2]} -->\n{text or 'Nothing has been measured yet.'}\n<!-- end -->"

    texts = {}
    for page in pages:
        old = page.read_text()
        new = re.sub(r"<!-- (results|speed)((?: \w+=\S+)*) -->\n.*?<!-- end -->", table, old, flags=re.S)
        link = r"(\[`([\w.]+)`\]\(([\w./]+\.py))(?:#L\d+(?:-L\d+)?)?\)"
        new = re.sub(link, lambda m, page=page: f"{m[1]}{lines_of(m[2], page.parent / m[3])})", new)
        texts[page] = new
    return texts


def runs_of(name: str, groups: dict[tuple, list[Result]]) -> dict[tuple, dict[int, list[Result]]]:
    """A variant's runs: place_of -> steps -> its seeds."""
    found = defaultdict(dict)
    for key, runs in groups.items():
        if key[-2] == name and found[place_of(runs[0].row)].setdefault(key[-1], runs) is not runs:
            print(f"note: {name}, {' '.join(key[:3])} is like a row that is compared in all but the images: left out")
    if not found:
        known = ", ".join(sorted({key[-2] for key in groups})) or "none"
        raise UserError(f"--compare {name}: no finished run; there are {known}")
    return found


def compare(names: tuple[str, ...], runs: list[Result]) -> str:
    """Two variants on the rows they share, and the interval of their difference (second minus first)."""
    if len(names) != 2:
        raise UserError("--compare A B: two variants, ALGO or ALGO:TAG")
    groups = groups_of(runs)
    one, two = (runs_of(name, groups) for name in names)
    lines, rows = [], []  # rows: title, both groups, whether it counts in the mean
    for place in sorted(one.keys() & two.keys(), key=order):
        both = one[place].keys() & two[place].keys()  # runs of equal length, if there are any; the longest
        enough = {n for n in both if min(len(one[place][n]), len(two[place][n])) >= MIN_SEEDS}
        steps = [max(enough or both or variant[place]) for variant in (one, two)]
        a, b = one[place][steps[0]], two[place][steps[1]]
        lengths = " and ".join(dict.fromkeys(f"{length:,}" for length in steps))
        title = f"{' '.join(place[:3])} {lengths} steps" + " quick" * (place[4] == "True")
        whole = place[4] != "True" and min(len(a), len(b)) >= MIN_SEEDS and bool(both)
        rows.append((title, a, b, whole and not mixed_flags(a) and not mixed_flags(b)))
    for score, what in zip(SCORES, ("last score", "mean of the late evaluations")) if rows else ():
        lines += ["", f"{what}: mean over seeds (their number), difference with its 95 % interval"]
        lines += [f"{'':52}{names[0]:>20}{names[1]:>20}   difference"]
        pairs = [[[float(run.row[score]) for run in group] for group in row[1:3]] for row in rows]
        for (title, *_), pair in zip(rows, pairs):
            means = [f"{statistics.fmean(values):.1f} ({len(values)})" for values in pair]
            gap, low, high = difference([pair])
            lines.append(f"{title:52}{means[0]:>20}{means[1]:>20}   {gap:+.1f}" + bracket(low, high, "+"))
        counted = [pair for pair, row in zip(pairs, rows) if row[3]]
        if len(counted) > 1:
            title = f"mean of the {len(counted)} full rows of {MIN_SEEDS} or more seeds and equal length"
            gap, low, high = difference(counted)
            lines.append(f"{title:92}   {gap:+.1f}" + bracket(low, high, "+"))
    lines += [] if rows else ["no row in common: task, set, source, data and quick must be equal"]
    for name, mine, other in ((names[0], one, two), (names[1], two, one)):
        lines += [f"only {name}: {' '.join(place[:3])}, data {place[3]}" for place in mine if place not in other]
    return "\n".join(lines).strip()


# ==== Page ====


def page_data(groups: dict, problems: list[str], paper: dict, out: Path) -> dict:
    """What report.html shows, as JSON."""
    shared, methods = aggregate(groups)
    rows = []
    for key, runs in groups.items():
        row = table_row(key, runs, paper) | {"name": key[-2], "video": None}
        row["set"] = standard_set(runs[0].row) or row["dataset"]
        row["cell"] = " ".join(place_of(runs[0].row)) + " online" * bool(row["env_steps"])
        parts = {name: score_text(row, name) for name in SCORES}
        row["text"] = {name: [first, " ".join(rest)] for name, (first, *rest) in parts.items()}
        row["runs"] = [run.row | {"curve": run.curve, "config": run.args} for run in runs]
        rows.append(row)
    data = {
        "rows": rows,
        "methods": methods,
        "shared": [" ".join(row[:3]) for row in shared],
        "problems": problems,
        "min_seeds": MIN_SEEDS,
    }
    room = PAGE_BYTES - len(json.dumps(data))
    for row, runs in zip(rows, groups.values()):
        for run in (run for run in runs if run.video and not row["video"]):
            try:
                video = base64.b64encode(video_of(run, out / "videos")).decode()
            except (OSError, subprocess.CalledProcessError, ImportError, RuntimeError) as error:
                problems.append(f"{run.video}: {error}")
                continue
            if len(video) > room:
                problems.append(f"{run.video}: left out, the page would exceed 20 MB")
                break
            room -= len(video)
            row |= {"video": f"data:video/mp4;base64,{video}", "video_of": f"seed {run.row['seed']}"}
    return data


def video_of(run: Result, cache: Path) -> bytes:
    """A run's video as the page shows it, re-encoded once."""
    if not run.whole_video:
        return run.video.read_bytes()
    name = hashlib.sha256(f"{run.video.resolve()} {run.video.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    if not (cache / f"{name}.mp4").exists():
        small_video(run.video, cache / f"{name}.mp4")
    return (cache / f"{name}.mp4").read_bytes()


def plot_curves(groups: dict, paper: dict, out: Path) -> list[Path]:
    """One PNG per task (quick runs apart): a panel per set, a line per variant, thin ones per seed."""
    try:
        import matplotlib
    except ImportError:
        print("note: matplotlib is not installed; no curves as PNG")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures, written = defaultdict(lambda: defaultdict(dict)), []
    for (task, dataset, source, data_hash, quick, name, steps), runs in groups.items():
        label = f"{name}, {steps:,} updates ({len(runs)})"
        online = ", online" if runs[0].row["env_steps"] else ""
        figures[task + "-quick" * (quick == "True")][f"{dataset}, {source}{online}", data_hash][label] = runs
    names = sorted({key[-2] for key in groups})
    for task, panels in figures.items():
        size = (max(6.4, 4.2 * len(panels)), 3.4)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
        for axis, ((title, _), variants) in zip(axes[0], panels.items()):
            for label, runs in variants.items():
                color = f"C{names.index(runs[0].name) % 10}"
                for run in runs:
                    axis.plot(
                        *zip(*run.curve),
                        ".-",
                        color=color,
                        linewidth=0.7,
                        markersize=2,
                        alpha=0.5 if len(runs) > 1 else 1,
                    )
                if len({tuple(step for step, _ in run.curve) for run in runs}) == 1:  # the same evaluations
                    steps = [step for step, _ in runs[0].curve]
                    mean = np.mean([[score for _, score in run.curve] for run in runs], 0)
                    axis.plot(steps, mean, color=color, linewidth=2, label=label)
                row = runs[0].row
                reported = paper.get((row["task"], standard_set(row), row["algo"]))
                if reported:
                    axis.axhline(reported[0], color=color, linestyle=":", linewidth=1)
            online = all(run.row["env_steps"] for runs in variants.values() for run in runs)
            axis.set(title=title, xlabel="environment steps" if online else "gradient updates")
            axis.legend(fontsize=8)
        scores = [
            score for panel in panels.values() for runs in panel.values() for run in runs for _, score in run.curve
        ]
        axes[0][0].set_ylim(min(0, *scores), max(100, *scores))
        axes[0][0].set_ylabel("score (return)" if task.startswith(MANIPULATION) else "score (return / 10)")
        figure.suptitle(f"{task}: evaluations; dotted: the paper, on official data")
        figure.tight_layout()
        written.append(out / f"curves-{task}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def plot_rows(rows: list[dict], file: Path) -> None:
    """Last scores, a line per task and data, and what the data scores; of one algorithm's lengths the longest, its
    untagged rows alone. Intervals where there are MIN_SEEDS, else the point is hollow."""
    try:
        import matplotlib
    except ImportError:
        print(f"note: matplotlib is not installed; {file.name} stays as it is")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    places, names = defaultdict(dict), sorted({row["algo"] for row in rows})
    for row in sorted(rows, key=lambda row: row["steps"]):
        if not row["tag"]:
            places[place_of(row)][row["algo"]] = row
    places = [found for _, found in sorted(places.items(), key=lambda item: order(item[0]))]
    figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.62 * len(places)), layout="constrained")
    labels, shown = [], [0, 100]
    for place, found in enumerate(places):
        first = next(iter(found.values()))
        kind = ", ".join([first["source"], *["quick"] * (first["quick"] == "True")])
        labels.append(f"{first['task']}\n{standard_set(first) or first['dataset']}, {kind}")
        axis.plot([first["data_score"]] * 2, [place - 0.38, place + 0.38], color="0.6", linewidth=2, zorder=0,
                  label="the data's mean" if place == 0 else None)  # fmt: skip
        for row in found.values():
            at = place + 0.11 * (names.index(row["algo"]) - (len(names) - 1) / 2)
            color, few = f"C{names.index(row['algo'])}", row["seeds"] < MIN_SEEDS
            if not few:
                axis.plot([row["score_last_low"], row["score_last_high"]], [at, at], color=color)
            axis.plot(row["score_last"], at, "o", color=color, markersize=4, fillstyle="none" if few else "full")
            shown.append(row["score_last"])
    for i, name in enumerate(names):
        axis.plot([], [], "o", color=f"C{i}", label=name)
    axis.set(
        yticks=range(len(labels)),
        yticklabels=labels,
        xlim=(min(shown) - 2, max(shown) + 2),
        xlabel=f"last score (return / 10; Meta-World: return), 95 % over seeds; hollow: under {MIN_SEEDS}",
    )
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names) + 1, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write_report(results: Path, runs: Path, out: Path) -> None:
    found, problems = gather(results, runs if runs.is_dir() else None)
    groups, paper = groups_of(found), published()
    (out / "videos").mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, TABLE, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_row(key, group, paper) for key, group in groups.items())
    write_atomically(out / "table.csv", table.getvalue())
    plot_curves(groups, paper, out)
    data = json.dumps(page_data(groups, problems, paper, out)).replace("<", "\\u003c")
    page = (HERE / "benchmarks" / "report.html").read_text().replace("/*DATA*/null", data)
    write_atomically(out / "index.html", page)
    for problem in problems:
        print(f"left out: {problem}")
    print(
        f"{len(found)} runs in {len(groups)} rows: {out / 'index.html'} ({len(page) / 1e6:.1f} MB), table.csv, curves"
    )


def main(args: Args) -> None:
    results, runs = Path(args.results_dir or HERE / "results"), Path(args.runs_dir or HERE / "runs")
    if args.add:
        folders = [path for path in args.add if not path.endswith(".log")]  # seed* finds benchmark.sh's logs, too
        if not folders:
            raise UserError("--add: these are logs; name run folders")
        add(folders, results)
    elif args.compare:
        print(compare(args.compare, gather(results, runs if runs.is_dir() else None)[0]))
    elif args.docs:
        for page, text in fill_docs(results, PAGES).items():
            if text != page.read_text():
                write_atomically(page, text)
                print(f"filled {page}")
        groups = groups_of(gather(results, None)[0])
        plot_rows([table_row(key, group, published()) for key, group in groups.items()], results / "scores.png")
    else:
        write_report(results, runs, Path(args.out))


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args))
