"""How the kernel of w4a16.py divides a product, on which device and for which shape. Numbers, measured."""

import functools
from typing import NamedTuple

import torch

from .launch import INTERPRETED


class Tiles(NamedTuple):
    """How a product is divided.

    warps: of a program; they take turns along K, 128 · wide columns each. tiles: of 16 rows of the weight, a program.
    tokens: tiles of 8 columns, rows of x. depth: steps that the weight is read ahead. wide: times 32 columns that a
    thread has in a step, 1 or 2: it has 36 · wide · tiles · depth bytes of the weight under way. spread: columns of a
    tile that each row of x has, 1, 2 or 4: for few rows, which leave columns empty. As many parts of a row's step are
    then loaded at once, by threads that would have nothing to load, and a step ahead; each has sums of its own.
    """

    warps: int
    tiles: int
    tokens: int
    depth: int
    wide: int
    spread: int = 1

    def programs(self, m: int, n: int) -> int:
        """Those of x [m, k] and a weight [n, k]."""
        return -(-n // (16 * self.tiles)) * -(-m // (8 * self.tokens // self.spread))

    @property
    def columns(self) -> int:
        """That a program has behind it after each turn of its loop."""
        return 128 * self.wide * self.warps * self.depth


# More rows of x go to cuBLAS, and then so many elements of the weight at a time are BF16.
LARGEST_M, LARGEST_CHUNK = 64, 2**27
# Fastest of about forty, on an H100 (up to 2 rows: an H200): for so many rows of x at most; for weights of 8192 rows or
# more, and of less, with more than 8192 columns and with less.
_TILES = {
    2: (Tiles(4, 1, 1, 1, 2, 4), Tiles(8, 1, 1, 2, 2, 4), Tiles(8, 1, 1, 1, 2)),
    8: (Tiles(4, 1, 1, 1, 1), Tiles(8, 1, 1, 1, 2), Tiles(8, 1, 1, 1, 2)),
    16: (Tiles(2, 2, 2, 2, 1), Tiles(8, 1, 2, 1, 1), Tiles(8, 1, 2, 1, 1)),
    LARGEST_M: (Tiles(2, 2, 4, 1, 1), Tiles(8, 2, 4, 1, 1), Tiles(8, 2, 4, 1, 1)),
}


def tiles_for(m: int, n: int, k: int) -> Tiles:
    """The tiles for x [m, k] and a weight [n, k]."""
    shape = 0 if n >= 8192 else 1 if k > 8192 else 2
    tiles = _TILES[min(limit for limit in _TILES if m <= limit or limit == LARGEST_M)][shape]
    if tiles.wide > 1 and n <= 2048:  # even fewer programs: more warps each
        tiles = tiles._replace(warps=16)
    if k % (32 * tiles.wide):
        tiles = tiles._replace(wide=1)
    while tiles.columns > max(k, 128):
        smaller = {"depth": 1} if tiles.depth > 1 else {"warps": tiles.warps // 2} if tiles.warps > 1 else {"wide": 1}
        tiles = tiles._replace(**smaller)
    return tiles


def fit(k: int, tiles: Tiles) -> int:
    """How rows of k columns end, the kernel's FIT: 2 with a turn of its loop, 1 with a thread's columns, 0 anywhere."""
    return 2 if k % tiles.columns == 0 else 1 if k % (32 * tiles.wide) == 0 else 0


@functools.cache
def abilities(device: torch.device) -> tuple[bool, bool]:
    """Whether kernels on a device have E4M3 as a type, and may start before the one in front of them has ended."""
    if device.type != "cuda" or INTERPRETED:
        return False, False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 9), capability >= (9, 0)
