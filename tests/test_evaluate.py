"""Scores against log-likelihoods worked out from the logits; precisions, padding, files, failures."""

import gzip
import importlib.util
import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="scripts/evaluate.py needs lm-eval: pip install 'hf_nvfp4[scripts]'")

from lm_eval.api.metrics import mean_stderr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import hf_nvfp4
from hf_nvfp4 import evaluation, scores
from hf_nvfp4.data import stdlib_documents
from hf_nvfp4.tasks import python_stdlib

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TEXTS = [
    "def f(x):\n    return x\n",
    "import os, sys",
    "# ünï\n" * 7,
    "class A:\n    b = 1\n" * 3,
    "x = [1, 2, 3]\n",
]
LONGEST = 64  # tokens of context


def script(name):
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The same random model with a tokenizer of bytes: plain, and converted to bf16 and nvfp4."""
    root = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=272, max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=0, **shape)
    for name in ("plain", "bf16", "nvfp4"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # far from uniform, so that errors show
        if name != "plain":
            hf_nvfp4.quantize_model(model, hf_nvfp4.NVFP4TrainingConfig(name))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Task files whose data lie under data/, relative to the folder: rolling text, choices, and groups of them."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "data").mkdir()
    (root / "data" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    items = [{"q": text[:7], "choices": [text[7:12], "zz"], "answer": i % 2} for i, text in enumerate(TEXTS)]
    (root / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (root / "data" / "few.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items[:3]))
    base = "test_split: test\ndataset_path: json\ndataset_kwargs: {data_files: {test: data/%s.jsonl}}\ntask: %s\n"
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\nmetric_list:\n"
    rolling += "".join(f"  - metric: {m}\n" for m in ("bits_per_byte", "word_perplexity"))
    choice = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    choice += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    group = "group: %s\ntask: [tiny_choice, tiny_few]\naggregate_metric_list: [{metric: acc, weight_by_size: %s}]\n"
    files = {
        "tiny_rolling": base % ("texts", "tiny_rolling") + rolling,
        "tiny_choice": base % ("items", "tiny_choice") + choice,
        "tiny_few": base % ("few", "tiny_few") + choice,
        "tiny_weighted": group % ("tiny_weighted", "true"),
        "tiny_unweighted": group % ("tiny_unweighted", "false"),
    }
    for name, text in files.items():
        (root / f"{name}.yaml").write_text(text)
    return root


def load(folders, name, dtype=torch.float32):
    return evaluation.load_model(folders[name], dtype, torch.device("cpu"))


def load_tasks(task_folder, *names):
    return evaluation.load_tasks(list(names), [str(task_folder)], str(task_folder))


def by_hand(model, tokenizer, text):
    """Log-likelihood of a text that fits one window, from FP32 log-probabilities."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    start = torch.tensor([tokenizer.bos_token_id])
    with torch.no_grad():
        logits = model(torch.cat([start, ids[:-1]])[None]).logits[0].float()
    return logits.log_softmax(-1).gather(1, ids[:, None]).sum().item()


# ---- Statistics ----------------------------------------------------------------------------------------


def test_mean_and_its_error_are_those_of_lm_eval():
    items = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    value, pull = scores.estimate("mean", items)
    assert value == pytest.approx(5 / 7)
    assert scores.standard_error(pull) == pytest.approx(mean_stderr(items))


@pytest.mark.parametrize("aggregation", ["bits_per_byte", "weighted_perplexity", "perplexity"])
def test_errors_of_ratios_and_perplexities_agree_with_the_jackknife(aggregation):
    generator = np.random.default_rng(0)
    sizes = generator.lognormal(7, 0.7, 200)
    items = list(zip(-sizes * generator.normal(0.8, 0.1, 200), sizes, strict=True))
    if aggregation == "perplexity":
        items = [likelihood / 1000 for likelihood, _ in items]
    without = [scores.estimate(aggregation, items[:i] + items[i + 1 :])[0] for i in range(200)]
    jackknife = math.sqrt(199 / 200 * sum((x - np.mean(without)) ** 2 for x in without))
    assert scores.standard_error(scores.estimate(aggregation, items)[1]) == pytest.approx(jackknife, rel=0.03)


def test_paired_difference_by_hand():
    difference, error = scores.paired_difference("mean", [1, 1, 0, 1], [1, 0, 0, 0])
    assert difference == 0.5
    assert error == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))  # differences 0 1 0 1
    ours, base = [(-10.0, 5), (-12.0, 7)], [(-8.0, 5), (-11.0, 7)]
    difference, _ = scores.paired_difference("bits_per_byte", ours, base)
    assert difference == pytest.approx((22 - 19) / 12 / math.log(2))
    assert scores.paired_difference("f1", [(0, 1)], [(1, 1)]) is None


def test_one_item_has_no_error():
    assert scores.standard_error(scores.estimate("mean", [1.0])[1]) is None
    assert scores.plus_minus(0.5, None) == "0.5000"


def test_numbers_have_the_digits_that_their_error_deserves():
    assert scores.plus_minus(2.58317, 0.04919) == "2.583 ± 0.049"
    assert scores.plus_minus(1234.5, 120.0) == "1234 ± 120"
    assert scores.plus_minus(-0.00208, 0.00017, "+") == "-0.00208 ± 0.00017"
    assert scores.plus_minus(1.94e9, 1.96e9) == "1.94e+09 ± 2e+09"


# ---- Scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_per_byte_is_that_of_the_logits(folders, task_folder, dtype):
    """In BF16 too: log-probabilities rounded to BF16 would be off by 1e-3."""
    model, tokenizer = load(folders, "plain", dtype)
    found, samples = evaluation.score(model, tokenizer, load_tasks(task_folder, "tiny_rolling"), evaluation.Settings(1))
    expected = [by_hand(model, tokenizer, text) for text in TEXTS]
    assert [sample["metrics"]["bits_per_byte"][0] for sample in samples] == pytest.approx(expected, rel=1e-5)
    sizes = [len(text.encode()) for text in TEXTS]
    entry = found["tasks"]["tiny_rolling"]["metrics"]["bits_per_byte"]
    assert entry["value"] == pytest.approx(-sum(expected) / sum(sizes) / math.log(2), rel=1e-5)
    pull = scores.estimate("bits_per_byte", list(zip(expected, sizes, strict=True)))[1]
    assert entry["stderr"] == pytest.approx(scores.standard_error(pull), rel=1e-3)
    assert entry["higher_is_better"] is False
    assert found["max_length"] == LONGEST


@pytest.mark.parametrize("name", ["plain", "nvfp4"])
def test_scores_do_not_depend_on_batch_and_padding(folders, task_folder, name):
    """Texts of 14 to 64 tokens, alone and padded to the longest: the order of sums may differ, no more."""
    model, tokenizer = load(folders, name)
    tasks = load_tasks(task_folder, "tiny_rolling", "tiny_choice")
    alone, padded = (evaluation.score(model, tokenizer, tasks, evaluation.Settings(size))[1] for size in (1, 8))
    for one, other in zip(alone, padded, strict=True):
        assert one["hash"] == other["hash"]
        one, other = (np.asarray(sample["responses"], dtype=float) for sample in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_group_is_aggregated_as_lm_eval_does(folders, task_folder):
    model, tokenizer = load(folders, "plain")
    for name in ("tiny_weighted", "tiny_unweighted"):
        tasks = load_tasks(task_folder, name)
        record = evaluation.score(model, tokenizer, tasks, evaluation.Settings())[0]["tasks"]
        theirs = tasks[0].aggregate(
            {leaf: {"acc,none": record[leaf]["metrics"]["acc"]["value"],
                    "acc_stderr,none": record[leaf]["metrics"]["acc"]["stderr"],
                    "sample_len": record[leaf]["samples"]} for leaf in ("tiny_choice", "tiny_few")}
        )  # fmt: skip
        entry = record[name]["metrics"]["acc"]
        assert entry["value"] == pytest.approx(theirs["acc,none"])
        if name == "tiny_unweighted":  # lm-eval's pooled error of weighted groups is another estimate
            assert entry["stderr"] == pytest.approx(theirs["acc_stderr,none"])
        assert list(scores.Scores(Path(), {"tasks": record}).tasks) == [name]  # its tasks are inside


def test_groups_are_compared_task_by_task(tmp_path):
    hits = {"base": {"a": [1, 0, 0, 0, 1], "b": [0, 1, 0]}, "ours": {"a": [1, 1, 0, 1, 1], "b": [0, 1, 1]}}
    metric = {"higher_is_better": True, "aggregation": "mean"}
    tasks = {task: {"metrics": {"acc": metric}} for task in "ab"}
    tasks["both"] = {"metrics": {"acc": metric | {"weights": {"a": 5 / 8, "b": 3 / 8}}}, "subtasks": ["a", "b"]}
    base, ours = (
        scores.write_scores(
            tmp_path / f"{name}.json",
            {"name": name, "tasks": tasks},
            [
                {"task": task, "doc_id": i, "hash": f"{task}{i}", "metrics": {"acc": hit}}
                for task, items in results.items()
                for i, hit in enumerate(items)
            ],
        )
        for name, results in hits.items()
    )
    value, error = scores.compare(ours, base, "both", "acc")
    assert value == pytest.approx((6 - 3) / 8)
    # Differences 0 1 0 1 0 and 0 0 1: variances 0.3 and 1/3 of the items, over 5 and 3 items.
    assert error == pytest.approx(math.sqrt((5 / 8) ** 2 * 0.3 / 5 + (3 / 8) ** 2 / 3 / 3))


def test_outputs_that_are_not_finite_are_an_error(folders, task_folder):
    model, tokenizer = load(folders, "plain")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="tiny_rolling: .* is nan; the outputs are not finite"):
        evaluation.score(model, tokenizer, load_tasks(task_folder, "tiny_rolling"), evaluation.Settings())


# ---- Precision -----------------------------------------------------------------------------------------


def logits(model, name):
    x = torch.arange(1, 33)[None]
    with evaluation.precision(model, name), torch.no_grad():
        return model(x).logits, evaluation.precision_detail(model)


def test_precisions_are_what_they_say(folders):
    plain, control, nvfp4 = (load(folders, name, torch.bfloat16)[0] for name in ("plain", "bf16", "nvfp4"))
    expected, detail = logits(plain, "bf16")
    assert detail == "plain model without an hf_nvfp4 configuration, bfloat16 throughout"
    in_bf16, detail = logits(nvfp4, "bf16")
    assert "bf16 on backend bf16 in 14 linears; all else bfloat16" == detail
    torch.testing.assert_close(in_bf16, expected)
    as_trained, detail = logits(nvfp4, "as-trained")
    assert detail.startswith("nvfp4 on backend bf16 in 14 linears, activation scales per token")
    assert (as_trained - expected).abs().max() > 0.05
    assert torch.equal(logits(control, "nvfp4")[0], as_trained)
    assert torch.equal(logits(nvfp4, "as-trained")[0], as_trained)  # the switch was undone


def test_a_packed_model_is_scored_as_trained(folders, task_folder):
    model, tokenizer = load(folders, "nvfp4", torch.bfloat16)
    tasks, settings = load_tasks(task_folder, "tiny_rolling"), evaluation.Settings()
    expected = evaluation.score(model, tokenizer, tasks, settings)
    config = hf_nvfp4.NVFP4TrainingConfig(inference="w4a4")
    model = AutoModelForCausalLM.from_pretrained(
        folders["nvfp4"], quantization_config=config, dtype=torch.bfloat16
    )
    with evaluation.precision(model, "as-trained"):
        assert evaluation.score(model, tokenizer, tasks, settings) == expected
        detail = evaluation.precision_detail(model)
    assert detail.startswith("recipe nvfp4, packed, W4A4, activations nvfp4 1×16") and "in 14 linears" in detail
    with pytest.raises(ValueError, match="packed model can be scored as-trained only, not in 'bf16'"):
        evaluation.precision(model, "bf16")


def test_a_plain_model_has_no_other_precision(folders):
    model, _ = load(folders, "plain", torch.bfloat16)
    with pytest.raises(ValueError, match="plain model.*as-trained or in bf16, not in 'nvfp4'"):
        evaluation.precision(model, "nvfp4")
    with pytest.raises(ValueError, match="loaded in float32: for bf16 use --dtype bfloat16"):
        evaluation.precision(model.float(), "bf16")


# ---- Tasks ---------------------------------------------------------------------------------------------


def test_shipped_tasks_are_deterministic_and_held_out():
    texts, items = python_stdlib.modules(version=1.0)["test"], python_stdlib.continuations()["test"]
    held_out = [document["text"] for document in stdlib_documents("validation")]
    assert len(texts) == min(40, len(held_out)) and len(items) == 200
    for text, whole in zip(texts["text"], held_out, strict=False):
        assert whole.startswith(text) and len(text.encode()) <= python_stdlib.MODULE_BYTES
        assert text == whole or (text.endswith("\n") and len(text.encode()) > python_stdlib.MODULE_BYTES - 500)
    for item in items:
        assert {len(choice) for choice in item["choices"]} == {python_stdlib.CONTINUATION_CHARACTERS}
        right = item["context"] + item["choices"][item["answer"]]
        wrong = item["context"] + item["choices"][1 - item["answer"]]
        assert any(right in text for text in held_out) and not any(wrong in text for text in held_out)
    assert sum(items["answer"]) == 100
    assert items.to_list() == python_stdlib.continuations()["test"].to_list()


def test_text_is_cut_at_a_line_and_never_inside_a_character():
    assert python_stdlib.whole_lines("añb\ncd\nef", 8) == "añb\ncd\n"
    assert python_stdlib.whole_lines("añb\ncd\nef", 6) == "añb\n"
    assert python_stdlib.whole_lines("añ\n", 4) == "añ\n"


def test_unknown_tasks_folders_and_data_are_errors(task_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "TaskManager", without_defaults(evaluation.TaskManager))
    with pytest.raises(ValueError, match=r"unknown task 'tiny_chois'. Did you mean tiny_choice"):
        load_tasks(task_folder, "tiny_chois")
    with pytest.raises(ValueError, match="no task files"):
        evaluation.load_tasks(["tiny_choice"], [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=f"start at {tmp_path}: see --data_dir"):
        evaluation.load_tasks(["tiny_choice"], [str(task_folder)], str(tmp_path))


def without_defaults(manager):
    """lm-eval's own 14,000 task files take long to read."""
    return lambda include_path=None, include_defaults=False: manager(include_path=include_path, include_defaults=False)


def test_a_local_task_of_the_text_pack(folders, monkeypatch, tmp_path):
    if not SHARED.is_dir():
        pytest.skip(f"no text pack at {SHARED}; it is not part of the repository")
    monkeypatch.chdir(tmp_path)
    tasks = evaluation.load_tasks(["local_copa"], [str(SHARED / "eval" / "lm_eval_tasks")], str(SHARED))
    assert Path.cwd() == tmp_path
    record, samples = evaluation.score(*load(folders, "nvfp4"), tasks, evaluation.Settings(limit=4))
    assert record["tasks"]["local_copa"]["samples"] == len(samples) == 4


# ---- The script ----------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach another machine is an error."""

    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: refuse(None, args[:2]))


def test_models_side_by_side(folders, task_folder, tmp_path, capsys, offline):
    names = ["bf16", "nvfp4", "plain"]
    options = f"--tasks tiny_rolling,tiny_choice --include_path {task_folder} --data_dir {task_folder}"
    options += f" --output {tmp_path} --precision as-trained nvfp4 --device cpu"
    failed = script("evaluate").main([*(folders[name] for name in names), *options.split()])
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith("device cpu") and "nvfp4: recipe nvfp4, backend bf16" in first and "plain model" in first

    assert failed == 1 and f"FAILED {folders['plain']}, nvfp4: a plain model" in printed
    assert printed.index("Scores taken as trained") < printed.index("Scores taken in nvfp4")
    assert "- nvfp4: nvfp4 on backend bf16 in 14 linears, activation scales per token; all else bfloat16" in printed
    assert "nvfp4 − bf16" in printed and "± is the paired standard error" in printed

    record = json.loads((tmp_path / "nvfp4" / "eval-as-trained.json").read_text())
    assert record["schema"] == 1 and record["name"] == record["recipe"] == "nvfp4" and record["dtype"] == "bfloat16"
    assert record["versions"]["lm_eval"] and record["device"]["type"] == "cpu"
    with gzip.open(tmp_path / "nvfp4" / record["samples_file"], "rt") as lines:
        assert sum(1 for _ in lines) == 2 * len(TEXTS)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "eval-as-trained.json",
        "eval-as-trained.samples.jsonl.gz",
    ]
    ours, base = (scores.read_scores(tmp_path / name / "eval-as-trained.json") for name in ("nvfp4", "bf16"))
    value, error = scores.compare(ours, base, "tiny_rolling", "bits_per_byte")
    metrics = [s.tasks["tiny_rolling"]["metrics"]["bits_per_byte"] for s in (ours, base)]
    assert value == pytest.approx(metrics[0]["value"] - metrics[1]["value"])
    assert 0 < error < metrics[0]["stderr"]  # that is what pairing is for
    same = [scores.read_scores(tmp_path / name / "eval-nvfp4.json") for name in ("nvfp4", "bf16")]
    assert scores.compare(*same, "tiny_rolling", "bits_per_byte") == (0, 0)


def test_a_model_trained_here_is_scored_in_windows_of_its_training(folders, task_folder, tmp_path):
    run = {"name": "short", "model": {"from_checkpoint": None}, "data": {"sequence_length": 16}}
    folder = tmp_path / "model"
    model, tokenizer = load(folders, "plain")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folders["plain"]).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(run))
    options = f"--tasks tiny_rolling --include_path {task_folder} --data_dir {task_folder} --device cpu"
    assert script("evaluate").main([str(folder), *options.split()]) == 0
    record = json.loads((folder / "eval-as-trained.json").read_text())
    assert record["name"] == "short" and record["max_length"] == 16


def test_what_cannot_be_run_is_said_in_a_sentence(folders, task_folder, tmp_path, capsys):
    main = script("evaluate").main
    assert main([folders["plain"], "--precision", "nvfp5"]) == 1
    assert "FAILED unknown recipe 'nvfp5'; known: " in capsys.readouterr().out
    for arguments, message in (
        (["runs/typo"], "no such folder: runs/typo"),
        ([folders["plain"], folders["plain"]], "same folder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    options = f"--tasks tiny_few --include_path {task_folder} --data_dir {task_folder} --output {tmp_path} --device cpu"
    assert main([str(empty), folders["plain"], *options.split()]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED {empty}: loading: " in printed and "has no config.json" in printed
    assert (tmp_path / "plain" / "eval-as-trained.json").is_file()  # the other model was scored all the same


def test_scores_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "eval-bf16.json"
    scores.write_scores(path, {"schema": 1, "tasks": {}}, [])
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        scores.write_scores(path, {"schema": 1, "tasks": {"new": {}}}, [])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
