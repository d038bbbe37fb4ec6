"""What `scripts/bench.py inference` times: a linear layer with a packed weight against F.linear in BF16.

As in decoding: several layers one after the other, each with a weight of its own that no cache holds. Each is compared
with the product in float64 before it is timed. Knows neither tables nor whole models.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nvfp4 import bench_tables as tables
from hf_nvfp4 import timing
from hf_nvfp4.bench_rows import recorded, time_rows
from hf_nvfp4.bench_tables import BASE, COPY
from hf_nvfp4.benchmarks import SEED, check_close
from hf_nvfp4.casts import Cast
from hf_nvfp4.reference import QuantizedTensor, quantize

W4A16 = "w4a16"
# Relative errors in the 2-norm: BF16 results err by 1.7e-3, their rounding.
TOLERANCE = 3e-3


def one_after_the_other(multiply: Callable, weights: list) -> list[Tensor]:
    """multiply(weight) of each weight."""
    return [multiply(weight) for weight in weights]


def _by_kernel(x: Tensor, tiles: tuple[int, ...] | None, q: QuantizedTensor) -> Tensor:
    # Not at the top: the package imports where Triton is not installed.
    from hf_nvfp4 import ops

    return ops.w4a16(x, q.codes, q.scales.view(torch.uint8), q.tensor_scale, None, tiles)


def weights(args: argparse.Namespace, shape: tuple[int, int]) -> tuple[list[Tensor], list[QuantizedTensor]]:
    """`args.layers_in_a_row` equal weights [out, in] in BF16, and as many packed ones."""
    k, n = shape
    torch.manual_seed(SEED)
    plain = torch.randn(n, k, device=args.device, dtype=torch.bfloat16) * k**-0.5
    q = quantize(plain, Cast())
    copies = range(args.layers_in_a_row)
    packed = [QuantizedTensor(*(t.clone() for t in q.tensors), q.cast) for _ in copies]
    return [plain.clone() for _ in copies], packed


def batch_rows(
    args: argparse.Namespace, batch: int, plain: list[Tensor], packed: list[QuantizedTensor]
) -> dict[str, dict]:
    """The products with one batch of rows of x: a row for BF16, one for each tiling of the kernel, one for a copy."""
    n, k = plain[0].shape
    x = torch.randn(batch, k, device=args.device, dtype=torch.bfloat16)
    calls = {BASE: (partial(F.linear, x), plain)}
    for tiles in (None, *args.tiles):
        name = W4A16 if tiles is None else f"{W4A16} {'x'.join(map(str, tiles))}"
        calls[name] = (partial(_by_kernel, x, tiles), packed)
    rows, runs, launches = {name: {} for name in calls}, {}, {}
    for name, (multiply, of) in calls.items():
        with recorded(rows[name]):
            values = of[0].double() if name == BASE else of[0].dequantize(torch.float64)
            error = check_close("y", multiply(of[0]), x.double() @ values.T, TOLERANCE)
            one = of[0].nbytes if name == BASE else sum(t.nbytes for t in of[0].tensors)
            rows[name] |= {"check": f"within {error:.1e}", "bytes": len(of) * (one + x.nbytes + 2 * batch * n)}
            launches[name] = runs[name] = partial(one_after_the_other, multiply, of)
            if not args.eager:
                runs[name] = timing.captured(runs[name], args.device)
    to = torch.empty_like(plain[0])
    rows[COPY] = {"check": "of the BF16 weights", "bytes": 2 * len(plain) * to.nbytes}
    runs[COPY] = partial(one_after_the_other, to.copy_, plain)
    time_rows(rows, runs, BASE, args, launches)
    for row in rows.values():
        if "time" in row:
            row["bytes_per_second"] = row["bytes"] / row["time"]["median_seconds"]
            row["layer_seconds"] = row["time"]["median_seconds"] / len(plain)
    for row in rows.values():
        if "time" in row and "time" in rows[COPY]:
            row["share_of_copy"] = row["bytes_per_second"] / rows[COPY]["bytes_per_second"]
    return rows


def bench_inference(args: argparse.Namespace, shape: tuple[int, int]) -> tuple[dict, str]:
    """A layer of in, out = shape at each batch: rows, table."""
    plain, packed = weights(args, shape)
    rows = {}
    for batch in args.batches:
        rows |= {f"{name}, batch {batch}": row for name, row in batch_rows(args, batch, plain, packed).items()}
    return rows, tables.inference_table(rows, len(plain), args.eager)
