"""What the study's command refuses before a notebook runs, and what it leaves running when it is stopped: nothing."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from salvit_core import cli, workspace
from salvit_core.experiments import study


def notebook(folder, *cells):
    first = new_code_cell('profile = "quick"\nseed = 0\nrate = 0.5\nfast = False', metadata={"tags": ["parameters"]})
    made = new_notebook(cells=[first, *(new_code_cell(cell) for cell in cells)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir()
    nbformat.write(made, folder / "00_first.ipynb")
    return folder


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "seed=[1"], "--set 'seed=[1' cannot be read (expected ',' or ']'"),
        (["--set", "profile=[1]"], "profile [1] is unknown: choose from smoke"),
        (["--set", "records=[1]"], "records [1] are unknown"),
        (["--set", "seed=abc"], "seed is 'abc': give one such as 0, as in 00_first"),
        (["--set", "seed=1.5"], "seed is 1.5: give one such as 0, as in 00_first"),
        (["--set", "seed=true"], "seed is True: give one such as 0"),
        (["--set", "seed="], "seed is None: give one such as 0"),
        (["--set", "seed=-1"], "seed is -1: give 0 or more"),
        (["--set", "rate=high"], "rate is 'high': give one such as 0.5"),
        (["--set", "fast=1"], "fast is 1: give one such as False"),
        (["--timeout", "nan"], "timeout is nan: give a positive number of seconds"),
        (["--timeout", "inf"], "timeout is inf: give a positive number of seconds"),
        (["--timeout", "-1"], "timeout is -1.0: give a positive number of seconds"),
    ],
)
def test_refused_before_anything_runs(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(study, "execute", lambda *a: pytest.fail("a notebook ran"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "--notebooks", str(notebook(tmp_path / "notebooks")), *arguments])
    line = str(ended.value.code)
    assert line.startswith("error: ") and message in line and "\n" not in line


@pytest.mark.parametrize("words", [["--set", "seed=3"], ["--set", "rate=1"], ["--set", "fast=true"]])
def test_values_of_the_notebooks_own_types_are_taken(tmp_path, monkeypatch, words):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    monkeypatch.setattr(study, "execute", lambda path, values, *rest: study.Outcome(path.stem, 0.0))
    cli.main(["study", "--notebooks", str(notebook(tmp_path / "notebooks")), *words])


def test_a_place_for_the_copies_is_tried_first(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "execute", lambda *a: pytest.fail("a notebook ran"))
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    (tmp_path / "figures").write_text("theirs")
    with pytest.raises(SystemExit, match="error: .*cannot write .*executed.00_first.ipynb .*: make room"):
        cli.main(["study", "--notebooks", str(notebook(tmp_path / "notebooks"))])


@pytest.mark.parametrize("seconds, limit", [(0.5, 1), (2.2, 3), (10, 10)])
def test_a_limit_is_never_rounded_to_none(tmp_path, monkeypatch, seconds, limit):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    limits = []
    monkeypatch.setattr(study.papermill, "execute_notebook", lambda *a, **k: limits.append(k["execution_timeout"]))
    study.execute(notebook(tmp_path / "notebooks") / "00_first.ipynb", {}, tmp_path, seconds)
    assert limits == [limit]


TRAININGS = """
from salvit_core import preset
from salvit_core.experiments import execute, runs
from salvit_core.training import Recipe
recipes = [Recipe(epochs=500, batch=64, augment="none", seed=seed) for seed in (0, 1)]
execute.collect([runs.TrainRun("digits", preset("cct_2_3x1"), recipe) for recipe in recipes])
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_it_leaves_no_kernel_and_no_worker(tmp_path, number):
    words = ["study", "--notebooks", notebook(tmp_path / "notebooks", TRAININGS), "--profile", "smoke"]
    environment = {**os.environ, "SALVIT_ROOT": str(tmp_path), "LOKY_MAX_CPU_COUNT": "2"}
    command = [sys.executable, "-m", "salvit_core.cli", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"stopped by {number.name}: run it again to go on" in said
    assert "Traceback" not in said
    assert len(started) > 2  # a kernel and its workers
    assert not psutil.wait_procs(started, 30)[1]
