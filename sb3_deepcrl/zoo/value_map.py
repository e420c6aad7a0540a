"""
Draws what a model of a run has learned: its value over the maze, for one goal, and the actions that it takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import get_model_path

from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.zoo.checkpoints import saved_env_kwargs
from sb3_deepcrl.zoo.launcher import DEFAULT_ENV


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: Arguments of the command line
    """
    parser = argparse.ArgumentParser(prog="sb3-deepcrl value_map", description=__doc__.strip())
    parser.add_argument("--env", help="Environment ID", type=EnvironmentName, default=EnvironmentName(DEFAULT_ENV))
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest, -1: no exp folder)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load best model instead of last model if available")
    parser.add_argument(
        "--goal", nargs=2, type=float, metavar=("X", "Y"), help="Goal in metres, by default in the first free cell"
    )
    parser.add_argument("-o", "--output", type=Path, help="Picture, by default value.png in the folder of the run")
    args = parser.parse_args(argv)
    try:
        _, model_path, log_path = get_model_path(args.exp_id, args.folder, "deepcrl", args.env, args.load_best)
        env = gym.make(args.env.gym_id, **saved_env_kwargs(Path(log_path) / args.env))
        maze = MazeMap.from_env(env)
    except (AssertionError, ValueError, gym.error.Error) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    # The first free cell is the end of a corridor in most mazes
    goal = maze.centers(*np.argwhere(~maze.walls)[0]) if args.goal is None else np.array(args.goal)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    plot_value_map(DeepCRL.load(model_path, buffer_size=1), env, goal, seed=0, ax=ax)
    ax.set_title(f"{args.env.gym_id}: learned value and policy")
    output = args.output or Path(log_path) / "value.png"
    figure.savefig(output, dpi=150)
    print(f"Value over the maze: {output}")


if __name__ == "__main__":
    main()
