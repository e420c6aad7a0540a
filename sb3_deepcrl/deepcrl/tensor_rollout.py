from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.distributed import n_envs_of_run
from sb3_deepcrl.common.running_norm import RunningNorm
from sb3_deepcrl.common.tensor_env import DeviceObs, LazyArray, TensorVecEnv, to_arrays


def collect_tensors(
    model: OffPolicyAlgorithm,
    env: VecEnv,
    callback: BaseCallback,
    train_freq: TrainFreq,
    replay_buffer: ContrastiveReplayBuffer,
    action_noise: ActionNoise | None = None,
    learning_starts: int = 0,
    log_interval: int | None = None,
) -> RolloutReturn | None:
    """
    Collect experiences on the device of an env that hands out tensors: what ``collect_rollouts`` of Stable-Baselines3 does,
    but the statistics of its episodes are read once, at the end. In each step, callbacks see ``new_obs`` as tensors,
    ``rewards`` and ``dones`` as what becomes an array when it is read, and empty ``infos``; at the end of the rollout
    ``episode_infos`` holds those of all episodes that ended in it.

    :return: None if Stable-Baselines3's loop has to do it: for other envs, under any wrapper (as ``VecNormalize``), with
        action noise, with several ranks, or if a rollout is counted in episodes
    """
    is_alone = n_envs_of_run(model) == env.num_envs and isinstance(model.action_space, spaces.Box)
    in_steps = action_noise is None and train_freq.unit == TrainFrequencyUnit.STEP
    if not isinstance(env, TensorVecEnv) or not is_alone or not in_steps:
        if isinstance(model._last_obs, DeviceObs):
            model._last_obs = to_arrays(model._last_obs)
        return None
    assert isinstance(model.action_space, spaces.Box) and model._last_obs is not None
    model.policy.set_training_mode(False)
    low, high = (th.as_tensor(bound, device=model.device) for bound in (model.action_space.low, model.action_space.high))
    infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
    records: list[th.Tensor] = []
    normalizer: RunningNorm | None = model.policy.actor.normalizer  # type: ignore[assignment, union-attr]
    continue_training = True
    callback.on_rollout_start()
    while len(records) < train_freq.frequency:
        obs = {key: th.as_tensor(value, device=model.device) for key, value in model._last_obs.items()}  # type: ignore[union-attr]
        if model.num_timesteps < learning_starts:
            actions, buffer_actions = (
                th.as_tensor(values, device=model.device)
                for values in model._sample_action(learning_starts, None, env.num_envs)
            )
        else:
            with th.no_grad():
                actions = model.policy._predict(obs)  # type: ignore[arg-type]
            # There and back again, as in `predict` and `_sample_action`, so that numbers are rounded in the same way
            actions = low + (0.5 * (actions + 1.0) * (high - low))
            buffer_actions = 2.0 * ((actions - low) / (high - low)) - 1.0
            actions = low + (0.5 * (buffer_actions + 1.0) * (high - low))
        step = env.step_tensors(actions.to(env.device))
        records.append(env.count(step))
        model.num_timesteps += env.num_envs
        new_obs, rewards, dones = step.observation, LazyArray(step.reward), LazyArray(step.terminated | step.truncated)
        callback.update_locals(locals())
        if not callback.on_step():
            continue_training = False
            break
        if normalizer is not None:
            normalizer.add(obs)
        replay_buffer.add_tensors(obs, buffer_actions, step.to(model.device))
        model._last_obs = DeviceObs(new_obs)  # type: ignore[assignment]
        model._update_current_progress_remaining(model.num_timesteps, model._total_timesteps)
        model._on_step()
    try:
        replay_buffer.read_added()
    except ValueError:
        # Its sums may hold the NaN already
        if normalizer is not None:
            normalizer.forget_added()
        raise
    steps = th.stack(records).numpy(force=True)
    episode_infos = [info for record in steps for _, info in env.finished_episodes(record)]
    for info in episode_infos:
        model._update_info_buffer([info], np.array([True]))
        model._episode_num += 1
        if log_interval is not None and model._episode_num % log_interval == 0:
            model.dump_logs()
    if continue_training:
        callback.update_locals(locals())
        callback.on_rollout_end()
    return RolloutReturn(len(records) * env.num_envs, len(episode_infos), continue_training)
