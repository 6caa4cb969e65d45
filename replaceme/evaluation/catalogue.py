"""lm-eval's catalogue of tasks, groups and tags: their names, their datasets, and the tasks themselves.

The names come from the YAML files that lm-eval ships. A task's text is a dataset of the hub, identified by its commit. If the
hub can't be reached, the dataset is read from the local cache.
"""

import functools
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

import numpy as np
import torch

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, ParameterError, excerpt
from replaceme.base.progress import logger
from replaceme.models import hub

# These dataset names are loaders of files, not repositories.
FILE_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}
# lm-eval's own seeds.
PYTHON_SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234


@functools.cache
def task_manager() -> Any:
    """Return lm-eval's index of tasks, read once."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    logger.info("tasks: reading the list of lm-eval's tasks")
    return TaskManager()


def task_index() -> Mapping[str, Any]:
    """Return the entry of each task, group and tag by its name."""
    return task_manager().task_index


def list_single_tasks(name: str) -> list[str]:
    """Return the names of the single tasks of a task, group or tag."""
    return [single for single, _ in _iterate_configs(name)]


def fingerprint_task(name: str) -> dict[str, Any]:
    """Return what identifies the items of a task, group or tag: lm-eval's version, and the commit of each dataset.

    Raises:
        DatasetError: a dataset can neither be reached nor found in the cache.
        ParameterError: the task needs more than text, or runs code that the model writes.
    """
    for single, config in _iterate_configs(name):
        if config.get("unsafe_code"):
            raise ParameterError(f"tasks: {single} runs code that the model writes; it is not run here, leave it out.")
        if config.get("doc_to_image") or config.get("doc_to_audio"):
            raise ParameterError(f"tasks: {single} needs more than text; leave it out.")
    commits = _resolve_commits(name)
    if not commits:
        logger.info("tasks: the items of '%s' are identified by lm-eval's version alone", name)
    return {"lm_eval": version("lm_eval"), "datasets": commits}


def load_tasks(task: Task, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return lm-eval's single tasks and groups of a task, by name.

    Args:
        task: its name and options.
        fingerprint: what identifies its items; the datasets are read at these commits.

    Raises:
        DatasetError: a dataset can't be read.
        ParameterError: the task can't be run here.
    """
    commits = fingerprint.get("datasets", {})
    if not hub.reachable() and (cached := _resolve_commits(task.name)) != commits:
        raise DatasetError(
            f"tasks: the cache holds another version of {min(cached)} than '{task.name}' was checked with; run again."
        )
    seed_generators()
    try:
        with _pinned_datasets(commits):
            loaded = task_manager().load([task.name])
    except Exception as failure:  # datasets and tasks in Python raise errors of many kinds
        reason = f"{type(failure).__name__}: {excerpt(failure, 150)}"
        raise DatasetError(f"tasks: '{task.name}' can't be loaded ({reason}).") from failure
    return loaded["tasks"], loaded.get("groups", {})


def set_fewshots(single: Any, fewshots: int | None) -> None:
    """Set the number of few-shot examples of one of lm-eval's tasks, and lm-eval's own seed for them.

    Args:
        single: the task; it is changed.
        fewshots: the number; None keeps the task's own, or 0 if it has none.

    Raises:
        ParameterError: the task has fewer examples to choose from.
    """
    if fewshots is not None or single.config.num_fewshot is None:
        single.set_config(key="num_fewshot", value=fewshots or 0)
    single.set_fewshot_seed(seed=FEWSHOT_SEED)
    examples = getattr(getattr(single, "sampler", None), "df", None)
    if fewshots and examples is not None:
        # An item can't be its own example.
        most = len(examples) - (single.fewshot_cfg.split == single.config.test_split)
        if fewshots > most:
            raise ParameterError(
                f"tasks: fewshots of {single.config.task} must be at most its {most} examples, not {fewshots}."
            )


def seed_generators() -> None:
    """Seed the global generators, as lm-eval's own program does: some tasks shuffle their choices."""
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)


def _resolve_commits(name: str) -> dict[str, str]:
    """Return dataset → commit for all single tasks of a name; offline, every configuration in use must be cached."""
    parts = dict.fromkeys((config.get("dataset_path"), config.get("dataset_name")) for _, config in _iterate_configs(name))
    commits: dict[str, str] = {}
    for path, part in parts:
        # A task in Python names its dataset in its code.
        if isinstance(path, str) and path not in FILE_BUILDERS and not (path in commits and hub.reachable()):
            commits[path] = hub.dataset_commit(path, part, f"tasks: '{name}'")
    return commits


def _iterate_configs(member: str | Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and configuration of each single task of a task, group or tag, without loading its dataset.

    Args:
        member: its name, or its definition within a group.
        group: the name of that group.
    """
    name = member if isinstance(member, str) else member.get("group", member.get("task"))
    if name in task_index():
        entry = task_index()[name]
        kind, config, tagged = entry.kind.name, entry.cfg, sorted(entry.tags)
    elif isinstance(member, Mapping):
        # It is defined in the group alone; this is lm-eval's name for it.
        name, kind, config, tagged = f"{group}::{name}", "GROUP" if "group" in member else "TASK", member, []
    else:
        return
    if kind in ("GROUP", "TAG"):
        for part in tagged if kind == "TAG" else config.get("task", []):
            yield from _iterate_configs(part, name)
    else:
        yield name, config


@contextmanager
def _pinned_datasets(commits: Mapping[str, str]) -> Iterator[None]:
    """Load datasets at the given commits inside the block, not at the newest; lm-eval has no option for this."""
    import datasets

    load = datasets.load_dataset

    def load_at_commit(path: str, *arguments: Any, **options: Any) -> Any:
        if hub.reachable() and path in commits:
            options.setdefault("revision", commits[path])
        return load(path, *arguments, **options)

    with mock.patch.object(datasets, "load_dataset", load_at_commit):
        yield
