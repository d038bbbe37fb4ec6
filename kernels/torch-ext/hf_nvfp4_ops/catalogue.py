"""Launches of cast.py, dequantize.py, grouped.py, rotate.py and w4a16.py that layers make, to compile without a GPU.

See variants.py.
"""

from dataclasses import replace

from .cast import amax_kernel, cast_kernel
from .conversion import NONE, STOCHASTIC, TO_NEAREST
from .dequantize import dequantize_kernel, factors_kernel
from .grouped import ACROSS, ROWS, SIDE_BY_SIDE, UNIT, WALK, columns_kernel, rows_kernel
from .grouped import tiles_for as grouped_tiles_for
from .launch import OPTIONS, tile_for, tile_for_values
from .rotate import NUM_WARPS, NUM_WARPS_TRANSPOSED, constants, rotate_kernel, rotate_transposed_kernel
from .spec import CODES, CODES_ACROSS, CODES_SWIZZLED, FP8, GRIDS, NOTHING, VALUES, Plan, Spec, plan
from .variants import Variant
from .w4a16 import w4a16_kernel
from .w4a16_tiles import fit, tiles_for

_NVFP4 = Spec()
_SR = Spec(rounding="stochastic")
_2D = Spec(square=True)
_RHT, _RHT_SR = Spec(hadamard=16), Spec(hadamard=16, rounding="stochastic")
_FP8, _FP8_2D = Spec("e4m3", 128, "float32"), Spec("e4m3", 128, "float32", square=True)
_E4M3, _E5M2 = Spec("e4m3", 0, "none"), Spec("e5m2", 0, "none")
_EXACT, _EXACT_2D = Spec(scale_rule="fp8_exact"), Spec(scale_rule="fp8_exact", square=True)
_EXACT_SR = Spec(scale_rule="fp8_exact", rounding="stochastic")
_EDEN, _EDEN_EXACT = Spec(rounding="eden"), Spec(rounding="eden", scale_rule="fp8_exact")
_MXFP4, _MXFP8 = Spec("e2m1", 32, "e8m0"), Spec("e4m3", 32, "e8m0")

# name: row's Spec and output, col's.
_CASTS = {
    "nvfp4_x": (_NVFP4, VALUES, _RHT, CODES_ACROSS),
    "nvfp4_w": (_2D, VALUES, None, NOTHING),
    "nvfp4_dy": (_SR, VALUES, _RHT_SR, VALUES),
    "nvfp4_eval": (Spec(per_row=True), VALUES, None, NOTHING),
    "nvfp4_packed": (_NVFP4, CODES, _2D, CODES),
    "nvfp4_native_x": (_NVFP4, CODES_SWIZZLED, _RHT, CODES_SWIZZLED),
    "nvfp4_native_w": (_2D, CODES_SWIZZLED, _2D, CODES_SWIZZLED),
    "nvfp4_native_dy": (_SR, CODES_SWIZZLED, _RHT_SR, CODES_SWIZZLED),
    "nvfp4_4over6": (Spec(scale_rule="4over6"), VALUES, Spec(scale_rule="4over6", square=True), CODES),
    "nvfp4_best": (Spec(scale_rule="best"), VALUES, Spec(scale_rule="best"), CODES),
    "eden": (_EDEN, VALUES, None, NOTHING),
    "eden_best": (_EDEN._replace(scale_rule="best"), VALUES, None, NOTHING),
    "eden_packed": (_EDEN, CODES, None, NOTHING),
    "eden_native": (_EDEN, CODES_SWIZZLED, None, NOTHING),
    "eden_exact": (_EDEN_EXACT, VALUES, None, NOTHING),
    "fp8_x": (_FP8, VALUES, _FP8, CODES_ACROSS),
    "fp8_w": (_FP8_2D, VALUES, None, NOTHING),
    "fp8_tensor": (_E5M2, VALUES, _E4M3, CODES_ACROSS),
    "mxfp4": (_MXFP4, VALUES, _MXFP4._replace(rounding="stochastic", headroom=4 / 3), VALUES),
    "mxfp8": (_MXFP8._replace(scale_rule="ceil"), VALUES, _MXFP8, CODES),
}
# The same with E4M3 bytes, of which sm_80 has no type.
_FP8_CASTS = {
    "fp8_exact_x": (_EXACT, FP8, _EXACT._replace(hadamard=16, bound=True), FP8),
    "fp8_exact_w": (_EXACT_2D, FP8, None, NOTHING),
    "fp8_exact_w_across": (None, NOTHING, _EXACT_2D, FP8),
    "fp8_exact_dy": (_EXACT_SR, FP8, _EXACT_SR._replace(hadamard=16, bound=True), FP8),
    "fp8_exact_eden": (_EDEN_EXACT, FP8, None, NOTHING),
    "fp8_rounded": (_NVFP4, FP8, _RHT, FP8),
    "fp8_rounded_eden": (_EDEN, FP8, None, NOTHING),
}
# Those of them whose codes come from conversion instructions where there are some, and what their PTX then has.
_TO_NEAREST = ("nvfp4_x", "nvfp4_packed", "nvfp4_native_x", "nvfp4_native_w", "nvfp4_best", "eden_native")
_CVT_RN, _CVT_RS = r"cvt\.rn\.satfinite\.e2m1x2\.f32", r"cvt\.rs\.satfinite\.e2m1x4\.f32"


def _data(spec: Spec | None, out: int) -> dict[str, str]:
    """Types of an orientation's outputs."""
    scales = "*fp32" if spec is not None and spec.scale == "float32" else "*u8"
    return {
        "": "*i32" if out in (CODES, CODES_ACROSS, CODES_SWIZZLED, FP8) else "*bf16" if out == VALUES else "*u8",
        "_scales": scales,
        "_scale": "*fp32",
    }


def _cast(
    name: str, row: Spec | None, row_out: int, col: Spec | None, col_out: int, x: str = "*bf16", hardware: int = NONE,
    groups: int = 0
) -> Variant:
    row_plan, col_plan = (plan(None if s is None else str(s)) for s in (row, col))
    tile = tile_for(row_plan, col_plan, 128 if groups else 0)
    types = {"x_ptr": x, "amax_ptr": "*fp32", "row_seed_ptr": "*i32", "col_seed_ptr": "*i32"}
    types |= {f"row{suffix}_ptr": t for suffix, t in _data(row, row_out).items()}
    types |= {f"col{suffix}_ptr": t for suffix, t in _data(col, col_out).items()}
    types |= {name: "i32" for name in ("M", "K", "stride", "M_PADDED", "unit")}
    types |= {"groups_ptr": "*i32"} if groups else {}
    constexprs = {"ROW": row_plan, "ROW_OUT": row_out, "COL": col_plan, "COL_OUT": col_out, "EVEN": True}
    constexprs |= {"GROUPS": groups} if groups else {"GROUPS": 0, "groups_ptr": None}
    constexprs |= {**tile.constexprs, "HARDWARE": hardware}
    options = {"num_warps": tile.num_warps, **OPTIONS}
    return Variant(f"cast_{name}", cast_kernel, types, constexprs, options, ("M", "K", "stride", "M_PADDED", "unit"))


def _by_instruction(name: str, suffix: str, hardware: int, instruction: str, last: int) -> Variant:
    """A cast of `_CASTS` as it is launched on sm_100 and later."""
    variant = _cast(f"{name}_{suffix}", *_CASTS[name], hardware=hardware)
    return replace(variant, min_arch=100, max_arch=last, expect={arch: instruction for arch in (100, 120)})


def _amax(name: str, hadamard: int, groups: int = 0) -> Variant:
    col = Plan(hadamard > 0, hadamard=hadamard, hadamard_factor=max(hadamard, 1) ** -0.5)
    tile = tile_for(Plan(True), col)
    types = {"x_ptr": "*bf16", "out_ptr": "*i32"} | {name: "i32" for name in ("M", "K", "stride", "unit")}
    types |= {"groups_ptr": "*i32"} if groups else {}
    constexprs = {"ROW": Plan(True), "COL": col, "EVEN": True, "GROUPS": groups, **tile.constexprs}
    constexprs |= {} if groups else {"groups_ptr": None}
    options = {"num_warps": tile.num_warps, **OPTIONS}
    return Variant(f"amax_{name}", amax_kernel, types, constexprs, options, ("M", "K", "stride", "unit"))


def _grouped(name: str, a: str, b: str, layout: int | None, hopper: bool, bias: bool = False) -> Variant:
    """A product of groups of rows; layout: None: of their columns (wgrad). hopper: with its own tiles."""
    fp8, wgrad = a != "bf16", layout is None
    tiles = grouped_tiles_for(fp8, layout, hopper)
    across = wgrad and not fp8
    of_a = [tiles.k, tiles.m] if across else [tiles.m, tiles.k]
    of_b = [tiles.k, tiles.n] if across or layout == ACROSS else [tiles.n, tiles.k]
    types = {n: f"tensordesc<{t}{list(of)}>".replace(" ", "") for n, t, of in (("a", a, of_a), ("b", b, of_b))}
    types |= {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "y_ptr": "*bf16", "M": "i32", "N": "i32"}
    grids = {"fp8e4nv": GRIDS["e4m3"], "fp8e5": GRIDS["e5m2"]}
    constexprs = {"A_GRID": grids.get(a), "B_GRID": grids.get(b), "WALK": WALK}
    constexprs |= {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k}
    if wgrad:
        types |= {"bounds_ptr": "*i32"}
        constexprs |= {"ACROSS": across}
    else:
        types |= {"groups_ptr": "*i32", "K": "i32"} | (dict(bias_ptr="*bf16", ends_ptr="*i32") if bias else {})
        constexprs |= {"LAYOUT": layout, "SCALES_OF_ROWS": False, "EVEN": True, "UNIT": UNIT}
        constexprs |= {} if bias else {"bias_ptr": None, "ends_ptr": None}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, **OPTIONS}
    kernel = columns_kernel if wgrad else rows_kernel
    kind = "e4m3|e5m2" if fp8 else "bf16"
    expect = {90: rf"wgmma\.mma_async\.\S*({kind})"} | ({} if fp8 else {80: r"mma\.sync\.\S*bf16"})
    divisible = tuple(name for name in ("M", "N", "K") if name in types)
    arch = {"min_arch": 90, "max_arch": 90} if hopper else {"min_arch": 89 if fp8 else 80}
    name = f"grouped_{name}" + "_hopper" * hopper
    return Variant(name, kernel, types, constexprs, options, divisible, **arch, expect=expect)


def _dequantize(name: str, spec: Spec, across: bool) -> Variant:
    p = plan(str(spec))
    R, B, num_warps = tile_for_values(across)
    scales = _data(spec, CODES)["_scales"]
    types = {"codes_ptr": "*i32", "scales_ptr": scales, "out_ptr": "*bf16", "M": "i32", "K": "i32"}
    constexprs = {"P": p, "ACROSS": across, "EVEN": True, "R": R, "B": B}
    options = {"num_warps": num_warps, **OPTIONS}
    return Variant(f"dequantize_{name}", dequantize_kernel, types, constexprs, options, ("M", "K"))


def _rotate(size: int, drawn: bool = False, transposed: bool = False) -> Variant:
    kernel = rotate_transposed_kernel if transposed else rotate_kernel
    integers = ("M", "K", "stride", "M_PADDED") if transposed else ("blocks",)
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16"} | {name: "i32" for name in integers}
    constexprs = constants(size, drawn, transposed) | ({} if drawn else {"seed_ptr": None})
    types |= {"seed_ptr": "*i32"} if drawn else {}
    options = {"num_warps": NUM_WARPS_TRANSPOSED if transposed else NUM_WARPS, **OPTIONS}
    name = f"rotate_{size}" + "_transposed" * transposed + "_drawn" * drawn
    return Variant(name, kernel, types, constexprs, options, integers)


def _w4a16(name: str, m: int, n: int, k: int, fp8: bool = True, pdl: bool = True) -> Variant:
    """The product of x [m, k] and a packed weight [n, k]; fp8, pdl: where `abilities` says so."""
    tiles = tiles_for(m, n, k)
    types = {"x_ptr": "*i32", "codes_ptr": "*i32", "scales_ptr": "*u8", "outer_ptr": "*fp32", "y_ptr": "*bf16"}
    types |= {"N": "i32", "K": "i32"} | ({"M": "i32"} if m > 1 else {})
    constexprs = {"WARPS": tiles.warps, "TILES": tiles.tiles, "TOKENS": tiles.tokens, "DEPTH": tiles.depth}
    constexprs |= {"WIDE": tiles.wide, "SPREAD": tiles.spread, "FIT": fit(k, tiles), "FP8": fp8, "PDL": pdl}
    constexprs |= {"bias_ptr": None} | ({} if m > 1 else {"M": 1})
    arch = {"min_arch": 90} if pdl else {"min_arch": 89, "max_arch": 89} if fp8 else {"max_arch": 86}
    instruction = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"
    expect = {arch: instruction for arch in (80, 89, 90, 100, 120)}
    options = {"num_warps": tiles.warps, **OPTIONS}
    return Variant(f"w4a16_{name}", w4a16_kernel, types, constexprs, options, ("N", "K"), **arch, expect=expect)


VARIANTS = [
    *map(_rotate, (32, 128, 4096)),
    _rotate(128, drawn=True),
    *(_rotate(size, drawn, transposed=True) for size in (32, 128, 256) for drawn in (False, True)),
    _amax("tensor", 0),
    _amax("both", 16),
    *(_cast(name, *arguments) for name, arguments in _CASTS.items()),
    *(replace(_cast(name, *arguments), min_arch=89) for name, arguments in _FP8_CASTS.items()),
    _cast("nvfp4_x_fp32", *_CASTS["nvfp4_x"], x="*fp32"),
    *(_by_instruction(name, "cvt_rn", TO_NEAREST, _CVT_RN, 120) for name in _TO_NEAREST),
    _by_instruction("nvfp4_native_dy", "cvt_rs", STOCHASTIC, _CVT_RS, 100),  # opt-in
    _dequantize("nvfp4", _NVFP4, False),
    _dequantize("nvfp4_across", _NVFP4, True),
    _dequantize("fp8_across", _FP8, True),
    _dequantize("fp8_tensor_across", _E5M2, True),
    _dequantize("mxfp4", _MXFP4, False),
    _amax("grouped", 16, groups=8),
    replace(_cast("grouped_fp8_exact_dy", *_FP8_CASTS["fp8_exact_dy"], groups=8), min_arch=89),
    _grouped("fprop", "bf16", "bf16", ROWS, False, bias=True),
    _grouped("wgrad", "bf16", "bf16", None, False),
    _grouped("dgrad_fp8", "fp8e5", "fp8e4nv", SIDE_BY_SIDE, False),
    _grouped("wgrad_fp8", "fp8e4nv", "fp8e4nv", None, False),
    _grouped("fprop", "bf16", "bf16", ROWS, True, bias=True),
    _grouped("dgrad", "bf16", "bf16", ACROSS, True),
    _grouped("wgrad", "bf16", "bf16", None, True),
    _grouped("fprop_fp8", "fp8e4nv", "fp8e4nv", ROWS, True),
    _grouped("dgrad_fp8", "fp8e5", "fp8e4nv", SIDE_BY_SIDE, True),
    _w4a16("1_token_wide", 1, 14336, 4096),
    _w4a16("1_token_long", 1, 4096, 14336),
    _w4a16("4_tokens", 4, 14336, 4096),
    _w4a16("16_tokens", 16, 14336, 4096),
    _w4a16("64_tokens", 64, 4096, 14336),
    _w4a16("ragged", 4, 4096, 4112),
    _w4a16("1_token_ada", 1, 14336, 4096, pdl=False),
    _w4a16("1_token_by_integers", 1, 14336, 4096, fp8=False, pdl=False),
    _w4a16("ragged_by_integers", 4, 4096, 4112, fp8=False, pdl=False),
    Variant("factors", factors_kernel, {n: "*fp32" for n in ("scale_a_ptr", "scale_b_ptr", "out_ptr")}, {"ADD": False}),
]
