"""What is tried with every causal LM of the installed Transformers, tiny and on the CPU, and what came of it.

Builds a model, trains one step in BF16 and one in NVFP4, saves and loads it. Each in a process of its own: a crash or
an endless loop is a row too. Knows steps and reasons; tiny_configs.py knows configs, convert.py what is converted.
"""

import contextlib
import difflib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_nvfp4.casts import Cast
from hf_nvfp4.convert import Decision
from hf_nvfp4.experts import OTHER_EXPERTS
from hf_nvfp4.integration import NVFP4TrainingConfig, quantize_model
from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import converted_modules
from hf_nvfp4.tiny_configs import TOKENS, VOCABULARY, tiny_config

_RN, _RN_2D = Cast(), Cast(square=True)
RECIPE = Recipe("nvfp4_nearest", fprop=(_RN, _RN_2D), dgrad=(_RN, _RN_2D), wgrad=(_RN, _RN))
BATCH, SEED = 2, 1
LOSS_TOLERANCE = 0.02  # of BF16's loss
LEAST_COSINE = 0.8  # of all gradients to BF16's
# Where a model exceeds these, it has to be as far off in BF16 with this much noise on the weights that are converted,
# by this factor at most. NVFP4's rounding error is about 0.1 of a Gaussian tensor, of x and of w.
NOISE, NOISE_FACTOR = 0.1, 2

ATTENTION, MLP, EXPERTS, MIXER, ROUTER, HEAD, OTHER = "attention", "MLP", "experts", "mixer", "router", "head", "other"
KINDS = (ATTENTION, MLP, EXPERTS, MIXER, ROUTER, HEAD, OTHER)
# Of the classes around a layer and of its own and their names, innermost first: the first that matches decides.
_PATTERNS = (
    (EXPERTS, r"(?!.*shared).*experts|.*ExpertGLU"),
    (ATTENTION, r"(?!.*(linear_?att|delta)).*(attn|attention).*"),
    (MLP, r".*(mlp|ffn|feed_?forward|intermediate|shared_experts?|_ff).*|ff.*|.*moe|fc\d*|(?!.*self).*output"),
    (MIXER, r".*(mixer|mamba|attn|attention|delta_?net|recurrent|lstm|short_?conv|rwkv|kda).*"),
)
_KIND_OF_REASON = {"output head": HEAD, "router of experts": ROUTER}


@dataclass
class Row:
    """What came of one class.

    status: "pass", "fail" or "not built"; reason: why, in words. control: what noise on the weights does in BF16, where
    it had to be asked.
    """

    name: str
    status: str = "fail"
    reason: str = ""
    kinds: dict[str, list[int]] = field(default_factory=dict)  # kind -> [converted, all]
    kept: dict[str, int] = field(default_factory=dict)  # reason -> layers
    loss: float | None = None
    loss_bf16: float | None = None
    cosine: float | None = None
    seconds: float | None = None
    remarks: list[str] = field(default_factory=list)
    control: str = ""


class Problem(Exception):
    """Something that is not as it should be; its text is the row's reason."""


class NotBuilt(Problem):
    """The plain model can't be built or trained: there is nothing to compare with."""


def causal_lms() -> dict[str, list[str]]:
    """Class -> its model types: all that AutoModelForCausalLM knows, in the order of its names."""
    classes = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        classes.setdefault(name, []).append(model_type)
    return classes


def named(names: list[str] | None, types: dict[str, list[str]]) -> list[str]:
    """Classes by their names or model types, each once; all for None. ValueError: an unknown one."""
    by_type = {model_type: name for name, of in types.items() for model_type in of}
    for name in names or ():
        if name not in types and name not in by_type:
            near = difflib.get_close_matches(name, [*types, *by_type], 5) or sorted(by_type)[:5]
            raise ValueError(
                f"no causal LM {name!r} among the {len(types)} of transformers {transformers.__version__}; give "
                f"classes or model types such as {', '.join(near)}"
            )
    return list(types) if names is None else list(dict.fromkeys(by_type.get(name, name) for name in names))


# ---- One model -----------------------------------------------------------------------------------------


def check(name: str) -> Row:
    """Try everything with one class, in this process. Never raises: what goes wrong is the row's reason."""
    row, start = Row(name), time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            _check(getattr(transformers, name), Path(folder), row)
        row.status = "pass"
    except NotBuilt as problem:
        row.status, row.reason = "not built", str(problem)
    except Problem as problem:
        row.reason = str(problem)
    except Exception as error:
        row.reason = describe(error)
    row.seconds = time.perf_counter() - start
    return row


def _check(cls: type, folder: Path, row: Row) -> None:
    try:
        model = build(cls)
        row.loss_bf16, expected = train_step(model)
        model.save_pretrained(folder / "plain")
    except Exception as error:
        raise NotBuilt(describe(error) + _of_default(cls)) from error
    model.zero_grad()
    decisions = quantize_model(model, NVFP4TrainingConfig(RECIPE))
    kinds = {decision.name: kind_of(model, decision) for decision in decisions}
    row.kinds = {kind: [0, 0] for kind in sorted(set(kinds.values()))}
    for decision in decisions:
        row.kinds[kinds[decision.name]][0] += decision.converted
        row.kinds[kinds[decision.name]][1] += 1
    row.kept = dict(Counter(d.reason for d in decisions if not d.converted))
    row.remarks += sorted({d.reason.partition(", ")[2] for d in decisions if d.converted} - {""})
    row.loss, gradients = _watched_step(model)
    row.cosine = cosine(gradients, expected)
    _check_gradients(model, gradients, expected)
    _check_nearness(cls, row, _weights(model), expected)
    _check_files(cls, model, folder, row.loss)
    for kind in (ATTENTION, MLP, EXPERTS, MIXER):
        reasons = {d.reason for d in decisions if kinds[d.name] == kind}
        if row.kinds.get(kind, [1])[0] == 0 and reasons - {OTHER_EXPERTS, "router of experts"}:
            raise Problem(f"no layer of kind {kind} was converted: {'; '.join(sorted(reasons))}")


def build(cls: type) -> nn.Module:
    """The tiny model, in FP32 and in training mode, the same weights each time."""
    config = tiny_config(cls.config_class)
    torch.manual_seed(SEED)
    return cls(config).train()


def _of_default(cls: type) -> str:
    """What to add where the class's own defaults are an error too."""
    try:
        with torch.device("meta"):
            cls(cls.config_class())
    except Exception:
        return "; nor can its default config be built"
    return ""


def train_step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch under BF16 autocast."""
    loss = _loss(model)
    if not math.isfinite(loss.item()):
        raise Problem(f"the loss is {loss.item()}")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(VOCABULARY // 16, VOCABULARY // 2, (BATCH, TOKENS), generator=generator)
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def cosine(gradients: dict, expected: dict) -> float:
    """Of all gradients, as one vector."""
    ours, theirs = (
        torch.cat([g[name].flatten().double() for name in expected if name in gradients]) for g in (gradients, expected)
    )
    return F.cosine_similarity(ours, theirs, dim=0).item()


def _watched_step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """A train_step; a converted module that gets a gradient without having been called did not quantize anything."""
    called, modules = set(), converted_modules(model)
    hooks = [m.register_forward_pre_hook(lambda *_, n=name: called.add(n)) for name, m in modules.items()]
    loss, gradients = train_step(model)
    for hook in hooks:
        hook.remove()
    passed_by = [name for name in _weights(model) if name.rpartition(".")[0] not in called and name in gradients]
    if passed_by:
        raise Problem(f"converted, but multiplied by without being called: {_some(passed_by)}")
    return loss, gradients


def _weights(model: nn.Module) -> list[str]:
    """The names of the parameters that are cast."""
    return [f"{name}.{matrix}" for name, module in converted_modules(model).items() for matrix in module.sizes]


def _check_gradients(model: nn.Module, gradients: dict, expected: dict) -> None:
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        raise Problem(f"gradients are not finite: {_some(bad)}")
    weights = [name for name in _weights(model) if name in expected and expected[name].any()]
    zero = [name for name in weights if not (name in gradients and gradients[name].any())]
    if zero:
        raise Problem(f"no gradient, though BF16 has one: {_some(zero)}")


def _check_nearness(cls: type, row: Row, converted: list[str], expected: dict) -> None:
    """Loss and gradients near BF16's, or no further from them than twice what noise on the weights does."""
    off = abs(row.loss - row.loss_bf16)
    if off <= LOSS_TOLERANCE * row.loss_bf16 and row.cosine >= LEAST_COSINE:
        return
    loss, gradients = train_step(disturbed(build(cls), converted))
    noisy_off, noisy_cosine = abs(loss - row.loss_bf16), cosine(gradients, expected)
    control = f"BF16 with {NOISE:.0%} noise on the same weights: loss {loss:.4f}, cosine {noisy_cosine:.3f}"
    if off > max(LOSS_TOLERANCE * row.loss_bf16, NOISE_FACTOR * noisy_off):
        raise Problem(f"loss {row.loss:.4f}, in BF16 {row.loss_bf16:.4f} ({control})")
    if row.cosine < min(LEAST_COSINE, 1 - NOISE_FACTOR * (1 - noisy_cosine)):
        raise Problem(f"gradients have cosine {row.cosine:.3f} to BF16's ({control})")
    row.control = control


@torch.no_grad()
def disturbed(model: nn.Module, names: list[str]) -> nn.Module:
    """The model with noise of relative size NOISE on these weights."""
    generator = torch.Generator().manual_seed(SEED)
    for name in names:
        weight = model.get_parameter(name)
        weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
    return model


def _check_files(cls: type, model: nn.Module, folder: Path, loss: float) -> None:
    trained, plain = folder / "trained", folder / "plain"
    model.save_pretrained(trained)
    keys, plain_keys = _keys(trained), _keys(plain)
    if keys != plain_keys:
        different = set(keys.items()) ^ set(plain_keys.items())
        raise Problem(f"keys on disk differ from the plain model's: {_some(different)}")
    again = cls.from_pretrained(trained, dtype=torch.float32).train()
    if other := set(converted_modules(again)) ^ set(converted_modules(model)):
        raise Problem(f"other layers are converted after loading: {_some(other)}")
    found = _loss(again).item()
    if found != loss:
        raise Problem(f"loss {found!r} after loading, {loss!r} before saving")
    config = json.loads((trained / "config.json").read_text())
    del config["quantization_config"]
    (trained / "config.json").write_text(json.dumps(config))
    info = {where: cls.from_pretrained(where, output_loading_info=True)[1] for where in (trained, plain)}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if extra := set(info[trained][problem]) - set(info[plain][problem]):
            raise Problem(f"loaded as a plain model: {problem} {_some(extra)}")


def _keys(folder: Path) -> dict[str, tuple]:
    keys = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return keys


def kind_of(model: nn.Module, decision: Decision) -> str:
    """What a layer is part of, by the classes of the modules around it and by their names."""
    if decision.reason in _KIND_OF_REASON:
        return _KIND_OF_REASON[decision.reason]
    parts = decision.name.split(".")
    for depth in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        names = (parts[depth - 1],) if isinstance(module, nn.Linear) else (type(module).__name__, parts[depth - 1])
        for name in names:
            for kind, pattern in _PATTERNS:
                if re.fullmatch(pattern, name, re.IGNORECASE):
                    return kind
    return OTHER


def _some(names) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe(error: BaseException) -> str:
    """An exception on one line: its type, the beginning of its text, and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(lines)[:160]} ({Path(frame.filename).name}:{frame.lineno})"


# ---- All of them ---------------------------------------------------------------------------------------


def check_all(
    names: list[str],
    seconds: float = 120,
    parallel: int = 1,
    done: Callable[[Row], None] = lambda row: None,
    attempt: Callable[[str], Row] = check,
) -> list[Row]:
    """Rows of the classes, in their order; each is tried in a process of its own that has so many seconds.

    done: called with each row as it comes. attempt: what a process does, by a module's name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting, running, rows = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < parallel:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(attempt, name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, ours, time.monotonic() + seconds)
        multiprocessing.connection.wait([ours for _, ours, _ in running.values()], timeout=1)
        for name, (process, ours, deadline) in list(running.items()):
            row = _outcome(name, process, ours, time.monotonic() > deadline, seconds)
            if row is not None:
                del running[name]
                rows[name] = row
                done(row)
    return [rows[name] for name in names]


def _child(attempt: Callable[[str], Row], name: str, connection) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        connection.send(asdict(attempt(name)))


def _outcome(name: str, process, connection, late: bool, seconds: float) -> Row | None:
    """The row of a process that has sent it, died, or had its time; None: wait."""
    if connection.poll():
        try:
            row = Row(**connection.recv())
        except EOFError:
            process.join()
            row = Row(name, reason=f"the process died with exit code {process.exitcode}")
    elif late:
        row = Row(name, reason=f"not done after {seconds:g} s")
    else:
        return None
    process.kill()
    process.join()
    connection.close()
    return row
