"""The model card of a comparison: fills a template through huggingface_hub's card classes. No torch."""

import itertools
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_nvfp4 import report
from hf_nvfp4.report import Run, Variant, count
from hf_nvfp4.scores import AS_TRAINED, markdown_table, taken

# Tokens a parameter of compute-optimal training: Hoffmann et al., arXiv 2203.15556.
_OPTIMAL_TOKENS = 20
# The smallest model in Pretraining LLMs with NVFP4, arXiv 2509.25149.
_PAPER_PARAMETERS = 1.2e9
_EMULATIONS = ("bf16", "reference")  # backends that compute what FP8 or FP4 hardware would, slower
_EMBEDDED = "embedded"
_METRIC_TYPES = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "exact_match"}
_NAMES_SHOWN = 40


def model_card(
    variants: list[Variant],
    template: Path,
    plot: str,
    language: list[str],
    license: str,
    stats: dict[str, str] | None = None,
) -> ModelCard:
    """The card of all variants together. plot: the figure's path from where the card will stand; stats: those of runs
    that measured what quantization does, by name."""
    data = card_data(variants, language, license)
    return ModelCard.from_template(
        data,
        template_path=str(template),
        heading=report.title(variants),
        recipes=[variant.label for variant in variants],
        training_table=report.training_table(variants),
        training_notes=report.training_notes(variants),
        scores=[
            (taken(precision), report.score_tables(variants, precision)) for precision in report.precisions(variants)
        ],
        plot=plot,
        stats=stats or {},
        origin=variants[0].first.record["model"].get("from_checkpoint"),
        source=variants[0].first.get("data.source"),
        settings=settings_table(variants),
        shared_settings=[(n, values[0]) for n, values in settings(variants).items() if len(set(values)) == 1],
        layers=[(variant.label, *kept_layers(variant.first)) for variant in variants],
        environments=environments(variants),
        commands=commands(variants),
        limits=limits(variants),
    )


def card_data(variants: list[Variant], language: list[str], license: str) -> ModelCardData:
    """The card's metadata."""
    run = variants[0].first
    recipes = list(dict.fromkeys(variant.first.record["recipe"] for variant in variants))
    dataset = re.match(r"Hub: ([\w.-]+/[\w.-]+|[\w.-]+)", run.get("data.source"))
    base = _hub_name(run.record["model"].get("from_checkpoint"))
    return ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_nvfp4", "low-precision-training", *recipes],
        datasets=[dataset[1]] if dataset else None,
        base_model=base,
        model_name=f"{run.get('model.type')}: {', '.join(variant.label for variant in variants)}",
        eval_results=list(eval_results(variants)),
        **({"base_model_relation": "finetune"} if base else {}),
    )


def _hub_name(checkpoint: str | None) -> str | None:
    """A checkpoint's name if it can be one on the Hub, and not a folder here."""
    if checkpoint and re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) and not Path(checkpoint).exists():
        return checkpoint
    return None


def eval_results(variants: list[Variant]):
    """Validation losses and task scores, means over seeds, as the Hub's model-index takes them."""
    for variant in variants:
        source = variant.first.get("data.source")
        loss = sum(variant.values("final.validation_loss")) / len(variant.runs)
        yield _result("validation", f"validation text of {source}", "loss", loss, f"{variant.label}, as trained")
        for precision in report.precisions(variants):
            found = report.scored(variant, precision)
            for task, metric, _ in report.metric_names(found):
                entries = [s.tasks.get(task, {}).get("metrics", {}).get(metric) for s in found]
                if None not in entries:
                    mean = sum(entry["value"] for entry in entries) / len(entries)
                    yield _result(task, task, metric, mean, f"{variant.label}, scored {taken(precision)}")


def _result(dataset: str, title: str, metric: str, value: float, whose: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=title,
        metric_type=_METRIC_TYPES.get(metric, metric),
        metric_name=f"{metric} ({whose})",
        metric_value=round(value, 6),
    )


def settings(variants: list[Variant]) -> dict[str, list[str]]:
    """Name of a setting -> its value in each variant."""
    runs = [variant.first for variant in variants]
    sections = [run.record["data"] | run.record["training"] for run in runs]
    found = {"backend": [run.record["backend"] for run in runs]}
    for key in dict.fromkeys(key for section in sections for key in section):
        found[key.replace("_", " ")] = [_plain(section.get(key)) for section in sections]
    found["seed"] = [", ".join(map(str, variant.values("training.seed"))) for variant in variants]
    found["late switch to BF16"] = [_switch(run) for run in runs]
    found["seconds of training"] = [f"{run.get('speed.train_seconds'):,.0f}" for run in runs]
    return found


def settings_table(variants: list[Variant]) -> str:
    """The settings that are not the same everywhere; empty if there are none."""
    rows = [[name, *values] for name, values in settings(variants).items() if len(set(values)) > 1]
    return markdown_table(["", *(variant.label for variant in variants)], rows) if rows else ""


def _plain(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _switch(run: Run) -> str:
    schedule = run.record["precision_schedule"]
    return f"{schedule['gemms']} GEMMs from step {schedule['switch_step']:,}" if schedule else "—"


def kept_layers(run: Run) -> tuple[str, list[tuple[str, str]]]:
    """The one-line conversion summary, and (reason, names) of the linear layers that stayed in high precision."""
    kept = sorted((d for d in run.record["decisions"] if not d["converted"]), key=lambda d: d["reason"])
    reasons = []
    for reason, found in itertools.groupby(kept, key=lambda d: d["reason"]):
        names = [f"`{decision['name']}`" for decision in found]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        reasons.append((reason, ", ".join(names[:_NAMES_SHOWN]) + more))
    return run.record["conversion"], reasons


def environments(variants: list[Variant]) -> list[str]:
    """Device and versions, a line for each that differs."""
    found = {}
    for run in (run for variant in variants for run in variant.runs):
        device = run.record["device"]
        versions = ", ".join(f"{name} {number}" for name, number in run.record["versions"].items() if number)
        where = f"{device.get('count', 1)} × {device['name']} ({device['type']}); {versions}"
        found.setdefault(where, []).append(run.record["name"])
    lines = [f"{', '.join(names)}: {where}" for where, names in found.items()] if len(found) > 1 else list(found)
    scored = (s.record["versions"]["lm_eval"] for v in variants for run in v.runs for s in run.scores)
    return lines + [f"scored with lm_eval {number}" for number in dict.fromkeys(scored)]


def commands(variants: list[Variant]) -> list[str]:
    """What to type to get these results again."""
    runs = [run for variant in variants for run in variant.runs]
    evaluations = [s.record.get("command") for run in runs for s in run.scores]
    return list(dict.fromkeys(filter(None, [*(run.record["command"] for run in runs), *evaluations])))


def limits(variants: list[Variant]) -> list[str]:
    """What these numbers cannot show, as far as the runs themselves say so."""
    run = variants[0].first
    parameters, tokens = run.get("model.parameters"), run.get("training.tokens")
    minutes = [run.get("speed.train_seconds") / 60 for variant in variants for run in variant.runs]
    said = [
        f"Each model has {count(parameters)} parameters and was trained on {count(tokens)} tokens for {_span(minutes)}."
    ]
    if not run.record["model"].get("from_checkpoint") and tokens / parameters < _OPTIMAL_TOKENS:
        said.append(
            f"That is {tokens / parameters:.2g} tokens a parameter; compute-optimal training takes about "
            f"{_OPTIMAL_TOKENS}. The losses would still fall, and the gaps may change."
        )
    if parameters < _PAPER_PARAMETERS:
        said.append(
            f"The models of the NVFP4 paper have {count(_PAPER_PARAMETERS)} parameters and more; gaps at this size "
            "do not foretell gaps at that one."
        )
    if all(len(variant.runs) == 1 for variant in variants):
        said.append("One seed each: how far a loss moves from seed to seed was not measured.")
    if run.get("data.source").startswith(_EMBEDDED):
        said.append("The training text is Python's standard library: these are no models of general English or code.")
    said += _emulated(variants) + _few_items(variants)
    said += [f"{label} is not comparable: {why}." for label, why in report.incomparable(variants).items()]
    return said


def _span(minutes: list[float]) -> str:
    low, high = (f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (min(minutes), max(minutes)))
    return f"{low} minutes" if low == high else f"{low} to {high} minutes"


def _emulated(variants: list[Variant]) -> list[str]:
    names = [
        f"{variant.label} (backend {variant.first.record['backend']})"
        for variant in variants
        if variant.first.record["recipe"] != "bf16" and variant.first.record["backend"] in _EMULATIONS
    ]
    if not names:
        return []
    return [f"Arithmetic was emulated for {', '.join(names)}: tokens/s and memory say nothing about real FP8 or FP4."]


def _few_items(variants: list[Variant]) -> list[str]:
    every = [s for variant in variants for run in variant.runs for s in run.scores]
    if not every:
        return ["No task was scored."]
    said = []
    if limited := {s.record["limit"] for s in every if s.record.get("limit")}:
        said.append(f"Tasks were cut to {', '.join(f'{x:g}' for x in sorted(limited))} items (--limit).")
    if not any(s.record["precision"] != AS_TRAINED for s in every):
        said.append("Scores were taken in the precision of training only, where the NVFP4 paper scores in BF16.")
    small = {task: entry["samples"] for s in every for task, entry in s.tasks.items() if entry["samples"] < 1000}
    if small:
        sizes = ", ".join(f"{task} {number}" for task, number in small.items())
        said.append(f"Tasks with few items ({sizes}) tell only large differences apart: mind the ±.")
    return said
