"""What a kernel has to know of a quantized operand: a `Spec` in words, a `Plan` in numbers. Pure data.

A Spec says what hf_nvfp4's `Cast` says, without its names: elements, blocks and scales by their standard types. An
operator's arguments must be plain, so a Spec travels as text (`str(spec)`, `Spec.parse(text)`).
"""

import functools
import re
from typing import NamedTuple

# Of the operators: this package's own name, whatever it was loaded as.
NAMESPACE = re.sub(r"\W", "_", __package__ or "hf_nvfp4_ops")
# What an orientation writes: BF16 values, or codes and scales; SWIZZLED: the scales as FP4 tensor cores want them;
# ACROSS: codes and scales of 16 neighbours together, block after block, as x lies in memory. FP8: E4M3 bytes of code ×
# block scale, exact under the rule "fp8_exact"; else an eighth of it, rounded, and 8 times the FP32 scale above.
NOTHING, VALUES, CODES, CODES_SWIZZLED, CODES_ACROSS, FP8 = range(6)
ROUNDINGS = ("nearest", "stochastic", "eden")
ELEMENT_MAX = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
SCALES = ("e4m3", "e8m0", "float32", "none")


# A field's value from its text, by the type of its default.
_TYPES = {str: str, int: int, float: float, bool: lambda text: bool(int(text))}


def spec_text(element, block, scale, square, rounding, hadamard, headroom, per_row, bound, scale_rule) -> str:
    """A Spec's text from its fields. A function of its own, which Dynamo traces on every version of torch."""
    return (
        f"element={element} block={block} scale={scale} square={int(square)} rounding={rounding} "
        f"hadamard={hadamard} headroom={headroom} per_row={int(per_row)} bound={int(bound)} scale_rule={scale_rule}"
    )


class Spec(NamedTuple):
    """How an operand [M, K] is quantized along K.

    element: "e2m1", "e4m3" or "e5m2".
    block: elements along K that share a scale: 16, 32, 64 or 128; 0: none do.
    scale: type of the block scales, one of SCALES. "e4m3" and "none" have an FP32 tensor scale above them.
    square: blocks of block × block elements.
    rounding: "nearest" (ties to even), "stochastic", or "eden" (MS-EDEN, arXiv 2601.22813, of 1×16 blocks of "e2m1"
        under "e4m3"): to nearest, then each block's scale is corrected and rounded stochastically, see eden.py.
    hadamard: size of the random Hadamard transform along K that comes first (2, 4, 8 or 16); 0: none.
    headroom: factor on the scales. per_row: the FP32 scale is one for each row. bound: it follows from the amax before
        the Hadamard transform, times the square root of its size.
    scale_rule: "amax", "ceil", "4over6", "4over6_mse", "best" or "fp8_exact": how a block's scale follows from its
        elements.
    """

    element: str = "e2m1"
    block: int = 16
    scale: str = "e4m3"
    square: bool = False
    rounding: str = "nearest"
    hadamard: int = 0
    headroom: float = 1.0
    per_row: bool = False
    bound: bool = False
    scale_rule: str = "amax"

    def __str__(self) -> str:
        return spec_text(*self)

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Inverse of `str`. Raises ValueError for what is no Spec, and for what the kernels can't do."""
        values = dict(part.partition("=")[::2] for part in text.split())
        if tuple(values) != cls._fields:
            raise ValueError(f"{text!r} is not the text of a Spec: {' '.join(f'{name}=…' for name in cls._fields)}")
        try:
            spec = cls(*(_TYPES[type(cls._field_defaults[name])](value) for name, value in values.items()))
        except ValueError as error:
            raise ValueError(f"{text!r} is not the text of a Spec: {error}") from None
        spec.check()
        return spec

    def check(self) -> None:
        """ValueError, in words, unless the kernels can do this."""
        if self.element not in ELEMENT_MAX:
            raise ValueError(f"element {self.element!r}; the kernels know {', '.join(ELEMENT_MAX)}")
        if self.scale not in SCALES:
            raise ValueError(f"scale {self.scale!r}; the kernels know {', '.join(SCALES)}")
        rules = RULES.get(self.scale, ("amax",))
        if self.scale_rule not in rules:
            raise ValueError(f"scale rule {self.scale_rule!r} with scale {self.scale!r}; it has {', '.join(rules)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding {self.rounding!r}; the kernels know {', '.join(ROUNDINGS)}")
        if self.scale_rule in _OTHER_SCALES and self.scale_rule != "fp8_exact" and self.rounding == "stochastic":
            raise ValueError(f"scale rule {self.scale_rule!r} measures the error of rounding to nearest")
        if not isinstance(self.headroom, (int, float)) or not self.headroom >= 1:
            raise ValueError(f"headroom={self.headroom!r}; give a number of at least 1")
        if self.hadamard not in (0, 2, 4, 8, 16):
            raise ValueError(f"a Hadamard transform of {self.hadamard}: the kernels know 2, 4, 8 and 16; rotate first")
        if (self.block == 0) != (self.scale == "none") or self.block not in (0, 16, 32, 64, 128):
            raise ValueError(f"blocks of {self.block} with scale {self.scale!r}; the kernels know 16, 32, 64 and 128")
        if self.bound and (not self.hadamard or self.scale not in ("e4m3", "none")):
            raise ValueError("bound: there is a bound where a Hadamard transform comes before an FP32 scale")
        if self.rounding == "eden" and (self.element, self.block, self.scale, self.headroom) != ("e2m1", 16, "e4m3", 1):
            raise ValueError("rounding 'eden' is for blocks of 16 of e2m1 under e4m3 scales, without headroom")
        if self.rounding == "eden" and self.square:
            raise ValueError("rounding 'eden' corrects the scales of 1×16 blocks; square blocks have others")
        if self.square and (self.hadamard or self.per_row):
            raise ValueError("square blocks are the same along both dimensions; rotations and row scales are not")


class Grid(NamedTuple):
    """A small float's rounding.

    To nearest, in FP32, by adding 1.5 · 2^(23 - mantissa) × (power of two): `magic` is what to add to the bits of the
    power for that, `least_magic` the bits for numbers below the smallest normal. Stochastically, in FP16 or FP32
    (`wide`): times `lower` its exponents are those of the wide format, subnormals too, and what is left when the lower
    `cut` bits are cut off, shifted, is the code. `shift` and `lift` (the inverse of `lower`) are the same for FP32.
    """

    max: float
    magic: int
    least_magic: int
    mask: int
    shift: int
    offset: int
    lift: float
    wide: int
    cut: int
    lower: float
    nan_code: int
    bits: int


def _grid(exponent_bits: int, mantissa: int, largest: float, nan_code: int) -> Grid:
    smallest = 2 - 2 ** (exponent_bits - 1)
    wide = 16 if mantissa < 3 else 32  # at least 8 bits to cut
    return Grid(
        max=largest,
        # 1.5, so that a negative number added to it stays in the same binade.
        magic=(23 - mantissa << 23) + (1 << 22),
        least_magic=(smallest + 150 - mantissa << 23) + (1 << 22),
        mask=2 ** (mantissa + 2) - 1,
        shift=23 - mantissa,
        offset=(smallest + 150 - mantissa << mantissa) + (1 << mantissa - 1),
        lift=2.0 ** (smallest + 126),
        wide=wide,
        cut=(10 if wide == 16 else 23) - mantissa,
        lower=2.0 ** -(smallest + (14 if wide == 16 else 126)),
        nan_code=nan_code,
        bits=1 + exponent_bits + mantissa,
    )


GRIDS = {
    "e2m1": _grid(2, 1, ELEMENT_MAX["e2m1"], 0x7),  # has no NaN: its code is the largest
    "e4m3": _grid(4, 3, ELEMENT_MAX["e4m3"], 0x7F),
    "e5m2": _grid(5, 2, ELEMENT_MAX["e5m2"], 0x7F),
}


class Plan(NamedTuple):
    """A Spec as the numbers that a kernel is compiled with. `on` is False for an orientation not asked for."""

    on: bool
    grid: Grid = GRIDS["e2m1"]
    scale_grid: Grid = GRIDS["e4m3"]
    block: int = 0
    scale: str = "none"
    rule: str = "amax"
    square: bool = False
    stochastic: bool = False  # the elements are rounded so
    eden: bool = False  # the scales are corrected, and rounded so
    hadamard: int = 0
    hadamard_factor: float = 1.0
    per_row: bool = False
    bound: float = 1.0  # factor on the amax that is given
    amax_at: int = 0  # where that stands, of an operand's columns
    headroom: float = 1.0
    element_share: float = 1.0  # headroom / largest element
    element_room: float = 1.0  # its inverse
    largest: float = 1.0  # what amax is mapped to, block scales included
    largest_exponent: int = 0  # floor(log2(largest element))
    carry: int = 0  # what rounds amax's bits up to a power of two, relative to the largest element
    shrink: float = 1.0  # 1 / headroom
    absolute_error: bool = False
    offsets: tuple = ()  # the other candidates for a scale: factors, or steps of its byte ("best")
    tries: bool = False  # whether their errors are those of the rounded elements; else found in FP16, see scales.py
    value_factor: float = 1.0  # of what output FP8 writes


_OTHER_SCALES = {"4over6": (1.5,), "4over6_mse": (1.5,), "best": (-1, 1, 4, 5, 6), "fp8_exact": (1.5,)}
# The largest block scale: where another than the amax's may be chosen, there is room above that; and 6 · 64 fits E4M3.
_SCALE_MAX = {"4over6": 256.0, "4over6_mse": 256.0, "best": 256.0, "fp8_exact": 64.0}
# Under rounding "eden": what a block's largest magnitude becomes, and the largest scale before it is corrected.
_EDEN = {"amax": (6 * 16 / (17 * 0.93), 256.0), "fp8_exact": (6.0, 48.0)}
_EDEN |= {rule: (6.0, 192.0) for rule in ("4over6", "4over6_mse", "best")}
RULES = {"e4m3": ("amax", *_OTHER_SCALES), "e8m0": ("amax", "ceil")}


@functools.cache
def plan(text: str | None) -> Plan:
    """The Plan of a Spec's text; that of no operand for None."""
    if text is None:
        return Plan(False)
    spec = Spec.parse(text)
    element = GRIDS[spec.element]
    most, top = element.max, _SCALE_MAX.get(spec.scale_rule, 448.0)
    if spec.rounding == "eden":
        most, top = _EDEN[spec.scale_rule]
    ceil = spec.scale_rule == "ceil"
    chooses = spec.rounding == "nearest" or spec.rounding == "eden" and spec.scale_rule != "fp8_exact"
    return Plan(
        True,
        grid=element,
        block=spec.block,
        scale=spec.scale,
        rule=spec.scale_rule,
        square=spec.square,
        stochastic=spec.rounding == "stochastic",  # "fp8_exact" rounds the scale up then
        eden=spec.rounding == "eden",
        hadamard=spec.hadamard,
        hadamard_factor=spec.hadamard**-0.5 if spec.hadamard else 1.0,
        per_row=spec.per_row,
        bound=spec.hadamard**0.5 if spec.bound else 1.0,
        amax_at=0 if spec.bound or spec.scale in ("e8m0", "float32") else 1,
        headroom=spec.headroom,
        element_share=spec.headroom / most,
        element_room=most / spec.headroom,
        largest=most * (top if spec.scale == "e4m3" else 1.0) / spec.headroom,
        largest_exponent=int(element.max).bit_length() - 1,
        carry=int((2 - element.max / 2.0 ** (int(element.max).bit_length() - 1)) * 2**23) - 1 if ceil else 0,
        shrink=1 / spec.headroom,
        absolute_error=spec.scale_rule == "4over6",
        offsets=_OTHER_SCALES.get(spec.scale_rule, ()) if chooses else (),
        tries=spec.scale_rule in _OTHER_SCALES and chooses and (spec.square or spec.scale_rule != "fp8_exact"),
        value_factor=1.0 if spec.scale_rule == "fp8_exact" else 0.125,
    )
