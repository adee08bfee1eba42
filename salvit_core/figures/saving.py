"""Where figures and their tables go: figures/ under the workspace, each file whole or not there at all."""

from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .. import workspace
from .style import STYLE


def save(figure: Figure, name: str) -> Figure:
    """Write figures/NAME.png and figures/NAME.pdf, without dates, so that equal figures are equal files.

    Raises:
        OSError: no room or no right to write; names the file.
    """
    folder = workspace.ROOT / "figures"
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    with plt.rc_context(STYLE):  # resolution and fonts are read when a figure is written
        for kind, metadata in undated.items():
            drawn = partial(figure.savefig, format=kind, metadata=metadata)
            workspace.write(folder / f"{name}.{kind}", drawn)
    return figure


def save_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write figures/NAME.csv, index included.

    Raises:
        OSError: no room or no right to write; names the file.
    """
    workspace.write(workspace.ROOT / "figures" / f"{name}.csv", table.to_csv(float_format="%.6g"))
    return table
