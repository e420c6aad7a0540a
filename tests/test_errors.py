import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.envs import IdentityEnv

from sb3_deepcrl.analysis.runs import update_schedule
from sb3_deepcrl.common.utils import check_choice, check_depth, is_for_user


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
