"""Independent openings travel together: tasks run until each waits for the other party, then all speak at once.

A task is a function that may stop in its midst, where it opens something: a greenlet, so that gates read as if each
were alone. Both parties start the same tasks in the same order, and a message, whichever way it goes, is one step of
its task for both. So both make up the same list of who waits, and need not tell each other what is in it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet


class Later:
    """What a task will give.

    Attributes:
        shape: of the tensor that it will be.
    """

    def __init__(self, shape: torch.Size, wait: "Callable[[Later], None] | None" = None):
        self.shape, self.done = shape, False
        self.readers: list[greenlet] = []
        self._wait, self._value = wait, None

    def become(self, value: Any) -> "Later":
        """It is here."""
        self.done, self._value = True, value
        return self

    def result(self) -> Any:
        """What it gave; a task that asks earlier waits."""
        if not self.done:
            assert self._wait is not None  # nobody but a task is ever too early
            self._wait(self)
        return self._value


class Task(greenlet):
    """One of the functions that run side by side.

    Attributes:
        node: whose it is: its costs are charged there.
        says: tensors that it sends, once it waits for the other party.
        hears: shapes of what it then receives.
    """

    def __init__(self, node: int, work: Callable[[], Any]):
        super().__init__(work)
        self.node = node
        self.says: Sequence[torch.Tensor] = ()
        self.hears: Sequence[torch.Size] = ()


class Schedule:
    """Runs tasks until none is left.

    Args:
        step: sends and receives, in one message each way at once, for a list of tasks: what each of them hears.
        charge: called with a node after it computed, or took part in a step as the first; all that happened since the
            last call is its.
    """

    def __init__(self, step: Callable[[list[Task]], list[list[torch.Tensor]]], charge: Callable[[int], None]):
        self._step, self._charge = step, charge
        self._ready: deque[tuple[Task, Any]] = deque()
        self._waiting: list[Task] = []

    def start(self, node: int, work: Callable[[], Any], shape: torch.Size | None = None) -> Later:
        """Run a function side by side with the others, once it is its turn.

        Args:
            node: whose it is.
            work: the function.
            shape: of what it gives, for who asks before.
        """
        later = Later(torch.Size() if shape is None else shape, self._until)

        def task() -> None:
            later.become(work())
            self._ready.extend((reader, None) for reader in later.readers)

        self._ready.append((Task(node, task), None))
        return later

    def run(self) -> None:
        """Run all that was started, and what these start."""
        while self._ready or self._waiting:
            while self._ready:
                task, given = self._ready.popleft()
                task.parent = getcurrent()
                task.switch(given) if task else task.switch()
                self._charge(task.node)
            if tasks := self._waiting:
                self._waiting = []
                self._ready.extend(zip(tasks, self._step(tasks), strict=True))
                self._charge(tasks[0].node)

    def exchange(self, says: Sequence[torch.Tensor], hears: Sequence[torch.Size]) -> list[torch.Tensor]:
        """Of the task that calls it: send, receive, and let others go on meanwhile."""
        task = getcurrent()
        assert isinstance(task, Task)
        task.says, task.hears = says, hears
        self._waiting.append(task)
        return task.parent.switch()

    def node(self) -> int:
        """Whose the task is that calls it."""
        task = getcurrent()
        assert isinstance(task, Task)
        return task.node

    def _until(self, later: Later) -> None:
        task = getcurrent()
        later.readers.append(task)
        assert task.parent is not None
        task.parent.switch()
