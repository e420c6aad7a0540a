"""
Train DeepCRL on a goal-conditioned env and look at what it learned.

    python -m sb3_deepcrl --env PointMaze_UMaze-v3 --depth 8 --steps 40000
"""

import argparse
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.env_util import make_vec_env

from sb3_deepcrl.common.callbacks import TrainingDisplay
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs.wrappers import SuccessInfoWrapper


def positive_int(text: str) -> int:
    """
    :param text: Argument of the command line
    :return: The number
    :raises argparse.ArgumentTypeError: if it is not a positive integer
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: Arguments of the command line
    :return: The parsed arguments
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_deepcrl",
        description=__doc__.split("\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--env", default="PointMaze_UMaze-v3", help="id of a goal-conditioned env")
    parser.add_argument("--steps", type=positive_int, default=40_000, help="number of env steps")
    parser.add_argument("--depth", type=int, default=8, help="layers in the residual blocks, a multiple of 4")
    parser.add_argument("--batch-size", type=int, default=256, help="size of a minibatch")
    parser.add_argument("--n-envs", type=positive_int, default=16, help="number of parallel envs")
    parser.add_argument("--eval-episodes", type=positive_int, default=50, help="number of evaluation episodes at the end")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for the model and the picture")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: Arguments of the command line
    """
    args = parse_args(argv)
    console = Console()

    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)

    try:
        env = make_vec_env(args.env, args.n_envs, seed=args.seed, wrapper_class=SuccessInfoWrapper)
        model = DeepCRL("MultiInputPolicy", env, depth=args.depth, batch_size=args.batch_size, seed=args.seed)
    except (ValueError, gym.error.Error) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    console.print(f"DeepCRL of depth {args.depth} on {args.env}, {args.n_envs} envs, device {model.device}")

    model_path = args.output / f"{args.env}.zip"
    display = TrainingDisplay(console=console)
    start = time.monotonic()
    try:
        model.learn(args.steps, callback=display)
    except KeyboardInterrupt:
        console.print("Interrupted: the model is saved as it is now, and evaluated")
    finally:
        seconds = time.monotonic() - start
        display.stop()
        model.save(model_path)

    eval_env = make_vec_env(args.env, args.n_envs, seed=args.seed + 1000, wrapper_class=SuccessInfoWrapper)
    means = mean_of_episodes(evaluate_goals(model, eval_env, args.eval_episodes))
    table = Table(title=f"{args.eval_episodes} evaluation episodes after {model.num_timesteps} env steps, {seconds:.0f} s")
    for column in ("success", "success at the last step", "time at goal", "mean distance"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{100 * means['success_any']:.0f} %",
        f"{100 * means['success_last']:.0f} %",
        f"{means['time_at_goal']:.0f} of {means['episode_length']:.0f} steps",
        f"{means['mean_distance']:.2f}",
    )
    console.print(table)
    console.print(f"Model: {model_path}")

    picture = save_value_map(model, args.env, args.output / f"{args.env}-value.png", console)
    if picture is not None:
        console.print(f"Value over the maze: {picture}")


def save_value_map(model: DeepCRL, env_id: str, path: Path, console: Console) -> Path | None:
    """
    :param model: The trained model
    :param env_id: Id of the env it was trained on
    :param path: Where to save the picture
    :param console: Where to say why there is none
    :return: The path, or None if there is no picture
    """
    from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map

    env = gym.make(env_id)
    try:
        maze = MazeMap.from_env(env)
    except ValueError as error:
        console.print(f"No picture: {error}")
        return None
    # The first free cell is the end of a corridor in most mazes
    row, column = np.argwhere(~maze.walls)[0]
    goal = maze.centers(row, column)
    try:
        import matplotlib
    except ImportError:
        console.print("No picture: matplotlib is not installed (`pip install matplotlib`)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    plot_value_map(model, env, goal, seed=0, ax=ax)
    ax.set_title(f"{env_id}: learned value and policy")
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
