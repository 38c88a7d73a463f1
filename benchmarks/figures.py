"""The report's pictures as PNG, and the colours that they share with its page. report.py calls these functions with its
groups: the rows of its tables, one per variant."""

import statistics
import zlib
from collections import defaultdict

from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from common import MANIPULATION

# a colour belongs to an algorithm for ever
COLORS = {"bc": "#0072b2", "drq_bc": "#d55e00", "cql": "#009e73", "offline_dv2": "#cc6699", "lompo": "#b8860b",
          "moto": "#7f3fbf"}  # fmt: skip
OTHER_COLORS = ("#3fa7d6", "#c00000", "#6b8e00", "#8d5a3a", "#008b8b", "#5c6bc0")  # of files that are not listed above
DASHES = ("", "9 4", "4 3", "12 3 3 3", "9 3 3 3 3 3", "2 2")  # lengths of strokes and gaps: these tell tags apart


def color_of(algo: str) -> str:
    return COLORS.get(algo) or OTHER_COLORS[zlib.crc32(algo.encode()) % len(OTHER_COLORS)]


def looks(groups: list) -> dict[str, tuple[str, str]]:
    """Variant -> colour, dashes. Only a variant without a tag has a solid line, unless two share an OTHER_COLOR."""
    found = {}
    for name in sorted({group.name for group in groups}):
        algo, _, tag = name.partition(":")
        free = [dash for dash in DASHES[1 if tag else 0 :] if (color_of(algo), dash) not in found.values()]
        found[name] = color_of(algo), (free or DASHES)[0]
    return found


def mean_curve(runs: list) -> list[tuple[int, float]]:
    """The mean of the seeds' curves; empty where they were evaluated at different steps."""
    steps = [step for step, _ in runs[0].points]
    if any([step for step, _ in run.points] != steps for run in runs):
        return []
    return [(step, statistics.fmean(run.points[i][1] for run in runs)) for i, step in enumerate(steps)]


def plot_curves(groups: list, look: dict[str, tuple[str, str]]) -> Figure:
    """One chart: a thick line per variant, thin ones per seed, what the data scores, dotted what the paper reports."""
    figure, first = Figure(figsize=(6.4, 4.4), layout="constrained"), groups[0]
    axis = figure.subplots()
    axis.axhline(first.table["data_score"], color="0.7", linewidth=3, zorder=0, label="the data's mean")
    for i, group in enumerate(groups):
        color, dashes = look[group.name]
        pattern = (0, [float(length) / 2 for length in dashes.split()]) if dashes else "-"
        points = (i - (len(groups) - 1) / 2) * min(2, 8 / len(groups))  # apart: equal lines do not hide each other
        apart = ScaledTranslation(0, points / 72, figure.dpi_scale_trans)
        style = {"color": color, "linestyle": pattern, "transform": axis.transData + apart}
        mean, label = mean_curve(group.runs), f"{group.name}, {group.steps:,} updates ({len(group.runs)})"
        for run in group.runs:
            axis.plot(*zip(*run.points), **style, linewidth=0.8, alpha=0.5 if mean else 1, marker=".", markersize=3)
            axis.update_datalim(run.points)
        axis.plot(*(zip(*mean) if mean else ([], [])), **style, linewidth=2, label=label)
        if group.table["paper_mean"] is not None:
            axis.axhline(group.table["paper_mean"], color=color, linestyle=":", linewidth=1)
    axis.autoscale_view()
    axis.set_ylim(min(-3, axis.get_ylim()[0]), max(103, axis.get_ylim()[1]))
    axis.set_xlabel("environment steps" if first.table["env_steps"] else "gradient updates")
    axis.set_ylabel("score (return)" if first.row["task"].startswith(MANIPULATION) else "score (return / 10)")
    axis.set_title(" ".join(first.place[:3]) + ", quick" * first.quick)
    axis.legend(fontsize=8, handlelength=4)
    return figure


def plot_scores(groups: list) -> Figure:
    """Last scores, a line per task and data, and what the data scores; of one algorithm's lengths the longest, its
    untagged rows alone. Intervals where there are enough seeds, else the point is hollow."""
    places = defaultdict(dict)
    for group in sorted(groups, key=lambda group: group.steps):
        if not group.row["tag"]:
            places[group.place][group.name] = group
    order = [place for place in dict.fromkeys(group.place for group in groups) if place in places]
    figure, labels = Figure(figsize=(8, 1 + 0.62 * len(order)), layout="constrained"), []
    axis = figure.subplots()
    for at, place in enumerate(order):
        found = [places[place][name] for name in sorted(places[place])]
        kind = ", ".join([*place[1:3], *["quick"] * found[0].quick])
        labels.append(f"{place[0]}\n{kind}")
        axis.plot([found[0].table["data_score"]] * 2, [at - 0.38, at + 0.38], color="0.6", linewidth=2, zorder=0)
        for i, group in enumerate(found):
            score, low, high = (group.table[name] for name in ("score_last", "score_last_low", "score_last_high"))
            y, color = at + 0.13 * (i - (len(found) - 1) / 2), color_of(group.name)
            if group.enough:
                axis.plot([low, high], [y, y], color=color)
            axis.plot(score, y, "o", color=color, markersize=4, fillstyle="full" if group.enough else "none")
    axis.set_xlim(min(0, axis.get_xlim()[0]), max(100, axis.get_xlim()[1]))
    names = sorted({name for place in order for name in places[place]})
    for name in names:
        axis.plot([], [], "o", color=color_of(name), label=name)
    axis.plot([], [], color="0.6", linewidth=2, label="the data's mean")
    axis.set_xlabel("last score and its 95 % interval over seeds; hollow: too few seeds for one")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names) + 1, fontsize=8, frameon=False)
    return figure
