"""Numbers in few bits: a uniform grid whose range is searched, weights whose rounding is learnt, divisors as shifts.

Letters in the shape comments: C output channels of a weight, K the weights of one of them.
"""

import torch
from torch import nn

SHRINKS = 80  # steps of 1 % by which the range search narrows the range
POWER = 2.4  # of the error that it minimises
SAMPLE = 2**17  # entries of an activation on which the error is taken; the range is that of all
ZETA, GAMMA = 1.1, -0.1  # of the stretched sigmoid (AdaRound, Nagel et al., 2020, Eq. 23)
LEAST = 1e-8  # of a step


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Rounds; the gradient passes as if it did not."""
    return x + (x.round() - x).detach()


def sampled(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many entries of each row of (rows, entries), drawn with a fixed seed.

    Evenly spaced ones would not do: a stride that divides a picture's width sees its border alone.
    """
    if x.shape[1] <= most:
        return x
    drawn = torch.randint(x.shape[1], (most,), generator=torch.Generator().manual_seed(0))
    return x[:, drawn.to(x.device)]


def searched(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero point of each row's grid: the range is narrowed by 1 % at a time, and the one of least error kept.

    The error is the mean of |x - q(x)|^2.4. Zero is in every range, so that what pads a picture is on the grid.

    Args:
        x: (rows, entries); of more entries than `SAMPLE` the error is that of a sample.
        bits: of the grid, which has 2^bits points.

    Returns:
        steps and zero points, each (rows, 1); zero points are whole, from 0 to 2^bits - 1.
    """
    top = 2**bits - 1
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)  # (rows, 1)
    x = sampled(x, SAMPLE)
    best = torch.full_like(low, torch.inf)
    step, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in range(SHRINKS):
        part = 1 - shrink / 100
        now = ((high - low) * part / top).clamp(min=LEAST)
        middle = (-low * part / now).round()
        error = (on_grid(x, now, middle, top) - x).abs().pow(POWER).mean(1, keepdim=True)
        better = error < best
        best, step, zero = (torch.where(better, a, b) for a, b in ((error, best), (now, step), (middle, zero)))
    return step, zero


def on_grid(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """What of x a grid of points 0 to `top` can hold: step (clamp(round(x / step) + zero, 0, top) - zero)."""
    return (torch.clamp(nearest(x / step) + zero, 0, top) - zero) * step


def log2_divisor(x: torch.Tensor, least: int = -6, most: int = 9) -> torch.Tensor:
    """The power of two that is nearest in ratio, so that a division is a shift: x > 0 -> 2^y of the same shape.

    y = floor(log2 x), one more where x / 2^y > 2^(y + 1) / x. Its relative error is at most sqrt(2) - 1, unless y
    is at an end of the 16 values that 4 bits hold. The gradient passes as if the ratio to x were fixed: with none, the
    step of what the divisor is made of would never be learnt.
    """
    y = x.log2().floor()
    y = y + (x / torch.exp2(y) > torch.exp2(y + 1) / x)
    return torch.exp2(y.clamp(least, most)).detach() * (x / x.detach())


class Quantizer(nn.Module):
    """A grid for an activation, one for the whole tensor, whose range the first batch that it sees decides.

    Args:
        bits: of the grid.

    Attributes:
        step: learnt afterwards (`engine.learn_activations`).
        on: whether it quantizes; otherwise it gives what it is given.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits, self.on = bits, False
        self.step = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(0.0))
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> the same shape, on the grid."""
        if not self.on:
            return x
        if not self.fitted:
            with torch.no_grad():
                step, zero = searched(x.detach().reshape(1, -1), self.bits)
                self.step.copy_(step[0, 0])
                self.zero.copy_(zero[0, 0])
                self.fitted.fill_(True)
        return on_grid(x, self.step.clamp(min=LEAST), self.zero, 2**self.bits - 1)

    def extra_repr(self) -> str:
        """What it shows of itself."""
        return f"bits={self.bits}"


class Rounding(nn.Module):
    """Weights on their grid, each between the two points beside it while it is learnt which (AdaRound).

    W = step (clamp(floor(w / step) + h(v) + zero, 0, 2^bits - 1) - zero), h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1).
    It begins at w.

    Args:
        weight: (C, ...).
        step: (C, 1, ...) or all ones.
        zero: as step.
        top: the last point, 2^bits - 1.
    """

    def __init__(self, weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int):
        super().__init__()
        self.step, self.zero, self.top = step, zero, top
        self.floor = (weight / step).floor()
        rest = weight / step - self.floor
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))

    def soft(self) -> torch.Tensor:
        """h(v), from 0 to 1, as the weights."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def forward(self) -> torch.Tensor:
        """The weights as they are now."""
        return (torch.clamp(self.floor + self.soft() + self.zero, 0, self.top) - self.zero) * self.step

    def codes(self) -> torch.Tensor:
        """Hard rounding: the point that every weight has come to, from 0 to `top`."""
        return torch.clamp(self.floor + (self.v >= 0) + self.zero, 0, self.top)

    def regulariser(self, beta: float) -> torch.Tensor:
        """Sum of 1 - |2 h - 1|^beta: zero where every weight is on the grid."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()
