"""The numerics in plain PyTorch: what a cast computes, bit for bit. The definition of correct.

Knows formats and casts; knows nothing of layers, gradients or backends. Runs on any device and compiles.
The order of operations is that of NVIDIA's Transformer Engine (arXiv 2509.25149, appendix), all in FP32.

Non-finite values are never hidden. NaN or inf anywhere under a scale makes that scale NaN or inf (the tensor's,
the row's where rows have their own, the block's where there is none above it), so that everything dequantized
with it is NaN or inf.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.eden import LIMITS, corrected
from hf_nvfp4.formats import (
    CHOOSING_RULES,
    E2M1,
    FLOAT32_MAX,
    FP8_EXACT_BOUNDS,
    FP8_EXACT_RANGE,
    FP8_EXACT_SIGNIFICANDS,
    FP16,
    RMS_CLIP,
    Element,
)
from hf_nvfp4.rounding import (
    decode,
    draw_seed,
    encode,
    grid_step,
    pack_nibbles,
    random_bytes,
    rescaled,
    rotate,
    round_to,
    sum16,
    unpack_nibbles,
)

# Where the rule may choose a larger scale than the amax's, the largest scale by amax is this, not E4M3's 448: room for
# half as much again (384), or for six codes more (448).
CHOOSING_SCALE_MAX = 256.0
# Rule "best": E4M3 codes of its candidates, less that of the scale by amax. Mean squared error on N(0, 1), in 1e-3:
# (0, -1, 5) 7.08; (0, -1, 4, 5) 6.80; these, the best six, 6.65; all from -4 to 6, 6.60.
BEST_OFFSETS = (0, -1, 1, 4, 5, 6)
# FP16 whose smallest normal number is E2M1's.
_E2M10 = Element("e2m10", 2, 10, FP16.max * 2.0**14)
# Added to a number below 8 and taken away, it leaves a multiple of 2^-11: 256 of them have an exact sum.
_ERROR_UNIT = 2.0**12

# ---------------------------------------------------------------------------- blocks


@dataclass
class Blocks:
    """A quantized [M, K] operand, unpacked: what packing and every backend start from.

    elements: FP32 on the element's grid, viewed as [M/m, m, K/k, k] blocks, zero-padded.
    scales: FP32 [M/m, 1, K/k, 1], or None without block scales.
    tensor_scale: FP32 scalar, or [M, 1] with per-row scales.
    """

    elements: Tensor
    scales: Tensor | None
    tensor_scale: Tensor
    shape: tuple[int, int]

    def values(self) -> Tensor:
        """element × block scale [M, K] in FP32, the tensor scale left out: at most 6 significant bits for NVFP4."""
        scaled = self.elements if self.scales is None else self.elements * self.scales
        return _unblock(scaled, self.shape)


def _block_view(x: Tensor, rows: int, columns: int) -> Tensor:
    """[M, K] -> [M/rows, rows, K/columns, columns], padded with zeros."""
    m, k = x.shape
    if m % rows or k % columns:
        x = F.pad(x, (0, -k % columns, 0, -m % rows))
    return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _unblock(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def _amax(x: Tensor, outer: str) -> Tensor:
    """Largest magnitude of the tensor (scalar) or of each row ([M, 1])."""
    magnitude = x.abs()
    return magnitude.amax(dim=1, keepdim=True) if outer == "row" else magnitude.amax()


def _scale_for(amax: Tensor, largest: float) -> Tensor:
    """The FP32 scale that maps amax to `largest`; 1 where all is zero. Not finite where amax is not."""
    # A true division: by a number, torch multiplies by its inverse on a GPU.
    return torch.where(amax == 0, torch.ones_like(amax), amax / torch.full_like(amax, largest))


def _divisor(amax: Tensor, largest: float) -> Tensor:
    """`_scale_for`, kept normal: the quotient of two subnormal numbers can be 0, and 0 / 0 is NaN."""
    return _scale_for(amax, largest).clamp(min=torch.finfo(torch.float32).tiny)


def _two_level(x: Tensor, amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """Block scales in a small float under an FP32 tensor scale (NVFP4): scaled blocks, scales, tensor scale."""
    fmt = cast.block_format
    element_max, scale_max = fmt.element.max, fmt.scale.max
    if cast.scale_rule in CHOOSING_RULES:
        scale_max = CHOOSING_SCALE_MAX
    if cast.scale_rule == "fp8_exact":
        scale_max = FP8_EXACT_RANGE[1]
    if cast.rounding == "eden":
        element_max, scale_max = LIMITS[cast.scale_rule]
    largest = element_max * scale_max / cast.headroom
    # A true division: `number / tensor` is number · (1 / tensor) in torch, which rounds twice.
    encode_scale = (torch.full_like(amax, largest) / amax).clamp(max=FLOAT32_MAX)
    usable = torch.isfinite(encode_scale) & (encode_scale > 0) & (amax > 0)
    encode_scale = torch.where(usable, encode_scale, torch.ones_like(encode_scale))
    decode_scale = 1.0 / encode_scale
    if cast.outer == "row":
        encode_scale, decode_scale = encode_scale[:, :, None, None], decode_scale[:, :, None, None]

    blocks = _block_view(x, fmt.block if cast.square else 1, fmt.block)
    block_amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # (1/6) · S_enc first: the other order changes one scale byte in 1,400.
    per_element_max = encode_scale * (cast.headroom / element_max)
    ideal = block_amax * per_element_max
    candidates = _candidates(ideal, cast)
    scales = candidates[0]
    if len(candidates) > 1:
        scales = _least_error(blocks, candidates, encode_scale, decode_scale, cast)
    return blocks * _inverse(scales, decode_scale), scales, _scale_for(amax, largest)


def _stored(scale: Tensor, element: Element) -> Tensor:
    """FP32 scales rounded to what `element` holds, saturating; NaN stays NaN."""
    return scale.clamp(max=element.max).to(element.dtype).float()


def _inverse(scales: Tensor, decode_scale: Tensor) -> Tensor:
    """What elements are multiplied by under a stored scale."""
    return (1.0 / (scales * decode_scale)).clamp_(max=FLOAT32_MAX)


def _stored_fp8_exact(scale: Tensor, up: bool) -> Tensor:
    """FP32 scales rounded to {1, 1.25, 1.5}·2^e in 2^-6 ... 64: the next one above, or by `FP8_EXACT_BOUNDS`."""
    bits = scale.view(torch.int32)
    mantissa = bits & 0x7FFFFF
    chosen = torch.zeros_like(bits)
    bounds = FP8_EXACT_SIGNIFICANDS if up else FP8_EXACT_BOUNDS
    for bound, above in zip(bounds, (*FP8_EXACT_SIGNIFICANDS[1:], 2.0), strict=True):
        chosen = torch.where(mantissa > int((bound - 1) * 2**23), int((above - 1) * 2**23), chosen)
    rounded = ((bits & 0x7F800000) + chosen).view(torch.float32)
    return torch.where(scale.isfinite(), rounded, scale).clamp_(*FP8_EXACT_RANGE)


def _candidates(ideal: Tensor, cast: Cast) -> list[Tensor]:
    """Block scales to choose from, the one by amax first. ideal: that one before it was rounded.

    4/6: E4M3(ideal), E4M3(ideal · 1.5). "best": codes of the first + `BEST_OFFSETS`, kept in 1 ... 126 (448).
    "fp8_exact": ideal and ideal · 1.5, each rounded; with stochastic rounding the one above ideal alone.
    Rounding "eden": all are at least the smallest scale above zero: what it makes too large, is corrected. Of
    "fp8_exact" ideal rounded alone.
    """
    element = cast.block_format.scale
    if cast.scale_rule == "fp8_exact":
        if cast.rounding != "nearest":
            return [_stored_fp8_exact(ideal, up=cast.rounding == "stochastic")]
        return [_stored_fp8_exact(ideal, up=False), _stored_fp8_exact(ideal * 1.5, up=False)]
    scales = [_stored(ideal, element)]
    if cast.scale_rule == "best":
        codes = encode(scales[0], element).int()
        others = [(codes + offset).clamp_(1, len(element.grid) - 1).to(torch.uint8) for offset in BEST_OFFSETS[1:]]
        scales += [decode(code, element) for code in others]
    elif cast.scale_rule != "amax":
        scales.append(_stored(ideal * 1.5, element))
    return [s.clamp_(min=element.grid[1]) for s in scales] if cast.rounding == "eden" else scales


def _least_error(blocks: Tensor, candidates: list[Tensor], encode_scale: Tensor, decode_scale: Tensor, cast: Cast):
    """The scale of each block with the least rounding error; of equal ones the first, and that too if its error is NaN.

    An element errs by d = q · scale - FP32(x · encode_scale), rounded once; q is x · inverse(scale) rounded to nearest.
    A block's error is the sum of |d| ("4over6") or FP32(d · d) (the others), halves added to halves: the first 8 of
    16 to the last 8, 4 to 4, 2 to 2, 1 to 1. In a square block each |d| or d · d is first rounded to a multiple of
    2^-11 · p (or p²), p the power of two at or below the first candidate, at least 2^-9, by adding and taking away
    2^12 · p: so sums are exact in any order, and the transposed block makes the same choice. Blocks of 1×16 under the
    rule "fp8_exact" have `_half_error` instead, which is cheaper.
    """
    first, chosen, least = candidates[0], candidates[0], None
    for scales in candidates:
        inverse = _inverse(scales, decode_scale)
        if cast.scale_rule == "fp8_exact" and not cast.square:
            error = _half_error(blocks, scales, inverse)
        else:
            d = round_to(blocks * inverse, cast.block_format.element).mul_(scales).sub_(blocks * encode_scale)
            error = _error(d, first, cast)
        if least is None:
            least = error
        else:
            better = error < least
            chosen, least = torch.where(better, scales, chosen), torch.where(better, error, least)
    return chosen


def _error(d: Tensor, first: Tensor, cast: Cast) -> Tensor:
    """Sums of |d| or d · d over blocks; see `_least_error`."""
    squared = cast.scale_rule != "4over6"
    d = d.square_() if squared else d.abs_()
    if not cast.square:
        return sum16(d)
    unit = _error_unit(first, squared)
    return d.add_(unit).sub_(unit).sum(dim=(1, 3), keepdim=True)


def _half_error(blocks: Tensor, scales: Tensor, inverse: Tensor) -> Tensor:
    """Squared errors of 1×16 blocks in the precision of FP16: for choosing scales that is enough.

    m = |x · inverse|, rounded to 11 bits, below 1 to a multiple of 2^-10; d, how far it is above the nearest element
    (of two the larger one), is exact; the sums of d · d of the even and of the odd elements are rounded to FP16 at each
    step, added in FP32 and multiplied by scale · scale.
    """
    m = round_to((blocks * inverse).abs_(), _E2M10)
    step = grid_step(m, E2M1)
    d = m - (m / step + 0.5).floor_().mul_(step)
    squares = round_to(d * d, FP16)
    total = torch.zeros_like(squares[..., :2])
    for pair in squares.unflatten(-1, (8, 2)).unbind(-2):
        total = round_to(total + pair, FP16)
    return (total[..., :1] + total[..., 1:]) * (scales * scales)


def _error_unit(scales: Tensor, squared: bool) -> Tensor:
    """2^12 · p, or 2^12 · p²; see `_least_error`."""
    power = (scales.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-9)
    return (power.square_() if squared else power).mul_(_ERROR_UNIT)


def _powers_of_two(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """Block scales 2^e (MX), the constant headroom above them: scaled blocks, scales, tensor scale.

    In the bits of FP32: the scale's E8M0 byte is the exponent byte of amax (rule "ceil": the next one, if amax has a
    larger significand than the element's largest) less that of the element's largest value, at least 0: all-zero
    blocks have the scale 2^-127 and codes 0, as OCP has it. Rule "rms": the same of standard deviation · 2.9225 / 6 ·
    the power of two of the element's largest, rounded up from 2^(e + 1/2) on. NaN or inf: byte 255, NaN. The scale
    belongs to x itself; elements are those of x / headroom: x · (1 / scale · FP32(1 / headroom)). A value above 2^127
    may be rounded to 2^128, which FP32 has not: inf.
    """
    fmt = cast.block_format
    blocks = _block_view(x, fmt.block if cast.square else 1, fmt.block)
    significand, exponent = math.frexp(fmt.element.max)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    carry = 2**24 - 1 - int(significand * 2**24) if cast.scale_rule == "ceil" else 0
    if cast.scale_rule == "rms":
        deviation = blocks.std(dim=(1, 3), correction=0, keepdim=True)
        amax = deviation * (RMS_CLIP / fmt.element.max * 2.0 ** (exponent - 1))
        carry = 2**24 - int(0.5**0.5 * 2**24)  # from the square root of 2 on, up
    byte = ((amax.view(torch.int32) + carry >> 23) - (exponent - 1)).clamp_(min=0)
    # 2^-127 is a subnormal number of FP32: its exponent byte is 0, as is that of zero.
    bits = torch.where(byte == 0, 1 << 22, byte << 23)
    scales = torch.where(torch.isfinite(amax), bits.view(torch.float32), float("nan"))
    inverse = (1.0 / scales).mul_(1 / cast.headroom)
    return blocks * inverse, scales, torch.full((), cast.headroom, device=x.device)


def _one_level(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """FP32 block scales and nothing above them (FP8, 1×128 and 128×128)."""
    fmt = cast.block_format
    blocks = _block_view(x, fmt.block if cast.square else 1, fmt.block)
    scales = _divisor(blocks.abs().amax(dim=(1, 3), keepdim=True), fmt.element.max / cast.headroom)
    return blocks * (1.0 / scales), scales, torch.ones((), device=x.device)


def _grouped(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 block scales under an FP32 scale for each group of 1×128: scaled blocks, products of scales, 1."""
    fmt = cast.block_format
    m, k = x.shape
    groups = _block_view(x, 1, fmt.group).reshape(-1, fmt.group)
    amax = groups.abs().amax(dim=1, keepdim=True)
    nvfp4 = dataclasses.replace(cast, format="nvfp4", outer="row")
    scaled, scales, group_scales = _two_level(groups, amax, nvfp4)
    scales = (scales * group_scales[:, :, None, None]).reshape(m, 1, -1, 1)[:, :, : -(-k // fmt.block)]
    scaled = scaled.reshape(m, 1, -1, fmt.block)[:, :, : scales.shape[2]]
    return scaled, scales, torch.ones((), device=x.device)


# ---------------------------------------------------------------------------- the cast


def prepare(
    x: Tensor, cast: Cast, generator: torch.Generator | None = None, rotate: Callable = rotate
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a cast needs to know of the whole tensor: x (rotated if the cast says so), its amax, a seed for rounding.

    rotate: what computes `rounding.rotate`.

    amax: scalar (where the cast says so, the bound that it has before the rotation), or [M, 1] with per-row scales;
        unused by formats without a tensor scale.
    """
    amax = torch.ones((), device=x.device)
    if cast.outer == "bound":
        amax = cast.of_all(_amax(x, cast.outer).float()) * cast.hadamard**0.5
    if cast.hadamard:
        x = rotate(x, cast.hadamard)
    if cast.outer != "bound" and cast.block_format.tensor_scale:
        amax = cast.of_all(_amax(x, cast.outer).float())
    return x, amax, None if cast.rounding == "nearest" else draw_seed(x.device, generator)


def quantize_rows(x: Tensor, amax: Tensor, seed: Tensor | None, cast: Cast, first_row: int = 0) -> Blocks:
    """Quantize what `prepare` returned, or some whole blocks of its rows (and their amax, if that is [M, 1])."""
    fmt = cast.block_format
    x = x.float()
    if fmt.group is not None:
        scaled, scales, tensor_scale = _grouped(x, cast)
    elif fmt.scale == "float32":
        scaled, scales, tensor_scale = _one_level(x, cast)
    elif fmt.scale == "e8m0":
        scaled, scales, tensor_scale = _powers_of_two(x, cast)
    elif fmt.scale is not None:
        scaled, scales, tensor_scale = _two_level(x, amax, cast)
    elif fmt.tensor_scale:
        tensor_scale = _divisor(amax, fmt.element.max / cast.headroom)
        scaled, scales = _block_view(x * (1.0 / tensor_scale), 1, x.shape[1]), None
    else:
        scaled, scales, tensor_scale = _block_view(x, 1, x.shape[1]), None, torch.ones((), device=x.device)
    random = None
    if cast.rounding == "stochastic":
        random = _block_view(random_bytes(x, seed, first_row), scaled.shape[1], scaled.shape[3])
    elements = round_to(scaled, fmt.element, random)
    if cast.rounding == "eden":
        random = random_bytes(scales[:, 0, :, 0], seed, first_row)[:, None, :, None]
        scales = corrected(scaled, elements, scales, random, cast)
    return Blocks(elements, scales, tensor_scale, tuple(x.shape))


def quantize_blocks(x: Tensor, cast: Cast, generator: torch.Generator | None = None) -> Blocks:
    """Quantize x [M, K] along K (K a multiple of the Hadamard transform's size, if there is one)."""
    return quantize_rows(*prepare(x, cast, generator), cast)


def unscaled(x: Tensor, cast: Cast) -> Tensor:
    """x [M, K] over the scales that a cast without rotation gives it, FP32; 0 under a scale of 0."""
    blocks = quantize_blocks(x.detach().contiguous(), cast)
    scales = torch.ones((), device=x.device) if blocks.scales is None else blocks.scales
    scales = _unblock(scales.expand_as(blocks.elements), blocks.shape) * blocks.tensor_scale
    return torch.where(scales == 0, 0.0, x.float() / scales)


# ---------------------------------------------------------------------------- the public tensor


@dataclass
class Packed:
    """Codes and scales as some layout stores them; its class says which."""

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor
    cast: Cast

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a later `type(self)(*tensors, cast)` is made of."""
        return self.codes, self.scales, self.tensor_scale


@dataclass(repr=False)
class QuantizedTensor(Packed):
    """A quantized [M, K] tensor as it is stored, with blocks along K.

    codes: uint8 [M, K/2] for 4-bit elements (even column in the low nibble), else [M, K].
    scales: [M, ceil(K/block)], float8_e4m3fn for nvfp4, float8_e8m0fnu for mxfp4 and mxfp8, float32 for
        fp8_e4m3_block; a square block's scale stands in every one of its rows. None for formats without any.
    tensor_scale: float32 scalar, or [M, 1] with per-row scales.
    The value of an element is (code × scale) × tensor_scale.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the tensor that was quantized."""
        per_byte = 8 // self.cast.block_format.element.bits
        return self.codes.shape[0], self.codes.shape[1] * per_byte

    def values(self) -> Tensor:
        """code × block scale, FP32 [M, K], the tensor scale left out (exact in FP32 for nvfp4)."""
        fmt = self.cast.block_format
        codes = unpack_nibbles(self.codes) if fmt.element.bits == 4 else self.codes
        values = decode(codes, fmt.element)
        if self.scales is None:
            return values
        blocks = _block_view(values, 1, fmt.block)
        return _unblock(blocks * self.scales.float()[:, None, :, None], self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, K] in `dtype`, still in the rotated basis if the cast rotates. float64 multiplies without rounding."""
        return rescaled(self.values(), self.tensor_scale, dtype)

    def transposed(self) -> "QuantizedTensor":
        """[K, M] of square blocks (4-bit elements, M a multiple of the block): Q(x.T), as Q(x).T is the same."""
        if not self.cast.square or self.cast.block_format.element.bits != 4:
            raise ValueError(f"{self.cast} is not the same along both dimensions; cast the transposed tensor")
        block = self.cast.block_format.block
        codes = pack_nibbles(unpack_nibbles(self.codes).T.contiguous())
        scales = self.scales.view(torch.uint8)[::block].T.repeat_interleave(block, 0).view(self.scales.dtype)
        return QuantizedTensor(codes, scales, self.tensor_scale, self.cast)

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.shape[0]}×{self.shape[1]}, {self.cast}, {self.codes.device})"


def pack(blocks: Blocks, cast: Cast) -> QuantizedTensor:
    """Blocks as stored bytes."""
    fmt = cast.block_format
    m, k = blocks.shape
    codes = _unblock(encode(blocks.elements, fmt.element), blocks.shape)
    if fmt.element.bits == 4:
        codes = pack_nibbles(codes)
    scales = blocks.scales
    if scales is not None:
        rows = fmt.block if cast.square else 1
        scales = scales[:, 0, :, 0].repeat_interleave(rows, dim=0)[:m]
        scales = scales.to(fmt.scale_dtype)
    return QuantizedTensor(codes.contiguous(), scales, blocks.tensor_scale, cast)


def quantize(x: Tensor, cast: Cast, *, generator: torch.Generator | None = None) -> QuantizedTensor:
    """Quantize a 2-D tensor in blocks along its last dimension (NVFP4: arXiv 2509.25149, section 2).

    Args:
        x: [M, K], float32, bfloat16 or float16. For 4-bit formats K must be a multiple of the block; with a
            Hadamard transform, of its size; for square blocks of 4-bit formats M too.
        cast: how; `Cast()` is NVFP4 with 1×16 blocks, rounded to nearest.
        generator: source of all random numbers, on x's device; torch's default one if None.

    Returns:
        A `QuantizedTensor` with `.codes`, `.scales`, `.tensor_scale` and `.dequantize(dtype)`.

    Raises:
        TypeError: x is not a floating-point tensor. ValueError: wrong rank, size or format, or redrawn signs.
    """
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise TypeError(f"quantize takes float32, bfloat16 or float16, not {x.dtype}; convert it first")
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"quantize takes a non-empty 2-D tensor, not {tuple(x.shape)}; reshape it to [rows, features]")
    fmt = cast.block_format
    if cast.signs == "random":
        raise ValueError(
            "signs='random' are drawn for both operands of a GEMM, by a layer. Quantize "
            "hf_nvfp4.rounding.flip(x, seed, cast.hadamard, 1) with signs='fixed'."
        )
    if fmt.high_precision:
        raise ValueError(f"{cast.format!r} is a plain floating-point type: use x.to({fmt.element.dtype})")
    multiple = max(cast.hadamard, fmt.multiple)
    rows = fmt.multiple if cast.square else 1
    if x.shape[1] % multiple or x.shape[0] % rows:
        raise ValueError(
            f"{cast} needs [M, K] with M a multiple of {rows} and K of {multiple}; this tensor is "
            f"{x.shape[0]}×{x.shape[1]}. Pad it with zeros, or keep this layer in high precision."
        )
    return pack(quantize_blocks(x, cast, generator), cast)
