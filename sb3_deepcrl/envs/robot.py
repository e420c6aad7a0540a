from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np

# Parts of MuJoCo's solver that cost one robot more time than they save: it is a single island anyway, and Newton's method
# needs no more iterations from the unconstrained acceleration than from the last one
DISABLED_SOLVER_PARTS = int(mujoco.mjtDisableBit.mjDSBL_ISLAND) | int(mujoco.mjtDisableBit.mjDSBL_WARMSTART)

# Moment of inertia in kg m^2 of each link about each axis in the physics of the released code (its spring_inertia_scale is 1)
LINK_INERTIA = 1.0

# The simulation's arrays by MjData name, each with a leading batch axis
State = Mapping[str, Any]


class Robot(ABC):
    """
    The physical half of a task: a model, its home state, what is observed and what an action does.
    Everything works on arrays with a leading batch axis and knows nothing of mazes. ``observe`` and ``control`` take NumPy's
    arrays and PyTorch's tensors: slices and operators mean the same for both.

    The observation starts with the coordinates that a goal is compared to, so the achieved goal is always
    ``observation[:, :goal_dim]``.

    :param on_field: Whether it acts on the open field
    """

    #: Name under which a task asks for the robot
    name: ClassVar[str]
    observation_dim: ClassVar[int]
    action_dim: ClassVar[int]
    goal_dim: ClassVar[int]
    #: Coordinates that all goals share, behind x and y, in meters
    goal_tail: ClassVar[tuple[float, ...]] = ()
    #: Derived MjData fields that the observation needs besides ``qpos`` and ``qvel``
    derived_fields: ClassVar[tuple[str, ...]] = ()
    #: Up to which stage of MuJoCo they are computed at the new state after a step. With none they are those of the last
    #: physics step, which starts one time step earlier, as in Gymnasium's environments, and cost nothing.
    derived_stage: ClassVar[mujoco.mjtStage] = mujoco.mjtStage.mjSTAGE_NONE
    #: Physics steps of one env step
    frame_skip: int
    #: Whether it works on a table, and in no maze
    on_table: ClassVar[bool] = False
    #: Side of a maze cell in meters
    cell_size: ClassVar[float] = 4.0
    #: Smallest and largest distance of a goal on the open field in meters (None: it acts in mazes only)
    field_distance: ClassVar[tuple[float, float] | None] = None
    #: Lowest and highest ``qpos[2]``, the height of the torso in meters, at which an episode goes on (None: no limits)
    healthy_z_range: ClassVar[tuple[float, float] | None] = None
    #: Spread of the start state: uniform on positions, normal on velocities
    reset_noise_scale: ClassVar[float] = 0.0
    #: Distance to the goal in meters below which a step counts as a success, and those of further measures by name
    success_threshold: ClassVar[float] = 0.5
    extra_thresholds: ClassVar[Mapping[str, float]] = {"success_easy": 2.0}
    #: Distance from walls that a start position must keep, in meters
    radius: ClassVar[float]
    #: Where ``qpos`` holds the two coordinates that a start position sets
    start_address: ClassVar[slice] = slice(0, 2)
    #: Where ``qpos`` and ``qvel`` get start noise
    noise_address: ClassVar[slice] = slice(None)
    #: Body that the follow camera looks at, and the camera's distance in meters
    follow_body: ClassVar[str]
    follow_distance: ClassVar[float]

    def __init__(self, on_field: bool = False):
        self.on_field = on_field

    @abstractmethod
    def make_spec(self) -> mujoco.MjSpec:
        """A new editable model of the robot on an open floor."""

    @abstractmethod
    def home(self) -> np.ndarray:
        """The ``qpos`` at which the robot stands at the origin."""

    @abstractmethod
    def observe(self, state: State, observation: Any) -> None:
        """Write all columns of observations, shape (n, observation_dim), of the simulation's arrays."""

    def observation(self, state: State) -> np.ndarray:
        """Observations in float32 of the simulation's arrays, shape (n, observation_dim)."""
        observation = np.empty((len(state["qpos"]), self.observation_dim), dtype=np.float32)
        self.observe(state, observation)
        return observation

    def control(self, actions: Any) -> Any:
        """The ``ctrl`` of actions in [-1, 1], shapes (n, nu) and (n, action_dim)."""
        return actions


def gymnasium_spec(file_name: str) -> mujoco.MjSpec:
    """Editable model that comes with Gymnasium, whose floor is drawn without an end."""
    spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / file_name))
    # Gymnasium draws 80 m of floor at most, less than the widest maze with its texture in meters
    floor, material = spec.geom("floor"), spec.material("MatPlane")
    floor.size = [0, 0, 1]
    material.texuniform, material.texrepeat, material.reflectance = True, [0.5, 0.5], 0
    return spec


def set_link_inertia(spec: mujoco.MjSpec) -> None:
    """Give each body with a joint the moment of inertia of the released code's links, at its mass and center of mass."""
    model = spec.compile()
    # Gymnasium's models take inertia from shapes, even where a body has its own
    spec.compiler.inertiafromgeom = int(mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_AUTO)
    for body in spec.bodies:
        if model.body_dofnum[body.id] > 0:
            body.explicitinertial, body.inertia, body.iquat = True, [LINK_INERTIA] * 3, [1, 0, 0, 0]
            body.mass, body.ipos = model.body_mass[body.id], model.body_ipos[body.id]
