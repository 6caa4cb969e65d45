"""The comparison of two models' scores, and its tables."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t
from torch import Tensor

from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params
from replaceme.evaluation.comparison import compare_scores
from replaceme.evaluation.scores import Scores, score_model
from replaceme.evaluation.standard_errors import Sample, compute_paired_p_value
from replaceme.evaluation.tables import format_score_comparison, format_scores, tabulate_score_comparison
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.devices import kind_of
from replaceme.models.model import Model
from replaceme.running.versions import SCORES, versions

SIZES = {"parameters": 200, "disk_bytes": 400, "kv_cache_bytes_per_token": 40}


def figures(accuracies: dict[str, float], perplexity: float = 10.0, kept: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "perplexity": {"t": {"token": perplexity, "word": 2 * perplexity, "byte": perplexity / 2}},
        "accuracy": {
            task: {"accuracy": value, "stderr": 0.02, "metric": "acc", "fewshots": 0, "by_size": True, **more}
            for task, value in accuracies.items()
        },
        **{name: int(size * kept) for name, size in SIZES.items()},
    }


def test_scores_of_both_models_are_compared() -> None:
    dense, pruned = figures({"c": 0.8}), figures({"c": 0.6}, 15.0, 0.75)
    comparison = compare_scores(dense, pruned, {}, {})
    assert comparison == {
        "perplexity": {"t": {"dense": 10.0, "pruned": 15.0, "ratio": 1.5}},
        "word_perplexity": {"t": {"dense": 20.0, "pruned": 30.0, "ratio": 1.5}},
        "byte_perplexity": {"t": {"dense": 5.0, "pruned": 7.5, "ratio": 1.5}},
        "accuracy": {"c": {"dense": 0.8, "pruned": 0.6, "stderr_dense": 0.02, "stderr_pruned": 0.02}},
        "average_accuracy": {"dense": 0.8, "pruned": 0.6},
        "retention_percent": pytest.approx(75.0),
        "parameters": {"dense": 200, "pruned": 150, "removed_percent": 25.0},
        "disk_bytes": {"dense": 400, "pruned": 300, "removed_percent": 25.0},
        "kv_cache_bytes_per_token": {"dense": 40, "pruned": 30, "removed_percent": 25.0},
    }
    assert "x 1.5" in format_score_comparison(comparison)
    assert "t perplexity" in format_scores(dense)


def test_retention_is_the_published_tables_last_column() -> None:
    dense, pruned = (.708, .713, .781, .492), (.715, .613, .698, .451)  # fmt: skip
    sides = [figures({str(number): value for number, value in enumerate(values)}) for values in (dense, pruned)]
    comparison = compare_scores(*sides, {}, {})
    assert round(comparison["retention_percent"], 1) == 91.9
    assert comparison["average_accuracy"]["dense"] == pytest.approx(0.674, abs=6e-4)


def compare_items(
    before: Tensor, after: Tensor, articles: Sequence[Tensor], by_size: bool = True, **more: Any
) -> dict[str, Any]:
    """Compare two models by the scores of their items, those of each single task one after the other."""
    sample = Sample.of_tasks(articles, by_size)
    sides = [figures({"c": float(sample.weights @ scores)}, **more) for scores in (before, after)]
    for side in sides:
        side["accuracy"]["c"]["by_size"] = by_size
    return compare_scores(*sides, {"accuracy/c": before, **sample.tensors("c")}, {"accuracy/c": after})


def alone(count: int) -> Tensor:
    return torch.full((count,), -1)


def scores_in_articles(articles: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores of two models (items,), 0 or 1, and the items' articles; an article's items are alike."""
    generator = torch.Generator().manual_seed(0)
    ease = torch.rand(articles, 1, generator=generator)
    before, after = ((torch.rand(articles, each, generator=generator) < ease * factor).double() for factor in (1.0, 0.8))
    return before.flatten(), after.flatten(), torch.arange(articles).repeat_interleave(each)


def test_differences_of_independent_items_are_tested_on_them() -> None:
    before, after, _ = scores_in_articles(30, 2)
    comparison = compare_items(before, after, [alone(60)])
    entry = comparison["accuracy"]["c"]
    assert entry["p_value"] == compute_paired_p_value(before, after)
    assert entry["stderr_diff"] == pytest.approx(float((after - before).std() / 60**0.5))
    assert entry["items"] == 60
    assert "articles" not in entry
    ratio = comparison["retention_percent"] / 100
    expected = float((after - ratio * before).std() / 60**0.5) / comparison["average_accuracy"]["dense"]
    assert comparison["retention_stderr"] == pytest.approx(100 * expected)


def test_items_that_share_articles_are_compared_by_the_t_test_over_articles() -> None:
    before, after, articles = scores_in_articles(40, 3)
    comparison = compare_items(before, after, [articles[:60], articles[60:]])
    entry, change = comparison["accuracy"]["c"], (after - before).reshape(2, 20, 3).mean(dim=2)
    stderr = float((change.var(dim=1) / 20).sum() ** 0.5) / 2
    assert (entry["items"], entry["articles"]) == (120, 40)
    assert entry["stderr_diff"] == pytest.approx(stderr)
    assert entry["p_value"] == pytest.approx(2 * t.sf(abs(float(change.mean())) / stderr, 38))


def test_a_group_that_weights_its_tasks_equally_is_tested_so() -> None:
    before, after, _ = scores_in_articles(30, 2)
    entry = compare_items(before, after, [alone(10), alone(50)], by_size=False)["accuracy"]["c"]
    mean = entry["pruned"] - entry["dense"]
    assert mean == pytest.approx(float((after - before)[:10].mean() + (after - before)[10:].mean()) / 2)
    assert entry["p_value"] == pytest.approx(math.erfc(abs(mean) / entry["stderr_diff"] / 2**0.5))


@given(st.floats(0, 0.5), st.floats(0.05, 0.5), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_model_that_knows_a_share_of_the_answers_and_guesses_the_others_keeps_that_share(
    chance: float, known: float, kept: float
) -> None:
    dense, pruned = (share + (1 - share) * chance for share in (known, known * kept))
    sides = [figures({"c": value}, chance=chance, stderr=0.0) for value in (dense, pruned)]
    comparison = compare_scores(*sides, {}, {})
    assert comparison["accuracy"]["c"]["above_chance_percent"] == pytest.approx(100 * kept)
    assert comparison["retention_above_chance_percent"] == pytest.approx(100 * kept)
    assert comparison["retention_percent"] >= 100 * kept - 1e-6


def test_of_a_dense_model_at_chance_nothing_is_said_to_be_kept() -> None:
    for dense, stderr, said in ((0.25, 0.0, False), (0.2, 0.0, False), (0.29, 0.02, False), (0.3, 0.02, True)):
        sides = [figures({"c": value}, chance=0.25, stderr=stderr) for value in (dense, 0.26)]
        comparison = compare_scores(*sides, {}, {})
        assert ("above_chance_percent" in comparison["accuracy"]["c"]) == said
        assert ("retention_above_chance_percent" in comparison) == said
        assert ("dense at chance" in format_score_comparison(comparison)) == (not said)


def test_the_error_of_what_is_kept_above_chance_is_paired() -> None:
    before, after, _ = scores_in_articles(30, 2)
    comparison = compare_items(before, after, [alone(60)], chance=0.1)
    # The same from the items less chance: chance is known, so it has no error.
    a, b = before - 0.1, after - 0.1
    ratio = float(b.mean() / a.mean())
    assert comparison["retention_above_chance_percent"] == pytest.approx(100 * ratio)
    expected = float((b - ratio * a).std() / 60**0.5 / a.mean())
    assert comparison["retention_above_chance_stderr"] == pytest.approx(100 * expected)


def test_the_headline_is_of_unseen_domains_alone() -> None:
    texts = {"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (0, 0)}
    ratios = {"a": 2.0, "b": 9.0, "c": 1.1, "d": 8.0}
    sides = [figures({"b": 0.5, "d": 0.5}), figures({"b": 0.1, "d": 0.4})]
    for power, side in enumerate(sides):
        side["perplexity"] = {task: {"token": 10 * ratio**power} for task, ratio in ratios.items()}
    assert "unseen" not in compare_scores(*sides, {}, {})
    sides[1]["calibration_text"] = {
        task: {"seen": seen, "same_domain": same, "overlap": 0.0} for task, (seen, same) in texts.items()
    }
    comparison = compare_scores(*sides, {}, {})
    assert comparison["unseen"] == pytest.approx({"texts": 2, "perplexity_ratio": 4.0, "tasks": 1, "retention_percent": 80.0})
    table = format_score_comparison(comparison)
    assert "2 unseen texts, geometric mean" in table
    assert "b perplexity (domain seen)" in table
    assert "c perplexity (seen)" in table
    assert table.endswith("\nSeen: c (is scored on calibration text).")


def test_the_tables_mark_what_is_calibrated_on() -> None:
    side = figures({"c": 0.5, "d": 0.5}) | {"calibration_text": {"t": {"seen": 0, "same_domain": 1}, "c": {"seen": 1}}}
    assert re.search(r"(?m)^t perplexity \(domain seen\) +10", format_scores(side))
    assert re.search(r"(?m)^c accuracy \(seen\) +50.0", format_scores(side))
    plain = figures({"c": 0.5, "d": 0.5})
    for pruned, average in ((plain, "average accuracy"), (plain | side, "average accuracy (in part seen)")):
        comparison = compare_scores(plain, pruned, {}, {})
        assert average in [row[0] for row in tabulate_score_comparison(comparison | {"unseen": {}})]


def test_a_models_scores_hold_every_task_and_size(params: Params, tiny: Model, tmp_path: Path) -> None:
    scores = score_model(params, tiny, task_fingerprints(params), is_dense=True)
    config = tiny.config()
    assert set(scores.figures["perplexity"]) == {"text"}
    assert scores.figures["accuracy"] == {}
    assert scores.figures["parameters"] == sum(parameter.numel() for parameter in tiny.load().parameters())
    head = config.hidden_size // config.num_attention_heads
    assert scores.figures["kv_cache_bytes_per_token"] == 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    assert scores.figures["disk_bytes"] == (tiny.folder / "model.safetensors").stat().st_size
    assert scores.figures["made_with"] == {"processor": kind_of("cpu"), **versions(SCORES)}
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.figures == scores.figures
    assert {name: tensor.tolist() for name, tensor in loaded.items.items()} == {
        name: tensor.tolist() for name, tensor in scores.items.items()
    }
    again = score_model(params, tiny, task_fingerprints(params), loaded)
    assert again.figures == scores.figures
    divergence = compare_scores(scores.figures, again.figures, scores.items, again.items)["divergence"]["text"]
    assert (divergence["kl"], divergence["agreement"]) == (0, 1)


def test_a_file_that_changed_since_its_check_is_not_scored(params: Params, tiny: Model) -> None:
    fingerprints = task_fingerprints(params)
    path = Path(params.tasks[0].name)
    path.write_text(path.read_text(encoding="utf-8") + " more", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"tasks: .*text\.txt changed while it was in use; run again"):
        score_model(params, tiny, fingerprints)
