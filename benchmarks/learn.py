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
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch as th
from harness import machine, make_parser, measure_apart, medians, write_report
from torch.profiler import ProfilerActivity, profile
from update import Size, roof_ms

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.tower_kernel import load_kernel
from sb3_deepcrl.common.utils import update_schedule
from sb3_deepcrl.envs import BatchVecEnv

TRANSITIONS_PER_UPDATE = 40
N_ENVS = 64
# Of a measurement
MIN_UPDATES = 40
SCHEDULE = update_schedule(N_ENVS, TRANSITIONS_PER_UPDATE)
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PARTS = ("simulate", "forward", "replay", "update", "other")


def watch(seconds: dict[str, float], part: str, owner: Any, *names: str) -> None:
    """Let the time of methods count as a part of the seconds from now on."""

    def timed(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start

    for name in names:
        setattr(owner, name, partial(timed, getattr(owner, name)))


def matrix_product_ms(model: DeepCRL, n_updates: int) -> dict[str, float]:
    """Milliseconds that PyTorch's matrix products take in an update, and those of the functions in C++, the kernel."""
    seconds = {"kernel": 0.0}
    if (kernel := load_kernel()) is not None:
        watch(seconds, "kernel", kernel, "tower_forward", "tower_backward", "info_nce")
    assert model.replay_buffer is not None
    observations, actions = model.replay_buffer.sample_contrastive(n_updates * model.batch_size)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for k in range(n_updates):
            rows = slice(k * model.batch_size, (k + 1) * model.batch_size)
            model._runner.run({key: values[rows] for key, values in observations.items()}, actions[rows])
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in MATRIX_PRODUCTS) / 1000 / n_updates
    return {"products": products, "kernel": 1000 * seconds["kernel"] / n_updates}


def measure(args: argparse.Namespace, depth: int) -> dict[str, float]:
    """Milliseconds by part, for one update and the 40 transitions that belong to it."""
    th.set_num_threads(args.n_threads)
    size = Size(depth, 256, args.batch_size)
    env = BatchVecEnv("AntUMaze-v0", N_ENVS, args.n_threads)
    model = DeepCRL(
        "MultiInputPolicy",
        env,
        **size._asdict(),
        buffer_size=200_000,
        learning_starts=2 * size.batch_size,
        transitions_per_update=TRANSITIONS_PER_UPDATE,
        compile=True,
        precision=args.precision,
        seed=0,
        device="cpu",
    )
    # Everything is compiled and the buffer holds something
    model.learn(2 * size.batch_size + 4 * SCHEDULE["train_freq"] * N_ENVS, log_interval=None)  # type: ignore[arg-type]
    updates_per_train = SCHEDULE["gradient_steps"]
    n_updates = -(-max(MIN_UPDATES, round(args.seconds / 0.004 / depth)) // updates_per_train) * updates_per_train
    model.learning_starts = 0
    seconds = dict.fromkeys(PARTS, 0.0)
    watch(seconds, "simulate", env, "step")
    watch(seconds, "forward", model, "predict")
    watch(seconds, "replay", model.replay_buffer, "add", "sample_contrastive")
    watch(seconds, "update", model._runner, "run")
    start = time.perf_counter()
    model.learn(n_updates * TRANSITIONS_PER_UPDATE, log_interval=None)  # type: ignore[arg-type]
    total = time.perf_counter() - start
    seconds |= {"other": total - sum(seconds.values()), "total": total}
    milliseconds = {part: 1000 * spent / n_updates for part, spent in seconds.items()}
    roof = roof_ms(size, "cpu", getattr(th, args.precision))
    return {**milliseconds, **matrix_product_ms(model, 8), "roof": roof}


def main() -> None:
    parser = make_parser(__doc__, rounds=3, seconds=8.0)
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measure(args, int(args.worker[0]))))
        return
    measured: dict[int, list[dict[str, float]]] = {depth: [] for depth in args.depths}
    for _, depth in itertools.product(range(args.rounds), args.depths):
        measured[depth].append(measure_apart(str(depth)))
    note = (
        f"`AntUMaze-v0`, {N_ENVS} envs, batch size {args.batch_size}, compiled, {args.precision}; "
        f"{machine('cpu', args.n_threads)}; median of {args.rounds} rounds. "
        f"Milliseconds for one update and the {TRANSITIONS_PER_UPDATE} env steps that belong to it."
    )
    names = {
        **{part: part for part in PARTS},
        "products": "PyTorch's matrix products of the update",
        "kernel": "its functions in C++",
        "roof": "the blocks' products in PyTorch (roof)",
    }
    table = []
    for depth, row in ((depth, medians(rounds)) for depth, rounds in measured.items()):
        cells = {names[name]: f"{row[name]:.1f} ({row[name] / row['total']:.0%})" for name in names}
        share = (row["simulate"] + row["products"] + row["kernel"]) / row["total"]
        cells["simulation, products and functions in C++"] = f"{share:.0%}"
        table.append({"depth": depth, "total (ms)": f"{row['total']:.1f}", **cells})
    write_report("Where the time of learn() goes", note, [table], args.output)


if __name__ == "__main__":
    main()
