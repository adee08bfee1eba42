"""What a unit of `tuned`'s work takes on this machine, so that seconds can be modelled without a run.

    salvit calibrate            # under a minute on two quiet cores
    salvit calibrate --check    # and the model beside five networks that it has not seen

The model is a sum of five terms (`private.Speed`), fitted to the seconds of a few networks by kind of operation with
non-negative least squares. It holds for the provider TFP and the load that the machine had.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LinearRegression

from ..models.config import Network, preset
from ..models.vit import build
from ..private.estimation import WORK, Speed, estimate, work
from ..private.parties.launch import infer
from . import store
from .runs import CalibrationRun, of_network

_MIDDLE = dict(image=32, channels=3, width=64, heads=4)

# In the small ones rounds count, in the large one words and products. With self-attention alone, whose normaliser has
# more words than all the rest, rounds and what fits the cache were told apart badly.
FITTED = (
    preset("cct_2_3x1", "SA softmax"),
    preset("cct_4_3x1", "SA L2Q", **_MIDDLE),
    preset("cct_4_3x1", "SA softmax", **_MIDDLE),
    preset("cct_4_3x1", "EA L2Q", **_MIDDLE),
    preset("cct_7_3x1", "SA 2Quad"),
)
CHECKED = (
    preset("cct_4_3x1", "Linformer", **_MIDDLE),
    preset("cct_4_3x1", "CosFormer", **_MIDDLE),
    preset("cct_7_3x1", "EA softmax"),
    preset("cct_7_3x1", "Performer ReLU"),
    preset("cct_7_3x1", "Dilated L2Q"),
)


def of_this_machine(networks: tuple[Network, ...] = FITTED, queries: int = 3) -> CalibrationRun:
    """The calibration that this machine has, or would have."""
    machine = store.machine()
    return CalibrationRun(networks, queries, machine["processor"], machine["cores"])


def speed(run: CalibrationRun | None = None) -> Speed | None:
    """This machine's speed if it is on record, else None."""
    record = store.find(run or of_this_machine())
    return None if record is None else Speed(**record["metrics"]["speed"])


def calibrate(run: CalibrationRun | None = None, again: bool = False) -> Speed:
    """This machine's speed, measured if it is not on record.

    Args:
        run: what to measure.
        again: measure it anew, in the place of the record.
    """
    run = run or of_this_machine()
    if again:
        store.path(run).unlink(missing_ok=True)
    return Speed(**store.ensure(run, measure)["metrics"]["speed"])


def measure(run: CalibrationRun) -> dict:
    """The speed, and what it was fitted to."""
    rows = pd.concat([measured(config, run.queries, run.seed) for config in run.networks], ignore_index=True)
    return {"speed": vars(fit(rows)), "operations": rows.to_dict("records")}


def measured(config: Network, queries: int = 3, seed: int = 0) -> pd.DataFrame:
    """A network's seconds by kind of operation, the median of several queries, beside the work of `estimate`.

    Returns:
        columns network, kind, those of `WORK`, seconds.
    """
    torch.manual_seed(seed)
    model = build(config).eval()
    shape = (config.channels, config.image, config.image)
    result = infer(model, torch.randn(queries, *shape), "tuned", batch=1)
    seconds = result.queries.groupby(["query", "kind"], observed=True)["seconds"].sum()
    return beside(config, seconds.groupby("kind", observed=True).median())


def beside(config: Network, seconds: pd.Series) -> pd.DataFrame:
    """A network's seconds, indexed by kind, as a table with its work."""
    counted = estimate(build(config), (1, config.channels, config.image, config.image)).operations
    rows = work(counted).groupby(counted["kind"], observed=True).sum()
    rows["seconds"] = seconds
    rows.index = rows.index.astype(str)
    rows = rows.reset_index()
    rows.insert(0, "network", of_network(config))
    return rows


def fit(rows: pd.DataFrame) -> Speed:
    """The speed that comes nearest to measured seconds, an error relative to its network's total.

    Args:
        rows: as `measured` gives, of several networks.
    """
    units = rows[list(WORK)]
    scale = units.max().clip(lower=1)  # the terms differ by ten powers of ten
    weight = 1 / rows.groupby("network")["seconds"].transform("sum")
    line = LinearRegression(fit_intercept=False, positive=True)
    line.fit((units / scale).mul(weight, axis=0).to_numpy(), (rows["seconds"] * weight).to_numpy())
    return Speed(*(line.coef_ / scale.to_numpy()).tolist())


def check(speed: Speed, networks: Iterable[Network] = CHECKED, queries: int = 3) -> pd.DataFrame:
    """Networks measured now, beside the model.

    Returns:
        Indexed by network: measured and modelled, seconds; difference, percent of the measured.
    """
    found = {}
    for config in networks:
        rows = measured(config, queries)
        model = sum(getattr(speed, name) * rows[name].sum() for name in WORK)
        found[of_network(config)] = {"measured": rows["seconds"].sum(), "modelled": model}
    table = pd.DataFrame(found).T.rename_axis("network")
    table["difference (%)"] = 100 * (table["modelled"] / table["measured"] - 1)
    return table


@dataclass(frozen=True)
class Command:
    """Measure what a unit of work takes on this machine, so that `salvit estimate` can model seconds."""

    again: bool = False
    """Measure it even if it is on record, in the place of the record."""
    check: bool = False
    """Measure five networks of other attention besides, and print the model beside them; about a minute."""


def run(command: Command) -> None:
    """Do it."""
    found = calibrate(again=command.again)
    for name, seconds in vars(found).items():
        print(f"{name.replace('_', ' '):16}{seconds:.3g} s")
    if command.check:
        table = check(found)
        print(table.round(2).to_string())
        print(f"largest difference {np.abs(table['difference (%)']).max():.0f} %; single runs scatter by themselves")
