from typing import Any

import mujoco
import numpy as np

from sb3_deepcrl.envs.robot import Robot, State


class Point(Robot):
    """
    A ball that slides on a plane, for studies on a laptop. It is no robot of the paper.

    Observation (4): position xy, velocity xy. Action (2): force / 16 N along x and y. Goal (2): x and y.
    With a mass of 1 kg and a damping of 4 Ns/m it reaches at most 4 m/s along an axis, within a few steps.
    A control step is 0.1 s: 4 Euler steps of 0.025 s.
    """

    name = "point"
    observation_dim = 4
    action_dim = 2
    goal_dim = 2
    frame_skip = 4
    cell_size = 2.0
    reset_noise_scale = 0.1
    radius = 0.25
    follow_body = "ball"
    follow_distance = 6.0

    def make_spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        spec.modelname = "point"
        spec.option.timestep = 0.025
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
        spec.option.iterations = 4
        kinds = {"type": mujoco.mjtTexture.mjTEXTURE_2D, "builtin": mujoco.mjtBuiltin.mjBUILTIN_CHECKER}
        spec.add_texture(name="checker", rgb1=[0.2, 0.25, 0.2], rgb2=[0.8, 0.85, 0.8], width=100, height=100, **kinds)
        material = spec.add_material(name="floor", texrepeat=[0.5, 0.5], texuniform=True)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "checker"
        spec.worldbody.add_light(pos=[0, 0, 3], dir=[0, 0, -1], type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
        # The slides hold the ball up, so the floor is for the eye only
        spec.worldbody.add_geom(
            name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1], material="floor", contype=0, conaffinity=0
        )
        ball = spec.worldbody.add_body(name="ball", pos=[0, 0, self.radius])
        shape = {"type": mujoco.mjtGeom.mjGEOM_SPHERE, "size": [self.radius, 0, 0], "rgba": [0.8, 0.3, 0.2, 1]}
        ball.add_geom(name="ball", mass=1, contype=1, conaffinity=0, condim=1, friction=[0, 0, 0], **shape)
        for axis, direction in (("x", [1, 0, 0]), ("y", [0, 1, 0])):
            ball.add_joint(name=axis, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=direction, damping=[4, 0, 0])
            motor = spec.add_actuator(name=axis, target=axis, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.gear[0] = 16
        return spec

    def home(self) -> np.ndarray:
        return np.zeros(2)

    def observe(self, state: State, observation: Any) -> None:
        observation[:, :2] = state["qpos"]
        observation[:, 2:] = state["qvel"]
