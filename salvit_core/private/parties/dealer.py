"""The dealer of `tuned`: a process that sees neither weights nor images, and hands out correlated randomness.

It has a link of its own to each party. Over it the dealer sends that party its keys, so that neither sees the other's,
and hears what the session will need; it refuses when the two do not say the same. To the server it then streams the
corrections of node after node, as far ahead as the socket holds. The dealer learns the public list of correlations and
no message between the parties; who holds the dealer and one party together can unmask everything.
"""

from typing import Any

import torch

from ..transport import Channel
from ..tuned.arithmetic.randomness import CORRELATIONS, DEALER, Dealing, new_key, packed
from .rendezvous import PartyError

NEEDS = 1 << 26  # bytes that the list of correlations may have: many times that of any network here


def serve(peers: dict[str, Channel], device: str = "cpu") -> None:
    """Deal for one session.

    Raises:
        PartyError: the parties do not ask for the same, or for what no dealer has.
        TransportError: a party left.
    """
    asked = {role: channel.hear(NEEDS) for role, channel in peers.items()}
    if asked["server"] != asked["client"]:
        raise PartyError("the server and the client ask for different correlations: they do not run the same network")
    queries, weights, nodes = _understood(asked["server"])
    keys = [(new_key(), new_key()) for _ in range(1 + queries)]  # of the weights, and of every query
    for rank, role in enumerate(("server", "client")):
        peers[role].send(packed(pair[rank] for pair in keys))
    dealing = Dealing(DEALER, keys[0], device=device)
    for name, shape in weights:
        dealing.weight(name, shape)
    for pair in keys[1:]:
        dealing.turn(pair)
        for calls in nodes:
            for name, arguments in calls:
                CORRELATIONS[name](dealing, *arguments)
            if dealing.outbox:
                peers["server"].send(torch.cat(dealing.outbox).cpu())
                dealing.outbox = []


def _understood(asked: Any) -> tuple[int, list, list]:
    """Queries, weights by name and shape, and every node's calls by name and arguments."""
    try:
        queries, weights, nodes = (_tuples(asked[name]) for name in ("queries", "weights", "calls"))
        if unknown := {name for calls in nodes for name, arguments in calls if name not in CORRELATIONS}:
            raise PartyError(f"no dealer has {', '.join(sorted(map(str, unknown)))}")
        return int(queries), [(str(name), shape) for name, shape in weights], nodes
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PartyError("the parties sent no list of correlations") from error


def _tuples(what: Any) -> Any:
    """JSON has lists where the calls have tuples."""
    return tuple(map(_tuples, what)) if isinstance(what, list) else what
