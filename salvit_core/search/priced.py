"""A search among any mechanisms, each with a price such as its private latency, within a budget for all layers.

Nothing in Algorithm 1 asks for two attentions. The mixture is sum_c alpha_c branch_c(x), the loss gets weight * sum
price_c |alpha_c| / mean price, and `afford` finds the architecture with the largest sum of |alpha| whose prices stay
within the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import torch

from ..datasets import Data
from ..fields import Weight, shown
from ..models.attention import ATTENTION
from ..models.attention.mixed import ChoiceAttention
from ..models.blocks import attention_of
from ..models.config import CCTConfig
from .sas import Architecture, MixedCCT, Penalty, Phases, extract, first_phase, found, second_phase


@dataclass(frozen=True)
class PricedSearch(Phases):
    """One search among priced mechanisms, as plain data.

    Raises:
        ValueError: a ViT's configuration, choices that cannot be searched, prices that do not fit them.
    """

    choices: tuple[str, ...] = ()  # names of mechanisms, two or more
    prices: tuple[float, ...] = ()  # of one layer of each, in any unit
    budget: Weight = 0.0  # for all layers, in the prices' unit
    weight: Weight = 0.1  # of the L1 term

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "choices", _checked_choices(self.choices))
        object.__setattr__(self, "prices", _checked_prices(self.choices, self.prices))


def search(
    run: PricedSearch,
    data: Data,
    teacher: torch.nn.Module | None = None,
    folder: str | Path | None = None,
    second: str | Path | None = None,
) -> dict:
    """As `sas.search`, selected by `afford`."""
    torch.manual_seed(run.seed)
    net = ChoiceCCT(run.network, run.choices)
    afford(net.alphas(), run.choices, run.prices, run.budget)  # an impossible budget is refused before the long phase
    history = first_phase(net, run, data, PricedPenalty(net, run.weight, run.prices), teacher, folder)
    chosen = afford(net.alphas(), run.choices, run.prices, run.budget)
    model = extract(net, chosen)
    tuned = second_phase(model, net, chosen, run, data, teacher, second or folder)
    return found(net, chosen, history, tuned, model)


class ChoiceCCT(MixedCCT):
    """A CCT whose layers mix any mechanisms; every alpha starts from 1 / their number.

    Args:
        config: the architecture; what it names as attention is ignored.
        choices: names of the mechanisms.

    Raises:
        ValueError: fewer than two different mechanisms, or a ViT's configuration.
    """

    def __init__(self, config: CCTConfig, choices: tuple[str, ...]):
        choices = _checked_choices(choices)

        def mixture(config: CCTConfig, layer: int) -> ChoiceAttention:
            every = {name: replace(config, attention=name) for name in choices}
            return ChoiceAttention({name: attention_of(one, layer) for name, one in every.items()})

        super().__init__(config, attention=mixture)
        self.choices = choices

    def ones(self, names: str | tuple[str, ...]) -> torch.Tensor:
        """The alphas of a layer whose mixture is to compute `names`."""
        return torch.tensor([float(name == names) for name in self.choices])


class PricedPenalty(Penalty):
    """weight * sum |alpha_c| price_c / mean price.

    Args:
        net: the network that is searched.
        weight: lambda.
        prices: of the network's choices, in any unit.

    Raises:
        ValueError: prices that do not fit the choices.
    """

    def __init__(self, net: MixedCCT, weight: float, prices: Sequence[float]):
        super().__init__(net, weight)
        self.prices = _checked_prices(net.choices, prices)

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        sizes = self.net.alphas().abs()
        sizes = sizes * sizes.new_tensor(self.prices) / (sum(self.prices) / len(self.prices))
        return self.weight * sizes.sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight}, prices={self.prices})"


def afford(
    alphas: torch.Tensor | Sequence, choices: Sequence[str], prices: Sequence[float], budget: float
) -> Architecture:
    """One choice per layer so that the sum of |alpha| is largest and the sum of prices stays within the budget.

    Exact: layer by layer it keeps every sum of prices that no cheaper one beats (a multiple-choice knapsack).

    Args:
        alphas: (L, C).
        choices: names of the C mechanisms.
        prices: of the choices, one layer each.
        budget: for all layers, in the prices' unit.

    Returns:
        a name per layer. Of equal sums, the cheaper.

    Raises:
        ValueError: prices or alphas that do not fit the choices, or a budget below the cheapest network's price.
    """
    prices = _checked_prices(choices, prices)
    values = torch.as_tensor(alphas).detach().abs().cpu().double()
    if values.dim() != 2 or values.shape[1] != len(choices):
        raise ValueError(f"alphas have shape {tuple(values.shape)}: give (layers, {len(choices)})")
    cheapest = len(values) * min(prices)
    if not budget >= cheapest * (1 - 1e-9):
        raise ValueError(f"budget {budget:g} cannot be met: {len(values)} layers cost at least {cheapest:g}")
    front: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]  # price, value, names: ascending in both
    for layer in values.tolist():
        grown = [
            (price + more, value + gain, (*names, name))
            for price, value, names in front
            for name, more, gain in zip(choices, prices, layer, strict=True)
        ]
        grown.sort(key=lambda entry: (entry[0], -entry[1]))
        front, best = [], -1.0
        for entry in grown:
            if entry[1] > best and entry[0] <= budget * (1 + 1e-9):
                front.append(entry)
                best = entry[1]
    return front[-1][2]


def _checked_choices(choices: Sequence[str]) -> tuple[str, ...]:
    choices = tuple(choices) if isinstance(choices, Sequence) and not isinstance(choices, str) else (choices,)
    if unknown := [name for name in choices if not isinstance(name, str) or name not in ATTENTION]:
        raise ValueError(f"attention {shown(unknown[0])} is unknown: choose from {', '.join(ATTENTION)}")
    if len(set(choices)) != len(choices) or len(choices) < 2:
        raise ValueError(f"choices {choices!r}: give two or more different mechanisms")
    return choices


def _checked_prices(choices: Sequence[str], prices: Sequence[float]) -> tuple[float, ...]:
    prices = tuple(prices) if isinstance(prices, Sequence) and not isinstance(prices, str) else (prices,)
    numbers = [isinstance(price, Real) and 0 < price < float("inf") for price in prices]
    if len(prices) != len(choices) or not all(numbers):
        raise ValueError(f"prices {shown(prices)} do not fit {len(choices)} choices: give one positive number for each")
    return tuple(map(float, prices))
