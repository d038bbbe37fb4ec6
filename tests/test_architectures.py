"""Any causal LM: a dozen families train in NVFP4, save and load; what goes wrong with a model is said, not raised."""

import os
import re
import time

import pytest

from hf_nvfp4 import architecture_tables, architectures
from hf_nvfp4.architectures import ATTENTION, EXPERTS, HEAD, MIXER, MLP, Row
from hf_nvfp4.experts import OTHER_EXPERTS

# Model type -> kinds that it has converted layers of.
DOZEN = {
    "llama": {ATTENTION, MLP},
    "qwen3": {ATTENTION, MLP},
    "gemma3_text": {ATTENTION, MLP},
    "mistral": {ATTENTION, MLP},
    "phi": {ATTENTION, MLP},
    "gpt2": {ATTENTION, MLP},
    "nemotron": {ATTENTION, MLP},
    "nemotron_h": {ATTENTION, MLP, MIXER, EXPERTS},
    "mamba2": {MIXER},
    "mixtral": {ATTENTION, EXPERTS},
    "qwen3_moe": {ATTENTION, EXPERTS},
    "deepseek_v3": {ATTENTION, MLP, EXPERTS},
    "gpt_oss": {ATTENTION, EXPERTS},
}


@pytest.mark.parametrize("model_type", DOZEN)
def test_a_dozen_families(model_type):
    (name,) = architectures.named([model_type], architectures.causal_lms())
    row = architectures.check(name)
    assert (row.status, row.reason) == ("pass", "")
    assert {kind for kind, (converted, _) in row.kinds.items() if converted} == DOZEN[model_type]
    assert row.kinds[HEAD][0] == 0 and not any("expert" in reason for reason in row.kept)
    assert 0 < abs(row.loss - row.loss_bf16) < 0.02 * row.loss_bf16


def _attempt(name: str) -> Row:
    if name == "crash":
        os.abort()
    if name == "endless":
        time.sleep(60)
    return Row(name, "pass")


def test_a_crash_or_an_endless_loop_is_a_row():
    done = []
    rows = architectures.check_all(["crash", "endless", "good"], 3, 2, lambda row: done.append(row.name), _attempt)
    assert [row.status for row in rows] == ["fail", "fail", "pass"]
    assert "exit code -6" in rows[0].reason and rows[1].reason == "not done after 3 s"
    assert sorted(done) == ["crash", "endless", "good"]


def test_what_is_wrong_with_a_model_is_its_rows_reason(monkeypatch):
    llama = "LlamaForCausalLM"
    monkeypatch.setattr(architectures, "LEAST_COSINE", 0.9999)
    monkeypatch.setattr(architectures, "NOISE_FACTOR", 0)
    row = architectures.check(llama)
    assert row.status == "fail" and "gradients have cosine 0.98" in row.reason
    monkeypatch.setattr(architectures, "_keys", lambda folder: {folder.name: ()})
    monkeypatch.setattr(architectures, "_check_nearness", lambda *_: None)
    assert "keys on disk differ" in architectures.check(llama).reason
    monkeypatch.setattr(architectures, "tiny_config", lambda cls: 1 / 0)
    row = architectures.check(llama)
    assert row.status == "not built" and re.fullmatch(r"ZeroDivisionError: division by zero \(test_.*\)", row.reason)
    monkeypatch.setattr(architectures.transformers.LlamaConfig, "__init__", lambda self: 1 / 0)
    assert architectures.check(llama).reason.endswith("); nor can its default config be built")


def test_names_are_classes_or_model_types():
    types = architectures.causal_lms()
    assert len(types) > 100 and "llama" in types["LlamaForCausalLM"]
    assert architectures.named(["llama", "GPT2LMHeadModel", "llama"], types) == ["LlamaForCausalLM", "GPT2LMHeadModel"]
    assert architectures.named(None, types) == list(types)
    with pytest.raises(ValueError, match=r"no causal LM 'lama' among the \d+ .* such as llama"):
        architectures.named(["lama"], types)


def test_the_page_counts_and_says_why():
    rows = [
        Row("A", "pass", kinds={ATTENTION: [4, 4], EXPERTS: [0, 2]}, kept={OTHER_EXPERTS: 2}, loss=5.5),
        Row("D", "pass", control="loss 5"),
        Row("B", "fail", "the process died | with exit code -6"),
        Row("C", "not built", "ImportError: timm"),
    ]
    types = {"A": ["a"], "B": ["b", "b_text"], "C": ["c"], "D": ["d"]}
    page = architecture_tables.page(rows, types, "python x.py", {"torch": "2", "transformers": "5"})
    notes = "1 with fused experts kept in high precision, 1 sensitive to rounding"
    assert f"2 of 3 pass ({notes}); 1 can't be built tiny" in page
    cells = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "sensitive to rounding: loss 5" in cells["D (d)"]
    assert "4/4" in cells["A (a)"] and "2 kept: experts that don't follow" in cells["A (a)"]
    assert "the process died \\| with exit code -6" in cells["B (b, b_text)"] and "timm" in cells["C (c)"]
