"""Place labels beside points so that none covers another label, a point, a leader line or the frame.

Each label takes the cheapest free place around its point: the cost is the distance, with a surcharge for covering a line of the
picture. A label without a free place is left out, because overlapping labels can't be read.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

# Sizes in points (1/72 inch), as matplotlib's offsets are.
INCH = 72
MARKER = 10.0
# Directions of a label from its point (right, up).
DIRECTIONS = ((1, 1), (1, 0), (0, 1), (-1, 1), (1, -1), (0, -1), (-1, -1), (-1, 0))
# At the nearest distance a label needs no leader line.
DISTANCES = (7, 16, 28, 42, 58, 76)
ACROSS_A_LINE = 30

Place = tuple[float, float]
# Left, bottom, right, top.
Box = tuple[float, float, float, float]


def place_labels(
    axes: Axes,
    labelled: Sequence[tuple[float, float, str]],
    points: Sequence[Place],
    lines: Sequence[tuple[Place, Place]],
) -> None:
    """Write each text beside its point, if there is a free place.

    The limits of the axes must be final, and everything that takes room beside the axes must have been drawn.

    Args:
        axes: the axes with the points.
        labelled: x and y of each point to label, and the text.
        points: x and y of all points, labelled or not.
        lines: ends of the lines that labels should not cover.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.draw_without_rendering()
    pixels, inside = figure.dpi / INCH, axes.get_window_extent()
    frame = inside.x0, inside.y0, inside.x1, inside.y1

    def on_screen(place: Place) -> Place:
        x, y = axes.transData.transform(place)
        return float(x), float(y)

    taken = [_box(on_screen(point), MARKER * pixels, MARKER * pixels) for point in points]
    lined = [box for ends in lines for box in _along(on_screen(ends[0]), on_screen(ends[1]), 3 * pixels)]
    for x, y, text in labelled:
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=10, linespacing=1.05, zorder=5,
            arrowprops={"arrowstyle": "-", "lw": 0.7, "shrinkA": 0, "shrinkB": 4, "color": axes.xaxis.label.get_color()},
        )  # fmt: skip
        # Labels lie within the frame and must not change the layout.
        label.set_in_layout(False)
        size = label.get_window_extent(figure.canvas.get_renderer())
        point = on_screen((x, y))
        best: tuple[float, Place, list[Box]] | None = None
        for distance, place in _places(size.width / pixels, size.height / pixels):
            box = _box((point[0] + place[0] * pixels, point[1] + place[1] * pixels), size.width, size.height)
            if not _within(box, frame) or (best and distance >= best[0]):
                continue
            leader = _leader(point, box, pixels) if distance > DISTANCES[0] else []
            cost = distance + ACROSS_A_LINE * _touches([box], lined)
            if (best is None or cost < best[0]) and not _touches([box, *leader], taken):
                best = cost, place, [box, *leader]
        if best is None:
            label.remove()
            continue
        _, place, boxes = best
        taken += boxes
        label.set(position=place, ha="center", va="center")
        if len(boxes) == 1 and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)


def _places(width: float, height: float) -> Iterator[tuple[float, Place]]:
    """Yield each distance with the offset (points) of a label's centre from its point."""
    for distance, (right, up) in product(DISTANCES, DIRECTIONS):
        yield distance, (right * (distance + width / 2), up * (distance * (0.6 if right else 1) + height / 2))


def _leader(point: Place, box: Box, pixels: float) -> list[Box]:
    """Return boxes that cover the line from a point to its label, without the ends."""
    near = min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])
    ends = [box, _box(point, MARKER * pixels, MARKER * pixels)]
    return [part for part in _along(point, near, 2 * pixels) if not _touches([part], ends)]


def _along(start: Place, end: Place, side: float) -> list[Box]:
    """Return small squares that cover a line."""
    steps = int(max(abs(end[0] - start[0]), abs(end[1] - start[1])) / side) + 1
    width, height = (end[0] - start[0]) / steps, (end[1] - start[1]) / steps
    return [_box((start[0] + step * width, start[1] + step * height), side, side) for step in range(steps + 1)]


def _touches(boxes: Sequence[Box], others: Sequence[Box]) -> bool:
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in others)


def _box(centre: Place, width: float, height: float) -> Box:
    return centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2


def _within(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
