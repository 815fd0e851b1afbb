"""Figures: kept as plain data with the evidence, drawn as SVG that follows the page's light or dark theme."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from papertrial.lab.claim import Claim
from papertrial.lab.evidence import Evidence
from papertrial.lab.statistics import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST = 4000
WIDE, NARROW = 6.4, 4.2  # inches: beside text, and on a phone
# Okabe and Ito's palette: told apart with every common colour blindness, visible on white and on near-black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#999933", "#7F7F7F")
INK = "#6b7280"  # replaced by the page's own text colour
KINDS = ("line", "scatter", "bar", "heatmap", "histogram")


def figure_data(
    name: str,
    *,
    caption: str,
    kind: str,
    series: Mapping[str, Any],
    x: Any = None,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> dict[str, Any]:
    """Check a figure and bring it into plain JSON data; see ``Trial.figure``.

    Raises
    ------
    ValueError
        On an unknown kind, an empty series, lengths that do not match, or more than 4,000 numbers.
    """
    if kind not in KINDS:
        raise ValueError(f"figure {name!r}: kind is {kind!r}; known: {', '.join(KINDS)}")
    if not series:
        raise ValueError(f"figure {name!r} has no series")
    if kind == "heatmap" and len(series) != 1:
        raise ValueError(f"figure {name!r}: a heatmap has exactly one series, got {len(series)}")
    plain = {str(label): _plain(values) for label, values in series.items()}
    x_plain = None if x is None else _plain(x)
    for label, values in plain.items():
        if x_plain is not None and kind in ("line", "scatter", "bar") and len(values) != len(x_plain):
            raise ValueError(f"figure {name!r}: series {label!r} has {len(values)} values along {len(x_plain)} of x")
    size = sum(_count(values) for values in plain.values())
    if size > LARGEST:
        raise ValueError(f"figure {name!r} holds {size} numbers; at most {LARGEST}, thin it first")
    return {
        "name": name,
        "caption": caption,
        "kind": kind,
        "x_label": x_label,
        "y_label": y_label,
        "log_x": log_x,
        "log_y": log_y,
        "x": x_plain,
        "series": plain,
    }


def _plain(values: Any) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    return [_plain(v) if isinstance(v, list | tuple) or hasattr(v, "tolist") else _round(v) for v in values]


def _round(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, int) else float(f"{value:.5g}") if math.isfinite(value) else None


def _count(values: Sequence[Any]) -> int:
    return sum(_count(v) if isinstance(v, list | tuple) else 1 for v in values)


def colours(arms: Sequence[str]) -> dict[str, str]:
    """One colour per arm, the same in every figure of a page."""
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}


def draw_arms(evidence: Evidence, claim: Claim, width: float = WIDE) -> str:
    """Every arm's metric: a point per seed, the mean and its 95 % interval. The claimed pair is drawn bold."""
    arms = [arm for arm in evidence.arms if evidence.values(arm, claim.metric)]
    figure, axes = _canvas(width, 0.9 + 0.42 * len(arms))
    palette = colours(evidence.arms)
    for row, arm in enumerate(arms):
        values = evidence.values(arm, claim.metric)
        interval = t_interval(values)
        bold = arm in (claim.baseline, claim.method)
        if math.isfinite(interval.low):
            axes.plot(
                [interval.low, interval.high], [row, row], color=palette[arm], lw=6, alpha=0.25, solid_capstyle="round"
            )
        axes.scatter(values, [row] * len(values), s=26, color=palette[arm], alpha=0.85, zorder=3, linewidths=0)
        axes.scatter([interval.mean], [row], s=130, marker="|", color=INK, zorder=4, linewidths=2 if bold else 1)
    axes.set_yticks(range(len(arms)), arms)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in (claim.baseline, claim.method) else "normal")
    axes.invert_yaxis()
    axes.margins(y=0.5 / max(len(arms), 1))
    arrow = "higher is what the paper claims" if claim.better == "higher" else "lower is what the paper claims"
    _label_x(axes, f"{claim.metric}{f' ({claim.unit})' if claim.unit else ''} - {arrow}", width)
    axes.grid(axis="x", color=INK, alpha=0.2, lw=0.6)
    return _svg(figure, f"{claim.metric} of every arm: a point per seed, the mean and its 95 % interval")


def draw_curves(evidence: Evidence, curve: str, width: float = WIDE) -> str:
    """A logged curve: each arm's mean over seeds, with every seed as a thin line."""
    figure, axes = _canvas(width, 3.2)
    palette = colours(evidence.arms)
    spare = iter(PALETTE[::-1])
    arms: dict[str, None] = {}
    for trial in evidence.trials:
        arms.update(dict.fromkeys(trial.curves.get(curve, {})))
    for arm in arms:
        colour = palette.get(arm) or next(spare, INK)
        by_x: dict[float, list[float]] = {}
        lines = [trial.curves[curve][arm] for trial in evidence.trials if arm in trial.curves.get(curve, {})]
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=colour, lw=0.6, alpha=0.35)
            for x, y in line:
                by_x.setdefault(x, []).append(y)
        shared = sorted(x for x, ys in by_x.items() if len(ys) == len(lines))
        axes.plot(shared, [math.fsum(by_x[x]) / len(by_x[x]) for x in shared], color=colour, lw=1.8, label=arm)
    _label_y(axes, curve)
    _legend(figure, list(arms), width)
    axes.grid(color=INK, alpha=0.18, lw=0.6)
    return _svg(figure, f"{curve} of every arm; thin lines are seeds, thick ones their mean")


def draw(data: Mapping[str, Any], palette: Mapping[str, str] | None = None, width: float = WIDE) -> str:
    """Draw a figure that a trial kept (see ``figure_data``) as an SVG document fragment."""
    figure, axes = _canvas(width, 3.2)
    series: dict[str, list[Any]] = data["series"]
    fixed = palette or {}
    spare = [colour for colour in PALETTE if colour not in fixed.values()] or list(PALETTE)
    chosen = {label: fixed.get(label, spare[i % len(spare)]) for i, label in enumerate(series)}
    if data["kind"] == "heatmap":
        _heatmap(figure, axes, next(iter(series.values())))
    elif data["kind"] == "histogram":
        for label, values in series.items():
            axes.hist(values, bins=40, histtype="stepfilled", alpha=0.45, color=chosen[label], label=label)
    elif data["kind"] == "bar":
        _bars(axes, series, data["x"], chosen)
    else:
        for label, values in series.items():
            xs, ys = _points(values, data["x"])
            style = {"marker": "o", "ms": 2.5} if data["kind"] == "line" and len(xs) <= 30 else {}
            if data["kind"] == "scatter":
                style = {"marker": "o", "ms": 3, "ls": "", "alpha": 0.7}
            axes.plot(xs, ys, color=chosen[label], lw=1.5, label=label, **style)  # type: ignore[arg-type]
    if data["log_x"]:
        axes.set_xscale("log")
    if data["log_y"]:
        axes.set_yscale("log")
    _label_x(axes, data["x_label"], width)
    _label_y(axes, data["y_label"])
    if data["kind"] != "heatmap":
        _legend(figure, list(series), width)
        axes.grid(color=INK, alpha=0.18, lw=0.6)
    return _svg(figure, data["caption"])


def _points(values: list[Any], x: list[Any] | None) -> tuple[list[Any], list[Any]]:
    if values and isinstance(values[0], list):
        return [v[0] for v in values], [math.nan if v[1] is None else v[1] for v in values]
    return (x if x is not None else list(range(len(values)))), [math.nan if v is None else v for v in values]


def _bars(axes: "Axes", series: dict[str, list[Any]], x: list[Any] | None, chosen: Mapping[str, str]) -> None:
    width = 0.8 / len(series)
    longest = max(len(values) for values in series.values())
    for i, (label, values) in enumerate(series.items()):
        axes.bar(
            [j + (i + 0.5) * width - 0.4 for j in range(len(values))], values, width, color=chosen[label], label=label
        )
    axes.set_xticks(range(longest), [str(v) for v in x] if x is not None else [str(j) for j in range(longest)])
    if longest > 6:
        axes.tick_params(axis="x", rotation=35)


def _heatmap(figure: "Figure", axes: "Axes", rows: list[Any]) -> None:
    image = axes.pcolormesh(rows, cmap="cividis")
    axes.invert_yaxis()
    bar = figure.colorbar(image, ax=axes)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=INK, labelsize=8)


def _label_x(axes: "Axes", label: str, width: float) -> None:
    axes.set_xlabel(textwrap.fill(label, round(14 * width) - 20))


def _label_y(axes: "Axes", label: str) -> None:
    axes.set_ylabel(textwrap.fill(label, 28))


def _legend(figure: "Figure", labels: Sequence[str], width: float) -> None:
    """Above the axes, where it hides no line, in as many columns as the longest label lets."""
    if labels:
        columns = max(1, round(width / (0.6 + 0.075 * max(map(len, labels)))))
        figure.legend(loc="outside upper left", frameon=False, fontsize=8, labelcolor=INK, ncols=columns)


def _canvas(width: float, height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: "Figure", description: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "papertrial"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    start = text.index(">") + 1
    opening = text[:start].replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}"', 1)
    return opening + text[start:]


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
