"""Runs the notebooks headless with papermill: python -m salvit_core.study --profile quick --only 01 --set seed=1."""

import argparse
import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from . import records
from .profiles import PROFILES

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@dataclass
class Outcome:
    """How one notebook ended: "" as problem means well."""

    name: str
    seconds: float
    problem: str = ""


def notebooks(only: str = "", folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks to run, in order.

    Args:
        only: comma-separated beginnings of their names, such as "00,01"; "" for all.
        folder: where they are.

    Raises:
        ValueError: a name that no notebook begins with.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if not any(path.name.startswith(name) for path in paths):
            raise ValueError(f"no notebook begins with {name!r}: there are {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not wanted or any(path.name.startswith(name) for name in wanted)]


def parameters(settings: list[str]) -> dict:
    """Values from NAME=VALUE, read as YAML, so that 1 is a number and true is a truth value.

    Raises:
        ValueError: a setting without "=".
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {setting!r}: expected NAME=VALUE, such as seed=1")
        values[name] = yaml.safe_load(value)
    return values


def check(paths: list[Path], values: dict) -> None:
    """Refuse parameters that a notebook does not have.

    Raises:
        ValueError: naming the notebook, the parameter and what the notebook does have.
    """
    for path in paths:
        known = papermill.inspect_notebook(str(path))
        if missing := sorted(set(values) - set(known)):
            raise ValueError(f"{path.stem} has no parameter {', '.join(missing)}: it has {', '.join(known)}")


@contextlib.contextmanager
def _live(name: str) -> Iterator[None]:
    """A line with the notebook's time and the number of records it wrote: one cell may run for many minutes."""
    runs = records.folder("local")
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
    problem = ""
    copy = output / path.name
    try:
        with _live(path.stem):
            papermill.execute_notebook(
                str(path),
                str(copy),
                parameters=values,
                kernel_name="python3",
                cwd=str(path.parent),
                execution_timeout=int(timeout),
                progress_bar=False,
            )
        cells = [cell for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
        done = sum(cell.execution_count is not None for cell in cells)
        if done < len(cells):
            problem = f"ended early, after code cell {done} of {len(cells)}"
    except PapermillExecutionError as error:
        problem = f"cell {error.cell_index}: {error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a cell over its time: whatever it is, the other notebooks still run
        problem = f"{type(error).__name__}: {error}"
    return Outcome(path.stem, time.perf_counter() - begin, " ".join(problem.split()))


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the number of notebooks that failed."""
    parser = argparse.ArgumentParser(prog="salvit_core.study", description=__doc__)
    parser.add_argument("--profile", default="quick", help=f"one of {', '.join(PROFILES)} (default quick)")
    parser.add_argument("--only", default="", help="notebooks to run, by the beginning of their names: 00,01")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook's parameter")
    parser.add_argument("--timeout", type=float, help="seconds a cell may run (smoke, quick: 2 h; else 7 d)")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="the folder to take the notebooks from")
    args = parser.parse_args(argv)
    try:
        paths = notebooks(args.only, args.notebooks)
        values = {"profile": args.profile, **parameters(args.set)}
        if values["profile"] not in PROFILES:
            raise ValueError(f"profile {values['profile']!r} is unknown: choose from {', '.join(PROFILES)}")
        records.folder(values.get("records", "local"))  # refuses an unknown source
        check(paths, values)
    except ValueError as error:
        parser.error(str(error))

    # One cell runs all of a notebook's trainings.
    timeout = args.timeout or (7200 if values["profile"] in ("smoke", "quick") else 7 * 24 * 3600)
    output = records.ROOT / "figures" / "executed"
    output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="papermill")
    outcomes = [execute(path, values, output, timeout) for path in paths]

    width = max(len(outcome.name) for outcome in outcomes)
    print(f"\n{'notebook':{width}}  minutes  outcome")
    for outcome in outcomes:
        print(f"{outcome.name:{width}}  {outcome.seconds / 60:7.1f}  {outcome.problem or 'well'}")
    print(f"executed copies in {output}, figures in {output.parent}")
    return sum(bool(outcome.problem) for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
