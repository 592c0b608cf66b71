"""The project's own files agree with each other: one set of pins, what the README names, what importing loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


def test_environment_has_the_tested_versions_of_what_pyproject_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    extras = PROJECT["optional-dependencies"]
    wanted = pins([*PROJECT["dependencies"], *extras["notebooks"], *extras["test"], *extras["browser"]])
    tested = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert pins(pip["pip"]) == {name: tested[name] for name in wanted}
    assert pip["pip"][-1] == "--editable ."
    assert tested["torch"] == "==2.13.0"
    assert environment["channels"] == ["conda-forge"]
    for spec in conda:
        assert MatchSpec(spec).name is not None, spec
    python = next(spec for spec in conda if spec.startswith("python=")).removeprefix("python=")
    assert python in PROJECT["requires-python"] or tuple(map(int, python.split("."))) >= (3, 10)


def test_tested_versions_satisfy_pyproject():
    tested = pins((ROOT / "constraints.txt").read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    optional = (line for name, lines in extras.items() if name != "private" for line in lines)
    for line in [*PROJECT["dependencies"], *optional]:
        requirement = Requirement(line)
        version = tested[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version), f"{line} does not admit the tested {version}"


def test_importing_the_package_loads_the_core_only():
    heavy = "datasets pandas plotly ipywidgets tokenizers pyarrow papermill".split()
    code = f"import sys, entropy_lib; print([m for m in {heavy} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    # transformers itself may look at tokenizers; nothing else of the optional parts may come along
    assert set(ast.literal_eval(seen.strip().splitlines()[-1])) <= {"tokenizers"}


def test_public_names_import_from_the_package():
    import entropy_lib

    for name in entropy_lib.__all__:
        assert getattr(entropy_lib, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'attention_entropi'"):
        _ = entropy_lib.attention_entropi


def test_readme_s_commands_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"run", "test", "lab"} <= targets
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", readme)) <= targets


@pytest.mark.parametrize("missing", ["python", "venv"])
def test_a_missing_tool_gives_one_clear_line(tmp_path, missing):
    """make in a folder without .venv, with a Python that is absent or has no venv module."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    fake = tmp_path / "python-without-venv"
    fake.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    python = "no-such-python" if missing == "python" else str(fake)
    done = subprocess.run(["make", "-s", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error:")
    assert not (tmp_path / ".venv").exists()
