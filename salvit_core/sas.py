"""Selective attention search, SAS: which layers, or heads, deserve self-attention (SAL-ViT, Section 3.3, Algorithm 1).

A mixed network computes alpha SA + (1 - alpha) EA everywhere (Eq. 3) and is trained with weight * sum |alpha| in its
loss (Eq. 5); `select` turns the alphas into an architecture, which is plain data; `extract` makes the plain network
that holds only the chosen branches; `search` does it all.

Beyond the paper, the choice may be among any mechanisms, each with a price, such as its measured private latency: the
mixture is sum_c alpha_c branch_c, the loss gets weight * sum price_c |alpha_c| / mean price, and `afford` finds the
architecture with the largest sum of |alpha| whose prices stay within a budget.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import data as datasets
from .attention.external import ExternalAttention
from .attention.headwise import ExternalHeads, SelfHeads
from .attention.mixed import ChoiceAttention, MixedAttention
from .attention.self_attention import SelfAttention
from .cct import CCT, CCTConfig, attention_of, normalizer_of
from .training import Recipe, _digest, fit, progress, train

PAIR = ("self", "external")  # the paper's two choices
GRANULARITIES = ("layer", "head")
RULES = ("top", "bottom", "random")

Architecture = tuple[str | tuple[str, ...], ...]  # `CCTConfig.attention`: one entry per layer


class MixedCCT(CCT):
    """The network that is searched: a CCT that computes both attentions and mixes them by alpha (Figure 4).

    Args:
        config: the architecture; what it names as attention is ignored.
        granularity: "layer", one alpha per layer (SAS-L), or "head", one per head (SAS-H).
        initial: value that every alpha starts from; the paper has 0.1. With other choices it is 1 / their number.
        choices: names of mechanisms; for each layer, where they are not the paper's two.

    Raises:
        ValueError: unknown granularity, a ViT's configuration, or choices that cannot be searched.
    """

    def __init__(
        self,
        config: CCTConfig,
        granularity: str = "layer",
        initial: float = 0.1,
        choices: tuple[str, ...] = PAIR,
    ):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity {granularity!r} is unknown: choose from {', '.join(GRANULARITIES)}")
        if not isinstance(config, CCTConfig):
            raise ValueError(f"the search is over a CCT's attention: {type(config).__name__} is of another network")
        self.choices = tuple(choices)
        if self.choices != PAIR and (granularity != "layer" or len(set(choices)) != len(choices) or len(choices) < 2):
            raise ValueError(f"choices {choices!r}: give two or more different mechanisms, and granularity 'layer'")

        def attention(config: CCTConfig, layer: int) -> MixedAttention | ChoiceAttention:
            if self.choices != PAIR:
                every = {name: replace(config, attention=name) for name in self.choices}
                return ChoiceAttention({name: attention_of(one, layer) for name, one in every.items()})
            common = (config.tokens, normalizer_of(config), config.attention_dropout)
            if granularity == "head":
                common = (config.width, config.heads, config.width // config.heads, *common)
                branches = SelfHeads(*common), ExternalHeads(*common, config.memory)
                return MixedAttention(*branches, config.heads, initial)
            common = (config.width, config.heads, *common)
            branches = SelfAttention(*common), ExternalAttention(*common, config.memory)
            return MixedAttention(*branches, None, initial)

        super().__init__(config, attention)
        self.granularity = granularity

    def alphas(self) -> torch.Tensor:
        """The selection parameters as part of the graph, so that a loss on them has a gradient.

        (L,), one per head (L, H), or one per choice (L, C) where the choices are not the paper's.
        """
        alphas = [block.attention.alpha for block in self.blocks]
        return torch.stack([alpha.flatten() if self.granularity == "head" else alpha for alpha in alphas])


def mixed(
    config: CCTConfig, granularity: str = "layer", initial: float = 0.1, choices: tuple[str, ...] = PAIR
) -> MixedCCT:
    """The network to search; see `MixedCCT`."""
    return MixedCCT(config, granularity, initial, choices)


class Penalty:
    """weight * sum |alpha|, the second term of Eq. 5, each choice's weighted by its price; made by `penalty`."""

    def __init__(self, net: MixedCCT, weight: float, released: bool, prices: tuple[float, ...] | None):
        self.net, self.weight, self.released, self.prices = net, weight, released, prices

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        alphas = self.net.alphas()
        sizes = (alphas.detach() if self.released else alphas).abs()
        if self.prices is not None:
            sizes = sizes * sizes.new_tensor(self.prices) / (sum(self.prices) / len(self.prices))
        return self.weight * sizes.sum()

    def facts(self) -> dict:
        """What an epoch's record keeps: alphas, nested lists (L,), (L, H) or (L, C)."""
        return {"alphas": self.net.alphas().tolist()}

    def __repr__(self) -> str:
        priced = "" if self.prices is None else f", prices={self.prices}"
        return f"Penalty(weight={self.weight}, released={self.released}{priced})"


def penalty(
    net: MixedCCT, weight: float = 0.1, released: bool = False, prices: Sequence[float] | None = None
) -> Penalty:
    """The L1 term of Eq. 5, to hand to `fit`.

    Args:
        net: the network that is searched.
        weight: lambda.
        released: as the published code has it (facts: row 1): the value is there but no gradient reaches alpha.
        prices: of the network's choices, in any unit; None counts all alike.

    Raises:
        ValueError: prices that do not fit the choices.
    """
    if prices is not None:
        prices = _prices(net.choices, prices)
        if net.choices == PAIR:
            raise ValueError("prices need one alpha per choice: search among more choices than self and external")
    return Penalty(net, weight, released, prices)


def _prices(choices: Sequence[str], prices: Sequence[float]) -> tuple[float, ...]:
    prices = tuple(float(price) for price in prices)
    if len(prices) != len(choices) or not all(0 < price < float("inf") for price in prices):
        raise ValueError(f"prices {prices} do not fit {len(choices)} choices: give one positive number for each")
    return prices


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
    prices = _prices(choices, prices)
    values = torch.as_tensor(alphas).detach().abs().cpu().double()
    if values.dim() != 2 or values.shape[1] != len(choices):
        raise ValueError(f"alphas have shape {tuple(values.shape)}: give (layers, {len(choices)})")
    cheapest = len(values) * min(prices)
    if not budget >= cheapest * (1 - 1e-9):
        raise ValueError(f"budget {budget:g} cannot be met: {len(values)} layers cost at least {cheapest:g}")
    front = [(0.0, 0.0, ())]  # price, value, names: ascending in both
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


def select(
    alphas: torch.Tensor | Sequence,
    budget: int,
    rule: str | Sequence[int] | Sequence[tuple[int, int]] = "top",
    seed: int = 0,
) -> Architecture:
    """Give self-attention to `budget` layers, or heads, and external attention to the others (Algorithm 1, line 7).

    Args:
        alphas: the selection parameters, (L,) or (L, H).
        budget: B, how many layers, or heads, get self-attention (Eq. 4).
        rule: "top", the largest alpha; "bottom", the smallest (the paper's SAS-L-WC); "random", drawn without
            replacement; or a list of B layers (from 0), or of B pairs (layer, head). Of equal alphas the earliest.
        seed: of the random rule.

    Returns:
        what `CCTConfig.attention` takes: a name per layer, or a tuple of names, one per head, for each layer.

    Raises:
        ValueError: a budget that cannot be met, an unknown rule, a list that does not fit.
    """
    alphas = torch.as_tensor(alphas).detach().cpu()
    places = [(layer,) for layer in range(len(alphas))]
    if alphas.dim() == 2:
        places = [(layer, head) for layer in range(len(alphas)) for head in range(alphas.shape[1])]
    unit = "layers" if alphas.dim() == 1 else "heads"
    if isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget <= len(places):
        raise ValueError(f"budget {budget!r} cannot be met: the network has {len(places)} {unit}; give 0 to that many")
    values = alphas.flatten().tolist()
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is unknown: choose from {', '.join(RULES)}, or give a list of {unit}")
        order = {
            "top": sorted(range(len(values)), key=lambda i: -values[i]),
            "bottom": sorted(range(len(values)), key=lambda i: values[i]),
            "random": random.Random(seed).sample(range(len(values)), len(values)),
        }[rule]
        given = {places[i] for i in order[:budget]}
    else:
        given = {tuple(place) if isinstance(place, Sequence) else (place,) for place in rule}
        if len(rule) != budget or len(given) != budget or given - set(places):
            raise ValueError(f"list {list(rule)!r} does not name {budget} different {unit} out of {len(places)}")
    names = ["self" if place in given else "external" for place in places]
    if alphas.dim() == 1:
        return tuple(names)
    heads = alphas.shape[1]
    return tuple(tuple(names[layer * heads : (layer + 1) * heads]) for layer in range(len(alphas)))


def freeze(net: MixedCCT, chosen: Architecture) -> None:
    """Set the alphas to 1 and 0 so that the mixture computes what `chosen` names (Algorithm 1, line 7), in place.

    Raises:
        ValueError: an architecture of another shape than the network's.
    """
    chosen = _checked(net, chosen)
    with torch.no_grad():
        for block, names in zip(net.blocks, chosen, strict=True):
            if net.choices != PAIR:
                ones = torch.tensor([float(name == names) for name in net.choices])
            else:
                names = (names,) if isinstance(names, str) else names
                ones = torch.tensor([float(name == "self") for name in names])
            block.attention.alpha.copy_(ones.view_as(block.attention.alpha))


def extract(net: MixedCCT, chosen: Architecture) -> CCT:
    """A plain network that holds and runs only the chosen branches, with their searched weights.

    It computes what the mixture computes with its alphas frozen to 1 and 0.

    Args:
        net: the searched network; it is not changed.
        chosen: a name per layer, or per head, such as `select` or `afford` returns.

    Raises:
        ValueError: an architecture of another shape than the network's.
    """
    chosen = _checked(net, chosen)
    model = CCT(replace(net.config, attention=chosen))
    searched, state = net.state_dict(), {}
    for name in model.state_dict():
        if ".attention." not in name:
            state[name] = searched[name]
            continue
        before, after = name.split(".attention.")  # "blocks.3", "qkv.weight"
        names = chosen[int(before.split(".")[1])]
        if isinstance(names, str):
            state[name] = searched[f"{before}.attention.{names}_attention.{after}"]
        else:  # after: "self_attention.qkv.weight"
            held = [head for head, kind in enumerate(names) if after.startswith(kind)]
            state[name] = _heads_of(searched[name], after, held, len(names))
    model.load_state_dict(state)
    return model.to(next(net.parameters()).device).train(net.training)


def _heads_of(tensor: torch.Tensor, name: str, held: list[int], heads: int) -> torch.Tensor:
    """What a branch with only the heads `held` keeps of the parameter of a branch with all heads."""
    if name.endswith(("qkv.weight", "query.weight")):  # (3 H D, M) or (H D, M)
        parts = 3 if name.endswith("qkv.weight") else 1
        return tensor.unflatten(0, (parts, heads, -1))[:, held].flatten(0, 2)
    if name.endswith(("normalizer.c", "normalizer.d")) and tensor.shape[1] == heads:  # (1, H, ...)
        return tensor[:, held]
    return tensor  # shared by the heads


def _checked(net: MixedCCT, chosen: Architecture) -> Architecture:
    """`chosen` as tuples, if it fits the network."""
    chosen = tuple(names if isinstance(names, str) else tuple(names) for names in chosen)
    kinds = {name for names in chosen for name in ((names,) if isinstance(names, str) else names)}
    sizes = {isinstance(names, str) or len(names) for names in chosen}
    wanted = {True} if net.granularity == "layer" else {net.config.heads}
    if len(chosen) != net.config.layers or kinds - set(net.choices) or sizes != wanted:
        unit = "layers" if net.granularity == "layer" else f"layers, each of {net.config.heads} heads"
        names = " or ".join(net.choices)
        raise ValueError(f"{chosen!r} does not fit: name {names} for {net.config.layers} {unit}")
    return chosen


def search(
    config: CCTConfig,
    data: "datasets.Data",
    search_recipe: Recipe,
    finetune_recipe: Recipe,
    budget: int | float,
    granularity: str = "layer",
    weight: float = 0.1,
    rule: str | Sequence = "top",
    seed: int = 0,
    folder: str | Path | None = None,
    released: bool = False,
    teacher: CCT | None = None,
    choices: tuple[str, ...] = PAIR,
    prices: Sequence[float] | None = None,
) -> dict:
    """Algorithm 1 from end to end: train the mixture, select, extract, fine-tune with a fresh optimizer, test once.

    With a folder the run can be stopped at any moment and started again. The first phase depends on neither budget nor
    rule: searches that differ only in these share its checkpoint, nas.pt, and do not repeat it.

    Args:
        config: the architecture, any normaliser; what it names as attention is ignored.
        data: the images.
        search_recipe: of the first phase, E_NAS epochs; the alphas are those of its last epoch.
        finetune_recipe: of the second phase, E_FT epochs.
        budget: B, how many layers, or heads, get self-attention; with prices, what all layers' attention may cost.
        granularity: "layer" (SAS-L) or "head" (SAS-H).
        weight: lambda of Eq. 5.
        rule: as in `select`; with prices, `afford` selects.
        seed: of initial weights and the random rule, and in place of both recipes' own.
        folder: where the checkpoints go.
        released: do what the published code does (facts: rows 1, 2 and 5): the L1 term has no gradient, weight decay
            acts on c, d and alpha too, and fine-tuning runs both branches, alpha frozen to 1 and 0.
        teacher: a trained network to distil from, in each phase whose recipe distils.
        choices: as in `mixed`.
        prices: of the choices; needed where these are not the paper's two.

    Returns:
        plain data: architecture (as `CCTConfig.attention`), alphas (the last), trajectory (alphas after each epoch of
        the first phase), granularity, budget, rule, weight, seed, released, nas (that phase's history), nas_seconds,
        finetune (`train`'s result), test_accuracy (%); and network, the trained CCT, not plain data.

    Raises:
        ValueError: a checkpoint of another search, prices missing or too many, or as `select`, `afford` and `fit`.
        FloatingPointError: as `fit`.
    """
    changes = {"seed": seed, **({"decay_all": True} if released else {})}
    search_recipe = replace(search_recipe, keep="last", **changes)
    finetune_recipe = replace(finetune_recipe, **changes)
    # The mixture is the same whatever attention the configuration names: one checkpoint serves them all.
    torch.manual_seed(seed)
    net = mixed(replace(config, attention="self"), granularity, choices=choices)
    if (prices is None) != (net.choices == PAIR):
        raise ValueError("give prices with choices other than self and external, and only then")

    def architecture(alphas: torch.Tensor) -> Architecture:
        return select(alphas, budget, rule, seed) if prices is None else afford(alphas, net.choices, prices, budget)

    architecture(net.alphas())  # an impossible budget is refused before the long phase, not after it

    epochs = fit(
        net,
        data,
        search_recipe,
        teacher if search_recipe.distill_logits or search_recipe.distill_features else None,
        penalty(net, weight, released, prices),
        folder and Path(folder) / "nas.pt",
    )
    history = list(progress(epochs, search_recipe, "search"))

    alphas = net.alphas().detach()
    chosen = architecture(alphas)
    # Named by what it starts from and how it goes on as well: another search's weights, or recipe, is another run.
    letters = "-".join("".join(name[0] for name in ((names,) if isinstance(names, str) else names)) for names in chosen)
    letters += "" if net.choices == PAIR else f"_{hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]}"
    taught = "" if teacher is None else _digest(*teacher.state_dict().values())
    how = hashlib.sha256(repr((finetune_recipe, taught)).encode()).hexdigest()[:8]
    start = f"finetune_{letters}_{_digest(*net.state_dict().values())}_{how}.pt"
    if released:
        freeze(net, chosen)
    model = net if released else extract(net, chosen)
    finetuned = train(
        model,
        data,
        finetune_recipe,
        teacher if finetune_recipe.distill_logits or finetune_recipe.distill_features else None,
        checkpoint=folder and Path(folder) / start,
        frozen=("alpha",) if released else (),
        label="fine-tuning",
    )
    return {
        "architecture": chosen,
        "alphas": alphas.tolist(),
        "trajectory": [facts["alphas"] for facts in history],
        "granularity": granularity,
        "budget": budget,
        "rule": rule if isinstance(rule, str) else list(rule),
        "weight": weight,
        "seed": seed,
        "released": released,
        "nas": history,
        "nas_seconds": sum(facts["seconds"] for facts in history),
        "finetune": finetuned,
        "test_accuracy": finetuned["test_accuracy"],
        "network": extract(net, chosen) if released else model,
    }
