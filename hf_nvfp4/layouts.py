"""The published layouts of packed NVFP4 checkpoints: names, dtypes, shapes, conventions, configs. Nothing else.

compressed-tensors (vLLM, SGLang, Transformers; format "nvfp4-pack-quantized", package compressed-tensors 0.20):
    X.weight_packed        uint8 [N, K/2]          even column in the low nibble
    X.weight_scale         float8_e4m3fn [N, K/16]
    X.weight_global_scale  float32 [1]             value = code · scale / global_scale
    X.input_global_scale   float32 [1]             2688 / amax of the input; only if activations are 4-bit too
ModelOpt (TensorRT-LLM, vLLM, SGLang; "NVFP4" and weight-only "W4A16_NVFP4", hf_quant_config.json):
    X.weight               uint8 [N, K/2]
    X.weight_scale         float8_e4m3fn [N, K/16]
    X.weight_scale_2       float32 []              value = code · scale · scale_2
    X.input_scale          float32 []              amax of the input / 2688

Knows neither models nor files.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.data import InputError
from hf_nvfp4.formats import E2M1, E4M3
from hf_nvfp4.reference import QuantizedTensor

BLOCK = 16
# What an input's largest magnitude becomes: the largest block scale times the largest element.
LARGEST = E4M3.max * E2M1.max


@dataclass(frozen=True)
class Layout:
    """One layout: the last parts of its tensors' names, and how its FP32 scales are stored.

    inverse: whether the scale of a tensor (and of an input) is stored as its inverse.
    scalar: the shape of such a scale.
    """

    name: str
    codes: str
    scales: str
    tensor_scale: str
    input_scale: str
    inverse: bool
    scalar: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all tensors of one weight, `codes` first."""
        return self.codes, self.scales, self.tensor_scale, self.input_scale

    def store(self, weight: QuantizedTensor, input_amax: Tensor | None) -> dict[str, Tensor]:
        """The tensors of one weight, on the CPU, by the last part of their names.

        input_amax: FP32 scalar, the largest magnitude of the layer's input; None: weight-only.
        """
        scale = weight.tensor_scale.float()
        stored = {
            self.codes: _without_scale_zero(weight),
            self.scales: weight.scales,
            self.tensor_scale: nearest_inverse(scale) if self.inverse else scale,
        }
        if input_amax is not None:
            largest = torch.full_like(input_amax, LARGEST)
            stored[self.input_scale] = largest / input_amax if self.inverse else input_amax / largest
        scalars = (self.tensor_scale, self.input_scale)
        return {
            part: (tensor.reshape(self.scalar).clone() if part in scalars else tensor).cpu().contiguous()
            for part, tensor in stored.items()
        }

    def read(self, tensors: dict[str, Tensor]) -> QuantizedTensor:
        """Inverse of `store`; the tensors as `check` and `check_values` let them pass."""
        scale = tensors[self.tensor_scale].float().reshape(())
        return QuantizedTensor(
            tensors[self.codes], tensors[self.scales], 1.0 / scale if self.inverse else scale, Cast()
        )

    def check(self, name: str, found: dict[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int]) -> None:
        """InputError unless a weight's tensors, part -> (dtype as safetensors names it, shape), are those of [N, K]."""
        rows, columns = shape
        wanted = {
            self.codes: ("U8", (rows, columns // 2)),
            self.scales: ("F8_E4M3", (rows, columns // BLOCK)),
            self.tensor_scale: ("F32", self.scalar),
        }
        if self.input_scale in found:
            wanted[self.input_scale] = ("F32", self.scalar)
        for part, (dtype, size) in wanted.items():
            if part not in found:
                raise InputError(
                    f"{name}: the checkpoint has {', '.join(f'{name}.{p}' for p in found)} but no {name}.{part}, which "
                    f"{self.name} needs. It is incomplete or from another tool: fetch or export it again."
                )
            have_dtype, have = found[part]
            scalars = (self.tensor_scale, self.input_scale)
            fits = have in ((), (1,)) if part in scalars else have == size
            if have_dtype != dtype or not fits:
                raise InputError(
                    f"{name}.{part} is {have_dtype} {list(have)}; {self.name} has {dtype} {list(size)} for a weight of "
                    f"{rows}×{columns}. The checkpoint is damaged or of another model: fetch or export it again."
                )

    def check_values(self, name: str, part: str, tensor: Tensor) -> None:
        """InputError if a scale is NaN, infinite, negative, or zero where it must not be."""
        if part == self.scales:
            bytes_ = tensor.view(torch.uint8)
            what = "NaN" if ((bytes_ & 0x7F) == 0x7F).any() else "negative" if (bytes_ > 0x80).any() else None
        else:
            value = float(tensor)
            positive = value > 0 and value != float("inf")
            what = None if positive else "zero" if value == 0 else f"{value:g}"
        if what is not None:
            raise InputError(
                f"{name}.{part} is {what}{' in places' if part == self.scales else ''}; scales are positive finite "
                "numbers. The checkpoint is damaged: fetch or export it again."
            )

    def quantization_config(self, kept: list[str], activations: bool) -> dict:
        """What config.json says of the layers: all nn.Linear except `kept`, names of modules or "prefix*"."""
        return (_compressed_config if self.inverse else _modelopt_config)(kept, activations)


COMPRESSED = Layout(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", True, (1,)
)
MODELOPT = Layout("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", False, ())
LAYOUTS = {layout.name: layout for layout in (COMPRESSED, MODELOPT)}
NVFP4_PACKED = "nvfp4-pack-quantized"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


def nearest_inverse(scale: Tensor) -> Tensor:
    """The FP32 number whose FP32 inverse is scale, or nearest to it: there is not one for every scale.

    1/x has half as many values between sqrt(2) and 2 as FP32 has there: up to one unit in the last place is lost.
    """
    first = 1.0 / scale
    up = torch.nextafter(first, torch.full_like(first, torch.inf))
    down = torch.nextafter(first, torch.zeros_like(first))
    candidates = torch.stack((first, up, down))
    return candidates.gather(0, (1.0 / candidates - scale).abs().argmin(0, keepdim=True))[0]


def _without_scale_zero(weight: QuantizedTensor) -> Tensor:
    """The codes, 0 in blocks whose scale is 0: the same values, and no reader can take them for damage."""
    empty = (weight.scales.view(torch.uint8) == 0).repeat_interleave(BLOCK // 2, dim=1)
    return weight.codes.masked_fill(empty, 0)


def _compressed_config(kept: list[str], activations: bool) -> dict:
    """As llm-compressor writes it. Without scale_dtype compressed-tensors would not round activations' scales."""
    bits = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}
    bits |= dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "dynamic": False},
        "input_activations": {**bits, "dynamic": "local"} if activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED.name,
        "format": NVFP4_PACKED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [f"re:^{re.escape(name[:-1])}" if name.endswith("*") else name for name in kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _modelopt_config(kept: list[str], activations: bool) -> dict:
    """As NVIDIA's unified Hugging Face checkpoints have it in config.json."""
    bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = {"weights": bits, "targets": ["Linear"], **({"input_activations": bits} if activations else {})}
    return {
        "quant_method": MODELOPT.name,
        "quant_algo": _ALGORITHMS[0 if activations else 1],
        "config_groups": {"group_0": group},
        "group_size": BLOCK,
        "ignore": kept,
        "producer": _PRODUCER,
    }


# Engines look for this name; the version is the layout's, that of the release which these pages describe.
_PRODUCER = {"name": "modelopt", "version": "0.29.0"}


def modelopt_file(kept: list[str], activations: bool) -> dict:
    """hf_quant_config.json, which ModelOpt's checkpoints have besides."""
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": _ALGORITHMS[0 if activations else 1],
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": kept,
        },
    }


def layout_of(config: dict) -> Layout:
    """The layout that a checkpoint's quantization_config, or its hf_quant_config.json, describes.

    Raises:
        InputError: it is none of ours; says what it is and which are.
    """
    details = config.get("quantization", config)
    method = str(config.get("quant_method") or config.get("producer", {}).get("name") or "without a quant_method")
    if method == COMPRESSED.name:
        problem = _compressed_problem(config)
        layout = COMPRESSED
    elif method in (MODELOPT.name, "modelopt_fp4"):
        algorithm = str(details.get("quant_algo")).upper()
        size = details.get("group_size", BLOCK)
        problem = f"quant_algo {details.get('quant_algo')!r}" if algorithm not in _ALGORITHMS else None
        problem = problem or (f"group_size {size}" if size != BLOCK else None)
        layout = MODELOPT
    else:
        problem, layout = "", None
    if problem is not None:
        raise InputError(
            f"the checkpoint is quantized by {method}{f', {problem}' if problem else ''}, which hf_nvfp4 can't read; "
            f"it reads compressed-tensors' {NVFP4_PACKED} and ModelOpt's {' and '.join(_ALGORITHMS)}. Train from a "
            "plain checkpoint, or load this one without NVFP4TrainingConfig."
        )
    return layout


def _compressed_problem(config: dict) -> str | None:
    """What a quantization_config of compressed-tensors has that plain NVFP4 weights have not, or None."""
    groups = list((config.get("config_groups") or {}).values())
    if not groups or not all(isinstance(group, dict) for group in groups):
        return "without config_groups"
    formats = {group.get("format") or config.get("format") for group in groups}
    if formats != {NVFP4_PACKED}:
        return f"format {' and '.join(sorted(map(str, formats)))}"
    for group in groups:
        weights = group.get("weights") or {}
        wanted = {"num_bits": 4, "type": "float", "group_size": BLOCK}
        if different := [f"{key} {weights.get(key)}" for key, value in wanted.items() if weights.get(key) != value]:
            return f"weights of {', '.join(different)}"
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        return f"quantization_status {status!r}"
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            return f"with a {key}"
    return None
