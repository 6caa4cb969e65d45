"""inputs: check everything that a run reads from outside, and write fingerprints of it.

This stage always runs, takes seconds, and writes the same bytes while nothing changed. All later stages depend on the
fingerprints, so new content of a local file or folder is always noticed; and on the versions of the packages that they compute
with. Models that can't be pruned are refused here, before any work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replaceme.base.compute import resolve_device
from replaceme.base.errors import ParameterError, ReplaceMeError
from replaceme.base.files import new_folder, write_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.source import dataset_title
from replaceme.base.stage import Stage
from replaceme.base.versions import FOUR_BIT, MODEL, SCORES, TEXT, versions
from replaceme.base.workspace import Workspace
from replaceme.corpora.find import fingerprints, own_documents
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.methods.refusals import family_refusals, needs_whole
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.find import check_weights, find_model, identity
from replaceme.models.memory import room_of
from replaceme.models.model import CARD_FILES, layer_count
from replaceme.models.own_form import check_own_form
from replaceme.models.recognition import check_cut
from replaceme.selection.criteria import allowed_starts


def inspect_inputs(params: Params, work: Workspace) -> None:
    """Check device, model, text and tasks, and write their fingerprints.

    Raises:
        ReplaceMeError: something is missing, unreachable or can't be pruned; the message lists all problems.
    """
    problems: list[ReplaceMeError] = []
    content: dict[str, Any] = {}
    with _collecting(problems):
        resolve_device(params.device)
    with _collecting(problems):
        model = find_model(params)
        config, family = model.config(), model.family()
        kind, positions = config.model_type, getattr(config, "max_position_embeddings", None)
        if positions and params.max_length > positions:
            raise ParameterError(f"max_length: must be at most the model's {positions} positions, not {params.max_length}.")
        method = METHODS[params.method]
        if refused := family_refusals(params.model_dump(), kind, family):
            raise ParameterError(refused)
        if not method.plain(params):
            check_own_form(config, kind)
        allowed_starts(params, layer_count(model), criterion_of(params))
        if method.check:
            method.check(params, model.skeleton(config), family)
        if family.detected:
            check_cut(model.skeleton, config, family)
            logger.warning(
                "model_path: the family '%s' is not described; its layers (%s), attention (%s) and MLP (%s) were recognised by "
                "their structure; profile and export will verify this on text",
                kind, family.layers, family.attention_output, family.mlp_output,
            )  # fmt: skip
        check_weights(model)
        for dtype in {params.dtype, params.eval_dtype}:
            room_of(model, params, dtype, packed=params.use_4bit, whole=needs_whole(params))
        model.tokenizer()
        content[work.model_input.name] = identity(model)
        content[work.tokenizer_input.name] = identity(model, model.tokenizer_files())
        content[work.card_input.name] = identity(model, model.files(CARD_FILES))
    with _collecting(problems):
        content[work.dataset_input.name] = fingerprints(params)
        content[work.own_text_input.name] = {"documents": own_documents(params)}
    with _collecting(problems):
        content[work.tasks_input.name] = task_fingerprints(params)
    if problems:
        raise problems[0] if len(problems) == 1 else ReplaceMeError("\n".join(map(str, problems)))
    if (processors := os.cpu_count() or 1) > params.threads and resolve_device(params.device) == "cpu":
        logger.info("threads: %d of this machine's %d processors are used", params.threads, processors)
    content[work.text_versions.name] = versions(TEXT)
    content[work.model_versions.name] = versions((*MODEL, *(FOUR_BIT if params.use_4bit else ())))
    content[work.score_versions.name] = versions(SCORES)
    with new_folder(work.artifact("inputs")) as folder:
        for name, entry in content.items():
            write_json(folder / name, entry)
    logger.info(
        "inputs: model %s (%d layers), text %s, tasks %s",
        model.name,
        layer_count(model),
        dataset_title(params.dataset),
        ", ".join(content[work.tasks_input.name]) or "none",
    )


@contextmanager
def _collecting(problems: list[ReplaceMeError]) -> Iterator[None]:
    try:
        yield
    except ReplaceMeError as problem:
        problems.append(problem)


# It always runs, so its parameters and its code need no declaration.
STAGE = Stage(name="inputs", run=inspect_inputs, code=(), methods=METHODS)
