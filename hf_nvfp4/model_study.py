"""What a recipe does to a real model: its linears' x, w and dy, and their weights' gradients against those of BF16.

Knows models, text and recipes; knows nothing of how casts are measured, of tables and plots.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_nvfp4.captured import Captured, watch
from hf_nvfp4.data import InputError, embedded_corpus, find_files, read_files
from hf_nvfp4.integration import NVFP4TrainingConfig, quantize_model
from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import NVFP4Module, converted_modules, quantized_linears, use_recipe
from hf_nvfp4.packing import load_tokenizer, tokenize

# ---- Model and text ------------------------------------------------------------------------------------


def load(name: str, device: torch.device) -> nn.Module:
    """A causal LM in FP32 with converted linears that train, from a folder or the Hub; all else (dropout) is in eval.

    A model that was saved with a configuration of ours keeps its choice of layers; in others all but the output head
    are converted.

    Raises:
        InputError: not a model, or nothing in it can be converted.
    """
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(f"{name} is not a model folder: it has no config.json. Give a folder that a model is saved in")
    if not path.exists() and name.count("/") != 1:
        raise InputError(f"{name}: no such folder, and not the name of a model on the Hub (org/name)")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
        if not any(isinstance(module, NVFP4Module) for module in model.modules()):
            quantize_model(model, NVFP4TrainingConfig(recipe="bf16"))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"could not load a causal LM from {name}: {str(error).strip().splitlines()[0]}") from error
    for module in converted_modules(model).values():
        module.train()
    return model


def token_batch(model_name: str, text: str | None, sequences: int, length: int) -> Tensor:
    """int64 [sequences, length] of a text (file, folder or glob; None: the standard library) in the model's tokens.

    Raises InputError for no tokenizer, no such file, or a text that is too short.
    """
    documents = embedded_corpus().validation() if text is None else read_files(find_files([text]), "text")
    needed = sequences * length
    stream = tokenize(documents, load_tokenizer(model_name), "tokenizing", limit=needed)
    if len(stream.tokens) < needed:
        raise InputError(
            f"{text or 'the standard library'} has {len(stream.tokens):,} tokens; {sequences} sequences of {length} "
            f"need {needed:,}. Give a longer text, or fewer or shorter sequences"
        )
    return torch.from_numpy(stream.tokens[:needed].astype("int64")).view(sequences, length)


def longest(model: nn.Module, wanted: int) -> int:
    """The wanted sequence length, or the longest that the model's positions allow."""
    return min(wanted, getattr(model.config, "max_position_embeddings", None) or wanted)


# ---- Captured tensors ----------------------------------------------------------------------------------


def evenly(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, the first and the last among them, evenly spaced."""
    if count >= len(names):
        return names
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def capture(model: nn.Module, tokens: Tensor, count: int) -> dict[str, Captured]:
    """Tensors of `count` of the model's converted linears, evenly spaced, in a training step of recipe bf16.

    tokens: int64 [sequences, length].
    """
    linears, found = quantized_linears(model), {}
    linears = {name: linears[name] for name in evenly(list(linears), count)}

    def keep(name: str, x: Tensor, dy: Tensor) -> None:
        # A linear that this batch did not reach (an expert, say) has no tensors, or no gradient.
        if dy.any():
            found[name] = Captured(x.detach().float(), linears[name].matrix.detach().float(), dy.float())

    with use_recipe(model, "bf16"), watch(linears, keep):
        _backward(model, tokens)
    model.zero_grad(set_to_none=True)
    return {name: found[name] for name in linears if name in found}


# ---- Gradients -----------------------------------------------------------------------------------------


def _backward(model: nn.Module, tokens: Tensor) -> float:
    """The gradients of the loss of predicting the tokens are in the parameters; returns the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens.to(model.device), labels=tokens.to(model.device)).loss
    loss.backward()
    return loss.item()


def _gradients(model: nn.Module, tokens: Tensor, recipe: str | Recipe, seed: int) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every converted linear's weight, under a recipe."""
    torch.manual_seed(seed)
    with use_recipe(model, recipe):
        loss = _backward(model, tokens)
    found = {
        name: linear.weight.grad for name, linear in quantized_linears(model).items() if linear.weight.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return loss, found


def _products(a: Tensor, b: Tensor) -> Tensor:
    """FP64 [3]: <a, b>, <a, a>, <b, b>."""
    a, b = a.flatten().double(), b.flatten().double()
    return torch.stack([a @ b, a @ a, b @ b])


def _cosine(products: Tensor) -> float | None:
    """Of `_products`; None for a gradient of zeros, or one that is not finite."""
    cosine = (products[0] / (products[1] * products[2]).sqrt()).item()
    return cosine if abs(cosine) < 2 else None


def gradient_cosines(
    model: nn.Module, tokens: Tensor, recipes: list[Recipe], seed: int, tick: Callable[[], None]
) -> dict[str, dict]:
    """Per recipe the loss, and cosines of its gradients to those of recipe bf16 on the same batch and weights.

    Returns {recipe: {"loss", "all": of all weights as one vector, "layers": {linear: cosine}}}, or {recipe: {"error":
    why this model's layers can't run it}}. One draw of what is drawn. The cosines include what the recipe's forward
    does to the loss. tick: called after each recipe.
    """
    _, base = _gradients(model, tokens, "bf16", seed)
    found = {}
    for recipe in recipes:
        try:
            loss, gradients = _gradients(model, tokens, recipe, seed)
        except ValueError as error:
            found[recipe.name] = {"error": str(error)}
        else:
            products = {name: _products(gradients[name], base[name]) for name in base}
            layers = {name: _cosine(product) for name, product in products.items()}
            found[recipe.name] = {"loss": loss, "all": _cosine(sum(products.values())), "layers": layers}
        tick()
    return found
