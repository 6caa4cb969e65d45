"""Accuracy through lm-eval: its tasks, its metrics, its standard errors; what runs the model is ``CausalScorer``."""

import logging
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

from replaceme.errors import DatasetError, ParameterError
from replaceme.evaluation import catalogue
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.tasks import Items, is_file, task_items, task_kind, task_name
from replaceme.progress import progress
from replaceme.task import Task

# Length-normalised accuracy where the task has it, then what else says how often a model is right.
ACCURACIES = ("acc_norm", "acc", "exact_match")
PERPLEXITIES = {"word_perplexity": "word", "byte_perplexity": "byte"}


@dataclass
class Suite:
    """Tasks for one run of lm-eval.

    Attributes:
        singles: name → lm-eval's task.
        groups: name → lm-eval's group.
        reported: the names whose scores are reported, each with the single tasks that it consists of.
        limits: single task → the items that are scored.
    """

    singles: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, list[str]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def add(self, task: Task, found: Any) -> None:
        """Add a task; ``found`` is its identity (``task_fingerprints``)."""
        if task_kind(task) == "lm-eval":
            loaded = catalogue.load(task, found)
            singles, groups = loaded["tasks"], loaded["groups"]
        else:
            singles, groups = {task_name(task): _own_task(task)}, {}
        self.singles |= singles
        self.groups |= groups
        # A tag, or a group that has no score of its own, is so many tasks.
        group = groups.get(task.name)
        scored = bool(group.aggregate_metric_list) if group else task.name in singles or is_file(task)
        self.reported |= {task_name(task): list(singles)} if scored else {name: [name] for name in singles}
        if task.limit is not None:
            self.limits |= dict.fromkeys(singles, task.limit)


@dataclass
class Outcome:
    """What a run of lm-eval gave.

    Attributes:
        accuracy: task → ``{accuracy, metric, fewshots}``, and ``stderr`` and ``items`` where it has them.
        perplexity: task → ``{word, byte}``, for lm-eval's own perplexity tasks.
        items: task → (items,) float64, the accuracy of each item.
    """

    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, Tensor] = field(default_factory=dict)


def run(scorer: CausalScorer, suite: Suite) -> Outcome:
    """Score all tasks of a suite in one run, so that their requests are sorted and batched together.

    Raises:
        DatasetError: a task measures nothing that is an accuracy or a perplexity.
    """
    outcome = Outcome()
    if not suite.singles:
        return outcome
    counts = {name: min(limit, len(suite.singles[name].eval_docs)) for name, limit in suite.limits.items()}
    # lm-eval's own bar over the items says nothing about what it counts.
    bar = partial(progress, description=f"{scorer.description}: items", unit="items")
    with mock.patch.object(lm_eval_task, "tqdm", bar):
        result = evaluate(
            lm=scorer,
            task_dict={"tasks": suite.singles, "groups": suite.groups},
            samples={name: list(range(count)) for name, count in counts.items()} or None,
            bootstrap_iters=0,  # no resampling: the standard error of a mean is known
        )
    for name, singles in suite.reported.items():
        _report(outcome, name, singles, result, suite)
    return outcome


def _report(outcome: Outcome, name: str, singles: Sequence[str], result: Any, suite: Suite) -> None:
    figures = {**result["results"], **result.get("groups", {})}[name]
    metrics = {key.split(",")[0]: key for key in figures if "," in key and "_stderr" not in key}
    better = result.get("higher_is_better", {}).get(name, {})
    others = [metric for metric, key in metrics.items() if better.get(metric) and 0 <= float(figures[key]) <= 1]
    if metric := next((metric for metric in (*ACCURACIES, *others) if metric in metrics), None):
        kind = metrics[metric].split(",")[1]
        score = {
            "accuracy": float(figures[metrics[metric]]),
            "metric": metric,
            "fewshots": int(suite.singles[singles[0]].config.num_fewshot or 0),
        }
        known = (_items(result["samples"][single], metric, kind) for single in singles)
        items = [values for values in known if values is not None]
        if len(items) == len(singles):
            outcome.items[name] = torch.cat(items)
            score["items"] = len(outcome.items[name])
            if all(len(values) > 1 for values in items):
                errors = [float(values.std() / len(values) ** 0.5) for values in items]
                score["stderr"] = errors[0] if len(errors) == 1 else pooled_sample_stderr(errors, list(map(len, items)))
        outcome.accuracy[name] = score
    elif found := {unit: float(figures[metrics[metric]]) for metric, unit in PERPLEXITIES.items() if metric in metrics}:
        outcome.perplexity[name] = found
    else:
        raise DatasetError(
            f"tasks: {name} measures {', '.join(metrics) or 'nothing'}, which is no accuracy and no perplexity; leave it out."
        )


def _items(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> Tensor | None:
    """Return (items,) float64, or None for a metric of all items together, of which one alone has no number."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    return torch.tensor(values, dtype=torch.float64) if all(isinstance(value, int | float) for value in values) else None


def _own_task(task: Task) -> Any:
    """Return an lm-eval task over items of ours."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    items, kind = task_items(task), task_kind(task)
    if (task.fewshots or 0) >= len(items):
        raise ParameterError(f"tasks: fewshots of {task_name(task)} must be below its {len(items)} items, not {task.fewshots}.")
    single = _task_of(task_name(task), items, WORD if kind == "word" else QUESTION if is_file(task) else CONTINUATION)
    catalogue.configure(single, task.fewshots)
    return single


# The prompts are those of lm-eval's tasks of the same form: lambada, piqa, hellaswag.
WORD: Mapping[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + word}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
CONTINUATION: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
QUESTION: Mapping[str, Any] = {**CONTINUATION, "doc_to_text": "Question: {{query}}\nAnswer:"}


def _task_of(name: str, items: Items, form: Mapping[str, Any]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
            "test_split": "test",
            "fewshot_split": "test",
            **form,
        }
    )
