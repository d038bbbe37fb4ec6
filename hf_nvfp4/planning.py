"""Memory and communication of a GPU when a model is trained on a mesh of many: arithmetic, nothing is run.

Knows the sizes of Llama-like models, dense or with experts, how the usual kinds of parallelism divide them, and how
many bytes a recipe keeps and gathers. What it says is for planning: allocators, kernels' buffers and the framework take
more, and a bandwidth is not a time.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_nvfp4.casts import Cast
from hf_nvfp4.convert import Choice, decide, fused_experts
from hf_nvfp4.formats import FORMATS
from hf_nvfp4.language import Recipe

# What carries each dimension of a mesh today: Transformers 5.23 (`DistributedConfig`) and Accelerate 1.15
# (`ParallelismConfig`), by their sources.
CARRIERS = {
    "dp_replicate": "DDP; with fsdp: DistributedConfig(dp_replicate_size), ParallelismConfig(dp_replicate_size)",
    "fsdp": "FSDP2: DistributedConfig(fsdp_size), ParallelismConfig(dp_shard_size)",
    "tp": "DistributedConfig(tp_size), ParallelismConfig(tp_size)",
    "cp": "ParallelismConfig(cp_size), with FSDP2",
    "ep": "DistributedConfig(ep_size): a multiple of tp_size that divides fsdp_size · tp_size; not with cp",
    "etp": "none: experts that are spread by ep are whole",
    "pp": "none for training: DistributedConfig(pp_size) sends without gradients",
}
# Bytes: of FP32 and BF16.
WIDE, NARROW = 4, 2
# Bytes of optimizer state a parameter.
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "adamw_4bit": 1, "sgd": 0}
# Logits in BF16, in FP32 for the loss, and the gradient of both.
LOGIT_BYTES = 2 * (WIDE + NARROW)


@dataclass(frozen=True)
class Mesh:
    """GPUs along each kind of parallelism, by Transformers' and Accelerate's names.

    tp: tensor; cp: context (a sequence's tokens); fsdp: data, parameters sharded; dp_replicate: data, whole copies; pp:
    pipeline. ep, etp: experts over GPUs, and each expert over GPUs. Attention and experts divide the same GPUs in two
    ways ("MoE Parallel Folding", arXiv 2504.14960, figure 1): dp_replicate · fsdp · cp · tp · pp of the dense parts is
    dp_replicate · efsdp · ep · etp · pp of the experts.
    """

    tp: int = 1
    cp: int = 1
    fsdp: int = 1
    dp_replicate: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self):
        for field in fields(self):
            if not isinstance(size := getattr(self, field.name), int) or size < 1:
                raise ValueError(f"{field.name}={size}: sizes of a mesh are whole numbers, 1 or more")
        if (self.fsdp * self.cp * self.tp) % (self.ep * self.etp):
            raise ValueError(
                f"ep · etp = {self.ep * self.etp} does not divide fsdp · cp · tp = {self.fsdp * self.cp * self.tp}, "
                "the GPUs over which experts can be folded"
            )

    @property
    def gpus(self) -> int:
        """How many there are in all."""
        return self.dp_replicate * self.fsdp * self.cp * self.tp * self.pp

    @property
    def efsdp(self) -> int:
        """GPUs over which an expert's parameters are sharded as data parallelism shards them."""
        return self.fsdp * self.cp * self.tp // (self.ep * self.etp)


@dataclass(frozen=True)
class Sizes:
    """What a plan needs of a model. Widths are features; counts are parameters.

    layers: decoder blocks. query, key_value: features of all heads. intermediate: width of the MLP, or of an expert's;
    experts_per_token: 1 where there are none. vocabulary: rows of the output head. converted, kept, experts, other:
    parameters of converted linears, of other linears and embeddings, of experts, of the rest, which every GPU of a
    tensor-parallel group has whole. converted_experts: whether experts are converted.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    experts_per_token: int
    vocabulary: int
    converted: int
    kept: int
    experts: int
    other: int
    converted_experts: bool = False

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.converted + self.kept + self.experts + self.other


def sizes_of(config, choice: Choice) -> Sizes:
    """The sizes of a Transformers config's causal LM, of which `choice` says what is converted. No weights are made.

    Raises:
        ValueError: a config that does not name its widths as Llama does, or as `decide`.
    """
    text = config.get_text_config()
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not hasattr(text, name)]:
        raise ValueError(f"{type(config).__name__} has no {', '.join(missing)}; plans are for Llama-like models")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    chosen = {d.name for d in decide(model, choice) if d.converted}
    counts = dict.fromkeys(("converted", "kept", "experts", "other"), 0)
    seen, converted_experts = set(), False
    for name, module in model.named_modules():
        fused = fused_experts(module) > 0
        converted_experts |= fused and name in chosen
        linear = isinstance(module, nn.Linear | nn.Embedding)
        kind = "experts" if fused else "converted" if name in chosen else "kept" if linear else "other"
        for parameter in module.parameters(recurse=fused):
            if id(parameter) not in seen:  # a tied head is counted once
                seen.add(id(parameter))
                counts[kind] += parameter.numel()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    expert_width = getattr(text, "moe_intermediate_size", None) if counts["experts"] else None
    return Sizes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_dim,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        intermediate=expert_width or getattr(text, "intermediate_size", 4 * text.hidden_size),
        experts_per_token=getattr(text, "num_experts_per_tok", 1) if counts["experts"] else 1,
        vocabulary=text.vocab_size,
        converted_experts=converted_experts,
        **counts,
    )


def element_bytes(cast: Cast) -> float:
    """Bytes an element of a cast takes in memory, scales included."""
    form = FORMATS[cast.format]
    if form.high_precision:
        return form.element.bits / 8
    scale = 0 if not form.block else (form.scale_dtype.itemsize / form.block)
    return form.element.bits / 8 + (scale / form.block if cast.square else scale)


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    recipe: of converted layers. sequences, length: of a forward pass of one data-parallel rank, in tokens.
    accumulation: forward passes a step. weights: bytes a parameter of the master weights, whose gradients have as many.
    gradient_checkpointing: whether blocks keep their input alone. gather_4bit: FSDP2 gathers converted weights in
    NVFP4, which it does not do yet. fp8_operands: what is kept of x is 8 bits, as on backend `fp8`, whatever the
    recipe's format.
    """

    recipe: Recipe
    sequences: int = 1
    length: int = 4096
    accumulation: int = 1
    weights: int = WIDE
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    gather_4bit: bool = False
    fp8_operands: bool = False

    @property
    def kept(self) -> float:
        """Bytes of an element of x that a converted layer keeps for wgrad."""
        if self.fp8_operands:
            return 1.0
        return element_bytes(self.recipe.wgrad.b)

    @property
    def gathered(self) -> float:
        """Bytes of an element of a converted weight in an all-gather."""
        if not self.gather_4bit:
            return NARROW
        return element_bytes(Cast())  # scales of blocks are sent for each 16, 16×16 or not


def local_parameters(sizes: Sizes, mesh: Mesh) -> tuple[float, float]:
    """Dense parameters and experts' of the GPU of a pipeline's stage, before FSDP shards them.

    Embeddings and head are divided by tp as linears are, and shared out over the stages as if they were blocks.
    """
    dense = (sizes.converted + sizes.kept) / mesh.tp + sizes.other
    return dense / mesh.pp, sizes.experts / (mesh.ep * mesh.etp) / mesh.pp


def memory(sizes: Sizes, mesh: Mesh, run: Run) -> dict[str, float]:
    """Bytes on each GPU by what they are for. With pp > 1 of the first stage, which holds most activations (1F1B)."""
    dense, experts = local_parameters(sizes, mesh)
    shards, expert_shards = mesh.fsdp * mesh.cp, mesh.efsdp
    held = dense / shards + experts / expert_shards
    bytes_of = {
        "weights": held * run.weights,
        "gradients": held * run.weights,
        "optimizer": held * OPTIMIZERS[run.optimizer],
    }
    blocks = sizes.layers / mesh.pp
    unit_converted = sizes.converted / mesh.tp / sizes.layers
    unit_experts = experts / blocks
    gathered = unit_converted * run.gathered if shards > 1 else 0
    gathered += unit_experts * NARROW if expert_shards > 1 else 0
    gradient = (unit_converted if shards > 1 else 0) + (unit_experts if expert_shards > 1 else 0)
    bytes_of["gathered"] = 2 * gathered + gradient * run.weights  # a block, the one behind it, and its gradient
    tokens = run.sequences * run.length / mesh.cp
    in_flight = min(mesh.pp, run.accumulation)
    bytes_of["activations"] = tokens * block_activations(sizes, mesh, run) * blocks * in_flight
    if run.gradient_checkpointing:
        kept = tokens * sizes.hidden * WIDE * blocks * in_flight
        bytes_of["activations"] = kept + tokens * block_activations(sizes, mesh, run)
    bytes_of["logits"] = tokens * sizes.vocabulary / mesh.tp * LOGIT_BYTES if mesh.pp == 1 else 0
    return bytes_of


def peak(bytes_of: dict[str, float], run: Run) -> float:
    """The most that a step holds of what `memory` counts, in bytes.

    At the loss there are all activations and, in the first of its forward passes, no gradients; in the end it is the
    other way round.
    """
    always = bytes_of["weights"] + bytes_of["optimizer"] + bytes_of["gathered"]
    forward, backward = bytes_of["activations"] + bytes_of["logits"], bytes_of["gradients"]
    return always + (forward + backward if run.accumulation > 1 else max(forward, backward))


def block_activations(sizes: Sizes, mesh: Mesh, run: Run) -> float:
    """Bytes a token that a block keeps for backward: BF16 but the residual stream, which autocast leaves in FP32.

    Of attention (which keeps no scores) q, k, v and its output; of the MLP gate and up; and the inputs of the linears
    as the recipe keeps them, that of q, k and v once, of gate and up once (of each of a token's experts). Where a
    recipe keeps BF16, the output of attention and the input of the projection behind it are one.
    """
    dense_width = (2 * sizes.query + 2 * sizes.key_value) / mesh.tp * NARROW
    kept = run.kept
    kept_mlp = kept if not sizes.experts or sizes.converted_experts else NARROW
    inputs = sizes.hidden * kept + (0 if kept == NARROW else sizes.query / mesh.tp * kept)
    inputs += sizes.experts_per_token * sizes.hidden * kept_mlp
    mlp = sizes.experts_per_token * sizes.intermediate / (mesh.etp if sizes.experts else mesh.tp)
    return 2 * sizes.hidden * WIDE + dense_width + inputs + mlp * (2 * NARROW + kept_mlp)


# ---------------------------------------------------------------------------- communication


def all_gather(size: float, ranks: int) -> float:
    """Bytes that each rank receives (and sends) for a tensor of `size` bytes in all; of a reduce-scatter as many."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """The same for a sum of tensors of `size` bytes: a reduce-scatter and an all-gather, as rings and trees do it."""
    return 2 * all_gather(size, ranks)


def traffic(sizes: Sizes, mesh: Mesh, run: Run) -> dict[str, float]:
    """Bytes that each GPU receives in one optimizer step, by what for.

    Weights are gathered for the forward and again for backward (reshard_after_forward), gradients reduced in each
    forward pass of an accumulation, as FSDP2 does by default; DDP's copies reduce once a step. Amax reductions of
    tensor parallelism, 4 bytes each, are left out. Ring attention passes k and v on in the forward, them and their
    gradients in backward.
    """
    dense, experts = local_parameters(sizes, mesh)
    shards, expert_shards = mesh.fsdp * mesh.cp, mesh.efsdp
    converted = sizes.converted / mesh.tp / mesh.pp
    passes, tokens = run.accumulation, run.sequences * run.length / mesh.cp
    blocks = sizes.layers / mesh.pp
    weight_bytes = converted * run.gathered + (dense - converted) * NARROW
    row = tokens * sizes.hidden * NARROW
    ring = tokens * 2 * sizes.key_value / mesh.tp * NARROW * (mesh.cp - 1)
    away = (mesh.ep - 1) / mesh.ep
    return {
        "fsdp: weights": passes * 2 * all_gather(weight_bytes, shards),
        "fsdp: gradients": passes * all_gather(dense * run.weights, shards),
        "fsdp: experts": passes * all_gather(experts * (2 * NARROW + run.weights), expert_shards),
        "dp_replicate: gradients": all_reduce(
            (dense / shards + experts / expert_shards) * run.weights, mesh.dp_replicate
        ),
        "tp: activations": passes * blocks * 4 * all_reduce(row, mesh.tp),
        "cp: keys and values": passes * blocks * 3 * ring,
        "ep: tokens": passes * blocks * 4 * row * sizes.experts_per_token * away / mesh.tp if sizes.experts else 0.0,
        "pp: activations": passes * 2 * row * (mesh.pp > 1),
    }
