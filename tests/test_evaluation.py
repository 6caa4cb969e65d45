import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from replaceme.errors import DatasetError, ParameterError
from replaceme.evaluation.continuation import CHOICE_WORDS, CONTEXT_WORDS, continuation_items
from replaceme.evaluation.harness import CausalScorer, accuracies, multiple_choice
from replaceme.evaluation.perplexity import WINDOW, cut_windows, perplexities
from replaceme.evaluation.scores import compare, comparison_table, score_model
from replaceme.evaluation.texts import task_fingerprints, task_name, task_texts
from replaceme.models import Model
from replaceme.params import Params, read_params
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
    found = perplexities(model, cut_windows("t", [text], tokenizer, None), batch_size, "test")
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
    assert perplexities(model, windows, 1, "t")["stderr"] == pytest.approx(math.exp(nll) * ratio_error, rel=1e-3)


def test_a_figure_that_overflows_is_left_out() -> None:
    endless = "ab" * 900  # one word of so many tokens that its perplexity is no number
    figures = perplexities(
        made_model(max_position_embeddings=2048), cut_windows("t", [endless], made_tokenizer(), None), 1, "t"
    )
    assert "word" not in figures
    assert {"token", "byte"} <= set(figures)
    dense = {"perplexity": {"t": figures}, "accuracy": {}, "parameters": 2}
    found = compare(dense, dense)
    assert "word_perplexity" not in found
    assert found["perplexity"]["t"]["ratio"] == 1.0


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


@pytest.fixture
def items() -> list[dict[str, Any]]:
    return continuation_items([made_text(120, seed) for seed in range(4)])


def test_items_are_runs_of_sentences_with_one_true_continuation(items: list[dict[str, Any]]) -> None:
    articles = [made_text(120, seed) for seed in range(4)]
    assert len(items) > 20
    for item in items:
        assert len(item["query"].split()) >= CONTEXT_WORDS
        assert [len(choice.split()) for choice in item["choices"]] == [CHOICE_WORDS] * 4
        assert len(set(item["choices"])) == 4
        true = f"{item['query']} {item['choices'][item['gold']]}"
        assert any(true in article for article in articles)
        assert all(
            f"{item['query']} {choice}" not in article
            for choice in item["choices"]
            if choice not in true
            for article in articles
        )


def test_the_same_text_gives_the_same_items_with_the_answer_anywhere(items: list[dict[str, Any]]) -> None:
    assert items == continuation_items([made_text(120, seed) for seed in range(4)])
    assert {item["gold"] for item in items} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_accuracy_equals_lm_evals_own(family: str, items: list[dict[str, Any]]) -> None:
    model, tokenizer = made_model(family), made_tokenizer()
    found = accuracies(CausalScorer(model, tokenizer, 1, "test"), {"choice": multiple_choice("choice", items)})["choice"]
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=True)
    expected = evaluate(reference, {"choice": multiple_choice("choice", items)}, bootstrap_iters=1)["results"]["choice"]
    assert found["accuracy"] == expected["acc_norm,none"]
    assert found["stderr"] == pytest.approx(expected["acc_norm_stderr,none"])
    assert found["items"] == len(items)


def test_each_likelihood_equals_one_plain_pass() -> None:
    model = made_model(dtype=torch.float64)
    scorer = CausalScorer(model, made_tokenizer(), 1, "test")
    pairs = [([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [11]), ([3, 4], [5, 6, 7]), ([12], [13, 14]), ([9, 8, 7, 6], [5])]
    found = scorer._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in pairs])
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        with torch.no_grad():
            predictions = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = sum(float(predictions[place, token]) for place, token in zip(places, continuation, strict=True))
        assert likelihood == pytest.approx(expected, rel=1e-5)
        assert greedy == all(
            int(predictions[place].argmax()) == token for place, token in zip(places, continuation, strict=True)
        )


def test_contexts_longer_than_the_model_are_cut_at_the_left() -> None:
    model = made_model(max_position_embeddings=16)
    scorer = CausalScorer(model, made_tokenizer(), 1, "test")
    long, short = list(range(2, 60)), list(range(2, 60))[-14:]
    found = scorer._loglikelihood_tokens([(("", ""), long, [5, 6]), (("", ""), short, [5, 6])])
    assert found[0] == found[1]


def test_scores_of_both_models_are_set_side_by_side() -> None:
    def scores(ppl: float, accuracy: float, parameters: int) -> dict[str, Any]:
        return {
            "perplexity": {"t": {"token": ppl, "word": 2 * ppl, "byte": ppl / 2}},
            "accuracy": {"c": {"accuracy": accuracy, "stderr": 0.02, "items": 9}},
            "parameters": parameters,
        }

    found = compare(scores(10.0, 0.8, 200), scores(15.0, 0.6, 150))
    assert found == {
        "perplexity": {"t": {"dense": 10.0, "pruned": 15.0, "ratio": 1.5}},
        "word_perplexity": {"t": {"dense": 20.0, "pruned": 30.0, "ratio": 1.5}},
        "byte_perplexity": {"t": {"dense": 5.0, "pruned": 7.5, "ratio": 1.5}},
        "accuracy": {"c": {"dense": 0.8, "pruned": 0.6, "stderr_dense": 0.02, "stderr_pruned": 0.02}},
        "retention_percent": 75.0,
        "parameters": {"dense": 200, "pruned": 150, "removed_percent": 25.0},
    }
    assert "x 1.5" in comparison_table(found)


def test_a_models_scores_hold_every_task(params: Params, tiny: Model) -> None:
    scores = score_model(params, tiny, "dense")
    assert set(scores["perplexity"]) == {"text"}
    assert scores["accuracy"] == {}
    assert scores["parameters"] == sum(parameter.numel() for parameter in tiny.load().parameters())


def test_text_files_are_tasks(tmp_path: Path) -> None:
    path = tmp_path / "my.notes.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n', encoding="utf-8")
    assert task_name(str(path)) == "my_notes"
    assert task_texts(str(path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", '{"body": "x", "n": 1}', "have no column 'text' with text; the first one's columns are body, n"),
        ("t.jsonl", "{", "isn't JSON"),
        ("t.txt", "", "is empty"),
    ],
)
def test_task_files_are_checked_before_any_work(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        task_fingerprints(read_params(None, {"tasks": (str(path),)}))
    assert str(caught.value).startswith("tasks: ")
    assert said in str(caught.value)


def test_unknown_and_clashing_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"'wikipedi' is not available \(did you mean 'wikipedia'\?\)"):
        task_fingerprints(read_params(None, {"tasks": ("wikipedi",)}))
    with pytest.raises(ParameterError, match="'winogrande' is not available"):
        task_fingerprints(read_params(None, {"tasks": ("winogrande",)}))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ParameterError, match="two tasks are named 't'"):
        task_fingerprints(read_params(None, {"tasks": (str(tmp_path / "a" / "t.txt"), str(tmp_path / "b" / "t.txt"))}))
