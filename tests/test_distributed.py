import itertools
import os
import socket
import time
from functools import partial

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.losses import CONTRASTIVE_LOSSES, ENERGIES
from tests.envs import EpisodeCounterEnv, GoalReachEnv

N_UPDATES = 50
# Not a multiple of the number of ranks
BATCH_SIZE = 14
LOSSES = [*itertools.product(ENERGIES, CONTRASTIVE_LOSSES)]


def make_model(n_envs: int = 1, env_class: type = GoalReachEnv, **kwargs) -> DeepCRL:
    arguments = dict(depth=4, width=8, batch_size=BATCH_SIZE, learning_starts=20, seed=0, compile=False, device="cpu")
    return DeepCRL("MultiInputPolicy", DummyVecEnv([env_class] * n_envs), **{**arguments, **kwargs})


def parameters_after_updates(energy: str, contrastive_loss: str, dtype: th.dtype = th.float64, **kwargs) -> list[th.Tensor]:
    """Parameters, and the metrics of all updates, after this rank has had its rows of minibatches that all ranks know."""
    policy_kwargs = dict(energy=energy, repr_dim=4)
    model = make_model(policy_kwargs=policy_kwargs, contrastive_loss=contrastive_loss, learning_rate=1e-2, **kwargs)
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.policy.to(dtype)
    model.log_ent_coef.data = model.log_ent_coef.data.to(dtype)
    generator = th.Generator().manual_seed(0)
    sizes = {"observation": 3, "achieved_goal": 2, "desired_goal": 2, "action": 2, "noise": 2}
    rows = {key: th.randn(N_UPDATES, BATCH_SIZE, size, generator=generator, dtype=dtype) for key, size in sizes.items()}
    ranks = model._ranks
    part = slice(*[BATCH_SIZE * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)])
    mine = {key: values[:, part] for key, values in rows.items()}
    noise = iter(mine.pop("noise"))
    joined = {key: values.flatten(0, 1) for key, values in mine.items()}
    actions = joined.pop("action").tanh()
    model.replay_buffer.sample_contrastive = lambda batch_size, env: (joined, actions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th, "randn_like", lambda mean: next(noise))
        # Stable-Baselines3 casts observations to float32
        patch.setattr(th.Tensor, "float", lambda x: x.to(dtype))
        model.train(N_UPDATES, BATCH_SIZE)
    metrics = th.tensor([value for name, value in model.logger.name_to_value.items()], dtype=th.float64)
    return [metrics, model.log_ent_coef.detach(), *model.policy.state_dict().values()]


def check_updates(folder) -> None:
    for energy, contrastive_loss in LOSSES:
        th.save(
            parameters_after_updates(energy, contrastive_loss), folder / f"{energy}-{contrastive_loss}-{os.environ['RANK']}"
        )


def run_rank(rank: int, size: int, port: int, folder, function) -> None:
    th.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(folder)


def start_ranks(size: int, folder, function):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return th.multiprocessing.start_processes(
        run_rank, (size, port, folder, function), nprocs=size, join=False, start_method="fork"
    )


def join(context) -> None:
    while not context.join():
        pass


@pytest.mark.parametrize("size", [2, 4])
def test_updates_are_those_of_one_process(size, tmp_path):
    context = start_ranks(size, tmp_path, check_updates)
    expected = {name: parameters_after_updates(*name) for name in LOSSES}
    join(context)
    for name in LOSSES:
        of_ranks = [th.load(tmp_path / f"{'-'.join(name)}-{rank}") for rank in range(size)]
        for other in of_ranks[1:]:
            assert all(map(th.equal, of_ranks[0], other))
        for ours, one in zip(of_ranks[0], expected[name], strict=True):
            th.testing.assert_close(ours, one, rtol=1e-9, atol=1e-12)
