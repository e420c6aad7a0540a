"""
One training on several processes, GPUs or machines: the ranks of ``torch.distributed``, which ``torchrun`` starts.

Each rank has envs, random numbers, a replay buffer and rows of each minibatch of its own. Representations are gathered, so
that the goals of all ranks are candidates for all, and each rank computes the whole contrastive loss, which costs nothing
beside the networks. What flows back into the representations of a rank is then complete, and the gradients of the parameters
are averaged. Rank 0 leads: it alone has callbacks, logs and files.
"""

import atexit
import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from traceback import format_exception
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer, arrange_envs
from sb3_deepcrl.common.running_norm import RunningNorm
from sb3_deepcrl.common.utils import handled, is_for_user, update_schedule

# How long a rank waits for another one, which may evaluate or save
TIMEOUT = timedelta(minutes=30)
# How long a rank that ends waits for the others to end too
SECONDS_TO_LEAVE = 5.0
# What ``env://`` of torch.distributed needs
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a rank asks for when all meet. The largest number is what happens.
GO, STOP, SAVE, INTERRUPT, FAIL = range(5)
# Where ranks leave word, if this module has connected them
_store: dist.Store | None = None
# What is the same on all ranks, besides parameters
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_missing_steps")


class RankLostError(RuntimeError):
    """Another rank has ended or does not answer."""


@contextlib.contextmanager
def _all_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            "another rank of this training was killed, failed or cannot be reached, so that this one ends too: the last "
            "checkpoint continues (`--save-freq` and `--resume`)"
        ) from error


def connect() -> tuple[int, int]:
    """
    Connect with the other ranks, if this process was started as one of several and nobody has connected yet: by gloo, and
    between GPUs by NCCL.

    :return: Number of this rank, and number of ranks
    """
    global _store
    is_rank = all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1
    if is_rank and dist.is_available() and not dist.is_initialized():
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), th.cuda.device_count()
        if n_gpus > 0:
            th.cuda.set_device(local_rank % n_gpus)
        # NCCL wants a GPU for each rank
        has_nccl = dist.is_nccl_available() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= n_gpus
        with _all_ranks():
            _store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT, store=_store, rank=rank, world_size=size)
        atexit.register(_disconnect)
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _disconnect() -> None:
    """End the connection when all ranks are done with it: one that leaves earlier would be missed by the others."""
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    with contextlib.suppress(RuntimeError):
        n_left = 0 if _store is None else _store.add("left", 1)
        while _store is not None and n_left < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            n_left = _store.add("left", 0)
    dist.destroy_process_group()


def comes_first(where: str) -> bool:
    """Whether no other rank has come there yet, so that what all would say is said once."""
    try:
        return _store is None or _store.add(where, 1) == 1
    except RuntimeError:
        # It was kept by a process that is gone
        return True


class _Gather(th.autograd.Function):
    """Rows of all ranks. Each has the same loss of them, so that the gradient of its own ones is already that of all."""

    @staticmethod
    def forward(ctx: Any, ranks: "Ranks", x: th.Tensor) -> th.Tensor:
        ctx.ranks = ranks
        # Parts may differ in size, which a sum does not mind
        gathered = x.new_zeros(ranks.batch_size, *x.shape[1:])
        gathered[ranks.rows] = x
        with ranks._reach():
            dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> Any:
        # The weight of the rank comes with its loss, as for losses of its own rows
        return None, gradient[ctx.ranks.rows] / ctx.ranks.weight


class Ranks:
    """
    The ranks that train a model together; all that is done here costs nothing if there is only one.
    """

    def __init__(self) -> None:
        self.rank, self.size = connect()
        #: Number of envs of each rank
        self.env_counts: list[int] = []
        #: Rows of this rank in a minibatch, number of rows of all, and the fraction that is ours
        self.rows, self.batch_size, self.weight = slice(None), 0, 1.0
        # The model in training, whether it goes on, so that the ranks meet again, and whether they are within updates
        self._model: Any = None
        self._meets = self._updates = False
        #: Whether all ranks are there, and have come to the end of the training together
        self.is_whole = True
        # Signals that have come and wait for all ranks, and whether they need not wait
        self._signals: list[int] = []
        self._is_interruptible = False

    @contextlib.contextmanager
    def _reach(self) -> Iterator[None]:
        try:
            with _all_ranks():
                yield
        except RankLostError:
            self.is_whole = self._meets = False
            raise

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has."""
        if self.size == 1:
            return value
        values = [value]
        with self._reach():
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """What each rank has."""
        values = [value] * self.size
        if self.size > 1:
            with self._reach():
                dist.all_gather_object(values, value)
        return values

    def seed(self, model: BaseAlgorithm) -> None:
        """Give all ranks but the first random numbers and envs of their own, also where the seed is the user's."""
        if self.rank > 0:
            seed = th.initial_seed() if model.seed is None else model.seed
            model.set_random_seed(int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0]) >> 1)

    def n_envs(self, n_envs: int) -> int:
        """Number of envs of all ranks, of which this one has so many."""
        return n_envs if self.size == 1 else sum(self.env_counts)

    def share(self, n_envs: int) -> range:
        """Which envs of a training are ours, as evenly as it goes."""
        if n_envs < self.size:
            raise ValueError(f"`n_envs={n_envs}` cannot be split over {self.size} ranks: use at least {self.size} envs")
        return range(n_envs * self.rank // self.size, n_envs * (self.rank + 1) // self.size)

    def part(self, total: int) -> slice:
        """What is ours of a whole that is divided as the envs are."""
        bounds = self._bounds(total)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def _bounds(self, total: int) -> list[int]:
        return [total * sum(self.env_counts[:rank]) // sum(self.env_counts) for rank in range(self.size + 1)]

    def split(self, batch_size: int) -> int:
        """Split minibatches over the ranks. Gives the number of our rows."""
        if self.size == 1:
            return batch_size
        if 0 in np.diff(self._bounds(batch_size)):
            raise ValueError(f"`batch_size={batch_size}` leaves no row for one of {self.size} ranks: use a larger one")
        self.batch_size, self.rows = batch_size, self.part(batch_size)
        n_rows = self.rows.stop - self.rows.start
        self.weight = n_rows / batch_size
        return n_rows

    def gather(self, x: th.Tensor) -> th.Tensor:
        """Rows of all ranks, with gradients, shape ``(batch_size, ...)``."""
        return x if self.size == 1 else _Gather.apply(self, x)

    def update_statistics(self, normalizer: RunningNorm | None) -> None:
        """Update the statistics of observations after a rollout. With several ranks it waits until they meet."""
        if self.size == 1 and normalizer is not None:
            normalizer.update()

    def begin_updates(self, model: Any) -> bool:
        """Meet before updates. Gives whether there will be any, as another rank may have stopped."""
        if self.size == 1:
            return True
        if self._model is None:
            self._equalize(model)
        elif self.meet_in_step() is None:
            return False
        self._updates = True
        if model.actor.normalizer is not None:
            model.actor.normalizer.update(self.collect)
        return True

    def start_sum(self, gradients: list[th.Tensor]) -> Callable[[], None]:
        """Start to add gradients over the ranks. What it returns waits until the sums are in their place."""
        total = gradients[0] if len(gradients) == 1 else th.cat([gradient.flatten() for gradient in gradients])
        with self._reach():
            work = dist.all_reduce(total, async_op=True)

        def finish() -> None:
            with self._reach():
                work.wait()
            if len(gradients) > 1:
                parts = total.split([gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

        return finish

    def mean(self, values: th.Tensor) -> th.Tensor:
        """Mean over the rows of all ranks, of which there are the means over ours. It ends the updates."""
        if self.size > 1:
            values = values * self.weight
            with self._reach():
                dist.all_reduce(values)
            self._updates = False
        return values

    def whole(self, rollout: RolloutReturn) -> RolloutReturn:
        """A rollout with the number of steps of all ranks."""
        if self.size == 1:
            return rollout
        own = self.env_counts[self.rank]
        return rollout._replace(episode_timesteps=rollout.episode_timesteps // own * self.n_envs(own))

    def gather_buffer(self, buffer: ContrastiveReplayBuffer) -> ContrastiveReplayBuffer | None:
        """One replay buffer with the envs of all ranks, on rank 0, and None on the others. They need not know of it before."""
        if self.size == 1:
            return buffer
        interruptible, self._is_interruptible = self._is_interruptible, False
        if self._meets and self.rank == 0:
            self.meet(SAVE)
        buffers = [buffer] * self.size
        with self._reach():
            dist.gather_object(buffer, buffers if self.rank == 0 else None)
        self._is_interruptible = interruptible
        return arrange_envs(buffers, range(sum(each.n_envs for each in buffers))) if self.rank == 0 else None

    def split_buffer(self, buffer: ContrastiveReplayBuffer, n_envs: int) -> ContrastiveReplayBuffer:
        """What is ours of a replay buffer of all ranks, for so many envs. What does not fit is left out, with a warning."""
        self.env_counts = self.collect(n_envs)
        total, found = sum(self.env_counts), buffer.n_envs
        if self.size == 1 and found == total:
            return buffer
        if found != total and self.rank == 0:
            rest = f"those of {found - total} are left out" if found > total else f"{total - found} begin with none"
            warnings.warn(f"The replay buffer holds transitions of {found} envs, but there are {total}: {rest}")
        own = self.part(min(found, total))
        envs = [*range(own.start, own.stop)]
        return arrange_envs([buffer], [*envs, *[-1] * (n_envs - len(envs))])

    @contextlib.contextmanager
    def training(self, model: Any, callback: MaybeCallback, progress_bar: bool) -> Iterator[tuple[MaybeCallback, bool]]:
        """
        Context in which all ranks train a model from the same state, until one of them stops. An error or a signal of
        one is that of all, and a signal waits until they meet, so that it finds none of them between the others.

        :param model: The model
        :param callback: Callbacks of the training
        :param progress_bar: Whether there is a progress bar
        :return: Context with both, as the model takes them
        """
        if self.size == 1:
            yield callback, progress_bar
            return
        self._signals.clear()
        self._equalize(model)
        buffer, n_transitions = model.replay_buffer, max(model.buffer_size // sum(self.env_counts), 1)
        if buffer.n_used == 0 and buffer.buffer_size != n_transitions:
            spaces = (model.observation_space, model.action_space, model.device, model.n_envs)
            model.replay_buffer = type(buffer)(n_transitions * model.n_envs, *spaces, **model.replay_buffer_kwargs)
        self._model, self._meets, self.is_whole = model, True, True
        try:
            with handled(self._on_signal):
                yield RankCallback(self, callback, progress_bar), False
                while self._meets:
                    self.meet(STOP)
        except BaseException as error:
            if self._updates:
                # The others are somewhere in there, and learn of it when this process ends
                self.is_whole = False
            elif self._meets:
                # With the others at the place where they meet
                self.meet(FAIL if isinstance(error, Exception) else INTERRUPT, error)
            raise
        finally:
            self._model, self._meets, self._updates = None, False, False
            if self._signals and self.is_whole:
                # Now for whoever handles it
                signal.raise_signal(self._signals[0])

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context in which the others wait, so that a signal need not."""
        self._is_interruptible = self.rank == 0
        try:
            yield
        finally:
            self._is_interruptible = False

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals.append(number)
        if self._is_interruptible:
            raise KeyboardInterrupt

    def meet_in_step(self, episodes: np.ndarray | None = None) -> np.ndarray | None:
        """Meet to go on. Gives what happened in the envs of all ranks, None if the training ends."""
        table = self.meet(episodes=episodes) if self._meets else None
        return table if self._meets else None

    def _equalize(self, model: Any) -> None:
        """Let all ranks begin alike."""
        self.env_counts = self.collect(model.n_envs)
        normalize = model._vec_normalize_env
        if normalize is not None and normalize.norm_obs and normalize.training:
            raise ValueError(
                "`VecNormalize` has other statistics on each rank: use `normalize_observations=True` of DeepCRL in its place"
            )
        total = self.n_envs(model.n_envs)
        if model.transitions_per_update is not None:
            vars(model).update(update_schedule(total, model.transitions_per_update))
        elif isinstance(model.train_freq, TrainFreq) and model.train_freq.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError("`train_freq` in episodes needs a single rank, as they end at different steps: count it in steps")
        if self.rank > 0:
            model.set_logger(Logger(folder=None, output_formats=[]))
        vars(model).update(self.broadcast({name: getattr(model, name) for name in COUNTERS}))
        tensors = [*model.policy.state_dict().values(), *([] if model.log_ent_coef is None else [model.log_ent_coef.detach()])]
        with self._reach():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def meet(self, wish: int = GO, error: BaseException | None = None, episodes: np.ndarray | None = None) -> np.ndarray:
        """
        Meet all other ranks in a training: do together what one of them wants.

        :param wish: What this rank wants
        :param error: Why it has to stop
        :param episodes: What happened in our envs, shape ``(n_envs, 5)``
        :return: What happened in the envs of all ranks
        :raises KeyboardInterrupt: If one was interrupted
        :raises RuntimeError: If one has failed
        """
        while True:
            table = np.zeros((self.size + sum(self.env_counts), 5))
            table[self.rank] = max(wish, INTERRUPT if self._signals else GO)
            if episodes is not None:
                table[self.size :][self.part(sum(self.env_counts))] = episodes
            with self._reach():
                dist.all_reduce(th.from_numpy(table))
            outcome = int(table[: self.size].max())
            self._meets = outcome in (GO, SAVE)
            if outcome == FAIL:
                # A bug with its traceback, which the other ranks do not have
                text = None if error is None else str(error) if is_for_user(error) else "".join(format_exception(error))
                errors = self.collect(text)
                if error is None:
                    rank, text = next((rank, text) for rank, text in enumerate(errors) if text is not None)
                    raise RuntimeError(f"rank {rank}: {text}")
            if outcome == INTERRUPT:
                raise KeyboardInterrupt
            if outcome != SAVE or wish == SAVE:
                return table[self.size :]
            with self._reach():
                # The answer to `gather_buffer` of rank 0
                dist.gather_object(self._model.replay_buffer, None)


def _describe(info: dict[str, Any], done: bool) -> tuple[float, ...]:
    """What statistics need of a step: whether it was the last one, success as two bits, and reward, length and time."""
    key = next((key for key in ("is_success", "success") if key in info), None)
    success = 0 if key is None else (1 + bool(info[key])) * (1 if key == "is_success" else -1)
    episode = info.get("episode", {})
    return (done, success, *(episode.get(name, 0.0) for name in "rlt"))


def _info(row: np.ndarray) -> dict[str, Any]:
    """What :func:`_describe` has kept of an info dict."""
    success, length = row[1], int(row[3])
    key = "is_success" if success > 0 else "success"
    info: dict[str, Any] = {} if success == 0 else {key: abs(success) == 2}
    return {**info, "episode": {"r": row[2], "l": length, "t": row[4]}} if length else info


class _ProgressBar(ProgressBarCallback):
    def _on_step(self) -> bool:
        self.pbar.update(len(self.locals["dones"]))
        return True


class RankCallback(CallbackList):
    """
    Callback at whose steps all ranks meet. Rank 0 alone has the other callbacks. They see the ``infos`` and ``dones`` of the
    envs of all ranks: of those of others, whether a goal was reached and, at the end of an episode, what ``Monitor`` tells.

    :param ranks: The ranks
    :param callback: Callbacks of the training
    :param progress_bar: Whether there is a progress bar
    """

    def __init__(self, ranks: Ranks, callback: MaybeCallback, progress_bar: bool):
        given: Sequence[Any] = callback if isinstance(callback, list) else [callback] if callback else []
        callbacks = [each if isinstance(each, BaseCallback) else ConvertCallback(each) for each in given]
        super().__init__([*callbacks, *[_ProgressBar()] * progress_bar] if ranks.rank == 0 else [])
        self.ranks = ranks

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        own = [_describe(info, done) for info, done in zip(infos, self.locals["dones"], strict=True)]
        table = self.ranks.meet_in_step(np.array(own, dtype=float))
        if table is None:
            return False
        self.num_timesteps = self.model.num_timesteps = self.model.num_timesteps + len(table) - len(own)
        # Those of rank 0 are the first
        others = [_info(row) for row in table[len(own) :]]
        if self.ranks.rank == 0:
            dones = table[:, 0] > 0
            self.model._update_info_buffer(others, dones[len(own) :])
            self.model._episode_num += int(dones[len(own) :].sum())  # type: ignore[attr-defined]
            self.update_locals({"infos": [*infos, *others], "dones": dones})
        with self.ranks.interruptible():
            return super()._on_step()


def n_envs_of_run(model: BaseAlgorithm) -> int:
    """Number of envs that a model is trained in, on all ranks."""
    ranks = vars(model).get("_ranks")
    return model.n_envs if ranks is None else ranks.n_envs(model.n_envs)
