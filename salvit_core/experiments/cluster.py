"""Trainings on the nodes of a Ray cluster: runs go out, records and weights come back, and this process writes them.

    pip install 'salvit-core[ray]'         # on every machine, with the same versions of Python, Ray and torch
    ray start --head                       # on this machine
    ray start --address=THIS:6379          # on every other
    salvit evidence --engine ray

A node needs none of our files but what that installs, and keeps none. It is given this package as it is here, the
run, its images, its teacher and how far it is; from then on the checkpoint comes back whenever there is another, in the
end the record and the weights. So the store has one writer. A node that dies, or a worker on it, takes along what it
did since its last checkpoint: the run is given to another, which goes on from there.

A node trains as many networks side by side as it has CPUs in Ray's books, and shares its cores out among them:
`ray start --num-cpus 4` on a machine of sixteen gives each four threads. On a cluster with GPUs each training has a
part of one.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
from ray import exceptions

from .. import datasets, workspace
from . import execute, store

EVERY = 10.0  # seconds between two looks for another checkpoint
ATTEMPTS = 3  # at a run that is lost with its worker, without having come further

# What says that whoever had a run is gone, and nothing against the run itself: out of memory, its neighbours may be at
# fault.
LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
)


class Nodes:
    """The cluster as something that trains, with the methods of `execute.Processes`.

    Args:
        runs: all that it will be given: what finds no node free waits in Ray's queue, in the order of `submit`, so that
            a node that joins has work at once.

    Raises:
        ValueError: no cluster is there.
    """

    def __init__(self, runs: list[execute.Training]):
        self.workers = len(runs)
        self._under_way: dict[Any, tuple[execute.Training, Future]] = {}  # by Ray's generator
        self._lost: Counter = Counter()
        self._images: dict[tuple[str, int], Any] = {}
        self._commit = store.commit()  # of the code that is sent
        package = str(Path(__file__).parents[1])
        try:
            # "auto": a cluster that RAY_ADDRESS names or that runs here, never one that is made for this call.
            ray.init("auto", runtime_env={"py_modules": [package]}, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ValueError(
                "engine 'ray' finds no cluster that this machine is a node of: begin one with `ray start --head`, or "
                "name one in RAY_ADDRESS"
            ) from error
        # A training has a part of a GPU wherever there is one, as those of `execute.Processes` have.
        part = 1 / execute.MOST_TOGETHER if ray.cluster_resources().get("GPU") else 0
        options = dict(num_cpus=1, num_gpus=part, max_retries=0, scheduling_strategy="SPREAD")
        self._task = ray.remote(**options)(_train)

    def submit(self, run: execute.Training) -> Future:
        """Give a run to the cluster; the future is done when it is on record, or when it cannot be."""
        future: Future = Future()
        self._send(run, future)
        return future

    def wait(self, running: Iterable[Future], patience: float | None) -> set[Future]:
        """Those that are done, once one is or the patience (seconds) is at its end; meanwhile what comes is written."""
        end = None if patience is None else time.monotonic() + patience
        while not (done := {each for each in running if each.done()}):
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _ = ray.wait(list(self._under_way), timeout=left)
            if not ready:
                break
            for stream in ready:
                self._receive(stream)
        return done

    def close(self) -> None:
        """Leave the cluster, which ends what still runs for this process."""
        ray.shutdown()

    def _send(self, run: execute.Training, future: Future) -> None:
        files = execute.checkpoints(run)
        for other in execute.needed(run):
            files += [store.path(other), store.path(other, ending=".pt")]
        which = run.data, run.images
        if which not in self._images:
            self._images[which] = ray.put(execute.dataset(*which).to("cpu"))
        self._under_way[self._task.remote(run, _contents(files), self._images[which], EVERY)] = run, future

    def _receive(self, stream: Any) -> None:
        """The next that a node has to say: files of the store, what stopped it, or that it is done."""
        run, future = self._under_way.pop(stream)
        try:
            record, files = ray.get(next(stream))
        except StopIteration:  # without a record before it: it cannot be
            return future.set_exception(RuntimeError(f"{run.label()}: a node ended it without a record"))
        except exceptions.RayTaskError as error:  # its text is a traceback; its cause is what the run itself raised
            return future.set_exception(error.cause)
        except LOST as error:
            self._lost[run] += 1
            if self._lost[run] < ATTEMPTS:
                return self._send(run, future)
            reason = str(error).splitlines()[0]
            return future.set_exception(RuntimeError(f"{run.label()}: lost {ATTEMPTS} workers, the last so: {reason}"))
        except exceptions.RayError as error:
            return future.set_exception(RuntimeError(f"{run.label()}: {error}"))
        try:
            if record is None:
                for name, content in files.items():
                    workspace.write(store.folder() / name, content)
                self._lost[run] = 0
                self._under_way[stream] = run, future
                return None
            store.keep(run, record | {"commit": self._commit}, files)
            execute.ensure(run)  # which removes its checkpoint
        except OSError as error:  # a full disk here stops no other run
            return future.set_exception(error)
        return future.set_result(None)


def _contents(files: Iterable[Path]) -> dict[str, bytes]:
    """What those files hold that are there, by their names in the store."""
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # a run that ends removes its checkpoints
            found[str(file.relative_to(store.folder()))] = file.read_bytes()
    return found


def _train(
    run: execute.Training, files: dict[str, bytes], data: "datasets.Data", every: float
) -> Iterator[tuple[dict | None, dict[str, bytes]]]:
    """On a node, in a workspace that ends with the run.

    Yields:
        None and the checkpoint whenever there is another; then the record, with all else that the run leaves.
    """
    here = ray.get_runtime_context().get_node_id()
    together = next(node["Resources"]["CPU"] for node in ray.nodes() if node["NodeID"] == here)
    threads = max(1, (os.cpu_count() or 1) // int(together))
    failures: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(threads)  # of the thread that trains
        try:
            execute.ensure(run, data=data.to("cuda" if torch.cuda.is_available() else "cpu"))
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory(prefix="salvit-") as folder:
        workspace.ROOT = Path(folder)
        for name, content in files.items():
            workspace.write(store.folder() / name, content)
        thread, known = threading.Thread(target=work, daemon=True), _stamps(run)
        thread.start()
        while thread.is_alive():
            thread.join(every)
            if thread.is_alive() and (stamps := _stamps(run)) != known:
                yield None, _contents(file for file in stamps if stamps[file] != known.get(file))
                known = stamps
        if failures:
            raise failures[0]
        # A first phase of its own stays with its search: searches to come go on from it.
        phases = [file for file, stamp in _stamps(run).items() if stamp != known.get(file)]
        yield store.find(run), _contents([store.path(run, ending=".pt"), *phases])


def _stamps(run: execute.Training) -> dict[Path, int]:
    """When each of a run's checkpoints was written."""
    found = {}
    for file in execute.checkpoints(run):
        with contextlib.suppress(FileNotFoundError):
            found[file] = file.stat().st_mtime_ns
    return found
