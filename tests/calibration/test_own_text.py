import pytest
import torch

from replaceme.base.errors import ModelError
from replaceme.calibration import own_text
from replaceme.calibration.own_text import choose_start, find_chat_turns, write_texts
from tests.conftest import made_model, made_tokenizer


def test_the_same_seed_writes_the_same_text_and_another_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "MAX_ROWS", 2)
    model, tokenizer = made_model(), made_tokenizer()
    tokenizer.chat_template = None
    state = torch.get_rng_state()
    texts = [write_texts(model, tokenizer, 5, 20, seed) for seed in (1, 1, 2)]
    assert [len(text) for text in texts] == [5, 5, 5]
    assert {len(document) for text in texts for document in text} == {20}
    assert all(map(torch.equal, texts[0], texts[1]))
    assert not all(map(torch.equal, texts[0], texts[2]))
    assert all(document[:1].tolist() == choose_start(tokenizer) for document in texts[0])
    # The caller's random numbers are left alone.
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_come_with_the_models_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "MAX_ROWS", 4000)
    model, tokenizer = made_model(), made_tokenizer()
    tokenizer.chat_template = None
    texts = torch.stack(write_texts(model, tokenizer, 4000, 2, 0))
    with torch.no_grad():
        expected = model(torch.tensor([choose_start(tokenizer)])).logits[0, -1].softmax(-1)
    counts = torch.bincount(texts[:, 1], minlength=len(expected)) / len(texts)
    spread = (expected * (1 - expected) / len(texts)).sqrt()
    assert bool(((counts - expected).abs() <= 5 * spread + 1e-4).all())


def test_half_of_a_chat_models_documents_are_chats_of_its_template() -> None:
    model, tokenizer = made_model(), made_tokenizer()
    turns = find_chat_turns(tokenizer)
    assert turns is not None
    texts = write_texts(model, tokenizer, 40, 150, 3)
    plain, chats = texts[::2], [document.tolist() for document in texts[1::2]]
    assert all(document[:1].tolist() == choose_start(tokenizer) for document in plain)
    ended = 0
    for ids in chats:
        assert ids[: len(turns.opening)] == turns.opening
        start, between = len(turns.opening), [turns.after_user, turns.after_assistant]
        while between[0][0] in ids[start:]:
            start = ids.index(between[0][0], start)
            written = ids[start : start + len(between[0])]
            assert written == between[0][: len(written)]
            ended += 1
            start += len(between[0])
            between.reverse()
    assert ended > 2


def test_a_template_without_separate_turns_gives_plain_texts_only() -> None:
    tokenizer = made_tokenizer()
    tokenizer.chat_template = None
    assert find_chat_turns(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert find_chat_turns(tokenizer) is None


def test_the_template_of_its_chats_has_the_date_that_all_chats_have() -> None:
    model, tokenizer = made_model(), made_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%Y-%m-%d') + ' ' }}{% for turn in messages %}{{ turn['content'] + ' then ' }}{% endfor %}"
    )
    assert "2024-07-26" in tokenizer.decode(write_texts(model, tokenizer, 2, 40, 0)[1])


def test_a_model_that_cannot_write_is_refused() -> None:
    tokenizer, model = made_tokenizer(bos=False), made_model()
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(ModelError, match="self needs a tokenizer with a bos or eos token"):
        choose_start(tokenizer)
    forward = model.forward
    model.forward = lambda ids, **_: forward(ids, use_cache=False)
    with pytest.raises(ModelError, match="dataset: self needs a model with a cache of keys and values"):
        write_texts(model, made_tokenizer(), 2, 8, 0)
    model.forward = forward
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="dtype: the model's predictions overflow while it writes its own text"):
        write_texts(model, made_tokenizer(), 2, 8, 0)
