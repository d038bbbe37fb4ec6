"""Where training text comes from, and which side of the train/validation split each document is on.

Three sources: the standard library of the running Python (every machine has it), local files, the Hub.
This file knows documents (strings); tokens and sequences are packing.py's. It imports `datasets` and
`pyarrow` only when a source needs them.
"""

import glob
import gzip
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used. Its text says what, what there is, and what to do."""


@dataclass
class DataArguments:
    """What to train on. Without dataset_name or train_file: Python's own standard library."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hugging Face Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Its split to validate on (default: hold out --validation_fraction)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Tokenize while training, in the order of the source; keep nothing."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files, folders or globs: .parquet .jsonl .json .txt (the last three also .gz)."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same, to validate on (default: hold out --validation_fraction)."}
    )
    text_column: str = field(default="text", metadata={"help": "Column or key that holds the text."})
    validation_fraction: float = field(
        default=0.01, metadata={"help": "Share of documents held out, chosen by a hash of their text."}
    )
    max_validation_tokens: int = field(
        default=1_000_000, metadata={"help": "Validate on documents until they hold this many tokens."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Name or folder of a tokenizer (default: train one on the data)."}
    )
    vocabulary_size: int = field(default=4096, metadata={"help": "Size of the tokenizer that is trained."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens a sequence."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Keep token streams here, for other runs on the same data."}
    )


@dataclass(frozen=True)
class Corpus:
    """Text with two sides. Calling a side iterates over its documents, in the same order every time."""

    source: str  # for people: "embedded: Python 3.11.7 standard library"
    key: str  # changes when the text does; names cached token streams
    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]


def load_corpus(args: DataArguments) -> Corpus:
    """The corpus that args ask for. Raises InputError when they contradict or nothing is there."""
    if args.dataset_name and args.train_file:
        raise InputError(
            f"two sources: dataset_name {args.dataset_name!r} and train_file {args.train_file}. Give one of them."
        )
    if args.validation_file and not args.train_file:
        raise InputError(
            "validation_file goes with train_file. For a Hub dataset give validation_split; "
            "the standard library brings its own split."
        )
    if not 0 < args.validation_fraction < 1:
        raise InputError(f"validation_fraction is {args.validation_fraction}; it must lie between 0 and 1.")
    if args.train_file:
        return _file_corpus(args)
    return _hub_corpus(args) if args.dataset_name else embedded_corpus()


# ---- The standard library ----------------------------------------------------------------------------

STDLIB_VALIDATION_FRACTION = 0.08
_DROPPED_FOLDERS = {
    *("test", "tests", "idle_test", "lib2to3"),  # test data, some of it not even Python
    *("site-packages", "dist-packages", "_bundled", "__pycache__"),  # not the standard library
    *("encodings", "pydoc_data"),  # generated, or eighty copies of one stub
}
_GENERATED_FILES = re.compile(
    r"_sysconfigdata.*|_opcode_metadata|opcode|token|symbol|keyword|stringprep|locale|_compat_pickle|entities"
)
_SMALLEST = 400  # characters; below are stubs that re-export another module


def stdlib_documents(split: str) -> list[dict]:
    """Modules of the running Python's standard library: [{"name": "json/decoder.py", "text": …}, …].

    split: "train" or "validation". A hash of the module's path decides, so the split is the same on every
    machine and does not depend on the order of folders. Test data, generated tables and stubs are left out.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'validation'.")
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    documents = []
    for name in names:
        wanted = (_unit_hash(name) < STDLIB_VALIDATION_FRACTION) == (split == "validation")
        if wanted and _is_prose_or_code(name):
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            if len(text) >= _SMALLEST and not looks_generated(text):
                documents.append({"name": name, "text": text})
    if not documents:
        raise InputError(f"no {split} modules of the standard library as .py files under {root}. Give train_file.")
    return documents


def looks_generated(text: str) -> bool:
    """True for tables: few words, many digits, or endless lines."""
    words = sum(len(word) for word in re.findall(r"[a-z]{2,}", text))
    digits = sum(map(str.isdigit, text))
    longest = max(map(len, text.splitlines()), default=0)
    return words < 0.2 * len(text) or digits > 0.1 * len(text) or longest > 500


def embedded_corpus() -> Corpus:
    """The standard library as a corpus."""
    sides = {split: stdlib_documents(split) for split in ("train", "validation")}
    digest = hashlib.sha256()
    for document in sides["train"] + sides["validation"]:
        digest.update(document["text"].encode())
    return Corpus(
        source=f"embedded: Python {platform.python_version()} standard library",
        key=f"stdlib {digest.hexdigest()}",
        train=lambda: (document["text"] for document in sides["train"]),
        validation=lambda: (document["text"] for document in sides["validation"]),
    )


def _is_prose_or_code(name: str) -> bool:
    *folders, file = name.split("/")
    return not (
        _DROPPED_FOLDERS.intersection(folders)
        or any(folder.startswith("config-") for folder in folders)  # how this very Python was compiled
        or _GENERATED_FILES.fullmatch(file.removesuffix(".py"))
    )


# ---- Holding out ---------------------------------------------------------------------------------------


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def held_out(documents: Iterator[str], fraction: float, validation: bool) -> Iterator[str]:
    """One side of a split by the hash of each document's text: copies of a text fall on the same side."""
    return (text for text in documents if (_unit_hash(text) < fraction) == validation)


def _split_corpus(source: str, key: str, sides: tuple[Callable, Callable | None], fraction: float) -> Corpus:
    """A corpus from the given sides; without a validation side, a fraction of training is held out."""
    train, validation = sides
    if validation is not None:
        return Corpus(source, key, train, validation)
    return Corpus(
        source,
        f"{key} held out {fraction}",
        train=lambda: held_out(train(), fraction, validation=False),
        validation=lambda: held_out(train(), fraction, validation=True),
    )


# ---- Local files -----------------------------------------------------------------------------------------


def _file_corpus(args: DataArguments) -> Corpus:
    train = find_files(args.train_file)
    validation = find_files(args.validation_file) if args.validation_file else []
    stamps = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in train + validation]
    column = args.text_column
    return _split_corpus(
        f"{len(train)} file{'s' * (len(train) > 1)}: {', '.join(args.train_file)}",
        f"files {column} {stamps} {len(train)}",
        (lambda: read_files(train, column), (lambda: read_files(validation, column)) if validation else None),
        args.validation_fraction,
    )


def find_files(patterns: list[str]) -> list[Path]:
    """The files that patterns (files, folders, globs) name, in sorted order."""
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _reader(file))
        else:
            files = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not files:
            what = f"no {' '.join(_READERS)} files in folder" if path.is_dir() else "no such file:"
            raise InputError(f"{what} {pattern} (looked from {Path.cwd()}). Check the path, or quote the glob.")
        found += files
    for file in found:
        if not _reader(file):
            raise InputError(
                f"{file}: unknown extension. Known ones: {' '.join(_READERS)}, and .gz of all but .parquet."
            )
    return found


def read_files(files: list[Path], column: str) -> Iterator[str]:
    """The documents of files, in order; empty ones are left out."""
    for file in files:
        for text in _reader(file)(file, column):
            if text and text.strip():
                yield text.encode("utf-8", "replace").decode()  # JSON may smuggle in half of a surrogate pair


def _reader(file: Path) -> Callable[[Path, str], Iterator[str]] | None:
    suffixes = file.suffixes
    if suffixes[-1:] == [".gz"]:
        return _READERS.get("".join(suffixes[-2:-1])) if suffixes[-2:-1] != [".parquet"] else None
    return _READERS.get(file.suffix)


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file}: reading .parquet needs pyarrow: pip install pyarrow.") from error
    with pyarrow.parquet.ParquetFile(file) as table:
        _check_column(column, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.column(0).to_pylist()


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _get_text(_parse_json(line, f"{file}, line {number}"), column, f"{file}, line {number}")


def _read_json(file: Path, column: str) -> Iterator[str]:
    with _open_text(file) as stream:
        rows = _parse_json(stream.read(), str(file))
    if not isinstance(rows, list):
        raise InputError(f"{file} holds a JSON {type(rows).__name__}; a list of objects is needed, or use .jsonl.")
    for number, row in enumerate(rows):
        yield _get_text(row, column, f"{file}, item {number}")


def _read_text(file: Path, column: str) -> Iterator[str]:
    del column  # a text file is one document
    with _open_text(file) as stream:
        yield stream.read()


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_text}


def _open_text(file: Path):
    opener = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", errors="replace")


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}). Repair or remove it.") from error


def _get_text(row, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not an object with the key {column!r}.")
    _check_column(column, list(row), where)
    if not isinstance(row[column], str | None):
        raise InputError(f"{where}: {column!r} holds a {type(row[column]).__name__}, not text. Give text_column.")
    return row[column]


def _check_column(column: str, present: list[str], where: str) -> None:
    if column not in present:
        raise InputError(f"{where}: no column {column!r}. It has {', '.join(present) or 'none'}. Give text_column.")


# ---- The Hub ---------------------------------------------------------------------------------------------


def _hub_corpus(args: DataArguments) -> Corpus:
    if Path(args.dataset_name).exists():
        raise InputError(f"dataset_name {args.dataset_name!r} is a local path. Give it as train_file.")
    train = _load_hub(args, args.train_split)
    validation = _load_hub(args, args.validation_split) if args.validation_split else None
    name = " ".join(filter(None, [args.dataset_name, args.dataset_config_name]))
    prints = [getattr(rows, "_fingerprint", "streamed") for rows in (train, validation) if rows is not None]
    return _split_corpus(
        f"Hub: {name}, {args.train_split}",
        f"hub {name} {args.train_split} {args.validation_split} {args.text_column} {prints}",
        (lambda: _read_hub(train, args), (lambda: _read_hub(validation, args)) if validation is not None else None),
        args.validation_fraction,
    )


def _load_hub(args: DataArguments, split: str):
    try:
        import datasets
    except ImportError as error:
        raise InputError("a dataset from the Hub needs the datasets package: pip install datasets.") from error
    try:
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=args.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"could not load split {split!r} of {args.dataset_name!r} from the Hub: {error} "
            "Check the names and the network, or give local files as train_file."
        ) from error


def _read_hub(rows, args: DataArguments) -> Iterator[str]:
    for row in rows:
        text = _get_text(row, args.text_column, args.dataset_name)
        if text and text.strip():
            yield text.encode("utf-8", "replace").decode()
