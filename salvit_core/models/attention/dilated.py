"""Dilated hybrid attention: windows at three dilations and one global linear branch, gated. This study's own."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import normalizer_of
from ..operations import Gain, MatMul, Take, of_kind
from . import fused
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


def windows(tokens: int, dilation: int, side: int) -> tuple[list[int], list[int]]:
    """Which tokens share a window.

    Token n = r g + c lies in row r and column c of a grid of g = ceil(sqrt(N)) columns. With s = `side` and
    d = `dilation`, two tokens share a window if their rows are in the same run of s d rows and equal modulo d, and
    their columns likewise: every d-th token in either direction, s x s of them. A window that reaches beyond the grid,
    or beyond the last token, takes tokens from the beginning again, and then holds some that others hold too.

    Args:
        tokens: number of tokens N.
        dilation: distance d between neighbours in a window.
        side: tokens s in a row of a window.

    Returns:
        the s^2 tokens of every window, one window after the other, row by row; and for each token its place in that
        list, of which there is just one.
    """
    grid = math.isqrt(tokens - 1) + 1  # g
    run = side * dilation

    def window(n: int) -> tuple[int, int]:
        """First row and first column of a token's window."""
        row, column = (i // run * run + i % dilation for i in divmod(n, grid))
        return row, column

    starts = sorted({window(n) for n in range(tokens)})
    steps = range(0, run, dilation)
    members = [
        ((row + i) % grid * grid + (column + j) % grid) % tokens for row, column in starts for i in steps for j in steps
    ]
    first = {start: index * side * side for index, start in enumerate(starts)}
    places = []
    for n in range(tokens):
        row, column = (i % run // dilation for i in divmod(n, grid))
        places.append(first[window(n)] + row * side + column)
    return members, places


class DilatedAttention(MergedAttention):
    """Attention within windows at dilations 1, 2 and 4 plus linear attention to all tokens, gated per head.

    With q, k, v from one projection that all branches share, and W_d(i) the window of token i at dilation d, s x s
    tokens that lie d apart (`windows`), head h gives token i

        out_i = sum_d g_hd sum_(j in W_d(i)) R(q_i . k_j / sqrt(D)) v_j  +  g_h0 q_i (sum_j k_j^T v_j) / N,

    R the normaliser over the s^2 keys of the window, one for each dilation; the last branch is scaling attention, over
    all tokens and not normalised. A token that a window holds twice counts twice. The gates g are learnt, start at
    1 / 4 for three dilations, one over the number of branches, and are not bounded.

    L2Q by elements has c and d for each query in each window and each place of a key: (heads, queries, s^2).

    Cost: s^2 N scores per head and dilation where windows tile the grid, and O(N D^2) of linear algebra.

    Args:
        config: the architecture.
        dilations: distances between neighbours in a window, one branch for each.
        side: tokens s in a row of a window.
    """

    name = "dilated"
    rows = {"Dilated hybrid": {}, "Dilated L2Q": {"normalizer": "l2q"}}

    def __init__(self, config: "TransformerConfig", dilations: tuple[int, ...] = (1, 2, 4), side: int = 4):
        super().__init__(config)
        self.side, heads = side, self.heads
        tables = [windows(self.tokens, dilation, side) for dilation in dilations]
        normalizer = normalizer_of(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.gather = of_kind("scores", nn.ModuleList(Take(members) for members, _ in tables))
        # The last one is the global branch's, here and in `values`.
        self.scores = of_kind("scores", nn.ModuleList(MatMul() for _ in range(len(tables) + 1)))
        self.normalizer = nn.ModuleList(
            normalizer(dim=-1, heads=heads, shape=(heads, len(members), side * side)) for members, _ in tables
        )
        self.dropout = nn.ModuleList(fused.Dropout(config.attention_dropout) for _ in tables)
        self.values = of_kind("values", nn.ModuleList(MatMul() for _ in range(len(tables) + 1)))
        self.scatter = of_kind("values", nn.ModuleList(Take(places) for _, places in tables))
        initial = 1 / (len(tables) + 1)
        self.gate = of_kind("values", nn.ModuleList(Gain((heads, 1, 1), initial) for _ in range(len(tables) + 1)))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def local(self, branch: int, rows: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side (B, H, N, 2 D + C) -> one dilation's branch (B, H, N, C)."""
        size = self.side * self.side
        rows = self.gather[branch](rows).unflatten(-2, (-1, size))  # (B, H, windows, s^2, 2 D + C)
        query, key = rows[..., : self.head], rows[..., self.head : 2 * self.head]
        scores = self.scores[branch](query, key.transpose(-2, -1)) * self.head**-0.5  # (B, H, windows, s^2, s^2)
        weights = self.dropout[branch](self.normalizer[branch](scores.flatten(-3, -2)))  # (B, H, windows s^2, s^2)
        values = self.values[branch](weights.unflatten(-2, (-1, size)), rows[..., 2 * self.head :])
        return self.scatter[branch](values.flatten(-3, -2))  # (B, H, N, C)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        context = self.scores[-1](key.transpose(-2, -1), value) * self.tokens**-0.5  # (B, H, D, C)
        out = self.gate[-1](self.values[-1](query * self.tokens**-0.5, context))
        rows = torch.cat([query, key, value], -1)  # one table moves all three
        for branch, gate in enumerate(self.gate[:-1]):
            out = out + gate(self.local(branch, rows))
        return out
