"""The embedded tasks, which need no hub: perplexity of held-out parts of embedded texts, and items made from them or by code.

- ``wikipedia_last_word``: predict the last word of a passage, in LAMBADA's form (arXiv 1606.06031). A passage is a sentence and
  the sentences before it. Its last word is not a common one and occurs in the earlier sentences, so that the long context gives
  it away and the last sentence alone hardly does.
- ``wikipedia_continuation``: choose how a text goes on, out of four choices, in HellaSwag's form. The context is a run of whole
  sentences. The choices are the next sentence and three others of the article, all cut to the same number of words, so that
  neither topic nor length gives the answer away.
- ``retrieval_exact``: write the number that belongs to a name, out of several given before; scored by exact match. Copying out
  of the context goes through several layers (induction; Olsson et al., arXiv 2209.11895), and the answer is written token by
  token: what multiple choice forgives, this doesn't. A model that writes any of the codes scores ``mean(1 / pairs)``.

      The code of the red box is 4817. The code of the green key is 2093.
      Question: What is the code of the red box?
      Answer: The code of the red box is

Items are the same in each run: random choices are seeded by the article, or by ``SEED``.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Items = list[dict[str, Any]]
# Items of each task, and words of a context at least: all tasks together take about as many tokens as the perplexities.
ITEMS, MIN_CONTEXT_WORDS = 270, {"last_word": 25, "continuation": 20}
CHOICES, CHOICE_WORDS = 4, 8
MIN_LETTERS = 4
# A word that occurs in this part of all sentences is common.
COMMON = 0.05
RETRIEVAL_ITEMS, SEED = 100, 0
# Names with codes in an item, in turn: from what a small model can do to what a large one still finds hard.
PAIRS = (2, 4, 8, 16)
# Increase when an item of ``retrieval_exact`` changes.
RETRIEVAL_VERSION = 1
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "orange", "purple", "silver")
THINGS = ("box", "door", "key", "book", "cup", "bag", "lamp", "chair", "coat", "hat", "car", "boat", "bell", "drum", "clock")

# lm-eval's configurations of the items; the prompts are those of its own tasks of the same form: lambada, hellaswag.
WORD: Mapping[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + word}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# The shortest text that can hold an answer: a space, four digits and what ends them.
GENERATION: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "query",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}


def make_last_word_items(articles: Iterable[str]) -> Items:
    """Return at most ``ITEMS`` items ``{context, word, article}``, from all articles in turn."""
    articles = [*articles]
    texts = [[split_sentences(paragraph) for paragraph in article.split("\n\n")] for article in articles]
    sentences = [sentence for text in texts for paragraph in text for sentence in paragraph]
    counts = Counter(word for sentence in sentences for word in set(_find_words(sentence)))
    common = {word for word, count in counts.items() if count >= COMMON * len(sentences)}
    return _interleave([_iterate_last_words(article, text, common) for article, text in zip(articles, texts, strict=True)])


def _iterate_last_words(article: str, paragraphs: Sequence[Sequence[str]], common: set[str]) -> Iterator[dict[str, Any]]:
    passage: list[str] = []
    for sentence in (sentence for paragraph in paragraphs for sentence in paragraph):
        ending = re.fullmatch(r"(.* )([a-z]+)[.!?]", sentence)
        if ending and _count_words(passage) >= MIN_CONTEXT_WORDS["last_word"]:
            word = ending[2]
            if word in _find_words(" ".join(passage)) and len(word) >= MIN_LETTERS and word not in common:
                yield {"context": " ".join([*passage, ending[1].rstrip()]), "word": word, "article": hash_article(article)}
                passage = []
                continue
        passage.append(sentence)
        # The shortest run of whole sentences before here that is long enough.
        while _count_words(passage[1:]) >= MIN_CONTEXT_WORDS["last_word"]:
            passage.pop(0)


def make_continuation_items(articles: Iterable[str]) -> Items:
    """Return at most ``ITEMS`` items ``{query, choices, gold, article}``, from all articles in turn."""
    return _interleave(map(_iterate_continuations, articles))


def _iterate_continuations(article: str) -> Iterator[dict[str, Any]]:
    chance = random.Random(hashlib.sha256(article.encode()).digest())
    paragraphs = [split_sentences(paragraph) for paragraph in article.split("\n\n")]
    pool = [opening for paragraph in paragraphs for sentence in paragraph if (opening := _cut_opening(sentence))]
    for paragraph in paragraphs:
        context: list[str] = []
        for sentence in paragraph:
            right = _cut_opening(sentence)
            if not right or _count_words(context) < MIN_CONTEXT_WORDS["continuation"]:
                context.append(sentence)
                continue
            query = " ".join(context)
            context = []
            others = [text for text in pool if text != right and text not in query]
            if len(others) >= CHOICES - 1:
                choices = [right, *chance.sample(others, CHOICES - 1)]
                chance.shuffle(choices)
                yield {"query": query, "choices": choices, "gold": choices.index(right), "article": hash_article(article)}


def _cut_opening(sentence: str) -> str:
    """Return the first ``CHOICE_WORDS`` words of a sentence; an empty text if it has fewer."""
    words = sentence.split()
    return " ".join(words[:CHOICE_WORDS]) if len(words) >= CHOICE_WORDS else ""


def make_retrieval_items(_articles: Iterable[str]) -> Items:
    """Return ``RETRIEVAL_ITEMS`` items ``{query, answer}``."""
    chance = random.Random(SEED)
    return [_make_retrieval_item(chance, PAIRS[number % len(PAIRS)]) for number in range(RETRIEVAL_ITEMS)]


def _make_retrieval_item(chance: random.Random, pairs: int) -> dict[str, Any]:
    names = chance.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], pairs)
    codes = chance.sample(range(1000, 10000), pairs)
    asked = chance.randrange(pairs)
    context = " ".join(f"The code of the {name} is {code}." for name, code in zip(names, codes, strict=True))
    question = f"Question: What is the code of the {names[asked]}?\nAnswer: The code of the {names[asked]} is"
    return {"query": f"{context}\n{question}", "answer": str(codes[asked])}


def _interleave(articles: Iterable[Iterable[dict[str, Any]]]) -> Items:
    """Return the first item of each article, then the second of each, and so on, ``ITEMS`` in all."""
    return [item for row in zip_longest(*articles) for item in row if item][:ITEMS]


def hash_article(article: str) -> str:
    """Return a short name of an article, by its content."""
    return hashlib.sha256(article.encode()).hexdigest()[:16]


def split_sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences, by punctuation and capitals."""
    return re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)


def _find_words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _count_words(sentences: Iterable[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


@dataclass(frozen=True)
class EmbeddedTask:
    """An embedded task.

    Attributes:
        text: the embedded text of whose held-out part it is made; None if seeded code makes it.
        make_items: returns its items, from the texts of the articles; None for a perplexity.
        form: lm-eval's configuration of the items.
    """

    text: str | None
    make_items: Callable[[Iterable[str]], Items] | None = None
    form: Mapping[str, Any] | None = None


EMBEDDED: Mapping[str, EmbeddedTask] = {
    "wikipedia": EmbeddedTask("wikipedia-sample"),
    "bbc_news": EmbeddedTask("bbc-news"),
    "gutenberg_fiction": EmbeddedTask("gutenberg-fiction"),
    "python_code": EmbeddedTask("python-code"),
    "finance_answers": EmbeddedTask("finance-answers"),
    "medical_abstracts": EmbeddedTask("medical-abstracts"),
    "convention_speeches": EmbeddedTask("convention-speeches"),
    "wikipedia_last_word": EmbeddedTask("wikipedia-sample", make_last_word_items, WORD),
    "wikipedia_continuation": EmbeddedTask("wikipedia-sample", make_continuation_items, CHOICE),
    "retrieval_exact": EmbeddedTask(None, make_retrieval_items, GENERATION),
}
