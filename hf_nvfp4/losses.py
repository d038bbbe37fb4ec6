"""Validation losses of a Trainer's model: as it was trained, in BF16, and what distillation made of the difference.

Knows Trainer and recipes; knows neither options nor files.
"""

import math

from transformers import Trainer

from hf_nvfp4.linear import converted_modules, use_recipe


def loss_in_bf16(trainer: Trainer) -> float:
    """Validation loss of the model as it is, its converted layers in BF16, in nats a token."""
    with use_recipe(trainer.model, "bf16"):
        return trainer.evaluate(metric_key_prefix="bf16")["bf16_loss"]


def losses_before(trainer: Trainer) -> dict:
    """{"before": …}: validation losses of a model that is yet to learn from its teacher, in its recipe and in BF16.

    Their difference is what quantizing alone costs. Empty in several processes: FSDP can't evaluate before it trains.
    """
    if trainer.args.world_size > 1:
        return {}
    loss = trainer.evaluate()["eval_loss"]
    return {"before": {"validation_loss": loss, "validation_loss_bf16": loss_in_bf16(trainer)}}


def recovered(before: dict, loss: float) -> float | None:
    """The share that training took of what quantizing had added to the loss; None where that had added nothing."""
    added = before["validation_loss"] - before["validation_loss_bf16"]
    return (before["validation_loss"] - loss) / added if added > 0 else None


def final_losses(trainer: Trainer, about: dict) -> dict:
    """Validation losses of the trained model, in nats a token, as it was trained and in BF16.

    about: the validation text's tokens and bytes, as `PackedData.about` has them.
    """
    state = trainer.state
    last = [x["eval_loss"] for x in state.log_history if x["step"] == state.global_step and "eval_loss" in x]
    reuse = last and not trainer.args.load_best_model_at_end
    loss = last[-1] if reuse else trainer.evaluate()["eval_loss"]
    loss_bf16 = loss_in_bf16(trainer)
    modules = converted_modules(trainer.model).values()
    names = " and ".join(sorted({module.eval_recipe.name for module in modules}))
    per_token = any(module.eval_recipe != module.train_recipe for module in modules)
    return {
        "validation_loss": loss,
        "validation_precision": f"{names} (as trained{', per-token activation scales' if per_token else ''})",
        "validation_loss_bf16": loss_bf16,
        "bits_per_byte": loss / math.log(2) * about["validation_tokens"] / about["validation_bytes"],
    }
