"""Distillation: the loss, what Trainer makes of it, and that a 4-bit student learns its teacher."""

import copy
import math

import pytest
import torch
from transformers import TrainingArguments

from hf_nvfp4 import DistillationTrainer
from hf_nvfp4 import distillation as module
from hf_nvfp4.distillation import divergence


def logits_and_labels():
    student, teacher = (3 * torch.randn(2, 9, 13) for _ in range(2))
    labels = torch.randint(13, (2, 9))
    labels[0, :4] = labels[1, 6] = -100
    return student, teacher, labels


def expected(student, teacher, labels, temperature=1.0, tokens=None):
    """By its definition, token by token, in FP64."""
    total, count = 0, 0
    for b in range(2):
        for t in range(8):
            if labels[b, t + 1] != -100:
                p, q = ((x[b, t].double() / temperature).softmax(0) for x in (teacher, student))
                total, count = total + (p * (p / q).log()).sum(), count + 1
    return temperature**2 * total / (count if tokens is None else tokens)


@pytest.mark.parametrize(("temperature", "tokens"), [(1.0, None), (2.5, None), (1.0, 40)])
def test_the_divergence_is_the_definition_s(monkeypatch, temperature, tokens):
    monkeypatch.setattr(module, "CHUNK", 5)  # 16 positions in pieces
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    got, want = (f(student, teacher, labels, temperature, tokens) for f in (divergence, expected))
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-5)
    (gradient,), (right,) = (torch.autograd.grad(loss, student) for loss in (got, want))
    assert torch.allclose(gradient, right.float(), atol=1e-6)
    assert not gradient[0, :3].any() and not gradient[:, -1].any()  # no label, no gradient


def test_no_label_at_all_is_no_loss():
    student, teacher, labels = logits_and_labels()
    assert divergence(student, teacher, torch.full_like(labels, -100)) == 0


@pytest.fixture
def distil(build, tmp_path):
    """distil(student, teacher, **arguments): a trainer on 16 sequences of random tokens."""

    def make(student, teacher, kd_ratio=1.0, temperature=1.0, **arguments):
        tokens = torch.randint(3, 256, (16, 24), generator=torch.Generator().manual_seed(2))
        data = [{"input_ids": row, "labels": row} for row in tokens]
        settings = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none", "use_cpu": True}
        settings |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant"}
        return DistillationTrainer(
            student,
            TrainingArguments(str(tmp_path / "run"), **settings | arguments),
            train_dataset=data,
            eval_dataset=data[:4],
            teacher=teacher,
            kd_ratio=kd_ratio,
            temperature=temperature,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_model_has_nothing_to_learn_from_itself_and_is_evaluated_by_the_text(build, distil):
    teacher = build()
    before = copy.deepcopy(teacher.state_dict())
    trainer = distil(build(), teacher, learning_rate=1e-3, weight_decay=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0, abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(256), rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_the_ratio_mixes_two_losses(build, distil):
    torch.manual_seed(7)
    teacher = build()
    for p in teacher.parameters():
        p.data += 0.05 * torch.randn_like(p)
    found = {}
    for ratio in (1.0, 0.5, 1e-6):
        trainer = distil(build("nvfp4"), teacher, kd_ratio=ratio)
        trainer.train()
        found[ratio] = losses(trainer)[0]
    assert found[1.0] > 0.01 and found[1e-6] == pytest.approx(math.log(256), rel=0.05)
    assert found[0.5] == pytest.approx((found[1.0] + found[1e-6]) / 2, rel=1e-3)


def test_accumulated_micro_batches_are_one_batch(build, distil):
    teacher = build()
    for p in teacher.parameters():
        p.data *= 1.5
    weights = []
    for arguments in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        student = build("bf16")
        trainer = distil(student, teacher, optim="sgd", learning_rate=1.0, max_grad_norm=0, **arguments)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in build("bf16").parameters()])
    moved = (weights[0] - start).norm()
    assert moved > 0 and (weights[1] - weights[0]).norm() < 0.01 * moved


def test_a_quantized_student_comes_back_to_its_teacher(build, distil):
    """Most of what quantization takes away is found again by training on the teacher's probabilities."""
    teacher = build()
    for p in teacher.parameters():
        p.data *= 2  # sharper than a random model, so that rounding matters
    student = build("nvfp4_qat")
    student.load_state_dict(teacher.state_dict())
    trainer = distil(student, teacher, max_steps=30, learning_rate=3e-3)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-4:]) < 0.5 * sum(found[:4])


def test_says_what_does_not_fit(build, distil):
    student = build("nvfp4")
    for ratio in (0, 1.5, -1):
        with pytest.raises(ValueError, match="kd_ratio=.*above 0 and up to 1"):
            distil(student, student, kd_ratio=ratio)
    with pytest.raises(ValueError, match="temperature=0: give a number above 0"):
        distil(student, student, temperature=0)
    other = build()
    other.config = copy.deepcopy(other.config)
    other.config.vocab_size = 512
    with pytest.raises(ValueError, match="the model has 256 tokens and its teacher 512"):
        distil(student, other)
