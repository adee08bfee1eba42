"""The normalisers: weights whose reciprocal sum waits for the product with the values."""

import torch

from ....models.normalizers import L1, L2Q, Scaling, Softmax, TwoQuad, TwoReLU
from ...domains import Span, spans, spread, within_octaves
from ..arithmetic.ring import log2_above
from ..arithmetic.schedule import Later
from ..arithmetic.share import Share, Waiting, scaled, session
from .exponential import exponentials
from .maximum import largest, positive_part
from .power import power
from .product import quadratic, square
from .truncate import times_rows, truncate

ROW_SUM = (-7, 11)
L2Q_SUM = (-12, 13)  # learnt c and d: sums from 2^-10.1 to 2^10.4 in a trained CCT-7/3x1
L1_SUM = (-11, 6)  # S slots, 64 in the presets, add up to S at most; down to 2^-9.6 in a trained network


def normalised(weights: Share, dim: int, octaves: tuple[int, int], extra: int = 0, nonzero: bool = True) -> Share:
    """Weights that still wait for the reciprocal of their sum, which is found while they meet the values."""
    total = Share(weights.data.sum(dim, keepdim=True), weights.bits)
    inverse = session.later(lambda: power(total, -1.0, octaves, nonzero=nonzero), total.shape)
    return _waiting(weights, inverse, extra)


def _waiting(weights: Share, inverse: Later, extra: int = 0) -> Share:
    return Share(weights.data, weights.bits, Waiting(inverse, session.bits + 1 + extra, times_rows))


def softmax(module: Softmax, secret: dict, scores: Share) -> Share:
    """exp(a - max a) over its sum, weights to 1e-3, for scores that differ by less than 128.

    To 4e-3 where one weight stands beside hundreds that are small and alike: their errors are alike too, and add up.
    8 rounds, 7 for few numbers, and those of `largest`; 1.5 n words for exp, 4 n / 3 for the maximum.

    Functionality:
        Inputs: Scores shared.
        Output: exp(a - max a), shared, and 1 / sum, which waits.
        Opened: By `largest`, `piecewise` and `power`, masked words and bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-36 a number of the scores; of the exponentials and of 1 / sum 0.
    """
    scores = scores.settle().to(session.bits)
    dim = module.dim % len(scores.shape)
    raised = exponentials(scores - largest(scores, dim, 8))
    count = scores.shape[dim]
    # The sum lies between 1 and K: its reciprocal needs the more bits, the smaller it can become.
    return normalised(raised, dim, (-1, log2_above(count) + 1), extra=log2_above(count) // 2)


def softmax_domain(module: Softmax, scores: torch.Tensor) -> list[Span]:
    """The range of a row's spread."""
    return spans("spreads of scores", spread(scores, module.dim), (0, 118))


def two_quad(module: TwoQuad, secret: dict, scores: Share) -> Share:
    """(a + c)^2 over its sum; squares are scaled by 1 / (32 K), so that sums stay near one. n words and one per row.

    Functionality:
        Inputs: Scores shared.
        Output: (a + c)^2, shared, and 1 / sum, which waits.
        Opened: a - r, the masked sum and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-36 a number, of the scores, of their squares, and of the sum for each range of `power`.
    """
    y = square(scores.settle().to(session.bits - 2) + module.c)
    down = 5 + log2_above(scores.shape[module.dim])
    return normalised(Share(y.data, y.bits + down).to(session.bits + 7), module.dim, ROW_SUM)


def two_quad_domain(module: TwoQuad, a: torch.Tensor) -> list[Span]:
    """The range of a row's sum."""
    scale = 2 ** (5 + log2_above(a.shape[module.dim]))
    return within_octaves("scaled sums of squares", (a + module.c).square().sum(module.dim) / scale, ROW_SUM)


def two_relu(module: TwoReLU, secret: dict, scores: Share) -> Share:
    """relu(a) over its sum; a row without a positive score gives zeros. Sums are scaled by about 1 / sqrt K.

    Functionality:
        Inputs: Scores shared.
        Output: relu(a), shared, and 1 / sum, which waits.
        Opened: a - r, the masked sum and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-36 a number, of the scores and of the sum for each range of `power`.
    """
    positive = positive_part(scores.settle().to(session.bits), 9)
    down = log2_above(scores.shape[module.dim]) // 2
    return normalised(
        Share(positive.data, positive.bits + down).to(session.bits + 7), module.dim, ROW_SUM, nonzero=False
    )


def two_relu_domain(module: TwoReLU, a: torch.Tensor) -> list[Span]:
    """The range of the scores, and of a row's sum unless it is zero."""
    sums = a.relu().sum(module.dim) / 2 ** (log2_above(a.shape[module.dim]) // 2)
    return spans("scores", a, (-64, 64)) + within_octaves("scaled sums", sums, ROW_SUM, zeros=True)


def l2q(module: L2Q, secret: dict, scores: Share) -> Share:
    """(d a + c)^2 over its sum, from one opening of a.

    With P = d^2, Q = 2 d c and R = c^2, all the server's, the square is P a^2 + Q a + R. One round and n words, those
    of its exact truncation, and beside them those of the sum's truncation and reciprocal. The server scales (d, c) so
    that the sum is near one where a is near one: L2Q does not change when both are scaled. Its eps, 2^-14, is left out:
    it would move a weight by that part of itself. Scores are rounded to 9 bits, which moves a weight by up to 2^-7 over
    the root of its row's sum of squares.

    Functionality:
        Inputs: Scores shared; c and d, where they are learnt, of the server.
        Output: (d a + c)^2 / K, shared, and 1 / sum, which waits.
        Opened: a - r, the masked sum and masked bits, to both; by `truncate`, the masked sum to both, the masked
            squares to the server, or to both if there are few; where c and d are learnt, theirs masked once per
            session.
        Simulator: uniform words and bits.
        Failure: 2^-35 a number, of the scores and of the sum for each range of `power`; of the squares 0.
    """
    # The square has P's bits and twice these: with more, too few of the 64 would be left to truncate it safely.
    x = scores.settle().to(min(session.bits - 4, 11))
    down = log2_above(scores.shape[module.dim])
    pair = [secret.get(name) for name in "dc"]
    shape = torch.broadcast_shapes(*(value.shape for value in pair if value is not None), ())
    name = next((value.name for value in pair if value is not None), "").rpartition(".")[0] or "fixed"
    name = f"{module.d}, {module.c} of {'x'.join(map(str, scores.shape[1:]))}" if name == "fixed" else name

    def coefficients() -> list[torch.Tensor]:
        d, c = (
            torch.as_tensor(fixed if value is None else value.value, dtype=torch.float64, device=session.device)
            for value, fixed in zip(pair, (module.d, module.c), strict=True)
        )
        scale = 1 / (d.square().mean() + c.square().mean())
        return [d * d * scale, 2 * d * c * scale, c * c * scale]

    y = quadratic(name, x, shape, coefficients, session.bits - 1)
    # The sum of K such squares is near one once they are divided by K.
    squares = Share(y.data, y.bits + down)
    total = Share(squares.data.sum(module.dim, keepdim=True), squares.bits)
    # As many bits more as the sum may be smaller than other normalisers'.
    bits = session.bits + 10
    inverse = session.later(lambda: power(truncate(total, bits), -1.0, L2Q_SUM), total.shape)
    # Exactly: trained networks have scores whose squares a local truncation lost too often.
    return _waiting(truncate(squares, bits), inverse)


def l2q_domain(module: L2Q, a: torch.Tensor) -> list[Span]:
    """The range of a row's sum."""
    d, c = torch.as_tensor(module.d), torch.as_tensor(module.c)
    scale = (d.square().mean() + c.square().mean()) * 2 ** log2_above(a.shape[module.dim])
    return within_octaves("scaled sums of squares", (d * a + c).square().sum(module.dim) / scale, L2Q_SUM)


def scaling(module: Scaling, secret: dict, scores: Share) -> Share:
    """Scores over n, a public number: local.

    Functionality:
        Inputs: Scores shared.
        Output: a / n, shared.
        Opened: Nothing.
        Simulator: nothing.
        Failure: 2^-36 a number; 0 where n is a power of two.
    """
    return scaled(scores, 1 / scores.shape[module.dim])


def l1(module: L1, secret: dict, weights: Share) -> Share:
    """Weights over their sum.

    Functionality:
        Inputs: Weights shared.
        Output: The weights, shared, and 1 / sum, which waits.
        Opened: The masked sum and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-34 a number, of the weights and of the sum for each range of `power`.
    """
    return normalised(weights.settle().to(session.bits + 7), module.dim, L1_SUM)


def l1_domain(module: L1, weights: torch.Tensor) -> list[Span]:
    """The range of a row's sum."""
    return within_octaves("sums", weights.sum(module.dim), L1_SUM)
