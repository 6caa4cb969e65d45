import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

from replaceme.base.compute import kind_of
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params
from replaceme.base.versions import SCORES, versions
from replaceme.evaluation.comparison import compare, comparison_table, paired_p_value, scores_table, weighted_stderr
from replaceme.evaluation.perplexity import Windows
from replaceme.evaluation.scores import Scores, score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model

SIZES = {"parameters": 200, "disk_bytes": 400, "kv_cache_bytes_per_token": 40}


def figures(ppl: float, accuracy: float, share: float = 1.0) -> dict[str, Any]:
    return {
        "perplexity": {"t": {"token": ppl, "word": 2 * ppl, "byte": ppl / 2}},
        "accuracy": {"c": {"accuracy": accuracy, "stderr": 0.02, "items": 9, "metric": "acc", "fewshots": 0, "by_size": True}},
        **{name: int(size * share) for name, size in SIZES.items()},
    }


def test_scores_of_both_models_are_compared() -> None:
    found = compare(figures(10.0, 0.8), figures(15.0, 0.6, 0.75), {}, {})
    assert found == {
        "perplexity": {"t": {"dense": 10.0, "pruned": 15.0, "ratio": 1.5}},
        "word_perplexity": {"t": {"dense": 20.0, "pruned": 30.0, "ratio": 1.5}},
        "byte_perplexity": {"t": {"dense": 5.0, "pruned": 7.5, "ratio": 1.5}},
        "accuracy": {
            "c": {
                "dense": 0.8, "pruned": 0.6, "stderr_dense": 0.02, "stderr_pruned": 0.02,
            }
        },
        "average_accuracy": {"dense": 0.8, "pruned": 0.6},
        "retention_percent": pytest.approx(75.0),
        "parameters": {"dense": 200, "pruned": 150, "removed_percent": 25.0},
        "disk_bytes": {"dense": 400, "pruned": 300, "removed_percent": 25.0},
        "kv_cache_bytes_per_token": {"dense": 40, "pruned": 30, "removed_percent": 25.0},
    }  # fmt: skip
    assert "x 1.5" in comparison_table(found)
    assert "t perplexity" in scores_table(figures(10.0, 0.8))


def test_retention_is_the_published_tables_last_column() -> None:
    dense, pruned = (.708, .713, .781, .492), (.715, .613, .698, .451)  # fmt: skip

    def side(values: tuple[float, ...]) -> dict[str, Any]:
        return {
            "perplexity": {},
            "accuracy": {str(n): {"accuracy": value, "by_size": True} for n, value in enumerate(values)},
            **SIZES,
        }

    found = compare(side(dense), side(pruned), {}, {})
    assert round(found["retention_percent"], 1) == 91.9
    assert found["average_accuracy"]["dense"] == pytest.approx(0.674, abs=6e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_significance_is_the_exact_mcnemar_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float64) for side in (0, 1))
    better, worse = sum(not a and b for a, b in pairs), sum(a and not b for a, b in pairs)
    n, k = better + worse, min(better, worse)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert paired_p_value(before, after) == pytest.approx(expected, rel=1e-9)


def test_scores_other_than_0_and_1_are_compared_by_the_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(200, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    alike, worse = paired_p_value(before, before + 0.1 * noise), paired_p_value(before, before - 0.1 + 0.1 * noise)
    assert alike > 0.05 > 1e-6 > worse


def test_standard_errors_of_differences_are_those_of_the_items() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randint(0, 2, (50,), generator=generator).double() for _ in range(2))
    losses = torch.rand(2, 8, generator=generator, dtype=torch.float64) * 100
    counts = torch.tensor([30.0, 40, 35, 40, 40, 40, 20, 10], dtype=torch.float64)
    sides = []
    for total in losses.sum(1):
        side = figures(math.exp(float(total / counts.sum())), 0.5)
        side["perplexity"]["t"]["stderr"] = 1.0
        sides.append(side)
    items = [{"accuracy/c/0": a, "losses/t": row, "counts/t": counts} for a, row in zip((before, after), losses, strict=True)]
    found = compare(*sides, *items)
    expected = float((after - before).std() / 50**0.5)
    assert found["accuracy"]["c"]["stderr_diff"] == pytest.approx(expected)
    assert found["accuracy"]["c"]["items"] == 50
    change = losses[1] - losses[0]
    ratio = found["retention_percent"] / 100
    expected = float((after - ratio * before).std() / 50**0.5) / found["average_accuracy"]["dense"]
    assert found["retention_stderr"] == pytest.approx(100 * expected)
    log_ratio = float(change.sum() / counts.sum())
    spread = float((change - log_ratio * counts).std() * 8**0.5 / counts.sum())
    assert found["perplexity"]["t"]["stderr_ratio"] == pytest.approx(math.exp(log_ratio) * spread, rel=1e-6)


def test_the_ratio_of_perplexities_is_clustered_by_text() -> None:
    generator = torch.Generator().manual_seed(1)
    losses, counts = torch.rand(2, 10, generator=generator, dtype=torch.float64) * 100, torch.full((10,), 24.0).double()
    sides = [figures(math.exp(float(total / 240)), 0.5) for total in losses.sum(1)]
    for side in sides:
        side["perplexity"]["t"]["stderr"] = 1.0
    items = [{"losses/t": row, "counts/t": counts, "texts/t": torch.arange(10) % 5} for row in losses]
    change = (losses[1] - losses[0]).reshape(2, 5).sum(0)
    found = compare(*sides, *items)["perplexity"]["t"]
    assert found["stderr_ratio"] == pytest.approx(found["ratio"] * float(change.std()) * 5**0.5 / 240)


def test_in_a_group_the_tasks_are_fixed_and_their_items_a_sample() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes, shares = (40, 200), (0.2, 0.8)
    before = [torch.bernoulli(torch.full((n,), p), generator=generator).double() for n, p in zip(sizes, shares, strict=True)]
    after = [torch.bernoulli(torch.full((n,), p / 2), generator=generator).double() for n, p in zip(sizes, shares, strict=True)]
    for by_size in (True, False):
        weights = [n / 240 if by_size else 0.5 for n in sizes]
        sides = [
            figures(10.0, sum(w * float(x.mean()) for w, x in zip(weights, parts, strict=True))) for parts in (before, after)
        ]
        for side in sides:
            side["accuracy"]["c"]["by_size"] = by_size
        items = [{f"accuracy/c/{n}": part for n, part in enumerate(parts)} for parts in (before, after)]
        found = compare(*sides, *items)["accuracy"]["c"]
        changes = [b - a for a, b in zip(before, after, strict=True)]
        variance = sum(w * w * float(change.var()) / len(change) for w, change in zip(weights, changes, strict=True))
        assert found["items"] == 240
        assert found["stderr_diff"] == pytest.approx(variance**0.5)
        mean = found["pruned"] - found["dense"]
        normal = math.erfc(abs(mean) / variance**0.5 / 2**0.5)
        expected = paired_p_value(torch.cat(before), torch.cat(after)) if by_size else normal
        assert found["p_value"] == pytest.approx(expected)


def in_articles(articles: int, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores of two models (items,), 0 or 1, and the items' articles; an article's items are alike."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.rand(articles, 1, generator=generator)
    before, after = ((torch.rand(articles, each, generator=generator) < ease * factor).double() for factor in (1.0, 0.8))
    return before.flatten(), after.flatten(), torch.arange(articles).repeat_interleave(each) + 7


def compared(before: torch.Tensor, after: torch.Tensor, articles: torch.Tensor | None) -> dict[str, Any]:
    sides = [figures(10.0, float(side.mean())) for side in (before, after)]
    owners = {} if articles is None else {"articles/c/0": articles}
    return compare(*sides, {"accuracy/c/0": before} | owners, {"accuracy/c/0": after})


def test_items_of_articles_of_one_size_are_compared_by_the_t_test_over_articles() -> None:
    before, after, articles = in_articles(12, 9)
    change = (after - before).reshape(12, 9).mean(dim=1)
    reference = ttest_1samp(change.numpy(), 0)
    found = compared(before, after, articles)
    entry = found["accuracy"]["c"]
    assert entry["p_value"] == pytest.approx(reference.pvalue)
    assert entry["stderr_diff"] == pytest.approx(float(change.std()) / 12**0.5)
    assert (entry["items"], entry["articles"]) == (108, 12)
    ratio = float(after.mean() / before.mean())
    per_article = (after - ratio * before).reshape(12, 9).mean(dim=1)
    assert found["retention_stderr"] == pytest.approx(100 * float(per_article.std() / 12**0.5 / before.mean()))


def test_the_standard_error_is_cluster_robust_for_articles_of_any_size() -> None:
    generator = torch.Generator().manual_seed(5)
    values, articles = torch.rand(40, generator=generator, dtype=torch.float64), torch.arange(40).square() % 11
    sums = [float((values - values.mean())[articles == each].sum()) for each in articles.unique()]
    expected = (len(sums) / (len(sums) - 1) * sum(each**2 for each in sums)) ** 0.5 / 40
    assert weighted_stderr([values], True, [articles]) == pytest.approx(expected)


def test_copies_of_items_within_their_articles_prove_nothing_more() -> None:
    before, after, articles = in_articles(30, 2)
    once = compared(before, after, articles)["accuracy"]["c"]
    copied = compared(*(each.repeat(5) for each in (before, after, articles)))["accuracy"]["c"]
    for key in ("p_value", "stderr_diff"):
        assert copied[key] == pytest.approx(once[key])
    assert copied["articles"] == once["articles"] == 30


@pytest.mark.parametrize("articles", [torch.arange(60), torch.zeros(60, dtype=torch.int64), None])
def test_items_of_their_own_or_of_a_single_article_are_the_sample(articles: torch.Tensor | None) -> None:
    before, after, _ = in_articles(30, 2)
    found = compared(before, after, articles)["accuracy"]["c"]
    assert found["p_value"] == paired_p_value(before, after)
    assert found["stderr_diff"] == pytest.approx(float((after - before).std() / 60**0.5))
    assert "articles" not in found


def test_two_tasks_over_the_same_articles_are_no_two_samples() -> None:
    before, after, articles = in_articles(20, 3)
    alone = compared(before, after, articles)["retention_stderr"]
    for owners, expected in ((articles, alone), (articles + 100, alone / 2**0.5)):
        sides = [figures(10.0, float(side.mean())) for side in (before, after)]
        for side in sides:
            side["accuracy"]["d"] = side["accuracy"]["c"]
        items = [{"accuracy/c/0": side, "accuracy/d/0": side} for side in (before, after)]
        found = compare(*sides, items[0] | {"articles/c/0": articles, "articles/d/0": owners}, items[1])
        assert found["retention_stderr"] == pytest.approx(expected)


def test_a_group_with_articles_is_tested_over_them() -> None:
    parts = [in_articles(20, 3, seed) for seed in range(2)]
    before, after, articles = zip(*parts, strict=True)
    sides = [figures(10.0, float(torch.cat(side).mean())) for side in (before, after)]
    items = [{f"accuracy/c/{n}": part for n, part in enumerate(side)} for side in (before, after)]
    items[0] |= {f"articles/c/{n}": own + 100 * n for n, own in enumerate(articles)}
    found = compare(*sides, *items)["accuracy"]["c"]
    change = torch.stack([b - a for a, b in zip(before, after, strict=True)]).reshape(2, 20, 3).mean(dim=2)
    stderr = float((change.var(dim=1) / 20).sum() ** 0.5) / 2
    assert found["stderr_diff"] == pytest.approx(stderr)
    assert found["p_value"] == pytest.approx(2 * t.sf(abs(float(change.mean())) / stderr, 38))


def test_a_figure_missing_from_one_model_is_left_out() -> None:
    dense, pruned = figures(10.0, 0.0), figures(15.0, 0.0)
    del pruned["perplexity"]["t"]["word"]
    found = compare(dense, pruned, {}, {})
    assert "word_perplexity" not in found
    assert "retention_percent" not in found


def test_a_models_scores_hold_every_task_and_size(params: Params, tiny: Model, tmp_path: Path) -> None:
    scores = score_model(params, tiny, "dense", task_fingerprints(params), is_dense=True)
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
    assert set(loaded.items) == {"losses/text", "counts/text", "likely_ids/text", "likely_logs/text"}
    assert all(torch.equal(loaded.items[name], scores.items[name]) for name in scores.items)
    windows: Windows = loaded.requests.windows["text"]
    assert all(map(torch.equal, windows.windows, scores.requests.windows["text"].windows))
    again = score_model(params, tiny, "again", task_fingerprints(params), loaded)
    assert again.figures == scores.figures
    divergence = compare(scores.figures, again.figures, scores.items, again.items)["divergence"]["text"]
    assert (divergence["kl"], divergence["agreement"]) == (0, 1)


def test_a_file_that_changed_since_its_check_is_not_scored(params: Params, tiny: Model) -> None:
    found = task_fingerprints(params)
    path = Path(params.tasks[0].name)
    path.write_text(path.read_text(encoding="utf-8") + " more", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"tasks: .*text\.txt changed while it was in use; run again"):
        score_model(params, tiny, "dense", found)


def sides_of(dense: float, pruned: float, chance: float, stderr: float = 0.0) -> list[dict[str, Any]]:
    score = {"stderr": stderr, "by_size": True, "chance": chance}
    return [{"perplexity": {}, "accuracy": {"c": {"accuracy": value, **score}}, "parameters": 4} for value in (dense, pruned)]


@given(st.floats(0, 0.5), st.floats(0.05, 0.5), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_model_that_knows_a_share_of_the_answers_and_guesses_the_others_keeps_that_share(
    chance: float, known: float, kept: float
) -> None:
    dense, pruned = (share + (1 - share) * chance for share in (known, known * kept))
    found = compare(*sides_of(dense, pruned, chance), {}, {})
    assert found["accuracy"]["c"]["above_chance_percent"] == pytest.approx(100 * kept)
    assert found["retention_above_chance_percent"] == pytest.approx(100 * kept)
    assert found["retention_percent"] >= 100 * kept - 1e-6


def test_of_a_dense_model_at_chance_nothing_is_said_to_be_kept() -> None:
    for dense, stderr, said in ((0.25, 0.0, False), (0.2, 0.0, False), (0.29, 0.02, False), (0.3, 0.02, True)):
        found = compare(*sides_of(dense, 0.26, 0.25, stderr), {}, {})
        assert ("above_chance_percent" in found["accuracy"]["c"]) == ("retention_above_chance_percent" in found) == said
        assert ("dense at chance" in comparison_table(found)) == (not said)


def test_the_error_of_what_is_kept_above_chance_is_paired() -> None:
    generator = torch.Generator().manual_seed(2)
    before, after = ((torch.rand(60, generator=generator) < share).double() for share in (0.8, 0.6))
    sides = sides_of(float(before.mean()), float(after.mean()), 0.25)
    found = compare(*sides, {"accuracy/c/0": before}, {"accuracy/c/0": after})
    # The same from the items less chance: chance is known, so it has no error.
    a, b = before - 0.25, after - 0.25
    ratio = float(b.mean() / a.mean())
    assert found["retention_above_chance_percent"] == pytest.approx(100 * ratio)
    expected = float((b - ratio * a).std() / 60**0.5 / a.mean())
    assert found["retention_above_chance_stderr"] == pytest.approx(100 * expected)
