"""The text that the dense model writes itself, in the pipeline: written once, and mixed with other text by its share."""

from pathlib import Path

from replaceme.base.documents import Documents
from replaceme.base.entries import Source
from replaceme.base.files import read_json
from replaceme.base.parameters import Params
from replaceme.pipeline.calibrate import calibrate
from replaceme.pipeline.generate import generate
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace


def prepared(params: Params, work: Workspace) -> Documents:
    for stage in (inspect_inputs, generate, calibrate):
        stage(params, work)
    return Documents.load(work.documents)


def test_own_text_is_mixed_with_a_file_by_its_share(params: Params, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    sources = (Source(str(params.dataset)), Source("self", 2.0))
    mixed = params.model_copy(update={"dataset": sources, "dataset_size": 9})
    documents = prepared(mixed, work)
    counts = read_json(work.documents / "documents.json")
    assert counts["documents"] == len(documents) == 9
    assert len(counts["sources"]) == 2
    share = counts["sources"][1]["tokens"] / counts["tokens"]
    assert abs(share - 2 / 3) <= mixed.max_length / counts["tokens"]
    written = Documents.load(work.own_text).documents
    assert read_json(work.own_text / "count.json") == {"documents": len(written)}
    own = {tuple(document.tolist()) for document in written}
    assert sum(tuple(document.tolist()) in own for document in documents.documents) == counts["sources"][1]["documents"]
    # The other text and the shares are no part of what is written.
    assert read_json(work.own_text_input) == {"documents": len(written)}


def test_a_dataset_without_it_has_nothing_written(params: Params, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    prepared(params, work)
    assert [path.name for path in work.own_text.iterdir()] == ["count.json"]


def test_it_can_be_all_of_the_text(params: Params, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    documents = prepared(params.model_copy(update={"dataset": (Source("self"),), "dataset_size": 4}), work)
    assert len(documents) == 4
    assert {len(document) for document in documents.documents} == {params.max_length}
