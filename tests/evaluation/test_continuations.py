"""Greedy decoding against plain passes, the report's prompts, and the embedded task with known answers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.entries import Task
from replaceme.base.parameters import Params
from replaceme.evaluation import requests
from replaceme.evaluation.continuations import PROMPTS, continue_prompts, pair_continuations, write_continuations
from replaceme.evaluation.scores import Scores, score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model
from tests.conftest import WRITTEN, made_model, made_text, made_tokenizer


def plain_greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The most likely token each time, by one whole pass a token; up to the model's end of text."""
    written: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            written.append(int(model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].argmax()))
        if written[-1] == model.config.eos_token_id:
            break
    return written


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_batch_gives_what_one_plain_pass_a_token_gives(family: str) -> None:
    model, tokenizer = made_model(family, dtype=torch.float64), made_tokenizer()
    # The model's own penalties and temperature change nothing.
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    prompts = [torch.randint(2, 400, (9,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
    expected = [tokenizer.decode(plain_greedy(model, ids, 12), skip_special_tokens=True) for ids in prompts]
    assert write_continuations(model, tokenizer, prompts, 12) == expected
    assert len(set(expected)) > 1
    assert model.generation_config.repetition_penalty == 5.0


def test_a_stop_text_ends_a_row_and_is_left_out() -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer()
    prompts = [[5, 6, 7], [8, 9, 10]]
    whole = write_continuations(model, tokenizer, prompts, 12)
    stop = whole[0][2:4]
    assert write_continuations(model, tokenizer, prompts, 12, [stop, ""]) == [text.split(stop)[0] for text in whole]


def test_a_chat_goes_through_the_template_up_to_the_reply() -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompts = [tokenizer.encode(f"<user>{prompt.text}\n<assistant>" if prompt.chat else prompt.text) for prompt in PROMPTS]
    expected = [tokenizer.decode(plain_greedy(model, ids, WRITTEN), skip_special_tokens=True) for ids in prompts]
    assert continue_prompts(model, tokenizer, "test") == expected
    short = made_model("gpt2", max_position_embeddings=16)
    assert len(continue_prompts(short, tokenizer, "test")) == len(PROMPTS)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no user') }}"])
def test_without_a_usable_chat_template_the_prompt_is_plain(template: str | None) -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer(chat=False)
    tokenizer.chat_template = template
    expected = [write_continuations(model, tokenizer, [tokenizer.encode(prompt.text)], WRITTEN)[0] for prompt in PROMPTS]
    assert continue_prompts(model, tokenizer, "test") == expected


def test_the_dense_models_continuations_are_kept_with_its_scores(params: Params, tiny: Model, tmp_path: Path) -> None:
    bare = params.model_copy(update={"tasks": ()})
    score_model(bare, tiny, {}, is_dense=True).save(tmp_path)
    dense = Scores.load(tmp_path)
    pruned = score_model(bare, tiny, {}, dense)
    pairs = pair_continuations(dense.continuations, pruned.continuations)
    assert [pair["dense"] for pair in pairs] == [pair["pruned"] for pair in pairs] == dense.continuations
    assert [pair["answer"] for pair in pairs] == ["", "", "Paris"]
    assert score_model(bare, tiny, {}).continuations == []


def test_exact_matches_are_counted(params: Params, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.load("float32", torch.device("cpu")), tiny.tokenizer()
    queries = [made_text(1 + seed % 2, seed).strip() for seed in range(12)]
    written = [tokenizer.decode(plain_greedy(model, tokenizer.encode(text), 8), skip_special_tokens=True) for text in queries]
    answers = [re.split(r"[.\n]", text)[0].strip() for text in written]
    monkeypatch.setattr(requests, "task_items", lambda _: items)
    asked = params.model_copy(update={"tasks": (Task("retrieval_exact"),), "eval_dtype": "float32"})
    for right in (0, 5, 12):
        items = [
            {"query": query, "answer": answer if number < right else f"not {answer}"}
            for number, (query, answer) in enumerate(zip(queries, answers, strict=True))
        ]
        scores = score_model(asked, tiny, task_fingerprints(asked))
        figures = scores.figures["accuracy"]["retrieval_exact"]
        assert figures["accuracy"] == pytest.approx(right / 12)
        assert (figures["items"], figures["metric"], figures["fewshots"]) == (12, "exact_match", 0)
        assert scores.items["accuracy/retrieval_exact"].tolist() == [1.0] * right + [0.0] * (12 - right)
