"""From documents to token files: the one pipeline behind every corpus.

documents -> byte-level BPE tokenizer -> train.bin, validation.bin (flat token ids) -> manifest.json, last
"""

import errno
import hashlib
import heapq
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.std import tqdm  # not tqdm.auto: its notebook bar shows 0% for ever in papermill logs

FORMAT_VERSION = 1  # raise it when the same documents would give other token files, of pinned corpora too
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "validation")
FILES = ("train.bin", "validation.bin", "tokenizer.json")
TOKENIZER_BYTES = 64_000_000  # text that the tokenizer is trained on, at most: bounds memory and time
PIECE_CHARS, BATCH_CHARS = 1_000_000, 4_000_000  # longest text encoded at once; text encoded in parallel
# Longest run of letters, digits, signs or blanks that is looked at as one word: merging takes time with its square. The
# longest of the pinned corpora has 179, so that their tokens are those of GPT-2's pattern, which has no limit.
RUN_CHARS = 256
HASH_ALWAYS_BYTES = 64_000_000  # token files up to this size are hashed at every load, larger ones on demand


class Document(NamedTuple):
    """One text of a corpus. `package` is what the split keeps together or is made within, "" where there is none."""

    package: str
    path: str
    split: str  # "train" or "validation"
    text: str


@dataclass(frozen=True)
class Source:
    """What a corpus is made of. `documents` can be called again: the same texts in the same order."""

    name: str
    description: str
    licence: str
    key: str  # everything that decides the documents: pinned list, file hashes, filter settings
    documents: Callable[[], Iterable[Document]]
    packages: Callable[[], list[dict]] = list  # name, version, sha256 and licence of each package
    scan_bytes: int = 2**30  # text looked at to choose what the tokenizer trains on
    max_tokens: dict | None = None  # by split
    quiet: bool = False


def progress(items: Iterable, label: str, unit: str = "file", quiet: bool = False):
    """A bar on a terminal; elsewhere one line for the stage, nothing when quiet."""
    terminal = sys.stderr.isatty()
    if not terminal and not quiet:
        print(label, file=sys.stderr, flush=True)
    return tqdm(items, desc=label, unit=unit, disable=quiet or not terminal)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class GivenTokenizer(NamedTuple):
    """A tokenizer that is not to be trained: its tokenizer.json, and the token that ends a text."""

    json: str
    end: str


def token_files(
    source: Source, vocab_size: int, cache: Path, verify: bool = False, given: GivenTokenizer | None = None
) -> tuple[Path, dict]:
    """The folder with `source`'s token files and its manifest, built unless the cache holds it whole.

    Files that differ from the manifest in size are built again, and so are those that differ in SHA-256 where
    they are small or `verify` is set. Raises OSError (ENOSPC) that says what to do when the disk is full.
    """
    settings = [FORMAT_VERSION, source.name, source.key, vocab_size, source.max_tokens, TOKENIZER_BYTES]
    settings += given or []
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = Path(cache) / "tokens" / f"{source.name[:80]}-{fingerprint[:16]}"
    if (folder / "manifest.json").exists():
        manifest, fault = _read_manifest(folder, verify)
        if fault is None:
            return folder, manifest
        print(f"{source.name}: {fault}; building the token files again", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder, _build(source, vocab_size, folder, given)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk that holds {folder} while building {source.name!r}. Free some space "
            "or choose another disk with cache_dir= or the environment variable ENTROPY_LIB_CACHE, and call "
            "again: finished downloads are kept",
        ) from error


def _read_manifest(folder: Path, verify: bool) -> tuple[dict | None, str | None]:
    """The manifest and None, or what is wrong with the files it describes."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        np.dtype(manifest["dtype"])
        for name in FILES:
            path, known = folder / name, manifest["files"][name]
            if not path.exists() or path.stat().st_size != known["bytes"]:
                return None, f"{name} is missing or has the wrong size"
            if (verify or known["bytes"] <= HASH_ALWAYS_BYTES) and file_sha256(path) != known["sha256"]:
                return None, f"{name} does not match its SHA-256"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "manifest.json cannot be read"
    return manifest, None


def _build(source: Source, vocab_size: int, folder: Path, given: GivenTokenizer | None) -> dict:
    # Temporary names of this process, renamed at the end: two builds at once cannot spoil each other, and
    # an interrupted one leaves nothing that a later call would trust.
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in (*FILES, "manifest.json")}
    for stale in folder.glob("*.tmp"):
        if time.time() - stale.stat().st_mtime > 6 * 3600:
            stale.unlink(missing_ok=True)
    try:
        if given is None:
            texts = _tokenizer_texts(source)
            label = f"{source.name}: training the tokenizer on {sum(map(len, texts)) / 1e6:.1f} MB"
            pieces = (piece for text in progress(texts, label, quiet=source.quiet) for piece in _pieces(text))
            tokenizer, end = _train_tokenizer(pieces, vocab_size), END_OF_TEXT
            del texts
        else:
            tokenizer, end = Tokenizer.from_str(given.json), given.end
            tokenizer.no_truncation()
            tokenizer.no_padding()
        tokenizer.save(str(temporary["tokenizer.json"]))
        documents = progress(source.documents(), f"{source.name}: encoding", quiet=source.quiet)
        counts = _encode(tokenizer, end, documents, temporary, source.max_tokens or {})
        manifest = _manifest(source, tokenizer.get_vocab_size(), counts, temporary)
        temporary["manifest.json"].write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name, path in temporary.items():  # manifest.json is last
            os.replace(path, folder / name)
        return manifest
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _tokenizer_texts(source: Source) -> list[str]:
    """The training texts with the smallest content hash, TOKENIZER_BYTES at most."""
    heap, total, scanned, count, bound = [], 0, 0, 0, 2**64
    for document in source.documents():
        data = document.text.encode()
        count, scanned = count + 1, scanned + len(data)
        if document.split == "train":
            rank = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
            if rank < bound:
                heapq.heappush(heap, (-rank, len(data), document.text))
                total += len(data)
            while total > TOKENIZER_BYTES and len(heap) > 1:
                largest, size, _ = heapq.heappop(heap)
                bound, total = min(bound, -largest), total - size
        if scanned > source.scan_bytes:
            break
    if not heap:
        raise ValueError(f"corpus {source.name!r} has no text to train on: saw {count} documents, {scanned} bytes")
    return [text for _, _, text in sorted(heap, reverse=True)]


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: id 0 is the end of text, 1 to 256 are the bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    words = words.replace("+", f"{{1,{RUN_CHARS}}}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about PIECE_CHARS that end at a line end, or else between words, where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        ends = (text.rfind(mark, start + 1, start + PIECE_CHARS) for mark in "\n ")
        end = next((end for end in ends if end > 0), start + PIECE_CHARS)
        yield text[start:end]
        start = end
    yield text[start:]


def _encode(tokenizer: Tokenizer, end: str, documents: Iterable[Document], paths: dict, limits: dict) -> dict:
    """Write the token ids of each split; returns, by (split, package), the files, bytes and tokens."""
    dtype, end = token_dtype(tokenizer.get_vocab_size()), tokenizer.token_to_id(end)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is ordinary text
    counts: dict[tuple[str, str], Counter] = {}
    written = Counter()
    batch, chars = [], 0  # (split, package), piece, the tokens to put after it

    def flush():
        encoded = tokenizer.encode_batch_fast([piece for _, piece, _ in batch], add_special_tokens=False)
        for (group, _, after), encoding in zip(batch, encoded, strict=True):
            split = group[0]
            ids = np.array(encoding.ids + after, dtype=dtype)
            if split in limits:
                ids = ids[: max(0, limits[split] - written[split])]
            files[split].write(ids.tobytes())
            counts[group]["tokens"] += len(ids)
            written[split] += len(ids)

    with open(paths["train.bin"], "wb") as train, open(paths["validation.bin"], "wb") as validation:
        files = {"train": train, "validation": validation}
        for document in documents:
            if written[document.split] >= limits.get(document.split, float("inf")):
                continue
            group = (document.split, document.package)
            counts.setdefault(group, Counter()).update(files=1, bytes=len(document.text.encode()))
            *pieces, last = _pieces(document.text)
            for piece, after in [*((piece, []) for piece in pieces), (last, [end])]:
                batch.append((group, piece, after))
                chars += len(piece)
                if chars >= BATCH_CHARS:
                    flush()
                    batch, chars = [], 0
        flush()
    return counts


def _manifest(source: Source, vocab_size: int, counts: dict, paths: dict) -> dict:
    dtype = token_dtype(vocab_size)
    files = {name: {"bytes": paths[name].stat().st_size, "sha256": file_sha256(paths[name])} for name in FILES}
    totals = {unit: sum(seen[unit] for seen in counts.values()) for unit in ("files", "bytes")}
    totals |= {f"{split}_tokens": files[f"{split}.bin"]["bytes"] // dtype.itemsize for split in SPLITS}
    known = {package["name"]: package for package in source.packages()}
    groups = [(known[package], split, seen) for (split, package), seen in counts.items() if package in known]
    return {
        "format_version": FORMAT_VERSION,
        "name": source.name,
        "licence": source.licence,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "tokenizers_version": tokenizers.__version__,
        "totals": totals,
        "files": files,
        "packages": [{**facts, "split": split, **seen} for facts, split, seen in groups],
    }
