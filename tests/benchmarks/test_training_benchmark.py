"""The training benchmark runs and writes its report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
@pytest.mark.timeout(700)
def test_benchmark_runs_and_writes_its_report(tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, ROOT / "benchmarks" / "training.py", "--quick", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [row["variant"] for row in report["rows"]] == ["recipe", "ours"] * 2
    assert all(row["images_per_second"] > 0 and row["process_mib"] > 0 for row in report["rows"])
    assert {"machine", "versions", "commit", "date"} <= report.keys()
    assert "| search phase | ours |" in done.stdout
    assert [row["network"] for row in report["accuracy"]["rows"]] == [
        "SAL-ViT B = 1, fine-tuning",
        "plain self-attention",
    ]
    for row in report["accuracy"]["rows"]:  # an epoch teaches either loop little, but something
        assert row["difference"] == row["ours"][0] - row["recipe"][0]
        assert min(row["ours"] + row["recipe"]) > 5


def test_a_run_that_is_stopped_leaves_the_rows_it_has(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("training_benchmark", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    facts = {"images_per_second": 2.0, "lowest": 1.0, "highest": 3.0, "process_mib": 1.0, "workers_mib": 0.0}

    def measured(run, row):
        if row != module.ROWS[0]:
            raise KeyboardInterrupt
        return [{"row": row, "variant": name, **facts, "device_mib": None, "speedup": 1.0} for name in module.VARIANTS]

    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1e9)
    out = tmp_path / "training.json"
    with pytest.raises(KeyboardInterrupt):
        module.main(["--quick", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [row["row"] for row in report["rows"]] == [module.ROWS[0]] * 2 and report["accuracy"]["rows"] == []
    assert "commit" in report and "| search phase | ours | 2.0 (1.0 to 3.0) |" in out.with_suffix(".md").read_text()
