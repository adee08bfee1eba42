"""The widgets of notebooks 02, 03, 04, 07 and 08: labelled, and along axes that stay where they are."""

import ast
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from cut import SMALL, WIDGETS, cells

from salvit_core import workspace

DATA = Path(__file__).parents[2] / "data"


def values(control):
    """All that a dropdown or a slider of options has, the ends of a slider of numbers."""
    return control.options if hasattr(control, "options") else (control.min, control.max)


def limits(figure):
    """Ends of every axis, and of the colours of every picture."""
    colours = [picture.get_clim() for axis in figure.axes for picture in axis.images]
    return [(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes], colours


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [number for number in WIDGETS if number not in SMALL])
def test_each_control_is_labelled_and_moves_what_is_drawn_along_the_same_axes(number, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(DATA)
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    *before, last = cells(number)
    names: dict = {}
    for source in before:
        exec(source, names)  # noqa: S102
    tree = ast.parse(last)
    shown = tree.body.pop()  # the widget
    exec(compile(tree, number, "exec"), names)  # noqa: S102
    widget = eval(compile(ast.Expression(shown.value), number, "eval"), names)  # noqa: S307
    draw = names[shown.value.args[0].id]
    *controls, _ = widget.children
    named = {word.arg: control for word, control in zip(shown.value.keywords, controls, strict=True)}
    usual = draw(**{name: control.value for name, control in named.items()})
    assert controls and all(isinstance(each, ipywidgets.Widget) and each.description for each in controls)
    for name, control in named.items():
        for value in values(control):
            other = draw(**{**{each: one.value for each, one in named.items()}, name: value})
            if isinstance(other, plt.Figure):
                assert limits(other) == limits(usual), (name, value)
        picture = widget.children[-1].value
        control.value = next(value for value in values(control) if value != control.value)
        assert widget.children[-1].value != picture, name
    plt.close("all")
