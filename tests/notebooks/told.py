"""What the tests of the words that are told of costs share: sizes, links, and cells of the benchmarks' tables."""

import functools
from pathlib import Path

from salvit_core.experiments import profiles, published
from salvit_core.private import LINKS

ROOT = Path(__file__).parents[2]
SIZE = profiles.profile("reference")
FULL = "cct_7_3x1"
WAN, FAR = LINKS["WAN (Cheetah)"], LINKS["WAN (CrypTFlow2)"]
ON_LOOPBACK = "batch of 8 on loopback, of a single one's seconds"
ALONE_OR_TOGETHER = "WAN (Cheetah) emulated: one query / each of 8"


@functools.cache
def variants():
    return published.variants_on_record()


def benchmark(name, row):
    """A cell of a benchmark's table."""
    lines = (ROOT / "data" / "reference" / "benchmarks" / f"{name}.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row} |")]
    return line.removeprefix(f"| {row} |").strip(" |").split(" | ")
