from typing import Any

import mujoco
import numpy as np

from sb3_deepcrl.envs.robot import DISABLED_SOLVER_PARTS, Robot, State, gymnasium_spec, set_link_inertia

FOOT_RADIUS = 0.08
# Mass of a link in kg. The physics of the released code gives 1 kg to each of the 9 links that have a joint between them;
# Gymnasium's ant weighs 0.9 kg as a whole, and with the same motors a random action throws it a meter into the air.
LINK_MASS = 1.0
# Joints and contacts of the same physics are springs. With these values MuJoCo's ant comes as far as that one and turns its
# joints as fast, in the mean over random actions and the waves of benchmarks/robots.py, and learns to walk as soon. With that
# one's own damping (10) and friction (1), and MuJoCo's hard limits, it comes 0.84 as far.
# Damping of a joint (Nms), times in which a limit of a joint and a contact give way (s), friction of feet and floor
JOINT_DAMPING = 8.0
LIMIT_TIME = 0.07
CONTACT_TIME = 0.15
FRICTION = 0.8


class Ant(Robot):
    """
    Gymnasium's ant with the joints, contacts, masses, inertia and thresholds of the paper's ant mazes.

    Observation (29): position xyz, quaternion, 8 joint angles, linear and angular velocity, 8 joint velocities.
    Action (8): motor torque / 150 Nm. Goal (2): x and y of the torso.
    A control step is 0.05 s: 5 Euler steps of 0.01 s.

    Contacts are those of the released code: the feet touch the floor, walls, each other, hips and torso; hips and torso touch
    walls, but not the floor; legs and ankles pass through everything.

    On the open field nothing but the feet and the floor collide, as in the released code.
    """

    name = "ant"
    observation_dim = 29
    action_dim = 8
    goal_dim = 2
    frame_skip = 5
    healthy_z_range = (0.2, 1.0)
    reset_noise_scale = 0.1
    # On a circle
    field_distance = (10.0, 10.0)
    radius = 0.7
    follow_body = "torso"
    follow_distance = 9.0

    def make_spec(self) -> mujoco.MjSpec:
        spec = gymnasium_spec("ant.xml")
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
        spec.option.iterations = 4
        # With such inertia damping may as well be explicit
        spec.option.disableflags |= DISABLED_SOLVER_PARTS | int(mujoco.mjtDisableBit.mjDSBL_EULERDAMP)
        for geom in spec.geoms:
            solid = geom.name == "floor" or (not self.on_field and (geom.name == "torso_geom" or geom.name.startswith("aux")))
            geom.contype, geom.conaffinity = 0, int(solid)
            geom.margin, geom.solref, geom.friction[0] = 0, [CONTACT_TIME, 1], FRICTION
        for joint in spec.joints:
            if joint.type == mujoco.mjtJoint.mjJNT_HINGE:
                joint.damping, joint.armature, joint.solref_limit = [JOINT_DAMPING, 0, 0], 0, [LIMIT_TIME, 1]
            if joint.name.startswith("ankle"):
                leg = joint.parent
                tip = leg.geoms[0].fromto[3:]
                foot = leg.add_geom(name=f"foot{joint.name[-2:]}", type=mujoco.mjtGeom.mjGEOM_SPHERE, pos=tip, mass=0)
                foot.size = [FOOT_RADIUS, 0, 0]
                foot.contype, foot.conaffinity = 1, int(not self.on_field)
                foot.margin, foot.solref, foot.friction[0] = 0, [CONTACT_TIME, 1], FRICTION
        _set_link_masses(spec)
        set_link_inertia(spec)
        return spec

    def home(self) -> np.ndarray:
        return np.array([0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1], dtype=np.float64)

    def observe(self, state: State, observation: Any) -> None:
        observation[:, :15] = state["qpos"]
        observation[:, 15:] = state["qvel"]


def _set_link_masses(spec: mujoco.MjSpec) -> None:
    """Give every link the same mass. Bodies without a joint are part of the link that carries them."""
    model = spec.compile()
    # body_weldid names the first body of a link
    link_mass = np.bincount(model.body_weldid, weights=model.body_mass)
    for body in spec.bodies:
        for geom in body.geoms:
            if body.id > 0:
                geom.density *= LINK_MASS / link_mass[model.body_weldid[body.id]]
