"""The tasks, groups and tags that lm-eval knows by name: which there are, what they are made from, and the tasks themselves.

The names come from the YAML files that lm-eval ships; a task's text is a dataset of the hub, known by its commit. Where
the hub can't be reached, a dataset in the local cache does.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

from replaceme import hub
from replaceme.errors import DatasetError, ParameterError
from replaceme.progress import logger
from replaceme.task import Task


def names() -> list[str]:
    """Return the names of all tasks, groups and tags."""
    return list(_index())


def has(name: str) -> bool:
    """Tell whether lm-eval knows a name."""
    return name in _index()


def members(name: str) -> list[str]:
    """Return the names of the single tasks that a name stands for."""
    return [str(config["task"]) for config in _single_tasks(name)]


def identity(name: str) -> dict[str, Any]:
    """Return what identifies a name's items: the version of lm-eval, and the commit of each dataset.

    Raises:
        DatasetError: a dataset can neither be reached nor found in the cache.
    """
    commits: dict[str, str] = {}
    for config in _single_tasks(name):
        path = config.get("dataset_path")
        # Builders such as "json" read files; a task in Python names its dataset in its code.
        if isinstance(path, str) and "/" in path and path not in commits:
            commits[path] = hub.dataset_commit(path, config.get("dataset_name"), f"tasks: '{name}'")
    if not commits:
        logger.info("tasks: what '%s' is made from is known by the version of lm-eval alone", name)
    return {"lm_eval": version("lm_eval"), "datasets": commits}


def load(task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's own objects of a task: ``tasks`` and ``groups``, both by name.

    Args:
        task: the name, and options.
        found: what ``identity`` returned; the datasets are read at these commits.

    Raises:
        DatasetError: a dataset can't be read.
        ParameterError: the task can't be run here.
    """
    try:
        with _pinned(found.get("datasets", {})):
            loaded = _manager().load([task.name])
    except Exception as failure:  # datasets and tasks in Python raise errors of many kinds
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        raise DatasetError(f"tasks: '{task.name}' can't be loaded ({reason}).") from failure
    for name, single in loaded["tasks"].items():
        if getattr(single, "UNSAFE_CODE", False):
            raise ParameterError(f"tasks: {name} runs code that the model writes; it is not run here, leave it out.")
        if getattr(single, "MULTIMODAL", False):
            raise ParameterError(f"tasks: {name} needs more than text; leave it out.")
        configure(single, task.fewshots)
    return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {})}


def configure(single: Any, fewshots: int | None) -> None:
    """Set the number of solved examples of one of lm-eval's tasks (None: its own, else none) and their seed, lm-eval's."""
    if fewshots is not None or single.config.num_fewshot is None:
        single.set_config(key="num_fewshot", value=fewshots or 0)
    single.set_fewshot_seed(seed=1234)


@functools.cache
def _manager() -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    logger.info("tasks: reading the list of lm-eval's tasks")
    return TaskManager()


def _index() -> Mapping[str, Any]:
    index: Mapping[str, Any] = _manager().task_index
    return index


def _single_tasks(name: str) -> Iterator[dict[str, Any]]:
    """Yield the configuration of each single task below a task, group or tag, without loading its dataset."""
    entry = _index()[name]
    if entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from _single_tasks(tagged)
    elif entry.kind.name == "GROUP":
        yield from _members(entry.cfg)
    else:
        yield entry.cfg


def _members(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    listed = group.get("task")
    for member in listed if isinstance(listed, list) else []:
        name = member if isinstance(member, str) else member.get("group", member.get("task"))
        if name in _index():
            yield from _single_tasks(name)
        elif isinstance(member, dict) and "group" in member:
            yield from _members(member)
        elif isinstance(member, dict):
            yield member


@contextmanager
def _pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Read datasets at the commits that were found, not at what is newest by then; lm-eval has no way to say so."""
    import datasets

    read = datasets.load_dataset

    def read_pinned(path: str, *arguments: Any, **options: Any) -> Any:
        if hub.reachable() and path in commits:
            options.setdefault("revision", commits[path])
        return read(path, *arguments, **options)

    with mock.patch.object(datasets, "load_dataset", read_pinned):
        yield
