"""The benchmark of replaced and pruned networks runs and writes its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_benchmark_runs_and_writes_its_report(tmp_path):
    out = tmp_path / "replacement.json"
    command = [sys.executable, ROOT / "benchmarks" / "replacement.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows[:4]] == ["attention", "multi-head BiLSTM", "50% masked", "50% removed"]
    parameters = [row["parameters"] for row in rows[:4]]
    assert parameters[3] < parameters[2] == parameters[1] > parameters[0]
    assert all(0 < row["least"] <= row["ms"] <= row["most"] for row in rows)
    assert "| network | batch | variant |" in done.stdout
