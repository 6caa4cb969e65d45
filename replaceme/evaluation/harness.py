"""Accuracy through lm-eval: its tasks, metrics and standard errors, with ``CausalScorer`` to run the model.

Items of one article or passage are no independent sample: the standard errors are clustered by it
(``replaceme.evaluation.comparison``), where lm-eval's are not.
"""

import hashlib
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

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, ParameterError
from replaceme.base.progress import logger, progress
from replaceme.evaluation import catalogue
from replaceme.evaluation.comparison import weighted_mean, weighted_stderr
from replaceme.evaluation.question_file import PASSAGES
from replaceme.evaluation.scorer import GENERATED, CausalScorer
from replaceme.evaluation.tasks import Items, is_file, task_items, task_kind, task_name

# Length-normalised accuracy if the task has it, else another metric that is a share of correct items. Other metrics (F1, BLEU,
# correlations) can't be averaged with these over tasks.
ACCURACIES = ("acc_norm", "acc", "exact_match", "em", "accuracy")
PERPLEXITIES = {"word_perplexity": "word", "byte_perplexity": "byte"}
# lm-eval's names for the number of tokens that a task generates.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Reported:
    """One reported score.

    Attributes:
        singles: names of the single tasks that it covers.
        metric: the reported accuracy; None for a perplexity.
        by_size: whether a group weights its items equally; otherwise it weights its tasks equally.
    """

    singles: tuple[str, ...]
    metric: str | None
    by_size: bool = True


@dataclass
class Suite:
    """Tasks for one run of lm-eval.

    Attributes:
        singles: name → lm-eval's task.
        groups: name → lm-eval's group.
        reported: name → the score that is reported under it.
        limits: single task → number of items to score.
    """

    singles: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Reported] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def add(self, task: Task, found: Any) -> None:
        """Add a task; ``found`` is its identity (``task_fingerprints``).

        Raises:
            DatasetError: the task can't be read, or measures neither an accuracy nor a perplexity.
            ParameterError: one of its names is taken already.
        """
        if task_kind(task) == "lm-eval":
            loaded = catalogue.load(task, found)
            singles, groups = loaded["tasks"], loaded["groups"]
        else:
            singles, groups = {task_name(task): _own_task(task)}, {}
        if taken := self.singles.keys() & singles.keys():
            raise ParameterError(f"tasks: {min(taken)} is there twice, by its own name or in a group; keep one.")
        self.singles |= singles
        self.groups |= groups
        # A tag, or a group without an aggregate score, is reported task by task.
        aggregates = groups[task.name].aggregate_metric_list if task.name in groups else None
        if aggregates:
            metric = _reported_metric(task.name, [aggregate.metric for aggregate in aggregates])
            by_size = all(aggregate.weight_by_size for aggregate in aggregates if aggregate.metric == metric)
            self.reported[task.name] = Reported(tuple(singles), metric, by_size)
        else:
            for name, single in singles.items():
                self.reported[name] = Reported((name,), _reported_metric(name, list(single.aggregation())))
        if task.limit is not None:
            self.limits |= dict.fromkeys(singles, task.limit)


def check_room(suite: Suite, positions: int | None) -> None:
    """Raise ParameterError if a task generates as many tokens as the model takes in all, where lm-eval would fail.

    Args:
        suite: the tasks.
        positions: largest number of tokens that the model takes, if its config says.
    """
    for name, single in suite.singles.items():
        if positions and single.OUTPUT_TYPE == "generate_until":
            options = single.config.generation_kwargs or {}
            wanted = next((options[key] for key in LENGTHS if options.get(key) is not None), GENERATED)
            if wanted >= positions:
                raise ParameterError(
                    f"tasks: {name} generates up to {wanted} tokens, and the model takes {positions} with the question; leave "
                    "it out."
                )


def _reported_metric(name: str, metrics: Sequence[str]) -> str | None:
    """Return the accuracy to report among a task's metrics, or None to report its perplexity."""
    if metric := next((metric for metric in ACCURACIES if metric in metrics), None):
        return metric
    if set(PERPLEXITIES) & set(metrics):
        return None
    raise DatasetError(
        f"tasks: {name} measures {', '.join(metrics)}, which is neither an accuracy nor a perplexity; leave it out."
    )


@dataclass
class Outcome:
    """Results of a run of lm-eval.

    Attributes:
        accuracy: task → ``{accuracy, chance, metric, fewshots, by_size}``, and ``stderr`` and ``items`` if known. ``chance`` is
            what guesses score on average: one out of an item's choices, and 0 where the answer is written.
        perplexity: task → ``{word, byte}``, for lm-eval's own perplexity tasks.
        items: task → (items,) float64 for each of its single tasks: the accuracy of each item.
        articles: task → for each of its single tasks (items,) int64, equal for items of one article; None where each item has
            its own, or none.
    """

    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, list[Tensor]] = field(default_factory=dict)
    articles: dict[str, list[Tensor | None]] = field(default_factory=dict)


def run(scorer: CausalScorer, suite: Suite) -> Outcome:
    """Score all tasks of a suite; their requests are batched together."""
    outcome = Outcome()
    rolling = {name for name, single in suite.singles.items() if single.OUTPUT_TYPE == "loglikelihood_rolling"}
    for names in (suite.singles.keys() - rolling, rolling):
        reported = {name: entry for name, entry in suite.reported.items() if names.issuperset(entry.singles)}
        try:
            result = _run_lm_eval(scorer, suite, {name for entry in reported.values() for name in entry.singles})
        except OverflowError:
            logger.warning("%s: the perplexity of %s overflows and is left out", scorer.description, ", ".join(reported))
            continue
        for name, entry in reported.items():
            figures = {**result["results"], **result.get("groups", {})}[name]
            if entry.metric:
                _report_accuracy(outcome, name, entry, figures, result["samples"], suite)
            else:
                keys = {key.split(",")[0]: key for key in figures if "," in key}
                outcome.perplexity[name] = {
                    unit: float(figures[keys[metric]]) for metric, unit in PERPLEXITIES.items() if metric in keys
                }
    return outcome


def _run_lm_eval(scorer: CausalScorer, suite: Suite, names: set[str]) -> Any:
    if not names:
        return {"results": {}}
    singles = {name: single for name, single in suite.singles.items() if name in names}
    groups = {
        name: group
        for name, group in suite.groups.items()
        if names.issuperset(task.task_name for task in group.get_all_tasks())
    }
    counts = {name: min(limit, len(singles[name].eval_docs)) for name, limit in suite.limits.items() if name in names}
    # Replaces lm-eval's own progress bar, which doesn't say what it counts.
    bar = partial(progress, description=f"{scorer.description}: items", unit="items")
    with mock.patch.object(lm_eval_task, "tqdm", bar):
        catalogue.seed()
        return evaluate(
            lm=scorer,
            task_dict={"tasks": singles, "groups": groups},
            samples={name: list(range(count)) for name, count in counts.items()} or None,
            bootstrap_iters=0,  # no bootstrap: the standard error of a mean has a formula
        )


def _report_accuracy(
    outcome: Outcome, name: str, entry: Reported, figures: Mapping[str, Any], samples: Mapping[str, Any], suite: Suite
) -> None:
    # With several filters of the answer (strict, flexible), the first is reported.
    key = next((key for key in figures if key.split(",")[0] == entry.metric), "")
    if not key:
        raise DatasetError(f"tasks: {name} declares the metric {entry.metric} but doesn't measure it; leave it out.")
    kind = key.split(",")[1]
    score: dict[str, Any] = {
        "accuracy": float(figures[key]),
        "metric": str(entry.metric) if kind == "none" else key,
        "fewshots": int(suite.singles[entry.singles[0]].config.num_fewshot or 0),
        "by_size": entry.by_size,
    }
    chances = [_chances(suite.singles[name], samples[name], kind) for name in entry.singles]
    if (known := [own for own in chances if own is not None]) and len(known) == len(chances):
        score["chance"] = weighted_mean(known, entry.by_size)
    parts = [_items(samples[single], str(entry.metric), kind) for single in entry.singles]
    # Some metrics are not the mean of their items; the items then give no standard error.
    if all(map(len, parts)) and abs(weighted_mean(parts, entry.by_size) - score["accuracy"]) < 1e-9:
        outcome.items[name] = parts
        articles = outcome.articles[name] = [_articles(samples[single], kind) for single in entry.singles]
        score["items"] = sum(map(len, parts))
        if all(len(values) > 1 for values in parts):
            errors = [float(values.std() / len(values) ** 0.5) for values in parts]
            if len(parts) > 1 and entry.by_size and not any(own is not None for own in articles):
                score["stderr"] = pooled_sample_stderr(errors, list(map(len, parts)))
            else:
                score["stderr"] = weighted_stderr(parts, entry.by_size, articles)
    outcome.accuracy[name] = score


def _items(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> Tensor:
    """Return (items,) float64; empty for a metric without a value for single items."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    return torch.tensor(values if all(isinstance(value, int | float) for value in values) else [], dtype=torch.float64)


def _chances(single: Any, samples: Sequence[Mapping[str, Any]], kind: str) -> Tensor | None:
    """Return what a guess scores on each item, (items,) float64; None where the task has a score of its own."""
    documents = [sample["doc"] for sample in samples if sample["filter"] == kind]
    if single.OUTPUT_TYPE != "multiple_choice":
        return torch.zeros(len(documents), dtype=torch.float64)
    if single.config.process_results is not None:
        return None

    def share(document: Any) -> float:
        right = single.doc_to_target(document)
        return (len(right) if isinstance(right, list) else 1) / len(single.doc_to_choice(document))

    return torch.tensor([share(document) for document in documents], dtype=torch.float64)


def _articles(samples: Sequence[Mapping[str, Any]], kind: str) -> Tensor | None:
    """Return the article of each item, (items,) int64, by its text's sha256; None if no two items are known to share one."""
    documents = [sample["doc"] for sample in samples if sample["filter"] == kind]
    texts = [next((doc[name] for name in PASSAGES if doc.get(name)), None) for doc in documents if isinstance(doc, Mapping)]
    if len(texts) < len(documents) or not all(isinstance(text, str) for text in texts) or len({*texts}) == len(texts):
        return None
    digests = {text: hashlib.sha256(str(text).encode()).digest()[:8] for text in texts}
    return torch.tensor([int.from_bytes(digests[text]) >> 1 for text in texts])


def _own_task(task: Task) -> Any:
    """Return an lm-eval task for an embedded task or the user's own file."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    items, kind = task_items(task), task_kind(task)
    form = {"word": WORD, "generation": GENERATION}.get(kind, QUESTION if is_file(task) else CONTINUATION)
    single = _task_of(task_name(task), items, form)
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
# The shortest text that can hold an answer: a space, four digits and what ends them.
GENERATION: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "query",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}


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
