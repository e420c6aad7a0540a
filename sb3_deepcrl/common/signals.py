"""
The signals that stop a program: SIGINT (Ctrl-C), SIGTERM (a scheduler's time limit) and SIGHUP (a terminal that is closed).
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Windows has no SIGHUP
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Signals that come together, as when a service is stopped, are one
SECONDS_TOGETHER = 1.0


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """
    Handle the signals that stop a program. Those that are ignored, as SIGHUP is under ``nohup``, stay ignored, and nothing is
    changed outside of the main thread, which cannot handle signals.

    :param handler: What a signal calls
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS} if is_main_thread else {}
    # None: handled by something else than Python
    changed = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """
    Let each of the signals that stop a program raise a KeyboardInterrupt, as Ctrl-C does.

    :return: Context with the numbers of the signals that have come so far
    """
    numbers: list[int] = []
    deaf_until = 0.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal deaf_until
        if time.monotonic() > deaf_until:
            deaf_until = time.monotonic() + SECONDS_TOGETHER
            numbers.append(number)
            raise KeyboardInterrupt

    with _handled(interrupt):
        yield numbers


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """
    :return: Context in which no signal stops the program, for what must come to its end, such as saving
    """
    return _handled(lambda number, frame: None)


def tell(text: str) -> None:
    """
    Print a line, without an error if the terminal was closed or nobody reads the pipe any more: from then on what is printed
    goes to the standard error, and nowhere if that is gone too.

    :param text: The line
    """
    try:
        print(text, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (sys.__stderr__.fileno() if sys.__stderr__ else nowhere, nowhere):
            with contextlib.suppress(OSError):
                os.dup2(descriptor, sys.stdout.fileno())
                # The line is still in the buffer
                sys.stdout.flush()
                break
        os.close(nowhere)
