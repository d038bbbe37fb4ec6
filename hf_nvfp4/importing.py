"""NVFP4 weights through Transformers' loading: packed ones checked first, then dequantized exactly or kept as they are;
plain ones packed as they arrive, for inference.

Knows Transformers' weight conversions and where a checkpoint says what it is; the layouts are layouts.py's.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_nvfp4.data import InputError
from hf_nvfp4.layouts import Layout, layout_of
from hf_nvfp4.linear import NVFP4Linear
from hf_nvfp4.packed import PackedLinear
from hf_nvfp4.reference import QuantizedTensor
from hf_nvfp4.shards import Entry, entries, open_shard, read_json, shard_files
from hf_nvfp4.weights import quantize_weight

# Last parts of names of tensors that change what a weight is, in ways that plain NVFP4 has not.
FOREIGN = ("pre_quant_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


def packed_layout(files: list[str] | None, own_method: str) -> Layout | None:
    """The layout of a checkpoint's files, by the config.json or hf_quant_config.json beside them; None: not packed.

    own_method: the quant_method of checkpoints that hold plain weights all the same.

    Raises:
        InputError: another quantization than ours to read, or packed weights without a word about it.
    """
    if not files or not str(files[0]).endswith(".safetensors"):
        return None
    folder = Path(files[0]).parent
    described = [
        read_json(folder / name).get("quantization_config") if name == "config.json" else read_json(folder / name)
        for name in ("config.json", "hf_quant_config.json")
        if (folder / name).exists()
    ]
    described = [config for config in described if config and config.get("quant_method") != own_method]
    if described:
        return layout_of(described[0])
    if not Path(files[0]).exists():
        return None
    with open_shard(Path(files[0])) as shard:
        suspicious = [name for name in shard.keys() if name.endswith(("weight_packed", "weight_scale"))]
    if suspicious:
        raise InputError(
            f"{folder} has {suspicious[0]}, of a quantized checkpoint, but neither its config.json nor an "
            "hf_quant_config.json says of which kind. Fetch it again with all its files."
        )
    return None


def check_packed(files: list[str], layout: Layout, model: nn.Module) -> list[str]:
    """The names of the layers whose weights are packed.

    Reads the files' headers and the packed weights' scales, one at a time.

    Raises:
        InputError: unless the files hold a weight for each linear layer of the model, packed as `layout` says or plain.
    """
    described = shard_files(Path(files[0]).parent)  # in a cache of the Hub too, its index lies beside the shards
    given = {Path(file): None for file in files}
    found = entries(described if described.keys() == given.keys() else given)
    for name in found:
        if name.rpartition(".")[2] in FOREIGN:
            raise InputError(
                f"the checkpoint has {name}: its weights are not codes and scales alone, which is what hf_nvfp4 reads. "
                "Load it without NVFP4TrainingConfig, or train from the plain checkpoint that it was made from."
            )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed = _packed(found, layout)
    for layer, parts in packed.items():
        if (linear := linears.get(layer)) is None:
            raise InputError(
                f"the checkpoint has packed weights of {layer}, which is no linear layer of {type(model).__name__} "
                "(fused experts can't be read yet), or has another name there."
            )
        layout.check(layer, {part: (e.dtype, e.shape) for part, e in parts.items()}, tuple(linear.weight.shape))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    absent = [name for name in linears if name not in packed and not {f"{name}.weight"} & (found.keys() | tied)]
    if packed and absent:
        raise InputError(
            f"the checkpoint lacks the weights of {len(absent)} of {len(linears)} linear layers, such as {absent[0]}. "
            "A shard is missing, or it is another model's: fetch it again."
        )
    _check_scales(files, layout, packed)
    return list(packed)


def _packed(found: dict[str, Entry], layout: Layout) -> dict[str, dict[str, Entry]]:
    """Layer -> part -> entry of all that is packed: what has any part beside a plain weight."""
    layers: dict[str, dict[str, Entry]] = {}
    for name, entry in found.items():
        layer, _, part = name.rpartition(".")
        if part in layout.parts:
            layers.setdefault(layer, {})[part] = entry
    return {
        layer: parts
        for layer, parts in layers.items()
        if len(parts) > 1 or layout.codes not in parts or parts[layout.codes].dtype == "U8"
    }


def _check_scales(files: list[str], layout: Layout, packed: dict) -> None:
    scales = (layout.scales, layout.tensor_scale, layout.input_scale)
    wanted = {f"{layer}.{part}": (layer, part) for layer, parts in packed.items() for part in parts if part in scales}
    for file in files:
        with open_shard(Path(file)) as shard:
            for name in shard.keys():
                if name in wanted:
                    layer, part = wanted[name]
                    layout.check_values(layer, part, shard.get_tensor(name))


class _Read(ConversionOps):
    """The tensors of one weight -> the weight, in its parameter's dtype; or a packed layer for its NVFP4Linear.

    activations: of the packed layer; None: the weight is wanted.
    """

    # Transformers does not cast what is given to an operation that has one.
    hf_quantizer = True

    def __init__(self, layout: Layout, activations: bool | None):
        self.layout, self.activations = layout, activations

    def convert(
        self, input_dict: dict, *, full_layer_name: str, model: nn.Module, missing_keys: set[str], **kwargs
    ) -> dict[str, Tensor]:
        """input_dict: source pattern -> [tensor]."""
        parts = {pattern.removesuffix("$"): tensors for pattern, tensors in input_dict.items()}
        parts = {part: found[0] if isinstance(found, list) else found for part, found in parts.items()}
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        if self.layout.scales not in parts:
            return {full_layer_name: parts["weight"].to(dtype)}
        weight = self.layout.read(parts)
        if self.activations is None:
            return {full_layer_name: weight.dequantize(torch.float32).to(dtype)}
        _put(model, full_layer_name, weight, self.activations, missing_keys)
        return {}


class Pack(ConversionOps):
    """Plain weights -> those of NVFP4Linears as packed layers in their places, the others as they are.

    problems: where an error is put, to be raised after loading: Transformers would log it and raise another.
    """

    def __init__(self, activations: bool, problems: list[InputError]):
        self.activations, self.problems = activations, problems

    def convert(self, input_dict: dict, *, model: nn.Module, missing_keys: set[str], **kwargs) -> dict[str, Tensor]:
        """input_dict: the parameter's name -> [tensor]."""
        others = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            if not is_to_be_packed(model, name):
                others[name] = found
                continue
            linear = model.get_submodule(name.removesuffix(".weight"))
            try:
                if weight.shape != linear.weight.shape:
                    have, wanted = list(weight.shape), list(linear.weight.shape)
                    raise InputError(f"{name} is {have}, and {wanted} in the model. They don't belong together.")
                q = quantize_weight(weight, linear.train_recipe, name)
            except InputError as error:
                self.problems.append(error)
                missing_keys.discard(name)
                continue
            _put(model, name, q, self.activations, missing_keys)
        return others


def is_to_be_packed(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight that `Pack` packs."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(layer), NVFP4Linear)


def _put(model: nn.Module, name: str, weight: QuantizedTensor, activations: bool, missing_keys: set[str]) -> None:
    """The packed layer of a weight that has arrived, in its layer's place."""
    layer = name.removesuffix(".weight")
    linear = model.get_submodule(layer)
    packed = PackedLinear.holding(weight, linear, activations)
    packed.bias = linear.bias  # the very parameter, loaded or not yet
    model.set_submodule(layer, packed)
    missing_keys.discard(name)


def converter(layout: Layout, activations: bool | None = None) -> WeightConverter:
    """What makes Transformers load packed weights of a layout into plain ones, or, with `activations`, keep them."""
    return WeightConverter([f"{part}$" for part in layout.parts], "weight", [_Read(layout, activations)])


def forget_conversion(model: nn.Module) -> None:
    """The model is saved as it is now, not as it was loaded: Transformers would pack it again."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [c for c in conversions if not _is_ours(c)]


def _is_ours(conversion) -> bool:
    return any(isinstance(operation, _Read) for operation in getattr(conversion, "operations", ()))

