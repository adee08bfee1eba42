"""Sliders over a pure plot function.

The picture is an image widget whose bytes are replaced. Nothing is captured or cleared, as ipywidgets' own `interact`
would do: headless, that now and then left papermill waiting for ever.
"""

import html
import io
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


class _Explorer(ipywidgets.VBox):
    """The controls and the picture; where no widget can live, as in the book, their text is one sentence."""

    def __repr__(self) -> str:
        return "(In JupyterLab, controls that move the figure or table above.)"


def explore(draw: Callable[..., Figure | pd.DataFrame], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls above what `draw` makes of their values, drawn anew whenever one moves.

    Args:
        draw: called with each control's value by name; gives a figure or a table. What it refuses later on with a
            ValueError is said in the figure's place.
        controls: widgets with a value, such as ipywidgets.FloatSlider.

    Raises:
        ValueError: `draw` refuses the values with which the controls start.
    """
    text = ipywidgets.HTML()
    picture = ipywidgets.Image(format="svg+xml")  # sharp on every screen
    shown = _Explorer([*controls.values(), text])

    def show() -> None:
        drawn = draw(**{name: control.value for name, control in controls.items()})
        if isinstance(drawn, Figure):
            file = io.BytesIO()
            drawn.savefig(file, format="svg")
            plt.close(drawn)
            picture.value = file.getvalue()
            shown.children = [*controls.values(), picture]
        else:
            text.value = drawn.to_html()
            shown.children = [*controls.values(), text]

    def move(_: object) -> None:
        try:
            show()
        except ValueError as error:
            text.value = html.escape(str(error))
            shown.children = [*controls.values(), text]

    for control in controls.values():
        control.observe(move, names="value")
    show()
    return shown
