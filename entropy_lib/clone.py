"""The clone of the project, if the library is imported from one: what an installed package does not hold is there."""

from pathlib import Path

_PARENT = Path(__file__).resolve().parent.parent
CLONE = _PARENT if (_PARENT / "pyproject.toml").is_file() else None
