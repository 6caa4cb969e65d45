"""The pictures of one run show the data, and nothing else."""

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.ma import masked

from replaceme.base.plan import Block
from replaceme.report.figures import draw_block_map, draw_layers, draw_ridge_path, draw_scores
from replaceme.report.theme import DARK, LIGHT, to_png
from tests.report.helpers import LAYERS, made_distances, made_layers


def _frames(figure: Figure) -> set[tuple[float, float]]:
    """Return the centres of the frames on a map."""
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return {(frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2) for frame in frames}


def test_the_map_shows_the_pairs_above_the_diagonal_and_frames_the_blocks() -> None:
    distances = made_distances(LAYERS)
    figure = draw_block_map(distances, "distance", [Block(1, 2), Block(3, 5)], DARK)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None
    for before in range(LAYERS):
        for last in range(LAYERS):
            if last > before:
                assert drawn[last, before] == distances[before][last]
            else:
                assert drawn[last, before] is masked
    assert _frames(figure) == {(0, 1), (2, 4)}
    assert "2, 1 layers" in {text.get_text() for text in figure.axes[0].texts}
    bare = draw_block_map(distances, "distance", [], DARK)
    assert not _frames(bare)
    assert not bare.axes[0].texts


def test_removed_layers_are_shaded_and_a_zero_influence_is_drawn() -> None:
    layers = made_layers(LAYERS)
    layers["block_influence"][2] = 0.0
    figure = draw_layers(layers, [Block(3, 5)], LIGHT)
    spans = [patch for axes in figure.axes for patch in axes.patches]
    assert [(span.get_x(), span.get_x() + span.get_width()) for span in spans] == [(2.5, 4.5)] * 2
    assert to_png(figure)
    assert not [patch for axes in draw_layers(layers, [], LIGHT).axes for patch in axes.patches]


@pytest.mark.parametrize(("accuracy", "perplexity"), [(0, 0), (1, 0), (0, 1), (10, 2)])
def test_the_scores_have_a_line_for_each_task(accuracy: int, perplexity: int) -> None:
    task = {"dense": 0.5, "pruned": 0.4, "stderr_dense": 0.5, "stderr_pruned": 0.1}
    kinds = {"accuracy": accuracy, "perplexity": perplexity}
    figure = draw_scores({kind: {f"{kind}{number}": task for number in range(count)} for kind, count in kinds.items()}, LIGHT)
    if figure is None:
        assert accuracy == perplexity == 0
        return
    assert [len(axes.containers) for axes in figure.axes] == [2 * tasks for tasks in (accuracy, perplexity) if tasks]
    assert b"Software" not in to_png(figure)


def test_the_ridge_path_shows_alpha_zero_and_needs_a_positive_one() -> None:
    rows = [(0.0, 0.40), (10.0, 0.41), (1000.0, 0.5)]
    figure = draw_ridge_path(rows, (0.0, 0.40), 200.0, LIGHT)
    assert figure is not None
    axes = figure.axes[0]
    path, chosen, eigenvalue = axes.lines
    assert list(zip(*path.get_data(), strict=True)) == rows
    assert list(zip(*chosen.get_data(), strict=True)) == [(0.0, 0.40)]
    assert list(eigenvalue.get_xdata()) == [200.0, 200.0]
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]
    assert to_png(figure)
    assert draw_ridge_path([(0.0, 0.4)], (0.0, 0.4), 1.0, LIGHT) is None
