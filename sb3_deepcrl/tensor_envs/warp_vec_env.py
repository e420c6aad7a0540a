import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_deepcrl.common.tensor_env import TensorObs, TensorStep, TensorVecEnv
from sb3_deepcrl.envs.batch_vec_env import BatchVecEnv, EnvView
from sb3_deepcrl.envs.arm import Arm
from sb3_deepcrl.envs.scenes import Maze, Scene
from sb3_deepcrl.envs.simulation import MAX_OBSERVATION

# Contacts and constraint rows of a world for which there is room, twice what random actions need
SIZES = {"point": (4, 16), "ant": (8, 48), "humanoid": (16, 64), "arm": (24, 128)}
# With few worlds the contacts of one of them matter
SPARE_CONTACTS = 64
# Resets of each env that are drawn ahead, and steps after which those that were used are drawn anew
N_RESETS, REFILL_EVERY = 4, 32
# Goals that are drawn ahead where the next one does not depend on the last one
N_GOALS = 1024


class WarpVecEnv(TensorVecEnv, BatchVecEnv):
    """
    n environments of one task of this package on MuJoCo Warp: what :class:`~sb3_deepcrl.envs.BatchVecEnv` does, on a GPU, in
    float32, with observations as tensors. ``DeepCRL`` collects experiences without leaving the GPU then. It is made for
    thousands of environments; without a GPU it runs, but ``BatchVecEnv`` is much faster.

    Starts and goals are drawn on the CPU ahead of time: they are those of ``BatchVecEnv`` with the same seeds.

    It is made from an id, ``WarpVecEnv("AntUMaze-v0", n_envs=4096)``, or the way ``make_vec_env`` makes it.

    :param env: Id of one of this package's environments, or a list of functions that each return the same one
    :param n_envs: Number of environments. With a list of functions it is the length of the list
    :param device: PyTorch device to simulate on. None takes the GPU if there is one
    :param kwargs: Further arguments of ``BatchVecEnv``, such as ``max_episode_steps``
    :raises ImportError: if MuJoCo Warp is not installed
    """

    def __init__(
        self,
        env: str | Sequence[Callable[[], gym.Env]],
        n_envs: int | None = None,
        device: th.device | str | None = None,
        **kwargs: Any,
    ):
        try:
            import mujoco_warp
            import warp
        except ImportError as error:
            raise ImportError(f"WarpVecEnv needs MuJoCo Warp: pip install 'sb3_deepcrl[warp]' ({error})") from error
        BatchVecEnv.__init__(self, env, n_envs, **kwargs)
        self.device = th.device(device or ("cuda" if th.cuda.is_available() else "cpu"))
        if self.device.type == "cpu":
            warnings.warn(
                "WarpVecEnv simulates on the CPU, as there is no GPU or device='cpu' was given: BatchVecEnv does it many times "
                "as fast"
            )
        task, self._warp, self._mujoco_warp = self.task, warp, mujoco_warp
        warp.config.quiet = True
        n_contacts, n_rows = SIZES[task.robot.name]
        with self._on_device():
            self._model = mujoco_warp.put_model(task.model)
            # It would print a line for each world whose solver reaches its number of iterations
            self._model.opt.warn_overflow = 0
            n_contacts += SPARE_CONTACTS // self.num_envs
            self._data = mujoco_warp.make_data(task.model, nworld=self.num_envs, nconmax=n_contacts, njmax=n_rows)
        names = ("qpos", "qvel", "ctrl", *task.robot.derived_fields)
        #: The simulation's arrays by MjData name, each with a leading axis of envs
        self.state = {name: warp.to_torch(getattr(self._data, name)) for name in names}
        self._warm_start = warp.to_torch(self._data.qacc_warmstart)
        self._overflow = warp.to_torch(self._data.overflow)
        # Its constants as tensors, so that it observes and controls on the device
        self._robot = copy.copy(task.robot)
        for name, value in vars(task.robot).items():
            if isinstance(value, np.ndarray):
                setattr(self._robot, name, self._tensor(value))
        self._host = {name: self.simulation.batch.bind(name) for name in ("qpos", "qvel")}
        self._generator = th.Generator(self.device)
        #: Goals in meters, shape (n_envs, goal_dim)
        self.goals = th.zeros(self.num_envs, task.robot.goal_dim, device=self.device)
        self._widths = [task.model.nq, task.model.nv, task.robot.goal_dim, task.robot.observation_dim]
        self._resets = th.zeros(self.num_envs, N_RESETS, sum(self._widths), device=self.device)
        self._is_running = self._has_warned = False
        self._graph: Any = None
        if self.device.type == "cuda":
            with self._on_device():
                # Modules are loaded before the capture
                self._simulate()
                with warp.ScopedCapture() as capture:
                    self._simulate()
            self._graph = capture.graph

    def _tensor(self, values: np.ndarray) -> th.Tensor:
        return th.as_tensor(values, dtype=th.float32 if values.dtype.kind == "f" else th.int64, device=self.device)

    def _on_device(self) -> AbstractContextManager:
        return self._warp.ScopedDevice(self._warp.device_from_torch(self.device))

    def _simulate(self) -> None:
        """Advance the simulations by one control step."""
        for _ in range(self.task.frame_skip):
            self._mujoco_warp.step(self._model, self._data)
        if self.task.robot.derived_stage == mujoco.mjtStage.mjSTAGE_VEL:
            # Derived fields at the new state
            for stage in ("kinematics", "com_pos", "sensor_pos", "com_vel", "sensor_vel"):
                getattr(self._mujoco_warp, stage)(self._model, self._data)
