"""Moves a folder of records to the present names and keys: what a change of the canonical form needs, once.

    salvit migrate data/reference

Each record is read with the layout it was written in, its run rebuilt, and its files renamed; its metrics, history and
what it was measured on stay as they are. A record that is in place already is left alone, so that it may be run again.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from .. import workspace
from . import store
from .runs import RUNS, Run, run_of


def migrate(folder: Path) -> dict[Path, Path]:
    """Rename and rewrite every record under a folder of records.

    Args:
        folder: holds one folder per study, such as data/reference or data/runs.

    Returns:
        the old path of every record that moved, to the new one.

    Raises:
        ValueError: a record of no known layout, or two that would have one name; nothing has moved then.
    """
    planned: dict[Path, tuple[Path, dict]] = {}
    for file in sorted(folder.glob("*/*.json")):
        try:
            record = json.loads(workspace.readable(file).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not JSON ({error}): mend it or delete it") from error
        if not isinstance(record, dict) or "config" not in record:
            continue  # a benchmark or a table, no record
        try:
            run = _run_of(record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is no record that can be moved ({error}): mend it or delete it") from error
        new = folder / run.study / f"{store.name(run)}.json"
        if new in (path for path, _ in planned.values()):
            raise ValueError(f"{file} and another record are both of run {store.name(run)}: delete one of them")
        fields = {"study": run.study, "key": store.key(run), "config": dataclasses.asdict(run), "seed": run.seed}
        planned[file] = new, {**record, **fields}
    moved = {}
    for file, (new, record) in planned.items():
        if file == new and file.read_text() == json.dumps(record, indent=1):
            continue
        workspace.write_json(new, record)
        for ending in (".pt", ".unfinished"):
            if (beside := file.with_suffix(ending)).exists():
                beside.rename(new.with_suffix(ending))
        if file != new:
            file.unlink()
            moved[file] = new
    for left in {file.parent for file in moved}:  # whatever else is empty there is not ours
        if not any(left.iterdir()):
            left.rmdir()
    return moved


def _run_of(record: dict) -> Run:
    """The run of a record in the present layout or an older one."""
    study, config = record["study"], record["config"]
    if study in ("encrypted", "drift") and "data" in config["trained"]:
        config = {**config, "trained": _searched(config["trained"])}
    if study in _OLDER:
        return run_of({**record, **_OLDER[study](config)})
    if study in RUNS:
        return run_of({**record, "config": _searched(config) if study == "search" else config})
    raise ValueError(f"record {record.get('key')!r} is of study {study!r}, which no layout knows: move it elsewhere")


def _searched(config: dict) -> dict:
    """The first layout of a search had its fields beside those of the run, and `released` as one of them."""
    if "budget" not in config:
        return config
    config = dict(config)
    run = {name: config.pop(name) for name in ("data", "images", "teacher") if name in config}
    released = config.pop("released", False)
    first, finetune = config.pop("search"), config.pop("finetune")
    if released:
        first, finetune = ({**recipe, "decay_all": True} for recipe in (first, finetune))
    return {**run, "search": {**config, "first": first, "finetune": finetune, "seed": finetune["seed"]}}


# Studies of the first layout: one query of a network was a "latency", several were a "session".
_OLDER: dict[str, Callable[[dict], dict]] = {
    "latency": lambda config: {"study": "private", "config": config},
    "sessions": lambda config: {"study": "private", "config": config},
    "choices": lambda config: {"study": "search", "config": _searched(config)},
}
