"""Versions of the packages that a result is made with, as installed; no package is imported.

A new version of a package can change the last digits of a result, or more. The inputs stage writes one file for each group
below; a stage depends on the file of the group that it computes with. So a new lm-eval repeats the scores alone, a new torch
everything.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# Reading text and tokenizing it; passes, solvers and the saved model; scoring.
TEXT = ("datasets", "mwparserfromhell", "numpy", "safetensors", "tokenizers", "torch", "transformers")
MODEL = ("numpy", "safetensors", "scipy", "torch", "transformers")
SCORES = (*MODEL, "datasets", "lm-eval", "mwparserfromhell", "tokenizers")
# What 4-bit linears compute with.
FOUR_BIT = ("bitsandbytes",)
# Beside the versions: the number format, with auto resolved.
FORMAT = "number format"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return ``{package: version}``, with the build (``2.9.0+cpu``) if the version names it; a missing package has ``none``."""
    return {package: _version(package) for package in sorted(packages)}


def list_versions(packages: Mapping[str, str]) -> str:
    """Return versions in words: ``numpy 2.4.6, torch 2.13.0+cpu``."""
    return ", ".join(f"{package} {packages[package]}" for package in sorted(packages))


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
