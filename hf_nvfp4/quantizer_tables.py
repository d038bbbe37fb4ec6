"""The tables of scripts/quantizers.py, from what stands in quantizers.json. No torch."""

from statistics import median

from hf_nvfp4.scores import markdown_table

NORMAL = "N(0, 1)"
_QUANTITIES = {
    "Squared error, relative to the signal, ×1e-3": lambda found: _number(found["error"], 1e-3),
    "1 − cosine, ×1e-3": lambda found: _number(1 - found["cosine"], 1e-3),
    "Projection bias <x, Q(x)> / <x, x> − 1, %": lambda found: f"{100 * found['bias']:+.3f}",
}


def _number(value: float | None, unit: float = 1) -> str:
    """value / unit to four digits, or a dash."""
    return "—" if value is None else f"{value / unit:#.4g}".rstrip(".")


def deviation(entry: dict) -> float | None:
    """Our squared error on N(0, 1) over the published one (or, without one, the recomputed), less 1."""
    yardstick = entry["yardstick"]
    if yardstick is None:
        return None
    value = yardstick["recomputed"] if yardstick["published"] is None else yardstick["published"]
    return entry["sources"][NORMAL]["error"] / value - 1


def yardstick_table(casts: dict[str, dict]) -> str:
    """One line a cast: N(0, 1) beside what is published, and the verdict on its mean."""
    header = ["cast", "ours", "published", "recomputed", "deviation %", "bias %", "mean of draws"]
    lines = []
    for name, entry in casts.items():
        ours, yardstick, off = entry["sources"][NORMAL], entry["yardstick"] or {}, deviation(entry)
        lines.append(
            [name, _number(ours["error"], 1e-3), _known(yardstick.get("published"), 1),
             _known(yardstick.get("recomputed"), 2), "—" if off is None else f"{100 * off:+.2f}",
             f"{100 * ours['bias']:+.3f}", _verdict(entry["unbiasedness"])]
        )  # fmt: skip
    notes = """
Squared errors on N(0, 1), relative to the signal, ×1e-3. Published: Quartet II, arXiv 2601.22813, table 1, with its
digits; recomputed: independently of this implementation; the deviation is from the published number, or, without one,
from the recomputed. "SR + 4/6" (published: 17.5, biased) is missing: choosing a scale by its errors biases stochastic
rounding, and `Cast` refuses it. A rotated cast is measured in the rotated basis, by the largest transform that divides
the columns."""
    return f"{markdown_table(header, lines)}\n{notes}"


def _known(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value / 1e-3:.{digits}f}"


def _verdict(curve: dict) -> str:
    return curve["verdict"] if curve["verdict"] == "unbiased" else f"biased, {curve['floor']:.2e}"


def unbiasedness_table(casts: dict[str, dict]) -> str:
    """One line a cast that draws random numbers: the error of the mean of B draws."""
    drawn = {name: entry["unbiasedness"] for name, entry in casts.items() if entry["draws"]}
    if not drawn:
        return "None of these casts draws random numbers."
    counts = next(iter(drawn.values()))["counts"]
    lines = [
        [name, *(f"{error:.2e}" for error in curve["errors"]), f"{curve['floor']:+.1e} ± {curve['floor_error']:.1e}",
         curve["verdict"]]
        for name, curve in drawn.items()
    ]  # fmt: skip
    notes = """
Relative squared error of the mean of B independent draws of one tensor from N(0, 1), rotated back where the cast
rotates. Floor: what of the last column is not the spread of the draws, the squared bias, ± its standard error.
Biased: a floor that is by more than 4 standard errors above 3e-6, about what rounding to BF16 costs (a rotation with
fixed signs does). Casts without random numbers are always the same and are left out: their floor is their error."""
    return f"{markdown_table(['cast', *(f'B = {n}' for n in counts), 'floor', 'verdict'], lines)}\n{notes}"


def source_tables(casts: dict[str, dict]) -> str:
    """For error, cosine and bias a table: one line a cast, one column a source of tensors."""
    sources = list(next(iter(casts.values()))["sources"])
    parts = []
    for title, cell in _QUANTITIES.items():
        lines = [
            [name, *("—" if entry["sources"][s] is None else cell(entry["sources"][s]) for s in sources)]
            for name, entry in casts.items()
        ]
        parts.append(f"### {title}\n\n{markdown_table(['cast', *sources], lines)}")
    return "\n\n".join(parts)


def gradient_table(gradients: dict[str, dict]) -> str:
    """One line a recipe: cosines of its gradients to BF16's."""
    lines, errors = [], []
    for recipe, entry in gradients.items():
        if "error" in entry:
            errors.append(f"\n{recipe}: not measured, {entry['error']}.")
            continue
        known = {name: cosine for name, cosine in entry["layers"].items() if cosine is not None}
        worst = min(known, key=known.get) if known else None
        lines.append(
            [recipe, f"{entry['loss']:.4f}", _cosine(entry["all"]), _cosine(median(known.values()) if known else None),
             _cosine(known.get(worst)), worst or "—"]
        )  # fmt: skip
    notes = """
Cosine of the weights' gradients under a recipe to those under recipe bf16: same weights, same batch, one draw, all else
in FP32. Whole: of all converted weights as one vector."""
    table = markdown_table(["recipe", "loss", "whole", "median layer", "worst layer", "which"], lines)
    return f"{table}\n{notes}{''.join(errors)}"


def _cosine(value: float | None) -> str:
    return "—" if value is None else f"{value:.5f}"


def layer_table(gradients: dict[str, dict]) -> str:
    """One line a layer, one column a recipe: the cosine of its weight's gradient to BF16's."""
    measured = {recipe: entry["layers"] for recipe, entry in gradients.items() if "layers" in entry}
    names = list(next(iter(measured.values()), {}))
    lines = [[name, *(_cosine(layers[name]) for layers in measured.values())] for name in names]
    return markdown_table(["layer", *measured], lines)


def cast_table(casts: dict[str, dict]) -> str:
    """What each name stands for, and which recipes' operands are cast so."""
    lines = [[name, entry["text"], ", ".join(entry["users"]) or "—"] for name, entry in casts.items()]
    return markdown_table(["name", "cast", "used by"], lines)


def full_report(record: dict) -> str:
    """All of quantizers.md below its headline."""
    casts, model = record["casts"], record.get("model")
    parts = [
        f"## Quantizers on N(0, 1)\n\n{yardstick_table(casts)}",
        f"## Unbiasedness\n\n{unbiasedness_table(casts)}\n\n![Unbiasedness](unbiasedness.png)",
        f"## Other tensors\n\n{_about_sources(model)}\n\n{source_tables(casts)}",
    ]
    if model:
        gradients = model["gradients"]
        parts.append(f"## Gradients\n\n{gradient_table(gradients)}\n\n![Gradients](gradients.png)")
        parts.append(f"## Gradients by layer\n\n{layer_table(gradients)}")
    parts.append(f"## Casts\n\n{cast_table(casts)}")
    return "\n\n".join(parts) + "\n"


def _about_sources(model: dict | None) -> str:
    text = "0.1% × 30: N(0, 1) with 0.1% of the elements multiplied by 30."
    if model:
        text += (
            f" Operands of the three GEMMs, blocks along the dimension that each contracts: of {model['name']}, recipe "
            f"bf16, {model['sequences']} × {model['length']} tokens of {model['text']}; means over "
            f"{len(model['captured'])} linears ({', '.join(model['captured'])}), without those that a cast's blocks or "
            "rotation do not fit."
        )
    return text
