"""
Milliseconds of one update by size of the networks and mode, beside the time that its matrix products alone would take.

- ``plain``: the same mathematics in uncompiled PyTorch, written as SB3's SAC is: each loss with its own forward passes,
  PyTorch's default Adam
- ``eager``: ours, uncompiled
- ``inductor``: ours, its blocks compiled by ``torch.compile`` alone
- ``compiled``: ours with ``compile=True``: on CPUs that it knows, the kernel of ``tower.cpp``
- ``bfloat16``: compiled, with ``precision="bfloat16"``
- ``checkpoint``: compiled, with ``checkpoint_activations=True``
- ``graph`` (GPU only): compiled, as a CUDA graph; the other modes run without
- ``jax`` (if jax and optax are installed, up to depth 64, beyond which it compiles for many minutes): the paper's update in
  JAX, jitted, in float32

Each measurement is a process of its own, with an empty cache of compiled code in the first round, so that start-up and
peak memory are its own. The roof is the rate of the three matrix products of a layer in PyTorch, at the same shapes and
precision, measured before and after the updates; products of our own may be above it. Run it on an idle machine::

    python benchmarks/update.py --output docs/results/update.md

Beside busy neighbors, the second time as the commands of this package do it, whose OpenMP threads soon sleep::

    python benchmarks/update.py --busy 2 --sizes 16x256x512 4x32x256 --modes eager compiled bfloat16
    GOMP_SPINCOUNT=1000 python benchmarks/update.py --busy 2 --sizes 16x256x512 4x32x256 --modes eager compiled bfloat16
"""

import argparse
import csv
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common import compilation
from sb3_deepcrl.common.utils import processor

# Observation, goal and action of the humanoid tasks
OBSERVATION_DIM, GOAL_DIM, ACTION_DIM = 246, 3, 17
MODES: dict[str, dict[str, Any]] = {
    "plain": dict(compile=False),
    "eager": dict(compile=False),
    "inductor": dict(compile=True),
    "compiled": dict(compile=True),
    "bfloat16": dict(compile=True, precision="bfloat16"),
    "checkpoint": dict(compile=True, checkpoint_activations=True),
    "graph": dict(compile=True, cuda_graph=True),
    "jax": dict(),
}


class Size(NamedTuple):
    """Of all networks, and of the minibatches."""

    depth: int
    width: int
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """The sizes of three numbers, as in ``16x256x512``."""
        return cls(*map(int, text.split("x")))


# Those of the humanoid tasks by depth, the largest batch size of the paper's figure 7, and those of the studies of the point
SIZES = ["4x256x512", "16x256x512", "64x256x512", "256x256x512", "1024x256x512", "16x256x1024", "4x32x256", "16x32x256"]
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
    """One update of a model's networks as a straightforward program does it."""
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
    """Seconds of each call of a function, which is called so often, and until the budget in seconds is spent."""
    seconds: list[float] = []
    while len(seconds) < least or sum(seconds) < budget:
        start = time.perf_counter()
        function()
        if device == "cuda":
            th.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def jax_update(size: Size, observations: dict[str, np.ndarray], actions: np.ndarray) -> Callable[[], None]:
    """What does one update of the paper's networks in JAX."""
    import jax
    import optax
    from jax import numpy as jnp

    def dense(key: Any, n_in: int, n_out: int) -> tuple[Any, Any]:
        return jax.random.uniform(key, (n_in, n_out), minval=-(n_in**-0.5), maxval=n_in**-0.5), jnp.zeros(n_out)

    def tower(key: Any, n_in: int, n_out: int) -> dict[str, Any]:
        keys = jax.random.split(key, size.depth + 2)
        layers = [(*dense(k, n_in if i == 0 else size.width, size.width),) for i, k in enumerate(keys[:-1])]
        norms = [(jnp.ones(size.width), jnp.zeros(size.width)) for _ in layers]
        return {"layers": layers, "norms": norms, "head": dense(keys[-1], size.width, n_out)}

    def layer(x: Any, weights: Any, norm: Any) -> Any:
        x = x @ weights[0] + weights[1]
        x = (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-6)
        return jax.nn.swish(x * norm[0] + norm[1])

    def apply(network: dict[str, Any], x: Any) -> Any:
        layers = list(zip(network["layers"], network["norms"], strict=True))
        x = layer(x, *layers[0])
        for start in range(1, size.depth + 1, 4):
            branch = x
            for weights, norm in layers[start : start + 4]:
                branch = layer(branch, weights, norm)
            x = x + branch
        return x @ network["head"][0] + network["head"][1]

    state, goal = np.concatenate([observations["observation"], observations["achieved_goal"]], 1), observations["desired_goal"]
    keys = jax.random.split(jax.random.key(0), 4)
    actor = tower(keys[0], state.shape[1] + GOAL_DIM, 2 * ACTION_DIM)
    critic = {"sa": tower(keys[1], state.shape[1] + ACTION_DIM, 64), "g": tower(keys[2], GOAL_DIM, 64)}
    log_alpha, optimizer = jnp.log(0.1), optax.adam(3e-4)
    states = {"actor": optimizer.init(actor), "critic": optimizer.init(critic), "alpha": optimizer.init(log_alpha)}

    def distance(squared: Any) -> Any:
        return jnp.sqrt(jnp.maximum(squared, 1e-12))

    def actor_loss(actor: Any, critic: Any, log_alpha: Any, noise: Any) -> Any:
        mean, log_std = jnp.split(apply(actor, jnp.concatenate([state, goal], 1)), 2, axis=1)
        log_std = -5 + 3.5 * (jnp.tanh(log_std) + 1)
        raw = mean + jnp.exp(log_std) * noise
        action = jnp.tanh(raw)
        log_prob = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi) - jnp.log(1 - action**2 + 1e-6)
        log_prob = log_prob.sum(1)
        reprs = apply(critic["sa"], jnp.concatenate([state, action], 1)), apply(critic["g"], goal)
        return (jnp.exp(log_alpha) * log_prob + distance(((reprs[0] - reprs[1]) ** 2).sum(1))).mean(), log_prob

    def critic_loss(critic: Any) -> Any:
        x, y = apply(critic["sa"], jnp.concatenate([state, actions], 1)), apply(critic["g"], goal)
        logits = -distance((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T)
        logsumexp = jax.nn.logsumexp(logits, axis=1)
        return (logsumexp - jnp.diag(logits) + 0.1 * logsumexp**2).mean()

    def alpha_loss(log_alpha: Any, log_prob: Any) -> Any:
        return -(jnp.exp(log_alpha) * (log_prob - 0.5 * ACTION_DIM).mean())

    @jax.jit
    def step(actor: Any, critic: Any, log_alpha: Any, states: Any, key: Any) -> Any:
        key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, actions.shape)
        (_, log_prob), of_actor = jax.value_and_grad(actor_loss, has_aux=True)(actor, critic, log_alpha, noise)
        gradients = {
            "actor": of_actor,
            "alpha": jax.grad(alpha_loss)(log_alpha, log_prob),
            "critic": jax.grad(critic_loss)(critic),
        }
        values = {"actor": actor, "alpha": log_alpha, "critic": critic}
        states = dict(states)
        for name in values:
            updates, states[name] = optimizer.update(gradients[name], states[name])
            values[name] = optax.apply_updates(values[name], updates)
        return values["actor"], values["critic"], values["alpha"], states, key

    everything = [actor, critic, log_alpha, states, keys[3]]

    def update() -> None:
        everything[:] = jax.block_until_ready(step(*everything))

    return update


def flops_per_second(size: Size, device: str, dtype: th.dtype) -> float:
    """Rate of a layer's three matrix products: its output, the gradients of its input and of its weights."""
    _, width, batch_size = size
    x, g = (th.randn(batch_size, width, dtype=dtype, device=device) for _ in range(2))
    w = th.randn(width, width, dtype=dtype, device=device)

    def products() -> None:
        for _ in range(20):
            F.linear(x, w)
            g @ w
            g.T @ x

    products()
    return 20 * 3 * 2 * batch_size * width**2 / statistics.median(seconds_of(products, device, 0.3, 5))


def make_update(args: argparse.Namespace, mode: str, size: Size) -> Callable[[], object]:
    """What does one update in one of the ``MODES``."""
    settings = {"cuda_graph": False, **MODES[mode]}
    if mode == "plain":
        settings["policy_kwargs"] = dict(optimizer_kwargs=dict(fused=False))
    if mode == "inductor":
        compilation.load_kernel = lambda: None
    model = DeepCRL(
        "MultiInputPolicy",
        HumanoidSizes(),
        depth=size.depth,
        width=size.width,
        batch_size=size.batch_size,
        buffer_size=1,
        device=args.device,
        **settings,
    )
    # As for a long learn(), which compiles
    model._setup_acceleration(10**6)
    model.policy.set_training_mode(True)
    observations = {
        key: th.randn(size.batch_size, *space.shape, device=args.device)
        for key, space in model.observation_space.spaces.items()
    }
    actions = th.rand(size.batch_size, ACTION_DIM, device=args.device) * 2 - 1
    if mode == "jax":
        return jax_update(size, {key: value.numpy() for key, value in observations.items()}, actions.numpy())
    if mode == "plain":
        return lambda: plain_update(model, observations, actions)
    return lambda: model._runner.run(observations, actions)


def measure(args: argparse.Namespace, mode: str, size: Size) -> dict[str, float]:
    """What was measured in one of the ``MODES``, by name."""
    th.set_num_threads(args.n_threads)
    th.manual_seed(0)
    start = time.perf_counter()
    update = make_update(args, mode, size)
    dtype = th.bfloat16 if mode == "bfloat16" else th.float32
    seconds_of(update, args.device, 0.0, 1)
    start_up = time.perf_counter() - start
    seconds_of(update, args.device, 0.0, 1 if size.depth >= 256 else 5)
    roofs = [flops_per_second(size, args.device, dtype)]
    seconds = seconds_of(update, args.device, args.seconds, 2)
    roofs.append(flops_per_second(size, args.device, dtype))
    roof_ms = 1000 * PASSES * 2 * size.depth * size.width**2 * size.batch_size / statistics.mean(roofs)
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
    """What the benchmark ran on."""
    if args.device == "cuda":
        return f"{th.cuda.get_device_name()}, torch {th.__version__}"
    return f"{args.n_threads} threads of {processor()} ({th.backends.cpu.get_cpu_capability()}), torch {th.__version__}"


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Table in Markdown of the medians of the rounds, one row a mode and size."""
    beside = f" with {args.busy} busy processes beside" if args.busy else ""
    if "GOMP_SPINCOUNT" in os.environ:
        beside += f" and GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}"
    plain = {row["size"]: row["ms"] for row in rows if row["mode"] == "plain"}
    lines = [
        "# Time and memory of one update",
        "",
        f"Sizes are depth x width x batch size, inputs those of the humanoid tasks; {machine(args)}{beside}; median of "
        f"{args.rounds} rounds. The roof is what the matrix products of the blocks alone take in PyTorch, at the rate "
        "measured in the same process; products of our own may be above it. Start-up is from the constructor to "
        "the end of the first update, with nothing compiled before. The modes are described in the script.",
        "",
        f"Printed by `python benchmarks/update.py {' '.join(sys.argv[1:])}`.",
        "",
        "| size | mode | ms an update | of plain | roof (ms) | share of the roof | ms a layer | start-up (s) | "
        "peak memory (GiB) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['ms'] / plain[row['size']]:.2f}" if row["size"] in plain else "-"
        lines.append(
            f"| {row['size']} | {row['mode']} | {row['ms']:.2f} | {ratio} | {row['roof_ms']:.2f} | "
            f"{row['roof_ms'] / row['ms']:.0%} | {row['ms'] / row['depth']:.2f} | {row['start_up']:.1f} | "
            f"{row['memory']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of an update by depth and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    # All depths of the first width and batch size
    rows = [row for row in rows if row["size"].split("x")[1:] == rows[0]["size"].split("x")[1:]]
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
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="depth, width and batch size, such as 16x256x512")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--n-threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="time of one measurement, at least two updates")
    parser.add_argument("--output", type=Path, help="file for the table, next to it a .csv and a .png (always printed)")
    parser.add_argument("--busy", type=int, default=0, help="number of other processes that keep the cores busy meanwhile")
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measure(args, args.worker[0], Size.parse(args.worker[1]))))
        return
    missing = {"graph"} if args.device == "cpu" else {"jax"}
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
        missing.add("jax")
    modes = args.modes or [mode for mode in MODES if mode not in missing]
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        for _ in range(args.busy):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        for _ in range(args.rounds):
            for size in args.sizes:
                for mode in modes:
                    if mode == "jax" and Size.parse(size).depth > 64:
                        continue
                    process = subprocess.run(
                        [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", mode, size],
                        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{mode}-{size}"},
                        stdout=subprocess.PIPE,
                        check=True,
                        text=True,
                    )
                    measured.setdefault((size, mode), []).append(json.loads(process.stdout.splitlines()[-1]))
                    print(size, mode, measured[size, mode][-1], file=sys.stderr, flush=True)
    rows = []
    for (size, mode), rounds in measured.items():
        medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        # Only the first round found nothing compiled
        medians["start_up"] = rounds[0]["start_up"]
        rows.append(
            {"size": size, "depth": Size.parse(size).depth, "mode": mode, **{n: round(v, 3) for n, v in medians.items()}}
        )
    text = report(rows, args)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
        with args.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
