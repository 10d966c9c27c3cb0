"""Several machines that do the same work: which one this is, and what they tell each other.

`mlx.launch` starts one process on each. What is here has to be called by all, in the same order.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

from .errors import UserError
from .foreign import from_json, one_line, to_json

Job = TypeVar("Job")

# Something in it: a person is being asked.
_asks: list[bool] = []

# Where the launchers say which process this is: MLX's own, and Open MPI's.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
GONE = "another machine has gone, so this one ends too"


def launched() -> bool:
    """Whether `mlx.launch` has started this process, of one or several."""
    return any(name in os.environ for name in _RANKS)


def is_first() -> bool:
    """Whether this is the machine that reads, writes and speaks for all, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def count() -> int:
    """How many machines there are. The first call waits for all of them."""
    import mlx.core as mx

    return mx.distributed.init().size()


def is_lost(error: Exception) -> bool:
    """Whether MLX says that another machine has gone."""
    return isinstance(error, RuntimeError) and "peer was lost" in str(error)


def watch(gone: Callable[[], None]) -> None:
    """Have `gone` called where MLX waits forever for another machine that has gone.

    It says so as a rule (`is_lost`), but not where a thread is handing it work when the connection
    ends. Call this before anything else that `count`s.
    """
    before = _connections()
    if count() > 1:
        others = [socket.socket(fileno=os.dup(fd)) for fd in _connections() - before]
        threading.Thread(target=_watch, args=(others, gone), daemon=True).start()


def _connections() -> set[int]:
    """Numbers of this process's sockets that are connected to somebody."""
    found = set()
    for fd in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # The listing's own, closed by now, and sockets that listen.
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as connection:
                    connection.getpeername()
                    found.add(fd)
    return found


def _watch(others: Sequence[socket.socket], gone: Callable[[], None], patience: float = 10) -> None:
    while not any(map(_is_closed, others)):
        time.sleep(0.5)
    # Whatever ends the command now, or is computed or asked first, needs the processor or a person.
    while True:
        used = time.process_time()
        time.sleep(patience)
        if not _asks and time.process_time() - used < patience / 20:
            gone()


def _is_closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def _in_step() -> Iterator[None]:
    """After what generation has begun: on a stream of its own, what is told could overtake that."""
    import mlx.core as mx
    from mlx_lm.generate import generation_stream

    with mx.stream(generation_stream):  # type: ignore[arg-type]
        yield


def any_of(flag: bool) -> bool:
    """Whether it is so on any of the machines."""
    import mlx.core as mx

    if count() == 1:
        return flag
    with _in_step():
        return mx.distributed.all_max(mx.array(int(flag))).item() == 1


def all_of(value: Any) -> list[Any]:
    """What each machine says, the first one first; JSON."""
    import mlx.core as mx
    import numpy as np

    said = np.frombuffer(to_json(value).encode(), np.uint8)
    with _in_step():
        sizes: Any = mx.distributed.all_gather(mx.array([said.size])).tolist()
        padded = mx.array(np.pad(said, (0, max(sizes) - said.size)))
        found = np.array(mx.distributed.all_gather(padded[None]))
    return [
        from_json(row[:size].tobytes().decode(), "what a machine said")
        for row, size in zip(found, sizes, strict=True)
    ]


def from_first(make: Callable[[], Any]) -> Any:
    """What the first machine makes, on all of them; JSON.

    Raises:
        UserError: on all of them, where it cannot be made; the first one raises what was raised.
    """
    if count() == 1:
        return make()
    if not is_first():
        return _made(_of_first(None))
    try:
        value = make()
    except Exception as error:
        _of_first({"error": one_line(error)})
        raise
    _of_first({"value": value})
    return value


@contextmanager
def held_by_first(make: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A context that the first machine alone enters. Errors as in `from_first`."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(make()))
        yield


def _of_first(value: Any) -> Any:
    import mlx.core as mx
    import numpy as np

    said = np.frombuffer(to_json(value).encode() if is_first() else b"", np.uint8)
    with _in_step():
        size: Any = mx.distributed.all_sum(mx.array(said.size)).item()
        padded = mx.array(said) if is_first() else mx.zeros(size, mx.uint8)
        found = np.array(mx.distributed.all_sum(padded))
    return from_json(found.tobytes().decode(), "what the first machine said")


def lines_from_first(lines: Iterable[str]) -> Iterator[str]:
    """The lines that the first machine reads, on all of them; the others' are not asked for."""
    mine = iter(lines)

    def ask() -> str | None:
        _asks.append(True)
        try:
            return next(mine, None)
        finally:
            _asks.pop()

    while (line := from_first(ask)) is not None:
        yield line


def shared_out(
    jobs: Iterable[Job], work: Callable[[Job], Iterable[Any]]
) -> Iterator[tuple[Job, Any]]:
    """Each job and what comes of it, on all machines, of which each does its share.

    Args:
        work: what comes of a job, piece by piece; JSON.

    Raises:
        UserError: on all machines, where one raises it.
    """
    machines, waiting = count(), iter(jobs)
    if machines == 1:
        yield from ((job, piece) for job in waiting for piece in work(job))
        return
    import mlx.core as mx

    me = mx.distributed.init().rank()
    while together := list(islice(waiting, machines)):
        try:
            mine: Any = {"value": [piece for job in together[me : me + 1] for piece in work(job)]}
        except UserError as error:
            mine = {"error": str(error)}
        # The last time there may be fewer jobs than machines.
        found = [_made(said) for said in all_of(mine)][: len(together)]
        for job, pieces in zip(together, found, strict=True):
            yield from ((job, piece) for piece in pieces)


def _made(said: dict[str, Any]) -> Any:
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]
