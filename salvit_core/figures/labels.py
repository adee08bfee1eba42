"""Names beside points, where all of them find room; and what is compared on equal axes."""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from .registry import PROTOCOLS

SIZE = 5.5  # points, of a name
MARKER = 3.5  # points, from the middle of a point to its edge
GAP = 4.5  # points from the middle of a point to its name, where it is beside it
REACHES = (0, 3, 6, 9, 13, 17, 22, 28, 35, 44, 55)  # points farther, at the end of a thin line
SIDES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200, 70, 110, 290, 250)  # degrees, the best ones first
_AROUND = np.radians(SIDES)
# What is tried in turn: reach, and a step towards the side.
TRIED = np.array([(reach, *np.round([np.cos(side), np.sin(side)], 2)) for reach, side in product(REACHES, _AROUND)])
ORDERS = 4  # in which points choose: the crowded ones first, then as a seeded draw has it
MOVES = 12  # of a point that found no room to the front, in each


def write_labels(figure: Figure, points: Iterable[tuple[Axes, float, float, str]]) -> bool:
    """Write a name beside each of the points, or none where one of them finds no room.

    A name lies within its axes, and on no other name, no point and no line from a point to its name; on no curve
    either, if there is room elsewhere.

    Args:
        figure: with its axes as they stay; it is laid out.
        points: axes, place in their data, name; a point without a name is only kept clear.

    Returns:
        Whether they are written: otherwise write a legend.
    """
    points = list(points)
    figure.draw_without_rendering()  # lays it out
    written: list[Annotation] = []
    for axis in dict.fromkeys(axis for axis, *_ in points):
        part = [(x, y, name) for each, x, y, name in points if each is axis]
        drawn = [curve.get_xydata() for curve in axis.lines]
        drawn += [each for some in axis.collections if isinstance(some, LineCollection) for each in some.get_segments()]
        curves = [box for curve in drawn for box in _along(axis.transData.transform(curve))]
        spots = _nearest(axis, part, curves) or (_nearest(axis, part, []) if curves else None)
        if spots is None:
            for each in written:
                each.remove()
            return False
        written += [_annotate(axis, part[i], *spot) for i, spot in spots.items()]
    return True


Spot = tuple[np.ndarray, float]  # where a name starts, in points from its point, and how far beyond beside it


def _nearest(axis: Axes, points: list[tuple[float, float, str]], curves: list) -> dict[int, Spot] | None:
    """Where the names of one panel are nearest to their points, by number of the point; None where there is no room.

    A name does not lie on `curves`; a line from a point to its name may cross them.
    """
    scale = axis.figure.dpi / 72  # pixels in a point
    places = axis.transData.transform([(x, y) for x, y, _ in points])
    sizes = [_size(axis, name) for *_, name in points]
    named = np.flatnonzero([bool(name) for *_, name in points])
    near = (np.linalg.norm(places[:, None] - places[None], axis=-1) < 40 * scale).sum(0)
    draw, found = np.random.default_rng(0), []
    for order in [named[np.argsort(-near[named], kind="stable")], *[draw.permutation(named) for _ in range(ORDERS)]]:
        turns = list(order)
        for _ in range(MOVES):
            spots = _spots(np.array(axis.bbox.extents), places, sizes, turns, curves, scale)
            if len(spots) == len(turns):
                found.append(spots)
                break
            stuck = turns[len(spots)]
            turns = [stuck, *(i for i in turns if i != stuck)]
    return min(found, key=lambda spots: sum(reach for _, reach in spots.values()), default=None)


def _spots(frame: np.ndarray, places: np.ndarray, sizes: list, turns: list, curves: list, scale: float) -> dict:
    """The spots of points in turn, up to the first that finds no room."""
    taken = [_box(place - MARKER * scale, place + MARKER * scale) for place in places]
    found: dict[int, Spot] = {}
    for i in turns:
        if (spot := _spot(frame, places[i], sizes[i], taken, curves, scale)) is None:
            break
        found[i] = spot
    return found


def _spot(
    frame: np.ndarray, place: np.ndarray, size: np.ndarray, taken: list, curves: list, scale: float
) -> Spot | None:
    """Of one name, whose room is then taken."""
    ends = place + (GAP + TRIED[:, :1]) * scale * TRIED[:, 1:]
    corners = ends + size * (np.sign(TRIED[:, 1:]) - 1) / 2
    boxes = np.hstack([corners, corners + size])
    inside = (boxes[:, :2] >= frame[:2]).all(1) & (boxes[:, 2:] <= frame[2:]).all(1)
    others, own = np.array(taken), _box(place - MARKER * scale, place + MARKER * scale)[None]
    for i in np.flatnonzero(inside & ~_overlap(boxes, np.array([*taken, *curves]))):
        reach = TRIED[i, 0]
        line = np.array(_along(np.array([place, ends[i]])) if reach else np.zeros((0, 4)))
        line = line[~_overlap(line, own)]
        if not _overlap(line, others).any():
            taken += [boxes[i], *line]
            return (corners[i] - place) / scale, reach
    return None


def _annotate(axis: Axes, point: tuple[float, float, str], offset: np.ndarray, reach: float) -> Annotation:
    x, y, name = point
    thin = {"arrowstyle": "-", "color": "0.55", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
    options: dict[str, Any] = {"xytext": tuple(offset), "textcoords": "offset points", "ha": "left", "va": "bottom"}
    label = axis.annotate(name, (x, y), fontsize=SIZE, arrowprops=thin if reach else None, **options)
    label.set_in_layout(False)  # the layout stays that by which the place was found
    return label


def _size(axis: Axes, name: str) -> np.ndarray:
    """Width and height of a name in pixels."""
    text = axis.text(0, 0, name, fontsize=SIZE)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width, extent.height])


def _box(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.concatenate([low, high])


def _along(corners: np.ndarray) -> list[np.ndarray]:
    """Small boxes along a line through places in pixels."""
    boxes = []
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        for part in np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) // 3)):
            place = start + part * (end - start)
            boxes.append(_box(place - 1.5, place + 1.5))
    return boxes


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the boxes lies on any of the others."""
    boxes = boxes[:, None]
    return np.any(np.all((boxes[..., :2] < others[:, 2:]) & (others[:, :2] < boxes[..., 2:]), axis=-1), axis=-1)


_PROTOCOL = re.compile(r"\b(" + "|".join(PROTOCOLS) + r")\b")


def compared(titles: Iterable[str]) -> list[list[str]]:
    """Titles of panels that differ in nothing but the protocol: what they show is compared, on equal axes."""
    groups: dict[str, list[str]] = {}
    for title in titles:
        groups.setdefault(_PROTOCOL.sub("", title), []).append(title)
    return [group for group in groups.values() if len(group) > 1]


def equal_scales(axes: Mapping[str, Axes], margin: float = 0.05) -> None:
    """Give the panels that are `compared`, by title, one horizontal scale, which holds what is drawn in any of them.

    Args:
        axes: by title, with everything drawn and their kind of scale, linear or logarithmic, set.
        margin: on both sides, as a part of the whole.
    """
    for group in compared(axes):
        low, high = np.transpose([axes[title].dataLim.intervalx for title in group])
        scale = axes[group[0]].xaxis.get_transform()
        ends = scale.transform([low.min(), high.max()])
        wider = scale.inverted().transform(ends + margin * np.ptp(ends) * np.array([-1, 1]))
        for title in group:
            axes[title].set_xlim(*wider)
