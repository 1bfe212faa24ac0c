"""Numbers to plots, as SVG that follows its reader's choice of light or dark."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Numbers = Sequence[float] | np.ndarray


BLUE, ORANGE, FAINT = "#2f6fb5", "#d9822b", "#5c6570"

# Colors of the drawing that a dark page needs otherwise; text has no color of its own.
_DARK = {"#000000": ("ink", "#1c2026", "#e4e7eb"), BLUE: ("blue", BLUE, "#7fb2e8"), FAINT: ("faint", FAINT, "#9aa4af")}


def svg(figure: Any) -> bytes:
    """A matplotlib figure as SVG without a background, equal for equal figures; ink, `BLUE` and `FAINT` follow light and dark."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "maskvit"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue().decode("utf-8")
    for color, (name, _, _) in _DARK.items():
        text = text.replace(f": {color}", f": var(--{name})")
    light, dark = (" ".join(f"--{row[0]}: {row[i]};" for row in _DARK.values()) for i in (1, 2))
    style = f"svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }} text {{ fill: var(--ink); }}"
    return text.replace("<defs>", f"<style>{style}</style>\n <defs>", 1).encode("utf-8")


def curves(series: Mapping[str, tuple[Numbers, Numbers]], title: str = "") -> bytes:
    """One small plot per series {name: (steps, values)}, as SVG: the values faint, their running mean strong, its last value named.

    Values that are not finite are left out. Raises ValueError without a series.
    """
    from matplotlib.figure import Figure

    if not series:
        raise ValueError("curves of nothing: no series given")
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(3.9 * columns, 2.6 * rows + (0.4 if title else 0)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13) if title else None
    for index, (name, (steps, values)) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        window = max(1, len(values) // 20)
        sums = np.cumsum(np.pad(values, (1, 0)))
        ends = np.arange(1, len(values) + 1)
        starts = np.maximum(ends - window, 0)
        smooth = (sums[ends] - sums[starts]) / (ends - starts)
        if window > 1:
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, marker="o" if len(values) <= 12 else None, markersize=4)
        last = f"   {smooth[-1]:.4g}" if len(values) else "   no finite value"
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_title(last, loc="right", fontsize=11, color=BLUE)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        if index >= len(series) - columns:
            axes.set_xlabel("step", fontsize=9)
    return svg(figure)


# Colors that people with any color vision tell apart (Okabe and Ito, 2008), then the same dashed and dotted.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", FAINT)


_STYLES = ("-", "--", ":", "-.")


def line_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Numbers, Numbers]]]], x: str | Mapping[str, str] = "epoch", columns: int = 3,
    logarithmic: Sequence[str] = (), from_zero: bool = False,
) -> bytes:  # fmt: skip
    """One plot per panel {name: {label: [(x, y) per run]}}, as SVG: the runs faint, their mean strong; a label has one color throughout.

    The mean is over the runs that have a finite value at an x; runs are logged at the same steps. `x`: what the horizontal axes show, by
    panel where they differ; those among `logarithmic` have a scale of powers of ten. `from_zero`: vertical axes begin there. The
    label "" stands in no legend. Raises ValueError without a panel.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("plots of nothing: no panel given")
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = 0.24 * math.ceil(len(labels) / 4) + 0.2
    figure = Figure(figsize=(max(4.2 * columns, 8.4), 2.9 * rows + legend), layout="constrained")  # room for four names
    drawn = {}
    for index, (name, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, runs in series.items():
            number = labels.index(label)
            style: dict[str, Any] = dict(color=LINES[number % len(LINES)], linestyle=_STYLES[number // len(LINES) % len(_STYLES)])
            merged: dict[float, list[float]] = {}
            for steps, values in runs:
                if len(runs) > 1:
                    axes.plot(steps, values, alpha=0.22, linewidth=0.8, **style)
                for step, value in zip(steps, values, strict=True):
                    if math.isfinite(value):
                        merged.setdefault(float(step), []).append(float(value))
            places = sorted(merged)
            means = [sum(merged[place]) / len(merged[place]) for place in places]
            marker = "o" if len(places) <= 12 else None
            drawn[label] = axes.plot(places, means, linewidth=1.7, marker=marker, markersize=3.5, **style)[0]
        axes.set_title(name, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        shown = x if isinstance(x, str) else x[name]
        axes.set_xlabel(shown, fontsize=9)
        if shown in logarithmic:
            axes.set_xscale("log")
        if from_zero:
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    drawn.pop("", None)
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside upper left", ncols=min(4, len(labels)), fontsize=9, frameon=False, handlelength=3
    )
    return svg(figure)


def points(panels: Mapping[str, Mapping[str, Numbers]], baseline: str) -> bytes:
    """One plot per panel {name: {label: values}}, as SVG: every value a point, a bar at their mean, the mean of `baseline` dashed."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.4 + 3.6 * columns, rows * (0.9 + 0.27 * len(labels))), layout="constrained")
    first = None
    for index, (name, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        first = first or axes
        for label, values in series.items():
            finite = [float(value) for value in values if math.isfinite(value)]
            if not finite:
                continue
            height, mean = labels.index(label), sum(finite) / len(finite)
            color = ORANGE if label == baseline else BLUE
            axes.plot(finite, [height] * len(finite), "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
            axes.plot([mean, mean], [height - 0.32, height + 0.32], color=color, linewidth=2.2)
            if label == baseline:
                axes.axvline(mean, color=ORANGE, linestyle="--", linewidth=1, zorder=0)
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelleft=index % columns == 0)
        axes.locator_params(axis="x", nbins=5)
    return svg(figure)


def bars(
    groups: Mapping[str, Mapping[str, float]], title: str = "", unit: str = "%", references: Mapping[str, float] | None = None
) -> bytes:
    """Bars by {group: {series: value}} (k-NN per feature, before and after), as SVG; `references` are dashed lines by name (chance)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colors = ["#9fb6d0", BLUE, ORANGE, "#5a9a6b", "#8a63a8"]
    references = references or {}
    figure = Figure(figsize=(max(4.8, 1.6 + 0.75 * len(names) * len(groups)) + (1.6 if references else 0), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        drawn = axes.bar(places, heights, width=0.74 / len(names), color=colors[index % len(colors)], label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=9)
    for index, (name, value) in enumerate(references.items()):
        axes.axhline(value, color=FAINT, linestyle=("--", ":", "-.")[index % 3], linewidth=1.2, label=f"{name} {value:.3g}")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=13)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return svg(figure)


def matrix(values: Float[np.ndarray, "r c"], rows: str, columns: str, title: str = "") -> bytes:
    """A matrix as a heat map around zero (blue below, red above), as SVG; `rows`, `columns`: what their numbers count."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 0.32 * values.shape[1], 1.4 + 0.28 * values.shape[0]), layout="constrained")
    axes = figure.add_subplot()
    limit = max(float(np.abs(values).max()), 1e-12)
    drawn = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 16)))
    axes.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 16)))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.set_title(title, loc="left", fontsize=13)
    figure.colorbar(drawn)
    return svg(figure)
