"""
A repair for gymnasium-robotics, needed until a release of it runs on the MuJoCo that this package needs.

Since MuJoCo 3.12 ``mujoco.mjtJoint.mjJNT_SLIDE == np.int32(2)`` is false, as the enum no longer compares equal to NumPy's
integers. gymnasium-robotics 1.4.2 compares them in this order, so its Fetch, Hand and kitchen environments stop with an
AssertionError when they are made. The maze environments are not affected.

To remove it, delete this file and its name in ``sb3_deepcrl.envs``.
"""

import types
from typing import Any

REPAIRED_ENUM = "mjtJoint"


def patch_gymnasium_robotics() -> bool:
    """
    Make the environments of gymnasium-robotics run on new versions of MuJoCo. Call it once before ``gym.make``::

        import gymnasium_robotics
        from sb3_deepcrl.envs import patch_gymnasium_robotics

        patch_gymnasium_robotics()
        env = gym.make("FetchPush-v4")

    It tests for the fault itself, not for a version, and changes nothing where there is none. Neither MuJoCo nor the files of
    gymnasium-robotics are changed: one module of the latter sees plain integers in place of the enum.

    :return: Whether the fault was there and is now repaired
    """
    import mujoco
    import numpy as np
    from gymnasium_robotics.utils import mujoco_utils

    slide = mujoco.mjtJoint.mjJNT_SLIDE
    if slide == np.int32(int(slide)):
        return False
    if not isinstance(mujoco_utils.mujoco, _MujocoWithPlainJoints):
        mujoco_utils.mujoco = _MujocoWithPlainJoints(mujoco)
    return True


class _MujocoWithPlainJoints(types.ModuleType):
    """
    The module ``mujoco`` with integers in place of the members of one enum.

    :param original: The module ``mujoco``
    """

    def __init__(self, original: types.ModuleType):
        super().__init__(original.__name__)
        members = getattr(original, REPAIRED_ENUM).__members__
        self._original = original
        setattr(self, REPAIRED_ENUM, types.SimpleNamespace(**{name: int(member) for name, member in members.items()}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
