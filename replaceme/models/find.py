"""Find the model that ``model_path`` names.

Each model becomes a local folder: that of an embedded model, the user's own, or the snapshot of a hub repository at a commit.
Later stages read that folder and need no network.
"""

from collections.abc import Iterable
from pathlib import Path

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, excerpt
from replaceme.base.files import local_path, read_json
from replaceme.base.fingerprints import sha256_of
from replaceme.base.parameters import Params, nearest
from replaceme.models import embedded, hub
from replaceme.models.checks import check_folder
from replaceme.models.context import ModelContext
from replaceme.models.memory import load_within_budget
from replaceme.models.model import Model
from replaceme.models.model_files import ALL_FILES, LEFT_OUT, WEIGHT_FILES
from replaceme.running.workspace import Workspace


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
        return Model(embedded.model_folder(name), name, disclosure=embedded.MODELS[name].disclosure)
    if folder.is_dir():
        model = Model(folder, folder.resolve().name, trust_remote_code=params.trust_remote_code)
    elif folder.exists():
        raise ModelError(f"model_path: {excerpt(name)} is a file; give the model's folder.")
    elif hub.is_repository_id(name):
        hint = "" if "/" in name else nearest(name, embedded.MODELS)
        commit = commit or hub.resolve_commit(name, "model", params.revision, hint)
        snapshot = hub.snapshot(name, commit, ALL_FILES, ignored=(LEFT_OUT, "*/*"))
        model = Model(snapshot, name, commit, params.trust_remote_code)
    else:
        raise ModelError(
            f"model_path: there is no folder {excerpt(name)}; give a model folder, a hub id or an embedded model's name."
        )
    check_folder(model)
    return model


def recorded_model(params: Params, record: Path) -> Model:
    """Return the model whose identity the inputs stage wrote to the file ``record``."""
    return find_model(params, read_json(record).get("commit"))


def identity(model: Model, files: Iterable[Path] | None = None) -> dict[str, object]:
    """Return what identifies files of a model (None: its weights, config and code): commit and repository, or their sha256."""
    if model.commit:
        return {"commit": model.commit, "repository": model.name}
    return {"sha256": sha256_of(model.files(WEIGHT_FILES) if files is None else files, model.folder)}


def calibration_context(params: Params, work: Workspace, obstacle: str | None = None) -> ModelContext:
    """Load the dense model for calibration, with its text; scratch files lie beside the artifacts.

    Args:
        params: the parameters.
        work: the paths of the run.
        obstacle: why the model can't be streamed for this use; None if it can.
    """
    documents, source, folder = Documents.load(work.documents), recorded_model(params, work.model_input), work.artifact("")
    model = load_within_budget(source, params, params.dtype, packed=params.use_4bit, obstacle=obstacle)
    return ModelContext(model, source.family(), documents, params.batch_size, folder)
