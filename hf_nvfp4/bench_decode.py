"""What `scripts/bench.py decode` times: one decode step of a whole model, weights packed, against BF16.

Random weights, a static cache that is full but for the new token. Knows Transformers' generation cache and packed
layers; knows neither tables nor training.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

from hf_nvfp4 import bench_tables as tables
from hf_nvfp4 import timing
from hf_nvfp4.bench_inference import TOLERANCE, W4A16
from hf_nvfp4.bench_model import choice_of, free, model_config
from hf_nvfp4.bench_rows import recorded, time_rows
from hf_nvfp4.bench_tables import BASE
from hf_nvfp4.benchmarks import SEED, Variant, check_close
from hf_nvfp4.integration import quantize_model
from hf_nvfp4.packed import PackedLinear, pack_model

# Tokens that a cache has room for: as many steps as the timing takes.
ROOM = 128


def plain_model(args: argparse.Namespace) -> nn.Module:
    """args.model with random weights in BF16, the same each time, in eval mode."""
    torch.manual_seed(SEED)
    with args.device:
        network = AutoModelForCausalLM.from_config(model_config(args), dtype=torch.bfloat16)
    return network.eval().requires_grad_(False)


def packed_model(args: argparse.Namespace, variant: Variant, plain: nn.Module) -> nn.Module:
    """The same with packed layers; what stays in BF16 is shared with `plain`."""
    # Parameters are shared, so that both fit; converted layers get packed weights of their own.
    network = copy.deepcopy(plain, {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())})
    quantize_model(network, choice_of(args, variant))
    return pack_model(network)


def compile_blocks(network: nn.Module, how: str) -> None:
    """As Trainer compiles: each block of the outermost lists by itself ("regional"), the model as one ("whole").

    A block's place in the cache is a constant of its code: each is compiled anew, which torch limits to 8 by default.
    """
    if how == "whole":
        network.compile(dynamic=False)
    for name, module in network.named_modules() if how == "regional" else ():
        if isinstance(module, nn.ModuleList) and "." not in name.removeprefix(network.base_model_prefix + "."):
            for block in module:
                block.compile(dynamic=False)


def decode_step(args: argparse.Namespace, network: nn.Module, batch: int) -> Callable[[], Tensor]:
    """A call that decodes one more token of each sequence, greedily, and returns the logits [batch, 1, vocabulary].

    Before the first call the static cache holds args.sequence_length - `ROOM` tokens, drawn at random; it takes `ROOM`.
    """
    cache = StaticCache(network.config, max_cache_len=args.sequence_length)
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(network.config.vocab_size, (batch, args.sequence_length - ROOM), generator=generator)
    token = torch.zeros(batch, 1, dtype=torch.long, device=args.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # once: not worth compiling
        network(prompt.to(args.device), past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step() -> Tensor:
        logits = network(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        return logits

    return step


@torch.no_grad()
def check_layers(network: nn.Module, batch: int) -> dict:
    """One packed layer of each shape against float64. Raises Wrong if one is off."""
    shapes = {(x.in_features, x.out_features): x for x in network.modules() if isinstance(x, PackedLinear)}
    errors = []
    for layer in shapes.values():
        x = torch.randn(batch, layer.in_features, device=layer.codes.device, dtype=torch.bfloat16)
        expected = x.double() @ layer.quantized().dequantize(torch.float64).T
        expected = expected if layer.bias is None else expected + layer.bias.double()
        errors.append(check_close("y", layer(x), expected, TOLERANCE))
    return {"check": f"{len(shapes)} shapes within {max(errors):.1e}"}


def weight_bytes(network: nn.Module) -> int:
    """Of parameters and packed weights, each once."""
    packed = [module for module in network.modules() if isinstance(module, PackedLinear)]
    return sum(p.nbytes for p in network.parameters()) + sum(layer.weight_bytes for layer in packed)


def bench_decode(args: argparse.Namespace) -> tuple[dict, str]:
    """Decode steps of one model at each batch, in BF16 and packed: rows, table."""
    free(args.device)
    models = {BASE: plain_model(args)}
    models |= {f"{W4A16} {v.recipe.name}": packed_model(args, v, models[BASE]) for v in args.variants}
    for network in models.values():
        compile_blocks(network, args.compile)
    limit = 256 + sum(1 for _ in models[BASE].modules())
    with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
        rows = time_models(args, models)
    return rows, tables.decode_table(rows, args.compile, args.sequence_length, args.eager)


def time_models(args: argparse.Namespace, models: dict[str, nn.Module]) -> dict[str, dict]:
    """A row for each model and batch."""
    rows = {}
    for batch in args.batches:
        runs, steps = {}, {}
        found = {name: {} for name in models}
        for name, network in models.items():
            with recorded(found[name]):
                found[name] |= {"batch": batch, "weight_bytes": weight_bytes(network), "check": "random weights"}
                found[name] |= {} if name == BASE else check_layers(network, batch)
                steps[name] = runs[name] = decode_step(args, network, batch)
                if not args.eager:
                    runs[name] = timing.captured(runs[name], args.device)
        time_rows(found, runs, BASE, args, {name: steps[name] for name in runs})
        for row in found.values():
            if "time" in row:
                row["tokens_per_second"] = batch / row["time"]["median_seconds"]
        rows |= {f"{name}, batch {batch}": row for name, row in found.items()}
    return rows
