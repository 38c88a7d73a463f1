"""Collects finished runs: one row each in results/summary.csv, their evaluations under results/curves/.

    python report.py --add runs/drq_bc/walker-walk/medium-84px/seed0 runs/drq_bc/walker-walk/medium-84px/seed1

Adding a run again replaces its row. A row reports the last evaluation and the mean of the last max(2, 10 %), never the
best evaluation: that one is chosen by the test set."""

import csv
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common import HERE, UserError, late_mean, lock_file, one_line_errors, write_atomically

KEY = ("algo", "task", "dataset", "source", "tag", "seed", "quick")  # one row per run
COLUMNS = ("algo", "task", "dataset", "source", "data_hash", "data_mean", "render", "tag", "seed", "steps", "quick",
           "score_last", "score_late_mean", "success_last", "success_late_mean", "env_steps", "episodes", "wall_s",
           "hardware", "versions", "commit", "command")  # fmt: skip
Row = dict[str, str]


@dataclass
class Args:
    add: tuple[str, ...] = ()  # folders of finished runs
    results_dir: str | None = None  # where summary.csv and curves/ are; None: results/ beside this file


def read_run(path: Path) -> tuple[Row, str]:
    """A finished run's row (COLUMNS) and the text of its eval.csv. Raises UserError where there is no whole run."""
    needed = {"config.json": "this is no run folder", "finished.json": "the run is not finished; its command continues"}
    needed |= {"eval.csv": "the run was never evaluated (--eval-every 0?), so there is no score"}
    for name, meaning in needed.items():
        if not (path / name).is_file():
            raise UserError(f"--add {path}: no {name}; {meaning}")
    try:
        config, finished = (json.loads((path / name).read_text()) for name in ("config.json", "finished.json"))
        curve = (path / "eval.csv").read_text()
        return row_of(config, finished, list(csv.DictReader(io.StringIO(curve)))), curve
    except (KeyError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"--add {path}: malformed ({problem}); --overwrite makes the run again") from None


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
    row |= {"steps": finished["steps"], "wall_s": finished["wall_s"]}
    row |= {name: finished.get(name) for name in ("env_steps", "episodes")}  # of runs that also collect
    parts = [config, *config["resumed"]]  # each process that trained a part of the run
    row |= {"command": parts[-1]["command"], "commit": " ".join(dict.fromkeys(part["commit"] for part in parts))}
    machines = " + ".join(dict.fromkeys(part["hardware"] for part in parts))
    row["hardware"] = f"{machines}, {args['precision']}, {args['accelerate']}"
    row["versions"] = "; ".join(f"{name} {version}" for name, version in config["versions"].items())
    return {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}


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


def curve_file(results: Path, row: Row) -> Path:
    """results/curves/[quick/]<algo>/<task>/<set>[-vd4rl]/[<tag>-]seed<k>.csv"""
    base = results / "curves" / ("quick" if row["quick"] == "True" else "")
    set_name = row["dataset"] + ("-vd4rl" if row["source"] == "vd4rl" else "")
    return base / row["algo"] / row["task"] / set_name / f"{row['tag']}{'-' * bool(row['tag'])}seed{row['seed']}.csv"


def main(args: Args) -> None:
    if not args.add:
        raise UserError("--add RUN [RUN ...]: name the folder of at least one finished run")
    results = Path(args.results_dir or HERE / "results")
    runs = [read_run(Path(path)) for path in args.add]  # all are whole before anything is written
    results.mkdir(parents=True, exist_ok=True)
    with lock_file(results / ".lock", wait=f"another process is writing {results}; waiting for it"):
        rows = {identity(row): row for row in read_summary(results / "summary.csv")}
        for row, curve in runs:
            file, verb = curve_file(results, row), "replaced" if identity(row) in rows else "added"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, curve)
            rows[identity(row)] = row
            print(f"{verb} {file}: score_last {row['score_last']}, score_late_mean {row['score_late_mean']}")
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        write_atomically(results / "summary.csv", table.getvalue())


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args))
