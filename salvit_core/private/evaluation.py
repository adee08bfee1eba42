"""Encrypted accuracy: a trained network on shares, image by image, beside itself in the clear."""

import hashlib
import pickle
from pathlib import Path

import pandas as pd
import torch
from torch import fx, nn
from tqdm.auto import tqdm

from .. import workspace
from ..fields import shown, whole
from . import protocol_of
from .asked import DAYS, Asked, folder_problem, model_problem
from .interpreter import DomainInterpreter, fingerprint, network_of
from .parties.launch import infer


def evaluate(
    model: nn.Module,
    dataset,
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
        dataset: a `datasets.Data`, whose test split is used.
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
        ValueError: more images than the test split has, a network that cannot be run, options out of range, or finished
            queries that cannot be read.
        PrivateInferenceError: a party failed; finished queries stay in `folder`.
    """
    Asked(protocol, provider, bits=bits, batch=batch)
    if not whole(batch):
        raise ValueError(f"batch is {batch!r}: give a whole number of images, 1 or more")
    if not isinstance(label, str):
        raise ValueError(f"label is {shown(label)}: give a text")
    if problem := model_problem(model) or folder_problem("folder", folder):
        raise ValueError(problem)
    images, labels = drawn(dataset, n)
    model = network_of(model, images.shape, protocol_of(protocol))

    # All that the logits depend on; n is not in it: fewer images are the first of more.
    identity = f"{_hashed(model)} {_data_hashed(dataset)} {protocol} {provider} {bits} {batch}"
    mark = hashlib.sha256(identity.encode()).hexdigest()[:8]
    path = None if folder is None else Path(folder) / f"queries_{mark}.pt"
    done = {"logits": torch.empty(0), "operations": []}
    if path is not None and path.exists():
        try:
            done = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as unread:
            why = str(unread).splitlines()[0]
            raise ValueError(f"{path} holds no finished queries ({why}): delete it") from unread
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
                timeout=min(DAYS, 600.0 + 60.0 * (n - start)),
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
    exactly = DomainInterpreter(model, protocol_of(protocol))
    with torch.no_grad():
        clear = torch.cat([exactly.run(part) for part in images.split(64)])
    error = (logits - clear).abs()
    best, exact = logits.argmax(1), clear.argmax(1)
    costs = pd.DataFrame(done["operations"]).groupby("query")[["seconds", "offline_seconds", "rounds", "bytes"]].sum()
    return {
        "clear_accuracy": 100 * (exact == labels).double().mean().item(),
        "private_accuracy": 100 * (best == labels).double().mean().item(),
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
            for label, ours, theirs in zip(labels, logits, clear, strict=True)
        ],
    }


def drawn(dataset, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """N test images without replacement, seed 0, as the network reads them, and their labels."""
    if not hasattr(dataset, "test"):
        raise ValueError(f"dataset is {type(dataset).__name__}: give what datasets.load gives")
    there = len(dataset.test.labels)
    if not whole(n) or not 1 <= n <= there:
        raise ValueError(f"n is {shown(n)}: the test split of {dataset.name} has {there} images, give 1 to {there}")
    chosen = torch.randperm(there, generator=torch.Generator().manual_seed(0))[:n]
    return dataset.test.normalised(dataset.test.images.cpu()[chosen]), dataset.test.labels.cpu()[chosen]


def _joined(done: dict, logits: torch.Tensor, operations: list[dict]) -> dict:
    """What was done before, and what was done now, its queries numbered on."""
    before = 1 + max((row["query"] for row in done["operations"]), default=-1)
    moved = [{**row, "query": row["query"] + before} for row in operations]
    every = torch.cat([done["logits"], logits]) if len(done["logits"]) else logits
    return {**done, "logits": every, "operations": done["operations"] + moved}


def _hashed(model: fx.GraphModule) -> str:
    """Of a network: its operations in order with their options, and its weights by name."""
    found = hashlib.sha256(fingerprint(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().double().numpy().tobytes())
    return found.hexdigest()


def _data_hashed(dataset) -> str:
    """Of the test split that images are drawn from, as the network reads them."""
    found = hashlib.sha256(dataset.test.images.cpu().numpy().tobytes() + dataset.test.labels.cpu().numpy().tobytes())
    found.update(dataset.test.normalised(dataset.test.images[:1].cpu()).numpy().tobytes())
    return found.hexdigest()


def _save(what: dict, path: Path) -> None:
    workspace.write(path, lambda file: torch.save(what, file))
