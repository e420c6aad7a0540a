"""
Draw the pictures of README and documentation: each task, a GIF of each robot with a trained agent among those that come with
the package, a grid of such agents, and again, from their CSV files, the learning curves of reports. What a robot does is what
its agent does, episode by episode from seed 0. Without a screen it needs MUJOCO_GL=egl or osmesa.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from sb3_deepcrl.analysis.report import draw_learning_curves
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.registration import ENV_TABLE
from sb3_deepcrl.zoo.runs import RunFolder

DOCS = Path(__file__).resolve().parent
STATIC = DOCS / "_static"
SIZE = 300
# Of a GIF: frames, and milliseconds that each is shown
N_FRAMES, SHOWN = 160, 50
# Seconds of the simulation from one frame to the next; an ant has far to go
SECONDS, SECONDS_OF_ANTS = 0.1, 1.0
# Frames over which the way of a robot in a maze is drawn behind it
TRAIL = 12
# After how many env steps at the goal, or frames without reaching it, the next episode begins
STEPS_AT_GOAL, MAX_FRAMES = 8, 50
# Reports that show learning curves
CURVES = ("depth_Point*", "baselines_*", "departures", "learning", "precision")
# Rows of the grid
GRID = (("PointBigMaze-v0", "PointU4Maze-v0", "FetchReach-v4"),)
ROBOTS = {"point": "PointBigMaze-v0", "ant": "AntHardestMaze-v0", "fetch": "FetchReach-v4"}


def has_maze(env_id: str) -> bool:
    """Whether the task is one of this package in a maze."""
    return "maze" in ENV_TABLE.get(env_id, {})


def make_env(env_id: str) -> gym.Env:
    """Make an env that draws its whole maze, or the robot where there is none."""
    own = {"camera": "top_down" if has_maze(env_id) else "follow", "goal": "resample"} if env_id in ENV_TABLE else {}
    return gym.make(find_spec(env_id), render_mode="rgb_array", width=SIZE, height=SIZE, **own)


def draw_trail(picture: np.ndarray, positions: Sequence[np.ndarray], bounds: Any) -> np.ndarray:
    """Draw where a robot has been into a picture of its maze, which has x run down and y to the right."""
    low, high = np.array(bounds)
    # As the top-down camera does
    pixels = SIZE * (0.5 + (np.array(positions) - (low + high) / 2) / (1.05 * (high - low).max()))
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).line([(y, x) for x, y in pixels], fill=(204, 51, 40), width=3)
    return np.array(image)


def frames(env_id: str) -> Iterator[np.ndarray]:
    """Yield pictures of the trained agent without an end, each of shape (SIZE, SIZE, 3)."""
    model = RunFolder.pretrained("deepcrl", env_id).load_model()
    env = make_env(env_id)
    steps_of_frame = round(
        (SECONDS_OF_ANTS if env_id.startswith("Ant") else SECONDS) / getattr(env.unwrapped, "task", env.unwrapped).dt
    )
    observation, _ = env.reset(seed=0)
    trail: deque[np.ndarray] = deque(maxlen=TRAIL)
    n_steps = n_at_goal = 0
    while True:
        if n_steps % steps_of_frame == 0:
            trail.append(observation["achieved_goal"][:2])
            picture = env.render()
            yield draw_trail(picture, trail, env.unwrapped.task.scene.bounds) if has_maze(env_id) else picture
        observation, _, terminated, truncated, info = env.step(model.predict(observation, deterministic=True)[0])
        n_steps, n_at_goal = n_steps + 1, n_at_goal + int(info["is_success"])
        if terminated or truncated or n_at_goal == STEPS_AT_GOAL or n_steps == MAX_FRAMES * steps_of_frame:
            observation, _ = env.reset()
            n_steps = n_at_goal = 0
            trail.clear()


def save_gif(path: Path, pictures: list[np.ndarray]) -> None:
    """Save a GIF, all of whose frames share their colors, so that it is small where nothing moves."""
    # So that small things keep their colors too
    palette = Image.fromarray(np.concatenate(pictures[:: len(pictures) // 8])).quantize(256, Image.Quantize.MAXCOVERAGE)
    images = [Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    images[0].save(path, save_all=True, append_images=images[1:], duration=SHOWN, loop=0)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def draw_curves(path: Path) -> None:
    """Draw the learning curves of a report again, given its CSV file."""
    rows = pd.read_csv(path)
    results = {
        str(label): [{str(name): column.to_numpy() for name, column in seed.items()} for _, seed in of_label.groupby("seed")]
        for label, of_label in rows.groupby("setting", sort=False)
    }
    figure = draw_learning_curves(results, is_ordered=all(label[-1:].isdigit() for label in results))
    title = path.with_suffix(".md").read_text().splitlines()[0].removeprefix("# ")
    n_seeds = rows["seed"].nunique()
    figure.suptitle(f"{title}: {'interquartile ' * (n_seeds > 3)}means of {n_seeds} seeds, 95 % intervals")
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    (STATIC / "tasks").mkdir(parents=True, exist_ok=True)
    for env_id in ENV_TABLE:
        if "Eval" not in env_id:
            env = make_env(env_id)
            env.reset(seed=0)
            Image.fromarray(env.render()).save(STATIC / "tasks" / f"{env_id}.png", optimize=True)
            env.close()
    films = {env_id: list(islice(frames(env_id), N_FRAMES)) for row in (*GRID, ROBOTS.values()) for env_id in row}
    for robot, env_id in ROBOTS.items():
        save_gif(STATIC / f"{robot}.gif", films[env_id])
    rows = [np.concatenate([films[env_id] for env_id in row], axis=2) for row in GRID]
    save_gif(STATIC / "robots.gif", list(np.concatenate(rows, axis=1)))
    for pattern in CURVES:
        for path in (DOCS / "results").glob(f"{pattern}.csv"):
            draw_curves(path)


if __name__ == "__main__":
    main()
