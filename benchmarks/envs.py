"""
Env steps per second of ``BatchVecEnv``, beside what limits it and what it replaces, in one run:

- the bare ``mujoco.batch.Batch.step`` of the same model, on states that occur in episodes (the ceiling),
- ``DummyVecEnv`` and ``SubprocVecEnv`` over the single environment,
- ``DummyVecEnv`` over gymnasium-robotics' ``AntMaze_UMaze-v5``.

All of them get the same kind of random actions. Everything is measured in turn, in several rounds, and the median of the
rounds is reported, so that a disturbance hits all alike. Run it on an idle machine::

    python benchmarks/envs.py --output docs/results/envs.md

With ``--stability`` nothing is timed: 1,000 episodes of random actions a robot are run, and MuJoCo's warnings and diverged
simulations are counted. None is expected::

    python benchmarks/envs.py --stability
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
from mujoco.batch import Batch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_deepcrl.common.utils import processor
from sb3_deepcrl.envs import BatchVecEnv, register_envs
from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import GoalTask

register_envs()
gym.register_envs(gymnasium_robotics)

REFERENCE = "AntMaze_UMaze-v5"
PACKAGES = ("mujoco", "gymnasium", "gymnasium-robotics", "stable-baselines3", "numpy")
# Steps between two snapshots of running episodes that the ceiling is measured on
SNAPSHOT_EVERY, N_SNAPSHOTS = 5, 8


def random_steps(vec_env: VecEnv) -> Iterator[int]:
    """Step with random actions for ever, and give the number of env steps of each."""
    shape = (64, vec_env.num_envs, *(vec_env.action_space.shape or ()))
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    vec_env.seed(0)
    vec_env.reset()
    for batch in itertools.cycle(actions):
        vec_env.step(batch)
        yield vec_env.num_envs


def rate(vec_env: VecEnv, seconds: float) -> float:
    """Env steps per second of an environment."""
    stepped = random_steps(vec_env)
    # Made and reset before the clock starts
    next(stepped)
    steps, start = 0, time.perf_counter()
    for n_envs in stepped:
        steps += n_envs
        if (spent := time.perf_counter() - start) >= seconds:
            break
    return steps / spent


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


def measure(env_id: str, n_envs: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Env steps per second by what was measured. Baselines are measured beside one number of envs only."""
    batch = BatchVecEnv(env_id, n_envs, arguments.n_threads)
    ceiling = ceiling_rate(batch, arguments.n_threads, arguments.seconds)
    rates = {"batch": rate(batch, arguments.seconds), "ceiling": ceiling}
    baselines = {"dummy": (DummyVecEnv, env_id), "subproc": (SubprocVecEnv, env_id), "reference": (DummyVecEnv, REFERENCE)}
    for name, (vec_env_cls, other_id) in baselines.items() if n_envs == arguments.compare_envs else ():
        vec_env = make_vec_env(other_id, n_envs=arguments.baseline_envs, seed=0, vec_env_cls=vec_env_cls)
        rates[name] = rate(vec_env, arguments.seconds)
        vec_env.close()
    return rates


def stability(env_id: str, n_envs: int, n_threads: int, episodes: int) -> tuple[int, int, int, int]:
    """Number of episodes, env steps, warnings of MuJoCo and diverged simulations; each episode is run to its end."""
    spec = gym.spec(env_id)
    simulation = Simulation(GoalTask(**spec.kwargs), n_envs, n_threads)
    for i in range(n_envs):
        simulation.seed(i, np.random.default_rng(i))
    simulation.reset(np.arange(n_envs))
    rng = np.random.default_rng(n_envs)
    # The first episodes to end are the short ones, so each environment runs the same number of episodes
    left = np.full(n_envs, -(-episodes // n_envs))
    lengths = np.zeros(n_envs, dtype=np.int64)
    finished = steps = n_warnings = 0
    while left.any():
        result = simulation.step(rng.uniform(-1, 1, (n_envs, simulation.task.robot.action_dim)).astype(np.float32))
        lengths += 1
        running = left > 0
        steps += int(running.sum())
        # Counted here, as the reset clears the warnings
        n_warnings += int(simulation.batch.warning[running, :, 1].sum())
        done = result.terminated | result.diverged | (lengths == spec.max_episode_steps)
        finished += int((done & running).sum())
        left -= done & running
        lengths[done] = 0
        if done.any():
            simulation.reset(np.flatnonzero(done))
    return finished, steps, n_warnings, simulation.n_diverged


def machine() -> str:
    """Processor, number of CPUs and versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"


def report(results: dict[tuple[str, int], dict[str, float]], arguments: argparse.Namespace) -> str:
    """Tables in Markdown of the env steps per second by id, number of environments and what was measured."""
    lines = [
        "# Env steps per second",
        "",
        f"{machine()}. {arguments.n_threads} native threads, random actions, median of {arguments.rounds} rounds of "
        f"{arguments.seconds:g} s each. One env step is one action, whatever the number of physics steps.",
        "",
        f"Printed by `python benchmarks/envs.py {' '.join(sys.argv[1:])}`.",
        "",
        "| env | envs | BatchVecEnv | bare Batch.step | share of it |",
        "|---|---:|---:|---:|---:|",
    ]
    for (env_id, n_envs), rates in results.items():
        share = rates["batch"] / rates["ceiling"]
        lines.append(f"| {env_id} | {n_envs} | {rates['batch']:,.0f} | {rates['ceiling']:,.0f} | {share:.0%} |")
    n = arguments.baseline_envs
    lines += [
        "",
        f"Baselines with {n} envs, and how many times faster BatchVecEnv with {arguments.compare_envs} envs is:",
        "",
        f"| env | DummyVecEnv | SubprocVecEnv ({n} processes) | DummyVecEnv over {REFERENCE} |",
        "|---|---:|---:|---:|",
    ]
    for (env_id, n_envs), rates in results.items():
        if n_envs == arguments.compare_envs:
            cells = [f"{rates[name]:,.0f} ({rates['batch'] / rates[name]:.1f}x)" for name in ("dummy", "subproc", "reference")]
            lines.append(f"| {env_id} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-ids", nargs="+", default=["AntUMaze-v0", "HumanoidUMaze-v0", "PointUMaze-v0", "ArmPushEasy-v0"])
    parser.add_argument("--n-envs", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--n-threads", type=int, default=os.cpu_count())
    parser.add_argument("--baseline-envs", type=int, default=16, help="number of envs of the baselines")
    parser.add_argument("--compare-envs", type=int, default=64, help="number of envs of the batch beside them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="time of one measurement")
    parser.add_argument("--stability", nargs="?", type=int, const=1000, metavar="EPISODES", help="count warnings instead")
    parser.add_argument("--output", type=Path, help="file for the tables (they are always printed)")
    arguments = parser.parse_args()
    if arguments.stability is not None:
        print("| env | episodes | env steps | warnings | divergences |\n|---|---:|---:|---:|---:|")
        for env_id in arguments.env_ids:
            counts = stability(env_id, arguments.compare_envs, arguments.n_threads, arguments.stability)
            print(f"| {env_id} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)
        return
    if arguments.compare_envs not in arguments.n_envs:
        parser.error(f"--compare-envs {arguments.compare_envs} must be one of --n-envs {arguments.n_envs}")

    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _, env_id, n_envs in itertools.product(range(arguments.rounds), arguments.env_ids, arguments.n_envs):
        rounds.setdefault((env_id, n_envs), []).append(measure(env_id, n_envs, arguments))
    results = {key: {name: statistics.median(r[name] for r in runs) for name in runs[0]} for key, runs in rounds.items()}
    text = report(results, arguments)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
