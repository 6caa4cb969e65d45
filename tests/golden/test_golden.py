"""Results stay the same, to the bit: edits and weights of tiny models, and the demo's scores.

The goldens are of one kind of machine. On another one they are made anew, which the skipped test says. To change one on
purpose, delete it from ``goldens.json`` and run this file. ``python -m tests.golden.test_golden`` compares all settings too,
and all methods on all families.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.cases import CASES, LONG, digests, machine
from tests.pipeline.closure import ROOT

FILE = Path(__file__).with_name("goldens.json")
FAMILIES = sorted({kind for kind, _ in CASES.values()})


def known() -> dict[str, dict[str, str]]:
    """Return the goldens: kind of machine → case → digest."""
    goldens: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return goldens


def compare(cases: Mapping[str, tuple[str, dict[str, Any]]], folder: Path) -> tuple[list[str], list[str]]:
    """Return the cases that differ from their goldens, and those that had none, which are written down."""
    found, goldens = digests(cases, folder), known()
    golden = goldens.setdefault(machine(), {})
    new = [name for name in found if name not in golden]
    differ = [name for name in found if golden.setdefault(name, found[name]) != found[name]]
    if new:
        FILE.write_text(json.dumps(goldens, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return differ, new


def digest_scores() -> str:
    """Return the digest of the demo's scores in this checkout."""
    return hashlib.sha256((ROOT / "metrics" / "evaluation.json").read_bytes()).hexdigest()


def has_other_run() -> bool:
    """Return whether the checkout's scores are of a run on this machine, where the committed ones are of another."""
    demo = known()["demo"]
    return digest_scores() != demo["metrics/evaluation.json"] and machine() != demo["machine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_and_weights_are_those_of_the_goldens(tmp_path: Path, family: str) -> None:
    differ, new = compare({name: case for name, case in CASES.items() if case[0] == family}, tmp_path)
    assert not differ
    if new:
        pytest.skip(f"{len(new)} goldens were made anew for {machine()}: nothing was compared")


def test_the_scores_of_the_demo_are_those_of_the_goldens() -> None:
    if has_other_run():
        pytest.skip("metrics/ has a run of this machine, whose last digits may be others")
    assert digest_scores() == known()["demo"]["metrics/evaluation.json"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        differ, new = compare(CASES | LONG, Path(folder))
    print(f"{len(CASES | LONG)} cases: {len(differ)} differ {differ}, {len(new)} are new")
    sys.exit(bool(differ))
