import argparse

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.envs import IdentityEnv

from sb3_deepcrl.common.utils import check_choice, check_depth, is_for_user, update_schedule, whole_number


def raise_here():
    raise ValueError("not of a package that checks")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: check_depth(6), True),
        # Over several lines, and in an assert statement
        (lambda: check_choice("a", ("b",), "c"), True),
        (lambda: SAC("MlpPolicy", IdentityEnv(dim=2)), True),
        (raise_here, False),
        # Fails in this package, but no check of it
        (lambda: check_depth("four" @ np.ones(2)), False),
        (lambda: update_schedule("four", 2), False),
        (lambda: spaces.Box(0, "high"), False),
    ],
)
def test_checks_and_bugs(call, expected):
    with pytest.raises(Exception) as caught:
        call()
    assert is_for_user(caught.value) == expected, caught.value


@pytest.mark.parametrize(
    ("n_envs", "transitions", "train_freq", "gradient_steps"), [(1, 16, 16, 1), (16, 16, 1, 1), (6, 16, 8, 3), (64, 16, 1, 4)]
)
def test_update_schedule(n_envs, transitions, train_freq, gradient_steps):
    assert update_schedule(n_envs, transitions) == dict(train_freq=train_freq, gradient_steps=gradient_steps)


def test_whole_number():
    assert [whole_number(text) for text in ("4", "1e6", "9007199254740993")] == [4, 1_000_000, 9007199254740993]
    for text in ("1.5", "many", "1e400"):
        with pytest.raises(argparse.ArgumentTypeError):
            whole_number(text)
