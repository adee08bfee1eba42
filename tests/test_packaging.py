"""What a newcomer relies on before any code runs: pins, clean notebooks, imports beside today's torch."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_has_the_pins_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["test"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (conda_pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert conda_pip == [*pins, "--editable ."]
    assert "python=3.11" in environment["dependencies"] and project["requires-python"] == ">=3.10,<3.14"


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_crypten_and_torchvision_import_after_the_repair():
    done = python(
        "from salvit_core import compat; compat.repair(); compat.repair()\n"
        "import crypten\nfrom torchvision import datasets\nfrom torchvision.transforms import v2\n"
        "print(crypten.__version__, datasets.CIFAR10.__name__)"
    )
    assert done.stdout.split() == ["0.4.1", "CIFAR10"], done.stderr


def test_crypten_does_not_import_without_the_repair():
    """If this fails, CrypTen or torch changed and compat.py can shrink."""
    assert "torch.onnx._internal.registration" in python("import crypten").stderr


def test_models_train_without_crypten():
    """A machine that only trains has neither CrypTen nor this package's pins."""
    done = python(
        "import sys\n"
        "for name in ('crypten', 'papermill', 'IPython', 'matplotlib'): sys.modules[name] = None\n"
        "import torch\nfrom salvit_core import CCT, cost, preset\n"
        "model = CCT(preset('cct_2_3x1', attention=('self', 'external'), normalizer='l2q'))\n"
        "model(torch.zeros(2, 1, 8, 8)).sum().backward()\n"
        "print(cost.flops(model) > 0, all(p.grad is not None for p in model.parameters()))"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_private_says_what_it_needs_without_crypten():
    done = python("import sys; sys.modules['crypten'] = None\nimport salvit_core.private")
    assert done.returncode != 0 and "crypten" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def cells(self, path):
        return json.loads(path.read_text())["cells"]

    def test_is_stripped(self, path):
        done = subprocess.run([sys.executable, "-m", "nbstripout", "--verify", path], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}run: nbstripout notebooks/*.ipynb"

    def test_has_one_parameters_cell_of_literals(self, path):
        tagged = [cell for cell in self.cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1
        for statement in ast.parse("".join(tagged[0]["source"])).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)

    def test_cells_are_short(self, path):
        code = ["".join(cell["source"]) for cell in self.cells(path) if cell["cell_type"] == "code"]
        assert max(source.count("\n") + 1 for source in code) <= 30


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    tour = (ROOT / "notebooks" / "00_start_here.ipynb").read_text()
    for path in NOTEBOOKS:
        number = path.stem[:2]
        assert path.name in readme, path.name
        assert re.search(rf"\| {number} ", tour), path.name
