import math
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor

from replaceme.base.errors import DatasetError
from replaceme.evaluation.perplexity import TOP, compute_perplexities, kl_divergence, score_windows
from replaceme.evaluation.windows import WINDOW, Windows, cut_windows
from tests.conftest import made_model, made_text, made_tokenizer


def plain_losses(model: Any, window: Tensor) -> Tensor:
    """Return the negative log-likelihood of each predicted token, by one pass over the window, (tokens − 1,) float64."""
    with torch.no_grad():
        logs = model(window[None]).logits[0].double().log_softmax(-1)
    return -logs[:-1].gather(1, window[1:, None])[:, 0]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_an_independent_computation(bos: bool, batch_size: int) -> None:
    model, tokenizer, text = made_model(max_position_embeddings=2048), made_tokenizer(bos=bos), made_text(150)
    ids = tokenizer.encode(text, add_special_tokens=False)
    room = WINDOW - bos
    assert len(ids) > room
    cut = [torch.tensor([*([0] if bos else []), *ids[start : start + room]]) for start in range(0, len(ids), room)]
    nll = float(torch.cat([plain_losses(model, window) for window in cut]).mean())
    windows = cut_windows("t", [text], tokenizer, None)
    figures = compute_perplexities(score_windows(model, windows, batch_size, "test")["losses"], windows)
    assert figures["token"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert figures["word"] == pytest.approx(math.exp(nll * len(ids) / len(text.split())), rel=1e-4)
    assert figures["byte"] == pytest.approx(math.exp(nll * len(ids) / len(text.encode())), rel=1e-4)
    assert 0 < figures["stderr"] < figures["token"]


def test_windows_of_several_texts_are_no_independent_sample() -> None:
    tokenizer, model = made_tokenizer(), made_model(max_position_embeddings=64)
    windows = cut_windows("t", [made_text(count, seed=count) for count in (3, 12, 20, 30, 9, 16)], tokenizer, None, 64)
    figures = compute_perplexities(score_windows(model, windows, 4, "t")["losses"], windows)
    losses = [plain_losses(model, window) for window in windows.ids]
    nll, owners = float(torch.cat(losses).mean()), torch.tensor(windows.texts)
    assert int(owners.bincount().max()) > 1
    residuals = torch.tensor([float((each - nll).sum()) for each in losses]).double()
    sums = torch.stack([residuals[owners == number].sum() for number in range(6)])
    expected = float((6 / 5 * sums.square().sum()) ** 0.5) / sum(map(len, losses))
    assert figures["stderr"] == pytest.approx(math.exp(nll) * expected, rel=1e-4)


def test_a_figure_that_overflows_is_left_out() -> None:
    endless = "ab" * 900  # one word of so many tokens that its perplexity overflows
    windows = cut_windows("t", [endless], made_tokenizer(), None)
    figures = compute_perplexities(score_windows(made_model(max_position_embeddings=2048), windows, 1, "t")["losses"], windows)
    assert "word" not in figures
    assert {"token", "byte"} <= set(figures)


def test_divergence_and_agreement_equal_those_of_the_whole_distributions() -> None:
    dense, other = made_model(max_position_embeddings=2048), made_model(max_position_embeddings=2048)
    torch.manual_seed(1)
    with torch.no_grad():
        other.lm_head.weight += 0.5 * torch.randn_like(other.lm_head.weight)
    windows = cut_windows("t", [made_text(40, seed) for seed in range(3)], made_tokenizer(), None)
    likely = score_windows(dense, windows, 2, "t", keep_likely=True)
    scores = score_windows(other, windows, 2, "t", likely)
    for number, window in enumerate(windows.ids):
        with torch.no_grad():
            p, q = (model(window[None, :-1]).logits[0].double().log_softmax(-1) for model in (dense, other))
        assert float(scores["agreements"][number]) == float((p.argmax(-1) == q.argmax(-1)).double().mean())
        whole = float((p.exp() * (p - q)).sum(-1).mean())
        assert 0.5 * whole < float(scores["divergences"][number]) <= whole * (1 + 1e-5)


@pytest.mark.parametrize("tokens", [TOP, 300])
def test_the_divergence_of_the_likely_tokens_is_near_the_whole(tokens: int) -> None:
    torch.manual_seed(0)
    p, q = (3 * torch.randn(2, 20, tokens, dtype=torch.float64)).log_softmax(-1)
    values, indices = p.topk(TOP)
    whole, partial = (p.exp() * (p - q)).sum(-1), kl_divergence(values, q.gather(1, indices))
    assert bool((partial <= whole + 1e-9).all())
    assert bool((partial >= (0.9 if tokens > TOP else 1 - 1e-6) * whole).all())


def test_a_chat_is_scored_in_its_template_or_as_plain_text() -> None:
    tokenizer = made_tokenizer()
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "bca"}]
    turns = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    for template, text in ((None, "User: abc\n\nAssistant: bca"), (turns, "abc bca ")):
        tokenizer.chat_template = template
        windows = [cut_windows("t", [row], tokenizer, None).ids[0] for row in (chat, text)]
        assert torch.equal(*windows)


def test_a_model_agrees_with_itself_everywhere_although_predictions_of_few_bits_tie() -> None:
    model = made_model(max_position_embeddings=2048).bfloat16()
    windows = cut_windows("t", [made_text(200)], made_tokenizer(), None)
    same = score_windows(model, windows, 1, "t", score_windows(model, windows, 1, "t", keep_likely=True))
    assert not same["divergences"].any()
    assert bool((same["agreements"] == 1).all())


def test_windows_come_from_each_text_in_turn_up_to_the_limit_and_the_models_positions() -> None:
    tokenizer, texts = made_tokenizer(bos=False), [made_text(300, 1), made_text(300, 2)]
    windows = cut_windows("t", texts, tokenizer, WINDOW + 10)
    assert [len(window) for window in windows.ids] == [WINDOW, 10]
    assert windows.tokens == WINDOW + 10
    assert windows.ids[1].tolist() == tokenizer.encode(texts[1])[:10]
    windows = cut_windows("t", texts, made_tokenizer(), None, 64)
    assert max(map(len, windows.ids)) == 64
    loaded = Windows.load(windows.tensors("t"), "t")
    assert all(map(torch.equal, loaded.ids, windows.ids))
    assert (loaded.texts, loaded.tokens, loaded.words, loaded.bytes) == (
        windows.texts, windows.tokens, windows.words, windows.bytes,
    )  # fmt: skip
    # A start of several ids makes no windows without text.
    start = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer._tokenizer.post_processor = start
    assert all(len(window) > 2 for window in cut_windows("t", ["the river", made_text(400)], tokenizer, None).ids)
    with pytest.raises(DatasetError, match="tasks: t has no text after tokenization"):
        cut_windows("t", [" "], tokenizer, None)
