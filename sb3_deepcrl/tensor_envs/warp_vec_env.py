import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch as th
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_deepcrl.common.tensor_env import TensorObs, TensorStep, TensorVecEnv
from sb3_deepcrl.envs.batch_vec_env import BatchVecEnv, EnvView
from sb3_deepcrl.envs.scenes import Maze
from sb3_deepcrl.envs.simulation import MAX_OBSERVATION

# Contacts and constraint rows of a world for which there is room, twice what random actions need, by the robot's kind
SIZES = {"point": (4, 16), "ant": (8, 48), "humanoid": (16, 64), "arm": (24, 128)}
# Further contacts that all worlds share: with few of them a single one may need most of the room
SPARE_CONTACTS = 64
# Resets of each env that are drawn ahead, and steps after which those that were used are drawn anew
N_RESETS, REFILL_EVERY = 4, 32
# Goals that are drawn ahead where the next one does not depend on the last one
N_GOALS = 1024


class WarpVecEnv(TensorVecEnv, BatchVecEnv):
    """
    n environments of one task of this package on MuJoCo Warp: what :class:`~sb3_deepcrl.envs.BatchVecEnv` does, on a GPU, in
    float32, with observations as tensors. ``DeepCRL`` collects experiences without leaving the GPU then. It is made for
    thousands of environments; without a GPU it runs, but ``BatchVecEnv`` is much faster. It was tested on CPUs only.

    Starts and goals are drawn on the CPU ahead of time: they are those of ``BatchVecEnv`` with the same seeds.

    It is made from an id, ``WarpVecEnv("AntUMaze-v0", n_envs=4096)``, or the way ``make_vec_env`` makes it.

    :param env: Id of one of this package's environments, or a list of functions that each return the same one
    :param n_envs: Number of environments. With a list of functions it is the length of the list
    :param device: PyTorch device to simulate on. None takes the GPU if there is one
    :param kwargs: Further arguments of ``BatchVecEnv``, such as ``max_episode_steps``
    :raises ImportError: if MuJoCo Warp is not installed
    """

    # Whether there is an episode. Attributes of an environment may be asked for before there is one
    _is_running = False

    def __init__(
        self,
        env: str | Sequence[Callable[[], gym.Env]],
        n_envs: int | None = None,
        device: th.device | str | None = None,
        **kwargs: Any,
    ):
        try:
            import warp

            # Not a line for each of its modules
            warp.config.log_level = warp.LOG_WARNING
            import mujoco_warp
        except ImportError as error:
            raise ImportError(f"WarpVecEnv needs MuJoCo Warp: pip install 'sb3_deepcrl[warp]' ({error})") from error
        BatchVecEnv.__init__(self, env, n_envs, **kwargs)
        self.device = th.device(device or ("cuda" if th.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.device.index is None:
            # Warp asks for its number
            self.device = th.device("cuda", th.cuda.current_device())
        if self.device.type == "cpu":
            warnings.warn(
                "WarpVecEnv simulates on the CPU, as there is no GPU or device='cpu' was given: BatchVecEnv is the faster one"
            )
        task, self._warp, self._mujoco_warp = self.task, warp, mujoco_warp
        warp.init()
        n_contacts, n_rows = SIZES[task.robot.name.partition("_")[0]]
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
        self._generator.seed()
        # What a reset consists of, and those that are drawn ahead, one after the other in a ring
        self._widths = [task.model.nq, task.model.nv, task.robot.goal_dim, task.robot.observation_dim]
        self._resets = th.zeros(self.num_envs, N_RESETS, sum(self._widths), device=self.device)
        self._goals = th.zeros(self.num_envs, task.robot.goal_dim, device=self.device)
        self._observation = th.zeros(self.num_envs, task.robot.observation_dim, device=self.device)
        self._rows = th.arange(self.num_envs, device=self.device)
        self._n_diverged = th.zeros((), dtype=th.int64, device=self.device)
        self._has_warned = False
        self._graph: Any = None
        if self.device.type == "cuda":
            with self._on_device():
                # Modules are loaded before the capture
                self._simulate()
                with warp.ScopedCapture() as capture:
                    self._simulate()
            self._graph = capture.graph
            # From here on everything is on the streams of PyTorch
            warp.synchronize_device(warp.device_from_torch(self.device))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A WarpVecEnv can neither be copied nor pickled: make a second one with the same arguments")

    def _tensor(self, values: np.ndarray) -> th.Tensor:
        return th.tensor(values, dtype=th.float32 if values.dtype.kind == "f" else th.int64, device=self.device)

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

    @property
    def n_diverged(self) -> int:
        """Number of simulations that diverged so far."""
        return int(self._n_diverged)

    def reset_tensors(self) -> TensorObs:
        if self._seeds[0] is not None:
            self._generator.manual_seed(self._seeds[0])
        # On the CPU, with the seeds and options that were given
        starts = self._pack(np.arange(self.num_envs), BatchVecEnv.reset(self))
        # Number of resets of each env that were drawn ahead, and that were used
        self._n_drawn, self._n_used = np.zeros(self.num_envs, dtype=np.int64), th.zeros_like(self._rows)
        self._refill()
        self._n_steps, self._episode_steps = 0, th.zeros_like(self._rows)
        self._is_running = True
        return self._restart(th.ones_like(self._rows, dtype=th.bool), starts)

    def _pack(self, indices: np.ndarray, observation: dict[str, np.ndarray]) -> th.Tensor:
        """What a reset consists of, of environments that were just reset on the CPU."""
        state = [self._host[name][indices] for name in ("qpos", "qvel")]
        parts = (*state, self.simulation.goals[indices], observation["observation"])
        return self._tensor(np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind"))

    def _refill(self) -> None:
        """Draw resets in the place of those that were used. One that is used twice is only less random than it should."""
        n_used = self._n_used.numpy(force=True)
        self._n_drawn = np.maximum(self._n_drawn, n_used)
        while len(indices := np.flatnonzero(self._n_drawn < n_used + N_RESETS)):
            drawn = self._pack(indices, self.simulation.reset(indices)[0])
            self._resets[self._tensor(indices), self._tensor(self._n_drawn[indices] % N_RESETS)] = drawn
            self._n_drawn[indices] += 1

    def _restart(self, done: th.Tensor, starts: th.Tensor) -> TensorObs:
        """Write the starts of environments that are done, and give the observations of all of them."""
        qpos, qvel, goals, self._observation = (
            th.where(done[:, None], start, now)
            for start, now in zip(
                starts.split(self._widths, dim=1),
                (self.state["qpos"], self.state["qvel"], self._goals, self._observation),
                strict=True,
            )
        )
        self.state["qpos"].copy_(qpos)
        self.state["qvel"].copy_(qvel)
        self._warm_start.masked_fill_(done[:, None], 0.0)
        self._goals = goals
        self._episode_steps = self._episode_steps * ~done
        return self._with_goals()

    def _with_goals(self) -> TensorObs:
        achieved = self._observation[:, : self.task.robot.goal_dim].clone()
        return {"observation": self._observation, "achieved_goal": achieved, "desired_goal": self._goals.clone()}

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        task = self.task
        self.simulation.check_open()
        if not self._is_running:
            raise RuntimeError("No episode is running. Call reset() before the first step().")
        if actions.shape != (expected := (self.num_envs, task.robot.action_dim)):
            raise ValueError(f"Actions have shape {tuple(actions.shape)}, expected {expected}.")
        if self._n_steps % REFILL_EVERY == REFILL_EVERY - 1:
            self._refill()
            self._check_overflow()
        self._n_steps += 1
        self.state["ctrl"].copy_(self._robot.control(actions.clamp(-1.0, 1.0)))
        with self._on_device():
            if self._graph is None:
                self._simulate()
            else:
                stream = self._warp.stream_from_torch(th.cuda.current_stream(self.device))
                self._warp.capture_launch(self._graph, stream=stream)
        observation = th.empty_like(self._observation)
        self._robot.observe(self.state, observation)
        # A comparison with NaN is false. The last sound observation stands in for a broken one
        diverged = ~(observation.abs().amax(dim=1) < MAX_OBSERVATION)
        self._observation = th.where(diverged[:, None], self._observation, observation)
        healthy = task.is_healthy(self.state["qpos"]) | diverged
        distance = task.goal_distance(self._observation[:, : task.robot.goal_dim], self._goals)
        measures = {**task.measures(distance, healthy), "diverged": diverged}
        reward = task.reward_from_distance(distance).float()
        if task.goal_mode == "continuing":
            self._goals = th.where(measures["is_success"][:, None], self._next_goals(), self._goals)
        terminal = self._with_goals()
        self._n_diverged += diverged.sum()
        self._episode_steps = self._episode_steps + 1
        terminated = ~healthy if task.terminate_when_unhealthy else th.zeros_like(diverged)
        truncated = diverged
        if self.max_episode_steps is not None:
            truncated = truncated | (self._episode_steps >= self.max_episode_steps)
        done = terminated | truncated
        starts = self._resets[self._rows, self._n_used % N_RESETS]
        self._n_used = self._n_used + done
        return TensorStep(self._restart(done, starts), reward, terminated, truncated, terminal, measures)

    def _next_goals(self) -> th.Tensor:
        """Goals after those that were reached: the law of ``Scene.next_goals``."""
        scene = self.task.scene
        counts, table = self._goal_table
        cells = th.zeros_like(self._rows)
        if isinstance(scene, Maze):
            row, column = (self._goals[:, :2] / scene.cell_size + 0.5).floor().long().unbind(dim=1)
            cells = row * scene.layout.shape[1] + column
        uniform = th.rand(self.num_envs, generator=self._generator, device=self.device)
        # Rounding may give the number itself
        choice = th.minimum((uniform * counts[cells]).long(), (counts[cells] - 1).clamp(min=0))
        return th.where((counts[cells] > 0)[:, None], table[cells, choice], self._goals)

    @cached_property
    def _goal_table(self) -> tuple[th.Tensor, th.Tensor]:
        """Number of goals that may follow one in each cell of a maze, and the goals; without a maze there is one cell."""
        scene = self.task.scene
        goals: list[Any]
        if isinstance(scene, Maze):
            goals = [[] if scene.layout.is_wall(*cell) else scene.goals_from(cell) for cell in np.ndindex(*scene.layout.shape)]
        else:
            generator = self.simulation.generators[0]
            goals = [scene.draw(np.array([generator.random(scene.n_uniform) for _ in range(N_GOALS)]))[1]]
        counts = np.array([len(of_cell) for of_cell in goals])
        table = np.zeros((len(goals), counts.max(), self.task.robot.goal_dim))
        for row, of_cell in zip(table, goals, strict=True):
            if len(of_cell) > 0:
                row[: len(of_cell)] = of_cell
        return self._tensor(counts), self._tensor(table)

    def _check_overflow(self) -> None:
        """Warn once if there was no room for contacts. Solvers stop at their number of iterations on the CPU too."""
        kinds = self._mujoco_warp.OverflowType
        flags = kinds(int(np.bitwise_or.reduce(self._overflow.numpy(force=True)))) & ~(kinds.ITERATIONS | kinds.LS_ITERATIONS)
        if flags and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"MuJoCo Warp ran out of room ({flags!r}): contacts were dropped, so that robots may pass through what they "
                "touch. Use BatchVecEnv for this task"
            )

    def step_async(self, actions: np.ndarray) -> None:
        super().step_async(self.simulation.check_actions(actions))

    def step_wait(self) -> VecEnvStepReturn:
        observation, rewards, dones, infos = super().step_wait()
        if dones.any():
            assert isinstance(observation, dict)
            distance = self.task.goal_distance(observation["achieved_goal"], observation["desired_goal"])
            healthy = self.task.is_healthy(self.state["qpos"].numpy(force=True))
            columns = {name: values.tolist() for name, values in self.task.measures(distance, healthy).items()}
            for i in np.flatnonzero(dones):
                self.reset_infos[i] = {name: column[i] for name, column in columns.items()}
        return observation, rewards, dones, infos

    def finished_episodes(self, record: np.ndarray) -> list[tuple[int, dict[str, Any]]]:
        episodes = super().finished_episodes(record)
        for i, info in episodes:
            self._write_episode(i, info)
        return episodes

    def _views(self, indices: VecEnvIndices) -> list[EnvView]:
        # They see the simulations on the CPU
        if self._is_running:
            for name, values in self._host.items():
                values[:] = self.state[name].numpy(force=True)
            self.simulation.goals[:] = self._goals.numpy(force=True)
        return super()._views(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        super().set_attr(attr_name, value, indices)
        self._goals = self._tensor(self.simulation.goals)
        if attr_name == "goal_mode" and self._is_running:
            # Those that were drawn ahead are of the old mode
            self._n_drawn[:] = 0
            self._refill()

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        results = super().env_method(method_name, *method_args, indices=indices, **method_kwargs)
        self._goals = self._tensor(self.simulation.goals)
        return results

    def close(self) -> None:
        # Views of the simulations' memory
        self._host = {}
        super().close()
