"""Accuracies by lm-eval: its tasks and metrics, with ``CausalScorer`` to run the model, and the score of each item.

Items of one article or passage are no independent sample: the standard errors are clustered by it
(``replaceme.evaluation.standard_errors``), where lm-eval's are not.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from lm_eval.api import task as lm_eval_task
from lm_eval.api.metrics import pooled_sample_stderr
from lm_eval.evaluator import evaluate
from torch import Tensor

from replaceme.base.errors import DatasetError
from replaceme.base.progress import logger, progress
from replaceme.evaluation import catalogue
from replaceme.evaluation.question_file import PASSAGES
from replaceme.evaluation.requests import PERPLEXITIES, ReportedScore, Suite
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.standard_errors import Sample

Rows = list[dict[str, Any]]


@dataclass
class SuiteScores:
    """Results of a run of lm-eval.

    Attributes:
        accuracy: name → ``{accuracy, metric, fewshots, by_size}``, and ``chance``, ``stderr`` and ``items`` if known. Chance
            is what guesses score on average: one out of an item's choices, and 0 where the answer is written.
        perplexity: name → ``{word, byte}``, for lm-eval's own perplexity tasks.
        items: ``accuracy/<name>`` (items,) float64, the accuracy of each item; and their ``Sample``.
    """

    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, Tensor] = field(default_factory=dict)


def score_suite(scorer: CausalScorer, suite: Suite) -> SuiteScores:
    """Score all tasks of a suite; their requests are batched together."""
    scores = SuiteScores()
    rolling = {name for name, task in suite.tasks.items() if task.OUTPUT_TYPE == "loglikelihood_rolling"}
    # Perplexities come apart: one that overflows would take the accuracies with it.
    for tasks in (suite.tasks.keys() - rolling, rolling):
        reported = {name: score for name, score in suite.reported.items() if tasks.issuperset(score.tasks)}
        if not reported:
            continue
        try:
            result = _evaluate(scorer, suite, {task for score in reported.values() for task in score.tasks})
        except OverflowError:
            logger.warning("%s: the perplexity of %s overflows and is left out", scorer.description, ", ".join(reported))
            continue
        for name, score in reported.items():
            figures = {**result["results"], **result.get("groups", {})}[name]
            if score.metric:
                _add_accuracy(scores, name, figures, result["samples"], suite)
            else:
                values = {key.split(",")[0]: value for key, value in figures.items()}
                scores.perplexity[name] = {
                    unit: float(values[metric]) for metric, unit in PERPLEXITIES.items() if metric in values
                }
    return scores


def _evaluate(scorer: CausalScorer, suite: Suite, names: set[str]) -> Any:
    tasks = {name: task for name, task in suite.tasks.items() if name in names}
    counts = {name: min(limit, len(tasks[name].eval_docs)) for name, limit in suite.limits.items() if name in names}
    # Replaces lm-eval's own progress bar, which doesn't say what it counts.
    bar = partial(progress, description=f"{scorer.description}: items", unit="items")
    with mock.patch.object(lm_eval_task, "tqdm", bar):
        catalogue.seed_generators()
        return evaluate(
            lm=scorer,
            task_dict={"tasks": tasks, "groups": suite.groups},
            samples={name: [*range(count)] for name, count in counts.items()} or None,
            bootstrap_iters=0,  # no bootstrap: the standard error of a mean has a formula
        )


def _add_accuracy(
    scores: SuiteScores, name: str, figures: Mapping[str, Any], samples: Mapping[str, Rows], suite: Suite
) -> None:
    """Add a reported accuracy, with its items if the metric is their mean."""
    reported = suite.reported[name]
    # With several filters of the answer (strict, flexible), the first is reported.
    key = next((key for key in figures if key.split(",")[0] == reported.metric), "")
    if not key:
        raise DatasetError(f"tasks: {name} declares the metric {reported.metric} but doesn't measure it; leave it out.")
    answer_filter = key.split(",")[1]
    tasks = [suite.tasks[task] for task in reported.tasks]
    parts = [[row for row in samples[task] if row["filter"] == answer_filter] for task in reported.tasks]
    accuracy: dict[str, Any] = {
        "accuracy": float(figures[key]),
        "metric": str(reported.metric) if answer_filter == "none" else key,
        "fewshots": int(tasks[0].config.num_fewshot or 0),
        "by_size": reported.by_size,
    }
    sample = Sample.of_tasks([_hash_articles(rows) for rows in parts], reported.by_size)
    chances = [_get_chance(task, row["doc"]) for task, rows in zip(tasks, parts, strict=True) for row in rows]
    if None not in chances:
        accuracy["chance"] = float(sample.weights @ torch.tensor(chances, dtype=torch.float64))
    values = [row.get(str(reported.metric)) for rows in parts for row in rows]
    if all(isinstance(value, int | float) for value in values):
        items = torch.tensor(values, dtype=torch.float64)
        # Some metrics are not the mean of their items; the items then give no standard error.
        if abs(float(sample.weights @ items) - accuracy["accuracy"]) < 1e-9:
            scores.items |= {f"accuracy/{name}": items, **sample.tensors(name)}
            accuracy |= {"items": len(items), **_compute_stderr(items, sample, reported)}
    scores.accuracy[name] = accuracy


def _compute_stderr(items: Tensor, sample: Sample, reported: ReportedScore) -> dict[str, float]:
    """Return the standard error of an accuracy: lm-eval's for a group of independent items that it weights equally."""
    if len(reported.tasks) > 1 and reported.by_size and bool((sample.articles < 0).all()):
        parts = [items[sample.tasks == task] for task in range(len(reported.tasks))]
        if all(len(part) > 1 for part in parts):
            return {
                "stderr": pooled_sample_stderr([float(part.std() / len(part) ** 0.5) for part in parts], [*map(len, parts)])
            }
        return {}
    stderr = sample.stderr(items)
    return {} if stderr is None else {"stderr": stderr}


def _get_chance(task: Any, document: Any) -> float | None:
    """Return what a guess scores on an item; None where the task has a score of its own."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    if task.config.process_results is not None:
        return None
    right = task.doc_to_target(document)
    return (len(right) if isinstance(right, list) else 1) / len(task.doc_to_choice(document))


def _hash_articles(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the article of each item, (items,) int64, by its text's sha256; −1 if no two items, or all, share one."""
    documents = [row["doc"] for row in rows]
    texts = [next((doc[name] for name in PASSAGES if doc.get(name)), None) for doc in documents if isinstance(doc, Mapping)]
    known = len(texts) == len(rows) and all(isinstance(text, str) for text in texts)
    if not known or not 1 < len({*texts}) < len(texts):
        return torch.full((len(rows),), -1)
    digests = {text: hashlib.sha256(str(text).encode()).digest()[:8] for text in texts}
    return torch.tensor([int.from_bytes(digests[text]) >> 1 for text in texts])
