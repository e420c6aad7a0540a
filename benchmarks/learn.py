"""
Where the wall-clock of ``learn()`` goes on the ant in the U maze: 64 envs stepped natively, one update for 40 transitions.

``simulate`` is the step of the envs, ``forward`` the policy that acts, ``replay`` storing and sampling, ``update`` the
gradient steps and ``other`` all the rest: SB3's loop, infos, logging. The matrix products of an update are measured in the
same process with PyTorch's profiler, on minibatches of the same buffer. Where residual towers and the loss are functions in
C++, their products cannot be told from what is done with each row in between: the functions are shown (kernel), and beside
them what the products of the blocks take in PyTorch, at the rate measured by ``update.py`` (roof). Simulation and learner take
turns, so each of them may have all cores. Run it on an idle machine::

    python benchmarks/learn.py --output docs/results/learn.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from torch.profiler import ProfilerActivity, profile
from update import PASSES, Size, flops_per_second

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.tower_kernel import load_kernel
from sb3_deepcrl.common.utils import update_schedule
from sb3_deepcrl.envs import BatchVecEnv

TRANSITIONS_PER_UPDATE = 40
N_ENVS = 64
SCHEDULE = update_schedule(N_ENVS, TRANSITIONS_PER_UPDATE)
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PARTS = ("simulate", "forward", "replay", "update", "other")


class Clock:
    """Adds up the time spent in functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Let the time of a method count as a part."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, timed)


def matrix_product_ms(model: DeepCRL, n_updates: int) -> tuple[float, float]:
    """Milliseconds that PyTorch's matrix products take in an update, and milliseconds of the functions in C++."""
    kernel = load_kernel()
    clock = Clock()
    for name in ("tower_forward", "tower_backward", "info_nce"):
        if kernel is not None:
            clock.watch(kernel, name, "update")
    assert model.replay_buffer is not None
    observations, actions = model.replay_buffer.sample_contrastive(n_updates * model.batch_size)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for k in range(n_updates):
            rows = slice(k * model.batch_size, (k + 1) * model.batch_size)
            model._runner.run({key: values[rows] for key, values in observations.items()}, actions[rows])
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in MATRIX_PRODUCTS) / 1000 / n_updates
    return products, 1000 * clock.seconds["update"] / n_updates


def measure(args: argparse.Namespace, depth: int) -> dict[str, float]:
    """Milliseconds by part, for one update and the 40 transitions that belong to it."""
    th.set_num_threads(args.n_threads)
    env = BatchVecEnv("AntUMaze-v0", N_ENVS, args.n_threads)
    model = DeepCRL(
        "MultiInputPolicy",
        env,
        depth=depth,
        batch_size=args.batch_size,
        buffer_size=200_000,
        learning_starts=2 * args.batch_size,
        transitions_per_update=TRANSITIONS_PER_UPDATE,
        compile=True,
        precision=args.precision,
        seed=0,
        device="cpu",
    )
    # Everything is compiled and the buffer holds something
    model.learn(2 * args.batch_size + 4 * SCHEDULE["train_freq"] * N_ENVS, log_interval=None)  # type: ignore[arg-type]
    updates_per_train = SCHEDULE["gradient_steps"]
    n_updates = -(-max(args.updates, round(args.seconds / 0.004 / depth)) // updates_per_train) * updates_per_train
    clock = Clock()
    model.learning_starts = 0
    clock.watch(env, "step", "simulate")
    clock.watch(model, "predict", "forward")
    clock.watch(model.replay_buffer, "add", "replay")
    clock.watch(model.replay_buffer, "sample_contrastive", "replay")
    clock.watch(model._runner, "run", "update")
    start = time.perf_counter()
    model.learn(n_updates * TRANSITIONS_PER_UPDATE, log_interval=None)  # type: ignore[arg-type]
    total = time.perf_counter() - start
    clock.seconds["other"] = total - sum(clock.seconds.values())
    milliseconds = {part: 1000 * seconds / n_updates for part, seconds in clock.seconds.items()}
    products, blocks = matrix_product_ms(model, 8)
    rate = flops_per_second(Size(depth, args.width, args.batch_size), "cpu", getattr(th, args.precision))
    roof = 1000 * PASSES * 2 * depth * args.width**2 * args.batch_size / rate
    return {**milliseconds, "total": 1000 * total / n_updates, "products": products, "blocks": blocks, "roof": roof}


def report(rows: dict[int, dict[str, float]], args: argparse.Namespace) -> str:
    """Table in Markdown of the medians of the rounds by depth."""
    lines = [
        "# Where the time of learn() goes",
        "",
        f"`AntUMaze-v0`, {N_ENVS} envs, batch size {args.batch_size}, compiled, {args.precision}; {args.n_threads} threads of "
        f"a CPU with {th.backends.cpu.get_cpu_capability()}, torch {th.__version__}; median of {args.rounds} rounds. "
        f"Milliseconds for one update and the {TRANSITIONS_PER_UPDATE} env steps that belong to it.",
        "",
        f"Printed by `python benchmarks/learn.py {' '.join(sys.argv[1:])}`.",
        "",
        "| depth | total (ms) | simulate | forward | replay | update | other | PyTorch's matrix products of the update | "
        "its functions in C++ | simulation, products and functions in C++ | the blocks' products in PyTorch (roof) |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for depth, row in rows.items():
        cells = [f"{row[part]:.1f} ({row[part] / row['total']:.0%})" for part in (*PARTS, "products", "blocks")]
        share = (row["simulate"] + row["products"] + row["blocks"]) / row["total"]
        roof = f"{row['roof']:.1f} ({row['roof'] / row['total']:.0%})"
        lines.append(f"| {depth} | {row['total']:.1f} | {' | '.join(cells)} | {share:.0%} | {roof} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--n-threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40, help="least number of updates of a measurement")
    parser.add_argument("--seconds", type=float, default=8.0, help="about the time of a measurement")
    parser.add_argument("--output", type=Path, help="file for the table (it is always printed)")
    parser.add_argument("--worker", type=int, metavar="DEPTH", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu", width=256)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measure(args, args.worker)))
        return
    measured: dict[int, list[dict[str, float]]] = {depth: [] for depth in args.depths}
    for _ in range(args.rounds):
        for depth in args.depths:
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", str(depth)]
            process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            measured[depth].append(json.loads(process.stdout.splitlines()[-1]))
            print(depth, measured[depth][-1], file=sys.stderr, flush=True)
    rows = {
        depth: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for depth, runs in measured.items()
    }
    text = report(rows, args)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()
