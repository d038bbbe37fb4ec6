"""Gaps to a base recipe, paired by seed: the numbers of a comparison, their table and JSON.

Knows the run.json files that report.py reads; needs no torch. ± of a gap is the standard error of its mean over
seeds, ± of a loss the standard deviation over seeds.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_nvfp4.report import ReportError, Run, Variant, headline, obstacles, other_differences, read_run, spread, title
from hf_nvfp4.scores import markdown_table, plus_minus

SCHEMA = 1
AS_TRAINED, IN_BF16 = "final.validation_loss", "final.validation_loss_bf16"


@dataclass(frozen=True)
class Gap:
    """Relative differences to the base in %, one a seed that both have."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the pairs, in %."""
        return statistics.fmean(self.by_seed.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, in %; None for one pair."""
        n = len(self.by_seed)
        return statistics.stdev(self.by_seed.values()) / math.sqrt(n) if n > 1 else None


def paired_gap(variant: Variant, base: Variant, path: str = AS_TRAINED) -> Gap | None:
    """100 (loss / base loss - 1), seed by seed; None without a common seed. path: of run.json."""
    ours, theirs = ({run.get("training.seed"): run.get(path) for run in v.runs} for v in (variant, base))
    pairs = {seed: 100 * (ours[seed] / theirs[seed] - 1) for seed in ours if seed in theirs}
    return Gap(pairs) if pairs else None


@dataclass(frozen=True)
class Row:
    """One recipe of the comparison. gap, gap_bf16: as trained, and the same weights scored in BF16.

    obstacle: why it cannot be compared with the base; "" if it can.
    """

    variant: Variant
    gap: Gap | None
    gap_bf16: Gap | None
    obstacle: str = ""

    @property
    def label(self) -> str:
        """The recipe as it was asked for."""
        return self.variant.label

    def record(self) -> dict:
        """For comparison.json. Losses in nats a token, gaps in %, memory in bytes."""
        runs = self.variant.runs
        return {
            "label": self.label,
            "recipe": self.variant.first.record["recipe"],
            "backend": self.variant.first.record["backend"],
            "seeds": self.variant.values("training.seed"),
            "folders": [run.path.name for run in runs],
            "validation_loss": _summary(self.variant.values(AS_TRAINED)),
            "gap_percent": _gap_record(self.gap),
            "validation_loss_bf16": _summary(self.variant.values(IN_BF16)),
            "gap_bf16_percent": _gap_record(self.gap_bf16),
            "not_comparable": self.obstacle or None,
            "tokens_per_second": median(self.variant.values("speed.tokens_per_second")),
            "peak_memory_bytes": max(self.variant.values("speed.peak_memory_bytes")),
            "train_seconds": median(self.variant.values("speed.train_seconds")),
        }


def _summary(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": values}


def _gap_record(gap: Gap | None) -> dict | None:
    return gap and {"mean": gap.mean, "standard_error": gap.standard_error, "pairs": len(gap.by_seed), **asdict(gap)}


def median(values: list[float | None]) -> float | None:
    """Of the numbers among the values; None if there are none."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """All recipes that have a finished run, the base first. base: None if it has none; base_name: as asked for."""

    rows: list[Row]
    base: Variant | None
    base_name: str

    @property
    def variants(self) -> list[Variant]:
        """What report.py and plots.py work on."""
        return [row.variant for row in self.rows]

    def base_spread(self) -> float | None:
        """The base's standard deviation over seeds in % of its mean loss; None for one seed."""
        losses = self.base.values(AS_TRAINED) if self.base else []
        return 100 * statistics.stdev(losses) / statistics.fmean(losses) if len(losses) > 1 else None


def compare(folders: dict[str, list[Path]], base: str) -> Comparison:
    """The comparison of finished runs. folders: label -> its runs. Raises ReportError if there is none."""
    variants = [Variant(label, sorted(map(read_run, paths), key=_seed)) for label, paths in folders.items() if paths]
    if not variants:
        raise ReportError("no run has finished, so there is nothing to compare.")
    found = next((variant for variant in variants if variant.label == base), None)
    variants.sort(key=lambda variant: variant is not found)
    return Comparison([_row(variant, found) for variant in variants], found, base)


def _seed(run: Run) -> int:
    return run.get("training.seed")


def _row(variant: Variant, base: Variant | None) -> Row:
    """Every run is held against the base's first one: data may have changed from one sitting to the next."""
    against = base or variant
    runs = [*variant.runs, *(base.runs if base else ())]
    reasons = [reason for run in runs for reason in obstacles(Variant(variant.label, [run]), against)]
    if reasons or base is None or variant is base:
        return Row(variant, None, None, "; ".join(dict.fromkeys(reasons)))
    return Row(variant, paired_gap(variant, base), paired_gap(variant, base, IN_BF16))


# ---- Table and JSON ------------------------------------------------------------------------------------


def gap_text(gap: Gap | None) -> str:
    """ "+1.50 ± 0.50 %"; of one pair "+1.50 %"."""
    if gap is None:
        return "—"
    return (f"{gap.mean:+.2f}" if gap.standard_error is None else plus_minus(gap.mean, gap.standard_error, "+")) + " %"


def table(comparison: Comparison) -> str:
    """One recipe a line."""
    base = comparison.base_name
    header = ["recipe", "seeds", "validation loss", f"gap to {base}", "pairs", "in BF16", f"gap to {base} in BF16"]
    rows = []
    for row in comparison.rows:
        record = row.record()
        speed, memory = record["tokens_per_second"], record["peak_memory_bytes"]
        cells = [row.label, str(len(record["seeds"])), spread(record["validation_loss"]["values"])]
        cells.append("not comparable" if row.obstacle else gap_text(row.gap))
        cells.append(str(len(row.gap.by_seed)) if row.gap else "—")
        cells.append(spread(record["validation_loss_bf16"]["values"]))
        cells.append("not comparable" if row.obstacle else gap_text(row.gap_bf16))
        cells.append("—" if speed is None else f"{speed:,.0f}")
        rows.append([*cells, f"{memory / 2**30:.2f} GiB", f"{record['train_seconds']:,.1f}"])
    return markdown_table([*header, "tokens/s", "peak memory", "seconds"], rows)


def notes(comparison: Comparison) -> list[str]:
    """What must be said beside the table; obstacles first."""
    rows, base = comparison.rows, comparison.base
    found = [f"**Not comparable: {row.label}**: {row.obstacle}." for row in rows if row.obstacle]
    if base is None:
        found.append(f"No run of the base {comparison.base_name!r} has finished: losses only, no gaps.")
    else:
        for row in rows[1:]:
            if not row.obstacle and row.gap is None:
                found.append(f"{row.label} and {base.label} have no seed in common: no gap.")
            if differences := other_differences(row.variant, base):
                found.append(f"{row.label} also differs from {base.label} in {'; '.join(differences)}.")
        found.append("A gap is loss / base loss − 1, the mean over seeds that both have; above zero is worse.")
    if any(row.gap and row.gap.standard_error is not None for row in rows):
        found.append("± of a gap is the standard error of that mean.")
    if (deviation := comparison.base_spread()) is not None:
        found.append(
            f"{base.label} alone varies by {deviation:.2g} % from seed to seed (standard deviation of "
            f"{len(base.runs)} seeds)."
        )
    if any(len(row.variant.runs) > 1 for row in rows):
        found.append("± of a loss is the standard deviation over seeds.")
    found.append("Validation loss: nats a token, as trained; in BF16: the same weights, all GEMMs in BF16.")
    found.append("Tokens/s and seconds of training: medians over seeds; peak memory: the largest.")
    return found


def document(comparison: Comparison, more_notes: list[str] = ()) -> str:
    """table.md."""
    variants = comparison.variants
    said = "\n".join(f"- {note}" for note in [*notes(comparison), *more_notes])
    return "\n\n".join([f"# {title(variants)}", headline(variants), table(comparison), said]) + "\n"


def record(comparison: Comparison, more_notes: list[str] = ()) -> dict:
    """comparison.json."""
    return {
        "schema": SCHEMA,
        "title": title(comparison.variants),
        "base": comparison.base_name,
        "base_spread_percent": comparison.base_spread(),
        "recipes": [row.record() for row in comparison.rows],
        "notes": [*notes(comparison), *more_notes],
    }
