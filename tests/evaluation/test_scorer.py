"""Likelihoods and generated answers: our scorer compared with lm-eval's own, and with one plain pass per request."""

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from replaceme.base.errors import DatasetError
from replaceme.evaluation.scorer import CausalScorer
from tests.conftest import made_model, made_text, made_tokenizer


def scorer_of(model: Any, batch_size: int = 1) -> CausalScorer:
    return CausalScorer(model, made_tokenizer(), batch_size, "test")


def score_pairs(scorer: CausalScorer, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    return scorer._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])


def plain_score(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logs = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return float(logs.gather(1, target[:, None]).sum()), bool((logs.argmax(-1) == target).all())


PAIRS = [
    ([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [11]), ([3, 4], [5, 6, 7]), ([12], [13, 14]), ([9, 8, 7, 6], [5]),
    ([3, 4], [5, 6, 7]), ([7, 7, 7, 7], [1, 2, 3]), ([6, 5], [4]), ([2, 2], [3, 3]),
]  # fmt: skip
# The families' sliding windows have 8 tokens.
LONG = [(list(range(2, 2 + length)), [length, 5, 6][:size]) for length in (9, 14, 30) for size in (1, 2, 3)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shares", [True, False])
def test_each_likelihood_equals_one_plain_pass(family: str, shares: bool) -> None:
    model = made_model(family, dtype=torch.float64)
    for batch_size in (1, 8):
        scorer = scorer_of(model, batch_size)
        assert scorer.shares_contexts
        scorer.shares_contexts = shares
        for pair, (likelihood, greedy) in zip(PAIRS + LONG, score_pairs(scorer, PAIRS + LONG), strict=True):
            expected = plain_score(model, *pair)
            assert likelihood == pytest.approx(expected[0], rel=1e-5)
            assert greedy == expected[1]


@pytest.mark.parametrize("bos", [True, False])
def test_empty_contexts_and_whole_texts_are_read_as_lm_eval_reads_them(bos: bool) -> None:
    model, tokenizer = made_model(max_position_embeddings=64), made_tokenizer(bos=bos)
    ours, theirs = CausalScorer(model, tokenizer, 1, "test"), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = [Instance("loglikelihood", {}, ("", text), 0) for text in ("the river", "a boat")]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in ours.loglikelihood(requests)] == pytest.approx([score for score, _ in expected], rel=1e-4)
    texts = [Instance("loglikelihood_rolling", {}, (made_text(count),), 0) for count in (1, 30)]
    assert len(tokenizer.encode(texts[1].args[0])) > 2 * 64
    whole = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(whole, rel=1e-5)


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(DatasetError, match="tasks: the answer 'x' of an item has no tokens"):
        scorer_of(made_model())._loglikelihood_tokens([(("", "x"), [5], [])])


def test_contexts_longer_than_the_model_are_cut_at_the_left() -> None:
    model = made_model(max_position_embeddings=16)
    long, short = list(range(2, 60)), list(range(2, 60))[-15:]
    scores = score_pairs(scorer_of(model), [(long, [5, 6]), (short, [5, 6])])
    assert scores[0] == scores[1]


def questions(texts: list[str], **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (text, options), number) for number, text in enumerate(texts)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_equal_lm_evals_own(batch_size: int) -> None:
    model = made_model(dtype=torch.float64)
    requests = questions([made_text(1 + seed % 3, seed) for seed in range(10)], until=["e", "\n"], max_gen_toks=6)
    reference = HFLM(pretrained=model, tokenizer=made_tokenizer(), batch_size=1, add_bos_token=True)
    expected = reference.generate_until(requests, disable_tqdm=True)
    assert scorer_of(model, batch_size).generate_until(requests) == expected


def test_answers_are_sampled_where_a_task_asks_for_it() -> None:
    scorer = scorer_of(made_model())
    sampling = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 9}
    greedy, cold, *hot = (
        scorer.generate_until(questions(["the river"], **options))
        for options in ({"max_gen_toks": 9}, {**sampling, "temperature": 0.0}, *[sampling] * 5)
    )
    assert cold == greedy
    assert len(set(map(tuple, hot))) > 1
