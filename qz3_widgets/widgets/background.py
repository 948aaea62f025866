"""Threads that end in good order with the interpreter.

A daemon thread that the interpreter cuts off inside a C++ library (Arrow, which reads the traces) can take the process
down with an abort. These are asked to stop, and waited for, before it comes to that.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

_WAIT_SECONDS = 5.0
_RUNNING: WeakKeyDictionary[threading.Thread, Callable[[], None]] = WeakKeyDictionary()


def start(name: str, work: Callable[[], None], *, stop: Callable[[], None]) -> threading.Thread:
    """Run ``work`` in a daemon thread.

    Args:
        name: Of the thread.
        work: What it does; it returns soon after ``stop``.
        stop: Called when the interpreter ends.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    _RUNNING[thread] = stop
    thread.start()
    return thread


@atexit.register
def stop_all() -> None:
    """Ask all of them to stop, and wait for each a while."""
    left = [(thread, stop) for thread, stop in _RUNNING.items() if thread.is_alive()]
    for _, stop in left:
        stop()
    for thread, _ in left:
        thread.join(_WAIT_SECONDS)
