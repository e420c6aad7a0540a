from typing import Any

import mujoco
import numpy as np

from sb3_deepcrl.envs.robot import DISABLED_SOLVER_PARTS, Robot, State, gymnasium_spec

# Torque limit of the motors as a share of their gear, Gymnasium's ctrlrange
CTRL_LIMIT = 0.4
# The released code steps the humanoid at 0.015 s in mazes, but at 0.03 s on the open field
FIELD_FRAME_SKIP = 10
# MuJoCo's bodies that have no joint of their own: rigid parts of their parents, which already stand for them
WELDED = ("right_foot", "left_foot")


class Humanoid(Robot):
    """
    Gymnasium's humanoid with the contacts, integrator and thresholds of the paper's humanoid tasks.

    Observation (246): position xyz, quaternion, 17 joint angles, linear and angular velocity, 17 joint velocities,
    MuJoCo's center-of-mass based inertia (10) and velocity (6) of each of the 11 moving bodies, actuator forces on all
    23 degrees of freedom. Inertia and velocity rows are those of the last physics step, one time step before the rest, as in
    Gymnasium's humanoid. Nothing in it depends on the goal: the released code's 268 numbers also hold the goal's position.
    Action (17): motor torque as a share of its limit. Goal (3): x, y and z of the torso, with z fixed at 1.25 m.
    A control step in a maze is 0.015 s: 5 Euler steps of 0.003 s; on the open field it is twice as long.

    Bodies touch floor and walls but not each other. The motors have Gymnasium's gears.
    """

    name = "humanoid"
    observation_dim = 246
    action_dim = 17
    goal_dim = 3
    # The height of every goal (the released code's constant): reaching one takes an upright torso
    goal_tail = (1.25,)
    derived_fields = ("cinert", "cvel")
    frame_skip = 5
    cell_size = 2.0
    healthy_z_range = (1.0, 2.0)
    # A ring around the start
    field_distance = (1.0, 5.0)
    radius = 0.4
    follow_body = "torso"
    follow_distance = 5.0

    def __init__(self, on_field: bool = False):
        super().__init__(on_field)
        if on_field:
            self.frame_skip = FIELD_FRAME_SKIP
        model = self.make_spec().compile()
        self.bodies = [i for i in range(1, model.nbody) if model.body(i).name not in WELDED]
        # The same as runs of neighbors, which are copied faster than single bodies: place in the observation, and bodies
        runs = np.split(np.arange(11), np.flatnonzero(np.diff(self.bodies) > 1) + 1)
        self._runs = [(slice(r[0], r[-1] + 1), slice(self.bodies[r[0]], self.bodies[r[-1]] + 1)) for r in runs]
        # A motor drives one joint, so the actuator force on that degree of freedom is its gear times its control
        driven = [model.joint(model.actuator_trnid[k, 0]).dofadr[0] for k in range(model.nu)]
        self.force_columns = 223 + np.array(driven)
        self.gear = model.actuator_gear[:, 0].copy()

    def make_spec(self) -> mujoco.MjSpec:
        spec = gymnasium_spec("humanoid.xml")
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
        spec.option.solver = mujoco.mjtSolver.mjSOL_NEWTON
        spec.option.iterations = 8
        spec.option.disableflags |= DISABLED_SOLVER_PARTS
        for geom in spec.geoms:
            geom.contype, geom.conaffinity = (0, 1) if geom.name == "floor" else (1, 0)
            geom.condim = 3
            geom.margin = 0
        return spec

    def home(self) -> np.ndarray:
        qpos = np.zeros(24)
        qpos[2:4] = 1.4, 1
        return qpos

    def observe(self, state: State, observation: Any) -> None:
        n = len(observation)
        observation[:, :24] = state["qpos"]
        observation[:, 24:47] = state["qvel"]
        inertia = observation[:, 47:157].reshape(n, 11, 10)
        velocity = observation[:, 157:223].reshape(n, 11, 6)
        for place, bodies in self._runs:
            inertia[:, place] = state["cinert"][:, bodies]
            velocity[:, place] = state["cvel"][:, bodies]
        # No motor drives the root
        observation[:, 223:229] = 0
        observation[:, self.force_columns] = self.gear * state["ctrl"]

    def control(self, actions: Any) -> Any:
        return CTRL_LIMIT * actions
