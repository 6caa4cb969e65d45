import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json, write_json
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, Surrogate, load_blocks
from replaceme.methods.registry import criterion_of
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.pipeline.select import select
from replaceme.running.workspace import Workspace
from replaceme.selection import cut_loss
from replaceme.selection.blocks import disjoint_blocks, smallest_blocks
from replaceme.selection.candidate_evaluation import Losses
from replaceme.selection.criteria import allowed_starts
from replaceme.selection.cut_loss import cut_losses
from tests.conftest import made_model
from tests.helpers import many_documents, means


def starts(layers: int, **options: Any) -> range:
    params = read_params(None, options)
    return allowed_starts(params, layers, criterion_of(params))


def distances(layers: int, best: tuple[int, int]) -> list[list[float]]:
    return [[0.1 if (host, last) == best else 0.5 for last in range(layers)] for host in range(layers)]


def test_the_block_with_the_smallest_distance_is_removed() -> None:
    # Host 4 and last removed layer 7: layers 5, 6 and 7 go.
    assert smallest_blocks(distances(12, (4, 7)), starts(12, layers_to_skip=3), 3) == [Block(5, 8)]
    assert Block(5, 8).layer_before_cut == 4


def test_the_last_layers_can_be_removed_and_the_first_one_never() -> None:
    assert starts(12, layers_to_skip=3) == range(1, 10)
    assert smallest_blocks(distances(12, (8, 11)), starts(12, layers_to_skip=3), 3) == [Block(9, 12)]


def test_limits_are_honoured() -> None:
    allowed = starts(12, layers_to_skip=3, min_distance_layer=6, max_distance_layer=11)
    assert allowed == range(6, 9)
    assert smallest_blocks(distances(12, (1, 4)), allowed, 3) == [Block(6, 9)]


def test_the_earliest_of_equal_blocks_is_taken() -> None:
    assert smallest_blocks(distances(12, (0, 0)), starts(12, layers_to_skip=3), 3) == [Block(1, 4)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers_to_skip": 12}, "layers_to_skip: must be less than the model's 12 layers, not 12"),
        (
            {"layers_to_skip": 3, "min_distance_layer": 10},
            "min_distance_layer: no block of 3 layers fits between layer 10 and layer 12",
        ),
        (
            {"layers_to_skip": 3, "max_distance_layer": 3},
            "max_distance_layer: no block of 3 layers fits between layer 1 and layer 3",
        ),
        ({"layers_to_skip": 3, "max_distance_layer": 13}, "max_distance_layer: must be at most the model's 12 layers, not 13"),
    ],
)
def test_impossible_limits_are_named(options: dict[str, int], said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        starts(12, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "transform", "surrogate"),
    [
        ("lstsq", "dense", "map"),
        ("cosine", "diagonal", "map"),
        ("lstsq", "refit", "refit"),
        ("lstsq", "channels", "joint"),
        ("uidl", "dense", "nothing"),
    ],
)
def test_the_loss_decides_among_the_best_cuts(
    method: str, transform: str, surrogate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, skip = 14, 3
    residuals = [[0.5 + 0.01 * host for _ in range(layers)] for host in range(layers)]
    angles = [[0.9 - 0.01 * host for _ in range(layers)] for host in range(layers)]
    work, asked = Workspace(tmp_path), []
    write_json(work.profile / "profile.json", {"angular_distance": angles, "residual": residuals})

    def measure(context: Any, blocks: list[Block], surrogate: str) -> Any:
        asked.extend((block.layer_before_cut, surrogate) for block in blocks)
        return map(of_one_domain, [3.0, math.nan, 2.0, 4.0, math.inf, 5.0])

    without_model(monkeypatch, measure)
    limits = {"min_distance_layer": 3, "max_distance_layer": 13, "layers_to_skip": skip}
    params = read_params(None, {"method": method, "transform": transform, "selection": "loss", **limits})
    select(params, work)
    # Hosts 2 to 9 are allowed; a map's residual is smallest for the first, the angle for the last.
    hosts = [2, 3, 4, 5, 6, 7] if surrogate != "nothing" else [9, 8, 7, 2, 3, 4]
    assert asked == [(host, surrogate) for host in hosts]
    figures = read_json(work.metric("select"))
    assert (figures["host"], figures["loss"], figures["dense_loss"]) == (hosts[2], 2.0, 1.5)
    assert figures["losses"] == {f"host{hosts[place]}": loss for place, loss in ((2, 2.0), (0, 3.0), (3, 4.0), (5, 5.0))}
    assert figures["typical_rises"] == {host: loss - 1.5 for host, loss in figures["losses"].items()}
    assert load_blocks(work.blocks) == (Block(hosts[2] + 1, hosts[2] + 1 + skip),)


RISES = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.5, 5: 0.54, 6: 0.6, 7: math.inf, 8: 1.0, 9: 2.0}


@pytest.mark.parametrize(("tolerated", "count"), [(0.15, 1), (0.5, 4), (0.54, 5), (0.7, 6), (3.0, 9)])
def test_the_most_layers_within_the_tolerated_rise_go(
    tolerated: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, tried = 14, []
    residuals = [[0.01 * host for _ in range(layers)] for host in range(layers)]
    work = Workspace(tmp_path)
    write_json(work.profile / "profile.json", {"angular_distance": residuals, "residual": residuals})

    def measure(context: Any, blocks: list[Block], surrogate: str) -> list[Losses]:
        tried.append(len(blocks[0]))
        assert [block.start for block in blocks] == list(range(3, 13))[: min(13 - len(blocks[0]) - 2, cut_loss.SHORTLIST)]
        # The last of them is the best.
        return [
            of_one_domain(1.5 + RISES[len(block)] + 0.01 * (blocks[-1].layer_before_cut - block.layer_before_cut))
            for block in blocks
        ]

    without_model(monkeypatch, measure)
    options = {"selection": "loss", "layers_to_skip": 9, "min_distance_layer": 3, "max_distance_layer": 13}
    select(read_params(None, {**options, "tolerated_loss": tolerated + 1e-9}), work)
    start = 2 + min(13 - count - 2, cut_loss.SHORTLIST)
    assert load_blocks(work.blocks) == (Block(start, start + count),)
    figures = read_json(work.metric("select"))
    assert len(set(tried)) == len(tried) <= 4
    assert figures["rises"] == pytest.approx({f"layers{each}": RISES[each] for each in tried if each != 7})
    assert figures["loss"] == pytest.approx(1.5 + RISES[count])
    said = r"tolerated_loss: the loss rises by 0.1000 nats without one layer, and 0.05 are tolerated; take more, or null"
    with pytest.raises(ParameterError, match=said):
        select(read_params(None, {**options, "tolerated_loss": 0.05}), work)


@pytest.mark.parametrize(("dense", "others"), [(math.nan, 2.0), (2.0, math.nan)])
@pytest.mark.parametrize("tolerated", [None, 0.5])
def test_a_format_that_overflows_is_named(
    dense: float, others: float, tolerated: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, values = Workspace(tmp_path), [[0.5] * 6 for _ in range(6)]
    write_json(work.profile / "profile.json", {"angular_distance": values, "residual": values})
    without_model(monkeypatch, lambda *arguments, **_: [of_one_domain(others) for _ in arguments[1]], dense)
    where = "every shortened model" if dense == 2 else "the model's predictions"
    with pytest.raises(ParameterError, match=f"dtype: bfloat16 overflows in {where}; use bfloat16 or float32"):
        select(read_params(None, {"selection": "loss", "layers_to_skip": 2, "tolerated_loss": tolerated}), work)
    assert not work.blocks.exists()


def of_one_domain(mean: float) -> Losses:
    return Losses([0], torch.tensor([8 * mean], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64))


WITHOUT_MODEL = ModelContext(None, Family(), many_documents(2), 4)


def without_model(monkeypatch: pytest.MonkeyPatch, measure: Callable[..., Any], dense: float = 1.5) -> None:
    """Replace the measured losses by a function, without a model."""
    monkeypatch.setattr("replaceme.pipeline.select.calibration_context", lambda *_: WITHOUT_MODEL)
    monkeypatch.setattr(cut_loss, "dense_losses", lambda *_: of_one_domain(dense))
    monkeypatch.setattr(cut_loss, "cut_losses", measure)


def test_the_loss_needs_documents_to_hold_out() -> None:
    with pytest.raises(ParameterError, match="dataset_size: selection loss holds documents out and needs at least 5, not 4"):
        starts(12, layers_to_skip=3, selection="loss", dataset_size=4)


def chosen(layers: int, values: dict[tuple[int, int], float], **options: Any) -> list[tuple[int, int]]:
    """Return start and end of each block, where pairs (host, last removed layer) have these values and all others 1."""
    params = read_params(None, options)
    table = [[values.get((host, last), 1.0) for last in range(layers)] for host in range(layers)]
    return [
        (block.start, block.end)
        for block in disjoint_blocks(table, allowed_starts(params, layers, criterion_of(params)), params)
    ]


def test_several_blocks_are_the_best_that_do_not_overlap() -> None:
    values = {(4, 6): 0.1, (5, 7): 0.2, (9, 11): 0.3}
    assert chosen(14, values, layers_to_skip=2, num_A=2) == [(5, 7), (10, 12)]


def test_adjacent_blocks_are_merged_or_kept_apart() -> None:
    values = {(4, 6): 0.1, (6, 8): 0.2, (7, 9): 0.3}
    assert chosen(14, values, layers_to_skip=2, num_A=2) == [(5, 9)]
    assert chosen(14, values, layers_to_skip=2, num_A=2, merge_consecutive=False) == [(5, 7), (8, 10)]


def test_the_best_block_leaves_room_for_the_others() -> None:
    # The block in the middle is the best, and would leave two layers on each side.
    assert chosen(8, {(2, 5): 0.1}, layers_to_skip=3, num_A=2) == [(1, 7)]
    assert chosen(8, {(2, 5): 0.1}, layers_to_skip=3, num_A=2, merge_consecutive=False) == [(1, 4), (5, 8)]


def test_blocks_that_do_not_fit_are_named() -> None:
    with pytest.raises(ParameterError, match="num_A: 3 blocks of 3 layers don't fit between layer 1 and layer 8; take fewer"):
        starts(8, layers_to_skip=3, num_A=3)
    with pytest.raises(ParameterError, match="num_A: 2 blocks of 4 layers with a kept layer between them don't fit"):
        starts(9, layers_to_skip=4, num_A=2, merge_consecutive=False)
    with pytest.raises(ParameterError, match=r"selection: loss makes one choice; with several blocks \(num_A\)"):
        starts(12, layers_to_skip=3, num_A=2, selection="loss")


@pytest.mark.parametrize("surrogate", ["map", "refit", "joint"])
def test_a_cut_after_an_mlp_that_adds_nothing_is_measured_without_a_fit(surrogate: Surrogate) -> None:
    model, documents, blocks = made_model(), many_documents(), [Block(2, 4), Block(3, 5)]
    family = family_of(model.config)
    last = family.linear_of(family.decoder_layers(model)[blocks[0].layer_before_cut], "mlp_output")
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    nothing, fitted = means(cut_losses(ModelContext(model, family, documents, 4), blocks, surrogate))
    bare = means(cut_losses(ModelContext(model, family, documents, 4), blocks, "nothing"))
    assert nothing == pytest.approx(bare[0], rel=1e-5)
    assert fitted != pytest.approx(bare[1], rel=1e-4)
