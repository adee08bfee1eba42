"""Attention replaced: what accuracy is kept, what pruning leaves, and what it costs in the clear and on shares."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import workspace
from ..fields import Checked, Count, CountOrNone, Share
from ..models import cost, maps
from ..models.config import TransformerConfig
from ..models.vit import build
from ..private.links import LINKS, Link
from ..replacement.distillation import Distillation
from ..replacement.pruning import Pruning, shaped
from . import store
from .profiles import Profile, profile_of
from .runs import ClearRun, PrivateRun, ReplacementRun, SearchRun, TrainRun, replaced_config

# Mechanisms and what they are called here. "standard" is attention as the teacher has it, its three matrices drawn
# anew: what the three stages do by themselves.
NAMES = {
    "standard": "attention, drawn anew",
    "multi_lstm": "multi-head BiLSTM",
    "grid_lstm": "rows and columns",
    "parallel_scan": "parallel scan",
    "lstm": "one BiLSTM",
    "mixer": "mixer",
}
# What they are beside on shares, rows of the tables.
BESIDE = ("SA softmax", "SA L2Q", "EA softmax", "ReLU linear")
# The same in the teacher's attention's place, as a mechanism and its normaliser: trained as the others are.
ALIKE = {"SA L2Q": ("standard", "l2q"), "EA softmax": ("external", None), "ReLU linear": ("relu_linear", None)}


@dataclass(frozen=True)
class Sizes(Checked):
    """How big the study is in one profile.

    Attributes:
        mechanisms: what replaces attention, keys of `NAMES` or `ALIKE`.
        seeds: of teachers and replacements.
        teacher: epochs of the teacher.
        stages: epochs of the replacements, of the blocks, of the head.
        pruned: shares of the hidden units of "multi_lstm" that are pruned.
        pruning: epochs with the regulariser, and of fine-tuning after it.
    """

    mechanisms: tuple[str, ...]
    seeds: Count
    teacher: Count
    stages: tuple[CountOrNone, ...]
    pruned: tuple[Share, ...]
    pruning: tuple[Count, ...]


SIZES = {
    "smoke": Sizes(("multi_lstm",), 1, 2, (1, 1, 1), (0.5,), (1, 1)),
    "quick": Sizes(("standard", "multi_lstm", "grid_lstm", "parallel_scan"), 1, 6, (3, 1, 1), (0.5,), (1, 1)),
    # CIFAR-10, 15,000 images, two cores.
    "reference": Sizes((*NAMES, *ALIKE), 3, 20, (6, 4, 1), (0.25, 0.5, 0.75), (3, 3)),
    "short": Sizes((*NAMES, *ALIKE), 1, 30, (15, 10, 3), (0.25, 0.5, 0.75), (5, 5)),
    "paper": Sizes((*NAMES, *ALIKE), 3, 600, (200, 100, 30), (0.25, 0.5, 0.75), (100, 100)),
}
RATES = {"attention": 1.0, "blocks": 0.25, "head": 0.25}  # of each stage, in the profile's learning rate

Plan = dict[tuple[str, float, int], ReplacementRun]  # mechanism, share pruned, seed


def teacher(size: Profile, data: str, seed: int = 0) -> TrainRun:
    """The network whose attention is replaced: the profile's CCT with softmax attention."""
    small = profile_of(size)
    return small.training(data, small.config(data, "SA softmax"), seed=seed, epochs=SIZES[size.name].teacher)


def distillation(size: Profile, by: str, seed: int = 0, **changes) -> Distillation:
    """The three stages in a profile's sizes; `changes` are fields of `Distillation`."""
    recipe, epochs = profile_of(size).recipe, SIZES[size.name].stages
    stages = {
        name: dataclasses.replace(recipe, epochs=count, lr=rate * recipe.lr) if count else None
        for (name, rate), count in zip(RATES.items(), epochs, strict=True)
    }
    mechanism, normalizer = ALIKE.get(by, (by, None))
    return Distillation(mechanism, seed=seed, normalizer=normalizer, **{**stages, **changes})


def plan(size: Profile, data: str, seed: int = 0) -> Plan:
    """The replacements, by mechanism, share that is pruned and seed, from `seed` on."""
    sizes, recipe = SIZES[size.name], profile_of(size).recipe
    made: Plan = {}
    for each in range(seed, seed + sizes.seeds):
        taught = teacher(size, data, each)
        for by in sizes.mechanisms:
            made[by, 0.0, each] = ReplacementRun(taught, distillation(size, by, each))
        parts = [dataclasses.replace(recipe, epochs=count, lr=RATES["blocks"] * recipe.lr) for count in sizes.pruning]
        for share in sizes.pruned:
            pruning = Pruning(share=share, sparsify=parts[0], finetune=parts[1], seed=each)
            made["multi_lstm", share, each] = dataclasses.replace(made["multi_lstm", 0.0, each], pruning=pruning)
    return made


# Accuracy kept


def accuracies(made: Plan, found: Mapping[ReplacementRun, dict]) -> pd.DataFrame:
    """One row per replacement on record that is not pruned, and one per teacher.

    Returns:
        columns dataset, variant (a category), seed, accuracy (%), kept (points above the teacher), after_attention and
        after_blocks (%), parameters, seconds.
    """
    rows: list[dict] = []
    names = ["teacher", *NAMES.values(), *ALIKE]
    for (by, share, seed), run in made.items():
        if share or run not in found:
            continue
        facts = found[run]["metrics"]
        after = {f"after_{name}": stage["test_accuracy"] for name, stage in facts["stages"].items() if name != "head"}
        row = {"dataset": run.data, "variant": NAMES.get(by, by), "seed": seed, "accuracy": facts["test_accuracy"]}
        row |= {"kept": facts["test_accuracy"] - facts["teacher_accuracy"], **after}
        row |= {"parameters": facts["parameters"], "seconds": facts["seconds"]}
        taught = {**row, "variant": "teacher", "accuracy": facts["teacher_accuracy"], "kept": 0.0, "seconds": np.nan}
        size = _parameters(run.teacher.network)  # type: ignore[arg-type]  # a transformer's
        taught |= {"parameters": size, **dict.fromkeys(after, np.nan)}
        rows += [row] if any(r["variant"] == "teacher" and r["seed"] == seed for r in rows) else [taught, row]
    columns = [
        "dataset",
        "variant",
        "seed",
        "accuracy",
        "kept",
        "after_attention",
        "after_blocks",
        "parameters",
        "seconds",
    ]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(variant=pd.Categorical(table["variant"], names))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """`accuracies` by variant: means over the seeds, accuracy's standard deviation, and how many there are."""
    by = table.groupby("variant", observed=True)
    means = by[["accuracy", "kept", "after_attention", "after_blocks"]].mean()
    means.insert(1, "spread", by["accuracy"].std())
    return means.assign(seeds=by["seed"].nunique(), parameters=by["parameters"].first())


def said_of_accuracy(table: pd.DataFrame) -> str:
    """Markdown: what each replacement keeps, and whether that is more than seeds differ by."""
    if table.empty:
        return "No replacement is on record."
    lines, short = [], summary(table)
    for name, row in short.drop(index="teacher").iterrows():
        spread = "" if np.isnan(row["spread"]) else f" ± {row['spread']:.2f}"
        more = row["parameters"] / short.loc["teacher", "parameters"] - 1
        lines.append(
            f"- **{name}**: {row['accuracy']:.2f}{spread} %, {row['kept']:+.2f} points from its teacher, after the "
            f"first stage {row['after_attention']:.2f} %; {100 * more:+.0f} % parameters."
        )
    count = int(short["seeds"].min())
    lines.append("- One seed: differences of a point or so say nothing." if count == 1 else f"- {count} seeds.")
    return "\n".join(lines)


# Pruning


def pruned(made: Plan, found: Mapping[ReplacementRun, dict]) -> pd.DataFrame:
    """One row per pruned network on record.

    Returns:
        columns share (%, of the hidden units), seed, accuracy (%), masked (%, before fine-tuning), change (points from
        what was pruned), parameters, before; and element, input, output: mean sparsity of the LSTMs' matrices (%).
    """
    rows = []
    for (by, share, seed), run in made.items():
        if not share or run not in found or (whole := made[by, 0.0, seed]) not in found:
            continue
        facts = found[run]["metrics"]
        row = {
            "share": 100 * share,
            "seed": seed,
            "accuracy": facts["test_accuracy"],
            "masked": facts["masked_accuracy"],
        }
        row |= {"change": facts["test_accuracy"] - found[whole]["metrics"]["test_accuracy"]}
        row |= {"parameters": facts["parameters"], "before": facts["parameters_before"]}
        row |= pd.DataFrame(facts["sparsity"])[["element", "input", "output"]].mean().to_dict()
        rows.append(row)
    columns = ["share", "seed", "accuracy", "masked", "change", "parameters", "before", "element", "input", "output"]
    return pd.DataFrame(rows, columns=columns)


def pruned_channels(record: dict) -> pd.DataFrame:
    """Hidden units that each head of a pruned network lost (%): a row per layer, a column per head and direction."""
    table = pd.DataFrame(record["metrics"]["channels"])
    head = "head " + table["head"].astype(str) + " " + table["direction"]
    lost = 100 * table["pruned"] / table["hidden"]
    return table.assign(head=head, lost=lost).pivot(index="layer", columns="head", values="lost")


def said_of_pruning(table: pd.DataFrame) -> str:
    """Markdown: accuracy, parameters and sparsity by share."""
    if table.empty:
        return "No pruned network is on record."
    lines = []
    for share, part in table.groupby("share"):
        row = part.mean(numeric_only=True)
        lines.append(
            f"- **{share:g} % of the hidden units removed**: {row['accuracy']:.2f} %, {row['change']:+.2f} points; "
            f"{row['masked']:.2f} % before the masked fine-tuning; "
            f"{100 * (row['parameters'] / row['before'] - 1):+.0f} % parameters; "
            f"{row['element']:.0f} % of the LSTMs' weights were zero."
        )
    return "\n".join(lines)


# What it costs


def networks(size: Profile, data: str) -> dict[str, TransformerConfig]:
    """What is compared on shares: the rows of `BESIDE`, and the teacher with each replacement.

    "lstm" is left out: it takes the rounds and the bytes of "multi_lstm", whose heads step together.
    """
    small = profile_of(size)
    made = {row: small.config(data, row) for row in (BESIDE[:2] if size.name == "smoke" else BESIDE)}
    by = [name for name in SIZES[size.name].mechanisms if name in NAMES and name not in ("standard", "lstm")]
    return made | {NAMES[name]: replaced_config(made["SA softmax"], name) for name in by}


def clear_runs(configs: Mapping[str, TransformerConfig], seed: int = 0) -> dict[str, ClearRun]:
    """Latency, FLOPs and parameters of each network in the clear, at batch 1 and 32."""
    return {name: ClearRun(config, (1, 32), seed=seed) for name, config in configs.items()}


def private_runs(
    size: Profile, configs: Mapping[str, TransformerConfig], seed: int = 0
) -> dict[tuple[str, int], PrivateRun]:
    """One query to each network on shares, by method and batch: of one image, in the long profiles of 32 as well."""
    batches = (1,) if size.name in ("smoke", "quick") else (1, 32)
    return {(name, n): PrivateRun(config, batch=n, seed=seed) for n in batches for name, config in configs.items()}


CONNECTIONS: dict[str, Link | None] = {"loopback": None, "LAN": LINKS["LAN (Cheetah)"], "WAN": LINKS["WAN (Cheetah)"]}


def removed(size: Profile, data: str) -> dict[str, nn.Module]:
    """The teacher with FAR's block, and without a share of the hidden units, as many of every cell; shapes alone."""
    config = replaced_config(profile_of(size).config(data, "SA softmax"), "multi_lstm")
    whole, made = config.width // config.heads, {}
    for share in (0.0, *SIZES[size.name].pruned):
        left = whole - round(share * whole)
        with torch.device("meta"):
            made[f"{share:.0%} removed"] = shaped(config, [[(left, left)] * config.heads] * config.layers)
    return made


def priced(
    networks: Mapping[str, TransformerConfig] | Mapping[str, nn.Module], batches: Iterable[int] = (1, 32)
) -> pd.DataFrame:
    """Rounds and bytes of one query to each network with `tuned`, from shapes alone: exact, nothing is run.

    Returns:
        columns method (a category), batch, rounds, mb (one way), serial_mb (those that wait for each other), dealer_mb,
        and per link of `CONNECTIONS` but loopback what it adds, seconds per image: modelled, without the parties'
        computing.
    """
    from ..private.estimation import estimate  # CrypTen, which a machine that only trains lacks

    rows = []
    for name, network in networks.items():
        with torch.device("meta"):
            model = network if isinstance(network, nn.Module) else build(network)
        config = model.config
        for batch in batches:
            found = estimate(model, (batch, config.channels, config.image, config.image))
            row = {"method": name, "batch": batch, "rounds": found.rounds, "mb": found.bytes / 1e6}
            serial = float(found.operations["serial_bytes"].sum())
            row |= {"serial_mb": serial / 1e6, "dealer_mb": found.dealer_bytes / 1e6}
            row |= {where: link.seconds(found.rounds, serial) / batch for where, link in CONNECTIONS.items() if link}
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(method=pd.Categorical(table["method"], list(networks)))


def on_links(runs: Mapping[tuple[str, int], PrivateRun], found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """Seconds per image on shares: measured on loopback, modelled on the links; and how wrong the logits are.

    Returns:
        indexed by method and batch: a column per link of `CONNECTIONS`, error (as text, which rounding leaves alone),
            right, date (of the measurement).
    """
    from .latency import on_link  # as in `priced`

    rows = []
    for (name, batch), run in runs.items():
        if run in found:
            record = found[run]
            row = {"method": name, "batch": batch}
            row |= {where: on_link(record, link) / batch for where, link in CONNECTIONS.items()}
            row |= {"error": f"{record['metrics']['logit_error']:.1e}", "right": record["metrics"]["faithful"]}
            rows.append({**row, "date": record["date"][:10]})
    columns = ["method", "batch", *CONNECTIONS, "error", "right", "date"]
    return pd.DataFrame(rows, columns=columns).set_index(["method", "batch"])


def cost_panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rounds and megabytes per image, a panel each: methods by batch."""
    table = table.assign(mb=table["mb"] / table["batch"])
    columns = {"rounds": "rounds of a query", "mb": "MB per image"}
    made = {title: table.pivot(index="method", columns="batch", values=name) for name, title in columns.items()}
    return {title: part.rename(columns="batch {}".format) for title, part in made.items()}


def waits(table: pd.DataFrame, link: Link) -> pd.DataFrame:
    """What a link adds to each network of `priced`, seconds per image: methods by batch, for `figures.dots`."""
    seconds = link.seconds(table["rounds"], 1e6 * table["serial_mb"]) / table["batch"]
    made = table.assign(seconds=seconds).pivot(index="method", columns="batch", values="seconds")
    return made.rename(columns="batch {}".format)


def said_of_costs(table: pd.DataFrame) -> str:
    """Markdown: where a recurrence takes less of a link's time than each attention, if anywhere."""
    lines, ours = [], [name for name in NAMES.values() if name in set(table["method"])]
    for where in [name for name, link in CONNECTIONS.items() if link]:
        for batch, part in table.groupby("batch"):
            seconds = part.set_index("method")[where]
            best = seconds[ours].idxmin()
            beaten = [name for name in BESIDE if name in seconds and seconds[best] < seconds[name]]
            told = f"less than {', '.join(beaten)}" if beaten else "more than every attention's"
            lines.append(
                f"- **{where}, batch {batch}**: of the replacements {best} waits least, {seconds[best]:.3g} "
                f"s per image, {told} (SA softmax {seconds['SA softmax']:.3g} s)."
            )
    return "\n".join(lines)


# The search among priced mechanisms (notebook 03), with recurrences among its choices: mechanism to row, or none.
# FAR's own block is not among them: one layer of it waits longer on a WAN than any of the others in all
# layers, so that its price excludes it within any budget of theirs.
CHOICES = {"self": "SA L2Q", "external": "EA L2Q", "scaling": "SA scaling", "parallel_scan": None, "mixer": None}


def choice(size: Profile, data: str, seed: int = 0) -> tuple[SearchRun, dict[str, float]]:
    """A search that may choose a recurrence for a layer, priced on a WAN, and the prices of a layer in seconds.

    The budget is what half the layers with self-attention and half with external attention take. Of few tokens external
    attention is the dearer one, and self-attention in all layers is within it.
    """
    from .choices import prices  # as in `priced`

    small = profile_of(size)
    base = small.config(data, "SA L2Q")
    made = {
        name: small.config(data, row) if row else dataclasses.replace(base, attention=name)
        for name, row in CHOICES.items()
    }
    known = prices(made, LINKS["WAN (Cheetah)"])
    half = base.layers // 2
    budget = round(half * known["self"] + (base.layers - half) * known["external"], 4)
    return small.choice(data, base, known, budget, seed), known


def clear(runs: Mapping[str, ClearRun], found: Mapping[ClearRun, dict]) -> pd.DataFrame:
    """What each network costs in the clear: parameters, MFLOPs, and milliseconds per image at batch 1 and 32."""
    rows = {}
    for name, run in runs.items():
        if run in found:
            facts = found[run]["metrics"]
            rows[name] = {"parameters": facts["parameters"], "mflops": facts["flops"] / 1e6}
            for batch, seconds in facts["seconds"].items():
                rows[name][f"ms_{batch}"] = 1e3 * pd.Series(seconds).median() / int(batch)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


# What tokens move


def with_weights(made: Plan, source: str) -> dict[str, ReplacementRun | TrainRun]:
    """The teacher, what replaces it and what is pruned, of the first seed: those whose weights are here, by name.

    For the project's own records the images must be here too: a few pictures are not worth a download.
    """
    first = min(seed for _, _, seed in made)
    runs: dict[str, ReplacementRun | TrainRun] = {}
    for (by, share, seed), run in made.items():
        if seed == first and by in ("multi_lstm", "grid_lstm", "parallel_scan"):
            runs.setdefault("teacher", run.teacher)
            runs[f"{NAMES[by]}, pruned {share:.0%}" if share else NAMES[by]] = run
    if source == "reference" and not (workspace.ROOT / "data" / "cifar-10-batches-py").is_dir():
        return {}
    return {name: run for name, run in runs.items() if store.path(run, source, ".pt").exists()}


def importance(models: Mapping[str, nn.Module], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token importance of the last block of each network, image by image: (B, N, N)."""
    return {name: maps.importance(model, inputs, last=1)[0] for name, model in models.items()}


def heat(found: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The mean over the images, the diagonal left out: the residual connection is there."""
    return {name: moved.mean(0).fill_diagonal_(float("nan")).numpy() for name, moved in found.items()}


def patches(
    models: Mapping[str, nn.Module], found: Mapping[str, torch.Tensor], inputs: torch.Tensor
) -> dict[str, list[np.ndarray]]:
    """Pictures by image: the teacher's attention rollout, and how much each patch moves what each answer reads.

    That is the last block's class token, or its mean token, as in `maps.read`.
    """
    seen = {name: maps.read(models[name], moved) for name, moved in found.items()}  # (B, N)
    if "teacher" in models:
        rolled = maps.rollout(models["teacher"], inputs)
        seen = {"teacher, rollout": maps.read(models["teacher"], rolled), **seen}
    return {name: [maps.grid(one).numpy() for one in tokens] for name, tokens in seen.items()}


def _parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return cost.parameters(build(config))
