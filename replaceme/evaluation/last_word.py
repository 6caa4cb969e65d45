"""Embedded task: predict the last word of a passage, in LAMBADA's form (arXiv 1606.06031), from held-out articles.

A passage is a sentence with the sentences before it. Its last word is not a common one and occurs in the earlier sentences, so
that the long context gives it away and the last sentence alone hardly does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from replaceme.evaluation.continuation import in_turn, name_of, sentences

ITEMS = 450
CONTEXT_WORDS = 50
SHORTEST_WORD = 4
# A word that occurs in at least this share of all sentences is common.
COMMON = 0.05


def last_word_items(articles: Iterable[str]) -> list[dict[str, Any]]:
    """Return at most ``ITEMS`` items ``{context, word, article}``, from all articles in turn; deterministic."""
    articles = [*articles]
    texts = [[sentences(paragraph) for paragraph in article.split("\n\n")] for article in articles]
    everything = [sentence for text in texts for paragraph in text for sentence in paragraph]
    counts = Counter(word for sentence in everything for word in set(_words(sentence)))
    common = {word for word, count in counts.items() if count >= COMMON * len(everything)}
    named = zip(texts, map(name_of, articles), strict=True)
    return in_turn([[{**item, "article": name} for item in _items_of(text, common)] for text, name in named], ITEMS)


def _items_of(paragraphs: list[list[str]], common: set[str]) -> Iterator[dict[str, Any]]:
    passage: list[str] = []
    for sentence in (sentence for paragraph in paragraphs for sentence in paragraph):
        ending = re.fullmatch(r"(.* )([a-z]+)[.!?]", sentence)
        if ending and sum(len(text.split()) for text in passage) >= CONTEXT_WORDS:
            start, word = ending[1].rstrip(), ending[2]
            known = word in _words(" ".join(passage))
            if known and len(word) >= SHORTEST_WORD and word not in common:
                yield {"context": " ".join([*passage, start]), "word": word}
                passage = []
                continue
        passage.append(sentence)
        # The shortest run of whole sentences before here that is long enough.
        while sum(len(text.split()) for text in passage[1:]) >= CONTEXT_WORDS:
            passage.pop(0)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
