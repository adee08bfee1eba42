"""One JSON file per run: written once, whole or not at all, found again by what fixes the run, read back as a table.

A run is a frozen dataclass. Its key is a hash of its *canonical form*: a version, its study, then the fields that
change the result and are not at their default. A field that a run ignores is not in it, and a new field with a default
moves no key. The file's name is made for people and ends in eight digits of the key.

Looking at reference records writes and deletes nothing.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pandas as pd
import psutil
import torch
from filelock import FileLock

from .. import workspace
from ..fields import shown

VERSION = 1  # of the canonical form: raised when a default changes its meaning
SOURCES = ("local", "reference")
PACKAGES = ("torch", "torchvision", "crypten", "numpy")


class Run(Protocol):
    """What the store asks of a run, which is a frozen dataclass besides."""

    study: ClassVar[str]  # the folder that its record lives in

    @property
    def seed(self) -> int:
        """Of everything random in it."""

    def label(self) -> str:
        """What a person would call it: words, joined by spaces."""


def canonical(value: Any, root: bool = True) -> Any:
    """The canonical form of a run, or of a part of one: JSON's types only.

    A dataclass becomes its fields that are not at their default, without those that its `ignored()` names.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, list | tuple):
            return [canonical(each, False) for each in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value
    kept: dict[str, Any] = {"version": VERSION, "study": getattr(value, "study")} if root else {}  # noqa: B009
    kept["type"] = type(value).__name__
    ignored = value.ignored() if hasattr(value, "ignored") else set()
    for field in dataclasses.fields(value):
        now = getattr(value, field.name)
        if field.name not in ignored and not _is_default(field, now):
            kept[field.name] = canonical(now, False)
    return kept


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is not dataclasses.MISSING and canonical(value, False) == canonical(default, False)


def key(run: Run) -> str:
    """16 hexadecimal digits that tell a run from every other."""
    text = json.dumps(canonical(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name(run: Run) -> str:
    """The name of a run's files, without an ending: its label and eight digits of its key."""
    words = "".join(letter if letter.isalnum() else "-" for letter in run.label().lower())
    return f"{'-'.join(word for word in words.split('-') if word)[:80]}_{key(run)[:8]}"


def folder(source: str = "local") -> Path:
    """Where records live: "local", this machine's runs; "reference", the project's own, committed.

    Raises:
        ValueError: unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"records {source!r} are unknown: choose from {', '.join(SOURCES)}")
    return workspace.ROOT / "data" / ("runs" if source == "local" else "reference")


def path(run: Run, source: str = "local", ending: str = ".json") -> Path:
    """The file of a run's record, or with another ending what lies beside it."""
    return folder(source) / run.study / f"{name(run)}{ending}"


def find(run: Run, source: str = "local") -> dict | None:
    """The record of a run, or None.

    Raises:
        ValueError: a file that is no record, or the record of another run.
        OSError: a file that cannot be read.
    """
    file = path(run, source)
    return _read(file, run) if file.exists() or file.is_symlink() else None


def ensure(run: Run, measure: Callable[[Any], dict]) -> dict:
    """The local record of a run, from its file if it is there, else by measuring it now.

    Of two processes that want the same record one measures; the other waits and takes what it wrote.

    Args:
        run: everything that fixes the result.
        measure: called with the run; returns metrics, of which "history" (a list, per epoch) is kept apart.

    Raises:
        ValueError: a record that is not one, or metrics that JSON cannot hold; names the field.
        OSError: the record could not be written: said before anything is measured.
        FloatingPointError: what is measured is no longer a number; names the run.
    """
    if (record := find(run)) is not None:
        return record
    file = path(run)
    with _alone(run):
        if (record := find(run)) is not None:
            return record
        workspace.try_out(file)
        code = commit()  # of the code that runs, not of what the tree holds when it ends
        begin = time.perf_counter()
        try:
            metrics = dict(measure(run))
        except FloatingPointError as error:
            raise FloatingPointError(f"{run.label()}: {error}") from error
        record = {
            "study": run.study,
            "key": key(run),
            "config": dataclasses.asdict(run),  # type: ignore[call-overload]  # a run is a dataclass
            "seed": run.seed,
            "history": metrics.pop("history", []),
            "metrics": metrics,
            "wall_seconds": time.perf_counter() - begin,
            **circumstances(),
            "commit": code,
        }
        workspace.write_json(file, record)
    # Read back, so that a run gives the same whether it was just measured or found.
    return _read(file, run)


def keep(run: Run, record: dict, beside: dict[str, bytes]) -> None:
    """Put on record what was measured elsewhere; where there is a record by now, that stays.

    Args:
        run: what was measured.
        record: as `ensure` makes it, on the machine that measured.
        beside: what else it left, by its name in the folder of all studies; written first.

    Raises:
        ValueError: it is no record of this run.
        OSError: it cannot be written.
    """
    with _alone(run):
        if find(run) is None:
            for file, content in beside.items():
                workspace.write(folder() / file, content)
            workspace.write_json(path(run), record)
    find(run)


def _alone(run: Run) -> FileLock:
    """What a process holds while it makes the record of a run."""
    lock = folder() / ".locks" / f"{run.study}-{name(run)}"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock)


def load(study: str, source: str = "local") -> list[dict]:
    """All records of a study, ordered by file name."""
    return [_read(file) for file in sorted((folder(source) / study).glob("*.json"))]


def caption(found: Iterable[dict]) -> str:
    """One line on where numbers are from: source, how many runs, their seeds, when, on what. Versions: `listing`."""
    found = list(found)
    if not found:
        return "no records"
    dates = sorted({record["date"][:10] for record in found})
    machines = sorted({_named(record["machine"]) for record in found})
    seeds = sorted({record["seed"] for record in found if record.get("seed") is not None})
    seeded = "seed" + "s" * (len(seeds) > 1) + " " + ", ".join(map(str, seeds))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    sources = " and ".join(sorted({record["source"] for record in found}))
    runs = f"{len(found)} run" + "s" * (len(found) > 1)
    return ", ".join([f"{sources}: {runs}", *[seeded] * bool(seeds), when, "; ".join(machines)])


def seeds_said(counts: Iterable[int]) -> str:
    """How many seeds rows of a table have, in words: "one seed", "3 seeds", "1 to 3 seeds"."""
    least, most = min(counts := list(counts)), max(counts)
    if most == 1:
        return "one seed"
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def _named(machine: dict) -> str:
    named = f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine['accelerator']} beside {named}" if "accelerator" in machine else named


def listing(found: Iterable[dict]) -> pd.DataFrame:
    """What a notebook made or read: each record once, by study and date.

    Returns:
        columns study, key (the eight digits in its file's name), source, date, seed, seconds, commit, and one for each
        library, its version.
    """
    columns, every = ["study", "key", "source", "date", "seed", "seconds", "commit"], {}
    for record in found:
        columns += [name for name in record["versions"] if name not in columns]
        seconds, day = round(record["wall_seconds"], 1), record["date"][:16].replace("T", " ")
        short = {"key": record["key"][:8], "date": day, "seconds": seconds}
        every[record["study"], record["key"]] = record | short | record["versions"]
    return pd.DataFrame(list(every.values()), columns=columns).sort_values(["study", "date"], ignore_index=True)


def _read(file: Path, run: Run | None = None) -> dict:
    try:
        record = json.loads(workspace.readable(file).read_text(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"record {file} is not JSON ({error}): delete it to run it again") from error
    parts = {"study": str, "key": str, "config": dict, "metrics": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{file} is not a record: delete it to run it again")
    if run is not None and record["key"] != key(run):
        raise ValueError(
            f"record {file} is of another run: its key is {record['key']!r}, asked was {key(run)!r}; "
            "delete it to run it again"
        )
    if run is not None and (other := _difference(run, record["config"])):
        raise ValueError(f"record {file} is of another run: {other}; delete it to run it again")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _difference(run: Any, recorded: Any, name: str = "config") -> str:
    """Where a record's config is not that of a run; "" where it is. What the run ignores may differ."""
    if isinstance(run, tuple) and isinstance(recorded, list) and len(run) == len(recorded):
        pairs = enumerate(zip(run, recorded, strict=True))
        return next((found for i, (a, b) in pairs if (found := _difference(a, b, f"{name}[{i}]"))), "")
    if not dataclasses.is_dataclass(run):
        same = canonical(run, False) == canonical(recorded, False)
        return "" if same else f"its {name} is {shown(recorded)}, asked was {shown(run)}"
    if not isinstance(recorded, dict):
        return f"its {name} is {shown(recorded)}"
    ignored = run.ignored() if hasattr(run, "ignored") else set()
    for field in dataclasses.fields(run):
        now = getattr(run, field.name)
        if field.name in ignored or (field.name not in recorded and _is_default(field, now)):
            continue
        if found := _difference(now, recorded.get(field.name), f"{name}.{field.name}"):
            return found
    return ""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; an absent package is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def machine() -> dict:
    """What this ran on: processor, cores, memory in GiB, operating system; the accelerator, where there is one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        **({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


@functools.cache
def commit() -> str:
    """The git commit, with "+" if salvit_core/ or pyproject.toml differ from it; "" where nothing says it.

    What `git archive` made is no checkout, but has it in a file.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() and (said := checkout / ".git_archival.txt").is_file():
        found = said.read_text().strip()
        return "" if found.startswith("$") else found[:12]
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        code = ["--", ":/salvit_core", ":/pyproject.toml"]
        changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def circumstances() -> dict:
    """What every measurement says of itself: date, versions, machine, commit, and that it was measured."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "versions": versions(), "machine": machine(), "commit": commit(), "source": "measured"}


def save_report(report: dict, table: str, path: Path) -> None:
    """A benchmark's report as JSON, and its table in Markdown beside it."""
    workspace.write_json(path, report)
    workspace.write(path.with_suffix(".md"), table + "\n")
    print(f"{table}\n\n{path}")
