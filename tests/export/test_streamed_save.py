"""The export of a streamed model: the files of a resident one to the byte, and nothing but a layer in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from replaceme.base.documents import Documents
from replaceme.base.fingerprints import sha256_below
from replaceme.edits.edits import Edits
from replaceme.export import save as export
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models.memory import measure_parts
from replaceme.models.model import Model
from tests.conftest import EXPERTS, WIDTH, made_model
from tests.helpers import edits_of, load_tensors


def room(source: Model, dtype: str = "float32") -> int:
    """Return room for what lies outside the layers, and for one layer."""
    return sum(measure_parts(source, dtype))


def saved(source: Model, edits: Edits, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the sums of the files that are saved without limit, and streamed."""
    assert save_pruned(source, edits, folder / "whole") == save_pruned(source, edits, folder / "streamed", room(source))
    return sha256_below(folder / "whole"), sha256_below(folder / "streamed")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gemma2", "mixtral"])
def test_the_files_are_the_same_to_the_byte(save_tiny: Callable[..., Model], kind: str, tmp_path: Path) -> None:
    whole, streamed = saved(save_tiny(kind), edits_of(2, 2, made_model(kind)), tmp_path)
    assert streamed == whole


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_several_files_are_written_as_transformers_divides_the_weights(
    save_tiny: Callable[..., Model], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_SIZE", "60KB")
    whole, streamed = saved(save_tiny(kind), edits_of(2, 2, made_model(kind)), tmp_path)
    assert len([name for name in streamed if name.endswith(".safetensors")]) > 1
    if kind in EXPERTS:
        assert max(path.stat().st_size for path in (tmp_path / "streamed").glob("*.safetensors")) < 70_000
    else:
        assert streamed == whole
    found, expected = (load_tensors(tmp_path / name) for name in ("streamed", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": {1: torch.stack([torch.arange(48) % 3 + 1, torch.arange(48)], dim=1)}},
        {"mixtures": {1: {1: -1.0, 2: 1.0, 3: 1.0}}},
        {"operators": {1: torch.tensor(1.5, dtype=torch.float64)}},
        {"operators": {1: torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)}},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_of_edit_is_written(
    save_tiny: Callable[..., Model], change: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    whole, streamed = saved(save_tiny(tie_word_embeddings=tied), Edits("test", [2, 3], **change), tmp_path)
    assert streamed == whole


def test_weights_of_two_dtypes_keep_them(save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = save_tiny(dtype=torch.bfloat16)
    mixed = Model(tmp_path / "mixed", "mixed")
    save_pruned(source, Edits("test", []), mixed.folder)
    parts = load_tensors(mixed.folder)
    widened = {name: each.float() if "norm" in name else each for name, each in parts.items()}
    save_file(widened, mixed.folder / "model.safetensors")
    whole, streamed = saved(mixed, edits_of(2, 2, made_model()), tmp_path)
    assert streamed == whole


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_a_streamed_proof_finds_the_same_errors(
    save_tiny: Callable[..., Model], kind: str, documents: Documents, tmp_path: Path
) -> None:
    source, edits, pruned = save_tiny(kind), edits_of(2, 2, made_model(kind)), Model(tmp_path, "pruned")
    save_pruned(source, edits, tmp_path)
    assert verify_export(source, pruned, edits, documents, room(source)) == verify_export(source, pruned, edits, documents)
