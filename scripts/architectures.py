"""The support table: every causal LM of the installed Transformers, tiny, one training step in NVFP4, saved and loaded.

    python scripts/architectures.py
    python scripts/architectures.py --only LlamaForCausalLM mamba2 --output -

Takes about 1 s a model on one core. Prints the table and writes it to --output.
"""

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from hf_nvfp4 import architecture_tables, architectures
from hf_nvfp4.runlog import versions
from hf_nvfp4.scores import write_atomically


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes or model types; without --output, no file")
    parser.add_argument("--output", metavar="FILE", help="default: ARCHITECTURES.md; -: none")
    parser.add_argument("--seconds", type=float, default=120, help="that a model has")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="processes at a time, of one thread each")
    args = parser.parse_args(argv)
    if args.parallel < 1 or args.seconds <= 0:
        parser.error("--parallel and --seconds have to be positive")
    args.output = args.output or ("-" if args.only else "ARCHITECTURES.md")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0 if all pass that can be built, else 1."""
    args = parse(argv)
    types = architectures.causal_lms()
    try:
        names = architectures.named(args.only, types)
    except ValueError as error:
        print(f"architectures: {error}", file=sys.stderr)
        return 2
    print(f"device cpu · backend bf16 · recipe {architectures.RECIPE.name} · {len(names)} models", flush=True)
    with tqdm(total=len(names), unit="model", disable=None) as bar:

        def done(row: architectures.Row) -> None:
            bar.update()
            bar.set_postfix_str(row.name)
            if row.status == "fail":
                tqdm.write(f"{row.name}: {row.reason}")

        rows = architectures.check_all(names, args.seconds, args.parallel, done)
    print(architecture_tables.table(rows, types))
    print(architecture_tables.count_line(rows))
    if args.output != "-":
        command = shlex.join(["python", "scripts/architectures.py", *(sys.argv[1:] if argv is None else argv)])
        content = architecture_tables.page(rows, types, command, versions()).encode()
        write_atomically(Path(args.output), content)
        print(f"written: {args.output}")
    return int(any(row.status == "fail" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
