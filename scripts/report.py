"""Compare training runs: table, plot and model card from the JSON files of train.py and evaluate.py.

    python scripts/report.py runs/bf16 runs/fp8 runs/nvfp4 --output runs/report

Writes table.md, loss.png and MODEL_CARD.md, and prints the table. Runs that differ only in the seed are shown as
one, with mean and standard deviation. Of runs with train.py's --quantization_stats, a table and plots of those too:
quantization_stats.png, or quantization_stats-RUN.png of several.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from hf_nvfp4 import cards, plots, report
from hf_nvfp4.scores import write_atomically

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "TEMPLATE.md"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="DIR", help="folders that scripts/train.py wrote")
    add("--output", type=Path, required=True, metavar="DIR", help="where table, plot and card go")
    add(
        "--card",
        type=Path,
        metavar="FILE",
        help="where the model card goes (default: MODEL_CARD.md in --output)",
    )
    add("--template", type=Path, default=TEMPLATE, metavar="FILE", help="the card's Jinja template")
    add(
        "--language",
        nargs="+",
        default=["en"],
        help="of the training text, for the card (ISO 639, or 'code')",
    )
    add("--license", default="apache-2.0", help="of the models, for the card")
    return parser.parse_args(argv)


def write_stats(variants: list[report.Variant], folder: Path) -> tuple[str, dict[str, Path]]:
    """A section for table.md, and the plot of each run that has measured its quantization, by name; written."""
    runs = [run for variant in variants for run in variant.runs]
    names = [run.record["name"] for run in runs]
    unique = {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)}
    found = {name: rows for name, run in unique.items() if (rows := report.read_stats(run))}
    if not found:
        return "", {}
    endings = {name: "-" + re.sub(r"[^\w.-]", "_", name) if len(found) > 1 else "" for name in found}
    files = {name: f"quantization_stats{ending}.png" for name, ending in endings.items()}
    for name, rows in found.items():
        write_atomically(folder / files[name], plots.quantization_stats_png(rows, name))
    links = "\n\n".join(f"![{name}]({file})" for name, file in files.items())
    section = f"\n## Quantization, at the last step measured\n\n{report.stats_table(found)}\n\n{links}\n"
    return section, {name: folder / file for name, file in files.items()}


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parse(argv)
    try:
        variants = report.read_variants(args.runs)
        stats, stats_plots = write_stats(variants, args.output)
    except report.ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    table, plot = report.full_table(variants) + stats, args.output / "loss.png"
    card_path = args.card or args.output / "MODEL_CARD.md"
    print(f"{report.headline(variants)}\n\n{table}")
    write_atomically(args.output / "table.md", table.encode())
    write_atomically(plot, plots.figure_png(variants))
    link, *links = (Path(os.path.relpath(p, card_path.parent)).as_posix() for p in (plot, *stats_plots.values()))
    linked = dict(zip(stats_plots, links, strict=True))
    card = cards.model_card(variants, args.template, link, args.language, args.license, linked)
    write_atomically(card_path, str(card).encode())
    print(f"table: {args.output / 'table.md'}\nplot:  {plot}\ncard:  {card_path}")
    for path in stats_plots.values():
        print(f"quantization: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
