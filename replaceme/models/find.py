"""Find the model that ``model_path`` names, and refuse an unusable one before any work, in one sentence.

Each model becomes a local folder: that of an embedded model, the user's own, or the snapshot of a hub repository at a commit.
Later stages read that folder and need no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from replaceme.base.compute import resolve_device
from replaceme.base.errors import ModelError, excerpt
from replaceme.base.files import local_path, read_json
from replaceme.base.fingerprints import sha256_of
from replaceme.base.params import Params, nearest
from replaceme.models import embedded, hub
from replaceme.models.families import Family
from replaceme.models.model import COPIED_FILES, LEFT_OUT, WEIGHT_FILES, WEIGHTS, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_model(params: Params, commit: str | None = None) -> Model:
    """Return the model that ``params.model_path`` names, downloading missing files.

    Args:
        params: the parameters ``model_path``, ``revision`` and ``trust_remote_code``.
        commit: for a hub model, the commit that an earlier stage resolved.

    Raises:
        ModelError: there is no such model, it can't be reached, or can't be loaded safely.
    """
    name = params.model_path
    folder = local_path(name)
    if params.revision is not None and (name in embedded.MODELS or folder.is_dir()):
        raise ModelError(f"revision: is for hub models, but {excerpt(name)} is not one; use null.")
    if name in embedded.MODELS:
        return Model(embedded.model_folder(name), name)
    if folder.is_dir():
        return check_folder(Model(folder, folder.resolve().name, trust_remote_code=params.trust_remote_code))
    if folder.exists():
        raise ModelError(f"model_path: {excerpt(name)} is a file; give the model's folder.")
    if not hub.is_repository_id(name):
        raise ModelError(
            f"model_path: there is no folder {excerpt(name)}; give a model folder, a hub id or an embedded model's name."
        )
    commit = commit or hub.resolve_commit(name, "model", params.revision, "" if "/" in name else nearest(name, embedded.MODELS))
    snapshot = hub.snapshot(name, commit, (*WEIGHT_FILES, *COPIED_FILES), ignored=(LEFT_OUT, "*/*"))
    return check_folder(Model(snapshot, name, commit, params.trust_remote_code))


def recorded_model(params: Params, record: Path) -> Model:
    """Return the model whose identity the inputs stage wrote to the file ``record``."""
    return find_model(params, read_json(record).get("commit"))


def identity(model: Model, patterns: tuple[str, ...] = WEIGHT_FILES) -> dict[str, object]:
    """Return what identifies the files of a model that match ``patterns``: the commit and repository, or their sha256."""
    if model.commit:
        return {"commit": model.commit, "repository": model.name}
    return {"sha256": sha256_of(model.files(patterns), model.folder)}


def calibration_model(params: Params, record: Path) -> tuple[PreTrainedModel, Family]:
    """Load for calibration the model that the inputs stage wrote to ``record``; return it with its family's description."""
    source = recorded_model(params, record)
    return source.load(params.dtype, resolve_device(params.device), params.use_4bit, params.device_map), source.family()


def check_folder(model: Model) -> Model:
    """Return ``model`` if its folder has config, safetensors and tokenizer. Raises ModelError with the reason otherwise."""
    if not (model.folder / "config.json").is_file():
        if (model.folder / "adapter_config.json").is_file():
            raise ModelError(f"model_path: {model.name} holds only an adapter; merge it into its base model first.")
        raise ModelError(f"model_path: {model.name} is not a model folder: it has no config.json.")
    if not model.files(WEIGHTS):
        if model.files(PICKLED):
            raise ModelError(
                f"model_path: {model.name} has pickled weights only, which can run code when loaded; convert it to safetensors."
            )
        raise ModelError(f"model_path: {model.name} has no safetensors weights.")
    if not model.files(("tokenizer*", "spiece.model", "vocab.*")):
        raise ModelError(f"model_path: {model.name} has no tokenizer files.")
    return model


def check_weights(model: Model) -> None:
    """Raise ModelError if a weight file is damaged or a shard named by the index is missing; reads only headers."""
    for index in model.files(("*.safetensors.index.json",)):
        try:
            shards = set(read_json(index)["weight_map"].values())
            missing = {name for name in shards if not (model.folder / name).is_file()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"model_path: {index.name} of {model.name} can't be read.") from None
        if missing:
            raise ModelError(f"model_path: {model.name} lacks {excerpt(min(missing))}, which {index.name} names.")
    for path in model.files(WEIGHTS):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as failure:
            raise ModelError(f"model_path: {path.name} of {model.name} is damaged ({excerpt(failure, 150)}).") from None
