"""How big a run is: one named set of sizes per kind of user."""

from dataclasses import dataclass

from .cct import METHODS


@dataclass(frozen=True)
class Profile:
    """Sizes of every study in one profile.

    Attributes:
        name: its key in `PROFILES`.
        networks: presets whose private latency is measured.
        queries: private inferences per network, one image each; every one is a record, so their spread is seen.
        methods: rows of the paper to measure, keys of `METHODS`.
    """

    name: str
    networks: tuple[str, ...] = ("cct_7_3x1",)
    queries: int = 3
    methods: tuple[str, ...] = tuple(METHODS)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", networks=("cct_4_3x2",), queries=1),
        Profile("quick"),
        Profile("short", queries=5),
        Profile("paper", networks=("cct_7_3x1", "cct_9_7x2"), queries=10),
    )
}


def profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown: choose from {', '.join(PROFILES)}")
    return PROFILES[name]
