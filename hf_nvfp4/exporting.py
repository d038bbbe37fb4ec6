"""Packed NVFP4 checkpoints for other engines, and plain BF16 ones, from a trained model or its folder.

Knows which layers a recipe quantizes and how; layouts.py knows the formats, shards.py the files. Weights pass one at
a time: memory holds about one shard of the result.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_nvfp4 import shards
from hf_nvfp4.casts import Cast, unknown
from hf_nvfp4.convert import decide
from hf_nvfp4.data import InputError
from hf_nvfp4.integration import QUANT_METHOD, NVFP4TrainingConfig
from hf_nvfp4.language import Recipe, recipe_for
from hf_nvfp4.layouts import BLOCK, LAYOUTS, MODELOPT, modelopt_file
from hf_nvfp4.linear import NVFP4Linear
from hf_nvfp4.reference import QuantizedTensor, pack, prepare, quantize_rows

FORMATS = (*LAYOUTS, "plain")
# Layers that engines compute as one, under one tensor scale (vLLM: "packed modules"; TensorRT-LLM and SGLang too).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FUSED_CHOICES = ("shared", "own")
# What is copied from the model's folder besides weights and config; never code, never pickles.
COPIED = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "*processor_config.json", "generation_config.json", "LICENSE*"),
)
# Elements of a weight that are quantized at once: what this takes beside the weight does not grow with it.
ELEMENTS = 2**20


@dataclass
class ExportSummary:
    """What an export wrote.

    packed, kept: bytes in the result and parameters of each tensor, by name of the parameter.
    requantized: group of fused layers -> how far its weights are from those of training, ‖new - trained‖ / ‖trained‖.
    notes: sentences about what the folder lacks or an engine will do differently.
    """

    path: Path
    format: str
    recipe: str
    activations: bool
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    requantized: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict]:
        """Packed tensors, the others, and all: tensors, parameters, bytes, bits a parameter, share of BF16's bytes."""
        rows = []
        for name, part in (("packed", self.packed), ("BF16", self.kept), ("all", self.packed | self.kept)):
            size, parameters = (sum(column) for column in zip(*part.values(), strict=True)) if part else (0, 0)
            share = size / (2 * parameters) if parameters else 0.0
            row = {"tensors": len(part), "parameters": parameters, "bytes": size, "bits": 16 * share, "share": share}
            rows.append({"name": name, **row})
        return rows

    def table(self) -> str:
        """The rows as a Markdown table."""
        lines = ["| | tensors | parameters | bytes | bits per weight | share of BF16 |", "|:--|--:|--:|--:|--:|--:|"]
        for r in self.rows():
            numbers = f"{r['tensors']} | {r['parameters']:,} | {r['bytes']:,} | {r['bits']:.3f} | {r['share']:.3f}"
            lines.append(f"| {r['name']} | {numbers} |")
        return "\n".join(lines)

    def describe(self) -> str:
        """What was done in words, a line each; the table is apart."""
        how = f"{'W4A4' if self.activations else 'W4A16'}, weights as recipe {self.recipe} multiplies them"
        lines = [f"{self.path}: {self.format}" + ("" if self.format == "plain" else f", {how}")]
        if self.requantized:
            worst = max(self.requantized, key=self.requantized.get)
            lines.append(
                f"{len(self.requantized)} groups of layers that engines fuse share one tensor scale now; the scales of "
                f"their blocks were rounded again, which moves their weights by {self.requantized[worst]:.1%} at most "
                f"({worst}). fused='own' keeps every weight exactly, for engines that don't fuse."
            )
        return "\n".join(lines + self.notes)


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

    def stream(self, wanted=None):
        """(name, tensor), one after the other."""
        if self.state is None:
            return shards.stream(self.files, wanted)
        return ((n, t.detach()) for n, t in self.state.items() if wanted is None or n in wanted)


@torch.no_grad()
def export(
    model_or_dir,
    out: str | Path,
    format: str = "compressed-tensors",
    *,
    activations: bool | None = None,
    calibration: Iterable | None = None,
    recipe: str | dict | Recipe | NVFP4TrainingConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fused: str = "shared",
) -> ExportSummary:
    """Write a trained model as a checkpoint that vLLM, SGLang, TensorRT-LLM and Transformers load.

    The weights' codes and block scales are, bit for bit, what the training forward multiplied; their FP32 tensor scale
    too in ModelOpt's layout. compressed-tensors stores its inverse, which FP32 may not have: then one unit in the last
    place (6e-8) is lost. Layers that engines fuse are the exception, see `fused`.

    Args:
        model_or_dir: a model, or the folder of a checkpoint in safetensors. A folder's weights are read one at a time.
        out: the folder to write; it must not exist. It appears complete or not at all.
        format: "compressed-tensors" (nvfp4-pack-quantized), "modelopt", or "plain": BF16 without quantization_config.
        activations: whether engines are to quantize activations too (W4A4), which needs calibration. None: if there is
            calibration. False: weight-only (W4A16).
        calibration: batches to measure inputs' largest magnitudes on: input_ids [B, T] (int64), or a dict of a
            model's arguments, without padding. Loads the model, if a folder was given.
        recipe: how to quantize, for checkpoints that were not trained in NVFP4, or instead of how they were: a recipe,
            its name, or an NVFP4TrainingConfig, which says what to skip as well.
        dtype: what training rounded weights to before it cast them (autocast's dtype, or the model's own), and the
            dtype of all that is not packed.
        fused: "shared": q/k/v and gate/up projections have one tensor scale, as engines take them to have (vLLM uses
            the largest for all three without correcting their block scales). Codes stay, block scales are rounded
            again, and the summary says how far that moves the weights. "own": all stay exact; for Transformers.

    Returns:
        An `ExportSummary`; `table()` and `describe()` are for people.

    Raises:
        InputError (a ValueError): a recipe whose forward is not NVFP4, a checkpoint that is damaged or lacks something,
            NaN in weights, `out` exists, no space. Nothing is left then.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if fused not in FUSED_CHOICES:
        raise unknown("choice of fused", fused, FUSED_CHOICES)
    if activations is None:
        activations = calibration is not None and format != "plain"
    if activations and (calibration is None or format == "plain"):
        raise InputError(
            "activations=True: 4-bit activations need "
            + ("a packed format, not 'plain'" if format == "plain" else "calibration=, some batches of input_ids")
            + ". Or leave activations out for a weight-only export."
        )
    out = Path(out)
    with shards.Folder(out) as folder:
        source = _source(model_or_dir)
        names = source.names()
        layers, kept, name = {}, [], "none"
        if format != "plain":
            layers, kept, name = _layers(source, recipe, activations)
            _check_names(source, names, layers)
            kept = _kept_on_disk(source, names, layers, kept)
        summary = ExportSummary(out, format, name, activations)
        folder.need(_estimate(names, layers))
        writer = _Writer(folder, LAYOUTS.get(format), source, summary, dtype)
        inputs = _input_amax(source, layers, calibration, dtype) if activations else {}
        groups = _groups(layers, summary) if fused == "shared" else {}
        writer.run(names, layers, inputs, groups)
        if other := {str(one.fprop.a) for one in layers.values() if activations and one.fprop.a != Cast()}:
            summary.notes.append(
                f"Training cast activations as {' and '.join(sorted(other))}; engines round each 1×16 block to "
                "nearest, its largest magnitude becoming 6, under the scale that calibration found."
            )
        _write_configs(folder, source, summary, kept, dtype)
    return summary


# ---- What is exported --------------------------------------------------------------------------------------


def _source(model_or_dir) -> Source:
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


def _layers(source: Source, recipe, activations: bool) -> tuple[dict[str, Recipe], list[str], str]:
    """Recipes of the layers to pack, by name; names of the linear layers that stay; the recipes' name."""
    linears = dict(source.model.named_modules())
    converted = {n: module for n, module in linears.items() if isinstance(module, NVFP4Linear)}
    if converted and recipe is None:
        layers = {name: module.train_recipe for name, module in converted.items()}
    else:
        config = recipe if isinstance(recipe, NVFP4TrainingConfig) else _config(source, recipe)
        chosen = converted or [d.name for d in decide(source.model, config.choice()) if d.converted]
        found = {name: recipe_for(config.recipe, name) for name in chosen}
        layers = {
            name: one.fitted(linears[name].in_features, linears[name].out_features).active(config.high_precision)
            for name, one in found.items()
            if one is not None
        }
    for name, found in layers.items():
        if reason := why_not(found, activations):
            raise InputError(
                f"recipe {found.name!r} ({name}): {reason}. Export with format='plain' for a BF16 checkpoint, or give "
                "recipe='nvfp4' to quantize the weights otherwise than in training."
            )
    names = dict.fromkeys(found.name for found in layers.values())
    others = [name for name, module in linears.items() if name not in layers and _is_kept(module)]
    return layers, others, " and ".join(names)


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


def why_not(recipe: Recipe, activations: bool = False) -> str | None:
    """Why what a recipe's forward multiplies is no packed NVFP4 weight, or None. activations: nor NVFP4 activations."""
    x, w = recipe.fprop
    if w.format != "nvfp4":
        return f"its forward multiplies weights in {w.format}, not NVFP4"
    if recipe.basis or w.hadamard:
        return f"its forward multiplies weights rotated by {recipe.basis or w.hadamard}, which engines don't undo"
    if w.rounding != "nearest" or w.outer != "tensor":
        return f"its forward casts weights as {w}; the formats hold one fixed value of each, under one tensor scale"
    if recipe.smooth or recipe.split == "outliers":
        return f"its forward multiplies weights {'scaled by' if recipe.smooth else 'in high precision with parts of'} x"
    if x.format != "nvfp4" and (activations or not x.block_format.high_precision):
        return f"its forward multiplies activations in {x.format}, not NVFP4"
    return None


def _check_names(source: Source, names: dict, layers: dict) -> None:
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


def _kept_on_disk(source: Source, names: dict, layers: dict, kept: list[str]) -> list[str]:
    """`kept`, and matrices that files hold under other names than the model: "….experts.*" for single experts."""
    embeddings = {name for name, module in source.model.named_modules() if isinstance(module, nn.Embedding)}
    known = {*layers, *kept, *embeddings}
    found = [n.removesuffix(".weight") for n, shape in names.items() if len(shape) > 1 and n.endswith(".weight")]
    others = [name for name in found if name not in known]
    others = [f"{n.partition('.experts.')[0]}.experts.*" if ".experts." in n else n for n in others]
    return list(dict.fromkeys([*kept, *others]))


def _estimate(names: dict, layers: dict) -> int:
    """Bytes of the result, from above."""
    total = 0
    for name, shape in names.items():
        size = torch.Size(shape).numel()
        packed = name.removesuffix(".weight") in layers and name.endswith(".weight")
        total += (size * 9 // BLOCK + 64) if packed else 4 * size
    return total


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- Calibration -------------------------------------------------------------------------------------------


def _input_amax(source: Source, layers: dict, calibration: Iterable, dtype: torch.dtype) -> dict[str, Tensor]:
    """The largest magnitude of each layer's input over the batches: FP32 scalars on the CPU."""
    from transformers import AutoModelForCausalLM

    model = source.model
    if source.state is None:
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, trust_remote_code=False).to(_device())
    device, found, modules = next(model.parameters()).device, {}, dict(model.named_modules())

    def watch(name):
        def hook(module, args):
            amax = args[0].detach().abs().amax().float()
            found[name] = torch.maximum(found[name], amax) if name in found else amax

        return modules[name].register_forward_pre_hook(hook)

    was_training = model.training
    model.eval()
    hooks = [watch(name) for name in layers]
    try:
        for batch in tqdm(calibration, desc="calibrating", unit="batch", leave=False, disable=None):
            batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            batch.pop("labels", None)
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    unseen = [name for name in layers if name not in found]
    if unseen:
        raise InputError(
            f"calibration never reached {unseen[0]} and {len(unseen) - 1} others. Give batches of input_ids."
        )
    for name, amax in found.items():
        if not 0 < float(amax) < float("inf"):
            raise InputError(f"the inputs of {name} are all zero or not finite in calibration ({float(amax):g}).")
    return {name: amax.cpu() for name, amax in found.items()}


# ---- Weights -----------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, recipe: Recipe, name: str = "weight") -> QuantizedTensor:
    """[N, K] in the training's compute dtype, packed as `recipe`'s forward casts it. InputError if not finite."""
    cast = recipe.fprop.b
    _, amax, _ = prepare(weight, cast)
    if not torch.isfinite(amax):
        raise InputError(f"{name} holds NaN or inf: the training diverged, or the file is damaged. Export another.")
    parts = [pack(quantize_rows(weight[rows].contiguous(), amax, None, cast), cast) for rows in _slices(weight.shape)]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return QuantizedTensor(codes, scales, parts[0].tensor_scale, cast)


def _slices(shape: tuple[int, int]) -> list[slice]:
    """Rows of [N, K] in whole blocks, about `ELEMENTS` elements a slice."""
    rows = max(BLOCK, ELEMENTS // shape[1] // BLOCK * BLOCK)
    return [slice(row, row + rows) for row in range(0, shape[0], rows)]


def _tensor_scale(weight: Tensor, recipe: Recipe) -> Tensor:
    """The tensor scale that `quantize_weight` gives it; 0 if all is zero."""
    cast = recipe.fprop.b
    _, amax, _ = prepare(weight, cast)
    scale = quantize_rows(weight[:BLOCK].contiguous(), amax, None, cast).tensor_scale
    return torch.where(amax == 0, 0.0, scale).cpu()


def under_scale(weight: QuantizedTensor, tensor_scale: Tensor) -> QuantizedTensor:
    """The same codes under another, larger tensor scale: block scales are rounded to E4M3 again.

    Nearer to the trained values than quantizing the weight anew: 2 to 4% of their norm against 7 to 12%, measured on
    N(0, 1), since elements keep their places on the grid.
    """
    scales = weight.scales.float() * (weight.tensor_scale / tensor_scale)
    return QuantizedTensor(weight.codes, scales.to(weight.scales.dtype), tensor_scale, weight.cast)


def _groups(layers: dict[str, Recipe], summary: ExportSummary) -> dict[str, list[str]]:
    """Fused layers, "model.layers.0.self_attn.q_proj/k_proj/v_proj" -> names; a note if one is packed only in part."""
    by_parent = defaultdict(dict)
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        by_parent[parent][leaf] = name
    groups = {}
    partial = []
    for parent, leaves in by_parent.items():
        for fused in FUSED:
            members = [leaves[leaf] for leaf in fused if leaf in leaves]
            if len(members) == len(fused):
                groups[f"{parent}.{'/'.join(fused)}"] = members
            elif members:
                partial.append(f"{parent}.{'/'.join(fused)}")
    if partial:
        summary.notes.append(
            f"{len(partial)} groups of layers that engines fuse are packed in part ({partial[0]}); vLLM refuses such a "
            "checkpoint unless all of a group or none is in the ignore list. Transformers does not mind."
        )
    return groups


@dataclass
class _Writer:
    """Packs or rounds each tensor of a source into a folder."""

    folder: shards.Folder
    layout: object
    source: Source
    summary: ExportSummary
    dtype: torch.dtype

    def run(self, names: dict, layers: dict[str, Recipe], inputs: dict[str, Tensor], groups: dict[str, list[str]]):
        """All of them. groups: layers that are to share a tensor scale."""
        scales = self._shared_scales(layers, groups)
        keep_fp32 = _fp32_names(self.source.model)
        errors = defaultdict(lambda: [0.0, 0.0])
        group_of = {member: group for group, members in groups.items() for member in members}
        for members in groups.values():
            if inputs:
                shared = torch.stack([inputs[member] for member in members]).amax()
                inputs.update(dict.fromkeys(members, shared))
        for name, tensor in tqdm(
            self.source.stream(), total=len(names), desc="exporting", unit="tensor", leave=False, disable=None
        ):
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in layers:
                weight = quantize_weight(self._on_device(tensor), layers[layer], name)
                if (group := group_of.get(layer)) is not None:
                    shared = under_scale(weight, scales[group].to(weight.tensor_scale.device))
                    _add_error(errors[group], shared, weight)
                    weight = shared
                stored = self.layout.store(weight, inputs.get(layer))
                for part, value in stored.items():
                    self.folder.add(f"{layer}.{part}", value)
                self.summary.packed[name] = (sum(value.nbytes for value in stored.values()), tensor.numel())
            else:
                floating = tensor.is_floating_point() and not any(part in keep_fp32 for part in name.split("."))
                tensor = tensor.to(self.dtype) if floating else tensor
                self.folder.add(name, tensor.clone() if self.source.state is not None else tensor)
                self.summary.kept[name] = (tensor.nbytes, tensor.numel())
        moved = {group: (square / total) ** 0.5 for group, (square, total) in errors.items() if square}
        self.summary.requantized |= moved

    def _on_device(self, tensor: Tensor) -> Tensor:
        """In the compute dtype; of a folder, on the GPU if there is one: the numerics are the same there."""
        device = _device() if self.source.state is None else tensor.device
        return tensor.to(device, self.dtype)

    def _shared_scales(self, layers: dict[str, Recipe], groups: dict[str, list[str]]) -> dict[str, Tensor]:
        """The largest tensor scale of each group: a pass over their weights before the others'."""
        group_of = {f"{member}.weight": group for group, members in groups.items() for member in members}
        largest: dict[str, Tensor] = {}
        if not group_of:
            return largest
        reading = self.source.stream(group_of)
        for name, tensor in tqdm(
            reading, total=len(group_of), desc="scales of fused layers", unit="tensor", leave=False, disable=None
        ):
            scale = _tensor_scale(self._on_device(tensor), layers[name.removesuffix(".weight")])
            group = group_of[name]
            largest[group] = torch.maximum(largest[group], scale) if group in largest else scale
        return {group: torch.where(scale == 0, 1.0, scale) for group, scale in largest.items()}


def _add_error(total: list[float], new: QuantizedTensor, trained: QuantizedTensor) -> None:
    for part in _slices(new.shape):
        a, b = (
            QuantizedTensor(t.codes[part], t.scales[part], t.tensor_scale, t.cast).dequantize() for t in (new, trained)
        )
        total[0] += float((a - b).square().sum(dtype=torch.float64))
        total[1] += float(b.square().sum(dtype=torch.float64))


def _fp32_names(model: nn.Module) -> set[str]:
    """Components of names of parameters that the model wants in FP32."""
    attributes = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {name for attribute in attributes for name in (getattr(model, attribute, None) or ())}


# ---- Everything else -----------------------------------------------------------------------------------------


def _write_configs(
    folder: shards.Folder, source: Source, summary: ExportSummary, kept: list[str], dtype: torch.dtype
) -> None:
    """config.json and its like, and what is copied."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "auto_map", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    layout = LAYOUTS.get(summary.format)
    if layout is not None:
        config["quantization_config"] = layout.quantization_config(kept, summary.activations)
    if layout is MODELOPT:
        folder.write_json("hf_quant_config.json", modelopt_file(kept, summary.activations))
    folder.write_json("config.json", config)
    copied = set()
    if source.folder is not None:
        for file in sorted(source.folder.iterdir()):
            if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in COPIED):
                folder.copy(file)
                copied.add(file.name)
    generation = getattr(source.model, "generation_config", None)
    if source.state is not None and generation is not None:
        generation.save_pretrained(folder.beside)
    if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in copied):
        summary.notes.append("There was no tokenizer to copy; save one there: tokenizer.save_pretrained(out).")
