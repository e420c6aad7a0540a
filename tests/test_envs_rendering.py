import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

from sb3_deepcrl.envs import BatchVecEnv, plot_maze, register_envs
from sb3_deepcrl.envs.layouts import make_layout

register_envs()
plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("Agg")


def can_render() -> bool:
    """Rendering needs a graphics library that MuJoCo chooses at import: try it in a process of its own."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ).returncode == 0


needs_rendering = pytest.mark.skipif(not can_render(), reason="MuJoCo cannot render here: set MUJOCO_GL=egl or osmesa")


def green(picture):
    """Pixels of the goal marker."""
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return (green > red + 40) & (green > blue + 40)


@needs_rendering
@pytest.mark.parametrize("env_id", ["PointU4Maze-v0", "AntBigMaze-v0"])
def test_top_down_picture_reads_as_the_text(env_id):
    env = gym.make(env_id, render_mode="rgb_array", camera="top_down", width=400, height=400)
    env.reset(seed=0)
    layout, size = env.unwrapped.task.scene.layout, env.unwrapped.task.scene.cell_size
    n_rows, n_columns = layout.shape
    for row, column in (layout.goals[0], layout.goals[-1]):
        env.unwrapped.goal = [row * size, column * size]
        picture = env.render()
        assert picture.shape == (400, 400, 3) and picture.dtype == np.uint8
        pixels = np.argwhere(green(picture))
        assert len(pixels) > 20
        # The picture is centered on the maze and shows a little more than its longer side
        cell = 400 / 1.05 / max(n_rows, n_columns)
        expected = 200 + (np.array([row - (n_rows - 1) / 2, column - (n_columns - 1) / 2])) * cell
        assert np.abs(pixels.mean(axis=0) - expected).max() < 0.35 * cell
    env.close()


@needs_rendering
def test_follow_camera_keeps_the_robot_in_the_middle():
    env = gym.make("PointU4Maze-v0", render_mode="rgb_array", width=200, height=100)
    for start in ([4.0, 2.0], [2.0, 6.0]):
        env.reset(seed=0, options={"start": start, "goal": [10.0, 6.0]})
        picture = env.render()
        assert picture.shape == (100, 200, 3)
        # The ball is the only thing that is much more red than green
        pixels = np.argwhere(picture[..., 0] > 2 * picture[..., 1].astype(int))
        assert len(pixels) > 10 and np.abs(pixels.mean(axis=0) - [50, 100]).max() < 5
    env.close()


@needs_rendering
def test_batch_pictures():
    vec_env = BatchVecEnv("HumanoidUMaze-v0", 3, render_mode="rgb_array", camera="top_down", width=64, height=48)
    vec_env.seed(0)
    vec_env.reset()
    images = vec_env.get_images()
    assert [image.shape for image in images] == [(48, 64, 3)] * 3
    vec_env.set_attr("goal", [6.0, 2.0, 1.25], indices=[0])
    vec_env.set_attr("goal", [2.0, 6.0, 1.25], indices=[1])
    assert (vec_env.get_images()[0] != vec_env.get_images()[1]).any()
    np.testing.assert_array_equal(vec_env.env_method("render", indices=[1])[0], vec_env.get_images()[1])
    # SB3 tiles them
    assert vec_env.render().shape == (96, 128, 3)
    single = gym.make("HumanoidUMaze-v0", render_mode="rgb_array", camera="top_down", width=64, height=48)
    single.reset(seed=0, options={"goal": [6.0, 2.0, 1.25]})
    # The same picture, but for the random specks in the texture of Gymnasium's model
    np.testing.assert_allclose(single.render().astype(int), vec_env.get_images()[0].astype(int), atol=20)
    vec_env.close()
    single.close()


def test_no_picture_without_render_mode():
    vec_env = BatchVecEnv("AntU4Maze-v0", 2)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert vec_env.get_images() == [None, None]
    env = gym.make("AntU4Maze-v0").unwrapped
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems need no display server")
def test_headless_error_names_the_fix():
    code = (
        "import gymnasium as gym; from sb3_deepcrl.envs import register_envs; register_envs();"
        "env = gym.make('PointUMaze-v0', render_mode='rgb_array'); env.reset(); env.render()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MUJOCO_GL": "glfw"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode != 0
    assert "MUJOCO_GL to 'egl' or 'osmesa'" in run.stderr and "libosmesa6" in run.stderr


@pytest.mark.parametrize("face", ["single", "batch", "layout"])
def test_plot_maze(face):
    env = {
        "single": lambda: gym.make("AntU4MazeEval-v0"),
        "batch": lambda: BatchVecEnv("AntU4MazeEval-v0", 3),
        "layout": lambda: make_layout("u4"),
    }[face]()
    size = 1 if face == "layout" else 4
    if face != "layout":
        # Before the first episode there is no goal
        assert "goal" not in {collection.get_label() for collection in plot_maze(env).collections}
        env.reset()
    ax = plot_maze(env, [np.array([[2.0, 1.0], [1.0, 1.0]]) * size, np.ones((3, 2)) * size])
    # Rows run down, columns to the right
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert ax.get_xlim() == (-0.5 * size, 4.5 * size) and ax.get_ylim() == (6.5 * size, -0.5 * size)
    layout = make_layout("u4")
    for i, row in enumerate(layout.rows):
        for j, kind in enumerate(row):
            point = (j * size, i * size)
            walls = [patch for patch in ax.patches if patch.get_x() < point[0] < patch.get_x() + patch.get_width()
                     and patch.get_y() < point[1] < patch.get_y() + patch.get_height()]  # fmt: skip
            assert len(walls) == (kind == "#")
    drawn = {collection.get_label(): collection.get_offsets().tolist() for collection in ax.collections}
    assert drawn["start cells"] == [[1 * size, 2 * size]]
    goals = layout.goals if face == "layout" else layout.eval_goals
    assert sorted(drawn["goal cells"]) == sorted([[j * size, i * size] for i, j in goals.tolist()])
    if face != "layout":
        assert len(drawn["goal"]) == (3 if face == "batch" else 1)
        assert all(goal in drawn["goal cells"] for goal in drawn["goal"])
    assert ax.lines[0].get_xydata().tolist() == [[size, 2 * size], [size, size]]
    assert drawn["trajectory start"] == [[size, 2 * size]]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["goal cells", "start cells", *(["goal"] if face != "layout" else []), "trajectory", "trajectory start"]
    plt.close(ax.figure)


def test_plot_maze_by_name_with_one_trajectory():
    ax = plot_maze("u4", np.array([[2.0, 1.0], [1.0, 1.0]]))
    assert ax.lines[0].get_xydata().tolist() == [[1, 2], [1, 1]] and len(ax.lines) == 1
    plt.close(ax.figure)


def test_plot_maze_needs_a_maze():
    for env_id in ("AntGoal-v0", "CartPole-v1"):
        with pytest.raises(ValueError, match="has no maze to draw"):
            plot_maze(gym.make(env_id))
