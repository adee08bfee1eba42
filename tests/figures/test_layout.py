"""Nothing is cut off and no text lies on another, with the longest names; what is compared is equal."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from salvit_core import figures
from salvit_core.experiments import ablations, replaced
from salvit_core.figures import labels
from salvit_core.models.operations import KINDS
from salvit_core.models.rows import METHODS, ROWS
from salvit_core.private.links import LINKS

NOTE = (
    "cct_7_3x1 (width 256, 7 layers, 256 tokens), search 200 + 600 epochs. " * 2 + "measured: 9 runs, seed 0, 2 cores"
)
DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def none_left_open():
    yield
    plt.close("all")


def texts(figure):
    """Every text that is seen, with its extent in pixels."""
    figure.draw_without_rendering()
    seen = [*figure.texts, *(text for each in figure.legends for text in each.get_texts())]
    for axes in figure.axes:
        seen += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            seen += [tick.label1 for tick in axis._update_ticks()]  # those within the axis
            seen.append(axis.offsetText)
    shown = [text for text in seen if text.get_visible() and text.get_text().strip()]
    for text in shown:
        if isinstance(text, Annotation):
            text.get_window_extent()  # finds its place
    return [(text.get_text(), written(text)) for text in shown]


def written(text):
    """Where there are letters: without the empty lines above them."""
    box, lines = Text.get_window_extent(text), text.get_text().split("\n")
    empty = next(i for i, line in enumerate(lines) if line)
    return Bbox([[box.x0, box.y0], [box.x1, box.y1 - box.height * empty / len(lines)]])


def assert_legible(figure):
    found, canvas = texts(figure), figure.bbox
    assert len(found) > 2
    for text, box in found:
        inside = canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and canvas.y0 <= box.y0 and box.y1 <= canvas.y1
        assert inside, f"{text!r} is cut off: {box.extents} in {canvas.extents}"
    for (one, box), (other, its) in itertools.combinations(found, 2):
        width = min(box.x1, its.x1) - max(box.x0, its.x0)
        height = min(box.y1, its.y1) - max(box.y0, its.y0)
        assert width <= 1 or height <= 1, f"{one!r} lies on {other!r}"


def long(**columns):
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


def kinds(names, seconds=1.0):
    costs = pd.DataFrame(seconds * DRAW.random((len(names), len(KINDS))), index=list(names), columns=list(KINDS))
    return costs.assign(low=costs.sum(axis=1) * 0.9, high=costs.sum(axis=1) * 1.3)


def points(names, scale=1.0):
    some = np.random.default_rng(len(names))
    table = pd.DataFrame({"method": names, "series": names, "x": scale * some.lognormal(0, 0.5, len(names))})
    return table.assign(accuracy=some.normal(60, 5, len(names)), x_low=0.9 * table["x"], x_high=1.4 * table["x"])


def drifting():
    layers = ["tokenizer", *(f"block {i}" for i in range(1, 8)), "norm", "pool", "head"]
    rows = [(layer, f"{layer}.{i}") for layer in layers for i in range(13 if layer.startswith("block") else 1)]
    table = pd.concat(
        [pd.DataFrame(rows, columns=["layer", "node"]).assign(series=name) for name in ("stock", "tuned")]
    )
    return table.assign(error=1e-3, scale=2.0)


def learnt():
    return long(layer=range(1, 8), head=range(1, 5), parameter=["c", "d"], mean=[1.0], variance=[0.1]).assign(
        low=0.2, high=1.9
    )


PANELS = ("mean of C", "mean of D", "variance of C", "variance of D")
ROUNDS = ("seconds", "MB one way", "dealer's MB", "rounds")
FIGURES = {
    "a stack by kind": lambda: figures.stacked_kinds({each: kinds(METHODS) for each in ROUNDS}, NOTE),
    "stacks of both protocols": lambda: figures.stacked_kinds(
        {f"{name}: seconds per image": kinds(ROWS, scale) for name, scale in (("stock", 9.0), ("tuned", 1.0))}, NOTE
    ),
    "one bar": lambda: figures.stacked_kinds({"seconds": kinds(["SA softmax"]), "rounds": kinds(["SA softmax"])}, NOTE),
    "ratios": lambda: figures.ratios_beside_paper(
        pd.DataFrame({"complete": 0.8, "without_layernorm": 0.7, "paper": 0.6}, index=[*METHODS]), NOTE, "SA softmax"
    ),
    "accuracy of 27 against three costs": lambda: figures.accuracy_against(
        {name: points([*ROWS]) for name in ("FLOPs", "in the clear", "on shares")}, NOTE, log=True
    ),
    "accuracy by protocol": lambda: figures.accuracy_against(
        {
            "ours, cifar10, stock": points([*METHODS][:9], 9.0),
            "ours, cifar10, tuned": points([*METHODS][:9]),
            "paper, cifar10": points(["SA 2Quad (KD)", "MPCViT (KD)", "SAL-ViT"], 50.0),
        },
        NOTE,
    ),
    "seven variants": lambda: figures.accuracy_by_variant(
        long(dataset=["cifar10"], variant=[*ablations.VARIANTS], seed=[0, 1], accuracy=[68.0]), note=NOTE
    ),
    "variants of two data sets": lambda: figures.accuracy_by_variant(
        long(dataset=["one", "two"], variant=["teacher", *replaced.NAMES.values()], seed=[0], accuracy=[68.0]),
        note=NOTE,
    ),
    "drift": lambda: figures.drift(drifting(), NOTE),
    "links": lambda: figures.dots(
        {
            f"{name} (modelled but for loopback)": pd.DataFrame(
                scale * DRAW.random((13, 5)) + 1, index=[*METHODS], columns=["loopback", *LINKS]
            )
            for name, scale in (("stock", 150), ("tuned", 30))
        },
        "seconds per image",
        True,
        NOTE,
    ),
    "replacements": lambda: figures.dots(
        {
            name: pd.DataFrame(
                DRAW.random((8, 2)) + 1, index=[*replaced.BESIDE, *list(replaced.NAMES.values())[:4]]
            ).set_axis(["batch 1", "batch 32"], axis=1)
            for name in ("rounds of a query", "MB per image")
        },
        "",
        True,
        NOTE,
    ),
    "growth of 27": lambda: figures.curves(
        long(series=[*ROWS], tokens=[64, 256, 784, 3136], ms=[2.0, 30.0]).assign(mb=3.0, ms_low=1.0, ms_high=40.0),
        "tokens",
        {"ms": "ms in the clear", "mb": "MB of activations"},
        ("tokens", "ms"),
        2,
        NOTE,
    ),
    "growth in four panels": lambda: figures.curves(
        long(series=["SA softmax", "Nystromformer L2Q"], tokens=[64, 256, 1024]).assign(
            **dict.fromkeys(ROUNDS, 1000.0)
        ),
        "tokens",
        {name: name for name in ROUNDS},
        ("tokens",),
        2,
        NOTE,
    ),
    "normalisers": lambda: figures.normalizer_curves(
        long(normalizer=["softmax", "2Quad", "2ReLU", "L2Q"], score=[-6.0, 6.0], weight=[0.01]), NOTE
    ),
    "learnt parameters": lambda: figures.parameter_ranges(learnt(), NOTE),
    "attention distance": lambda: figures.scatter_by_layer(
        long(layer=range(1, 8), head=range(4)).assign(distance=DRAW.random(28), **dict.fromkeys(PANELS, 0.98)),
        "distance",
        {name: name for name in PANELS},
        NOTE,
    ),
    "C and D": lambda: figures.heat_maps({f"{name}, layer 7, head 4": DRAW.random((64, 64)) for name in "CD"}, NOTE),
    "channels": lambda: figures.heat_maps(
        {
            "% of the hidden units removed": pd.DataFrame(
                DRAW.random((4, 8)),
                index=range(1, 5),
                columns=[f"head {i} {way}" for i in range(1, 5) for way in ("forward", "backward")],
            )
        },
        NOTE,
        ("head and direction", "layer"),
    ),
    "maps": lambda: figures.map_grid(
        [DRAW.random((32, 32))] * 8,
        {name: [DRAW.random((8, 8))] * 8 for name in ("Dilated hybrid, rollout", "SA softmax")},
        NOTE,
    ),
    "one map": lambda: figures.map_grid([DRAW.random((32, 32))], {"layer 4, head 4": [np.eye(8)]}, "Dilated hybrid"),
    "bits": lambda: figures.accuracy_by_bits(
        long(bits=["W8", "W4", "W8A8"], variant=["all tricks", "without reconstruction"], accuracy=[50.0]).assign(
            lowest=49.0, highest=51.0
        ),
        51.0,
        NOTE,
    ),
    "searches": lambda: figures.trajectories(
        long(
            search=["L1 with gradient (Eq. 5)", "no L1 term", "released: no gradient, decay"],
            layer=range(1, 8),
            epoch=range(60),
            alpha=[0.05],
        ),
        NOTE,
    ),
    "roofline": lambda: figures.roofline(
        long(layer=[f"block {i}" for i in range(1, 22)], kind=["depth-wise", "point-wise"]).assign(
            intensity=[*np.geomspace(0.5, 70, 42)], speed=2e10, utilisation=0.9, cycles=9
        ),
        2.3e10,
        19.2e9,
        NOTE,
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off_or_lies_on_another(name):
    assert_legible(FIGURES[name]())


def test_what_lies_on_another_or_outside_is_found():
    figure, axis = plt.subplots()
    axis.set(xlabel="x", ylabel="y", title="title")
    axis.text(0.5, 0.5, "one")
    assert_legible(figure)
    more = axis.text(0.51, 0.5, "other")
    with pytest.raises(AssertionError, match="lies on"):
        assert_legible(figure)
    more.set_position((0.9, 1.2))
    with pytest.raises(AssertionError, match="is cut off"):
        assert_legible(figure)


def test_points_are_named_where_names_find_room_and_in_a_legend_otherwise():
    few = figures.accuracy_against({"ours": points(["SA softmax", "EA L2Q", "Linformer, heads"])})
    assert [text.get_text() for text in few.axes[0].texts] == ["SA softmax", "EA L2Q", "Linformer, heads"]
    assert not few.legends
    one_place = pd.DataFrame({"method": [*ROWS], "series": [*ROWS], "x": 1.0, "accuracy": 50.0})
    heap = figures.accuracy_against({"ours": one_place})
    assert not heap.axes[0].texts and len(heap.legends[0].get_texts()) == len(ROWS)


def test_a_series_is_named_once_and_its_points_by_what_differs():
    rows = {"method": ["B=1", "B=2", "MPCViT", "MPCViT"], "series": ["SAL-ViT"] * 2 + ["MPCViT"] * 2}
    table = pd.DataFrame(rows | {"x": [1.0, 2.0, 3.0, 4.0], "accuracy": [50.0, 60.0, 70.0, 75.0]})
    drawn = figures.accuracy_against({"ours": table})
    assert [text.get_text() for text in drawn.axes[0].texts] == ["SAL-ViT B=1", "B=2", "MPCViT"]


def test_a_name_lies_on_no_point_and_no_curve():
    table = points([*METHODS][:9])
    axis = figures.accuracy_against({"ours": table}).axes[0]
    places = axis.transData.transform(table[["x", "accuracy"]])
    ranges = [each for some in axis.collections for each in some.get_segments()]
    across = [axis.transData.transform(np.linspace(*each, 200)) for each in ranges]
    assert len(across) == len(table)
    for text in axis.texts:
        text.get_window_extent()
        box = Text.get_window_extent(text)
        assert not box.count_contains(places) and not any(box.count_contains(line) for line in across), text.get_text()
    along = pd.DataFrame({"method": ["one", "two"], "series": "SAL-ViT", "x": [1.0, 2.0], "accuracy": [50.0, 50.1]})
    axis = figures.accuracy_against({"ours": along}).axes[0]
    line = axis.transData.transform(np.linspace([1.0, 50.0], [2.0, 50.1], 200))
    for text in axis.texts:
        text.get_window_extent()
        assert not Text.get_window_extent(text).count_contains(line), text.get_text()


def test_panels_that_differ_in_the_protocol_alone_are_compared():
    assert labels.compared(["ours, stock", "ours, tuned", "paper"]) == [["ours, stock", "ours, tuned"]]
    assert labels.compared(["stock: seconds", "tuned: rounds", "seconds", "stocks"]) == []

    def limits(figure):
        return [axis.get_xlim() for axis in figure.axes]

    both = {"ours, stock": points(["SA softmax", "EA L2Q"], 9.0), "ours, tuned": points(["SA softmax", "EA L2Q"])}
    drawn = figures.accuracy_against(both | {"paper": points(["SA softmax"], 50.0)})
    one, other, paper = limits(drawn)
    assert one == other != paper
    assert one[0] < both["ours, tuned"]["x"].min() and one[1] > both["ours, stock"]["x"].max()
    assert drawn.axes[0].get_xscale() == "log"  # nine times apart
    everything = pd.concat([table[["x", "x_low", "x_high"]] for table in both.values()])
    whole = everything.max(axis=None) / everything.min(axis=None)
    assert np.log(one[1] / one[0]) == pytest.approx(1.3 * np.log(whole))  # what is drawn, and a margin
    near = {"ours, stock": points(["SA softmax"]), "ours, tuned": points(["SA softmax"])}
    assert figures.accuracy_against(near).axes[0].get_xscale() == "linear"

    seconds = {f"{name}: seconds": kinds(["SA", "EA"], scale) for name, scale in (("stock", 9.0), ("tuned", 1.0))}
    drawn = figures.stacked_kinds(seconds | {"rounds": kinds(["SA", "EA"])})
    one, other, _, enlarged = limits(drawn)
    assert one == other and enlarged[1] < one[1] / 4
    assert drawn.axes[3].get_xlabel() == "tuned: seconds,\nenlarged"
    one, other, _, enlarged = limits(
        figures.stacked_kinds(
            seconds | {"rounds": kinds(["SA"] * 2)}, ends={"stock: seconds": 90.0, "tuned: seconds": 10.0}
        )
    )
    assert one == other == (0, 1.04 * 90) and enlarged == (0, 1.04 * 10)

    links = {
        f"{name} (modelled)": pd.DataFrame({"LAN": [scale, 2 * scale]}, index=["SA", "EA"])
        for name, scale in (("stock", 9.0), ("tuned", 1.0))
    }
    one, other = limits(figures.dots(links, "seconds", log=True))
    assert one == other


def test_a_stack_that_ends_in_a_kind_without_length_keeps_its_margin():
    costs = pd.DataFrame([[3.0, 0.0]], index=["SA"], columns=["scores", "head"])
    assert figures.stacked_kinds({"seconds": costs}).axes[0].get_xlim() == (0, pytest.approx(3.12))


def test_whole_numbers_have_whole_ticks():
    rows = {"method": ["B=1", "B=2", "B=3"], "series": "SAL-ViT", "x": [1, 2, 3], "accuracy": [50.0, 60.0, 70.0]}
    axis = figures.accuracy_against({"ours": pd.DataFrame(rows)}).axes[0]
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_ranges_are_drawn_in_the_directions_in_which_they_are_known():
    table = points(["SA softmax"]).assign(accuracy_low=58.0, accuracy_high=66.0)
    across, up = (each.get_segments()[0] for each in figures.accuracy_against({"ours": table}).axes[0].collections)
    assert across[:, 0].tolist() == pytest.approx(table[["x_low", "x_high"]].iloc[0].tolist())
    assert up[:, 1].tolist() == [58.0, 66.0]
    (across,) = figures.accuracy_against({"ours": points(["SA softmax"])}).axes[0].collections
    assert len(across.get_segments()) == 1
    grown = pd.DataFrame({"series": "SA softmax", "tokens": [64, 256], "ms": [1.0, 2.0], "ms_low": [0.5, np.nan]})
    (range_,) = figures.curves(grown.assign(ms_high=3.0), "tokens", {"ms": "ms"}).axes[0].collections
    assert [each[:, 1].tolist() for each in range_.get_segments()] == [[0.5, 3.0]]


def test_a_row_of_which_nothing_is_known_is_not_drawn():
    table = pd.DataFrame({"clear": [70.0, np.nan], "on shares": [70.0, np.nan]}, index=["SA", "EA"])
    figure = figures.dots({"tuned": table, "stock": table.assign(clear=[50.0, np.nan])}, "accuracy")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["SA"]
