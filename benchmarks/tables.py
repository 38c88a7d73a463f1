"""Tables that `report.py --docs` writes beside that of the results: measured speed; runs on sets with distractions or
other bodies, beside V-D4RL's (arXiv:2206.04779, Tables 3, 11 and 12)."""

import csv
import json
import re
from pathlib import Path

from common import HERE, UserError

LEVELS = ("low", "moderate", "high")
PARTS = {True: ("train", "interpolation", "extrapolation"), False: ("original", "train", "test")}  # bodies or not


def speed(results: Path, part: str, about: str = "") -> str:
    """One part's rows, of those that begin with `about`, of results/throughput*.json (throughput.py --json)."""
    tables, updates = [], part in ("update", "world")
    for file in sorted(results.glob("throughput*.json")):
        try:
            facts = json.loads(file.read_text())
            rows = [] if facts["quick"] else facts["rows"]  # a rehearsal's numbers mean nothing
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not what throughput.py --json writes; measure again") from None
        lines = []
        for row in [row for row in rows if row["part"] == part and row["what"].startswith(about)]:
            unit, other, rate = row["unit"].split("/")[0], "", ""
            if row["other"]:
                other = f"{row['other']:.4g} {unit} ({row['ratio']:.{1 if row['ratio'] < 10 else 0}f}x)"
            if row["unit"] == "s/update":
                rate = f"{row['value'] * 1e5 / 3600:.1f} h"
            elif row["per_second"] and not updates:  # LOMPO's rollouts are no updates
                rate = f"{row['per_second']:.3g}"
            lines.append(f"| {row['what'].removesuffix(', eager')} | {row['value']:.3g} {unit} | {other} | {rate} |")
        if lines:
            machine = f"{facts['hardware']}, calibration {facts['calibration_s'] * 1e3:.0f} ms"
            last = "100,000 updates" if updates else "per second"
            tables.append("\n".join([f"| {machine} | here | other code | {last} |", "|---|---|---|---|", *lines]))
    return "\n\n".join(tables)


def varied(group) -> re.Match | None:
    """Of a group's set: its name (medexp), what it varies (low50, bodies), and of a distraction level and percent."""
    return re.fullmatch(r"(\w+)-\d+px.*?-((low|moderate|high)(\d+)|bodies).*", group.row["dataset"])


def published() -> dict[tuple, tuple[str, ...]]:
    """(algo, task, set, variation) -> the paper's three scores, as text."""
    with open(HERE / "results" / "published_variations.csv", newline="") as file:
        return {tuple(row[:4]): tuple(row[4:]) for row in list(csv.reader(file))[1:]}


def varied_table(groups: list) -> str:
    """Late means of the three parts of an evaluation, a row per file, task and set; empty where there is none."""
    paper, lines = published(), []
    for group in sorted(filter(varied, groups), key=lambda group: (group.name, *group.place[:2])):
        name, what, level, percent = varied(group).groups()
        scores = ", ".join(f"{part} {score:.1f}" for part, score in zip(PARTS[what == "bodies"], parts_of(group)))
        theirs = " / ".join(paper.get((group.row["algo"], group.row["task"], name, what), ()))
        rest = group.row["dataset"].rpartition(what)[2].strip("-")  # --redraw, a folder of backgrounds
        shown = f"{level}, {percent} % shifted, {rest or 'procedural'}" if level else what
        lines.append(f"| {group.name} | {group.row['task']} {name}{', quick' * group.quick} | {shown} | {scores} "
                     f"| {group.table['data_score']:.1f} | {theirs} | {len(group.runs)} |")  # fmt: skip
    head = "| file | set | variation | late mean | data | paper, full size | seeds |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *lines]) if lines else ""


def parts_of(group) -> list[float]:
    """The three late means, over the seeds."""
    return [group.table["score_late_mean"], *group.parts.values()]
