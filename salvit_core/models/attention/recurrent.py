"""What stands in attention's place without attending: recurrent layers (FAR, arXiv 2505.21535), and a token mixer.

FAR's block is `MultiLSTM`. Two that follow cost a private inference fewer rounds, which a step of a recurrence asks for
one after the other: `GridLSTM` makes about 2 sqrt(N) steps, `ParallelScan` log2 N.

On real tokens torch's LSTM (oneDNN's, cuDNN's) makes input and recurrence together; in a graph they are two operations,
so that a private protocol makes the input's part of all steps in one product. All heads may be one call, as an LSTM
whose matrices are block-diagonal: that is fewer calls and more products with zeros. Which is faster depends on the
size, so heads are joined up to `JOINED` features, and on a GPU, which long sequences of small steps leave idle (neither
is on record).

Letters: B batch, N tokens, M dimension of the model, H heads, D dimension of a head, k hidden size of a cell.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import LSTM, BlockLinear, LinearScan, Multiply, Take, TokenSum, of_kind
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig

JOINED = 192  # features of all heads together up to which a processor takes them as one LSTM

Hidden = Sequence[tuple[int, int]]  # for every head: hidden sizes of its forward and its backward LSTM


class Replacement(Mechanism):
    """What mixes tokens without queries, keys and values: W_o mix(x), W_o the `projection`."""

    queried = False
    apart = True  # whether heads are independent of each other between `lower` and `projection`
    lower: Callable[[torch.Tensor], torch.Tensor]
    projection: nn.Linear

    def mix(self, u: torch.Tensor) -> torch.Tensor:
        """What `lower` gives (B, N, M) -> what `projection` reads, tokens (B, N, ...)."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        return self.projection(self.mix(self.lower(x)))

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> how much token i's output moves with token j, (B, H, N, N), or one for all heads.

        FAR's token importance: sum over a head's features c of |d (sum of the outputs of token i) / d u_jc|, u what
        `lower` makes of the tokens.
        """
        with torch.enable_grad():
            u = self.lower(x).detach().requires_grad_()
            mixed = self.mix(u).sum((0, 2))  # (N)
            rows = [torch.autograd.grad(row, u, retain_graph=True)[0] for row in mixed]  # N x (B, N, M)
        heads = self.heads if self.apart else 1
        return torch.stack(rows, 1).unflatten(-1, (heads, -1)).abs().sum(-1).permute(0, 3, 1, 2)


class BiLSTM(nn.Module):
    """Heads of bidirectional LSTMs: of each head's features the states of one LSTM either way, side by side.

    Args:
        head: features D of every head.
        hidden: their hidden sizes.
    """

    def __init__(self, head: int, hidden: Hidden):
        super().__init__()
        sizes = [sum(pair) for pair in hidden]
        self.gates = of_kind("scores", BlockLinear([head] * len(sizes), [4 * size for size in sizes]))
        self.recurrence = of_kind("recurrence", LSTM(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., N, H D) -> states (..., N, sum of k), head by head, the forward one's first."""
        if isinstance(x, torch.Tensor) and x.device.type != "meta":  # while a graph is traced x is no tensor
            return self._by_torch(x)
        return self.recurrence(self.gates(x))

    def _by_torch(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            x = x.to(self.recurrence.weight.dtype)  # not in bfloat16, where a processor has to emulate it
        rows = x.flatten(0, -3)  # (B, N, H D)
        if x.is_cuda or rows.shape[-1] <= JOINED:
            return self._joined(rows).unflatten(0, x.shape[:-2])
        states, cells = [], list(zip(self.recurrence.matrices(), self.recurrence.biases(), strict=True))
        maps = zip(self.gates.matrices(), self.gates.bias.split(self.gates.outputs), strict=True)
        for head, (part, (weight, bias)) in enumerate(zip(rows.split(self.gates.inputs, -1), maps, strict=True)):
            sizes = self.recurrence.hidden[head]
            read = zip(weight.split([4 * k for k in sizes]), bias.split([4 * k for k in sizes]), strict=True)
            flat = [(w, u, b, c) for (w, b), (u, c) in zip(read, cells[2 * head :], strict=False)]
            if sizes[0] == sizes[1] != 0:
                states.append(_lstm(part, [*flat[0], *flat[1]], sizes[0]))
                continue
            if sizes[0]:
                states.append(_lstm(part, flat[0], sizes[0]))
            if sizes[1]:
                states.append(_lstm(part.flip(1), flat[1], sizes[1]).flip(1))
        made = torch.cat(states, -1) if states else rows[..., :0]
        return made.unflatten(0, x.shape[:-2])

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """All heads as one LSTM each way: (B, N, H D) -> (B, N, sum of k)."""
        gates, own, wide, ways, states = self.gates, self.recurrence, x.shape[-1], [], []
        order, *places = _joined(gates.inputs, own.hidden, x.device)
        for rows, *at in (places[:5], places[5:]):  # of the biases; of both weights, in the large one and here
            count = len(rows)
            read = gates.weight.new_zeros(count * wide).scatter(0, at[0], gates.weight[0, at[1]])
            back = own.weight.new_zeros(count * count // 4).scatter(0, at[2], own.weight[0, at[3]])
            biases = gates.bias[rows[:, 0]], own.bias[rows[:, 1]]
            ways.append((read.view(count, wide), back.view(count, count // 4), *biases))
        forward, backward = (way[1].shape[1] for way in ways)  # hidden sizes
        if forward == backward != 0:
            states.append(_lstm(x, [*ways[0], *ways[1]], forward))
        else:
            states += [_lstm(x, ways[0], forward)] if forward else []
            states += [_lstm(x.flip(1), ways[1], backward).flip(1)] if backward else []
        return torch.cat(states, -1)[..., order] if states else x[..., :0]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _joined(inputs: tuple[int, ...], hidden: tuple[tuple[int, int], ...], device: torch.device) -> list[torch.Tensor]:
    """Where numbers of heads stand in one LSTM of all, whose gates come one after the other.

    Args:
        inputs: features D of every head.
        hidden: their hidden sizes.
        device: where what is found is to be.

    Returns:
        the place of every head's states, forward, then backward, among all forward and then all backward ones; and for
        each way: of every row the places of its two biases (4 K, 2); of the map's weight the places in (4 K, H D) and
        in the flat weight of a `BlockLinear`; of the recurrence's those in (4 K, K) and in the flat weight of a `LSTM`.
    """
    wide, found = sum(inputs), []
    totals = [sum(sizes) for sizes in zip(*hidden, strict=True)]
    order: list[list[int]] = [[] for _ in hidden]
    for way, total in enumerate(totals):
        rows = torch.zeros(4 * total, 2, dtype=torch.int64, device="cpu")
        parts: list[list[torch.Tensor]] = [[], [], [], []]
        column = unit = base = weight = bias = start = 0  # of this head: where its numbers begin
        for head, (width, pair) in enumerate(zip(inputs, hidden, strict=True)):
            k, before = pair[way], way * pair[0]  # `before`: the forward cell's
            local = torch.arange(4 * k, device="cpu").view(4, k)
            place = (torch.arange(4, device="cpu")[:, None] * total + unit + torch.arange(k, device="cpu")).flatten()
            rows[place, 0], rows[place, 1] = base + 4 * before + local.flatten(), bias + 4 * before + local.flatten()
            features, units = torch.arange(width, device="cpu"), torch.arange(k, device="cpu")
            parts[0].append((place[:, None] * wide + column + features).flatten())
            parts[1].append(weight + 4 * before * width + torch.arange(4 * k * width, device="cpu"))
            parts[2].append((place[:, None] * total + unit + units).flatten())
            parts[3].append(start + 4 * before * before + torch.arange(4 * k * k, device="cpu"))
            order[head] += [way * totals[0] + unit + n for n in range(k)]
            column, unit, base = column + width, unit + k, base + 4 * sum(pair)
            weight, bias, start = weight + 4 * sum(pair) * width, base, start + 4 * sum(size * size for size in pair)
        found += [rows, *map(torch.cat, parts)]
    places = torch.tensor([place for head in order for place in head], dtype=torch.int64, device="cpu")
    return [part.to(device) for part in (places, *found)]


def _lstm(x: torch.Tensor, weights: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Torch's LSTM of zero state on x (B, N, D), one way or, with twice the weights, both -> states (B, N, ...)."""
    both = len(weights) == 8
    zero = x.new_zeros(1 + both, len(x), size)
    return torch.lstm(x, (zero, zero), weights, True, 1, 0.0, torch.is_grad_enabled(), both, True)[0]


class MultiLSTM(Replacement):
    """FAR's block: W_o W_p [LSTM_h(u), reversed LSTM_h(u)] of every head h, u = W_l x; W_p block-diagonal, 2 D to D.

    The same as h separate bidirectional LSTMs of hidden size D, one for every D features of u. What follows no token
    but the one before has no map of N x N: the scores of an attention are gone, and with them its normaliser.

    Cost: O(N D^2) per head, in N steps one after the other.

    Args:
        config: the architecture.
        hidden: for every head the hidden sizes of its forward and its backward LSTM, D each if left out; pruning
            makes them smaller, or zero.

    Raises:
        ValueError: hidden sizes of another number of heads.
    """

    name = "multi_lstm"

    def __init__(self, config: "TransformerConfig", hidden: Hidden | None = None):
        super().__init__(config)
        heads = self.heads if self.apart else 1
        head = config.width // heads
        hidden = [(head, head)] * heads if hidden is None else list(hidden)
        if len(hidden) != heads:
            raise ValueError(f"hidden sizes of {len(hidden)} heads: the network has {heads}")
        self.lower = of_kind("projection", nn.Linear(config.width, config.width))
        self.lstm = BiLSTM(head, hidden)
        self.merge = of_kind("values", BlockLinear([sum(pair) for pair in hidden], [head] * heads))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def mix(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, M) -> (B, N, M)."""
        return self.merge(self.lstm(u))


class WholeLSTM(MultiLSTM):
    """One bidirectional LSTM over the full width: FAR's block with a single head, its other replacement "lstm".

    Cost: O(N M^2), in N steps one after the other.
    """

    name = "lstm"
    apart = False


class GridLSTM(Replacement):
    """LSTMs along the rows of the token grid, then along its columns (ReNet, Visin et al., 2015): this study's own.

    Every row is a sequence of its own, then every column, so that about 2 sqrt(N) steps follow one another instead of
    N, and each token has heard of all others after both. The hidden sizes of a head's two LSTMs add up to D, so that
    both ways together have as many states as one of `MultiLSTM`'s.

    Where N is a square the grid is the image's. Where it is one more, the first is the class token: it stands before
    every row and before every column, and becomes the mean of what it is there.

    Cost: O(N D^2) per head, in 2 sqrt(N) steps.

    Raises:
        ValueError: hidden sizes that do not add up, or tokens that are no grid.
    """

    name = "grid_lstm"

    def __init__(self, config: "TransformerConfig", hidden: Hidden | None = None):
        super().__init__(config)
        head, tokens = self.head, self.tokens
        hidden = [(head - head // 2, head // 2)] * self.heads if hidden is None else list(hidden)
        if len(hidden) != self.heads or any(sum(pair) != head for pair in hidden):
            raise ValueError(f"hidden sizes {hidden}: give {self.heads} pairs that add up to {head}")
        side = math.isqrt(tokens)
        self.first = tokens - side * side  # class tokens
        if self.first > 1:
            raise ValueError(f"{tokens} tokens are no grid: grid_lstm takes a square of them, or one more")
        self.side = side
        grid = torch.arange(side * side, device="cpu").view(side, side)
        lines = [
            torch.cat([torch.arange(self.first, device="cpu").expand(side, -1), self.first + way], 1)
            for way in (grid, grid.T)
        ]
        self.lower = of_kind("projection", nn.Linear(config.width, config.width))
        self.along = of_kind("scores", nn.ModuleList(Take(part.flatten().tolist()) for part in lines))
        self.lstm = nn.ModuleList(BiLSTM(head, hidden) for _ in lines)
        # Back from lines to tokens, where turning the grid undoes itself; class tokens are left to `_tokens`.
        self.back = of_kind("values", nn.ModuleList(Take(way.flatten().tolist()) for way in (grid, grid.T)))
        self.sum = of_kind("values", nn.ModuleList(TokenSum() for _ in lines))
        self.merge = of_kind("values", BlockLinear([head] * self.heads, [head] * self.heads))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def mix(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, M) -> (B, N, M)."""
        for way, lstm in enumerate(self.lstm):
            lines = self.along[way](u).unflatten(1, (self.side, -1))  # (B, lines, steps, M)
            u = self._tokens(way, lstm(lines))
        return self.merge(u)

    def _tokens(self, way: int, lines: torch.Tensor) -> torch.Tensor:
        """Lines (B, lines, steps, M) -> tokens (B, N, M)."""
        if not self.first:
            return self.back[way](lines.flatten(1, 2))
        mean = self.sum[way](lines[:, :, 0]) * (1 / self.side)  # (B, 1, M)
        return torch.cat([mean, self.back[way](lines[:, :, 1:].flatten(1, 2))], 1)


class ParallelScan(Replacement):
    """Gates that read only the input, h_t = f_t h_(t-1) + (1 - f_t) v_t, either way, in log2 N steps: a minimal GRU.

    f = s(W_f x) and v = W_v x, s the logistic function, of both directions; out = W_o [h, reversed h] (Feng et al.,
    "Were RNNs all we needed?", 2024, minGRU; earlier QRNN, Bradbury et al., 2017, and SRU, Lei et al., 2018). States
    are weighted means of values and need no tanh to stay small. All M features of a direction are on their own.

    Cost: O(N M^2).
    """

    name = "parallel_scan"
    apart = False

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        width = config.width
        self.gates = of_kind("scores", nn.Linear(width, 4 * width))  # f of both directions, v of both
        self.activation = of_kind("activation", nn.Sigmoid())
        self.multiply = of_kind("values", Multiply())
        self.recurrence = of_kind("recurrence", LinearScan(width, width))
        self.projection = of_kind("projection", nn.Linear(2 * width, width))

    def lower(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing: the gates are linear themselves."""
        return x

    def mix(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, M) -> (B, N, 2 M)."""
        gates, values = self.gates(u).unflatten(-1, (2, -1)).unbind(-2)  # 2 x (B, N, 2 M)
        f = self.activation(gates)
        return self.recurrence(f, self.multiply(1 - f, values))


class Mixer(Replacement):
    """W_o of a token-mixing MLP: W_2 gelu(W_1 X), W_1 S x N and W_2 N x S for all features alike (MLP-Mixer, 2021).

    Tolstikhin et al., Eq. 1, without its norm and skip, which the block around it has; S is `memory`. FAR names a mixer
    among its replacements, and W_o stands where attention's stood.

    Cost: O(N S M).
    """

    name = "mixer"
    sized = True

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.expand = of_kind("scores", nn.Linear(self.tokens, config.memory))
        self.activation = of_kind("activation", nn.GELU())
        self.contract = of_kind("values", nn.Linear(config.memory, self.tokens))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def lower(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return x

    def mix(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, M) -> (B, N, M)."""
        return self.contract(self.activation(self.expand(u.transpose(1, 2)))).transpose(1, 2)
