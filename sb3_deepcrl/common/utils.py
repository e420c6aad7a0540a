"""
Checks of what users pass, and small helpers.

Each check raises a ValueError with the name and value of what is wrong, and how to mend it. Those of a number or a choice
return it, so that they may stand where it is used.
"""

import argparse
import contextlib
import dis
import errno
import math
import operator
import os
import pathlib
import platform
import re
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from numbers import Integral, Real
from types import FrameType
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

# Number of Dense layers in a residual block, of which depths are multiples
LAYERS_PER_BLOCK = 4

# Arguments with which a model is loaded that stores no transitions, and so needs no env
WITHOUT_BUFFER: dict[str, Any] = {"buffer_size": 1, "replay_buffer_class": None, "replay_buffer_kwargs": {}}

# Windows has no SIGHUP
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Signals that come together, as when a service is stopped, are one
SECONDS_TOGETHER = 1.0

# Their `raise` and `assert` statements check what somebody gave, and say what is wrong with it
CHECKING = ("sb3_deepcrl", "stable_baselines3", "sb3_contrib", "rl_zoo3")
GYMNASIUM_ERRORS = (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv, gym.error.DependencyNotInstalled)
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_positive_int(value: int, name: str) -> int:
    """Check that a number is a positive integer."""
    if not _is_integer(value) or value < 1:
        fix = f": use {int(value)}" if isinstance(value, float) and value >= 1 and value % 1 == 0 else ""
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}{fix}")
    return value


def check_number(value: float, name: str, maximum: float = math.inf) -> float:
    """Check that a number is finite, not negative and not above a maximum."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not is_number or not 0 <= value <= maximum:
        wanted = f"be between 0 and {maximum:g}" if maximum < math.inf else "not be negative" if is_number else "be a number"
        raise ValueError(f"`{name}` must {wanted}, got {value!r}")
    return value


def check_learning_rate(learning_rate: float | Schedule | None, name: str) -> float | Schedule | None:
    """Check that a learning rate, if there is one, is a positive number, or a schedule that begins with one."""
    if learning_rate is None:
        return None
    first = learning_rate(1.0) if callable(learning_rate) else learning_rate
    if check_number(first, name) == 0:
        raise ValueError(f"`{name}` must be positive, got {first!r}")
    return learning_rate if callable(learning_rate) else float(learning_rate)


def parse_number(value: Any, name: str, others: str) -> float:
    """Read a finite number, where the user may also give something else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number or {others}, got {value!r}") from None
    check_number(abs(number), name)
    return number


def parse_ent_coef(ent_coef: float | str) -> tuple[float, bool]:
    """Value of an entropy coefficient, and whether it is learned from there on."""
    kind, underscore, start = str(ent_coef).partition("_")
    is_learned = kind == "auto"
    value = ent_coef if not is_learned else start if underscore else 1.0
    number = check_number(parse_number(value, "ent_coef", '"auto" or such as "auto_0.1"'), "ent_coef")
    assert number > 0.0 or not is_learned, "The initial value of ent_coef must be greater than 0"
    return number, is_learned


def check_kind_of_ent_coef(ent_coef: float | str, parameters: Mapping[str, Any]) -> None:
    """Check that an entropy coefficient is learned if that of a saved model is, given the parameters of that."""
    _, is_learned = parse_ent_coef(ent_coef)
    if is_learned != ("ent_coef_optimizer" in parameters):
        which = "learned, that of the saved model is not" if is_learned else "not learned, that of the saved model is"
        raise ValueError(f"`ent_coef={ent_coef!r}` is {which}: use one of the same kind, or leave it out")


def check_batch_size(batch_size: int) -> None:
    """Check that there are negatives in a minibatch."""
    if check_positive_int(batch_size, "batch_size") < 2:
        raise ValueError(f"`batch_size` must be at least 2, got {batch_size}: there would be no negatives")


def check_choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    """Check that a value is one of those that there are."""
    # 1 is equal to True
    if value not in choices or type(value) is int:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_depth(depth: int, name: str = "depth") -> int:
    """Check that a residual tower of this depth can be built. Gives the number of its blocks, ``depth / 4``."""
    if not _is_integer(depth) or depth < 1 or depth % LAYERS_PER_BLOCK != 0:
        is_number = isinstance(depth, Real) and LAYERS_PER_BLOCK < depth < math.inf
        below = int(depth // LAYERS_PER_BLOCK) * LAYERS_PER_BLOCK if is_number else 0
        fix = f"use {below} or {below + LAYERS_PER_BLOCK}" if below else f"use {LAYERS_PER_BLOCK}"
        raise ValueError(
            f"`{name}` must be a positive multiple of {LAYERS_PER_BLOCK}, because a residual block holds "
            f"{LAYERS_PER_BLOCK} Dense layers, got {depth!r}: {fix}"
        )
    return int(depth) // LAYERS_PER_BLOCK


def check_class(value: Any, base: type, name: str, fix: str) -> None:
    """Check that a value is a class whose instances are those of ``base``, or a function that may make one."""
    is_suitable = issubclass(value, base) if isinstance(value, type) else callable(value) and not isinstance(value, nn.Module)
    if not is_suitable:
        raise ValueError(f"`{name}` must be {base.__name__} or a subclass of it, got {value!r}: {fix}")


def check_dict(value: Any, name: str) -> None:
    """Check that keyword arguments are a dict, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be a dict of keyword arguments, got {value!r}: use for instance `dict(name=value)`")


def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def check_buffer_size(buffer_size: int, env: VecEnv) -> None:
    """Check that the longest episode fits into a buffer of so many transitions of all envs, if these tell how long it is."""
    # The attribute of the TimeLimit wrapper: unlike a spec, a number can always be sent from another process
    name = "_max_episode_steps"
    try:
        # The processes of SubprocVecEnv die of `get_attr` with a name that they do not know
        longest = max(int(length or 0) for length in env.get_attr(name)) if env.has_attr(name) else 0
    except Exception:
        # VecEnvs of simulators raise all kinds of errors and may return anything
        return
    if buffer_size // env.num_envs < longest:
        raise ValueError(
            f"`buffer_size={buffer_size}` leaves {buffer_size // env.num_envs} transitions for each of {env.num_envs} envs, "
            f"less than one episode of {longest} steps, within which goals are drawn: use at least {env.num_envs * longest}"
        )


def _innermost_envs(env: VecEnv) -> set[int]:
    """Identities of what is inside all wrappers: of the vectorized env, and of its envs where they are in this process."""
    base = env.unwrapped
    envs = [single.unwrapped for single in base.envs] if isinstance(base, DummyVecEnv) else []
    return {id(each) for each in (base, *envs)}


def evaluates_in(callback: BaseCallback | None, training_env: VecEnv) -> bool:
    """Whether an ``EvalCallback``, this one or one inside of it, evaluates in the env that the model is trained in."""
    if isinstance(callback, EvalCallback) and _innermost_envs(training_env) & _innermost_envs(callback.eval_env):
        return True
    children = (*getattr(callback, "callbacks", ()), getattr(callback, "callback", None))
    return any(child is not None and evaluates_in(child, training_env) for child in children)


def warn_of_mixed_episodes(callback: BaseCallback, training_env: VecEnv) -> None:
    """Warn if a callback evaluates in the env that the model is trained in."""
    if evaluates_in(callback, training_env):
        warnings.warn(
            "A callback evaluates in the env that the model is trained in: the episodes that run there go on as others, "
            "whose goals are no positives for the contrastive loss. Give it an env of its own"
        )


def env_state(env: VecEnv) -> list[Any]:
    """
    Objects that a step or a reset of the envs replaces by others: infos, or the counters of a ``TensorVecEnv``. The VecEnvs of
    others may keep none of them.
    """
    base = env.unwrapped
    reset_infos = getattr(base, "reset_infos", ())
    return [reset_infos, *reset_infos, *getattr(base, "buf_infos", ()), getattr(base, "_counters", None)]


def is_left_alone(env: VecEnv, state: list[Any] | None) -> bool:
    """Whether nobody has stepped or reset the envs since ``env_state`` gave this."""
    return state is None or all(map(operator.is_, env_state(env), state))


@contextlib.contextmanager
def keep_normalization(vec_normalize: VecNormalize | None) -> Iterator[None]:
    """
    Put the statistics of VecNormalize back if a value from the env is not a number, as it is in them already, and let it go on
    to learn if a callback made it rest by ``training = None``. Any other change of it stays.
    """
    # There is no `obs_rms` where observations are not normalized
    attributes: dict[str, Any] = {} if vec_normalize is None else vars(vec_normalize)
    statistics = deepcopy({name: value for name, value in attributes.items() if name in ("obs_rms", "ret_rms")})
    training = {name: value for name, value in attributes.items() if name == "training"}
    try:
        yield
    except ValueError:
        attributes.update(statistics)
        raise
    finally:
        if attributes.get("training") is None:
            attributes.update(training)


def update_schedule(n_envs: int, transitions_per_update: int) -> dict[str, int]:
    """The smallest ``train_freq`` and ``gradient_steps`` with which there is one update for so many transitions."""
    divisor = math.gcd(n_envs, check_positive_int(transitions_per_update, "transitions_per_update"))
    # Stable-Baselines3 takes no integer of NumPy
    return {"train_freq": int(transitions_per_update) // divisor, "gradient_steps": n_envs // divisor}


@contextlib.contextmanager
def atomic_path(path: Any, suffix: str) -> Iterator[Any]:
    """
    Write a file as a whole or not at all: the body of the ``with`` statement writes to a temporary file in the same folder,
    which takes the place of the real one when it is complete. Whatever happens before, the previous file stays as it was.

    :param path: Where the file goes (an open file is written to as it is). Missing folders are created; if it is a
        folder, ``_2`` is appended to its name (as Stable-Baselines3 does)
    :param suffix: Ending to append if the path has none, with its dot
    :return: Path of the temporary file
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield path
        return
    path = pathlib.Path(path)
    if path.suffix == "":
        path = path.with_name(path.name + suffix)
    if path.is_dir():
        path = path.with_name(path.name + "_2")
    # Write through a link, not over it
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """
    Handle the signals that stop a program. Those that are ignored, as SIGHUP is under ``nohup``, stay ignored, and nothing is
    changed outside of the main thread, which cannot handle signals.
    """
    numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    # None: handled by something else than Python
    previous = {number: old for number in numbers if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
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

    with handled(interrupt):
        yield numbers


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """Context in which no signal stops the program, for what must come to its end, such as saving."""
    return handled(lambda number, frame: None)


@contextlib.contextmanager
def delayed_signals() -> Iterator[None]:
    """Context at the end of which the program is stopped, if a signal has come in between."""
    numbers: list[int] = []
    with handled(lambda number, frame: numbers.append(number)):
        yield
    for number in numbers[:1]:
        signal.raise_signal(number)


def tell(text: str) -> None:
    """
    Print a line, without an error if the terminal was closed or nobody reads the pipe any more: from then on what is printed
    goes to the standard error, and nowhere if that is gone too.
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


def is_for_user(error: BaseException) -> bool:
    """
    Whether the message of an error says all, because a check of this package, or of one that it builds on, has raised it.
    Whatever else goes wrong, for instance inside of an env, is somebody's bug, which is found by its traceback.
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
    """A full disk, or a path among what the user gave that is no place to write to, and what to do; None for other errors."""
    if not isinstance(error, OSError):
        return None
    if error.errno in NO_SPACE:
        return f"{error}: free some space or choose another disk (what was saved before is whole)"
    if error.errno in NOT_WRITABLE and isinstance(error.filename, str):
        path = pathlib.Path(error.filename).absolute()
        for place in (pathlib.Path(value).absolute() for value in given if value and isinstance(value, str | pathlib.Path)):
            if path.is_relative_to(place) or place.is_relative_to(path):
                return f"{error}: choose another place than {place}"
    return None


def whole_number(text: str) -> int:
    """Read a whole number of the command line, which may be written as 1e6."""
    with contextlib.suppress(ValueError):
        # Not by way of a float, which may be another one
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise argparse.ArgumentTypeError(f"expected a whole number such as 4 or 1e6, got {text!r}")
