"""Every notebook as `make study PROFILE=smoke` runs it, in a root of its own, and a second time from its records."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("notebooks")]  # one root, in order
# What each notebook leaves in figures/: pictures (PNG and PDF) and tables (CSV).
PICTURES = {
    "00": [
        "tour_shares",
        "protocol_two_parties",
        "reciprocal_domain",
        "tour_one_private_inference",
        "estimated_costs",
        "figure_normalizer_curves",
    ],
    "01": [
        "table_3_latency_by_operation",
        "table_3_bytes_and_rounds",
        "table_4_latency_ratios",
        "table_4_salvit_by_layer",
        "table_4_tuned_by_operation",
        "table_4_tuned_ratios",
    ],
    "02": ["l2q_curves", "figure_7_l2q_granularity", "figure_8_l2q_parameters", "figure_7_private_cost"],
    "03": [
        "algorithm_1_alpha",
        "figure_1_accuracy_latency",
        "figure_5_accuracy_latency",
        "figure_6_normalizers",
        "search_against_the_truth",
        "choices_accuracy_latency",
    ],
    "04": ["figure_9_learned_parameters", "figure_9_heat_maps", "figure_9_attention_distance"],
    "05": ["encrypted_accuracy", "encrypted_drift", "encrypted_precision"],
    "09": [
        "table_4_stock_and_tuned",
        "links_modelled",
        "links_emulated",
        "scaling_tokens",
        "scaling_depth",
        "scaling_batch",
        "activation_cost",
        "cost_bar",
    ],
    "06": [
        "efficient_trade_offs",
        "table_2_complete",
        "efficient_resolution_clear",
        "efficient_resolution_private",
        "efficient_attention_maps",
        "efficient_attention_map",
    ],
    "07": ["quantization_bits", "bits_costs", "bits_lookup", "accelerator_roofline"],
    "08": [
        "replaced_accuracy",
        "replaced_channels",
        "replaced_importance",
        "replaced_patches",
        "replaced_rounds_and_bytes",
    ],
}
TABLES = {
    "00": [],
    "01": [
        "table_2_attention_latency",
        "table_3_normalizer_latency",
        "table_4_latency",
        "table_4_tuned_latency",
        "table_7_parameters_flops",
    ],
    "02": ["figure_7_private_cost"],
    "03": ["table_6_search", "table_4_accuracy_latency", "search_truth", "search_picks", "choices_alpha"],
    "04": ["figure_9_learned_parameters", "figure_9_stripes", "figure_9_reset_to_means"],
    "05": ["encrypted_accuracy", "encrypted_precision", "encrypted_ranges"],
    "09": [
        "table_4_encrypted_latency",
        "links_modelled",
        "links_emulated",
        "dealers",
        "activation_cost",
    ],
    "06": ["efficient_attention", "table_2_complete", "efficient_resolution"],
    "07": [
        "quantization",
        "bits_costs",
        "bits_lookup",
        "bits_divisors",
        "bits_small_ring",
        "bits_answers",
        "bits_beside",
        "accelerator",
    ],
    "08": [
        "replaced_accuracy",
        "replaced_pruning",
        "replaced_costs",
        "replaced_pruned_costs",
        "replaced_seconds",
        "replaced_clear",
    ],
}


def run(root, only, *settings):
    command = [sys.executable, "-m", "salvit_core.cli", "study", "--profile", "smoke", "--only", only]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "SALVIT_ROOT": str(root)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)


def shown(root, number):
    """How many figures a reader of the executed notebook sees."""
    (path,) = (root / "figures" / "executed").glob(f"{number}_*.ipynb")
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "notebooks", made / "notebooks")
    shutil.copytree(ROOT / "data" / "paper", made / "data" / "paper")
    shutil.copytree(ROOT / "data" / "reference", made / "data" / "reference")
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", PICTURES)
def test_notebook_runs(root, number):
    done = run(root, number)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in PICTURES[number]:
        for kind in ("png", "pdf"):
            assert (root / "figures" / f"{name}.{kind}").stat().st_size > 5000, name
    for name in TABLES[number]:
        assert (root / "figures" / f"{name}.csv").stat().st_size > 100, name
    assert shown(root, number) >= len(PICTURES[number])
    assert not tables.faults(root)
    written = {path: path.stat().st_mtime_ns for path in (root / "data" / "runs").rglob("*.json")}
    assert written
    if number in ("01", "03"):  # nothing is run twice; the other notebooks share these two's machinery
        assert run(root, number).returncode == 0
        again = {path: path.stat().st_mtime_ns for path in (root / "data" / "runs").rglob("*.json")}
        assert again == written


@pytest.mark.timeout(600)
def test_efficient_attention_in_a_plain_vision_transformer(root):
    """With figures of its own beside those of the CCT, and the comparison in the records as well."""
    done = run(root, "06", "backbone=vit")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("efficient_trade_offs_vit", "efficient_attention_maps_vit"):
        assert (root / "figures" / f"{name}.png").stat().st_size > 5000, name
    for name in ("attention", "attention_vit"):  # the other is of the CCT's run, above
        rows = json.loads((root / "data" / "runs" / "efficient" / f"{name}.json").read_text())
        assert {"SA softmax", "Linformer"} < {row["method"] for row in rows}
        assert all(0 < row["accuracy"] <= 100 and row["private_s"] > 0 for row in rows)


@pytest.mark.timeout(600)
def test_the_projects_own_records_are_shown(root):
    """With no data set to be had; nothing is measured, written beside them or removed."""
    reference = root / "data" / "reference"
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    runs = set((root / "data" / "runs").rglob("*"))
    done = run(root, "00,01,02,03,04,05,06,07,08,09", "records=reference", "profile=reference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not tables.faults(root)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before
    assert set((root / "data" / "runs").rglob("*")) == runs
