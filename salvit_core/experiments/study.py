"""Runs the notebooks headless with papermill: salvit study --profile quick --only 01 --set seed=1."""

import ast
import contextlib
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import papermill
import tyro
import yaml
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from .. import workspace
from ..fields import shown
from ..training.recipe import Recipe
from . import store
from .execute import ABSENT, engine_of
from .profiles import profile as profile_of


@dataclass
class Outcome:
    """How one notebook ended: "" as problem means well. `absent` runs that it asked for are not on record."""

    name: str
    seconds: float
    problem: str = ""
    absent: int = 0

    def said(self) -> str:
        """What the study says of it."""
        partial = f"its tables and figures are partial: {self.absent} runs are not on record" if self.absent else ""
        return "; ".join(filter(None, [self.problem or "well", partial]))


def notebooks(only: str, folder: Path) -> list[Path]:
    """The notebooks to run, in order.

    Args:
        only: comma-separated beginnings of their names, such as "00,01"; "" for all.
        folder: where they are.

    Raises:
        ValueError: no notebooks in the folder, or a name that none begins with.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ValueError(f"{folder} holds no notebooks: name their folder with --notebooks")
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if not any(path.name.startswith(name) for path in paths):
            raise ValueError(f"no notebook begins with {name!r}: there are {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not wanted or any(path.name.startswith(name) for name in wanted)]


def parameters(settings: list[str]) -> dict:
    """Values from NAME=VALUE, read as YAML, so that 1 is a number and true is a truth value.

    Raises:
        ValueError: a setting without "=", or one whose value YAML cannot read.
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {setting!r}: expected NAME=VALUE, such as seed=1")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it is no YAML"
            raise ValueError(f"--set {setting!r} cannot be read ({problem}): give a value such as seed=1") from error
    return values


def check(paths: list[Path], values: dict) -> None:
    """Refuse parameters that a notebook does not have, or whose values are of another type than its own.

    Raises:
        ValueError: naming the notebook, the parameter and what the notebook does have.
    """
    for path in paths:
        known = papermill.inspect_notebook(str(path))
        if missing := sorted(set(values) - set(known)):
            raise ValueError(f"{path.stem} has no parameter {', '.join(missing)}: it has {', '.join(known)}")
        for name, value in values.items():
            default = ast.literal_eval(known[name]["default"])
            kinds = (int, float) if type(default) is float else (type(default),)
            if default is not None and type(value) not in kinds:
                raise ValueError(f"{name} is {shown(value)}: give one such as {default!r}, as in {path.stem}")
    if "seed" in values:
        Recipe(seed=values["seed"])  # says what a seed may be


@contextlib.contextmanager
def _live(name: str) -> Iterator[None]:
    """A line with the notebook's time and the number of records it wrote: one cell may run for many minutes."""
    runs = store.folder("local")
    before = set(runs.glob("*/*.json"))
    done = threading.Event()
    interval = 1.0 if sys.stderr.isatty() else 30.0
    line = tqdm(desc=name, bar_format="{desc}: {elapsed}{postfix}", file=sys.stderr)

    def refresh() -> None:
        while not done.wait(interval):
            line.set_postfix_str(f"{len(set(runs.glob('*/*.json')) - before)} new records")

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        line.set_postfix_str(f"{len(set(runs.glob('*/*.json')) - before)} new records")
        line.close()


def execute(path: Path, values: dict, output: Path, timeout: float) -> Outcome:
    """Run one notebook and say how it ended; the executed copy keeps what it printed even if it failed."""
    begin = time.perf_counter()
    problem, absent = "", 0
    copy = output / path.name
    try:
        with _live(path.stem):
            papermill.execute_notebook(
                str(path),
                str(copy),
                parameters=values,
                kernel_name="python3",
                cwd=str(path.parent),
                execution_timeout=math.ceil(timeout),  # zero would be no limit
                progress_bar=False,
            )
        cells = [cell for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
        printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
        absent = sum(map(int, re.findall(rf"^{ABSENT}.*?: (\d+) runs", printed, re.MULTILINE)))
        done = sum(cell.execution_count is not None for cell in cells)
        if done < len(cells):
            problem = f"ended early, after code cell {done} of {len(cells)}"
    except PapermillExecutionError as error:
        problem = f"cell {error.cell_index}: {error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a cell over its time: whatever it is, the other notebooks still run
        problem = f"{type(error).__name__}: {error}"
    return Outcome(path.stem, time.perf_counter() - begin, " ".join(problem.split()), absent)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this process instead of ending it at once, so that its kernels end too."""

    def stop(number: int, frame: object) -> None:
        print(f"stopped by {signal.Signals(number).name}: run it again to go on", file=sys.stderr)
        logging.disable()  # what the cells that are cut off have to say would bury this line
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # only there can a signal be handled
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)} if here else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _trains_with(engine: str) -> Iterator[None]:
    """What kernels read in their environment, which is this process's."""
    before = os.environ.get("SALVIT_ENGINE")
    os.environ["SALVIT_ENGINE"] = engine
    try:
        yield
    finally:
        os.environ.pop("SALVIT_ENGINE")
        if before is not None:
            os.environ["SALVIT_ENGINE"] = before


@dataclass(frozen=True)
class Study:
    """Run the notebooks headless; what they measured before is read, not measured again."""

    profile: str = ""
    """Size of the runs: smoke, quick, reference, short, paper. Default: quick, or reference with reference records."""
    records: str = "local"
    """"local" measures what is missing; "reference" shows the project's own records and measures nothing."""
    only: str = ""
    """Notebooks to run, by the beginnings of their names: 00,01. Default: all."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE: a parameter of the notebooks, such as seed=1; may be given several times."""
    engine: str | None = None
    """Where networks are trained: "local", side by side on this machine, or "ray", on all nodes of a Ray cluster of
    which this machine is one (`salvit evidence --help` says more). Nothing else is sent out: what is timed, private
    inference above all, is measured on this machine, one after the other, while no training of this study runs.
    Default: what SALVIT_ENGINE says, else local."""
    timeout: float | None = None
    """Seconds that a cell may run. Default: 2 hours with smoke and quick, else 7 days."""
    notebooks: Path | None = None
    """Folder to take the notebooks from. Default: notebooks/ in the workspace."""


def run(command: Study) -> int:
    """Run the study; returns the number of notebooks that failed.

    Raises:
        ValueError: an unknown profile, source of records, engine, notebook or parameter; nothing has run then.
    """
    values = {"profile": command.profile, **parameters(list(command.set))}
    if command.records != "local":
        values["records"] = command.records
    source = values.get("records", "local")
    store.folder(source)  # refuses an unknown one
    values["profile"] = values["profile"] or ("quick" if source == "local" else "reference")
    profile_of(values["profile"])
    engine = engine_of(command.engine)
    if command.timeout is not None and not 0 < command.timeout < math.inf:
        raise ValueError(f"timeout is {command.timeout}: give a positive number of seconds")
    paths = notebooks(command.only, command.notebooks or workspace.ROOT / "notebooks")
    check(paths, values)

    # One cell runs all of a notebook's trainings.
    timeout = command.timeout or (7200 if values["profile"] in ("smoke", "quick") else 7 * 24 * 3600)
    output = workspace.ROOT / "figures" / "executed"
    for path in paths:
        workspace.try_out(output / path.name)
    warnings.filterwarnings("ignore", module="papermill")
    with _stoppable(), _trains_with(engine):
        outcomes = [execute(path, values, output, timeout) for path in paths]

    width = max(len(outcome.name) for outcome in outcomes)
    print(f"\n{'notebook':{width}}  minutes  outcome")
    for outcome in outcomes:
        print(f"{outcome.name:{width}}  {outcome.seconds / 60:7.1f}  {outcome.said()}")
    print(f"executed copies in {output}, figures in {output.parent}")
    return sum(bool(outcome.problem) for outcome in outcomes)
