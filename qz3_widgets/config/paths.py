"""Folders outside a run: the cache for what is built or unpacked once on a machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def default_cache_dir() -> Path:
    """``QZ3_CACHE_DIR``, else ``qz3_widgets`` in the platform's own cache folder."""
    given = os.environ.get("QZ3_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qz3_widgets"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qz3_widgets"
