"""What few bits cost a trained network, trick by trick: the runs, their table, and what the released logs say."""

import dataclasses
from collections.abc import Iterable, Sequence

import pandas as pd

from ..models.config import preset
from ..quantization.engine import TRICKS, Quantization
from ..training.recipe import Recipe
from .runs import QuantizationRun, TrainRun

# Bits of weights and, where they are quantized, of activations.
BITS = ((8, None), (4, None), (8, 8), (4, 8), (8, 6))
ALL = "all tricks"
VARIANTS = (ALL, *(f"without {trick}" for trick in TRICKS))
SEEDS = (1005, 1006, 1007)  # of calibration; the first is the released one

# The network of the reference records: its stem halves the picture, so that one core trains it in minutes.
TRAINED = TrainRun(
    "cifar10",
    preset("efficientvit_micro_32", stem_stride=2),
    Recipe(epochs=12, batch=64, lr=3e-3, augment="crop", channels_last=True),
    images=15000,
)
# A fortieth of the published steps, at ten times the published rate, so that roundings still come to an end.
BRIEF = dict(iterations=500, lr=1e-2, iterations_activations=100, lr_activations=1e-3)

# ImageNet top-1 (%) in the logs of the released code, most likely of B1 at 224 pixels; published, not ours.
LOGS = (
    (4, None, "rounded to the nearest", 0.10),
    (4, None, "reconstructed, lambda 0.01", 76.23),
    (4, None, "reconstructed, lambda 0.05", 78.24),
    (4, None, "reconstructed, lambda 0.1", 78.40),
    (4, None, "reconstructed, lambda 0.5", 78.46),
    (8, 4, "plain activations", 0.11),
    (8, 6, "plain activations", 0.11),
    (8, 8, "plain activations", 3.23),
    (8, 10, "plain activations", 75.08),
    (8, 12, "plain activations", 78.86),
    (8, 16, "plain activations", 79.32),
    (8, 8, "filter-wise shift", 79.19),
    (8, 12, "filter-wise shift", 79.33),
    (8, 16, "filter-wise shift", 79.37),
)
LOGS_FLOAT = 79.4


def named(bits_weights: int, bits_activations: int | None) -> str:
    """Such as "W8" or "W4A8"."""
    return f"W{bits_weights}" + ("" if bits_activations is None else f"A{bits_activations}")


def runs(
    trained: TrainRun = TRAINED,
    seeds: Sequence[int] = SEEDS,
    bits: Iterable[tuple[int, int | None]] = BITS,
    **changes,
) -> list[QuantizationRun]:
    """Every choice of bits with all tricks, and with each left out where it has a part, for every seed.

    Args:
        trained: whose network is quantized.
        seeds: of calibration.
        bits: of weights and of activations; None: these stay in float.
        changes: fields of `Quantization`; `BRIEF` where there are none.
    """
    found = []
    for seed in seeds:
        for weights, activations in bits:
            of_bits = dict(bits_weights=weights, seed=seed, **(changes or BRIEF))
            if activations is None:
                options = Quantization(**of_bits).weights_alone()
            else:
                options = Quantization(bits_activations=activations, **of_bits)
            found.append(QuantizationRun(trained, options))
            for trick in TRICKS:
                if trick not in options.ignored():
                    found.append(QuantizationRun(trained, dataclasses.replace(options, **{trick: False})))
    return found


def table(found: dict[QuantizationRun, dict]) -> pd.DataFrame:
    """Accuracy by bits and by what is left out, over the seeds of calibration.

    Args:
        found: records by run, of one trained network.

    Returns:
        bits (Categorical, "W8" and so on), variant (Categorical, of `VARIANTS`), seeds (how many), accuracy (mean, %),
        spread (standard deviation over seeds; nothing of one), lowest, highest, lost (points below the network in
        float) and nearest (mean, %, of weights rounded to the nearest, activations in float).
    """
    rows = []
    for run, record in found.items():
        options, accuracy = run.options, record["metrics"]["accuracy"]
        left = [trick for trick in TRICKS if not getattr(options, trick) and trick not in options.ignored()]
        stage = "activations" if options.activations else "weights"
        rows.append(
            {
                "bits": named(options.bits_weights, options.bits_activations if options.activations else None),
                "variant": f"without {' and '.join(left)}" if left else ALL,
                "accuracy": accuracy[stage],
                "float": accuracy["float"],
                "nearest": accuracy["nearest"],
            }
        )
    columns = ["bits", "variant", "accuracy", "float", "nearest"]
    every = pd.DataFrame(rows, columns=columns)
    for name, usual in (("bits", [named(*each) for each in BITS]), ("variant", list(VARIANTS))):
        every[name] = pd.Categorical(every[name], list(dict.fromkeys([*usual, *every[name]])))
    grouped = every.groupby(["bits", "variant"], observed=True)
    made = grouped["accuracy"].agg(seeds="count", accuracy="mean", spread="std", lowest="min", highest="max")
    made["lost"] = grouped["float"].mean() - made["accuracy"]
    made["nearest"] = grouped["nearest"].mean()
    return made.reset_index()


def logs() -> pd.DataFrame:
    """What the released logs say, published and not measured here: bits, variant, accuracy, lost (points), source."""
    rows = [(named(weights, activations), variant, accuracy) for weights, activations, variant, accuracy in LOGS]
    found = pd.DataFrame(rows, columns=["bits", "variant", "accuracy"])
    return found.assign(lost=(LOGS_FLOAT - found["accuracy"]).round(2), source="published, ImageNet, most likely B1")
