"""Look at everything that a run reads from outside, and write down its identity.

Always runs, in seconds, and writes the same bytes while nothing changed; all later stages hang on these files, so that
a local file or folder with new content is never taken for the old one. What can't be pruned is refused here, before any
work.
"""

from replaceme.compute import resolve_device
from replaceme.corpora import find_dataset
from replaceme.evaluation.texts import task_fingerprints
from replaceme.files import new_folder, write_json
from replaceme.fingerprints import sha256_of
from replaceme.models import MODEL_FILES, TOKENIZER_FILES, Model, find_model, layer_count
from replaceme.params import Params
from replaceme.progress import logger
from replaceme.selection import allowed_starts
from replaceme.workspace import Workspace


def inspect_inputs(params: Params, work: Workspace) -> None:
    """Check model, text and tasks, and write their fingerprints.

    Raises:
        ModelError, DatasetError, ParameterError: something is missing, unreachable or can't be pruned.
    """
    resolve_device(params.device)
    model = find_model(params)
    model.family()
    layers = layer_count(model)
    allowed_starts(params, layers)
    dataset = find_dataset(params)
    tasks = task_fingerprints(params)
    with new_folder(work.artifact("inputs")) as folder:
        write_json(folder / work.model_input.name, _identity(model, MODEL_FILES))
        write_json(folder / work.tokenizer_input.name, _identity(model, TOKENIZER_FILES))
        write_json(folder / work.dataset_input.name, dataset.fingerprint())
        write_json(folder / work.tasks_input.name, tasks)
    logger.info("inputs: model %s (%d layers), text %s, %d tasks", model.name, layers, params.dataset, len(tasks))


def _identity(model: Model, patterns: tuple[str, ...]) -> dict[str, object]:
    if model.commit:
        return {"commit": model.commit, "repository": model.name}
    return {"sha256": sha256_of(model.files(patterns), model.folder)}
