"""Training runs side by side: reads run.json and eval-*.json, decides what may be compared, makes the tables.

Runs that differ in nothing but the seed are one variant; its numbers are mean ± standard deviation over
seeds. The figure is plots.py's, the model card cards.py's. Nothing here needs torch.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from hf_nvfp4.scores import (
    AS_TRAINED,
    ScoreError,
    Scores,
    markdown_table,
    metric_names,
    paired_table,
    plus_minus,
    precision_lines,
    read_scores,
    taken,
)

SCHEMA = 1
STATS_FILE = "quantization_stats.jsonl"
NOISE_THRESHOLD = math.sqrt(3)  # of gradients, see hf_nvfp4.operand_stats
BASES = ("bf16", "fp8")  # recipes that gaps are taken to

# What a run.json must hold, by dotted path.
_NEEDED = """
    name recipe backend status conversion decisions model.type model.parameters data.source data.fingerprint
    data.train_tokens data.validation_tokens data.sequence_length training.seed training.steps training.tokens
    losses.train losses.validation final.validation_loss final.validation_loss_bf16 final.validation_precision
    final.bits_per_byte speed.train_seconds speed.tokens_per_second speed.peak_memory_bytes device.type
    device.name versions command
""".split()

# Losses are comparable only where these agree.
_SAME = """
    model.type model.parameters data.fingerprint data.sequence_length data.validation_tokens training.tokens
""".split()


class ReportError(ValueError):
    """A run is missing or broken; the text says which and what to do."""


# ---- Runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run: its run.json, and its scores in every precision they were taken in."""

    path: Path
    record: dict
    scores: list[Scores]

    def get(self, path: str):
        """The value at a dotted path of run.json."""
        value = self.record
        for key in path.split("."):
            value = value[key]
        return value


@dataclass(frozen=True)
class Variant:
    """Runs that differ only in their seed."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run that speaks for all where they agree."""
        return self.runs[0]

    def values(self, path: str) -> list[float]:
        """One number a run."""
        return [run.get(path) for run in self.runs]


def read_run(folder: Path) -> Run:
    """The run that scripts/train.py left in a folder, and scripts/evaluate.py's scores. Raises ReportError."""
    path = Path(folder) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path}: {error.strerror}. Give folders in which scripts/train.py has finished a run."
        ) from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}). Train again, or leave this run out.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ReportError(f"{path}: schema {found!r}; this version reads {SCHEMA}.")
    run = Run(Path(folder), record, [read_scores(p) for p in sorted(Path(folder).glob("eval-*.json"))])
    for needed in _NEEDED:
        try:
            run.get(needed)
        except (KeyError, TypeError) as error:
            raise ReportError(f"{path} lacks {needed!r}; it was written by another version.") from error
    if not isinstance(loss := run.get("final.validation_loss"), float) or not math.isfinite(loss):
        raise ReportError(f"{path}: the validation loss is {loss}. Did training diverge? Leave this run out.")
    return run


def group(runs: list[Run]) -> list[Variant]:
    """Variants, BF16 first, then FP8, then in the order given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_all_but_seed(run), sort_keys=True), []).append(run)
    recipes = [members[0].record["recipe"] for members in found.values()]
    variants = []
    for members in found.values():
        recipe = members[0].record["recipe"]
        variants.append(Variant(recipe if recipes.count(recipe) == 1 else members[0].record["name"], members))
    order = {recipe: place for place, recipe in enumerate(BASES)}
    return sorted(variants, key=lambda variant: order.get(variant.first.record["recipe"], len(BASES)))


def _all_but_seed(run: Run) -> dict:
    keys = ("recipe", "backend", "precision_schedule", "conversion", "training", "data")
    settings = {key: run.record.get(key) for key in keys}
    settings["training"] = {k: v for k, v in settings["training"].items() if k != "seed"}
    return settings | {
        "parameters": run.get("model.parameters"),
        "checkpoint": run.record["model"].get("from_checkpoint"),
    }


def base_of(variants: list[Variant], recipe: str) -> Variant | None:
    """The variant that gaps to `recipe` are taken to."""
    return next((variant for variant in variants if variant.first.record["recipe"] == recipe), None)


def read_stats(run: Run) -> list[dict]:
    """What train.py --quantization_stats left of a run: rows of a step and a layer; [] if nothing was quantized.

    Raises ReportError for a line that is not one.
    """
    path, rows = run.path / STATS_FILE, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("step", "layer", "operands", "noise_ratio")})
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path}, line {number} is broken ({error!r}). Delete that line, or the file.") from error
    return rows if any(row["operands"] for row in rows) else []


# ---- What may be compared ------------------------------------------------------------------------------


def obstacles(variant: Variant, base: Variant) -> list[str]:
    """Why losses of the two cannot be compared; empty if they can."""
    found = []
    for run in (*variant.runs, *base.runs):
        if run.record["status"] != "complete":
            found.append(f"{run.record['name']} is {run.record['status']}")
    for path in _SAME:
        ours, theirs = variant.first.get(path), base.first.get(path)
        if ours != theirs:
            found.append(f"{path} is {_short(ours)}, that of {base.label} {_short(theirs)}")
    return found


def _short(value) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 16 else text[:12] + "…"


def incomparable(variants: list[Variant]) -> dict[str, str]:
    """Label -> why this variant stands outside the comparison with the first one."""
    found = {variant.label: obstacles(variant, variants[0]) for variant in variants[1:]}
    return {label: "; ".join(reasons) for label, reasons in found.items() if reasons}


def other_differences(variant: Variant, base: Variant) -> list[str]:
    """Settings besides the recipe that are not the same; the gap between the two is theirs as well."""
    found = []
    for section in ("training", "versions", "device", "data"):
        ours, theirs = variant.first.record[section], base.first.record[section]
        for key in dict.fromkeys([*ours, *theirs]):
            path = f"{section}.{key}"
            if ours.get(key) != theirs.get(key) and path not in (*_SAME, "training.seed"):
                found.append(f"{path} {_short(ours.get(key))} (not {_short(theirs.get(key))})")
    return found


def gaps(variant: Variant, base: Variant | None, path: str = "final.validation_loss") -> list[float] | None:
    """Relative differences to the base in %, a number for each seed that both have; None if incomparable.

    Without a common seed: one number, from the means.
    """
    if base is None or obstacles(variant, base):
        return None
    ours, theirs = ({run.get("training.seed"): run.get(path) for run in v.runs} for v in (variant, base))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    pairs = pairs or [(statistics.fmean(ours.values()), statistics.fmean(theirs.values()))]
    return [100 * (mine / its - 1) for mine, its in pairs]


# ---- Tables --------------------------------------------------------------------------------------------


def spread(values: list[float] | None, digits: int = 4, sign: str = "") -> str:
    """One value, or mean ± standard deviation of several."""
    if not values or any(value is None for value in values):
        return "—"
    if len(values) > 1:
        return plus_minus(statistics.fmean(values), statistics.stdev(values), sign)
    return f"{values[0]:{sign}.{digits}f}"


def training_table(variants: list[Variant]) -> str:
    """Losses, gaps, speed and memory, one variant a line."""
    bases = {recipe: base_of(variants, recipe) for recipe in BASES}
    header = ["run", "validation loss", "gap to bf16", "gap to fp8", "scored in bf16", "gap, scored in bf16"]
    rows = []
    for variant in variants:
        cells = [spread(variant.values("final.validation_loss"))]
        cells += [_gap_cell(variant, bases[recipe]) for recipe in BASES]
        cells.append(spread(variant.values("final.validation_loss_bf16")))
        cells.append(_gap_cell(variant, bases["bf16"], "final.validation_loss_bf16"))
        cells.append(spread(variant.values("final.bits_per_byte")))
        speeds, memory = variant.values("speed.tokens_per_second"), variant.values("speed.peak_memory_bytes")
        cells.append("—" if None in speeds else f"{statistics.fmean(speeds):,.0f}")
        cells.append("—" if None in memory else f"{max(memory) / 2**30:.2f} GiB")
        rows.append([_seeded(variant), *cells])
    return markdown_table([*header, "bits per byte", "tokens/s", "peak memory"], rows)


def _seeded(variant: Variant) -> str:
    return variant.label if len(variant.runs) == 1 else f"{variant.label} ({len(variant.runs)} seeds)"


def _gap_cell(variant: Variant, base: Variant | None, path: str = "final.validation_loss") -> str:
    if base is None or variant is base:
        return "—"
    found = gaps(variant, base, path)
    return "not comparable" if found is None else spread(found, 2, "+") + " %"


def training_notes(variants: list[Variant]) -> list[str]:
    """What must be said beside the training table; obstacles to comparison first."""
    notes = [f"**Not comparable: {label}**: {why}." for label, why in incomparable(variants).items()]
    for variant in variants[1:]:
        if found := other_differences(variant, variants[0]):
            notes.append(f"{variant.label} also differs from {variants[0].label} in {'; '.join(found)}.")
    ways = dict.fromkeys(variant.first.get("final.validation_precision") for variant in variants)
    notes.append(f"Validation loss: nats a token, in {'; '.join(ways)}.")
    notes.append("Scored in bf16: the same weights, all GEMMs in BF16 (as the NVFP4 paper scores).")
    notes.append("A gap is loss / base loss − 1; above zero is worse.")
    if base_of(variants, "bf16") is None:
        notes.append("No BF16 run was given, so there is no gap to it.")
    if any(len(variant.runs) > 1 for variant in variants):
        seeds = "; ".join(f"{v.label}: {', '.join(map(str, v.values('training.seed')))}" for v in variants)
        notes.append(f"± is the standard deviation over seeds ({seeds}); gaps are taken seed by seed.")
    return notes


def precisions(variants: list[Variant]) -> list[str]:
    """The precisions in which any of the runs was scored, as-trained first."""
    names = {s.record["precision"] for variant in variants for run in variant.runs for s in run.scores}
    return sorted(names, key=lambda name: (name != AS_TRAINED, name))


def scored(variant: Variant, precision: str) -> list[Scores]:
    """The variant's scores in one precision, a file a run."""
    return [s for run in variant.runs for s in run.scores if s.record["precision"] == precision]


def score_tables(variants: list[Variant], precision: str) -> str:
    """Task scores in one precision; with one seed each also paired differences to the first variant and to FP8's."""
    columns = {variant.label: found for variant in variants if (found := scored(variant, precision))}
    first, *others = columns.values()
    rows = []
    for task, metric, arrow in metric_names([s for found in columns.values() for s in found]):
        rows.append([task, metric + arrow, *(_score_cell(found, first, task, metric) for found in columns.values())])
    everything = [s for found in columns.values() for s in found]
    several = any(len(found) > 1 for found in columns.values())
    meaning = "standard deviation over seeds" if several else "standard error over items"
    parts = [
        f"By lm-evaluation-harness; ± is the {meaning}.",
        markdown_table(["task", "metric", *columns], rows),
    ]
    parts.append("\n".join(dict.fromkeys(precision_lines(everything))))
    if others and not several:
        bases = [base_of(variants, recipe) for recipe in BASES]
        for label in dict.fromkeys([next(iter(columns)), *(base.label for base in bases if base is not None)]):
            if label not in columns:
                continue
            parts.append(f"Differences to {label} on the same items, ± the paired standard error; 1.96 of it is 95%:")
            base = columns[label][0]
            parts.append(paired_table([base, *(s for s in everything if s is not base)]))
    return "\n\n".join(parts)


def _score_cell(found: list[Scores], base: list[Scores], task: str, metric: str) -> str:
    entries = [s.tasks.get(task, {}).get("metrics", {}).get(metric) for s in found]
    if None in entries:
        return "—"
    versions = [_task_version(s, task) for s in found]
    if any(version != (_task_version(base[0], task) or versions[0]) for version in versions):
        return "not comparable"
    if len(entries) > 1:
        return spread([entry["value"] for entry in entries])
    return plus_minus(entries[0]["value"], entries[0]["stderr"])


def _task_version(s: Scores, task: str):
    """What must agree for scores to be comparable; None where a model was not scored on the task."""
    entry = s.tasks.get(task)
    return entry and [entry.get(key) for key in ("version", "num_fewshot", "fingerprint", "samples")]


def stats_table(found: dict[str, list[dict]]) -> str:
    """Quantization at the last step at which a run measured any: medians over layers. found: rows by run."""
    header = ["run", "step", "SNR of x, dB", "of w", "of dy", "underflow of dy", "gradient's noise ratio", "lowest"]
    lines = []
    for name, rows in found.items():
        step = max(row["step"] for row in rows if row["operands"])
        last = [row for row in rows if row["step"] == step]
        ratios = [row["noise_ratio"] for row in last if row["noise_ratio"] is not None]
        cells = [_median(last, operand, "snr_db") for operand in ("fprop x", "fprop w", "dgrad dy")]
        cells.append(_median(last, "dgrad dy", "underflow", "{:.1%}"))
        low = f"{sum(ratio < NOISE_THRESHOLD for ratio in ratios)} of {len(ratios)}"
        cells += [f"{statistics.median(ratios):.1f}", f"{min(ratios):.2f}", low] if ratios else ["—"] * 3
        lines.append([name, f"{step:,}", *cells])
    return markdown_table([*header, "layers below √3"], lines)


def _median(rows: list[dict], operand: str, kind: str, form: str = "{:.1f}") -> str:
    values = [row["operands"][operand][kind] for row in rows if operand in row["operands"]]
    values = [value for value in values if value is not None]
    return form.format(statistics.median(values)) if values else "—"


def headline(variants: list[Variant]) -> str:
    """Device, backend and recipes in one line."""
    devices = dict.fromkeys(f"{r.get('device.type')} ({r.get('device.name')})" for v in variants for r in v.runs)
    recipes = dict.fromkeys(f"{v.first.record['recipe']} on backend {v.first.record['backend']}" for v in variants)
    return f"device {', '.join(devices)} · {', '.join(recipes)}"


def title(variants: list[Variant]) -> str:
    """What was trained, in a few words."""
    run = variants[0].first
    size = run.record["model"].get("size") or run.record["model"].get("from_checkpoint") or ""
    return (
        f"{run.get('model.type')} {size}".strip()
        + f", {count(run.get('model.parameters'))} parameters, {count(run.get('training.tokens'))} tokens"
    )


def count(number: float) -> str:
    """3012352 -> "3.0M"."""
    power = min(max(int(math.log10(max(number, 1))) // 3, 0), 4)
    return f"{number / 1000**power:.{1 if power else 0}f}{'KMBT'[power - 1] if power else ''}"


def full_table(variants: list[Variant]) -> str:
    """Everything that scripts/report.py prints and writes to table.md."""
    parts = [f"# {title(variants)}", headline(variants), "## Training", training_table(variants)]
    parts.append("\n".join(f"- {note}" for note in training_notes(variants)))
    for precision in precisions(variants):
        parts += [f"## Scores taken {taken(precision)}", score_tables(variants, precision)]
    return "\n\n".join(parts) + "\n"


def read_variants(folders: list[Path]) -> list[Variant]:
    """Runs from folders, grouped. Raises ReportError."""
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ReportError("a run was given twice; give each folder once.")
    try:
        return group([read_run(folder) for folder in folders])
    except ScoreError as error:
        raise ReportError(str(error)) from error
