"""Tasks that run side by side: what each hears, how few messages they need, whose the costs are."""

import contextlib

import pytest
import torch

from salvit_core import CCT, preset, private
from salvit_core.models.graph import trace
from salvit_core.private.interpreter import SecretInterpreter
from salvit_core.private.protocol import SERVER
from salvit_core.private.tuned import protocol as tuned
from salvit_core.private.tuned.arithmetic.schedule import Schedule
from salvit_core.private.tuned.arithmetic.share import Weight, session


def words(*values):
    return torch.tensor(values)


class Echo:
    """A step that gives each task its own words back, and notes who took part."""

    def __init__(self):
        self.steps, self.charged = [], []
        self.schedule = Schedule(self.step, self.charged.append)

    def step(self, tasks):
        self.steps.append([(task.node, [x.tolist() for x in task.says], list(task.hears)) for task in tasks])
        return [[x.clone() for x in task.says] for task in tasks]

    def says(self, *values):
        (x,) = self.schedule.exchange([words(*values)], [torch.Size((len(values),))])
        return x.tolist()


def test_who_waits_speaks_in_one_message_and_hears_its_own():
    echo, heard = Echo(), {}

    def chain(node, length):
        heard[node] = [echo.says(10 * node + i, node) for i in range(length)]

    for node, length in enumerate((3, 1, 2)):
        echo.schedule.start(node, lambda node=node, length=length: chain(node, length))
    echo.schedule.run()
    assert heard == {node: [[10 * node + i, node] for i in range(n)] for node, n in enumerate((3, 1, 2))}
    assert [[node for node, _, _ in step] for step in echo.steps] == [[0, 1, 2], [0, 2], [0]]


def test_whoever_asks_early_waits_and_the_others_go_on():
    echo, order = Echo(), []

    def slow():
        echo.says(1), echo.says(2)
        order.append("slow")
        return 7

    def reader(later):
        order.append(f"reader heard {later.result()}")

    def quick():
        echo.says(3)
        order.append("quick")

    later = echo.schedule.start(0, slow, torch.Size((1,)))
    for node in (1, 2):
        echo.schedule.start(node, lambda: reader(later))
    echo.schedule.start(3, quick)
    echo.schedule.run()
    assert order == ["quick", "slow", "reader heard 7", "reader heard 7"]
    assert later.shape == torch.Size((1,)) and len(echo.steps) == 2


def test_a_task_starts_others_of_its_own_node():
    echo, found = Echo(), []

    def outer():
        inner = echo.schedule.start(echo.schedule.node(), lambda: echo.says(1), torch.Size((1,)))
        echo.says(2)
        found.append(inner.result())

    echo.schedule.start(5, outer)
    echo.schedule.run()
    assert found == [[1]] and len(echo.steps) == 1 and set(echo.charged) == {5}


def test_an_error_in_a_task_is_the_run_s():
    echo = Echo()
    echo.schedule.start(0, lambda: echo.says(1))
    echo.schedule.start(1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        echo.schedule.run()


@pytest.fixture
def in_turn(monkeypatch):
    """Makes a function that estimates with one node after the other."""

    def estimate(*given):
        with monkeypatch.context() as patch:
            patch.setattr(tuned.Tuned, "schedule", lambda self, charge: contextlib.nullcontext())
            return private.estimate(*given)

    return estimate


HEADS = preset("cct_2_3x1", attention=(("self", "external"), ("external", "self")), normalizer="l2q")
NETWORKS = {
    "both attentions of a layer": (HEADS, 14),
    "three softmaxes": (preset("cct_4_3x1", "Nystromformer"), 40),
    "a reciprocal beside the values": (preset("cct_4_3x1", "SAL-ViT B=2"), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_words_in_fewer_rounds(name, in_turn):
    """Whatever is charged to whom, the sums are those of one node after the other, less the rounds that are shared."""
    config, saved = NETWORKS[name]
    together, one_by_one = (estimate(CCT(config), (1, 1, 8, 8)) for estimate in (private.estimate, in_turn))
    assert together.bytes == one_by_one.bytes and together.dealer_bytes == one_by_one.dealer_bytes
    assert together.rounds <= one_by_one.rounds - saved
    # What is sent both ways at once takes as long as the longer of the two.
    serial = [each.operations["serial_bytes"].sum() for each in (together, one_by_one)]
    assert together.bytes <= serial[0] <= serial[1]


@pytest.mark.processes
@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_side_by_side_the_answer_is_right_and_every_row_has_its_costs(provider):
    torch.manual_seed(0)
    model, images = CCT(HEADS).eval(), torch.randn(2, 1, 8, 8)
    result = private.infer(model, images, "tuned", provider)
    expected = private.estimate(model, images.shape).operations
    assert result.error < 1e-3 and result.operations["seconds"].min() >= 0
    columns = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]
    assert result.operations[columns].astype(str).equals(expected[columns].astype(str))
    assert result.operations["seconds"].sum() == pytest.approx(result.seconds, rel=0.05)


def test_values_are_forgotten_once_all_have_read_them():
    held = []

    class Watching(SecretInterpreter):
        def _run_one(self, node, index):
            held.append(len(self.env))
            return super()._run_one(node, index)

    graph = tuned.PROTOCOL.rewrite(trace(CCT(preset("cct_4_3x1", "SA softmax")))).to("meta")
    network = Watching(graph, tuned.PROTOCOL)
    network.secrets = {name: Weight(name, tensor, False) for name, tensor in graph.state_dict().items()}
    session.begin(SERVER)
    session.recording = True
    try:
        tuned.PROTOCOL.record(network, (1, 1, 8, 8), "logits")
    finally:
        session.begin(SERVER)
    # The weights that the graph reads by themselves are there from the start.
    weights = sum(node.op == "get_attr" for node in graph.graph.nodes)
    assert len(network.env) == 1 and max(held) < weights + 8 < len(held)
