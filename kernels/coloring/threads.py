"""Independent pieces of work over as many threads as torch uses; numpy lets go of the interpreter.

Results come in the order of the pieces, so they do not depend on the number of threads.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_worker = threading.local()


def in_order(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[Result]:
    """``work(piece)`` for every piece, in their order, a few pieces ahead of what is read.

    Inside of another piece of work, and where torch has one thread, it is a plain loop.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2 or getattr(_worker, "busy", False):
        yield from map(work, pieces)
        return

    def enter() -> None:
        _worker.busy = True

    with ThreadPoolExecutor(threads, initializer=enter) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
