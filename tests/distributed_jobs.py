"""What the processes of test_distributed*.py do: jobs, run by name, by gloo on the CPU.

    python tests/distributed_jobs.py FOLDER JOB ...

imports everything once and forks the processes of one job after the other. What the processes return is written to
FOLDER/JOB.RANK.pt, their exit statuses to FOLDER/JOB.json.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import gather_cases
import shard_cases
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from hf_nvfp4 import Cast, GatherIn4Bits, NVFP4TrainingConfig, Recipe, quantize_model
from hf_nvfp4.rounding import draw_seed
from hf_nvfp4.runlog import SafeTrainer, publish_model
from hf_nvfp4.tiny_configs import tiny_config

SECONDS = 60  # that a job may take
# Recipe nvfp4, everything rounded to nearest.
NEAREST = Recipe(
    "nearest",
    fprop=(Cast(), Cast(square=True)),
    dgrad=(Cast(), Cast(square=True)),
    wgrad=(Cast(hadamard=16), Cast(hadamard=16)),
)


def llama(recipe=NEAREST, backend="auto"):
    """A Llama of 2 blocks in FP32, the same weights each time, converted."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    quantize_model(model, NVFP4TrainingConfig(recipe=recipe, backend=backend, keep_bf16_last=0))
    return model


def tokens(number: int, rows: int = 2) -> dict:
    """A micro-batch by its number."""
    ids = torch.randint(256, (rows, 32), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def whole(tensor):
    """A tensor, gathered if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights(model) -> dict:
    return {name: whole(p) for name, p in model.named_parameters()}


def step(model, numbers, autocast=False) -> dict:
    """Loss of each micro-batch, and the gradients of their mean over all micro-batches of this process."""
    losses = []
    for number in numbers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**tokens(number)).loss
        (loss / len(numbers)).backward()
        losses.append(loss.item())
    gradients = {name.removeprefix("module."): whole(p.grad).float() for name, p in model.named_parameters()}
    return {"losses": losses, "gradients": gradients}


# ---------------------------------------------------------------------------- one step


def steps(rank: int, folder: Path) -> dict:
    """A step in each layout. Micro-batch n is that of rank n % 2, so that one process can have them in order."""
    folder, cpu = folder / "model", torch.device("cpu")
    if rank == 0:
        llama().save_pretrained(folder)
    dist.barrier()

    def native(**parallel):
        config = DistributedConfig(**parallel)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32).train()

    def checkpointed():
        model = native(fsdp_size=2)
        model.gradient_checkpointing_enable()
        return model

    def offloaded():
        model = llama()
        policy = CPUOffloadPolicy(pin_memory=False)  # there is nothing to pin it for
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)), offload_policy=policy)
        return model

    return {
        "ddp": step(DistributedDataParallel(llama()), [rank]),
        "ddp, autocast": step(DistributedDataParallel(llama()), [rank], autocast=True),
        "fsdp2": step(native(fsdp_size=2), [rank]),
        "fsdp2, autocast": step(native(fsdp_size=2), [rank], autocast=True),
        "fsdp2, two micro-batches": step(native(fsdp_size=2), [rank, 2 + rank]),
        "fsdp2, checkpointing": step(checkpointed(), [rank]),
        "fsdp2, bf16": step(native(fsdp_size=2, fsdp_mixed_precision=True), [rank]),
        "fsdp2, offload": step(offloaded(), [rank]),
        "seeds": [draw_seed(cpu, torch.Generator().manual_seed(3), by_rank) for by_rank in (True, False)],
    }


# ---------------------------------------------------------------------------- weights gathered in 4 bits


def two_steps(model, number: int, autocast=False) -> list[dict]:
    """A step, the optimizer's (fused, which torch does not count as writes), and another step."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    first = step(model, [number], autocast)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return [first, step(model, [number], autocast)]


def gather(rank: int, folder: Path) -> dict:
    """Steps with weights gathered as ever and in 4 bits; bytes; refusals."""
    layouts = {
        "fp32": {},
        "autocast": {"autocast": True, "dtype": torch.bfloat16},
        "bf16": {"mp_policy": gather_cases.BF16},
        "reference": {"backend": "reference"},
        "from_forward": {"recipe": "nvfp4_qat_w4a16"},
        "drawn": {"recipe": "nvfp4"},
    }
    found = {"refusals": gather_cases.refusals()}
    for name, layout in layouts.items():
        given = {"recipe": NEAREST, "backend": "auto", "autocast": False, "dtype": None} | layout
        recipe, backend, autocast = given.pop("recipe"), given.pop("backend"), given.pop("autocast")
        models = [gather_cases.sharded(llama(recipe, backend), in_4_bits, **given) for in_4_bits in (False, True)]
        found[name] = [two_steps(model, rank, autocast) for model in models]
    models = [gather_cases.sharded(llama(recipe), in_4_bits) for recipe, in_4_bits in BYTES.values()]
    found["bytes"] = {name: gather_cases.traffic(m, tokens(0)) for name, m in zip(BYTES, models, strict=True)}
    return found


BYTES = {"plain": (NEAREST, False), "square": (NEAREST, True), "by rows": ("nvfp4_qat_w4a16", True)}


# ---------------------------------------------------------------------------- experts


def mixtral():
    """A Mixtral of 2 blocks in FP32, its experts converted, the same each time. Without wgrad, see `experts`."""
    torch.manual_seed(1)
    model = MixtralForCausalLM(tiny_config(MixtralConfig))
    recipe = Recipe("nearest", NEAREST.fprop, NEAREST.dgrad, (Cast("bf16"), Cast("bf16")))
    quantize_model(model, NVFP4TrainingConfig(recipe={"experts": recipe}, keep_bf16_last=0))
    return model


def experts(rank: int, folder: Path) -> dict:
    """A step with half of the experts on each process; micro-batch 0 on both, and a micro-batch each.

    Expert parallelism hands an expert its tokens in another order, and wgrad has other blocks then: it is BF16 here.
    """
    if not hasattr(DistributedConfig, "ep_size"):  # an older Transformers
        return {}
    if rank == 0:
        mixtral().save_pretrained(folder / "mixtral")
    dist.barrier()
    found = {}
    for layout, number in (("tp_size", 0), ("fsdp_size", rank)):
        config = DistributedConfig(**{layout: 2, "ep_size": 2})
        model = AutoModelForCausalLM.from_pretrained(folder / "mixtral", distributed_config=config, dtype=torch.float32)
        found[layout] = step(model.train(), [number])
    return found


# ---------------------------------------------------------------------------- tensor parallelism


def float64():
    """A model whose sums are so exact that their order does not show."""
    return llama(backend="reference").double()


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return whole(model.eval()(**tokens(0)).logits)


def split(rank: int, folder: Path, micro_batch: int = 0, **parallel) -> dict:
    """A step and scores of a model whose layers are split, in FP64 and in FP32; what is saved of it."""
    path, config = folder / f"split{os.environ['WORLD_SIZE']}", DistributedConfig(tp_size=2, **parallel)
    if rank == 0:
        llama(backend="reference").save_pretrained(path)
        llama().save_pretrained(path / "fp32")
    dist.barrier()
    found = {}
    for name, dtype in {"": torch.float64, "fp32": torch.float32}.items():
        model = AutoModelForCausalLM.from_pretrained(path / name, distributed_config=config, dtype=dtype)
        found[name] = step(model.train(), [micro_batch])
    model.save_pretrained(path / "saved")
    return found | {"scores": scores(model)}


def tensor_parallel(rank: int, folder: Path) -> dict:
    operands = {"operands": shard_cases.mismatches(rank), "nan": shard_cases.nan_everywhere(rank)}
    return operands | split(rank, folder)


def tensor_parallel_fsdp2(rank: int, folder: Path) -> dict:
    """Ranks 0 and 1 split layers and see micro-batch 0, ranks 2 and 3 micro-batch 1."""
    return split(rank, folder, rank // 2, fsdp_size=2)


# ---------------------------------------------------------------------------- training


def accelerate_fsdp_on_cpu() -> None:
    """Let Accelerate shard on the CPU: it does so where there are several accelerators only."""
    init = AcceleratorState.__init__

    def init_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_fsdp


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {key: ids[0] for key, ids in tokens(100 + i, rows=1).items()}


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
SHARDED = {
    "fsdp": True,
    "fsdp_config": {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
}


def train(folder: Path, recipe=NEAREST, resume=None, callbacks=(), **arguments) -> SafeTrainer:
    """Four steps of 4 sequences, a checkpoint at each second one. Not clipped: a norm is summed by shards."""
    if "fsdp" in arguments:
        arguments["fsdp_config"] = dict(arguments["fsdp_config"])  # TrainingArguments writes into it
    given = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // int(os.environ["WORLD_SIZE"]),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = SafeTrainer(llama(recipe), given, train_dataset=Tokens(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def trained(trainer) -> dict:
    """The losses that were logged, with all digits, and the weights."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": weights(trainer.model)}


def go_on(rank: int, folder: Path, resume: Path, **arguments) -> dict:
    return trained(train(folder, resume=resume / "checkpoint-2", save_strategy="no", **arguments))


def trained_twice(folder: Path, **arguments) -> list[dict]:
    """The whole run with stochastic rounding, and its second half once more from the checkpoint."""
    first = trained(train(folder, "nvfp4", **arguments))
    second = trained(train(folder, "nvfp4", folder / "checkpoint-2", save_strategy="no", **arguments))
    return [first, second]


def train_ddp(rank: int, folder: Path) -> dict:
    return {
        "nearest": trained(train(folder / "ddp")),
        "from one process": go_on(rank, folder / "ddp_1_to_2", folder / "one"),
        "stochastic": trained_twice(folder / "ddp_nvfp4"),
    }


def train_fsdp2(rank: int, folder: Path) -> dict:
    accelerate_fsdp_on_cpu()
    sharded = train(folder / "sharded", **SHARDED)
    publish_model(sharded, folder / "published")
    return {
        "sharded": trained(sharded),
        "from one process": go_on(
            rank, folder / "sharded_1_to_2", folder / "sharded_one", callbacks=[GatherIn4Bits()], **SHARDED
        ),
        "gathered": trained(train(folder / "gathered", callbacks=[GatherIn4Bits()], **SHARDED)),
        "from gathered": go_on(rank, folder / "gathered_and_not", folder / "gathered", **SHARDED),
        "stochastic": trained_twice(folder / "fsdp2_nvfp4", **FSDP),
        "bf16": trained(train(folder / "fsdp2_bf16", bf16=True, save_strategy="no", **FSDP)),
    }


def train_one(rank: int, folder: Path) -> dict:
    """One process, which accumulates."""
    return {"nearest": trained(train(folder / "one"))}


def train_fsdp2_one(rank: int, folder: Path) -> dict:
    """One process again, whose one shard is everything."""
    accelerate_fsdp_on_cpu()
    return {"sharded": trained(train(folder / "sharded_one", **SHARDED))}


# ---------------------------------------------------------------------------- processes that die


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieInBackward(TrainerCallback):
    """In the middle of the fourth step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).register_hook(lambda gradient: die())


def killed_in_step(rank: int, folder: Path) -> None:
    train(folder / "killed_in_step", callbacks=[DieInBackward()] if rank == 1 else [])


def killed_in_save(rank: int, folder: Path) -> None:
    """The process that writes, in the middle of a file."""
    save = torch.save

    def save_half(thing, path, *args, **kwargs):
        save(thing, path, *args, **kwargs)
        if rank == 0 and "checkpoint-4/optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save_half
    train(folder / "killed_in_save")


def killed_in_sharded_save(rank: int, folder: Path) -> None:
    """One of two processes that both write, when the weights are written and the optimizer's state is not."""
    import transformers.trainer

    accelerate_fsdp_on_cpu()
    save = transformers.trainer.save_fsdp_optimizer

    def save_or_die(plugin, accelerator, optimizer, model, output_dir):
        if rank == 1 and "checkpoint-4" in output_dir:
            die()
        save(plugin, accelerator, optimizer, model, output_dir)

    transformers.trainer.save_fsdp_optimizer = save_or_die
    train(folder / "killed_in_sharded_save", **SHARDED)


# ---------------------------------------------------------------------------- other numbers of processes


def resume_one(rank: int, folder: Path) -> dict:
    """Two processes' checkpoints, the last ones of those that died too."""
    runs = ("ddp", "killed_in_step", "killed_in_save")
    return {run: go_on(rank, folder / f"{run}_2_to_1", folder / run) for run in runs}


def resume_fsdp2_one(rank: int, folder: Path) -> dict:
    accelerate_fsdp_on_cpu()
    runs = ("sharded", "killed_in_sharded_save")
    return {run: go_on(rank, folder / f"{run}_2_to_1", folder / run, **SHARDED) for run in runs}


# ---------------------------------------------------------------------------- the processes

# How many each job has.
JOBS = {
    steps: 2,
    gather: 2,
    experts: 2,
    tensor_parallel: 2,
    tensor_parallel_fsdp2: 4,
    train_one: 1,
    train_fsdp2_one: 1,
    train_ddp: 2,
    train_fsdp2: 2,
    killed_in_step: 2,
    killed_in_save: 2,
    killed_in_sharded_save: 2,
    resume_one: 1,
    resume_fsdp2_one: 1,
}


def process(job, rank: int, size: int, folder: Path) -> None:
    sys.stdout = sys.stderr = open(folder / f"{job.__name__}.{rank}.log", "w", buffering=1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    store = dist.FileStore(str(folder / f"{job.__name__}.store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    try:
        torch.save(job(rank, folder), folder / f"{job.__name__}.{rank}.pt")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


def run(job, folder: Path) -> list[int | None]:
    """Exit statuses of a job's processes; None of one that did not end, and was killed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(job, r, JOBS[job], folder)) for r in range(JOBS[job])]
    for p in processes:
        p.start()
    end = time.monotonic() + SECONDS
    for p in processes:
        p.join(max(0.0, end - time.monotonic()))
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = {job.__name__: job for job in JOBS}
    for name in sys.argv[2:]:
        began = time.monotonic()
        codes = run(jobs[name], Path(sys.argv[1]))
        Path(sys.argv[1], f"{name}.json").write_text(json.dumps(codes))
        print(f"{name}: {codes}, {time.monotonic() - began:.1f} s", flush=True)
