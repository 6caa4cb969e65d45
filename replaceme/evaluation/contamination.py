"""Contamination: whether a task is scored on the calibration text, so that its score says nothing about other text.

It is where both have the same source: files of one SHA-256, one split of an embedded text, or one config and split of a hub
dataset. And it is where a tenth of the items (of a running text: of its windows) or more have a 13-gram in common with the
calibration documents (as in Brown et al., arXiv 2005.14165, appendix C): 13 words in a row, in lower case and without
punctuation. What a chat template puts before and between the turns belongs to no 13-gram.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replaceme.base.documents import Documents
from replaceme.base.entries import Source, Task
from replaceme.base.progress import logger
from replaceme.calibration import embedded, streamed
from replaceme.calibration.own_text import find_chat_turns
from replaceme.calibration.sources import IdentifiedSource
from replaceme.evaluation.embedded_tasks import EMBEDDED
from replaceme.evaluation.requests import Requests
from replaceme.evaluation.tasks import HELD_OUT, is_file, task_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Hashes = NDArray[np.int64]
N, MIN_OVERLAP = 13, 0.1
# A character of a script without spaces is a word.
_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")


def hash_ngrams(text: str) -> Hashes:
    """Return Python's hash of each 13-gram of a text, (ngrams,) int64; another process has other ones."""
    words = _WORD.findall(text.lower())
    return np.array([hash(tuple(words[start : start + N])) for start in range(len(words) - N + 1)], dtype=np.int64)


def iterate_texts(document: Any) -> Iterator[str]:
    """Yield all texts in an item, whatever its form."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, Mapping | list | tuple):
        for part in document.values() if isinstance(document, Mapping) else document:
            yield from iterate_texts(part)


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text.

    Attributes:
        sources: its sources, each with what identifies its content.
        ngrams: the hashes of its 13-grams, ascending; None where the text itself isn't known.
        template: what the chat template puts before and between the turns.
    """

    sources: Sequence[IdentifiedSource]
    ngrams: Hashes | None
    template: frozenset[str] = frozenset()

    @classmethod
    def of_documents(
        cls, sources: Sequence[IdentifiedSource], documents: Documents, tokenizer: PreTrainedTokenizerBase
    ) -> CalibrationText:
        """Return the text of calibration documents, which come from these sources."""
        turns = find_chat_turns(tokenizer)
        parts = (turns.opening, turns.after_user, turns.after_assistant) if turns else ()
        template = {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in parts} - {""}
        text = cls(sources, None, frozenset(template))
        decoded = (tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in documents.documents)
        hashes = [hash_ngrams(piece) for document in decoded for piece in text.split_at_template(document)]
        return cls(sources, np.unique(np.concatenate([np.empty(0, dtype=np.int64), *hashes])), text.template)

    def split_at_template(self, text: str) -> list[str]:
        """Return the pieces of a text between the parts of the chat template."""
        parts = sorted(self.template, key=len, reverse=True)
        return re.split("|".join(map(re.escape, parts)), text) if parts else [text]

    def measure_contamination(
        self, name: str, task: Task, fingerprint: Any, items: Iterable[Iterable[str]], single_tasks: Sequence[Any] = ()
    ) -> dict[str, float]:
        """Return how far a score is on calibration text, and warn if it is.

        Args:
            name: the score's name.
            task: its task.
            fingerprint: what identifies the task's content.
            items: the texts of each item, or of each window.
            single_tasks: lm-eval's tasks that it covers.

        Returns:
            ``seen``: 1 or 0; ``same_domain``: 1 if it isn't, but other text of its domain is calibrated on, else 0; and
            ``overlap``: the part of the items with a common 13-gram, where the calibration text itself is known.
        """
        same_source = self._has_source(task, fingerprint, single_tasks)
        figures: dict[str, float] = {}
        if self.ngrams is not None:
            common = [any(map(self._has_ngram, texts)) for texts in items]
            figures["overlap"] = sum(common) / max(len(common), 1)
        overlap = figures.get("overlap", 0.0)
        contaminated = same_source or overlap >= MIN_OVERLAP
        if contaminated:
            why = "its source is" if same_source else f"{100 * overlap:.0f} % of its items share {N} words in a row with"
            logger.warning(
                "tasks: %s is no unseen text: %s the calibration text (%s); take its score for no other text",
                name, why, ", ".join(source.name for source, _ in self.sources),
            )  # fmt: skip
        return {"seen": int(contaminated), "same_domain": int(not contaminated and self._has_domain(task)), **figures}

    def _has_ngram(self, text: str) -> bool:
        if self.ngrams is None or not len(self.ngrams):
            return False
        hashes = hash_ngrams(text)
        nearest = np.searchsorted(self.ngrams, hashes).clip(max=len(self.ngrams) - 1)
        return bool((self.ngrams[nearest] == hashes).any())

    def _has_domain(self, task: Task) -> bool:
        text = EMBEDDED[task.name].text if task.name in EMBEDDED else None
        names = (name for source, _ in self.sources for name in streamed.list_repositories(source.name))
        return text is not None and embedded.TEXTS[text].domain in map(_find_domain, names)

    def _has_source(self, task: Task, fingerprint: Any, single_tasks: Sequence[Any]) -> bool:
        if task.name in EMBEDDED:
            return any(known.get("sha256") == fingerprint and source.split == HELD_OUT for source, known in self.sources)
        if is_file(task):
            return any(known.get("sha256") == fingerprint for _, known in self.sources)
        return any(_is_same_split(single, source, known) for source, known in self.sources for single in single_tasks)


def find_contamination(
    calibration: CalibrationText, requests: Requests, fingerprints: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """Return, for each score, what ``CalibrationText.measure_contamination`` returns."""
    figures = {}
    for name, task in requests.tasks.items():
        single_tasks = []
        if name in requests.windows:
            windows = (tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in requests.windows[name].ids)
            texts: Iterable[Iterable[str]] = map(calibration.split_at_template, windows)
        else:
            single_tasks = [requests.suite.tasks[single] for single in requests.suite.reported[name].tasks]
            texts = map(iterate_texts, requests.suite.documents(name))
        figures[name] = calibration.measure_contamination(name, task, fingerprints[task_name(task)], texts, single_tasks)
    return figures


def _find_domain(name: str) -> str | None:
    """Return the domain of a source, if it is known: of an embedded text, or of a hub dataset with a name of its own here."""
    return embedded.TEXTS[name].domain if name in embedded.TEXTS else streamed.DOMAINS.get(name)


def _is_same_split(single: Any, source: Source, known: Mapping[str, Any]) -> bool:
    """Return whether one of lm-eval's tasks reads the config and split of the hub dataset that the calibration reads."""
    config = single.config
    split = config.test_split if single.has_test_docs() else config.validation_split
    if str(split).split("[")[0] != (source.split or "train").split("[")[0]:
        return False
    for repository in known.get("commits", {}):
        part = source.config or streamed.CONFIGS.get(repository)
        if str(config.dataset_path).lower() == repository.lower() and (
            part == config.dataset_name or None in (part, config.dataset_name)
        ):
            return True
    return False
