"""What a pruned model was made from: its dense model and its calibration text, as far as the files beside its folder say.

The card in the folder has the settings. Identities and documents lie in the work folder beside it, or among the pipeline's
artifacts. A folder that was copied or downloaded has its card alone, and nothing can be compared with its text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from replaceme.base.errors import ModelError, ParameterError, excerpt
from replaceme.base.files import read_json
from replaceme.base.params import Params, read_params
from replaceme.base.progress import logger
from replaceme.base.source import SELF, Source
from replaceme.base.task import unusable_text
from replaceme.base.workspace import Workspace

if TYPE_CHECKING:
    from replaceme.evaluation.seen import Calibration
    from replaceme.models.model import Model

# The settings on a card (``replaceme.export.card``), and those that name the calibration text.
_SETTINGS = re.compile(r"(?ms)^With replaceme-dvc [^\n]*`settings\.yaml`.*?^```yaml\n(.*?)^```$")
_TEXT = ("dataset", "dataset_config", "dataset_split", "dataset_column", "dataset_revision")


def calibration_of(model: Model) -> Calibration | None:
    """Return the text that a model was calibrated on; None for one not pruned here, or, with a warning, if the text is gone."""
    from safetensors import SafetensorError

    from replaceme.base.documents import Documents
    from replaceme.corpora.find import by_source, sources_of
    from replaceme.evaluation.seen import Calibration

    if (settings := _settings_of(model)) is None:
        return None
    work = _work_of(model)
    try:
        own = yaml.safe_load(settings) if work.dataset_input.is_file() else {}
        params = read_params(None, {key: own[key] for key in _TEXT if key in own})
        found, documents = read_json(work.dataset_input), Documents.load(work.documents)
        parts = [*zip(sources_of(params), by_source(found), strict=True)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, SafetensorError):
        logger.warning(
            "tasks: the calibration text of %s is not beside it (%s), so none is marked as seen", model.name,
            excerpt(work.documents, 150),
        )  # fmt: skip
        return None
    if not all(_is_of(source, known) for source, known in parts):
        logger.warning(
            "tasks: the text in %s is of a later run than %s, by its card, so none is marked as seen",
            excerpt(work.documents, 150), model.name,
        )  # fmt: skip
        return None
    return Calibration.of(params, found, documents, model.tokenizer())


def dense_of(params: Params, model: Model, name: str) -> Model:
    """Return the dense model that a pruned one is to stand beside; warn if it is not the one that this was made from.

    Args:
        params: ``trust_remote_code`` holds for both.
        model: the pruned model.
        name: a folder, a hub id or an embedded model's name. Of a hub model, the commit is the one that was pruned, if known.

    Raises:
        ParameterError: the name can't be one, or is that of the pruned model.
        ModelError: there is no such model, or it has another tokenizer, so that the two can't be compared item by item.
    """
    from replaceme.models.find import find_model, identity

    if wanted := unusable_text(name) if name.strip() else "a folder, a hub id or an embedded model's name":
        raise ParameterError(f"compare_with: must be {wanted}, not {excerpt(name)!r}.")
    record = _work_of(model).model_input
    known = read_json(record) if record.is_file() else {}
    commit = known.get("commit") if known.get("repository") == name else None
    try:
        dense = find_model(params.model_copy(update={"model_path": name, "revision": None}), commit)
        vocabulary = dense.tokenizer().get_vocab()
    except ModelError as error:
        raise ModelError(re.sub("^model_path: ", "compare_with: ", str(error))) from error
    if dense.folder.resolve() == model.folder.resolve():
        raise ParameterError("compare_with: is the model that is scored; name the one that it was made from.")
    if vocabulary != model.tokenizer().get_vocab():
        raise ModelError(
            f"compare_with: {excerpt(name)} has another tokenizer than {model.name}; name the model that it was made from."
        )
    if known and identity(dense) != known:
        logger.warning("compare_with: %s is not what %s was made from, by their files' sums", excerpt(name), model.name)
    return dense


def _work_of(model: Model) -> Workspace:
    """Return the paths of the run that made a model, whether or not its files are there."""
    places = []
    # A link to a result has nothing beside it.
    for folder in map(Path, (os.path.abspath(model.folder), os.path.realpath(model.folder))):
        pipeline = Workspace(folder.parent.parent)
        places.append(pipeline if folder == pipeline.model else Workspace.beside(folder))
    return next((work for work in places if work.model_input.is_file()), places[0])


def _settings_of(model: Model) -> str | None:
    """Return the settings on a model's card, as YAML; None if this program didn't write it."""
    from replaceme.models.model import CARD

    try:
        found = _SETTINGS.search((model.folder / CARD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def _is_of(source: Source, known: Mapping[str, Any]) -> bool:
    """Return whether an identity can be that of a source that the card names; of a file, the card has no more than its name."""
    from replaceme.corpora import embedded, streamed

    if source.name == SELF:
        return not known.keys() & {"sha256", "commits"}
    if source.name in embedded.TEXTS:
        return bool(known.get("sha256") == embedded.text_fingerprint(source.name))
    if "commits" in known:
        return set(known["commits"]) == {*streamed.repositories(source.name)}
    return bool(known.get("form") == Path(source.name).suffix)
