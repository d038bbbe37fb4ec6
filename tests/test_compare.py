"""scripts/compare.py: which runs start where, what an earlier call has left, and its numbers against hand-made ones."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_report import cells, make_run, script

from hf_nvfp4 import comparison, gaps, plots, processes
from hf_nvfp4.comparison import parse_entries, parse_entry
from hf_nvfp4.data import InputError
from hf_nvfp4.processes import Job, Pool, Process, Slot, slots

compare = script("compare")

# Stands in for scripts/train.py: what plan.json says of a run's folder happens; calls.jsonl says what was called.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

here = Path(__file__).parent
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:])
folder = Path(flags["output_dir"])
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({"run": folder.name, "flags": flags}) + "\\n")
what = json.loads((here / "plan.json").read_text()).get(folder.name)
if what == "fail":
    sys.exit("Traceback\\ntrain.py: the GPU is on fire")
if what == "forget":
    sys.exit()

def stop(number, frame):
    if what == "slow":
        checkpoint = folder / "checkpoint-5"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
        sys.exit(143)

if what in ("slow", "stubborn") and not list(folder.glob("checkpoint-*")):
    signal.signal(signal.SIGTERM, stop)
    print("\\r 20%|██        | 2/10 [00:01<00:04,  2.00it/s]", flush=True)
    (here / "waiting").touch()
    while True:
        time.sleep(0.02)
run = json.loads((here / "template" / "run.json").read_text())
run["recipe"] = flags["recipe"]
run["training"]["seed"] = int(flags["seed"])
run["final"]["validation_loss"] = LOSSES[flags["recipe"]][int(flags["seed"]) - 1]
(folder / "run.json").write_text(json.dumps(run))
"""
LOSSES = {"bf16": [3.0, 4.0], "nvfp4": [3.06, 4.16], "fp8": [3.03, 4.04]}


class Trainer:
    """The stand-in, and compare.py run with it."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "out"
        self.script = folder / "train.py"
        self.script.write_text(FAKE.replace("LOSSES[", f"{LOSSES}["))
        make_run(folder / "template")
        self.plan({})

    def plan(self, what: dict) -> None:
        (self.folder / "plan.json").write_text(json.dumps(what))

    def compare(self, *argv: str, options=("--max_steps=10",)) -> int:
        """The exit status; calls before this one are forgotten."""
        (self.folder / "calls.jsonl").unlink(missing_ok=True)
        argv = ["--output", str(self.output), *argv]
        return compare.main([*argv, "--", "--use_cpu=True", *options], train=self.script)

    @property
    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def ran(self) -> list[str]:
        return [call["run"] for call in self.calls]

    @property
    def result(self) -> dict:
        """comparison.json by recipe."""
        record = json.loads((self.output / "comparison.json").read_text())
        return record | {"recipes": {row["label"]: row for row in record["recipes"]}}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_POLL_SECONDS", 0.02)
    return Trainer(tmp_path)


TWO = ["--recipes", "bf16", "nvfp4"]


# ---- Recipes -------------------------------------------------------------------------------------------


def test_entries():
    assert parse_entry("bf16").flags == ("--recipe=bf16",)
    entry = parse_entry("nvfp4@bf16:switch_last=0.18,lr_scheduler_kwargs={'a': 1, 'b': 2}")
    assert entry.flags == (
        "--recipe=nvfp4", "--backend=bf16", "--switch_last=0.18", "--lr_scheduler_kwargs={'a': 1, 'b': 2}",
    )  # fmt: skip
    assert parse_entry("nvfp4@bf16:switch_last=0.18").folder == "nvfp4_bf16_switch_last=0.18"
    long = [parse_entry(f"nvfp4:skip={'x' * 200}{i}").folder for i in range(2)]
    assert max(map(len, long)) <= 100 and long[0] != long[1]


@pytest.mark.parametrize("text", ["", ":a=1", "nvfp4@", "nvfp4:switch_last", "nvfp4:switch_last="])
def test_broken_entries(text):
    with pytest.raises(InputError, match=r"not of the form recipe\[@backend\]"):
        parse_entry(text)


def test_what_an_entry_cannot_set():
    for text in ("nvfp4:seed=3", "nvfp4@bf16:backend=fp8", "nvfp4:tf32=1,tf32=0"):
        with pytest.raises(InputError, match="stands elsewhere already"):
            parse_entry(text)
    with pytest.raises(InputError, match="share the folder name 'nvfp4_bf16'"):
        parse_entries(["nvfp4@bf16", "nvfp4 bf16"])


@pytest.mark.parametrize(
    ("argv", "options", "message"),
    [
        (TWO, ["--learning_rat=1"], "unknown argument '--learning_rat=1'. Did you mean --learning_rate"),
        (["--recipes", "nvfp5"], [], "recipe 'nvfp5': .*nvfp5"),
        (["--recipes", "nvfp4@fp9"], [], "recipe 'nvfp4@fp9': .*fp9"),
        (["--recipes", "nvfp4:switch_last=7"], [], "recipe 'nvfp4:switch_last=7': --switch_last 7.0: give a fraction"),
        (TWO, ["--seed=3"], "--seed cannot stand after --"),
        ([*TWO, "--seeds", "1", "1"], [], "a seed is given twice"),
    ],
)
def test_what_cannot_work_is_said_before_any_run(trainer, argv, options, message, capsys):
    assert trainer.compare(*argv, options=options) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("compare.py: ")
    assert not trainer.ran and not trainer.output.exists()


# ---- Numbers -------------------------------------------------------------------------------------------


def test_gaps_by_hand(trainer, capsys):
    """nvfp4 is 2 % and 4 % above bf16: 3 %, standard error √2/√2 = 1 %; bf16's own deviation √½ of 3.5."""
    assert trainer.compare(*TWO, "fp8", "--seeds", "1", "2") == 0
    found = trainer.result
    gap = found["recipes"]["nvfp4"]["gap_percent"]
    assert gap["mean"] == pytest.approx(3.0) and gap["standard_error"] == pytest.approx(1.0) and gap["pairs"] == 2
    assert gap["by_seed"] == {"1": pytest.approx(2.0), "2": pytest.approx(4.0)}
    assert found["recipes"]["fp8"]["gap_percent"]["standard_error"] == pytest.approx(0, abs=1e-9)
    assert found["base_spread_percent"] == pytest.approx(100 * 0.5**0.5 / 3.5)
    assert found["recipes"]["bf16"]["gap_percent"] is None
    table = (trainer.output / "table.md").read_text()
    row = cells(table, "nvfp4")
    assert row[:5] == ["nvfp4", "2", "3.61 ± 0.78", "+3.0 ± 1.0 %", "2"]
    assert row[-3:] == ["12,346", "1.50 GiB", "90.0"]
    assert "bf16 alone varies by 20 % from seed to seed (standard deviation of 2 seeds)" in table
    assert table in capsys.readouterr().out
    for name in ("loss.png", "gap.png"):
        assert (trainer.output / name).read_bytes().startswith(b"\x89PNG")


def test_pairs_are_the_seeds_that_both_have(tmp_path):
    losses = {"bf16": {1: 2.0, 2: 4.0}, "nvfp4": {2: 4.2, 1: 2.02, 3: 9.0}, "fp8": {3: 5.0}}
    folders = {
        name: [make_run(tmp_path / f"{name}-{seed}", name, loss, seed) for seed, loss in by_seed.items()]
        for name, by_seed in losses.items()
    }
    found = gaps.compare(folders, "bf16")
    _, nvfp4, fp8 = found.rows
    assert nvfp4.gap.by_seed == {1: pytest.approx(1.0), 2: pytest.approx(5.0)}
    assert nvfp4.gap_bf16.by_seed[1] == pytest.approx(100 * (2.01 / 1.99 - 1))
    assert fp8.gap is None and "fp8 and bf16 have no seed in common" in gaps.document(found)
    assert cells(gaps.table(found), "nvfp4")[4] == "2" and cells(gaps.table(found), "fp8")[3] == "—"
    assert len(plots.gaps_png(found)) > 1000


def test_one_seed_has_no_error_and_another_base(trainer):
    assert trainer.compare(*TWO, "--base", "nvfp4") == 0
    found = trainer.result
    gap = found["recipes"]["bf16"]["gap_percent"]
    assert gap["mean"] == pytest.approx(100 * (3.0 / 3.06 - 1)) and gap["standard_error"] is None
    assert found["base_spread_percent"] is None
    table = (trainer.output / "table.md").read_text()
    assert cells(table, "bf16")[2:5] == ["3.0000", "-1.96 %", "1"]
    assert "±" not in table


def test_without_base_there_are_losses_only(trainer):
    assert trainer.compare("--recipes", "nvfp4", "--seeds", "1", "2") == 0
    table = (trainer.output / "table.md").read_text()
    assert "No run of the base 'bf16' has finished: losses only, no gaps." in table
    assert cells(table, "nvfp4")[2:4] == ["3.61 ± 0.78", "—"]


def test_other_data_is_not_comparable(tmp_path):
    other = [("data.fingerprint", "f" * 20)]
    folders = {
        "bf16": [make_run(tmp_path / "bf16-1", loss=3.0)],
        "nvfp4": [make_run(tmp_path / "nvfp4-1", "nvfp4", 3.06, change=other)],
    }
    found = gaps.compare(folders, "bf16")
    assert found.rows[1].gap is None and cells(gaps.table(found), "nvfp4")[3] == "not comparable"
    assert "**Not comparable: nvfp4**: data.fingerprint is ffff" in gaps.document(found)


# ---- What an earlier call has left ---------------------------------------------------------------------


def test_seed_by_seed_and_nothing_twice(trainer, capsys):
    assert trainer.compare(*TWO, "--seeds", "1", "2") == 0
    assert trainer.ran == ["bf16-1", "nvfp4-1", "bf16-2", "nvfp4-2"]
    flags = trainer.calls[1]["flags"]
    assert flags["recipe"] == "nvfp4" and flags["seed"] == "1" and flags["max_steps"] == "10"
    assert flags["save_model"] == "False" and flags["save_strategy"] == "no"
    assert flags["cache_dir"] == str(trainer.output / "cache")
    assert trainer.compare(*TWO, "fp8", "--seeds", "1", "2") == 0
    assert trainer.ran == ["fp8-1", "fp8-2"]
    assert "nvfp4-2: finished earlier" in capsys.readouterr().out
    assert len(trainer.result["recipes"]) == 3


def test_other_settings_are_refused_or_overwritten(trainer, capsys):
    trainer.compare(*TWO)
    assert trainer.compare(*TWO, options=["--max_steps=20"]) == 1 and not trainer.ran
    error = capsys.readouterr().err
    assert "made with other settings" in error and "max_steps 10 (now 20)" in error and "--overwrite" in error
    (trainer.output / "nvfp4-1" / "model.safetensors").touch()
    assert trainer.compare(*TWO, "--overwrite", options=["--max_steps=20"]) == 0
    assert trainer.ran == ["bf16-1", "nvfp4-1"]
    assert not (trainer.output / "nvfp4-1" / "model.safetensors").exists()
    assert trainer.compare(*TWO, options=["--max_steps=20", "--save_steps=3", "--report_to=none"]) == 0
    assert not trainer.ran  # a result does not depend on these


def test_a_recipe_of_ones_own_is_what_its_file_holds(trainer, tmp_path, capsys):
    own = tmp_path / "own.json"
    argv = ["--recipes", str(own)]
    assert trainer.compare(*argv) == 1 and "no such recipe file" in capsys.readouterr().err
    own.write_text(json.dumps({"mlp": "nvfp4"}))
    trainer.script.write_text(trainer.script.read_text().replace('flags["recipe"]', '"nvfp4"'))
    assert trainer.compare(*argv) == 0 and trainer.ran == ["own.json-1"]
    assert trainer.compare(*argv) == 0 and not trainer.ran
    own.write_text(json.dumps({"mlp": "fp8"}))
    assert trainer.compare(*argv) == 1 and "recipe {'mlp': 'nvfp4'} (now {'mlp': 'fp8'})" in capsys.readouterr().err


def test_a_folder_of_unknown_settings_is_refused(trainer, capsys):
    make_run(trainer.output / "bf16-1")
    assert trainer.compare(*TWO) == 1 and not trainer.ran
    assert "nothing there says with which" in capsys.readouterr().err


def test_a_failure_does_not_stop_the_others_and_is_tried_again(trainer, capsys):
    trainer.plan({"bf16-1": "forget", "nvfp4-1": "fail"})
    assert trainer.compare(*TWO, "fp8") == 1
    assert trainer.ran == ["bf16-1", "nvfp4-1", "fp8-1"]
    captured = capsys.readouterr()
    assert "nvfp4-1: failed with exit status 1; " in captured.err and "the GPU is on fire" in captured.err
    assert "bf16-1: ended well, but left no whole run.json" in captured.err
    assert "nvfp4-1 is missing: failed with exit status 1." in captured.out
    trainer.plan({})
    assert trainer.compare(*TWO, "fp8") == 0 and trainer.ran == ["bf16-1", "nvfp4-1"]


def test_minutes_stop_what_runs_and_the_next_call_goes_on(trainer, capsys):
    trainer.plan({"bf16-1": "slow"})
    assert trainer.compare(*TWO, "--minutes", "0.02") == 3
    assert trainer.ran == ["bf16-1"] and "save_strategy" not in trainer.calls[0]["flags"]
    captured = capsys.readouterr()
    assert "bf16-1: stopped with checkpoint-5" in captured.out
    assert "no run has finished" in captured.err and "2 of 2 runs are unfinished" in captured.err
    assert trainer.compare(*TWO) == 0
    assert [call["flags"].get("resume_from_checkpoint") for call in trainer.calls] == ["auto", None]
    assert sorted(path.name for path in (trainer.output / "bf16-1").iterdir()) == ["run.json", "settings.json"]
    assert trainer.result["recipes"]["nvfp4"]["gap_percent"]["mean"] == pytest.approx(2.0)


def test_a_signal_stops_all_and_a_second_one_at_once(trainer, monkeypatch, capsys):
    trainer.plan({"nvfp4-1": "stubborn"})

    def interrupt():
        while not (trainer.folder / "waiting").exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert trainer.compare(*TWO, "fp8") == 128 + signal.SIGTERM
    thread.join()
    assert trainer.ran == ["bf16-1", "nvfp4-1"]
    captured = capsys.readouterr()
    assert "nvfp4-1: stopped, no checkpoint yet" in captured.out and "2 of 3 runs are unfinished" in captured.err
    assert "nvfp4-1 is not finished yet." in (trainer.output / "table.md").read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_at_once_in_one_folder_are_refused(trainer, capsys):
    with comparison.alone_in(trainer.output):
        assert trainer.compare(*TWO) == 1
    assert "another compare.py, or a run that it has started, is at work" in capsys.readouterr().err
    assert not trainer.ran


def test_a_run_whose_parent_was_killed_keeps_the_folder(tmp_path):
    with comparison.alone_in(tmp_path):
        job = Job("job", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
        process = Process(job, Slot(None))
    with pytest.raises(InputError, match="at work"), comparison.alone_in(tmp_path):
        pass
    process.kill()
    with comparison.alone_in(tmp_path):
        pass


# ---- Only the report -----------------------------------------------------------------------------------


def test_only_report(trainer, capsys):
    assert compare.main(["--output", str(trainer.output), "--only_report"]) == 1
    assert "no run has finished" in capsys.readouterr().err
    entry = "nvfp4:keep_bf16_last=0"
    trainer.compare("--recipes", "bf16", entry, "--seeds", "1", "2")
    make_run(trainer.output / "fp8-7", "fp8", 3.0, 7)  # brought from elsewhere
    (trainer.output / "broken").mkdir()
    (trainer.output / "broken" / "run.json").write_text("{")
    noted = trainer.output / "bf16-1" / "settings.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"shared_by": 3}))
    assert compare.main(["--output", str(trainer.output), "--only_report"]) == 0
    found = trainer.result
    seeds = {label: row["seeds"] for label, row in found["recipes"].items()}
    assert seeds == {"bf16": [1, 2], entry: [1, 2], "fp8": [7]}
    assert found["recipes"][entry]["gap_percent"]["mean"] == pytest.approx(3.0)
    assert any(note.startswith("Up to 3 runs shared a GPU") for note in found["notes"])
    chosen = ["--recipes", entry, "bf16", "--seeds", "2"]
    assert compare.main(["--output", str(trainer.output), "--only_report", *chosen]) == 0
    found = trainer.result
    assert list(found["recipes"]) == ["bf16", entry] and found["recipes"][entry]["seeds"] == [2]
    assert not any("shared a GPU" in note for note in found["notes"])


# ---- Processes and GPUs --------------------------------------------------------------------------------


def test_slots(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots(cpu=False, parallel=2) == [Slot("0"), Slot("1"), Slot("0"), Slot("1")]
    assert slots(cpu=True, parallel=2) == [Slot(None)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert slots(cpu=False) == [Slot("3"), Slot("GPU-5")]
    assert Slot("3").environment()["CUDA_VISIBLE_DEVICES"] == "3"
    assert Slot(None).environment()["CUDA_VISIBLE_DEVICES"] == "3,GPU-5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots(cpu=False, parallel=2) == [Slot(None)]


def test_runs_are_spread_over_gpus(tmp_path):
    """Two slots on each of two GPUs: five jobs, at most four at once; the first alone until it draws its bar."""
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.2)"
    bar = r"; print('\r 10%|#  | 1/10 [00:01<00:09,  1.00it/s]', flush=True); time.sleep(0.6)"
    jobs = [Job(f"job{i}", [sys.executable, "-c", code + bar], tmp_path / f"{i}.log") for i in range(5)]
    pool = Pool(jobs, [Slot(gpu) for gpu in "0101"])
    pool.step()
    assert len(pool.running) == 1 and not pool.running[0].steps()
    most, ended = 0, []
    while pool.running or pool.waiting:
        ended += pool.step()[1]
        most = max(most, len(pool.running))
        assert max(Counter(process.slot.gpu for process in pool.running).values(), default=0) <= 2
        time.sleep(0.02)
    assert most == 4 and len(ended) == 5 and all(process.status() == 0 for process in ended)
    used = [(tmp_path / f"{i}.log").read_text().split()[0] for i in range(5)]
    assert used == [process.slot.gpu for process in sorted(ended, key=lambda process: process.job.name)]
    assert sorted(used[:4]) == ["0", "0", "1", "1"]


def test_patience_ends(tmp_path, monkeypatch):
    """What ignores SIGTERM is killed, and what it has started with it."""
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); {child}"
    pool = Pool([Job("job", [sys.executable, "-c", code], tmp_path / "log")], [Slot(None)])
    pool.step()
    while (tmp_path / "log").read_text().count("up") < 2:
        time.sleep(0.02)
    (process,) = pool.stop()
    assert process.status() == -signal.SIGKILL and not pool.running
    pid = int(next(line for line in (tmp_path / "log").read_text().splitlines() if line.isdigit()))
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the child's child is alive")


def test_steps_are_those_of_the_first_bar(tmp_path):
    """Bars of evaluations, nested or with a text before them, are others; a bar may arrive in two pieces."""
    log = tmp_path / "log"
    log.write_text("old\r 90%|### | 9/10 [00:01<00:09,  1.00it/s]")
    process = Process(Job("job", [sys.executable, "-c", ""], log), Slot(None))

    def print_(text):
        with log.open("a") as file:
            file.write(text)
        return process.steps()

    assert process.steps() is None
    assert print_("\rMap: 100%|###| 7/7 [00:01<00:00]") is None
    assert print_("\r  5%|#  | 5/100 [00:01<00:09,  1.00it/s]") == (5, 100)
    assert print_("\n\n 40%|#  | 4/10 [00:01<00:09]\x1b[A") == (5, 100)
    assert print_("\r 12%|#  | 12/1") == (5, 100)
    assert print_("00 [00:01<00:09,  1.00it/s]") == (12, 100)
    assert print_("\na line\r\n100%|#  | 10/10 [00:01<00:09]\nfailed: why\n") == (12, 100)
    assert process.last_lines() == "a line\nfailed: why"
    process.kill()


# ---- The real train.py ---------------------------------------------------------------------------------


def test_two_recipes_from_end_to_end(tmp_path, capsys):
    line = "what is {0} times {1}? It is the same as {1} times {0}.\n"
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": "".join(line.format(i, j) for j in range(9))}) for i in range(100))
    )
    llama = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(llama | {"num_hidden_layers": 2, "num_attention_heads": 2}))
    options = {
        "config_name": tmp_path / "config.json",
        "train_file": tmp_path / "text.jsonl",
        "validation_fraction": 0.1,
        "max_validation_tokens": 500,
        "vocabulary_size": 300,
        "sequence_length": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_steps": 2,
        "use_cpu": True,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    argv = ["--recipes", "bf16", "nvfp4:keep_bf16_last=0", "--output", str(tmp_path / "out"), "--", *flags]
    assert compare.main(argv) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    base, nvfp4 = record["recipes"]
    assert base["recipe"] == "bf16" and nvfp4["recipe"] == "nvfp4" and nvfp4["not_comparable"] is None
    losses = [row["validation_loss"]["mean"] for row in (base, nvfp4)]
    assert losses[0] != losses[1] and nvfp4["gap_percent"]["mean"] == pytest.approx(100 * (losses[1] / losses[0] - 1))
    folder = tmp_path / "out" / "nvfp4_keep_bf16_last=0-1"
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "settings.json", "trainer_state.json"]
    first = [json.loads((tmp_path / "out" / name / "run.json").read_text()) for name in ("bf16-1", folder.name)]
    assert first[0]["losses"]["train"][0][1] == pytest.approx(first[1]["losses"]["train"][0][1], rel=1e-3)
    capsys.readouterr()
    assert compare.main(argv) == 0 and "nvfp4_keep_bf16_last=0-1: finished earlier" in capsys.readouterr().out
