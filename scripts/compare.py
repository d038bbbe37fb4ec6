"""Train a list of recipes on the same data with the same seeds, and compare them: loss gaps, speed, memory.

    python scripts/compare.py --recipes bf16 nvfp4 nvfp4_hopper --seeds 1 2 --output runs/compare
    # Options of scripts/train.py for all runs after --; for one recipe behind a colon; a backend behind an @
    python scripts/compare.py --recipes bf16 nvfp4 nvfp4@bf16:keep_bf16_last=0 --seeds 1 2 3 --output runs/30m \\
        -- --config scripts/configs/30m.yaml --max_steps 2000

    # For ten minutes, three runs at once on each GPU; again until the exit status is no longer 3
    python scripts/compare.py --recipes bf16 nvfp4 --seeds 1 2 --output runs/30m --minutes 9 --parallel 3
    # Table and plots of all finished runs in a folder, wherever they were trained
    python scripts/compare.py --output runs/30m --only_report

Each run is a process of scripts/train.py with a folder of its own in --output and its log beside it, one on each GPU
at a time. A run with the same seed has the same initial weights and the same data order, whatever the recipe. The
same command again goes on where it was cut off, and adds the runs of new recipes and seeds. Checkpoints are saved
when a run is stopped (with --minutes also as train.py does by default) and deleted when it has finished; text is
tokenized once, into cache/ in --output, unless --cache_dir stands after --.

Writes table.md, comparison.json, loss.png and gap.png. Exit status: 0, all has finished; 1, a run failed (the next call
tries it again); 3, --minutes were over; 128 + n, signal n came.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

from hf_nvfp4 import comparison, gaps, plots, report
from hf_nvfp4.data import InputError
from hf_nvfp4.processes import Signals, slots
from hf_nvfp4.scores import write_atomically, write_json

TRAIN = Path(__file__).resolve().parent / "train.py"
UNFINISHED = 3  # exit status


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line before and after --; see --help."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipes", nargs="+", metavar="RECIPE", help="recipe[@backend][:option=value,...]")
    add("--seeds", nargs="+", type=int, metavar="N", help="of initial weights, data order and rounding (default: 1)")
    add("--output", type=Path, required=True, metavar="DIR", help="where the runs, the table and the plots go")
    add("--base", default="bf16", metavar="RECIPE", help="the recipe that gaps are taken to (default: bf16)")
    add("--parallel", "--per_device", type=int, default=1, metavar="N", help="runs at once on each GPU (default: 1)")
    add("--minutes", type=float, metavar="M", help="stop after so long; stopping takes a minute at most")
    add("--keep_models", action="store_true", help="save trained models too (of runs that this call finishes)")
    add("--overwrite", action="store_true", help="train anew what is there with other settings")
    add("--only_report", action="store_true", help="train nothing; --recipes and --seeds choose among what is there")
    args = parser.parse_args(argv[:cut])
    if not args.recipes and not args.only_report:
        parser.error("--recipes is needed, except with --only_report")
    if args.parallel < 1 or args.minutes is not None and args.minutes <= 0:
        parser.error("--parallel and --minutes must be above zero")
    return args, argv[cut + 1 :]


def write_results(args: argparse.Namespace, folders: dict[str, list[Path]], more_notes: list[str] = ()) -> None:
    """Table, JSON and plots of finished runs; prints the table. Raises ReportError if there is none."""
    found = gaps.compare(folders, args.base)
    more_notes = [*comparison.speed_note(sum(folders.values(), [])), *more_notes]
    text = gaps.document(found, more_notes)
    write_atomically(args.output / "table.md", text.encode())
    write_json(args.output / "comparison.json", gaps.record(found, more_notes))
    write_atomically(args.output / "loss.png", plots.comparison_png(found))
    write_atomically(args.output / "gap.png", plots.gaps_png(found))
    names = ("table.md", "comparison.json", "loss.png", "gap.png")
    print(f"\n{text}\nwritten: {', '.join(str(args.output / name) for name in names)}")


def plan(args: argparse.Namespace, options: list[str], train: Path) -> list[comparison.Planned]:
    """The runs that the command line asks for."""
    comparison.check_options(options)
    saving = [f"--save_model={args.keep_models}"] + ([] if args.minutes else ["--save_strategy=no"])
    entries = comparison.parse_entries(args.recipes)
    return comparison.plan(train, entries, args.seeds or [1], args.output, [*saving, *options])


def compare(args: argparse.Namespace, options: list[str], train: Path, deadline: float) -> int:
    """Run all, then report; returns the exit status. deadline: by time.monotonic()."""
    runs = plan(args, options, train)
    on_cpu = any(run.args.training.use_cpu for run in runs)
    places = slots(on_cpu, args.parallel)
    shared_by = args.parallel if places[0].gpu else 1
    print(f"{len(runs)} runs on {', '.join(dict.fromkeys(map(str, places)))}: {', '.join(run.name for run in runs)}")
    with comparison.alone_in(args.output), Signals() as signals:
        todos = [dataclasses.replace(comparison.look(run), shared_by=shared_by) for run in runs]
        if not args.overwrite:
            comparison.refuse_other_settings(todos)
        outcome = comparison.run_all(todos, places, signals, deadline)
        notes = [f"{failure.run.name} is missing: {failure.why}." for failure in outcome.failures]
        notes += [f"{run.name} is not finished yet." for run in outcome.unfinished]
        folders = {run.entry.text: [] for run in runs}
        for run in runs:
            folders[run.entry.text] += [run.folder] if comparison.look(run).state == "finished" else []
        try:
            write_results(args, folders, notes)
        except report.ReportError as error:
            print(f"compare.py: {error}", file=sys.stderr)
    for failure in outcome.failures:
        print(f"\n{failure.run.name}: {failure.why}; {comparison.log_of(failure.run)} ends:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in failure.tail.splitlines()), file=sys.stderr)
    if outcome.unfinished:
        text = f"{len(outcome.unfinished)} of {len(runs)} runs are unfinished: the same command goes on from here"
        print(text, file=sys.stderr)
    if signals.first:
        return 128 + signals.first
    return UNFINISHED if outcome.unfinished else int(bool(outcome.failures))


def main(argv: list[str] | None = None, train: Path = TRAIN) -> int:
    """Parse and run; returns the exit status. train: the script of a single run."""
    args, options = parse(sys.argv[1:] if argv is None else argv)
    deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    try:
        if not args.only_report:
            return compare(args, options, train, deadline)
        write_results(args, comparison.finished_runs(args.output, args.recipes, args.seeds))
        return 0
    except (InputError, report.ReportError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
