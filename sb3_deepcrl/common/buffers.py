import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import ArrayLike
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer, psutil
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_deepcrl.common.datasets import Episode, open_minari, read_episodes
from sb3_deepcrl.common.tensor_env import TensorObs, TensorStep, to_arrays
from sb3_deepcrl.common.utils import check_choice, check_class, check_number, delayed_signals

if TYPE_CHECKING:
    from minari import MinariDataset

# Keyword arguments that only HerReplayBuffer knows
HER_KWARGS = ("n_sampled_goal", "goal_selection_strategy", "copy_info_dict")
# ``remaining`` of a transition whose episode is still running
RUNNING = -1
# What a slot holds of the transition that starts there
TRANSITION_ARRAYS = ("actions", "rewards", "dones", "timeouts")
# Draws after which the transitions are looked up, because hardly any slot holds one
MAX_DRAWS = 20
FIND_NAN = (
    "Check the env (diverging physics?) and the policy (diverging training?), for instance with "
    "`stable_baselines3.common.vec_env.VecCheckNan`"
)
EMPTY = "Cannot sample from an empty replay buffer: collect at least one transition first"


def check_finite(values: Mapping[str, ArrayLike], axis: str = "env", episode: int = 0) -> None:
    """
    Check that what came from the envs, arrays of shape ``(n_envs, ...)`` by name (or another first axis), are numbers that can
    be stored.
    """
    of_episode, fix = ("", FIND_NAN) if axis == "env" else (f" of episode {episode}", "Leave its episode out of the data set")
    for key, value in values.items():
        value = np.asarray(value.cpu() if isinstance(value, th.Tensor) else value)
        if value.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            is_number = np.isfinite(value.astype(np.float32, copy=False))
        if is_number.all():
            continue
        index = np.flatnonzero(~is_number.reshape(len(value), -1).all(axis=1))[0]
        raise ValueError(f"NaN or infinity in `{key}` of {axis} {index}{of_episode}: {value[index]}. It was not stored. {fix}")


def replace_her_replay_buffer(buffer_class: Any, buffer_kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """
    Put the contrastive replay buffer in the place of HerReplayBuffer, which existing code may ask for, with a warning.
    Other classes are refused, as their samples hold no goals that were reached later.
    """
    is_her = isinstance(buffer_class, type) and issubclass(buffer_class, HerReplayBuffer)
    unused = [f"`{name}`" for name in HER_KWARGS if name in buffer_kwargs]
    if is_her or unused:
        warnings.warn(
            "DeepCRL uses its ContrastiveReplayBuffer in place of HerReplayBuffer, whose batches hold real goals, which "
            "are no positives for the contrastive loss"
            + (f"; {', '.join(unused)} not used" if unused else "")
            + ". Leave `replay_buffer_class` and its arguments out to get rid of this warning"
        )
    if "gamma" in buffer_kwargs:
        raise ValueError("`replay_buffer_kwargs` has `gamma`, but the replay buffer takes that of the algorithm: set that one")
    buffer_class = ContrastiveReplayBuffer if is_her else buffer_class
    check_class(buffer_class, ContrastiveReplayBuffer, "replay_buffer_class", "leave it out")
    return buffer_class, {name: value for name, value in buffer_kwargs.items() if name not in HER_KWARGS}


def _in_order(name: str, shift: int = 0) -> Any:
    """A property that gives what the slots hold, so many steps later, in the order in which it was added."""
    return property(lambda buffer: buffer._read_in_order(name, shift))


class ContrastiveReplayBuffer(DictReplayBuffer):
    """
    Replay buffer for contrastive RL: samples transitions together with a goal that their own episode reached later.

    The goal of a transition at step ``t`` is the achieved goal of step ``t + k`` of the same episode, where ``k >= 1``
    follows the geometric law truncated at the end of the episode, ``P(k) ~ gamma^k``
    (sections 2 and 4 of the paper: the discounted future state distribution).

    Each env has its own ring of states. A state is stored once: it is the next observation of a transition and the
    observation of the following one. The last state of an episode has its own slot, from which no transition starts.
    Floating point observations are stored as float32, all others as they are.

    An episode that is still running can be sampled, with the states seen so far as its future. A transition that does
    not continue where the last one of its env ended starts a new episode (the desired goal may change within an
    episode), so that resetting an env behind the buffer's back does not mix two episodes (``DeepCRL`` sees it between two
    ``learn()``, but not if a callback steps or resets the env). One that is longer than the buffer is truncated there and goes
    on as a new one.

    ``observations``, ``next_observations``, ``actions``, ``rewards``, ``dones`` and ``timeouts`` are the newest ``size()``
    transitions of each env, oldest first, of shape ``(size(), n_envs, ...)``: read-only copies, which are made when they
    are asked for and kept until the next ``add``. ``pos`` is their number until old transitions are overwritten (``full``),
    and 0 from then on, as the oldest one is always the first.

    :param buffer_size: Max number of states in the buffer, over all envs
    :param observation_space: Observation space, with the keys ``achieved_goal`` and ``desired_goal``
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Not supported, states are never stored twice
    :param handle_timeout_termination: Whether ``dones`` of the samples are false where the episode ended by timeout
    :param gamma: Parameter of the geometric law, between 0 (the next state) and 1 (uniform over the future)
    :param on_device: Whether to keep states and actions on ``device`` too, so that minibatches are gathered there. What was
        added since the last sample is copied there at once. Same law, same file. ``"auto"`` does it on a GPU if it takes at
        most half of the memory that is free at the first sample.
    :raises ValueError: if an argument is out of its range
    """

    observations: dict[str, np.ndarray] = _in_order("observations")
    next_observations: dict[str, np.ndarray] = _in_order("observations", shift=1)
    actions: np.ndarray = _in_order("actions")
    rewards: np.ndarray = _in_order("rewards")
    dones: np.ndarray = _in_order("dones")
    timeouts: np.ndarray = _in_order("timeouts")

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        gamma: float = 0.99,
        on_device: bool | str = "auto",
    ):
        # Skip the parent, which would allocate observations and next observations
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError(
                "`optimize_memory_usage=True` is not supported by ContrastiveReplayBuffer, which already stores "
                "every state once: leave it at False"
            )
        self.optimize_memory_usage = False
        self.handle_timeout_termination = handle_timeout_termination
        self.gamma = check_number(gamma, "gamma", maximum=1.0)

        self.buffer_size = max(buffer_size // n_envs, 1)
        n_slots = self.n_slots
        assert isinstance(self.obs_shape, dict)
        dtypes = {key: np.dtype(space.dtype) for key, space in observation_space.items()}
        self._observations = {
            key: np.zeros((n_slots, n_envs, *shape), dtype=np.float32 if dtypes[key].kind == "f" else dtypes[key])
            for key, shape in self.obs_shape.items()
        }
        self._actions = np.zeros((n_slots, n_envs, self.action_dim), dtype=self._maybe_cast_dtype(action_space.dtype))
        self._rewards = np.zeros((n_slots, n_envs), dtype=np.float32)
        self._dones = np.zeros((n_slots, n_envs), dtype=bool)
        self._timeouts = np.zeros((n_slots, n_envs), dtype=bool)
        # Steps from a slot to the last state of its episode, RUNNING if it has not ended,
        # 0 where no transition starts (last states, the head, free slots)
        self.remaining = np.zeros((n_slots, n_envs), dtype=np.int32)
        # Slot of the newest state of each env
        self.head = np.zeros(n_envs, dtype=np.int64)
        # Number of transitions in the running episode of each env, 0 before its first one
        self.episode_steps = np.zeros(n_envs, dtype=np.int64)
        n_bytes = sum(values.nbytes for values in (*self._observations.values(), self._actions, self._rewards, self.remaining))
        # As SB3 does, without psutil nobody knows
        if psutil is not None and n_bytes > (available := psutil.virtual_memory().available):
            warnings.warn(
                f"The replay buffer takes {n_bytes / 1e9:.1f} GB when it is full, but only {available / 1e9:.1f} GB of memory "
                "are free: use a smaller `buffer_size`"
            )
        # Number of slots that were ever used, over the envs
        self.n_used = 0
        # Whether `add` has begun and not ended: it was interrupted
        self._adding = False
        self._env_indices = np.arange(n_envs)
        self.on_device = check_choice(on_device, (True, False, "auto"), "on_device")
        self._forget_copies()

    def _forget_copies(self) -> None:
        self._device_copy: dict[str, th.Tensor] = {}
        # Flat indices of the slots that were written since the copy was brought up to date
        self._written: list[np.ndarray] = []
        # What was read in order since the last change
        self._copies_in_order: dict[tuple[str, int], Any] = {}
        # Tensors that were added to the copy: what the host has still to know of each step, head and episode steps of the
        # rings after them, and whether states and actions are newer there than here
        self._unread: list[th.Tensor] = []
        self._device_rings: tuple[th.Tensor, th.Tensor] | None = None
        self._is_behind = False

    def __getstate__(self) -> dict[str, Any]:
        self._fetch()
        state = dict(self.__dict__)
        # The file is the same for all devices
        for name in ("_device_copy", "_written", "_copies_in_order", "_unread", "_device_rings", "_is_behind"):
            del state[name]
        # Slots that were never used need no room in it
        state["observations"] = {key: values[: self.n_used] for key, values in state.pop("_observations").items()}
        state.update({name: state.pop(f"_{name}")[: self.n_used] for name in TRANSITION_ARRAYS})
        state["remaining"] = self.remaining[: self.n_used]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        observations = state.pop("observations")
        slots = {f"_{name}": state.pop(name) for name in TRANSITION_ARRAYS}
        self.__dict__.update(state)
        self._observations = {key: self._with_all_slots(values) for key, values in observations.items()}
        for name, values in {**slots, "remaining": self.remaining}.items():
            setattr(self, name, self._with_all_slots(values))
        self._forget_copies()
        self._count()

    def _with_all_slots(self, values: np.ndarray) -> np.ndarray:
        """Values of the slots that were used, followed by zeros for all others."""
        if len(values) == self.n_slots:
            return values
        padded = np.zeros((self.n_slots, *values.shape[1:]), dtype=values.dtype)
        padded[: len(values)] = values
        return padded

    @property
    def n_slots(self) -> int:
        """Number of slots of each env: two more, for the last state of an episode and for the first one of the next."""
        return self.buffer_size + 2

    @property
    def transition_bytes(self) -> int:
        """Bytes of the observations of a transition."""
        return sum(values[0, 0].nbytes for values in self._observations.values())

    def warn_of_copies(self, batch_size: int) -> bool:
        """Warn if rows of a minibatch must be the same transition. Gives whether it was necessary."""
        n_transitions = (self.buffer_size if self.full else self.pos) * self.n_envs
        if n_transitions < batch_size:
            # Some envs may have more
            n_transitions = int(np.count_nonzero(self.remaining))
        if n_transitions < batch_size:
            warnings.warn(
                f"`batch_size={batch_size}` is more than the {n_transitions} transitions in the replay buffer: negatives of "
                "the contrastive loss are copies of its positives. Use a larger `learning_starts` or `buffer_size`, or a "
                "smaller `batch_size`"
            )
        return n_transitions < batch_size

    def size(self) -> int:
        """Number of transitions of each env that can be sampled, the smallest one of the envs."""
        self.read_added()
        return int(np.count_nonzero(self.remaining, axis=0).min()) if self.full else self.pos

    def _count(self) -> None:
        """Set ``pos`` and ``full`` to what is stored. The oldest transition is always the first one."""
        self.full = self.n_used == self.n_slots
        self.pos = 0 if self.full else int(np.count_nonzero(self.remaining, axis=0).min())

    def _read_in_order(self, name: str, shift: int) -> Any:
        """That of the newest ``size()`` transitions of each env, oldest first, read-only as nobody would store a change."""
        self._fetch()
        if (name, shift) not in self._copies_in_order:
            size = self.size()
            indices = np.empty((size, self.n_envs), dtype=np.int64)
            for env_idx in self._env_indices:
                slots = np.flatnonzero(self.remaining[:, env_idx])
                # The oldest ones are behind the head
                slots = np.roll(slots, -np.searchsorted(slots, self.head[env_idx]))
                indices[:, env_idx] = slots[len(slots) - size :] * self.n_envs + env_idx
            stored = getattr(self, f"_{name}")
            arrays = stored if isinstance(stored, dict) else {name: stored}
            copies = {key: self._take(values, self._shift(indices, shift)) for key, values in arrays.items()}
            for values in copies.values():
                values.flags.writeable = False
            self._copies_in_order[name, shift] = copies if stored is arrays else copies[name]
        return self._copies_in_order[name, shift]

    def reset(self) -> None:
        """Forget all transitions."""
        super().reset()
        self.n_used = 0
        for values in (self.remaining, self.head, self.episode_steps):
            values[:] = 0
        self._forget_copies()

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Add one transition of every env.

        :param obs: Observations, arrays of shape ``(n_envs, ...)``
        :param next_obs: What they led to; for an env that is done, the last observation of its episode
        :param action: Actions in [-1, 1], shape ``(n_envs, action_dim)``
        :param reward: Rewards of shape ``(n_envs,)``
        :param done: Whether the episode ended, by termination or truncation, shape ``(n_envs,)``
        :param infos: Info dicts, one for each env
        :raises ValueError: if a value is NaN or infinite, except in the rewards, which are not needed; nothing is stored then
        """
        envs = self._env_indices
        obs = {key: np.asarray(obs[key]).reshape(self.n_envs, *shape) for key, shape in self.obs_shape.items()}  # type: ignore[attr-defined]
        next_obs = {key: np.asarray(next_obs[key]).reshape(self.n_envs, *shape) for key, shape in self.obs_shape.items()}  # type: ignore[attr-defined]
        done = np.asarray(done, dtype=bool)
        check_finite(obs)
        check_finite({**next_obs, "action": action})
        self._fetch()
        self._device_rings = None

        jumped = np.zeros(self.n_envs, dtype=bool)
        for key, value in obs.items():
            if key != "desired_goal":
                stored = self._observations[key][self.head, envs]
                jumped |= (stored != value.astype(stored.dtype)).reshape(self.n_envs, -1).any(axis=1)
        self._adding = True
        self._copies_in_order = {}
        # An episode that is longer than the buffer would overwrite itself
        too_long = self.episode_steps >= self.buffer_size
        self._end_episodes(np.flatnonzero((jumped & (self.episode_steps > 0)) | too_long), truncated=True)

        next_slots = (self.head + 1) % self.n_slots
        for slots, values in ((self.head, obs), (next_slots, next_obs)):
            if self._device_copy:
                self._written.append(slots * self.n_envs + envs)
            for key, value in values.items():
                self._observations[key][slots, envs] = value
        self._actions[self.head, envs] = np.asarray(action).reshape(self.n_envs, self.action_dim)
        self._end_step(reward, done, [info.get("TimeLimit.truncated", False) for info in infos])

    def _end_step(self, reward: np.ndarray, done: np.ndarray, timeout: Any) -> None:
        """Let a transition start at the heads, and move these to where it ends."""
        slots, envs = self.head, self._env_indices
        self._rewards[slots, envs] = reward
        self._dones[slots, envs] = done
        self._timeouts[slots, envs] = timeout if self.handle_timeout_termination else False
        self.remaining[slots, envs] = RUNNING
        self.episode_steps += 1
        self._advance(envs)
        self._end_episodes(np.flatnonzero(done))
        self._adding = False
        self.full = self.n_used == self.n_slots
        self.pos = 0 if self.full else self.pos + 1

    def add_tensors(self, obs: TensorObs, action: th.Tensor, step: TensorStep) -> None:
        """
        Add one transition of every env that hands out tensors. With ``on_device`` nothing waits for the device: what the host
        has to know of the transition is read by ``read_added``, at the latest when the buffer is sampled.

        :param obs: Observations of shape ``(n_envs, ...)`` by key
        :param action: Actions in [-1, 1], shape ``(n_envs, action_dim)``
        :param step: What they led to
        :raises ValueError: as ``add`` does; with ``on_device`` it is ``read_added`` that raises it
        """
        done, timeout = step.terminated | step.truncated, step.truncated & ~step.terminated
        if not self._is_on_device():
            check_finite(step.observation)
            infos = [{"TimeLimit.truncated": value} for value in timeout.tolist()]
            other = to_arrays({"action": action, "reward": step.reward, "done": done})
            self.add(to_arrays(obs), to_arrays(step.terminal_observation), **other, infos=infos)
            return
        storage, envs = self._update_device_copy(), th.arange(self.n_envs, device=self.device)
        if self._device_rings is None:
            head, n_steps = (th.tensor(values, device=self.device) for values in (self.head, self.episode_steps))
        else:
            head, n_steps = self._device_rings
        self._adding = self._is_behind = True
        self._copies_in_order = {}
        jumped, finite = th.zeros_like(done), []
        for key in self._observations:
            for new in (step.terminal_observation[key], step.observation[key]):
                finite.append(th.isfinite(new.to(th.float32)).flatten(1).all(dim=1))
            if key != "desired_goal":
                stored = storage[key][head * self.n_envs + envs]
                jumped |= (stored != obs[key].reshape(stored.shape).to(stored.dtype)).flatten(1).any(dim=1)
        finite.append(th.isfinite(action).all(dim=1))
        # Nothing is stored from the first step on that is not finite
        is_sound = th.stack(finite).all()
        if self._unread:
            is_sound &= self._unread[-1][0].all()
        broken = (jumped & (n_steps > 0)) | (n_steps >= self.buffer_size)
        first = (head + broken) % self.n_slots
        second = (first + 1) % self.n_slots
        for slots, values in ((first, {**obs, "action": action}), (second, step.terminal_observation)):
            rows = slots * self.n_envs + envs
            for key, stored in storage.items():
                if key in values:
                    value = values[key].reshape(-1, *stored.shape[1:]).to(stored.dtype)
                    stored[rows] = th.where(is_sound, value, stored[rows])
        record = (is_sound.expand(self.n_envs), broken, done, timeout, step.reward, *finite)
        self._unread.append(th.stack([row.to(th.float32) for row in record]))
        n_steps = th.where(broken, 1, n_steps + 1) * ~done
        self._device_rings = th.where(is_sound, (second + done) % self.n_slots, head), n_steps
        self._adding = False

    def read_added(self) -> None:
        """Read on the host what it has to know of the transitions that ``add_tensors`` stored on the device."""
        if not self._unread:
            return
        records = th.stack(self._unread).numpy(force=True)
        names = [key for key in self._observations for _ in range(2)] + ["action"]
        with delayed_signals():
            # Whether the next one was interrupted is still to be known
            was_adding, self._unread = self._adding, []
            for is_sound, broken, done, timeout, reward, *finite in records:
                if not is_sound.all():
                    for name, values in zip(names, finite, strict=True):
                        check_finite({name: np.where(values, 0, np.nan)})
                self._end_episodes(np.flatnonzero(broken), truncated=True)
                self._end_step(reward, done, timeout)
            self._adding = was_adding

    def _fetch(self) -> None:
        """Bring the host up to date with what was added on the device."""
        self.read_added()
        if self._is_behind:
            for key, values in {**self._observations, "action": self._actions}.items():
                values[:] = self._device_copy[key].numpy(force=True).reshape(values.shape)
            self._is_behind = False

    def _advance(self, envs: np.ndarray) -> None:
        """Move the head of some envs to the next slot, from which no transition starts yet."""
        self.head[envs] = (self.head[envs] + 1) % self.n_slots
        self.remaining[self.head[envs], envs] = 0
        self.n_used = max(self.n_used, int(self.head.max()) + 1)

    def _end_episodes(self, envs: np.ndarray, truncated: bool = False) -> None:
        """Let the newest state of some envs be the last one of its episode, which goes on in the env if it is truncated."""
        for env_idx in envs:
            n_steps = self.episode_steps[env_idx]
            steps_to_end = np.arange(1, n_steps + 1)
            slots = (self.head[env_idx] - steps_to_end) % self.n_slots
            self.remaining[slots, env_idx] = steps_to_end
            if truncated:
                # Not an actual timeout, but what the last state is worth does not change by us looking away
                self._dones[slots[0], env_idx] = True
                self._timeouts[slots[0], env_idx] = self.handle_timeout_termination
        self.episode_steps[envs] = 0
        if len(envs) > 0:
            self._advance(envs)

    def add_episodes(self, episodes: Iterable[Episode]) -> None:
        """
        Add whole episodes, each to the env that got the fewest transitions so far. One that is longer than the buffer is
        divided. Running episodes are truncated.

        :param episodes: The episodes
        :raises ValueError: if a value is NaN or infinite; its episode and those that follow are not stored then
        """
        self.truncate_last_trajectory()
        self._fetch()
        added = np.zeros(self.n_envs, dtype=np.int64)
        try:
            for index, episode in enumerate(episodes):
                check_finite({**episode.observations, "action": episode.actions}, "step", index)
                self._add_episode(episode, added)
        finally:
            self._copies_in_order = {}
            self._count()

    def _add_episode(self, episode: Episode, added: np.ndarray) -> None:
        """Add an episode to the env with the fewest transitions of those that were added, whose numbers go on."""
        for start in range(0, len(episode.actions), self.buffer_size):
            env_idx = int(added.argmin())
            steps = slice(start, start + self.buffer_size)
            actions = episode.actions[steps]
            n_steps = len(actions)
            slots = (self.head[env_idx] + np.arange(n_steps + 1)) % self.n_slots
            if self._device_copy:
                self._written.append(slots * self.n_envs + env_idx)
            for key, values in self._observations.items():
                values[slots, env_idx] = episode.observations[key][start : start + n_steps + 1]
            self._actions[slots[:-1], env_idx] = actions
            self._rewards[slots[:-1], env_idx] = episode.rewards[steps]
            self._dones[slots[:-1], env_idx] = self._timeouts[slots[:-1], env_idx] = False
            self.remaining[slots[-1], env_idx] = 0
            self.head[env_idx], self.episode_steps[env_idx] = slots[-1], n_steps
            self.n_used = max(self.n_used, int(slots.max()) + 1)
            is_end = start + n_steps == len(episode.actions)
            self._end_episodes(np.array([env_idx]), truncated=not (is_end and episode.terminated))
            self._dones[slots[-2], env_idx] = True
            added[env_idx] += n_steps

    def episodes(self) -> Iterator[Episode]:
        """The episodes that it holds, and the parts that are left of them, those of one env after the other."""
        self._fetch()
        remaining = self.remaining.copy()
        slots, envs = np.nonzero(remaining == RUNNING)
        remaining[slots, envs] = (self.head[envs] - slots) % self.n_slots
        for env_idx in self._env_indices:
            column = remaining[:, env_idx]
            # Where a transition starts and the slot before, around the ring, does not lead to it
            for start in np.flatnonzero((column > 0) & (np.roll(column, 1) != column + 1)):
                states = (start + np.arange(column[start] + 1)) % self.n_slots
                steps = states[:-1]
                yield Episode(
                    {key: values[states, env_idx] for key, values in self._observations.items()},
                    self._actions[steps, env_idx],
                    self._rewards[steps, env_idx],
                    bool(self._dones[steps[-1], env_idx] and not self._timeouts[steps[-1], env_idx]),
                )

    @classmethod
    def from_minari(
        cls, dataset: "str | Path | MinariDataset", device: th.device | str = "auto", **kwargs: Any
    ) -> "ContrastiveReplayBuffer":
        """
        Make a buffer, of one env, that holds a data set of Minari.

        :param dataset: Its id, its folder, or the data set itself
        :param device: PyTorch device of the samples
        :param kwargs: Other arguments of the buffer
        :return: The buffer
        :raises ValueError: if there is no such data set, or one without goals
        """
        found = open_minari(dataset)
        observation_space, action_space = found.observation_space, found.action_space
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"The observations of {found.spec.dataset_id} are no Dict with goals, but {observation_space}")
        # A state more than transitions in each episode
        kwargs = {"buffer_size": int(found.total_steps + found.total_episodes), **kwargs}
        buffer = cls(observation_space=observation_space, action_space=action_space, device=device, **kwargs)
        buffer.add_episodes(read_episodes(found, observation_space, action_space))
        return buffer

    def truncate_last_trajectory(self) -> None:
        """
        End the running episodes: what is added next belongs to new ones. If the last ``add`` was interrupted,
        the running episodes are dropped, because nobody knows how much of it was done.
        """
        self.read_added()
        self._device_rings = None
        if self._adding:
            self.remaining[self.remaining == RUNNING] = 0
            self.episode_steps[:] = 0
            # The newest state may be the last one of an episode that just ended
            self._advance(self._env_indices)
            self._adding = False
        self._end_episodes(np.flatnonzero(self.episode_steps > 0), truncated=True)
        self._copies_in_order = {}
        self._count()

    def _sample_indices(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Draw transitions uniformly, and for each a state that its episode reached later, as flat indices
        (``slot * n_envs + env``), each of shape ``(batch_size,)``.
        """
        self.read_added()
        if self.n_used == 0:
            raise ValueError(EMPTY)
        check_number(self.gamma, "gamma", maximum=1.0)
        remaining = self.remaining.reshape(-1)
        indices = np.random.randint(self.n_used * self.n_envs, size=batch_size)
        n_draws = 1
        # Few slots hold no transition (about one an episode): draw again where one was hit
        while len(rejected := np.flatnonzero(remaining[indices] == 0)) > 0:
            if n_draws < MAX_DRAWS:
                indices[rejected] = np.random.randint(self.n_used * self.n_envs, size=len(rejected))
            elif len(stored := np.flatnonzero(remaining)) > 0:
                indices[rejected] = np.random.choice(stored, size=len(rejected))
            else:
                raise ValueError(EMPTY)
            n_draws += 1

        horizon = remaining[indices].astype(np.int64)
        running = np.flatnonzero(horizon == RUNNING)
        slots, envs = np.divmod(indices[running], self.n_envs)
        horizon[running] = (self.head[envs] - slots) % self.n_slots
        return indices, self._shift(indices, self._sample_steps(horizon))

    def _shift(self, indices: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
        """Flat indices of the states so many steps later, around the ring."""
        return (indices + steps * self.n_envs) % self.remaining.size

    @staticmethod
    def _take(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
        # Several times as fast as indexing with slots and envs
        return values.reshape(-1, *values.shape[2:]).take(indices, axis=0)

    def _is_on_device(self) -> bool:
        if self.on_device == "auto":
            n_bytes = sum(values.nbytes for values in (*self._observations.values(), self._actions))
            self.on_device = self.device.type == "cuda" and n_bytes <= th.cuda.mem_get_info(self.device)[0] / 2
        return bool(self.on_device)

    def _update_device_copy(self) -> dict[str, th.Tensor]:
        """States and actions on the device, as flat storage."""
        storage = {**self._observations, "action": self._actions}
        copy = self._device_copy
        if not copy or copy["action"].device != th.empty(0, device=self.device).device:
            self._fetch()
            self._device_copy = {key: th.tensor(values, device=self.device).flatten(0, 1) for key, values in storage.items()}
        elif self._written:
            slots = np.unique(np.concatenate(self._written))
            on_device = self._move(slots)
            for key, values in storage.items():
                copy[key][on_device] = self._move(self._take(values, slots))
        self._written = []
        return self._device_copy

    def _move(self, values: np.ndarray) -> th.Tensor:
        """Values on the device, for which nobody waits: a GPU reads pinned memory while the host goes on."""
        tensor = th.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def _sample_steps(self, horizon: np.ndarray) -> np.ndarray:
        """
        Draw the number of steps to the goal, of which there are 1 to ``horizon``: invert the distribution function of the
        truncated geometric law, ``F(k) = (1 - gamma^k) / (1 - gamma^horizon)``.
        """
        uniform = np.random.random(len(horizon))
        if self.gamma == 0.0:
            return np.ones_like(horizon)
        if self.gamma == 1.0:
            steps = uniform * horizon
        else:
            log_gamma = np.log(self.gamma)
            steps = np.log1p(uniform * np.expm1(horizon * log_gamma)) / log_gamma
        # Rounding may give the horizon itself
        return np.minimum(steps.astype(np.int64), horizon - 1) + 1

    def _gather(
        self, indices: np.ndarray, goal_indices: np.ndarray, env: VecNormalize | None
    ) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """Observations with the achieved goals of other states as desired ones, and actions."""
        if self._is_on_device():
            copy = self._update_device_copy()
            rows, goal_rows = self._move(indices), self._move(goal_indices)
            on_device = {key: copy[key][rows] for key in self._observations if key != "desired_goal"}
            on_device["desired_goal"] = copy["achieved_goal"][goal_rows]
            return self._normalize_on_device(on_device, env), copy["action"][rows]
        self._fetch()
        obs = {key: self._take(values, indices) for key, values in self._observations.items() if key != "desired_goal"}
        obs["desired_goal"] = self._take(self._observations["achieved_goal"], goal_indices)
        normalized = self._normalize_obs(obs, env)
        assert isinstance(normalized, dict)
        observations = {key: self._move(value) for key, value in normalized.items()}
        return observations, self._move(self._take(self._actions, indices))

    def _normalize_on_device(self, obs: dict[str, th.Tensor], env: VecNormalize | None) -> dict[str, th.Tensor]:
        """What ``VecNormalize.normalize_obs`` does, without moving the observations."""
        if env is None or not env.norm_obs:
            return obs
        normalized = dict(obs)
        for key in env.norm_obs_keys or ():
            statistics = env.obs_rms[key]  # type: ignore[index]
            moments = (statistics.mean, np.sqrt(statistics.var + env.epsilon))
            mean, std = (th.as_tensor(value, dtype=th.float32, device=self.device) for value in moments)
            normalized[key] = ((obs[key] - mean) / std).clamp(-env.clip_obs, env.clip_obs)
        return normalized

    def sample_contrastive(self, batch_size: int, env: VecNormalize | None = None) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """
        Sample what the contrastive losses need, in random order.

        :param batch_size: Number of transitions
        :param env: Associated ``VecNormalize`` to normalize the observations, if any
        :return: Observations of shape ``(batch_size, ...)`` by key, where ``desired_goal`` is the goal that the
            episode reached later, and actions of shape ``(batch_size, action_dim)``
        :raises ValueError: if the buffer is empty
        """
        return self._gather(*self._sample_indices(batch_size), env)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> DictReplayBufferSamples:  # type: ignore[override]
        """
        Sample whole transitions. Rewards and dones are those of the env: they are not computed again for the new goal.

        :param batch_size: Number of transitions
        :param env: Associated ``VecNormalize`` to normalize observations and rewards, if any
        :return: Transitions whose ``desired_goal`` is a goal that the episode reached later
        :raises ValueError: if the buffer is empty
        """
        indices, goal_indices = self._sample_indices(batch_size)
        dones = self._take(self._dones, indices) & ~self._take(self._timeouts, indices)
        rewards = self._normalize_reward(self._take(self._rewards, indices).reshape(-1, 1), env)
        observations, actions = self._gather(indices, goal_indices, env)
        return DictReplayBufferSamples(
            observations=observations,
            actions=actions,
            next_observations=self._gather(self._shift(indices, 1), goal_indices, env)[0],
            dones=self.to_torch(dones.astype(np.float32).reshape(-1, 1), copy=False),
            rewards=self.to_torch(rewards, copy=False),
        )


def arrange_envs(buffers: Sequence[ContrastiveReplayBuffer], envs: Sequence[int]) -> ContrastiveReplayBuffer:
    """
    Make a replay buffer of envs of others.

    :param buffers: Replay buffers with as many slots for each env
    :param envs: Which of all their envs, counted through; -1 for one without transitions
    :return: The replay buffer
    """
    states = [buffer.__getstate__() for buffer in buffers]
    n_used = max(state["n_used"] for state in states)
    is_new = np.array(envs) < 0

    def arrange(arrays: list[np.ndarray]) -> np.ndarray:
        padded = [np.pad(values, [(0, n_used - len(values))] + [(0, 0)] * (values.ndim - 1)) for values in arrays]
        arranged = np.concatenate(padded, axis=1).take(envs, axis=1)
        arranged[:, is_new] = 0
        return arranged

    state = {**states[0], "n_used": n_used, "n_envs": len(envs), "_env_indices": np.arange(len(envs))}
    state["_adding"] = any(each["_adding"] for each in states)
    state["observations"] = {key: arrange([each["observations"][key] for each in states]) for key in state["observations"]}
    for name in (*TRANSITION_ARRAYS, "remaining"):
        state[name] = arrange([each[name] for each in states])
    for name in ("head", "episode_steps"):
        state[name] = np.where(is_new, 0, np.concatenate([each[name] for each in states]).take(envs))
    arranged = ContrastiveReplayBuffer.__new__(type(buffers[0]))
    arranged.__setstate__(state)
    return arranged
