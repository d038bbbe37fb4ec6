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
    """An NVFP4 weight [N, K] in one tensor that can be cut into shards by rows of blocks, and put together again.

    bytes: uint8 [N/m, m·K/2 + K/16], of each row of blocks (m = 16 if they are square, else 1) the codes of its m rows
        and the E4M3 scale of each block.
    tensor_scale: FP32 scalar. dtype: what the weight was rounded to before it was cast.
    """

    bytes: Tensor
    shape: tuple[int, int]
    tensor_scale: Tensor
    cast: Cast
    dtype: torch.dtype

    @classmethod
    def of(cls, q: QuantizedTensor, dtype: torch.dtype) -> "Codes":
        """A weight, or a shard of one, that was cast."""
        m = rows_of_blocks(q.cast)
        codes = q.codes.view(q.codes.shape[0] // m, -1)
        return cls(torch.cat([codes, q.scales.view(torch.uint8)[::m]], 1), q.shape, q.tensor_scale, q.cast, dtype)

    def quantized(self) -> QuantizedTensor:
        """The same apart."""
        (rows, columns), m = self.shape, rows_of_blocks(self.cast)
        codes, scales = self.bytes.split((m * columns // 2, columns // 16), 1)
        scales = scales.repeat_interleave(m, 0).view(self.cast.block_format.scale_dtype)
        return QuantizedTensor(codes.reshape(rows, columns // 2), scales, self.tensor_scale, self.cast)


def rows_of_blocks(cast: Cast) -> int:
    """How many rows a row of blocks has: a shard must not cut them."""
    return cast.block_format.block if cast.square else 1


class CastWeight(Tensor):
    """A parameter's shape [N, K] and dtype, for autograd, with codes instead of values.

    Layers of this package read it; whoever else does, gets a TypeError. `parts` is shared by its aliases, so that new
    codes are everybody's.
    """

    parts: Codes

    @staticmethod
    def __new__(cls, parts: Codes, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, parts.shape, dtype=dtype, device=parts.bytes.device)

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
