from typing import Any

import mujoco
import numpy as np

from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import GoalTask, check_count

CAMERAS = ("follow", "top_down")
GOAL_COLOR = (0.1, 0.8, 0.2, 0.45)
HEADLESS_HINT = (
    "Without a display set the environment variable MUJOCO_GL to 'egl' or 'osmesa' before Python starts, "
    "and install the system library (on Debian: apt install libegl1, or apt install libosmesa6)."
)


class TaskRenderer:
    """
    Pictures of a task's simulations. The goal is drawn into the picture only: it is no part of the model.

    :param task: The task
    :param camera: "follow" looks at the robot from behind and above; "top_down" shows the whole scene as a maze's text
        reads, i.e. with x down and y to the right
    :param width: Width of the picture in pixels
    :param height: Height of the picture in pixels
    """

    def __init__(self, task: GoalTask, camera: str, width: int, height: int):
        self.task = task
        task.model.vis.global_.offwidth = max(width, task.model.vis.global_.offwidth)
        task.model.vis.global_.offheight = max(height, task.model.vis.global_.offheight)
        try:
            self.renderer = mujoco.Renderer(task.model, height, width)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"MuJoCo could not open a rendering context ({reason}). {HEADLESS_HINT}") from error
        self.data = mujoco.MjData(task.model)
        self.camera = mujoco.MjvCamera()
        self.follow_id = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_BODY, task.robot.follow_body)
        self.follows = camera == "follow"
        if self.follows:
            self.camera.distance = task.robot.follow_distance
            self.camera.azimuth, self.camera.elevation = 160, -50
        else:
            (low_x, low_y), (high_x, high_y) = task.scene.bounds
            self.camera.lookat[:] = (low_x + high_x) / 2, (low_y + high_y) / 2, 0
            # The vertical opening angle decides, so a wide scene needs a larger distance in a narrow picture
            extent = max(high_x - low_x, (high_y - low_y) * height / width)
            self.camera.distance = 1.05 * extent / (2 * np.tan(np.deg2rad(task.model.vis.global_.fovy) / 2))
            # The light at the camera would burn out the tops of the walls, so it shines from everywhere
            headlight = task.model.vis.headlight
            headlight.ambient[:], headlight.diffuse[:], headlight.specular[:] = 0.3, 0, 0
            # Looking down with -x up in the picture
            self.camera.azimuth, self.camera.elevation = 180, -90

    def render(self, simulation: Simulation, index: int) -> np.ndarray:
        """
        :param simulation: The simulations of the task
        :param index: Index of the one to draw
        :return: RGB picture of shape (height, width, 3)
        """
        data = simulation.data(index, self.data)
        if self.follows:
            self.camera.lookat[:] = data.xpos[self.follow_id]
        self.renderer.update_scene(data, self.camera)
        scene = self.renderer.scene
        marker = scene.geoms[scene.ngeom]
        # The sphere shows where a step counts as a success
        mujoco.mjv_initGeom(
            marker,
            mujoco.mjtGeom.mjGEOM_SPHERE,
            np.full(3, self.task.success_threshold),
            np.array([*simulation.goals[index], 0.0])[:3].astype(np.float64),
            np.eye(3).ravel(),
            np.array(GOAL_COLOR, dtype=np.float32),
        )
        scene.ngeom += 1
        return self.renderer.render()

    def close(self) -> None:
        """Free the rendering context."""
        self.renderer.close()


def check_render_arguments(render_mode: str | None, camera: str, width: int, height: int) -> dict[str, Any]:
    """
    :param render_mode: None or "rgb_array"
    :param camera: "follow" or "top_down"
    :param width: Width of a picture in pixels
    :param height: Height of a picture in pixels
    :return: The arguments of ``TaskRenderer`` besides the task
    :raises ValueError: If one of them cannot be used
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode={render_mode!r} is not supported: use None or 'rgb_array'.")
    if camera not in CAMERAS:
        raise ValueError(f"Unknown camera {camera!r}. Choose one of: {', '.join(CAMERAS)}.")
    check_count("width", width)
    check_count("height", height)
    return {"camera": camera, "width": width, "height": height}
