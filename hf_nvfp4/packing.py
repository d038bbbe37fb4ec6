"""From documents to sequences of tokens: tokenizer, token streams, packed datasets.

Knows strings and tokens; where the strings come from is data.py's, models are nobody's here.
"""

import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from hf_nvfp4.data import Corpus, InputError

END, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1 of a tokenizer trained here
_BATCH_CHARACTERS = 1 << 20  # of text given to the tokenizer at once: bounds memory, feeds every core


@dataclass(frozen=True)
class TokenStream:
    """Documents as one row of tokens, each followed by the end-of-text token."""

    tokens: np.ndarray  # uint16 or uint32 [N]
    text_bytes: int  # UTF-8 bytes of the text they stand for; bits per byte need it
    documents: int

    def __str__(self) -> str:
        return f"{self.documents:,} documents, {self.text_bytes:,} bytes, {len(self.tokens):,} tokens"

    def fingerprint(self) -> str:
        """sha256 of the tokens as little-endian 32-bit integers, whatever they are stored as."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), 1 << 22):
            digest.update(self.tokens[start : start + (1 << 22)].astype("<u4").tobytes())
        return digest.hexdigest()


# ---- Tokenizer -------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocabulary_size: int, max_characters: int = 200_000_000):
    """A byte-level BPE tokenizer (any text survives encoding and decoding), trained on the first documents.

    <|endoftext|> is 0, and begins and ends text; <|pad|> is 1, apart, so that padding never hides an end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 2
    if vocabulary_size < smallest:
        raise InputError(f"vocabulary_size is {vocabulary_size}; 256 bytes and 2 special tokens need {smallest}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(_first_characters(documents, max_characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str):
    """The tokenizer of a name on the Hub or a folder. Raises InputError if it has no end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"could not load a tokenizer from {name!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name!r} has no eos_token to end documents with. Set one in its folder.")
    return tokenizer


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        if limit <= 0:
            return
        yield text
        limit -= len(text)


# ---- Token streams ---------------------------------------------------------------------------------------


def tokenize(documents: Iterable[str], tokenizer, label: str, limit: int | None = None) -> TokenStream:
    """All documents, or as many as hold `limit` tokens, as one stream. Shows a progress bar with the label."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    pieces, count, text_bytes = [np.empty(0, dtype)], 0, 0
    total = 0
    with tqdm(desc=label, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # None: on terminals
        for text, ids in _encode(documents, tokenizer):
            if limit is not None and total >= limit:
                break
            pieces.append(np.array(ids, dtype))
            size = len(text.encode())
            count, total, text_bytes = count + 1, total + len(ids), text_bytes + size
            bar.update(size)
    return TokenStream(np.concatenate(pieces), text_bytes, count)


def _encode(documents: Iterable[str], tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Each document with its token ids and the end-of-text id. Text that spells a special token stays text."""
    for batch in _batches(documents):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            yield text, [*ids, tokenizer.eos_token_id]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def cached(folder: str | None, key: str, build: Callable[[], TokenStream]) -> TokenStream:
    """The stream that `build` makes, kept under a hash of `key` in folder. A killed process leaves no half."""
    if folder is None:
        return build()
    path = Path(folder) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    if path.exists():
        with np.load(path) as saved:
            return TokenStream(saved["tokens"], int(saved["text_bytes"]), int(saved["documents"]))
    stream = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        try:
            np.savez(part, tokens=stream.tokens, text_bytes=stream.text_bytes, documents=stream.documents)
            part.close()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
    return stream


# ---- Sequences -------------------------------------------------------------------------------------------


class PackedDataset(Dataset):
    """A token stream cut into sequences; what is left over at the end is dropped."""

    def __init__(self, stream: TokenStream, length: int, what: str):
        self.stream, self.length = stream, length
        if not stream.documents:
            raise InputError(f"{what} is empty: no document with text. Check the files, the split and text_column.")
        if len(self) == 0:
            raise InputError(
                f"{what} is shorter than one sequence: {len(stream.tokens):,} tokens in {stream.documents} "
                f"documents, sequence_length {length}. Give more text or a smaller sequence_length."
            )

    def __len__(self) -> int:
        return len(self.stream.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        return _example(self.stream.tokens[start : start + self.length])


class StreamedDataset(IterableDataset):
    """Sequences tokenized on the way, in the order of the documents. Each epoch reads the source anew."""

    def __init__(self, documents: Callable[[], Iterator[str]], tokenizer, length: int):
        self.documents, self.tokenizer, self.length = documents, tokenizer, length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(_example, itertools.islice(self._sequences(), first, None, step))

    def _sequences(self) -> Iterator[list[int]]:
        waiting = []
        for _, ids in _encode(self.documents(), self.tokenizer):
            waiting += ids
            full = len(waiting) - len(waiting) % self.length
            for start in range(0, full, self.length):
                yield waiting[start : start + self.length]
            waiting = waiting[full:]

    def fingerprint(self, documents: int = 256) -> str:
        """sha256 of the first documents' tokens; the whole is known only after reading it all."""
        head = tokenize(itertools.islice(self.documents(), documents), self.tokenizer, "first documents")
        return f"first {documents} documents: {head.fingerprint()}"


def _example(tokens) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # [sequence_length]
    return {"input_ids": ids, "labels": ids}


# ---- All of it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedData:
    """What a training run needs of its data."""

    train: PackedDataset | StreamedDataset
    validation: PackedDataset
    about: dict  # for run.json: source, token counts, fingerprint, …

    def describe(self) -> str:
        """One line for people."""
        train = "streamed" if isinstance(self.train, StreamedDataset) else self.train.stream
        return f"data: {self.about['source']}; training: {train}; validation: {self.validation.stream}"


def pack(corpus: Corpus, tokenizer, args) -> PackedData:
    """Tokenize both sides of a corpus into sequences. args: DataArguments."""
    length, limit = args.sequence_length, args.max_validation_tokens
    key = f"{corpus.key} {_tokenizer_hash(tokenizer)}"
    held = cached(
        args.cache_dir,
        f"{key} validation {limit}",
        lambda: tokenize(corpus.validation(), tokenizer, "validation text", limit),
    )
    validation = PackedDataset(held, length, "the validation text")
    if args.streaming:
        train, train_tokens = StreamedDataset(corpus.train, tokenizer, length), None
        fingerprint = train.fingerprint()
    else:
        stream = cached(args.cache_dir, f"{key} train", lambda: tokenize(corpus.train(), tokenizer, "training text"))
        train, train_tokens = PackedDataset(stream, length, "the training text"), len(stream.tokens)
        fingerprint = stream.fingerprint()
    return PackedData(
        train,
        validation,
        about={
            "source": corpus.source,
            "train_tokens": train_tokens,
            "validation_tokens": len(held.tokens),
            "validation_bytes": held.text_bytes,
            "sequence_length": length,
            "fingerprint": fingerprint,
        },
    )


def _tokenizer_hash(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
