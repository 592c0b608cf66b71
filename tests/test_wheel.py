"""The library without its clone: what an installed wheel can do from any folder, and what it says it cannot."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import entropy_lib, sys
assert entropy_lib.__file__.startswith(sys.argv[1]), entropy_lib.__file__
from entropy_lib import inference_cost, load_corpus
from entropy_lib.explore import attention_inspector, penalty_explorer, run_explorer, temperature_explorer, tug_of_war
from entropy_lib.modeling import EntropyGPT2Config
from entropy_lib.private_inference.parties import private_python

print(len(inference_cost(EntropyGPT2Config(), 128, "spu-0.9.5").bytes) > 3)
data, tokenizer = load_corpus("sample", context_length=128)
print(len(data["train"]) > 1000)
penalty_explorer(), temperature_explorer(), attention_inspector(), run_explorer(), tug_of_war().html()
try:
    private_python()
except ImportError as error:
    print(error)
"""


def test_an_installed_wheel_needs_no_clone_but_for_what_it_names(tmp_path):
    pytest.importorskip("anywidget")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "entropy_lib", source / "entropy_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], check=True, cwd=tmp_path, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"entropy_lib"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ENTROPY_LIB_PRIVATE_PYTHON"}
    environment |= {"PYTHONPATH": str(site), "ENTROPY_LIB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(site)], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    priced, loaded, private = done.stdout.splitlines()
    assert (priced, loaded) == ("True", "True")
    assert "make private" in private


def test_the_example_runs_are_those_on_record():
    for path in (ROOT / "entropy_lib" / "explore" / "example_runs").iterdir():
        assert path.read_bytes() == (ROOT / "data" / "runs" / "pypi-small" / path.name).read_bytes()
