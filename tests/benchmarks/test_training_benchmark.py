"""The training benchmark runs and writes its report."""

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
