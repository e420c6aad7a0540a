"""
The command ``sb3-deepcrl value_map``: draws what the model of a run has learned, its value over the maze for one goal and the
actions that it takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from stable_baselines3.common.vec_env import VecFrameStack, is_vecenv_wrapped

from sb3_deepcrl.analysis import MazeMap, plot_value_map
from sb3_deepcrl.analysis.report import new_figure
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import how_to_write, is_for_user
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.zoo.launcher import DEFAULT_ENV
from sb3_deepcrl.zoo.runs import RunFolder


def draw_run(run: RunFolder, goal: Sequence[float] | None = None, output: Path | None = None) -> Path:
    """Draw the learned value of a run for a goal in meters, by default in the first free cell."""
    known = FigureCanvasBase.get_supported_filetypes()
    if output is not None and output.suffix and not output.is_dir() and output.suffix[1:].lower() not in known:
        raise ValueError(f"{output} has the suffix of no picture: use one of {', '.join(sorted(known))}")
    vec_env = run.make_env()
    if is_vecenv_wrapped(vec_env, VecFrameStack):
        raise ValueError(f"{run.path} has `frame_stack`: what its model sees cannot be placed on a map")
    model, (env,) = run.load_model(vec_env), vec_env.unwrapped.envs  # type: ignore[attr-defined]
    assert isinstance(model, DeepCRL)
    figure, axes = new_figure(width=6, height=5)
    # The first free cell is the end of a corridor in most mazes
    goal = MazeMap.from_env(env).places()[0] if goal is None else goal
    ax = plot_value_map(model, env, goal, seed=0, ax=axes[0, 0])
    vec_env.close()
    ax.set_title(f"{run.args()['env']}: learned value and policy")
    output = output or run.path / "value.png"
    output = output / "value.png" if output.is_dir() else output if output.suffix else output.with_suffix(".png")
    if not output.parent.exists():
        output.parent.mkdir(parents=True)
    figure.savefig(output, dpi=150)
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    end_start()
    parser = argparse.ArgumentParser(prog="sb3-deepcrl value_map", description="Draw the learned value of a run.")
    parser.add_argument("--env", help="Environment ID", default=DEFAULT_ENV)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--pretrained", action="store_true", help="Take the agent that comes with sb3_deepcrl")
    parser.add_argument("--goal", nargs=2, type=float, metavar=("X", "Y"), help="Goal, by default in the first free cell")
    parser.add_argument("-o", "--output", type=Path, help="Picture, by default value.png in the run's folder")
    args = parser.parse_args(argv)
    try:
        env_id = find_spec(args.env).id
        run = RunFolder.pretrained("deepcrl", env_id) if args.pretrained else RunFolder.newest(args.folder, "deepcrl", env_id)
        if run is None:
            raise ValueError(f"there is no run of {args.env} in {args.folder}")
        if args.pretrained and args.output is None:
            # Nothing is written into the package
            args.output = Path("value.png")
        print(f"Value over the maze: {draw_run(run, args.goal, args.output)}")
    except Exception as error:
        message = str(error) if is_for_user(error) else how_to_write(error, [args.folder, args.output])
        if message is None:
            raise
        parser.exit(2, f"{parser.prog}: error: {message}\n")
