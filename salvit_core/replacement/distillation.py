"""Function-preserving attention replacement, FAR (arXiv 2505.21535): another mechanism learns what attention did.

A trained network's attention is taken out of its blocks and something else put in. Three stages train it: the
replacements alone, to do what the teacher's attention and blocks do; the blocks, to classify; the head. Each is a
`training.loop.train` with its own recipe, so that a run may be stopped at any moment, between stages and within them.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from ..datasets import Data
from ..fields import Among, Checked, CountOrNone, Seed, Share
from ..models.attention import ATTENTION
from ..models.cct import CCT
from ..models.config import TransformerConfig
from ..models.normalizers import NORMALIZERS
from ..models.vit import ViT, build
from ..training.checkpoint import digest, not_finite
from ..training.distillation import projected
from ..training.loop import train
from ..training.preparation import others
from ..training.recipe import Recipe

LOSSES = ("combine", "similarity")

# As published, at batches of 256: 5e-4 of a batch of 512. Its warming up of 5 epochs is a line to 1/5, 2/5, ... of the
# rate, ours `training.recipe.learning_rate`.
ATTENTION_STAGE = Recipe(
    epochs=200, batch=256, lr=2.5e-4, weight_decay=0.05, warmup=5, augment="randaugment", erase=0.25
)
BLOCKS_STAGE = replace(ATTENTION_STAGE, epochs=100, lr=5e-5)
HEAD_STAGE = replace(ATTENTION_STAGE, epochs=30, lr=5e-4)


@dataclass(frozen=True)
class Distillation(Checked):
    """How attention is replaced, as plain data; the defaults are the published recipe.

    Attributes:
        by: the mechanism in attention's place.
        loss: of the first stage. "combine": cross-entropy and the cosine losses between the blocks' outputs.
            "similarity": the cosine losses between the attention outputs before their projections, alone.
        attention: how the replacements are trained, all else as the teacher has it; None: they are not
            (`--skip-train-attn`), and the second stage finds them as they were drawn.
        blocks: how the blocks are trained after it, with cross-entropy; None: they are not.
        head: how the head is trained at the end; None: it is not.
        layers: how many of the last layers are replaced (0: all).
        drop_path: largest share of residual branches that stochastic depth drops.
        seed: of the replacements' initial weights and of the three stages.
        normalizer: of the mechanism, where it has one; None: the teacher's.

    Raises:
        ValueError: a value of another type, unknown or out of range, or no stage at all.
    """

    by: Annotated[str, Among(*ATTENTION)] = "multi_lstm"
    loss: Annotated[str, Among(*LOSSES)] = "combine"
    attention: Recipe | None = ATTENTION_STAGE
    blocks: Recipe | None = BLOCKS_STAGE
    head: Recipe | None = HEAD_STAGE
    layers: CountOrNone = 0
    drop_path: Share = 0.1
    seed: Seed = 0
    normalizer: Annotated[str, Among(*NORMALIZERS)] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.normalizer and self.layers:
            raise ValueError(
                f"normalizer is {self.normalizer!r} with layers {self.layers}: a network has one, leave layers at 0"
            )
        if not (self.attention or self.blocks or self.head):
            raise ValueError("attention, blocks and head are all None: leave at least one stage to train")
        combined = {"cross_entropy": 1.0, "distill_blocks": 1.0, "distill_attention": 0.0}
        similar = {"cross_entropy": 0.0, "distill_blocks": 0.0, "distill_attention": 1.0}
        for name, weights in (
            ("attention", combined if self.loss == "combine" else similar),
            ("blocks", {}),
            ("head", {}),
        ):
            if recipe := getattr(self, name):
                object.__setattr__(self, name, replace(recipe, seed=self.seed, **weights))

    def stages(self) -> dict[str, Recipe]:
        """The stages that there are, by name, in order."""
        named = {"attention": self.attention, "blocks": self.blocks, "head": self.head}
        return {name: recipe for name, recipe in named.items() if recipe}


def replaced(
    teacher: nn.Module, by: str, layers: int = 0, drop_path: float = 0.1, normalizer: str | None = None
) -> nn.Module:
    """A copy of a trained network with another mechanism in attention's place; its other weights are the teacher's.

    Where both end with a linear map of M features to M, the replacement begins with the teacher's: it reads what the
    teacher's attention gave, so that nothing fresh stands behind what the first stage compares.

    Args:
        teacher: a CCT or a ViT.
        by: the mechanism's name.
        layers: how many of the last layers are replaced (0: all).
        drop_path: stochastic depth of the copy.
        normalizer: of all layers; None: the teacher's.

    Raises:
        ValueError: a network of another kind, more layers than it has, or one of which a pruned layer would stay.
    """
    if not isinstance(teacher, CCT | ViT):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, whose blocks have no names here: give a CCT or a ViT, "
            "or load DeiT's weights by name"
        )
    model = build(replaced_config(teacher.config, by, layers, drop_path, normalizer))
    inherited, ours = _inherited(model, teacher), model.state_dict()
    if other := next((name for name, tensor in inherited.items() if tensor.shape != ours[name].shape), None):
        raise ValueError(
            f"the teacher's {other} is of another size, since it is pruned: replace all that is pruned, or begin with "
            "the network that was not"
        )
    model.load_state_dict(inherited, strict=False)
    return model.to(next(teacher.parameters()).device)


def replaced_config(
    config: TransformerConfig, by: str, layers: int = 0, drop_path: float = 0.1, normalizer: str | None = None
) -> TransformerConfig:
    """The configuration of a network whose attention is replaced; arguments as in `replaced`.

    Raises:
        ValueError: more layers than there are, or attention that is replaced by itself.
    """
    if layers > config.layers:
        raise ValueError(f"layers is {layers}: the teacher has {config.layers}, give at most that many")
    count = layers or config.layers
    names = (*config.attention[: config.layers - count], *[by] * count)
    if names == config.attention:
        raise ValueError(f"the teacher's attention is {by!r} already: nothing is replaced, name another mechanism")
    return replace(config, attention=names, stochastic_depth=drop_path, normalizer=normalizer or config.normalizer)


def distil(run: Distillation, teacher: nn.Module, data: Data, folder: str | Path | None = None) -> dict:
    """Replace a trained network's attention and train what replaces it, stage by stage; test after each.

    With a folder the run can be stopped at any moment and started again: every stage has a checkpoint of its own there,
    named by the weights it starts from and how it goes on.

    Args:
        run: how.
        teacher: a trained CCT or ViT; it is moved to the data's device.
        data: the images.
        folder: where the checkpoints go.

    Returns:
        plain data: stages, name to `train`'s result of each, test_accuracy (%) of the last; and network, the trained
        network, not plain data.

    Raises:
        ValueError: a teacher that does not fit, one with weights that are not finite, or as `training.loop.fit`.
        FloatingPointError: as `training.loop.fit`.
    """
    if name := not_finite(teacher):
        raise ValueError(f"weight {name} of the teacher is not finite: train it again, or name another file")
    torch.manual_seed(run.seed)
    model = replaced(teacher.to(data.train.images.device), run.by, run.layers, run.drop_path, run.normalizer)
    stages = {}
    for name, recipe in run.stages().items():
        frozen = others(model, trained(model, teacher, name, run.loss))
        taught = teacher if recipe.distills else None
        stages[name] = train_stage(model, data, recipe, name, taught, frozen, folder)
    return {"stages": stages, "test_accuracy": stages[name]["test_accuracy"], "network": model}


def trained(model: nn.Module, teacher: nn.Module, stage: str, loss: str = "combine") -> list[str]:
    """The parts of a network that a stage trains, by their dotted names.

    The first stage trains all of every replacement. With "similarity" that is without a projection behind the place
    where the outputs are compared: no gradient reaches it, and it is the teacher's own.
    """
    if stage != "attention":
        return [stage]
    parts = []
    for i, (ours, theirs) in enumerate(zip(model.blocks, teacher.blocks, strict=True)):
        if model.config.attention[i] == teacher.config.attention[i]:
            continue
        behind = loss == "similarity" and projected(ours.attention) and projected(theirs.attention)
        names = [name for name, _ in ours.attention.named_parameters()]
        parts += [f"blocks.{i}.attention.{name}" for name in names if not (behind and name.startswith("projection."))]
    return parts


def train_stage(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    name: str,
    teacher: nn.Module | None = None,
    frozen: tuple[str, ...] = (),
    folder: str | Path | None = None,
    penalty=None,
) -> dict:
    """One stage, from the weights that the model has; `train`'s result."""
    teachers = "" if teacher is None else digest(*teacher.state_dict().values())
    text = repr((name, digest(*model.state_dict().values()), recipe, teachers, frozen, repr(penalty)))
    file = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    checkpoint = None if folder is None else Path(folder) / file
    return train(model, data, recipe, teacher, penalty, checkpoint, frozen, label=name)


def _inherited(model: nn.Module, teacher: nn.Module) -> dict[str, torch.Tensor]:
    """What a network has from its teacher: all outside of what is replaced, and projections of M features to M."""
    ours, found = model.state_dict(), dict(teacher.state_dict())
    for i, pair in enumerate(zip(model.blocks, teacher.blocks, strict=True)):
        if model.config.attention[i] != teacher.config.attention[i]:
            place = f"blocks.{i}.attention."
            same = all(projected(block.attention) for block in pair)
            kept = {f"{place}projection.weight", f"{place}projection.bias"} if same else set()
            found = {name: tensor for name, tensor in found.items() if not name.startswith(place) or name in kept}
    return {name: tensor for name, tensor in found.items() if name in ours}
