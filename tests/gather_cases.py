"""Steps of FSDP2 on two processes that gathers weights in 4 bits, for distributed_jobs.py."""

from collections import OrderedDict

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nvfp4 import NVFP4Linear, gather_in_4_bits
from hf_nvfp4.linear import use_recipe

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model, gather: bool, dtype=None, **policies):
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh(), **policies)
    if gather:
        assert all(decision.converted for decision in gather_in_4_bits(model, dtype))
    return model


class Bytes(TorchDispatchMode):
    """What collectives hand to each process, by kind."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "allgather" in func.__name__:
            self.gathered += args[0].nbytes
        if func.namespace == "_c10d_functional" and "all_reduce" in func.__name__:
            self.reduced += args[0].nbytes
        return func(*args, **(kwargs or {}))


def traffic(model, batch) -> dict:
    """Bytes that the first forward gathers, every parameter once; and that two forwards reduce, no step in between."""
    with torch.no_grad(), Bytes() as counted:
        model(**batch)
        gathered = counted.gathered
        model(**batch)
    return {"gathered": gathered, "reduced": counted.reduced}


def message(do) -> str:
    """Of the error that it raises."""
    try:
        do()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals() -> dict:
    """Why layers are left out, by name; messages of what must not be done later."""
    net = nn.Sequential(OrderedDict({
        "fits": NVFP4Linear(32, 32, bias=False),
        "cut": NVFP4Linear(32, 48, bias=False),  # 24 rows a process
        "frozen": NVFP4Linear(32, 32, bias=False),
        "tied": NVFP4Linear(32, 32, bias=False),
        "twin": nn.Embedding(32, 32),
        "bf16": NVFP4Linear(32, 32, bias=False, recipe="bf16"),
        "other": NVFP4Linear(32, 32, bias=False, recipe="fp4_all_the_way"),
    }))  # fmt: skip
    net.frozen.requires_grad_(False)
    net.twin.weight = net.tied.weight
    plain = message(lambda: gather_in_4_bits(net))
    for module in (net.fits, net):
        fully_shard(module, mesh=mesh())
    reasons = {decision.name: decision.reason for decision in gather_in_4_bits(net) if not decision.converted}
    x = torch.randn(4, 32)
    with use_recipe(net, "bf16"):
        recipe = message(lambda: net.fits(x))
    dtype = message(lambda: net.fits(x.bfloat16()))
    net.fits.reshard()
    late = message(lambda: gather_in_4_bits(net))
    net.fits.unshard()
    read = message(lambda: net.fits.weight + 1)
    return {"unsharded": plain, "reasons": reasons, "recipe": recipe, "dtype": dtype, "late": late, "read": read}
