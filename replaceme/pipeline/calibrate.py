"""calibrate: draw the calibration documents."""

from dataclasses import asdict, astuple

from replaceme.base.documents import Documents
from replaceme.base.entries import dataset_title
from replaceme.base.files import new_folder, read_json, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.calibration.draw import Counts, draw_documents
from replaceme.calibration.find import find_datasets
from replaceme.calibration.sources import list_sources
from replaceme.models.find import recorded_model
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def calibrate(params: Params, work: Workspace) -> None:
    """Write the calibration documents and their counts, in all and by source."""
    tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
    sources, datasets = list_sources(params), find_datasets(params, read_json(work.dataset_input))
    corpora = [source.open(params.seed) if source else Documents.load(work.own_text) for source in datasets]
    documents, counts = draw_documents(corpora, tokenizer, params)
    total = Counts(*map(sum, zip(*map(astuple, counts), strict=True)))
    with new_folder(work.documents) as folder:
        documents.save(folder)
        # In the order of ``dataset``: names of files say nothing about their content.
        write_json(folder / "documents.json", {**asdict(total), "sources": [*map(asdict, counts)]})
    logger.info(
        "calibrate: %d documents, %d tokens from %s (%d cut to %d tokens, %d empty ones skipped)",
        total.documents, total.tokens, dataset_title(params.dataset), total.cut, params.max_length, total.empty,
    )  # fmt: skip
    if total.documents < params.dataset_size:
        logger.warning(
            "dataset_size: %s gave %d documents, not %d", dataset_title(params.dataset), total.documents, params.dataset_size
        )
    whole = sum(source.share for source in sources)
    for source, count in zip(sources, counts, strict=True):
        # An earlier end of a text is no rounding to whole documents.
        if total.tokens * source.share / whole - count.tokens > params.max_length:
            logger.warning(
                "dataset: %s has %d tokens only, %.0f %% of the text instead of %.0f %%",
                source.name, count.tokens, 100 * count.tokens / total.tokens, 100 * source.share / whole,
            )  # fmt: skip


STAGE = Stage(
    name="calibrate",
    run=calibrate,
    params=(
        "dataset_config", "dataset_split", "dataset_column", "dataset_size", "max_length", "pack", "seed", "trust_remote_code",
    ),
    reads=(Workspace.tokenizer_input, Workspace.dataset_input, Workspace.own_text, Workspace.text_versions),
    writes=Workspace.documents,
)  # fmt: skip
