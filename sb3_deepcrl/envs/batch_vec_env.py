import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from sb3_deepcrl.envs.arguments import default_arguments
from sb3_deepcrl.envs.goal_env import GoalEnv, TaskView
from sb3_deepcrl.envs.registration import ENTRY_POINT
from sb3_deepcrl.envs.rendering import TaskRenderer
from sb3_deepcrl.envs.simulation import Simulation, Transition
from sb3_deepcrl.envs.task import SETTABLE, GoalTask, check_counts

# Wrappers whose work BatchVecEnv does itself
ABSORBED_WRAPPERS = (TimeLimit, Monitor, OrderEnforcing, PassiveEnvChecker)
# Attributes that can only be set for all environments at once
SHARED = (*SETTABLE, "max_episode_steps", "_max_episode_steps")
# Arguments of the task, its attributes, number of steps of an episode and pictures
Alike = tuple[dict[str, Any], dict[str, Any], int | None, dict[str, Any]]


def _shared(name: str) -> Any:
    return property(lambda self: getattr(self.vec_env, name))


class EnvView(TaskView):
    """One environment of a ``BatchVecEnv`` as ``get_attr``, ``set_attr`` and ``env_method`` see it."""

    __slots__ = ("index", "vec_env")

    def __init__(self, vec_env: "BatchVecEnv", index: int):
        self.vec_env, self.index = vec_env, index

    unwrapped = property(lambda self: self)
    np_random = property(lambda self: self.simulation.generators[self.index])
    action_space, observation_space = _shared("action_space"), _shared("observation_space")
    task, simulation, renderer = _shared("task"), _shared("simulation"), _shared("renderer")
    spec, render_mode, metadata = _shared("spec"), _shared("render_mode"), _shared("metadata")

    def get_wrapper_attr(self, name: str) -> Any:
        """An attribute, under Gymnasium's name for wrapped environments."""
        return getattr(self, name)

    def has_wrapper_attr(self, name: str) -> bool:
        """Whether there is an attribute."""
        return hasattr(self, name)

    @property
    def max_episode_steps(self) -> int | None:
        """Steps after which an episode is truncated."""
        return self.vec_env.max_episode_steps

    @max_episode_steps.setter
    def max_episode_steps(self, value: int | None) -> None:
        check_counts(max_episode_steps=value)
        self.vec_env.max_episode_steps = value

    #: The same under the name that it has in ``TimeLimit``
    _max_episode_steps = max_episode_steps


class BatchVecEnv(VecEnv):
    """
    n environments of one task, stepped by native threads: one call of ``mujoco.batch.Batch`` a step, and vectorized
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
    :param max_episode_steps: Steps after which an episode is truncated. None takes what the id is registered with, -1 never
        truncates
    :param render_mode: None or "rgb_array"
    :param camera: "follow" or "top_down"
    :param width: Width of a picture in pixels
    :param height: Height of a picture in pixels
    :param task_kwargs: Arguments of :class:`~sb3_deepcrl.envs.task.GoalTask` that replace those of the id
    :raises ValueError: if an argument is out of its range, or the envs are not alike or none of this package's
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
        # As in `gym.make`
        unlimited = max_episode_steps == -1
        check_counts(n_envs=n_envs, n_threads=n_threads, max_episode_steps=None if unlimited else max_episode_steps)
        # What Monitor would have written, and where: a writer and the extra info keys of each environment
        self._writers: list[ResultsWriter | None] = []
        self._info_keywords: tuple[str, ...] = ()
        picture: dict[str, Any] = {"render_mode": render_mode, "camera": camera, "width": width, "height": height}
        defaults = default_arguments(GoalEnv)
        changed = {name: value for name, value in picture.items() if value != defaults[name]} | task_kwargs
        if isinstance(env, str):
            self.spec = find_spec(env)
            if self.spec.entry_point != ENTRY_POINT:
                raise ValueError(
                    f"{env!r} is no environment of this package, such as 'PointUMaze-v0', so it has no batched simulation. "
                    "Use make_vec_env with DummyVecEnv or SubprocVecEnv."
                )
            task_kwargs = {**self.spec.kwargs, **task_kwargs}
            self.spec = replace(self.spec, kwargs={**self.spec.kwargs, **changed})
            limit, n_envs = self.spec.max_episode_steps, n_envs or 1
            settings: dict[str, Any] = {}
            generators: list[np.random.Generator | None] = []
        elif isinstance(env, list | tuple) and all(callable(env_fn) for env_fn in env):
            if changed:
                raise ValueError(
                    f"{sorted(changed)} cannot be changed on envs that functions return. "
                    "Pass them where the envs are made, e.g. make_vec_env(..., env_kwargs={...})."
                )
            if n_envs not in (None, len(env)):
                raise ValueError(f"n_envs={n_envs}, but {len(env)} functions are given. Leave n_envs out.")
            n_envs = len(env)
            (task_kwargs, settings, limit, picture), generators = self._read_envs(env)
        else:
            raise ValueError(
                f"BatchVecEnv cannot be made from {env!r}: pass the id of an environment of this package and n_envs, or a "
                "list of functions that return one environment each."
            )
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if max_episode_steps is not None:
            limit = None if unlimited else max_episode_steps
        self.max_episode_steps = limit
        if self.spec is not None:
            self.spec = replace(self.spec, max_episode_steps=self.max_episode_steps)
        self.render_mode = picture["render_mode"]
        self.task = GoalTask(**task_kwargs)
        for name, value in settings.items():
            self.task.set(name, value)
        self.renderer = TaskRenderer(self.task, **picture)
        self.simulation = Simulation(self.task, n_envs, n_threads or min(usable, n_envs))
        for i, generator in enumerate(generators):
            if generator is not None:
                self.simulation.seed(i, generator)
        self._lengths, self._returns = np.zeros(n_envs, dtype=np.int64), np.zeros(n_envs, dtype=np.float64)
        self._start_time = time.time()
        super().__init__(n_envs, self.task.observation_space, self.task.action_space)
        self.metadata["render_fps"] = self.task.render_fps

    def __getstate__(self) -> dict[str, Any]:
        # A copy goes on where this one is, but two of them cannot write the same files of Monitor
        return {**self.__dict__, "_writers": []}

    def _read_envs(self, env_fns: Sequence[Callable[[], gym.Env]]) -> tuple[Alike, list[np.random.Generator | None]]:
        """What environments have in common, and the random numbers of those that were seeded."""
        read: list[Alike] = []
        generators = []
        for i, env_fn in enumerate(env_fns):
            env = env_fn()
            core = env.unwrapped
            if not isinstance(core, GoalEnv):
                name = type(core).__name__
                raise ValueError(f"Env {i} is a {name}. BatchVecEnv steps this package's GoalEnv only: use DummyVecEnv.")
            self.spec, limit, writer = env.spec, None, None
            while isinstance(env, gym.Wrapper):
                if not isinstance(env, ABSORBED_WRAPPERS):
                    raise ValueError(
                        f"Env {i} is wrapped in {type(env).__name__}, which steps one environment at a time. "
                        "Use a VecEnvWrapper around BatchVecEnv instead, or DummyVecEnv."
                    )
                if isinstance(env, TimeLimit):
                    # The innermost and outermost limit both hold, so the smaller one counts. It has no public name
                    limit = min(limit or env._max_episode_steps, env._max_episode_steps)
                if isinstance(env, Monitor):
                    writer, self._info_keywords = env.results_writer, env.info_keywords
                env = env.env
            read.append((core.task_kwargs, {name: getattr(core, name) for name in SETTABLE}, limit, core.picture))
            if read[-1] != read[0]:
                raise ValueError(f"Env {i} differs from env 0: {read[-1]} is not {read[0]}. All of them must be alike.")
            self._writers.append(writer)
            # The public name would make them
            generators.append(None if core._np_random is None else core.np_random)
            # Not that of the outermost wrapper, which would close the file that Monitor has just opened
            core.close()
        if not read:
            raise ValueError("The list of env functions is empty: at least 1 is needed.")
        return read[0], generators

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
        given = []
        for i, options in enumerate(self._options):
            try:
                given.append(self.task.check_options(options))
            except ValueError as error:
                raise ValueError(f"Env {i}: {error}") from None
        for i, seed in enumerate(self._seeds):
            if seed is not None:
                self.simulation.seed(i, seeding.np_random(seed)[0])
        observation, info = self.simulation.reset(np.arange(self.num_envs), given)
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
        result = self.simulation.step(self._actions)
        self._lengths += 1
        self._returns += result.reward
        truncated = result.diverged
        if self.max_episode_steps is not None:
            truncated = truncated | (self._lengths >= self.max_episode_steps)
        dones = result.terminated | truncated
        result.info["TimeLimit.truncated"] = (truncated & ~result.terminated).tolist()
        # Also kept, as those of DummyVecEnv are
        infos = self.buf_infos = _rows(result.info)
        if dones.any():
            self._finish(np.flatnonzero(dones), result, infos)
        return result.observation, result.reward, dones, infos

    def _finish(self, indices: np.ndarray, result: Transition, infos: list[dict[str, Any]]) -> None:
        """Complete the infos of finished episodes and start new ones, whose observations replace those of the step."""
        elapsed = round(time.time() - self._start_time, 6)
        for i in indices.tolist():
            info = infos[i]
            info["terminal_observation"] = {key: value[i].copy() for key, value in result.observation.items()}
            if result.diverged[i]:
                info["diverged"] = True
            info["episode"] = {"r": round(float(self._returns[i]), 6), "l": int(self._lengths[i]), "t": elapsed}
            self._write_episode(i, info)
        self._lengths[indices] = 0
        self._returns[indices] = 0
        observation, measures = self.simulation.reset(indices)
        for key, value in observation.items():
            result.observation[key][indices] = value
        for i, row in zip(indices.tolist(), _rows(measures), strict=True):
            self.reset_infos[i] = row

    def _write_episode(self, index: int, info: dict[str, Any]) -> None:
        """Write what Monitor would write of a finished episode."""
        for keyword in self._info_keywords:
            info["episode"][keyword] = info[keyword]
        if self._writers and (writer := self._writers[index]) is not None:
            writer.write_row(info["episode"])

    def _views(self, indices: VecEnvIndices) -> list[EnvView]:
        # Made anew each time: if they were kept, they and this object would keep each other alive
        return [EnvView(self, i) for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(view, attr_name) for view in self._views(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        ``goal`` belongs to one environment. ``goal_mode``, ``reward_type``, ``success_threshold`` and ``max_episode_steps``
        are shared by all of them and can only be set for all of them. No other attribute can be changed while they run.
        """
        views = self._views(indices)
        if attr_name in SHARED and len(views) < self.num_envs:
            raise ValueError(
                f"All environments share {attr_name!r}, so it cannot be set for {indices} of {self.num_envs} alone. "
                "Leave indices out, or make a second BatchVecEnv."
            )
        for view in views:
            setattr(view, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        views = self._views(indices)
        if method_name == "set_wrapper_attr":
            # What all environments share is not set in one after the other
            name, value = method_args
            self.set_attr(name, value, indices)
            return [True] * len(views)
        return [getattr(view, method_name)(*method_args, **method_kwargs) for view in views]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """``Monitor`` and ``TimeLimit`` count as wrapped: their work is done here, and ``evaluate_policy`` may rely on it."""
        time_limited = self.max_episode_steps is not None and issubclass(wrapper_class, TimeLimit)
        return [time_limited or issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [view.render() for view in self._views(None)]

    def close(self) -> None:
        self.simulation.close()
        self.renderer.close()
        for writer in self._writers:
            if writer is not None:
                writer.close()
        self._writers = []


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Lists by name as one dict a position. No Python code runs for the single row, as it is called in every step."""
    return list(map(dict, map(zip, repeat(tuple(columns)), zip(*columns.values(), strict=True))))
