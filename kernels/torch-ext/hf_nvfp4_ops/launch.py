"""How a kernel is launched: tiles that hold whole blocks, the number of warps, and quickly."""

import contextlib
import functools
import os
from typing import NamedTuple

import torch

from .conversion import NONE, STOCHASTIC, TO_NEAREST
from .spec import Plan

# Products are never fused with sums: the reference rounds each operation.
OPTIONS = {"enable_fp_fusion": False}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


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


def tile_for(row: Plan, col: Plan, unit: int = 0) -> Tile:
    """The tiles that were fastest on an H100 at 16384 × 8192, of those that hold whole blocks.

    unit: not 0: rows that a tile must not leave, a multiple of 16 and of the blocks.
    """
    # Elements a thread: 16 by rows, whose loads are contiguous; 64 by columns, of which a thread has four; 32 for both.
    tall = 16 if not col.on else 32 if row.on else 64
    tall = max(min(tall, unit & -unit) if unit else tall, col.block, row.block if row.square else 1)
    wide = max(128, row.block, col.block if col.square else 1)
    return Tile(tall, wide // 16, wide, tall // 16, 8 if tall * wide > 8192 else 4)


def tile_for_values(across: bool) -> tuple[int, int, int]:
    """R, B and the number of warps to dequantize with."""
    return (256, 1, 4) if across else (32, 8, 4)


def on(device: torch.device):
    """Make a GPU the current one, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def hardware(device: torch.device) -> int:
    """Which instructions of conversion.py the casts use on a device. None but on NVIDIA's sm_100 and sm_120 families.

    Those that round stochastically only where there are some (sm_100 and sm_103) and the environment has
    HF_NVFP4_CVT_RS=1 at the first cast: fewer instructions, but a seed then gives other bits than on other devices.
    """
    if device.type != "cuda" or INTERPRETED or torch.version.cuda is None:
        return NONE
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in (10, 12):
        return NONE
    stochastic = capability in ((10, 0), (10, 3)) and os.environ.get("HF_NVFP4_CVT_RS") == "1"
    return STOCHASTIC if stochastic else TO_NEAREST


class Launcher:
    """A Triton kernel, launched without Triton's own binding of arguments once a like call was made.

    A compiled kernel depends on the constants, on the types of the tensors and whether they are 16-byte aligned, and
    on which integers are 1, multiples of 16, or beyond 32 bits: what Triton specializes for, and this looks up.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = {}

    def __call__(
        self, programs: int, tensors: tuple, integers: tuple, constants: tuple, num_warps: int, pdl: bool = False
    ) -> None:
        """Run `programs` of it on the current GPU. constants: plans, which are never freed, and plain values.

        pdl: it may start while the kernel in front still runs, and waits for it itself (sm_90 and later).
        """
        arguments = (*tensors, *integers, *constants)
        if INTERPRETED:
            self.kernel[(programs,)](*arguments)
            return
        key = (
            torch.cuda.current_device(),
            *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
            *[(n == 1, n % 16 == 0, n < 2**31) for n in integers],
            *[id(c) if isinstance(c, Plan) else c for c in constants],
        )
        compiled = self.compiled.get(key)
        if compiled is None:
            options = {"num_warps": num_warps, **OPTIONS, **({"launch_pdl": True} if pdl else {})}
            self.compiled[key] = self.kernel[(programs,)](*arguments, **options)
        else:
            compiled[(programs, 1, 1)](*arguments)
