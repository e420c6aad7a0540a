"""
What the commands of this package do before PyTorch is loaded. Programs that import the package are left as they are.
"""

import io
import os
import signal
import sys
from pathlib import Path

# How long the threads of OpenMP spin before they sleep. On busy cores those that spin keep away the others for which they
# wait, on idle ones threads that sleep at once are slow. libgomp, which PyTorch has on Linux, counts rounds (by default
# 300,000), LLVM's and Intel's, on macOS and Windows, milliseconds (by default 200).
SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
# Whoever sets one of these has chosen
CHOICES = (*SPINNING, "OMP_WAIT_POLICY", "KMP_LIBRARY")
MESSAGE = "Loading PyTorch ..."


def is_command() -> bool:
    """Whether this process is ``sb3-deepcrl``, ``sb3-deepcrl-analysis`` or ``python -m sb3_deepcrl`` or one of its modules."""
    program = sys.argv[0] if sys.argv else ""
    if program != "-m":
        return Path(program).stem in ("sb3-deepcrl", "sb3-deepcrl-analysis")
    # Python has not found the module yet, which is in this package or its `__main__`. It leaves the name out of `argv`
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == "sb3_deepcrl"


def start_command() -> None:
    """
    Set what OpenMP reads when it is loaded, also in processes that this one starts, and give a sign of life. Until
    :func:`end_start`, Ctrl-C ends the process without the traceback of some import.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(SPINNING)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr.isatty():
        print(MESSAGE, end="\r", file=sys.stderr, flush=True)


def end_start() -> None:
    """Take the sign of life away. Ctrl-C is an exception again, and each line is seen at once where there is no terminal."""
    if sys.stderr.isatty():
        print(" " * len(MESSAGE), end="\r", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
