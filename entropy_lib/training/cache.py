"""Where downloads, token files and unfinished runs are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else the environment variable ENTROPY_LIB_CACHE, else the user's cache folder."""
    return Path(cache_dir or os.environ.get("ENTROPY_LIB_CACHE") or user_cache_dir("entropy_lib")).expanduser()
