"""What a training leaves on disk after every epoch, and how it goes on from there: bit for bit on a CPU."""

import dataclasses
import hashlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .. import workspace
from ..datasets import Data
from ..models.config import Network, config_of
from .preparation import Optimizers
from .processes import process
from .recipe import Recipe


def digest(*tensors: torch.Tensor) -> str:
    """Twelve digits that tell the bytes of some tensors from others."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:12]


def described(model: nn.Module) -> dict:
    """A network's configuration as plain data; of one that others wrote, its operations."""
    config: Any = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {"operations": hashlib.sha256(str(model).encode()).hexdigest()[:12]}


def identity(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    teacher: nn.Module | None,
    penalty: object,
    frozen: tuple[str, ...],
) -> dict:
    """What must agree for a checkpoint to be continued, as flat plain data."""
    return {
        "data": data.name,
        "training labels": digest(data.train.labels),  # another split, or another order, is another run
        "training images": digest(data.train.images),
        "network": type(model).__name__,
        **described(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **dataclasses.asdict(recipe),
        "teacher": None if teacher is None else digest(*teacher.state_dict().values()),
        "penalty": None if penalty is None else repr(penalty),
        "frozen": tuple(frozen),
    }


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_states(generator: torch.Generator) -> dict:
    name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]  # a tuple, since legacy
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]  # an array
        "torch": torch.get_rng_state(),
        "batches": generator.get_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict, generator: torch.Generator) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    generator.set_state(states["batches"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(
    path: Path,
    identity: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    generator: torch.Generator,
    history: list[dict],
    best: dict | None,
) -> None:
    """Write a checkpoint, whole or not at all; the first process does, with the random states of all."""
    rank, world = process()
    states: list = [_random_states(generator)]
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, _random_states(generator))
    if rank:
        return
    content = {
        "identity": identity,
        "epoch": history[-1]["epoch"],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": states,
        "history": history,
        "best": best,
    }
    workspace.write(path, lambda file: torch.save(content, file))


def resume(
    path: Path,
    identity: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    generator: torch.Generator,
) -> tuple[list[dict], dict | None]:
    """Put model, optimizer and random generators where the checkpoint left them; its history and best weights.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: a file that is no checkpoint, lacks a part of one, or is of another run; names it.
    """
    # What a checkpoint was written without, it was trained without.
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    content = continued(path, identity, ("model", "optimizer", "random", "history", "best"), defaults)
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        rank = process()[0]
        if rank < len(content["random"]):
            _set_random_states(content["random"][rank], generator)
        else:  # more processes than before: a new one needs the batches' state all the same
            generator.set_state(content["random"][0]["batches"])
        return [dict(facts) for facts in content["history"]], content["best"]
    except _UNFIT as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"checkpoint {path} does not fit ({reason}): name another file or delete this one") from error


def continued(path: Path, identity: dict, parts: tuple[str, ...], defaults: dict | None = None) -> dict:
    """What a checkpoint holds that is of a run, and of no other.

    Args:
        path: the file.
        identity: of the run, flat plain data; the checkpoint has its own.
        parts: that it must have besides.
        defaults: what its identity means where it does not say it.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: a file that is no checkpoint, lacks a part of one, or is of another run; names it.
    """
    content = loaded(path, "a checkpoint of this program")
    lacking = [name for name in ("identity", *parts) if not isinstance(content, dict) or name not in content]
    if lacking:
        raise ValueError(f"checkpoint {path} lacks {', '.join(lacking)}: name another file or delete this one")
    found = content["identity"]
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint {path} does not say of which run it is: name another file or delete this one")
    found = (defaults or {}) | found
    for name in {**found, **identity}:
        if found.get(name) != identity.get(name):
            raise ValueError(
                f"checkpoint {path} is of another run: its {name} is {found.get(name)!r}, here {identity.get(name)!r}; "
                "name another file or delete this one"
            )
    return content


def result_of(run: Path, writers: str) -> tuple[Network, dict]:
    """The configuration of the network in a folder that a command wrote, and all that its result.json says.

    Args:
        run: the folder.
        writers: the commands that write such folders, for the messages: "salvit train or search".

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: no such file, or one without the configuration of a network and its data set; names it.
    """
    result = run / "result.json"
    if not result.is_file():
        raise ValueError(f"run {run} holds no result.json: give a folder that {writers} wrote")
    try:
        said = json.loads(workspace.readable(result).read_text())
        config, _ = config_of(said["config"]), said["data"]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{result} is no result of {writers} ({reason}): train again") from error
    return config, said


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights that a training left in a file into a network.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: it holds no weights, or those of another network, or some that are not finite; names it.
    """
    weights = loaded(path, "a file of weights")
    try:
        model.load_state_dict(weights)
    except _UNFIT as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} are of another network ({reason}): name those of this one") from error
    if name := not_finite(model):
        raise ValueError(f"{name} in {path} is not finite: train again, with a lower lr")


def not_finite(model: nn.Module) -> str:
    """The first of a network's weights and buffers that holds a number which is not finite; "" if none does."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if not state or torch.stack([tensor.isfinite().all() for tensor in state.values()]).all():
        return ""
    return next(name for name, tensor in state.items() if not tensor.isfinite().all())


# What a state that does not fit raises, on its way into a network, an optimizer or a generator.
_UNFIT = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


def loaded(path: Path, what: str) -> Any:
    """What torch.save wrote. Only what cannot be decoded is to be deleted: what cannot be read may be sound.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: it is not what it should be; names it.
    """
    workspace.readable(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNFIT, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not {what} ({type(error).__name__}): delete it") from error
