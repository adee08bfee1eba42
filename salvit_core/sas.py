"""Selective attention search, SAS: which layers, or heads, deserve self-attention (SAL-ViT, Section 3.3, Algorithm 1).

A mixed network computes alpha SA + (1 - alpha) EA everywhere (Eq. 3) and is trained with weight * sum |alpha| in its
loss (Eq. 5); `select` turns the alphas into an architecture, which is plain data; `extract` makes the plain network
that holds only the chosen branches; `search` does it all.
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
from .attention.mixed import MixedAttention
from .attention.self_attention import SelfAttention
from .cct import CCT, CCTConfig, normalizer_of
from .training import Recipe, _digest, fit, progress, train

GRANULARITIES = ("layer", "head")
RULES = ("top", "bottom", "random")

Architecture = tuple[str | tuple[str, ...], ...]  # `CCTConfig.attention`: one entry per layer


class MixedCCT(CCT):
    """The network that is searched: a CCT that computes both attentions and mixes them by alpha (Figure 4).

    Args:
        config: the architecture; what it names as attention is ignored.
        granularity: "layer", one alpha per layer (SAS-L), or "head", one per head (SAS-H).
        initial: value that every alpha starts from; the paper has 0.1.

    Raises:
        ValueError: unknown granularity.
    """

    def __init__(self, config: CCTConfig, granularity: str = "layer", initial: float = 0.1):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity {granularity!r} is unknown: choose from {', '.join(GRANULARITIES)}")

        def attention(config: CCTConfig, layer: int) -> MixedAttention:
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
        """The selection parameters, (L,) or (L, H), as part of the graph: a loss on them has a gradient."""
        alphas = [block.attention.alpha for block in self.blocks]
        return torch.stack([alpha.flatten() if self.granularity == "head" else alpha for alpha in alphas])


def mixed(config: CCTConfig, granularity: str = "layer", initial: float = 0.1) -> MixedCCT:
    """The network to search; see `MixedCCT`."""
    return MixedCCT(config, granularity, initial)


class Penalty:
    """weight * sum |alpha|, the second term of Eq. 5; made by `penalty`."""

    def __init__(self, net: MixedCCT, weight: float, released: bool):
        self.net, self.weight, self.released = net, weight, released

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        alphas = self.net.alphas()
        return self.weight * (alphas.detach() if self.released else alphas).abs().sum()

    def facts(self) -> dict:
        """What an epoch's record keeps: alphas, nested lists (L,) or (L, H)."""
        return {"alphas": self.net.alphas().tolist()}

    def __repr__(self) -> str:
        return f"Penalty(weight={self.weight}, released={self.released})"


def penalty(net: MixedCCT, weight: float = 0.1, released: bool = False) -> Penalty:
    """The L1 term of Eq. 5, to hand to `fit`.

    Args:
        net: the network that is searched.
        weight: lambda.
        released: as the published code has it (facts: row 1): the value is there but no gradient reaches alpha.
    """
    return Penalty(net, weight, released)


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
    """Set alpha to 1 where `chosen` names self-attention and to 0 elsewhere (Algorithm 1, line 7), in place.

    Raises:
        ValueError: an architecture of another shape than the network's.
    """
    chosen = _checked(net, chosen)
    with torch.no_grad():
        for block, names in zip(net.blocks, chosen, strict=True):
            ones = torch.tensor([float(name == "self") for name in ((names,) if isinstance(names, str) else names)])
            block.attention.alpha.copy_(ones.view_as(block.attention.alpha))


def extract(net: MixedCCT, chosen: Architecture) -> CCT:
    """A plain network that holds and runs only the chosen branches, with their searched weights.

    It computes what the mixture computes with its alphas frozen to 1 and 0.

    Args:
        net: the searched network; it is not changed.
        chosen: a name per layer, or per head, such as `select` returns.

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
    if len(chosen) != net.config.layers or kinds - {"self", "external"} or sizes != wanted:
        unit = "layers" if net.granularity == "layer" else f"layers, each of {net.config.heads} heads"
        raise ValueError(f"{chosen!r} does not fit: name self or external for {net.config.layers} {unit}")
    return chosen


def search(
    config: CCTConfig,
    data: "datasets.Data",
    search_recipe: Recipe,
    finetune_recipe: Recipe,
    budget: int,
    granularity: str = "layer",
    weight: float = 0.1,
    rule: str | Sequence = "top",
    seed: int = 0,
    folder: str | Path | None = None,
    released: bool = False,
    teacher: CCT | None = None,
) -> dict:
    """Algorithm 1 from end to end: train the mixture, select, extract, fine-tune with a fresh optimizer, test once.

    With a folder the run can be stopped at any moment and started again. The first phase depends on neither budget nor
    rule: searches that differ only in these share its checkpoint, nas.pt, and do not repeat it.

    Args:
        config: the architecture, any normaliser; what it names as attention is ignored.
        data: the images.
        search_recipe: of the first phase, E_NAS epochs; the alphas are those of its last epoch.
        finetune_recipe: of the second phase, E_FT epochs.
        budget: B, how many layers, or heads, get self-attention.
        granularity: "layer" (SAS-L) or "head" (SAS-H).
        weight: lambda of Eq. 5.
        rule: as in `select`.
        seed: of initial weights and the random rule, and in place of both recipes' own.
        folder: where the checkpoints go.
        released: do what the published code does (facts: rows 1, 2 and 5): the L1 term has no gradient, weight decay
            acts on c, d and alpha too, and fine-tuning runs both branches, alpha frozen to 1 and 0.
        teacher: a trained network to distil from, in each phase whose recipe distils.

    Returns:
        plain data: architecture (as `CCTConfig.attention`), alphas (the last), trajectory (alphas after each epoch of
        the first phase), granularity, budget, rule, weight, seed, released, nas (that phase's history), nas_seconds,
        finetune (`train`'s result), test_accuracy (%); and network, the trained CCT, not plain data.

    Raises:
        ValueError: a checkpoint of another search, or as `select` and `fit`.
        FloatingPointError: as `fit`.
    """
    changes = {"seed": seed, **({"decay_all": True} if released else {})}
    search_recipe = replace(search_recipe, keep="last", **changes)
    finetune_recipe = replace(finetune_recipe, **changes)
    # The mixture is the same whatever attention the configuration names: one checkpoint serves them all.
    torch.manual_seed(seed)
    net = mixed(replace(config, attention="self"), granularity)
    select(net.alphas(), budget, rule)  # an impossible budget is refused before the long phase, not after it

    epochs = fit(
        net,
        data,
        search_recipe,
        teacher if search_recipe.distill_logits or search_recipe.distill_features else None,
        penalty(net, weight, released),
        folder and Path(folder) / "nas.pt",
    )
    history = list(progress(epochs, search_recipe, "search"))

    alphas = net.alphas().detach()
    chosen = select(alphas, budget, rule, seed)
    # Named by what it starts from and how it goes on as well: another search's weights, or recipe, is another run.
    letters = "-".join("".join(name[0] for name in ((names,) if isinstance(names, str) else names)) for names in chosen)
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
