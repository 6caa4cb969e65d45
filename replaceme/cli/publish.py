"""Upload a pruned model to the hub, with its scores on its card. A command, not a stage.

A stage's output must not change afterwards, so the card in the pipeline's ``artifacts/model`` has no scores. The uploaded card
has them, as those of the report and of `replaceme prune` have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from replaceme.base.errors import ParameterError, excerpt
from replaceme.base.progress import logger
from replaceme.methods.registry import METHODS
from replaceme.pipeline.results import result_lock
from replaceme.running.entry import Parser, plain_parser
from replaceme.running.extras import require_package
from replaceme.running.stage import pipeline_params
from replaceme.running.workspace import Workspace


def push(arguments: Sequence[str]) -> None:
    """Upload a pruned model to the hub."""
    options = make_parser().parse_args(arguments)
    folder = options.save_path or Workspace().model
    work = Workspace.for_result(folder.absolute())
    # No run may replace the files while they are uploaded.
    with result_lock(work) if os.access(work.root, os.W_OK) else nullcontext():
        _upload(folder, options.repo_id, options.private)


def make_parser() -> Parser:
    """Return the command's parser."""
    description = "Upload a pruned model to the hub, with its card. The token comes from the environment variable HF_TOKEN."
    parser = plain_parser("replaceme push", description, "replaceme push --save_path smaller --repo_id you/smaller --private")
    parser.add_argument(
        "--repo_id", required=True, metavar="USER/NAME", help="the repository; it is created if it doesn't exist"
    )
    parser.add_argument("--save_path", type=Path, metavar="FOLDER", help="the result [the pipeline's artifacts/model]")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    return parser


def _upload(folder: Path, repo_id: str, private: bool) -> None:
    from replaceme.models import hub
    from replaceme.models.model import Model
    from replaceme.models.model_files import CARD, REFERENCE
    from replaceme.pipeline.report import render_run_card

    pipeline = Workspace()
    files: dict[str, Path | bytes] = {path.name: path for path in Model(folder, folder.name).files()}
    if (reference := folder / REFERENCE).is_file():
        files[REFERENCE] = reference
    if not {"config.json", CARD} <= files.keys():
        raise ParameterError(f"save_path: there is no pruned model in {folder}; run `dvc repro` or `replaceme prune` first.")
    if folder.resolve() == pipeline.model.resolve():
        _check_scores()
        files[CARD] = render_run_card(pipeline_params(METHODS), pipeline, repo_id).encode()
    url = hub.upload(repo_id, files, private)
    logger.info("the model is at %s", url)


def _check_scores() -> None:
    """Raise ParameterError unless the pipeline's model, scores and settings are up to date."""
    require_package("dvc", "save_path: the pipeline's model")

    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            changed = repo.status(["export", "evaluate"])
    except DvcException as failure:
        raise ParameterError(f"save_path: {excerpt(failure, 200)} (run it inside the repository).") from failure
    if changed:
        stage = next(iter(changed))
        raise ParameterError(
            f"save_path: the stage {stage} is not up to date, so its scores may be those of another model; run `dvc repro`."
        )
