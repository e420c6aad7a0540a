"""
Vectorized environments that hand out PyTorch tensors, so that what they simulate on a GPU stays there.
"""

import functools
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvStepReturn

TensorObs = dict[str, th.Tensor]


class TensorStep(NamedTuple):
    """What one step of all envs leads to: tensors on their device with a leading axis of envs, new ones in each step."""

    #: Observations by key, of the new episode where one ended
    observation: TensorObs
    reward: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    #: Observations that the step led to, those of ``observation`` where the episode goes on
    terminal_observation: TensorObs
    #: What the info of a finished episode holds of its last step, by name; ``is_success``, or else ``success``, is counted as
    #: time at the goal
    measures: TensorObs

    def to(self, device: th.device) -> "TensorStep":
        """The same on another device."""
        parts: dict[str, Any] = {}
        for name, part in self._asdict().items():
            is_tensor = isinstance(part, th.Tensor)
            parts[name] = part.to(device) if is_tensor else {key: value.to(device) for key, value in part.items()}
        return TensorStep(**parts)


class DeviceObs(dict):
    """Observations on a device. They are pickled as arrays, as they may be loaded where there is no such device."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (to_arrays(self),)


class LazyArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of NumPy that is read from its tensor when somebody looks, so that nobody waits for the device for nothing."""

    def __init__(self, tensor: th.Tensor):
        self.tensor = tensor

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The array, read once. It is read-only, as the training does not read it again."""
        array = self.tensor.numpy(force=True)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        def arrays(values: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(value.array if isinstance(value, LazyArray) else value for value in values)

        if "out" in kwargs:
            kwargs["out"] = arrays(kwargs["out"])
        return getattr(ufunc, method)(*arrays(inputs), **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Methods of an array, but not its ways of being copied or of handing out its memory
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array, name)

    def __len__(self) -> int:
        return len(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __getitem__(self, index: Any) -> Any:
        return self.array[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[index] = value


def to_arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as arrays of NumPy, by name. Arrays stay what they are."""
    return {name: value.numpy(force=True) if isinstance(value, th.Tensor) else value for name, value in values.items()}


class TensorVecEnv(VecEnv):
    """
    A vectorized environment on tensors: a subclass has a ``device``, ``reset_tensors`` and ``step_tensors``. Finished episodes
    are reset in the same step. ``DeepCRL`` trains on the tensors; for everything else there is the interface of
    Stable-Baselines3, whose infos are empty but where an episode ended: ``terminal_observation``, ``TimeLimit.truncated``,
    ``episode``, ``time_at_goal`` (steps) and the measures of the last step, by name.
    """

    device: th.device
    # Return, length and steps at the goal of the running episodes, shape (3, n_envs)
    _counters: th.Tensor | None = None
    # Names of the measures, and what their numbers are made on the host
    _measure_types: Mapping[str, type] = {}
    _start_time = 0.0

    @abstractmethod
    def reset_tensors(self) -> TensorObs:
        """Start a new episode in all envs and give its first observations, tensors of shape ``(n_envs, ...)`` by key."""

    @abstractmethod
    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all envs with actions of the action space, shape ``(n_envs, action_dim)``."""

    def count(self, step: TensorStep) -> th.Tensor:
        """
        Count a step for the statistics of its episodes.

        :return: What ``finished_episodes`` reads on the host, float32 of shape ``(n, n_envs)``, on the device
        """
        if self._counters is None:
            self._counters = th.zeros(3, self.num_envs, device=self.device)
            self._start_time = self._start_time or time.time()
        done = step.terminated | step.truncated
        at_goal = step.measures.get("is_success", step.measures.get("success", th.zeros_like(done)))
        self._counters = self._counters + th.stack((step.reward, th.ones_like(step.reward), at_goal.to(step.reward.dtype)))
        self._measure_types = {name: bool if row.dtype == th.bool else float for name, row in step.measures.items()}
        rows = (done, step.truncated & ~step.terminated, *self._counters, *step.measures.values())
        record = th.stack([row.to(th.float32) for row in rows])
        self._counters = self._counters * ~done
        return record

    def finished_episodes(self, record: np.ndarray) -> list[tuple[int, dict[str, Any]]]:
        """Index and info of each env whose episode ended in a step, by what ``count`` gave for it."""
        episodes = []
        for i in np.flatnonzero(record[0]).tolist():
            _, timeout, reward, length, time_at_goal, *measures = record[:, i].tolist()
            info: dict[str, Any] = {"TimeLimit.truncated": bool(timeout)}
            for (name, kind), value in zip(self._measure_types.items(), measures, strict=True):
                info[name] = kind(value)
            if "is_success" in info or "success" in info:
                info["time_at_goal"] = int(time_at_goal)
            elapsed = round(time.time() - self._start_time, 6)
            info["episode"] = {"r": round(reward, 6), "l": int(length), "t": elapsed}
            episodes.append((i, info))
        return episodes

    def reset(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        self._counters = None
        return to_arrays(self.reset_tensors())

    def step_async(self, actions: np.ndarray) -> None:
        self._tensor_actions = th.as_tensor(actions, dtype=th.float32, device=self.device)

    def step_wait(self) -> VecEnvStepReturn:
        step = self.step_tensors(self._tensor_actions)
        record = self.count(step).numpy(force=True)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if episodes := self.finished_episodes(record):
            indices = [i for i, _ in episodes]
            terminal = to_arrays({key: values[indices] for key, values in step.terminal_observation.items()})
            for k, (i, info) in enumerate(episodes):
                infos[i] = {**info, "terminal_observation": {key: values[k] for key, values in terminal.items()}}
        return to_arrays(step.observation), step.reward.numpy(force=True), record[0].astype(bool), infos  # type: ignore[return-value]
