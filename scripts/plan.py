#!/usr/bin/env python
"""What a training run takes of each GPU, before there are any: memory, and bytes communicated in a step.

    python scripts/plan.py --model 8b --fsdp 8
    # Thousands of GPUs: a mixture of experts folded over the GPUs of attention (MoE Parallel Folding)
    python scripts/plan.py --model mistralai/Mixtral-8x22B-v0.1 --tp 4 --cp 2 --fsdp 32 --pp 8 --ep 8 --accumulation 32
    # Recipes side by side
    python scripts/plan.py --model 1b --fsdp 2 --recipes bf16 fp8 nvfp4 --sequences 8

Arithmetic, of the formulas in hf_nvfp4/planning.py: nothing is run, and no weights are made.
"""

import argparse
import sys
from dataclasses import fields

from transformers import AutoConfig

from hf_nvfp4 import planning
from hf_nvfp4.integration import NVFP4TrainingConfig
from hf_nvfp4.planning import CARRIERS, OPTIMIZERS, Mesh, Run
from hf_nvfp4.recipes import RECIPES
from hf_nvfp4.scores import markdown_table
from hf_nvfp4.sizes import SIZES, TIMED

GIB = 2**30


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = ", ".join({**SIZES, **TIMED})
    add("--model", "--size", default="8b", metavar="CONFIG", help=f"a config.json, folder, Hub name, or of {known}")
    add("--recipes", nargs="+", choices=RECIPES, default=["bf16", "nvfp4_hopper", "nvfp4"], metavar="NAME")
    for dimension in fields(Mesh):
        add(f"--{dimension.name}", type=int, default=1, metavar="N", help=CARRIERS[dimension.name])
    add("--sequences", type=int, default=1, metavar="N", help="of a data-parallel rank and forward pass (default: 1)")
    add("--sequence_length", type=int, default=4096, metavar="T", help="in tokens (default: 4096)")
    add("--accumulation", type=int, default=1, metavar="N", help="forward passes a step (default: 1)")
    add("--weights", type=int, choices=(2, 4), default=4, help="bytes a master weight (default: 4)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--gradient_checkpointing", action="store_true")
    add("--gather_4bit", action="store_true", help="FSDP2 gathering NVFP4: planned, not built")
    args = parser.parse_args(argv)
    if min(args.sequences, args.sequence_length, args.accumulation) < 1:
        parser.error("--sequences, --sequence_length and --accumulation are at least 1")
    return args


def config_of(name: str):
    """The Transformers config of a named size, file, folder or repository of the Hub."""
    shape = {**SIZES, **TIMED}.get(name)
    return shape.config(shape.vocabulary, shape.sequence_length, {}) if shape else AutoConfig.from_pretrained(name)


def number(size: float) -> str:
    return f"{size / GIB:,.2f}" if size else "—"


def main(argv: list[str] | None = None) -> int:
    """Print the plan; returns 1 where something that was given can't be planned."""
    args = parse(argv)
    try:
        mesh = Mesh(**{dimension.name: getattr(args, dimension.name) for dimension in fields(Mesh)})
        config, columns = config_of(args.model), {}
        for name in args.recipes:
            sizes = planning.sizes_of(config, NVFP4TrainingConfig(name).choice())
            recipe, fp8 = RECIPES[name], RECIPES[name].wgrad.b.scale_rule == "fp8_exact"
            run = Run(
                recipe, args.sequences, args.sequence_length, args.accumulation, args.weights, args.optimizer,
                args.gradient_checkpointing, args.gather_4bit and recipe.fprop.b.format == "nvfp4", fp8,
            )  # fmt: skip
            columns[name] = (sizes, planning.memory(sizes, mesh, run), planning.traffic(sizes, mesh, run), run)
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 1
    sizes = next(iter(columns.values()))[0]
    tokens = args.sequences * args.sequence_length * args.accumulation * mesh.fsdp * mesh.dp_replicate
    print(
        f"{args.model}: {sizes.parameters / 1e9:,.2f}B parameters ({sizes.experts / 1e9:,.2f}B in experts), "
        f"{mesh.gpus:,} GPUs, {tokens:,} tokens a step\n"
    )
    for name in CARRIERS:
        if getattr(mesh, name) > 1:
            print(f"{name} {getattr(mesh, name)}: {CARRIERS[name]}")
    rows = [[part, *(number(columns[name][1][part]) for name in columns)] for part in next(iter(columns.values()))[1]]
    rows.append(["**peak**", *(number(planning.peak(parts, run)) for _, parts, _, run in columns.values())])
    print("\n" + markdown_table(["GiB on each GPU", *columns], rows))
    moved = next(iter(columns.values()))[2]
    rows = [[part, *(number(columns[name][2][part]) for name in columns)] for part, size in moved.items() if size]
    if rows:
        rows.append(["**all**", *(number(sum(columns[name][2].values())) for name in columns)])
        print("\n" + markdown_table(["GiB received by each GPU, a step", *columns], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
