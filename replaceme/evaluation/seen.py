"""Whether a task is scored on the calibration text, so that its score says nothing about other text.

It is where both have the same source: files of one SHA-256, one split of an embedded text, or one config and split of a hub
dataset. And it is where a tenth of the items (of a running text: of its windows) or more hold copies: each shares a run of 13
words with the calibration documents (as in Brown et al., arXiv 2005.14165, appendix C), in lower case and without punctuation.
An item without a run of 13 words shares none, and what a chat template puts before and between the turns belongs to no run.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replaceme.base.documents import Documents
from replaceme.base.entries import Source, Task
from replaceme.base.progress import logger
from replaceme.corpora import embedded, streamed
from replaceme.corpora.own_text import chat_turns
from replaceme.corpora.sources import Known
from replaceme.evaluation.tasks import EMBEDDED, HELD_OUT, is_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Hashes = NDArray[np.uint64]
WORDS, SEEN_SHARE = 13, 0.1
# Hashes of calibration runs that are kept, of more the smallest ones: 128 MiB.
MOST = 1 << 24
# A character of a script without spaces is a word.
_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def hashes_of_runs(text: str) -> Hashes:
    """Return a hash of each run of ``WORDS`` words of a text, (runs,) uint64."""
    words = _WORD.findall(text.lower())
    codes = np.array([_code(word) for word in words], dtype=np.uint64)
    runs = np.zeros(max(len(words) - WORDS + 1, 0), dtype=np.uint64)
    for offset in range(WORDS):
        runs = runs * _FACTOR + codes[offset : offset + len(runs)]
    return runs


def without(text: str, template: Iterable[str]) -> list[str]:
    """Return the pieces of a text between the parts of a chat template."""
    parts = sorted(template, key=len, reverse=True)
    return re.split("|".join(map(re.escape, parts)), text) if parts else [text]


@functools.lru_cache(maxsize=1 << 16)
def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def known_runs(texts: Iterable[str]) -> Hashes:
    """Return the hashes of all runs of texts, ascending; at most ``MOST``."""
    known = np.empty(0, dtype=np.uint64)
    waiting: list[Hashes] = []
    for text in texts:
        waiting.append(hashes_of_runs(text))
        if sum(map(len, waiting)) > MOST:
            known, waiting = np.unique(np.concatenate([known, *waiting]))[:MOST], []
    return np.unique(np.concatenate([known, *waiting]))[:MOST]


@dataclass(frozen=True)
class Calibration:
    """The calibration text.

    Attributes:
        sources: its sources, each with its identity.
        runs: the hashes of its runs of words (``known_runs``); None where the text itself isn't known.
        template: what the chat template puts before and between the turns.
    """

    sources: Sequence[Known]
    runs: Hashes | None
    template: frozenset[str] = frozenset()

    @classmethod
    def of(cls, sources: Sequence[Known], documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Calibration:
        """Return the text of calibration documents, which come from these sources."""
        turns = chat_turns(tokenizer)
        parts = (turns.opening, turns.after_user, turns.after_assistant) if turns else ()
        template = {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in parts} - {""}
        texts = (tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in documents.documents)
        runs = known_runs(piece for text in texts for piece in without(text, template))
        return cls(sources, runs, frozenset(template))

    def in_items(self, name: str, task: Task, found: Any, singles: Sequence[Any], limit: int | None) -> dict[str, float]:
        """Return the figures of an accuracy, or of a text of lm-eval: its single tasks' items, the first ``limit`` of each."""
        items = (doc for single in singles for doc in _first(single.eval_docs, limit))
        return self._figures(name, task, self._same_source(task, found, singles), map(_texts, items))

    def in_windows(self, name: str, task: Task, found: Any, windows: Iterable[str]) -> dict[str, float]:
        """Return the figures of a perplexity, whose windows are given as text."""
        texts = (without(window, self.template) for window in windows)
        return self._figures(name, task, self._same_source(task, found, []), texts)

    def _figures(self, name: str, task: Task, same: bool, items: Iterable[Iterable[str]]) -> dict[str, float]:
        """Return what is known of a task's text; warn if it was seen.

        Returns:
            ``seen``: 1 or 0; ``same_domain``: 1 if it isn't, but other text of its domain is calibrated on, else 0; and
            ``overlap``: the share of the items that share a run, where the calibration text itself is known.
        """
        copies: dict[str, float] = {}
        if self.runs is not None:
            shared = [any(_share_run(text, self.runs) for text in texts) for texts in items]
            copies["overlap"] = sum(shared) / max(len(shared), 1)
        overlap = copies.get("overlap", 0.0)
        seen = same or overlap >= SEEN_SHARE
        why = "its source is" if same else f"{100 * overlap:.0f} % of its items share {WORDS} words in a row with"
        if seen:
            logger.warning(
                "tasks: %s is no unseen text: %s the calibration text (%s); take its score for no other text",
                name, why, ", ".join(source.name for source, _ in self.sources),
            )  # fmt: skip
        return {"seen": int(seen), "same_domain": int(not seen and self._same_domain(task)), **copies}

    def _same_domain(self, task: Task) -> bool:
        domains = {_domain(name) for source, _ in self.sources for name in streamed.repositories(source.name)}
        text = EMBEDDED.get(task.name, ("", None))[1]
        return text is not None and embedded.TEXTS[text].domain in domains

    def _same_source(self, task: Task, found: Any, singles: Sequence[Any]) -> bool:
        if task.name in EMBEDDED:
            return any(known.get("sha256") == found and source.split == HELD_OUT for source, known in self.sources)
        if is_file(task):
            return any(known.get("sha256") == found for _, known in self.sources)
        return any(_same_split(source, known, single) for source, known in self.sources for single in singles)


def _share_run(text: str, known: Hashes) -> bool:
    runs = hashes_of_runs(text)
    if not len(runs) or not len(known):
        return False
    places = np.searchsorted(known, runs).clip(max=len(known) - 1)
    return bool((known[places] == runs).any())


def _domain(name: str) -> str | None:
    """Return the domain of a source, if it is known: of an embedded text, or of a hub dataset with a name of its own here."""
    return embedded.TEXTS[name].domain if name in embedded.TEXTS else streamed.DOMAINS.get(name)


def _same_split(source: Source, known: Mapping[str, Any], single: Any) -> bool:
    """Tell whether one of lm-eval's tasks reads the config and split of the hub dataset that the calibration reads."""
    config = single.config
    for repository in known.get("commits", {}):
        split = config.test_split if single.has_test_docs() else config.validation_split
        part = source.config or streamed.CONFIGS.get(repository)
        if (
            str(config.dataset_path).lower() == repository.lower()
            and str(split).split("[")[0] == (source.split or "train").split("[")[0]
            and (part == config.dataset_name or None in (part, config.dataset_name))
        ):
            return True
    return False


def _first(documents: Sequence[Any], limit: int | None) -> Iterator[Any]:
    return (documents[place] for place in range(len(documents) if limit is None else min(limit, len(documents))))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in an item, whatever its form."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.values()])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
