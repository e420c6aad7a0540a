"""
Which errors are for users, who did something wrong, and which for those who look for a bug.
"""

import dis

import gymnasium as gym

# Their `raise` and `assert` statements check what somebody gave, and say what is wrong with it
CHECKING = ("sb3_deepcrl", "stable_baselines3", "sb3_contrib", "rl_zoo3")
GYMNASIUM_ERRORS = (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv, gym.error.DependencyNotInstalled)


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
