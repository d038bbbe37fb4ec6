"""Which layers of a model are converted and why, and the conversion itself. A layer's numerics are linear.py's."""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_nvfp4 import experts
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.conv1d import NVFP4Conv1D
from hf_nvfp4.gemm import backend_name, check_backend
from hf_nvfp4.language import Recipe, RecipeMap, check_block_count, matches, recipe_for
from hf_nvfp4.linear import NVFP4Linear, NVFP4Module, converted_modules, unsuitable
from hf_nvfp4.weight_reads import BOTH, READ, uses

# Subclasses of nn.Linear whose own forward computes the same thing.
_LINEAR_FORWARDS = ("FalconLinear",)
# Heads that get_output_embeddings does not name: of classifiers, and of models that are not Transformers'.
_HEAD_NAMES = ("lm_head", "score", "classifier")
# Of the names of a config's parts: what is not text.
_OTHER_MODES = r"vision|image|video|audio|speech"


@dataclass(frozen=True)
class Decision:
    """What was done with one linear layer, or one module of fused experts, by name, and the reason.

    experts: how many are fused in the module; 0: it is a linear layer.
    """

    name: str
    converted: bool
    reason: str
    experts: int = 0


@dataclass(frozen=True)
class Choice:
    """What decides which layers are converted.

    skip: patterns of module names to keep in high precision; each is compared, component by component and
        with shell wildcards, with every run of components of a name ("layers.1" is not "layers.11").
    keep_bf16_first, keep_bf16_last: blocks at either end to keep: a count (int) or a fraction (float).
    """

    recipe: Recipe | RecipeMap
    backend: str = "auto"
    skip: tuple[str, ...] = ()
    keep_bf16_first: int | float = 0
    keep_bf16_last: int | float = 0

    def __post_init__(self):
        check_backend(self.backend)
        check_block_count("keep_bf16_first", self.keep_bf16_first)
        check_block_count("keep_bf16_last", self.keep_bf16_last)


def decide(model: nn.Module, choice: Choice) -> list[Decision]:
    """A decision for every linear layer of the model, in the model's order. Changes nothing.

    Raises:
        ValueError: a pattern of skip or of a recipe map that matches no linear layer, a model without linears, or
            nothing to convert.
    """
    candidates = {name: module for name, module in model.named_modules() if _is_linear(module) or fused_experts(module)}
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no linear layers; hf_nvfp4 converts nn.Linear modules")
    patterns = [] if isinstance(choice.recipe, Recipe) else [pattern for pattern, _ in choice.recipe.recipes]
    for kind, pattern in [*(("skip", p) for p in choice.skip), *(("recipe", p) for p in patterns)]:
        if not any(matches(pattern, name) for name in candidates):
            examples = ", ".join(list(candidates)[:8])
            raise ValueError(
                f"{kind} pattern {pattern!r} matches none of the {len(candidates)} linear layers; their names are "
                f"like {examples}. Patterns match whole components, with * and ? as wildcards."
            )
    heads = _output_heads(model)
    not_text = _not_text(model)
    blocks = _block_positions(model, candidates)
    decisions = []
    for name, module in candidates.items():
        reason = (
            ("output head" if module in heads else None)
            or ("not in the text model" if not_text(name) else None)
            or ("router of experts" if _is_router(name, model) else None)
            or _unconvertible(name, module, model)
            or _kept_by_user(name, choice)
            or _kept_block(blocks.get(name), choice)
            or (None if recipe_for(choice.recipe, name) else "no pattern of the recipe map matches")
        )
        why = reason or _recipe_of(name, module, choice.recipe) + _may_be_passed_by(name, model)
        decisions.append(Decision(name, reason is None, why, fused_experts(module)))
    if not any(d.converted for d in decisions):
        raise ValueError(f"nothing to convert: {summary(decisions)}")
    return decisions


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def fused_experts(module: nn.Module) -> int:
    """How many experts are fused in a module's own parameters; 0 in others."""
    named = type(module).__name__.endswith("Experts")
    return next((len(p) for p in module.parameters(recurse=False) if named and p.dim() == 3), 0)


def _sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """in_features, out_features; of experts each matrix's, by its name."""
    if not _is_linear(module):
        return experts.sizes_of(module)
    return {"": (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)}


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The output head, and any linear layer that shares its weight with an embedding."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    heads = set() if head is None else set(head.modules())  # all of them: PEFT wraps the head
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = {m for m in model.modules() if type(m) is nn.Linear and id(m.weight) in embeddings}
    named = {m for name, m in model.named_modules() if name.rpartition(".")[2] in _HEAD_NAMES}
    return heads | tied | named


def _not_text(model: nn.Module) -> Callable[[str], bool]:
    """Whether a layer, by its name, is outside the text model of a multimodal model; in others none is.

    By Transformers' configs: the model of a config has it as its `config`.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return lambda name: False
    text = type(config.get_text_config(decoder=True))
    others = tuple(type(getattr(config, key, None)) for key in config.sub_configs if re.search(_OTHER_MODES, key))
    configs = {f"{name}.": getattr(module, "config", None) for name, module in model.named_modules() if name}
    inside = tuple(name for name, c in configs.items() if text is not type(config) and isinstance(c, text))
    outside = tuple(name for name, c in configs.items() if isinstance(c, others) and c is not None)
    return lambda name: name.startswith(outside) or bool(inside) and not name.startswith(inside)


def _is_router(name: str, model: nn.Module) -> bool:
    """Whether a linear layer chooses experts: it is, or is part of, a router, or is the gate beside the experts."""
    parts = name.split(".")
    names = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    if any(re.fullmatch(r"router|.*Router", s) for n in names for s in (n.rpartition(".")[2], _class(model, n))):
        return True
    return parts[-1] == "gate" and hasattr(model.get_submodule(".".join(parts[:-1])), "experts")


def _class(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def _use(name: str, model: nn.Module) -> str | None:
    """How the module around a layer uses it, by `weight_reads.uses`."""
    outer, _, attribute = name.rpartition(".")
    return uses(type(model.get_submodule(outer))).get(attribute)


def _may_be_passed_by(name: str, model: nn.Module) -> str:
    if _use(name, model) != BOTH:
        return ""
    return f", except where {_class(model, name.rpartition('.')[0])} multiplies by its weight directly (fused kernels)"


def _unconvertible(name: str, module: nn.Module, model: nn.Module) -> str | None:
    kind = type(module)
    if any(part.startswith("lora_") for part in name.split(".")):
        return "LoRA adapter"
    if not _is_linear(module):
        if reason := experts.why_not(module):
            return reason
    elif kind not in (nn.Linear, Conv1D) and kind.__name__ not in _LINEAR_FORWARDS:
        return f"{kind.__name__} is a subclass of {kind.__base__.__name__} that may compute something else"
    if _use(name, model) == READ:
        return f"{_class(model, name.rpartition('.')[0])} multiplies by its weight without calling it"
    if "forward" in vars(module):
        return "its forward is replaced on the instance (a hook of Accelerate's?); convert before dispatching"
    reasons = ((matrix, unsuitable(*sizes)) for matrix, sizes in _sizes(module).items())
    return next((f"{matrix}: {reason}" if matrix else reason for matrix, reason in reasons if reason), None)


def _recipe_of(name: str, module: nn.Module, recipe: Recipe | RecipeMap) -> str:
    """What a converted layer, or the experts, compute with, and what their shapes changed."""
    recipe = recipe_for(recipe, name)
    sizes, shapes = _sizes(module), ""
    changes = [change for matrix, size in sizes.items() for change in _changes(recipe, size, matrix and f"{matrix} ")]
    if not _is_linear(module):
        shapes = f" ({fused_experts(module)} × {' and '.join(f'{matrix} {k}→{n}' for matrix, (k, n) in sizes.items())})"
    return f"recipe {recipe.name}{shapes}{''.join(changes)}"


def _changes(recipe: Recipe, sizes: tuple[int, int], matrix: str) -> list[str]:
    """What a matrix's shape changes in a recipe."""
    fitted, changes = recipe.fitted(*sizes), []
    for name, features in zip(("fprop", "dgrad"), sizes, strict=True):
        before, after = (getattr(r, name).a.hadamard for r in (recipe, fitted))
        if before != after:
            changes.append(f", {matrix}{name} rotated by {after}, not {before}, which does not divide {features}")
    if recipe.basis != fitted.basis:
        rotations = f"{fitted.basis}, not {recipe.basis}"
        changes.append(f", {matrix}features rotated by {rotations}, which does not divide theirs")
    return changes


def _kept_by_user(name: str, choice: Choice) -> str | None:
    pattern = next((p for p in choice.skip if matches(p, name)), None)
    return None if pattern is None else f"skip pattern {pattern!r}"


def _block_positions(model: nn.Module, names) -> dict[str, tuple[int, int]]:
    """Linear name -> (index, count) of its block: its place in the outermost ModuleList that holds it."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    positions = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if (count := lists.get(".".join(parts[:depth]))) is not None:
                positions[name] = (int(parts[depth]), count)
                break
    return positions


def _kept_block(position: tuple[int, int] | None, choice: Choice) -> str | None:
    if position is None:
        return None
    index, count = position
    first, last = (
        round(keep * count) if isinstance(keep, float) else keep
        for keep in (choice.keep_bf16_first, choice.keep_bf16_last)
    )
    if index < first:
        return f"first {first} of {count} blocks in BF16"
    if index >= count - last:
        return f"last {last} of {count} blocks in BF16"
    return None


def summary(decisions: list[Decision]) -> str:
    """One line, such as "converted 14 of 15 linears and 2 of 2 modules of experts (lm_head: kept, output head)"."""
    kept = defaultdict(list)
    for decision in decisions:
        if not decision.converted:
            kept[decision.reason].append(decision)
    groups = [
        f"{', '.join(d.name for d in of) if len(of) < 3 else f'{len(of)} {_noun(of)}'}: kept, {reason}"
        for reason, of in kept.items()
    ]
    kinds = [[d for d in decisions if bool(d.experts) == fused] for fused in (False, True)]
    counts = [f"{sum(d.converted for d in of)} of {len(of)} {_noun(of)}" for of in kinds if of]
    line = f"converted {' and '.join(counts)}"
    return f"{line} ({'; '.join(groups)})" if groups else line


def _noun(decisions: list[Decision]) -> str:
    fused = {bool(decision.experts) for decision in decisions}
    return "layers" if len(fused) > 1 else "modules of experts" if True in fused else "linears"


def convert(model: nn.Module, choice: Choice, high_precision: str | None = None) -> list[Decision]:
    """Decide, convert in place, print the summary. The list is also kept as `model.nvfp4_decisions`.

    high_precision: as `NVFP4Linear.set_recipe` takes it.

    Raises:
        ValueError: as `decide`; or the model is converted already; or no backend runs the recipe there.
    """
    if any(isinstance(module, NVFP4Module) for module in model.modules()):
        recipe = next(iter(converted_modules(model).values())).recipe.name
        raise ValueError(
            f"this model is converted already (recipe {recipe!r}); use hf_nvfp4.use_recipe for another recipe, or "
            "build the model anew"
        )
    decisions = decide(model, choice)
    modules = dict(model.named_modules())
    recipes = {d.name: recipe_for(choice.recipe, d.name) for d in decisions if d.converted}
    device = next(modules[next(iter(recipes))].parameters()).device
    line = summary(decisions)
    for recipe in dict.fromkeys(recipes.values()):
        active = recipe.active(high_precision)
        line += f"; recipe {active.name}"
        if device.type != "meta":
            backend = backend_name(choice.backend, active, device)
            line += f", backend {backend}: {BACKENDS[backend].exactness(active)}"
    for name, recipe in recipes.items():
        _class_for(modules[name]).convert(modules[name], recipe, choice.backend, high_precision)
    model.nvfp4_decisions = decisions
    _tell_transformers(model)
    if os.environ.get("RANK", "0") == "0":
        print(f"hf_nvfp4: {line}", flush=True)
    return decisions


def _class_for(module: nn.Module) -> type[NVFP4Module]:
    if not _is_linear(module):
        return experts.experts_class(type(module))
    return NVFP4Conv1D if isinstance(module, Conv1D) else NVFP4Linear


def _tell_transformers(model: nn.Module) -> None:
    """Set what `from_pretrained` sets: some models then call their layers rather than multiply by their weights."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "get_text_config"):
            module.config._is_quantized = True


def set_high_precision(model: nn.Module, gemms: str | None) -> None:
    """Run "all" GEMMs of the converted layers in BF16, or the "forward" one, or (None) the recipe as it is.

    The choice is written into `model.config.quantization_config`, so that a checkpoint saved now says so.
    """
    for module in converted_modules(model).values():
        module.set_recipe(module.recipe, high_precision=gemms)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        config.high_precision = gemms
