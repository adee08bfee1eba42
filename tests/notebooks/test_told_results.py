"""What the page of results says in words, against the project's own records."""

import json

from prose import held
from told import ON_LOOPBACK, ROOT, SIZE, benchmark, variants

from salvit_core.experiments import efficient, execute, latency, published, store
from salvit_core.experiments.runs import QuantizationRun, SearchRun, TrainRun, run_of


def test_results_tell_what_is_on_record():
    """What the page says in words beside its tables."""
    found = {protocol: published.variants()[f"{protocol} ratio"] for protocol in ("stock", "tuned")}
    hybrid = [each["SAL-ViT B=3"] for each in found.values()]
    table = published.variants()
    complete = [table[f"{name} s"]["SAL-ViT B=3"] / table[f"{name} s"]["SA softmax"] for name in found]
    pair = (each["EA 2Quad"] / each["SA 2Quad"] for each in found.values())
    layer = published.table_2()
    slow = layer.loc["Hamburger"]
    fast = {name: f"{value:.2f}" for name, value in layer["tuned ratio"].items()}
    free, paid = efficient.resolution_runs(SIZE)
    grown, bought = (execute.recorded(each.values(), "reference") for each in (free, paid))
    growth = efficient.growth(free, grown, paid, bought)
    at = growth[growth["tokens"] == 784].set_index("series")["private_s"]
    stock, tuned = (
        {
            name: float(benchmark(name, f"SAL-ViT B=3 | {protocol}")[0].split()[0])
            for name in ("private", "private_xeon")
        }
        for protocol in ("stock", "tuned")
    )
    what_if = [float(benchmark("private", f"stock{more}")[0]) for more in ("", ", a reciprocal that holds")]
    assert round(what_if[0] - what_if[1], 1) == 0
    assert round(at["SA softmax"] / at["Performer"]) == 19  # "a nineteenth"
    held(
        "results.md",
        f"`stock` ({hybrid[0]:.2f} at B = 3, paper 0.50; {complete[0]:.2f} with LayerNorm)",
        f"two fifths with `tuned` ({hybrid[1]:.2f}; {complete[1]:.2f})",
        f"{next(pair):.2f} of the time of self-attention with `stock`",
        f"and {next(pair):.2f} with `tuned`",
        f"{slow['stock ratio']:.1f} and {slow['tuned ratio']:.1f} times the cost of softmax attention",
        f"CosFormer takes {fast['CosFormer']} of softmax attention's time with `tuned`, Performer with ReLU "
        f"{fast['Performer ReLU']}, SOFT {fast['SOFT']}, Performer {fast['Performer']}, "
        f"Nystromformer {fast['Nystromformer']}",
        f"stock takes {stock['private_xeon'] / stock['private']:.1f} times and tuned "
        f"{tuned['private_xeon'] / tuned['private']:.1f} times as long",
        "each of 8 takes {} of one alone".format(benchmark("private", ON_LOOPBACK)[-1]),
        f"costs it nothing ({what_if[1]:.1f} s with it and without)",
    )


def test_what_came_out_is_on_record():
    """The first words of the page of results; what they say of a search is in `test_trained_conclusions`."""
    table = published.variants()
    right = latency.answers(variants_of("tuned"))["faithful"]
    assert right.all() and len(right) == 13
    sooner, seconds, wan = table["stock s"] / table["tuned s"], table["tuned s"], table["WAN s"]
    three = ["SA softmax", "SA L2Q", "EA softmax"]
    assert seconds["EA L2Q"] < seconds["SAL-ViT B=3"] < seconds["SA L2Q"]  # "lies between"
    assert wan["SA L2Q"] < wan["EA softmax"] < wan["SA softmax"]  # "on a WAN more"
    quad, hybrid = table.loc["SA 2Quad"], table.loc["SAL-ViT B=3"]
    both = [
        f"{row['tuned s']:.2f} s, {row['tuned rounds']} rounds and {row[dealt]:.0f} MB"
        for dealt in ["dealer's MB"]
        for row in (quad, hybrid)
    ]
    ours = published.accuracies()
    small, large = (ours[of]["mean"] for of in ("small network", "CCT-7/3x1"))
    held(
        "results.md",
        f"{sooner.min():.1f} to {sooner.max():.1f} times sooner",
        "takes {:.2f} s, self-attention with L2Q {:.2f} and external attention with softmax {:.2f}".format(
            *seconds[three]
        ),
        "(modelled) they take {:.1f}, {:.1f} and {:.1f} s.".format(*wan[three]),
        f"take {seconds['EA L2Q']:.2f} s, and a SAL-ViT with B = 3 lies between, {hybrid['tuned s']:.2f}.",
        f"Self-attention with it takes {both[0]} from a dealer, where SAL-ViT with B = 3 takes {both[1]};",
        f"on the WAN {quad['WAN s']:.1f} s for {hybrid['WAN s']:.1f}.",
        f"it sends {quad['tuned MB'] - hybrid['tuned MB']:.0f} MB more",
        f"{small['SA 2Quad']:.2f} % for {small['SAS-L B=3']:.2f} in the small network, {large['SA 2Quad']:.2f} for "
        f"{large['SAS-L B=3']:.2f} in CCT-7/3x1",
        f"takes {seconds['SA scaling']:.2f} s with self-attention in every layer, and has {small['SA scaling']:.2f} %",
    )
    kept: dict[type, list[int]] = {TrainRun: [], SearchRun: [], QuantizationRun: []}
    every = []
    for record in store.load("encrypted", "reference"):
        run = run_of(record)
        of = run.trained.trained if isinstance(run.trained, QuantizationRun) else run.trained
        if run.protocol == "tuned" and run.n == 256 and of.data == "cifar10":
            agreeing = every if run.quantizers else kept[type(run.trained)] if not run.tables else []
            agreeing.append(round(record["metrics"]["agreement"] * 2.56))
    assert kept == {TrainRun: [256] * 8, SearchRun: [256], QuantizationRun: [255] * 2} and len(every) == 1
    held("results.md", "each of the nine networks", f"with every quantizer as a table one gives it to {every[0]},")


def variants_of(protocol):
    """The records of one protocol."""
    return {run: record for run, record in variants().items() if run.protocol == protocol}


def test_what_is_said_of_training_s_speed_is_measured():
    report = json.loads((ROOT / "data" / "reference" / "benchmarks" / "training.json").read_text())
    rows = report["rows"]
    assert len(rows) == 6 and report["run"]["bf16"] and {len(row["turns"]) for row in rows} == {3}
    rates = report["matmul_flop_per_second"]
    assert rates["bfloat16"] > rates["float32"]
    for recipe, ours in zip(rows[::2], rows[1::2], strict=True):
        assert recipe["row"] == ours["row"] and recipe["highest"] < ours["lowest"]
    assert 2.5 < max(row["highest"] / row["lowest"] for row in rows) < 3
    held("results.md", "medians of 3 turns", "differ by up to three times")
