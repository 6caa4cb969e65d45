"""Embedded task: choose how a text continues, out of four choices, in HellaSwag's form, from held-out articles.

The context is a run of whole sentences. The choices are the next sentence and three sentences from elsewhere in the same
article, all cut to the same number of words, so that neither topic nor length gives the answer away.
"""

import hashlib
import random
import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

ITEMS = 450
CONTEXT_WORDS = 40
CHOICE_WORDS = 12
CHOICES = 4


def continuation_items(articles: Iterable[str]) -> list[dict[str, Any]]:
    """Return at most ``ITEMS`` items ``{query, choices, gold, article}``, from all articles in turn; deterministic."""
    return in_turn([_items_of(article) for article in articles], ITEMS)


def in_turn(lists: Iterable[list[dict[str, Any]]], limit: int) -> list[dict[str, Any]]:
    """Return the first entry of each list, then the second of each, and so on, ``limit`` in all."""
    return [item for row in zip_longest(*lists) for item in row if item][:limit]


def _items_of(article: str) -> list[dict[str, Any]]:
    chance = random.Random(hashlib.sha256(article.encode()).digest())
    items = []
    paragraphs = [sentences(paragraph) for paragraph in article.split("\n\n")]
    pool = [_opening(sentence) for paragraph in paragraphs for sentence in paragraph if _long_enough(sentence)]
    for paragraph in paragraphs:
        context: list[str] = []
        for sentence in paragraph:
            if sum(len(text.split()) for text in context) >= CONTEXT_WORDS and _long_enough(sentence):
                gold = _opening(sentence)
                others = [text for text in pool if text != gold and text not in " ".join(context)]
                if len(others) >= CHOICES - 1:
                    choices = [gold, *chance.sample(others, CHOICES - 1)]
                    chance.shuffle(choices)
                    item = {"query": " ".join(context), "choices": choices, "gold": choices.index(gold)}
                    items.append(item | {"article": name_of(article)})
                context = []
            else:
                context.append(sentence)
    return items


def name_of(article: str) -> str:
    """Return a short name of an article, by its content."""
    return hashlib.sha256(article.encode()).hexdigest()[:16]


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences, by punctuation and capitals."""
    return re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)


def _long_enough(sentence: str) -> bool:
    return len(sentence.split()) >= CHOICE_WORDS


def _opening(sentence: str) -> str:
    return " ".join(sentence.split()[:CHOICE_WORDS])
