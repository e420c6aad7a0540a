"""
Time to sample a transition and bytes to store one, beside SB3's HerReplayBuffer, at the sizes of AntMaze.

    python benchmarks/replay.py --output docs/results/replay.md
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import ContrastiveReplayBuffer
from sb3_deepcrl.common.utils import processor


class AntMazeSizes(gym.Env):
    """Observations and actions of the sizes of AntMaze_UMaze-v5, and its reward, without the physics."""

    def __init__(self) -> None:
        goal = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        observation = spaces.Box(-np.inf, np.inf, (105,), np.float64)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)
        self.action_space = spaces.Box(-1.0, 1.0, (8,), np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        values = self.np_random.standard_normal(107)
        return {"observation": values[:105], "achieved_goal": values[105:], "desired_goal": np.zeros(2)}

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        return self._observation(), 0.0, False, self.steps == 700, {"TimeLimit.truncated": False}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info) -> np.ndarray:
        return (np.linalg.norm(achieved_goal - desired_goal, axis=-1) <= 0.45).astype(np.float64)


def stored_bytes(buffer: DictReplayBuffer) -> int:
    """Bytes of all arrays of a buffer; Python objects in them (the info dicts of HerReplayBuffer) are not even counted."""
    values = [value for name, value in vars(buffer).items() if name != "_env_indices"]
    arrays = [array for value in values for array in (value.values() if isinstance(value, dict) else [value])]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200_000, help="transitions in the buffer")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--gradient-steps", type=int, default=40, help="minibatches that are drawn at once")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--output", type=Path, help="file for the tables (they are always printed)")
    args = parser.parse_args()

    env = DummyVecEnv([AntMazeSizes for _ in range(args.n_envs)])
    env.seed(0)
    spaces_and_envs = (env.observation_space, env.action_space)
    ours = ContrastiveReplayBuffer(args.size, *spaces_and_envs, device="cpu", n_envs=args.n_envs)
    her = HerReplayBuffer(args.size, *spaces_and_envs, env=env, device="cpu", n_envs=args.n_envs)
    actions = np.zeros((args.n_envs, 8), dtype=np.float32)
    obs = env.reset()
    for _ in range(args.size // args.n_envs):
        next_obs, rewards, dones, infos = env.step(actions)
        after = {key: values.copy() for key, values in next_obs.items()}
        for key, index in itertools.product(after, np.flatnonzero(dones)):
            after[key][index] = infos[index]["terminal_observation"][key]
        for buffer in (ours, her):
            buffer.add(obs, after, actions, rewards, dones, infos)
        obs = next_obs

    n_samples = args.gradient_steps * args.batch_size

    def her_minibatches() -> None:
        # How SAC uses it: one call for each minibatch
        for _ in range(args.gradient_steps):
            her.sample(args.batch_size)

    ways = {
        "HerReplayBuffer.sample, all at once": lambda: her.sample(n_samples),
        "HerReplayBuffer.sample, minibatch by minibatch (as SAC does)": her_minibatches,
        "ContrastiveReplayBuffer.sample, all at once": lambda: ours.sample(n_samples),
        "ContrastiveReplayBuffer.sample_contrastive, all at once (as DeepCRL does)": lambda: ours.sample_contrastive(
            n_samples
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # In turn, so that what else the machine does hits all of them alike
    for _ in range(args.repeat):
        for name, sample in ways.items():
            start = time.perf_counter()
            sample()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: 1e6 * float(np.median(values)) / n_samples for name, values in seconds.items()}
    sizes = {type(buffer).__name__: stored_bytes(buffer) / args.size for buffer in (her, ours)}

    lines = [
        "# Replay buffers at the sizes of AntMaze",
        "",
        f"Command: `python benchmarks/replay.py {' '.join(sys.argv[1:])}`: {args.gradient_steps} x {args.batch_size} "
        f"transitions out of {args.size:,}, observations of 105 + 2 + 2 float64, 8 actions; medians. "
        f"Machine: {processor()}, {os.cpu_count()} cores.",
    ]
    for title, unit, values in (("sampling", "microseconds", medians), ("storing", "bytes", sizes)):
        reference = next(iter(values.values()))
        lines += ["", f"| {title} | {unit} a transition | ratio |", "|---|---|---|"]
        lines += [f"| {name} | {value:.4g} | {value / reference:.3f} |" for name, value in values.items()]
    report = "\n".join([*lines, ""])
    print(report)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(report)


if __name__ == "__main__":
    main()
