"""The safetensors files of a checkpoint: which there are, what is in them, one tensor at a time; and writing them.

Knows files and names; knows nothing of what the tensors mean. Reads no other kind of file than safetensors and JSON.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_nvfp4.data import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a file that is written; one tensor more may go into it.
SHARD_BYTES = 5 * 10**9
# In the files' metadata; a reader that meets another number does not know what it reads.
FORMAT_VERSION = "1"
_VERSION_KEY = "hf_nvfp4_export"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where it is, its dtype as safetensors names it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict:
    """An object from a file. InputError if it is not there or not one."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there. Give the folder of a whole checkpoint.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}). Fetch or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object. Fetch it again.")
    return content


def shard_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, in order -> names that the index promises of each (None: no index).

    Raises:
        InputError: there are none, or some that the index names are missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give the folder of a checkpoint.")
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}; it has {', '.join(others) or 'no weights'}. Only safetensors "
            "are read: save the model with save_pretrained."
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(f, str) for f in index.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from names to files. Fetch it again.")
    files: dict[Path, set[str] | None] = {}
    for name, file in index.items():
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX} names {file!r}, which is not a file of this folder. Fetch it again.")
        files.setdefault(folder / file, set()).add(name)
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:4])}. Fetch them again, or "
            f"repair {INDEX} if they are there under other names."
        )
    return dict(sorted(files.items()))


def open_shard(file: Path):
    """An open safetensors file. InputError if it is truncated or none."""
    try:
        shard = safe_open(file, framework="pt", device="cpu")
        metadata = shard.metadata() or {}
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "not there"
        raise InputError(
            f"{file} ({size}) is not a whole safetensors file ({error}). It is truncated or damaged: fetch it again."
        ) from error
    if metadata.get(_VERSION_KEY, FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(
            f"{file} was written by a newer hf_nvfp4 (export version {metadata[_VERSION_KEY]}; this one knows "
            f"{FORMAT_VERSION}). Upgrade hf_nvfp4."
        )
    return shard


def entries(files: dict[Path, set[str] | None]) -> dict[str, Entry]:
    """Name -> entry of every tensor, from the files' headers alone. InputError if they are not what the index says."""
    found: dict[str, Entry] = {}
    for file, promised in files.items():
        with open_shard(file) as shard:
            names = set(shard.keys())
            if promised is not None and names != promised:
                lacks, extra = sorted(promised - names), sorted(names - promised)
                raise InputError(
                    f"{file} is not the shard that {INDEX} describes: it lacks {len(lacks)} of its {len(promised)} "
                    f"tensors{f' ({lacks[0]}, …)' if lacks else ''} and has {len(extra)} others"
                    f"{f' ({extra[0]}, …)' if extra else ''}. The shards are misnamed or mixed up: fetch them again."
                )
            for name in shard.keys():
                part = shard.get_slice(name)
                found[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
    return found


def stream(files, wanted=None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all files, or of the names in `wanted`; one file open, and one tensor read, at a time."""
    for file in files:
        with open_shard(file) as shard:
            for name in shard.keys():
                if wanted is None or name in wanted:
                    yield name, shard.get_tensor(name)


class Folder:
    """A checkpoint folder that is written beside its place and moved there when it is complete.

        with Folder(out) as folder:
            folder.add("lm_head.weight", tensor)
            folder.write_json("config.json", config)

    On leaving without an exception the last shard and the index are written and the folder is at `out`; with one,
    nothing is left.

    Raises:
        InputError: `out` exists, can't be written beside, or there is no space.
    """

    def __init__(self, out: Path, shard_bytes: int | None = None):
        self.out, self.shard_bytes = out, shard_bytes or SHARD_BYTES
        self.beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self.tensor_bytes = 0

    def __enter__(self) -> "Folder":
        if self.out.exists() or self.out.is_symlink():
            raise InputError(f"{self.out} exists already. Remove it, or choose another folder.")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.beside.mkdir()
        except OSError as error:
            raise InputError(f"can't write beside {self.out} ({error}). Choose another folder.") from error
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._finish()
                return
        except (OSError, SafetensorError) as late:
            error = late
        finally:
            shutil.rmtree(self.beside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise InputError(
                f"could not write {self.out} ({error}). Nothing is left of it; make space, or choose another folder."
            ) from error

    def need(self, size: int) -> None:
        """InputError unless `size` bytes fit on the disk."""
        free = shutil.disk_usage(self.beside).free
        if size > free:
            raise InputError(
                f"{self.out} needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left. Make space, or "
                "choose another folder."
            )

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor more; written with others once they fill a shard."""
        tensor = tensor.detach().cpu().contiguous()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self._flush()

    def write_json(self, name: str, content: dict) -> None:
        """A JSON file of the folder."""
        (self.beside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def copy(self, file: Path) -> None:
        """A file of another folder, under its name."""
        shutil.copyfile(file, self.beside / file.name)

    def _shard_name(self, number: int, of: int) -> str:
        return f"model-{number:05}-of-{of:05}.safetensors"

    def _flush(self) -> None:
        # A tensor of its own memory each: safetensors refuses shared ones.
        self._shards.append(list(self._pending))
        file = self.beside / self._shard_name(len(self._shards), 0)
        file.touch()
        mode = file.stat().st_mode  # safetensors gives nobody else leave to read it
        save_file(self._pending, file, metadata={"format": "pt", _VERSION_KEY: FORMAT_VERSION})
        file.chmod(mode)
        self.tensor_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            (self.beside / self._shard_name(1, 0)).rename(self.beside / SINGLE)
        else:
            weight_map = {}
            for number, names in enumerate(self._shards, 1):
                file = self._shard_name(number, count)
                (self.beside / self._shard_name(number, 0)).rename(self.beside / file)
                weight_map |= dict.fromkeys(names, file)
            total = {"total_size": self.tensor_bytes}
            self.write_json(INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
        self.beside.rename(self.out)


def shared_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Name -> the first name of the same memory, for tensors that have several (tied weights)."""
    first: dict[tuple, str] = {}
    shared = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and tensor.device != torch.device("meta") and first.setdefault(key, name) != name:
            shared[name] = first[key]
    return shared
