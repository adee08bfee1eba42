"""What notebook 05 concludes, and what its exercise solves, against the project's own records."""

import functools
import math

from prose import held
from told import FULL, SIZE

from salvit_core.experiments import encrypted, execute, store
from salvit_core.experiments.runs import DriftRun, EvaluationRun, QuantizationRun, run_of
from salvit_core.private.tuned.gates.normalise import L1_SUM


@functools.cache
def answers():
    plan = encrypted.evaluations(
        encrypted.networks(SIZE, "cifar10", "SAL-ViT B=2"), SIZE.encrypted, 4, False, "SAL-ViT B=2"
    )
    plan |= encrypted.besides(plan, "reference")
    found = execute.recorded(plan.values(), "reference")
    trained = execute.recorded([run.trained for run in found], "reference")
    return plan, found, encrypted.answers(plan, found, trained)


def test_05_concludes_what_is_on_record():
    plan, found, table = answers()
    tuned, stock = table[table["protocol"] == "tuned"], table[table["protocol"] == "stock"].iloc[0]
    assert len(tuned) == 9 and (tuned["images"] == 256).all() and (tuned["agreement"] == 100).all()
    assert (tuned["clear"] == tuned["on shares"]).all()
    assert stock["method"] == "SA L2Q" and stock["images"] == 4 and stock["agreement"] == 25
    size = tuned["clear logits"]
    held(
        "05",
        f"agree on {tuned['images'].sum():,} of {tuned['images'].sum():,} images",
        f"err by at most {tuned['largest logit error'].max():.3f}, where",
        f"a mean size of {size.min():.1f} to {size.max():.1f}",
        f"off by {stock['mean logit error']:.2g} on average. Of 4 images 1 has",
        f"{tuned['clear'].min():.1f} to {tuned['clear'].max():.1f} % of these images",
        f"not one of {tuned['images'].sum():,} answers differs",
    )
    tight = encrypted.tightest(encrypted.ranges(plan, found)).reset_index()
    least = tight.loc[tight["margin"].idxmin()]
    large = tight[tight["method"] == f"{FULL} SAL-ViT B=3"].iloc[0]
    assert (least["method"], least["what"]) == ("cct 4x64 32px self softmax", "spreads of scores")
    assert least["place"] == "blocks.3.attention.normalizer" and large["place"] == "blocks.0.mlp.activation"
    held(
        "05",
        f"than a factor of {least['margin']:.1f}: how far",
        f"{least['high']:.0f} of {least['most']:.0f}",
        f"{large['high']:.1f} of {large['most']:.0f}, a factor of {large['margin']:.1f}",
    )
    sums = tight[tight["place"].str.endswith(".l1")].iloc[0]
    assert sums["method"] == "EA L2Q, seed 1" and math.log2(sums["least"]) == L1_SUM[0]
    held(
        "05",
        f"a sum of 2^{math.log2(sums['low']):.1f}, within a factor of {sums['low'] * 2**10:.1f} of where",
        f"begins at 2^{L1_SUM[0]} since, and the margin is {sums['margin']:.1f}",
    )
    said = encrypted.said_of_the_answer(table)
    assert "2304 of 2304 images" in said and "1 of 4 images" in said and "noise comes out of SA L2Q" in said


def test_05_concludes_of_precision_what_is_on_record():
    network = encrypted.networks(SIZE, "cifar10", "SAL-ViT B=2")["SA L2Q"]
    drift = encrypted.drift(execute.recorded([DriftRun(network, 4, p) for p in ("stock", "tuned")], "reference"))
    part = drift.assign(part=drift["error"] / drift["scale"])
    lost = part[(part["series"] == "stock") & (part["part"] > 0.5)]
    assert lost["node"].iloc[0] == "blocks.0.attention.normalizer"
    tuned = part[part["series"] == "tuned"].set_index("node")["part"]
    assert tuned.max() < 0.004
    held("05", f"{tuned['blocks.0.norm1']:.2%}".replace("%", " %") + " of it after the first LayerNorm")
    held("05", f"{tuned['norm']:.2%}".replace("%", " %") + " after the last")
    sweep = encrypted.precision_runs(network, range(10, 21, 2))
    table = encrypted.precision(sweep, execute.recorded(sweep.values(), "reference"))
    bits = table[table["series"] == "tuned"].set_index("fractional bits")
    assert (bits["images"] == 16).all() and (bits.loc[10:18, "agreement"] == 100).all()
    assert bits.loc[20, "agreement"] == 100 * 15 / 16
    assert (table.loc[table["series"] == "stock", "mean_error"] > 1e6).all()
    error = bits["mean_error"]
    held(
        "05",
        f"err by {error[10]:.4f} on average with 10 and {error[18]:.4f} with 18",
        f"({error[20]:.2g} on average)",
    )


def test_05_solution():
    config = encrypted.networks(SIZE, "cifar10", "SAL-ViT B=2")["SA L2Q"].network
    assert (config.layers, config.heads, config.tokens, config.width) == (4, 4, 64, 64)
    maps = config.layers * config.tokens * 4 * config.width
    scores = config.layers * config.heads * config.tokens**2
    assert maps + scores == 2**17
    held("05", f"{maps:,}; scores", f"= {scores:,}; together {maps + scores:,}", f"or {2.0 ** (17 - 32):.1e}")
    for bits, power in ((13, 32), (20, 18)):
        assert 2 * bits + 6 - 64 == -power
        held("05", f"2^{{{2 * bits + 6} - 64}} = 2^{{-{power}}}")


def test_05_leaves_no_trained_network_on_record_out():
    """What `besides` adds are networks that were trained, each with a protocol's own precision."""
    every = [run_of(record) for record in store.load("encrypted", "reference")]
    plan, *_ = answers()
    shown = set(plan.values())
    for run in every:
        assert isinstance(run, EvaluationRun)
        elsewhere = isinstance(run.trained, QuantizationRun) or run.trained.data != "cifar10"  # notebooks 07 and 00
        assert run in shown or run.bits is not None or run.tables is not None or elsewhere
    assert encrypted.besides(plan, "local") == {}
