"""How a kernel file says which of its kernels there are to compile: a list `VARIANTS` of `Variant`s.

Pure data; imports neither Triton nor torch. scripts/compile_kernels.py compiles every variant of every file of
this package for every architecture that it fits, without a GPU.

    VARIANTS = [
        Variant(
            "cast_rows_sr",
            _cast_rows,
            {"x_ptr": "*bf16", "codes_ptr": "*u8", "seed_ptr": "*i32", "m": "i32", "k": "i32"},
            {"BLOCK": 128, "STOCHASTIC": True},
            divisible=("k",),
        ),
    ]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments, as a launch would compile it.

    name: unique among all files, what is printed.
    kernel: the function that `triton.jit` decorated.
    types: type of each run-time argument in Triton's words: "*bf16" a pointer, "i32", "i64", "fp32". Pointers are
        taken to be 16-byte aligned, as the allocator's are. Leave out an argument that is None at launch (give it in
        constexprs) and an integer that is 1 there.
    constexprs: value of each compile-time argument without a default.
    options: num_warps, num_stages and other launch options.
    divisible: the integer arguments that a usual launch has as multiples of 16.
    min_arch, max_arch: the first and last architecture that it is written for (80, 89, 90, 100, 120).
    min_triton: by architecture, the first Triton version (major, minor) that compiles it; below, it is skipped.
    expect: by architecture, a regular expression that some line of its PTX has to match.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    min_arch: int = 80
    max_arch: int | None = None
    min_triton: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    expect: Mapping[int, str] = field(default_factory=dict)

    def unfit(self, arch: int, triton_version: tuple[int, int]) -> str | None:
        """Why this variant is not compiled for an architecture by a Triton, or None."""
        if arch < self.min_arch:
            return f"written for sm_{self.min_arch} and later"
        if self.max_arch is not None and arch > self.max_arch:
            return f"written for sm_{self.max_arch} and earlier"
        needed = self.min_triton.get(arch)
        if needed is not None and triton_version < needed:
            have = ".".join(map(str, triton_version))
            return f"needs Triton {needed[0]}.{needed[1]} on sm_{arch}; this is {have}"
        return None
