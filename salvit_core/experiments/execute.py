"""How every kind of run is measured, once, and how several are done together.

found = collect(runs)            # run -> record; what is missing is measured
found = collect(runs, "reference")   # the project's own records, those that exist; nothing is written or deleted
"""

import dataclasses
import functools
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from joblib.externals import loky
from torch import nn
from tqdm.auto import tqdm

from .. import datasets, workspace
from ..fields import shown
from ..models import cost
from ..models.config import TransformerConfig, config_of
from ..models.vit import build
from ..quantization import engine, shares
from ..quantization.engine import STAGES, drawn, quantize
from ..replacement.distillation import distil
from ..replacement.pruning import prune, shaped
from ..search import priced, released, sas
from ..training.checkpoint import digest, load_weights
from ..training.evaluation import evaluate as accuracy_of
from ..training.loop import train
from . import learned, store
from .runs import (
    SHAPES,
    CalibrationRun,
    ClearRun,
    DriftRun,
    EvaluationRun,
    LearnedRun,
    PrivateRun,
    QuantizationRun,
    ReplacementRun,
    Run,
    SearchRun,
    Training,
    TrainRun,
)

ABSENT = "Not on record here"  # begins the line on results that are partial
ENGINES = ("local", "ray")
RESIZED = ("flowers", "cars", "tiny_imagenet", "imagenet", "imagenet100", "imagenette")
TABULATED = 256  # training images of which tables of activation functions take their ranges
MOST_TOGETHER = 4  # trainings at a time, each a process with a few hundred MB of its own, and some GB of a GPU's

AnyRun = TypeVar("AnyRun", bound=Run)


class Found(dict[AnyRun, dict]):
    """Records by run, in the order asked for; `absent` has the runs that are not on record."""

    def __init__(self, asked: Iterable[AnyRun], found: dict[AnyRun, dict]):
        asked = list(dict.fromkeys(asked))
        super().__init__((run, found[run]) for run in asked if run in found)
        self.absent = [run for run in asked if run not in found]

    def said(self) -> str:
        """One line that names what is not on record; "" where all is."""
        if not self.absent:
            return ""
        names = "; ".join(run.label() for run in self.absent[:6]) + ("; ..." if len(self.absent) > 6 else "")
        return f"{ABSENT}, so in no table or figure below: {len(self.absent)} runs ({names})."


def collect(
    runs: Iterable[AnyRun],
    source: str = "local",
    label: str = "runs",
    minutes: float | None = None,
    engine: str | None = None,
) -> Found[AnyRun]:
    """The records of several runs; of what the source lacks, a line is printed.

    Args:
        runs: any kinds; equal ones are one.
        source: "local": what is missing is measured now, trainings several at a time; "reference": the project's own
            records, of which those that exist are read and nothing else is done.
        label: of the progress bar.
        minutes: for trainings alone, how long at most: they stop then, and only what is on record is given. Each goes
            on from its last whole epoch when it is asked for again.
        engine: of what is missing, where trainings are done: "local", in processes beside this one, or "ray", on the
            nodes of a cluster (`cluster`). All else is measured in this process, one after the other: its seconds
            would be of no use beside anything. Default: what SALVIT_ENGINE says, else "local".

    Raises:
        ValueError: unknown source or engine, one that is not here, or a file that is no record.
    """
    asked = list(dict.fromkeys(runs))
    if source == "local":
        if not _train_together(asked, label, minutes, engine_of(engine)):
            return recorded(asked)
        return Found(asked, {run: ensure(run) for run in tqdm(asked, desc=label)})
    found = recorded(asked, source)
    if found.absent:  # whatever is made of them is partial
        print(found.said())
    return found


def engine_of(name: str | None = None) -> str:
    """The engine that is meant; None means what SALVIT_ENGINE says, else "local".

    Raises:
        ValueError: unknown, or Ray is not installed.
    """
    name = os.environ.get("SALVIT_ENGINE", "local") if name is None else name
    if name not in ENGINES:
        raise ValueError(f"engine {shown(name)} is unknown: choose from {', '.join(ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("engine 'ray' needs Ray, which is not installed: pip install 'salvit-core[ray]'")
    return name


def recorded(runs: Iterable[AnyRun], source: str = "local") -> Found[AnyRun]:
    """The records of those runs that are on record; nothing is measured."""
    asked = list(dict.fromkeys(runs))
    read = {run: store.find(run, source) for run in asked}
    return Found(asked, {run: record for run, record in read.items() if record is not None})


def ensure(run: Run, source: str = "local", data: datasets.Data | None = None) -> dict:
    """The record of one run: measured if it is not there; of the project's own records, it must be.

    Args:
        run: any kind.
        source: as in `collect`.
        data: the images of a training, where they are at hand; else they are read from data/.

    Raises:
        FileNotFoundError: a reference record that does not exist.
        ValueError: a record that is of another run, or of other weights than those that its training has now.
    """
    if source != "local":
        if (record := store.find(run, source)) is not None:
            return record
        raise FileNotFoundError(f'no {source} record {store.path(run, source)}: run with records = "local"')
    measure = _MEASURES[type(run)]
    record = store.ensure(run, measure if data is None else functools.partial(measure, data=data))
    _refuse_other_weights(run, record)
    # Only now that the record is written may its checkpoint go. A search keeps its first phase: others share it.
    shutil.rmtree(_unfinished(run), ignore_errors=True)
    return record


def trained(run: Training, source: str = "local") -> nn.Module:
    """The trained network of a run, in evaluation mode on the CPU; trained now if there is no local record.

    Raises:
        FileNotFoundError: its weights are not here: the project's own records keep those of a few runs only.
        ValueError: weights that are truncated, of another network, or not those that the record was measured with.
    """
    record = ensure(run, source)
    path = store.path(run, source, ".pt")
    if not path.exists():
        there = store.path(run, source)
        how = f"delete {there} to train it again" if source == "local" else 'train it here with records = "local"'
        raise FileNotFoundError(f"no weights {path} for this record: {how}")
    config = run.network
    if "architecture" in record["metrics"]:
        config = config_of({**dataclasses.asdict(config), "attention": record["metrics"]["architecture"]})
    hidden = record["metrics"].get("hidden")
    model = shaped(config, hidden) if hidden and isinstance(config, TransformerConfig) else build(config)
    load_weights(model, path)
    if record["metrics"].get("weights", found := digest(*model.state_dict().values())) != found:
        raise ValueError(f"the weights {path} are not those of its record: delete {store.path(run, source)} and them")
    return model.eval()


def carry_over(run: Training) -> None:
    """Put the project's own record of a training, with its weights, among the local ones, unless one is there.

    What is measured of it here then needs no training. Where the project has no weights of it, nothing is done: it is
    trained when it is asked for.

    Raises:
        ValueError: a file that is no record of this run.
        OSError: a file that cannot be read or written.
    """
    record, weights = store.find(run, "reference"), store.path(run, "reference", ".pt")
    if record is not None and weights.exists():
        beside = {f"{run.study}/{weights.name}": workspace.readable(weights).read_bytes()}
        store.keep(run, record, beside)


def _refuse_other_weights(run: Run, record: dict) -> None:
    """What was measured of a training that was done again since is of other weights; older records do not say."""
    if not isinstance(run, LearnedRun | EvaluationRun | DriftRun | QuantizationRun):
        return
    training = store.find(run.trained)
    now = training and training["metrics"].get("weights")
    if now and record["metrics"].get("weights", now) != now:
        raise ValueError(
            f"record {store.path(run)} is of other weights than {store.path(run.trained, ending='.pt')}: "
            "delete it to run it again"
        )


# Data sets


@functools.lru_cache(maxsize=4)
def dataset(name: str, images: int = 0) -> datasets.Data:
    """A data set from data/, on the GPU where there is one, with at most `images` training images (0: all).

    Where training images are left out, a quarter of their number is kept to validate. The validation split is drawn
    with seed 0 whatever the run's seed is, so that all runs see the same images.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = SHAPES[name][0] if name in RESIZED else None
    found = datasets.load(name, workspace.ROOT / "data", device, image=image)
    if images and images < len(found.train.labels):
        # The training images are in the order of the data set; take a random part, the same for all runs.
        kept = torch.randperm(len(found.train.labels), generator=torch.Generator().manual_seed(0))[:images]
        split = dataclasses.replace(found.train, images=found.train.images[kept], labels=found.train.labels[kept])
        held, part = found.validation, slice(-(-images // 4))
        validation = dataclasses.replace(held, images=held.images[part], labels=held.labels[part])
        found = dataclasses.replace(found, train=split, validation=validation)
    return found


def resolve(name: str) -> str:
    """The data set that "auto" stands for on this machine; any other name is itself."""
    return dataset(name).name if name == "auto" else name


# Several trainings at a time


def _train_together(asked: list, label: str, minutes: float | None, engine: str) -> bool:
    """Do the trainings that are missing, several at a time.

    They start in the order asked for, but those that wait for another: pupils for their teacher, what is pruned for
    what it is pruned from, and of the searches that share a first phase all for the first.

    Returns:
        whether there was time for all that is asked.

    Raises:
        Exception: what stopped the first of those that were stopped; the others are done before it is said.
    """
    trainings = [run for run in asked if isinstance(run, Training)]
    with_teachers = dict.fromkeys(one for run in trainings for one in (*needed(run), run))
    missing = [run for run in with_teachers if store.find(run) is None]
    workers = min(os.cpu_count() or 1, MOST_TOGETHER, len(missing))
    if not missing or (engine == "local" and workers < 2 and minutes is None):
        return True
    if minutes == 0:  # workers that end as they begin leave a traceback of loky's
        return False
    leaders = {run.first_phase(): run for run in reversed(missing) if isinstance(run, SearchRun)}

    def waits(run: Training) -> bool:
        leader = leaders[run.first_phase()] if isinstance(run, SearchRun) else run
        return bool(unfinished.intersection(needed(run))) or (leader != run and leader in unfinished)

    unfinished, left, running = set(missing), list(missing), dict[Future, Training]()
    failures: list[BaseException] = []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    pool: Pool = _nodes(missing) if engine == "ray" else Processes(workers)
    try:
        with tqdm(total=len(missing), desc=label) as bar:
            while unfinished:
                ready = [run for run in left if not waits(run)][: pool.workers - len(running)]
                left = [run for run in left if run not in ready]
                running |= {pool.submit(run): run for run in ready}
                done = pool.wait(running, None if end is None else max(0.0, end - time.monotonic()))
                if not done:
                    break  # what runs has a checkpoint of its last whole epoch
                for each in done:
                    unfinished.remove(running.pop(each))
                    failures += [error] if (error := each.exception()) else []
                    bar.update()
    finally:
        pool.close()
    if failures:
        raise failures[0]
    return not unfinished


class Pool(Protocol):
    """Where trainings are done."""

    workers: int  # how many it takes at a time

    def submit(self, run: Training) -> Future:
        """Begin one; the future is done when it is on record, or has what stopped it."""

    def wait(self, running: Iterable[Future], patience: float | None) -> set[Future]:
        """Those that are done, as soon as one is; none once the patience, in seconds, is at its end."""

    def close(self) -> None:
        """End what still runs."""


class Processes:
    """Processes beside this one, with a part of the processor's threads each.

    Two networks of this study's size train 1.5 times as fast side by side, a thread each, as one after the other with
    two; on a GPU one computes while another waits for its Python.
    """

    def __init__(self, workers: int):
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.workers, self._pool = workers, loky.ProcessPoolExecutor(workers, env=dict.fromkeys(names, threads))

    def submit(self, run: Training) -> Future:
        """As in `Pool`."""
        return self._pool.submit(_in_a_worker, run, workspace.ROOT, os.getpid())

    def wait(self, running: Iterable[Future], patience: float | None) -> set[Future]:
        """As in `Pool`."""
        return wait(running, patience, FIRST_COMPLETED)[0]

    def close(self) -> None:
        """As in `Pool`."""
        self._pool.shutdown(kill_workers=True)


def _nodes(runs: list[Training]) -> Pool:
    from .cluster import Nodes  # Ray, which few have

    return Nodes(runs)


def needed(run: Training) -> list[Training]:
    """The trainings that one starts from, in order."""
    teacher: list[Training] = [run.teacher] if run.teacher else []
    return [*teacher, run.unpruned()] if isinstance(run, ReplacementRun) and run.pruning else teacher


def _in_a_worker(run: Run, root: Path, parent: int) -> None:
    """Train, and end with the process that asked for it, however that ends: checkpoints stay, as if it had trained."""

    def follow() -> None:
        while os.getppid() == parent:
            if done.wait(1.0):
                return
        os._exit(1)

    done = threading.Event()
    threading.Thread(target=follow, daemon=True).start()
    workspace.ROOT = root
    try:
        ensure(run)
    finally:
        done.set()


# One measurement each


def _unfinished(run: Run) -> Path:
    """Where checkpoints of a run lie until it is on record."""
    return store.path(run, ending=".unfinished")


def checkpoints(run: Training) -> list[Path]:
    """The files that a training goes on from: one for each stage, and a search's first phase, which others share."""
    shared = [_phases(run) / "nas.pt"] if isinstance(run, SearchRun) else []
    return [file for file in shared if file.exists()] + sorted(_unfinished(run).glob("*.pt"))


def _phases(run: SearchRun) -> Path:
    return store.path(run.first_phase(), ending=".phases")


def _save_weights(run: Training, model: nn.Module) -> dict:
    """Write them beside the record; what the record says of them."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    workspace.write(store.path(run, ending=".pt"), lambda file: torch.save(weights, file))
    return _weights(model)


def _weights(model: nn.Module) -> dict:
    return {"weights": digest(*model.state_dict().values())}


def _teacher(run: TrainRun | SearchRun) -> nn.Module | None:
    return trained(run.teacher) if run.teacher else None


def _metrics(result: dict) -> dict:
    """`train`'s result without what the record's config says already, and how many threads it had."""
    kept = {name: value for name, value in result.items() if name not in ("config", "recipe", "data")}
    return {**kept, "threads": torch.get_num_threads()}


def _train(run: TrainRun, data: datasets.Data | None = None) -> dict:
    teacher = _teacher(run)
    torch.manual_seed(run.seed)
    model = build(run.network)
    data = data or dataset(run.data, run.images)
    result = train(model, data, run.recipe, teacher, checkpoint=_unfinished(run) / "checkpoint.pt")
    return _metrics(result) | _save_weights(run, model)


_SEARCHES: dict[type, Callable] = {
    sas.Search: sas.search,
    released.ReleasedSearch: released.search,
    priced.PricedSearch: priced.search,
}


def _search(run: SearchRun, data: datasets.Data | None = None) -> dict:
    search = _SEARCHES[type(run.search)]
    found = search(run.search, data or dataset(run.data, run.images), _teacher(run), _phases(run), _unfinished(run))
    found |= _save_weights(run, found.pop("network"))
    finetune = _metrics(found.pop("finetune"))
    history = finetune.pop("history")
    return {**finetune, **found, "history": history}


def _replace(run: ReplacementRun, data: datasets.Data | None = None) -> dict:
    taught = ensure(run.teacher)["metrics"]["test_accuracy"]
    data, folder = data or dataset(run.data, run.images), _unfinished(run)
    if run.pruning:
        result = prune(run.pruning, trained(run.unpruned()), data, folder)
    else:
        result = distil(run.distillation, trained(run.teacher), data, folder)
        result["parameters"] = cost.parameters(result["network"])
    stages = result.pop("stages")
    history = [{"stage": name, **facts} for name, stage in stages.items() for facts in stage["history"]]
    told = ("test_accuracy", "test_loss", "validation_accuracy", "best_epoch", "seconds")
    return {
        "teacher_accuracy": taught,
        "stages": {name: {what: stage[what] for what in told} for name, stage in stages.items()},
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "threads": torch.get_num_threads(),
        **_save_weights(run, result.pop("network")),
        **result,
        "history": history,
    }


def _learned(run: LearnedRun) -> dict:
    model, data = trained(run.trained), dataset(run.trained.data)
    images, _ = next(datasets.batches(data.test, run.images))
    device = data.test.images.device

    def accuracy(network: nn.Module) -> float:
        return accuracy_of(network.to(device), data.test)["accuracy"]

    resets = [
        {"replaced": name, "mean over": over, "accuracy": accuracy(learned.reset(model, name, over))}
        for name in ("c", "d", "both")
        for over in ("head", "layer")
    ]
    return {
        "spread": learned.spread(model).to_dict("records"),
        "distance": learned.attention_distance(model, images.cpu()).to_dict("records"),
        "resets": resets,
        "accuracy": accuracy(model),
        **_weights(model),
    }


def _clear(run: ClearRun) -> dict:
    model, shape = subject(run)
    images = torch.randn(max(run.batches), *shape)
    return {
        "parameters": cost.parameters(model),
        "flops": cost.flops(model, "torch", images[:1]),
        "memory": cost.peak_memory(model, images[:1]),
        "seconds": {str(batch): cost.latency(model, images[:batch], run.repeats) for batch in run.batches},
        "threads": torch.get_num_threads(),
    }


class _Alone(nn.Module):
    """One attention as a network: tokens stand where images do, (B, 1, N, M)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens.squeeze(1))


def subject(run: ClearRun | PrivateRun) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of a run, or its first attention alone, with the shape of one input."""
    torch.manual_seed(run.seed)
    model: nn.Module = build(run.network)
    if not run.alone or not isinstance(run.network, TransformerConfig):  # it is refused elsewhere
        return model.eval(), (run.network.channels, run.network.image, run.network.image)
    attention = model.blocks[0].attention  # type: ignore[union-attr,index]  # a CCT's or a ViT's
    shape = (run.network.tokens, run.network.width)
    return (attention.eval(), shape) if isinstance(run, ClearRun) else (_Alone(attention).eval(), (1, *shape))


def _private(run: PrivateRun) -> dict:
    from ..private.parties.launch import infer  # CrypTen, which a machine that only trains lacks

    model, shape = subject(run)
    torch.manual_seed(run.seed + 1 + run.query)
    images = torch.randn(run.queries * run.batch, *shape)
    result = infer(model, images, run.protocol, run.provider, run.link, timeout=3600, batch=run.batch)
    return {
        "faithful": result.faithful,
        "logit_error": result.error,
        **({} if run.alone else {"margin": result.margin, "doubt": result.doubt}),  # tokens are no classes
        "violations": result.violations,
        "setup_seconds": result.setup,
        "threads": result.threads,
        "operations": result.queries.astype({"kind": str}).to_dict("records"),
    }


def quantized(run: QuantizationRun, source: str = "local") -> nn.Module:
    """The quantized network of a run, in evaluation mode on the CPU; quantized now if there is no local record.

    Raises:
        FileNotFoundError: its file is not here.
        ValueError: a file that holds no quantized network.
    """
    ensure(run, source)
    path = store.path(run, source, ".pt")
    if source == "local" and not path.exists():  # the record is older than these files
        _quantize(run)
    return engine.load(path)[0]


def _evaluate(run: EvaluationRun) -> dict:
    from ..private.evaluation import evaluate

    data = dataset(run.trained.data)
    if isinstance(run.trained, QuantizationRun):
        model = shares.on_shares(quantized(run.trained), run.quantizers)
        weights = {"weights": ensure(run.trained)["metrics"]["weights"]}
    else:
        model = trained(run.trained)
        weights = _weights(model)
    if run.tables:
        images = drawn(data.train, min(TABULATED, len(data.train.labels)), 0).cpu()
        model = shares.tabulated(model, images, run.tables, most=run.most)
    label = f"{run.protocol}, {run.bits or 'its own'} bits"
    found = evaluate(model, data, run.protocol, run.n, run.batch, run.provider, run.bits, _unfinished(run), label)
    return found | weights


def _calibrate(run: CalibrationRun) -> dict:
    from .calibration import measure

    return measure(run)


def _drift(run: DriftRun) -> dict:
    from ..private.evaluation import drawn
    from ..private.parties.launch import infer

    images, _ = drawn(dataset(run.trained.data), run.n)
    model = trained(run.trained)
    result = infer(model, images, run.protocol, run.provider, timeout=3600, bits=run.bits, drift=True)
    assert result.drift is not None  # asked for
    return {
        "layers": result.drift.to_dict("records"),
        "logit_error": result.error,
        "violations": result.violations,
        **_weights(model),
    }


def _quantize(run: QuantizationRun) -> dict:
    """Runs that differ in what concerns activations share their weights, and what is known of these."""
    options, shared = run.options, run.weights_alone()
    before = ensure(shared)["metrics"]["accuracy"] if options.activations else {}
    model, data = trained(run.trained), dataset(run.trained.data, run.trained.images)
    found = quantize(
        model.to(data.test.images.device),
        drawn(data.train, options.images, options.seed),
        options,
        lambda network: accuracy_of(network, data.test)["accuracy"],
        _unfinished(run),
        store.path(shared, ending=".phases"),
        stages=[stage for stage in STAGES if stage not in before],
    )
    engine.save(found["network"].cpu(), options, store.path(run, ending=".pt"))
    accuracy = before | {stage: found[stage] for stage in STAGES if stage in found}
    return {"accuracy": accuracy, "history": found["history"], "threads": torch.get_num_threads(), **_weights(model)}


_MEASURES: dict[type, Callable[..., dict]] = {
    TrainRun: _train,
    SearchRun: _search,
    ReplacementRun: _replace,
    LearnedRun: _learned,
    ClearRun: _clear,
    PrivateRun: _private,
    CalibrationRun: _calibrate,
    EvaluationRun: _evaluate,
    DriftRun: _drift,
    QuantizationRun: _quantize,
}
