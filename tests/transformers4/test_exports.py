"""``make test-transformers4``: transformers 4.57 itself reads exported folders of all families as the same models.

It is installed beside the environment, in .venv/transformers4, and computes in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.export.transformers4 import transformers_4_obstacle
from replaceme.models.model import Model
from tests.conftest import KINDS, UNDESCRIBED, made_config
from tests.pipeline.closure import ROOT
from tests.transformers4 import reader

OLDER = ROOT / ".venv" / "transformers4"
# Another base than the one that transformers 4 takes where it finds none.
BASE = 50_000.0
CASES = [
    (kind, base)
    for kind in (*KINDS, *UNDESCRIBED)
    for base in (None, BASE)
    if base is None or getattr(made_config(kind), "rope_parameters", None)
]


@pytest.fixture(scope="module")
def folders(save_tiny: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float | None], Path]:
    """Exported folders, each with what transformers 4.57 computes of it."""
    made = {}
    ids = torch.randint(2, 400, (1, 80), generator=torch.Generator().manual_seed(1))
    for kind, base in CASES:
        options = dict(UNDESCRIBED.get(kind, {}))
        if base:
            rope = made_config(kind).rope_parameters
            nested = {name: {**own, "rope_theta": base} for name, own in rope.items() if isinstance(own, dict)}
            options["rope_parameters"] = nested or {**rope, "rope_theta": base}
        folder = tmp_path_factory.mktemp("exports") / "model"
        save_pruned(save_tiny(kind, **options), Edits("test", [1]), folder)
        save_file({"ids": ids}, folder / "ids.safetensors")
        made[kind, base] = folder
    path = os.pathsep.join([str(OLDER), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, reader.__file__, *map(str, made.values())], env={**os.environ, "PYTHONPATH": path}, check=True
    )
    return made


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_transformers_4_computes_the_same_logits(
    folders: dict[tuple[str, float | None], Path], kind: str, base: float | None
) -> None:
    folder = folders[kind, base]
    assert transformers_4_obstacle(json.loads((folder / "config.json").read_text(encoding="utf-8"))) is None
    read = load_file(folder / "read.safetensors")
    with torch.no_grad():
        logits = Model(folder, "exported").load("float32")(load_file(folder / "ids.safetensors")["ids"]).logits
    assert torch.allclose(read["logits"], logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    assert read["words"].tolist() == AutoTokenizer.from_pretrained(folder)(reader.TEXT)["input_ids"]
