"""The report's pictures as PNG, and the colours that they share with its page. report.py calls these functions with its
groups: the rows of its tables, one per variant."""

import io
import statistics
import zlib
from collections import defaultdict
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from PIL import Image, ImageDraw

from benchmarks.tables import LEVELS, PARTS, parts_of, varied

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
    success = first.table["success_last"] is not None  # its points are percentages, the data's mean is a return
    if not success:
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
    axis.set_ylabel("success, % of the episodes" if success else "score (return / 10)")
    axis.set_title(" ".join(first.place[:3]) + ", quick" * first.quick)
    axis.legend(fontsize=8, handlelength=4)
    return figure


def plot_scores(groups: list) -> Figure:
    """A panel per algorithm and set: the curve, what the data scores, and the paper's score at full size. Of quick runs
    and of those tagged "tenth", the longest."""
    panels = defaultdict(dict)
    for group in groups:
        if not group.parts and (group.quick and not group.row["tag"] or group.row["tag"] == "tenth"):
            panel = panels[group.row["algo"], group.row["task"], group.place[1].split("-")[0]]
            panel[group.quick] = max(panel.get(group.quick, group), group, key=lambda group: group.steps)
    order = sorted(panels, key=lambda key: [*COLORS, key[0]].index(key[0]))  # stable: tasks and sets as they come
    rows = max(1, -(-len(order) // 4))
    figure = Figure(figsize=(11, 0.5 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flatten()
    for axis, key in zip(axes, order):
        color, marks, starts, what = color_of(key[0]), [], [], key[2]
        for quick, group in panels[key].items():
            style = {"color": color, "linestyle": "-" if quick else "--"}
            for run in group.runs:
                axis.plot(*zip(*run.points), **style, linewidth=0.7, alpha=0.45)
                marks += [score for _, score in run.points]
                starts += [2 * first - second for (first, _), (second, _) in zip(run.points, run.points[1:2])]
            axis.plot(*(zip(*mean) if (mean := mean_curve(group.runs)) else ([], [])), **style, linewidth=2.2)
            if group.table["success_last"] is None:
                axis.axhline(group.table["data_score"], color="0.6", linewidth=3, zorder=0)
                marks.append(group.table["data_score"])
        if group.table["success_last"] is not None:
            marks, what = [100], "success in %"
        if group.paper:
            axis.plot(0.985, group.paper[0], "*", color="black", markersize=9, transform=axis.get_yaxis_transform())
            marks.append(group.paper[0])
        left = max(0, min(starts, default=0))  # a world model's first phase has no evaluations
        axis.set(xlim=(left, None), ylim=(0, 1.08 * max(marks)))
        axis.set_title(f"{key[0]}: {key[1].removeprefix('metaworld-')} {what}")
        axis.set_xlabel("environment steps" if group.table["env_steps"] else "", fontsize=8)
        axis.title.set(fontsize=9, fontweight="bold", color=color)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(order) :]:
        axis.axis("off")
    lines = {
        "score over gradient updates: mean of the seeds, and each seed": {"linewidth": 2.2},
        "a tenth of the paper's updates": {"linewidth": 2.2, "linestyle": "--"},
        "mean of the data": {"color": "0.6", "linewidth": 3},
        "the paper, full size": {"linestyle": "", "marker": "*", "markersize": 9},
    }
    handles = [Line2D([], [], **{"color": "black"} | style, label=label) for label, style in lines.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def plot_shifts(groups: list) -> Figure | None:
    """A panel per file, task, set and level: the three scores over the percentage of shifted episodes."""
    panels, lines = defaultdict(dict), dict(zip(PARTS[False], ("-", "--", ":")))
    for group in filter(varied, groups):
        _, what, level, percent = varied(group).groups()
        if level:  # the whole name of the set: other sizes and lengths are other panels
            name = group.row["dataset"].replace(what, level) + ", quick" * group.quick
            panels[group.name, group.row["task"], name, level][int(percent)] = group
    if not panels:
        return None
    keys = sorted(panels, key=lambda key: (*key[:3], LEVELS.index(key[3])))
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.6 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, key in zip(axes, keys):
        percents = sorted(panels[key])
        scores = zip(*(parts_of(panels[key][percent]) for percent in percents))
        for line, values in zip(lines.values(), scores):
            axis.plot(percents, values, line, color="black", marker="o", markersize=3)
        axis.set(xlim=(-3, 103), ylim=(0, None), xticks=(0, 25, 50, 75, 100), xlabel="% of the episodes shifted")
        axis.set_title(" ".join(key[:3]), fontsize=9, fontweight="bold")
    for axis in axes[len(keys) :]:
        axis.axis("off")
    handles = [Line2D([], [], color="black", linestyle=line, label=part) for part, line in lines.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def film(videos: dict[str, Path], frames: int = 100) -> bytes:
    """A GIF in which the videos play side by side, named, each from start to end at about twice its speed."""
    tiles = []
    for name, file in videos.items():
        video = np.stack(imageio.mimread(file, memtest=False))
        small = [Image.fromarray(video[int(at)]).resize((128, 128), 0) for at in np.linspace(0, len(video) - 1, frames)]
        for image in small:
            ImageDraw.Draw(image).text((4, 2), name, fill="white", stroke_width=1, stroke_fill="black")
        tiles.append(np.stack(small))
    wide = min(3, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % wide)
    grid = np.concatenate([np.concatenate(tiles[i : i + wide], 2) for i in range(0, len(tiles), wide)], 1)
    palette = Image.fromarray(grid[::10].reshape(-1, *grid.shape[2:])).quantize(64)
    images, out = [Image.fromarray(frame).quantize(palette=palette, dither=0) for frame in grid], io.BytesIO()
    images[0].save(out, "gif", save_all=True, append_images=images[1:], duration=125, loop=0)
    return out.getvalue()
