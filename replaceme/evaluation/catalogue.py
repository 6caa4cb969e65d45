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


def names() -> list[str]:
    """Return the names of all tasks, groups and tags."""
    return list(_index())


def has(name: str) -> bool:
    """Tell whether lm-eval knows a name."""
    return name in _index()


def members(name: str) -> list[str]:
    """Return the single tasks of a task, group or tag, by name."""
    return [single for single, _ in _single_tasks(name)]


def identity(name: str) -> dict[str, Any]:
    """Return what identifies the items of a task, group or tag: lm-eval's version, and the commit of each dataset.

    Raises:
        DatasetError: a dataset can neither be reached nor found in the cache.
        ParameterError: the task needs more than text, or runs code that the model writes.
    """
    for single, config in _single_tasks(name):
        if config.get("unsafe_code"):
            raise ParameterError(f"tasks: {single} runs code that the model writes; it is not run here, leave it out.")
        if config.get("doc_to_image") or config.get("doc_to_audio"):
            raise ParameterError(f"tasks: {single} needs more than text; leave it out.")
    commits = _commits(name)
    if not commits:
        logger.info("tasks: the items of '%s' are identified by lm-eval's version alone", name)
    return {"lm_eval": version("lm_eval"), "datasets": commits}


def load(task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's objects for a task: ``tasks`` and ``groups``, both by name.

    Args:
        task: its name and options.
        found: its ``identity``; the datasets are read at these commits.

    Raises:
        DatasetError: a dataset can't be read.
        ParameterError: the task can't be run here.
    """
    if not hub.reachable() and (commits := _commits(task.name)) != found.get("datasets", {}):
        raise DatasetError(
            f"tasks: the cache holds another version of {min(commits)} than '{task.name}' was found with; run again."
        )
    seed()
    try:
        with _pinned(found.get("datasets", {})):
            loaded = _manager().load([task.name])
    except Exception as failure:  # datasets and tasks in Python raise errors of many kinds
        reason = f"{type(failure).__name__}: {excerpt(failure, 150)}"
        raise DatasetError(f"tasks: '{task.name}' can't be loaded ({reason}).") from failure
    for single in loaded["tasks"].values():
        configure(single, task.fewshots)
    return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {})}


def configure(single: Any, fewshots: int | None) -> None:
    """Set the number of few-shot examples of one of lm-eval's tasks, and lm-eval's own seed for them.

    Args:
        single: the task; it is changed.
        fewshots: the number; None keeps the task's own, or 0 if it has none.

    Raises:
        ParameterError: the task has fewer examples to choose from.
    """
    if fewshots is not None or single.config.num_fewshot is None:
        single.set_config(key="num_fewshot", value=fewshots or 0)
    single.set_fewshot_seed(seed=1234)
    examples = getattr(getattr(single, "sampler", None), "df", None)
    if fewshots and examples is not None:
        # An item can't be its own example.
        most = len(examples) - (single.fewshot_cfg.split == single.config.test_split)
        if fewshots > most:
            raise ParameterError(
                f"tasks: fewshots of {single.config.task} must be at most its {most} examples, not {fewshots}."
            )


def seed() -> None:
    """Seed the global generators, as lm-eval's own program does: some tasks shuffle their choices."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


@functools.cache
def _manager() -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    logger.info("tasks: reading the list of lm-eval's tasks")
    return TaskManager()


def _index() -> Mapping[str, Any]:
    index: Mapping[str, Any] = _manager().task_index
    return index


def _commits(name: str) -> dict[str, str]:
    """Return dataset → commit for all single tasks of a name; offline, every configuration in use must be cached."""
    commits: dict[str, str] = {}
    asked = set()
    for _, config in _single_tasks(name):
        path, part = config.get("dataset_path"), config.get("dataset_name")
        # A task in Python names its dataset in its code.
        if not isinstance(path, str) or path in FILE_BUILDERS:
            continue
        if (path, part) in asked or (path in commits and hub.reachable()):
            continue
        asked.add((path, part))
        commits[path] = hub.dataset_commit(path, part, f"tasks: '{name}'")
    return commits


def _single_tasks(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and configuration of each single task of a task, group or tag, without loading its dataset."""
    entry = _index()[name]
    if entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from _single_tasks(tagged)
    elif entry.kind.name == "GROUP":
        yield from _members(name, entry.cfg)
    else:
        yield name, entry.cfg


def _members(group_name: str, group: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    listed = group.get("task")
    for member in listed if isinstance(listed, list) else []:
        name = member if isinstance(member, str) else member.get("group", member.get("task"))
        if name in _index():
            yield from _single_tasks(name)
        elif isinstance(member, dict) and "group" in member:
            yield from _members(f"{group_name}::{member['group']}", member)
        elif isinstance(member, dict):
            yield f"{group_name}::{member.get('task')}", member  # defined only in the group; this is lm-eval's name for it


@contextmanager
def _pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Load datasets at the given commits inside the block, not at the newest; lm-eval has no option for this."""
    import datasets

    read = datasets.load_dataset

    def read_pinned(path: str, *arguments: Any, **options: Any) -> Any:
        if hub.reachable() and path in commits:
            options.setdefault("revision", commits[path])
        return read(path, *arguments, **options)

    with mock.patch.object(datasets, "load_dataset", read_pinned):
        yield
