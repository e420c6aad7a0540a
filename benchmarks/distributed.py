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
        row.append(median_ms(lambda ways=ways: [way() for way in ways], seconds / 4))  # type: ignore[misc]
        rows.append([*row, sum(tensor.nbytes for tensor in sent)])
    if rank == 0:
        th.save(rows, path)


def report_updates(args: argparse.Namespace) -> str:
    """Measure updates with one rank and with several. Gives a table in Markdown."""
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
    lines = [
        "# One update on several ranks",
        "",
        f"One thread a rank on {os.cpu_count()} cores of {processor()}, gloo, torch {th.__version__}; the size is depth x "
        "width x batch size of all ranks, with inputs of the humanoid tasks. What the ranks tell each other was measured "
        "alone, too; in an update, the gradients of the actor travel while those of the critic are computed.",
        "",
        f"Printed by `python benchmarks/distributed.py {' '.join(sys.argv[1:])}`.",
        "",
        "| size | ranks | ms an update | of one rank | communication alone (ms) | of the update | bytes of a rank |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for depth, width, batch_size, n_ranks, update, ways, n_bytes in sorted(
        rows, key=lambda row: (SIZES.index(tuple(row[:3])), row[3])
    ):
        lines.append(
            f"| {depth}x{width}x{batch_size} | {n_ranks} | {update:.1f} | {update / one[depth, width, batch_size]:.2f} | "
            f"{ways:.1f} | {ways / update:.0%} | {n_bytes / 1e6:.1f} MB |"
        )
    return "\n".join(lines) + "\n"


def report_trainings(args: argparse.Namespace) -> str:
    """Train with one rank and with several. Gives a table in Markdown."""
    from sb3_deepcrl.zoo.runs import RunFolder

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
    lines = [
        f"# {ENV} on several ranks",
        "",
        "Success at any step over 50 evaluation episodes and the number of updates, by env steps, with the settings of "
        f"`zoo_configs/deepcrl.yml`. The numbers are those of seeds {', '.join(map(str, range(args.seeds)))}.",
        "",
        f"Printed by `python benchmarks/distributed.py learn --steps {args.steps} --seeds {args.seeds}`: "
        "`torchrun --nproc-per-node RANKS -m sb3_deepcrl.zoo train`.",
        "",
        "| env steps | updates | " + " | ".join(f"{n_ranks} rank{'s' * (n_ranks > 1)}" for n_ranks in args.ranks) + " |",
        "|---:|---:|" + "---|" * len(args.ranks),
    ]
    table: dict[tuple[int, int], dict[int, list[float]]] = {}
    for n_ranks in args.ranks:
        for seed in range(args.seeds):
            logs = args.logs / f"{n_ranks}-{seed}"
            arguments = (
                f"--env {ENV} --seed {seed} -n {args.steps} --eval-freq {EVAL_FREQ} --eval-episodes 50 --n-eval-envs 10"
            )
            command = [
                *torchrun,
                str(n_ranks),
                "-m",
                "sb3_deepcrl.zoo",
                "train",
                *arguments.split(),
                "-f",
                str(logs),
                "--resume",
            ]
            # One run is left as it is if it is complete
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            run = RunFolder.newest(str(logs), "deepcrl", ENV)
            assert run is not None
            evaluations = run.evaluations()
            for steps, updates, success in zip(
                *(evaluations[name] for name in ("timesteps", "n_updates", "success_any")), strict=True
            ):
                table.setdefault((steps, updates), {}).setdefault(n_ranks, []).append(success.mean())
    for (steps, updates), found in table.items():
        cells = (
            f"{np.median(found[n]):.2f} ({', '.join(f'{value:.2f}' for value in found[n])})" for n in args.ranks if n in found
        )
        lines.append(f"| {steps:,} | {updates:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    report = report_updates(args) if args.what == "update" else report_trainings(args)
    print(report, end="")
    if args.output is not None:
        args.output.write_text(report)


if __name__ == "__main__":
    main()
