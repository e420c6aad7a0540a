import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_deepcrl.common.tensor_env import TensorObs, TensorStep, TensorVecEnv

# Where batched envs put the last observations of finished episodes: Gymnasium and Isaac Lab, ManiSkill
FINAL_OBSERVATION_KEYS = ("final_obs", "final_observation")


class GoalAdapter(TensorVecEnv):
    """
    A goal-conditioned env on tensors, made of a batched PyTorch env whose observations tell where the goal is and what was
    achieved: of Isaac Lab, mjlab, ManiSkill (in its ``ManiSkillVectorEnv``), MuJoCo Playground (in its wrapper for RSL-RL), or
    any other one with their contract:

    - ``reset()`` gives observations, or them and a dict; ``step(actions)`` gives observations, rewards, terminated, truncated
      and a dict, or observations, rewards, dones and a dict with ``time_outs``. Everything is a tensor on one device with a
      leading axis of envs, or a dict of such tensors.
    - An env that is done starts a new episode in the same step. The observation before that is in the dict, as ``final_obs``
      or ``final_observation`` for all envs. Where there is none, the last observation but one stands in for it.
    - ``num_envs`` and ``device`` are attributes. So is ``single_action_space``, unless ``action_space`` is given.

    :param env: The batched env
    :param achieved: Function that takes observations of the env to what was achieved, shape ``(n_envs, goal_dim)``
    :param desired: The same for the goals
    :param observation: The same for what the networks see besides, shape ``(n_envs, observation_dim)``. None takes the
        observations themselves, or their entry ``"policy"``
    :param success_threshold: Distance between achieved and desired goal below which a step is a success. None: nothing tells
        of success
    :param action_space: Actions of one env. None takes the env's own one, within [-1, 1] where that has no bounds
    :raises ValueError: if the env does not keep to this contract
    """

    def __init__(
        self,
        env: Any,
        achieved: Callable[[Any], th.Tensor],
        desired: Callable[[Any], th.Tensor],
        observation: Callable[[Any], th.Tensor] | None = None,
        success_threshold: float | None = None,
        action_space: spaces.Box | None = None,
    ):
        self.env = env
        self.device = th.device(self._attribute("device"))
        self._functions = {
            "observation": observation or _policy_observation,
            "achieved_goal": achieved,
            "desired_goal": desired,
        }
        self.success_threshold = success_threshold
        num_envs = int(self._attribute("num_envs"))
        self._observation = self._goal_observation(self._first(env.reset()), num_envs)
        space: dict[str, spaces.Space] = {
            key: spaces.Box(-np.inf, np.inf, tuple(value.shape[1:]), np.float32) for key, value in self._observation.items()
        }
        super().__init__(num_envs, spaces.Dict(space), action_space or _bounded(self._attribute("single_action_space")))

    def _attribute(self, name: str) -> Any:
        # Wrappers of Gymnasium hide the attributes of what they wrap
        for env in (self.env, getattr(self.env, "unwrapped", None)):
            if hasattr(env, name):
                return getattr(env, name)
        if name == "single_action_space":
            raise ValueError(f"{self.env} has no attribute `{name}`: pass `action_space=`")
        raise ValueError(
            f"{self.env} has no attribute `{name}`, so it is no batched env on tensors. Envs of Gymnasium and of "
            "Stable-Baselines3 need no adapter"
        )

    @staticmethod
    def _first(result: Any) -> Any:
        return result[0] if isinstance(result, tuple) else result

    def _goal_observation(self, observations: Any, num_envs: int) -> TensorObs:
        """Copies, as the env may write into its tensors."""
        result = {}
        for key, function in self._functions.items():
            value = function(observations)
            if not isinstance(value, th.Tensor) or value.ndim < 2 or len(value) != num_envs:
                found = f"shape {tuple(value.shape)}" if isinstance(value, th.Tensor) else type(value).__name__
                raise ValueError(f"`{key}` must be a tensor of shape ({num_envs}, ...), but the function for it gave {found}")
            result[key] = value.to(self.device, th.float32, copy=True)
        if result["achieved_goal"].shape != result["desired_goal"].shape:
            shapes = [tuple(result[key].shape) for key in ("achieved_goal", "desired_goal")]
            raise ValueError(f"Achieved and desired goals must have one shape, got {shapes[0]} and {shapes[1]}")
        return result

    def reset_tensors(self) -> TensorObs:
        if any(self._options):
            raise ValueError(f"The reset options {self._options} are not handed to {self.env}: set them on the env itself")
        seed, takes_seed = self._seeds[0], "seed" in inspect.signature(self.env.reset).parameters
        result = self.env.reset(seed=seed) if seed is not None and takes_seed else self.env.reset()
        self._reset_seeds()
        self._observation = self._goal_observation(self._first(result), self.num_envs)
        return self._observation

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        observations, *results, info = self.env.step(actions)
        # Some have a trailing axis of one
        reward, terminated, *others = (value.reshape(self.num_envs) for value in results)
        if others:
            (truncated,) = others
        else:
            truncated = info.get("time_outs", th.zeros_like(terminated)).reshape(self.num_envs)
            terminated = terminated.bool() & ~truncated.bool()
        terminated, truncated = (value.to(self.device, th.bool, copy=True) for value in (terminated, truncated))
        last, self._observation = self._observation, self._goal_observation(observations, self.num_envs)
        final = next((info[key] for key in FINAL_OBSERVATION_KEYS if info.get(key) is not None), None)
        if final is not None:
            last = self._goal_observation(final, self.num_envs)
        terminal = {}
        for key, value in self._observation.items():
            done = (terminated | truncated).reshape(-1, *[1] * (value.ndim - 1))
            terminal[key] = th.where(done, last[key], value)
        measures = {}
        if self.success_threshold is not None:
            distance = (terminal["achieved_goal"] - terminal["desired_goal"]).flatten(1).norm(dim=1)
            measures = {"is_success": distance < self.success_threshold, "distance": distance}
        return TensorStep(
            self._observation, reward.to(self.device, th.float32, copy=True), terminated, truncated, terminal, measures
        )

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        # Stable-Baselines3 asks for it
        default = (None,) if attr_name == "render_mode" else ()
        return [getattr(self.env, attr_name, *default) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """All envs share their attributes."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """All envs share their methods, so that it is called once."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """``Monitor`` counts as wrapped: the infos hold what it would put there."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]


def _policy_observation(observations: Any) -> th.Tensor:
    if isinstance(observations, th.Tensor):
        return observations
    # TensorDict is no Mapping
    if "policy" in observations.keys():
        return observations["policy"]
    raise ValueError(f"The observations have the entries {list(observations.keys())}: pass `observation=`, a function of them")


def _bounded(space: Any) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise ValueError(f"The actions are {space}, but must be a Box: pass `action_space=`")
    return space if space.is_bounded() else spaces.Box(-1.0, 1.0, space.shape, np.float32)
