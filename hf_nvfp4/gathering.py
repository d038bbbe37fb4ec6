"""FSDP2 that gathers weights as NVFP4 codes and scales, 0.25 to 0.28 of BF16's bytes.

A rank rounds its shard to the compute dtype first, then casts it under the scale of the whole weight, whose largest
magnitude is reduced over the ranks: once for all weights after each optimizer step, 4 bytes a weight. So the codes are
those that one process casts, bit for bit, and so are losses and gradients where nothing is drawn. Masters, gradients,
state dicts and optimizers are as without it.

By PyTorch's hooks for shards, fsdp_pre_all_gather and fsdp_post_all_gather, set on the plain local tensors of a model
that fully_shard has split. Knows shards and hooks; what arrives is precast.py's.
"""

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from hf_nvfp4.backends import bf16
from hf_nvfp4.casts import Cast
from hf_nvfp4.convert import Decision
from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import NVFP4Layer, NVFP4Linear, converted_modules
from hf_nvfp4.precast import CastWeight, Codes, rows_of_blocks
from hf_nvfp4.tensor_parallel import ShardedCast

# ---------------------------------------------------------------------------- which weights


def why_not_recipe(recipe: Recipe) -> str | None:
    """Why one NVFP4 cast of the weight does not serve fprop and dgrad of a recipe, or None."""
    w, back = recipe.fprop.b, recipe.dgrad.b
    if recipe.conditions:
        return f"recipe {recipe.name!r} does something else to the weight before it is cast"
    if w.format != "nvfp4":
        return f"recipe {recipe.name!r} casts the weight to {w.format}"
    if w.draws or w.hadamard or w.outer != "tensor":
        return f"recipe {recipe.name!r} casts the weight as {w}: only rounded to nearest, neither rotated nor by rows"
    if not recipe.from_forward and not (w.square and back == w):
        return (
            f"recipe {recipe.name!r} casts the weight as {w} for fprop and, in the other direction, as {back} for "
            "dgrad: not once for both"
        )
    return None


def _why_not_weight(module: NVFP4Layer, sharded_names: set[str], name: str) -> str | None:
    """The same of how a weight lies."""
    weight = module.weight
    if not isinstance(weight, DTensor) or module.shards is not None or not _inside(name, sharded_names):
        return "its weight is not sharded by fully_shard alone"
    mesh, rows = weight.device_mesh, module.out_features
    if mesh.ndim != 1 or type(weight.placements[0]) is not Shard or weight.placements[0].dim != 0:
        return f"its weight is {weight.placements} on a mesh of {mesh.ndim} dimensions, not split by rows over one"
    if weight._local_tensor.device.type != mesh.device_type:
        return f"its shard is offloaded to the {weight._local_tensor.device.type}"
    if not weight.requires_grad:
        return "its weight is frozen"
    unit = rows_of_blocks(module.train_recipe.fprop.b)
    if rows % (mesh.size() * unit):
        return f"{rows} rows over {mesh.size()} ranks are not equal parts of a multiple of {unit}: a shard cuts blocks"
    return None


def _inside(name: str, sharded_names: set[str]) -> bool:
    """Whether a module or one around it went through fully_shard."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in sharded_names for end in range(len(parts) + 1))


def _decide(model: nn.Module) -> list[Decision]:
    sharded_names = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    uses = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    decisions, mesh = [], None
    for name, module in converted_modules(model).items():
        if not isinstance(module, NVFP4Linear):
            reason = f"{type(module).__name__} is no linear layer whose weight is [out_features, in_features]"
        elif others := [use for use in uses[id(module.weight)] if use != f"{name}.weight"]:
            reason = f"its weight is that of {others[0]} too"
        else:
            reason = why_not_recipe(module.train_recipe) or _why_not_weight(module, sharded_names, name)
        if reason is None:
            mesh = mesh or module.weight.device_mesh
            if module.weight.device_mesh != mesh:
                reason = "its mesh is not that of the layers before it"
        fused = getattr(module, "num_experts", 0)
        decisions.append(Decision(name, reason is None, reason or f"as {module.train_recipe.fprop.b}", fused))
    return decisions


# ---------------------------------------------------------------------------- shards


class _Amaxes:
    """Largest magnitudes of all whole weights, FP32 [count]; found anew once an optimizer has stepped or torch has
    counted a change of a shard. Ranks run alike, so all of them reduce at the same places."""

    def __init__(self, shards: list[Tensor], group: str):
        self.shards, self.across = shards, ShardedCast(group=group)
        self.found = None
        own = weakref.ref(self)

        def forget(*_):
            if (amaxes := own()) is not None:
                amaxes.found = None

        # Not every optimizer's writes are counted: those of fused AdamW, Trainer's default, are not.
        weakref.finalize(self, register_optimizer_step_post_hook(forget).remove)

    def of(self, index: int) -> Tensor:
        """The whole weight's, from the shards as they are now; on the current stream."""
        if self.found is None or self.versions[index] != self.shards[index]._version:
            self.versions = [shard._version for shard in self.shards]
            self.found = self.across.of_all(torch.stack([shard.abs().amax().float() for shard in self.shards]))
            self.ready = torch.cuda.current_stream().record_event() if self.found.is_cuda else None
        if self.ready is not None:
            self.ready.wait()  # FSDP may have gathered another weight on another stream
            _read_here(self.found)
        return self.found[index]


def _read_here(x: Tensor) -> None:
    """Keep the memory of a tensor that was made on another stream until the current one has read it."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream())


class _Hooks:
    """What FSDP2 calls before and after it gathers one weight."""

    def __init__(self, shard: Tensor, cast: Cast, amaxes: _Amaxes, index: int, dtype: torch.dtype | None):
        self.shard, self.cast, self.dtype = shard, cast, dtype
        self.amaxes, self.index = amaxes, index

    def attach(self):
        """To the shard: FSDP2 looks for them by name."""
        self.shard.fsdp_pre_all_gather = self.before
        self.shard.fsdp_post_all_gather = self.after

    @torch.no_grad()
    def before(self, mesh, outer_size, outer_stride, module, mp_policy) -> tuple:
        """The shard's codes and block scales, one tensor (of several, FSDP2 gathers the first alone on one rank)."""
        x, amax = self.shard, self.amaxes.of(self.index)
        # Rounding keeps the order, so the largest magnitude rounded is that of what was rounded.
        for dtype in (mp_policy.param_dtype, self.dtype):
            if dtype is not None:
                x, amax = x.to(dtype), amax.to(dtype)
        q = bf16.packed(x, self.cast, amax.float())
        shard = Codes.of(q, x.dtype)
        return (shard.bytes,), replace(shard, shape=tuple(outer_size))

    @torch.no_grad()
    def after(self, all_gather_outputs, metadata, param_dtype, *, out: CastWeight | None = None) -> tuple | None:
        """The whole weight; FSDP frees the memory of its codes, and fills it again for backward."""
        parts = replace(metadata, bytes=all_gather_outputs[0])
        _read_here(parts.tensor_scale)
        if out is not None:
            vars(out.parts).update(vars(parts))
            return None
        return CastWeight(parts, param_dtype), ()  # nothing to free besides what was gathered


def gather_in_4_bits(model: nn.Module, dtype: torch.dtype | None = None) -> list[Decision]:
    """Let FSDP2 gather weights as NVFP4 codes where that changes no bit of what is computed; prints which.

        for block in (*model.model.layers, model):
            fully_shard(block)
        hf_nvfp4.gather_in_4_bits(model, dtype=torch.bfloat16)   # under autocast to BF16

    Call it on every rank, after fully_shard and before the first forward. From then on a layer's recipe must stay as it
    is; a layer that casts its weight otherwise, or in another dtype, is an error in its forward. Writes into weights
    that torch does not count (`weight.data`), other than those of a torch optimizer, are not seen. In a
    compiled model each such layer breaks the graph and runs eagerly.

    Args:
        dtype: in which the layers compute: autocast's, where it is on. None: that of MixedPrecisionPolicy's
            param_dtype, or else of the weights.

    Returns:
        For each converted layer or module of experts whether its weight is gathered so (`Decision.converted`), and why.

    Raises:
        ValueError: a model without converted layers, or none of them can be. RuntimeError: it was run already.
    """
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    if any(state._is_root is not None for state in states):
        raise RuntimeError("gather_in_4_bits comes before the first forward; FSDP has laid out its memory by now")
    decisions = _decide(model)
    if not any(decision.converted for decision in decisions):
        reasons = "; ".join(dict.fromkeys(decision.reason for decision in decisions))
        raise ValueError(f"no weight can be gathered in 4 bits: {reasons}. Leave gather_in_4_bits out")
    layers = [model.get_submodule(decision.name) for decision in decisions if decision.converted]
    shards = [layer.weight._local_tensor for layer in layers]
    amaxes = _Amaxes(shards, layers[0].weight.device_mesh.get_group().group_name)
    for index, (layer, shard) in enumerate(zip(layers, shards, strict=True)):
        _Hooks(shard, layer.train_recipe.fprop.b, amaxes, index, dtype).attach()
    if torch.distributed.get_rank() == 0:
        print(f"hf_nvfp4: {summary(decisions)}", flush=True)
    return decisions


def summary(decisions: list[Decision]) -> str:
    """One line, such as "gathers 13 of 15 weights in 4 bits (lm_head: its weight is frozen)"."""
    left = {}
    for decision in decisions:
        if not decision.converted:
            left.setdefault(decision.reason, []).append(decision.name)
    line = f"gathers {sum(decision.converted for decision in decisions)} of {len(decisions)} weights in 4 bits"
    groups = [f"{', '.join(names) if len(names) < 3 else f'{len(names)} layers'}: {why}" for why, names in left.items()]
    return f"{line} ({'; '.join(groups)})" if groups else line


class GatherIn4Bits(TrainerCallback):
    """`gather_in_4_bits` for Trainer with FSDP2: once Accelerate has sharded the model and loaded a checkpoint.

    Args:
        dtype: as there; None is right where Accelerate gathers parameters in BF16 (`bf16=True`) and in FP32.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Sets the hooks; a model that is not sharded is an error."""
        self.decisions = gather_in_4_bits(model, self.dtype)
