"""How the base model's weights reach this rank: one function behind ``model.load_strategy``."""

from __future__ import annotations

from .base import BaseModel, Loader
from .stock import load_stock

LOADERS: dict[str, Loader] = {"stock": load_stock}
"""Strategy name to its function; the names are those of ``ModelSection.load_strategy``."""

__all__ = ["LOADERS", "BaseModel", "Loader"]
