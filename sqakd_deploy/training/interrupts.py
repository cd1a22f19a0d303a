"""Ctrl-C at a place where nothing is half done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_HEARD = b"\nstopping after this step; Ctrl-C again stops at once and keeps the last save\n"


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C sets a flag and says so; the second acts at once.

    Outside the main thread, which alone may handle signals, and where something else than Python's
    own handler is in charge, nothing is changed and the flag stays down.

    Yields:
        Whether Ctrl-C was pressed.
    """
    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        os.write(2, _HEARD)  # a first step may compile for a minute; streams are not safe here
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if in_charge:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if in_charge:
            signal.signal(signal.SIGINT, signal.default_int_handler)
