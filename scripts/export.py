"""Write a trained model as a checkpoint for vLLM, SGLang, TensorRT-LLM and Transformers.

    # Weight-only NVFP4 (W4A16), compressed-tensors: needs neither text nor a GPU
    python scripts/export.py runs/nvfp4 exports/nvfp4
    # 4-bit activations too (W4A4): their scales are measured on 64 sequences of text
    python scripts/export.py runs/nvfp4 exports/nvfp4-w4a4 --calibrate 64 --train_file 'texts/*.parquet'
    # ModelOpt's layout; plain BF16; a checkpoint that was not trained in NVFP4
    python scripts/export.py runs/nvfp4 exports/modelopt --format modelopt
    python scripts/export.py runs/fp8 exports/plain --format plain
    python scripts/export.py path/to/bf16 exports/ptq --recipe nvfp4

The folder appears complete or not at all. Prints what was packed, its size, and what an engine will do differently.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from hf_nvfp4 import export
from hf_nvfp4.data import DataArguments, load_corpus
from hf_nvfp4.exporting import FORMATS, FUSED_CHOICES
from hf_nvfp4.packing import StreamedDataset, load_tokenizer
from hf_nvfp4.recipes import RECIPES
from hf_nvfp4.runlog import describe_device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="folder of a checkpoint in safetensors")
    add("output", type=Path, metavar="OUT", help="folder to write; it must not exist")
    add("--format", choices=FORMATS, default=FORMATS[0])
    add("--recipe", choices=RECIPES, help="quantize as this recipe does (default: as the checkpoint was trained)")
    add("--fused", choices=FUSED_CHOICES, default="shared", help="tensor scales of q/k/v and gate/up (default: shared)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="compute dtype of training, and of all that is not packed")
    add("--calibrate", type=int, default=0, metavar="N", help="4-bit activations, measured on N sequences of text")
    add("--sequence_length", type=int, default=512, metavar="T", help="their length in tokens")
    add("--train_file", nargs="+", metavar="FILE", help="text to calibrate on (default: Python's standard library)")
    add("--dataset_name", metavar="NAME", help="the same from a dataset on the Hub")
    return parser.parse_args(argv)


def batches(args: argparse.Namespace):
    """The calibration text as input_ids [1, T], one sequence after the other."""
    corpus = load_corpus(DataArguments(train_file=args.train_file, dataset_name=args.dataset_name))
    sequences = StreamedDataset(corpus.train, load_tokenizer(str(args.model)), args.sequence_length)
    return [example["input_ids"][None] for example in itertools.islice(sequences, args.calibrate)]


def main(argv: list[str] | None = None) -> int:
    """Run; returns 1 where something that was given can't be used."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = f"recipe {args.recipe or 'of training'}" if args.format != "plain" else "no quantization"
    print(f"device: {describe_device(device, 1)['name']}; format: {args.format}; {how}", flush=True)
    try:
        summary = export(
            args.model,
            args.output,
            args.format,
            calibration=batches(args) if args.calibrate else None,
            recipe=args.recipe,
            dtype=DTYPES[args.dtype],
            fused=args.fused,
        )
    except ValueError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    print(f"{summary.describe()}\n\n{summary.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
