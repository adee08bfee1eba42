"""Few bits and secret shares together: what quantization saves a private inference, as runs, tables and sentences.

Rounds and bytes follow from shapes and are exact; accuracies are records. Prior work that joins the two is PrivQuant
(Xu et al., ICCAD 2024, arXiv 2410.09531): protocols without a dealer, whose bytes fall with the bits of weights and
activations. What is said here is of shares in Z_2^64 with a dealer, and of nothing else.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..models import cost
from ..models.config import CCTConfig, EfficientViTConfig, Network, preset
from ..models.operations import KINDS, Divide, Lookup, ShiftDivide
from ..models.vit import build
from ..private.estimation import Costs, estimate
from ..private.links import LINKS, Link
from ..private.tuned.arithmetic import ring
from ..private.tuned.gates.divide import inverse_error
from ..quantization import accelerator
from ..quantization.engine import Quantization, quantize
from ..quantization.layers import folded
from ..quantization.shares import on_shares, tabulated
from . import efficient, quantization
from .execute import Found, recorded
from .profiles import Profile, profile_of
from .runs import EvaluationRun, QuantizationRun, TrainRun, network

SOFTMAX, LINEAR = "CCT, softmax", "EfficientViT"
TABLES = 8  # bits of what activation functions read, where they are tables; a spare one makes tables of 2^9 words
# Numbers of an image up to which an activation function is a table, where only the cheap ones are: so many are dealt
# on `WAN` in the time of the three rounds that they save.
FEW = 660
SHIFTED, ALL_TABLES = "W8 or W4, log2 divisor", f"and all functions as tables of {TABLES} bits"
WAN = LINKS["WAN (Cheetah)"]


# Runs


def trainings(size: Profile, data: str, seed: int = 0) -> dict[str, TrainRun]:
    """An EfficientViT, and a CCT with softmax attention of about as many parameters."""
    if size.name == "reference":
        small = profile_of(size)
        return {LINEAR: quantization.TRAINED, SOFTMAX: small.training(data, small.config(data, "SA softmax"), seed)}
    name = "efficientvit_test" if data == "digits" else "efficientvit_micro_32"
    changes = {} if data == "digits" else {"stem_stride": 2}
    linear = size.training(data, network(name, data, **changes), seed)  # type: ignore[arg-type]
    return {LINEAR: linear, SOFTMAX: size.training(data, size.config(data, "SA softmax"), seed)}


def quantizations(size: Profile, trained: TrainRun) -> list[QuantizationRun]:
    """The table of quantization: all of it in the project's own records and on a GPU, elsewhere W8A8 and W4A8."""
    if size.name in ("smoke", "quick"):
        steps = 2 if size.name == "smoke" else 40
        brief = dict(quantization.BRIEF, iterations=steps, iterations_activations=steps, images=64)
        whole = quantization.runs(trained, quantization.SEEDS[:1], ((8, 8), (4, 8)), **brief)
        return [chosen(whole, bits) for bits in ((8, 8), (4, 8))]
    return quantization.runs(trained)


def chosen(runs: list[QuantizationRun], bits: tuple[int, int]) -> QuantizationRun:
    """The quantization to these bits of weights and activations with all tricks, first seed."""
    return next(
        run
        for run in runs
        if (run.options.bits_weights, run.options.bits_activations, run.options.activations) == (*bits, True)
        and all(getattr(run.options, name) for name in quantization.TRICKS)
    )


def evaluations(
    size: Profile, trained: Mapping[str, TrainRun], runs: list[QuantizationRun], n: int | None = None
) -> dict[str, EvaluationRun]:
    """What is run on shares, by name: in float, quantized, with tables in small layers, and the CCT.

    Of a quantized network shares keep the weights and the log2 divisor; what it reads is left in fixed point, a finer
    grid than its quantizers', but where every quantizer is a table.
    """
    of: dict[str, Any] = dict(n=n or {"smoke": 8, "quick": 16}.get(size.name, size.encrypted), batch=8)
    return {
        "float": EvaluationRun(trained[LINEAR], **of),
        "W8, log2": EvaluationRun(chosen(runs, (8, 8)), **of),
        "W4, log2": EvaluationRun(chosen(runs, (4, 8)), **of),
        f"W8, log2, tables of {TABLES} bits": EvaluationRun(chosen(runs, (8, 8)), tables=TABLES, most=FEW, **of),
        # Two images in a query: its tables weigh hundreds of megabytes an image.
        "W8A8, every quantizer": EvaluationRun(chosen(runs, (8, 8)), quantizers=True, **of | {"batch": 2}),
        SOFTMAX: EvaluationRun(trained[SOFTMAX], **of),
    }


# Tables


def on_links(found: Costs, link: Link = WAN) -> dict[str, float]:
    """Rounds, megabytes one way and the dealer's, and what a link would add for them: modelled, seconds."""
    serial = found.operations["serial_bytes"].sum()
    return {
        "rounds": found.rounds,
        "megabytes": found.bytes / 1e6,
        "dealer_megabytes": found.dealer_bytes / 1e6,
        "wan_seconds": link.seconds(found.rounds, serial),
        "dealer_wan_seconds": link.seconds(0, found.dealer_bytes),
    }


@functools.cache
@torch.random.fork_rng()
def variants(config: EfficientViTConfig, other: CCTConfig, few: int = FEW) -> dict[str, Costs]:
    """What one image costs with `tuned`, by what is done with the bits: exact, from shapes alone.

    Args:
        config: of the EfficientViT.
        other: of the CCT.
        few: numbers of an image that a function reads at most where only small ones are tables.
    """
    torch.manual_seed(0)
    images = torch.randn(4, config.channels, config.image, config.image)
    model = folded(build(config))
    brief = Quantization(reconstruction=False)
    shifted = quantize(model, images, brief)["network"]
    made: dict[str, nn.Module] = {
        "float, W8 or W4": model,  # the same operations, and so the same costs
        SHIFTED: on_shares(shifted),
        f"and small functions as tables of {TABLES} bits": tabulated(on_shares(shifted), images, TABLES, most=few),
        ALL_TABLES: tabulated(on_shares(shifted), images, TABLES),
        "and every quantizer as a table": on_shares(shifted, quantizers=True),
        SOFTMAX: build(other),
    }
    shape = (1, config.channels, config.image, config.image)
    return {name: estimate(each, shape) for name, each in made.items()}


def cost_table(config: Network, other: Network, few: int = FEW) -> pd.DataFrame:
    """`variants` with their parameters: columns parameters, rounds, megabytes, dealer_megabytes, and on a WAN."""
    assert isinstance(config, EfficientViTConfig) and isinstance(other, CCTConfig)
    counts = {True: cost.parameters(build(other)), False: cost.parameters(build(config))}
    rows = {
        name: {"parameters": counts[name == SOFTMAX], **on_links(found)}
        for name, found in variants(config, other, few).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def waits(config: Network, other: Network, link: Link) -> pd.DataFrame:
    """What a link adds to an image with each of `variants`, seconds: modelled, for `figures.dots`.

    Returns:
        Indexed by network: "dealt ahead", what the parties send each other; "dealt on the same link", with what the
        dealer has to send first.
    """
    assert isinstance(config, EfficientViTConfig) and isinstance(other, CCTConfig)
    found = {name: on_links(each, link) for name, each in variants(config, other).items()}
    ahead = {name: each["wan_seconds"] for name, each in found.items()}
    both = {name: each["wan_seconds"] + each["dealer_wan_seconds"] for name, each in found.items()}
    return pd.DataFrame({"dealt ahead": ahead, "dealt on the same link": both}).rename_axis("network")


def cost_panels(config: Network, other: Network) -> dict[str, pd.DataFrame]:
    """Rounds and megabytes of every variant by kind of operation, for `figures.stacked_kinds`."""
    assert isinstance(config, EfficientViTConfig) and isinstance(other, CCTConfig)
    panels: dict[str, dict] = {"rounds": {}, "bytes": {}}
    for name, found in variants(config, other).items():
        sums = found.operations.groupby("kind", observed=True)[["rounds", "bytes"]].sum()
        panels["rounds"][name], panels["bytes"][name] = sums["rounds"], sums["bytes"] / 1e6
    labels = {"rounds": "rounds", "bytes": "MB one way"}
    return {
        labels[name]: pd.DataFrame(rows).T.reindex(columns=[k for k in KINDS if k in pd.DataFrame(rows).index])
        for name, rows in panels.items()
    }


class _Alone(nn.Module):
    """An operation as a network: of all it is given, or of two parts of it, the first column and the rest."""

    def __init__(self, operation: nn.Module, two: bool = False):
        super().__init__()
        self.operation, self.two = operation, two

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x[..., 1:], x[..., :1]) if self.two else self.operation(x)


def _of_one(module: nn.Module, rows: int, columns: int, two: bool = False) -> Costs:
    """What one operation costs; the answer's last message is left out."""
    table = estimate(_Alone(module, two), (1, 1, rows, columns)).operations
    return Costs(table[table["layer"] == "operation"])


def functions(bits: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10), count: int = 1 << 15) -> pd.DataFrame:
    """What a hard-swish costs, by a curve and by tables of so many bits: per number, exact.

    Returns:
        columns series (Categorical), bits, rounds, bytes (one way), dealer_bytes, wan_us (microseconds that `WAN` takes
        for both, the rounds aside).
    """
    curve = _of_one(nn.Hardswish(), 1, count)
    rows = []
    for each in bits:
        table = _of_one(Lookup("hardswish", each - 1, 2.0**-4, 2 ** (each - 2)), 1, count)
        rows += [("a curve", each, curve), ("a table", each, table)]
    made = [
        {
            "series": series,
            "bits": each,
            "rounds": found.rounds,
            "bytes": found.bytes / count,
            "dealer_bytes": found.dealer_bytes / count,
            "wan_us": 1e6 * (found.bytes + found.dealer_bytes) / count / WAN.bandwidth,
        }
        for series, each, found in rows
    ]
    table = pd.DataFrame(made)
    table["series"] = pd.Categorical(table["series"], ["a curve", "a table"])
    return table


def divisors(tokens: int = 64, head: int = 8) -> pd.DataFrame:
    """A division of a head's values by their sums, by a reciprocal and by a shift: rounds and bytes, exact; error.

    `error` is the largest relative one: of the shift by definition, in the clear; of the reciprocal that of its gate,
    within its octaves, but for the last truncation.
    """
    b = torch.logspace(-2, 2, 999, 2, dtype=torch.float64)
    error = float((ShiftDivide(eps=0.0)(b, b) - 1).abs().max())
    rows = {}
    for name, module, off in (("reciprocal", Divide(), inverse_error()), ("log2 divisor", ShiftDivide(), error)):
        found = _of_one(module, tokens, 1 + head, two=True)
        rows[name] = {
            "rounds": found.rounds,
            "bytes": found.bytes,
            "dealer_bytes": found.dealer_bytes,
            "error": off,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("division")


# Kinds that are products alone, whose words would be half as long in a ring of 32 bits.
PRODUCTS = ("tokenizer", "projection", "scores", "values", "MLP", "pooling", "head")


def small_ring(config: Network, other: Network) -> pd.DataFrame:
    """What linear layers would send in a ring of 32 bits, in which 8-bit products fit: modelled, not implemented.

    A product of 8-bit numbers summed over n of them takes 16 + log2 n bits, so that 32 hold sums of 65,536. The words
    of what is opened for products are then half as long, online and the dealer's. What is no table has to come back to
    64 bits, and so do divisions and LayerNorm where all functions are tables: a share of 32 bits becomes one of 64 only
    with the carry between the parties, a comparison of two rounds at least, which is not counted here.
    """
    assert isinstance(config, EfficientViTConfig) and isinstance(other, CCTConfig)
    rows = {}
    for name in (SHIFTED, ALL_TABLES):
        found = variants(config, other)[name]
        table = found.operations
        linear = table[table["kind"].isin(PRODUCTS)]
        saved, dealt = linear["bytes"].sum() / 2, linear["offline_bytes"].sum() / 2
        rows[name] = {
            "megabytes": found.bytes / 1e6,
            "megabytes_32": (found.bytes - saved) / 1e6,
            "dealer_megabytes": found.dealer_bytes / 1e6,
            "dealer_megabytes_32": (found.dealer_bytes - dealt) / 1e6,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def products(rows: int = 256, inner: int = 256, columns: int = 256, repeats: int = 20) -> pd.DataFrame:
    """Milliseconds of a matrix product by a weight of 8 bits, in Z_2^64 and in Z_2^32, here: the median of some.

    In Z_2^32 an activation's 32 bits times a weight's 8, 256 of them summed, fit the 53 bits of one float64 product;
    in Z_2^64 `ring.product` cuts the activation into limbs, where the processor does not multiply int64 by itself.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**62), 2**62, (rows, inner), generator=generator)
    weight = torch.randint(-128, 128, (inner, columns), generator=generator)
    ready, exact = ring.Factor(weight, 9), weight.double()
    low = x & 2**32 - 1

    def narrow() -> torch.Tensor:
        return (low.double() @ exact).long() & 2**32 - 1

    whole32, weight32 = x.int(), weight.int()
    ways = {
        "Z_2^64": lambda: ring.product(x, ready),
        "Z_2^32, float64": narrow,
        "Z_2^32, int32": lambda: whole32 @ weight32,
    }
    found, wanted = {}, ring.product(x, ready) & 2**32 - 1
    for name, way in ways.items():
        assert torch.equal(way().long() & 2**32 - 1, wanted), name
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            way()
            spent.append(time.perf_counter() - start)
        found[name] = {"milliseconds": 1e3 * sorted(spent)[repeats // 2]}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("ring")


def answers(runs: Mapping[str, EvaluationRun], found: Found) -> pd.DataFrame:
    """Accuracy in the clear and on shares (%), agreement, the largest error of a logit; rounds of a query.

    And of an image, in a query of as many as its run has: MB one way, seconds of wall time on loopback.
    """
    rows = {}
    for name, run in runs.items():
        if run not in found:
            continue
        metrics = found[run]["metrics"]
        rows[name] = {
            "images": metrics["images"],
            "clear": metrics["clear_accuracy"],
            "shares": metrics["private_accuracy"],
            "agreement": metrics["agreement"],
            "largest_error": metrics["largest_error"],
            "rounds": metrics["rounds"],
            "megabytes": metrics["bytes"] / 1e6 / run.batch,
            "seconds": metrics["seconds"] / run.batch,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def beside(size: Profile, plan: Mapping[str, TrainRun], source: str = "local", nearest: int = 3) -> pd.DataFrame:
    """The EfficientViT, the CCT of as many parameters, and the CCTs on record of the nearest accuracy, whatever theirs.

    Args:
        size: whose trainings of notebook 06 are looked at; none is made.
        plan: `trainings`.
        source: of records, as in `execute.collect`.
        nearest: how many of these CCTs.

    Returns:
        indexed by network: accuracy (%), epochs, parameters, and the columns of `on_links`, exact; sorted by accuracy.
    """
    data = plan[LINEAR].data
    others = {f"CCT, {row}": run for (_, row), run in efficient.plan(profile_of(size), [data]).items()}
    found = recorded([*plan.values(), *others.values()], source)
    accuracy = {run: record["metrics"]["test_accuracy"] for run, record in found.items()}
    if plan[LINEAR] not in accuracy:
        return pd.DataFrame()
    others = {name: run for name, run in others.items() if run in accuracy and run != plan[SOFTMAX]}
    near = sorted(others, key=lambda name: abs(accuracy[others[name]] - accuracy[plan[LINEAR]]))[:nearest]
    rows = {}
    for name, run in {**plan, **{name: others[name] for name in near}}.items():
        if run not in accuracy:
            continue
        model = build(run.network)
        facts = {"accuracy": accuracy[run], "epochs": run.recipe.epochs, "parameters": cost.parameters(model)}
        if name == LINEAR:
            model = folded(model)
        costs = estimate(model, (1, run.network.channels, run.network.image, run.network.image))
        rows[name] = {**facts, **on_links(costs)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network").sort_values("accuracy")


# Sentences


def said_of_trainings(plan: Mapping[str, TrainRun], found: Found) -> str:
    """Markdown: parameters of each network, and its test accuracy where it is on record."""
    lines = []
    for name, run in plan.items():
        said = (
            f"**{name}** on {run.data}: {cost.parameters(build(run.network)):,} parameters, {run.recipe.epochs} epochs"
        )
        if run in found:
            said += f", {found[run]['metrics']['test_accuracy']:.1f} % of test images"
        lines.append(f"- {said}.")
    return "\n".join(lines)


def said_of_quantization(table: pd.DataFrame) -> str:
    """Markdown: what all tricks leave of the accuracy at each choice of bits, and which one matters most."""
    lines = []
    for bits, part in table.groupby("bits", observed=True):
        part = part.set_index("variant")
        if quantization.ALL not in part.index:
            continue
        whole = part.loc[quantization.ALL]
        lost = f"{abs(whole['lost']):.1f} points {'below' if whole['lost'] > 0 else 'above'} float"
        said = f"- **{bits}**: {whole['accuracy']:.1f} %, {'as float' if abs(whole['lost']) < 0.05 else lost}"
        rest = part.drop(quantization.ALL)
        if len(rest):
            worst = rest["accuracy"].idxmin()
            said += f"; {worst} {rest['accuracy'].min():.1f} %"
        lines.append(said + ".")
    return "\n".join(lines)


def said_of_answers(table: pd.DataFrame) -> str:
    """Markdown: how often shares answer as the clear network does."""
    return "\n".join(
        f"- **{name}**: {row['shares']:.1f} % on shares, {row['clear']:.1f} % in the clear; the same answer for "
        f"{row['agreement']:.1f} % of {row['images']:.0f} images."
        for name, row in table.iterrows()
    )


# The accelerator


def machine(name: str = "efficientvit_b1", images: tuple[int, ...] = (224, 256, 288)) -> pd.DataFrame:
    """What the model of Trio-ViT's accelerator says of a published network, by side of its images: modelled."""
    rows = {}
    for side in images:
        with torch.device("meta"):
            rows[side] = accelerator.totals(accelerator.backbone(accelerator.cycles(build(preset(name, image=side)))))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")


def machine_layers(name: str = "efficientvit_b1") -> pd.DataFrame:
    """Every product of a published network on the accelerator, the classifier aside: modelled."""
    with torch.device("meta"):
        return accelerator.backbone(accelerator.cycles(build(preset(name))))
