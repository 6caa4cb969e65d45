"""Depth pruning of language models: replace a block of decoder layers by one linear map, folded into kept weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replaceme.api import Pruned, prune

__version__ = "0.1.0"
__all__ = ["Pruned", "__version__", "prune"]


def __getattr__(name: str) -> Any:
    """Return what ``replaceme.api`` offers, which is loaded when it is first asked for."""
    if name in ("Pruned", "prune"):
        return getattr(import_module("replaceme.api"), name)
    raise AttributeError(f"module 'replaceme' has no attribute '{name}'")
