"""What the page of results says in words, against the project's own records."""

from prose import held
from told import ON_LOOPBACK, SIZE, benchmark, variants

from salvit_core.experiments import efficient, execute, latency, published, store
from salvit_core.experiments.runs import QuantizationRun, SearchRun, TrainRun, run_of


def test_results_tell_what_is_on_record():
    """What the page says in words beside its tables."""
    found = {protocol: published.variants()[f"{protocol} ratio"] for protocol in ("stock", "tuned")}
    hybrid = (each["SAL-ViT B=3"] for each in found.values())
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
    assert round(at["SA softmax"] / at["Performer"]) == 19  # "a nineteenth"
    held(
        "results.md",
        "({:.2f} and {:.2f} at B = 3; paper 0.50)".format(*hybrid),
        f"{next(pair):.2f} of the time of self-attention with `stock`",
        f"and {next(pair):.2f} with `tuned`",
        f"{slow['stock ratio']:.1f} and {slow['tuned ratio']:.1f} times the cost of softmax attention",
        f"CosFormer takes {fast['CosFormer']} of softmax attention's time with `tuned`, Performer with ReLU "
        f"{fast['Performer ReLU']}, SOFT {fast['SOFT']}, Performer {fast['Performer']}, "
        f"Nystromformer {fast['Nystromformer']}",
        f"stock takes {stock['private_xeon'] / stock['private']:.1f} times and tuned "
        f"{tuned['private_xeon'] / tuned['private']:.1f} times as long",
        "each of 8 takes {} of one alone".format(benchmark("private", ON_LOOPBACK)[-1]),
        f"in {what_if[1]:.1f} s for {what_if[0]:.1f}",
    )


def test_what_came_out_is_on_record():
    """The first words of the page of results; what they say of a search is in `test_trained_conclusions`."""
    table = published.variants()
    right = latency.answers(variants_of("tuned"))["faithful"]
    sooner, ratio = table["stock s"] / table["tuned s"], table["tuned s"] / table["tuned s"]["SA softmax"]
    ours = {name: f"{table['tuned ratio'][name]:.2f}" for name in ("SA L2Q", "SA 2Quad", "EA L2Q", "SAL-ViT B=3")}
    assert right.all() and len(right) == 13 and ratio["SA L2Q"] < 0.6
    kept: dict[type, list[int]] = {TrainRun: [], SearchRun: [], QuantizationRun: []}
    for record in store.load("encrypted", "reference"):
        run = run_of(record)
        of = run.trained.trained if isinstance(run.trained, QuantizationRun) else run.trained
        if run.protocol == "tuned" and run.n == 256 and of.data == "cifar10" and not (run.tables or run.quantizers):
            kept[type(run.trained)].append(round(record["metrics"]["agreement"] * 2.56))
    assert kept == {TrainRun: [256] * 8, SearchRun: [256], QuantizationRun: [255] * 2}
    held(
        "results.md",
        f"{sooner.min():.1f} to {sooner.max():.1f} times sooner",
        f"L2Q takes {ours['SA L2Q']} of softmax's time, 2Quad {ours['SA 2Quad']}; external attention in every layer, "
        f"with L2Q, takes {ours['EA L2Q']}, and a SAL-ViT with B = 3 lies between, {ours['SAL-ViT B=3']}",
        "each of the nine networks",
    )


def variants_of(protocol):
    """The records of one protocol."""
    return {run: record for run, record in variants().items() if run.protocol == protocol}
