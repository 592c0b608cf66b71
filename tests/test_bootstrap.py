"""A kernel without the companion gets it from a clone by the notebooks' first cell, and keeps its own packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "notebooks" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_code_cell(path):
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


def test_every_notebook_begins_with_the_same_cell():
    assert len({first_code_cell(path) for path in NOTEBOOKS}) == 1
    assert "bootstrap.py" in first_code_cell(NOTEBOOKS[0])


def test_nothing_is_missing_here(bootstrap):
    assert bootstrap.unmet() == []


def test_missing_and_old_packages_are_installed_around_those_that_are_kept(bootstrap, monkeypatch):
    versions = {"plotly": "5.24.1", "ipywidgets": "7.7.1", "transformers": "4.57.0", "datasets": None}
    real = bootstrap.installed
    monkeypatch.setattr(bootstrap, "installed", lambda name: versions.get(name, real(name)))
    calls = []

    def pip(command, check):
        kept = Path(command[command.index("--constraint") + 1]).read_text().split("\n")
        calls.append((command, kept))

    monkeypatch.setattr(bootstrap.subprocess, "run", pip)
    monkeypatch.setattr(bootstrap.sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bootstrap, "importable", lambda: False)
    bootstrap.main()
    ((command, kept),) = calls
    assert [Requirement(line).name for line in command[command.index("--constraint") + 2 :]] == [
        "transformers",
        "datasets",
    ]
    assert kept == [f"torch=={real('torch')}", f"numpy=={real('numpy')}", "plotly==5.24.1", "ipywidgets==7.7.1"]


def test_an_old_torch_is_an_error_and_not_replaced(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "installed", lambda name: "1.13.0" if name == "torch" else "99")
    with pytest.raises(RuntimeError, match=r"left alone: torch>=.* \(here: 1.13.0\)"):
        bootstrap.unmet()


@pytest.mark.parametrize("place", ["entropy_lib", "drive/MyDrive/entropy_lib", None])
def test_the_cell_finds_a_clone(tmp_path, place):
    """In an interpreter that does not find the installed library, as in Colab's."""
    if place:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(ROOT, target_is_directory=True)
    program = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [folder for folder in sys.path if not folder.startswith({str(ROOT)!r}) or "site-packages" in folder]
sys.path.insert(0, "")
exec({first_code_cell(NOTEBOOKS[0])!r})
print(importlib.util.find_spec("entropy_lib").origin, pathlib.Path("../pyproject.toml").exists())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    if place:
        assert done.stdout.split() == [str(ROOT / "entropy_lib" / "__init__.py"), "True"], done.stderr
    else:
        assert "FileNotFoundError" in done.stderr
        assert "clone the project here" in done.stderr
