"""
Milliseconds of one update by depth and mode, beside the time that its matrix products alone would take.

- ``plain``: the same mathematics in uncompiled PyTorch, written as SB3's SAC is: each loss with its own forward passes,
  PyTorch's default Adam
- ``eager``: ours, uncompiled
- ``compiled``: ours with ``compile=True``
- ``bfloat16``: compiled, with ``precision="bfloat16"``
- ``checkpoint``: compiled, with ``checkpoint_activations=True``
- ``graph`` (GPU only): compiled, as a CUDA graph; the other modes run without

Each measurement is a process of its own, with an empty cache of compiled code in the first round, so that start-up and
peak memory are its own. The roof is the rate of the three matrix products of a layer in PyTorch, at the same shapes and
precision, measured before and after the updates; blocks with products of their own may be above it. Run it on an idle
machine::

    python benchmarks/update.py --output docs/results/update.md
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.runs import write_rows

# Observation, goal and action of the humanoid tasks
OBSERVATION_DIM, GOAL_DIM, ACTION_DIM = 246, 3, 17
MODES: dict[str, dict[str, Any]] = {
    "plain": dict(compile=False),
    "eager": dict(compile=False),
    "compiled": dict(compile=True),
    "bfloat16": dict(compile=True, precision="bfloat16"),
    "checkpoint": dict(compile=True, checkpoint_activations=True),
    "graph": dict(compile=True, cuda_graph=True),
}
# Matrix products of an update in forward passes: the actor 3, the state-action encoder 2 for the actor and 3 for the
# critic, the goal encoder 3 (a backward pass counts 2, or 1 where only the inputs need gradients)
PASSES = 11


class HumanoidSizes(gym.Env):
    """Observations and actions of the sizes of the humanoid tasks. It is never stepped."""

    def __init__(self) -> None:
        goal = spaces.Box(-np.inf, np.inf, (GOAL_DIM,), np.float32)
        observation = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def plain_update(model: DeepCRL, observations: dict[str, th.Tensor], actions: th.Tensor) -> None:
    """
    One update as a straightforward program does it.

    :param model: Whose networks to update
    :param observations: Observations with relabelled goals
    :param actions: Actions of shape ``(batch_size, action_dim)``
    """
    actor, critic = model.actor, model.critic
    actions_pi, log_prob = actor.action_log_prob(observations)
    state_features = critic.extract_state_features(observations)
    difference = critic.encode_state_action(state_features, actions_pi) - critic.encode_goal(observations)
    ent_coef = model.log_ent_coef.detach().exp()
    actor_loss = (ent_coef * log_prob + difference.norm(dim=1)).mean()
    actor.optimizer.zero_grad()
    actor_loss.backward()
    actor.optimizer.step()

    ent_coef_loss = -(model.log_ent_coef.exp() * (log_prob.detach() + model.target_entropy).mean()).sum()
    model.ent_coef_optimizer.zero_grad()
    ent_coef_loss.backward()
    model.ent_coef_optimizer.step()

    logits = -th.cdist(critic.encode_state_action(state_features, actions), critic.encode_goal(observations))
    critic_loss = F.cross_entropy(logits, th.arange(len(logits), device=logits.device))
    critic_loss = critic_loss + 0.1 * logits.logsumexp(dim=1).square().mean()
    critic.optimizer.zero_grad()
    critic_loss.backward()
    critic.optimizer.step()


def seconds_of(function: Callable[[], object], device: str, budget: float, least: int) -> list[float]:
    """
    :param function: What to time
    :param device: Where it runs
    :param budget: Seconds to spend
    :param least: Least number of calls
    :return: Seconds of each call
    """
    seconds: list[float] = []
    while len(seconds) < least or sum(seconds) < budget:
        start = time.perf_counter()
        function()
        if device == "cuda":
            th.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def flops_per_second(args: argparse.Namespace, dtype: th.dtype) -> float:
    """
    :param args: Arguments of the command line
    :param dtype: Type of the matrices
    :return: Rate of a layer's three matrix products: its output, the gradients of its input and of its weights
    """
    x, g = (th.randn(args.batch_size, args.width, dtype=dtype, device=args.device) for _ in range(2))
    w = th.randn(args.width, args.width, dtype=dtype, device=args.device)

    def products() -> None:
        for _ in range(20):
            F.linear(x, w)
            g @ w
            g.T @ x

    products()
    return 20 * 3 * 2 * args.batch_size * args.width**2 / statistics.median(seconds_of(products, args.device, 0.3, 5))


def measure(args: argparse.Namespace, mode: str, depth: int) -> dict[str, float]:
    """
    :param args: Arguments of the command line
    :param mode: One of ``MODES``
    :param depth: Depth of all networks
    :return: What was measured, by name
    """
    th.set_num_threads(args.n_threads)
    th.manual_seed(0)
    settings = {"cuda_graph": False, **MODES[mode]}
    if mode == "plain":
        settings["policy_kwargs"] = dict(optimizer_kwargs=dict(fused=False))
    start = time.perf_counter()
    model = DeepCRL(
        "MultiInputPolicy",
        HumanoidSizes(),
        depth=depth,
        width=args.width,
        batch_size=args.batch_size,
        buffer_size=1,
        device=args.device,
        **settings,
    )
    model.policy.set_training_mode(True)
    observations = {
        key: th.randn(args.batch_size, *space.shape, device=args.device)
        for key, space in model.observation_space.spaces.items()
    }
    actions = th.rand(args.batch_size, ACTION_DIM, device=args.device) * 2 - 1

    def update() -> None:
        if mode == "plain":
            plain_update(model, observations, actions)
        elif model._graphed_update is not None:
            model._graphed_update({**observations, "__action__": actions})
        else:
            model._update(observations, actions)

    dtype = th.bfloat16 if mode == "bfloat16" else th.float32
    seconds_of(update, args.device, 0.0, 1)
    start_up = time.perf_counter() - start
    n_warm_up = 1 if depth >= 256 else 5
    seconds_of(update, args.device, 0.0, n_warm_up)
    roofs = [flops_per_second(args, dtype)]
    seconds = seconds_of(update, args.device, args.seconds, 2)
    roofs.append(flops_per_second(args, dtype))
    roof_ms = 1000 * PASSES * 2 * depth * args.width**2 * args.batch_size / statistics.mean(roofs)
    if args.device == "cuda":
        memory = th.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "ms": 1000 * statistics.median(seconds),
        "roof_ms": roof_ms,
        "gflops": statistics.mean(roofs) / 1e9,
        "start_up": start_up,
        "memory": memory,
    }


def machine(args: argparse.Namespace) -> str:
    """
    :param args: Arguments of the command line
    :return: What the benchmark ran on
    """
    if args.device == "cuda":
        return f"{th.cuda.get_device_name()}, torch {th.__version__}"
    return f"{args.n_threads} threads of a CPU with {th.backends.cpu.get_cpu_capability()}, torch {th.__version__}"


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """
    :param rows: Medians of the rounds, one row a mode and depth
    :param args: Arguments of the command line
    :return: Table in Markdown
    """
    plain = {row["depth"]: row["ms"] for row in rows if row["mode"] == "plain"}
    lines = [
        "# Time and memory of one update",
        "",
        f"Batch size {args.batch_size}, width {args.width}, sizes of the humanoid tasks; {machine(args)}; median of "
        f"{args.rounds} rounds. The roof is what the matrix products of the blocks alone take in PyTorch, at the rate "
        "measured in the same process; blocks with products of their own may be above it. Start-up is from the constructor to "
        "the end of the first update, with nothing compiled before. The modes are described in the script.",
        "",
        f"Printed by `python benchmarks/update.py {' '.join(sys.argv[1:])}`.",
        "",
        "| depth | mode | ms an update | of plain | roof (ms) | share of the roof | ms a layer | start-up (s) | "
        "peak memory (GiB) |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['ms'] / plain[row['depth']]:.2f}" if row["depth"] in plain else "-"
        lines.append(
            f"| {row['depth']} | {row['mode']} | {row['ms']:.1f} | {ratio} | {row['roof_ms']:.1f} | "
            f"{row['roof_ms'] / row['ms']:.0%} | {row['ms'] / row['depth']:.2f} | {row['start_up']:.1f} | "
            f"{row['memory']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """
    :param rows: Medians of the rounds, one row a mode and depth
    :param path: Path of the picture
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        ax.plot([row["depth"] for row in chosen], [row["ms"] for row in chosen], "o-", label=mode)
    roof = [row for row in rows if row["mode"] != "bfloat16"]
    depths = sorted({row["depth"] for row in roof})
    times = [statistics.mean(row["roof_ms"] for row in roof if row["depth"] == depth) for depth in depths]
    ax.plot(depths, times, "k--", lw=1, label="matrix products in float32")
    ax.set(xscale="log", yscale="log", xlabel="depth", ylabel="ms an update", xticks=depths, xticklabels=depths)
    ax.minorticks_off()
    ax.legend()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64, 256, 1024])
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--n-threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="time of one measurement, at least two updates")
    parser.add_argument("--output", type=Path, help="file for the table, next to it a .csv and a .png (always printed)")
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measure(args, args.worker[0], int(args.worker[1]))))
        return
    modes = args.modes or [mode for mode in MODES if args.device == "cuda" or mode != "graph"]
    measured: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for depth in args.depths:
                for mode in modes:
                    folder = f"{cache}/{mode}-{depth}"
                    process = subprocess.run(
                        [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", mode, str(depth)],
                        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
                        stdout=subprocess.PIPE,
                        check=True,
                        text=True,
                    )
                    measured.setdefault((depth, mode), []).append(json.loads(process.stdout.splitlines()[-1]))
                    print(depth, mode, measured[depth, mode][-1], file=sys.stderr, flush=True)
    rows = []
    for (depth, mode), rounds in measured.items():
        medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        # Only the first round found nothing compiled
        medians["start_up"] = rounds[0]["start_up"]
        rows.append({"depth": depth, "mode": mode, **{name: round(value, 3) for name, value in medians.items()}})
    text = report(rows, args)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
        write_rows(args.output.with_suffix(".csv"), rows)
        draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
