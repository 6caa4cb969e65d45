import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from replaceme.base.errors import DatasetError
from replaceme.evaluation.perplexity import TOP, WINDOW, cut_windows, divergence, mean_stderr, perplexities, score_windows
from replaceme.evaluation.requests import Requests
from tests.conftest import made_model, made_text, made_tokenizer


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_an_independent_computation(bos: bool, batch_size: int) -> None:
    model, tokenizer, text = made_model(max_position_embeddings=2048), made_tokenizer(bos=bos), made_text(150)
    ids = tokenizer.encode(text, add_special_tokens=False)
    room = WINDOW - bos
    losses: list[torch.Tensor] = []
    for start in range(0, len(ids), room):
        window = torch.tensor([*([0] if bos else []), *ids[start : start + room]])
        with torch.no_grad():
            likelihood = model(window[None]).logits[0].double().log_softmax(-1)
        losses += [-likelihood[position, window[position + 1]] for position in range(len(window) - 1)]
    nll = float(torch.stack(losses).mean())
    windows = cut_windows("t", [text], tokenizer, None)
    found = perplexities(score_windows(model, windows, batch_size, "test")["losses"], windows)
    assert found["token"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["word"] == pytest.approx(math.exp(nll * len(ids) / len(text.split())), rel=1e-4)
    if len(ids) > room:
        assert 0 < found["stderr"] < found["token"]
    assert found["byte"] == pytest.approx(math.exp(nll * len(ids) / len(text.encode())), rel=1e-4)


def test_standard_error_is_that_of_the_windows_means() -> None:
    model, tokenizer = made_model(max_position_embeddings=2048), made_tokenizer()
    texts = [made_text(9, seed) for seed in range(12)]
    windows = cut_windows("t", texts, tokenizer, None)
    losses = []
    for window in windows.windows:
        with torch.no_grad():
            likelihood = model(window[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(likelihood[place, window[place + 1]]) for place in range(len(window) - 1)))
    counts = torch.tensor([float(len(window) - 1) for window in windows.windows], dtype=torch.float64)
    totals = torch.tensor(losses, dtype=torch.float64)
    nll = float(totals.sum() / counts.sum())
    ratio_error = float((totals - nll * counts).std() * len(losses) ** 0.5 / counts.sum())
    assert perplexities(score_windows(model, windows, 1, "t")["losses"], windows)["stderr"] == pytest.approx(
        math.exp(nll) * ratio_error, rel=1e-3
    )


def test_windows_of_several_texts_are_no_independent_sample(tmp_path: Path) -> None:
    tokenizer, model = made_tokenizer(), made_model(max_position_embeddings=64)
    windows = cut_windows("t", [made_text(count, seed=count) for count in (3, 12, 20, 30, 9, 16)], tokenizer, None, 64)
    counts, losses = windows.predictions(), score_windows(model, windows, 4, "t")["losses"]
    owners = torch.tensor(windows.texts)
    assert owners.bincount().tolist() == [len([text for text in windows.texts if text == number]) for number in range(6)]
    assert int(owners.bincount().max()) > 1
    nll = float(losses.sum() / counts.sum())
    sums = [float((losses - nll * counts)[owners == number].sum()) for number in range(6)]
    expected = (6 / 5 * sum(each**2 for each in sums)) ** 0.5 / float(counts.sum())
    assert perplexities(losses, windows)["stderr"] == pytest.approx(math.exp(nll) * expected)
    (requests := Requests({"t": windows})).save(tmp_path)
    assert [*Requests.load(tmp_path).windows["t"].texts] == [*requests.windows["t"].texts]


def test_windows_of_one_text_or_of_their_own_are_the_sample() -> None:
    windows = cut_windows("t", [made_text(60)], made_tokenizer(), None, 64)
    assert len(windows.windows) > 1
    assert windows.texts == ()
    assert cut_windows("t", [made_text(1, seed) for seed in range(5)], made_tokenizer(), None).texts == ()


def test_a_figure_that_overflows_is_left_out() -> None:
    endless = "ab" * 900  # one word of so many tokens that its perplexity overflows
    windows = cut_windows("t", [endless], made_tokenizer(), None)
    figures = perplexities(score_windows(made_model(max_position_embeddings=2048), windows, 1, "t")["losses"], windows)
    assert "word" not in figures
    assert {"token", "byte"} <= set(figures)


def test_a_start_of_several_ids_makes_no_empty_windows() -> None:
    tokenizer = made_tokenizer(bos=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    windows = cut_windows("t", ["the river", made_text(400)], tokenizer, None)
    assert all(len(window) > 2 for window in windows.windows)


def test_windows_come_from_each_text_in_turn_up_to_the_limit() -> None:
    tokenizer = made_tokenizer(bos=False)
    texts = [made_text(300, 1), made_text(300, 2)]
    windows = cut_windows("t", texts, tokenizer, WINDOW + 10)
    assert [len(window) for window in windows.windows] == [WINDOW, 10]
    assert windows.tokens == WINDOW + 10
    assert windows.windows[1].tolist() == tokenizer.encode(texts[1])[:10]


def test_a_text_without_tokens_is_an_error() -> None:
    with pytest.raises(DatasetError, match="tasks: t has no text after tokenization"):
        cut_windows("t", [" "], made_tokenizer(), None)


def test_windows_are_no_longer_than_the_positions_that_a_model_has() -> None:
    model, tokenizer = made_model("gpt2", n_positions=64, max_position_embeddings=64), made_tokenizer()
    windows = cut_windows("t", [made_text(60)], tokenizer, None, model.config.max_position_embeddings)
    assert max(map(len, windows.windows)) == 64
    assert perplexities(score_windows(model, windows, 2, "t")["losses"], windows)["token"] > 1


def test_divergence_and_agreement_equal_those_of_the_whole_distributions() -> None:
    dense, other = made_model(max_position_embeddings=2048), made_model(max_position_embeddings=2048)
    torch.manual_seed(1)
    with torch.no_grad():
        other.lm_head.weight += 0.5 * torch.randn_like(other.lm_head.weight)
    windows = cut_windows("t", [made_text(40, seed) for seed in range(3)], made_tokenizer(), None)
    likely = score_windows(dense, windows, 2, "t", keep_likely=True)
    found = score_windows(other, windows, 2, "t", likely)
    for number, window in enumerate(windows.windows):
        with torch.no_grad():
            p, q = (model(window[None, :-1]).logits[0].double().log_softmax(-1) for model in (dense, other))
        assert float(found["agreements"][number]) == int((p.argmax(-1) == q.argmax(-1)).sum())
        whole = float((p.exp() * (p - q)).sum())
        assert 0 < float(found["divergences"][number]) <= whole * (1 + 1e-5)
        if p.shape[-1] <= TOP:
            assert float(found["divergences"][number]) == pytest.approx(whole, rel=1e-4)
    same = score_windows(dense, windows, 2, "t", likely)
    assert not same["divergences"].any()
    assert same["agreements"].tolist() == windows.predictions().tolist()


@pytest.mark.parametrize("tokens", [64, 300])
def test_the_divergence_of_the_likely_tokens_is_near_the_whole(tokens: int) -> None:
    torch.manual_seed(0)
    p, q = (3 * torch.randn(2, 20, tokens, dtype=torch.float64)).log_softmax(-1)
    values, places = p.topk(64)
    whole, found = (p.exp() * (p - q)).sum(-1), divergence(values, q.gather(1, places))
    assert bool((found <= whole + 1e-9).all())
    assert bool((found >= 0.9 * whole).all())


def test_a_chat_is_scored_in_its_template_or_as_plain_text() -> None:
    tokenizer = made_tokenizer()
    tokenizer.chat_template = None
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "bca"}]
    plain = cut_windows("t", [chat], tokenizer, None).windows[0]
    assert torch.equal(plain, cut_windows("t", ["User: abc\n\nAssistant: bca"], tokenizer, None).windows[0])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    assert torch.equal(
        cut_windows("t", [chat], tokenizer, None).windows[0], cut_windows("t", ["abc bca "], tokenizer, None).windows[0]
    )


def test_a_model_agrees_with_itself_everywhere_although_predictions_of_few_bits_tie() -> None:
    model = made_model(max_position_embeddings=2048).bfloat16()
    windows = cut_windows("t", [made_text(200)], made_tokenizer(), None)
    likely = score_windows(model, windows, 1, "t", keep_likely=True)
    same = score_windows(model, windows, 1, "t", likely)
    assert not same["divergences"].any()
    assert same["agreements"].tolist() == windows.predictions().tolist()


def test_few_texts_have_no_standard_error() -> None:
    sums, counts = torch.arange(12, dtype=torch.float64), torch.full((12,), 3, dtype=torch.float64)
    assert mean_stderr(sums, counts, torch.arange(12) % 4) is None
    assert mean_stderr(sums[:1], counts[:1]) is None
    assert mean_stderr(sums, counts, torch.arange(12) % 6)
