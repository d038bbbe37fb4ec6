"""What is exported: a model, or a folder's files with a model without weights; and which of its layers are packed."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_nvfp4 import shards
from hf_nvfp4.convert import decide, fused_experts
from hf_nvfp4.data import InputError
from hf_nvfp4.integration import QUANT_METHOD, NVFP4TrainingConfig
from hf_nvfp4.language import Recipe, recipe_for
from hf_nvfp4.layouts import BLOCK
from hf_nvfp4.linear import NVFP4Layer
from hf_nvfp4.packed import PackedLinear
from hf_nvfp4.weights import why_not


@dataclass(frozen=True)
class Source:
    """Where weights come from: a folder's files, or a model in memory (state). model: with or without its weights."""

    model: nn.Module
    folder: Path | None
    files: dict | None
    state: dict[str, Tensor] | None
    config: dict

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        if self.state is not None:
            return {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        return {name: entry.shape for name, entry in shards.entries(self.files).items()}

    def fused_experts(self) -> int:
        """How many modules of fused experts the model has."""
        return sum(fused_experts(module) > 0 for module in self.model.modules())

    def stream(self, wanted=None):
        """(name, tensor), one after the other."""
        if self.state is None:
            return shards.stream(self.files, wanted)
        return ((n, t.detach()) for n, t in self.state.items() if wanted is None or n in wanted)


def source_of(model_or_dir) -> Source:
    if isinstance(model_or_dir, nn.Module):
        return _source_of_model(model_or_dir)
    folder = Path(model_or_dir)
    files = shards.shard_files(folder)
    config = shards.read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise InputError(
            f"{folder} is quantized by {method} already. Export the checkpoint that it was made from; or load it with "
            "from_pretrained(..., quantization_config=NVFP4TrainingConfig(...)) and export the model."
        )
    return Source(_skeleton(folder), folder, files, None, config)


def _skeleton(folder: Path) -> nn.Module:
    """The model without weights, on the meta device. Never runs code from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder} is no causal LM that this Transformers knows ({error}).") from error


def _source_of_model(model: nn.Module) -> Source:
    if not hasattr(model, "config"):
        raise InputError(f"{type(model).__name__} has no config; give a Transformers model or its folder.")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError(
            "this model is packed for inference: the weights that it was made from are gone. Export the checkpoint "
            "that was trained, or the model loaded from it without inference."
        )
    state = model.state_dict()
    if absent := [name for name, tensor in state.items() if tensor.is_meta or type(tensor.data) is not Tensor]:
        raise InputError(
            f"{absent[0]} and {len(absent) - 1} others are not whole tensors in this process (sharded or offloaded). "
            "Save the model with save_pretrained and export the folder."
        )
    tied = shards.shared_names(state)
    state = _as_saved(model, {name: tensor for name, tensor in state.items() if name not in tied})
    saved = getattr(model, "name_or_path", "")
    folder = Path(saved) if saved and Path(saved).is_dir() else None
    return Source(model, folder, None, state, json.loads(model.config.to_json_string()))


def _as_saved(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that `save_pretrained` gives it."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def packed_layers(source: Source, recipe, activations: bool) -> tuple[dict[str, Recipe], list[str], str]:
    """Recipes of the layers to pack, by name; names of the linear layers that stay; the recipes' name."""
    linears = dict(source.model.named_modules())
    converted = {n: module for n, module in linears.items() if isinstance(module, NVFP4Layer)}
    if converted and recipe is None:
        layers = {name: _packable(name, module).train_recipe for name, module in converted.items()}
    else:
        config = recipe if isinstance(recipe, NVFP4TrainingConfig) else _config(source, recipe)
        chosen = converted or [d.name for d in decide(source.model, config.choice()) if d.converted and not d.experts]
        found = {name: recipe_for(config.recipe, name) for name in chosen}
        to_pack = {name: _packable(name, linears[name]) for name, one in found.items() if one is not None}
        layers = {
            name: found[name].fitted(linear.in_features, linear.out_features).active(config.high_precision)
            for name, linear in to_pack.items()
        }
    for name, found in layers.items():
        if reason := why_not(found, activations):
            raise InputError(
                f"recipe {found.name!r} ({name}): {reason}. Export with format='plain' for a BF16 checkpoint, or give "
                "recipe='nvfp4' to quantize the weights otherwise than in training."
            )
    if not layers:
        raise InputError("there is nothing to pack: only fused experts are converted. Export with format='plain'.")
    names = dict.fromkeys(found.name for found in layers.values())
    others = [name for name, module in linears.items() if name not in layers and _is_kept(module)]
    return layers, others, " and ".join(names)


def _packable(name: str, module: nn.Module) -> nn.Linear:
    """The layer; InputError for one whose weight lies otherwise than that of nn.Linear."""
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"{name} is of class {type(module).__name__}, whose weight is transposed: packed formats can't say so. "
            "Export with format='plain' for a BF16 checkpoint."
        )
    return module


def _is_kept(module: nn.Module) -> bool:
    """Whether an engine may take it for a linear layer, or for experts: it has matrices, and is no embedding."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Embedding)


def _config(source: Source, recipe) -> NVFP4TrainingConfig:
    saved = source.config.get("quantization_config")
    if saved is not None and recipe is None:
        return NVFP4TrainingConfig(**saved)
    if recipe is None:
        raise InputError(
            "this model has no quantization_config of hf_nvfp4: it was not trained in NVFP4. Give recipe='nvfp4', say, "
            "to quantize it now (post-training), or format='plain'."
        )
    return NVFP4TrainingConfig(recipe=recipe)


def check_names(source: Source, names: dict, layers: dict) -> None:
    modules = dict(source.model.named_modules())
    for layer in layers:
        shape = (modules[layer].out_features, modules[layer].in_features)
        have = names.get(f"{layer}.weight")
        if have is None:
            raise InputError(
                f"{layer}.weight is not in the checkpoint ({len(names)} tensors, such as {', '.join(list(names)[:3])})."
                " A shard is missing from its index, or the weights have other names there: load the model, which "
                "renames them, and export that."
            )
        if have != shape:
            raise InputError(f"{layer}.weight is {list(have)} and config.json says {list(shape)}. They don't belong.")
    expected = set(source.model.state_dict())
    tied = set(getattr(source.model, "all_tied_weights_keys", None) or ())
    missing = sorted(expected - names.keys() - tied)
    if missing and names.keys() <= expected:  # else they have other names in files, which Transformers maps to these
        raise InputError(
            f"the checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]}. Its files are "
            "incomplete: fetch or save it again."
        )


def kept_on_disk(source: Source, names: dict, layers: dict, kept: list[str]) -> list[str]:
    """`kept`, and matrices that files hold under other names than the model: "….experts.*" for single experts."""
    embeddings = {name for name, module in source.model.named_modules() if isinstance(module, nn.Embedding)}
    known = {*layers, *kept, *embeddings}
    found = [n.removesuffix(".weight") for n, shape in names.items() if len(shape) > 1 and n.endswith(".weight")]
    others = [name for name in found if name not in known]
    others = [f"{n.partition('.experts.')[0]}.experts.*" if ".experts." in n else n for n in others]
    return list(dict.fromkeys([*kept, *others]))


def estimate(names: dict, layers: dict) -> int:
    """Bytes of the result, from above."""
    total = 0
    for name, shape in names.items():
        size = torch.Size(shape).numel()
        packed = name.removesuffix(".weight") in layers and name.endswith(".weight")
        total += (size * 9 // BLOCK + 64) if packed else 4 * size
    return total


def fp32_names(model: nn.Module) -> set[str]:
    """Components of names of parameters that the model wants in FP32."""
    attributes = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {name for attribute in attributes for name in (getattr(model, attribute, None) or ())}
