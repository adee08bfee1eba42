"""One JSON file per run: written once, whole or not at all, and read back as a table.

A record holds the run's config, seed, metrics and history, its wall time, and what it was measured with and on. Its
file name is a hash of its config, so a study that was stopped finds what it already has.
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
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import psutil

ROOT = Path(os.environ.get("SALVIT_ROOT", Path(__file__).resolve().parents[1]))
SOURCES = ("local", "reference")
PACKAGES = ("torch", "torchvision", "crypten", "numpy")


def folder(source: str = "local") -> Path:
    """Where records live: "local", this machine's runs; "reference", the project's own, committed.

    Raises:
        ValueError: unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"records {source!r} are unknown: choose from {', '.join(SOURCES)}")
    return ROOT / "data" / ("runs" if source == "local" else "reference")


def key(study: str, config) -> str:
    """The name of a run: a hash of the canonical JSON of its study and config (a frozen dataclass)."""
    text = json.dumps([study, dataclasses.asdict(config)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ensure(study: str, config, run: Callable[..., dict], source: str = "local") -> dict:
    """The record of a run, from its file if it is there, else by running it now.

    Args:
        study: name of the folder that the record lives in, such as "latency".
        config: frozen dataclass with everything that fixes the run, its seed included.
        run: called with config; returns metrics, of which "history" (a list, per epoch) is kept apart.
        source: "local" computes what is missing; "reference" only reads.

    Raises:
        FileNotFoundError: a reference record that does not exist.
        ValueError: a record that is not JSON, or metrics that JSON cannot hold.
    """
    path = folder(source) / study / f"{key(study, config)}.json"
    if path.exists():
        return _read(path)
    if source == "reference":
        raise FileNotFoundError(f'no reference record {study}/{path.name} for {config}: run with records = "local"')
    code = commit()  # of the code that runs, not of what the tree holds when it ends
    begin = time.perf_counter()
    metrics = dict(run(config))
    record = {
        "study": study,
        "key": path.stem,
        "config": dataclasses.asdict(config),
        "seed": getattr(config, "seed", None),
        "history": metrics.pop("history", []),
        "metrics": metrics,
        "wall_seconds": time.perf_counter() - begin,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "commit": code,
        "source": "measured",
    }
    write(path, json.dumps(record, indent=1, allow_nan=False))
    # Read back, so that a run gives the same whether it was just computed or found.
    return _read(path)


def load(study: str, source: str = "local") -> list[dict]:
    """All records of a study, ordered by file name."""
    return [_read(path) for path in sorted((folder(source) / study).glob("*.json"))]


def table(found: list[dict]) -> pd.DataFrame:
    """Records as a table, one row each: columns config.*, metrics.*, machine.* and the rest, nested names dotted."""
    return pd.json_normalize(found)


def caption(found: list[dict]) -> str:
    """One line on where numbers are from: source, how many runs, when, on what, with which versions."""
    if not found:
        return "no records"
    dates = sorted({record["date"][:10] for record in found})
    machines = sorted({f"{r['machine']['processor']}, {r['machine']['cores']} cores" for r in found})
    used = {f"{name} {version}": 0 for r in found for name, version in r["versions"].items() if name != "python"}
    package = ", ".join(used)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    sources = " and ".join(sorted({record["source"] for record in found}))
    return f"{sources}: {len(found)} runs, {when}, {'; '.join(machines)}; {package}"


def listing(found: list[dict]) -> pd.DataFrame:
    """What a notebook made or read: study, key, date, seed, wall time, commit of each record."""
    columns = ["study", "key", "source", "date", "seed", "wall_seconds", "commit"]
    return pd.DataFrame(found, columns=columns).sort_values(["study", "date"], ignore_index=True)


def write(path: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never half of one.

    Args:
        path: the file; other processes may write the same one meanwhile.
        content: its text, or what writes it into an open file, such as torch.save does.

    Raises:
        OSError: no room or no right to write; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror or error}): make room, or write elsewhere"
        raise type(error)(error.errno, reason) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"record {path} is not JSON ({error}): delete it to run it again") from error


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
    """What this ran on: processor, cores, memory in GiB, operating system."""
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
    }


@functools.cache
def commit() -> str:
    """The git commit, with "+" if salvit_core/ or pyproject.toml differ from it; "" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        code = ["--", ":/salvit_core", ":/pyproject.toml"]
        changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
