"""Quiet is for the whole process, and ends."""

import logging
import sys
import threading
import warnings

from fxfib.exporting import quiet


def test_threads_that_overlap_leave_the_streams_as_they_were() -> None:
    before = (sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters))
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        assert inside.wait(30)
        assert sys.stdout is not before[0]
    # The first has left, the second has not.
    assert sys.stdout is not before[0]
    leave.set()
    thread.join()
    assert (sys.stdout, sys.stderr, logging.root.manager.disable) == before[:3]
    assert list(warnings.filters) == before[3]


def test_nested() -> None:
    before = sys.stdout
    with quiet():
        with quiet():
            pass
        assert sys.stdout is not before
    assert sys.stdout is before
