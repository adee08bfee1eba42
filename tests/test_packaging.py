"""What a newcomer relies on before any code runs: pins, clean notebooks, imports beside today's torch."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from importlinter.cli import lint_imports as import_linter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def requirements(lines):
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_lock_is_within_the_ranges():
    """Every direct requirement has a version in the lock, on every Python that is supported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    locked = {}
    for each in requirements((ROOT / "requirements.lock").read_text().splitlines()):
        (pin,) = each.specifier
        assert pin.operator == "==", each
        locked.setdefault(canonicalize_name(each.name), []).append((pin.version, each.marker))
    for each in requirements(wanted):
        if each.name == "salvit-core":
            continue
        for python in ("3.10", "3.11", "3.12", "3.13"):
            here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
            found = [v for v, marker in locked[canonicalize_name(each.name)] if not marker or marker.evaluate(here)]
            assert len(found) == 1 and each.specifier.contains(found[0]), (str(each), python, found)


def test_environment_is_made_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (conda_pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert conda_pip == [*(ROOT / "requirements.lock").read_text().splitlines(), "--no-deps --editable ."]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "python=3.11" in environment["dependencies"] and project["requires-python"] == ">=3.10,<3.14"


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.processes
def test_crypten_and_torchvision_import_after_the_repair():
    done = python(
        "from salvit_core import compat; compat.repair(); compat.repair()\n"
        "import crypten\nfrom torchvision import datasets\nfrom torchvision.transforms import v2\n"
        "print(crypten.__version__, datasets.CIFAR10.__name__)"
    )
    assert done.stdout.split() == ["0.4.1", "CIFAR10"], done.stderr


@pytest.mark.processes
def test_crypten_does_not_import_without_the_repair():
    """If this fails, CrypTen or torch changed and compat.py can shrink."""
    assert "torch.onnx._internal.registration" in python("import crypten").stderr


@pytest.mark.processes
def test_models_train_without_crypten():
    """A machine that only trains has neither CrypTen nor what notebooks need."""
    done = python(
        "import sys\n"
        "for name in ('crypten', 'papermill', 'IPython', 'matplotlib', 'psutil', 'joblib'): sys.modules[name] = None\n"
        "import torch\nfrom salvit_core import CCT, cost, preset\n"
        "model = CCT(preset('cct_2_3x1', attention=('self', 'external'), normalizer='l2q'))\n"
        "model(torch.zeros(2, 1, 8, 8)).sum().backward()\n"
        "print(cost.flops(model) > 0, all(p.grad is not None for p in model.parameters()))"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.processes
def test_an_archive_of_the_code_says_its_commit(tmp_path):
    """On a machine to which the code was carried without its history."""
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    parts = ["salvit_core", "pyproject.toml", ".git_archival.txt"]
    subprocess.run([*git, "archive", "HEAD", "-o", str(tmp_path / "code.tar"), *parts], check=True)
    subprocess.run(["tar", "xf", "code.tar"], cwd=tmp_path, check=True)
    code = "from salvit_core.experiments import store; print(store.__file__, store.commit())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert done.stdout.split() == [str(tmp_path / "salvit_core/experiments/store.py"), head[:12]], done.stderr


@pytest.mark.processes
def test_the_campaign_needs_no_crypten():
    """A GPU that is lent has torch and what records need."""
    done = python(
        "import sys\n"
        "for name in ('crypten', 'cryptography', 'papermill', 'matplotlib', 'seaborn'): sys.modules[name] = None\n"
        "from salvit_core import cli\ncli.main(['evidence', '--profile', 'short', '--list'])"
    )
    assert "left" in done.stdout.splitlines()[0] and done.returncode == 0, done.stderr


@pytest.mark.processes
def test_private_says_what_it_needs_without_crypten():
    done = python("import sys; sys.modules['crypten'] = None\nfrom salvit_core import private\nprivate.infer")
    assert done.returncode != 0 and "crypten" in done.stderr.splitlines()[-1]


@pytest.mark.processes
def test_an_installed_package_works_from_any_folder(tmp_path):
    """Not editable, from a folder that is no checkout: results go there, or where the workspace is said to be."""
    source, site, here, there = (tmp_path / name for name in ("source", "site", "here", "there"))
    here.mkdir()
    shutil.copytree(ROOT / "salvit_core", source / "salvit_core")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site, source]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    words = ["train", "--preset", "cct_2_3x1", "--data", "digits", "--epochs", "1", "--augment", "none"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("SALVIT_ROOT", None)
    for options, root in (([], here), (["--workspace", str(there)], there)):
        command = [sys.executable, "-m", "salvit_core.cli", *options, *words]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(list((root / "data" / "runs" / "trainings").rglob("result.json"))) == 1
    assert (
        str(site)
        in subprocess.run(
            [sys.executable, "-c", "import salvit_core; print(salvit_core.__file__)"],
            **{"cwd": here, "env": environment, "capture_output": True, "text": True},
        ).stdout
    )


def test_arrows_between_rooms_point_one_way(tmp_path):
    assert import_linter(no_cache=True, config_filename=str(ROOT / "pyproject.toml")) == 0, "run: lint-imports"


def test_no_room_imports_upwards_inside_a_function():
    """The import contract sees `import` inside functions; `importlib` is kept for what may not be installed."""
    allowed = {
        f"salvit_core/{name}.py"
        for name in ("__init__", "cli", "compat", "private/__init__", "models/attention/__init__")
    }
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "salvit_core").rglob("*.py")
        if "importlib.import_module" in path.read_text()
    ]
    assert set(found) <= allowed, found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_what_runs_leave_is_ignored_and_the_projects_own_is_not():
    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    left = ["figures/x.png", "figures/x.csv", "figures/executed/00.ipynb", "lab/00.ipynb", "data/runs/training/x.json"]
    kept = ["figures/reference/x.png", "data/reference/training/x.pt", "data/paper/x.csv", "notebooks/00.ipynb"]
    assert {path: ignored(path) for path in left + kept} == dict.fromkeys(left, True) | dict.fromkeys(kept, False)
    tracked = subprocess.run(["git", "ls-files", "figures"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked and all(path.startswith("figures/reference/") for path in tracked)


def test_notebooks_are_stripped():
    command = [sys.executable, "-m", "nbstripout", "--verify", *NOTEBOOKS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}run: nbstripout notebooks/*.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def cells(self, path):
        return json.loads(path.read_text())["cells"]

    def test_has_one_parameters_cell_of_literals(self, path):
        tagged = [cell for cell in self.cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1
        for statement in ast.parse("".join(tagged[0]["source"])).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)

    def test_cells_are_few_and_short(self, path):
        every = self.cells(path)
        code = ["".join(cell["source"]) for cell in every if cell["cell_type"] == "code"]
        assert len(every) <= 25 and max(source.count("\n") + 1 for source in code) <= 12

    def test_begins_with_its_question_and_has_an_exercise_with_a_solution(self, path):
        every = ["".join(cell["source"]) for cell in self.cells(path)]
        assert every[0].startswith(f"# {path.stem[:2]} ")
        assert all(f"**{each}**" in every[0] for each in ("Question.", "What to expect.", "Time."))
        (exercise,) = [source for source in every if "**Exercise.**" in source]
        solved = r"\*\*Exercise\.\*\*.+<details><summary>Solution</summary>\n\n.+\n\n</details>"
        assert re.search(solved, exercise, re.S)


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    tour = (ROOT / "notebooks" / "00_start_here.ipynb").read_text()
    for path in NOTEBOOKS:
        number = path.stem[:2]
        assert path.name in readme, path.name
        assert re.search(rf"\| {number} ", tour), path.name
