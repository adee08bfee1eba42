"""Every kind of run as plain data: what fixes it, what it is called, and how it is read back from a record.

How each is measured is in `execute`.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args

from ..fields import Checked, Count, CountOrNone, Range, Seed
from ..models.config import (
    EFFICIENTVITS,
    PRESETS,
    CCTConfig,
    EfficientViTConfig,
    Network,
    TransformerConfig,
    config_of,
    preset,
)
from ..models.rows import ROWS
from ..private.links import Link
from ..quantization.engine import TRICKS, Quantization
from ..replacement.distillation import Distillation, replaced_config
from ..replacement.pruning import Pruning
from ..search.priced import PricedSearch
from ..search.released import ReleasedSearch
from ..search.sas import Search
from ..training.recipe import Recipe

# Side in pixels (Tiny-ImageNet and ImageNet resized as in the paper, ImageNet's parts for a laptop), channels and
# classes: what fixes a network, so that records can be looked up where the images are not.
SHAPES = {
    "digits": (8, 1, 10),
    "fashion_mnist": (28, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "flowers": (224, 3, 102),
    "cars": (224, 3, 196),
    "tiny_imagenet": (224, 3, 200),
    "imagenet": (224, 3, 1000),
    "imagenet100": (64, 3, 100),
    "imagenette": (64, 3, 10),
}


def network(name: str, data: str, method: str | None = None, **changes) -> Network:
    """A preset with the image size, channels and classes of a data set; the rest as in `preset`.

    Raises:
        ValueError: a data set without a shape here, such as "auto": resolve it first.
    """
    if data not in SHAPES:
        raise ValueError(f"data {data!r} has no known shape: choose from {', '.join(SHAPES)}")
    image, channels, classes = SHAPES[data]
    return preset(name, method, image=image, channels=channels, classes=classes, **changes)


@dataclass(frozen=True)
class TrainRun(Checked):
    """One network trained from scratch.

    Attributes:
        data: a data set's name; "auto" is resolved before a run is made (`execute.resolve`).
        network: the architecture, of the data set's image size, channels and classes.
        recipe: how it is trained; its seed is also that of the initial weights.
        images: use only this many training images, and a quarter as many to validate (0: all); the test images stay.
        teacher: the run to distil from, if the recipe distils.
    """

    study: ClassVar[str] = "training"

    data: str
    network: Network
    recipe: Recipe
    images: CountOrNone = 0
    teacher: "TrainRun | None" = None

    @property
    def seed(self) -> int:
        """Of initial weights, batches, augmentation and dropout."""
        return self.recipe.seed

    def label(self) -> str:
        """Data set, network, epochs, seed."""
        parts = [
            name for name in ("logits", "features", "blocks", "attention") if getattr(self.recipe, f"distill_{name}")
        ]
        taught = f" distilled {' '.join(parts)}" if self.teacher else ""
        return f"{self.data} {of_network(self.network)}{taught} {self.recipe.epochs} epochs seed {self.seed}"


@dataclass(frozen=True)
class SearchRun(Checked):
    """One search from the mixture to the fine-tuned network: selective, as released, or among priced mechanisms.

    Attributes:
        data: as in `TrainRun`.
        search: what is searched, and how.
        images: as in `TrainRun`.
        teacher: the run to distil from in fine-tuning, if its recipe distils.
    """

    study: ClassVar[str] = "search"

    data: str
    search: Search | ReleasedSearch | PricedSearch
    images: CountOrNone = 0
    teacher: TrainRun | None = None

    @property
    def network(self) -> CCTConfig:
        """The architecture, whose attention is searched."""
        return self.search.network

    @property
    def seed(self) -> int:
        """Of everything random in both phases."""
        return self.search.seed

    def first_phase(self) -> "SearchRun":
        """What searches that differ in budget, rule or fine-tuning have in common: they share their first phase."""
        changes: dict[str, Any] = {"budget": 0, "finetune": self.search.first}
        if isinstance(self.search, Search):
            changes |= {"rule": "top", "folded": False, "score": "alpha"}
        return dataclasses.replace(self, search=dataclasses.replace(self.search, **changes), teacher=None)

    def label(self) -> str:
        """Data set, kind of search, budget, rule, epochs, seed."""
        search = self.search
        kind, rule = "priced", ""
        if isinstance(search, Search):
            kind = ("released " if isinstance(search, ReleasedSearch) else "") + f"sas-{search.granularity[0]}"
            rule = f" {search.rule if isinstance(search.rule, str) else 'given'}"
            rule += "" if search.score == "alpha" else f" by {search.score}"
            rule += "" if search.weight == Search.weight else f" lambda {search.weight:g}"
            rule += " folded" if search.folded else ""
            rule += "" if search.gate == "free" else f" {search.gate}"
            rule += "" if search.cheap == "external" else f" {search.cheap}"
            rule += "".join(f" sgd {name}" for name in search.first.sgd)
        epochs = f"{search.first.epochs} and {search.finetune.epochs} epochs"
        taught = " distilled" if self.teacher else ""
        return (
            f"{self.data} {kind} {search.network.normalizer} b {search.budget}{rule}{taught} {epochs} seed {self.seed}"
        )


@dataclass(frozen=True)
class ReplacementRun(Checked):
    """Attention of one trained network replaced by another mechanism, and what came of it pruned.

    Attributes:
        teacher: the run that trained the network.
        distillation: what replaces its attention, and how that is trained.
        pruning: how it is pruned after that; None: it is not.
    """

    study: ClassVar[str] = "replacement"

    teacher: TrainRun
    distillation: Distillation
    pruning: Pruning | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.teacher.network, TransformerConfig):
            name = of_network(self.teacher.network)
            raise ValueError(f"teacher is a training of {name}, which has no attention to replace: give a CCT or a ViT")

    @property
    def data(self) -> str:
        """The teacher's, as its number of images."""
        return self.teacher.data

    @property
    def images(self) -> int:
        """As in `TrainRun`."""
        return self.teacher.images

    @property
    def seed(self) -> int:
        """Of the replacements and their training."""
        return self.distillation.seed

    @property
    def network(self) -> TransformerConfig:
        """The architecture with its replacements, none of whose hidden units is pruned."""
        run, config = self.distillation, self.teacher.network
        return replaced_config(config, run.by, run.layers, run.drop_path, run.normalizer)  # type: ignore[arg-type]  # no other is taken

    def unpruned(self) -> "ReplacementRun":
        """What is to be pruned."""
        return dataclasses.replace(self, pruning=None)

    def label(self) -> str:
        """Data set, teacher, replacement, loss, epochs, what is pruned, seed."""
        run, taught = self.distillation, "-".join(dict.fromkeys(map(str, self.teacher.network.attention)))  # type: ignore[union-attr]
        epochs = " ".join(str(recipe.epochs) for recipe in run.stages().values())
        normalizer = f" {run.normalizer}" if run.normalizer else ""
        pruned = ""
        if self.pruning:
            pruned = f" pruned {self.pruning.share:g} {self.pruning.regulariser.replace('_', ' ')}"
        return f"{self.data} {taught} by {run.by}{normalizer} {run.loss} {epochs} epochs{pruned} seed {self.seed}"


@dataclass(frozen=True)
class LearnedRun(Checked):
    """What one trained L2Q network learnt (`learned`): read off its weights and the test images.

    Attributes:
        trained: the run that trained it.
        images: test images over which attention distances are averaged.
    """

    study: ClassVar[str] = "learned"

    trained: TrainRun
    images: Count = 64

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.trained.network, TransformerConfig):
            raise ValueError(f"trained is of {of_network(self.trained.network)}, which has no L2Q: give a CCT or a ViT")

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed

    def label(self) -> str:
        """That of the training."""
        return self.trained.label()


@dataclass(frozen=True)
class ClearRun(Checked):
    """What one network with random weights costs in the clear, on this machine's processor (`cost`).

    Attributes:
        network: the architecture.
        batches: images at a time whose latency is measured.
        repeats: forward passes per batch size, after some to warm up.
        alone: only the attention of the first layer, on random tokens; of a transformer.
        seed: of the weights and of the images.
    """

    study: ClassVar[str] = "clear"

    network: Network
    batches: tuple[Count, ...] = (1, 64)
    repeats: Count = 10
    alone: bool = False
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        _refuse_alone(self)

    def label(self) -> str:
        """The network, or its attention."""
        return f"{of_network(self.network)}{' attention alone' if self.alone else ''}"


@dataclass(frozen=True)
class PrivateRun(Checked):
    """Equal queries of random images to one network with random weights, in one session of two parties.

    Costs need no training: they depend on shapes, not on values. The parties start once and the weights are masked
    once, so that a session of several queries costs little more than one.

    Attributes:
        network: the architecture.
        protocol: as in `private.infer`.
        provider: as in `private.infer`.
        query: which of several equal sessions this is; they differ in the images and in the machine's noise.
        queries: how many queries.
        batch: images in a query.
        link: emulated connection; None for the bare loopback.
        alone: only the attention of the first layer, on random tokens in place of images; of a transformer.
        seed: of the weights and, with `query`, of the images.
    """

    study: ClassVar[str] = "private"

    network: Network
    protocol: str = "tuned"
    provider: str = "TFP"
    query: CountOrNone = 0
    queries: Count = 1
    batch: Count = 1
    link: Link | None = None
    alone: bool = False
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        _refuse_alone(self)

    def label(self) -> str:
        """The network, and what is not usual about the session."""
        words = [of_network(self.network), self.protocol, self.provider]
        words += ["attention alone"] if self.alone else []
        words += [f"{self.queries} queries"] if self.queries > 1 else [f"query {self.query}"]
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        words += [f"link {1e3 * self.link.rtt:g} ms"] if self.link else []
        return " ".join(words)


@dataclass(frozen=True)
class CalibrationRun(Checked):
    """What a unit of `tuned`'s work takes on one machine (`calibration`).

    Attributes:
        networks: that are run.
        queries: of each, one image each, in one session; the median counts.
        processor: of the machine.
        cores: of the machine.
        seed: of weights and images.
    """

    study: ClassVar[str] = "calibration"

    networks: tuple[Network, ...]
    queries: Count
    processor: str
    cores: Count
    seed: Seed = 0

    def label(self) -> str:
        """The machine, and how much is run."""
        return f"{self.processor} {self.cores} cores {len(self.networks)} networks {self.queries} queries"


@dataclass(frozen=True)
class EvaluationRun(Checked):
    """One trained network evaluated on shares.

    Attributes:
        trained: the run that trained it, or that quantized it after training.
        n: test images.
        batch: images in a query.
        protocol: as in `private.infer`.
        provider: as in `private.infer`.
        bits: as in `private.infer`.
        tables: bits of what activation functions read, each a table of its own (`quantization.shares.tabulated`).
        most: numbers of an image that such a function reads at most; others stay as they are.
        quantizers: of a quantized network, keep those of activations, each as a table (`shares.on_shares`).
    """

    study: ClassVar[str] = "encrypted"

    trained: "TrainRun | SearchRun | ReplacementRun | QuantizationRun"
    n: Count = 256
    batch: Count = 8
    protocol: str = "tuned"
    provider: str = "TFP"
    bits: int | None = None
    tables: Annotated[int, Range(1, 14)] | None = None
    most: Count | None = None
    quantizers: bool = False

    def ignored(self) -> set[str]:
        """The fields that the result does not depend on."""
        kept = isinstance(self.trained, QuantizationRun)
        return (set() if self.tables else {"most"}) | (set() if kept else {"quantizers"})

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed

    def label(self) -> str:
        """The training, the protocol, how many images."""
        bits = "" if self.bits is None else f" {self.bits} bits"
        bits += f" tables of {self.tables} bits" if self.tables else ""
        bits += " quantizers" if self.quantizers else ""
        return f"{self.trained.label()} {self.protocol}{bits} {self.n} images"


@dataclass(frozen=True)
class DriftRun(Checked):
    """How far the shares of one trained network's activations are from the clear ones, layer by layer.

    Attributes:
        trained: the run that trained it.
        n: test images, all in one query.
        protocol: as in `private.infer`.
        provider: as in `private.infer`.
        bits: as in `private.infer`.
    """

    study: ClassVar[str] = "drift"

    trained: TrainRun | SearchRun | ReplacementRun
    n: Count = 4
    protocol: str = "tuned"
    provider: str = "TFP"
    bits: int | None = None

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.trained.seed

    def label(self) -> str:
        """The training, the protocol, how many images."""
        return f"{self.trained.label()} {self.protocol} {self.n} images"


@dataclass(frozen=True)
class QuantizationRun(Checked):
    """One trained network quantized after training (`quantization.engine`), and its accuracy on all test images.

    Attributes:
        trained: the run that trained it; calibration images are drawn from those that it was trained with.
        options: how.
    """

    study: ClassVar[str] = "quantization"

    trained: TrainRun
    options: Quantization

    @property
    def data(self) -> str:
        """Of the training."""
        return self.trained.data

    @property
    def network(self) -> Network:
        """Of the training."""
        return self.trained.network

    @property
    def seed(self) -> int:
        """Of calibration images and batches."""
        return self.options.seed

    def weights_alone(self) -> "QuantizationRun":
        """What runs have in common that differ in what concerns activations."""
        return dataclasses.replace(self, options=self.options.weights_alone())

    def label(self) -> str:
        """Data set, network, bits, what is left out, the calibration's seed."""
        options = self.options
        bits = f"w{options.bits_weights}" + (f"a{options.bits_activations}" if options.activations else "")
        left = [f"no {name}" for name in TRICKS if not getattr(options, name)]
        words = [self.trained.data, of_network(self.trained.network), bits, *left]
        words += [] if options.per_channel else ["per tensor"]
        return " ".join([*words, f"calibration {options.seed}"])


Training = TrainRun | SearchRun | ReplacementRun  # what leaves weights
Run = (
    TrainRun
    | SearchRun
    | ReplacementRun
    | LearnedRun
    | ClearRun
    | PrivateRun
    | CalibrationRun
    | EvaluationRun
    | DriftRun
    | QuantizationRun
)
RUNS: dict[str, type] = {each.study: each for each in get_args(Run)}


def _refuse_alone(run: ClearRun | PrivateRun) -> None:
    if run.alone and not isinstance(run.network, TransformerConfig):
        raise ValueError(f"alone is True: {of_network(run.network)} has no layers of tokens, give a CCT or a ViT")


# Names of networks

EFFICIENTVIT = "EfficientViT"  # where the tables have the row of a transformer


@functools.cache
def _named() -> dict[Network, tuple[str, str]]:
    named: dict[Network, tuple[str, str]] = {preset(name): (name, EFFICIENTVIT) for name in EFFICIENTVITS}
    for name, fields in PRESETS.items():
        layers = fields.get("layers", TransformerConfig.layers)
        for method, choice in ROWS.items():
            # On a network of B layers SAL-ViT at budget B is plain self-attention: the first name stays.
            budget = choice["attention"]
            if not isinstance(budget, int) or budget <= layers:
                named.setdefault(preset(name, method), (name, method))
    return named


def name_of(config: Network) -> tuple[str, str] | None:
    """Preset and method of a network, or None where it is no preset with a method of the tables.

    An EfficientViT's method is `EFFICIENTVIT`: its attention is its own.
    """
    return _named().get(config)


def of_network(config: Network) -> str:
    """What a person would call a network: preset and method, or its kind, size and attention."""
    if found := name_of(config):
        return found[0] if isinstance(config, EfficientViTConfig) else " ".join(found)
    if isinstance(config, EfficientViTConfig):
        return f"efficientvit {'-'.join(map(str, config.widths))} {config.image}px"
    kind = "cct" if isinstance(config, CCTConfig) else "vit"
    names = dict.fromkeys(name if isinstance(name, str) else "heads" for name in config.attention)
    attention = "-".join(names)
    if set(config.attention) == {"self", "external"}:
        attention = "".join(str(name)[0] for name in config.attention)
    return f"{kind} {config.layers}x{config.width} {config.image}px {attention} {config.normalizer}"


# From a record back to its run


def run_of(record: dict) -> Run:
    """The run that a record is of, from its study and config.

    Raises:
        ValueError: a study or a config that no kind of run has.
    """
    study, config = record["study"], record["config"]
    if study not in RUNS:
        raise ValueError(f"study {study!r} is unknown: choose from {', '.join(RUNS)}")
    try:
        return _read(RUNS[study], config)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the config of record {record['key']} is of no {RUNS[study].__name__}: {error}") from error


def _read(kind: type, fields: dict) -> Any:
    """A run from its fields as JSON has them: nested dictionaries, lists for tuples."""
    read = {
        "network": config_of,
        "networks": lambda f: tuple(config_of(each) for each in f),
        "recipe": lambda f: Recipe(**f),
        "first": lambda f: Recipe(**f),
        **dict.fromkeys(("finetune", "attention", "blocks", "head", "sparsify"), lambda f: f and Recipe(**f)),
        "teacher": lambda f: f and _read(TrainRun, f),
        "trained": _training,
        "distillation": lambda f: _read(Distillation, f),
        "pruning": lambda f: f and _read(Pruning, f),
        "search": _search,
        "link": lambda f: f and Link(**f),
        "options": lambda f: Quantization(**f),
    }
    return kind(**{name: read.get(name, _tuples)(value) for name, value in fields.items()})


def _training(fields: dict) -> Training | QuantizationRun:
    kinds: dict[str, type] = {"search": SearchRun, "distillation": ReplacementRun, "options": QuantizationRun}
    return _read(next((kind for name, kind in kinds.items() if name in fields), TrainRun), fields)


def _search(fields: dict) -> Search | ReleasedSearch | PricedSearch:
    if "prices" in fields:
        return _read(PricedSearch, fields)
    fields = dict(fields)
    released = fields["first"]["decay_all"] and fields["finetune"]["decay_all"]
    return _read(ReleasedSearch if released else Search, fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
