"""
Env steps per second of ``BatchVecEnv``, beside what limits it and what it replaces, in one run:

- the bare ``mujoco.batch.Batch.step`` of the same model, on states that occur in episodes (the ceiling),
- ``DummyVecEnv`` and ``SubprocVecEnv`` over the single environment,
- ``DummyVecEnv`` over gymnasium-robotics' ``AntMaze_UMaze-v5``.

All of them get the same kind of random actions. Everything is measured in turn, in several rounds, and the median of the
rounds is reported, so that a disturbance hits all alike. Run it on an idle machine::

    python benchmarks/envs.py --output docs/results/envs.md

With ``--stability`` nothing is timed: 1,000 episodes of random actions a robot are run, and simulations that diverge, or of
which MuJoCo warns, are counted. None is expected::

    python benchmarks/envs.py --stability
"""

import argparse
import itertools
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
from harness import make_parser, medians, write_report
from mujoco.batch import Batch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_deepcrl.common.utils import processor
from sb3_deepcrl.envs import BatchVecEnv

REFERENCE = "gymnasium_robotics:AntMaze_UMaze-v5"
# Classes of VecEnv, and the env in them where it is another
BASELINES: dict[str, tuple[type[VecEnv], str | None]] = {
    "DummyVecEnv": (DummyVecEnv, None),
    "SubprocVecEnv": (SubprocVecEnv, None),
    f"DummyVecEnv over {REFERENCE}": (DummyVecEnv, REFERENCE),
}
# Number of envs of the baselines, and of the batch beside them
BASELINE_ENVS, COMPARED_ENVS = 16, 64
PACKAGES = ("mujoco", "gymnasium", "gymnasium-robotics", "stable-baselines3", "numpy")
# Steps between two snapshots of running episodes that the ceiling is measured on
SNAPSHOT_EVERY, N_SNAPSHOTS = 5, 8


def random_steps(vec_env: VecEnv) -> Iterator[np.ndarray]:
    """Step with random actions for ever, and give what is done after each step, shape ``(n_envs,)``."""
    shape = (1000, vec_env.num_envs, *(vec_env.action_space.shape or ()))
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    vec_env.seed(0)
    vec_env.reset()
    for batch in itertools.cycle(actions):
        _, _, dones, _ = vec_env.step(batch)
        yield dones


def rate(vec_env: VecEnv, seconds: float) -> float:
    """Env steps per second of an environment."""
    stepped = random_steps(vec_env)
    # Made and reset before the clock starts
    next(stepped)
    n_steps, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        n_steps += len(next(stepped))
    return n_steps / spent


def ceiling_rate(vec_env: BatchVecEnv, n_threads: int, seconds: float) -> float:
    """Env steps per second of the bare engine, on the states of the environment's episodes."""
    task, rng = vec_env.task, np.random.default_rng(0)
    stepped = itertools.islice(random_steps(vec_env), SNAPSHOT_EVERY - 1, SNAPSHOT_EVERY * N_SNAPSHOTS, SNAPSHOT_EVERY)
    snapshots = [vec_env.simulation.batch.state.copy() for _ in stepped]
    batch = Batch(task.model, vec_env.num_envs, n_threads)
    ctrl = batch.bind("ctrl")
    actions = rng.uniform(-1, 1, (SNAPSHOT_EVERY, vec_env.num_envs, task.robot.action_dim))
    steps, spent = 0, 0.0
    while spent < seconds:
        for snapshot in snapshots:
            batch.state[:] = snapshot
            for control in map(task.robot.control, actions):
                ctrl[:] = control
                start = time.perf_counter()
                batch.step(nstep=task.frame_skip)
                spent += time.perf_counter() - start
                steps += vec_env.num_envs
    return steps / spent


def measure(env_id: str, n_envs: int, args: argparse.Namespace) -> dict[str, float]:
    """Env steps per second by what was measured. Baselines are measured beside one number of envs only."""
    batch = BatchVecEnv(env_id, n_envs, args.n_threads)
    rates = {"ceiling": ceiling_rate(batch, args.n_threads, args.seconds), "batch": rate(batch, args.seconds)}
    for name, (vec_env_cls, reference) in BASELINES.items() if n_envs == COMPARED_ENVS else ():
        vec_env = make_vec_env(reference or env_id, BASELINE_ENVS, seed=0, vec_env_cls=vec_env_cls)
        rates[name] = rate(vec_env, args.seconds)
        vec_env.close()
    return rates


def stability(env_id: str, n_envs: int, n_threads: int, episodes: int) -> dict[str, str]:
    """Run each environment for the same number of episodes, as the first ones to end are short, and count divergences."""
    vec_env = BatchVecEnv(env_id, n_envs, n_threads)
    left = np.full(n_envs, -(-episodes // n_envs))
    n_episodes, n_steps = int(left.sum()), 0
    for dones in random_steps(vec_env):
        n_steps += int((left > 0).sum())
        left -= dones & (left > 0)
        if not left.any():
            break
    n_diverged = vec_env.simulation.n_diverged
    return {"env": env_id, "episodes": f"{n_episodes:,}", "env steps": f"{n_steps:,}", "divergences": f"{n_diverged:,}"}


def main() -> None:
    parser = make_parser(__doc__, rounds=3, seconds=4.0)
    parser.add_argument("--env-ids", nargs="+", default=["AntUMaze-v0", "HumanoidUMaze-v0", "PointUMaze-v0", "ArmPushEasy-v0"])
    parser.add_argument("--n-envs", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--stability", nargs="?", type=int, const=1000, metavar="EPISODES", help="count divergences instead")
    args = parser.parse_args()
    if args.stability is not None:
        rows = [stability(env_id, COMPARED_ENVS, args.n_threads, args.stability) for env_id in args.env_ids]
        note = (
            f"{COMPARED_ENVS} envs, seeds 0 to {COMPARED_ENVS - 1}. Each simulation with a warning of MuJoCo is a divergence."
        )
        write_report("Episodes of random actions", note, [rows], args.output)
        return

    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _, env_id, n_envs in itertools.product(range(args.rounds), args.env_ids, sorted({*args.n_envs, COMPARED_ENVS})):
        rounds.setdefault((env_id, n_envs), []).append(measure(env_id, n_envs, args))
    results = {key: medians(found) for key, found in rounds.items()}
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    note = (
        f"{processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}. {args.n_threads} native "
        f"threads, random actions, median of {args.rounds} rounds of {args.seconds:g} s each. One env step is one action, "
        f"whatever the number of physics steps. The second table has baselines with {BASELINE_ENVS} envs, and how many times "
        f"faster BatchVecEnv with {COMPARED_ENVS} envs is."
    )
    speeds = [
        {
            "env": env_id,
            "envs": n_envs,
            "BatchVecEnv": f"{found['batch']:,.0f}",
            "bare Batch.step": f"{found['ceiling']:,.0f}",
            "share of it": f"{found['batch'] / found['ceiling']:.0%}",
        }
        for (env_id, n_envs), found in results.items()
    ]
    baselines = [
        {"env": env_id, **{name: f"{found[name]:,.0f} ({found['batch'] / found[name]:.1f}x)" for name in BASELINES}}
        for (env_id, n_envs), found in results.items()
        if n_envs == COMPARED_ENVS
    ]
    write_report("Env steps per second", note, [speeds, baselines], args.output)


if __name__ == "__main__":
    main()
