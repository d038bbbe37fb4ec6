"""Tables, figure and model card against numbers worked out by hand, from made-up runs."""

import importlib.util
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_nvfp4 import cards, plots, report
from hf_nvfp4.scores import write_atomically, write_scores

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOKENS_A_STEP = 200, 1024


def script(name):
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(folder, recipe="bf16", loss=3.0, seed=1, change=(), validations=(50, 100, 150, 200)):
    """Write a run.json that ends at validation loss `loss`; change: pairs of a dotted path and its value."""
    curve = {step: loss + 4 * math.exp(-step / 40) for step in range(10, STEPS + 1, 10)}
    record = {
        "schema": 1,
        "status": "complete",
        "name": folder.name,
        "command": f"python scripts/train.py --recipe {recipe} --seed {seed}",
        "recipe": recipe,
        "backend": "bf16",
        "conversion": "converted 14 of 15 linears (lm_head: kept, output head)",
        "decisions": [
            {"name": "model.layers.0.mlp.up_proj", "converted": True, "reason": f"recipe {recipe}"},
            {"name": "lm_head", "converted": False, "reason": "output head"},
        ],
        "precision_schedule": None,
        "model": {
            "size": "tiny",
            "type": "llama",
            "parameters": 3_012_352,
            "config": {},
            "from_checkpoint": None,
        },
        "data": {
            "source": "embedded: Python 3.11.7 standard library",
            "train_tokens": 2_000_000,
            "validation_tokens": 140_000,
            "validation_bytes": 500_000,
            "sequence_length": 256,
            "tokenizer": "byte-level BPE, 4096, trained on the data",
            "fingerprint": "0123456789abcdef0123",
        },
        "training": {"seed": seed, "steps": STEPS, "tokens": STEPS * TOKENS_A_STEP, "learning_rate": 0.003},
        "versions": {"hf_nvfp4": "0.1.0", "torch": "2.13.0"},
        "device": {"type": "cpu", "name": "Test CPU", "count": 1, "threads": 2},
        "losses": {
            "train": [list(x) for x in curve.items()],
            "validation": [[s, curve[s]] for s in validations],
        },
        "final": {
            "validation_loss": loss,
            "validation_precision": f"{recipe} (as trained, per-token activation scales)",
            "validation_loss_bf16": loss - 0.01,
            "bits_per_byte": loss / math.log(2) * 140_000 / 500_000,
        },
        "speed": {
            "train_seconds": 90.0,
            "tokens_per_second": 12_345.6,
            "peak_memory_bytes": 3 * 2**29,
            "peak_memory_kind": "process resident",
        },
    }
    for path, value in change:
        *parents, last = path.split(".")
        target = record
        for key in parents:
            target = target[key]
        target[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def make_scores(folder, hits, precision="as-trained", fingerprint="f", **more):
    """Write scores of an accuracy task whose items were answered right or wrong as `hits` says."""
    accuracy = sum(hits) / len(hits)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(hits) - 1))
    metric = {"value": accuracy, "stderr": error, "higher_is_better": True, "aggregation": "mean"}
    task = {
        "metrics": {"acc": metric},
        "samples": len(hits),
        "num_fewshot": 0,
        "version": 1.0,
        "fingerprint": fingerprint,
    }
    record = {
        "schema": 1,
        "model": str(folder),
        "name": folder.name,
        "recipe": folder.name,
        "precision": precision,
        "precision_detail": f"{folder.name} on backend bf16 in 14 linears",
        "command": "python scripts/evaluate.py " + folder.name,
        "versions": {"lm_eval": "0.4.13"},
        "limit": None,
        "tasks": {"order": task},
        **more,
    }
    samples = [
        {"task": "order", "doc_id": i, "hash": f"{fingerprint}{i}", "metrics": {"acc": hit}}
        for i, hit in enumerate(hits)
    ]
    return write_scores(folder / f"eval-{precision}.json", record, samples)


@pytest.fixture
def three(tmp_path):
    """bf16 at 3.0, fp8 at 3.015, nvfp4 at 3.06; given in another order."""
    folders = [make_run(tmp_path / name, name, loss) for name, loss in (("nvfp4", 3.06), ("fp8", 3.015), ("bf16", 3.0))]
    return report.read_variants(folders)


def cells(table, row):
    """The cells of the row that begins with `row`."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- Training table ------------------------------------------------------------------------------------


def test_training_table_holds_the_numbers_of_the_runs(three):
    assert [variant.label for variant in three] == ["bf16", "fp8", "nvfp4"]
    row = cells(report.training_table(three), "nvfp4")
    assert row[1] == "3.0600"
    assert row[2] == "+2.00 %"  # 3.06 / 3.0
    assert row[3] == "+1.49 %"  # 3.06 / 3.015
    assert row[4:6] == ["3.0500", "+2.01 %"]  # 3.05 / 2.99
    assert row[6] == f"{3.06 / math.log(2) * 0.28:.4f}"
    assert row[7:] == ["12,346", "1.50 GiB"]
    assert cells(report.training_table(three), "bf16")[2:4] == ["—", "-0.50 %"]


def test_seeds_become_mean_and_standard_deviation(tmp_path):
    folders = [
        make_run(tmp_path / f"{recipe}-{seed}", recipe, loss, seed)
        for recipe, losses in (("bf16", (3.0, 3.1)), ("nvfp4", (3.03, 3.162)))
        for seed, loss in enumerate(losses)
    ]
    base, variant = report.read_variants(folders)
    assert (base.label, len(base.runs)) == ("bf16", 2)
    assert report.gaps(variant, base) == pytest.approx([1.0, 2.0])  # 3.03 / 3.0 and 3.162 / 3.1: pairs by seed
    row = cells(report.training_table([base, variant]), "nvfp4 (2 seeds)")
    assert row[1] == "3.096 ± 0.093"  # (3.162 - 3.03) / √2
    assert row[2] == "+1.50 ± 0.71 %"
    assert "standard deviation over seeds (bf16: 0, 1; nvfp4: 0, 1)" in "\n".join(
        report.training_notes([base, variant])
    )


def test_other_settings_make_another_variant_and_are_named(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", change=[("training.learning_rate", 0.001)])]
    variants = report.read_variants(folders)
    assert [variant.label for variant in variants] == ["a", "b"]  # one recipe: the runs' own names
    assert "b also differs from a in training.learning_rate 0.001 (not 0.003)." in report.training_notes(variants)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data.fingerprint", "fedcba"),
        ("training.tokens", 999),
        ("data.validation_tokens", 1),
        ("data.sequence_length", 512),
        ("model.parameters", 5),
        ("status", "interrupted"),
    ],
)
def test_what_cannot_be_compared_is_not(tmp_path, path, value):
    variants = report.read_variants(
        [make_run(tmp_path / "bf16"), make_run(tmp_path / "nvfp4", "nvfp4", 3.06, change=[(path, value)])]
    )
    table = report.full_table(variants)
    assert cells(table, "nvfp4")[2] == "not comparable"
    assert "**Not comparable: nvfp4**" in table and str(value) in table
    assert "%" not in "".join(cells(table, "nvfp4"))
    assert plots.figure_png(variants)


def test_without_a_bf16_run_there_is_no_gap_and_the_table_says_so(tmp_path):
    variants = report.read_variants([make_run(tmp_path / "nvfp4", "nvfp4"), make_run(tmp_path / "fp8", "fp8")])
    assert cells(report.training_table(variants), "nvfp4")[2] == "—"
    assert any("No BF16 run" in note for note in report.training_notes(variants))


def test_missing_and_broken_runs_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(report.ReportError, match=r"nothing/run\.json: No such file.*train\.py"):
        report.read_variants([tmp_path / "nothing"])
    broken = make_run(tmp_path / "broken")
    (broken / "run.json").write_text('{"schema": 1, "name"')
    with pytest.raises(report.ReportError, match="not JSON"):
        report.read_variants([broken])
    (broken / "run.json").write_text('{"schema": 2}')
    with pytest.raises(report.ReportError, match="schema 2; this version reads 1"):
        report.read_variants([broken])
    (broken / "run.json").write_text('{"schema": 1, "name": "x", "recipe": "bf16"}')
    with pytest.raises(report.ReportError, match="lacks 'backend'"):
        report.read_variants([broken])
    with pytest.raises(report.ReportError, match="validation loss is nan"):
        report.read_variants([make_run(tmp_path / "diverged", loss=math.nan)])
    with pytest.raises(report.ReportError, match="given twice"):
        report.read_variants([broken, tmp_path / "x" / ".." / "broken"])


def test_a_broken_file_of_scores_is_an_error(tmp_path):
    run = make_run(tmp_path / "bf16")
    (run / "eval-bf16.json").write_text("{}")
    with pytest.raises(report.ReportError, match=r"eval-bf16\.json.*lacks"):
        report.read_variants([run])


# ---- Scores --------------------------------------------------------------------------------------------


def test_scores_with_errors_and_paired_differences(tmp_path):
    runs = [make_run(tmp_path / "bf16"), make_run(tmp_path / "nvfp4", "nvfp4")]
    make_scores(runs[0], [1, 1, 1, 0, 0, 1, 1, 0, 1, 1])
    make_scores(runs[1], [1, 1, 0, 0, 0, 1, 1, 0, 1, 0])
    table = report.score_tables(report.read_variants(runs), "as-trained")
    assert cells(table, "order")[1:4] == ["acc ↑", "0.70 ± 0.15", "0.50 ± 0.17"]  # √(0.21 / 9), √(0.25 / 9)
    # Two of ten items got lost: mean -0.2, variance (2 · 0.8² + 8 · 0.2²) / 9 / 10.
    assert "| -0.20 ± 0.13 (1.5 σ) |" in table


def test_scores_are_also_compared_with_fp8(tmp_path):
    runs = [make_run(tmp_path / name, name) for name in ("bf16", "nvfp4", "fp8")]
    for run, items in zip(runs, ([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]), strict=True):
        make_scores(run, items)
    table = report.score_tables(report.read_variants(runs), "as-trained")
    to_bf16, to_fp8 = table.split("Differences to ")[1:]
    assert to_bf16.startswith("bf16") and "-0.50 ± 0.29" in to_bf16
    assert to_fp8.startswith("fp8") and "-0.25 ± 0.25" in to_fp8 and "nvfp4 − fp8" in to_fp8


def test_each_table_says_in_which_precision_it_was_taken(tmp_path):
    run = make_run(tmp_path / "nvfp4", "nvfp4")
    for precision in ("as-trained", "bf16"):
        make_scores(run, [1, 0], precision, precision_detail=f"detail of {precision}")
    table = report.full_table(report.read_variants([run]))
    assert table.index("Scores taken as trained") < table.index("detail of as-trained")
    assert table.index("detail of as-trained") < table.index("Scores taken in bf16") < table.index("detail of bf16")


def test_scores_on_other_items_are_not_compared(tmp_path):
    runs = [make_run(tmp_path / "bf16"), make_run(tmp_path / "nvfp4", "nvfp4")]
    make_scores(runs[0], [1, 0, 1])
    make_scores(runs[1], [1, 0, 1], fingerprint="another Python's standard library")
    table = report.score_tables(report.read_variants(runs), "as-trained")
    assert cells(table, "order")[3] == "not comparable"
    assert "not comparable: 3 and 3 items, not the same ones" in table


def test_scores_over_seeds_are_mean_and_standard_deviation(tmp_path):
    runs = [make_run(tmp_path / f"bf16-{seed}", seed=seed) for seed in (1, 2)]
    make_scores(runs[0], [1, 1, 1, 0])
    make_scores(runs[1], [1, 1, 0, 0])
    table = report.score_tables(report.read_variants(runs), "as-trained")
    assert cells(table, "order")[2] == "0.62 ± 0.18"
    assert "standard deviation over seeds" in table


# ---- Figure and card -----------------------------------------------------------------------------------


def write_stats(folder, steps=(500, 1000), **changes):
    """What --quantization_stats leaves: three layers, better and better with the step, the first below √3."""
    rows = []
    for step in steps:
        for layer in range(3):
            cast = {"underflow": 0.1 * layer, "saturation": 0.01, "snr_db": 18.0 + layer + step / 1000}
            operands = {name: dict(cast) for name in ("fprop x", "fprop w", "dgrad dy")}
            row = {"step": step, "layer": f"l.{layer}", "operands": operands, "noise_ratio": 1.5 + layer}
            rows.append(row | changes)
    (folder / report.STATS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_quantization_does_is_tabled_and_drawn(three, tmp_path, capsys):
    runs = {variant.label: variant.first for variant in three}
    write_stats(runs["nvfp4"].path)
    write_stats(runs["bf16"].path, operands={}, noise_ratio=None)  # nothing quantized: no table, no plot
    assert report.read_stats(runs["bf16"]) == report.read_stats(runs["fp8"]) == []
    rows = report.read_stats(runs["nvfp4"])
    cells = [cell.strip() for cell in report.stats_table({"nvfp4": rows}).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["nvfp4", "1,000", "20.0", "20.0", "20.0", "10.0%", "2.5", "1.50", "1 of 3"]
    image = plots.quantization_stats_png(rows, "nvfp4")
    assert image[:4] == b"\x89PNG" and image != plots.quantization_stats_png(rows[:3], "nvfp4")

    folders, out = [str(run.path) for run in runs.values()], tmp_path / "out"
    assert script("report").main([*folders, "--output", str(out), "--card", str(tmp_path / "CARD.md")]) == 0
    assert (out / "quantization_stats.png").read_bytes() == image
    assert "![nvfp4](quantization_stats.png)" in (out / "table.md").read_text()
    assert "(out/quantization_stats.png)" in (tmp_path / "CARD.md").read_text()
    write_stats(runs["fp8"].path)
    assert script("report").main([*folders, "--output", str(out)]) == 0
    assert {path.name for path in out.glob("*stats-*.png")} == {f"quantization_stats-{r}.png" for r in ("fp8", "nvfp4")}

    (runs["fp8"].path / report.STATS_FILE).write_text('{"step": 1}\n')
    capsys.readouterr()
    assert script("report").main([*folders, "--output", str(out)]) == 1
    assert "line 1 is broken (KeyError('layer'))" in capsys.readouterr().err


def test_report_and_training_agree_on_names():
    from hf_nvfp4 import operand_stats, stats

    assert (report.STATS_FILE, report.NOISE_THRESHOLD) == (stats.STATS_FILE, operand_stats.NOISE_THRESHOLD)


def test_figure_is_a_png_of_the_asked_size_and_depends_on_the_losses(three, tmp_path):
    image = plots.figure_png(three, inches=(10, 4), dpi=100)
    assert image.startswith(b"\x89PNG")
    assert struct.unpack(">II", image[16:24]) == (1000, 400)
    other = report.read_variants([make_run(tmp_path / "o" / name, name) for name in ("bf16", "fp8", "nvfp4")])
    assert plots.figure_png(other, inches=(10, 4), dpi=100) != image


@pytest.mark.parametrize("validations", [(), (200,), (40, 80, 120, 160, 200)])
def test_figure_with_few_or_no_validations_and_a_switch(tmp_path, validations):
    schedule = {"last": 0.18, "gemms": "all", "switch_step": 164}
    folders = [
        make_run(tmp_path / "bf16", validations=validations),
        make_run(
            tmp_path / "nvfp4",
            "nvfp4",
            3.1,
            change=[("precision_schedule", schedule)],
            validations=validations,
        ),
    ]
    assert len(plots.figure_png(report.read_variants(folders))) > 10_000


def gap_ends(variants, kind):
    base, other = variants
    return plots._gap_curve(other, base, kind)[1][:, -1]


def test_the_gap_curve_ends_at_the_gap_of_the_table(tmp_path):
    variants = report.read_variants([make_run(tmp_path / "bf16"), make_run(tmp_path / "nvfp4", "nvfp4", 3.06)])
    end = 3.0 + 4 * math.exp(-5)
    assert gap_ends(variants, "validation") == pytest.approx([100 * 0.06 / end])
    assert gap_ends(variants, "train") == pytest.approx([100 * 0.06 / end], rel=0.01)


def card_of(variants):
    return cards.model_card(variants, ROOT / "model_cards" / "TEMPLATE.md", "loss.png", ["en"], "apache-2.0")


def test_card_metadata_reads_back(three, tmp_path):
    path = tmp_path / "CARD.md"
    card_of(three).save(path)
    data = ModelCard.load(path).data
    assert (data.library_name, data.license, data.language) == ("transformers", "apache-2.0", ["en"])
    assert {"nvfp4", "fp8", "bf16"} <= set(data.tags)
    assert data.base_model is None and "base_model_relation" not in data
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found["loss (nvfp4, as trained)"] == 3.06


def test_card_says_what_was_done_and_its_limits(three, tmp_path):
    make_scores(three[2].first.path, [1, 0, 1])
    text = card_of(report.read_variants([variant.first.path for variant in three])).text
    assert "3.0M parameters" in text and "204.8K tokens" in text and "1.5 minutes" in text
    assert "0.068 tokens a parameter" in text and "One seed each" in text and "order 3" in text
    assert "emulated for fp8 (backend bf16), nvfp4 (backend bf16)" in text
    assert "output head: `lm_head`" in text and "![Loss" in text and "(loss.png)" in text
    assert "python scripts/train.py --recipe nvfp4 --seed 1" in text and "Test CPU" in text


def test_limits_follow_from_the_runs(tmp_path):
    big = [("model.parameters", 8_000_000_000), ("training.tokens", 10**12), ("backend", "fp4")]
    big += [("data.source", "Hub: org/text, train"), ("speed.train_seconds", 36000.0)]
    runs = [make_run(tmp_path / f"nvfp4-{seed}", "nvfp4", seed=seed, change=big) for seed in (1, 2)]
    said = " ".join(cards.limits(report.read_variants(runs)))
    assert "8.0B parameters" in said and "1.0T tokens" in said and "600 minutes" in said
    for claim in (
        "tokens a parameter",
        "One seed",
        "emulated",
        "Python's standard library",
        "NVFP4 paper have",
    ):
        assert claim not in said


def test_base_model_is_named_only_if_there_is_one_on_the_hub(tmp_path):
    from_hub = make_run(
        tmp_path / "a",
        change=[("model.from_checkpoint", "org/base"), ("data.source", "Hub: org/text, train")],
    )
    data = cards.card_data(report.read_variants([from_hub]), ["en"], "mit")
    assert (data.base_model, data["base_model_relation"], data.datasets) == (
        "org/base",
        "finetune",
        ["org/text"],
    )
    from_folder = make_run(tmp_path / "b", change=[("model.from_checkpoint", str(tmp_path / "a"))])
    assert cards.card_data(report.read_variants([from_folder]), ["en"], "mit").base_model is None


# ---- The script, and writing ---------------------------------------------------------------------------


def test_script_writes_everything_and_prints_the_table(three, tmp_path, capsys):
    folders = [str(variant.first.path) for variant in three]
    assert script("report").main([*folders, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("device cpu (Test CPU) · bf16 on backend bf16")
    assert (tmp_path / "out" / "table.md").read_text().strip() in printed
    assert ModelCard.load(tmp_path / "out" / "MODEL_CARD.md").data.library_name == "transformers"
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000


def test_script_fails_with_a_sentence(tmp_path, capsys):
    assert script("report").main([str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_atomically(path, b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    assert path.read_bytes() == b"old"


def test_reports_do_without_torch():
    code = "import sys; from hf_nvfp4 import cards, plots, report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
