"""Every family with the setting that docs/families.md gives it, every method, and every path of a setting: as on the processor.

What is compared is what the pruned models predict: edits can differ by more than the predictions do, where text is short.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.parameters import Params, read_params
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.pipeline.runner import run_stages
from replaceme.running.stage import FIT
from replaceme.running.workspace import Workspace
from tests.conftest import EXPERTS, NORM_AFTER_MLP, REPRESENTATIVES, UNDESCRIBED, made_model, made_text, made_tokenizer
from tests.device.conftest import REAL, set_float64
from tests.golden.cases import CASES, LONG, SMALL
from tests.helpers import logits_of

# What differs on a device besides the walk over the text, which all share.
PATHS = (
    "two blocks", "streamed", "chat", "transform diagonal", "transform two_vectors", "transform triangular",
    "transform orthogonal", "transform refit", "selection influence", "selection greedy", "cosine lbfgs", "cosine accurate",
    "cosine elastic net", "cosine two vectors", "slicegpt plain", "llm_pruner plain", "llm_streamline mlp",
    "linearpatch diagonal", "ghosted weighted",
)  # fmt: skip
# Of the families that the default suits, one is healed.
FAMILIES = {
    name: (kind, {} if "healed" in name and kind != "llama" else settings)
    for name, (kind, settings) in CASES.items()
    if "method" not in name
}
ON_LLAMA = {name: case for name, case in CASES.items() if "method" in name} | {
    **{f"llama: {name}": LONG[f"llama: {name}"] for name in PATHS},
    "llama: on both devices": ("llama", {"preset": "published", "device_map": "balanced"}),
    "llama: healed by muon": ("llama", {"heal_tokens": 600, "heal_tokens_per_step": 200, "heal_optimizer": "muon"}),
}
# The second of the two pretended ones.
LAST = torch.accelerator.device_count() - 1
# Methods that choose by the profile alone, which an earlier setting leaves.
BY_PROFILE = ("average", "shortgpt", "uidl")
# Largest relative difference of the predictions (Frobenius). Single tokens are stored in 16 bits, which makes more of a last
# bit; the solvers that go to the very minimum show it.
TOLERANCE, OF_TOKENS = 1e-5, 1e-4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the session, so that all settings of a family share a profile."""
    return tmp_path_factory.mktemp("results")


def _grouped(cases: Mapping[str, tuple[str, dict[str, Any]]], group: str) -> list[Any]:
    return [pytest.param(*case, id=name, marks=pytest.mark.xdist_group(group)) for name, case in cases.items()]


@pytest.mark.parametrize(("kind", "settings"), _grouped(FAMILIES, "families") + _grouped(ON_LLAMA, "llama"))
def test_a_device_gives_the_processors_result(kind: str, settings: dict[str, Any], folder: Path) -> None:
    removed, logits = fit(folder, kind, {**settings, "device_map": None}, "cpu")
    tolerance = OF_TOKENS if settings.get("solver") == "lbfgs" else TOLERANCE
    # Families of one form differ in nothing that needs float64.
    for float64 in (True, False) if kind in REPRESENTATIVES and not REAL else (True,):
        if not REAL:
            set_float64(there=float64)
        torch.accelerator.reset_peak_memory_stats(LAST)
        # The thread's present device is the first: a name without its number would show.
        own_removed, own = fit(folder, kind, settings, "cuda" if "device_map" in settings else f"cuda:{LAST}", str(float64))
        assert torch.accelerator.max_memory_allocated(LAST) or settings.get("method") in BY_PROFILE
        assert own_removed == removed
        assert float((own - logits).norm() / logits.norm()) <= tolerance, f"float64: {float64}"


def test_every_family_and_every_method_is_tried() -> None:
    assert {kind for kind, _ in FAMILIES.values()} >= {*REPRESENTATIVES, *NORM_AFTER_MLP, *EXPERTS, *UNDESCRIBED}
    assert {settings.get("method") for _, settings in ON_LLAMA.values()} >= METHODS.keys()


def fit(folder: Path, kind: str, settings: Mapping[str, Any], device: str, name: str = "") -> tuple[list[int], torch.Tensor]:
    """Return the layers that a setting removes, and the pruned model's predictions, computed on the processor."""
    work, params = Workspace(folder / kind / f"{device.partition(':')[0]}{name}"), make_params(folder, kind, settings, device)
    run_stages(params, work, ["inputs", *FIT])
    source, edits = Model(Path(params.model_path), kind), Edits.load(work.edits)
    model = source.load()
    with unfused(model, source.family(), edits):
        return edits.removed_layers, logits_of(model)


def make_params(folder: Path, kind: str, settings: Mapping[str, Any], device: str) -> Params:
    """Return the parameters of a run on a tiny model of a family."""
    source, text = folder / "models" / kind, folder / "text.txt"
    if not source.is_dir():
        made_model(kind, **UNDESCRIBED.get(kind, {})).save_pretrained(source)
        made_tokenizer().save_pretrained(source)
        text.write_text(made_text(600), encoding="utf-8")
    given = {"preset": "recommended", **SMALL, "dataset": str(text), **settings, "model_path": str(source), "device": device}
    given["layers_to_skip"] = given.pop("layers")
    return read_params(None, given, METHODS)
