"""inputs: check everything that a run reads from outside, and write fingerprints of it.

This stage always runs, takes seconds, and writes the same bytes while nothing changed. All later stages depend on the
fingerprints, so new content of a local file or folder is always noticed; and on the versions of the packages that they compute
with. Models that can't be pruned are refused here, before any work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from replaceme.base.accelerators import is_accelerator
from replaceme.base.combinations import NEW_WEIGHTS
from replaceme.base.entries import SELF, dataset_title
from replaceme.base.errors import DatasetError, ParameterError, ReplaceMeError
from replaceme.base.files import new_folder, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.calibration.find import dataset_fingerprints, find_datasets, healing_fingerprints
from replaceme.calibration.own_text import choose_start, count_own_documents
from replaceme.calibration.sources import healing_params, list_sources, naming_heal_dataset
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.methods.refusals import check_model, streaming_obstacle
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.checks import check_weights
from replaceme.models.devices import free_memory, resolve_device
from replaceme.models.dtypes import dtype_name, stored_dtype, working_dtype
from replaceme.models.families import inputs_of
from replaceme.models.find import find_model, identity
from replaceme.models.formats import resolve_formats
from replaceme.models.memory import format_size, healing_bytes, proof_budget, weight_budget, weight_bytes
from replaceme.models.model import Model, layer_count, positions_of
from replaceme.models.model_files import CARD_FILES, TEXT_RECORD
from replaceme.models.recognition import check_cut
from replaceme.running.extras import require_package
from replaceme.running.stage import Stage
from replaceme.running.versions import FORMAT, FOUR_BIT, MODEL, SCORES, TEXT, versions
from replaceme.running.workspace import Workspace
from replaceme.selection.budget import apply_budget
from replaceme.selection.criteria import allowed_starts

# Calibration tokens for each channel of an MLP: with fewer, a warning; and with how many new weights were seen to gain on all
# kinds of text (docs/scale.md: 2 and 7 of a 1.5B model).
FEW_TOKENS, ENOUGH_TOKENS = 4, 7


def inspect_inputs(params: Params, work: Workspace) -> None:
    """Check device, model, text and tasks, and write their fingerprints.

    Raises:
        ReplaceMeError: something is missing, unreachable or can't be pruned; the message lists all problems.
    """
    problems: list[ReplaceMeError] = []
    content: dict[str, Any] = {
        work.text_versions.name: versions(TEXT),
        work.model_versions.name: versions((*MODEL, *(FOUR_BIT if params.use_4bit else ()))),
        work.score_versions.name: versions(SCORES),
    }
    with _collecting(problems):
        resolve_device(params.device)
        if params.use_4bit:
            require_package("bitsandbytes", "use_4bit")
    with _collecting(problems):
        model = find_model(params)
        # Without a device, neither is known which format it computes fastest nor how much is free.
        if has_device := not problems:
            params = resolve_formats(params, model)
        content[work.model_versions.name][FORMAT], content[work.score_versions.name][FORMAT] = params.dtype, params.eval_dtype
        checked = _check_model(params, model)
        if has_device:
            _log_needs(checked, model)
            _warn_of_a_training_that_may_not_fit(checked, model)
        _warn_of_little_text(params, model)
        model.tokenizer()
        content[work.model_input.name] = identity(model)
        content[work.tokenizer_input.name] = identity(model, model.tokenizer_files())
        content[work.card_input.name] = identity(model, model.files((*CARD_FILES, TEXT_RECORD)))
    with _collecting(problems):
        content[work.dataset_input.name] = dataset_fingerprints(params)
        content[work.own_text_input.name] = {"documents": count_own_documents(params)}
    content[work.heal_dataset_input.name] = {}
    if params.heal_tokens:
        with _collecting(problems), naming_heal_dataset(params):
            content[work.heal_dataset_input.name] = _check_healing_text(params)
    with _collecting(problems):
        content[work.tasks_input.name] = task_fingerprints(params)
    if problems:
        raise problems[0] if len(problems) == 1 else ReplaceMeError("\n".join(map(str, problems)))
    if (processors := os.cpu_count() or 1) > params.threads and resolve_device(params.device) == "cpu":
        logger.info("threads: %d of this machine's %d processors are used", params.threads, processors)
    with new_folder(work.inputs) as folder:
        for name, entry in content.items():
            write_json(folder / name, entry)
    tasks = ", ".join(content[work.tasks_input.name]) or "none"
    logger.info(
        "inputs: model %s (%d layers), text %s, tasks %s", model.name, layer_count(model), dataset_title(params.dataset), tasks
    )


def _check_model(params: Params, model: Model) -> Params:
    """Raise ReplaceMeError for a model that these settings can't prune; return them with the layers that a budget removes."""
    config, family = model.config(), model.family()
    kind, positions = config.model_type, positions_of(config)
    if params.max_length > positions:
        raise ParameterError(f"max_length: must be at most the model's {positions} positions, not {params.max_length}.")
    params = apply_budget(params, model, criterion_of(params))
    allowed_starts(params, layer_count(model), criterion_of(params))
    check_model(params, model, family)
    if family.detected:
        check_cut(model.skeleton, config, family)
        logger.warning(
            "model_path: the family '%s' is not described; its layers (%s), attention (%s) and MLP (%s) were recognised by "
            "their structure; profile and export will verify this on text",
            kind, family.layers, family.attention_output, family.mlp_output,
        )  # fmt: skip
    check_weights(model)
    return params


def _check_healing_text(params: Params) -> dict[str, Any]:
    """Return what identifies the text of the healing, if it is not the calibration's. Raises DatasetError if it has none."""
    text = healing_params(params)
    is_own = [source.name == SELF for source in list_sources(text)]
    if params.heal_dataset is None:
        if all(is_own):
            raise DatasetError(
                "heal_dataset: the calibration has no text but its own; name one, or self, which is written then."
            )
        return {}
    if any(is_own):
        # A tokenizer without a token that a text could start with is refused.
        choose_start(find_model(params).tokenizer())
    # Not only when the training begins, which may be hours later.
    for dataset in find_datasets(text):
        if dataset:
            dataset.check()
    return healing_fingerprints(params)


def _log_needs(params: Params, model: Model) -> None:
    """Log how much memory for weights the run will need at most.

    Raises:
        ParameterError: ``memory`` is too little, or the settings need the whole model in memory.
    """
    obstacle = streaming_obstacle(params)
    # Only the model of the calibration passes is packed.
    dtypes = {params.eval_dtype: False, params.dtype: params.use_4bit}
    budgets = [weight_budget(model, params, dtype, packed=packed, obstacle=obstacle) for dtype, packed in dtypes.items()]
    matrix = int(model.config().hidden_size) if METHODS[params.method].operator(params) else 0
    budgets.append(proof_budget(model, params, obstacle, matrix))
    stored = dtype_name(stored_dtype(model))
    # The export compares the weights of two models, and then computes with one of them.
    whole = max(2 * weight_bytes(model, stored), *(weight_bytes(model, dtype) for dtype in {*dtypes, working_dtype(model)}))
    most = min((each for each in budgets if each), default=whole)
    streamed = " (streamed where they are larger)" if any(budgets) else ""
    logger.info("memory: weights take up to %s%s", format_size(most), streamed)


def _warn_of_a_training_that_may_not_fit(params: Params, model: Model) -> None:
    """Warn if healing takes more memory than is free: hours may pass before it begins."""
    device = resolve_device(params.device)
    free = free_memory(device) // (1 if is_accelerator(device) else params.processes)
    if not params.heal_tokens or (needed := healing_bytes(model, params)) <= free:
        return
    if params.heal_weights != "lora":
        by_muon = healing_bytes(model, params.model_copy(update={"heal_optimizer": "muon"}))
        advice = "set heal_weights: lora" + (", or heal_optimizer: muon" if by_muon < needed else "")
    else:
        advice = "lower batch_size or max_length"
    logger.warning(
        "heal_tokens: the training takes about %s of memory, and %s are free; %s",
        format_size(needed),
        format_size(free),
        advice,
    )


def _warn_of_little_text(params: Params, model: Model) -> None:
    """Warn if there is less text than the new weights of an MLP need."""
    if not params.repair and params.transform not in NEW_WEIGHTS:
        return
    family = model.family()
    first, *_ = family.decoder_layers(model.skeleton(model.config()))
    channels = inputs_of(family.linear_of(first, "mlp_output"))
    if (tokens := params.dataset_size * params.max_length) < FEW_TOKENS * channels:
        logger.warning(
            "dataset_size: %d tokens at most are %.1f for each of an MLP's %d channels: new weights that are fitted on so "
            "little may be no better than plain removal; use %d documents or more", tokens, tokens / channels, channels,
            ceil(ENOUGH_TOKENS * channels / params.max_length),
        )  # fmt: skip


@contextmanager
def _collecting(problems: list[ReplaceMeError]) -> Iterator[None]:
    try:
        yield
    except ReplaceMeError as problem:
        problems.append(problem)


STAGE = Stage(name="inputs", run=inspect_inputs, writes=Workspace.inputs, methods=METHODS, always=True)
