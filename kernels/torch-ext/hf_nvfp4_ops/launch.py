"""Which tiles a launch is made of: shapes that hold whole blocks, and the number of warps."""

import functools
from typing import NamedTuple

import torch

from .spec import Plan

# Products are never fused with sums: the reference rounds each operation.
OPTIONS = {"enable_fp_fusion": False}


class Tile(NamedTuple):
    """R rows × 16·B columns for the row-wise part; RC columns × 16·BC rows for the other: the same elements."""

    R: int
    B: int
    RC: int
    BC: int
    num_warps: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """R, B, RC, BC."""
        return self[:4]

    def fits(self, m: int, k: int) -> bool:
        """Whether [m, k] is made of whole tiles."""
        return m % self.R == 0 and k % (16 * self.B) == 0

    @property
    def constexprs(self) -> dict[str, int]:
        """The kernel's arguments."""
        return {"R": self.R, "B": self.B, "RC": self.RC, "BC": self.BC}

    def count(self, m: int, k: int) -> int:
        """Tiles in an [m, k] tensor."""
        return -(-m // self.R) * -(-k // (16 * self.B))


def tile_for(row: Plan, col: Plan) -> Tile:
    """The tiles that were fastest on an H100 at 16384 × 8192, of those that hold whole blocks."""
    # Elements a thread: 16 by rows, whose loads are contiguous; 64 by columns, of which a thread has four; 32 for both.
    tall = 16 if not col.on else 32 if row.on else 64
    tall = max(tall, col.block, row.block if row.square else 1)
    wide = max(128, row.block, col.block if col.square else 1)
    return Tile(tall, wide // 16, wide, tall // 16, 8 if tall * wide > 8192 else 4)


def tile_for_values(across: bool) -> tuple[int, int, int]:
    """R, B and the number of warps to dequantize with."""
    return (256, 1, 4) if across else (32, 8, 4)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
