"""What an evaluation leaves behind: scores with standard errors, one result an item, paired comparisons.

Knows the files (eval-<precision>.json and its samples), the statistics and the tables. Knows neither torch
nor lm-eval: evaluation.py makes the results, report.py puts them beside the training runs.
"""

import gzip
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

SCHEMA = 1
AS_TRAINED = "as-trained"
_HIGHER_IS_BETTER = {True: " ↑", False: " ↓", None: ""}


# ---- Statistics ----------------------------------------------------------------------------------------


def estimate(aggregation: str, items: list) -> tuple[float, np.ndarray] | None:
    """A score, and how far each item pulls it: to first order, value(all) - value(without i) for large n.

    aggregation: lm-eval's name of the function that makes one score of all items. "mean" and "perplexity"
        take a number an item, "bits_per_byte" and "weighted_perplexity" a pair (log-likelihood, size).
    Returns None for aggregations that are not smooth functions of sums (F1, BLEU, …).
    """
    values = np.asarray(items, dtype=np.float64)
    if aggregation in ("mean", "perplexity") and values.ndim == 1:
        value, pull = values.mean(), (values - values.mean()) / len(values)
    elif aggregation in ("bits_per_byte", "weighted_perplexity") and values.ndim == 2:
        sums = values.sum(0)
        value = sums[0] / sums[1]
        pull = (values[:, 0] - value * values[:, 1]) / sums[1]
    else:
        return None
    if aggregation == "bits_per_byte":
        return -value / math.log(2), -pull / math.log(2)
    if aggregation != "mean":
        return math.exp(-value), -math.exp(-value) * pull
    return value, pull


def standard_error(pull: np.ndarray) -> float | None:
    """The standard error of an estimate from its items' pulls, [n]; None for a single item."""
    n = len(pull)
    return math.sqrt(n / (n - 1) * float(np.square(pull).sum())) if n > 1 else None


def paired_difference(aggregation: str, items: list, base: list) -> tuple[float, float | None] | None:
    """score(items) - score(base) and its standard error, over the same items in the same order."""
    ours, theirs = estimate(aggregation, items), estimate(aggregation, base)
    if ours is None or theirs is None:
        return None
    return ours[0] - theirs[0], standard_error(ours[1] - theirs[1])


def combine(parts: list[tuple[float, float | None]], weights: list[float]) -> tuple[float, float | None]:
    """The weighted sum of independent (value, standard error)."""
    value = sum(w * v for (v, _), w in zip(parts, weights, strict=True))
    if any(error is None for _, error in parts):
        return value, None
    return value, math.sqrt(sum((w * e) ** 2 for (_, e), w in zip(parts, weights, strict=True)))


# ---- Files ---------------------------------------------------------------------------------------------


class ScoreError(ValueError):
    """A file of scores is missing, broken, or does not belong beside another."""


@dataclass(frozen=True)
class Scores:
    """One eval-<precision>.json; `items` reads the results of single items from the file beside it."""

    path: Path
    record: dict

    @property
    def name(self) -> str:
        """The model's name."""
        return self.record["name"]

    @property
    def tasks(self) -> dict[str, dict]:
        """What the user asked for: groups, and tasks that are in none of them."""
        tasks = self.record["tasks"]
        children = {child for task in tasks.values() for child in task.get("subtasks", ())}
        return {name: task for name, task in tasks.items() if name not in children}

    @cached_property
    def items(self) -> dict[tuple[str, str], dict[int, tuple[str, object]]]:
        """(task, metric) -> item number -> (hash of the item, its result)."""
        found: dict = {}
        path = self.path.parent / self.record["samples_file"]
        try:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for sample in map(json.loads, lines):
                    for metric, value in sample["metrics"].items():
                        items = found.setdefault((sample["task"], metric), {})
                        items[sample["doc_id"]] = (sample["hash"], value)
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ScoreError(f"{path}: cannot read the single items ({error}). Evaluate again.") from error
        return found


def read_scores(path: Path) -> Scores:
    """The scores in a JSON file that `write_scores` wrote. Raises ScoreError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path}: cannot read it ({error}). Evaluate again.") from error
    needed = {"schema", "name", "recipe", "precision", "precision_detail", "tasks", "samples_file"}
    if not isinstance(record, dict) or not needed <= record.keys():
        missing = sorted(needed - record.keys()) if isinstance(record, dict) else "an object"
        raise ScoreError(f"{path}: not a file of scores; it lacks {missing}. Evaluate again.")
    if record["schema"] != SCHEMA:
        raise ScoreError(f"{path}: schema {record['schema']!r}; this version reads {SCHEMA}. Evaluate again.")
    return Scores(path, record)


def write_scores(path: Path, record: dict, samples: list[dict]) -> Scores:
    """Write samples, then the record that names them; each file is complete or not there."""
    samples_path = path.with_suffix(".samples.jsonl.gz")
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(samples_path, gzip.compress(lines.encode(), mtime=0))
    record = {**record, "samples_file": samples_path.name}
    write_json(path, record)
    return Scores(path, record)


def write_atomically(path: Path, content: bytes) -> None:
    """Make `path` hold content; a reader, or a crash on the way, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """`write_atomically` for what reads well as JSON."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


# ---- Comparisons -----------------------------------------------------------------------------------------


def compare(scores: Scores, base: Scores, task: str, metric: str) -> tuple[float, float | None] | None:
    """Difference to the base on a task or a group with its paired standard error; None: not for this metric.

    Raises ScoreError when the two were not scored on the same items.
    """
    entry = base.record["tasks"].get(task, {"metrics": {}})["metrics"].get(metric)
    if entry is None:
        raise ScoreError(f"{base.name} was not scored on it")
    weights = entry.get("weights", {task: 1.0})
    parts = [_compare_task(scores, base, child, metric) for child in weights]
    return None if None in parts else combine(parts, list(weights.values()))


def _compare_task(scores: Scores, base: Scores, task: str, metric: str) -> tuple[float, float | None] | None:
    ours, theirs = (s.items.get((task, metric), {}) for s in (scores, base))
    if ours.keys() != theirs.keys() or any(ours[number][0] != theirs[number][0] for number in theirs):
        raise ScoreError(f"{len(ours)} and {len(theirs)} items, not the same ones")
    pairs = [(ours[number][1], theirs[number][1]) for number in theirs]
    aggregation = base.record["tasks"][task]["metrics"][metric]["aggregation"]
    return paired_difference(aggregation, [mine for mine, _ in pairs], [its for _, its in pairs])


# ---- Tables --------------------------------------------------------------------------------------------


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well in a terminal; numbers stand at the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    right = [i > 0 and all(re.match(r"[-+\d—]", row[i]) for row in rows) for i in range(len(header))]

    def line(cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def plus_minus(value: float | None, error: float | None, sign: str = "") -> str:
    """value ± error, both with the decimals that give the error two digits; sign="+" to show it always."""
    if value is None:
        return "—"
    if abs(value) >= 1e6:
        return f"{value:{sign}.3g}" + ("" if error is None else f" ± {error:.2g}")
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:{sign}.4f}"
    decimals = 4 if error == 0 else min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def precision_lines(scores: list[Scores]) -> list[str]:
    """A list that says for each model in what arithmetic its scores were taken."""
    return [f"- {s.name}: {s.record['precision_detail']}" for s in scores]


def taken(precision: str) -> str:
    """A precision as it stands after "scores taken"."""
    return "as trained" if precision == AS_TRAINED else f"in {precision}"


def metric_names(scores: list[Scores]) -> list[tuple[str, str, str]]:
    """(task, metric, arrow towards better) of everything that any of the scores holds, in order."""
    names = {}
    for s in scores:
        for task, result in s.tasks.items():
            for metric, entry in result["metrics"].items():
                names[task, metric] = _HIGHER_IS_BETTER[entry["higher_is_better"]]
    return [(*key, arrow) for key, arrow in names.items()]


def score_table(scores: list[Scores]) -> str:
    """Tasks down, models across; ± is the standard error over items."""
    rows = []
    for task, metric, arrow in metric_names(scores):
        entries = [s.tasks.get(task, {}).get("metrics", {}).get(metric, {}) for s in scores]
        cells = [plus_minus(entry.get("value"), entry.get("stderr")) for entry in entries]
        rows.append([task, metric + arrow, *cells])
    return markdown_table(["task", "metric", *(s.name for s in scores)], rows)


def paired_table(scores: list[Scores]) -> str:
    """Differences to the first model with their paired standard errors; in brackets their ratio."""
    base, *others = scores
    rows = [
        [task, metric + arrow, *(_paired_cell(other, base, task, metric) for other in others)]
        for task, metric, arrow in metric_names(scores)
    ]
    return markdown_table(["task", "metric", *(f"{s.name} − {base.name}" for s in others)], rows)


def _paired_cell(scores: Scores, base: Scores, task: str, metric: str) -> str:
    try:
        difference = compare(scores, base, task, metric)
    except ScoreError as error:
        return f"not comparable: {error}"
    if difference is None:
        return "no paired error for this metric"
    value, error = difference
    return plus_minus(value, error, "+") + (f" ({abs(value) / error:.1f} σ)" if error else "")
