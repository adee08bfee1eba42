"""One look per method, kind, protocol and link: all have one, none that are drawn together are alike, all use it."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

from salvit_core import METHODS, figures
from salvit_core.experiments import ablations, accuracy, replaced
from salvit_core.figures import diagrams
from salvit_core.figures.registry import BESIDES, KINDS, LINKS, LOOKS, PROTOCOLS
from salvit_core.models import operations
from salvit_core.models.attention import ATTENTION
from salvit_core.models.normalizers import NORMALIZERS
from salvit_core.models.rows import MECHANISMS, ROWS
from salvit_core.private import links
from salvit_core.quantization import accelerator

# What stands in one figure, with colours.
TOGETHER = {
    "Figures 1 and 5, efficient attention": [*dict.fromkeys([*ROWS, *accuracy._SERIES])],
    "Figures 7 and 8": [*ablations.VARIANTS],
    "attention replaced": ["teacher", *replaced.NAMES.values(), "SA L2Q", "EA softmax", "ReLU linear"],
    "normalisers": [*NORMALIZERS],
    "operations": [*operations.KINDS],
    "the accelerator": [*accelerator.KINDS],
    "protocols": ["stock", "tuned"],
    "links": ["loopback", *links.LINKS],
}

# Linear RGB as people without one kind of cones see it (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "no long": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no middle": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no short": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


@pytest.fixture(autouse=True)
def none_left_open():
    yield
    plt.close("all")


def seen(color, eye):
    """A colour in CIE L*a*b*, where distances are about equally visible."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(eye @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(one, other):
    """How far two colours are apart for those who tell them apart least."""
    return min(np.linalg.norm(seen(one, eye) - seen(other, eye)) for eye in EYES.values())


def test_everything_that_a_figure_names_has_a_look():
    assert set(itertools.chain(*TOGETHER.values())) <= set(LOOKS)
    named = set(itertools.chain(*(each.rows for each in ATTENTION.values()))) | set(MECHANISMS) | set(METHODS)
    assert named <= set(LOOKS)
    # A mechanism without a row is one that stands in attention's place.
    assert {name for name, each in ATTENTION.items() if not each.rows} - {"self", "external", "scaling"} <= {
        *replaced.NAMES
    }
    assert set(PROTOCOLS) == {"stock", "tuned"}


@pytest.mark.parametrize("figure", TOGETHER)
def test_no_two_that_stand_in_one_figure_look_alike(figure):
    drawn = {LOOKS[name]: name for name in TOGETHER[figure]}  # a normaliser has two names
    names = {name.lower() for name in TOGETHER[figure]}
    assert len(drawn) == len(names), "two names of one look"
    for (one, name), (other, its) in itertools.combinations(drawn.items(), 2):
        # In colour, for all eyes: another marker, or another colour.
        assert one.marker != other.marker or apart(one.color, other.color) > 12, (name, its)
        # Without colour.
        assert (one.marker, one.dashes) != (other.marker, other.dashes), (name, its)


@pytest.mark.parametrize("names", [[*operations.KINDS, *BESIDES], ["L2Q, C only", "L2Q, D only"]])
def test_bars_are_told_apart(names):
    for name, its in itertools.combinations(names, 2):
        one, other = LOOKS[name], LOOKS[its]
        assert one.hatch != other.hatch or apart(one.color, other.color) > 12, (name, its)


def test_a_normaliser_alone_is_that_of_self_attention():
    for name in ("softmax", "2Quad", "2ReLU", "L2Q"):
        assert LOOKS[name] == LOOKS[name.lower()] == LOOKS[f"SA {name}"]
    assert LOOKS["teacher"] == LOOKS["SA softmax"] and LOOKS["L2Q element-wise"] == LOOKS["SA L2Q"]


def test_one_attention_has_one_hue():
    def hue(name):
        red, green, blue = to_rgb(LOOKS[name].color)
        order = np.argsort([red, green, blue])
        return tuple(order)

    for attention in ("SA", "EA"):
        assert len({hue(f"{attention} {name}") for name in ("softmax", "2Quad", "2ReLU", "L2Q", "scaling")}) == 1
        assert (
            len({LOOKS[f"{attention} {name}"].color for name in ("softmax", "2Quad", "2ReLU", "L2Q", "scaling")}) == 5
        )


def test_hatches_are_seen_on_every_colour():
    def brightness(color):
        red, green, blue = to_rgb(color)
        return 0.21 * red + 0.72 * green + 0.07 * blue

    for name, one in LOOKS.items():
        assert abs(brightness(one.color) - brightness(one.edge)) > 0.3, name


def test_what_has_no_name_looks_like_nothing_that_has():
    """A mechanism of one's own, beside those of the study."""
    drawn = figures.looks(["SA softmax", "mine", "EA L2Q", "yours"])
    assert drawn["SA softmax"] == LOOKS["SA softmax"] and drawn["EA L2Q"] == LOOKS["EA L2Q"]
    assert drawn["mine"] == figures.looks(["mine", "SAL-ViT"])["mine"]  # whatever stands beside it
    assert drawn["mine"] != drawn["yours"]
    for own, (name, other) in itertools.product((drawn["mine"], drawn["yours"]), LOOKS.items()):
        assert (own.marker, own.dashes) != (other.marker, other.dashes), name
        assert (own.marker, own.color) != (other.marker, other.color), name


def line_colors(figure):
    return {line.get_label(): to_hex(line.get_color()) for line in figure.axes[0].lines}


def colors(names):
    return {name: to_hex(LOOKS[name].color) for name in names}


def test_every_figure_of_methods_protocols_and_links_uses_them():
    names = ["SA softmax", "EA L2Q", "SAL-ViT", "Linformer"]
    points = pd.DataFrame(
        {"method": names, "series": names, "x": [1.0, 2.0, 3.0, 4.0], "accuracy": [5.0, 6.0, 7.0, 8.0]}
    )
    assert line_colors(figures.accuracy_against({"ours": points})) == colors(names)
    grown = pd.DataFrame({"series": names * 2, "tokens": [64] * 4 + [256] * 4, "ms": range(1, 9)})
    assert line_colors(figures.curves(grown, "tokens", {"ms": "ms"})) == colors(names)
    of_scores = pd.DataFrame(
        {"normalizer": ["softmax", "l2q"] * 2, "score": [0, 0, 1, 1], "weight": [0.1, 0.2, 0.3, 0.4]}
    )
    assert line_colors(figures.normalizer_curves(of_scores)) == colors(["softmax", "l2q"])
    seeds = pd.DataFrame({"dataset": "one", "variant": [*ablations.FIGURE_7], "seed": 0, "accuracy": range(5)})
    means = [each for each in figures.accuracy_by_variant(seeds).axes[0].collections if each.get_linewidth()[0] == 3]
    assert [to_hex(each.get_color()[0]) for each in means] == [*colors(ablations.FIGURE_7).values()]

    drifts = pd.DataFrame({"series": ["tuned", "stock"], "layer": "one", "node": "a", "error": 1e-3, "scale": 2.0})
    drawn = line_colors(figures.drift(drifts))
    assert {name: drawn[f"largest difference, {name}"] for name in PROTOCOLS} == colors(PROTOCOLS)
    seconds = pd.DataFrame([[1.0] * 5], index=["SA softmax"], columns=["loopback", *links.LINKS])
    drawn = figures.dots({"one": seconds}, "seconds").axes[0].collections[1:]
    edges = {each.get_label(): to_hex(each.get_edgecolor()[0]) for each in drawn}
    assert edges == colors(seconds.columns) and set(edges) <= set(LINKS)

    costs = pd.DataFrame([[1.0] * len(operations.KINDS)], index=["SA softmax"], columns=list(operations.KINDS))
    stacks = figures.stacked_kinds({"seconds": costs}).axes[0].containers
    assert {each.get_label(): to_hex(each[0].get_facecolor()) for each in stacks} == colors(operations.KINDS)
    layers = pd.DataFrame({"layer": "one", "kind": ["fused", "attention"], "intensity": 2.0, "speed": 1e9})
    drawn = figures.roofline(layers.assign(utilisation=0.5, cycles=9), 2e9, 1e9).axes[0].collections
    assert {each.get_label(): to_hex(each.get_facecolor()[0]) for each in drawn} == colors(["fused", "attention"])
    assert set(KINDS) == {*operations.KINDS, *accelerator.KINDS}


def test_diagrams_have_the_colours_of_the_attentions():
    assert LOOKS["SA softmax"].color == diagrams.SELF and LOOKS["EA softmax"].color == diagrams.EXTERNAL
    figure = figures.salvit(("self", "external"), "L2Q", ((3, 32, 32), (64, 64), 10))
    edges = {to_hex(patch.get_edgecolor()) for axis in figure.axes for patch in axis.patches}
    assert {diagrams.SELF, diagrams.EXTERNAL} <= edges
