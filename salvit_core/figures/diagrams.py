"""Diagrams: who holds what and what travels; self-attention and external attention; a SAL-ViT.

Drawn from plain data, such as the attention of each layer. Coordinates are inches.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .registry import LOOKS, PALETTE
from .style import STYLE, WIDTH, write_note

SERVER, CLIENT, DEALER = PALETTE[:3]
SELF, EXTERNAL, EITHER = (LOOKS[name].color for name in ("SA softmax", "EA softmax", "SAL-ViT"))
ATTENTION = {"self": ("SA", SELF), "external": ("EA", EXTERNAL)}
PLAIN = "0.6"


def two_parties(rounds: int | None = None, note: str = "") -> Figure:
    """The two-party protocol in time, from above: what client, server and dealer hold, and what travels between them.

    Args:
        rounds: how often the two open something, where it is known.
        note: what is shown.
    """
    often = "in every round" if rounds is None else f"{rounds} rounds"
    holds = {
        0.95: ("client", "holds the image $x$\nlearns the answer", CLIENT),
        3.5: ("server", "holds the weights $w$\nlearns nothing", SERVER),
        6.05: ("dealer", "holds neither\nknows the architecture", DEALER),
    }
    client, server, dealer = holds
    with plt.rc_context(STYLE):
        figure, axis = _page(4.15)
        for place, (name, text, color) in holds.items():
            axis.plot([place, place], [0.15, 3.3], color=color, linewidth=1.2, linestyle=(0, (4, 2)), zorder=0)
            _box(axis, place, 3.65, 1.75, 0.72, "", color)
            axis.text(place, 3.87, name, ha="center", va="center", weight="bold", fontsize=9)
            axis.text(place, 3.56, text, ha="center", va="center", fontsize=7.5)
        _message(axis, dealer, server, 2.98, "half of $a$, $b$, $ab$", DEALER)
        _message(axis, dealer, client, 2.6, "the other half", DEALER, at=2.22)
        _message(axis, client, server, 2.12, "share: $x - x_1$, uniform", CLIENT)
        _message(axis, server, client, 1.74, "share: $w - w_0$, uniform", SERVER)
        _message(axis, client, server, 1.2, f"open, {often}: $x - a$, $w - b$", "0.25", both=True)
        _message(axis, server, client, 0.44, "answer: $y_0$; the client adds $y_1$", SERVER)
        for place in (client, server):
            axis.text(
                place, 0.82, "computes on\nits half alone", ha="center", va="center", fontsize=7, backgroundcolor="w"
            )
        for height, phase in ((2.79, "offline: needs no image"), (1.52, "online"), (0.44, "only the client opens it")):
            axis.text(
                dealer, height, phase, ha="center", va="center", style="italic", fontsize=7.5, backgroundcolor="w"
            )
        write_note(figure, note)
    return figure


def external_beside_self(tokens: int, width: int, heads: int, slots: int, normalizer: str, note: str = "") -> Figure:
    """Self-attention and external attention of one layer, step by step, with the shape of every tensor.

    Args:
        tokens: N, of the image.
        width: M, numbers of a token.
        heads: H; each has D = M / H numbers of a token.
        slots: S, of the memories of external attention.
        normalizer: what turns scores into weights, such as "L2Q".
        note: what is shown.
    """
    head = width // heads
    ours = [
        ("tokens $X$", (tokens, width), PLAIN),
        ("$Q = X W_Q$,  $K = X W_K$,  $V = X W_V$", (heads, tokens, head), SELF),
        ("scores $Q K^T$: a secret times a secret", (heads, tokens, tokens), SELF),
        (f"{normalizer} over the keys", (heads, tokens, tokens), SELF),
        ("weights times $V$: a secret times a secret", (heads, tokens, head), SELF),
        ("projection $W_O$", (tokens, width), PLAIN),
    ]
    theirs = [
        ("tokens $X$", (tokens, width), PLAIN),
        ("$Q = X W_Q$ alone", (heads, tokens, head), EXTERNAL),
        ("scores $Q M_K^T$: $M_K$ are weights", (heads, tokens, slots), EXTERNAL),
        (f"{normalizer} over the tokens, then L1 over the slots", (heads, tokens, slots), EXTERNAL),
        ("weights times $M_V$: $M_V$ are weights", (heads, tokens, head), EXTERNAL),
        ("projection $W_O$ of each head, plus $Q$", (tokens, width), PLAIN),
    ]
    with plt.rc_context(STYLE):
        figure, axis = _page(4.0)
        for left, title, steps in ((0.1, "self-attention (SA)", ours), (3.6, "external attention (EA)", theirs)):
            axis.text(left + 1.65, 3.8, title, ha="center", va="center", weight="bold", fontsize=9)
            for i, (text, shape, color) in enumerate(steps):
                height = 3.35 - 0.6 * i
                size = " x ".join(map(str, shape))
                _box(axis, left + 1.65, height, 3.2, 0.42, f"{text}\n{size}", color)
                if i:
                    _arrow(axis, (left + 1.65, height + 0.39), (left + 1.65, height + 0.21))
        write_note(figure, note)
    return figure


def salvit(
    attention: Sequence[str | Sequence[str]],
    normalizer: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...], int],
    note: str = "",
) -> Figure:
    """A SAL-ViT from image to logits: which layers have which attention, and below it one layer in parts.

    Args:
        attention: of each layer, or of each of its heads: "self", "external" or another mechanism's name.
        normalizer: what turns scores into weights, such as "L2Q".
        shapes: of the image (C, height, width), of the tokens (N, M), and the number of classes.
        note: what is shown.

    Raises:
        ValueError: no layers.
    """
    if not attention:
        raise ValueError("a network without layers: give the attention of at least one")
    image, tokens, classes = shapes
    chain = [("image\n" + " x ".join(map(str, image)), PLAIN), ("tokenizer\nconvolution\nReLU\nmax-pool", PLAIN)]
    for i, name in enumerate(attention):
        kinds = [name] if isinstance(name, str) else list(dict.fromkeys(name))
        named = [ATTENTION.get(kind, (kind, PLAIN)) for kind in kinds]
        text = "\n".join(short for short, _ in named)
        number = f"layer {i + 1}" if len(attention) < 9 else f"{i + 1}"
        chain.append((f"{number}\n\n{text}", named[0][1] if len(named) == 1 else EITHER))
    chain += [("pooling\nsoftmax\nover\ntokens", PLAIN), (f"head\n{classes}\nlogits", PLAIN)]
    inside = [
        ("tokens\n" + " x ".join(map(str, tokens)), PLAIN),
        ("LayerNorm", PLAIN),
        (f"SA or EA\nwith {normalizer}", EITHER),
        ("add", PLAIN),
        ("LayerNorm", PLAIN),
        ("linear, GELU,\nlinear", PLAIN),
        ("add", PLAIN),
    ]
    with plt.rc_context(STYLE):
        figure, axis = _page(2.75)
        _row(axis, 2.1, 1.0, chain)
        _row(axis, 0.55, 0.5, inside)
        axis.text(0.1, 1.3, "every layer:", fontsize=8, style="italic", va="center")
        if normalizer == "L2Q":
            formula = r"L2Q: $(d\,a + c)^2\,/\,\sum (d\,a + c)^2$ with learnt $c$, $d$, in softmax's place"
            axis.text(WIDTH - 0.1, 1.3, formula, fontsize=8, va="center", ha="right")
        write_note(figure, note)
    return figure


def _page(height: float) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    axis.set(xlim=(0, WIDTH), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def _box(axis: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 7.5) -> None:
    """A box around its centre, its text in points."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.06"
    looks: dict[str, Any] = {"facecolor": to_rgba(color, 0.15), "edgecolor": color, "linewidth": 1.0}
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, **looks))
    axis.text(x, y, text, ha="center", va="center", fontsize=size)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "0.25", both=False) -> None:
    look = {"arrowstyle": "<|-|>" if both else "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.0}
    axis.annotate("", end, start, arrowprops=look)


def _message(
    axis: Axes, start: float, end: float, y: float, text: str, color: str, both: bool = False, at: float | None = None
) -> None:
    """What travels from one line of life to another, its name above it."""
    _arrow(axis, (start, y), (end, y), color, both)
    axis.text((start + end) / 2 if at is None else at, y + 0.04, text, ha="center", va="bottom", fontsize=7.5)


def _row(axis: Axes, y: float, height: float, boxes: list[tuple[str, str]]) -> None:
    """Boxes from left to right that fill the page, wider where their text is, with arrows between them."""
    letters = [2 + max(map(len, text.split("\n"))) for text, _ in boxes]
    gap = 0.15
    unit = (WIDTH - 0.1 - gap * (len(boxes) - 1)) / sum(letters)
    size = min(7.5, 130 * unit)  # points: a letter is not wider than its unit
    left = 0.05
    for i, ((text, color), count) in enumerate(zip(boxes, letters, strict=True)):
        if i:
            _arrow(axis, (left - gap, y), (left, y))
        _box(axis, left + count * unit / 2, y, count * unit, height, text, color, size)
        left += count * unit + gap
