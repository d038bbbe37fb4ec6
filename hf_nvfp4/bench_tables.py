"""The tables of scripts/bench.py, from rows of plain data. No torch."""

import math

from hf_nvfp4.scores import markdown_table

BASE = "nn.Linear"  # in BF16; what speeds are compared with
EXPERTS = "grouped_mm"  # Transformers' experts in BF16
COPY = "copy"
FP8_PRODUCTS = "FP8 products"
COMPILED = {"regional": "each decoder block compiled by itself", "whole": "compiled as one", "none": "not compiled"}


# ---- Cells ---------------------------------------------------------------------------------------------


def number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    """value / unit, or a dash."""
    return "—" if value is None else f"{value / unit:,.{digits}f}"


def times(row: dict) -> list[str]:
    """Cells: median and launch time in ms."""
    found = row.get("time", {})
    return [number(found.get(key), 1e-3, 3) for key in ("median_seconds", "launch_seconds")]


def memory(row: dict, base: dict, key: str) -> list[str]:
    """Cells: MiB and the ratio to the base's."""
    both = row.get(key) is not None and base.get(key)
    return [number(row.get(key), 2**20, 1), number(row[key] / base[key], 1, 3) if both else "—"]


def converted(decisions: list[dict]) -> str:
    """A cell: how many of the linears."""
    return f"{sum(d['converted'] for d in decisions)} of {len(decisions)}" if decisions else "—"


def outcome(row: dict) -> str:
    """The error, or how the check came out."""
    return f"ERROR {row['error']}"[:160].replace("|", "/") if "error" in row else row.get("check", "the base")


# ---- Tables --------------------------------------------------------------------------------------------


def casts_table(rows: dict[str, dict]) -> str:
    """One line a cast."""
    header = ["cast", "what", "ms", "launch ms", "MB read", "MB written", "GB/s", "of copy", "check"]
    lines = [
        [name, row["what"], *times(row), number(row.get("bytes_read"), 1e6), number(row.get("bytes_written"), 1e6),
         number(row.get("bytes_per_second"), 1e9), number(row.get("share_of_copy"), 1, 2), outcome(row)]
        for name, row in rows.items()
    ]  # fmt: skip
    note = "MB read: x for the amax, if there is a tensor scale, and x again. Of copy: of the copy's GB/s."
    return f"{markdown_table(header, lines)}\n\n{note}"


def set_ceilings(rows: dict[str, dict]) -> None:
    """Enter the speed that a row would have, were its casts a copy's bytes and its products bare."""
    medians = {name: row["time"]["median_seconds"] for name, row in rows.items() if "time" in row}
    for row in rows.values():
        products = medians.get(row.get("products"))
        if row.get("cast_bytes") is not None and products and COPY in medians and BASE in medians:
            casts = row["cast_bytes"] / rows[COPY]["bytes"] * medians[COPY]
            row["ceiling"] = medians[BASE] / (products + casts)


def linear_table(shape: tuple[int, int, int], rows: dict[str, dict], clocked: str) -> str:
    """One line a variant, and what the columns mean. clocked: how they were timed."""
    set_ceilings(rows)
    copy, base, lines = rows[COPY], rows[BASE], []
    for name, row in rows.items():
        if "time" in row:
            row["flops_per_second"] = 6 * math.prod(shape) / row["time"]["median_seconds"]
        if name == COPY:
            continue
        lines.append(
            [name, *times(row), number(row.get("speed"), 1, 3), number(row.get("ceiling"), 1, 3),
             number(row.get("flops_per_second"), 1e12, 1), *memory(row, base, "saved_bytes"),
             *memory(row, base, "peak_bytes"), outcome(row)]
        )  # fmt: skip
    header = ["linear", "ms", "launch ms", "speed", "ceiling", "TFLOP/s", "saved MiB", "× BF16", "peak MiB", "× BF16"]
    gigabytes = number(copy["bytes"] / copy["time"]["median_seconds"], 1e9) if "time" in copy else "—"
    notes = f"""
ms: forward and backward, {clocked}. Launch ms: the host's, of a call that launches every kernel.
Speed: BF16's time / its own. Ceiling: the same, if its products took what they take alone (BF16's: {BASE}, FP8's: as
measured) and its casts' bytes moved as in a copy of x, {gigabytes} GB/s in this run.
Saved: from forward to backward, the parameters left out. Peak: what a step allocates at most."""
    if any("amax given" in name for name in rows):
        notes += """
Amax given: every tensor's amax known beforehand, which no recipe does; what a delayed one could reach at most.
Its launch ms is mostly the benchmark's own."""
    return f"{markdown_table([*header, 'check'], lines)}\n{notes}"


def experts_table(shape: tuple[int, ...], rows: dict[str, dict], clocked: str) -> str:
    """One line a variant. shape: tokens, hidden, intermediate, experts, experts a token."""
    tokens, hidden, intermediate, _, chosen = shape
    base, lines = rows[EXPERTS], []
    for name, row in rows.items():
        if "time" in row:
            products = 6 * 3 * tokens * chosen * hidden * intermediate
            row["flops_per_second"] = products / row["time"]["median_seconds"]
        lines.append(
            [name, *times(row), number(row.get("speed"), 1, 3), number(row.get("flops_per_second"), 1e12, 1),
             *memory(row, base, "saved_bytes"), *memory(row, base, "peak_bytes"), outcome(row)]
        )  # fmt: skip
    header = ["experts", "ms", "launch ms", "speed", "TFLOP/s", "saved MiB", "× BF16", "peak MiB", "× BF16", "check"]
    notes = f"""
{EXPERTS}: Transformers' own, BF16. ms: forward and backward, {clocked}; one by one: as launched
by the host, which waits for the GPU in between. Speed: {EXPERTS}'s time / its own. Saved: from forward to backward,
the parameters left out. Peak: what a step allocates at most."""
    return f"{markdown_table(header, lines)}\n{notes}"


def inference_table(rows: dict[str, dict], layers: int, eager: bool) -> str:
    """One line a product and batch."""
    header = ["product", "µs a layer", "speed", "GB/s", "of copy", "check"]
    lines = [
        [name, number(row.get("layer_seconds"), 1e-6, 2), number(row.get("speed"), 1, 3),
         number(row.get("bytes_per_second"), 1e9), number(row.get("share_of_copy"), 1, 3), outcome(row)]
        for name, row in rows.items()
    ]  # fmt: skip
    how = "as launched by the host" if eager else "in one CUDA graph"
    note = f"""
{layers} layers one after the other, each with its own weight, {how}. Speed: of BF16's at the same batch. GB/s: of the
weight, x and y. Tiles of {{name}} WxTxOxDxCxS: warps, tiles of 16 rows and of 8 columns, steps read ahead, times 32
columns a thread, columns of a tile for each token."""
    return f"{markdown_table(header, lines)}\n{note.format(name='w4a16')}"


def decode_table(rows: dict[str, dict], compiled: str, length: int, eager: bool) -> str:
    """One line a model and batch."""
    header = ["model", "ms a step", "tokens/s", "speed", "weights MiB", "× BF16", "check"]
    lines = []
    for name, row in rows.items():
        base = rows[f"{BASE}, batch {row['batch']}"] if "batch" in row else row
        speeds = [number(row.get("tokens_per_second"), 1, 1), number(row.get("speed"), 1, 3)]
        lines.append([name, times(row)[0], *speeds, *memory(row, base, "weight_bytes"), outcome(row)])
    how = "as launched by the host" if eager else "a replayed CUDA graph"
    note = f"""
One decode step, greedy, of sequences of about {length:,} tokens in a static cache: {how}, {COMPILED[compiled]}.
Speed: of BF16's at the same batch. Weights: embeddings and head included, which stay in BF16."""
    return f"{markdown_table(header, lines)}\n{note}"


def model_table(rows: dict[str, dict], drift: float | None, compiled: str) -> str:
    """One line a training run, and what a step is."""
    header = ["model", "converted", "ms a step", "tokens/s", "speed", "peak MiB", "× BF16", "loss", "compile s"]
    lines = [
        [name, converted(row.get("decisions", [])), times(row)[0], number(row.get("tokens_per_second")),
         number(row.get("speed"), 1, 3), *memory(row, rows[BASE], "peak_bytes"), number(row.get("loss"), 1, 4),
         number(row.get("compile_seconds"), 1, 1), outcome(row)]
        for name, row in rows.items()
    ]  # fmt: skip
    differ = "" if drift is None else f", which differ by {100 * drift:+.1f}%"
    notes = f"""
A step of Trainer: FP32 weights, BF16 autocast, gradients clipped at 1.0, fused AdamW; {COMPILED[compiled]}. Medians.
Speed: BF16's time, the mean of its first and last run{differ}, / its own. Peak: all that is allocated at once in
training. Compile s: what the warm-up took beyond its steps."""
    return f"{markdown_table([*header, 'check'], lines)}\n{notes}"


def layers_table(shapes: dict[tuple[int, int], list[str]], results: list[dict[str, dict]], tokens: int) -> str:
    """One line a layer shape, with each variant's speed; then which layers are faster in BF16."""
    variants = list(dict.fromkeys(name for rows in results for name in rows if name not in (BASE, COPY, FP8_PRODUCTS)))
    header = ["layer", "in → out", "BF16 ms", *(cell for name in variants for cell in (f"{name} ms", "speed"))]
    lines = []
    for ((k, n), names), rows in zip(shapes.items(), results, strict=True):
        cells = [", ".join(names), f"{k} → {n}", times(rows[BASE])[0]]
        for name in variants:
            row = rows.get(name, {})
            cells += ["ERROR" if "error" in row else times(row)[0], number(row.get("speed"), 1, 3)]
        lines.append(cells)
    said = [f"\nForward and backward of one layer at {tokens:,} tokens, FP32 weights."]
    said += [f"{name}: {advice(name, shapes, results)}" for name in variants if not name.startswith("torchao ")]
    return f"{markdown_table(header, lines)}\n" + "\n".join(said)


def advice(variant: str, shapes: dict[tuple[int, int], list[str]], results: list[dict[str, dict]]) -> str:
    """Which layers are faster in BF16 than in a variant, as a sentence."""
    speeds = [rows.get(variant, {}).get("speed") for rows in results]
    slower = [shape for shape, speed in zip(shapes, speeds, strict=True) if speed is not None and speed < 1]
    unknown = f"; {speeds.count(None)} of {len(speeds)} shapes were not timed" if None in speeds else ""
    if not slower:
        return f"BF16 is faster for no layer of this model that was timed{unknown}."
    skipped = list(dict.fromkeys(name for shape in slower for name in shapes[shape]))
    widths = ", ".join(f"{k} → {n}" for k, n in slower)
    return f"BF16 is faster for {widths}; skip={skipped} keeps these layers in BF16{unknown}."


def kernel_lines(rows: dict[str, dict]) -> str:
    """What --kernels adds: each variant's longest kernels."""
    lines = []
    for name, row in rows.items():
        lines += [f"  {name}"] if row.get("kernels") else []
        for kernel, seconds in list(row.get("kernels", {}).items())[:15]:
            lines.append(f"    {number(seconds, 1e-3, 4):>9} ms  {kernel[:100]}")
    return "\n".join(lines)
