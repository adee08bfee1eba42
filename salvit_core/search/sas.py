"""Selective attention search, SAS: which layers, or heads, deserve self-attention (SAL-ViT, Section 3.3, Algorithm 1).

A mixed network computes alpha SA + (1 - alpha) EA everywhere (Eq. 3) and is trained with weight * sum |alpha| in its
loss (Eq. 5); `select` turns the alphas into an architecture, which is plain data; `extract` makes the plain network
that holds only the chosen branches; `search` does it all. What the published code does otherwise is in `released`, a
search among any mechanisms within a budget in `priced`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock
from torch.nn import functional
from torch.nn.utils import parametrize

from ..datasets import Data, batches
from ..fields import Among, Checked, CountOrNone, Seed, Weight, shown, whole
from ..models.attention import ATTENTION
from ..models.attention.headwise import HEADS
from ..models.attention.mixed import MixedAttention
from ..models.cct import CCT
from ..models.config import CCTConfig
from ..training.checkpoint import digest
from ..training.loop import fit, progress, train
from ..training.recipe import Recipe

CHEAP = ("external", "scaling")  # what the layers, or heads, without self-attention get: the paper's, and MPCViT's
GRANULARITIES = ("layer", "head")
GATES = ("free", "sigmoid")
RULES = ("top", "bottom", "random")
SCORES = ("alpha", "saliency", "perturbation")  # by which layers, or heads, are chosen: `scores`

Architecture = tuple[str | tuple[str, ...], ...]  # `CCTConfig.attention`: one entry per layer


@dataclass(frozen=True)
class Phases(Checked):
    """What every search fixes: the network and its two trainings.

    The attention that `network` names plays no part and is kept as "self"; both recipes get the search's seed, and the
    first one ends with its last epoch, whose alphas are selected from.
    """

    network: CCTConfig
    first: Recipe  # E_NAS epochs
    finetune: Recipe  # E_FT epochs
    seed: Seed = 0  # of initial weights, of both trainings and of the random rule

    def __post_init__(self):
        if not isinstance(self.network, CCTConfig):
            kind = type(self.network).__name__
            raise ValueError(f"the search is over a CCT's attention: {kind} is of another network")
        super().__post_init__()
        object.__setattr__(self, "network", replace(self.network, attention="self"))
        object.__setattr__(self, "first", replace(self.first, seed=self.seed, keep="last"))
        kept = tuple(name for name in self.finetune.sgd if name != "alpha")  # what is extracted has none
        object.__setattr__(self, "finetune", replace(self.finetune, seed=self.seed, sgd=kept))


@dataclass(frozen=True)
class Search(Phases):
    """One selective attention search as plain data.

    Raises:
        ValueError: a ViT's configuration, a value of another type or out of range, an unknown name, or a budget or a
            list that does not fit the network.
    """

    budget: CountOrNone = 2  # B, how many layers, or heads, get self-attention
    granularity: Annotated[str, Among(*GRANULARITIES)] = "layer"  # "layer" (SAS-L) or "head" (SAS-H)
    rule: str | tuple = "top"  # as in `select`
    weight: Weight = 0.1  # lambda of Eq. 5
    folded: bool = False  # as in `extract`
    gate: Annotated[str, Among(*GATES)] = "free"  # as in `MixedCCT`
    cheap: Annotated[str, Among(*CHEAP)] = "external"  # what the other layers, or heads, get
    score: Annotated[str, Among(*SCORES)] = "alpha"  # what the rule is of: alpha (Algorithm 1), or one of `scores`

    def __post_init__(self):
        super().__post_init__()
        if self.folded and self.granularity != "layer":
            raise ValueError(
                f"folded is True with granularity {self.granularity!r}: only whole layers keep their alpha"
            )
        if not isinstance(self.rule, str):
            object.__setattr__(self, "rule", tuple(tuple(e) if isinstance(e, list) else e for e in self.rule))
        shape = (self.network.layers, self.network.heads)[: 1 if self.granularity == "layer" else 2]
        select(torch.zeros(shape), self.budget, self.rule, self.seed, self.cheap)  # an impossible one is refused now


def search(
    run: Search,
    data: Data,
    teacher: torch.nn.Module | None = None,
    folder: str | Path | None = None,
    second: str | Path | None = None,
) -> dict:
    """Algorithm 1 from end to end: train the mixture, select, extract, fine-tune with a fresh optimizer, test once.

    With a folder the run can be stopped at any moment and started again. The first phase depends on neither budget nor
    rule: searches that differ only in these share its checkpoint, nas.pt, and do not repeat it.

    Args:
        run: what to search.
        data: the images.
        teacher: a trained network to distil from, in each phase whose recipe distils.
        folder: where the checkpoints go.
        second: where that of fine-tuning goes, if elsewhere.

    Returns:
        plain data: architecture (as `CCTConfig.attention`), alphas (the last), trajectory (alphas after each epoch of
        the first phase), scores (as `scores` gives them), nas (that phase's history), nas_seconds, finetune (`train`'s
        result), test_accuracy (%); and network, the trained CCT, not plain data.

    Raises:
        ValueError: a checkpoint of another search, or as `select` and `fit`.
        FloatingPointError: as `fit`.
    """
    torch.manual_seed(run.seed)
    net = MixedCCT(run.network, run.granularity, gate=run.gate, cheap=run.cheap)
    history = first_phase(net, run, data, Penalty(net, run.weight), teacher, folder)
    judged = scores(net, data, run.first.batch)
    values = net.alphas() if run.score == "alpha" else judged[run.score]
    chosen = select(values, run.budget, run.rule, run.seed, run.cheap)
    model = extract(net, chosen, run.folded)
    tuned = second_phase(model, net, chosen, run, data, teacher, second or folder)
    return {**found(net, chosen, history, tuned, model), "scores": judged}


# The network that is searched


class MixedCCT(CCT):
    """A CCT that computes both attentions and mixes them by alpha (Figure 4).

    Args:
        config: the architecture; what it names as attention is ignored.
        granularity: "layer", one alpha per layer (SAS-L), or "head", one per head (SAS-H).
        initial: value that every alpha starts from; the paper has 0.1.
        gate: "free", alpha is learnt itself and has no bounds (Eq. 3), or "sigmoid", alpha is the logistic function of
            what is learnt, as a softmax of two learnt numbers would be of their difference.
        cheap: what is mixed with self-attention, "external" or "scaling".

    Raises:
        ValueError: unknown granularity, gate or cheap attention, or a ViT's configuration.
    """

    def __init__(
        self,
        config: CCTConfig,
        granularity: str = "layer",
        initial: float = 0.1,
        attention: Callable[[CCTConfig, int], torch.nn.Module] | None = None,
        gate: str = "free",
        cheap: str = "external",
    ):
        _known_granularity(granularity)
        if gate not in GATES:
            raise ValueError(f"gate {shown(gate)} is unknown: choose from {', '.join(GATES)}")
        if cheap not in CHEAP:
            raise ValueError(f"cheap {shown(cheap)} is unknown: choose from {', '.join(CHEAP)}")
        if not isinstance(config, CCTConfig):
            raise ValueError(f"the search is over a CCT's attention: {type(config).__name__} is of another network")

        def mixture(config: CCTConfig, layer: int) -> torch.nn.Module:
            if granularity == "head":
                one, other = (HEADS[name](config, config.heads) for name in ("self", cheap))
                return MixedAttention(one, other, config.heads, initial, cheap)
            return MixedAttention(ATTENTION["self"](config), ATTENTION[cheap](config), None, initial, cheap)

        super().__init__(config, attention or mixture)
        self.granularity, self.gate = granularity, gate
        self.choices: tuple[str, ...] = ("self", cheap)
        if gate == "sigmoid":
            for block in self.blocks:
                parametrize.register_parametrization(block.attention, "alpha", Sigmoid())

    def alphas(self) -> torch.Tensor:
        """The selection parameters as part of the graph, so that a loss on them has a gradient.

        (L,), or one per head (L, H).
        """
        alphas = [block.attention.alpha for block in self.blocks]
        return torch.stack([alpha.flatten() if self.granularity == "head" else alpha for alpha in alphas])

    def ones(self, names: str | tuple[str, ...]) -> torch.Tensor:
        """The alphas of a layer whose mixture is to compute what `names` says."""
        names = (names,) if isinstance(names, str) else names
        return torch.tensor([float(name == "self") for name in names])


def mixed(config: CCTConfig, granularity: str = "layer", initial: float = 0.1) -> MixedCCT:
    """The network to search; see `MixedCCT`."""
    return MixedCCT(config, granularity, initial)


class Sigmoid(torch.nn.Module):
    """The logistic function, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return torch.sigmoid(x)

    def right_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Any shape, of values from 0 to 1."""
        return torch.logit(y)


class Penalty:
    """weight * sum |alpha|, the second term of Eq. 5, to hand to `fit`.

    Args:
        net: the network that is searched.
        weight: lambda.
    """

    def __init__(self, net: MixedCCT, weight: float = 0.1):
        self.net, self.weight = net, weight

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        return self.weight * self.net.alphas().abs().sum()

    def facts(self) -> dict:
        """What an epoch's record keeps: alphas, nested lists (L,), (L, H) or (L, C)."""
        return {"alphas": self.net.alphas().tolist()}

    def __repr__(self) -> str:
        gate = "" if self.net.gate == "free" else f", gate={self.net.gate!r}"
        cheap = f", cheap={self.net.choices[1]!r}" if self.net.choices[1:] == ("scaling",) else ""
        return f"{type(self).__name__}(weight={self.weight}{gate}{cheap})"


# From alphas to an architecture


def scores(net: MixedCCT, data: Data, batch: int) -> dict[str, list]:
    """What a search knows of its layers, or heads, besides alpha: by both, more is more in need of self-attention.

    Both are of the cross-entropy on the validation images, all else in the network as it is. What Algorithm 1 selects
    by, alpha, says how loud self-attention is and not what is lost without it, since its weights grow as alpha shrinks.

    Args:
        net: the mixture, trained.
        data: `data.validation` is read.
        batch: images at a time.

    Returns:
        saliency: minus the derivative by alpha, first order in what more self-attention would gain; perturbation: how
        much is lost with alpha at zero (as of operations in Wang et al., "Rethinking architecture selection in
        differentiable NAS", 2021). Nested lists (L,) or (L, H).
    """
    was, total = net.training, len(data.validation.labels)
    layers = [block.attention for block in net.eval().blocks]

    def entropy(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Its part of the mean cross-entropy."""
        return functional.cross_entropy(net(images), labels, reduction="sum") / total

    def loss() -> torch.Tensor:
        """The mean cross-entropy."""
        with torch.no_grad():
            return sum(entropy(images, labels) for images, labels in batches(data.validation, batch))

    before, shape = loss(), net.alphas().shape
    saliency, lost = torch.zeros(shape), torch.zeros(shape)
    for images, labels in batches(data.validation, batch):
        with parametrize.cached():
            alphas = [attention.alpha for attention in layers]
            slopes = torch.autograd.grad(entropy(images, labels), alphas)
        saliency -= torch.stack([slope.reshape(shape[1:]).cpu() for slope in slopes])
    for layer, attention in enumerate(layers):
        alpha = attention.alpha.detach().clone()
        for place in range(alpha.numel()):
            changed = alpha.clone()
            changed.view(-1)[place] = 0.0
            _set_alpha(attention, changed)
            lost[layer].view(-1)[place] = (loss() - before).cpu()
        _set_alpha(attention, alpha)
    net.train(was)
    return {"saliency": saliency.tolist(), "perturbation": lost.tolist()}


def _set_alpha(attention: torch.nn.Module, value: torch.Tensor) -> None:
    """Whether it is learnt itself, or through a gate."""
    with torch.no_grad():
        value = value.view_as(attention.alpha).to(attention.alpha)
        if parametrize.is_parametrized(attention):
            attention.alpha = value
        else:
            attention.alpha.copy_(value)


def select(
    alphas: torch.Tensor | Sequence,
    budget: int,
    rule: str | Sequence[int] | Sequence[tuple[int, int]] = "top",
    seed: int = 0,
    cheap: str = "external",
) -> Architecture:
    """Give self-attention to `budget` layers, or heads, and external attention to the others (Algorithm 1, line 7).

    Args:
        alphas: the selection parameters, or another score of the same places, (L,) or (L, H).
        budget: B, how many layers, or heads, get self-attention (Eq. 4).
        rule: "top", the largest alpha; "bottom", the smallest (the paper's SAS-L-WC); "random", drawn without
            replacement; or a list of B layers (from 0), or of B pairs (layer, head). Of equal alphas the earliest.
        seed: of the random rule.
        cheap: what the others get in external attention's place.

    Returns:
        what `CCTConfig.attention` takes: a name per layer, or a tuple of names, one per head, for each layer.

    Raises:
        ValueError: a budget that cannot be met, an unknown rule, a list that does not fit.
    """
    alphas = torch.as_tensor(alphas).detach().cpu()
    places: list[tuple[int, ...]] = [(layer,) for layer in range(len(alphas))]
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
        given: set[tuple] = {places[i] for i in order[:budget]}
    else:
        if not isinstance(rule, Sequence) or not all(_is_place(each) for each in rule):
            raise ValueError(f"rule {shown(rule)} is unknown: choose from {', '.join(RULES)}, or give a list of {unit}")
        given = {tuple(place) if isinstance(place, list | tuple) else (place,) for place in rule}
        if len(rule) != budget or len(given) != budget or given - set(places):
            raise ValueError(f"rule {shown(list(rule))} does not name {budget} different {unit} out of {len(places)}")
    names = ["self" if place in given else cheap for place in places]
    if alphas.dim() == 1:
        return tuple(names)
    heads = alphas.shape[1]
    return tuple(tuple(names[layer * heads : (layer + 1) * heads]) for layer in range(len(alphas)))


def _is_place(place: object) -> bool:
    """Whether it may be a layer, or a pair of layer and head."""
    pair = isinstance(place, list | tuple) and len(place) == 2 and all(map(whole, place))
    return whole(place) or pair


def freeze(net: MixedCCT, chosen: Architecture) -> None:
    """Set the alphas to 1 and 0 so that the mixture computes what `chosen` names (Algorithm 1, line 7), in place.

    Raises:
        ValueError: an architecture of another shape than the network's.
    """
    for block, names in zip(net.blocks, _checked(net, chosen), strict=True):
        _set_alpha(block.attention, net.ones(names))


def extract(net: MixedCCT, chosen: Architecture, folded: bool = False) -> CCT:
    """A plain network that holds and runs only the chosen branches, with their searched weights.

    It computes what the mixture computes with its alphas frozen to 1 and 0 (Algorithm 1, line 7). The L1 term makes
    alphas small while self-attention's weights grow to make up for it, so that alpha = 1 makes it louder than the
    network was trained with. Folded, self-attention keeps the scale that it had: a departure from the paper, good where
    an alpha is small and not zero.

    Args:
        net: the searched network; it is not changed.
        chosen: a name per layer, or per head, such as `select` returns.
        folded: whether self-attention's output projection takes up its alpha; of layers alone.

    Raises:
        ValueError: an architecture of another shape than the network's, or heads to be folded.
    """
    chosen = _checked(net, chosen)
    if folded and not all(isinstance(names, str) for names in chosen):
        raise ValueError("folded is True for heads: only whole layers keep their alpha")
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
    if folded:
        with torch.no_grad():
            for block, mixed, name in zip(model.blocks, net.blocks, chosen, strict=True):
                if name == "self":
                    for parameter in block.attention.projection.parameters():
                        parameter.mul_(mixed.attention.alpha.cpu())
    return model.to(next(net.parameters()).device).train(net.training)


# The two phases of every search


def first_phase(
    net: MixedCCT,
    run: Phases,
    data: Data,
    penalty: Penalty,
    teacher: torch.nn.Module | None,
    folder: str | Path | None,
) -> list[dict]:
    """Train the mixture with its penalty (Algorithm 1, lines 1-6); its epochs' facts.

    Of processes that share the folder one trains; the others wait, and take what it wrote.
    """
    if folder is None:
        return list(progress(fit(net, data, run.first, _for(run.first, teacher), penalty), run.first, "search"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / "nas.lock"):
        epochs = fit(net, data, run.first, _for(run.first, teacher), penalty, Path(folder) / "nas.pt")
        return list(progress(epochs, run.first, "search"))


def second_phase(
    model: torch.nn.Module,
    net: MixedCCT,
    chosen: Architecture,
    run: Phases,
    data: Data,
    teacher: torch.nn.Module | None,
    folder: str | Path | None,
    frozen: tuple[str, ...] = (),
) -> dict:
    """Fine-tune what was extracted (lines 8-9); `train`'s result.

    Its checkpoint is named by what it starts from and how it goes on: another search's weights, or these extracted in
    another way, or another recipe, is another run.
    """
    taught = "" if teacher is None else digest(*teacher.state_dict().values())
    start = digest(*net.state_dict().values(), *model.state_dict().values())
    text = repr((chosen, start, run.finetune, taught, frozen))
    name = f"finetune_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    checkpoint = None if folder is None else Path(folder) / name
    return train(
        model,
        data,
        run.finetune,
        _for(run.finetune, teacher),
        checkpoint=checkpoint,
        frozen=frozen,
        label="fine-tuning",
    )


def found(net: MixedCCT, chosen: Architecture, history: list[dict], tuned: dict, model: CCT) -> dict:
    """What a search returns."""
    return {
        "architecture": chosen,
        "alphas": history[-1]["alphas"],
        "trajectory": [facts["alphas"] for facts in history],
        "nas": history,
        "nas_seconds": sum(facts["seconds"] for facts in history),
        "finetune": tuned,
        "test_accuracy": tuned["test_accuracy"],
        "network": model,
    }


def _for(recipe: Recipe, teacher: torch.nn.Module | None) -> torch.nn.Module | None:
    return teacher if recipe.distills else None


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


def _known_granularity(granularity: str) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity!r} is unknown: choose from {', '.join(GRANULARITIES)}")
