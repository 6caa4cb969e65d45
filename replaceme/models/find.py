"""Find the model that ``model_path`` names, and refuse an unusable one before any work, in one sentence.

Each model becomes a local folder: that of an embedded model, the user's own, or the snapshot of a hub repository at a commit.
Later stages read that folder and need no network.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from replaceme.base.errors import ModelError, excerpt
from replaceme.base.files import local_path, read_json
from replaceme.base.fingerprints import sha256_of
from replaceme.base.parameters import Params, nearest
from replaceme.base.progress import logger
from replaceme.models import embedded, hub
from replaceme.models.families import Family
from replaceme.models.memory import load_within_budget
from replaceme.models.model import (
    ADAPTER,
    ALL_FILES,
    FORMATS,
    LEFT_OUT,
    TOKENIZER_CONFIG,
    VOCABULARIES,
    WEIGHT_FILES,
    WEIGHTS,
    Model,
    stored_dtype,
)

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
        return Model(embedded.model_folder(name), name, about=embedded.MODELS[name].about)
    if folder.is_dir():
        return check_folder(Model(folder, folder.resolve().name, trust_remote_code=params.trust_remote_code))
    if folder.exists():
        raise ModelError(f"model_path: {excerpt(name)} is a file; give the model's folder.")
    if not hub.is_repository_id(name):
        raise ModelError(
            f"model_path: there is no folder {excerpt(name)}; give a model folder, a hub id or an embedded model's name."
        )
    commit = commit or hub.resolve_commit(name, "model", params.revision, "" if "/" in name else nearest(name, embedded.MODELS))
    snapshot = hub.snapshot(name, commit, ALL_FILES, ignored=(LEFT_OUT, "*/*"))
    return check_folder(Model(snapshot, name, commit, params.trust_remote_code))


def recorded_model(params: Params, record: Path) -> Model:
    """Return the model whose identity the inputs stage wrote to the file ``record``."""
    return find_model(params, read_json(record).get("commit"))


def identity(model: Model, files: Iterable[Path] | None = None) -> dict[str, object]:
    """Return what identifies files of a model (None: its weights, config and code): commit and repository, or their sha256."""
    if model.commit:
        return {"commit": model.commit, "repository": model.name}
    return {"sha256": sha256_of(model.files(WEIGHT_FILES) if files is None else files, model.folder)}


def calibration_model(params: Params, record: Path, obstacle: str | None = None) -> tuple[PreTrainedModel, Family]:
    """Load for calibration the model that the inputs stage wrote to ``record``; return it with its family's description.

    Args:
        params: the parameters.
        record: the file; walks of a streamed model have their scratch files on the same disk.
        obstacle: why it can't be streamed for this use; None if it can.
    """
    source = recorded_model(params, record)
    model = load_within_budget(
        source, params, params.dtype, packed=params.use_4bit, obstacle=obstacle, folder=record.parents[1]
    )
    return model, source.family()


def check_folder(model: Model) -> Model:
    """Return ``model`` if its folder has config, safetensors and tokenizer. Raises ModelError with the reason otherwise."""
    # A pipe or a device could be read for ever.
    if odd := [path.name for path in model.folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]:
        raise ModelError(f"model_path: {excerpt(min(odd))} of {model.name} is no regular file; put the file itself there.")
    adapter = (model.folder / ADAPTER).is_file()
    if not (model.folder / "config.json").is_file():
        if adapter:
            raise ModelError(f"model_path: {model.name} holds only an adapter; merge it into its base model first.")
        raise ModelError(f"model_path: {model.name} is not a model folder: it has no config.json.")
    if adapter:
        raise ModelError(
            f"model_path: {model.name} holds an adapter ({ADAPTER}) beside its model, and it would be left out; merge it into "
            "the model, or remove its files."
        )
    if not model.files(WEIGHTS):
        if model.files(PICKLED):
            raise ModelError(
                f"model_path: {model.name} has pickled weights only, which can run code when loaded; convert it to safetensors."
            )
        raise ModelError(f"model_path: {model.name} has no safetensors weights.")
    if not model.files(VOCABULARIES):
        raise ModelError(f"model_path: {model.name} has no tokenizer files.")
    for name in ("config.json", TOKENIZER_CONFIG):
        if elsewhere := [each for each in model.code_references(name) if "--" in each]:
            raise ModelError(
                f"model_path: auto_map in {name} of {model.name} names code of another repository ({elsewhere[0][:80]}), which "
                "can change at any time; use a copy of the model with that code in its folder, or without auto_map."
            )
    for path in model.copied_files():
        if not _is_within(path, model.folder):
            raise ModelError(
                f"model_path: {path.name} of {model.name} is a link out of the model's folder, and it would be copied into the "
                "result; put a copy of the file there."
            )
    return model


def _is_within(path: Path, folder: Path) -> bool:
    """Return whether a file really lies in a model's folder, or among the files of its repository in the hub's cache."""
    folder = folder.resolve()
    # A snapshot in the hub's cache consists of links: REPOSITORY/snapshots/COMMIT/FILE → REPOSITORY/blobs/SUM.
    places = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return any(path.resolve().is_relative_to(place) for place in places)


def check_weights(model: Model) -> None:
    """Raise ModelError if a weight file is damaged, a shard named by the index is missing, or a dtype can't be kept.

    Reads only headers.
    """
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
    stored, usual = model.stored(), stored_dtype(model)
    others = {name for name, place in stored.items() if FORMATS.get(place.format, usual) != usual}
    if others and (kept := others & {*model.names_of(model.skeleton(model.config()), stored).values()}):
        logger.info(
            "model_path: %d of %d weights are stored in another format than most (%s), such as %s: passes compute in that one, "
            "and the pruned model keeps each as it is stored",
            len(kept), len(stored), usual, min(kept),
        )  # fmt: skip
