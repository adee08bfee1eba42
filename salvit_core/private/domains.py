"""What values were seen at an operation, and the interval that its protocol covers."""

import math
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """What values were seen at one place, and the closed interval that its protocol covers."""

    what: str
    low: float
    high: float
    least: float
    most: float

    @property
    def outside(self) -> str | None:
        """How the values leave the interval, in words, or None."""
        if self.least <= self.low and self.high <= self.most:
            return None
        return f"{self.what} {self.low:.3g} to {self.high:.3g} outside [{self.least:.3g}, {self.most:.3g}]"

    @property
    def margin(self) -> float:
        """By which factor values could still grow, or shrink towards zero where that is a bound; below 1 outside."""
        up = self.most / self.high if self.high > 0 else math.inf
        if self.least > 0:
            return min(up, self.low / self.least)
        return min(up, self.least / self.low) if self.low < 0 else up


def spans(what: str, values: torch.Tensor, domain: tuple[float, float]) -> list[Span]:
    """The one span of some values, none of no values: a recurrence may be left without a unit."""
    return [Span(what, values.min().item(), values.max().item(), *domain)] if values.numel() else []


def within_octaves(what: str, sums: torch.Tensor, octaves: tuple[int, int], zeros: bool = False) -> list[Span]:
    """The span of sums that must lie between two powers of two; with `zeros` those that are zero may."""
    sums = sums[sums != 0] if zeros else sums
    return spans(what, sums, (2.0 ** octaves[0], 2.0 ** octaves[1]))


def spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest difference of two entries along a dimension."""
    return x.amax(dim) - x.amin(dim)
