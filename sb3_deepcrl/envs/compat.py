"""
A repair for gymnasium-robotics, needed until a release of it runs on the MuJoCo that this package needs.

Since MuJoCo 3.12 ``mujoco.mjtJoint.mjJNT_SLIDE == np.int32(2)`` is false, as the enum no longer compares equal to NumPy's
integers. gymnasium-robotics 1.4.2 compares them in this order, so its Fetch, Hand and kitchen environments stop with an
AssertionError when they are made. The maze environments are not affected.

To remove it, delete this file, its name in ``sb3_deepcrl.envs`` and its call in ``sb3_deepcrl``.
"""

import importlib
import types
from typing import Any

from sb3_deepcrl.import_hook import ImportHook

REPAIRED_ENUM = "mjtJoint"
FAULTY_MODULE = "gymnasium_robotics.utils.mujoco_utils"


def patch_gymnasium_robotics() -> bool:
    """
    Make the environments of gymnasium-robotics run on new versions of MuJoCo. Importing ``sb3_deepcrl`` sees to it, see
    :func:`patch_gymnasium_robotics_on_import`.

    It tests for the fault itself, not for a version, and changes nothing where there is none. Neither MuJoCo nor the files of
    gymnasium-robotics are changed: one module of the latter sees plain integers in place of the enum.

    :return: Whether the fault was there and is now repaired
    """
    return _patch(importlib.import_module(FAULTY_MODULE))


def patch_gymnasium_robotics_on_import() -> None:
    """
    Do what :func:`patch_gymnasium_robotics` does as soon as somebody imports gymnasium-robotics, or now if it is imported
    already: whoever makes the environments, by whichever call and in whichever process, finds them repaired. It imports
    nothing itself.
    """
    ImportHook(FAULTY_MODULE, _patch).install()


def _patch(mujoco_utils: Any) -> bool:
    import mujoco
    import numpy as np

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
