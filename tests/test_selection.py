from typing import Any

import pytest

from replaceme.errors import ParameterError
from replaceme.params import read_params
from replaceme.plan import Block
from replaceme.selection import allowed_starts, smallest


def starts(layers: int, **options: Any) -> range:
    return allowed_starts(read_params(None, options), layers)


def distances(layers: int, best: tuple[int, int]) -> list[list[float]]:
    return [[0.1 if (host, last) == best else 0.5 for last in range(layers)] for host in range(layers)]


def test_the_block_with_the_smallest_distance_is_removed() -> None:
    # Host 4 and last removed layer 7: layers 5, 6 and 7 go.
    assert smallest(distances(12, (4, 7)), starts(12, layers_to_skip=3), 3) == [Block(5, 8)]
    assert Block(5, 8).host == 4


def test_the_last_layers_can_be_removed_and_the_first_one_never() -> None:
    assert starts(12, layers_to_skip=3) == range(1, 10)
    assert smallest(distances(12, (8, 11)), starts(12, layers_to_skip=3), 3) == [Block(9, 12)]


def test_limits_are_honoured() -> None:
    allowed = starts(12, layers_to_skip=3, min_distance_layer=6, max_distance_layer=11)
    assert allowed == range(6, 9)
    assert smallest(distances(12, (1, 4)), allowed, 3) == [Block(6, 9)]


def test_the_earliest_of_equal_blocks_is_taken() -> None:
    assert smallest(distances(12, (0, 0)), starts(12, layers_to_skip=3), 3) == [Block(1, 4)]


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
