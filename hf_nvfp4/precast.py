"""A weight that arrives as NVFP4 codes, cast before it was gathered, without a copy in high precision.

Knows how its codes become a backend's operands, and who may not have them; nothing of processes.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.reference import QuantizedTensor


@dataclass
class Codes:
    """codes: uint8 [N, K/2]; scales: E4M3 bytes, uint8 [N, K/16], of square blocks one row each, [N/16, K/16].

    tensor_scale: FP32 scalar. dtype: what the weight was rounded to before it was cast.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    cast: Cast
    dtype: torch.dtype

    def quantized(self) -> QuantizedTensor:
        """The same with a square block's scale in each of its rows."""
        fmt, scales = self.cast.block_format, self.scales
        scales = scales.repeat_interleave(fmt.block, 0) if self.cast.square else scales
        return QuantizedTensor(self.codes, scales.view(fmt.scale_dtype), self.tensor_scale, self.cast)


class CastWeight(Tensor):
    """A parameter's shape [N, K] and dtype, for autograd, with codes instead of values.

    Layers of this package read it; whoever else does, gets a TypeError. `parts` is shared by its aliases, so that new
    codes are everybody's.
    """

    parts: Codes

    @staticmethod
    def __new__(cls, parts: Codes, dtype: torch.dtype):
        rows, half = parts.codes.shape
        return Tensor._make_wrapper_subclass(cls, (rows, 2 * half), dtype=dtype, device=parts.codes.device)

    def __init__(self, parts: Codes, dtype: torch.dtype):
        self.parts = parts

    def operands(self, backend: ModuleType, dtype: torch.dtype, row: Cast | None, col: Cast | None) -> tuple:
        """As `gemm.cast` gives them of the weight in the compute dtype.

        Raises:
            ValueError: the layer computes in another dtype, or casts its weight otherwise, than when it was gathered.
        """
        parts = self.parts
        if dtype != parts.dtype:
            raise ValueError(
                f"the weight was gathered as NVFP4 codes of its values in {parts.dtype}, and the layer computes in "
                f"{dtype}, whose codes are others: gather_in_4_bits(model, dtype={dtype})"
            )
        for how in (row, col):
            if how is not None and (how != parts.cast or how is col and not how.square):
                raise ValueError(
                    f"the weight was gathered as {parts.cast}, and the layer now casts it as {how}: a recipe stays as "
                    "it is (no use_recipe, no PrecisionSchedule) once gather_in_4_bits was called"
                )
        q = parts.quantized()
        of_row = None if row is None else backend.operand_of(q)
        return of_row, None if col is None else backend.operand_of(q, across=True)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"CastWeight({self.shape[0]}×{self.shape[1]}, {self.parts.cast}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """FSDP and nn.Parameter alias it; there is nothing else to do with it."""
        x = args[0]
        if func is torch.ops.aten.detach.default:
            return cls(x.parts, x.dtype)
        if func is torch.ops.aten.as_strided.default and (tuple(args[1]), tuple(args[2])) == (x.shape, x.stride()):
            return cls(x.parts, x.dtype)
        raise TypeError(
            f"{func} of a weight that was gathered as NVFP4 codes: only its layer's forward and backward read it. "
            "Outside of these it is a shard in high precision"
        )
