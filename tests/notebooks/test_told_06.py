"""What notebook 06 concludes, and what its exercise solves, against the project's own records."""

import pytest
import torch
from prose import held
from told import FULL, SIZE

from salvit_core import preset
from salvit_core.experiments import efficient, execute, profiles, published, store
from salvit_core.models.operations import NewtonInverse, PseudoInverse
from salvit_core.models.vit import build
from salvit_core.private.estimation import estimate


def test_06_concludes_what_is_on_record():
    table = published.mechanisms()
    accuracy, seconds, rounds = table["accuracy (%)"], table["private (s)"], table["rounds"]
    assert len(table) == 18 and accuracy.idxmax() == "Linformer, heads" and seconds.idxmin() == "SA L2Q"
    assert accuracy.idxmin() == "EA softmax" and set(table["MFLOPs"].nsmallest(2).index) == {"EA softmax", "EA L2Q"}
    order = table[["MFLOPs", "private (s)"]].rank()
    moved = order["private (s)"] - order["MFLOPs"]
    assert moved.idxmax() == "EA softmax" and moved.max() == pytest.approx(8, abs=0.5)
    assert moved.nsmallest(2).to_dict() == {"SA L2Q": -9, "CosFormer": -8}
    heads, plain = "Linformer, heads", "Linformer"
    held(
        "06",
        f"{accuracy[heads]:.1f} % where softmax attention has {accuracy['SA softmax']:.1f} %",
        f"no longer on shares, {seconds[heads]:.2f} s for its {seconds['SA softmax']:.2f} s, in as many rounds",
        f"({seconds['SA L2Q']:.2f} s, {accuracy['SA L2Q']:.1f} %)",
        f"hardly slower ({seconds['ReLU linear']:.2f} s) and has {accuracy['ReLU linear']:.1f} %",
        f"the lowest accuracy, {accuracy['EA softmax']:.1f} %",
        f"correlate by {order.corr().iloc[0, 1]:.2f}",
        f"Hamburger has {rounds['Hamburger']:,.0f}, Nystromformer {rounds['Nystromformer']:.0f}, SOFT "
        f"{rounds['SOFT']:.0f}, where Linformer has {rounds[plain]:.0f}",
    )
    times = seconds / seconds["SA softmax"]
    held("results.md", f"take {times['Nystromformer']:.1f} and {times['Hamburger']:.1f} times as long on shares")
    assert rounds[heads] == rounds["SA softmax"]
    far, low = seconds + 0.02 * rounds, "Linformer L2Q"
    assert far.idxmin() == rounds.idxmin() == "SA L2Q" and far.nsmallest(2).index[1] == low
    assert far[heads] < far["SA softmax"]
    best = far.idxmin()
    held(
        "06",
        f"{seconds[best]:.2f} + {rounds[best]:.0f} x 0.02 = {far[best]:.1f} s and has {accuracy[best]:.1f} %",
        f"Linformer L2Q ({rounds[low]:.0f}) takes {far[low]:.1f} s and has {accuracy[low]:.1f} %",
        f"takes {far[heads]:.1f} s for the highest accuracy, {accuracy[heads]:.1f} %",
        f"takes {far['SA softmax']:.1f} s for {accuracy['SA softmax']:.1f} %",
    )


def test_06_concludes_of_resolution_what_is_on_record():
    free, paid = efficient.resolution_runs(SIZE)
    grown, bought = (execute.recorded(each.values(), "reference") for each in (free, paid))
    growth = efficient.growth(free, grown, paid, bought)
    said = efficient.said_of_growth(growth)
    for name, clear, shares in (
        ("CosFormer", 256, 64),
        ("EA softmax", 64, 64),
        ("Linformer", 64, 64),
        ("Performer", 256, 256),
    ):
        told = f"**{name}** is faster than SA softmax from {clear} tokens in the clear, from {shares} tokens on shares"
        assert told in said
    for name in ("Nystromformer", "Hamburger", "SOFT"):
        assert f"**{name}** is faster than SA softmax from 784 tokens in the clear." in said
    assert "**Dilated hybrid** is faster than SA softmax from 256 tokens in the clear." in said
    paid = growth[growth["tokens"] == 64].set_index("series")["private_s"]
    assert (abs(paid[["EA softmax", "Linformer"]] / paid["SA softmax"] - 1) < 0.05).all()  # by a hair
    assert growth.dropna(subset=["private_s"])["tokens"].max() == 784
    assert "SOFT at 64, 256, 784, 3136" in said
    held("06", "Linformer are faster than softmax attention from 64 tokens on", "256, 64, 64 and 256 tokens")
    layers, networks = efficient.table_2_runs(SIZE)
    found = [execute.recorded(each.values(), "reference") for each in (layers, networks)]
    soft = efficient.table_2(layers, found[0], networks, found[1]).loc["SOFT"]
    steps = [steps_of("SOFT", NewtonInverse, 20), steps_of("Nystromformer", PseudoInverse, 6)]
    held(
        "06",
        f"take {steps[0][0]} of its rounds with `tuned`, four each",
        f"and {steps[0][1]:.0f} of its {soft['tuned mb']:.0f} MB",
        f"6 steps take {steps[1][0]}.",
    )
    held("results.md", f"take {steps[0][0]} of its {soft['tuned rounds']:.0f} rounds")


def steps_of(row, kind, steps):
    """What an attention's iterations take with `tuned` at the paper's shape: rounds and MB one way."""
    config, found = preset(FULL, row), []
    for count in (steps, 1):
        with torch.device("meta"):
            attention = build(config).blocks[0].attention.eval()
        for part in attention.modules():
            if isinstance(part, kind):
                part.iterations = count
        found.append(estimate(execute._Alone(attention), (1, 1, config.tokens, config.width)))
    more = found[0].rounds - found[1].rounds, found[0].bytes - found[1].bytes
    return more[0] * steps // (steps - 1), more[1] * steps / (steps - 1) / 1e6


def test_06_says_what_its_maps_lack(monkeypatch):
    plan = efficient.plan(profiles.profile_of(SIZE), ["cifar10"])
    here = len([run for (_, m), run in plan.items() if m[:2] != "EA" and store.path(run, "reference", ".pt").exists()])
    assert here > 0
    said = efficient.said_of_absent_maps(plan, "cifar10", "reference")
    assert said.startswith(f"No maps: weights of {here} networks are on record, the images of cifar10 are not here.")
    assert "no weights of these networks" in efficient.said_of_absent_maps({}, "cifar10", "reference")
    monkeypatch.setattr(efficient, "_images", lambda data, source: True)
    assert len(efficient.with_weights(plan, "cifar10", "reference")) == here
