import os
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.goal_env import GoalEnv
from sb3_deepcrl.envs.registration import ENTRY_POINT
from sb3_deepcrl.envs.rendering import TaskRenderer, check_render_arguments
from sb3_deepcrl.envs.simulation import Simulation, Transition
from sb3_deepcrl.envs.task import SETTABLE, GoalTask, check_count, check_task_arguments, refuse_setting

DEFAULT_PICTURE = {"render_mode": None, "camera": "follow", "width": 480, "height": 480}
# Wrappers whose work BatchVecEnv does itself
ABSORBED_WRAPPERS = (TimeLimit, Monitor, OrderEnforcing, PassiveEnvChecker)


class EnvView:
    """
    One environment of a ``BatchVecEnv`` as ``get_attr``, ``set_attr`` and ``env_method`` see it: what belongs to it alone is
    here, everything else is looked up in the task that all of them share. It is made where it is needed: if the vectorized
    environment kept it, the two would keep each other alive.

    :param vec_env: The vectorized environment
    :param index: Index of the environment
    :param attributes: What was set on this environment, to be kept by the vectorized one
    """

    __slots__ = ("__dict__", "_index", "_vec_env")

    def __init__(self, vec_env: "BatchVecEnv", index: int, attributes: dict[str, Any]):
        self._vec_env = vec_env
        self._index = index
        self.__dict__ = attributes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._vec_env.task, name)

    @property
    def unwrapped(self) -> "EnvView":
        """The environment itself, there are no wrappers around it."""
        return self

    @property
    def task(self) -> GoalTask:
        """The task that all environments share."""
        return self._vec_env.task

    @property
    def spec(self) -> EnvSpec | None:
        """Specification under which the environment is registered."""
        return self._vec_env.spec

    @property
    def max_episode_steps(self) -> int | None:
        """Steps after which an episode is truncated."""
        return self._vec_env.max_episode_steps

    #: The same under the name that it has in ``TimeLimit``
    _max_episode_steps = max_episode_steps

    @property
    def render_mode(self) -> str | None:
        """Render mode that all environments share."""
        return self._vec_env.render_mode

    @property
    def metadata(self) -> dict[str, Any]:
        """Render modes and frames per second."""
        return self._vec_env.metadata

    @property
    def np_random(self) -> np.random.Generator:
        """Random numbers of the environment."""
        return self._vec_env.simulation.generators[self._index]

    @property
    def goal(self) -> np.ndarray:
        """The goal of the running episode in metres. It may be set."""
        return self._vec_env.simulation.goals[self._index].copy()

    @goal.setter
    def goal(self, goal: np.ndarray) -> None:
        self._vec_env.simulation.check_open()
        self._vec_env.simulation.goals[self._index] = self._vec_env.task.check_goal(goal, f" of env {self._index}")

    def render(self) -> np.ndarray | None:
        """
        :return: RGB picture of the environment, None without a render mode
        """
        return self._vec_env.picture(self._index)

    def has_wrapper_attr(self, name: str) -> bool:
        """
        :param name: Name of an attribute
        :return: Whether it exists
        """
        return hasattr(self, name)

    def get_wrapper_attr(self, name: str) -> Any:
        """
        :param name: Name of an attribute
        :return: Its value
        """
        return getattr(self, name)

    def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool:
        """
        See :meth:`BatchVecEnv.set_attr`.

        :param name: Name of an attribute
        :param value: Its new value
        :param force: Whether to make an attribute that does not exist yet
        :return: Whether it was set
        """
        return self._vec_env.env_method("set_wrapper_attr", name, value, force=force, indices=self._index)[0]


class BatchVecEnv(VecEnv):
    """
    n environments of one task, stepped by native threads: one call of ``mujoco.batch.Batch`` a step, and vectorised
    observation, reward, success and reset code. The trajectories are bit for bit those of n :class:`GoalEnv` seeded with
    seed, seed + 1, ... for any number of threads.

    Finished episodes are reset in the same step, as in SB3's own vectorized environments: the infos hold
    ``terminal_observation``, ``TimeLimit.truncated`` and the ``episode`` statistics of ``Monitor``. An environment whose
    physics diverges is truncated and reset; it is counted in ``n_diverged`` and its info holds ``diverged=True``. MuJoCo
    itself then prints a warning and appends it to its log file, MUJOCO_LOG.TXT.

    It is made from an id, ``BatchVecEnv("AntU4Maze-v0", n_envs=64)``, or the way ``make_vec_env`` makes it,
    ``make_vec_env("AntU4Maze-v0", n_envs=64, vec_env_cls=BatchVecEnv)``.

    :param env: Id of one of this package's environments, or a list of functions that each return the same one
    :param n_envs: Number of environments. With a list of functions it is the length of the list
    :param n_threads: Number of native threads. None takes all CPUs that this process may use, and at most ``n_envs``
    :param max_episode_steps: Steps after which an episode is truncated. None takes what the id is registered with
    :param render_mode: None or "rgb_array"
    :param camera: "follow" or "top_down"
    :param width: Width of a picture in pixels
    :param height: Height of a picture in pixels
    :param task_kwargs: Arguments of :class:`~sb3_deepcrl.envs.task.GoalTask` that replace those of the id
    """

    spec: EnvSpec | None

    def __init__(
        self,
        env: str | Sequence[Callable[[], gym.Env]],
        n_envs: int | None = None,
        n_threads: int | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        camera: str = "follow",
        width: int = 480,
        height: int = 480,
        **task_kwargs: Any,
    ):
        check_task_arguments(BatchVecEnv, task_kwargs)
        for name, value in (("n_envs", n_envs), ("n_threads", n_threads), ("max_episode_steps", max_episode_steps)):
            check_count(name, value)
        # What Monitor would have written, and where: a writer and the extra info keys of each environment
        self._writers: list[ResultsWriter | None] = []
        self._info_keywords: tuple[str, ...] = ()
        picture: dict[str, Any] = {"render_mode": render_mode, "camera": camera, "width": width, "height": height}
        if isinstance(env, str):
            self.spec = _own_spec(env)
            arguments = {**self.spec.kwargs, **task_kwargs}
            limit = self.spec.max_episode_steps
            n_envs = 1 if n_envs is None else n_envs
        elif not isinstance(env, list | tuple) or not all(callable(env_fn) for env_fn in env):
            raise ValueError(
                f"BatchVecEnv cannot be made from {env!r}: pass the id of an environment of this package and n_envs, or a "
                "list of functions that return one environment each."
            )
        else:
            given = {name for name, value in picture.items() if value != DEFAULT_PICTURE[name]} | set(task_kwargs)
            if given:
                raise ValueError(
                    f"{sorted(given)} cannot be changed on envs that functions return. "
                    "Pass them where the envs are made, e.g. make_vec_env(..., env_kwargs={...})."
                )
            if n_envs not in (None, len(env)):
                raise ValueError(f"n_envs={n_envs}, but {len(env)} functions are given. Leave n_envs out.")
            n_envs = len(env)
            arguments, limit, picture = self._read_envs(env)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        n_threads = min(usable, n_envs) if n_threads is None else n_threads
        self.max_episode_steps = limit if max_episode_steps is None else max_episode_steps
        self.render_mode = picture.pop("render_mode")
        self._render_arguments = check_render_arguments(self.render_mode, **picture)
        self._renderer: TaskRenderer | None = None

        self.task = GoalTask(**arguments)
        self.simulation = Simulation(self.task, n_envs, n_threads)
        self._attributes: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._returns = np.zeros(n_envs, dtype=np.float64)
        self._start_time = time.time()
        self._actions: np.ndarray | None = None
        super().__init__(n_envs, self.task.observation_space, self.task.action_space)
        self.metadata["render_fps"] = round(1 / self.task.dt)

    def _read_envs(self, env_fns: Sequence[Callable[[], gym.Env]]) -> tuple[dict[str, Any], int | None, dict[str, Any]]:
        """
        :param env_fns: Functions that return the environments
        :return: Arguments of the task, number of steps of an episode and arguments of the pictures
        :raises ValueError: If the environments are not alike, not of this package, or wrapped in something that only a
            single environment can do
        """
        read: list[tuple[dict[str, Any], int | None, dict[str, Any]]] = []
        for i, env_fn in enumerate(env_fns):
            env = env_fn()
            if not isinstance(env.unwrapped, GoalEnv):
                raise ValueError(
                    f"Env {i} is a {type(env.unwrapped).__name__}. BatchVecEnv steps this package's GoalEnv only: use "
                    "DummyVecEnv."
                )
            spec, limit, writer = env.spec, None, None
            layer = env
            while isinstance(layer, gym.Wrapper):
                if not isinstance(layer, ABSORBED_WRAPPERS):
                    raise ValueError(
                        f"Env {i} is wrapped in {type(layer).__name__}, which steps one environment at a time. "
                        "Use a VecEnvWrapper around BatchVecEnv instead, or DummyVecEnv."
                    )
                if isinstance(layer, TimeLimit):
                    # The innermost and outermost limit both hold, so the smaller one counts
                    limit = layer._max_episode_steps if limit is None else min(limit, layer._max_episode_steps)
                if isinstance(layer, Monitor):
                    writer, self._info_keywords = layer.results_writer, layer.info_keywords
                layer = layer.env
            assert isinstance(layer, GoalEnv)
            read.append((layer.task_kwargs, limit, {"render_mode": layer.render_mode, **layer.render_arguments}))
            if read[-1] != read[0]:
                raise ValueError(f"Env {i} differs from env 0: {read[-1]} is not {read[0]}. All of them must be alike.")
            self._writers.append(writer)
            self.spec = spec
            # Not env.close(), which would close the file that Monitor has just opened
            layer.close()
        if not read:
            raise ValueError("The list of env functions is empty: at least 1 is needed.")
        return read[0]

    @property
    def n_diverged(self) -> int:
        """Number of simulations that diverged so far."""
        return self.simulation.n_diverged

    def reset(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        if not isinstance(self._options, Sequence) or len(self._options) != self.num_envs:
            raise ValueError(
                f"The reset options {self._options!r} do not fit {self.num_envs} envs: pass one dict for all of them, or a "
                "list of one dict an env, to set_options()."
            )
        starts, goals = [], []
        for i, options in enumerate(self._options):
            start, goal = self.task.check_options(options, f" of env {i}")
            starts.append(start)
            goals.append(goal)
        for i, seed in enumerate(self._seeds):
            if seed is not None:
                self.simulation.seed(i, seeding.np_random(seed)[0])
        observation, info = self.simulation.reset(np.arange(self.num_envs), starts, goals)
        self.reset_infos = _rows(info)
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        self._lengths[:] = 0
        self._returns[:] = 0
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        if self._actions is None:
            raise RuntimeError("No actions are given. Call step_async() before step_wait(), or step().")
        actions, self._actions = self._actions, None
        result = self.simulation.step(actions)
        self._lengths += 1
        self._returns += result.reward
        truncated = result.diverged
        if self.max_episode_steps is not None:
            truncated = truncated | (self._lengths >= self.max_episode_steps)
        dones = result.terminated | truncated
        result.info["TimeLimit.truncated"] = (truncated & ~result.terminated).tolist()
        infos = _rows(result.info)
        if dones.any():
            self._finish(np.flatnonzero(dones), result, infos)
        return result.observation, result.reward, dones, infos

    def _finish(self, indices: np.ndarray, result: Transition, infos: list[dict[str, Any]]) -> None:
        """
        Complete the infos of finished episodes and start new ones.

        :param indices: Environments whose episode is over
        :param result: The step, whose observations are replaced by those of the new episodes
        :param infos: Infos of all environments
        """
        elapsed = round(time.time() - self._start_time, 6)
        last = {key: value[indices] for key, value in result.observation.items()}
        for k, i in enumerate(indices.tolist()):
            info = infos[i]
            info["terminal_observation"] = {key: value[k].copy() for key, value in last.items()}
            if result.diverged[i]:
                info["diverged"] = True
            info["episode"] = {"r": round(float(self._returns[i]), 6), "l": int(self._lengths[i]), "t": elapsed}
            for keyword in self._info_keywords:
                info["episode"][keyword] = info[keyword]
            if self._writers and (writer := self._writers[i]) is not None:
                writer.write_row(info["episode"])
        self._lengths[indices] = 0
        self._returns[indices] = 0
        observation, measures = self.simulation.reset(indices)
        for key, value in observation.items():
            result.observation[key][indices] = value
        for i, row in zip(indices.tolist(), _rows(measures), strict=True):
            self.reset_infos[i] = row

    def _views(self, indices: VecEnvIndices) -> list[EnvView]:
        return [EnvView(self, i, self._attributes[i]) for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(view, attr_name) for view in self._views(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        ``goal`` belongs to one environment. ``goal_mode``, ``reward_type``, ``success_threshold`` and ``max_episode_steps``
        are shared by all of them and can only be set for all of them. A name that no environment has becomes an attribute of
        the environments given.

        :param attr_name: Name of the attribute
        :param value: Its new value
        :param indices: Indices of the environments, None for all of them
        :raises ValueError: If the value is not allowed, or the attribute cannot be changed on a running environment
        """
        chosen = list(self._get_indices(indices))
        limits = ("max_episode_steps", "_max_episode_steps")
        if attr_name in SETTABLE or attr_name in limits:
            if set(chosen) != set(range(self.num_envs)):
                raise ValueError(
                    f"All environments share {attr_name!r}, so it cannot be set for {chosen} of {self.num_envs} alone. "
                    "Leave indices out, or make a second BatchVecEnv."
                )
            if attr_name in limits:
                check_count(attr_name, value)
                self.max_episode_steps = value
            else:
                setattr(self.task, attr_name, value)
            return
        if attr_name != "goal" and (hasattr(EnvView, attr_name) or hasattr(self.task, attr_name)):
            refuse_setting(attr_name, "max_episode_steps", "goal")
        for view in self._views(chosen):
            setattr(view, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if method_name == "set_wrapper_attr":
            # What all environments share is set once, not in one after the other
            return self._set_wrapper_attrs(chosen, *method_args, **method_kwargs)
        return [getattr(view, method_name)(*method_args, **method_kwargs) for view in self._views(chosen)]

    def _set_wrapper_attrs(self, indices: list[int], name: str, value: Any, *, force: bool = True) -> list[bool]:
        exists = force or all(view.has_wrapper_attr(name) for view in self._views(indices))
        if exists:
            self.set_attr(name, value, indices)
        return [exists for _ in indices]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        ``Monitor`` and ``TimeLimit`` count as wrapped: their work is done here, and ``evaluate_policy`` may rely on it.
        """
        time_limited = self.max_episode_steps is not None and issubclass(wrapper_class, TimeLimit)
        return [time_limited or issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def picture(self, index: int) -> np.ndarray | None:
        """
        :param index: Index of the environment
        :return: RGB picture of shape (height, width, 3), None without a render mode
        """
        if self.render_mode is None:
            warnings.warn("There is no picture without a render mode. Pass render_mode='rgb_array' to BatchVecEnv.")
            return None
        self.simulation.check_open()
        if self._renderer is None:
            self._renderer = TaskRenderer(self.task, **self._render_arguments)
        return self._renderer.render(self.simulation, index)

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [self.picture(i) for i in range(self.num_envs)]

    def close(self) -> None:
        self.simulation.close()
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        for writer in self._writers:
            if writer is not None:
                writer.close()
        self._writers = []


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """
    :param columns: Lists of equal length by name
    :return: One dict a position
    """
    # No Python code runs for the single row: this is called in every step
    return list(map(dict, map(zip, repeat(tuple(columns)), zip(*columns.values(), strict=True))))


def _own_spec(env_id: str) -> EnvSpec:
    """
    :param env_id: A Gymnasium id
    :return: Its specification
    :raises ValueError: If it is no environment of this package
    """
    spec = find_spec(env_id)
    if spec.entry_point != ENTRY_POINT:
        raise ValueError(
            f"{env_id!r} is no environment of this package, such as 'PointUMaze-v0', so it has no batched simulation. "
            "Use make_vec_env with DummyVecEnv or SubprocVecEnv."
        )
    return spec
