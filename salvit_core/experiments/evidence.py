"""The campaign: every training that the study's claims rest on, in order of worth, for hours in the background.

    make evidence
    make evidence PROFILE=short FLAGS="--minutes 12"     # on a GPU

It goes on where it was, whatever stopped it, and ends with the same records. `--publish` copies what is finished to
data/reference, where notebooks and the README read it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from .. import workspace
from ..fields import Checked, CountOrNone, Range
from ..models.config import TransformerConfig
from . import execute, replaced, store
from .profiles import Profile, profile
from .runs import Run, TrainRun

# How good is what a search picks? All assignments of SA and EA to the layers, each trained from scratch.
TRUTH = dict(images=15_000, epochs=12)
SEEDS = 3

SA: dict[str, dict[str, Any]] = {
    "SA softmax": dict(normalizer="softmax"),
    "SA 2Quad": dict(normalizer="2quad"),
    "SA L2Q": dict(normalizer="l2q"),
    "SA 2ReLU": dict(normalizer="2relu"),
    "SA scaling": dict(attention="scaling"),
    "SA L2Q global": dict(normalizer="l2q", l2q_granularity="global"),
    "SA L2Q head-wise": dict(normalizer="l2q", l2q_granularity="head"),
    "SA L2Q, C only": dict(normalizer="l2q", l2q_learn_d=False),
    "SA L2Q, D only": dict(normalizer="l2q", l2q_learn_c=False),
}
EA: dict[str, dict[str, Any]] = {
    f"EA {label}": dict(attention="external", normalizer=normalizer)
    for label, normalizer in (
        ("softmax", "softmax"),
        ("L2Q", "l2q"),
        ("2Quad", "2quad"),
        ("2ReLU", "2relu"),
        ("scaling", "scaling"),
    )
}


def assignments(config: TransformerConfig) -> list[TransformerConfig]:
    """A network with every assignment of self- and external attention to its layers, 2^L of them."""
    names = itertools.product(("self", "external"), repeat=config.layers)
    return [replace(config, attention=each) for each in names]


def truth(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> list[TrainRun]:
    """The trainings behind the question of how good a search's choice is: every assignment, several seeds."""
    config = size.config(data, "SA L2Q")
    cut = replace(size, images=TRUTH["images"])
    return [
        cut.training(data, each, seed=seed, epochs=TRUTH["epochs"])
        for seed in range(seeds)
        for each in assignments(config)
    ]


def rows(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> Iterator[Run]:
    """The papers' rows: plain networks, searches at each budget, distilled ones; several seeds, seed by seed."""
    for seed in range(seeds):
        for changes in (*SA.values(), *EA.values()):
            yield size.training(data, size.config(data, **changes), seed=seed)
        config = size.config(data, "SA L2Q")
        budgets = range(1, config.layers)
        for budget, rule in itertools.product(budgets, ("top", "bottom", "random")):
            yield size.search(data, config, budget, seed, rule=rule)
        for budget in budgets:
            yield size.search(data, config, budget * config.heads, seed, granularity="head")
        middle = budgets[len(budgets) // 2]
        for normalizer in ("softmax", "2quad", "2relu"):
            yield size.search(data, size.config(data, normalizer=normalizer), middle, seed)
        yield size.search(data, config, middle, seed, weight=0.0)
        yield size.search(data, config, middle, seed, released=True)
        teacher = size.training(data, size.config(data, "SA softmax"), seed=seed)
        for part in ("distill_logits", "distill_features"):
            yield size.training(data, config, seed=seed, teacher=teacher, **{part: 1.0})


def first(size: Profile) -> Iterator[Run]:
    """What a GPU that is lent for minutes does before anything else: the paper's main rows, CIFAR-100 last."""
    for data, labels in (
        ("cifar10", ("SAL-ViT", "SA softmax", "SA L2Q", "EA L2Q", "SA 2Quad", "EA softmax")),
        ("cifar100", ("SA softmax", "SAL-ViT", "SA L2Q", "EA L2Q")),
    ):
        for label in labels:
            if label == "SAL-ViT":
                yield size.search(data, size.config(data, "SA L2Q"), 3)
            else:
                yield size.training(data, size.config(data, label))


def campaign(name: str = "reference") -> list[Run]:
    """All runs of the campaign, the most telling first.

    Args:
        name: of the profile whose sizes it has.
    """
    size = profile(name)
    every: list[Run] = [*(first(size) if name == "short" else ())]
    for run in replaced.plan(size, "digits" if name == "smoke" else "cifar10").values():
        every += [run.teacher, run]
    every += [*truth(size), *rows(size)]
    main = [
        dict(normalizer="softmax"),
        dict(normalizer="2quad"),
        dict(normalizer="l2q"),
        EA["EA softmax"],
        EA["EA L2Q"],
    ]
    for seed in range(SEEDS):
        every += [size.training("cifar100", size.config("cifar100", **changes), seed=seed) for changes in main]
    return list(dict.fromkeys(every))


@dataclass(frozen=True)
class Evidence(Checked):
    """Train what the study's claims rest on, for hours; stop it at any moment, it goes on where it was."""

    profile: str = "reference"
    """Whose sizes it has: reference for two cores, short for a GPU, smoke to try it out."""
    most: CountOrNone | None = None
    """How many runs to do at most. Default: all."""
    minutes: Annotated[float, Range(0.0)] | None = None
    """How long at most. What runs then stops, and goes on from its last whole epoch next time. Default: to the end."""
    list: bool = False
    """Only say what is done and what is left."""
    publish: bool = False
    """Copy the records that are finished to data/reference, without weights, and do nothing else."""


def run(command: Evidence) -> int:
    """Do it; 0.

    Raises:
        ValueError: unknown profile.
    """
    every = campaign(command.profile)
    done = [each for each in every if store.find(each) is not None]
    known = [each for each in every if store.find(each, "reference") is not None]
    left = [each for each in every if each not in done and each not in known]
    print(f"{len(every)} runs: {len(done)} done here, {len(known)} in data/reference, {len(left)} left")
    if command.list:
        print("\n".join(each.label() for each in left))
    elif command.publish:
        for each in done:
            workspace.write(store.path(each, "reference"), store.path(each).read_bytes())
    else:
        found = execute.collect(left[: command.most], label="evidence", minutes=command.minutes)
        print(f"{len(found)} done, {len(left) - len(found)} left")
    return 0
