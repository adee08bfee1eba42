"""A calibration finds the speed behind its rows, is a record of its machine, and is used by the command line."""

import pytest
import torch

from salvit_core import cli, preset, workspace
from salvit_core.experiments import calibration, choices, latency, store
from salvit_core.experiments.runs import run_of
from salvit_core.models.vit import build
from salvit_core.private import LINKS, Speed, estimate

TRUE = Speed(rounds=1.5e-3, words=1.1e-7, offline_words=2.3e-8, products=4e-10, uncached_words=7e-9)
FEW = (
    preset("cct_2_3x1", "SA softmax"),
    preset("cct_4_3x1", "EA L2Q", width=64, image=32),
    preset("vit_2", "SA 2Quad"),
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)


def timed(config, queries=3, seed=0, speed=TRUE):
    """As `measured`, on a machine that is exactly as fast as `speed` says."""
    shape = (1, config.channels, config.image, config.image)
    rows = estimate(build(config), shape, speed=speed).operations
    return calibration.beside(config, rows.groupby("kind", observed=True)["seconds"].sum())


def run(speed, monkeypatch):
    monkeypatch.setattr(calibration, "measured", lambda config, *_: timed(config, speed=speed))
    return calibration.of_this_machine(FEW, 2)


def test_the_fit_finds_the_speed_behind_its_rows(monkeypatch):
    found = calibration.calibrate(run(TRUE, monkeypatch))
    assert vars(found) == pytest.approx(vars(TRUE), rel=1e-6)
    table = calibration.check(found, FEW[:2])
    assert table["modelled"].to_numpy() == pytest.approx(table["measured"].to_numpy(), rel=1e-6)


def test_no_term_is_negative(monkeypatch):
    rows = timed(FEW[0])
    rows["seconds"] = 1e-3 * rows["rounds"] - 1e-9 * rows["words"].clip(upper=125)
    assert min(vars(calibration.fit(rows)).values()) >= 0


def test_a_calibration_is_a_record_until_it_is_measured_again(monkeypatch):
    asked = run(TRUE, monkeypatch)
    assert calibration.speed(asked) is None
    first = calibration.calibrate(asked)
    assert run_of(store.find(asked)) == asked
    slow = run(Speed(3e-3, 1e-7, 1e-8, 1e-9, 1e-9), monkeypatch)
    assert calibration.calibrate(slow) == calibration.speed(slow) == first
    assert calibration.calibrate(slow, again=True).rounds == pytest.approx(3e-3)


def test_prices_are_the_links_share_of_one_layer():
    config = preset("cct_4_3x1", "SA L2Q")
    (price,) = choices.prices({"self": config}, LINKS["WAN (Cheetah)"]).values()
    rows = estimate(build(config), (1, 1, 8, 8)).operations
    rows = rows[(rows["layer"] == "block 2") & rows["kind"].isin(["projection", "scores", "normaliser", "values"])]
    assert price == pytest.approx(rows["rounds"].sum() * 0.02 + rows["serial_bytes"].sum() / 44e6, abs=1e-4)


def test_estimated_costs_are_a_table_of_operations():
    networks = {name: preset("cct_2_3x1", name) for name in ("SA softmax", "EA softmax")}
    for protocol in ("tuned", "stock"):
        bars = latency.by_kind(latency.estimated(networks, protocol), "rounds")
        assert list(bars.index) == list(networks)
        found = estimate(build(networks["EA softmax"]), (1, 1, 8, 8), protocol)
        assert bars.loc["EA softmax"].sum() == found.rounds


def test_the_command_says_which_numbers_are_exact_and_which_modelled(monkeypatch, capsys):
    asked = run(TRUE, monkeypatch)
    words = ["estimate", "--preset", "cct_2_3x1", "--row", "SA L2Q"]
    cli.main(words)
    said = capsys.readouterr().out
    assert "one way: exact" in said and "not modelled, this machine is not calibrated" in said
    calibration.calibrate(asked)
    monkeypatch.setattr(calibration, "of_this_machine", lambda: asked)
    cli.main([*words, "--link", "WAN (Cheetah)"])
    said = capsys.readouterr().out
    found = estimate(build(preset("cct_2_3x1", "SA L2Q")), (1, 1, 8, 8), link=LINKS["WAN (Cheetah)"], speed=TRUE)
    total = next(line for line in said.splitlines() if line.startswith("total")).split()
    assert [int(n) for n in total[1:4]] == [found.rounds, found.bytes, found.dealer_bytes]
    assert float(total[4]) == pytest.approx(found.seconds, abs=2e-3)
    assert "seconds on WAN (Cheetah): modelled" in said and "adds" in said
    cli.main([*words, "--protocol", "stock"])
    assert "not modelled, of tuned only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--link", "the moon"], "link 'the moon' is unknown: choose from LAN"),
        (["--row", "SA nothing"], "method 'SA nothing' is unknown"),
        (["--protocol", "fast"], "protocol 'fast' is unknown: choose from stock, tuned"),
        (["--provider", "HE"], "provider 'HE' is unknown"),
    ],
)
def test_bad_input_gets_one_line(words, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["estimate", "--preset", "cct_4_3x1", *words])
    assert message in str(ended.value) and "\n" not in str(ended.value)


def test_a_batch_of_none_gets_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["estimate", "--preset", "cct_4_3x1", "--batch", "0"])
    said = capsys.readouterr().err
    assert "batch is 0: give 1 or more" in said and said.count("\n") == 1


@pytest.mark.processes
def test_measured_seconds_stand_beside_the_work_of_the_estimate():
    torch.manual_seed(0)
    rows = calibration.measured(FEW[0], 2)
    assert (rows["seconds"] > 0).all() and set(rows.columns) >= {"network", "kind", "products"}
    assert rows["rounds"].sum() == estimate(build(FEW[0]), (1, 1, 8, 8)).rounds
