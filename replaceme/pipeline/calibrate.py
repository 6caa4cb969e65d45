"""calibrate: draw the calibration documents."""

from dataclasses import asdict

from replaceme.base.files import new_folder, read_json, write_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.stage import Stage
from replaceme.base.workspace import Workspace
from replaceme.corpora.draw import draw_documents
from replaceme.corpora.find import find_dataset
from replaceme.models.find import recorded_model


def calibrate(params: Params, work: Workspace) -> None:
    """Write the calibration documents and their counts."""
    tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
    source = find_dataset(params, read_json(work.dataset_input).get("commits"))
    corpus = source.open()
    if corpus.running and params.pack:
        logger.info("pack: has no effect on a running text, whose documents are full already")
    documents, counts = draw_documents(
        corpus, tokenizer, params.dataset_size, params.max_length, pack=params.pack, seed=params.seed
    )
    with new_folder(work.documents) as folder:
        documents.save(folder)
        write_json(folder / "documents.json", asdict(counts))
    logger.info(
        "calibrate: %d documents, %d tokens from %s (%d cut to %d tokens, %d empty ones skipped)",
        counts.documents, counts.tokens, params.dataset, counts.cut, params.max_length, counts.empty,
    )  # fmt: skip
    if counts.documents < params.dataset_size:
        logger.warning("dataset_size: %s gave %d documents, not %d", params.dataset, counts.documents, params.dataset_size)


STAGE = Stage(
    name="calibrate",
    run=calibrate,
    params=(
        "dataset_config", "dataset_split", "dataset_column", "dataset_size", "max_length", "pack", "seed", "trust_remote_code",
    ),
    reads=(Workspace.tokenizer_input, Workspace.dataset_input, Workspace.text_versions),
    writes=Workspace.documents,
    code=("base", "models", "corpora"),
)  # fmt: skip
