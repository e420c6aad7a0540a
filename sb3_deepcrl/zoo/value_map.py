"""
Draws what a model of a run has learned: its value over the maze, for one goal, and the actions that it takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import how_to_write, is_for_user
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.zoo.checkpoints import RunLoader, saved_env_kwargs
from sb3_deepcrl.zoo.launcher import DEFAULT_ENV, picture


def env_of_run(config: Path, env_id: str) -> tuple[VecEnv, gym.Env]:
    """
    :param config: Folder with the ``config.yml`` and ``args.yml`` of a run
    :param env_id: Id of its env
    :return: One env with the arguments, wrappers and ``VecNormalize`` statistics of the run, and the same without statistics
    :raises ValueError: if the model sees something else than what the env gives, but for statistics
    """
    with patch.object(yaml, "UnsafeLoader", RunLoader):
        hyperparams, stats_path = get_saved_hyperparams(str(config), test_mode=True)
    for key in ("frame_stack", "vec_env_wrapper"):
        if hyperparams.get(key):
            raise ValueError(f"the run has `{key}: {hyperparams[key]}`: what its model sees cannot be placed on a map")
    env_kwargs = saved_env_kwargs(config)
    vec_env = create_test_env(
        env_id, stats_path=stats_path, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs
    )
    base = vec_env.unwrapped
    assert isinstance(base, DummyVecEnv)
    return vec_env, base.envs[0]


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: Arguments of the command line
    """
    end_start()
    parser = argparse.ArgumentParser(prog="sb3-deepcrl value_map", description=__doc__.strip())
    parser.add_argument("--env", help="Environment ID", type=EnvironmentName, default=EnvironmentName(DEFAULT_ENV))
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest, -1: no exp folder)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load best model instead of last model if available")
    parser.add_argument(
        "--goal", nargs=2, type=float, metavar=("X", "Y"), help="Goal in metres, by default in the first free cell"
    )
    parser.add_argument("-o", "--output", type=picture, help="Picture, by default value.png in the folder of the run")
    args = parser.parse_args(argv)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    try:
        args.env = EnvironmentName(find_spec(args.env.gym_id).id)
        _, model_path, log_path = get_model_path(args.exp_id, args.folder, "deepcrl", args.env, args.load_best)
        vec_env, env = env_of_run(Path(log_path) / args.env, args.env.gym_id)
        maze = MazeMap.from_env(env)
        # The first free cell is the end of a corridor in most mazes
        goal = maze.centers(*np.argwhere(~maze.walls)[0]) if args.goal is None else np.array(args.goal)
        plot_value_map(DeepCRL.load(model_path, env=vec_env, buffer_size=1), env, goal, seed=0, ax=ax)
        vec_env.close()
    except Exception as error:
        if not is_for_user(error):
            raise
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    ax.set_title(f"{args.env.gym_id}: learned value and policy")
    output = args.output or Path(log_path) / "value.png"
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        if (advice := how_to_write(error, vars(args).values())) is None:
            raise
        parser.exit(2, f"{parser.prog}: error: {error}: {advice}\n")
    print(f"Value over the maze: {output}")


if __name__ == "__main__":
    main()
