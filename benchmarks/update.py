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
- ``jax`` (if jax and optax are installed, up to depth 64): the paper's update in JAX, jitted, in float32

Each measurement is a process of its own, with an empty cache of compiled code in the first round, so that start-up and
peak memory are its own. The roof is the rate of the three matrix products of a layer in PyTorch, at the same shapes and
precision, measured before and after the updates; products of our own may be above it. Run it on an idle machine::

    python benchmarks/update.py --output docs/results/update.md

Beside busy neighbors (``yes > /dev/null`` once for each core), OpenMP threads that soon sleep are faster. The commands of this
package have them::

    GOMP_SPINCOUNT=1000 python benchmarks/update.py --sizes 16x256x512 4x32x256 --modes eager compiled bfloat16
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from harness import machine, make_parser, measure_apart, medians, write_report
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common import compilation
from sb3_deepcrl.envs import BatchVecEnv

# Its observations, goals and actions are the inputs
ENV = "HumanoidUMaze-v0"
MODES: dict[str, dict[str, Any]] = {
    "plain": dict(compile=False, policy_kwargs=dict(optimizer_kwargs=dict(fused=False))),
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
# Beyond it JAX compiles for many minutes
MAX_JAX_DEPTH = 64


def plain_update(model: DeepCRL, observations: dict[str, th.Tensor], actions: th.Tensor) -> None:
    """One update of a model's networks as a straightforward program does it."""
    actor, critic = model.actor, model.critic
    actions_pi, log_prob = actor.action_log_prob(observations)
    state_features = critic.extract_state_features(observations)
    difference = critic.encode_state_action(state_features, actions_pi) - critic.encode_goal(observations)
    ent_coef = model.log_ent_coef.detach().exp()
    actor_loss = (ent_coef * log_prob + difference.norm(dim=1)).mean()
    ent_coef_loss = -(model.log_ent_coef.exp() * (log_prob.detach() + model.target_entropy).mean()).sum()
    logits = -th.cdist(critic.encode_state_action(state_features, actions), critic.encode_goal(observations))
    critic_loss = F.cross_entropy(logits, th.arange(len(logits), device=logits.device))
    critic_loss = critic_loss + 0.1 * logits.logsumexp(dim=1).square().mean()
    for loss, optimizer in (
        (actor_loss, actor.optimizer),
        (ent_coef_loss, model.ent_coef_optimizer),
        (critic_loss, critic.optimizer),
    ):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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

    state, goal = np.concatenate([observations["observation"], observations["achieved_goal"]], 1), observations["desired_goal"]

    def make_tower(key: Any, n_in: int, n_out: int) -> list[Any]:
        sizes = [n_in, *[size.width] * (size.depth + 1), n_out]
        keys = jax.random.split(key, len(sizes) - 1)
        # Of each layer the weights; bias, shift and scale
        return [
            (jax.random.uniform(key, shape, minval=-(shape[0] ** -0.5), maxval=shape[0] ** -0.5), jnp.zeros((3, shape[1])))
            for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
        ]

    def layer(x: Any, parameters: Any) -> Any:
        weights, (bias, shift, scale) = parameters
        return jax.nn.swish(jax.nn.standardize(x @ weights + bias, epsilon=1e-6) * (1 + scale) + shift)

    def apply(tower: list[Any], *inputs: Any) -> Any:
        x = layer(jnp.concatenate(inputs, 1), tower[0])
        for start in range(1, size.depth + 1, 4):
            x = x + functools.reduce(layer, tower[start : start + 4], x)
        weights, (bias, *_) = tower[-1]
        return x @ weights + bias

    def distance(squared: Any) -> Any:
        return jnp.sqrt(jnp.maximum(squared, 1e-12))

    def loss(networks: dict[str, Any], noise: Any) -> Any:
        # What the actor's loss teaches nothing
        fixed = jax.lax.stop_gradient(networks)
        mean, log_std = jnp.split(apply(networks["actor"], state, goal), 2, axis=1)
        log_std = -5 + 3.5 * (jnp.tanh(log_std) + 1)
        action = jnp.tanh(mean + jnp.exp(log_std) * noise)
        log_prob = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi) - jnp.log(1 - action**2 + 1e-6)
        log_prob = log_prob.sum(1)
        difference = apply(fixed["sa_encoder"], state, action) - apply(fixed["g_encoder"], goal)
        actor_loss = (jnp.exp(fixed["log_alpha"]) * log_prob + distance((difference**2).sum(1))).mean()
        entropy_gap = jax.lax.stop_gradient(log_prob).mean() - 0.5 * actions.shape[1]
        alpha_loss = -jnp.exp(networks["log_alpha"]) * entropy_gap
        x, y = apply(networks["sa_encoder"], state, actions), apply(networks["g_encoder"], goal)
        logits = -distance((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T)
        logsumexp = jax.nn.logsumexp(logits, axis=1)
        return actor_loss + alpha_loss + (logsumexp - jnp.diag(logits) + 0.1 * logsumexp**2).mean()

    optimizer = optax.adam(3e-4)

    @jax.jit
    def step(networks: dict[str, Any], optimizer_state: Any, key: Any) -> Any:
        key, noise_key = jax.random.split(key)
        gradients = jax.grad(loss)(networks, jax.random.normal(noise_key, actions.shape))
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(networks, updates), optimizer_state, key

    keys = jax.random.split(jax.random.key(0), 4)
    networks = {
        "actor": make_tower(keys[0], state.shape[1] + goal.shape[1], 2 * actions.shape[1]),
        "sa_encoder": make_tower(keys[1], state.shape[1] + actions.shape[1], 64),
        "g_encoder": make_tower(keys[2], goal.shape[1], 64),
        "log_alpha": jnp.log(0.1),
    }
    everything = [networks, optimizer.init(networks), keys[3]]

    def update() -> None:
        everything[:] = jax.block_until_ready(step(*everything))

    return update


def roof_ms(size: Size, device: str, dtype: th.dtype) -> float:
    """
    Milliseconds that the matrix products of the blocks alone take in an update, at the rate of a layer's three: its output,
    the gradients of its input and those of its weights.
    """
    x, g = (th.randn(size.batch_size, size.width, dtype=dtype, device=device) for _ in range(2))
    w = th.randn(size.width, size.width, dtype=dtype, device=device)

    def products() -> None:
        for _ in range(20):
            F.linear(x, w)
            g @ w
            g.T @ x

    products()
    product_ms = 1000 * statistics.median(seconds_of(products, device, 0.3, 5)) / 20 / 3
    return PASSES * size.depth * product_ms


def make_model(
    env: VecEnv, size: Size, device: str, settings: dict[str, Any]
) -> tuple[DeepCRL, dict[str, th.Tensor], th.Tensor]:
    """A model with these settings, ready for a long ``learn()``, for which it compiles, and a minibatch of random numbers."""
    model = DeepCRL("MultiInputPolicy", env, **size._asdict(), buffer_size=1000, seed=0, device=device, **settings)
    model._setup_acceleration(10**6)
    model.policy.set_training_mode(True)
    # The same numbers, whatever compiling has drawn
    th.manual_seed(1)
    observations = {
        key: th.randn(size.batch_size, *space.shape, device=device) for key, space in env.observation_space.spaces.items()
    }
    actions = th.rand(size.batch_size, *env.action_space.shape, device=device) * 2 - 1
    return model, observations, actions


def make_update(mode: str, env: VecEnv, size: Size, device: str) -> Callable[[], object]:
    """What does one update in one of the ``MODES``."""
    if mode == "inductor":
        compilation.load_kernel = lambda: None
    model, observations, actions = make_model(env, size, device, {"cuda_graph": False, **MODES[mode]})
    if mode == "jax":
        return jax_update(size, {key: value.numpy() for key, value in observations.items()}, actions.numpy())
    if mode == "plain":
        return lambda: plain_update(model, observations, actions)
    return lambda: model._runner.run(observations, actions)


def measure(args: argparse.Namespace, mode: str, size: Size) -> dict[str, float]:
    """What was measured in one of the ``MODES``, by name."""
    th.set_num_threads(args.n_threads)
    env = BatchVecEnv(ENV, 1)
    start = time.perf_counter()
    update = make_update(mode, env, size, args.device)
    dtype = th.bfloat16 if mode == "bfloat16" else th.float32
    seconds_of(update, args.device, 0.0, 1)
    start_up = time.perf_counter() - start
    seconds_of(update, args.device, 0.0, 1 if size.depth >= 256 else 5)
    roofs = [roof_ms(size, args.device, dtype)]
    seconds = seconds_of(update, args.device, args.seconds, 2)
    roofs.append(roof_ms(size, args.device, dtype))
    is_cuda = args.device == "cuda"
    kibibytes = th.cuda.max_memory_allocated() / 2**10 if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    milliseconds = {"ms": 1000 * statistics.median(seconds), "roof_ms": statistics.mean(roofs)}
    return {**milliseconds, "start_up": start_up, "memory": kibibytes / 2**20}


def main() -> None:
    parser = make_parser(__doc__, rounds=3, seconds=3.0)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="depth, width and batch size, such as 16x256x512")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.worker is not None:
        mode, size = args.worker
        print(json.dumps(measure(args, mode, Size.parse(size))))
        return
    missing = {"graph"} if args.device == "cpu" else {"jax"}
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
        missing.add("jax")
    modes = args.modes or [mode for mode in MODES if mode not in missing]
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for _, size, mode in itertools.product(range(args.rounds), args.sizes, modes):
            if mode != "jax" or Size.parse(size).depth <= MAX_JAX_DEPTH:
                found = measure_apart(mode, size, TORCHINDUCTOR_CACHE_DIR=f"{cache}/{mode}-{size}")
                measured.setdefault((size, mode), []).append(found)
    # Only the first round found nothing compiled
    rows = {key: {**medians(rounds), "start_up": rounds[0]["start_up"]} for key, rounds in measured.items()}
    beside = f" with GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}" if "GOMP_SPINCOUNT" in os.environ else ""
    note = (
        f"Sizes are depth x width x batch size, inputs those of {ENV}; {machine(args.device, args.n_threads)}{beside}; "
        f"median of {args.rounds} rounds. The roof is what the matrix products of the blocks alone take in PyTorch, at the "
        "rate measured in the same process; products of our own may be above it. Start-up is from the constructor to "
        "the end of the first update, with nothing compiled before. The modes are described in the script."
    )
    table = [
        {
            "size": size,
            "mode": mode,
            "ms an update": f"{row['ms']:.2f}",
            "of plain": f"{row['ms'] / rows[size, 'plain']['ms']:.2f}" if (size, "plain") in rows else "-",
            "roof (ms)": f"{row['roof_ms']:.2f}",
            "share of the roof": f"{row['roof_ms'] / row['ms']:.0%}",
            "ms a layer": f"{row['ms'] / Size.parse(size).depth:.2f}",
            "start-up (s)": f"{row['start_up']:.1f}",
            "peak memory (GiB)": f"{row['memory']:.2f}",
        }
        for (size, mode), row in rows.items()
    ]
    write_report("Time and memory of one update", note, [table], args.output)


if __name__ == "__main__":
    main()
