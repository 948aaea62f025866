"""How the base model's weights reach this rank: one function behind ``model.load_strategy``."""

from __future__ import annotations

from .base import BaseModel, Loader
from .sharded import load_sharded
from .stock import load_stock
from .whole import load_device_map, load_replicated

LOADERS: dict[str, Loader] = {
    "sharded": load_sharded,
    "stock": load_stock,
    "replicated": load_replicated,
    "device_map": load_device_map,
}
"""Strategy name to its function; the names are those of ``ModelSection.load_strategy``."""

__all__ = ["LOADERS", "BaseModel", "Loader"]
