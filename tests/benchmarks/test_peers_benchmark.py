"""What the benchmark against SPU hands over, and with SPU's environment there, that it runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from salvit_core.models.config import config_of
from salvit_core.models.vit import build

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "peers" / "run.py"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
there = pytest.mark.skipif(not PYTHON.exists(), reason="`make bench-peers` makes SPU's environment")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("peers_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["SA softmax", "SA 2Quad", "SAL-ViT B=1"])
def test_archive_rebuilds_the_network(benchmark, tmp_path, method):
    model, images = benchmark.network("cct_2_3x1", method)
    benchmark.export(model, images, tmp_path / "network.npz")
    with np.load(tmp_path / "network.npz") as archive:  # refuses pickles
        found = {name: archive[name] for name in archive.files}
    fields = json.loads(str(found.pop("config")))
    again = torch.from_numpy(found.pop("images"))
    copy = build(config_of(fields)).eval()
    assert fields["attention"] == list(model.config.attention) and copy.config == model.config
    assert {name: weight.shape for name, weight in found.items()} == {
        name: tuple(weight.shape) for name, weight in copy.state_dict().items()
    }
    assert {weight.dtype for weight in found.values()} == {np.dtype("float32")}
    assert again.shape == (1, copy.config.channels, copy.config.image, copy.config.image)
    copy.load_state_dict({name: torch.from_numpy(weight) for name, weight in found.items()})
    with torch.no_grad():
        assert torch.equal(copy(again), model(images))


# With GELU itself, JAX computes what torch does. As initialised, networks hardly tell one normaliser from another.
CLEAR = """
import json, sys
import jax, numpy as np
import spu_vit
spu_vit.gelu = lambda x: jax.nn.gelu(x, approximate=False)
weights = dict(np.load(sys.argv[1]))
config, images = json.loads(str(weights.pop("config"))), weights.pop("images")
print(json.dumps(jax.jit(lambda w, x: spu_vit.network(config, w, x))(weights, images).tolist()))
"""


@pytest.mark.slow
@there
@pytest.mark.parametrize("method", ["SA softmax", "SA 2Quad", "SAL-ViT B=1"])
def test_same_network_in_the_clear(benchmark, tmp_path, method):
    model, images = benchmark.network("cct_2_3x1", method)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
        benchmark.export(model, images, tmp_path / "network.npz")
        wanted = model(images)
    command = [PYTHON, "-c", CLEAR, tmp_path / "network.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    assert wanted.abs().max() > 1
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), wanted, rtol=0, atol=1e-3)


@pytest.mark.slow
@there
def test_benchmark_runs_and_logits_are_right(tmp_path):
    out = tmp_path / "peers.json"
    command = [sys.executable, SCRIPT, "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 9 and report["peer"]["gelu_error"] < 0.005
    assert all(row["largest_error"] < 0.002 and row["seconds"] > 0 for row in report["rows"])
    assert all(row["bytes"] > 0 and row["messages"] > 0 for row in report["rows"])
    assert all(row["clear_error"] < 0.0005 for row in report["rows"] if row["system"].startswith("SPU"))
    assert "| SA softmax | SPU SEMI2K |" in done.stdout
