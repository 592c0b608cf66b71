"""Makes this clone importable in a kernel that lacks the companion, such as Colab's, and goes to its notebooks; their
first cell runs it.

Installs what is missing, and nothing over what KEEP names: those are built for the machine's GPU and for the front
end that shows the widgets.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
KEEP = ("torch", "numpy", "plotly", "ipywidgets")
LOCAL = ("jupyterlab", "papermill", "kaleido")  # of use on a machine of one's own only


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unmet() -> list[Requirement]:
    """What notebooks need and this interpreter lacks. RuntimeError where only an upgrade of KEEP would help."""
    import tomllib  # not in Python 3.10, where `make` has installed everything

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    wanted = [requirement for requirement in map(Requirement, lines) if requirement.name not in LOCAL]
    found = {requirement.name: installed(requirement.name) for requirement in wanted}
    missing = [r for r in wanted if not (found[r.name] and r.specifier.contains(found[r.name], prereleases=True))]
    if old := [f"{r} (here: {found[r.name]})" for r in missing if r.name in KEEP and found[r.name]]:
        raise RuntimeError(f"this machine's own packages are too old and are left alone: {', '.join(old)}")
    return missing


def importable() -> bool:
    return getattr(importlib.util.find_spec("entropy_lib"), "origin", None) is not None


def main() -> None:
    if not importable():
        set_up()
    os.chdir(ROOT / "notebooks")  # the notebooks read ../data


def set_up() -> None:
    if missing := unmet():
        print(f"installing {', '.join(map(str, missing))}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder, "kept.txt")
            kept.write_text("\n".join(f"{name}=={installed(name)}" for name in KEEP if installed(name)))
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(kept)]
            subprocess.run([*command, *map(str, missing)], check=True)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    if "google.colab" in sys.modules:
        from google.colab import output

        output.enable_custom_widget_manager()  # anywidget's are such


if __name__ == "__main__":
    main()
