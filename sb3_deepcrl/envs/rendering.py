import warnings
from typing import Any

import mujoco
import numpy as np

from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import GoalTask, check_counts

CAMERAS = ("follow", "top_down")
GOAL_COLOR = (0.1, 0.8, 0.2, 0.45)
HEADLESS_HINT = (
    "Without a display set the environment variable MUJOCO_GL to 'egl' or 'osmesa' before Python starts, "
    "and install the system library (on Debian: apt install libegl1, or apt install libosmesa6)."
)


class TaskRenderer:
    """
    Pictures of a task's simulations. The goal is drawn into the picture only: it is no part of the model. Arguments are
    those of :class:`~sb3_deepcrl.envs.goal_env.GoalEnv`.
    """

    def __init__(self, task: GoalTask, render_mode: str | None, camera: str, width: int, height: int):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} is not supported: use None or 'rgb_array'.")
        if camera not in CAMERAS:
            raise ValueError(f"Unknown camera {camera!r}. Choose one of: {', '.join(CAMERAS)}.")
        check_counts(width=width, height=height)
        self.task = task
        self.render_mode = render_mode
        self.follows = camera == "follow"
        self.width, self.height = width, height
        # Made when the first picture is asked for
        self._renderer: mujoco.Renderer | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy opens a rendering context of its own
        return {name: value for name, value in {**self.__dict__, "_renderer": None}.items() if name not in ("data", "camera")}

    def _open(self) -> mujoco.Renderer:
        task, visual = self.task, self.task.model.vis
        visual.global_.offwidth = max(self.width, visual.global_.offwidth)
        visual.global_.offheight = max(self.height, visual.global_.offheight)
        try:
            renderer = mujoco.Renderer(task.model, self.height, self.width)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"MuJoCo could not open a rendering context ({reason}). {HEADLESS_HINT}") from error
        self.data = mujoco.MjData(task.model)
        self.camera = mujoco.MjvCamera()
        if self.follows:
            self.camera.distance = task.robot.follow_distance
            self.camera.azimuth, self.camera.elevation = 160, -50
        else:
            (low_x, low_y), (high_x, high_y) = task.scene.bounds
            self.camera.lookat[:] = (low_x + high_x) / 2, (low_y + high_y) / 2, 0
            # The vertical opening angle decides, so a wide scene needs a larger distance in a narrow picture
            extent = max(high_x - low_x, (high_y - low_y) * self.height / self.width)
            self.camera.distance = 1.05 * extent / (2 * np.tan(np.deg2rad(visual.global_.fovy) / 2))
            # The light at the camera would burn out the tops of the walls, so it shines from everywhere
            visual.headlight.ambient[:], visual.headlight.diffuse[:], visual.headlight.specular[:] = 0.3, 0, 0
            # Looking down with -x up in the picture
            self.camera.azimuth, self.camera.elevation = 180, -90
        return renderer

    def render(self, simulation: Simulation, index: int) -> np.ndarray | None:
        """RGB picture of one of the simulations, shape (height, width, 3), None without a render mode."""
        if self.render_mode is None:
            warnings.warn("There is no picture without a render mode: make the environment with render_mode='rgb_array'.")
            return None
        simulation.check_open()
        if self._renderer is None:
            self._renderer = self._open()
        data = simulation.data(index, self.data)
        if self.follows:
            self.camera.lookat[:] = data.body(self.task.robot.follow_body).xpos
        self._renderer.update_scene(data, self.camera)
        scene = self._renderer.scene
        # The sphere shows where a step counts as a success
        mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom],
            mujoco.mjtGeom.mjGEOM_SPHERE,
            np.full(3, self.task.success_threshold),
            np.array([*simulation.goals[index], 0.0])[:3].astype(np.float64),
            np.eye(3).ravel(),
            np.array(GOAL_COLOR, dtype=np.float32),
        )
        scene.ngeom += 1
        return self._renderer.render()

    def close(self) -> None:
        """Free the rendering context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
