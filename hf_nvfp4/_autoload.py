"""Registers the quantizer with Transformers the moment Transformers' quantizers are imported.

Knows only the standard library: torch calls `install` at the end of its own import (entry point group
`torch.backends`), where an exception would break `import torch` for every program on the machine.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` in the environment turns that call off; `import hf_nvfp4` makes it too.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

_TARGET = "transformers.quantizers"


def _register() -> None:
    """Import our integration module; a failure becomes a warning that says what it costs."""
    try:
        importlib.import_module("hf_nvfp4.integration")
    except Exception as error:  # runs inside somebody else's import, which must go on
        warnings.warn(
            f"hf_nvfp4 could not register with Transformers ({type(error).__name__}: {error}): checkpoints "
            "trained in NVFP4 would load as plain high-precision models in this process.",
            stacklevel=2,
        )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders load the target, and registers once it has been executed."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register now if Transformers' quantizers are loaded, else as soon as they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
