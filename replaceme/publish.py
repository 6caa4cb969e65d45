"""Upload a pruned model to the hub, with its scores on its card. A command, not a stage.

A stage's output must not change afterwards, so the card in the pipeline's ``artifacts/model`` has no scores. The uploaded card
has them, and so does the card of a console script.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from replaceme.base.claims import in_use
from replaceme.base.entry import Parser, plain_parser, run_command
from replaceme.base.errors import ParameterError, excerpt
from replaceme.base.extras import need
from replaceme.base.files import read_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.stage import pipeline_params
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import METHODS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


# What is kept, by the metrics' names.
KEPT = {
    "retention": "\n\n{} of the dense model's average accuracy is kept; ± is one standard error.",
    "retention_above_chance": " Of what is above chance, {} is.",
}


def push_to_hub() -> NoReturn:
    """Upload a pruned model to the hub."""
    run_command(partial(push, prog=None))


def push(arguments: Sequence[str], prog: str | None = "replaceme push") -> None:
    """Read the command line, and upload."""
    _push(parser(prog).parse_args(arguments))


def parser(prog: str | None = None) -> Parser:
    """Return the command's parser; ``prog`` is how it is called, if not by the script's name."""
    description = "Upload a pruned model to the hub, with its card. The token comes from the environment variable HF_TOKEN."
    parser = plain_parser(prog, description, "replaceme push --save_path smaller --repo_id you/smaller --private")
    parser.add_argument(
        "--repo_id", required=True, metavar="USER/NAME", help="the repository; it is created if it doesn't exist"
    )
    parser.add_argument("--save_path", type=Path, metavar="FOLDER", help="the result [the pipeline's artifacts/model]")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    return parser


def _push(options: argparse.Namespace) -> None:
    folder = options.save_path or Workspace().model
    place = Workspace.beside(folder.absolute())
    # No run may replace the files while they are uploaded.
    with in_use(place) if os.access(place.root, os.W_OK) else nullcontext():
        _upload(options, folder)


def _upload(options: argparse.Namespace, folder: Path) -> None:
    from replaceme.models import hub
    from replaceme.models.model import CARD, Model

    pipeline = Workspace()
    files: dict[str, Path | bytes] = {path.name: path for path in Model(folder, folder.name).files()}
    if not {"config.json", CARD} <= files.keys():
        raise ParameterError(f"save_path: there is no pruned model in {folder}; run `dvc repro` or `replaceme prune` first.")
    if folder.resolve() == pipeline.model.resolve():
        _check_scores()
        files[CARD] = card_of(pipeline_params(METHODS), pipeline, options.repo_id).encode()
    url = hub.upload(options.repo_id, files, options.private)
    logger.info("the model is at %s", url)


def _check_scores() -> None:
    """Raise ParameterError unless the pipeline's model, scores and settings are up to date."""
    need("dvc", "save_path: the pipeline's model")

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


def card_of(params: Params, work: Workspace, place: str = ".") -> str:
    """Return the card of a finished run's model, with its scores on the tasks of ``params``; its example loads ``place``."""
    from replaceme.edits.edits import Edits
    from replaceme.export.card import model_card
    from replaceme.models.find import recorded_model

    source, edits, solved = recorded_model(params, work.model_input), Edits.load(work.edits), read_json(work.metric("solve"))
    made_with = read_json(work.model_versions)
    if not params.tasks:
        return model_card(params, source, edits, solved, made_with=made_with, place=place)
    evaluation, made_with = read_json(work.metric("evaluation")), made_with | read_json(work.score_versions)
    return model_card(
        params, source, edits, solved, _scores(evaluation), _results(evaluation),
        continuations=_continuations(read_json(work.continuations)), made_with=made_with, place=place,
    )  # fmt: skip


def _scores(evaluation: Mapping[str, Any]) -> str:
    """Return metrics/evaluation.json as Markdown."""
    from replaceme.evaluation.comparison import comparison_rows, seen_note

    head, *rows = comparison_rows(evaluation)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    for key, words in KEPT.items():
        if f"{key}_stderr" in evaluation:
            table += words.format(f"{evaluation[f'{key}_percent']:.1f} ± {evaluation[f'{key}_stderr']:.1f} %")
    if note := seen_note(evaluation):
        table += f"\n\n{note}"
    return table


def _continuations(pairs: Sequence[Mapping[str, str]]) -> str:
    """Return both models' continuations as Markdown, in code blocks that nothing in them can end."""
    parts = ["The most likely token each time, some 40 of them at most."]
    for pair in pairs:
        known = f" (known answer: {pair['answer']})" if pair["answer"] else ""
        parts += [f"### {pair['kind'].capitalize()}{known}", _block(pair["prompt"])]
        parts += [f"{model}:\n\n{_block(pair[model])}" for model in ("dense", "pruned")]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text.strip()}\n{fence}"


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """Return the pruned model's scores as the hub's evaluation results; calibration text is named as such."""
    from huggingface_hub import EvalResult

    from replaceme.evaluation.comparison import seen_tasks

    names = {task: f"{task} (seen in calibration)" for task in seen_tasks(evaluation)}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=names.get(task, task),
            metric_type=metric,
            metric_value=pair["pruned"],
        )
        for metric in ("perplexity", "accuracy")
        for task, pair in evaluation.get(metric, {}).items()
    ]
