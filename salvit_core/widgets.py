"""Sliders over a pure plot function.

The picture is an image widget whose bytes are replaced. Nothing is captured or cleared, as ipywidgets' own `interact`
would do: headless, that now and then left papermill waiting for ever.
"""

import io
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def explore(draw: Callable[..., Figure | pd.DataFrame], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls above what `draw` makes of their values, drawn anew whenever one moves.

    Args:
        draw: called with each control's value by name; gives a figure or a table.
        controls: widgets with a value, such as ipywidgets.FloatSlider.
    """
    view = ipywidgets.HTML()
    picture = ipywidgets.Image(format="png")

    def update(_=None) -> None:
        drawn = draw(**{name: control.value for name, control in controls.items()})
        if isinstance(drawn, Figure):
            file = io.BytesIO()
            drawn.savefig(file, format="png", dpi=110)
            plt.close(drawn)
            picture.value = file.getvalue()
        else:
            view.value = drawn.to_html()

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), picture if picture.value else view])
