"""What is scored: the windows of each running text, and the items of each other task, which are lm-eval's.

Every task is prepared before a model is loaded, so that errors in a task come first. Embedded items and the user's questions
become tasks of lm-eval. A group with an aggregate score is reported as one; a tag, or any other group, task by task.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, ParameterError
from replaceme.base.parameters import Params
from replaceme.evaluation import catalogue
from replaceme.evaluation.scorer import DEFAULT_MAX_TOKENS
from replaceme.evaluation.tasks import check_unchanged, task_form, task_items, task_kind, task_name, task_texts
from replaceme.evaluation.windows import Windows, cut_windows
from replaceme.models.model import Model, positions_of

# Length-normalised accuracy if the task has it, else another metric that is the part of correct items. Other metrics (F1, BLEU,
# correlations) can't be averaged with these over tasks.
ACCURACIES = ("acc_norm", "acc", "exact_match", "em", "accuracy")
PERPLEXITIES = {"word_perplexity": "word", "byte_perplexity": "byte"}


@dataclass(frozen=True)
class ReportedScore:
    """A score that is reported.

    Attributes:
        tasks: names of the single tasks that it covers.
        metric: the reported accuracy; None for a perplexity.
        by_size: whether a group weights its items equally; otherwise it weights its tasks equally.
    """

    tasks: tuple[str, ...]
    metric: str | None
    by_size: bool = True


@dataclass
class Suite:
    """Tasks for one run of lm-eval.

    Attributes:
        tasks: name → lm-eval's single task.
        groups: name → lm-eval's group.
        reported: name → the score that is reported under it.
        limits: single task → number of items to score.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, ReportedScore] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def add(self, task: Task, fingerprint: Any, positions: int | None = None) -> list[str]:
        """Add a task, and return the names of its reported scores.

        Args:
            task: its name and options.
            fingerprint: what identifies its content (``task_fingerprints``).
            positions: largest number of tokens that the model takes, if its config says.

        Raises:
            DatasetError: the task can't be read, or measures neither an accuracy nor a perplexity.
            ParameterError: one of its names is taken already, or it generates more tokens than the model takes.
        """
        if task_kind(task) == "lm-eval":
            tasks, groups = catalogue.load_tasks(task, fingerprint)
        else:
            tasks, groups = {task_name(task): _build_task(task)}, {}
        if twice := self.tasks.keys() & tasks.keys():
            raise ParameterError(f"tasks: {min(twice)} is there twice, by its own name or in a group; keep one.")
        for name, single in tasks.items():
            catalogue.set_fewshots(single, task.fewshots)
            _check_length(name, single, positions)
        self.tasks |= tasks
        self.groups |= groups
        if task.limit is not None:
            self.limits |= dict.fromkeys(tasks, task.limit)
        aggregates = groups[task.name].aggregate_metric_list if task.name in groups else None
        if aggregates:
            metric = _choose_metric(task.name, [aggregate.metric for aggregate in aggregates])
            by_size = all(aggregate.weight_by_size for aggregate in aggregates if aggregate.metric == metric)
            reported = {task.name: ReportedScore(tuple(tasks), metric, by_size)}
        else:
            metrics = {name: _choose_metric(name, [*single.aggregation()]) for name, single in tasks.items()}
            reported = {name: ReportedScore((name,), metric) for name, metric in metrics.items()}
        self.reported |= reported
        return sorted(reported)

    def documents(self, name: str) -> Iterator[Any]:
        """Yield the items of a reported score, as lm-eval's dataset has them."""
        for task in self.reported[name].tasks:
            yield from islice(self.tasks[task].eval_docs, self.limits.get(task))


@dataclass
class Requests:
    """What is scored.

    Attributes:
        tasks: the name of each score → the task that it belongs to, in the order of ``params.tasks``.
        windows: the windows of each score that is the perplexity of a running text.
        suite: lm-eval's tasks, to which all other scores belong.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    windows: dict[str, Windows] = field(default_factory=dict)
    suite: Suite = field(default_factory=Suite)


def prepare_requests(
    params: Params, source: Model, fingerprints: Mapping[str, Any], dense_items: Mapping[str, Tensor] | None = None
) -> Requests:
    """Return what a model is scored on.

    Args:
        params: the tasks, and how many tokens of a text are scored.
        source: the model, for its tokenizer and the number of tokens that it takes.
        fingerprints: what identifies the tasks' content (``task_fingerprints``).
        dense_items: ``Scores.items`` of the dense model, if this is a pruned one, which scores the same windows.

    Raises:
        DatasetError: a task can't be read, has changed, or measures neither an accuracy nor a perplexity.
        ParameterError: two tasks share a name, or one doesn't fit the model.
    """
    requests, tokenizer, positions = Requests(), source.tokenizer(), positions_of(source.config())
    for task in params.tasks:
        name = task_name(task)
        if task_kind(task) != "perplexity":
            scores = requests.suite.add(task, fingerprints[name], positions)
        else:
            scores = [name]
            requests.windows[name] = (
                Windows.load(dense_items, name)
                if dense_items
                else cut_windows(name, task_texts(task), tokenizer, params.eval_tokens, positions)
            )
        requests.tasks |= dict.fromkeys(scores, task)
        check_unchanged(task, fingerprints[name])
    return requests


def _choose_metric(name: str, metrics: Sequence[str]) -> str | None:
    """Return the accuracy to report among a task's metrics, or None to report its perplexity."""
    if metric := next((metric for metric in ACCURACIES if metric in metrics), None):
        return metric
    if set(PERPLEXITIES) & set(metrics):
        return None
    raise DatasetError(
        f"tasks: {name} measures {', '.join(metrics)}, which is neither an accuracy nor a perplexity; leave it out."
    )


def _check_length(name: str, single: Any, positions: int | None) -> None:
    """Raise ParameterError if a task generates as many tokens as the model takes in all."""
    if positions and single.OUTPUT_TYPE == "generate_until":
        tokens = normalize_gen_kwargs(single.config.generation_kwargs or {}, DEFAULT_MAX_TOKENS)["max_gen_toks"]
        if tokens >= positions:
            raise ParameterError(
                f"tasks: {name} generates up to {tokens} tokens, and the model takes {positions} with the question; leave it "
                "out."
            )


def _build_task(task: Task) -> Any:
    """Return lm-eval's task of embedded items or of the user's own file; its items are its few-shot examples too."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    dataset = {"test": Dataset.from_list([*task_items(task)])}
    splits = {"test_split": "test", "fewshot_split": "test"}
    return ConfigurableTask(
        config={"task": task_name(task), "custom_dataset": lambda **_: dataset, **splits, **task_form(task)}
    )
