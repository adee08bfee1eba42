"""CCT under SPU's SEMI2K, one process a party; runs in the environment of requirements.txt, without our package.

    python spu_vit.py network.npz result.json [--local]

The archive holds every weight by its name in our network, `images` (B, C, height, width) and `config`, JSON text. Both
parties get shares of weights and images. The network is the clear one, line by line, but for GELU, and for two steps
that leave the result as it is: queries are scaled instead of scores, and max-pooling comes before its ReLU.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import socket
import sys
import tempfile
import time
from concurrent import futures
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu
from spu.utils import frontend

EPS = 2.0**-14  # of our 2ReLU and L2Q; the 1e-9 of L1 is zero at 18 bits
PATIENCE = 900  # seconds that a party waits for the other or for its result


# GELU by pieces: 0 below the first edge, a quartic, a sextic, and x from the last edge on.
EDGES = (-4.0, -1.0, 3.0)
DEGREES = (4, 6)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """GELU, x Phi(x), in float64."""
    return x * np.array([math.erfc(-y / math.sqrt(2)) / 2 for y in x])


def fitted() -> np.ndarray:
    """Coefficients of x^0 to x^6 of both pieces, (2, 7): interpolation at Chebyshev's points."""
    found = np.zeros((len(DEGREES), 1 + max(DEGREES)))
    for row, degree, low, high in zip(found, DEGREES, EDGES, EDGES[1:]):
        piece = np.polynomial.Chebyshev.interpolate(exact_gelu, degree, (low, high))
        row[: degree + 1] = piece.convert(kind=np.polynomial.Polynomial).coef
    return found


PIECES = fitted()


def gelu(x):
    """The pieces; one truncation for the sums of both, since products with public numbers are added before it."""
    square = x * x
    cube = square * x
    powers = jnp.stack([x, square, cube, square * square, square * cube, cube * cube], -1)
    quartic, sextic = jnp.moveaxis(powers @ PIECES[:, 1:].T.astype(x.dtype) + PIECES[:, 0].astype(x.dtype), -1, 0)
    low, middle, high = jnp.moveaxis(x[..., None] < jnp.array(EDGES, x.dtype), -1, 0)  # one comparison, fewer rounds
    return jnp.where(high, jnp.where(middle, jnp.where(low, 0.0, quartic), sextic), x)


def gelu_error() -> float:
    """Largest error of the pieces, in the clear."""
    x = np.linspace(-6, 6, 24001)
    return float(abs(np.asarray(jax.jit(gelu)(x.astype(np.float32))) - exact_gelu(x)).max())


# The network. B batch, N tokens, M width, H heads, D of a head, S memory slots.


def network(config: dict, w: dict, images):
    """Images (B, C, height, width) -> logits (B, classes)."""
    x = images
    for step in range(config["convolutions"]):
        padding = [(config["kernel"] // 2,) * 2] * 2
        x = jax.lax.conv_general_dilated(x, w[f"tokenizer.{3 * step}.weight"], (config["stride"],) * 2, padding)
        x = jnp.maximum(pooled(x), 0)
    x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2) + w["position"]  # (B, N, M)
    for layer, attention in enumerate(config["attention"]):
        start = f"blocks.{layer}."
        block = {name.removeprefix(start): weight for name, weight in w.items() if name.startswith(start)}
        mixed = {"self": self_attention, "external": external_attention}[attention]
        x = x + mixed(config, block, norm(block, "norm1", x))
        x = norm(block, "norm2", x)  # replaces the residual stream, as published
        x = x + linear(block, "mlp.contract", gelu(linear(block, "mlp.expand", x)))
    x = norm(w, "norm", x)
    weights = jax.nn.softmax(linear(w, "pool.scores", x), -2)  # (B, N, 1)
    return linear(w, "head", (weights.swapaxes(1, 2) @ x)[:, 0])


def pooled(x):
    """Max-pooling 3x3, stride 2, padding 1."""
    edge = ((0, 0), (0, 0), (1, 1), (1, 1))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), edge)


def linear(w: dict, name: str, x):
    """Linear map, x W^T + b."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: dict, name: str, x):
    """LayerNorm over the last dimension."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def normalized(config: dict, w: dict, scores, axis: int):
    """Softmax, 2Quad or L2Q of scores (B, H, N, K)."""
    if config["normalizer"] == "softmax":
        return jax.nn.softmax(scores, axis)
    if config["normalizer"] == "2quad":
        squares, eps = jnp.square(scores + 5), 0.0
    else:
        shifted = scores * w["attention.normalizer.d"] + w["attention.normalizer.c"]
        squares, eps = jnp.square(shifted), EPS
    return squares / (squares.sum(axis, keepdims=True) + eps)


def self_attention(config: dict, w: dict, x):
    """(B, N, M) -> (B, N, M)."""
    heads = config["heads"]
    qkv = linear(w, "attention.qkv", x).reshape(*x.shape[:2], 3, heads, -1)
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, N, D)
    scores = (query * query.shape[-1] ** -0.5) @ key.swapaxes(-1, -2)  # (B, H, N, N)
    values = normalized(config, w, scores, -1) @ value
    return linear(w, "attention.projection", values.swapaxes(1, 2).reshape(x.shape))


def external_attention(config: dict, w: dict, x):
    """(B, N, M) -> (B, N, M)."""
    query = linear(w, "attention.query", x).reshape(*x.shape[:2], config["heads"], -1).swapaxes(1, 2)  # (B, H, N, D)
    weights = normalized(config, w, linear(w, "attention.scores", query), -2)  # (B, H, N, S), over the tokens
    weights = weights / weights.sum(-1, keepdims=True)  # over the slots
    values = linear(w, "attention.projection", linear(w, "attention.values", weights)) + query
    return values.swapaxes(1, 2).reshape(x.shape)


# The parties


def runtime_config(local: bool) -> libspu.RuntimeConfig:
    """SEMI2K on 64 bits, 18 of them fractional, one thread; `local` truncates without a message, and may fail."""
    config = libspu.RuntimeConfig(libspu.ProtocolKind.SEMI2K, libspu.FieldType.FM64, 18)
    config.max_concurrency = 1
    config.beaver_type = libspu.RuntimeConfig.BeaverType.TrustedFirstParty
    config.trunc_allow_msb_error = local
    config.enable_pphlo_profile = config.enable_hal_profile = True  # else the runtime does not tell what it sent
    return config


def party(rank: int, addresses: list[str], log: str, local: bool, executable: bytes, shares: dict) -> tuple:
    """One party: its seconds, and its share of the logits. What the runtime prints goes into `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    description = libspu.link.Desc()
    description.recv_timeout_ms = PATIENCE * 1000
    for number, address in enumerate(addresses):
        description.add_party(f"party {number}", address)
    link = libspu.link.create_brpc(description, rank)
    runtime = spu.api.Runtime(link, runtime_config(local))
    for name, share in shares.items():
        runtime.set_var(name, share)
    program = libspu.Executable()
    program.ParseFromString(executable)
    start = time.perf_counter()
    runtime.run(program)
    seconds = time.perf_counter() - start
    logits = runtime.get_var("logits")
    link.stop_link()
    return seconds, logits


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def infer(config: dict, weights: dict, images: np.ndarray, local: bool) -> dict:
    """One inference: logits, seconds of the slower party, bytes one way, messages that a party sent."""
    names, arrays = [*weights, "images"], [*weights.values(), images]

    def clear(*arrays):
        return network(config, dict(zip(names, arrays)), arrays[-1])

    options = libspu.CompilerOptions()
    options.enable_optimize_denominator_with_broadcast = True  # else a division for each element of a row
    secret = [libspu.Visibility.VIS_SECRET] * len(names)
    kind, outputs = frontend.Kind.JAX, lambda found: ["logits"]
    executable, _ = frontend.compile(kind, clear, arrays, {}, names, secret, outputs, copts=options)
    io = spu.api.Io(2, runtime_config(local))
    shares = [io.make_shares(array, libspu.Visibility.VIS_SECRET) for array in arrays]
    addresses, text = free_addresses(2), executable.SerializeToString()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        logs = [os.path.join(folder, f"{rank}.log") for rank in range(2)]
        given = [dict(zip(names, (share[rank] for share in shares))) for rank in range(2)]
        running = [pool.submit(party, r, addresses, logs[r], local, text, given[r]) for r in range(2)]
        try:
            seconds, logits = zip(*(each.result(PATIENCE) for each in running))
        except Exception:
            for log in logs:
                sys.stderr.write(Path(log).read_text(errors="replace")[-2000:] if os.path.exists(log) else "")
            raise
        sent, received, messages, _ = sent_and_received(Path(logs[0]).read_text())
    return {
        "logits": io.reconstruct(list(logits)).tolist(),
        "clear_logits": np.asarray(jax.jit(clear)(*arrays)).tolist(),
        "seconds": max(seconds),
        "bytes": (sent + received) // 2,
        "messages": messages,
    }


def sent_and_received(log: str) -> list[int]:
    """Bytes sent and received, messages sent and received, from the last line that the profile writes."""
    pattern = r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
    return [int(number) for number in re.findall(pattern, log)[-1]]


def main() -> None:
    """Read the archive, infer once, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--local", action="store_true", help="truncate without a message")
    options = parser.parse_args()
    with np.load(options.network) as archive:
        weights = {name: archive[name] for name in archive.files}
    config, images = json.loads(str(weights.pop("config"))), weights.pop("images")
    result = infer(config, weights, images, options.local)
    packages = {name: version(name) for name in ("spu", "jax", "jaxlib", "numpy")}
    result |= {"gelu_error": gelu_error(), "versions": {"python": platform.python_version(), **packages}}
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
