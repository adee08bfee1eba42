"""Encrypted accuracy: a trained network on shares, image by image, beside itself in the clear."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from .. import data as datasets
from .. import records, runs
from ..graph import trace
from ..runs import SearchRun, TrainRun
from .interpreter import DomainInterpreter
from .launch import infer
from .party import PROTOCOLS


@dataclass(frozen=True)
class EvaluationRun:
    """One trained network evaluated on shares.

    Attributes:
        trained: the run that trained it.
        n: test images.
        batch: images in a query.
        protocol: as in `infer`.
        provider: as in `infer`.
        bits: as in `infer`.
    """

    trained: TrainRun | SearchRun
    n: int = 256
    batch: int = 8
    protocol: str = "tuned"
    provider: str = "TFP"
    bits: int | None = None

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed


@dataclass(frozen=True)
class DriftRun:
    """How far the shares of one trained network's activations are from the clear ones, layer by layer.

    Attributes:
        trained: the run that trained it.
        n: test images, all in one query.
        protocol: as in `infer`.
        provider: as in `infer`.
        bits: as in `infer`.
    """

    trained: TrainRun | SearchRun
    n: int = 4
    protocol: str = "tuned"
    provider: str = "TFP"
    bits: int | None = None

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed


def evaluate(
    model: nn.Module,
    dataset: datasets.Data,
    protocol: str = "tuned",
    n: int = 256,
    batch: int = 8,
    provider: str = "TFP",
    bits: int | None = None,
    folder: Path | None = None,
    label: str = "queries",
) -> dict:
    """Top-1 accuracy on shares beside that in the clear, on n test images drawn without replacement with seed 0.

    All queries are of one session: the weights are masked once, the activations of each query anew.

    Args:
        model: the trained network.
        dataset: the images; its test split is used.
        protocol: as in `infer`.
        n: number of images.
        batch: images in a query.
        provider: as in `infer`.
        bits: as in `infer`.
        folder: where finished queries are kept, so that a killed evaluation goes on where it was; None to keep nothing.
        label: what the progress bar says.

    Returns:
        clear_accuracy and private_accuracy (%), agreement (%, same top-1), largest_error and mean_error (of logits),
        violations (operations that left their range), ranges (of each operation what was seen on these images, what
        its protocol covers, and by which factor values could still grow), seconds, offline_seconds, rounds and bytes of
        a query (median), and history: logits per image, encrypted and clear, with the label.

    Raises:
        ValueError: more images than the test split has, a network that cannot be run, or a folder with the queries of
            another evaluation.
        PrivateInferenceError: a party failed; finished queries stay in `folder`.
    """
    split, images = _drawn(dataset, n)

    path = None if folder is None else Path(folder) / "queries.pt"
    identity = {"network": _hashed(model), "data": dataset.name, "protocol": protocol, "provider": provider}
    identity |= {"bits": bits, "batch": batch}
    done = {**identity, "logits": torch.empty(0), "operations": []}
    if path is not None and path.exists():
        done = torch.load(path, weights_only=True)
        for name, value in identity.items():
            if done.get(name) != value:
                raise ValueError(
                    f"{path} is of another evaluation: its {name} is {done.get(name)!r}, here {value!r}; "
                    "name another folder or delete it"
                )
    start = len(done["logits"])
    if start < n:
        first = start // batch
        with tqdm(total=-(-n // batch), initial=first, desc=label) as bar:

            def keep(found: dict) -> None:
                bar.update(len(found["logits"]) // batch + first - bar.n)
                if path is not None:
                    _save(_joined(done, found["logits"], found["operations"]), path)

            result = infer(
                model,
                images[start:],
                protocol,
                provider,
                timeout=600.0 + 60.0 * (n - start),
                bits=bits,
                batch=batch,
                progress=keep,
            )
            bar.update(bar.total - bar.n)
        done = _joined(done, result.logits, result.queries.to_dict("records"))
        if path is not None:
            _save(done, path)
    logits = done["logits"][:n]

    # Of all images, so that an evaluation that was stopped says what one in a single go says.
    exactly = DomainInterpreter(trace(model), PROTOCOLS[protocol])
    with torch.no_grad():
        clear = torch.cat([exactly.run(part) for part in images.split(64)])
    error = (logits - clear).abs()
    best, exact = logits.argmax(1), clear.argmax(1)
    costs = pd.DataFrame(done["operations"]).groupby("query")[["seconds", "offline_seconds", "rounds", "bytes"]].sum()
    return {
        "clear_accuracy": 100 * (exact == split.labels).double().mean().item(),
        "private_accuracy": 100 * (best == split.labels).double().mean().item(),
        "agreement": 100 * (best == exact).double().mean().item(),
        "largest_error": error.max().item(),
        "mean_error": error.mean().item(),
        "violations": sorted(set(exactly.violations)),
        "ranges": [
            {"place": place, **span._asdict(), "margin": min(span.margin, 1e9)}
            for (place, _), span in exactly.spans.items()
        ],
        "images": n,
        **{name: float(value) for name, value in costs.median().items()},
        "history": [
            {"label": int(label), "private": [float(x) for x in ours], "clear": [float(x) for x in theirs]}
            for label, ours, theirs in zip(split.labels, logits, clear, strict=True)
        ],
    }


def _drawn(dataset: datasets.Data, n: int) -> tuple[datasets.Split, torch.Tensor]:
    """N test images without replacement, seed 0: as they are with their labels, and as the network reads them."""
    there = len(dataset.test.labels)
    if not 1 <= n <= there:
        raise ValueError(f"n is {n}: the test split of {dataset.name} has {there} images, give 1 to {there}")
    chosen = torch.randperm(there, generator=torch.Generator().manual_seed(0))[:n]
    split = datasets.Split(dataset.test.images.cpu()[chosen], dataset.test.labels.cpu()[chosen])
    return split, torch.cat([part for part, _ in datasets.batches(split, 256, dataset.mean, dataset.std)])


def drift(run: DriftRun) -> dict:
    """Metrics of a run: one row per module's result, as `Result.drift`, and what leaves its domain."""
    model = runs.trained(runs.ensure(run.trained))
    _, images = _drawn(runs.dataset(run.trained.data), run.n)
    result = infer(model, images, run.protocol, run.provider, timeout=3600, bits=run.bits, drift=True)
    return {
        "layers": result.drift.to_dict("records"),
        "logit_error": result.error,
        "violations": result.violations,
    }


def _joined(done: dict, logits: torch.Tensor, operations: list[dict]) -> dict:
    """What was done before, and what was done now, its queries numbered on."""
    before = 1 + max((row["query"] for row in done["operations"]), default=-1)
    moved = [{**row, "query": row["query"] + before} for row in operations]
    whole = torch.cat([done["logits"], logits]) if len(done["logits"]) else logits
    return {**done, "logits": whole, "operations": done["operations"] + moved}


def _hashed(model: nn.Module) -> str:
    """Of a network's weights, by name."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.cpu().double().numpy().tobytes())
    return whole.hexdigest()[:16]


def _save(what: dict, path: Path) -> None:
    records.write(path, lambda file: torch.save(what, file))


def ensure(run: EvaluationRun, source: str = "local") -> dict:
    """The record of an evaluation, study "encrypted"; trains and evaluates what is not there yet, where it left off."""
    folder = records.folder() / "encrypted" / f"{records.key('encrypted', run)}.unfinished"

    def measure(run: EvaluationRun) -> dict:
        model = runs.trained(runs.ensure(run.trained))
        label = f"{run.protocol}, {run.bits or 'its own'} bits"
        data = runs.dataset(run.trained.data)
        return evaluate(model, data, run.protocol, run.n, run.batch, run.provider, run.bits, folder, label)

    record = records.ensure("encrypted", run, measure, source)
    shutil.rmtree(folder, ignore_errors=True)
    return record
