"""
The signals that stop a program: SIGINT (Ctrl-C), SIGTERM (a scheduler's time limit) and SIGHUP (a terminal that is closed).
"""

import contextlib
import os
import select
import signal
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


def drop_unread_outputs() -> None:
    """
    Let what is written to a closed terminal, or to a pipe that nobody reads any more, go nowhere: until then it raises.
    """
    # Windows has no poll
    for descriptor in (1, 2) if hasattr(select, "poll") else ():
        poll = select.poll()
        poll.register(descriptor, 0)
        # A descriptor that was never open is left as it is
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """
    :return: Context in which neither a signal nor a closed terminal stops the program, for what must come to its end, such as
        saving
    """
    with _handled(lambda number, frame: None):
        drop_unread_outputs()
        yield
