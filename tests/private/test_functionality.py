"""What every gate says that it realises: in one form, and its probability of failure against the values themselves.

A local truncation of y fails with probability |y| / 2^64 (test_truncation). Here the y of whole networks are looked at.
"""

import inspect
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from test_private_tuned import random_like_trained, together
from torch import fx

from salvit_core import CCT, MECHANISMS, ViT, preset
from salvit_core.experiments.runs import run_of
from salvit_core.models.graph import parameters_of, trace
from salvit_core.models.rows import ROWS
from salvit_core.private import tuned as room
from salvit_core.private.interpreter import SecretInterpreter
from salvit_core.private.protocol import CLIENT, SERVER
from salvit_core.private.tuned import gates
from salvit_core.private.tuned import protocol as tuned
from salvit_core.private.tuned.arithmetic import share as shares
from salvit_core.private.tuned.arithmetic.share import Share, Weight

LABELS = ["Inputs", "Output", "Opened", "Simulator", "Failure"]
# What a graph may ask for besides modules, and what gates are made of.
OTHERS = {
    "*": shares.scaled,
    "to": Share.to,
    "truncate": gates.truncate.truncate,
    "times_rows": gates.truncate.times_rows,
    "answer": gates.answer.answer,
    "check": gates.curve.check,
}
STATED = {**{kind.__name__: gate for kind, gate in tuned.MODULES.items()}, **OTHERS}


def functionality(gate):
    """What a docstring says under `Functionality`, by label; a line that is indented further goes on."""
    found, label = {}, None
    for line in (inspect.getdoc(gate) or "").partition("Functionality:\n")[2].split("\n"):
        if not line.startswith("    "):
            break
        if not line.startswith(" " * 8):
            label, _, line = line.strip().partition(":")
        found[label] = f"{found.get(label, '')} {line.strip()}".strip()
    return found


def complete(gate):
    found = functionality(gate)
    form = list(found) == LABELS and all(text.endswith(".") and len(text) > 1 for text in found.values())
    return form and re.match(r"(0|2\^-\d+)\b", found["Failure"]) is not None


def failure(name):
    """Per number that a gate truncates locally."""
    power = re.match(r"2\^-(\d+)", functionality(STATED[name])["Failure"])
    return 2.0 ** -int(power[1]) if power else 0.0


@pytest.mark.parametrize("name", STATED)
def test_every_gate_states_its_functionality(name):
    found = functionality(STATED[name])
    assert complete(STATED[name]), f"{STATED[name].__name__} says {found}: its docstring needs {', '.join(LABELS)}"
    silent = found["Opened"] == "Nothing."
    assert not silent or found["Simulator"].startswith("nothing"), "who opens nothing needs no simulator"


def test_a_gate_that_says_nothing_or_no_number_is_found():
    def silent(module, secret, x):
        """What it does."""

    def vague(module, secret, x):
        """What it does.

        Functionality:
            Inputs: x.
            Output: y.
            Opened: Nothing.
            Simulator: nothing.
            Failure: rarely.
        """

    assert not complete(silent) and not complete(vague)
    vague.__doc__ = vague.__doc__.replace("rarely", "2^-40")
    assert complete(vague)


# How many numbers are truncated locally


class Counting(SecretInterpreter):
    """Runs on shapes, and says which module it is at."""

    kind = "*"

    def call_module(self, target, args, kwargs):
        Counting.kind = type(self.fetch_attr(target)).__name__
        try:
            return super().call_module(target, args, kwargs)
        finally:
            Counting.kind = "*"


def numbers(model, monkeypatch):
    """By kind of module, the numbers that one inference truncates locally."""
    counts, before = Counter(), Share.to

    def to(self, bits):
        if self.bits > bits:
            counts[Counting.kind] += self.data.numel()
        return before(self, bits)

    config, session = model.config, shares.session
    graph = tuned.PROTOCOL.rewrite(trace(model)).to("meta")
    network = Counting(graph, tuned.PROTOCOL)
    network.secrets = {name: Weight(name, tensor, False) for name, tensor in graph.state_dict().items()}
    session.begin(SERVER)
    session.recording = True
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Share, "to", to)
            tuned.PROTOCOL.record(network, (1, config.channels, config.image, config.image), "logits")
    finally:
        session.begin(SERVER)
    return counts


# With these every gate of a row runs; the others: -m slow.
SOME = ("SAL-ViT B=2", "SA softmax", "Hamburger", "Performer", "Nystromformer L2Q", "SOFT")
EVERY_ROW = [pytest.param(row, marks=() if row in SOME else pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize("row", EVERY_ROW)
def test_who_never_fails_truncates_nothing_locally(row, monkeypatch):
    counts = numbers(CCT(preset("cct_4_3x1", row)), monkeypatch)
    assert not [kind for kind in counts if not failure(kind)] and sum(counts.values()) > 10_000


def test_the_gates_numbers_add_up_to_what_the_room_states(monkeypatch):
    counts = numbers(CCT(preset("cct_7_3x1", "SAL-ViT B=3")), monkeypatch)
    total = sum(count * failure(kind) for kind, count in counts.items())
    stated = float(re.search(r"add up to ([\d.e-]+) per inference", room.__doc__)[1])
    millions = float(re.search(r"over ([\d.]+) million numbers", room.__doc__)[1])
    assert stated == pytest.approx(total, rel=0.05)
    assert millions == pytest.approx(sum(counts.values()) / 1e6, rel=0.01)


# What is truncated locally


class Shared(fx.Interpreter):
    """A graph on the shares of one of two threads."""

    def __init__(self, graph, log):
        super().__init__(graph)
        rank = shares.session.rank
        self.secrets = {name: Weight(name, part, rank == SERVER) for name, part in graph.state_dict().items()}
        self.log = log[rank]

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        self.log.append(type(module).__name__)
        secret = {name: self.secrets[f"{target}.{name}"] for name in parameters_of(module)}
        result = tuned.MODULES[type(module)](module, secret, *args, **kwargs)
        self.log.append("*")
        return result

    def call_function(self, target, args, kwargs):
        return tuned.FUNCTIONS[target](*args, **kwargs)

    call_method = call_function

    def get_attr(self, target, args, kwargs):
        return self.secrets[target]


def failures(model, seed=0):
    """By kind, (numbers truncated locally, the expected failures among them) of one inference on shares."""
    config = model.config
    images = torch.randn(1, config.channels, config.image, config.image, generator=torch.Generator().manual_seed(seed))
    graph = tuned.PROTOCOL.rewrite(trace(model.eval()))
    log, before = {SERVER: ["*"], CLIENT: ["*"]}, Share.to

    def to(self, bits):
        if self.bits > bits:
            log[shares.session.rank].append(self.data.clone())
        return before(self, bits)

    def run(x):
        with torch.no_grad():
            return gates.answer.answer(Shared(graph, log).run(x), "logits")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Share, "to", to)
        together(run, ((images.double() * 2.0**13).round().long(), 13))
    found, kind = defaultdict(lambda: [0, 0.0]), "*"
    for ours, theirs in zip(log[SERVER], log[CLIENT], strict=True):
        if isinstance(ours, str):
            kind = ours
        else:
            found[kind][0] += ours.numel()
            found[kind][1] += (ours + theirs).double().abs().sum().item() / 2.0**64
    return found


TRAINED = Path(__file__).parents[2] / "data/reference/training/cifar10-cct-4x64-32px-self-l2q-6-epochs-seed-0_3f6d528a"


def trained():
    """A network of the reference records with the weights that its training found."""
    network = CCT(run_of(json.loads(TRAINED.with_suffix(".json").read_text())).network)
    network.load_state_dict(torch.load(TRAINED.with_suffix(".pt"), weights_only=True))
    return network


def random(build, *named, **changes):
    torch.manual_seed(0)
    return random_like_trained(build(preset(*named, **changes)))


NETWORKS = {
    "trained": trained,
    "SAL-ViT at paper size": lambda: random(CCT, "cct_7_3x1", "SAL-ViT B=1", layers=2),
    "SA softmax": lambda: random(CCT, "cct_4_3x1", "SA softmax"),
    "a head's width that is no power of four": lambda: random(ViT, "vit_tiny", "SA softmax", layers=1),
    "recurrent layers": lambda: random(
        CCT, "cct_4_3x1", attention=("multi_lstm", "lstm", "grid_lstm", "parallel_scan"), layers=4
    ),
    "tokens that are no power of two": lambda: random(ViT, "vit_tiny", "SA scaling", layers=1),
    "tokens that are no power of two, external": lambda: random(ViT, "vit_tiny", "EA scaling", layers=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_failures_are_no_likelier_than_stated(name):
    found = failures(NETWORKS[name]())
    beyond = {
        kind: f"2^{math.log2(expected / count):.1f} a number, stated is 2^{math.log2(failure(kind)):.0f}"
        for kind, (count, expected) in found.items()
        if expected > count * failure(kind)
    }
    assert not beyond
    # What is stated says something, although it is of the row that has the largest numbers.
    assert sum(count * failure(kind) for kind, (count, _) in found.items()) < 32 * sum(e for _, e in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("row", MECHANISMS)
def test_failures_of_gates_that_the_paper_lacks_are_no_likelier_than_stated(row):
    paper = {"Linear", "MatMul", "LayerNorm", "GELU", "MaxPool2d", "Softmax", "L1", "L2Q", "*"}
    found = failures(random(CCT, "cct_4_3x1", row))
    assert not {kind for kind, (count, e) in found.items() if kind not in paper and e > count * failure(kind)}


@pytest.mark.slow
def test_failures_of_the_paper_s_network_are_those_stated():
    found = failures(random(CCT, "cct_7_3x1", "SAL-ViT B=3"))
    stated = float(re.search(r"themselves it is ([\d.e-]+)", room.__doc__)[1])
    assert stated == pytest.approx(sum(expected for _, expected in found.values()), rel=0.15)
