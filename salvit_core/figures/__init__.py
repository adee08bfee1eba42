"""Tables in, matplotlib Figures out, all in one style; nothing here computes a result.

A table carries its order: the place of a value among the categories of its column fixes how it looks in every figure
(`style.looks`). No mechanism, normaliser or kind of operation is known here by name. `widgets` stands beside this, for
notebooks: it alone needs ipywidgets.
"""

from .accuracy import accuracy_against, accuracy_by_variant, drift
from .costs import ratios_beside_paper, stacked_kinds
from .diagrams import external_beside_self, salvit, two_parties
from .domains import errors_over_ranges
from .learned import normalizer_curves, parameter_ranges, scatter_by_layer
from .maps import heat_maps, map_grid, pictures
from .quantities import curves, dots
from .quantization import accuracy_by_bits
from .roofline import roofline
from .saving import save, save_table
from .search import trajectories
from .style import PALETTE, STYLE, WIDTH, Look, look, looks

__all__ = [
    "PALETTE",
    "STYLE",
    "WIDTH",
    "Look",
    "accuracy_against",
    "accuracy_by_bits",
    "accuracy_by_variant",
    "curves",
    "dots",
    "drift",
    "errors_over_ranges",
    "external_beside_self",
    "heat_maps",
    "look",
    "looks",
    "map_grid",
    "normalizer_curves",
    "parameter_ranges",
    "pictures",
    "ratios_beside_paper",
    "roofline",
    "salvit",
    "save",
    "save_table",
    "scatter_by_layer",
    "stacked_kinds",
    "trajectories",
    "two_parties",
]
