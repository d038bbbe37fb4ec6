"""Distillation: a student, say in NVFP4, learns what its teacher thinks of each next token (QAD).

Knows logits and Trainer; knows nothing of casts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

# Tokens whose probabilities are computed at once, in FP32; the others wait as logits.
CHUNK = 2048


class DistillationTrainer(Trainer):
    """Trainer whose training loss compares the model with a teacher; it evaluates as Trainer does, by the labels.

    The loss is kd_ratio · temperature² · KL(teacher ‖ student) + (1 − kd_ratio) · cross entropy, in nats a token,
    labels of −100 left out. With both settings 1 that is the loss of arXiv 2601.20088, which found that a model with
    post-training behind it, quantized to NVFP4, keeps more by it than by training on the text again.

    Args:
        teacher: a causal LM with the student's tokens, on any device; it is put where the model is, and never trained.
        kd_ratio: the teacher's share of the loss, in (0, 1]; the rest is the text's.
        temperature: both models' logits are divided by this, above 0.
        All others: as `Trainer` takes them.

    Raises:
        ValueError: an argument out of range, or a teacher of another vocabulary.
    """

    def __init__(self, *args, teacher: nn.Module, kd_ratio: float = 1.0, temperature: float = 1.0, **kwargs):
        if not 0 < kd_ratio <= 1:
            raise ValueError(f"kd_ratio={kd_ratio!r}: give the teacher's share of the loss, above 0 and up to 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: give a number above 0")
        super().__init__(*args, compute_loss_func=self._distillation_loss, **kwargs)
        models = self.accelerator.unwrap_model(self.model), teacher
        ours, theirs = (model.config.get_text_config().vocab_size for model in models)
        if ours != theirs:
            raise ValueError(
                f"the model has {ours} tokens and its teacher {theirs}. Both need the same tokenizer, and output "
                "layers of one size"
            )
        self.kd_ratio, self.temperature = kd_ratio, temperature
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)
        self._teacher_logits = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As Trainer's: the teacher reads the same inputs first, in training."""
        if model.training:
            with torch.no_grad():
                read = {name: value for name, value in inputs.items() if name != "labels"}
                self._teacher_logits = self.teacher(**read).logits
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _distillation_loss(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Trainer's `compute_loss_func`. outputs.logits: [B, T, V]; labels: [B, T]."""
        student, teacher, self._teacher_logits = outputs.logits, self._teacher_logits, None
        about = {"vocab_size": student.shape[-1], "num_items_in_batch": num_items_in_batch}
        loss_of_text = self.accelerator.unwrap_model(self.model).loss_function
        if teacher is None:
            return loss_of_text(student, labels, **about)
        loss = self.kd_ratio * divergence(student, teacher, labels, self.temperature, num_items_in_batch)
        if self.kd_ratio < 1:
            loss = loss + (1 - self.kd_ratio) * loss_of_text(student, labels, **about)
        return loss


def divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, tokens: Tensor | int | None = None
) -> Tensor:
    """temperature² · KL(teacher ‖ student) of each next token, summed and divided by `tokens`: an FP32 scalar.

    student, teacher: logits [B, T, V] in any float dtype; labels: [B, T], of which the one after a position says
    whether it counts (not −100). tokens: what to divide by, None for as many as count.
    """
    counts = labels[:, 1:].flatten() != -100
    tokens = counts.sum().clamp(min=1) if tokens is None else tokens
    pieces = zip(*(t[:, :-1].flatten(0, 1).split(CHUNK) for t in (student, teacher)), counts.split(CHUNK), strict=True)
    total = sum(checkpoint(_divergence, *piece, temperature, use_reentrant=False) for piece in pieces)
    return total * temperature**2 / tokens


def _divergence(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Of [N, V], the sum over rows that count."""
    logs = [(t.float() / temperature).log_softmax(-1) for t in (student, teacher)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mul(counts).sum()
