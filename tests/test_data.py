"""Documents, splits, tokenizers and packed sequences."""

import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_nvfp4 import data, packing
from hf_nvfp4.data import DataArguments, InputError, load_corpus, stdlib_documents
from hf_nvfp4.packing import PackedDataset, StreamedDataset, TokenStream, tokenize, train_tokenizer

TEXTS = [f"Document {i}: " + f"the quick brown fox number {i * 7919} jumps. " * (i % 5 + 1) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def stdlib():
    return {split: stdlib_documents(split) for split in ("train", "validation")}


def arguments(**given) -> DataArguments:
    return DataArguments(**given)


# ---- The standard library --------------------------------------------------------------------------------


def test_stdlib_sides_are_disjoint_and_clean(stdlib):
    train, validation = ({document["name"] for document in stdlib[side]} for side in ("train", "validation"))
    assert not train & validation
    assert len(train) > 200 and len(validation) > 10
    texts = [{document["text"] for document in side} for side in stdlib.values()]
    assert not texts[0] & texts[1]
    for name in train | validation:
        assert not {"test", "tests", "site-packages", "encodings"} & set(name.split("/"))
        assert name.rsplit("/")[-1] not in ("topics.py", "entities.py", "token.py", "stringprep.py")


def test_stdlib_share(stdlib):
    train, validation = (sum(len(document["text"]) for document in stdlib[side]) for side in stdlib)
    assert 0.02 < validation / (train + validation) < 0.15


def test_stdlib_split_depends_on_the_name_alone(tmp_path, monkeypatch):
    """Two machines: other folders, other order of creation, another text of a module."""
    names = [f"package{i % 3}/module{i}.py" for i in range(200)]
    code = "def function(argument):\n    return argument\n" * 20
    sides = []
    for machine, order in (("a", names), ("b", names[::-1])):
        for name in order:
            path = tmp_path / machine / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code + f"# on machine {machine}\n")
        monkeypatch.setattr(data.sysconfig, "get_path", lambda _, machine=machine: str(tmp_path / machine))
        sides.append([[document["name"] for document in stdlib_documents(side)] for side in ("train", "validation")])
    assert sides[0] == sides[1]
    assert sorted(sides[0][0] + sides[0][1]) == sorted(names)
    assert sides[0][1]


def test_stdlib_survives_bytes_that_are_no_text(tmp_path, monkeypatch):
    code = b"def function(argument):\n    return argument\n" * 20
    for i in range(100):
        (tmp_path / f"module{i}.py").write_bytes(code + b"# \xff\xfe\n")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "\ufffd" in stdlib_documents("train")[0]["text"]


def test_stdlib_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="no train modules"):
        stdlib_documents("train")
    with pytest.raises(ValueError, match="must be 'train' or 'validation'"):
        stdlib_documents("test")


@pytest.mark.parametrize(
    "text", ["0x41, 0x42, 0x43,\n" * 100, "    'A': 1, 'B': 2,\n" * 100, "word " * 200, "1234 words\n" * 100]
)
def test_tables_look_generated(text):
    assert data.looks_generated(text)


def test_code_does_not_look_generated():
    assert not data.looks_generated('def add(first, second):\n    """The sum."""\n    return first + second\n' * 9)


def test_embedded_corpus_repeats_itself():
    corpus = load_corpus(arguments())
    assert "standard library" in corpus.source
    assert list(corpus.train()) == list(corpus.train())
    assert corpus.key == load_corpus(arguments()).key


# ---- Files -----------------------------------------------------------------------------------------------


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path, texts, column="text"):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)
    return path


def write_json(path, texts):
    path.write_text(json.dumps([{"text": text} for text in texts]))
    return path


def write_gz(path, texts):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.parquet", write_parquet), ("a.json", write_json), ("a.jsonl.gz", write_gz)],
)
def test_every_format_gives_the_same_documents(tmp_path, name, write):
    corpus = load_corpus(arguments(train_file=[str(write(tmp_path / name, TEXTS))], validation_fraction=0.2))
    train, validation = list(corpus.train()), list(corpus.validation())
    assert sorted(train + validation) == sorted(TEXTS)
    assert validation and len(validation) < 30
    again = load_corpus(
        arguments(train_file=[str(write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1]))], validation_fraction=0.2)
    )
    assert set(again.validation()) == set(validation)  # whatever the order and the file


def test_text_files_folders_and_globs(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not a known extension: a folder's other files are left alone")
    for pattern in (str(tmp_path), str(tmp_path / "*.txt")):
        corpus = load_corpus(arguments(train_file=[pattern], validation_file=[str(tmp_path / "b.txt")]))
        assert list(corpus.train()) == ["first", "second"]
        assert list(corpus.validation()) == ["second"]


def test_empty_texts_and_broken_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": "  "}\n{"text": "half a pair: \\ud800"}\n')
    assert list(data.read_files([path], "text")) == ["half a pair: ?"]


def test_own_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    assert list(data.read_files([path], "content")) == TEXTS


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, {"train_file": ["absent.jsonl"]}, "no such file: absent.jsonl"),
        ({"a.csv": "x"}, {"train_file": ["a.csv"]}, r"a.csv: unknown extension. Known ones: .parquet .jsonl"),
        ({"folder/a.csv": "x"}, {"train_file": ["folder"]}, "no .parquet .jsonl .json .txt files in folder folder"),
        ({"a.jsonl": '{"body": "x", "id": 1}'}, {}, "line 1: no column 'text'. It has body, id. Give text_column"),
        ({"a.jsonl": "{broken"}, {}, "line 1: not JSON"),
        ({"a.jsonl": "[1]"}, {}, "a list, not an object with the key 'text'"),
        ({"a.jsonl": '{"text": 3}'}, {}, "'text' holds a int, not text"),
        ({"a.json": '{"text": "x"}'}, {"train_file": ["a.json"]}, "holds a JSON dict; a list of objects is needed"),
        ({}, {"train_file": ["a.txt"], "dataset_name": "name/set"}, "two sources: dataset_name 'name/set'"),
        ({"a.txt": "x"}, {"validation_file": ["a.txt"]}, "validation_file goes with train_file"),
        ({"folder/a.txt": "x"}, {"dataset_name": "folder"}, "'folder' is a local path. Give it as train_file"),
        ({"a.txt": "x"}, {"train_file": ["a.txt"], "validation_fraction": 1.5}, "must lie between 0 and 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, files, given, message):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(load_corpus(arguments(**(given or {"train_file": ["a.jsonl"]}))).train())


def test_missing_parquet_column_lists_the_present_ones(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    with pytest.raises(InputError, match="no column 'text'. It has content, id"):
        list(data.read_files([path], "text"))


# ---- The Hub, without it ---------------------------------------------------------------------------------


class Rows(list):
    _fingerprint = "abc"


def fake_datasets(monkeypatch, load):
    errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, exceptions=errors))


def test_hub_dataset(monkeypatch):
    calls = []

    def load(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return Rows({"text": f"{split}: {text}"} for text in TEXTS)

    fake_datasets(monkeypatch, load)
    corpus = load_corpus(
        arguments(dataset_name="org/set", dataset_config_name="en", validation_split="dev", streaming=True)
    )
    assert list(corpus.train()) == [f"train: {text}" for text in TEXTS]
    assert list(corpus.validation()) == [f"dev: {text}" for text in TEXTS]
    assert calls == [("org/set", "en", "train", True), ("org/set", "en", "dev", True)]


def test_hub_dataset_held_out(monkeypatch):
    fake_datasets(monkeypatch, lambda name, config, split, streaming: Rows({"text": text} for text in TEXTS))
    corpus = load_corpus(arguments(dataset_name="org/set", validation_fraction=0.2))
    assert not set(corpus.train()) & set(corpus.validation())
    assert set(corpus.train()) | set(corpus.validation()) == set(TEXTS)


def test_hub_errors_are_sentences(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, load)
    with pytest.raises(InputError, match="could not load split 'train' of 'org/set' from the Hub: no route"):
        load_corpus(arguments(dataset_name="org/set"))
    fake_datasets(monkeypatch, lambda *args, **kwargs: Rows([{"content": "x"}]))
    with pytest.raises(InputError, match="org/set: no column 'text'. It has content"):
        list(load_corpus(arguments(dataset_name="org/set")).train())


# ---- Tokenizer -------------------------------------------------------------------------------------------


def test_tokenizer_round_trips_anything(tokenizer):
    every_byte = "".join(map(chr, range(0x250))) + "".join(chr(1 << k) for k in range(10, 17)) + "\U0010fffd"
    for text in (every_byte, "", " ", "\n\n\t  x  \r\n", "naïve – 数 🤗", "<|endoftext|> is text here", *TEXTS):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids)


def test_tokenizer_special_tokens_and_reload(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), packing.load_tokenizer(str(tmp_path))):
        assert (each.bos_token_id, each.eos_token_id, each.pad_token_id) == (0, 0, 1)
        assert each.eos_token == "<|endoftext|>" and len(each) == 300
        assert each(TEXTS[3])["input_ids"] == tokenizer(TEXTS[3])["input_ids"]


def test_tokenizer_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()


def test_tokenizer_errors(tmp_path):
    with pytest.raises(InputError, match="vocabulary_size is 100; 256 bytes and 2 special tokens need 258"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(InputError, match="could not load a tokenizer from"):
        packing.load_tokenizer(str(tmp_path))


def test_tokenizer_without_end(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    with pytest.raises(InputError, match="has no eos_token"):
        packing.load_tokenizer(str(tmp_path))


# ---- Packing ---------------------------------------------------------------------------------------------


def reference_stream(texts, tokenizer) -> list[int]:
    stream = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return stream


def test_packing_is_exact(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 500)  # several batches
    stream = tokenize(iter(TEXTS), tokenizer, "test")
    expected = reference_stream(TEXTS, tokenizer)
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens.tolist() == expected
    assert stream.documents == len(TEXTS) and stream.text_bytes == sum(len(text.encode()) for text in TEXTS)
    packed = PackedDataset(stream, 32, "text")
    assert len(packed) == len(expected) // 32
    assert torch.cat([example["input_ids"] for example in packed]).tolist() == expected[: len(packed) * 32]
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in packed)
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_streaming_gives_the_same_sequences(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 500)
    packed = PackedDataset(tokenize(TEXTS, tokenizer, "test"), 32, "text")
    streamed = StreamedDataset(lambda: iter(TEXTS), tokenizer, 32)
    for _ in range(2):  # two epochs
        assert [x["input_ids"].tolist() for x in streamed] == [x["input_ids"].tolist() for x in packed]
    loader = torch.utils.data.DataLoader(streamed, batch_size=None, num_workers=2)
    assert sorted(x["input_ids"].tolist() for x in loader) == sorted(x["input_ids"].tolist() for x in packed)


def test_limit_stops_after_the_document_that_reaches_it(tokenizer):
    first = len(reference_stream(TEXTS[:3], tokenizer))
    assert tokenize(TEXTS, tokenizer, "test", limit=first).documents == 3
    assert tokenize(TEXTS, tokenizer, "test", limit=first + 1).documents == 4


def test_fingerprint_is_of_the_tokens_whatever_their_type():
    tokens = np.arange(100)
    short, long = (TokenStream(tokens.astype(dtype), 5, 1) for dtype in (np.uint16, np.uint32))
    assert short.fingerprint() == long.fingerprint()
    assert short.fingerprint() != TokenStream(tokens[::-1].astype(np.uint16), 5, 1).fingerprint()


def test_pack_describes_itself(tokenizer, tmp_path):
    args = arguments(
        train_file=[str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], validation_fraction=0.3, sequence_length=16
    )
    packed = packing.pack(load_corpus(args), tokenizer, args)
    about = packed.about
    assert about["train_tokens"] == len(packed.train.stream.tokens)
    assert about["validation_bytes"] == packed.validation.stream.text_bytes > about["validation_tokens"]
    assert len(about["fingerprint"]) == 64 and "1 file" in packed.describe()


def test_pack_streaming(tokenizer, tmp_path):
    args = arguments(
        train_file=[str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], validation_fraction=0.3, sequence_length=16
    )
    whole = packing.pack(load_corpus(args), tokenizer, args)
    args.streaming = True
    streamed = packing.pack(load_corpus(args), tokenizer, args)
    assert streamed.about["train_tokens"] is None and "streamed" in streamed.describe()
    assert [x["input_ids"].tolist() for x in streamed.train] == [x["input_ids"].tolist() for x in whole.train]


def test_cache_holds_the_same_tokens_and_notices_changes(tokenizer, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    args = arguments(
        train_file=[str(file)], validation_fraction=0.3, sequence_length=16, cache_dir=str(tmp_path / "cache")
    )
    first = packing.pack(load_corpus(args), tokenizer, args)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(packing, "tokenize", lambda *args: pytest.fail("tokenized again"))
        assert packing.pack(load_corpus(args), tokenizer, args).about == first.about
    write_jsonl(file, [*TEXTS, "one more"])
    assert packing.pack(load_corpus(args), tokenizer, args).about["fingerprint"] != first.about["fingerprint"]


def test_failed_cache_write_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        packing.cached(str(tmp_path), "key", lambda: tokenize(TEXTS, tokenizer, "test"))
    assert not list(tmp_path.iterdir())


def test_empty_and_short_text(tokenizer, tmp_path):
    with pytest.raises(InputError, match="the training text is empty: no document with text"):
        PackedDataset(tokenize([], tokenizer, "test"), 32, "the training text")
    with pytest.raises(InputError, match=r"shorter than one sequence: \d+ tokens in 1 documents, sequence_length 4096"):
        PackedDataset(tokenize(TEXTS[:1], tokenizer, "test"), 4096, "the training text")
