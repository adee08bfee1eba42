"""Tables in, matplotlib Figures out, all in one style; nothing here computes a result.

Methods, normalisers, kinds of operation, protocols and links look the same in every figure, by name (`registry`); how
what has no name there looks, its place among the categories of its column says. Panels that differ in the protocol
alone have equal axes (`labels`). `widgets` stands beside this, for notebooks: it alone needs ipywidgets.
"""

from .accuracy import accuracy_against, accuracy_by_variant, drift
from .costs import ratios_beside_paper, stacked_kinds
from .diagrams import external_beside_self, salvit, two_parties
from .domains import errors_over_ranges
from .learned import normalizer_curves, parameter_ranges, scatter_by_layer
from .maps import heat_maps, map_grid, pictures
from .quantities import curves, dots
from .quantization import accuracy_by_bits
from .registry import PALETTE, Look, look
from .roofline import roofline
from .saving import save, save_table
from .search import trajectories
from .style import STYLE, WIDTH, looks

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
