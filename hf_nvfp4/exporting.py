"""Packed NVFP4 checkpoints for other engines, and plain BF16 ones, from a trained model or its folder.

Says what happens in which order; sources.py knows which layers are packed, weights.py how, layouts.py the formats,
shards.py the files. Weights pass one at a time: memory holds about one shard of the result.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hf_nvfp4 import shards
from hf_nvfp4.casts import Cast, unknown
from hf_nvfp4.data import InputError
from hf_nvfp4.integration import NVFP4TrainingConfig
from hf_nvfp4.language import Recipe
from hf_nvfp4.layouts import LAYOUTS, MODELOPT, Layout, modelopt_file
from hf_nvfp4.sources import Source, check_names, estimate, fp32_names, kept_on_disk, packed_layers, source_of
from hf_nvfp4.weights import quantize_weight, squares, tensor_scale_of, under_scale

FORMATS = (*LAYOUTS, "plain")
# Layers that engines compute as one, under one tensor scale (vLLM: "packed modules"; TensorRT-LLM and SGLang too).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FUSED_CHOICES = ("shared", "own")
# What is copied from the model's folder besides weights and config; never code, never pickles.
COPIED = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "*processor_config.json", "generation_config.json", "LICENSE*"),
)


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
        for name, part in (("packed", self.packed), ("others", self.kept), ("all", self.packed | self.kept)):
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
    place (1e-7) is lost. Layers that engines fuse are the exception, see `fused`.

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
        source = source_of(model_or_dir)
        names = source.names()
        layers, kept, name = {}, [], "none"
        if format != "plain":
            layers, kept, name = packed_layers(source, recipe, activations)
            kept = kept_on_disk(source, names, layers, kept)
        check_names(source, names, layers)
        summary = ExportSummary(out, format, name, activations)
        folder.need(estimate(names, layers))
        writer = _Writer(folder, LAYOUTS.get(format), source, summary, dtype)
        inputs = _input_amax(source, layers, calibration, dtype) if activations else {}
        groups = _groups(layers, summary) if fused == "shared" else {}
        writer.run(names, layers, inputs, groups)
        if layers and (experts := source.fused_experts()):
            summary.notes.append(
                f"The fused experts of {experts} modules stay in {str(dtype).removeprefix('torch.')}: they are not "
                "packed yet."
            )
        if other := {str(one.fprop.a) for one in layers.values() if activations and one.fprop.a != Cast()}:
            summary.notes.append(
                f"Training cast activations as {' and '.join(sorted(other))}; engines round each 1×16 block to "
                "nearest, its largest magnitude becoming 6, under the scale that calibration found."
            )
        _write_configs(folder, source, summary, kept, dtype)
    return summary


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
    layout: Layout | None
    source: Source
    summary: ExportSummary
    dtype: torch.dtype
    rounded: int = 0

    def run(self, names: dict, layers: dict[str, Recipe], inputs: dict[str, Tensor], groups: dict[str, list[str]]):
        """All of them. groups: layers that are to share a tensor scale."""
        scales = self._shared_scales(layers, groups)
        keep_fp32 = fp32_names(self.source.model)
        errors = defaultdict(lambda: (0.0, 0.0))
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
                self.rounded += tensor.dtype != self.dtype
                weight = quantize_weight(self._on_device(tensor), layers[layer], name)
                if (group := group_of.get(layer)) is not None:
                    shared = under_scale(weight, scales[group].to(weight.tensor_scale.device))
                    errors[group] = [a + b for a, b in zip(errors[group], squares(shared, weight), strict=True)]
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
        if self.rounded:
            self.summary.notes.append(
                f"Weights were rounded to {str(self.dtype).removeprefix('torch.')} before they were packed, as "
                "autocast does in training; if that computed in another dtype, give that as dtype."
            )

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
            scale = tensor_scale_of(self._on_device(tensor), layers[name.removesuffix(".weight")])
            group = group_of[name]
            largest[group] = torch.maximum(largest[group], scale) if group in largest else scale
        return {group: torch.where(scale == 0, 1.0, scale) for group, scale in largest.items()}


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
