"""The training runs that notebooks share: what fixes one, how it is run once, and where its weights are.

A `TrainRun` or a `SearchRun` is the config of a record (`records.ensure`); its trained weights lie beside the record.
"""

import dataclasses
import functools
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from torch import nn
from tqdm.auto import tqdm

from . import cost, learned, records, sas, training
from . import data as datasets
from .cct import TransformerConfig, config_of, preset
from .training import Recipe
from .vit import build

# Side in pixels (Tiny-ImageNet and ImageNet resized as in the paper, ImageNet's parts for a laptop), channels and
# classes: what fixes a network, so that records can be looked up where the images are not.
SHAPES = {
    "digits": (8, 1, 10),
    "fashion_mnist": (28, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "tiny_imagenet": (224, 3, 200),
    "imagenet": (224, 3, 1000),
    "imagenet100": (64, 3, 100),
    "imagenette": (64, 3, 10),
}
RESIZED = ("tiny_imagenet", "imagenet", "imagenet100", "imagenette")


@dataclass(frozen=True)
class TrainRun:
    """One network trained from scratch.

    Attributes:
        data: a data set's name; "auto" is resolved before a run is made (`dataset`).
        network: the architecture, of the data set's image size, channels and classes.
        recipe: how it is trained; its seed is also that of the initial weights.
        images: use only this many training images, and a quarter as many to validate (0: all); the test images stay.
        teacher: the run to distil from, if the recipe distils.
    """

    data: str
    network: TransformerConfig
    recipe: Recipe
    images: int = 0
    teacher: "TrainRun | None" = None

    @property
    def seed(self) -> int:
        """Of initial weights, batches, augmentation and dropout."""
        return self.recipe.seed


@dataclass(frozen=True)
class SearchRun:
    """One selective attention search, Algorithm 1, from the mixture to the fine-tuned network.

    Attributes:
        data: as in `TrainRun`.
        network: the architecture; what it names as attention is ignored.
        search: recipe of the first phase.
        finetune: recipe of the second phase; its seed is that of the whole search.
        budget: B, how many layers (or heads) get self-attention.
        granularity: "layer" (SAS-L) or "head" (SAS-H).
        rule: how they are selected: "top", "bottom" (SAS-L-WC) or "random".
        weight: lambda of Eq. 5.
        released: what the published code does where it parts from the paper.
        images: as in `TrainRun`.
        teacher: the run to distil from in fine-tuning, if its recipe distils.
    """

    data: str
    network: TransformerConfig
    search: Recipe
    finetune: Recipe
    budget: int
    granularity: str = "layer"
    rule: str = "top"
    weight: float = 0.1
    released: bool = False
    images: int = 0
    teacher: TrainRun | None = None

    @property
    def seed(self) -> int:
        """Of everything random in both phases."""
        return self.finetune.seed


@dataclass(frozen=True)
class LearnedRun:
    """What one trained L2Q network learnt (`learned`): read off its weights and the test images.

    Attributes:
        trained: the run that trained it.
        images: test images over which attention distances are averaged.
    """

    trained: TrainRun
    images: int = 64

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed


@dataclass(frozen=True)
class ChoiceRun:
    """One search among any mechanisms within a budget (`sas.search` with prices).

    Attributes:
        data: as in `TrainRun`.
        network: as in `SearchRun`.
        search: as in `SearchRun`.
        finetune: as in `SearchRun`.
        choices: names of the mechanisms.
        prices: of one layer of each, such as its private latency in seconds.
        budget: for all layers, in the prices' unit.
        weight: of the L1 term.
        images: as in `TrainRun`.
    """

    data: str
    network: TransformerConfig
    search: Recipe
    finetune: Recipe
    choices: tuple[str, ...]
    prices: tuple[float, ...]
    budget: float
    weight: float = 0.1
    images: int = 0

    @property
    def seed(self) -> int:
        """Of everything random in both phases."""
        return self.finetune.seed


@dataclass(frozen=True)
class ClearRun:
    """What one network with random weights costs in the clear, on this machine's processor (`cost`).

    Attributes:
        network: the architecture.
        batches: images at a time whose latency is measured.
        repeats: forward passes per batch size, after some to warm up.
        alone: only the attention of the first layer, on random tokens.
        seed: of the weights and of the images.
    """

    network: TransformerConfig
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 10
    alone: bool = False
    seed: int = 0


Run = TrainRun | SearchRun | LearnedRun | ChoiceRun | ClearRun


@functools.lru_cache(maxsize=4)
def dataset(name: str, images: int = 0) -> datasets.Data:
    """A data set from data/, on the GPU where there is one, with at most `images` training images (0: all).

    Where training images are left out, a quarter of their number is kept to validate. The validation split is drawn
    with seed 0 whatever the run's seed is, so that all runs see the same images.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = SHAPES[name][0] if name in RESIZED else None
    found = datasets.load(name, records.ROOT / "data", device, image=image)
    if images and images < len(found.train.labels):
        # The training images are in the order of the data set; take a random part, the same for all runs.
        kept = torch.randperm(len(found.train.labels), generator=torch.Generator().manual_seed(0))[:images]
        train = dataclasses.replace(found.train, images=found.train.images[kept], labels=found.train.labels[kept])
        held, part = found.validation, slice(-(-images // 4))
        validation = dataclasses.replace(held, images=held.images[part], labels=held.labels[part])
        found = dataclasses.replace(found, train=train, validation=validation)
    return found


def network(name: str, data: str, method: str | None = None, **changes) -> TransformerConfig:
    """A preset with the image size, channels and classes of a data set; the rest as in `cct.preset`.

    Raises:
        ValueError: a data set without a shape here, such as "auto": resolve it first.
    """
    if data not in SHAPES:
        raise ValueError(f"data {data!r} has no known shape: choose from {', '.join(SHAPES)}")
    image, channels, classes = SHAPES[data]
    return preset(name, method, image=image, channels=channels, classes=classes, **changes)


def resolve(name: str) -> str:
    """The data set that "auto" stands for on this machine; any other name is itself."""
    return dataset(name).name if name == "auto" else name


def ensure(run: Run, source: str = "local") -> dict:
    """The record of a run; trains or measures what is not there yet."""
    study, measure = _STUDIES[type(run)]
    record = records.ensure(study, run, measure, source)
    # Only now that the record is written may its checkpoint go. A search keeps its own: others share them.
    shutil.rmtree(_unfinished(run), ignore_errors=True)
    return record


def key(run: Run) -> str:
    """The key of a run's record."""
    return records.key(_STUDIES[type(run)][0], run)


def collect(runs: Sequence[Run], source: str = "local", label: str = "runs") -> list[dict]:
    """The records of several runs, in order; of the project's own records ("reference") those that exist."""
    if source == "local":
        _train_together(runs, label)
        return [ensure(run, source) for run in tqdm(runs, desc=label)]
    return [ensure(run, source) for run in runs if _exists(run, source)]


def _exists(run: Run, source: str = "local") -> bool:
    return (records.folder(source) / _STUDIES[type(run)][0] / f"{key(run)}.json").exists()


MOST_TOGETHER = 4  # trainings at a time, each a process with a few hundred MB of its own


def _train_together(runs: Sequence[Run], label: str) -> None:
    """Do the trainings that are missing, several at a time with a part of the processor's threads each.

    Two networks of this study's size train 1.5 times as fast side by side, a thread each, as one after the other with
    two. What others wait for comes first: teachers, and of the searches that share a first phase the first.
    """
    trainings = [run for run in dict.fromkeys(runs) if isinstance(run, TrainRun | SearchRun | ChoiceRun)]
    teachers = [teacher for run in trainings if (teacher := getattr(run, "teacher", None))]
    missing = [run for run in dict.fromkeys([*teachers, *trainings]) if not _exists(run)]
    workers = min(os.cpu_count() or 1, MOST_TOGETHER, len(missing))
    if workers < 2 or torch.cuda.is_available():
        return
    leaders = {_first_phase(run): run for run in reversed(missing) if isinstance(run, SearchRun)}
    first = [run for run in missing if run in teachers or run in leaders.values() or isinstance(run, ChoiceRun)]
    first += [run for run in missing if isinstance(run, TrainRun) and not run.teacher and run not in first]
    with tqdm(total=len(missing), desc=label) as bar:
        for wave in (first, [run for run in missing if run not in first]):
            with joblib.parallel_config("loky", inner_max_num_threads=max(1, (os.cpu_count() or 1) // workers)):
                work = (joblib.delayed(_in_a_worker)(run, records.ROOT, os.getpid()) for run in wave)
                for _ in joblib.Parallel(workers, return_as="generator_unordered")(work):
                    bar.update()


def _in_a_worker(run: Run, root: Path, parent: int) -> None:
    """Train, and end with the process that asked for it, however that ends: checkpoints stay, as if it had trained."""

    def follow() -> None:
        while os.getppid() == parent:
            if done.wait(1.0):
                return
        os._exit(1)

    done = threading.Event()
    threading.Thread(target=follow, daemon=True).start()
    records.ROOT = root
    try:
        ensure(run)
    finally:
        done.set()


def trained(record: dict, source: str = "local") -> nn.Module:
    """The trained network of a record, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: its weights are not here: the project's own records keep those of a few runs only.
    """
    path = _weights(record["study"], record["key"], source)
    if not path.exists():
        raise FileNotFoundError(f'no weights {path.name} for this record: train it here with records = "local"')
    config = config_of(record["config"]["network"])
    if "architecture" in record["metrics"]:
        config = dataclasses.replace(config, attention=record["metrics"]["architecture"])
    model = build(config)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


def _weights(study: str, key: str, source: str = "local") -> Path:
    return records.folder(source) / study / f"{key}.pt"


def _unfinished(run) -> Path:
    return records.folder() / _STUDIES[type(run)][0] / f"{key(run)}.unfinished"


def _save_weights(study: str, run: TrainRun | SearchRun | ChoiceRun, model: nn.Module) -> None:
    path = _weights(study, records.key(study, run))
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    records.write(path, lambda file: torch.save(weights, file))


def _teacher(run: TrainRun | SearchRun) -> nn.Module | None:
    return trained(ensure(run.teacher)) if run.teacher else None


def _metrics(result: dict) -> dict:
    """`training.train`'s result without what the record's config says already, and how many threads it had."""
    kept = {name: value for name, value in result.items() if name not in ("config", "recipe", "data")}
    return {**kept, "threads": torch.get_num_threads()}


def _train(run: TrainRun) -> dict:
    teacher = _teacher(run)
    torch.manual_seed(run.seed)
    model = build(run.network)
    checkpoint = _unfinished(run) / "checkpoint.pt"
    result = training.train(model, dataset(run.data, run.images), run.recipe, teacher, checkpoint=checkpoint)
    _save_weights("training", run, model)
    return _metrics(result)


def _search(run: SearchRun) -> dict:
    folder = records.folder() / "search" / f"{records.key('search', _first_phase(run))}.phases"
    found = sas.search(
        run.network,
        dataset(run.data, run.images),
        run.search,
        run.finetune,
        run.budget,
        run.granularity,
        run.weight,
        run.rule,
        run.seed,
        folder,
        run.released,
        _teacher(run),
    )
    return _searched("search", run, found)


def _first_phase(run: SearchRun) -> SearchRun:
    """What searches that differ in budget, rule or fine-tuning have in common: they share their first phase."""
    same = dataclasses.replace(run.search, seed=run.seed)
    return dataclasses.replace(run, budget=0, rule="top", search=same, finetune=same, teacher=None)


def _searched(study: str, run: SearchRun | ChoiceRun, found: dict) -> dict:
    _save_weights(study, run, found.pop("network"))
    finetune = _metrics(found.pop("finetune"))
    history = finetune.pop("history")
    return {**finetune, **found, "history": history}


def _choose(run: ChoiceRun) -> dict:
    found = sas.search(
        run.network,
        dataset(run.data, run.images),
        run.search,
        run.finetune,
        run.budget,
        weight=run.weight,
        seed=run.seed,
        folder=_unfinished(run),
        choices=run.choices,
        prices=run.prices,
    )
    return _searched("choices", run, found)


def _clear(run: ClearRun) -> dict:
    torch.manual_seed(run.seed)
    model = build(run.network)
    shape = (run.network.channels, run.network.image, run.network.image)
    if run.alone:
        model, shape = model.blocks[0].attention, (run.network.tokens, run.network.width)
    model = model.eval()
    images = torch.randn(max(run.batches), *shape)
    return {
        "parameters": cost.parameters(model),
        "flops": cost.flops(model, "torch", images[:1]),
        "memory": cost.peak_memory(model, images[:1]),
        "seconds": {str(batch): cost.latency(model, images[:batch], run.repeats) for batch in run.batches},
        "threads": torch.get_num_threads(),
    }


def _learned(run: LearnedRun) -> dict:
    model, data = trained(ensure(run.trained)), dataset(run.trained.data)
    images, _ = next(datasets.batches(data.test, run.images, data.mean, data.std))
    device = data.test.images.device

    def accuracy(network: nn.Module) -> float:
        return training.evaluate(network.to(device), data.test, data.mean, data.std)["accuracy"]

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
    }


_STUDIES = {
    TrainRun: ("training", _train),
    SearchRun: ("search", _search),
    LearnedRun: ("learned", _learned),
    ChoiceRun: ("choices", _choose),
    ClearRun: ("clear", _clear),
}
