"""
A repair for gymnasium-robotics, needed until a release of it runs on the MuJoCo that this package needs.

Since MuJoCo 3.12 ``mujoco.mjtJoint.mjJNT_SLIDE == np.int32(2)`` is false, as the enum no longer compares equal to NumPy's
integers. gymnasium-robotics 1.4.2 compares them in this order, so its Fetch, Hand and kitchen environments stop with an
AssertionError when they are made. The maze environments are not affected.

To remove it, delete this file and its call in ``sb3_deepcrl``.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

COMPARING_MODULE = "gymnasium_robotics.utils.mujoco_utils"


def repair_gymnasium_robotics() -> None:
    """
    Let this enum compare equal to NumPy's integers again, now or as soon as the module that needs it is imported, so that the
    order of imports does not matter and neither MuJoCo nor gymnasium-robotics is imported for it.
    """
    if COMPARING_MODULE in sys.modules:
        _repair_enum()
    elif not any(isinstance(finder, _Repair) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Repair())


class _Repair(MetaPathFinder):
    """Repairs the enum when the module is looked for, and leaves it to the other finders to find it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == COMPARING_MODULE:
            _repair_enum()


def _repair_enum() -> None:
    import mujoco
    import numpy as np

    joint, equals = mujoco.mjtJoint, mujoco.mjtJoint.__eq__
    if joint.mjJNT_SLIDE == np.int32(2):
        return

    def equals_number(self: mujoco.mjtJoint, other: Any) -> bool:
        return equals(self, int(other) if isinstance(other, np.integer) else other)

    joint.__eq__ = equals_number
    joint.__ne__ = lambda self, other: not equals_number(self, other)
