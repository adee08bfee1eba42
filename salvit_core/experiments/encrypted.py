"""Encrypted accuracy and what bounds it, as tables: answers, distance from the edge, drift, fractional bits."""

from collections.abc import Iterable, Mapping

import pandas as pd

from . import store
from .evidence import named
from .profiles import Profile, profile
from .runs import DriftRun, EvaluationRun, SearchRun, TrainRun, of_network, run_of

Names = dict[tuple[str, str], EvaluationRun]  # (method, protocol) to a run


# Answers


def networks(size: Profile, data: str, hybrid: str, seed: int = 0) -> dict[str, TrainRun | SearchRun]:
    """The trained networks that are run on shares, by method; `hybrid` is a SAL-ViT with its budget in its name."""
    names = ("SA softmax",) if size.name == "smoke" else ("SA softmax", "SA 2Quad", "SA L2Q", "EA softmax")
    made: dict[str, TrainRun | SearchRun] = {
        name: size.training(data, size.config(data, name), seed=seed) for name in names
    }
    made[hybrid] = size.search(data, size.config(data, "SA L2Q"), int(hybrid[-1]), seed)
    return made


def evaluations(trained: Mapping[str, TrainRun | SearchRun], images: int, few: int, brief: bool, hybrid: str) -> Names:
    """Each network on shares: `images` with tuned, `few` with stock (of the hybrid alone where it must be brief)."""
    return {
        (name, protocol): EvaluationRun(run, n, min(n, 16), protocol)
        for protocol, n in (("tuned", images), ("stock", few))
        for name, run in trained.items()
        if not brief or protocol == "tuned" or name == hybrid
    }


def besides(plan: Names, source: str) -> Names:
    """Evaluations of other networks, trained on the same data, that the project has on record at a protocol's own bits.

    Quantized networks are notebook 07's. Of local records there are none: whose they would be is not known here.
    Rows of the campaign have its names and their seed.
    """
    known = [run.trained for run in plan.values()]
    sets = {run.data for run in known}
    rows = {run: f"{row}, seed {run.seed}" for data in sets for row, run in named(profile("reference"), data)}
    every = [run_of(record) for record in store.load("encrypted", source)] if source == "reference" else []
    return {
        (rows.get(run.trained) or of_network(run.trained.network), run.protocol): run
        for run in every
        if isinstance(run, EvaluationRun) and isinstance(run.trained, TrainRun | SearchRun)
        if run.bits is None and run.tables is None and run.trained not in known and run.trained.data in sets
    }


def answers(plan: Names, found: Mapping[EvaluationRun, dict], trained: Mapping) -> pd.DataFrame:
    """One row per evaluation on record: the clear network, the same on shares, and how far apart they are."""
    rows = []
    for (name, protocol), run in plan.items():
        if run not in found:
            continue
        metrics, training = found[run]["metrics"], trained.get(run.trained)
        logits = pd.DataFrame([image["clear"] for image in found[run]["history"]])
        row = {"method": name, "protocol": protocol, "images": metrics["images"]}
        row |= {"test accuracy": training["metrics"]["test_accuracy"] if training else None}
        row |= {"clear": metrics["clear_accuracy"], "on shares": metrics["private_accuracy"]}
        row |= {"agreement": metrics["agreement"], "largest logit error": metrics["largest_error"]}
        row |= {"mean logit error": metrics["mean_error"], "clear logits": logits.abs().mean(axis=None)}
        row |= {"left domain": len({violation.split(":")[0] for violation in metrics["violations"]})}
        rows.append(row | {"seconds per image": metrics["seconds"] / run.batch})
    return pd.DataFrame(rows)


def accuracy_panel(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`answers` for a figure: a row for each network and protocol on record, accuracy in the clear and on shares."""
    named = [f"{row['method']}, {row['protocol']}, {row['images']} images" for _, row in table.iterrows()]
    columns = table[["clear", "on shares"]].rename(columns={"clear": "in the clear"})
    return {"the images that were run on shares": columns.set_axis(named)}


def said_of_answers(table: pd.DataFrame) -> str:
    """Markdown: for each network and protocol, whether the answer is noise, and how often it is the clear one."""
    lines = []
    for _, row in table.iterrows():
        noise = row["mean logit error"] > row["clear logits"]
        told = (
            f"**noise**: logits are off by {row['mean logit error']:.2g} on average where the clear ones are of size "
            f"{row['clear logits']:.2g}"
            if noise
            else f"logits within {row['largest logit error']:.2g}"
        )
        lines.append(
            f"- {row['method']}, `{row['protocol']}`: {told}; same top-1 for {row['agreement']:.1f} % of "
            f"{row['images']} images, accuracy {row['on shares']:.1f} %, in the clear {row['clear']:.1f} %."
        )
    return "\n".join(lines)


def ranges(plan: Names, found: Mapping[EvaluationRun, dict]) -> pd.DataFrame:
    """What each operation of tuned saw, what it covers, and by which factor values could still grow (margin)."""
    return pd.DataFrame(
        [
            {"method": name, **row}
            for (name, protocol), run in plan.items()
            if protocol == "tuned" and run in found
            for row in found[run]["metrics"].get("ranges", [])
        ]
    )


def tightest(table: pd.DataFrame) -> pd.DataFrame:
    """The three smallest margins of each method."""
    tight = table.sort_values("margin").groupby("method", sort=False).head(3)
    return tight.sort_values(["method", "margin"]).set_index(["method", "place"])


def drift(found: Mapping[DriftRun, dict]) -> pd.DataFrame:
    """How far shares are from the clear activations, module after module; series is the protocol."""
    parts = [pd.DataFrame(r["metrics"]["layers"]).assign(series=run.protocol) for run, r in found.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def said_of_drift(table: pd.DataFrame) -> str:
    """Markdown: where each protocol's activations are lost, if they are."""
    lines = []
    for name, part in table.groupby("series"):
        relative = part["error"] / part["scale"]
        first, worst = part[relative > 0.5], part.loc[relative.idxmax()]
        told = f"largest difference, as a part of the largest clear value, {relative.max():.2g}, at `{worst['node']}`"
        if len(first):
            told = (
                f"lost at `{first['node'].iloc[0]}` ({first['kind'].iloc[0]}), where the difference first passes "
                "half of the largest clear value"
            )
        last = f"at the logits {part['error'].iloc[-1]:.2g}, clear logits up to {part['scale'].iloc[-1]:.2g}"
        lines.append(f"- `{name}`: {told}; {last}.")
    return "\n".join(lines)


def precision_runs(trained: TrainRun | SearchRun, grid: Iterable[int]) -> dict[tuple[str, int], EvaluationRun]:
    """One network on a few images with each number of fractional bits."""
    return {
        (protocol, bits): EvaluationRun(trained, n, n, protocol, bits=bits)
        for protocol, n in (("tuned", 16), ("stock", 2))
        for bits in grid
    }


def precision(sweep: Mapping[tuple[str, int], EvaluationRun], found: Mapping[EvaluationRun, dict]) -> pd.DataFrame:
    """Logit errors and agreement by series (the protocol) and fractional bits."""
    rows = [
        {"series": protocol, "fractional bits": bits, **found[run]["metrics"]}
        for (protocol, bits), run in sweep.items()
        if run in found
    ]
    columns = ["series", "fractional bits", "images", "mean_error", "largest_error", "agreement"]
    return pd.DataFrame(rows, columns=columns)


def said_of_precision(table: pd.DataFrame) -> str:
    """Markdown: the most exact precision of each protocol, and with which the answers agree."""
    lines = []
    for name in ("tuned", "stock"):
        part = table[table["series"] == name].set_index("fractional bits")
        best, same = part["mean_error"].idxmin(), part.index[part["agreement"] == 100]
        lines.append(
            f"- `{name}` is most exact with {best} bits (mean logit error {part['mean_error'][best]:.2g}; "
            f"{part['mean_error'].iloc[0]:.2g} with {part.index[0]}, {part['mean_error'].iloc[-1]:.2g} with "
            f"{part.index[-1]}). The top-1 agrees on all {part['images'].iloc[0]} images with "
            f"{', '.join(map(str, same)) or 'no number of'} bits."
        )
    return "\n".join(lines)


# What agrees with the paper


def said_of_the_answer(table: pd.DataFrame) -> str:
    """Markdown: whether accuracy in the clear, which the paper reports, is accuracy on shares.

    Args:
        table: `answers`.
    """
    lines = []
    for protocol, part in table.groupby("protocol", sort=False):
        noise = part["mean logit error"] > part["clear logits"]
        same = (part["agreement"] * part["images"] / 100).round().astype(int).sum()
        told = f"{same} of {part['images'].sum()} images have the clear network's class"
        told += f"; noise comes out of {', '.join(part.loc[noise, 'method'])}" if noise.any() else "; none is noise"
        lines.append(f"- `{protocol}`, {len(part)} network{'s'[: len(part) > 1]}: {told}.")
    return "\n".join(lines)
