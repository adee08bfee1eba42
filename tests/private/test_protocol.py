"""Every protocol has an entry for every operation, and says where it holds; the estimate is what is measured."""

import json
from pathlib import Path

import pytest
import torch

from salvit_core import CCT, preset, private
from salvit_core.models import operations
from salvit_core.models.activations import ACTIVATIONS
from salvit_core.models.attention import ATTENTION
from salvit_core.models.graph import trace
from salvit_core.models.normalizers import NORMALIZERS
from salvit_core.models.rows import ROWS
from salvit_core.private import Speed, estimate
from salvit_core.private import protocol as protocols
from salvit_core.private.interpreter import unsupported
from salvit_core.private.links import LINKS
from salvit_core.private.stock import comm, crypten

OURS = [kind for kind in operations.known() if kind.__module__.startswith(("salvit_core", "torch"))]
# Rounds, bytes, serial bytes and the dealer's bytes of every layer and kind of every row with both protocols, one
# image of cct_4_3x1, as two real parties measured them.
COSTS = json.loads(Path(__file__).with_name("costs.json").read_text())
PROTOCOLS = {name: private.protocol_of(name) for name in protocols.PROTOCOLS}
COLUMNS = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("operation", OURS, ids=lambda kind: kind.__name__)
def test_every_operation_has_an_entry_and_says_where_it_holds(operation, protocol):
    table = PROTOCOLS[protocol]
    assert operation in table.modules, f"{protocol} has no protocol of {operation.__name__}"
    stated = (operation in table.domains) + (operation in table.everywhere)
    assert stated == 1, f"{protocol} must say where {operation.__name__} holds: a domain, or everywhere"


def test_a_protocol_that_lacks_an_operation_refuses_the_network_by_name():
    class Strange(operations.Operation):
        def forward(self, x):
            return x

        def flops(self, result, *inputs):
            return 0

    for protocol in PROTOCOLS.values():
        assert unsupported(trace(torch.nn.Sequential(Strange())), protocol) == ["Strange (0)"]


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_and_normaliser_has_its_protocols(attention):
    for normalizer in NORMALIZERS:
        graph = trace(CCT(preset("cct_2_3x1", attention=attention, normalizer=normalizer, layers=1)))
        for protocol in PROTOCOLS.values():
            assert unsupported(graph, protocol) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_protocols(activation):
    graph = trace(CCT(preset("cct_2_3x1", activation=activation, layers=1)))
    assert all(unsupported(graph, protocol) == [] for protocol in PROTOCOLS.values())


def rows(table):
    return {(row["layer"], row["kind"]): [int(row[name]) for name in COLUMNS[2:]] for row in table.to_dict("records")}


def known(protocol, row):
    return {(layer, kind): costs for layer, kind, *costs in COSTS[f"{protocol}, {row}"]}


# With these every operation of stock runs; the others: -m slow.
SOME = ("SA softmax", "SA 2ReLU", "SAL-ViT B=2", "Performer", "Nystromformer")
EVERY_ROW = [pytest.param(row, marks=() if row in SOME else pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize("row", ROWS)
def test_the_estimate_is_what_was_measured(row):
    """Exactly, by layer and kind: what two parties and a dealer sent each other, from shapes alone."""
    assert rows(estimate(CCT(preset("cct_4_3x1", row)), (1, 1, 8, 8)).operations) == known("tuned", row)


@pytest.mark.parametrize("row", EVERY_ROW)
def test_the_estimate_of_stock_is_what_was_measured(row):
    assert rows(estimate(CCT(preset("cct_4_3x1", row)), (1, 1, 8, 8), "stock").operations) == known("stock", row)


@pytest.mark.processes
@pytest.mark.parametrize("row", ["SA softmax", "SAL-ViT B=2", "Hamburger", "Nystromformer L2Q", "Dilated hybrid"])
def test_tuned_costs_what_it_did(row):
    result = private.infer(CCT(preset("cct_4_3x1", row)), torch.randn(1, 1, 8, 8), "tuned")
    assert rows(result.operations) == known("tuned", row)


@pytest.mark.processes
@pytest.mark.parametrize("row", EVERY_ROW)
def test_stock_costs_what_it_did(row):
    result = private.infer(CCT(preset("cct_4_3x1", row)), torch.randn(1, 1, 8, 8), "stock")
    assert rows(result.operations) == known("stock", row)


def test_an_estimate_of_stock_leaves_crypten_as_it_was():
    def state():
        generators = {name: dict(each) for name, each in crypten.generators.items()}
        return comm.get, crypten.mpc.get_default_provider(), crypten.cfg.communicator.verbose, generators

    model, before, drawn = CCT(preset("cct_2_3x1", "SA L2Q")), state(), torch.get_rng_state()
    first, second = (estimate(model, (2, 1, 8, 8), "stock", provider).operations for provider in ("TFP", "TTP"))
    assert first.equals(second)
    assert state() == before and (torch.get_rng_state() == drawn).all()


@pytest.mark.processes
def test_a_dealer_of_stock_sends_what_the_estimate_says():
    model = CCT(preset("cct_2_3x1", "SA softmax"))
    result = private.infer(model, torch.randn(1, 1, 8, 8), "stock", "TTP")
    assert rows(result.operations) == rows(estimate(model, (1, 1, 8, 8), "stock", "TTP").operations)


def test_an_estimate_grows_with_the_batch_and_knows_the_link():
    model, speed = CCT(preset("cct_2_3x1", "SA L2Q")), Speed(1e-4, 1e-8, 1e-8, 1e-9, 1e-9)
    one, four = (estimate(model, (batch, 1, 8, 8), speed=speed) for batch in (1, 4))
    assert one.rounds == four.rounds and 3 < four.bytes / one.bytes < 4.1 and one.dealer_bytes < four.dealer_bytes
    assert one.seconds < four.seconds and estimate(model, (1, 1, 8, 8)).seconds is None
    link = LINKS["WAN (Cheetah)"]
    far = estimate(model, (1, 1, 8, 8), speed=speed, link=link)
    assert far.seconds == pytest.approx(
        one.seconds + one.rounds * link.rtt / 2 + one.operations["serial_bytes"].sum() / link.bandwidth
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: estimate(m, (1, 1, 8, 8), "fast"), "protocol 'fast' is unknown: choose from stock, tuned"),
        (lambda m: estimate(m, (1, 1, 8, 8), provider="HE"), "provider 'HE' is unknown: choose from TFP, TTP"),
        (lambda m: estimate(m, (1, 1, 8, 8), bits=4), "bits is 4: give 8 to 22"),
        (lambda m: estimate(m, (1, 1, 8, 8), reveal="all"), "reveal 'all' is unknown: choose from logits, label"),
        (lambda m: estimate(m, (1, 1, 8, 8), "stock", reveal="label"), "opens the logits: choose tuned"),
        (lambda m: estimate(m, (1, 1, 8, 8), "stock", speed=Speed(1, 1, 1, 1, 1)), "cannot be modelled: a speed is of"),
        (
            lambda m: estimate(torch.nn.Sequential(torch.nn.Linear(4, 4)), (1, 1, 8, 8)),
            r"shape \(1, 1, 8, 8\) do not fit the network: ",
        ),
        (
            lambda m: estimate(torch.nn.Sequential(torch.nn.Linear(4, 4)), (1, 1, 8, 8), "stock"),
            "do not fit the network: ",
        ),
        (lambda m: estimate(m, (1, 1, 8)), r"shape is \(1, 1, 8\): give \(B, C, height, width\)"),
        (lambda m: estimate(m, (0, 1, 8, 8)), "each at least 1"),
        (lambda m: estimate(m, (1, 3, 8, 8)), r"do not fit: this network reads \(B, 1, 8, 8\)"),
        (lambda m: estimate(torch.nn.Sequential(torch.nn.Mish()), (1, 1, 8, 8)), r"no private protocol for mish \(0\)"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(CCT(preset("cct_2_3x1")))
