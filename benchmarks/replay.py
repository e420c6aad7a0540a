"""
Time to sample a transition and bytes to store one, beside SB3's HerReplayBuffer, at the sizes of AntMaze.

    python benchmarks/replay.py
"""

import argparse
import os
import platform
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import ContrastiveReplayBuffer


class AntMazeSizes(gym.Env):
    """
    Observations and actions of the sizes of AntMaze_UMaze-v5, and its reward, without the physics.

    :param max_steps: Length of an episode
    """

    def __init__(self, max_steps: int = 700):
        goal = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        observation = spaces.Box(-np.inf, np.inf, (105,), np.float64)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)
        self.action_space = spaces.Box(-1.0, 1.0, (8,), np.float32)
        self.max_steps = max_steps

    def _observation(self) -> dict[str, np.ndarray]:
        values = self.np_random.standard_normal(107)
        return {"observation": values[:105], "achieved_goal": values[105:], "desired_goal": np.zeros(2)}

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        return self._observation(), 0.0, False, self.steps == self.max_steps, {"TimeLimit.truncated": False}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info) -> np.ndarray:
        return (np.linalg.norm(achieved_goal - desired_goal, axis=-1) <= 0.45).astype(np.float64)


def fill(buffer: DictReplayBuffer, env: DummyVecEnv, n_steps: int) -> None:
    """
    :param buffer: The buffer to fill
    :param env: Where the transitions come from
    :param n_steps: Number of steps in each env
    """
    obs = env.reset()
    actions = np.zeros((env.num_envs, 8), dtype=np.float32)
    for _ in range(n_steps):
        new_obs, rewards, dones, infos = env.step(actions)
        next_obs = {key: values.copy() for key, values in new_obs.items()}
        for index in np.flatnonzero(dones):
            for key in next_obs:
                next_obs[key][index] = infos[index]["terminal_observation"][key]
        buffer.add(obs, next_obs, actions, rewards, dones, infos)
        obs = new_obs


def stored_bytes(buffer: DictReplayBuffer) -> int:
    """
    :param buffer: A buffer
    :return: Bytes of all its arrays; Python objects in them (the info dicts of HerReplayBuffer) are not even counted
    """
    arrays = []
    for name, value in vars(buffer).items():
        if name != "_env_indices":
            arrays.extend(value.values() if isinstance(value, dict) else [value])
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200_000, help="transitions in the buffer")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--gradient-steps", type=int, default=40, help="minibatches that are drawn at once")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()

    env = DummyVecEnv([AntMazeSizes for _ in range(args.n_envs)])
    env.seed(0)
    spaces_and_envs = (env.observation_space, env.action_space)
    ours = ContrastiveReplayBuffer(args.size, *spaces_and_envs, device="cpu", n_envs=args.n_envs)
    her = HerReplayBuffer(args.size, *spaces_and_envs, env=env, device="cpu", n_envs=args.n_envs)
    for buffer in (ours, her):
        fill(buffer, env, args.size // args.n_envs)

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
    reference = medians["HerReplayBuffer.sample, all at once"]
    sizes = {type(buffer).__name__: stored_bytes(buffer) / args.size for buffer in (her, ours)}

    report = "\n".join(
        [
            "# Replay buffers at the sizes of AntMaze",
            "",
            f"Command: `python benchmarks/replay.py --size {args.size} --n-envs {args.n_envs} --batch-size {args.batch_size} "
            f"--gradient-steps {args.gradient_steps} --repeat {args.repeat}`: {args.gradient_steps} x {args.batch_size} "
            f"transitions out of {args.size:,}, observations of 105 + 2 + 2 float64, 8 actions; medians. "
            f"Machine: {platform.machine()}, {os.cpu_count()} cores.",
            "",
            "| sampling | microseconds a transition | ratio |",
            "|---|---|---|",
            *(f"| {name} | {value:.3f} | {value / reference:.3f} |" for name, value in medians.items()),
            "",
            "| storing | bytes a transition | ratio |",
            "|---|---|---|",
            *(f"| {name} | {value:.0f} | {value / sizes['HerReplayBuffer']:.3f} |" for name, value in sizes.items()),
            "",
        ]
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "replay.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
