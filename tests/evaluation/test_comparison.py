import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replaceme.base.compute import kind_of
from replaceme.base.errors import DatasetError
from replaceme.base.params import Params
from replaceme.base.versions import SCORES, versions
from replaceme.evaluation.comparison import compare, comparison_table, paired_p_value, scores_table
from replaceme.evaluation.perplexity import Windows
from replaceme.evaluation.requests import Requests
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


def test_a_figure_missing_from_one_model_is_left_out() -> None:
    dense, pruned = figures(10.0, 0.0), figures(15.0, 0.0)
    del pruned["perplexity"]["t"]["word"]
    found = compare(dense, pruned, {}, {})
    assert "word_perplexity" not in found
    assert "retention_percent" not in found


def test_a_models_scores_hold_every_task_and_size(params: Params, tiny: Model, tmp_path: Path) -> None:
    scores = score_model(params, tiny, "dense", task_fingerprints(params), Requests())
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
    assert set(loaded.items) == {"losses/text", "counts/text"}
    assert all(torch.equal(loaded.items[name], scores.items[name]) for name in scores.items)
    windows: Windows = loaded.requests.windows["text"]
    assert all(map(torch.equal, windows.windows, scores.requests.windows["text"].windows))
    again = score_model(params, tiny, "again", task_fingerprints(params), loaded.requests)
    assert again.figures == scores.figures


def test_a_file_that_changed_since_its_check_is_not_scored(params: Params, tiny: Model) -> None:
    found = task_fingerprints(params)
    path = Path(params.tasks[0].name)
    path.write_text(path.read_text(encoding="utf-8") + " more", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"tasks: .*text\.txt changed while it was in use; run again"):
        score_model(params, tiny, "dense", found, Requests())
