"""Figures: what is drawn, that a value looks the same wherever it is drawn, and what is refused."""

import ast
import itertools
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from salvit_core import MECHANISMS, METHODS, figures, workspace
from salvit_core.figures import registry, style
from salvit_core.figures.widgets import explore


@pytest.fixture(autouse=True)
def none_left_open():
    yield
    plt.close("all")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    return tmp_path / "figures"


def lines(figure):
    """Colour, dashes and marker by the names of all lines of a figure."""
    return {
        line.get_label(): (line.get_color(), line.get_linestyle(), line.get_marker(), line._unscaled_dash_pattern)
        for line in (line for axis in figure.axes for line in axis.lines)
    }


def bars(figure, panel=0):
    """Colour and hatch by kind, in the order of the stack."""
    stacks = [each for each in figure.axes[panel].containers if isinstance(each, BarContainer)]
    return {each.get_label(): (each[0].get_facecolor(), each[0].get_hatch()) for each in stacks}


def table(names, known=None):
    series = names if known is None else pd.Categorical(names, known)
    return pd.DataFrame({"method": names, "series": series, "x": [1.0] * len(names), "accuracy": [50.0] * len(names)})


def kinds(names, known=None):
    columns = pd.Index(names) if known is None else pd.CategoricalIndex(names, known)
    return pd.DataFrame([[1.0] * len(names)] * 2, index=["SA", "EA"], columns=columns)


def long(**columns):
    """One row for each combination of the values given."""
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


# Every drawing function that takes one table, with a small one.
TABLES = {
    "ratios_beside_paper": pd.DataFrame(
        {"complete": [1.0, 0.6], "without_layernorm": [1.0, 0.5], "paper": [1.0, np.nan]}, index=["SA", "EA"]
    ),
    "normalizer_curves": long(normalizer=["softmax", "l2q"], score=[-1.0, 1.0], weight=[0.5]),
    "accuracy_by_bits": long(bits=["W8", "W4"], variant=["a", "b"], accuracy=[50.0], lowest=[49.0], highest=[51.0]),
    "accuracy_by_variant": long(dataset=["one", "two"], variant=["a", "b"], seed=[0, 1], accuracy=[80.0]),
    "trajectories": long(search=["SAS"], layer=[1, 2], epoch=[0, 1], alpha=[0.1]),
    "parameter_ranges": long(
        layer=[1, 2], head=[1, 2], parameter=["c", "d"], mean=[1.0], variance=[0.1], low=[0.9], high=[1.1]
    ),
    "drift": long(series=["stock", "tuned"], layer=["one", "two"], node=["a"], error=[1e-3], scale=[2.0]),
    "curves": long(series=["a", "b"], tokens=[64, 256], ms=[2.0]),
    "errors_over_ranges": pd.DataFrame({"x": [0.1, 1.0, 10.0], "error": [1e-4, 0.0, 1e5]}),
    "scatter_by_layer": long(layer=[2, 1], head=[1, 2], reach=[3.0], mean=[1.0]),
    "roofline": long(
        layer=["block 1", "pool"], kind=["a", "b"], intensity=[2.0], speed=[1e9], utilisation=[0.5], cycles=[9]
    ),
}
MORE = {
    "errors_over_ranges": ({"covered": (0.2, 50.0), "asked": (0.5, 2.0)}, "the reciprocal", 0.01),
    "curves": ("tokens", {"ms": "ms"}),
    "scatter_by_layer": ("reach", {"mean": "mean of C"}),
    "roofline": (2e9, 1e9),
}
PANELS = {
    "stacked_kinds": (kinds(["scores", "values", "offline"]),),
    "accuracy_against": (table(["SA softmax", "EA L2Q"]),),
    "dots": (pd.DataFrame({"LAN": [1.0, 2.0], "WAN": [3.0, np.nan]}, index=["SA", "EA"]), "seconds"),
}


def test_every_public_drawing_function_is_in_one_of_the_tables_here():
    rest = {"PALETTE", "STYLE", "WIDTH", "Look", "look", "looks", "save", "save_table"}
    rest |= {"heat_maps", "map_grid", "pictures", "two_parties", "external_beside_self", "salvit"}
    assert set(figures.__all__) - rest == {*TABLES, *PANELS}
    assert all(hasattr(figures, name) for name in figures.__all__)


@pytest.mark.parametrize("name", TABLES)
def test_a_figure_is_drawn_from_a_small_table_and_leaves_it_as_it_is(name):
    before = TABLES[name].copy()
    figure = getattr(figures, name)(TABLES[name], *MORE.get(name, ()), note="measured")
    assert isinstance(figure, Figure) and all(axis.has_data() for axis in figure.axes)
    assert figure.get_supxlabel() == "measured"
    pd.testing.assert_frame_equal(TABLES[name], before)


@pytest.mark.parametrize("name", PANELS)
def test_a_figure_of_panels_has_one_for_each_table(name):
    first, *more = PANELS[name]
    figure = getattr(figures, name)({"one": first, "two": first}, *more)
    assert len(figure.axes) == 2 and all(axis.has_data() for axis in figure.axes)


def test_pictures():
    assert len(figures.heat_maps({"C": np.eye(3), "D": np.ones((2, 3))}).axes) == 4  # each with its colour bar
    assert len(figures.map_grid([np.ones((4, 4, 3))] * 2, {"SA": [np.eye(2)] * 2}).axes) == 4
    shown = figures.pictures({"image": np.eye(2), "share": 1e18 * np.eye(2) - 2e18}).axes
    assert [axis.get_title() for axis in shown] == ["image", "share"]
    assert [axis.get_xlabel() for axis in shown] == ["0 to 1", "-2e+18 to -1e+18"]


DIAGRAMS = {
    "two_parties": lambda: figures.two_parties(152, note="counted"),
    "external_beside_self": lambda: figures.external_beside_self(1024, 256, 4, 64, "softmax", note="counted"),
    **{
        f"salvit of {len(layers)} layers": lambda layers=layers: figures.salvit(
            layers, "L2Q", ((3, 224, 224), (196, 384), 1000), note="counted"
        )
        for layers in (["self"], ["external", ("self", "external")] * 2, ["self"] * 3 + ["external"] * 11)
    },
}


@pytest.mark.parametrize("name", DIAGRAMS)
def test_what_a_diagram_says_stands_in_its_boxes_and_does_not_overlap(name):
    figure = DIAGRAMS[name]()
    assert figure.get_supxlabel() == "counted"
    figure.canvas.draw()
    (axis,) = figure.axes
    boxes = [patch.get_window_extent() for patch in axis.patches if isinstance(patch, FancyBboxPatch)]
    texts = [text for text in axis.texts if text.get_text()]
    extents = [text.get_window_extent() for text in texts]
    page = figure.bbox
    assert len(boxes) >= 3 and len(texts) >= 3
    for text, extent in zip(texts, extents, strict=True):
        assert page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1, text
        for box in boxes:
            inside = box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
            assert inside or not box.overlaps(extent), text
    for (one, first), (other, second) in itertools.combinations(zip(texts, extents, strict=True), 2):
        assert not first.overlaps(second), (one.get_text(), other.get_text())
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_diagram_says_what_it_is_given():
    def said(figure):
        return " ".join(text.get_text().replace("\n", " ") for text in figure.axes[0].texts)

    assert "open, 152 rounds" in said(figures.two_parties(152)) and "in every round" in said(figures.two_parties())
    both = said(figures.external_beside_self(256, 128, 4, 64, "L2Q"))
    assert both.count("4 x 256 x 256") == 2 and both.count("4 x 256 x 64") == 2  # scores and weights of each
    assert both.count("4 x 256 x 32") == 4 and "L2Q over the keys" in both
    whole = said(figures.salvit(["self", "external", ("self", "external")], "L2Q", ((1, 8, 8), (16, 32), 10)))
    assert "layer 1  SA" in whole and "layer 2  EA" in whole and "layer 3  SA EA" in whole
    assert "image 1 x 8 x 8" in whole and "tokens 16 x 32" in whole and "10 logits" in whole and "learnt" in whole
    assert "learnt" not in said(figures.salvit(["linformer"], "softmax", ((1, 8, 8), (16, 32), 10)))
    with pytest.raises(ValueError, match="without layers: give the attention of at least one"):
        figures.salvit([], "L2Q", ((1, 8, 8), (16, 32), 10))


def test_ranges_stand_below_the_errors_as_far_as_the_table_goes():
    table, more = TABLES["errors_over_ranges"], MORE["errors_over_ranges"]
    above, below = figures.errors_over_ranges(table, *more).axes
    np.testing.assert_allclose(above.lines[0].get_xydata(), [[0.1, 1e-4], [10, 1e5]])  # no error has no place
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in below.patches] == [(0.2, 10.0), (0.5, 2.0)]
    assert below.get_xscale() == "log" and below.get_xlim() == (0.1, 10.0)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("lack", ["rows", "columns", "numbers"])
def test_an_empty_table_is_refused_in_one_line(name, lack):
    full = TABLES[name]
    numbers = full.select_dtypes("number").columns
    empty = {"rows": full.iloc[:0], "columns": pd.DataFrame(), "numbers": full.assign(**dict.fromkeys(numbers, np.nan))}
    with pytest.raises(ValueError, match="the table .*: .* leave it out") as refused:
        getattr(figures, name)(empty[lack], *MORE.get(name, ()))
    assert "\n" not in str(refused.value)
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", PANELS)
def test_a_figure_with_an_empty_panel_is_refused_by_the_panels_name(name):
    first, *more = PANELS[name]
    draw = getattr(figures, name)
    numbers = first.select_dtypes("number").columns
    for empty in (first.iloc[:0], pd.DataFrame(), first.assign(**dict.fromkeys(numbers, np.nan))):
        with pytest.raises(ValueError, match="panel 'tuned' .*: .* leave it out"):
            draw({"stock": first, "tuned": empty}, *more)
    with pytest.raises(ValueError, match="without panels: give"):
        draw({}, *more)


def test_a_quantity_that_has_no_number_is_refused_by_name():
    grown = TABLES["curves"].assign(mb=np.nan)
    with pytest.raises(ValueError, match="series, tokens, mb"):
        figures.curves(grown, "tokens", {"ms": "ms", "mb": "MB"})
    with pytest.raises(ValueError, match="lacks gb: it has the columns series, tokens, ms"):
        figures.curves(TABLES["curves"], "tokens", {"gb": "GB"})
    only_c = TABLES["parameter_ranges"].query("parameter == 'c'")
    with pytest.raises(ValueError, match="parameter 'd' is empty"):
        figures.parameter_ranges(only_c)


def test_a_roofline_has_its_ridge_and_weighs_a_layers_utilisation_by_cycles():
    rows = {"layer": ["one", "one", "two"], "kind": ["a", "b", "a"], "intensity": [1.0, 8.0, 4.0]}
    rows |= {"speed": [1e9, 2e9, 3e9], "utilisation": [0.2, 0.8, 0.5], "cycles": [300, 100, 50]}
    left, right = figures.roofline(pd.DataFrame(rows), 4e9, 2e9).axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[0.5, 1.0], [2.0, 4.0], [16.0, 4.0]])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([35.0, 50.0])
    with pytest.raises(ValueError, match="peak is 0 and bandwidth 1: give two positive numbers"):
        figures.roofline(pd.DataFrame(rows), 0, 1)


def test_empty_pictures_are_refused():
    for empty, fault in ((np.full((2, 2), np.nan), "holds only NaN"), (np.ones((0, 2)), "is empty")):
        with pytest.raises(ValueError, match=f"matrix 'C' {fault}: compute"):
            figures.heat_maps({"D": np.eye(2), "C": empty})
        with pytest.raises(ValueError, match=f"picture 0 of row 'SA' {fault}: compute"):
            figures.map_grid([np.eye(2)], {"SA": [empty]})
    for draw, nothing in ((figures.heat_maps, ({},)), (figures.map_grid, ([], {})), (figures.pictures, ({},))):
        with pytest.raises(ValueError, match="without pictures: give"):
            draw(*nothing)
    with pytest.raises(ValueError, match="row 'SA' has 1 maps for 2 images"):
        figures.map_grid([np.eye(2)] * 2, {"SA": [np.eye(2)]})


def test_a_row_without_a_name_is_refused_not_left_out():
    with pytest.raises(ValueError, match="'series' has no value in 1 of 2 rows: name these"):
        figures.accuracy_against({"ours": table(["SA", "EA"], ["SA"])})
    assert not plt.get_fignums()


def test_places_look_different_in_colour_and_without_it():
    many = [figures.look(place) for place in range(60)]
    assert len({(one.color, one.marker) for one in many}) == 60
    assert len({(one.dashes, one.marker) for one in many}) == 60
    assert len({(one.color, one.hatch) for one in many}) == 60
    for one, next_one in itertools.pairwise(many):
        assert one.color != next_one.color and one.hatch != next_one.hatch
        assert one.dashes != next_one.dashes and one.marker != next_one.marker
    assert len(set(registry.MARKERS)) == 12 and len(set(registry.HATCHES)) == 11


def test_hatches_are_seen_on_every_colour():
    def brightness(color):
        red, green, blue = to_rgb(color)
        return 0.21 * red + 0.72 * green + 0.07 * blue

    for place in range(10):
        one = figures.look(place)
        assert abs(brightness(one.color) - brightness(one.edge)) > 0.3, one


def test_the_place_among_all_categories_fixes_the_look():
    known = ["a", "b", "c", "d"]
    drawn = figures.looks(pd.Series(pd.Categorical(["d", "b"], known)))
    assert drawn == {name: figures.look(place) for place, name in enumerate(known)}
    assert figures.looks(pd.Series(["d", "b", "d"])) == {"d": figures.look(0), "b": figures.look(1)}
    # Where one column carries the order, others follow it, and what it does not name comes after.
    mixed = style.order(pd.Series(["x", "b"]), pd.CategoricalIndex(["d"], known))
    assert mixed == ["a", "b", "c", "d", "x"]


def test_a_method_looks_the_same_in_every_figure():
    known = ["SA softmax", "SAL-ViT", "EA L2Q", "MPCViT", "Linformer"]
    one = lines(figures.accuracy_against({"ours": table(["SA softmax", "SAL-ViT", "EA L2Q"], known)}))
    other = lines(
        figures.accuracy_against({"paper": table(["MPCViT", "EA L2Q"], known), "ours": table(["SA softmax"], known)})
    )
    grown = pd.DataFrame({"series": ["Linformer", "SA softmax"] * 2, "tokens": [64, 64, 256, 256], "ms": [1, 2, 3, 4]})
    grown["series"] = pd.Categorical(grown["series"], known)
    third = lines(figures.curves(grown, "tokens", {"ms": "ms"}))
    for name in ("SA softmax", "EA L2Q"):
        assert one[name] == other[name]
    assert one["SA softmax"] == third["SA softmax"]
    assert len({look[0] for look in one.values()}) == 3
    assert set(third) == {"Linformer", "SA softmax"}  # no entry for what is not drawn


@pytest.mark.parametrize("names", [[*METHODS], ["SA softmax", "SA L2Q", "EA softmax", "EA L2Q", *MECHANISMS]])
def test_all_methods_of_a_study_are_told_apart(names):
    drawn = set(lines(figures.accuracy_against({"ours": table(names)})).values())
    assert len(drawn) == len(names)
    assert len({look[:1] + look[2:3] for look in drawn}) == len(names)


def test_a_variant_keeps_its_colour_when_fewer_are_drawn():
    def colours(figure):
        means = [each for each in figure.axes[0].collections if isinstance(each, LineCollection)]
        return [tuple(each.get_color()[0]) for each in means]

    rows = TABLES["accuracy_by_variant"]
    both = colours(figures.accuracy_by_variant(rows))
    alone = rows[rows["variant"] == "b"]
    assert colours(figures.accuracy_by_variant(alone)) == both[:1]
    assert colours(figures.accuracy_by_variant(alone, ["a", "b"])) == both[1:]
    categorical = alone.assign(variant=pd.Categorical(alone["variant"], ["a", "b"]))
    assert colours(figures.accuracy_by_variant(categorical)) == both[1:]


def test_kinds_stand_in_the_order_of_the_categories_before_offline_and_link():
    known = ["scores", "offline", "normaliser", "values"]
    drawn = bars(figures.stacked_kinds({"seconds": kinds(["offline", "values", "scores"], known)}))
    assert list(drawn) == ["scores", "values", "offline"]
    whole = bars(figures.stacked_kinds({"seconds": kinds(["scores", "normaliser", "values", "link"])}))
    assert list(whole) == ["scores", "normaliser", "values", "link"]
    assert drawn["scores"] == whole["scores"] and drawn["values"] == whole["values"]  # "offline" took no place
    assert len(set((drawn | whole).values())) == 5


def test_a_panel_that_lost_its_categories_follows_one_that_has_them():
    first = kinds(["values", "scores"], ["scores", "normaliser", "values"])
    second = first.assign(offline=1.0)  # pandas drops the categories of the columns here
    assert not isinstance(second.columns, pd.CategoricalIndex)
    figure = figures.stacked_kinds({"MB": first, "seconds": second})
    assert list(bars(figure, 1).items())[:2] == list(bars(figure).items())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scores", "values", "offline"]


def test_a_stack_goes_on_behind_a_kind_that_a_method_has_not():
    costs = kinds(["scores", "values"])
    costs.loc["EA", "scores"] = np.nan
    figure = figures.stacked_kinds({"seconds": costs.assign(low=[1.5, 0.5], high=[2.5, 1.5])})
    ends = [[bar.get_x() + bar.get_width() for bar in stack] for stack in figure.axes[0].containers[:2]]
    assert ends == [[1.0, 0.0], [2.0, 1.0]]
    assert list(bars(figure)) == ["scores", "values"]  # no stack of the range
    (whiskers,) = (each for each in figure.axes[0].collections if isinstance(each, LineCollection))
    assert [[float(x) for x, _ in each] for each in whiskers.get_segments()] == [[1.5, 2.5], [0.5, 1.5]]


def test_equal_figures_are_equal_files(folder):
    contents = []
    for _ in range(2):
        figures.save(figures.stacked_kinds({"seconds": kinds(["scores", "values", "link"])}, note="measured"), "one")
        contents.append([(folder / f"one.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
    assert sorted(file.name for file in folder.iterdir()) == ["one.pdf", "one.png"]
    assert b"Type3" not in contents[0][1]  # fonts that journals take


def test_a_table_is_written_with_its_index_and_given_back(folder):
    costs = pd.DataFrame({"seconds": [1 / 3]}, index=pd.Index(["SA"], name="method"))
    assert figures.save_table(costs, "costs") is costs
    assert (folder / "costs.csv").read_text() == "method,seconds\nSA,0.333333\n"


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    figures.save_table(kinds(["scores"]), "costs")
    before = (folder / "costs.csv").read_text()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace.os, "fsync", full_disk)
    with pytest.raises(OSError, match="costs.csv.*make room"):
        figures.save_table(kinds(["values"]), "costs")
    with pytest.raises(OSError, match="one.png.*make room"):
        figures.save(Figure(), "one")
    assert [file.name for file in folder.iterdir()] == ["costs.csv"]
    assert (folder / "costs.csv").read_text() == before


def test_a_widget_draws_anew_and_says_what_is_refused():
    def draw(x):
        if x == 2:
            return pd.DataFrame({"x": [x]})
        return figures.accuracy_against({"<ours>": table(["SA softmax"] * (x != 3))})

    slider = ipywidgets.IntSlider(0, max=3)
    box = explore(draw, x=slider)
    assert box.children[0] is slider and box.children[1].format == "svg+xml"
    assert bytes(box.children[1].value[:5]) == b"<?xml" and box._repr_mimebundle_()["text/plain"].startswith("(In Jup")
    slider.value = 3
    assert "panel &#x27;&lt;ours&gt;&#x27; is empty" in box.children[1].value
    slider.value = 2
    assert "<table" in box.children[1].value
    slider.value = 1
    assert isinstance(box.children[1], ipywidgets.Image)
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="is empty"):
        explore(draw, x=ipywidgets.IntSlider(3, max=3))


def test_the_room_knows_tables_only():
    """No model, no torch, and of ours the workspace alone."""
    for file in Path(figures.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {name.name.split(".")[0] for name in node.names} & {"torch", "salvit_core"}, file.name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"torch", "salvit_core"}, file.name
                if node.level == 2:
                    assert [name.name for name in node.names] == ["workspace"], file.name
                assert node.level < 3, file.name


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("number", [np.inf, -np.inf])
def test_an_infinite_number_is_refused_by_its_column(name, number):
    table = TABLES[name].copy()
    last = table.select_dtypes("number").columns[-1]
    table[last] = table[last].astype(float)
    table.iloc[0, table.columns.get_loc(last)] = number
    with pytest.raises(ValueError, match=f"the table holds an infinite number in .*{last}"):
        getattr(figures, name)(table, *MORE.get(name, ()))
    assert not plt.get_fignums()


def test_an_infinite_picture_and_a_column_without_numbers():
    with pytest.raises(ValueError, match="matrix 'C' holds an infinite number"):
        figures.heat_maps({"C": np.array([[1.0, np.inf]])})
    ratios = TABLES["ratios_beside_paper"].assign(paper=np.nan)  # rows that the paper has not
    assert figures.ratios_beside_paper(ratios).axes[0].has_data()


def test_heat_maps_name_the_rows_and_columns_of_a_table():
    table = pd.DataFrame([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], index=["one", "two"], columns=["a", "b", "c"])
    axis, *_ = figures.heat_maps({"named": table}, labels=("head", "layer")).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["one", "two"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("head", "layer")


def test_heat_maps_share_a_scale_that_is_given():
    pair = {"a": np.eye(2), "b": 3 * np.eye(2)}
    for scale, wanted in ((None, [(0, 1), (0, 3)]), ((-1, 4), [(-1, 4), (-1, 4)])):
        figure = figures.heat_maps(pair, scale=scale)
        assert [axis.images[0].get_clim() for axis in figure.axes[:2]] == wanted
