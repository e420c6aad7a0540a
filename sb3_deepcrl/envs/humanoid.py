from typing import Any, ClassVar

import mujoco
import numpy as np

from sb3_deepcrl.envs.robot import DISABLED_SOLVER_PARTS, Robot, State, gymnasium_spec, set_link_inertia

# Torque limit of the motors as a share of their gear, Gymnasium's ctrlrange
CTRL_LIMIT = 0.4
# The released code's physics damps the rotation of each joint (constraint_ang_damping of its humanoid.xml, in Nms) and has no
# springs; 11 motors move trunk and legs, 6 the arms. With Gymnasium's joints, gears and inertia random actions throw the
# humanoid down three times sooner, and hardly move it.
JOINT_DAMPING = 30.0
GEARS = [350.0] * 11 + [100.0] * 6
# The released code steps the humanoid at 0.015 s in mazes, but at 0.03 s on the open field
FIELD_FRAME_SKIP = 10


class Humanoid(Robot):
    """
    Gymnasium's humanoid with the joints, motors, inertia, contacts, integrator and thresholds of the paper's humanoid tasks.

    Observation (246): position xyz, quaternion, 17 joint angles, linear and angular velocity, 17 joint velocities,
    MuJoCo's center-of-mass based inertia (10) and velocity (6) of each of the 11 moving bodies, actuator forces on all
    23 degrees of freedom as shares of their limits. Inertia and velocity rows are those of the last physics step, one time
    step before the rest, as in Gymnasium's humanoid. Nothing in it depends on the goal: the released code's 268 numbers also
    hold the goal's position.
    Action (17): motor torque as a share of its limit. Goal (3): x, y and z of the torso, with z fixed at 1.25 m.
    A control step in a maze is 0.015 s: 5 Euler steps of 0.003 s; on the open field it is twice as long.

    Bodies touch floor and walls but not each other.
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
    #: Whether joints, gears and moments of inertia are those of Gymnasium's model
    gymnasium_physics: ClassVar[bool] = False
    #: Whether actuator forces are observed in Nm. They then outweigh all the rest, as in the released code
    forces_in_nm: ClassVar[bool] = False

    def __init__(self, on_field: bool = False):
        super().__init__(on_field)
        if on_field:
            self.frame_skip = FIELD_FRAME_SKIP
        model = self.make_spec().compile()
        # The feet have no joint: they are rigid parts of the shins, which stand for them
        self.bodies = np.flatnonzero(model.body_dofnum).tolist()
        # The same as runs of neighbors, which are copied faster than single bodies: place in the observation, and bodies
        runs = np.split(np.arange(11), np.flatnonzero(np.diff(self.bodies) > 1) + 1)
        self._runs = [(slice(r[0], r[-1] + 1), slice(self.bodies[r[0]], self.bodies[r[-1]] + 1)) for r in runs]
        # A motor drives one joint, so the actuator force on that degree of freedom is its gear times its control
        driven = [model.joint(model.actuator_trnid[k, 0]).dofadr[0] for k in range(model.nu)]
        self.force_columns = 223 + np.array(driven)
        self.force_scale = model.actuator_gear[:, 0].copy() if self.forces_in_nm else 1 / CTRL_LIMIT

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
        if not self.gymnasium_physics:
            for motor, gear in zip(spec.actuators, GEARS, strict=True):
                joint = spec.joint(motor.target)
                motor.gear[0], joint.damping, joint.stiffness = gear, [JOINT_DAMPING, 0, 0], [0, 0, 0]
            set_link_inertia(spec)
            # With such inertia damping may as well be explicit, which is faster
            spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_EULERDAMP)
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
        observation[:, self.force_columns] = self.force_scale * state["ctrl"]

    def control(self, actions: Any) -> Any:
        return CTRL_LIMIT * actions


class GymnasiumHumanoid(Humanoid):
    """The humanoid with the joints, gears and moments of inertia of Gymnasium's model."""

    name = "humanoid_gymnasium"
    gymnasium_physics = True


class UnscaledHumanoid(Humanoid):
    """The humanoid with actuator forces in Nm in its observation."""

    name = "humanoid_unscaled"
    forces_in_nm = True
