"""
Which errors are for users, who did something wrong, and which for those who look for a bug.
"""

import dis
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym

# Their `raise` and `assert` statements check what somebody gave, and say what is wrong with it
CHECKING = ("sb3_deepcrl", "stable_baselines3", "sb3_contrib", "rl_zoo3")
GYMNASIUM_ERRORS = (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv, gym.error.DependencyNotInstalled)
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def is_for_user(error: BaseException) -> bool:
    """
    Whether the message of an error says all, because a check of this package, or of one that it builds on, has raised it.
    Whatever else goes wrong, for instance inside of an env, is somebody's bug, which is found by its traceback.

    :param error: An error that was caught
    :return: Whether it may be shown as one line
    """
    # A bug in another process has its traceback as a note
    if not str(error) or hasattr(error, "__notes__"):
        return False
    if isinstance(error, GYMNASIUM_ERRORS):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in CHECKING:
        return False
    # A statement that raises, not one in which something failed
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def how_to_write(error: BaseException, given: Iterable[Any]) -> str | None:
    """
    :param error: An error that was caught
    :param given: What the user gave, among which may be paths
    :return: What to do, if the disk is full or one of those paths is no place to write to; None for any other error
    """
    if not isinstance(error, OSError):
        return None
    if error.errno in NO_SPACE:
        return "free some space or choose another disk (what was saved before is whole)"
    if error.errno in NOT_WRITABLE and isinstance(error.filename, str):
        path = Path(error.filename).absolute()
        for place in (Path(value).absolute() for value in given if value and isinstance(value, str | Path)):
            if path.is_relative_to(place) or place.is_relative_to(path):
                return f"choose another place than {place}"
    return None
