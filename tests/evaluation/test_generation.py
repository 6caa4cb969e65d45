"""Generated answers: greedy decoding against plain passes and lm-eval's own, and the embedded task with known answers."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from replaceme.base.entries import Task
from replaceme.base.parameters import Params
from replaceme.evaluation import harness, tasks
from replaceme.evaluation.greedy import continuations
from replaceme.evaluation.prompts import PROMPTS, TOKENS, side_by_side, written
from replaceme.evaluation.requests import Encodings, Requests
from replaceme.evaluation.retrieval import ITEMS, PAIRS, retrieval_items
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.scores import Scores, score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model
from tests.conftest import made_model, made_text, made_tokenizer


def plain_greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The most likely token each time, by one whole pass a token; up to the model's end of text."""
    written: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            written.append(int(model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].argmax()))
        if written[-1] == model.config.eos_token_id:
            break
    return written


def scorer_of(model: Any, batch_size: int = 1, encodings: Encodings | None = None) -> CausalScorer:
    return CausalScorer(model, made_tokenizer(), batch_size, "test", encodings or Encodings())


def asked(texts: list[str], **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (text, options), number) for number, text in enumerate(texts)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_batch_gives_what_one_plain_pass_a_token_gives(family: str) -> None:
    model, tokenizer = made_model(family, dtype=torch.float64), made_tokenizer()
    prompts = [torch.randint(2, 400, (9,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
    expected = [tokenizer.decode(plain_greedy(model, ids, 12), skip_special_tokens=True) for ids in prompts]
    assert continuations(model, tokenizer, prompts, 12) == expected
    assert len(set(expected)) > 1


def test_a_stop_text_ends_a_row_and_is_left_out() -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer()
    prompts = [[5, 6, 7], [8, 9, 10]]
    whole = continuations(model, tokenizer, prompts, 12)
    stop = whole[0][2:4]
    assert continuations(model, tokenizer, prompts, 12, [stop, ""]) == [text.split(stop)[0] for text in whole]


def test_the_models_own_penalties_and_temperature_change_nothing() -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer()
    expected = continuations(model, tokenizer, [[5, 6, 7]], 12)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    assert continuations(model, tokenizer, [[5, 6, 7]], 12) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_equal_lm_evals_own(batch_size: int) -> None:
    model = made_model(dtype=torch.float64)
    texts = [made_text(1 + seed % 3, seed) for seed in range(10)]
    options = {"until": ["e", "\n"], "max_gen_toks": 6}
    reference = HFLM(pretrained=model, tokenizer=made_tokenizer(), batch_size=1, add_bos_token=True)
    expected = reference.generate_until(asked(texts, **options), disable_tqdm=True)
    assert scorer_of(model, batch_size).generate_until(asked(texts, **options)) == expected


def test_sampled_answers_are_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(made_model())
    monkeypatch.setattr(scorer, "_split", None)
    assert len(scorer.generate_until(asked(["the river"], do_sample=True, temperature=1.0, max_gen_toks=4))) == 1


def test_a_question_longer_than_the_model_is_cut_at_the_left() -> None:
    model = made_model(max_position_embeddings=32)
    text = made_text(20)
    tail = made_tokenizer().encode(text)[-28:]
    expected = continuations(model, made_tokenizer(), [tail], 4)
    assert scorer_of(model).generate_until(asked([text], max_gen_toks=4, until=["\n"])) == expected


def test_questions_are_encoded_once_and_survive_the_disk(tmp_path: Path) -> None:
    model, requests = made_model(), Requests()
    questions = asked(["the river", "a boat is"], max_gen_toks=4, until=["\n"])
    first = scorer_of(model, encodings=requests.encodings).generate_until(questions)
    requests.save(tmp_path)
    loaded = Requests.load(tmp_path).encodings
    assert loaded.pairs == requests.encodings.pairs
    scorer = scorer_of(model, encodings=loaded)
    scorer.tok_encode = None  # type: ignore[assignment,method-assign]  # no question may be encoded again
    assert scorer.generate_until(questions) == first


def test_the_same_seed_gives_the_same_items_whatever_was_drawn_before() -> None:
    first = retrieval_items()
    random.seed(5)
    assert retrieval_items() == first
    assert len(first) == len({item["query"] for item in first}) == ITEMS


def test_each_answer_is_the_code_of_the_name_that_is_asked_for() -> None:
    for number, item in enumerate(retrieval_items()):
        context, question, start = item["query"].split("\n")
        codes = dict(re.findall(r"The code of the (\w+ \w+) is (\d{4})\.", context))
        (asked_for,) = re.findall(r"^Question: What is the code of the (\w+ \w+)\?$", question)
        assert start == f"Answer: The code of the {asked_for} is"
        assert codes[asked_for] == item["answer"]
        assert len(codes) == len(set(codes.values())) == PAIRS[number % len(PAIRS)]


@pytest.fixture
def planted(params: Params, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Params]:
    """Return a function that plants items, the first of them with the answer that the tiny model gives."""
    model, tokenizer = tiny.load("float32", torch.device("cpu")), tiny.tokenizer()
    queries = [made_text(1 + seed % 2, seed).strip() for seed in range(12)]
    written = [tokenizer.decode(plain_greedy(model, tokenizer.encode(text), 8), skip_special_tokens=True) for text in queries]
    answers = [re.split(r"[.\n]", text)[0].strip() for text in written]

    def plant(right: int) -> Params:
        items = [
            {"query": query, "answer": answer if number < right else f"not {answer}"}
            for number, (query, answer) in enumerate(zip(queries, answers, strict=True))
        ]
        monkeypatch.setattr(tasks, "retrieval_items", lambda: items)
        return params.model_copy(update={"tasks": (Task("retrieval_exact"),), "eval_dtype": "float32"})

    return plant


@pytest.mark.parametrize("right", [0, 5, 12])
def test_exact_matches_are_counted(right: int, planted: Callable[[int], Params], tiny: Model) -> None:
    asked_for = planted(right)
    scores = score_model(asked_for, tiny, "dense", task_fingerprints(asked_for))
    figures = scores.figures["accuracy"]["retrieval_exact"]
    assert figures["accuracy"] == pytest.approx(right / 12)
    assert (figures["items"], figures["metric"], figures["fewshots"]) == (12, "exact_match", 0)
    assert scores.items["accuracy/retrieval_exact/0"].tolist() == [1.0] * right + [0.0] * (12 - right)


def test_an_example_shows_the_answer_after_its_question() -> None:
    suite = harness.Suite()
    suite.add(Task("retrieval_exact", fewshots=1, limit=1), {})
    (single,) = suite.singles.values()
    context = single.fewshot_context(single.eval_docs[0], num_fewshot=1)
    assert re.search(r"Answer: The code of the \w+ \w+ is \d{4}\n\n", context)
    assert context.endswith(single.eval_docs[0]["query"])


def test_a_chat_goes_through_the_template_up_to_the_reply() -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(f"<user>{prompt.text}\n<assistant>" if prompt.chat else prompt.text)
        assert ids[:2] != [0, 0]
        expected.append(tokenizer.decode(plain_greedy(model, ids, TOKENS), skip_special_tokens=True))
    assert written(model, tokenizer, "test") == expected


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no user') }}"])
def test_without_a_usable_chat_template_the_prompt_is_plain(template: str | None) -> None:
    model, tokenizer = made_model(dtype=torch.float64), made_tokenizer(chat=False)
    tokenizer.chat_template = template
    expected = [continuations(model, tokenizer, [tokenizer.encode(prompt.text)], TOKENS)[0] for prompt in PROMPTS]
    assert written(model, tokenizer, "test") == expected


def test_prompts_fit_the_positions_that_a_model_has() -> None:
    assert len(written(made_model("gpt2", max_position_embeddings=16), made_tokenizer(), "test")) == len(PROMPTS)


def test_the_dense_models_continuations_are_kept_with_its_scores(params: Params, tiny: Model, tmp_path: Path) -> None:
    bare = params.model_copy(update={"tasks": ()})
    dense = score_model(bare, tiny, "dense", {}, is_dense=True)
    dense.save(tmp_path)
    kept = Scores.load(tmp_path)
    assert kept.continuations == dense.continuations
    pruned = score_model(bare, tiny, "pruned", {}, kept)
    pairs = side_by_side(kept.continuations, pruned.continuations)
    assert [pair["dense"] for pair in pairs] == [pair["pruned"] for pair in pairs] == dense.continuations
    assert [pair["answer"] for pair in pairs] == ["", "", "Paris"]
    assert score_model(bare, tiny, "alone", {}).continuations == []
