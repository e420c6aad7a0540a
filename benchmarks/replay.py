"""
Time to sample a transition and bytes to store one, beside SB3's HerReplayBuffer, at the sizes of AntMaze.

    python benchmarks/replay.py --output docs/results/replay.md
"""

import os
from collections.abc import Callable
from timeit import timeit
from typing import Any

import numpy as np
from gymnasium import spaces
from harness import make_parser, medians, write_report
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer

from sb3_deepcrl import ContrastiveReplayBuffer
from sb3_deepcrl.common.utils import processor

# Those of AntMaze_UMaze-v5
GOAL = spaces.Box(-np.inf, np.inf, (2,), np.float64)
OBSERVATION = spaces.Box(-np.inf, np.inf, (105,), np.float64)
OBSERVATION_SPACE = spaces.Dict(observation=OBSERVATION, achieved_goal=GOAL, desired_goal=GOAL)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (8,), np.float32)
EPISODE_LENGTH = 700
N_ENVS, BATCH_SIZE, GRADIENT_STEPS = 16, 512, 40


class AntMazeReward:
    """What HerReplayBuffer asks its envs for."""

    def env_method(self, method_name: str, achieved_goal: np.ndarray, desired_goal: np.ndarray, *_: Any, **__: Any) -> list:
        return [(np.linalg.norm(achieved_goal - desired_goal, axis=-1) <= 0.45).astype(np.float64)]


def stored_bytes(buffer: DictReplayBuffer) -> int:
    """Bytes of all arrays of a buffer; Python objects in them (the info dicts of HerReplayBuffer) are not even counted."""
    values = [value for name, value in vars(buffer).items() if name != "_env_indices"]
    arrays = [array for value in values for array in (value.values() if isinstance(value, dict) else [value])]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def main() -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--size", type=int, default=200_000, help="transitions in the buffers")
    args = parser.parse_args()

    kwargs: dict[str, Any] = dict(device="cpu", n_envs=N_ENVS)
    ours = ContrastiveReplayBuffer(args.size, OBSERVATION_SPACE, ACTION_SPACE, **kwargs)
    her = HerReplayBuffer(args.size, OBSERVATION_SPACE, ACTION_SPACE, env=AntMazeReward(), **kwargs)
    rng = np.random.default_rng(0)

    def observe() -> dict[str, np.ndarray]:
        return {key: rng.standard_normal((N_ENVS, *space.shape)) for key, space in OBSERVATION_SPACE.items()}

    obs, actions, rewards = observe(), np.zeros((N_ENVS, 8)), np.zeros(N_ENVS)
    for step in range(1, args.size // N_ENVS + 1):
        next_obs, is_done = observe(), step % EPISODE_LENGTH == 0
        for buffer in (ours, her):
            infos = [{"TimeLimit.truncated": is_done} for _ in range(N_ENVS)]
            buffer.add(obs, next_obs, actions, rewards, np.full(N_ENVS, is_done), infos)
        obs = next_obs

    n_samples = GRADIENT_STEPS * BATCH_SIZE
    ways: dict[str, Callable[[], Any]] = {
        "HerReplayBuffer.sample, all at once": lambda: her.sample(n_samples),
        "HerReplayBuffer.sample, minibatch by minibatch (as SAC does)": lambda: [
            her.sample(BATCH_SIZE) for _ in range(GRADIENT_STEPS)
        ],
        "ContrastiveReplayBuffer.sample, all at once": lambda: ours.sample(n_samples),
        "ContrastiveReplayBuffer.sample_contrastive, all at once (as DeepCRL does)": lambda: ours.sample_contrastive(
            n_samples
        ),
    }
    # In turn, so that what else the machine does hits all of them alike
    seconds = [{name: timeit(sample, number=1) for name, sample in ways.items()} for _ in range(args.rounds)]
    microseconds = {name: 1e6 * median / n_samples for name, median in medians(seconds).items()}
    sizes = {type(buffer).__name__: stored_bytes(buffer) / args.size for buffer in (her, ours)}

    def table(title: str, unit: str, values: dict[str, float]) -> list[dict[str, str]]:
        first = next(iter(values.values()))
        return [{title: name, unit: f"{value:.4g}", "ratio": f"{value / first:.3f}"} for name, value in values.items()]

    note = (
        f"Sampling {GRADIENT_STEPS} x {BATCH_SIZE} transitions out of {args.size:,}, observations of 105 + 2 + 2 float64, "
        f"8 actions; medians of {args.rounds} rounds. Machine: {processor()}, {os.cpu_count()} cores."
    )
    tables = [table("sampling", "microseconds a transition", microseconds), table("storing", "bytes a transition", sizes)]
    write_report("Replay buffers at the sizes of AntMaze", note, tables, args.output)


if __name__ == "__main__":
    main()
