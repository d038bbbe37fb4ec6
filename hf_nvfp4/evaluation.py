"""Scores a causal LM with lm-eval-harness: which tasks, in which precision, with which standard errors.

Knows lm-eval and Transformers. What becomes of the scores (files, tables, comparisons) is in scores.py.
"""

import contextlib
import difflib
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_nvfp4.gemm import backend_name
from hf_nvfp4.integration import QUANT_METHOD, NVFP4TrainingConfig
from hf_nvfp4.language import Recipe, RecipeMap
from hf_nvfp4.linear import NVFP4Layer, NVFP4Module, use_recipe
from hf_nvfp4.packed import PackedLinear
from hf_nvfp4.scores import AS_TRAINED, combine, estimate, standard_error

TASKS = Path(__file__).parent / "tasks"
_BOOTSTRAP_DRAWS = 1000  # for metrics without a closed form; lm-eval's default of 100,000 takes minutes


@dataclass(frozen=True)
class Settings:
    """How to score, apart from precision."""

    batch_size: int = 8
    limit: float | None = None  # items a task, or below 1 a fraction of them
    num_fewshot: int | None = None  # None: as the task says
    max_length: int | None = None  # None: as the model's config says


# ---- Tasks ---------------------------------------------------------------------------------------------


def load_tasks(names: list[str], include_path: list[str] = (), data_dir: str | None = None) -> list:
    """The lm-eval Tasks and Groups of these names, or globs of names.

    Looks in the package and in include_path. Only if a name is found in neither, lm-eval's own tasks are
    read as well, which takes seconds; most of them load their data from the Hub.
    data_dir: the folder that relative paths in the tasks' YAML files start from (default: the current one).
    """
    folders = [TASKS, *(Path(folder).resolve() for folder in include_path)]
    for folder in folders:
        if not any(folder.glob("**/*.yaml")):
            raise ValueError(f"no task files (*.yaml) in {folder}. Check --include_path.")
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folders)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else "Check --tasks and --include_path."
            raise ValueError(f"unknown task {name!r}. {hint}")
    try:
        with _working_directory(data_dir):
            loaded = manager.load(manager.match_tasks(names))
    except FileNotFoundError as error:
        start = Path(data_dir or ".").resolve()
        raise FileNotFoundError(f"{error}. Relative paths in task files start at {start}: see --data_dir.") from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    inside |= {child.name for group in groups.values() for child in group.get_all_groups()}
    return [item for name, item in {**groups, **tasks}.items() if name not in inside]


@contextlib.contextmanager
def _working_directory(path: str | None):
    before = Path.cwd()
    os.chdir(path or before)
    try:
        yield
    finally:
        os.chdir(before)


# ---- Models --------------------------------------------------------------------------------------------


def stored_recipe(name: str) -> tuple[Recipe | RecipeMap, str] | None:
    """The recipe and backend that a checkpoint's config.json names; None for a model without ours."""
    values = getattr(AutoConfig.from_pretrained(_checked(name)), "quantization_config", None)
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        return None
    config = NVFP4TrainingConfig(**values)
    return config.recipe.active(config.high_precision), config.backend


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """(model, tokenizer) from a folder or from the Hub ("org/name"), ready to score."""
    tokenizer = AutoTokenizer.from_pretrained(_checked(name))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return model, tokenizer


def _checked(name: str) -> str:
    """The name, unless it can only be a mistyped folder: that would be looked for on the Hub."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise OSError(f"{name} is not a model folder: it has no config.json. Did the training end?")
    if not path.is_dir() and (len(path.parts) != 2 or path.parent.is_dir()):
        raise OSError(f"{name}: no such folder (and not the name of a model on the Hub, org/name).")
    return name


def precision(model, name: str) -> contextlib.AbstractContextManager:
    """A context that runs `model` in the named precision: "as-trained", or any recipe."""
    if name == AS_TRAINED:
        return contextlib.nullcontext(model)
    if _converted(model):
        return use_recipe(model, name)
    if _packed(model):
        raise ValueError(f"a packed model can be scored as-trained only, not in {name!r}: its weights are 4-bit codes.")
    if name != "bf16":
        raise ValueError(
            f"a plain model, without an hf_nvfp4 configuration, can be scored as-trained or in bf16, not in "
            f"{name!r}. Convert it with hf_nvfp4.quantize_model and save it."
        )
    if model.dtype != torch.bfloat16:
        raise ValueError(f"a plain model, loaded in {_plain(model.dtype)}: for bf16 use --dtype bfloat16.")
    return contextlib.nullcontext(model)


def precision_detail(model) -> str:
    """In which arithmetic `model` runs now, in words."""
    modules = _converted(model)
    if packed := _packed(model):
        ways = " and ".join(sorted({f"recipe {x.recipe_name}, packed, {x.arithmetic}" for x in packed}))
        return f"{ways}, in {len(packed)} linears; all else {_plain(model.dtype)}"
    if not modules and (other := getattr(model.config, "quantization_config", None)):
        return f"{getattr(other, 'quant_method', 'other')} quantization, not hf_nvfp4's; all else {_plain(model.dtype)}"
    if not modules:
        return f"plain model without an hf_nvfp4 configuration, {_plain(model.dtype)} throughout"
    ways = {(x.eval_recipe.name, backend_name(x.backend, x.eval_recipe, next(x.parameters()).device)) for x in modules}
    recipes = ", ".join(f"{recipe} on backend {backend}" for recipe, backend in sorted(ways))
    per_token = any(x.eval_recipe.fprop.a.outer == "row" for x in modules)
    scales = ", activation scales per token" if per_token else ""
    linears = sum(isinstance(x, NVFP4Layer) for x in modules)
    experts = f" and {len(modules) - linears} modules of experts" if linears < len(modules) else ""
    return f"{recipes} in {linears} linears{experts}{scales}; all else {_plain(model.dtype)}"


def _converted(model) -> list[NVFP4Module]:
    return [module for module in model.modules() if isinstance(module, NVFP4Module)]


def _packed(model) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Scores --------------------------------------------------------------------------------------------


class _HFLM(HFLM):
    """One progress bar for all windows of rolling log-likelihoods, where lm-eval draws one for each batch."""

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        with tqdm(desc="Running loglikelihood windows", disable=disable_tqdm) as self._windows:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        rolling = override_bs is not None
        answers = super()._loglikelihood_tokens(requests, disable_tqdm or rolling, override_bs)
        if rolling:
            self._windows.update(len(requests))
        return answers


def score(model, tokenizer, tasks: list[Task | Group], settings: Settings) -> tuple[dict, list[dict]]:
    """Run lm-eval. Returns {"tasks": …, "max_length": …} for the JSON, and one sample an item.

    Log-probabilities are taken from FP32 logits: rounded to BF16, a sum over a window would be off by more
    than the differences between recipes.
    """
    lm = _HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        softmax_dtype="float32",
    )
    if lm.prefix_token_id is None:
        raise ValueError("the tokenizer has neither bos_token nor eos_token to begin a text with; set one.")
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
        task_manager=TaskManager(include_defaults=False),
    )
    samples = [_sample(task, sample) for task, found in results["samples"].items() for sample in found]
    groups = [item for item in tasks if isinstance(item, Group)]
    leaves = [item for item in tasks if isinstance(item, Task)]
    leaves += [leaf for group in groups for leaf in group.get_all_tasks()]
    record = {task.task_name: _task_entry(task, results, samples) for task in leaves}
    for group in [inner for outer in groups for inner in (outer, *outer.get_all_groups())]:
        record[group.name] = _group_entry(group, record)
    return {"tasks": record, "max_length": lm.max_length}, samples


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _sample(task: str, sample: dict) -> dict:
    """What is kept of one item: which it is, the model's answers, the metrics."""
    hashes = "".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
        "metrics": {_label(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]},
        "responses": sample["filtered_resps"],
    }


def _task_entry(task: Task, results: dict, samples: list[dict]) -> dict:
    """The JSON entry of one task, with our own standard errors where there is a closed form."""
    name = task.task_name
    mine = [sample for sample in samples if sample["task"] == name]
    entry = {
        "metrics": {},
        "samples": results["n-samples"][name]["effective"],
        "num_fewshot": results["n-shot"][name],
        "version": task.VERSION,
        "fingerprint": hashlib.sha256("".join(sample["hash"] for sample in mine).encode()).hexdigest()[:16],
    }
    scores = results["results"][name]
    for key, value in scores.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = _label(metric, filter_name)
        if not math.isfinite(value):
            raise ValueError(f"{name}: {label} is {value}; the outputs are not finite. Did training diverge?")
        aggregation = getattr(task.aggregation().get(metric), "__name__", "mean")  # lm-eval's own fallback
        found = estimate(aggregation, [s["metrics"][label] for s in mine if label in s["metrics"]])
        error = standard_error(found[1]) if found else scores[f"{metric}_stderr,{filter_name}"]
        entry["metrics"][label] = {
            "value": value,
            "stderr": error if isinstance(error, float) else None,  # lm-eval says "N/A"
            "higher_is_better": task.higher_is_better().get(metric),
            "aggregation": aggregation,
        }
    return entry


def _group_entry(group: Group, record: dict) -> dict:
    """The JSON entry of a group: weighted means of its tasks' metrics, as its YAML file asks for."""
    leaves = [task.task_name for task in group.get_all_tasks()]
    entry = {"metrics": {}, "samples": sum(record[leaf]["samples"] for leaf in leaves)}
    for config in group.aggregate_metric_list or ():
        for label in dict.fromkeys(label for leaf in leaves for label in record[leaf]["metrics"]):
            if label.partition(" (")[0] != config.metric:
                continue
            sizes = {leaf: record[leaf]["samples"] for leaf in leaves if label in record[leaf]["metrics"]}
            total = sum(sizes.values()) if config.weight_by_size else len(sizes)
            weights = {leaf: (size if config.weight_by_size else 1) / total for leaf, size in sizes.items()}
            parts = [record[leaf]["metrics"][label] for leaf in weights]
            value, error = combine([(p["value"], p["stderr"]) for p in parts], list(weights.values()))
            kept = {"higher_is_better": parts[0]["higher_is_better"], "weights": weights}
            entry["metrics"][label] = {"value": value, "stderr": error, **kept}
    if entry["metrics"]:
        entry["subtasks"] = [*leaves, *(inner.name for inner in group.get_all_groups())]
    return entry
