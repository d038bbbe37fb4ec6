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
    """Tiles of 4,096 elements where blocks allow, 32 a thread."""
    tall = max(64 if col.on else 32, col.block, row.block if row.square else 1)
    wide = max(64 if col.on else 128, row.block, col.block if col.square else 1)
    return Tile(tall, wide // 16, wide, tall // 16, min(8, max(4, tall * wide // 1024)))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
