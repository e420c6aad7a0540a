import itertools
import os
import signal
import socket

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.losses import CONTRASTIVE_LOSSES, ENERGIES
from tests.envs import GoalReachEnv

N_UPDATES = 50
# Not a multiple of the number of ranks
BATCH_SIZE = 14
# A multiple of the lanes of any vector
KERNEL = dict(compile=True, width=32)
LOSSES = [*itertools.product(ENERGIES, CONTRASTIVE_LOSSES)]


class NanEnv(GoalReachEnv):
    def step(self, action: np.ndarray):
        observation, *rest = super().step(action)
        return {**observation, "observation": observation["observation"] * np.nan}, *rest


def make_model(n_envs: int = 1, env_class: type = GoalReachEnv, **kwargs) -> DeepCRL:
    arguments = dict(depth=4, width=8, batch_size=BATCH_SIZE, learning_starts=20, seed=0, compile=False, device="cpu")
    return DeepCRL("MultiInputPolicy", DummyVecEnv([lambda: Monitor(env_class())] * n_envs), **{**arguments, **kwargs})


def parameters_after_updates(energy: str, contrastive_loss: str, dtype: th.dtype = th.float64, **kwargs) -> list[th.Tensor]:
    """What is learned from minibatches that all ranks know, where each has its rows of them: metrics and parameters."""
    policy_kwargs = dict(energy=energy, repr_dim=4)
    model = make_model(policy_kwargs=policy_kwargs, contrastive_loss=contrastive_loss, learning_rate=1e-2, **kwargs)
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.policy.to(dtype)
    model.log_ent_coef.data = model.log_ent_coef.data.to(dtype)
    generator = th.Generator().manual_seed(0)
    sizes = {"observation": 3, "achieved_goal": 2, "desired_goal": 2, "action": 2, "noise": 2}
    rows = {key: th.randn(N_UPDATES, BATCH_SIZE, size, generator=generator, dtype=dtype) for key, size in sizes.items()}
    rank, size = model._ranks.rank, model._ranks.size
    mine = {key: values[:, BATCH_SIZE * rank // size : BATCH_SIZE * (rank + 1) // size] for key, values in rows.items()}
    noise = iter(mine.pop("noise"))
    joined = {key: values.flatten(0, 1) for key, values in mine.items()}
    actions = joined.pop("action").tanh()
    model.replay_buffer.sample_contrastive = lambda batch_size, env: (joined, actions)
    model.replay_buffer.pos = BATCH_SIZE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th, "randn_like", lambda mean: next(noise))
        # Stable-Baselines3 casts observations to float32
        patch.setattr(th.Tensor, "float", lambda x: x.to(dtype))
        model.train(N_UPDATES, BATCH_SIZE)
    metrics = th.tensor([*model.logger.name_to_value.values()], dtype=th.float64)
    return [metrics, model.log_ent_coef.detach(), *model.policy.state_dict().values()]


class Counter(BaseCallback):
    """Counts steps and episodes, and stops at a number of steps."""

    def __init__(self, last: int = 10**9):
        super().__init__()
        self.last, self.steps, self.n_successes, self.n_episodes = last, [], 0, 0

    def _on_step(self) -> bool:
        self.steps.append(self.num_timesteps)
        self.n_episodes += sum(self.locals["dones"])
        self.n_successes += sum(info["is_success"] for info in self.locals["infos"])
        return self.num_timesteps < self.last


def learn(folder, rank: int) -> dict:
    """Trainings that end in all ways, on each rank."""
    found = {}
    model = make_model(2 + rank, gamma=0.9, buffer_size=500, normalize_observations=True)
    counter = Counter()
    checkpoints = CheckpointCallback(30, str(folder), save_replay_buffer=True)
    model.learn(330, callback=[counter, checkpoints], log_interval=None)
    model.save(folder / "model")
    model.save_replay_buffer(folder / "buffer")
    found["parameters"] = [*model.policy.state_dict().values(), model.log_ent_coef.detach()]
    found["observations"] = model.replay_buffer.observations["observation"]
    found["counts"] = (model.num_timesteps, model._n_updates, counter.steps[:2], counter.n_episodes, counter.n_successes)
    found["episodes"] = (model._episode_num, len(model.ep_info_buffer), len(model.ep_success_buffer))
    # One stops all
    model.learn(10_000, callback=Counter(50))
    found["stopped"] = model.num_timesteps
    for error, wrong in (("nan", NanEnv), ("interrupt", GoalReachEnv)):
        model = make_model(env_class=wrong if rank == 1 else GoalReachEnv)
        if error == "interrupt" and rank == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        try:
            model.learn(10**9)
        except (ValueError, RuntimeError, KeyboardInterrupt) as raised:
            found[error] = f"{type(raised).__name__}: {raised}"
    return found


def run_rank(rank: int, size: int, port: int, folder) -> None:
    th.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results = {"-".join(name): parameters_after_updates(*name) for name in losses_of(size)}
    results["kernel"] = parameters_after_updates("norm", "forward", th.float32, **KERNEL)
    if size == 2:
        results["learn"] = learn(folder, rank)
    th.save(results, folder / f"{rank}.pt")


def losses_of(size: int) -> list[tuple[str, str]]:
    """All for two ranks, and each once for more, whose time is that of the ways between them."""
    return LOSSES if size == 2 else LOSSES[:: len(CONTRASTIVE_LOSSES) + 1]


@pytest.fixture(scope="module")
def expected():
    results = {"-".join(name): parameters_after_updates(*name) for name in LOSSES}
    return {**results, "kernel": parameters_after_updates("norm", "forward", th.float32, **KERNEL)}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    th.multiprocessing.start_processes(run_rank, (request.param, port, folder), nprocs=request.param, start_method="fork")
    return [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)], folder


def test_updates_are_those_of_one_process(ranks, expected):
    for name in {*map("-".join, losses_of(len(ranks[0]))), "kernel"}:
        of_ranks = [found[name] for found in ranks[0]]
        for other in of_ranks[1:]:
            assert all(map(th.equal, of_ranks[0], other))
        tolerance = dict(rtol=1e-3, atol=1e-4) if name == "kernel" else dict(rtol=1e-9, atol=1e-12)
        for ours, one in zip(of_ranks[0], expected[name], strict=True):
            th.testing.assert_close(ours, one, **tolerance)


def test_learn(ranks):
    found, folder = [each.get("learn") for each in ranks[0]], ranks[1]
    if found[0] is None:
        pytest.skip("two ranks only")
    assert all(map(th.equal, found[0]["parameters"], found[1]["parameters"]))
    assert not np.array_equal(found[0]["observations"][:, 0], found[1]["observations"][:, 0])
    one = make_model(5).learn(330)
    assert found[0]["counts"][:4] == (330, one._n_updates, [5, 10], 30)
    assert found[1]["counts"] == (330, one._n_updates, [], 0, 0)
    assert found[0]["episodes"] == (30, 30, 30) and 0 < found[0]["counts"][4] < 330
    assert found[0]["stopped"] == 50
    assert all("NaN or infinity in `observation` of env 0" in each["nan"] for each in found)
    assert found[0]["nan"].startswith("RuntimeError: rank 1: ")
    assert all(each["interrupt"].startswith("KeyboardInterrupt") for each in found)
    # What one process goes on with
    model = DeepCRL.load(folder / "model", env=DummyVecEnv([GoalReachEnv] * 5))
    assert all(map(th.equal, found[0]["parameters"], [*model.policy.state_dict().values(), model.log_ent_coef]))
    model.load_replay_buffer(folder / "buffer")
    both = np.concatenate([each["observations"] for each in found], axis=1)
    np.testing.assert_array_equal(model.replay_buffer.observations["observation"], both)
    assert model.replay_buffer.buffer_size == 100
    assert sorted(path.name for path in folder.glob("rl_model*"))[-1] == "rl_model_replay_buffer_300_steps.pkl"
    model.learn(50, reset_num_timesteps=False)
    for n_envs, message in ((7, "2 begin with none"), (3, "those of 2 are left out")):
        model = DeepCRL.load(folder / "model", env=DummyVecEnv([GoalReachEnv] * n_envs))
        with pytest.warns(UserWarning, match=f"5 envs, but there are {n_envs}: {message}"):
            model.load_replay_buffer(folder / "buffer")
        model.learn(50, reset_num_timesteps=False)
        assert model.replay_buffer.n_envs == n_envs
