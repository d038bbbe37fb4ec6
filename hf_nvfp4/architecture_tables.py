"""ARCHITECTURES.md: the table of what `architectures` found, and what passing means. Knows words, tries nothing."""

from collections import Counter

from hf_nvfp4.architectures import KINDS, LEAST_COSINE, LOSS_TOLERANCE, NOISE, NOISE_FACTOR, SEED, Row
from hf_nvfp4.experts import OTHER_EXPERTS
from hf_nvfp4.scores import markdown_table
from hf_nvfp4.tiny_configs import WIDTH


def count_line(rows: list[Row]) -> str:
    """Such as "170 of 175 pass (4 with fused experts kept in high precision); 6 can't be built tiny"."""
    status = Counter(row.status for row in rows)
    passed = [row for row in rows if row.status == "pass"]
    notes = {
        "with fused experts kept in high precision": sum(OTHER_EXPERTS in row.kept for row in passed),
        "sensitive to rounding": sum(bool(row.control) for row in passed),
    }
    notes = ", ".join(f"{count} {note}" for note, count in notes.items() if count)
    tried = len(rows) - status["not built"]
    line = f"{len(passed)} of {tried} pass" + (f" ({notes})" if notes else "")
    return f"{line}; {status['not built']} can't be built tiny"


def table(rows: list[Row], types: dict[str, list[str]]) -> str:
    """Markdown: a row a class."""
    lines = []
    for row in rows:
        cells = [f"{row.name} ({', '.join(types[row.name])})", row.status]
        cells += ["/".join(map(str, row.kinds[kind])) if kind in row.kinds else "" for kind in KINDS]
        cells += [_number(row.loss, 4), _number(row.loss_bf16, 4), _number(row.cosine, 3), _words(row)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    head = ["model (types)", "result", *KINDS, "loss", "BF16's", "cosine", "why, what is kept, remarks"]
    return markdown_table(head, lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _words(row: Row) -> str:
    kept = [f"{count} kept: {reason}" for reason, count in row.kept.items() if reason != "output head"]
    control = f"sensitive to rounding: {row.control}" if row.control else ""
    return "; ".join(filter(None, [row.reason, *kept, *row.remarks, control]))


def page(rows: list[Row], types: dict[str, list[str]], command: str, versions: dict) -> str:
    """ARCHITECTURES.md."""
    given = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    kinds = ", ".join(KINDS[:-1])
    return f"""# Architectures

{count_line(rows)}. Every causal LM of {given}; made by `{command}`.

Each is built from a tiny config ({WIDTH} wide, each kind of layer once), with random weights in FP32 (seed {SEED}).
It is trained for one step under BF16 autocast on the CPU: as it is, and with its linear layers in NVFP4, rounded to
nearest. It passes if

- of attention, MLPs, experts and mixers (Mamba, linear attention, convolutions, recurrences), each that the model has
  has converted layers, and every converted layer was called; routers stay in high precision, and so do fused experts
  that don't follow Transformers' experts interface;
- loss and gradients are finite, and every converted weight has a gradient where BF16 has one;
- the loss is within {LOSS_TOLERANCE:.0%} of BF16's, and all gradients together have a cosine of {LEAST_COSINE} or more
  to BF16's; or both are at most {NOISE_FACTOR} times as far off as BF16 is with {NOISE:.0%} noise on the same weights,
  which is then said ("sensitive to rounding"; where that noise has a cosine of {1 - 1 / NOISE_FACTOR} or less, any
  gradient passes);
- saved, it has the keys and shapes of the plain model; loaded by `from_pretrained`, the same layers are converted and
  the loss is the same to the last bit; without its quantization_config it loads in plain Transformers with no missing
  and no unexpected key.

Columns {kinds}: layers converted / layers, a module of fused experts being one;
"other" are projections of embeddings and the like. "Not built" means that the plain model can't be built tiny or
doesn't train by itself; the last column says why.

{table(rows, types)}
"""
