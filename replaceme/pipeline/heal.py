"""heal: train the shortened model toward the dense model's predictions, if heal_tokens is above 0."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from replaceme.base.errors import DatasetError
from replaceme.base.files import copy_tree, new_folder, read_json, read_remembered, remove, round_floats, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from replaceme.base.documents import Documents
    from replaceme.edits.edits import Edits
    from replaceme.models.context import ModelContext
    from replaceme.training.training import Curves

# Folder of the text that the model writes, beside the checkpoints.
OWN_TEXT = "own_text"


def heal(params: Params, work: Workspace) -> None:
    """Write the healed edits and metrics/heal.json; without healing, the edits are copied."""
    if not params.heal_tokens:
        # Torch takes seconds to load, and most runs train nothing.
        logger.info("heal: nothing to do")
        with new_folder(work.healed) as folder:
            copy_tree(work.repaired, folder)
        write_json(work.metric("heal"), {})
        return
    from replaceme.base.documents import TEXT
    from replaceme.base.group import all_gather
    from replaceme.models.devices import use_processor
    from replaceme.models.find import calibration_context
    from replaceme.models.memory import HEALING_OBSTACLE
    from replaceme.training.training import LAST, write_curves

    use_processor(params.threads)
    context = calibration_context(params, work, obstacle=HEALING_OBSTACLE)
    # The text of a stream could differ from process to process: all take the first one's.
    documents = all_gather(None if rank() else draw_text(params, work, context))[0]
    assert documents is not None
    edits, figures, curves = _train(params, work, context.with_documents(documents))
    if rank():
        return
    with new_folder(work.healed) as folder:
        edits.save(folder)
        write_curves(folder, curves)
        (folder / TEXT).mkdir()
        documents.save(folder / TEXT)
    write_json(work.metric("heal"), round_floats(figures))
    for name in (LAST, OWN_TEXT):
        remove(work.heal_checkpoints / name)


def draw_text(params: Params, work: Workspace, context: ModelContext) -> Documents:
    """Return the text to train on: of the sources of ``heal_dataset``, documents that the calibration didn't take.

    Args:
        params: the parameters.
        work: the paths of the run.
        context: the dense model, which writes the text that ``self`` names.
    """
    from replaceme.base.documents import HELD_OUT_EVERY
    from replaceme.calibration.draw import draw_after
    from replaceme.calibration.find import find_datasets
    from replaceme.calibration.sources import are_same_text, healing_params, identify_sources, list_sources, naming_heal_dataset
    from replaceme.models.find import recorded_model
    from replaceme.training.distillation import HELD_OUT_TOKENS, hold_out

    text, record = healing_params(params), work.dataset_input if params.heal_dataset is None else work.heal_dataset_input
    found, sources = find_datasets(text, read_json(record)), list_sources(text)
    datasets = {number: dataset for number, dataset in enumerate(found) if dataset}
    counts = [count["documents"] for count in read_json(work.documents / "documents.json")["sources"]]
    drawn = [*zip(identify_sources(params, read_json(work.dataset_input)), counts, strict=True)]
    identified = identify_sources(text, read_json(record))
    taken = {
        number: max((count for source, count in drawn if are_same_text(source, identified[number])), default=0)
        for number in datasets
    }
    # The model writes text only where it is named for the training.
    writing = [number for number, dataset in enumerate(found) if not dataset and params.heal_dataset is not None]
    whole = sum(sources[number].share for number in (*datasets, *writing))
    tokens = params.heal_tokens + HELD_OUT_TOKENS + params.max_length
    tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
    own_text = {
        number: _write_own_text(params, work, context, tokenizer, tokens * sources[number].share / whole) for number in writing
    }
    # More, as nothing else of the sources that are held out is trained on.
    drawn_tokens = tokens * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1)
    while True:
        corpora = {number: dataset.open(params.seed) for number, dataset in datasets.items()}
        with naming_heal_dataset(params):
            documents = draw_after({**corpora, **own_text}, taken, tokenizer, text, drawn_tokens)
        came, numbers = documents.tokens_by_domain, Counter(documents.domains)
        # A source that hasn't ended has more than its share of these: all but a document of each.
        least = max(drawn_tokens - (len(datasets) + len(writing)) * params.max_length, 0)
        used_up = [
            number
            for number in datasets
            if taken[number] and numbers[number] < HELD_OUT_EVERY
            if came.get(number, 0) <= least * sources[number].share / whole
        ]
        if not used_up:
            break
        names = ", ".join(sources[number].name for number in used_up)
        logger.warning("heal_dataset: the calibration left hardly any text of %s; the training takes all of it", names)
        taken.update(dict.fromkeys(used_up, 0))
    if not len(documents):
        raise DatasetError("heal_dataset: no text is left after tokenization; name a text with words.")
    for number, count in documents.taken(hold_out(documents)[0]).tokens_by_domain.items():
        if (needed := params.heal_tokens * sources[number].share / whole) > count:
            logger.warning(
                "heal_dataset: %s has %d tokens for this; they are read %.1f times", sources[number].name, count, needed / count
            )
    return documents


def _write_own_text(params: Params, work: Workspace, context: ModelContext, tokenizer: Any, tokens: float) -> list[Tensor]:
    """Return documents that the dense model writes, so many tokens of them; of more, the first ones are the same.

    They are kept beside the checkpoints until the training has ended, so that one that resumes doesn't write them again.
    """
    from replaceme.base.checkpoints import checkpoint_key
    from replaceme.base.documents import Documents
    from replaceme.calibration.own_text import MAX_TOKENS, write_batches
    from replaceme.calibration.sources import naming_heal_dataset
    from replaceme.models.devices import describe_environment
    from replaceme.models.kv_cache import eager_attention_where_faster

    length = min(params.max_length, MAX_TOKENS)
    count, folder = ceil(tokens / length), work.heal_checkpoints / OWN_TEXT
    settings = {
        **describe_environment(str(context.model.device)),
        "model": [read_json(work.model_input), read_json(work.tokenizer_input)],
        "text": [count, length, params.seed, params.dtype, params.use_4bit, params.threads],
    }
    key = checkpoint_key(settings, ())
    if read_remembered(folder / "key.json").get("key") == key:
        return Documents.load(folder).documents
    with eager_attention_where_faster(context.model, context.family), naming_heal_dataset(params):
        # Another seed than those of the calibration's own text and of the comparison with plain removal.
        documents = write_batches(context.model, tokenizer, count, length, params.seed + 2)
    with new_folder(folder) as new:
        Documents(documents).save(new)
        write_json(new / "key.json", {"key": key})
    return documents


def _train(params: Params, work: Workspace, context: ModelContext) -> tuple[Edits, dict[str, Any], Curves]:
    """Return the edits that give the trained model, the training's figures and the curves; ``context`` has the text."""
    from replaceme.base.accelerators import is_accelerator
    from replaceme.base.checkpoints import checkpoint_key
    from replaceme.base.documents import HELD_OUT_EVERY
    from replaceme.calibration.sources import healing_params, list_sources
    from replaceme.edits.edits import Edits
    from replaceme.models.dtypes import stored_dtype
    from replaceme.models.find import recorded_model
    from replaceme.training.distillation import LogitDistillation, plan_steps
    from replaceme.training.training import checkpoint_settings, train

    plan = Plan.load(work.plan)
    # With narrower MLPs, the states differ from the dense model's from the first layer on.
    first = 0 if plan.mlp_width else plan.blocks[0].layer_before_cut
    task = LogitDistillation(context, Edits.load(work.repaired), first, params.heal_weights, params.heal_rank)
    shares = [source.share for source in list_sources(healing_params(params))]
    steps = plan_steps(context.documents, shares, params.heal_tokens, params.heal_tokens_per_step, params.heal_learning_rate)
    if not steps.held_out:
        logger.warning(
            "heal: no entry has %d documents, so that none is held out, and nothing tells whether the training helps",
            HELD_OUT_EVERY,
        )
    if params.heal_optimizer == "muon":
        steps = replace(steps, muon=task.matrices, muon_products=context.model.dtype)
    settings = {
        **checkpoint_settings(task.batches.device),
        "model": read_json(work.model_input),
        "edits": sha256_below(work.repaired),
        "weights": [params.heal_weights, params.heal_rank if params.heal_weights == "lora" else 0, first],
        # A GPU whose memory doesn't suffice goes on from the checkpoint with smaller batches.
        "computing": [params.dtype, 0 if is_accelerator(task.batches.device) else params.batch_size],
    }
    parameters = task.trainable_parameters()
    curves, figures = train(task, parameters, steps, work.heal_checkpoints, checkpoint_key(settings, ()))
    if figures.get("held_out_loss_last", 0.0) > figures.get("held_out_loss_first", 0.0):
        logger.warning("heal: what was trained is worse on held-out documents than before; the weights from before are kept")
        edits, figures["kept_step"] = task.edits, 0
    else:
        edits = task.healed_edits(parameters, stored_dtype(recorded_model(params, work.model_input)))
    # Steps after those that are kept trained nothing of the result.
    tokens = sum(map(task.batches.token_count, steps.documents[: figures.get("kept_step")]))
    return edits, {"training_tokens": tokens, **figures}, curves


STAGE = Stage(
    name="heal",
    run=heal,
    params=(
        "heal_tokens", "heal_dataset", "heal_weights", "heal_learning_rate", "heal_tokens_per_step", "heal_rank",
        "heal_optimizer", "dataset_size", "dataset_config", "dataset_split", "dataset_column", "max_length", "pack", "seed",
        *PASS,
    ),
    reads=(
        Workspace.model_input, Workspace.tokenizer_input, Workspace.dataset_input, Workspace.heal_dataset_input,
        Workspace.documents, Workspace.plan, Workspace.repaired, Workspace.text_versions, Workspace.model_versions,
    ),
    writes=Workspace.healed,
    metrics=("heal",),
    shared=lambda params, work: params.heal_tokens > 0,
)  # fmt: skip
