"""The search as the published code does it, where that parts from the paper (facts, section 1, rows 1, 2 and 5).

The L1 term has a value but no gradient, so that weight decay alone shrinks alpha; weight decay acts on c, d and alpha
too; fine-tuning runs both branches of every layer, alpha frozen to 1 and 0.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..datasets import Data
from .sas import MixedCCT, Penalty, Search, extract, first_phase, found, freeze, scores, second_phase, select


@dataclass(frozen=True)
class ReleasedSearch(Search):
    """One search as the published code does it; fields as in `sas.Search`."""

    def __post_init__(self):
        super().__post_init__()
        if self.folded:
            raise ValueError("folded is True: as released, alphas are 1 and 0 before fine-tuning")
        if self.gate != "free":
            raise ValueError(f"gate is {self.gate!r}: as released, alpha is learnt itself")
        if self.score != "alpha":
            raise ValueError(f"score is {self.score!r}: as released, layers are chosen by alpha")
        if self.cheap != "external":
            raise ValueError(f"cheap is {self.cheap!r}: as released, the other layers get external attention")
        for name in ("first", "finetune"):
            object.__setattr__(self, name, replace(getattr(self, name), decay_all=True))


class ReleasedPenalty(Penalty):
    """The L1 term of Eq. 5 as published: no gradient reaches alpha."""

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        return super().__call__().detach()


def search(
    run: ReleasedSearch,
    data: Data,
    teacher: torch.nn.Module | None = None,
    folder: str | Path | None = None,
    second: str | Path | None = None,
) -> dict:
    """As `sas.search`; `network` holds the chosen branches only, `finetune` is of the network with both."""
    torch.manual_seed(run.seed)
    net = MixedCCT(run.network, run.granularity)
    history = first_phase(net, run, data, ReleasedPenalty(net, run.weight), teacher, folder)
    judged = scores(net, data, run.first.batch)
    chosen = select(net.alphas(), run.budget, run.rule, run.seed)
    freeze(net, chosen)
    tuned = second_phase(net, net, chosen, run, data, teacher, second or folder, frozen=("alpha",))
    return {**found(net, chosen, history, tuned, extract(net, chosen)), "scores": judged}
