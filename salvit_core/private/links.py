"""Links between the parties: what rounds and bytes cost on one, as a model and as an emulation.

Everything else in the study is measured on loopback. A `Link` turns such a measurement into a latency elsewhere,
labelled "modelled", or delays every message of a real run (`private.infer(..., link=...)`), which is measured.
"""

import math
import time
from dataclasses import dataclass

from ..fields import number, shown


@dataclass(frozen=True)
class Link:
    """A symmetric connection of two parties.

    Attributes:
        rtt: round-trip time, seconds; a message takes half of it.
        bandwidth: bytes per second, each way at once.

    Raises:
        ValueError: a round-trip time that is negative or endless, or a bandwidth that is not positive.
    """

    rtt: float
    bandwidth: float

    def __post_init__(self):
        if not number(self.rtt) or not 0 <= self.rtt < math.inf:
            raise ValueError(f"rtt is {shown(self.rtt)}: give seconds, zero or more")
        if not number(self.bandwidth) or not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {shown(self.bandwidth)}: give bytes per second, more than zero")

    def seconds(self, rounds: float, size: float) -> float:
        """What this many rounds add, which carry `size` bytes one after another."""
        return rounds * self.rtt / 2 + size / self.bandwidth

    def latency(self, operations) -> float:
        """Modelled latency in seconds: the measured time on loopback, and what the link adds.

        Args:
            operations: a table with columns seconds, rounds and serial_bytes, as `Result.operations`.
        """
        table = operations[["seconds", "rounds", "serial_bytes"]].sum()
        return float(table["seconds"]) + self.seconds(table["rounds"], table["serial_bytes"])

    def wait(self, size: int) -> None:
        """Emulate the arrival of a message of `size` bytes."""
        time.sleep(self.seconds(1, size))


# Settings of the literature. CrypTFlow2: Rathee et al., CCS 2020, Section 6. Cheetah: Huang et al., USENIX Security
# 2022, Section 6.1. Both give the bandwidth in bytes and the time of an echo.
LINKS = {
    "LAN (CrypTFlow2)": Link(0.8e-3, 377e6),
    "LAN (Cheetah)": Link(0.3e-3, 384e6),
    "WAN (Cheetah)": Link(40e-3, 44e6),
    "WAN (CrypTFlow2)": Link(80e-3, 40e6),
}
