import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.utils import configure_logger

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.datasets import Episode, read_episodes
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.running_norm import RunningNorm
from sb3_deepcrl.common.utils import check_positive_int
from sb3_deepcrl.deepcrl.policies import Actor

if TYPE_CHECKING:
    from minari import MinariDataset

SelfOfflineLearning = TypeVar("SelfOfflineLearning", bound="OfflineLearning")

# Updates in a call of `train`
UPDATES_AT_ONCE = 100


def read_replay_buffer(path: Any, model: OffPolicyAlgorithm) -> ContrastiveReplayBuffer:
    """
    Read a replay buffer for a model from a file.

    :param path: The file, or the replay buffer itself
    :param model: The model
    :return: The replay buffer
    :raises ValueError: if it is none, or has other spaces
    """
    loaded = path if isinstance(path, ContrastiveReplayBuffer) else load_from_pkl(path, model.verbose)
    if not isinstance(loaded, ContrastiveReplayBuffer):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, but DeepCRL needs a ContrastiveReplayBuffer")
    source = "" if loaded is path else f" in {path}"
    for name in ("observation_space", "action_space"):
        if (found := getattr(loaded, name)) != (wanted := getattr(model, name)):
            raise ValueError(f"The replay buffer{source} has `{name}={found}`, but the model has {wanted}")
    return loaded


class OfflineLearning(OffPolicyAlgorithm):
    """What :class:`~sb3_deepcrl.deepcrl.deepcrl.DeepCRL` does with data that exist: a part of it."""

    replay_buffer: ContrastiveReplayBuffer | None
    actor: Actor
    bc_coef: float
    _ranks: Ranks
    _setup_acceleration: Any
    # Coefficient of behavior cloning in the updates, 0 while the agent learns from what it does itself
    _bc_coef = 0.0

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        # No env is needed. If it is no buffer for this model, the one in use is kept.
        loaded = self._ranks.split_buffer(read_replay_buffer(path, self), self.n_envs)
        if truncate_last_traj:
            loaded.truncate_last_trajectory()
        loaded.device = self.device
        loaded.on_device = self.replay_buffer_kwargs.get("on_device", "auto")
        self.replay_buffer = loaded
        if (normalizer := self.actor.normalizer) is not None and normalizer.count == 0:
            # Otherwise it has statistics of these observations and of others already
            self._learn_statistics(normalizer, loaded.episodes())

    def _learn_statistics(self, normalizer: RunningNorm, episodes: Iterable[Episode]) -> None:
        for episode in episodes:
            normalizer.add(episode.observations)
        self._ranks.update_statistics(normalizer)

    def load_dataset(
        self, dataset: "str | Path | MinariDataset | ContrastiveReplayBuffer", goal_indices: Sequence[int] | None = None
    ) -> None:
        """
        Add the episodes of a data set to the replay buffer; those that do not fit replace the oldest.

        :param dataset: Data set of Minari (id, folder, or object), file of OGBench, which ends in ``.npz``, or replay buffer
            of a model with any number of envs, itself or its file, which ends in ``.pkl``
        :param goal_indices: Which components of the observation are the goal, where the data have no goals (OGBench): by
            default the first ones, such as x and y in mazes
        :raises ValueError: if there is no such data set, or it does not fit the env
        """
        assert self.replay_buffer is not None
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs:
            raise ValueError("The statistics of `VecNormalize` know nothing of a data set: use `normalize_observations=True`")
        if isinstance(dataset, ContrastiveReplayBuffer) or str(dataset).endswith(".pkl"):
            episodes = list(read_replay_buffer(dataset, self).episodes())
        else:
            episodes = list(read_episodes(dataset, self.observation_space, self.action_space, goal_indices))  # type: ignore[arg-type]
        self.replay_buffer.add_episodes(episodes)
        if self.actor.normalizer is not None:
            self._learn_statistics(self.actor.normalizer, episodes)

    def learn_offline(self: SelfOfflineLearning, n_updates: int, log_interval: int = 1000) -> SelfOfflineLearning:
        """
        Learn from the replay buffer alone, without a step in the env. Interrupted, it can be called again for the rest.
        A ``learn()`` that follows begins with the policy as it is, without random actions, and without behavior cloning.
        Schedules of learning rates run from the first of these updates to the last one.

        :param n_updates: Number of updates
        :param log_interval: Number of updates after which the logger is dumped, as it is at the end
        :return: self
        :raises ValueError: if the replay buffer is empty
        """
        assert self.replay_buffer is not None
        check_positive_int(n_updates, "n_updates")
        check_positive_int(log_interval, "log_interval")
        if self._ranks.size > 1:
            raise ValueError("`learn_offline` runs in a single process: call it without torchrun, and `learn` with it")
        if self.replay_buffer.n_used == 0:
            raise ValueError("There is nothing to learn from: fill the replay buffer by `load_dataset`")
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, "DeepCRL_offline")
        self._setup_acceleration(n_updates)
        self.learning_starts, self._bc_coef = 0, self.bc_coef
        try:
            for done in range(0, n_updates, UPDATES_AT_ONCE):
                n_next = min(UPDATES_AT_ONCE, n_updates - done)
                self._update_current_progress_remaining(done, n_updates)
                self.train(n_next, self.batch_size)
                if (done + n_next) // log_interval > done // log_interval or done + n_next == n_updates:
                    self.logger.dump(self._n_updates)
        finally:
            self._bc_coef = 0.0
        return self
