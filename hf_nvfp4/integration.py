"""The skin over Transformers: a quantization config and a quantizer. Nothing else subclasses its quantizers.

Importing this module registers both under `nvfp4_training`. The weights stay plain Parameters under their
own names, so Transformers need not know anything after loading: the quantizer detaches itself. Packed layers are for
inference; a model of them is not saved.
"""

import copy
import dataclasses
import os

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_nvfp4.casts import unknown
from hf_nvfp4.convert import Choice, Decision, convert, summary
from hf_nvfp4.data import InputError
from hf_nvfp4.importing import Pack, check_packed, converter, forget_conversion, is_to_be_packed, packed_layout
from hf_nvfp4.language import GEMM_CHOICES, Recipe, RecipeMap, recipe_for
from hf_nvfp4.layouts import MODELOPT, layout_of
from hf_nvfp4.linear import NVFP4Linear, split
from hf_nvfp4.packed import check_packable, for_inference
from hf_nvfp4.recipes import get_recipes

QUANT_METHOD = "nvfp4_training"
INFERENCE_CHOICES = ("w4a16", "w4a4")


@register_quantization_config(QUANT_METHOD)
class NVFP4TrainingConfig(QuantizationConfigMixin):
    """How a model is converted; `quantization_config=` of `from_pretrained`, and part of config.json.

    Args:
        recipe: a name in `hf_nvfp4.RECIPES`, a `Recipe`, or its `to_dict()` (config.json holds the latter); or one for
            each kind of layer, by patterns as in `skip` of which the first that matches counts: a name in
            `hf_nvfp4.RECIPE_MAPS`, a `RecipeMap`, or a dict such as {"mlp.*": "nvfp4", "self_attn.*": "fp8"}. Layers
            that no pattern matches stay in high precision; a pattern that matches nothing is an error.
        backend: "auto", or a name in `hf_nvfp4.backends.BACKENDS`. "auto" is what is saved, not its outcome.
        skip: names or patterns of layers to keep in high precision, besides the output head ("mlp.down_proj",
            "layers.0", "*.o_proj"). One that matches nothing is an error.
        keep_bf16_first, keep_bf16_last: transformer blocks at either end to keep in BF16, as a count (int) or
            a fraction (float in [0, 1)). None: the recipe's own.
        high_precision: GEMMs that run in BF16 all the same: None, "all" or "forward". `PrecisionSchedule`
            sets it, so that a checkpoint says in which precision it was being trained.
        inference: for `from_pretrained`, to generate and score, not to train or save: the converted layers are
            `PackedLinear`s, weights in 4.5 bits; while loading, one of them at a time is in high precision.
            "w4a16", or True: activations in BF16, the more exact, for checkpoints with 4-bit activations too.
            "w4a4": activations are cast as the recipe says, under a scale for each token; the static scales of inputs
            that a checkpoint may hold are not used. The checkpoint is one of three kinds:
            trained with hf_nvfp4: it says how itself, pass inference alone. Weights are rounded to from_pretrained's
            `dtype` before they are packed: give the compute dtype of training (autocast's);
            packed, by `hf_nvfp4.export` or others: its codes and scales are kept bit for bit, its other layers stay in
            high precision, and the recipe says how "w4a4" casts activations, nothing else;
            plain: the converted layers are rounded as the recipe says.
            `config.json` never holds it. Which backend is used is the packed layers' own choice.

    Raises:
        ValueError: an unknown key, name or value; the message lists the known ones.
    """

    def __init__(
        self,
        recipe: str | dict | Recipe | RecipeMap = "nvfp4",
        backend: str = "auto",
        skip: tuple[str, ...] = (),
        keep_bf16_first: int | float | None = None,
        keep_bf16_last: int | float | None = None,
        high_precision: str | None = None,
        inference: bool | str = False,
        quant_method: str = QUANT_METHOD,
        **unknown_keys,
    ):
        for key in unknown_keys:
            raise unknown("key of NVFP4TrainingConfig", key, [*self.keys(), "inference"])
        if quant_method != QUANT_METHOD:
            raise ValueError(f"NVFP4TrainingConfig is quant_method {QUANT_METHOD!r}, not {quant_method!r}")
        if high_precision is not None and high_precision not in GEMM_CHOICES:
            raise unknown("choice of GEMMs for high_precision", high_precision, ["None", *GEMM_CHOICES])
        if inference is not False and inference is not True and inference not in INFERENCE_CHOICES:
            raise unknown("choice of inference", inference, ["False", "True", *INFERENCE_CHOICES])
        if inference and backend != "auto":
            raise ValueError(f"backend={backend!r}: packed layers choose theirs; leave it out with inference")
        self.quant_method = QUANT_METHOD
        self.inference = INFERENCE_CHOICES[0] if inference is True else inference
        self.recipe = get_recipes(recipe)
        self.backend = backend
        self.skip = _patterns(skip)
        self.keep_bf16_first = keep_bf16_first
        self.keep_bf16_last = keep_bf16_last
        self.high_precision = high_precision
        self.choice()

    @staticmethod
    def keys() -> list[str]:
        """The settings, as they stand in config.json."""
        return ["recipe", "backend", "skip", "keep_bf16_first", "keep_bf16_last", "high_precision"]

    def choice(self) -> Choice:
        """The settings with the recipe's defaults filled in."""
        first, last = self.keep_bf16_first, self.keep_bf16_last
        return Choice(
            self.recipe,
            self.backend,
            self.skip,
            self.recipe.keep_bf16_first if first is None else first,
            self.recipe.keep_bf16_last if last is None else last,
        )

    def to_dict(self) -> dict:
        """Plain data with the whole recipe, so that one registered here reloads where it is not."""
        values = {key: getattr(self, key) for key in self.keys()}
        values |= {"quant_method": QUANT_METHOD, "recipe": self.recipe.to_dict(), "skip": list(self.skip)}
        return values

    def get(self, key: str, default=None):
        """As a dict has it: Transformers asks a model config's quantization_config this way."""
        return getattr(self, key, default)

    def __eq__(self, other) -> bool:
        if not isinstance(other, NVFP4TrainingConfig):
            return False
        return self.to_dict() == other.to_dict() and self.inference == other.inference

    __hash__ = None


def _patterns(skip) -> tuple[str, ...]:
    patterns = [skip] if isinstance(skip, str) else skip
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"skip={skip!r}: give a list of names or patterns of layers, such as ['mlp.down_proj']")
    return tuple(patterns)


class PackedQuantizer(HfQuantizer):
    """Loads packed NVFP4 weights, if the checkpoint has them, as plain ones, dequantized exactly; then leaves."""

    layout = None
    packed = ()

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self.layout = packed_layout(checkpoint_files, QUANT_METHOD)
        if self.layout is not None:
            self.packed = check_packed(checkpoint_files, self.layout, model)
        # Codes and scales are to be read as they are; plain weights, of our checkpoints too, in the model's dtype, and
        # one after the other where they are packed on their way.
        self.pre_quantized = self.layout is not None
        return model

    def get_weight_conversions(self):
        """How packed tensors become weights."""
        return [] if self.layout is None else [converter(self.layout)]

    def _process_model_after_weight_loading(self, model, **kwargs):
        forget_conversion(model)
        # A model that looks quantized is saved through the quantizer's state dict, which breaks Trainer's and
        # FSDP2's saves; ours has nothing to add to a plain state dict.
        model.is_quantized = False
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        """Checkpoints hold the original parameters and the config."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training is what this is for."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights themselves train, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` traces through the layers."""
        return True


@register_quantizer(QUANT_METHOD)
class NVFP4TrainingQuantizer(PackedQuantizer):
    """Converts the skeleton before the weights are loaded, packs them on their way for inference, and leaves."""

    # Of a weight that will be packed: for device maps.
    quantized_element_size = 4.5 / 8

    def __init__(self, quantization_config: NVFP4TrainingConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.problems: list[InputError] = []

    @property
    def _activations(self) -> bool | None:
        """Of packed layers, or None: there are to be none."""
        inference = self.quantization_config.inference
        return inference == "w4a4" if inference else None

    def validate_environment(self, device_map=None, **kwargs):
        """ValueError for packed layers on disk."""
        if self._activations is not None and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("inference: packed layers can't be offloaded to disk; give a device_map without 'disk'")

    def _process_model_before_weight_loading(self, model, **kwargs):
        super()._process_model_before_weight_loading(model, **kwargs)
        config = self.quantization_config
        if self._activations is not None and self.layout is not None:
            _convert_packed(model, config, self.packed)
        else:
            _convert(model, config)
        if self._activations is not None:
            check_packable(model, self._activations, loaded=False)
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        """Whether it is a weight that is packed when it is loaded."""
        return self._activations is not None and is_to_be_packed(model, param_name)

    def get_quantize_ops(self) -> Pack:
        """What packs plain weights."""
        return Pack(self._activations, self.problems)

    def get_weight_conversions(self):
        """How packed tensors become weights or packed layers."""
        return [] if self.layout is None else [converter(self.layout, self._activations)]

    def _process_model_after_weight_loading(self, model, **kwargs):
        super()._process_model_after_weight_loading(model, **kwargs)
        if self._activations is None:
            split(model)
            return model
        for problem in self.problems:
            raise problem
        if left := [name for name, module in model.named_modules() if isinstance(module, NVFP4Linear)]:
            raise InputError(
                f"the checkpoint lacks the weights of {len(left)} linear layers, such as {left[0]}, or has them in "
                "another form than Transformers loads one by one. Fetch or save it again; or load it without "
                "inference, and call hf_nvfp4.pack_model(model)."
            )
        return for_inference(model)


class PackedConfig(QuantizationConfigMixin):
    """The quantization_config of a ModelOpt checkpoint that is loaded without an NVFP4TrainingConfig: for inference."""

    # The model is a plain one afterwards, without a quantization_config.
    dequantize = True

    def __init__(self, quant_method: str = MODELOPT.name, **details):
        layout_of({"quant_method": quant_method, **details})
        self.quant_method, self.details = quant_method, details

    def to_dict(self) -> dict:
        """As it was read."""
        return {"quant_method": self.quant_method, **self.details}


# Transformers has none of its own; should it get one, that one counts.
if MODELOPT.name not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(MODELOPT.name)(PackedConfig)
    register_quantizer(MODELOPT.name)(PackedQuantizer)


def _convert(model, config: NVFP4TrainingConfig) -> list[Decision]:
    return convert(model, config.choice(), config.high_precision)


def _convert_packed(model, config: NVFP4TrainingConfig, packed: list[str]) -> None:
    """Convert the layers whose weights the checkpoint has packed, whatever a recipe would convert."""
    given = [key for key in ("skip", "keep_bf16_first", "keep_bf16_last", "high_precision") if getattr(config, key)]
    if given:
        raise ValueError(f"the checkpoint says itself which layers are packed: leave out {' and '.join(given)}")
    if not packed:
        raise InputError("the checkpoint says that it is packed, and no weight in it is. Load it without inference.")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in packed:
        recipe, kind = recipe_for(config.recipe, name), type(linears[name])
        if recipe is None:
            raise ValueError(f"{name} is packed in the checkpoint, and no pattern of the recipe map matches it")
        if kind is not nn.Linear:
            raise InputError(f"{name} is a {kind.__name__}, which may compute something else than a packed nn.Linear")
        NVFP4Linear.convert(linears[name], recipe)
    how = {True: "packed in the checkpoint", False: "not packed in the checkpoint"}
    model.nvfp4_decisions = [Decision(name, name in packed, how[name in packed]) for name in linears]
    if os.environ.get("RANK", "0") == "0":
        print(f"hf_nvfp4: {summary(model.nvfp4_decisions)}", flush=True)


def quantize_model(model, config: NVFP4TrainingConfig) -> list[Decision]:
    """Convert a model in place, as `from_pretrained(..., quantization_config=config)` would have.

    For models built with `from_config`, which runs no quantizer, and for any `torch.nn.Module`.

    Args:
        model: a model on any device; its parameters keep their names, dtypes and values.
        config: how; a copy becomes `model.config.quantization_config` if the model has a config.

    Returns:
        A `Decision` for every linear layer, also printed as one line.

    Raises:
        ValueError: no linear layers, none to convert, converted already, a pattern that matches nothing, or
            no backend that runs the recipe on the model's device.
    """
    if not isinstance(config, NVFP4TrainingConfig):
        raise ValueError(f"config is a {type(config).__name__}; pass hf_nvfp4.NVFP4TrainingConfig(...)")
    if config.inference:
        raise ValueError("inference is for from_pretrained; leave it out, and then call hf_nvfp4.pack_model(model)")
    decisions = _convert(model, config)
    if hasattr(model, "config"):
        model.config.quantization_config = copy.deepcopy(config)  # PrecisionSchedule writes into the model's
    return decisions


def _reconcile(saved: NVFP4TrainingConfig, passed: NVFP4TrainingConfig) -> NVFP4TrainingConfig:
    """The checkpoint's config, with the backend that the caller asks for; ValueError if they disagree otherwise.

    For inference what has its default is not compared.
    """
    ignored = {"backend"} | ({"high_precision"} if passed.high_precision is None else set())
    if passed.inference:
        ignored |= {key for key in saved.keys() if getattr(passed, key) == getattr(NVFP4TrainingConfig(), key)}
    different = [key for key in saved.keys() if key not in ignored and getattr(saved, key) != getattr(passed, key)]
    # The defaults of a recipe and the same numbers written out are one choice.
    if dataclasses.replace(saved.choice(), backend="auto") == dataclasses.replace(passed.choice(), backend="auto"):
        different = [key for key in different if key == "high_precision"]
    if different:
        shown = "; ".join(f"{key}: checkpoint {_show(saved, key)}, passed {_show(passed, key)}" for key in different)
        raise ValueError(
            f"the checkpoint has a quantization_config that differs from the one passed ({shown}; what is not given "
            "has its default). Leave quantization_config out to load it as it was trained, or have nothing but "
            "inference in it; or replace it on purpose: "
            "config = AutoConfig.from_pretrained(...); config.quantization_config = NVFP4TrainingConfig(...); "
            "from_pretrained(..., config=config)."
        )
    if passed.backend != "auto":
        saved.backend = passed.backend
    saved.inference = passed.inference
    return saved


def _show(config: NVFP4TrainingConfig, key: str) -> str:
    value = getattr(config, key)
    return value.name if isinstance(value, (Recipe, RecipeMap)) else repr(value)


_merge = AutoHfQuantizer.merge_quantization_configs


def _merge_or_refuse(cls, quantization_config, quantization_config_from_args):
    """Transformers ignores, with a warning, a config passed for a checkpoint that has one. For ours: an error.

    Unless the checkpoint is packed NVFP4: how it is to be trained is for the one who loads it to say.
    """
    saved, passed = (
        NVFP4TrainingConfig(**c) if isinstance(c, dict) and c.get("quant_method") == QUANT_METHOD else c
        for c in (quantization_config, quantization_config_from_args)
    )
    if isinstance(saved, NVFP4TrainingConfig) and isinstance(passed, NVFP4TrainingConfig):
        return _reconcile(saved, passed)
    if isinstance(passed, NVFP4TrainingConfig) and not isinstance(saved, NVFP4TrainingConfig):
        layout_of(saved if isinstance(saved, dict) else saved.to_dict())
        return copy.deepcopy(passed)
    return _merge(saved, passed)


AutoHfQuantizer.merge_quantization_configs = classmethod(_merge_or_refuse)
