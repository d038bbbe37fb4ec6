"""Several processes, gloo on the CPU, against one process that accumulates over the same micro-batches.

With everything rounded to nearest, and two processes, data parallelism is the same bits: each micro-batch is cast by
itself in either case, and half of a gradient plus half of another is the same sum. What runs is distributed_jobs.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_jobs import JOBS, llama, mixtral, step, tokens, whole
from transformers import AutoModelForCausalLM

from hf_nvfp4.runlog import find_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where all jobs have run, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(0.2)
        return folder
    try:
        script, names = Path(__file__).with_name("distributed_jobs.py"), [job.__name__ for job in JOBS]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, script, folder, *names], env=environment, timeout=300, check=True)
    finally:
        (folder / "done").touch()
    return folder


@pytest.fixture
def results(folder):
    """results(job): what each of its processes returned."""

    def read(name: str) -> list[dict]:
        codes = json.loads((folder / f"{name}.json").read_text())
        logs = "\n".join(path.read_text()[-3000:] for path in folder.glob(f"{name}.*.log"))
        assert set(codes) == {0}, f"{name}: exit statuses {codes}\n{logs}"
        return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(len(codes))]

    return read


def assert_same(tensors: dict, expected: dict, tolerance: float = 0.0):
    """Equal, or as near as a tolerance relative to the norm of each."""
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (tensors[name] - tensor).norm() / tensor.norm()
        assert torch.equal(tensors[name], tensor) or difference <= tolerance, f"{name}: {difference:.2g}"


# ---------------------------------------------------------------------------- one step


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_distributed_step_is_that_of_one_process(results, layout, autocast):
    found = [result[f"{layout}, autocast" if autocast else layout] for result in results("steps")]
    expected = step(llama(), [0, 1], autocast)
    assert [loss for rank in found for loss in rank["losses"]] == expected["losses"]
    for rank in found:
        assert_same(rank["gradients"], expected["gradients"])


@pytest.mark.parametrize("layout", ["fsdp2, checkpointing", "fsdp2, offload"])
def test_what_saves_memory_changes_no_bit_of_a_distributed_step(results, layout):
    expected = step(llama(), [0, 1])
    for rank, result in enumerate(results("steps")):
        assert result[layout]["losses"] == [expected["losses"][rank]]
        assert_same(result[layout]["gradients"], expected["gradients"])


def test_distributed_accumulation_adds_in_another_order(results):
    """Each process adds its own micro-batches first."""
    expected = step(llama(), [0, 1, 2, 3])
    for rank, result in enumerate(results("steps")):
        assert result["fsdp2, two micro-batches"]["losses"] == expected["losses"][rank::2]
        assert_same(result["fsdp2, two micro-batches"]["gradients"], expected["gradients"], 1e-6)


def test_distributed_bf16_parameters_are_those_of_a_bf16_model(results):
    """FSDP2 gathers parameters in BF16: what computes is a BF16 model; gradients are summed in FP32."""

    def with_bf16_parameters():  # buffers stay
        model = llama()
        for p in model.parameters():
            p.data = p.data.bfloat16()
        return model

    halves = [step(with_bf16_parameters(), [number]) for number in (0, 1)]
    expected = {name: (a + halves[1]["gradients"][name]) / 2 for name, a in halves[0]["gradients"].items()}
    for rank, result in enumerate(results("steps")):
        assert result["fsdp2, bf16"]["losses"] == halves[rank]["losses"]
        assert_same(result["fsdp2, bf16"]["gradients"], expected)


def test_distributed_ranks_draw_different_numbers_and_the_same_signs(results):
    numbers, signs = zip(*(result["seeds"] for result in results("steps")), strict=True)
    assert not torch.equal(*numbers) and torch.equal(*signs)


# ---------------------------------------------------------------------------- weights gathered in 4 bits


@pytest.mark.parametrize("layout", ["fp32", "autocast", "bf16", "reference", "from_forward", "drawn"])
def test_distributed_4_bit_gather_changes_no_bit(results, layout):
    """Before and after an optimizer step; against FSDP2 without it, which the tests above compare to one process."""
    for result in results("gather"):
        for plain, in_4_bits in zip(*result[layout], strict=True):
            assert in_4_bits["losses"] == plain["losses"]
            assert_same(in_4_bits["gradients"], plain["gradients"])


def test_distributed_4_bit_gather_moves_a_quarter_of_the_bytes(results):
    sizes = {name: p.numel() for name, p in llama().named_parameters()}
    weights = sum(size for name, size in sizes.items() if "proj" in name)
    for result in results("gather"):
        moved = result["bytes"]
        assert moved["plain"] == {"gathered": 4 * sum(sizes.values()), "reduced": 0}
        for name, bits in {"square": 4 + 8 / 256, "by rows": 4 + 8 / 16}.items():
            assert moved["plain"]["gathered"] - moved[name]["gathered"] == weights * (32 - bits) / 8
            assert bits / 16 <= 0.32
            assert moved[name]["reduced"] == 4 * 14  # largest magnitudes, once


def test_distributed_4_bit_gather_says_what_it_leaves_out(results):
    for result in results("gather"):
        found = result["refusals"]
        reasons = found["reasons"]
        assert reasons["cut"].startswith("48 rows over 2 ranks are not equal parts of a multiple of 16")
        assert reasons["frozen"] == "its weight is frozen" and reasons["tied"].endswith("twin.weight too")
        assert "casts the weight to bf16" in reasons["bf16"] and "not once for both" in reasons["other"]
        assert reasons.keys() == {"cut", "frozen", "tied", "bf16", "other"}
        assert found["unsharded"].startswith("ValueError") and "not sharded by fully_shard" in found["unsharded"]
        assert found["recipe"].startswith("ValueError") and "a recipe stays as it is" in found["recipe"]
        assert "gather_in_4_bits(model, dtype=torch.bfloat16)" in found["dtype"]
        assert found["late"].startswith("RuntimeError") and "before the first forward" in found["late"]
        assert found["read"].startswith("TypeError")


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "job, run", [("train_ddp", "nearest"), ("train_fsdp2", "sharded"), ("train_fsdp2", "gathered")]
)
def test_distributed_training_is_that_of_one_process(results, job, run):
    """Four steps of AdamW; Trainer's losses, and the weights."""
    (expected,) = results("train_one")
    for result in results(job):
        assert_same(result[run]["weights"], expected["nearest"]["weights"])
    assert results(job)[0][run]["losses"] == expected["nearest"]["losses"]


@pytest.mark.parametrize("job", ["train_ddp", "train_fsdp2"])
def test_distributed_training_resumes_to_the_bit_with_stochastic_rounding(results, job):
    for result in results(job):
        whole, resumed = result["stochastic"]
        assert resumed["losses"] == whole["losses"]
        assert_same(resumed["weights"], whole["weights"])


@pytest.mark.parametrize(
    "job, run",
    [
        ("resume_one", "ddp"),
        ("train_ddp", "from one process"),
        ("resume_fsdp2_one", "sharded"),
        ("train_fsdp2", "from one process"),  # gathers in 4 bits what was saved by one that did not
        ("train_fsdp2", "from gathered"),  # the other way round
    ],
)
def test_distributed_training_goes_on_with_another_number_of_processes(results, job, run):
    (expected,) = results("train_one")
    result = results(job)[0][run]
    assert result["losses"] == expected["nearest"]["losses"]
    assert_same(result["weights"], expected["nearest"]["weights"])


def test_distributed_training_in_bf16_learns_as_one_process_does(results):
    """Parameters and activations are BF16, unlike under autocast; the loss is not rounded to it."""
    (expected,) = results("train_one")
    losses = results("train_fsdp2")[0]["bf16"]["losses"]
    assert losses == pytest.approx(expected["nearest"]["losses"], rel=5e-3)
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in losses)


def test_distributed_training_in_shards_publishes_a_whole_model(results, folder):
    (result, _), ids = results("train_fsdp2"), tokens(7)
    model = AutoModelForCausalLM.from_pretrained(folder / "published")
    assert_same({name: whole(p) for name, p in model.named_parameters()}, result["sharded"]["weights"])
    assert model.nvfp4_decisions and model(**ids).loss.isfinite()
    assert (folder / "sharded" / "checkpoint-2" / "config.json").exists()  # what --resume_from_checkpoint looks at


@pytest.mark.parametrize("layout, batches", [("tp_size", 1), ("fsdp_size", 2)])
def test_distributed_experts_are_those_of_one_process(results, layout, batches):
    """Half of them on each process. An expert is cast with the tokens of all processes: one batch of all here."""
    model, parts = mixtral(), [tokens(number) for number in range(batches)]
    loss = model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss
    loss.backward()
    found = [result.get(layout) for result in results("experts")]
    if None in found:
        pytest.skip("expert parallelism needs a newer Transformers")
    assert sum(rank["losses"][0] for rank in found) / 2 == pytest.approx(loss.item(), rel=1e-6)
    for rank in found:
        assert_same(rank["gradients"], {name: p.grad for name, p in model.named_parameters()}, 1e-4)


# ---------------------------------------------------------------------------- processes that die


@pytest.mark.parametrize("job, dead", [("killed_in_step", 1), ("killed_in_save", 0), ("killed_in_sharded_save", 1)])
def test_a_distributed_job_ends_with_its_process_and_goes_on(results, folder, job, dead):
    """The other process ends too, with an error; what was saved before, is resumed from."""
    codes = json.loads((folder / f"{job}.json").read_text())
    assert codes[dead] == -9 and codes[1 - dead] == 1, codes
    checkpoint, _ = find_checkpoint("auto", folder / job)
    assert checkpoint == folder / job / "checkpoint-2"
    (expected,) = results("train_one")
    resumed = results("resume_fsdp2_one" if "sharded" in job else "resume_one")[0][job]
    assert_same(resumed["weights"], expected["nearest"]["weights"])
