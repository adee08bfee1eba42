"""The study's command: what it refuses, and what it makes of notebooks that fail or end early."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from salvit_core import cli, workspace
from salvit_core.experiments import study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path / "root")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def notebook(folder, name, *cells):
    first = new_code_cell('profile = "quick"\nseed = 0', metadata={"tags": ["parameters"]})
    made = new_notebook(cells=[first, *(new_code_cell(cell) for cell in cells)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, folder / f"{name}.ipynb")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "profile=huge"], "profile 'huge' is unknown"),
        (["--set", "records=refrence"], "records 'refrence' are unknown: choose from local, reference"),
        (["--engine", "dask"], "engine 'dask' is unknown: choose from local, ray"),
        (["--profile", "huge"], "profile 'huge' is unknown: choose from smoke, quick, reference, short, paper"),
        (["--only", "77"], "no notebook begins with '77': there are 00_start_here, 01_attention_latency"),
        (["--set", "depth=3"], "00_start_here has no parameter depth: it has profile, records, seed"),
        (["--set", "seed"], "--set 'seed': expected NAME=VALUE"),
        (["--timeout", "0"], "timeout is 0.0: give a positive number of seconds"),
        (["--notebooks", "/nowhere"], "/nowhere holds no notebooks: name their folder with --notebooks"),
    ],
)
def test_refused_before_anything_runs(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(study, "execute", lambda *a: pytest.fail("a notebook ran"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *arguments])
    assert message in str(ended.value.code) and str(ended.value.code).startswith("error: ")


@pytest.mark.parametrize("command", ["study", "evidence"])
def test_an_engine_that_is_not_installed_is_one_line(monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--engine", "ray"])
    wanted = "error: engine 'ray' needs Ray, which is not installed: pip install 'salvit-core[ray]'"
    assert ended.value.code == wanted


def test_values_are_typed():
    assert study.parameters(["seed=1", "records=reference", "fast=true"]) == {
        "seed": 1,
        "records": "reference",
        "fast": True,
    }


PARTIAL = """
from salvit_core import preset
from salvit_core.experiments import execute
from salvit_core.experiments.runs import PrivateRun
for layers in (1, 2):
    runs = [PrivateRun(preset("cct_2_3x1", layers=layers), query=i, seed=987654) for i in range(layers)]
    execute.collect(runs, "reference")
"""


@pytest.mark.processes
def test_a_study_of_which_runs_are_missing_says_that_it_is_partial(folder, capsys):
    notebook(folder, "00_partial", PARTIAL)
    notebook(folder, "01_whole", "print('all there')")
    cli.main(["study", "--notebooks", str(folder), "--profile", "smoke"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:2].isdigit()}
    assert lines["00_partial"].endswith("well; its tables and figures are partial: 3 runs are not on record")
    assert lines["01_whole"].endswith("well")


@pytest.mark.processes
def test_failures_are_told_and_the_others_run(folder, capsys):
    notebook(folder, "00_fails", "print('so far')", "1 / 0", "print('never')")
    notebook(folder, "01_ends_early", "raise SystemExit", "print('never')")
    notebook(folder, "02_dies", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)", "print('never')")
    notebook(folder, "03_hangs", "import time; time.sleep(60)")
    notebook(folder, "04_well", "assert (profile, seed) == ('smoke', 5)")
    arguments = ["--notebooks", str(folder), "--profile", "smoke", "--set", "seed=5", "--timeout", "10"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *arguments])
    assert ended.value.code == 4
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:2].isdigit()}
    assert "cell 3: ZeroDivisionError: division by zero" in lines["00_fails"]
    assert "ended early" in lines["01_ends_early"] or "SystemExit" in lines["01_ends_early"]
    assert "Dead" in lines["02_dies"] or "died" in lines["02_dies"]
    assert "imed out" in lines["03_hangs"] or "Timeout" in lines["03_hangs"]
    assert lines["04_well"].endswith("well")
    executed = workspace.ROOT / "figures" / "executed" / "00_fails.ipynb"
    assert "so far" in executed.read_text()  # the copy of a failed notebook keeps what it printed
