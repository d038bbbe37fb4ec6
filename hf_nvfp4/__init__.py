"""NVFP4 training of any Hugging Face causal LM.

    from hf_nvfp4 import NVFP4TrainingConfig
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=NVFP4TrainingConfig())

Names are imported on first use, so that `import hf_nvfp4` costs nothing and works inside `import torch`.
"""

import importlib

from hf_nvfp4 import _autoload

__version__ = "0.1.0"

_EXPORTS = {
    "RECIPES": "recipes",
    "RECIPE_MAPS": "recipes",
    "Cast": "casts",
    "Gemm": "language",
    "Recipe": "language",
    "RecipeMap": "language",
    "register_recipe": "recipes",
    "QuantizedTensor": "reference",
    "quantize": "reference",
    "NVFP4Linear": "linear",
    "use_recipe": "linear",
    "cast_weights_once": "linear",
    "PackedLinear": "packed",
    "pack_model": "packed",
    "Decision": "convert",
    "quantize_model": "integration",
    "NVFP4TrainingConfig": "integration",
    "export": "exporting",  # a module export.py would hide the function once it is imported
    "CastWeightsOnce": "schedule",
    "GatherIn4Bits": "gathering",
    "gather_in_4_bits": "gathering",
    "DistillationTrainer": "distillation",
    "OsciReset": "oscillation",
    "PrecisionSchedule": "schedule",
    "StopOnNonFinite": "schedule",
    "QuantizationStats": "stats",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"hf_nvfp4.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'hf_nvfp4' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]


_autoload.install()
