"""scripts/train.py: its options, its output folder, and short runs from end to end."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_nvfp4
from hf_nvfp4 import packing, runlog
from hf_nvfp4.data import InputError, load_corpus
from hf_nvfp4.losses import recovered
from hf_nvfp4.options import parse_arguments
from hf_nvfp4.sizes import SIZES

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
spec = importlib.util.spec_from_file_location("train", SCRIPT)
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small text and a small model's config."""
    folder = tmp_path_factory.mktemp("input")
    rows = [{"text": f"Line {i}: " + f"what is {i} times {i % 7}? It is {i * (i % 7)}.\n" * 9} for i in range(120)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def flags(folder, tmp_path):
    """The flags of a run of six steps that takes a second."""
    options = {
        "config_name": folder / "config.json",
        "train_file": folder / "text.jsonl",
        "validation_fraction": 0.1,
        "max_validation_tokens": 500,
        "vocabulary_size": 300,
        "sequence_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
        "use_cpu": True,
        "bf16": True,
    }

    def make(*more: str, **changed) -> list[str]:
        return [*(f"--{name}={value}" for name, value in (options | changed).items() if value is not None), *more]

    return make


def parse(*argv: str):
    return parse_arguments(list(argv), about="")


# ---- Options ---------------------------------------------------------------------------------------------


def test_command_line_over_file_over_size_over_defaults(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "size: 30m\nlearning_rate: 1e-2\nseed: 7\nskip: [mlp, layers.0]\nbf16: false\nlr_scheduler_kwargs: {a: 1}"
    )
    args = parse("--config", str(config), "--seed", "8")
    assert args.training.seed == 8
    assert args.training.learning_rate == 1e-2 and args.model.skip == ["mlp", "layers.0"]
    assert args.training.bf16 is False and args.training.lr_scheduler_kwargs == {"a": 1}
    assert args.training.max_steps == SIZES["30m"].steps and args.data.sequence_length == 512
    assert args.training.adam_beta2 == 0.95 and args.training.output_dir == "runs/nvfp4"


def test_json_file(tmp_path):
    config = tmp_path / "run.json"
    config.write_text('{"recipe": "fp8", "train_file": "a.txt"}')
    args = parse("--config", str(config))
    assert args.model.recipe == "fp8" and args.data.train_file == ["a.txt"]
    assert args.training.output_dir == "runs/fp8"


def test_no_autocast_by_default_on_a_cpu_without_bf16(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr("hf_nvfp4.options.cpu_multiplies_bf16", lambda able=able: able)
        assert parse("--use_cpu").training.bf16 is able
        assert parse("--use_cpu", "--bf16").training.bf16


def test_epochs_replace_the_default_steps():
    assert parse("--num_train_epochs", "2").training.max_steps == -1
    assert parse("--num_train_epochs", "2", "--max-steps", "9").training.max_steps == 9
    assert parse("--model_name_or_path", "x").training.max_steps == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recip", "fp8"], "unknown argument '--recip'. Did you mean --recipe"),
        (["stray"], "unknown argument 'stray'"),
        (["--size", "huge"], "invalid choice: 'huge'.*'tiny', '30m'"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--size", "30m", "--model_name_or_path", "x"], "excludes --size and --config_name"),
        (["--streaming", "--num_train_epochs", "1"], "give --max_steps"),
        (["--warmup_steps", "-3"], "warmup_steps"),
        (["--config", "absent.yaml"], "no such config file: absent.yaml"),
        (["--config", "run.toml"], "run.toml: unknown extension. A config file is .json, .yaml, .yml"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(InputError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte'. Did you mean learning_rate"),
        ("[1, 2]", "holds a list; it must map option names to values"),
        ("a: [", "cannot be read"),
        ("max_steps: many", "invalid int value: 'many'"),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(InputError, match=message):
        parse("--config", str(config))


@pytest.mark.parametrize("reporter", ["tensorboard", "trackio", "wandb"])
def test_missing_reporter(monkeypatch, reporter):
    monkeypatch.setattr("hf_nvfp4.options.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--report_to {reporter} needs a package .* pip install {reporter}"):
        parse("--report_to", reporter)


@pytest.mark.parametrize("config", SCRIPT.parent.glob("configs/*.yaml"), ids=lambda path: path.name)
def test_shipped_configs(config):
    parse("--config", str(config))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes(size):
    from transformers import AutoModelForCausalLM

    config = size.config(1000, 512, {})
    assert config.vocab_size == 1024
    assert size.hidden % size.heads == 0
    assert all(
        value % 64 == 0 for value in (size.hidden, size.intermediate, size.vocabulary, size.hidden // size.heads)
    )
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def test_size_names_are_true():
    for name, size in SIZES.items():
        width = size.intermediate * max(1, size.experts_per_token)
        inner = size.layers * (4 * size.hidden**2 + 3 * size.hidden * width)
        claimed = {"tiny": 2.1e6, "1b": 1e9}.get(name) or (30 if size.experts else float(name[:-1])) * 1e6
        assert abs(inner / claimed - 1) < 0.06, (name, inner)


# ---- Checkpoints and folders -----------------------------------------------------------------------------


def make_checkpoint(output_dir: Path, step: int, state: str | None = None) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state != "":
        (path / "trainer_state.json").write_text(state or json.dumps({"global_step": step}))
    return path


def test_newest_whole_checkpoint(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, '{"global_step": 2')
    make_checkpoint(tmp_path, 300, "")
    make_checkpoint(tmp_path, 400, '{"global_step": 300}')
    (tmp_path / "checkpoint-best").mkdir()
    found, ignored = runlog.find_checkpoint("auto", tmp_path)
    assert found == tmp_path / "checkpoint-100"
    assert len(ignored) == 3
    assert "checkpoint-400: its trainer_state.json is of step 300" in ignored[0]
    assert "checkpoint-300: it has no readable trainer_state.json" in ignored[1]
    assert "checkpoint-200: its trainer_state.json is damaged" in ignored[2]


def test_no_checkpoint(tmp_path):
    assert runlog.find_checkpoint(None, tmp_path) == (None, [])
    assert runlog.find_checkpoint("auto", tmp_path) == (None, [])
    with pytest.raises(InputError, match="cannot resume from .*: there is no such folder"):
        runlog.find_checkpoint(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(InputError, match="its save did not finish"):
        runlog.find_checkpoint(str(make_checkpoint(tmp_path, 5, "")), tmp_path)


def test_claim(tmp_path):
    runlog.claim(tmp_path / "new", resume=False, overwrite=False)
    make_checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="checkpoints of an unfinished run. Continue it with --resume_from_checkpoint"):
        runlog.claim(tmp_path, resume=False, overwrite=False)
    runlog.claim(tmp_path, resume=True, overwrite=False)
    (tmp_path / "run.json").write_text("{}")
    for resume in (True, False):
        with pytest.raises(InputError, match="holds a finished run"):
            runlog.claim(tmp_path, resume=resume, overwrite=False)
    runlog.claim(tmp_path, resume=True, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["checkpoint-5"]
    runlog.claim(tmp_path, resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def fake_trainer(save) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=lambda: True, save_model=save)


def test_publish_replaces_and_ends_with_the_config(tmp_path, monkeypatch):
    for old in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / old).write_text("old")
    moved = []
    replace = os.replace
    monkeypatch.setattr(runlog.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))

    def save(staging):
        Path(staging).mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (Path(staging) / name).write_text("new")

    runlog.publish_model(fake_trainer(save), tmp_path)
    assert moved == ["model.safetensors", "tokenizer.json", "config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "tokenizer.json"
    ]  # fmt: skip


def test_failed_publish_leaves_the_old_model(tmp_path):
    (tmp_path / "config.json").write_text("old")
    make_checkpoint(tmp_path, 5)

    def save(staging):
        Path(staging).mkdir()
        (Path(staging) / "config.json").write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(runlog.SaveError, match="No space left.*checkpoint-5 is intact"):
        runlog.publish_model(fake_trainer(save), tmp_path)
    assert (tmp_path / "config.json").read_text() == "old"
    assert not (tmp_path / ".saving").exists()


def test_timer_counts_training_only(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(runlog, "_now", lambda: float(next(clock)))
    timer, state = runlog.RunTimer(warmup_steps=2), SimpleNamespace(stateful_callbacks={})
    timer.on_train_begin(None, state, None)
    for step in range(1, 8):
        control = SimpleNamespace(should_evaluate=step in (4, 7), should_save=False)
        timer.on_step_begin(None, state, control)
        timer.on_step_end(None, state, control)
    timer.on_train_end(None, state, None)
    assert timer.seconds == 3  # three stretches of one tick: steps 1-2, 3-4, 5-7
    assert timer.steps_per_second() == 5 / 2
    resumed = runlog.RunTimer()
    resumed.on_train_begin(None, SimpleNamespace(stateful_callbacks={"RunTimer": timer.state()}), None)
    assert resumed.seconds == 3 and resumed.steps_per_second() is None


# ---- Runs ------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> dict:
    """Train in this process; the content of run.json."""
    train.main(argv)
    return json.loads((Path(parse(*argv).training.output_dir) / "run.json").read_text())


def test_the_script(flags, tmp_path):
    """As a user runs it: another process, the default recipe."""
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"}
    argv = [sys.executable, str(SCRIPT), *flags("--recipe", "nvfp4", "--report_to", "none", "--seed", "3")]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.strip().splitlines()
    assert first.startswith("device cpu (") and first.endswith("backend bf16, recipe nvfp4")
    assert "saved in" in last
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["command"].startswith("python scripts/train.py ")  # not where that is on this machine
    check_run(run)
    check_model(tmp_path / "run")
    again = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1])
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("train.py: ") and "holds a finished run" in again.stderr


def check_run(run: dict):
    assert run["schema"] == 1 and run["status"] == "complete" and run["name"] == "run"
    assert run["command"].startswith("python ") and "--seed 3" in run["command"]
    assert (run["recipe"], run["backend"], run["precision_schedule"]) == ("nvfp4", "bf16", None)
    assert run["conversion"].startswith("converted 21 of 29 linears")
    assert len(run["decisions"]) == 29 and set(run["decisions"][0]) == {"name", "converted", "reason", "experts"}
    assert run["model"]["config"]["quantization_config"]["recipe"]["name"] == "nvfp4"
    assert run["model"]["type"] == "llama" and run["model"]["parameters"] > 30000
    data, training = run["data"], run["training"]
    assert data["tokenizer"] == "byte-level BPE, 300, trained on the data" and len(data["fingerprint"]) == 64
    assert data["train_tokens"] > data["validation_tokens"] > 500 and data["validation_bytes"] > 500
    assert (training["seed"], training["steps"], training["batch_sequences"]) == (3, 6, 4)
    assert training["tokens"] == 6 * 4 * 32 and training["autocast"] == "bfloat16"
    assert {"hf_nvfp4", "python", "torch", "transformers", "accelerate", "datasets"} <= set(run["versions"])
    assert run["device"]["type"] == "cpu" and run["device"]["count"] == 1
    assert [step for step, _ in run["losses"]["train"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in run["losses"]["validation"]] == [3, 6]
    final = run["final"]
    assert final["validation_loss"] == run["losses"]["validation"][-1][1]
    assert final["validation_precision"] == "nvfp4 (as trained, per-token activation scales)"
    assert final["validation_loss_bf16"] != final["validation_loss"]
    assert 1 < final["bits_per_byte"] < 8
    speed = run["speed"]
    assert speed["train_seconds"] > 0 and speed["tokens_per_second"] > 0
    assert speed["peak_memory_bytes"] > 1e8 and speed["peak_memory_kind"] == "process resident"


def check_model(path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert "recipe='nvfp4'" in repr(model)
    assert model.dtype == torch.float32
    inputs = tokenizer("what is 3 times 4?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4
    assert (path / "generation_config.json").exists() and not (path / ".saving").exists()


def test_resume_is_bit_exact(flags, tmp_path, capsys):
    whole = run(flags())
    partial = tmp_path / "partial"
    shutil.copytree(tmp_path / "run" / "checkpoint-3", partial / "checkpoint-3")
    make_checkpoint(partial, 5, '{"global')
    resumed = run(flags("--resume_from_checkpoint", "auto", output_dir=partial))
    weights, again = (load_file(path / "model.safetensors") for path in (tmp_path / "run", partial))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert resumed["losses"] == whole["losses"] and resumed["final"] == whole["final"]
    assert resumed["data"] == whole["data"] and resumed["training"] == whole["training"]
    printed = capsys.readouterr().out
    assert (
        "checkpoint-5: its trainer_state.json is damaged" in printed
        and f"resuming from {partial}/checkpoint-3" in printed
    )


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(flags, tmp_path, monkeypatch):
    """It comes during step 2 of 6; what was asked for by then is what a run without it finds."""
    whole = run(flags("--no_save_model"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint-3", "checkpoint-6", "run.json", "trainer_state.json",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:

        def kill(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(runlog.SameData, "on_step_begin", kill)
        with pytest.raises(runlog.Stopped, match="stopped by SIGTERM at step 2 of 6; a checkpoint is saved"):
            train.main(flags(save_strategy="no"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RunTimer"]["attributes"]["seconds"] > 0
    resumed = run(flags("--resume_from_checkpoint", "auto", save_strategy="no"))
    assert resumed["losses"] == whole["losses"] and resumed["final"] == whole["final"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_refuses_other_data_and_recipes(flags, folder, tmp_path):
    run(flags("--recipe", "nvfp4"))
    (tmp_path / "run" / "run.json").unlink()
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "text.jsonl").read_text().replace("times", "plus"))
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")]
    with pytest.raises(InputError, match="trained on other data"):
        train.main(flags(*resume, train_file=other))
    with pytest.raises(InputError, match="trained with recipe 'nvfp4' and this run asks for 'fp8'"):
        train.main(flags(*resume, "--recipe", "fp8"))


def test_recipes_share_data_order_and_initial_weights(flags):
    batches, states = [], []
    for recipe in ("bf16", "nvfp4"):
        args = parse(*flags("--recipe", recipe))
        tokenizer, packed = train.prepare_data(args, None)
        network = train.build_model(args, tokenizer)
        states.append({name: weight.clone() for name, weight in network.state_dict().items()})
        trainer, _ = train.build_trainer(args, network, tokenizer, packed)
        torch.rand(1 if recipe == "bf16" else 5)  # stochastic rounding draws, BF16 does not
        loader = trainer.get_train_dataloader()
        batches.append(torch.cat([batch["input_ids"] for _ in range(2) for batch in loader]))  # two epochs
    assert torch.equal(*batches)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    half = len(batches[0]) // 2
    assert not torch.equal(batches[0][:half], batches[0][half:])


def test_full_disk(flags, tmp_path, monkeypatch):
    """The second checkpoint fails half-way: a sentence, the first one intact, and the run can go on from it."""
    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            runlog.SaveError, match="could not save .*checkpoint-6.*No space left.*checkpoint-3 is intact"
        ):
            train.main(flags("--save_total_limit", "1"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    assert run(flags("--resume_from_checkpoint", "auto"))["training"]["steps"] == 6


def test_quantization_stats(flags, tmp_path):
    run(flags("--quantization_stats", "2", "--recipe", "nvfp4"))
    path = tmp_path / "run" / "quantization_stats.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [2, 4, 6] and {row["tokens"] for row in rows} == {128}
    history = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "quantization/noise_ratio" in entry] == [2, 4, 6]
    run(flags("--overwrite_output_dir", max_steps=1, save_steps=1))
    assert not path.exists()  # a new run doesn't keep the old one's
    with pytest.raises(InputError, match="--quantization_stats 0: give a number of steps, 1 or more"):
        parse("--quantization_stats", "0")


def test_late_switch(flags, capsys):
    wsd = ["--lr_scheduler_type", "warmup_stable_decay", "--switch_last", "0.5", "--warmup_steps", "1"]
    result = run(flags(*wsd, learning_rate=1e-3))
    assert result["precision_schedule"] == {"last": 0.5, "gemms": "all", "switch_step": 3}
    assert result["training"]["lr_scheduler_kwargs"] == {"num_decay_steps": 2}
    assert "all GEMMs in BF16 from step 3 of 6, learning rate decays from step 4" in capsys.readouterr().out
    final = result["final"]
    assert "bf16" in final["validation_precision"] and "per-token" not in final["validation_precision"]
    assert final["validation_loss"] == final["validation_loss_bf16"]


def test_resets_of_oscillating_weights(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_nvfp4.OsciReset.__init__, "__defaults__", (3, 2, 1.5, 0.5))  # at 200 and 50, a minute
    result = run(flags("--osci_reset=true"))  # as compare.py passes it
    assert result["training"]["osci_reset"] == {"period": 3, "watch": 2, "ratio": 1.5, "last": 0.5}
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    (entry,) = [entry for entry in state["log_history"] if "weights_reset" in entry]
    assert entry["step"] == 5 and 0 < entry["weights_reset"] < entry["weights_watched"]


def schedule(*argv: str, steps: int = 1000):
    args = parse("--max_steps", str(steps), *argv)
    return train.lay_out_schedule(args), args.training.lr_scheduler_kwargs


def test_schedule_layout(capsys):
    assert schedule() == ([], None)
    assert schedule("--lr_scheduler_type", "warmup_stable_decay") == ([], {"num_decay_steps": 200})
    wsd = ["--lr_scheduler_type", "warmup_stable_decay", "--switch_last", "0.18"]
    (switch,), kwargs = schedule(*wsd)
    assert switch.switch_step(1000) == 820 and kwargs == {"num_decay_steps": 170}
    assert schedule(*wsd, "--lr_scheduler_kwargs", '{"num_decay_steps": 50}')[1] == {"num_decay_steps": 50}
    capsys.readouterr()
    schedule("--switch_last", "0.18")
    assert "meant for --lr_scheduler_type warmup_stable_decay, this is cosine" in capsys.readouterr().out
    assert schedule(*wsd, steps=2)[1] == {"num_decay_steps": 1}
    switch, resets = schedule(*wsd, "--osci_reset")[0]
    assert isinstance(resets, hf_nvfp4.OsciReset) and [type(c) for c in schedule("--osci_reset")[0]] == [type(resets)]


def test_epochs_become_steps():
    args = parse(
        "--num_train_epochs", "1.5", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "3"
    )
    train.resolve_steps(args.training, range(20))
    assert args.training.max_steps == 6  # 7 batches, 4 updates an epoch


def test_from_a_checkpoint(flags, tmp_path, capsys):
    run(flags("--recipe", "fp8"))
    scratch = {"config_name": None, "model_name_or_path": tmp_path / "run", "output_dir": tmp_path / "more"}
    more = run(flags("--num_train_epochs", "0.2", **scratch, max_steps=None))
    assert more["recipe"] == "fp8"  # what the checkpoint says
    assert more["model"]["from_checkpoint"] == str(tmp_path / "run") and more["training"]["steps"] > 1
    other = run(flags("--recipe", "fp8_tensor", **scratch | {"output_dir": tmp_path / "other"}))
    assert other["recipe"] == "fp8_tensor"  # what the user says
    assert "the checkpoint was trained with recipe fp8; this run's choices replace" in capsys.readouterr().out


def test_from_a_plain_checkpoint(flags, folder, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "config.json"), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    corpus = load_corpus(parse(*flags()).data)
    packing.train_tokenizer(corpus.train(), 300).save_pretrained(tmp_path / "plain")
    args = parse(*flags(config_name=None, model_name_or_path=tmp_path / "plain"))
    network = train.build_model(args, packing.load_tokenizer(str(tmp_path / "plain")))
    assert network.dtype == torch.float32 and "recipe='nvfp4'" in repr(network)
    config = tmp_path / "plain" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="is quantized with 'fp8'. Training needs high-precision weights"):
        train.main(flags(config_name=None, model_name_or_path=tmp_path / "plain"))


def test_streaming(flags):
    result = run(flags("--streaming"))
    assert result["data"]["train_tokens"] is None and result["data"]["fingerprint"].startswith("first 256 documents: ")
    assert result["training"]["steps"] == 6


def test_a_nan_in_the_weights_stops_training(flags, tmp_path):
    run(flags())
    weights = load_file(tmp_path / "run" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"model.layers.1.mlp.up_proj"):
        train.main(flags(config_name=None, model_name_or_path=tmp_path / "run", output_dir=tmp_path / "more"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "nvfp5"], "recipe 'nvfp5'"),
        (["--backend", "fp3"], "backend 'fp3'"),
        (["--skip", "absent_proj"], "'absent_proj' matches none"),
        (["--keep_bf16_last", "half"], "--keep_bf16_last half: give a number of blocks"),
        (["--keep_bf16_last", "4"], "nothing to convert"),
        (["--vocabulary_size", "400"], "the tokenizer has 400 tokens, the model's embedding only 320 rows"),
        (["--sequence_length", "100000"], "text is shorter than one sequence"),
        (["--config_name", "no/such/model"], "no/such/model"),
        (["--osci_reset"], "watches 50 steps, and the last 0.2 of 6 are 1"),
        (["--osci_reset", "--recipe", "halo1", "--max_steps", "999"], "'halo1' of .* rotates w before its cast"),
        (["--switch_last", "1.5"], "--switch_last 1.5: give a fraction"),
    ],
)
def test_bad_input(flags, argv, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        train.main(flags(*argv))


# ---- Distillation ----------------------------------------------------------------------------------------


def test_a_checkpoint_teaches_its_own_student(flags, tmp_path, capsys):
    train.main(flags("--recipe=bf16"))
    teacher = tmp_path / "run"
    options = [f"--teacher={teacher}", "--recipe=nvfp4_qat", "--kd_ratio=0.5"]
    student = flags(*options, config_name=None, output_dir=tmp_path / "s")
    train.main(student)
    said = capsys.readouterr().out
    assert f"teacher: {teacher}, 0.5 of the loss, temperature 1" in said
    run = json.loads((tmp_path / "s" / "run.json").read_text())
    assert run["model"]["from_checkpoint"] == str(teacher)
    assert run["training"]["teacher"] == {"checkpoint": str(teacher), "kd_ratio": 0.5, "temperature": 1.0}
    assert run["recipe"] == "nvfp4_qat"
    start = json.loads((teacher / "run.json").read_text())["final"]
    before, after = run["final"]["before"], run["final"]
    assert before["validation_loss_bf16"] == pytest.approx(start["validation_loss"], abs=1e-3)
    assert before["validation_loss"] not in (before["validation_loss_bf16"], after["validation_loss"])
    assert f"{before['validation_loss']:.4f}   in BF16 {before['validation_loss_bf16']:.4f}" in said


def test_recovered_is_the_share_of_what_quantizing_added():
    before = {"validation_loss": 4.25, "validation_loss_bf16": 4.0}
    assert [recovered(before, loss) for loss in (4.25, 4.125, 4.0, 4.5)] == [0, 0.5, 1, -1]
    assert recovered({"validation_loss": 4.0, "validation_loss_bf16": 4.0}, 3.9) is None


def test_distillation_says_what_is_missing(flags, folder, tmp_path):
    with pytest.raises(InputError, match="are for distillation: give --teacher"):
        train.main(flags("--kd_ratio=0.5"))
    train.main(flags("--recipe=bf16"))
    other = json.loads((folder / "config.json").read_text()) | {"vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="the model has 512 tokens and its teacher"):
        options = {"config_name": tmp_path / "config.json", "output_dir": tmp_path / "s"}
        train.main(flags(f"--teacher={tmp_path / 'run'}", **options))
