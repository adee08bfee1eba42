"""How big a run is: one named set of sizes per kind of user."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from ..fields import Among, Checked, Count, CountOrNone, shown
from ..models.config import PRESETS, Network, TransformerConfig
from ..models.rows import METHODS
from ..search.priced import PricedSearch
from ..search.released import ReleasedSearch
from ..search.sas import Search
from ..training.recipe import Recipe
from .runs import SHAPES, SearchRun, TrainRun, network


@dataclass(frozen=True)
class Profile(Checked):
    """Sizes of every study in one profile, and the runs that follow from them.

    Attributes:
        name: its key in `PROFILES`.
        networks: presets whose private latency is measured.
        queries: private inferences per network, one image each; every one is a record, so their spread is seen.
        methods: rows of the paper to measure, keys of `METHODS`.
        data: data sets to train on, names that `data.load` knows.
        trained: preset that is trained, its image size and classes those of the data set.
        changes: fields of `CCTConfig` in which the trained network differs from the preset.
        images: training images used, and a quarter as many to validate (0: all).
        recipe: of every training and of fine-tuning after a search.
        search_epochs: epochs of the search phase, E_NAS.
        differs: per data set, what it has of its own: fields of `Recipe`, or search_epochs.
        seeds: how many seeds the ablations of notebook 02 have; the searches of notebook 03 have one.
        encrypted: test images that notebook 05 runs on shares with `tuned`; `stock` gets a sixty-fourth of them.
    """

    name: str
    networks: tuple[Annotated[str, Among(*PRESETS)], ...] = ("cct_7_3x1",)
    queries: Count = 3
    methods: tuple[Annotated[str, Among(*METHODS)], ...] = tuple(METHODS)
    data: tuple[Annotated[str, Among("auto", *SHAPES)], ...] = ("auto",)
    trained: Annotated[str, Among(*PRESETS)] = "cct_7_3x1"
    changes: dict = field(default_factory=dict, hash=False)
    images: CountOrNone = 0
    recipe: Recipe = Recipe()
    search_epochs: Count = 600
    differs: dict[str, dict] = field(default_factory=dict, hash=False)
    seeds: Count = 3
    encrypted: Count = 256

    def config(self, data: str, method: str | None = None, **changes) -> TransformerConfig:
        """The network that this profile trains on a data set."""
        made = network(LARGE.get(data, self.trained), data, method, **{**self.changes, **changes})
        assert isinstance(made, TransformerConfig)  # as all of `PRESETS` are
        return made

    def training(self, data: str, config: Network, seed: int = 0, **changes) -> TrainRun:
        """One network trained from scratch; `changes` are fields of `Recipe`, or `teacher`."""
        teacher = changes.pop("teacher", None)
        return TrainRun(data, config, self._finetune(data, seed=seed, **changes), self.images, teacher)

    def search(
        self,
        data: str,
        config: Network,
        budget: int,
        seed: int = 0,
        released: bool = False,
        teacher: TrainRun | None = None,
        **changes,
    ) -> SearchRun:
        """One search; `changes` are fields of `sas.Search`, or fields of its fine-tuning's `Recipe`."""
        kind = ReleasedSearch if released else Search
        of_search = {name: changes.pop(name) for name in list(changes) if name in kind.__dataclass_fields__}
        first, second = self._search(data), self._finetune(data, **changes)
        search = kind(config, first, second, seed, budget, **of_search)  # type: ignore[arg-type]  # it refuses a ViT
        return SearchRun(data, search, self.images, teacher)

    def choice(self, data: str, config: Network, prices: dict[str, float], budget: float, seed: int = 0) -> SearchRun:
        """One search among the mechanisms that `prices` names."""
        phases = (config, self._search(data), self._finetune(data), seed)
        search = PricedSearch(*phases, tuple(prices), tuple(prices.values()), budget)  # type: ignore[arg-type]
        return SearchRun(data, search, self.images)

    def _search(self, data: str) -> Recipe:
        """Of the search phase."""
        epochs = self.differs.get(data, {}).get("search_epochs", self.search_epochs)
        return self._finetune(data, epochs=epochs)

    def _finetune(self, data: str, **changes) -> Recipe:
        """Of training from scratch, and of the second phase."""
        own = {name: value for name, value in self.differs.get(data, {}).items() if name != "search_epochs"}
        return dataclasses.replace(self.recipe, **{**own, **changes})


# Data sets of larger images have the paper's networks for them in every profile.
LARGE = {"tiny_imagenet": "cct_9_7x2", "imagenet": "cct_14_7x2"}

# What the paper does elsewhere than on CIFAR (Section 4; facts: training).
PUBLISHED: dict[str, dict] = {
    "tiny_imagenet": dict(search_epochs=50),
    "imagenet": dict(search_epochs=50, epochs=100, batch=168, lr=5e-4, weight_decay=0.05),
}


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            networks=("cct_4_3x1",),
            queries=1,
            methods=("SA softmax", "SA 2Quad", "EA softmax", "EA L2Q", "SAL-ViT B=3"),
            data=("digits",),
            trained="cct_4_3x1",
            images=256,
            recipe=Recipe(epochs=2, batch=64, lr=2e-3, augment="none"),
            search_epochs=1,
            seeds=1,
            encrypted=32,
        ),
        Profile(
            "quick",
            queries=1,
            trained="cct_4_3x2",
            changes=dict(convolutions=1, stride=2),
            images=2000,
            recipe=Recipe(epochs=3, batch=64, lr=2e-3, augment="crop", channels_last=True),
            search_epochs=2,
            encrypted=128,
        ),
        # A small network on two CPU cores, hours: what the project's own records hold (data/reference).
        Profile(
            "reference",
            data=("cifar10",),
            trained="cct_4_3x2",
            changes=dict(convolutions=1, stride=2),
            recipe=Recipe(epochs=6, batch=128, lr=2e-3, augment="crop", bf16=True, channels_last=True),
            search_epochs=4,
        ),
        # The paper's network, for minutes of a GPU: nine of an H100 finish eight of `evidence.first`'s ten runs. So few
        # epochs leave AutoAugment nothing to prevent; 250 divides the training images: one size of batch to compile.
        Profile(
            "short",
            queries=5,
            data=("cifar10", "cifar100"),
            recipe=Recipe(epochs=12, batch=250, augment="crop", bf16=True, channels_last=True, compile=True),
            search_epochs=5,
            seeds=1,
            encrypted=1000,
        ),
        Profile(
            "paper",
            networks=("cct_7_3x1", "cct_9_7x2"),
            queries=10,
            data=("cifar10", "cifar100", "tiny_imagenet"),
            recipe=Recipe(bf16=True, channels_last=True),
            differs=PUBLISHED,
            encrypted=1000,
        ),
    )
}


def profile_of(size: Profile) -> Profile:
    """The sizes of what compares many mechanisms: in profile reference fewer images than elsewhere, in float32."""
    if size.name != "reference":
        return size
    return dataclasses.replace(size, images=15_000, recipe=dataclasses.replace(size.recipe, bf16=False))


def profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ValueError: unknown name.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"profile {shown(name)} is unknown: choose from {', '.join(PROFILES)}")
    return PROFILES[name]
