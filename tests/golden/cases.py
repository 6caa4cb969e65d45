"""What the goldens cover: tiny models of every family, the settings that the README and docs/families.md name, all methods.

A case is pruned by ``replaceme.prune``; its digest is that of the edits' tensors and of the saved weights. ``LONG`` are all
settings on a Llama, and all methods on all families, which takes a quarter of an hour.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import replaceme
from replaceme.base.errors import ReplaceMeError
from replaceme.methods.registry import METHODS
from replaceme.models.devices import kind_of
from tests.conftest import EXPERTS, KINDS, NORM_AFTER_MLP, UNDESCRIBED, made_model, made_text, made_tokenizer

SMALL: Mapping[str, Any] = {
    "layers": 2, "keep_if_better": False, "dataset_size": 20, "max_length": 48, "batch_size": 4, "dtype": "float32",
    "tasks": [], "threads": 1, "device": "cpu",
}  # fmt: skip
HEALED: Mapping[str, Any] = {"heal_tokens": 600, "heal_tokens_per_step": 200}


def family_settings(kind: str) -> dict[str, dict[str, Any]]:
    """Return the settings that docs/families.md gives a family, by name."""
    if kind in NORM_AFTER_MLP:
        return {"norm after the MLP": {"transform": "orthogonal", "repair": False, **HEALED}}
    if kind in EXPERTS:
        return {"experts": {"transform": "dense", "repair": False}}
    if kind.startswith("falcon"):
        return {"falcon": {"transform": "joint"}}
    if kind in UNDESCRIBED:
        return {"not described": {"transform": "refit", "repair": False}}
    # The healing starts from what the default gives.
    return {"healed": dict(HEALED)}


# On a Llama alone: what a parameter changes.
_PUBLISHED = {"preset": "published"}
# What llm_pruner needs of a model with six layers.
PARTS: Mapping[str, Any] = {"min_distance_layer": 1, "max_distance_layer": 5, "max_length": 64}
_LLAMA: Mapping[str, dict[str, Any]] = {
    "published": _PUBLISHED,
    "remove": {"remove": "21%"},
    "tolerated loss": {"tolerated_loss": 0.2, "layers": 3},
    "two blocks": {**_PUBLISHED, "num_A": 2, "layers": 1, "merge_consecutive": False},
    "streamed": {"memory": "200KB"},
    "chat": {"dataset": ["self"], "max_length": 24},
    **{f"transform {name}": {"transform": name} for name in ("diagonal", "two_vectors", "triangular", "orthogonal", "refit")},
    **{f"alpha {alpha}": {**_PUBLISHED, "alpha": alpha} for alpha in (0.1, 10.0)},
    **{
        f"selection {name}": {**_PUBLISHED, "selection": name}
        for name in ("angular", "residual", "loss", "influence", "greedy")
    },
    **{
        f"cosine {solver}": {"method": "cosine", "solver": solver, "epochs": 2, "max_iterations": 20}
        for solver in ("adam", "lbfgs", "cg", "trust_region")
    },
    "cosine accurate": {"method": "cosine", "accurate": True, "epochs": 2},
    "cosine mse diagonal": {"method": "cosine", "loss": "mse", "transform": "diagonal", "epochs": 2},
    "cosine elastic net": {"method": "cosine", "loss": "elastic_net", "alpha": 0.1, "epochs": 2},
    "cosine two vectors": {"method": "cosine", "transform": "two_vectors", "solver": "lbfgs", "max_iterations": 20},
    "slicegpt plain": {"method": "slicegpt", "plain": True},
    "llm_pruner plain": {"method": "llm_pruner", "plain": True, "max_length": 64},
    "llm_streamline mlp": {"method": "llm_streamline", "llm_streamline_form": "mlp"},
    "linearpatch diagonal": {"method": "linearpatch", "linearpatch_form": "diagonal"},
    "ghosted weighted": {"method": "ghosted", "ghosted_weighted": True},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}: {name}": (kind, settings) for kind in (*KINDS, *UNDESCRIBED) for name, settings in family_settings(kind).items()
} | {f"llama: method {name}": ("llama", {"method": name, **(PARTS if name == "llm_pruner" else {})}) for name in METHODS}
LONG: dict[str, tuple[str, dict[str, Any]]] = {f"llama: {name}": ("llama", settings) for name, settings in _LLAMA.items()} | {
    f"{kind}: method {name}": (kind, {"method": name, **(PARTS if name == "llm_pruner" else {})})
    for kind in (*KINDS, *UNDESCRIBED)
    for name in METHODS
    if kind != "llama"
}


def machine() -> str:
    """Return what the last digits depend on."""
    return f"{kind_of('cpu')}, torch {torch.__version__}, transformers {transformers.__version__}"


def digests(cases: Mapping[str, tuple[str, dict[str, Any]]], folder: Path) -> dict[str, str]:
    """Prune each case and return its digest; that of a case that is refused for its family is ``refused``."""
    text = folder / "text.txt"
    text.write_text(made_text(600), encoding="utf-8")
    return {name: _digest(kind, settings, folder, text) for name, (kind, settings) in cases.items()}


def _digest(kind: str, settings: Mapping[str, Any], folder: Path, text: Path) -> str:
    source = folder / "models" / kind
    if not source.is_dir():
        made_model(kind, **UNDESCRIBED.get(kind, {})).save_pretrained(source)
        made_tokenizer().save_pretrained(source)
    chosen = {"dataset": str(text), **SMALL, **settings}
    # One place a family: its profile is computed once.
    try:
        pruned = replaceme.prune(source, save_path=folder / "results" / kind, overwrite=True, **chosen)
    except ReplaceMeError:
        return "refused"
    work = pruned.path.with_name(f"{pruned.path.name}.work")
    return _sha256([work / "artifacts" / "edits" / "edits.safetensors", *sorted(pruned.path.glob("*.safetensors"))])


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
