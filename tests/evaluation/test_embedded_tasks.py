"""The items that are made from embedded texts, or by code."""

import json
import random
import re

from replaceme.evaluation.embedded_tasks import (
    CHOICE_WORDS,
    MIN_CONTEXT_WORDS,
    PAIRS,
    RETRIEVAL_ITEMS,
    make_continuation_items,
    make_last_word_items,
    make_retrieval_items,
)
from tests.conftest import made_text
from tests.pipeline.closure import ROOT


def test_continuations_are_runs_of_sentences_with_one_true_end() -> None:
    articles = [made_text(120, seed) for seed in range(4)]
    items = make_continuation_items(articles)
    assert len(items) > 20
    for item in items:
        assert len(item["query"].split()) >= MIN_CONTEXT_WORDS["continuation"]
        assert [len(choice.split()) for choice in item["choices"]] == [CHOICE_WORDS] * 4
        assert len(set(item["choices"])) == 4
        true = f"{item['query']} {item['choices'][item['gold']]}"
        assert any(true in article for article in articles)
        false = [f"{item['query']} {choice}" for choice in item["choices"] if choice not in true]
        assert not any(text in article for text in false for article in articles)
    assert items == make_continuation_items(iter(articles))
    assert {item["gold"] for item in items} == {0, 1, 2, 3}
    assert len({item["article"] for item in items}) == 4


def test_last_words_end_a_sentence_and_occur_in_the_passage_before_it() -> None:
    # Every word of the small made-up vocabulary is common, so rare words are inserted.
    articles = []
    for seed in range(4):
        sentences = made_text(60, seed).replace("\n\n", " ").split(". ")
        for index in range(8, 60, 10):
            sentences[index - 3] += f" near the zebra{'abcdef'[index // 10]}"
            sentences[index] += f" saw the zebra{'abcdef'[index // 10]}"
        articles.append(". ".join(sentences))
    items = make_last_word_items(articles)
    assert len(items) >= 8
    assert items == make_last_word_items(iter(articles))
    homes = {item["article"]: {article for article in articles if item["context"][:60] in article} for item in items}
    assert len(homes) == len({*map(frozenset, homes.values())}) > 1
    for item in items:
        assert any(f"{item['context']} {item['word']}." in article for article in articles)
        assert len(item["context"].split()) >= MIN_CONTEXT_WORDS["last_word"]
        earlier = item["context"].rsplit(". ", 1)[0]
        assert re.search(rf"\b{item['word']}\b", earlier, re.IGNORECASE)
        assert item["word"].startswith("zebra")


def test_embedded_tasks_have_enough_items_for_a_standard_error_of_three_points() -> None:
    # As the committed run of the pipeline scored them.
    scores = json.loads((ROOT / "metrics" / "evaluation.json").read_text(encoding="utf-8"))["accuracy"]
    for name in ("wikipedia_last_word", "wikipedia_continuation"):
        assert 100 * 0.5 / scores[name]["items"] ** 0.5 < 3.1


def test_each_answer_of_the_retrieval_is_the_code_of_the_name_that_is_asked_for() -> None:
    items = make_retrieval_items([])
    random.seed(5)
    assert make_retrieval_items([]) == items
    assert len(items) == len({item["query"] for item in items}) == RETRIEVAL_ITEMS
    for number, item in enumerate(items):
        context, question, start = item["query"].split("\n")
        codes = dict(re.findall(r"The code of the (\w+ \w+) is (\d{4})\.", context))
        (asked_for,) = re.findall(r"^Question: What is the code of the (\w+ \w+)\?$", question)
        assert start == f"Answer: The code of the {asked_for} is"
        assert codes[asked_for] == item["answer"]
        assert len(codes) == len(set(codes.values())) == PAIRS[number % len(PAIRS)]
