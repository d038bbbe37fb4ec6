"""Ways to compute "cast both operands, multiply". One file a backend; fastest first, which is auto's order.

A backend is a module with
    supports(recipe, device) -> str | None    why it can't run the recipe there; None if it can
    exactness(recipe) -> str                  "exact", or what it rounds beyond the recipe
    cast(x, row, col, keep_col, signs=None) -> (a, b)
                                              x [M, K] quantized along K by `row`, and xᵀ along M by `col` (M padded
                                              with zeros); None for what is not asked for. Rounding that draws
                                              draws row's seed first. keep_col: b as small as can be, to save it.
                                              signs: seed of the drawn signs of a rotation; for one of both alone.
    operand_of(q, across) -> a                an operand [M, K] of NVFP4 codes that were cast before, a QuantizedTensor;
                                              across: of its transpose, whose blocks are square
    multiply(a, b, dtype, bias) -> Tensor     [M, K] @ [N, K].T -> [M, N]
An operand is a dataclass of tensors and, last, its cast; `tensors` gives the former.
"""

from hf_nvfp4.backends import bf16, fp4, fp4_triton, fp8, fp8_rounded, reference

BACKENDS = {
    "fp4": fp4,
    "fp8": fp8,
    "bf16": bf16,
    "fp4_triton": fp4_triton,
    "reference": reference,
    "fp8_rounded": fp8_rounded,
}
# Not exact where others are: "auto" never takes them, nor does an error advise them.
BY_NAME_ONLY = frozenset({"fp8_rounded"})
