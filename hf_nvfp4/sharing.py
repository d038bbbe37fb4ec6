"""Operands that are cast once and used again: an input by several layers, a weight by several micro-batches.

Only in eager mode: a compiled graph merges equal casts by itself. Only casts that draw no random numbers: results are
the same bits, and later draws the same numbers. Knows when a tensor is still what was cast; nothing of layers, GEMMs or
backends.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hf_nvfp4.casts import Cast


class Casts:
    """Operands cast from one tensor, each made once."""

    def __init__(self):
        self.operands: dict[tuple, tuple] = {}

    def once(self, tensor: Tensor, how: tuple, make: Callable[[], tuple]) -> tuple:
        """make()'s operands of the tensor, or those that it gave before.

        how: all that they depend on besides the tensor: backend, compute dtype, casts.
        """
        if _must_not_share(tensor) or not self.knows(tensor):
            return make()
        if any(isinstance(part, Cast) and part.draws for part in how):
            return make()
        key = (*how, _stream(tensor.device))
        if key not in self.operands:
            operands = make()
            if _lie_in(operands, tensor):  # nothing was computed, and the tensor would be held
                return operands
            self.operands[key] = operands
        return self.operands[key]

    def knows(self, tensor: Tensor) -> bool:
        """Whether the operands are still those of this tensor."""
        return True

    def __reduce__(self):
        """Copies and pickles of what holds operands hold None instead."""
        return type(None), ()


def _must_not_share(tensor: Tensor) -> bool:
    """Whether somebody records or replaces operations: each has to happen each time, and on this very tensor.

    Tracing; modes that see every operation (selective checkpointing recomputes in the same order); CUDA graphs, whose
    memory is not ours to keep. And tensors that are more than memory on a device: DTensors, fake ones.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _is_ordinary(tensor):
        return True
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in ("cpu", "cuda")


def _stream(device: torch.device) -> int | None:
    """The stream on which operands are made: on another they might not be there yet."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _lie_in(operands: tuple, tensor: Tensor) -> bool:
    """Whether an operand is the tensor's own memory, as a BF16 tensor "cast" to BF16 is."""
    storage = tensor.untyped_storage().data_ptr()
    tensors = [t for operand in operands if operand is not None for t in operand.tensors if t is not None]
    return any(t.untyped_storage().data_ptr() == storage for t in tensors)


# ---------------------------------------------------------------------------- inputs


class _InputCasts(Casts):
    """Of an input, as long as it lives."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.input = weakref.ref(x, lambda _, operands=self.operands: operands.clear())
        self.state = _state(x)
        self.layers: set[int] = set()


class _Latest(threading.local):
    """The input that a thread's layers cast last. One is enough: q, k and v follow each other, gate and up too."""

    casts: _InputCasts | None = None


_latest = _Latest()


def casts_of_input(x: Tensor, layer: nn.Module) -> Casts | None:
    """What other layers cast from the same tensor, unchanged; None for an input that is not to be shared.

    Held until x dies or another input comes. A layer that asks twice begins anew, so that a loop over one input (a
    benchmark, say) casts it each time. Writes into x that torch does not count (a kernel of one's own, `x.data`)
    between two layers are not seen.
    """
    if not _is_ordinary(x) or x.is_inference():  # an inference tensor does not count its changes
        return None
    casts = _latest.casts
    if casts is None or casts.input() is not x or casts.state != _state(x) or id(layer) in casts.layers:
        casts = _latest.casts = _InputCasts(x)
    casts.layers.add(id(layer))
    return casts


def _state(tensor: Tensor) -> tuple:
    """What changes when a tensor is written to, replaced or viewed differently."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


# ---------------------------------------------------------------------------- weights


class WeightCasts(Casts):
    """Of a weight, until `drop`; once torch has counted a change of the weight, each is made anew."""

    def __init__(self, weight: Tensor):
        super().__init__()
        # Held, its memory can't become another tensor's: the same address is the same weight.
        self.weight = weight.detach()
        self.state = _state(weight)

    def knows(self, tensor: Tensor) -> bool:
        """Whether it is the weight, itself or as autograd saved it, unchanged."""
        return self.weight is not None and not tensor.is_inference() and _state(tensor) == self.state

    def drop(self) -> None:
        """Forget the operands, for good."""
        self.weight = None
        self.operands.clear()


def can_keep(weight: Tensor) -> bool:
    """Whether a weight of the right shape lies whole and still between two optimizer steps.

    Sharded ones don't: those of FSDP are DTensors, flat, or views of something; those of ZeRO-3 are empty.
    """
    return type(weight) is nn.Parameter and not weight.is_inference() and _is_ordinary(weight)
