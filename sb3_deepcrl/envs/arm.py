from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import mujoco
import numpy as np

from sb3_deepcrl.envs.robot import Robot, State

# Half the side of the cube in meters
CUBE_HALF = 0.03
# The cube starts above the table and falls onto it (meters)
CUBE_DROP_HEIGHT = 0.07
# Stroke of one finger in meters
FINGER_STROKE = 0.04
CAPSULE, BOX = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_BOX
QUARTER_TURN = np.sqrt(0.5)


class Link(NamedTuple):
    """One link of the arm, with the kinematic and inertial figures published for the Panda, in kg, meters and radians."""

    #: Position in the parent's frame
    pos: tuple[float, float, float]
    #: Quarter turns about the parent's x axis
    turn: int
    limits: tuple[float, float]
    #: Of the servo in Nm/rad, a tenth of it is the damping in Nms/rad
    stiffness: float
    #: Largest one in Nm
    torque: float
    mass: float
    center_of_mass: tuple[float, float, float]
    #: xx, yy, zz, xy, xz, yz
    inertia: tuple[float, float, float, float, float, float]
    #: End points of the capsule that is drawn
    shape: tuple[float, float, float, float, float, float]


LINKS = (
    Link((0, 0, 0.333), 0, (-2.8973, 2.8973), 4500, 87, 4.970684, (0.003875, 0.002081, -0.04762),
         (0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169), (0, 0, -0.19, 0, 0, 0)),
    Link((0, 0, 0), -1, (-1.7628, 1.7628), 4500, 87, 0.646926, (-0.003141, -0.02872, 0.003495),
         (0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704), (0, 0, 0, 0, -0.19, 0)),
    Link((0, -0.316, 0), 1, (-2.8973, 2.8973), 3500, 87, 3.228604, (0.027518, 0.039252, -0.066502),
         (0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805), (0, 0, -0.12, 0.0825, 0, 0)),
    Link((0.0825, 0, 0), 1, (-3.0718, -0.0698), 3500, 87, 3.587895, (-0.05317, 0.104419, 0.027454),
         (0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641), (0, 0, 0, -0.0825, 0.12, 0)),
    Link((-0.0825, 0.384, 0), -1, (-2.8973, 2.8973), 2000, 12, 1.225946, (-0.011953, 0.041065, -0.038437),
         (0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229), (0, 0, -0.26, 0, 0, 0)),
    Link((0, 0, 0), 1, (-0.0175, 3.7525), 2000, 12, 1.666555, (0.060149, -0.014117, -0.010517),
         (0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341), (0, 0, 0, 0.088, 0, 0)),
    Link((0.088, 0, 0), 1, (-2.8973, 2.8973), 2000, 12, 0.735522, (0.010517, -0.004252, 0.061597),
         (0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741), (0, 0, 0, 0, 0, 0.1)),
)  # fmt: skip

# Joints that an action moves, and the angles that -1 and 1 stand for (radians). The servos of the released model have a gain
# that differs from their stiffness, so a joint settles at a share of the commanded angle; written out here as the angles that
# it settles at: 2000/3500 of joint 4's command and half of joint 6's and 7's. The torques are the same.
MOVED_JOINTS = (0, 1, 3, 5)
TARGET_LOW = np.array([0.3491, 0.0, -3.0718 * 2000 / 3500, 2.3562 / 2])
TARGET_HIGH = np.array([2.7925, 1.48353, -0.0698 * 2000 / 3500, 3.7525 / 2])
HELD_TARGETS = {2: 0.0, 4: 0.0, 6: 1.4487 / 2}
# Angles at the start of an episode (radians)
START_ANGLES = (1.571, 0.742, 0.0, -1.571, 0.0, 3.054, 1.449)


class Arm(Robot):
    """
    A 7-joint arm with two fingers and a cube on a table, built from primitive shapes with the Panda's published figures.

    Observation (17): cube position xyz, 7 joint angles, position xyz and velocity xyz of the last link, gripper opening.
    Action (5): target angles of joints 1, 2, 4 and 6 within their ranges, and the fingers: above 0 closes, else opens them.
    Goal (3): position of the cube. A control step is 0.05 s: 25 steps of 0.002 s.

    Cube, fingers, hand, table and bins touch each other; the links pass through everything. An episode never terminates.
    """

    name = "arm"
    observation_dim = 17
    action_dim = 5
    goal_dim = 3
    # The height at which the cube lies flat
    goal_tail = (CUBE_HALF,)
    derived_fields = ("sensordata",)
    derived_stage = mujoco.mjtStage.mjSTAGE_VEL
    frame_skip = 25
    on_table = True
    success_threshold = 0.1
    extra_thresholds: ClassVar[Mapping[str, float]] = {"success_easy": 0.3, "success_hard": 0.03}
    radius = CUBE_HALF
    follow_body = "link7"
    follow_distance = 1.8
    # qpos holds 7 arm joints, 2 fingers, then the cube
    start_address = slice(9, 11)
    # Cube and fingers would start within others
    noise_address = slice(7)

    def __init__(self, on_field: bool = False):
        super().__init__(on_field)
        # The number in the action that commands each joint and finger, and the targets between which it chooses
        self.action_columns, self.target_low, self.target_span = np.full(9, 4), np.zeros(9), np.full(9, FINGER_STROKE)
        for joint, target in HELD_TARGETS.items():
            self.target_low[joint], self.target_span[joint] = target, 0
        joints = list(MOVED_JOINTS)
        self.action_columns[joints] = range(4)
        self.target_low[joints], self.target_span[joints] = TARGET_LOW, TARGET_HIGH - TARGET_LOW

    def make_spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        spec.modelname = "arm"
        spec.compiler.degree = False
        spec.option.timestep = 0.002
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        spec.option.iterations = 6
        spec.option.ls_iterations = 12
        # Nothing collides but the pairs named below, all with MuJoCo's friction for pairs (1), as in the released model: its
        # friction values of table and fingers have no effect on pairs
        spec.default.geom.contype = 0
        spec.default.geom.conaffinity = 0
        world = spec.worldbody
        # Without shadows, which were full of specks at the edge of the table
        light = world.add_light(pos=[0, 0, 2], dir=[0.3, 0.3, -1], type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
        light.diffuse, light.castshadow = [0.6] * 3, False
        world.add_geom(name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[2.8, 2.4, 0.1], rgba=[0.6, 0.62, 0.65, 1])
        world.add_geom(name="base", type=CAPSULE, fromto=[0, 0, 0.04, 0, 0, 0.2], size=[0.07, 0, 0], rgba=[0.9, 0.9, 0.92, 1])
        body = world
        for number, link in enumerate(LINKS, start=1):
            quat = [QUARTER_TURN, QUARTER_TURN * link.turn, 0, 0] if link.turn else [1, 0, 0, 0]
            body = body.add_body(name=f"link{number}", pos=link.pos, quat=quat)
            body.explicitinertial = True
            body.mass, body.ipos, body.fullinertia = link.mass, link.center_of_mass, link.inertia
            _add_joint(body, f"joint{number}", mujoco.mjtJoint.mjJNT_HINGE, [0, 0, 1], link.limits)
            color = [0.95, 0.95, 0.95, 1] if number % 2 else [0.6, 0.65, 0.7, 1]
            # Unequal radii, as the rounded ends of neighbors would cover each other with specks
            body.add_geom(type=CAPSULE, fromto=link.shape, size=[0.056 - 0.001 * (number % 2), 0, 0], mass=0, rgba=color)
        _add_hand(body)
        cube = world.add_body(name="cube", pos=[0, 0, CUBE_DROP_HEIGHT])
        cube.add_freejoint(name="cube")
        cube.add_geom(name="cube", type=BOX, size=[CUBE_HALF] * 3, rgba=[0.1, 0.45, 0.2, 1])
        for number, link in enumerate(LINKS, start=1):
            _add_servo(spec, f"joint{number}", link.stiffness, link.torque, link.limits)
        for side in ("left", "right"):
            _add_servo(spec, f"{side}_finger", 500, 500, (0, FINGER_STROKE))
        _add_contacts(spec)
        for name, kind in (("position", mujoco.mjtSensor.mjSENS_FRAMEPOS), ("velocity", mujoco.mjtSensor.mjSENS_FRAMELINVEL)):
            spec.add_sensor(name=name, type=kind, objtype=mujoco.mjtObj.mjOBJ_XBODY, objname="link7")
        return spec

    def home(self) -> np.ndarray:
        return np.array([*START_ANGLES, FINGER_STROKE, FINGER_STROKE, 0, 0, CUBE_DROP_HEIGHT, 1, 0, 0, 0])

    def observe(self, state: State, observation: Any) -> None:
        qpos = state["qpos"]
        observation[:, :3] = qpos[:, 9:12]
        observation[:, 3:10] = qpos[:, :7]
        observation[:, 10:16] = state["sensordata"]
        observation[:, 16] = qpos[:, 7] + qpos[:, 8]

    def control(self, actions: Any) -> Any:
        commands = actions[:, self.action_columns]
        # The fingers close or open
        commands[:, 7:] = 1 - 2 * (commands[:, 7:] > 0)
        return self.target_low + self.target_span * (commands + 1) / 2


def _add_hand(link: mujoco.MjsBody) -> None:
    eighth_turn = np.pi / 8
    hand = link.add_body(name="hand", pos=[0, 0, 0.107], quat=[np.cos(eighth_turn), 0, 0, -np.sin(eighth_turn)])
    hand.explicitinertial = True
    hand.mass, hand.ipos, hand.inertia = 0.73, [-0.01, 0, 0.03], [0.001, 0.0025, 0.0017]
    palm = {"fromto": [0, -0.06, 0.035, 0, 0.06, 0.035], "size": [0.04, 0, 0]}
    hand.add_geom(name="hand", type=CAPSULE, mass=0, rgba=[0.95, 0.95, 0.95, 1], **palm)
    for side, quat in (("left", [1, 0, 0, 0]), ("right", [0, 0, 0, 1])):
        finger = hand.add_body(name=f"{side}_finger", pos=[0, 0, 0.0584], quat=quat)
        finger.explicitinertial = True
        finger.mass, finger.inertia = 0.015, [2.375e-6, 2.375e-6, 7.5e-7]
        _add_joint(finger, f"{side}_finger", mujoco.mjtJoint.mjJNT_SLIDE, [0, 1, 0], (0, FINGER_STROKE))
        place = {"pos": [0, 0.0055, 0.035], "size": [0.015, 0.005, 0.04]}
        finger.add_geom(name=f"{side}_finger", type=BOX, mass=0, rgba=[0.25, 0.25, 0.25, 1], **place)


def _add_contacts(spec: mujoco.MjSpec) -> None:
    pairs = [("cube", "table"), ("table", "hand"), ("left_finger", "right_finger"), ("cube", "hand")]
    pairs += [(other, f"{side}_finger") for other in ("cube", "table") for side in ("left", "right")]
    for first, second in pairs:
        spec.add_pair(geomname1=first, geomname2=second)
    # Both fingers move alike
    kinds = {"type": mujoco.mjtEq.mjEQ_JOINT, "objtype": mujoco.mjtObj.mjOBJ_JOINT, "data": [0, 1] + [0] * 10}
    stiffness = {"solref": [0.005, 1], "solimp": [0.95, 0.99, 0.001, 0.5, 2]}
    spec.add_equality(name1="left_finger", name2="right_finger", **kinds, **stiffness)


def _add_joint(body: mujoco.MjsBody, name: str, kind: mujoco.mjtJoint, axis: Sequence[float], limits: Sequence[float]) -> None:
    limited = mujoco.mjtLimited.mjLIMITED_TRUE
    body.add_joint(name=name, type=kind, axis=axis, range=limits, limited=limited, armature=0.1, damping=[5, 0, 0])


def _add_servo(spec: mujoco.MjSpec, joint: str, stiffness: float, limit: float, target_range: tuple[float, float]) -> None:
    """A servo that moves a joint to the commanded position, with a force of ``stiffness`` per unit of error."""
    servo = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    servo.set_to_position(kp=stiffness, kv=stiffness / 10)
    servo.forcelimited, servo.forcerange = mujoco.mjtLimited.mjLIMITED_TRUE, [-limit, limit]
    servo.ctrllimited, servo.ctrlrange = mujoco.mjtLimited.mjLIMITED_TRUE, target_range
