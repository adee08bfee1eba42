"""What every method, normaliser, kind of operation, protocol and link looks like: by name, the same in all figures.

The hue says the attention; shade, marker, hatch and dashes say the normaliser. Two names look alike only where they are
two names of one thing, as a normaliser alone is that of self-attention. What has no name here gets a look by its place
(`style.looks`), so that a mechanism of your own is drawn as well; a line here gives it one for good.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import seaborn as sns
from matplotlib.colors import to_hex, to_rgb

# Each is gone through in turn. Since they are 10, 11, 12 and 5 long, colour and marker together come again only after
# 60 places, as dash and marker do, for print without colour; colour and hatch after 110. Neighbours differ in all.
PALETTE: list[str] = sns.color_palette("colorblind", 10).as_hex()
HATCHES = ("", "///", "\\\\\\", "...", "xxx", "---", "|||", "+++", "ooo", "OO", "||//")
MARKERS = "osD^vP*Xh<>p"
DASHES = ((1, 0), (4, 1), (1, 1), (4, 1, 1, 1), (4, 1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Look:
    """What tells one value from the others, in bars, lines and points."""

    color: str
    hatch: str
    dashes: tuple[int, ...]
    marker: str

    @property
    def edge(self) -> str:
        """Colour of hatches and outlines that is seen on this one's: white on dark, dark on pale."""
        red, green, blue = to_rgb(self.color)
        return "white" if 0.21 * red + 0.72 * green + 0.07 * blue < 0.6 else "0.25"

    @property
    def bar(self) -> dict[str, Any]:
        """For matplotlib's bars."""
        return {"color": self.color, "hatch": self.hatch, "edgecolor": self.edge}

    @property
    def line(self) -> dict[str, Any]:
        """For matplotlib's lines; the thin outline keeps pale markers visible."""
        outline = {"markeredgecolor": "0.25", "markeredgewidth": 0.4}
        return {"color": self.color, "dashes": self.dashes, "marker": self.marker, **outline}

    @property
    def point(self) -> dict[str, Any]:
        """For matplotlib's scatter."""
        return {"color": self.color, "marker": self.marker, "edgecolor": "0.25", "linewidth": 0.4}


def look(place: int) -> Look:
    """The look of what has no name here, at its place among the values of its column, counted from 0."""
    return Look(
        PALETTE[place % len(PALETTE)],
        HATCHES[place % len(HATCHES)],
        DASHES[place % len(DASHES)],
        MARKERS[place % len(MARKERS)],
    )


# From the pure hue towards white (above 0) or black.
SHADES = (0.0, 0.45, -0.45, 0.6, -0.7)


def _family(hue: str, markers: str, names: tuple[str, ...], first: int = 0) -> Iterator[tuple[str, Look]]:
    """Names of one hue, in shades of it; a marker for each, or one for all. `first` sets off dashes and hatches."""
    for i, name in enumerate(names):
        shade = SHADES[i % len(SHADES)]
        red, green, blue = (part + (1 - part) * shade if shade > 0 else part * (1 + shade) for part in to_rgb(hue))
        place = first + i
        marker = markers[i % len(markers)]
        yield name, Look(to_hex((red, green, blue)), HATCHES[place % len(HATCHES)], DASHES[place % len(DASHES)], marker)


METHODS = dict(
    (
        *_family("#0072b2", "osD^v", ("SA softmax", "SA 2Quad", "SA L2Q", "SA 2ReLU", "SA scaling")),
        *_family("#d55e00", "osD^v", ("EA softmax", "EA 2Quad", "EA L2Q", "EA 2ReLU", "EA scaling"), 1),
        *_family("#882255", "***Xp", ("SAL-ViT", "SAL-ViT B=3", "SAL-ViT B=2", "SAL-ViT B=1", "SAL-ViT (KD)")),
        *_family("#4d4d4d", "X8", ("MPCViT", "MPCViT (KD)"), 1),
        *_family("#0072b2", "8H", ("SA separate", "SA 2Quad (KD)"), 3),
        *_family("#009e73", "PP8", ("Linformer", "Linformer L2Q", "Linformer, heads"), 3),
        *_family("#e7b800", "h", ("CosFormer",), 2),
        *_family("#cc79a7", "<", ("Hamburger",), 1),
        *_family("#999999", ">", ("SOFT",), 4),
        *_family("#56b4e9", "pX", ("Performer", "Performer ReLU"), 1),
        *_family("#5e3c99", "d", ("Nystromformer", "Nystromformer L2Q"), 3),
        *_family("#8c6d31", "H", ("Dilated hybrid", "Dilated L2Q")),
        *_family("#1b9e9e", "h", ("ReLU linear",)),
        # What stands in attention's place (notebook 08).
        *_family("#0072b2", "X", ("attention, drawn anew",), 2),
        *_family("#b2182b", "P8", ("multi-head BiLSTM", "one BiLSTM"), 1),
        *_family("#7a5195", "<", ("rows and columns",), 2),
        *_family("#66a61e", ">", ("parallel scan",), 3),
        *_family("#e6ab02", "p", ("mixer",), 4),
        # Where and with what L2Q learns (notebook 02); C and D in each entry is L2Q as it is.
        *_family("#6a51a3", "<>", ("L2Q global", "L2Q head-wise"), 1),
        *_family("#3690c0", "P", ("L2Q, C only",), 3),
        *_family("#02818a", "p", ("L2Q, D only",), 4),
    )
)
_SAME = {
    "softmax": "SA softmax",
    "2Quad": "SA 2Quad",
    "2ReLU": "SA 2ReLU",
    "L2Q": "SA L2Q",
    "scaling": "SA scaling",
    "L2Q element-wise": "SA L2Q",
    "teacher": "SA softmax",
    "SA or EA": "SAL-ViT",
}
# Normalisers alone, under their names in the tables and in configurations, and what else is a method by another name.
METHODS |= {name: METHODS[same] for name, same in _SAME.items()}
METHODS |= {name.lower(): METHODS[name] for name in ("2Quad", "2ReLU", "L2Q")}

_KINDS = "tokenizer LayerNorm projection scores normaliser values MLP activation pooling head convolution recurrence "
_KINDS += "point-wise depth-wise fused attention"  # those of the accelerator's model
KINDS = {kind: look(place) for place, kind in enumerate(_KINDS.split())}
# What stands behind the kinds of operation in a stack: the dealer's seconds, and what a modelled link adds.
BESIDES = {"offline": Look("0.4", "////", (1, 0), "o"), "link": Look("0.8", "....", (1, 0), "s")}

PROTOCOLS = {"stock": Look("#e69f00", "///", (4, 1), "s"), "tuned": Look("#0f766e", "", (1, 0), "o")}

LINKS = {
    "loopback": Look("#000000", "", (1, 0), "o"),
    "LAN (CrypTFlow2)": Look("#6699cc", "///", (4, 1), "s"),
    "LAN (Cheetah)": Look("#004488", "\\\\\\", (1, 1), "D"),
    "WAN (Cheetah)": Look("#ee99aa", "...", (4, 1, 1, 1), "^"),
    "WAN (CrypTFlow2)": Look("#994455", "xxx", (4, 1, 1, 1, 1, 1), "v"),
}
LINKS |= {f"{name}, modelled": one for name, one in LINKS.items()}

LOOKS: dict[str, Look] = METHODS | KINDS | BESIDES | PROTOCOLS | LINKS
