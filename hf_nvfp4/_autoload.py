"""Registers the quantizer with Transformers the moment Transformers' quantizers are imported.

Knows only the standard library: torch calls `install` at the end of its own import (entry point group
`torch.backends`), where an exception would break `import torch` for every program on the machine.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` in the environment turns that call off; `import hf_nvfp4` makes it too.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import threading
import warnings

# The second is for programs that import the first before torch: it is half imported when torch calls us.
_TARGETS = ("transformers.quantizers", "transformers.modeling_utils")


def _register() -> bool:
    """Import our integration module; a failure becomes a warning that says what it costs."""
    try:
        importlib.import_module("hf_nvfp4.integration")
    except Exception as error:  # runs inside somebody else's import, which must go on
        warnings.warn(
            f"hf_nvfp4 could not register with Transformers ({type(error).__name__}: {error}): checkpoints "
            "trained in NVFP4 would load as plain high-precision models in this process.",
            stacklevel=2,
        )
        return False
    return True


class _Loader(importlib.abc.Loader):
    """The target's own loader, and then us."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        if _register():
            _disarm()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a target as the other finders do, with our loader around its own."""

    _searching = threading.local()

    def find_spec(self, fullname, path, target=None):
        if fullname not in _TARGETS or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _disarm() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def install() -> None:
    """Register now if Transformers' quantizers are loaded, else as soon as they are."""
    module = sys.modules.get(_TARGETS[0])
    loaded = module is not None and not getattr(module.__spec__, "_initializing", False)
    if loaded and _register():
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
