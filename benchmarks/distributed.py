"""
What several ranks of one training cost and reach.

- ``update``: milliseconds of an update by number of ranks, and of what the ranks tell each other in it, alone. A minibatch has
  the same size whatever the number of ranks. Run it on an idle machine::

    python benchmarks/distributed.py update --output docs/results/distributed.md

- ``learn``: success of trainings with one and with two ranks, of the same number of env steps and updates::

    python benchmarks/distributed.py learn --output docs/results/distributed_learn.md
"""

import argparse
import functools
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock as mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from harness import write_report

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.utils import processor

# Depth, width and batch size, with observations, goals and actions of the humanoid tasks
SIZES = ((4, 256, 512), (16, 256, 512), (64, 256, 512), (16, 256, 1024))
OBSERVATION_DIM, GOAL_DIM, ACTION_DIM = 246, 3, 17
ENV, EVAL_FREQ = "PointMaze_UMaze-v3", 2000


class HumanoidSizes(gym.Env):
    """Observations and actions of the sizes of the humanoid tasks. It is never stepped."""

    def __init__(self) -> None:
        goal = spaces.Box(-np.inf, np.inf, (GOAL_DIM,), np.float32)
        observation = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def median_ms(function: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call. All ranks do as many calls as the first one wants."""
    times: list[float] = []
    goes_on = th.ones(())
    while goes_on > 0:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        goes_on.fill_(sum(times) < seconds or len(times) < 5)
        if dist.is_initialized():
            dist.broadcast(goes_on, 0)
    return 1000 * statistics.median(times)


def measure_updates(rank: int, n_ranks: int, port: int, seconds: float, path: Path) -> None:
    """Measure updates in a process that is one of the ranks, which have a thread each."""
    th.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rows = []
    for depth, width, batch_size in SIZES:
        sizes: dict[str, Any] = dict(depth=depth, width=width, batch_size=batch_size, buffer_size=1)
        model = DeepCRL("MultiInputPolicy", HumanoidSizes(), seed=0, device="cpu", **sizes)
        # As for a long learn(), which compiles
        model._setup_acceleration(10**6)
        model._ranks.env_counts = [1] * n_ranks
        n_rows = model._ranks.split(batch_size)
        observation_spaces = model.observation_space.spaces.items()
        observations = {key: th.randn(n_rows, *space.shape) for key, space in observation_spaces}
        actions = th.rand(n_rows, ACTION_DIM) * 2 - 1
        update = functools.partial(model._runner.run, observations, actions)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            update()
        sent = [call.args[0].clone() for call in all_reduce.call_args_list]
        ways = [functools.partial(dist.all_reduce, tensor) for tensor in sent]
        row = [depth, width, batch_size, n_ranks, median_ms(update, seconds)]
        # A single rank has nobody to talk to
        row.append(median_ms(lambda ways=ways: [way() for way in ways], seconds / 4) if ways else 0.0)  # type: ignore[misc]
        rows.append([*row, sum(tensor.nbytes for tensor in sent)])
    if rank == 0:
        th.save(rows, path)


def report_updates(args: argparse.Namespace) -> None:
    """Measure updates with one rank and with several, and report them."""
    rows: list[list[float]] = []
    for n_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            path = Path(folder) / "rows.pt"
            arguments = (n_ranks, port, args.seconds, path)
            th.multiprocessing.start_processes(measure_updates, arguments, nprocs=n_ranks, start_method="spawn")
            rows += th.load(path)
    one = {tuple(row[:3]): row[4] for row in rows if row[3] == 1}
    note = (
        f"One thread a rank on {os.cpu_count()} cores of {processor()}, gloo, torch {th.__version__}; the size is depth x "
        "width x batch size of all ranks, with inputs of the humanoid tasks. What the ranks tell each other was measured "
        "alone, too; in an update, the gradients of the actor travel while those of the critic are computed."
    )
    table = [
        {
            "size": f"{depth}x{width}x{batch_size}",
            "ranks": n_ranks,
            "ms an update": f"{update:.1f}",
            "of one rank": f"{update / one[depth, width, batch_size]:.2f}",
            "communication alone (ms)": f"{ways:.1f}",
            "of the update": f"{ways / update:.0%}",
            "bytes of a rank": f"{n_bytes / 1e6:.1f} MB",
        }
        for depth, width, batch_size, n_ranks, update, ways, n_bytes in sorted(
            rows, key=lambda row: (SIZES.index(tuple(row[:3])), row[3])
        )
    ]
    write_report("One update on several ranks", note, [table], args.output)


def report_trainings(args: argparse.Namespace) -> None:
    """Train with one rank and with several, and report success."""
    from sb3_deepcrl.zoo.runs import RunFolder

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
    found: dict[tuple[int, int], dict[int, list[float]]] = {}
    for n_ranks, seed in itertools.product(args.ranks, range(args.seeds)):
        logs = str(args.logs / f"{n_ranks}-{seed}")
        options = f"--env {ENV} --seed {seed} -n {args.steps} --eval-freq {EVAL_FREQ} --eval-episodes 50 --n-eval-envs 10"
        # A run that is complete is left as it is
        train = ("-m", "sb3_deepcrl.zoo", "train", *options.split(), "-f", logs, "--resume")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, str(n_ranks), *train], check=True, stdout=subprocess.DEVNULL, env=environment)
        run = RunFolder.newest(logs, "deepcrl", ENV)
        assert run is not None
        evaluations = run.evaluations()
        columns = (evaluations[name] for name in ("timesteps", "n_updates", "success_any"))
        for steps, updates, success in zip(*columns, strict=True):
            found.setdefault((steps, updates), {}).setdefault(n_ranks, []).append(success.mean())
    note = (
        "Success at any step over 50 evaluation episodes and the number of updates, by env steps, with the settings of "
        f"`zoo_configs/deepcrl.yml`. The numbers are those of seeds {', '.join(map(str, range(args.seeds)))}. A training is "
        "`torchrun --nproc-per-node RANKS -m sb3_deepcrl.zoo train`."
    )
    table = [
        {
            "env steps": f"{steps:,}",
            "updates": f"{updates:,}",
            **{
                f"{n} rank{'s' * (n > 1)}": f"{np.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"
                for n, values in of_ranks.items()
            },
        }
        for (steps, updates), of_ranks in found.items()
    ]
    write_report(f"{ENV} on several ranks", note, [table], args.output)


def main() -> None:
    """Measure, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("update", "learn"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="Time for the updates of a size")
    parser.add_argument("--steps", type=int, default=14_000, help="Env steps of a training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=Path("logs/distributed"), help="Folder of the trainings")
    parser.add_argument("--output", type=Path, help="File for the report")
    args = parser.parse_args()
    report = report_updates if args.what == "update" else report_trainings
    report(args)


if __name__ == "__main__":
    main()
