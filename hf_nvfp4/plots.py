"""Figures: loss curves, gaps to BF16 over training and at its end; errors of casts, gradients of layers. No torch."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from hf_nvfp4.gaps import Comparison, Gap, gap_text
from hf_nvfp4.report import NOISE_THRESHOLD, Variant, base_of, gaps, incomparable, spread, title

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers tell the curves apart in print.
_KNOWN = {"bf16": "#000000", "fp8": "#0072B2", "nvfp4": "#D55E00"}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MORE = ("#882255", "#999933", "#332288", "#777777")  # Tol's
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":")
_ENOUGH_VALIDATIONS = 5
_SMOOTHED_SHARE = 0.05  # of all logged losses are averaged into one point


def figure_png(variants: list[Variant], inches: tuple[float, float] = (11, 4.8), dpi: int = 150) -> bytes:
    """Loss curves at the left, relative gap to the BF16 run at the right; inches × dpi pixels."""
    compared = [v for v in variants if v.label not in incomparable(variants)]
    base = base_of(compared, "bf16")
    texts = {variant.label: _gap_note(variant, compared, base) for variant in variants}
    return _curves_png(variants, compared, base, texts, (inches, dpi))


def comparison_png(comparison: Comparison, inches: tuple[float, float] = (11, 5.2), dpi: int = 150) -> bytes:
    """The same of a Comparison, to its base; lines are means over seeds, bands their range, ± standard errors."""
    compared = [row.variant for row in comparison.rows if not row.obstacle]
    texts = {row.label: f" ({gap_text(row.gap)})" if row.gap else "" for row in comparison.rows}
    texts |= {row.label: " (not comparable)" for row in comparison.rows if row.obstacle}
    return _curves_png(comparison.variants, compared, comparison.base, texts, (inches, dpi))


def gaps_png(comparison: Comparison, inches_wide: float = 8, dpi: int = 150) -> bytes:
    """Mean gap of each recipe to the base with its standard error, a dot a seed; the base's own spread in grey.

    The smallest gap on top.
    """
    rows = sorted((row for row in comparison.rows if row.gap), key=lambda row: row.gap.mean)
    figure = Figure(figsize=(inches_wide, 1.8 + 0.45 * max(len(rows), 1)), dpi=dpi, layout="constrained")
    axes = figure.subplots()
    if not rows:
        _say_instead(axes, f"nothing to compare with {comparison.base_name}")
        return _png(figure)
    if spread_percent := comparison.base_spread():
        words = f"±1 standard deviation of {comparison.base_name} over seeds"
        axes.axvspan(-spread_percent, spread_percent, color="0.92", label=words)
    axes.axvline(0, color="black", linewidth=1.2)
    _draw_points(axes, [row.gap for row in rows], -0.13, "#D55E00", "as trained")
    _draw_points(axes, [row.gap_bf16 for row in rows], 0.13, "#0072B2", "the same weights in BF16")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g} %" if x else "0 %"))
    heading = f"Gap in validation loss to {comparison.base_name}: mean ± standard error, a dot a seed"
    figure.suptitle(heading, fontsize=10)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def _draw_points(axes, found: list[Gap], offset: float, colour: str, label: str) -> None:
    """One gap a line, `offset` below its middle."""
    for line, gap in enumerate(found):
        values = list(gap.by_seed.values())
        axes.plot(values, [line + offset] * len(values), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        bar = None if gap.standard_error is None else [gap.standard_error]
        axes.errorbar(
            [gap.mean], [line + offset], xerr=bar, fmt="D", color=colour, markersize=6, capsize=3,
            label=None if line else label,
        )  # fmt: skip


def _curves_png(variants: list[Variant], compared: list[Variant], base, texts: dict[str, str], size: tuple) -> bytes:
    """texts: what stands behind each label in the legend; size: (inches, dpi)."""
    inches, dpi = size
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = _styles(variants)
    _draw_losses(left, variants, styles)
    _draw_gaps(right, compared, base, styles)
    figure.suptitle(title(variants), fontsize=11)
    handles = [_legend_entry(variant.label + texts[variant.label], *styles[variant.label]) for variant in variants]
    handles.append(Line2D([], [], color="0.4", label="training, smoothed"))
    handles.append(Line2D([], [], color="0.4", marker="o", linestyle="", label="validation"))
    if any(variant.first.record["precision_schedule"] for variant in variants):
        handles.append(Line2D([], [], color="0.4", linestyle=":", label="switch to BF16"))
    longest = max(len(handle.get_label()) for handle in handles)
    lines = -(-len(handles) // max(1, int(13 * inches[0] / (longest + 8))))
    figure.set_size_inches(inches[0], inches[1] + 0.2 * max(0, lines - 2))
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // lines), frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _styles(variants: list[Variant]) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker)."""
    taken = [v.label for v in variants if v.label in _KNOWN]
    others = [v.label for v in variants if v.label not in _KNOWN]
    colours = {label: _KNOWN[label] for label in taken}
    palette = (*_OTHERS, *_MORE)
    colours |= {label: palette[i % len(palette)] for i, label in enumerate(others)}
    return {v.label: (colours[v.label], _MARKERS[i % len(_MARKERS)]) for i, v in enumerate(variants)}


def _gap_note(variant: Variant, compared: list[Variant], base: Variant | None) -> str:
    found = None if variant is base else gaps(variant, base)
    if variant not in compared:
        return " (not comparable)"
    return f" ({spread(found, 2, '+')} % in validation)" if found else ""


def _legend_entry(text: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=5, label=text)


def _curve(variant: Variant, kind: str, smoothed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n], losses [seeds, n]) at the steps that all seeds have."""
    tables = [dict(map(tuple, run.get(f"losses.{kind}"))) for run in variant.runs]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    losses = np.array([[table[step] for step in steps] for table in tables], dtype=float).reshape(len(tables), -1)
    tokens = np.array(steps) * variant.first.get("training.tokens") / variant.first.get("training.steps")
    width = max(1, round(_SMOOTHED_SHARE * len(steps))) if smoothed else 1
    if width > 1:
        inside = np.convolve(np.ones(len(steps)), np.ones(width), "same")  # fewer at either end
        losses = np.array([np.convolve(row, np.ones(width), "same") / inside for row in losses])
    return tokens, losses


def _draw_band(axes, tokens: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Mean over seeds as a line, their range as a band."""
    axes.plot(tokens, values.mean(0), color=colour, linewidth=1.6)
    if len(values) > 1:
        axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _draw_losses(axes, variants: list[Variant], styles: dict) -> None:
    shown = []  # (from where on, lowest): the first tenth of training would flatten the rest
    for place, variant in enumerate(variants):
        colour, marker = styles[variant.label]
        tokens, losses = _curve(variant, "train", smoothed=True)
        if losses.size:
            _draw_band(axes, tokens, losses, colour)
            shown.append((np.interp(tokens[-1] / 10, tokens, losses.max(0)), losses.min()))
        tokens, losses = _curve(variant, "validation", smoothed=False)
        if losses.size:
            size = max(9 - 2 * place, 3)  # smaller ones on top, so that coinciding ones all show
            axes.plot(tokens, losses.mean(0), marker, color=colour, markersize=size, markeredgecolor="white")
            shown.append((losses.min(), losses.min()))
        _mark_switch(axes, variant, colour)
    high, low = max((high for high, _ in shown), default=0), min((low for _, low in shown), default=0)
    if np.isfinite(high - low) and high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_ylabel("loss, nats a token")
    _finish(axes, "Loss")


def _say_instead(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.4")
    axes.set_axis_off()


def _draw_gaps(axes, variants: list[Variant], base: Variant | None, styles: dict) -> None:
    others = [variant for variant in variants if variant is not base]
    if base is None or not others:
        _say_instead(axes, "nothing to compare with")
        return
    enough = all(_curve(v, "validation", False)[0].size >= _ENOUGH_VALIDATIONS for v in variants)
    kind = "validation" if enough else "train"
    axes.axhline(0, color=styles[base.label][0], linewidth=1.2)
    late = []
    for variant in others:
        colour, marker = styles[variant.label]
        tokens, gap = _gap_curve(variant, base, kind)
        _draw_band(axes, tokens, gap, colour)
        if enough:
            axes.plot(tokens, gap.mean(0), marker, color=colour, markersize=5, markeredgecolor="white")
        _mark_switch(axes, variant, colour)
        late.append(gap[:, tokens >= tokens[-1] / 10] if tokens.size else gap)
    values = np.concatenate([gap.ravel() for gap in late] + [np.zeros(1)])
    margin = 0.08 * (values.max() - values.min()) or 1.0
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g} %" if y else "0 %"))
    _finish(axes, f"Gap to {_name(base)}, {'validation loss' if enough else 'smoothed training loss'}")


def _name(base: Variant) -> str:
    return "BF16" if base.label == "bf16" else base.label


def _gap_curve(variant: Variant, base: Variant, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n], % [seeds, n]) for the seeds that both have; without any, of the means."""
    ours, theirs = ({run.get("training.seed"): run for run in v.runs} for v in (variant, base))
    seeds = [seed for seed in ours if seed in theirs]
    if seeds:
        variant, base = (Variant(variant.label, [runs[seed] for seed in seeds]) for runs in (ours, theirs))
    tokens, losses = _curve(variant, kind, smoothed=kind == "train")
    base_tokens, base_losses = _curve(base, kind, smoothed=kind == "train")
    if not seeds:
        losses, base_losses = losses.mean(0, keepdims=True), base_losses.mean(0, keepdims=True)
    _, mine, its = np.intersect1d(tokens, base_tokens, return_indices=True)
    return tokens[mine], 100 * (losses[:, mine] / base_losses[:, its] - 1)


def _mark_switch(axes, variant: Variant, colour: str) -> None:
    """A dotted line where a precision schedule left the recipe."""
    if schedule := variant.first.record["precision_schedule"]:
        tokens = variant.first.get("training.tokens") / variant.first.get("training.steps")
        axes.axvline(schedule["switch_step"] * tokens, color=colour, linestyle=":", linewidth=1.2)


def _finish(axes, heading: str) -> None:
    axes.set_title(heading, fontsize=10, loc="left")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- Quantization in training ----------------------------------------------------------------------------


def quantization_stats_png(rows: list[dict], heading: str, inches=(13, 4.4), dpi: int = 150) -> bytes:
    """SNR and underflow of each operand, and noise ratios, over steps: medians over layers, 10% to 90% as a band.

    rows: as `report.read_stats` returns them.
    """
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    snr, ratio, underflow = figure.subplots(1, 3)
    names = list(dict.fromkeys(name for row in rows for name in row["operands"]))
    for place, name in enumerate(names):
        style = _style_of(place + 1) | {"markersize": 3, "linewidth": 1.2}
        for axes, kind in ((snr, "snr_db"), (underflow, "underflow")):
            found = [(row["step"], row["operands"][name][kind]) for row in rows if name in row["operands"]]
            _draw_layers(axes, found, style | ({"label": name} if axes is snr else {}))
    _draw_layers(ratio, [(row["step"], row["noise_ratio"]) for row in rows], {"color": "black", "linewidth": 1.4})
    ratio.axhline(NOISE_THRESHOLD, color=_KNOWN["nvfp4"], linestyle="--", linewidth=1.2)
    ratio.annotate("√3", (0, NOISE_THRESHOLD), (4, 3), ("axes fraction", "data"), "offset points", fontsize=9)
    ratio.set_yscale("log")
    ratio.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ratio.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    underflow.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    titles = ("SNR, dB", "Weight gradient over its quantization noise", "Underflow: share that becomes zero")
    for axes, text in zip((snr, ratio, underflow), titles, strict=True):
        _finish(axes, text)
        axes.set_xlabel("step")
    figure.suptitle(f"{heading}: medians over layers, 10% to 90% of them as a band", fontsize=11)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return _png(figure)


def _draw_layers(axes, found: list[tuple[int, float | None]], style: dict) -> None:
    """Median and band of (step, value of a layer)."""
    by_step: dict[int, list[float]] = {}
    for step, value in found:
        if value is not None:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    low, middle, high = np.array([np.percentile(by_step[step], (10, 50, 90)) for step in steps]).reshape(-1, 3).T
    axes.plot(steps, middle, **({"marker": "o", "markersize": 3} | style))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


# ---- Quantizers ------------------------------------------------------------------------------------------


def _style_of(place: int) -> dict:
    """A colour, marker and dash of its own for each of 84 curves."""
    colours = (*_KNOWN.values(), *_OTHERS)
    dash = _DASHES[place // len(colours) % len(_DASHES)]
    return {"color": colours[place % len(colours)], "marker": _MARKERS[place % len(_MARKERS)], "linestyle": dash}


def unbiasedness_png(casts: dict[str, dict], inches: tuple[float, float] = (10, 6), dpi: int = 150) -> bytes:
    """Error of the mean of B draws over B, both logarithmic: what draws coloured, what doesn't in grey.

    casts: as in quantizers.json.
    """
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    axes, drawn = figure.subplots(), 0
    for name, entry in casts.items():
        curve = entry["unbiasedness"]
        if not entry["draws"]:
            axes.loglog(curve["counts"], curve["errors"], color="0.75", linewidth=0.8)
            continue
        label = name if curve["verdict"] == "unbiased" else f"{name} (biased, {curve['floor']:.1e})"
        axes.loglog(curve["counts"], curve["errors"], label=label, markersize=4, linewidth=1.2, **_style_of(drawn))
        drawn += 1
    axes.plot([], [], color="0.75", linewidth=0.8, label="always the same: biased")
    axes.set_title("Relative squared error of the mean of B draws; unbiased: ∝ 1/B", fontsize=10, loc="left")
    axes.set_xticks(next(iter(casts.values()))["unbiasedness"]["counts"], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()
    axes.set_xlabel("B")
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)


def gradients_png(gradients: dict[str, dict], inches: tuple[float, float] = (11, 5.5), dpi: int = 150) -> bytes:
    """1 - cosine of each layer's weight gradient to BF16's, a curve a recipe over the layers in the model's order.

    gradients: as in quantizers.json.
    """
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    axes, names = figure.subplots(), []
    for place, (recipe, entry) in enumerate((r, e) for r, e in gradients.items() if r != "bf16" and "layers" in e):
        names = list(entry["layers"])
        values = [np.nan if cosine is None else 1 - cosine for cosine in entry["layers"].values()]
        axes.semilogy(values, label=recipe, markersize=4, linewidth=1.2, **_style_of(place))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=max(3, min(7, 300 // max(len(names), 1))))
    axes.set_title("1 − cosine of each weight's gradient to that of recipe bf16", fontsize=10, loc="left")
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)
