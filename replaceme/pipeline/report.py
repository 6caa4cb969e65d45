"""report: a page with scores, figures and settings, and the model's card with its scores.

The card in the model's folder is written before anything is scored, and no stage's output changes afterwards. So the card with
the scores stands next to the page; it replaces the one in a copy of the folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult

from replaceme.base.config import WITHOUT_EFFECT
from replaceme.base.files import new_folder, read_json, write_text
from replaceme.base.parameters import Params
from replaceme.edits.edits import Edits
from replaceme.evaluation.tables import describe_contamination, find_contaminated_tasks, tabulate_score_comparison
from replaceme.export.card import RunResults, render_card
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.find import recorded_model
from replaceme.report.page import render
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace

# Everything that a result can depend on.
ALL = tuple(name for name in FIELDS if name not in WITHOUT_EFFECT)
CARD_FILE = "model_card.md"
# What is kept, by the metrics' names.
KEPT = {
    "retention": "\n\n{} of the dense model's average accuracy is kept; ± is one standard error.",
    "retention_above_chance": " Of what is above chance, {} is.",
}


def write_report(params: Params, work: Workspace) -> None:
    """Write the report, which has no times, and the card."""
    page, card = render(params, work), render_run_card(params, work)
    with new_folder(work.report) as folder:
        page.save(folder)
        write_text(folder / CARD_FILE, card)


def render_run_card(params: Params, work: Workspace, path: str = ".") -> str:
    """Return the card of a finished run's model, with its scores on the tasks of ``params``; its example loads ``path``."""
    results = RunResults.of(work)
    if params.tasks:
        evaluation = read_json(work.metric("evaluation"))
        results = replace(
            results,
            made_with={**results.made_with, **read_json(work.score_versions)},
            scores=format_score_section(evaluation),
            entries=list_hub_results(evaluation),
            continuations=format_continuations(read_json(work.continuations)),
        )
    return render_card(params, recorded_model(params, work.model_input), Edits.load(work.edits), results, path)


def format_score_section(evaluation: Mapping[str, Any]) -> str:
    """Return metrics/evaluation.json as Markdown."""
    head, *rows = tabulate_score_comparison(evaluation)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    for key, words in KEPT.items():
        if f"{key}_stderr" in evaluation:
            table += words.format(f"{evaluation[f'{key}_percent']:.1f} ± {evaluation[f'{key}_stderr']:.1f} %")
    if note := describe_contamination(evaluation):
        table += f"\n\n{note}"
    return table


def format_continuations(pairs: Sequence[Mapping[str, str]]) -> str:
    """Return both models' continuations as Markdown, in code blocks that nothing in them can end."""
    parts = ["The most likely token each time, some 40 of them at most."]
    for pair in pairs:
        known = f" (known answer: {pair['answer']})" if pair["answer"] else ""
        parts += [f"### {pair['kind'].capitalize()}{known}", _fence(pair["prompt"])]
        parts += [f"{model}:\n\n{_fence(pair[model])}" for model in ("dense", "pruned")]
    return "\n\n".join(parts)


def _fence(text: str) -> str:
    marks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{marks}text\n{text.strip()}\n{marks}"


def list_hub_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """Return the pruned model's scores as the hub's evaluation results; calibration text is named as such."""
    contaminated = find_contaminated_tasks(evaluation)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task} (seen in calibration)" if task in contaminated else task,
            metric_type=metric,
            metric_value=pair["pruned"],
        )
        for metric in ("perplexity", "accuracy")
        for task, pair in evaluation.get(metric, {}).items()
    ]


STAGE = Stage(
    name="report",
    run=write_report,
    params=ALL,
    reads=(
        Workspace.model_input, Workspace.card_input, Workspace.profile, Workspace.blocks, Workspace.solution,
        Workspace.repaired, Workspace.edits, Workspace.continuations, Workspace.text_versions, Workspace.model_versions,
        Workspace.score_versions,
    ),
    writes=Workspace.report,
    figures=("select", "solve", "repair", "heal", "check", "export", "evaluation"),
    methods=METHODS,
)  # fmt: skip
