import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import cloudpickle
import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.robots import RELEASED, behavior
from sb3_deepcrl import envs
from sb3_deepcrl.envs import BatchVecEnv, GoalEnv, register_envs
from sb3_deepcrl.envs.registration import ENV_TABLE
from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import CLEARANCE, GoalTask

register_envs()

# One of each kind
IDS = [
    "PointUMaze-v0",
    "AntU4Maze-v0",
    "AntGoal-v0",
    "HumanoidUMaze-v0",
    "HumanoidGoal-v0",
    "ArmPushHard-v0",
    "ArmBinpickHard-v0",
]
N = 4000


def drawn(task: GoalTask) -> tuple[np.ndarray, np.ndarray]:
    """Starts and goals of N resets, without simulating them."""
    return task.scene.draw(task.draw([np.random.default_rng(i) for i in range(N)])[0])


def actions(env: gym.Env, n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, *env.action_space.shape)).astype(np.float32)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*(infinity|alternative to this env):UserWarning")
def test_check_env(env_id):
    env = gym.make(env_id).unwrapped
    gymnasium_check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_registered_ids():
    # Big, Hardest and U1 to U7 for three robots, evaluation and stitching, the open field, the arm
    assert len(ENV_TABLE) == 3 * (9 + 8 + 2) + 1 + 2 + 3
    register_envs()
    for env_id in ENV_TABLE:
        assert "/" not in env_id and ":" not in env_id
        spec = gym.spec(env_id)
        assert spec.entry_point == "sb3_deepcrl.envs.goal_env:GoalEnv"
        assert spec.max_episode_steps == (150 if env_id.startswith("Point") else 1000)
    for env in (gym.make("HumanoidBigMazeEval-v0"), gym.make("HumanoidUMaze-v0", maze="Big", goal_set="eval")):
        assert len(env.unwrapped.task.scene.pairs) == 10


def test_import_is_light():
    """The ids are there before the simulator is. The package around envs is left out, it loads the learning code."""
    package = Path(envs.__file__).parent.parent
    code = (
        "import sys, types; package = sys.modules['sb3_deepcrl'] = types.ModuleType('sb3_deepcrl');"
        f"package.__path__ = [{str(package)!r}]; import sb3_deepcrl.envs as envs; envs.register_envs();"
        "assert {*envs.__all__} <= {*dir(envs)};"
        "print(sorted({'mujoco', 'matplotlib', 'torch', 'stable_baselines3'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_observation_sizes_and_control_steps():
    expected = {
        "PointUMaze-v0": (4, 2, 2, 0.1),
        "AntU4Maze-v0": (29, 2, 8, 0.05),
        "AntGoal-v0": (29, 2, 8, 0.05),
        "HumanoidUMaze-v0": (246, 3, 17, 0.015),
        "HumanoidGoal-v0": (246, 3, 17, 0.03),
        "ArmPushEasy-v0": (17, 3, 5, 0.05),
    }
    for env_id, (observation, goal, action, dt) in expected.items():
        env = gym.make(env_id).unwrapped
        assert env.observation_space["observation"].shape == (observation,)
        assert env.observation_space["desired_goal"].shape == env.observation_space["achieved_goal"].shape == (goal,)
        assert env.action_space.shape == (action,)
        assert env.task.dt == pytest.approx(dt)
        assert all(space.dtype == np.float32 for space in env.observation_space.values())


@pytest.mark.parametrize("env_id", IDS)
def test_the_goal_is_nowhere_in_the_observation(env_id):
    """Two episodes that differ in nothing but the goal: all that is observed of the robot is the same, bit for bit."""
    first, second = gym.make(env_id), gym.make(env_id)
    goal = gym.make(env_id).reset(seed=3)[0]["desired_goal"].astype(np.float64)
    other = goal + [0.05, -0.05, 0.0][: len(goal)]
    a = first.reset(seed=3, options={"goal": goal})[0]
    b = second.reset(seed=3, options={"goal": other})[0]
    for action in actions(first, 12):
        assert np.abs(a["desired_goal"] - b["desired_goal"]).max() > 0.04
        np.testing.assert_array_equal(a["observation"], b["observation"])
        np.testing.assert_array_equal(a["achieved_goal"], b["achieved_goal"])
        a, b = first.step(action)[0], second.step(action)[0]
    # Nor does a goal that is set later
    second.unwrapped.goal = goal
    np.testing.assert_array_equal(first.step(action)[0]["observation"], second.step(action)[0]["observation"])


@pytest.mark.parametrize("env_id", IDS)
def test_achieved_goal_is_the_head_of_the_observation(env_id):
    env = gym.make(env_id)
    env.reset(seed=0)
    observation = env.step(actions(env, 1)[0])[0]
    n = len(observation["achieved_goal"])
    np.testing.assert_array_equal(observation["achieved_goal"], observation["observation"][:n])
    data = env.unwrapped.simulation.data(0)
    body = "cube" if env_id.startswith("Arm") else env.unwrapped.task.robot.follow_body
    np.testing.assert_allclose(observation["achieved_goal"], data.body(body).xpos[:n], atol=1e-6)


@pytest.mark.parametrize("robot", ["humanoid", "humanoid_gymnasium", "humanoid_unscaled"])
def test_humanoid_observation_is_that_of_serial_physics(robot):
    """Positions and velocities are those after the step, inertia and velocity rows those of its last physics step."""
    env = gym.make("HumanoidUMaze-v0", robot=robot)
    env.reset(seed=0)
    for action in actions(env, 5):
        data, task = env.unwrapped.simulation.data(0), env.unwrapped.task
        observation = env.step(action)[0]["observation"]
    data.ctrl[:] = task.robot.control(action)
    mujoco.mj_step(task.model, data, task.frame_skip)
    bodies = task.robot.bodies
    forces = data.qfrc_actuator.copy()
    if robot != "humanoid_unscaled":
        # Shares of the limits of the motors, which the actions are too
        forces[task.model.jnt_dofadr[task.model.actuator_trnid[:, 0]]] = action
    parts = (data.qpos, data.qvel, data.cinert[bodies].ravel(), data.cvel[bodies].ravel(), forces)
    np.testing.assert_allclose(observation, np.concatenate(parts).astype(np.float32), rtol=1e-5, atol=1e-5)
    assert len(bodies) == 11
    assert (observation[223:229] == 0).all() and (observation[229:] != 0).all()


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_first_humanoid_observation_is_that_of_a_forward_pass(noise):
    env = gym.make("HumanoidU4Maze-v0", reset_noise_scale=noise)
    for seed in range(3):
        observation = env.reset(seed=seed)[0]["observation"]
        data, robot = env.unwrapped.simulation.data(0), env.unwrapped.task.robot
        parts = (data.cinert[robot.bodies].ravel(), data.cvel[robot.bodies].ravel())
        np.testing.assert_allclose(observation[47:223], np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_ant_contact_pairs():
    """Feet touch the floor, each other and walls; torso and hips touch walls and feet; legs touch nothing."""
    for env_id, maze in (("AntU4Maze-v0", True), ("AntGoal-v0", False)):
        model = gym.make(env_id).unwrapped.task.model

        def collide(first, second, model=model):
            a, b = model.geom(first).id, model.geom(second).id
            kind, affinity = model.geom_contype, model.geom_conaffinity
            return bool(kind[a] & affinity[b] or kind[b] & affinity[a])

        assert collide("foot_1", "floor")
        assert collide("foot_1", "foot_2") == collide("foot_1", "torso_geom") == collide("foot_1", "aux_2_geom") == maze
        for geom in ("torso_geom", "aux_1_geom", "left_leg_geom", "left_ankle_geom"):
            assert not collide(geom, "floor")
        if maze:
            assert collide("foot_1", "wall_0_0") and collide("torso_geom", "wall_0_0") and collide("aux_1_geom", "wall_0_0")
            assert not collide("left_leg_geom", "wall_0_0") and not collide("left_ankle_geom", "wall_0_0")


HUMANOID_TORQUES = [140] * 11 + [40] * 6
# Integrator, iterations, iterations of the line search, timestep, impratio
ANT_SOLVER, HUMANOID_SOLVER = ("EULER", 4, 50, 0.01, 1), ("EULER", 8, 50, 0.003, 1)
ARM_SOLVER = ("IMPLICITFAST", 6, 12, 0.002)


@pytest.mark.parametrize("env_id, solver, torques, damping", [
    ("PointUMaze-v0", ("EULER", 4, 50, 0.025, 1), [16] * 2, 4),
    ("AntU4Maze-v0", ANT_SOLVER, [150] * 8, 8),
    ("AntGoal-v0", ANT_SOLVER, [150] * 8, 8),
    ("HumanoidUMaze-v0", HUMANOID_SOLVER, HUMANOID_TORQUES, 30),
    ("HumanoidGoal-v0", HUMANOID_SOLVER, HUMANOID_TORQUES, 30),
    ("ArmPushEasy-v0", (*ARM_SOLVER, 1), None, None),
    ("ArmPushHard-v0", (*ARM_SOLVER, 1), None, None),
    ("ArmBinpickHard-v0", (*ARM_SOLVER, 10), None, None),
])  # fmt: skip
def test_compiled_physics(env_id, solver, torques, damping):
    task = gym.make(env_id).unwrapped.task
    model, option = task.model, task.model.opt
    if damping is not None:
        moved = model.dof_damping[model.jnt_dofadr[model.actuator_trnid[:, 0]]]
        np.testing.assert_array_equal(moved, np.full(model.nu, damping))
    integrator = mujoco.mjtIntegrator(option.integrator).name.removeprefix("mjINT_")
    assert (integrator, option.iterations, option.ls_iterations, option.timestep, option.impratio) == solver
    assert mujoco.mjtSolver(option.solver).name == "mjSOL_NEWTON"
    for sign in (-1, 1):
        ctrl = task.robot.control(np.full((1, task.robot.action_dim), sign, dtype=np.float32))[0]
        if torques is None:
            assert (np.abs(ctrl[[0, 1, 3, 5]]) > 0).any()
            continue
        limited = model.actuator_ctrllimited.astype(bool)
        limits = np.where(limited[:, None], model.actuator_ctrlrange, [-np.inf, np.inf])
        np.testing.assert_allclose(np.clip(ctrl, *limits.T) * model.actuator_gear[:, 0], sign * np.array(torques), rtol=1e-6)
    if torques is None:
        stiffness = [4500, 4500, 3500, 3500, 2000, 2000, 2000, 500, 500]
        np.testing.assert_array_equal(model.actuator_gainprm[:, 0], stiffness)
        np.testing.assert_array_equal(model.actuator_biasprm[:, 1:3], np.outer(stiffness, [-1, -0.1]))
        np.testing.assert_array_equal(model.actuator_forcerange[:, 1], [87] * 4 + [12] * 3 + [500] * 2)


def test_both_humanoids():
    model = gym.make("HumanoidUMaze-v0", robot="humanoid_gymnasium").unwrapped.task.model
    original = gym.make("Humanoid-v5").unwrapped.model
    for name in ("dof_damping", "jnt_stiffness", "actuator_gear", "body_mass"):
        np.testing.assert_array_equal(getattr(model, name), getattr(original, name))
    np.testing.assert_array_equal(model.body_inertia[1:], original.body_inertia[1:])
    # The released code's links have the same masses, and one moment of inertia
    paper = gym.make("HumanoidUMaze-v0").unwrapped.task.model
    moving = [i for i in range(1, paper.nbody) if not paper.body(i).name.endswith("foot")]
    np.testing.assert_array_equal(paper.body_inertia[moving], np.ones((11, 3)))
    np.testing.assert_allclose(paper.body_mass, original.body_mass)
    assert not paper.jnt_stiffness.any()


# contype, conaffinity, condim and friction by the kind of a geom
WALL = (1, 1, 3, (1.0, 0.5, 0.5))
ANT_PASSIVE, ANT_FLOOR, ANT_FOOT = ((*bits, 3, (0.8, 0.5, 0.5)) for bits in ((0, 0), (0, 1), (1, 1)))
HUMANOID = {"floor": (0, 1, 3, (1.0, 0.1, 0.1)), "wall": WALL, "": (1, 0, 3, (1.0, 0.005, 0.0001))}


@pytest.mark.parametrize("env_id, kinds", [
    ("PointUMaze-v0", {"floor": (0, 0, 3, (1.0, 0.005, 0.0001)), "wall": WALL, "ball": (1, 0, 1, (0.0, 0.0, 0.0))}),
    ("AntU4Maze-v0", {**dict.fromkeys(("floor", "torso", "aux"), ANT_FLOOR), "wall": WALL, "foot": ANT_FOOT, "": ANT_PASSIVE}),
    ("AntGoal-v0", {"floor": ANT_FLOOR, "foot": (1, 0, 3, (0.8, 0.5, 0.5)), "": ANT_PASSIVE}),
    ("HumanoidUMaze-v0", HUMANOID),
    ("HumanoidGoal-v0", HUMANOID),
    ("ArmPushHard-v0", {"": (0, 0, 3, (1.0, 0.005, 0.0001))}),
    ("ArmBinpickHard-v0", {"": (0, 0, 3, (1.0, 0.005, 0.0001))}),
])  # fmt: skip
def test_compiled_contacts(env_id, kinds):
    """Every geom collides and rubs as the first kind that its name begins with; no margin makes contacts earlier."""
    model = gym.make(env_id).unwrapped.task.model
    for i in range(model.ngeom):
        name = model.geom(i).name
        expected = next(values for kind, values in kinds.items() if name.startswith(kind))
        found = model.geom_contype[i], model.geom_conaffinity[i], model.geom_condim[i], tuple(model.geom_friction[i])
        assert found == expected, name
        assert model.geom_margin[i] == 0
    assert (model.npair > 0) == env_id.startswith("Arm")


@pytest.mark.parametrize("env_id", ["ArmPushEasy-v0", "ArmPushHard-v0", "ArmBinpickHard-v0"])
def test_arm_contact_pairs(env_id):
    model = gym.make(env_id).unwrapped.task.model
    pairs = {
        frozenset((model.geom(first).name, model.geom(second).name))
        for first, second in zip(model.pair_geom1, model.pair_geom2, strict=True)
    }
    fingers = ["left_finger", "right_finger"]
    expected = {frozenset(pair) for pair in (("cube", "table"), ("cube", "hand"), ("table", "hand"), fingers)}
    expected |= {frozenset((thing, finger)) for thing in ("cube", "table") for finger in fingers}
    if env_id == "ArmBinpickHard-v0":
        walls = [f"{side}_bin{i}" for side in ("start", "goal") for i in range(4)]
        expected |= {frozenset((wall, thing)) for wall in walls for thing in ("cube", "hand", *fingers)}
    assert pairs == expected and model.npair == len(expected)
    np.testing.assert_allclose(model.pair_friction, np.tile([1, 1, 0.005, 0.0001, 0.0001], (model.npair, 1)))
    assert (model.pair_dim == 3).all()


def test_masses():
    ant = gym.make("AntU4Maze-v0").unwrapped.task.model
    links = np.bincount(ant.body_weldid, weights=ant.body_mass)
    np.testing.assert_allclose(links[links > 0], np.ones(9))
    np.testing.assert_array_equal(ant.body_inertia[ant.body_dofnum > 0], np.ones((9, 3)))
    assert gym.make("HumanoidGoal-v0").unwrapped.task.model.body_mass.sum() == pytest.approx(42.1, abs=0.05)


@pytest.mark.parametrize("env_id, body_height", [("AntU4Maze-v0", 2.0), ("HumanoidUMaze-v0", 1.0), ("PointUMaze-v0", 1.0)])
def test_walls_stand_where_the_text_says(env_id, body_height):
    task = gym.make(env_id).unwrapped.task
    size, model = task.scene.cell_size, task.model
    walls = [i for i in range(model.ngeom) if model.geom(i).name.startswith("wall")]
    for i, row in enumerate(task.scene.layout.rows):
        for j, kind in enumerate(row):
            inside = [
                w for w in walls if (np.abs(np.array([i, j]) * size - model.geom_pos[w, :2]) < model.geom_size[w, :2]).all()
            ]
            assert len(inside) == (kind == "#")
    assert all(model.geom_pos[w, 2] + model.geom_size[w, 2] == body_height for w in walls)


def test_walls_stop_the_point():
    env = gym.make("PointUMaze-v0", reset_noise_scale=0.0)
    env.reset(options={"start": [2.0, 2.0], "goal": [2.0, 6.0]})
    for _ in range(100):
        observation = env.step(np.array([1.0, 0.0], dtype=np.float32))[0]
    # The wall of row 2 begins at x = 3, and the ball has a radius of 0.25
    assert observation["achieved_goal"] == pytest.approx([2.75, 2.0], abs=0.02)


# --- Start and goal laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["AntU4Maze-v0", "AntU4MazeEval-v0", "HumanoidBigMazeEval-v0", "PointHardestMazeEval-v0"])
def test_maze_goals_are_uniform_over_their_cells(env_id):
    task = gym.make(env_id).unwrapped.task
    layout, size = task.scene.layout, task.scene.cell_size
    cells = layout.eval_goals if "Eval" in env_id else layout.goals
    starts, goals = drawn(task)
    np.testing.assert_array_equal(starts, np.broadcast_to(layout.starts[0] * size, (N, 2)))
    centers, counts = np.unique(goals[:, :2], axis=0, return_counts=True)
    np.testing.assert_array_equal(centers, np.unique(cells * size, axis=0))
    if "Humanoid" in env_id:
        assert (goals[:, 2] == 1.25).all()
    # Five standard deviations of a binomial count
    p = 1 / len(cells)
    assert np.abs(counts - N * p).max() < 5 * np.sqrt(N * p * (1 - p))


def test_several_starts_are_uniform():
    starts, _ = drawn(GoalTask("point", maze=["######", "#r.gr#", "######"], cell_size=2))
    cells, counts = np.unique(starts, axis=0, return_counts=True)
    np.testing.assert_array_equal(cells, [[2, 2], [2, 8]])
    assert np.abs(counts - N / 2).max() < 5 * np.sqrt(N / 4)


def test_random_starts_are_uniform_over_all_pairs():
    # The free cell at the right has no way to the others, and is no goal
    maze = ["#########", "#rgg#...#", "#########"]
    starts, goals = drawn(GoalTask("point", maze=maze, cell_size=2, random_start=True))
    pairs, counts = np.unique(np.hstack((starts, goals)) / 2, axis=0, return_counts=True)
    # From the cells in columns 1 to 3 to the goals in columns 2 and 3, but for a goal that is the start
    assert pairs[:, [1, 3]].tolist() == [[1, 2], [1, 3], [2, 3], [3, 2]]
    assert np.abs(counts - N / 4).max() < 5 * np.sqrt(N * 3 / 16)


def towards_the_goal(observation) -> np.ndarray:
    """What a point does in a corridor, with or without a batch axis."""
    to_goal = observation["desired_goal"] - observation["achieved_goal"]
    return np.clip(to_goal - 0.3 * observation["observation"][..., 2:], -1, 1)


def test_a_continuing_goal_is_another_one_after_success():
    # The free cells at the right have no way to the others
    kwargs = {"robot": "point", "maze": ["#########", "#rggg#..#", "#########"], "goal": "continuing", "random_start": True}
    env, vec_env = GoalEnv(**kwargs), BatchVecEnv("PointUMaze-v0", 2, max_episode_steps=1000, **kwargs)
    vec_env.seed(4)
    batch = vec_env.reset()
    observation, _ = env.reset(seed=5)
    next_goals: dict[tuple[float, ...], set[tuple[float, ...]]] = {}
    for _ in range(900):
        goal = observation["desired_goal"]
        observation, reward, _, _, info = env.step(towards_the_goal(observation))
        batch, rewards, _, infos = vec_env.step(towards_the_goal(batch))
        # What the step led to is measured by the goal that was seen before it, and the next one is seen before the next step
        assert info["distance"] == pytest.approx(np.linalg.norm(observation["achieved_goal"] - goal), abs=1e-6)
        assert reward == info["is_success"] == info["success"] == env.compute_reward(observation["achieved_goal"], goal, {})
        np.testing.assert_array_equal(env.goal, observation["desired_goal"])
        if info["is_success"]:
            next_goals.setdefault(tuple(goal), set()).add(tuple(observation["desired_goal"]))
        else:
            np.testing.assert_array_equal(observation["desired_goal"], goal)
        # The same in a batch
        np.testing.assert_array_equal(batch["desired_goal"][1], observation["desired_goal"])
        assert rewards[1] == reward and infos[1]["distance"] == info["distance"]
    cells = {(2.0, 4.0), (2.0, 6.0), (2.0, 8.0)}
    assert next_goals == {goal: cells - {goal} for goal in cells}


@pytest.mark.parametrize("face", [DummyVecEnv, BatchVecEnv])
@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
def test_transitions_of_her_have_the_reward_of_their_goal(face, reward_type):
    """Also at the ends of episodes, and although most goals are reached at once."""
    maze = ["#####", "#rgg#", "#####"]
    kwargs = {"maze": maze, "max_episode_steps": 7, "success_threshold": 1.9, "reward_type": reward_type}
    env = make_vec_env("PointUMaze-v0", 2, seed=0, env_kwargs=kwargs, vec_env_cls=face)
    small = dict(buffer_size=1000, learning_starts=500, seed=0, device="cpu")
    model = SAC("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **small).learn(400)
    buffer = model.replay_buffer
    goals = buffer.observations["desired_goal"][:200]
    expected = env.get_attr("unwrapped")[0].compute_reward(buffer.next_observations["achieved_goal"][:200], goals, {})
    np.testing.assert_array_equal(buffer.rewards[:200], expected)
    changed = (buffer.next_observations["desired_goal"][:200] != goals).any(axis=2)
    ends = buffer.dones[:200].astype(bool)
    assert 20 < changed.sum() and (changed & ends).any()
    # What is seen after a step is what is seen before the next one
    for t, i in np.argwhere(~ends[:-1]):
        np.testing.assert_array_equal(buffer.next_observations["desired_goal"][t, i], goals[t + 1, i])


def test_the_only_goal_stays():
    env = GoalEnv(robot="point", maze=["####", "#rg#", "####"], goal="continuing")
    observation, _ = env.reset(seed=0)
    for _ in range(50):
        observation, _, _, _, info = env.step(towards_the_goal(observation))
        np.testing.assert_array_equal(observation["desired_goal"], [2, 4])
    assert info["is_success"]


@pytest.mark.parametrize("env_id", ["AntGoal-v0", "ArmPushEasy-v0"])
def test_continuing_goals_without_a_maze(env_id):
    env = gym.make(env_id, goal="continuing", success_threshold=100.0)
    observation, _ = env.reset(seed=0)
    goals = [observation["desired_goal"]] + [env.step(env.action_space.sample())[0]["desired_goal"] for _ in range(5)]
    assert len(np.unique(goals, axis=0)) == 6
    env.unwrapped.goal_mode = "resample"
    later = [env.step(env.action_space.sample())[0]["desired_goal"] for _ in range(3)]
    assert len(np.unique(later, axis=0)) == 1


def test_the_point_starts_anywhere_but_in_evaluation():
    for env_id in ("PointU4Maze-v0", "PointU4MazeEval-v0"):
        task = gym.make(env_id).unwrapped.task
        assert task.goal_mode == ("resample" if "Eval" in env_id else "continuing")
        starts, _ = drawn(task)
        cells = task.scene.layout.starts if "Eval" in env_id else task.scene.layout.free
        np.testing.assert_array_equal(np.unique(starts, axis=0), np.unique(cells * task.scene.cell_size, axis=0))


def test_a_registered_id_takes_any_maze():
    env = gym.make("AntUMaze-v0", maze=["####", "#rg#", "####"], cell_size=3.0, wall_height=0.7)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["desired_goal"], [3, 6])
    task = env.unwrapped.task
    assert task.model.geom("wall_0_0").size[2] * 2 == pytest.approx(0.7)
    assert task.scene.cell_of(observation["achieved_goal"]) == (1, 1)


def test_open_field_goals():
    _, ant = drawn(GoalTask("ant"))
    np.testing.assert_allclose(np.hypot(*ant.T), 10)
    starts, humanoid = drawn(GoalTask("humanoid"))
    assert (starts == 0).all() and (humanoid[:, 2] == 1.25).all()
    radius = np.hypot(humanoid[:, 0], humanoid[:, 1])
    assert 1 <= radius.min() < 1.01 and 4.99 < radius.max() <= 5
    # Uniform in the radius, not in the area
    assert radius.mean() == pytest.approx(3, abs=5 * 4 / np.sqrt(12 * N))
    for goals in (ant, humanoid):
        angle = np.arctan2(goals[:, 1], goals[:, 0])
        counts = np.histogram(angle, bins=8, range=(-np.pi, np.pi))[0]
        assert np.abs(counts - N / 8).max() < 5 * np.sqrt(N / 8)


@pytest.mark.parametrize(
    "table, start, goal, half",
    [
        ("push_easy", (-0.1, 0.6), (0.1, 0.6), 0.1),
        ("push_hard", (-0.25, 0.65), (0.25, 0.65), 0.25),
        ("binpick_hard", (-0.3, 0.6), (0.3, 0.6), 0.15),
    ],
)
def test_arm_starts_and_goals(table, start, goal, half):
    starts, goals = drawn(GoalTask("arm", table=table))
    assert (goals[:, 2] == 0.03).all()
    for points, center in ((starts, start), (goals[:, :2], goal)):
        assert np.abs(points - center).max() <= half + 1e-12
        assert np.abs(points - center).max() > 0.99 * half
        np.testing.assert_allclose(points.mean(axis=0), center, atol=5 * half / np.sqrt(3 * N))


def test_stitching_env():
    train, evaluation = (gym.make(f"AntUMaze{name}-v0").unwrapped.task for name in ("Stitch", "StitchEval"))
    starts, goals = drawn(train)
    steps = [
        train.scene.layout.distances(train.scene.cell_of(s))[train.scene.cell_of(g)]
        for s, g in zip(starts, goals, strict=True)
    ]
    counts = np.bincount(steps, minlength=4)
    assert counts[0] == 0 and len(counts) == 4
    assert np.abs(counts[1:] - N / 3).max() < 5 * np.sqrt(N * 2 / 9)
    starts, goals = drawn(evaluation)
    assert (starts == 4).all()
    assert {evaluation.scene.cell_of(goal) for goal in goals} == {(3, 1), (3, 2), (3, 3)}
    # Start positions are exact here
    observation = gym.make("AntUMazeStitchEval-v0").reset(seed=0)[0]
    assert (observation["achieved_goal"] == 4).all()


def test_start_noise():
    simulation = Simulation(GoalTask("ant", maze="u4"), 500, 1)
    observation = simulation.reset(np.arange(500))[0]["observation"].astype(np.float64)
    home = np.array([8, 4, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1])
    noise = observation[:, :15] - home
    # Height and orientation have another law
    flat = np.delete(noise, np.s_[2:7], axis=1)
    assert np.abs(flat).max() <= 0.1 + 1e-6
    assert np.abs(flat).max(axis=0).min() > 0.095
    np.testing.assert_allclose(np.linalg.norm(observation[:, 3:7], axis=1), 1, atol=1e-6)
    assert np.abs(noise[:, 3:7]).max() > 0.05
    # The lowest foot is just above the floor where the noise pushed it through, as nearly everywhere, and untouched elsewhere
    feet = [simulation.task.model.geom(f"foot_{k}").id for k in range(1, 5)]
    heights = np.array([simulation.data(i).geom_xpos[feet, 2].min() - 0.08 for i in range(500)])
    lifted = np.abs(heights - CLEARANCE) < 1e-9
    assert heights.min() > 0 and 0.9 < lifted.mean() < 1
    assert np.abs(noise[~lifted, 2]).max() <= 0.1 + 1e-6 and noise[lifted, 2].max() > 0.2
    assert observation[:, 15:].std() == pytest.approx(0.1, rel=0.05)
    # The humanoid starts upright and at rest, always in the same place
    simulation = Simulation(GoalTask("humanoid", maze="u"), 3, 1)
    observation = simulation.reset(np.arange(3))[0]["observation"]
    np.testing.assert_allclose(observation[:, :47], np.tile([2, 2, 1.4, 1] + [0] * 43, (3, 1)), atol=1e-7)


def test_fixed_goal_and_resampled_goal():
    env = gym.make("AntBigMaze-v0", goal="fixed")
    goals = [env.reset(seed=0)[0]["desired_goal"]] + [env.reset()[0]["desired_goal"] for _ in range(8)]
    assert len(np.unique(goals, axis=0)) == 1
    seeds = [env.reset(seed=seed)[0]["desired_goal"] for seed in range(8)]
    assert len(np.unique(seeds, axis=0)) > 3
    env = gym.make("AntBigMaze-v0")
    assert len(np.unique([env.reset()[0]["desired_goal"] for _ in range(20)], axis=0)) > 5
    # Fixed start cells, too: a pair of the stitching study stays a pair
    env = gym.make("AntUMazeStitch-v0", goal="fixed")
    first = env.reset(seed=1)[0]
    for _ in range(5):
        again = env.reset()[0]
        np.testing.assert_array_equal(first["desired_goal"], again["desired_goal"])
        np.testing.assert_array_equal(first["achieved_goal"], again["achieved_goal"])


@pytest.mark.parametrize("env_id, start, goal", [
    ("AntU4Maze-v0", [4.0, 8.5], [20.0, 4.25]),
    ("HumanoidUMaze-v0", [2.0, 4.0], [6.0, 2.0, 1.25]),
    ("ArmBinpickHard-v0", [-0.2, 0.55], [0.3, 0.6, 0.03]),
    ("AntGoal-v0", [1.0, -2.0], [3.0, 4.0]),
])  # fmt: skip
def test_reset_options(env_id, start, goal):
    env = gym.make(env_id)
    observation, info = env.reset(seed=0, options={"start": start, "goal": goal})
    assert observation["achieved_goal"][:2] == pytest.approx(start)
    assert observation["desired_goal"] == pytest.approx(goal)
    assert info["distance"] == pytest.approx(np.linalg.norm(observation["achieved_goal"] - goal), rel=1e-5)
    # The options hold for one episode, and the random numbers go on as without them
    other = gym.make(env_id)
    other.reset(seed=0)
    np.testing.assert_array_equal(env.reset()[0]["observation"], other.reset()[0]["observation"])


# --- Success, reward, termination -------------------------------------------------------------------------------------


def test_thresholds_at_their_edge():
    for env_id, success, others in (
        ("AntU4Maze-v0", 0.5, {"success_easy": 2.0}),
        ("HumanoidUMaze-v0", 0.5, {"success_easy": 2.0}),
        ("ArmPushEasy-v0", 0.1, {"success_easy": 0.3, "success_hard": 0.03}),
    ):
        env = gym.make(env_id).unwrapped
        n = env.task.robot.goal_dim
        for name, threshold in {"success": success, "is_success": success, **others}.items():
            for distance in (threshold, np.nextafter(threshold, 0)):
                measures = env.task.measures(np.array([distance]), np.array([True]))
                assert measures[name] == [distance < threshold]
        for distance, reward in ((success, 0.0), (np.nextafter(success, 0), 1.0)):
            goal = np.zeros(n)
            goal[-1] = distance
            assert env.compute_reward(np.zeros(n), goal, {}) == reward
    assert not {"success_hard"} & set(gym.make("AntU4Maze-v0").reset()[1])


def test_success_counts_every_step_and_ends_nothing():
    env = gym.make("PointUMaze-v0", goal="resample", reset_noise_scale=0.0)
    env.reset(options={"start": [2.0, 2.0], "goal": [2.0, 4.0]})
    seen = []
    for step in range(30):
        action = np.array([0.0, 1.0 if step < 5 else 0.0], dtype=np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not terminated and not truncated
        assert info["is_success"] is info["success"] is (info["distance"] < 0.5)
        assert reward == float(info["is_success"])
        assert info["distance"] == pytest.approx(np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"]))
        seen.append(info["is_success"])
    assert not seen[0] and sum(seen) > 10


@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
def test_rewards_of_batches(reward_type):
    env = gym.make("AntU4Maze-v0", reward_type=reward_type).unwrapped
    rng = np.random.default_rng(0)
    achieved, desired = rng.uniform(0, 1, (2, 5, 2)).astype(np.float32)
    rewards = env.compute_reward(achieved, desired, [{}] * 5)
    distance = np.linalg.norm(achieved - desired, axis=1)
    expected = distance < 0.5 if reward_type == "sparse" else -distance
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert rewards.dtype == np.float32 and len(set(expected)) > 1
    for i in range(5):
        assert env.compute_reward(achieved[i], desired[i], {}) == rewards[i]


@pytest.mark.parametrize("env_id, low, high", [("AntU4Maze-v0", 0.2, 1.0), ("HumanoidUMaze-v0", 1.0, 2.0)])
def test_termination_at_the_edge(env_id, low, high):
    env = gym.make(env_id).unwrapped
    qpos = np.zeros((6, env.task.model.nq))
    qpos[:, 2] = low, np.nextafter(low, 0), high, np.nextafter(high, 9), low - 1, high + 1
    assert env.task.is_healthy(qpos).tolist() == [True, False, True, False, False, False]


def test_falling_terminates():
    env = gym.make("HumanoidUMaze-v0")
    env.reset(seed=0)
    steps = 0
    terminated = False
    while not terminated:
        observation, _, terminated, truncated, info = env.step(np.zeros(17, dtype=np.float32))
        steps += 1
        assert terminated == (not info["is_healthy"])
    assert 10 < steps < 200 and observation["observation"][2] < 1 and not truncated
    env = gym.make("HumanoidUMaze-v0", terminate_when_unhealthy=False)
    env.reset(seed=0)
    for _ in range(steps):
        _, _, terminated, _, info = env.step(np.zeros(17, dtype=np.float32))
        assert not terminated
    assert not info["is_healthy"]
    env = gym.make("HumanoidUMaze-v0", healthy_z_range=(1.35, 2.0))
    env.reset(seed=0)
    shorter = 1
    while not env.step(np.zeros(17, dtype=np.float32))[2]:
        shorter += 1
    assert shorter < steps


@pytest.mark.parametrize("env_id, actions", RELEASED)
def test_robots_move_like_those_of_the_released_code(env_id, actions):
    # Idle humanoids are all alike
    n_robots = 8 if actions == "idle" and env_id.startswith("Humanoid") else 256
    steps, fallen, distance, velocity = behavior(env_id, actions, n_robots)
    expected_steps, expected_fallen, expected_distance, expected_velocity = RELEASED[env_id, actions]
    # Strong waves make every tenth of theirs fall and none of ours, quick ones move ours 1.3 times as far
    assert fallen == pytest.approx(expected_fallen, abs=12 if actions == "strong waves" else 4)
    assert steps == pytest.approx(expected_steps, rel=0.2)
    # Idle ants slide 3 cm farther in 5 s
    assert distance == pytest.approx(expected_distance, rel=0.35 if actions == "quick waves" else 0.2, abs=0.03)
    # and are calmer, 0.06 rad/s instead of 0.125
    if (actions, env_id[:3]) != ("idle", "Ant"):
        assert velocity == pytest.approx(expected_velocity, rel=0.2)


@pytest.mark.parametrize("env_id", [env_id for env_id, kwargs in ENV_TABLE.items() if kwargs["robot"] == "ant"])
def test_no_idle_ant_dies(env_id):
    """With feet in the floor, every sixth was thrown out of its healthy range."""
    vec_env = BatchVecEnv(env_id, 64, n_threads=1)
    vec_env.seed(0)
    vec_env.reset()
    for _ in range(60):
        assert not vec_env.step(np.zeros((64, 8)))[2].any()


def test_time_limit():
    env = gym.make("PointUMaze-v0", max_episode_steps=7)
    env.reset(seed=0)
    truncations = [env.step(np.zeros(2, dtype=np.float32))[3] for _ in range(7)]
    assert truncations == [False] * 6 + [True]


@pytest.mark.parametrize("make", [GoalEnv, lambda **kwargs: BatchVecEnv("PointUMaze-v0", **kwargs)])
def test_slow_envs_have_a_frame_a_second(make):
    assert make(robot="point", maze="u", frame_skip=250).metadata["render_fps"] == 1


# --- Physics ----------------------------------------------------------------------------------------------------------


def test_arm_follows_commands_and_carries_nothing_away():
    env = gym.make("ArmPushEasy-v0")
    observation = env.reset(seed=0)[0]["observation"]
    np.testing.assert_allclose(observation[3:10], [1.571, 0.742, 0, -1.571, 0, 3.054, 1.449], atol=1e-5)
    assert observation[16] == pytest.approx(0.08) and observation[2] == pytest.approx(0.07)
    for _ in range(60):
        observation = env.step(np.array([0.5, -1, 0, 0, 1], dtype=np.float32))[0]["observation"]
    # Halfway between the middle and the upper end of joint 1, the lower end of joint 2, the middle of joints 4 and 6
    targets = [2.1817, 0.0, 0.0, -0.8975, 0.0, 1.5272, 0.7244]
    np.testing.assert_allclose(observation[3:10], targets, atol=0.03)
    # The fingers are closed, and the cube lies flat on the table
    assert observation[16] == pytest.approx(0, abs=0.003)
    assert observation[2] == pytest.approx(0.03, abs=0.002)


def test_arm_can_push_the_cube():
    """Lower the closed hand behind the cube and turn the first joint: the cube crosses over to the goals."""
    env = gym.make("ArmPushEasy-v0")
    before = env.reset(seed=0, options={"start": [-0.05, 0.6], "goal": [0.1, 0.6, 0.03]})[0]["achieved_goal"]
    # Joints 2, 4 and 6 that hold the hand above the table, and on it, 0.6 m from the base
    above, on_table = (-0.2, -0.49, 0.53), (0.28, -0.49, 0.53)
    sweep = [(0.35, *above)] * 30 + [(0.35, *on_table)] * 30 + [(turn, *on_table) for turn in np.linspace(0.35, -0.1, 60)]
    for joints in sweep:
        observation, _, _, _, info = env.step(np.array([*joints, 1], dtype=np.float32))
    assert observation["achieved_goal"][0] - before[0] > 0.08
    assert info["distance"] < 0.15


@pytest.mark.parametrize("terminate", [True, False])
@pytest.mark.parametrize("env_id", IDS)
def test_random_actions_are_stable(env_id, terminate, tmp_path, monkeypatch):
    """No warning of MuJoCo, no NaN, and no file left behind; also where a fallen robot goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = gym.make(env_id, terminate_when_unhealthy=terminate).unwrapped.task
    simulation = Simulation(task, 16, 1)
    simulation.reset(np.arange(16))
    rng = np.random.default_rng(0)
    for _ in range(60):
        # Full force one way or the other is rougher than uniform noise
        result = simulation.step(np.sign(rng.uniform(-1, 1, (16, task.robot.action_dim))))
        # Here and not at the end, as a reset clears the warnings
        assert simulation.batch.warning[:, :, 1].sum() == 0
        assert not result.diverged.any() and np.isfinite(result.observation["observation"]).all()
        if result.terminated.any():
            simulation.reset(np.flatnonzero(result.terminated))
    assert not os.listdir(tmp_path)


def test_pickled_env_starts_afresh():
    env = gym.make("PointU4Maze-v0", reward_type="dense").unwrapped
    env.reset(seed=0)
    copy = cloudpickle.loads(cloudpickle.dumps(env))
    assert copy.task.reward_type == "dense"
    a, b = env.reset(seed=5)[0], copy.reset(seed=5)[0]
    for action in actions(env, 3):
        assert all(np.array_equal(a[key], b[key]) for key in a)
        a, b = env.step(action)[0], copy.step(action)[0]


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"robot": "dog", "maze": "u"}, "Unknown robot 'dog'"),
        ({"robot": "ant", "maze": "nowhere"}, "Unknown maze 'nowhere'"),
        ({"robot": "ant", "maze": ["###", "#r#", "###"]}, "no goal cell"),
        ({"robot": "ant", "maze": "u", "goal_set": "test"}, "Unknown goal_set 'test'"),
        ({"robot": "ant", "maze": "u", "goal": "moving"}, "Unknown goal 'moving'"),
        ({"robot": "ant", "maze": "u", "reward_type": "shaped"}, "Unknown reward_type 'shaped'"),
        ({"robot": "ant", "maze": "u", "cell_size": 0}, "cell_size=0"),
        ({"robot": "ant", "maze": "u", "cell_size": 1.0}, "too narrow for the ant"),
        ({"robot": "ant", "maze": "u", "wall_height": -1.0}, "wall_height=-1.0"),
        ({"robot": "ant", "maze": "u", "success_threshold": float("nan")}, "success_threshold=nan"),
        ({"robot": "ant", "maze": "u", "frame_skip": 0}, "frame_skip=0"),
        ({"robot": "ant", "maze": "u", "frame_skip": 2.5}, "frame_skip=2.5: expected an integer"),
        ({"robot": "ant", "maze": "u", "reset_noise_scale": -0.1}, "reset_noise_scale=-0.1"),
        ({"robot": "ant", "maze": "u", "healthy_z_range": (1.0, 0.2)}, "a lower and a higher height"),
        ({"robot": "ant", "maze": "u", "healthy_z_range": 0.3}, "healthy_z_range=0.3: expected a lower and a higher height"),
        ({"robot": "ant", "maze": "u", "healthy_z_range": (0.1, 0.2, 0.3)}, "a lower and a higher height"),
        ({"robot": "ant", "maze": "u", "healthy_z_range": ("a", "b")}, "a lower and a higher height"),
        ({"robot": "humanoid", "maze": "u", "healthy_z_range": (0.2, 1.0)}, "the humanoid starts at 1.* m"),
        ({"robot": "ant", "maze": "u", "reset_noise_scale": "a"}, "reset_noise_scale='a'"),
        ({"robot": "ant", "maze": "u", "reset_noise_scale": 1.31}, "leaves it 1.3 m to each side"),
        ({"robot": "point", "maze": "u", "reset_noise_scale": 5.0}, "puts the point into walls"),
        ({"robot": "ant", "maze": "u", "success_threshold": "0.5"}, "success_threshold='0.5'"),
        ({"robot": "ant", "maze": "u", "cell_size": "2"}, "cell_size='2'"),
        ({"robot": "ant", "maze": "u", "frame_skip": True}, "frame_skip=True: expected an integer"),
        ({"robot": "ant", "maze": 5}, "Unknown maze 5"),
        ({"robot": "point", "maze": "u", "healthy_z_range": (0.0, 1.0)}, "point cannot fall"),
        ({"robot": "ant", "maze": "u", "stitching": 0}, "stitching=0"),
        ({"robot": "ant", "maze": "u", "random_start": "yes"}, "random_start='yes': expected True or False"),
        ({"robot": "ant", "maze": "u", "random_start": True, "stitching": 3}, "=3 .* pass random_start=False and goal="),
        ({"robot": "ant", "maze": "u", "goal": "continuing", "stitching": 3}, "=3 .* pass random_start=False and goal="),
        ({"robot": "ant", "random_start": True}, "random_start describes a maze.*Pass maze=..., or random_start=False"),
        ({"robot": "ant", "maze": "u", "stitching": 9}, "no two cells are 7 cells apart"),
        ({"robot": "ant", "goal_set": "eval"}, "goal_set describes a maze"),
        ({"robot": "ant", "cell_size": 3.0}, "cell_size describes a maze"),
        ({"robot": "arm", "table": "push_easy", "cell_size": 2.0}, "no maze is given. Pass cell_size=None"),
        ({"robot": "point", "random_start": True, "goal": "continuing"}, "mazes only"),
        ({"robot": "ant", "table": "push_easy"}, "is for the arm"),
        ({"robot": "point"}, "mazes only"),
        ({"robot": "arm"}, "works on a table"),
        ({"robot": "arm", "table": "push_easy", "maze": "u"}, "works on a table"),
        ({"robot": "arm", "table": "pull"}, "Unknown table 'pull'"),
        ({"robot": "ant", "render_mode": "human"}, "render_mode='human'"),
        ({"robot": "ant", "camera": "side"}, "Unknown camera 'side'"),
        ({"robot": "ant", "width": 0}, "width=0"),
        ({"robot": "ant", "height": 2.5}, "height=2.5: expected an integer"),
        ({"robot": "ant", "terminate_when_unhealthy": "no"}, "terminate_when_unhealthy='no'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GoalEnv(**kwargs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": [8.0, 8.0]}, r"start \[8.0, 8.0\] lies in the wall at row 2, column 2"),
        ({"start": [400.0, 8.0]}, "wall at row 100, column 2"),
        ({"start": [5.9, 8.0]}, r"0.100 m from the wall at row 2, column 2, but the robot needs 0.7"),
        ({"goal": [0.0, 4.0]}, "goal .* lies in the wall at row 0, column 1"),
        ({"goal": [4.0, 4.0, 1.25]}, "must be 2 finite numbers"),
        ({"start": [np.nan, 4.0]}, "must be 2 finite numbers"),
        ({"start": "abc"}, "start 'abc' must be 2 finite numbers"),
        ({"goal": [[4.0], [4.0, 4.0]]}, "goal .* must be 2 finite numbers"),
        (5, "reset options 5 are no dict"),
        ({"begin": [4.0, 4.0]}, r"Unknown reset options \['begin'\]"),
    ],
)
def test_bad_reset_options(options, message):
    env = gym.make("AntU4Maze-v0")
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_largest_start_noise():
    assert GoalEnv(robot="ant", maze="u", reset_noise_scale=1.3).task.reset_noise_scale == 1.3
    # Nothing is in the way on the open field
    GoalEnv(robot="ant", reset_noise_scale=1.4)


def test_start_noise_of_the_arm_is_that_of_its_joints():
    task = GoalTask("arm", table="push_easy", reset_noise_scale=0.1)
    noise = np.ones((1, task.model.nq)), np.ones((1, task.model.nv))
    qpos, qvel = task.start_states(np.zeros((1, 2)), np.array([True]), *noise)
    for moved in (qpos[0] - task.robot.home(), qvel[0]):
        np.testing.assert_allclose(moved, [0.1] * 7 + [0] * (len(moved) - 7), atol=1e-9)


def test_bad_reset_options_of_the_arm():
    env = gym.make("ArmPushEasy-v0")
    with pytest.raises(ValueError, match=r"start \[3.0, 0.6\] is out of the arm's reach"):
        env.reset(options={"start": [3.0, 0.6]})
    for height in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"choose z from 0 to 1\.0"):
            env.reset(options={"goal": [0.1, 0.6, height]})


def test_a_way_must_lead_to_the_goal():
    # Two rooms, the right one of which holds neither starts nor goals
    env = gym.make("PointUMaze-v0", maze=["########", "#rg.#..#", "########"], cell_size=2.0)
    for options, message in (
        ({"start": [2.0, 12.0]}, "given start in row 1, column 6 to the drawn goal in row 1, column 2"),
        ({"goal": [2.0, 12.0]}, "drawn start in row 1, column 1 to the given goal in row 1, column 6"),
        ({"start": [2.0, 10.0], "goal": [2.0, 6.0]}, "given start in row 1, column 5 to the given goal in row 1, column 3"),
    ):
        with pytest.raises(ValueError, match=f"No way leads from the {message}"):
            env.reset(options=options)
    env.reset(options={"start": [2.0, 10.0], "goal": [2.0, 12.0]})
    env.set_wrapper_attr("goal", [2.0, 10.0])
    with pytest.raises(ValueError, match="No way leads"):
        env.set_wrapper_attr("goal", [2.0, 4.0])


def test_unknown_or_missing_argument():
    for make in (GoalEnv, partial(gym.make, "AntGoal-v0")):
        with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
            make(robot="ant", foo=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'robot'"):
        GoalEnv()


def test_attributes():
    env = gym.make("AntU4Maze-v0")
    core = env.unwrapped
    for name, value, bad in (
        ("reward_type", "dense", "shaped"),
        ("goal_mode", "fixed", "moving"),
        ("success_threshold", 0.7, -3),
    ):
        env.set_wrapper_attr(name, value)
        assert env.get_wrapper_attr(name) == getattr(core.task, name) == value and name not in core.__dict__
        for refused in (bad, None):
            with pytest.raises(ValueError, match=name):
                env.set_wrapper_attr(name, refused)
        assert getattr(core, name) == value
    with pytest.raises(AttributeError):
        env.get_wrapper_attr("no_such_thing")
    with pytest.raises(ValueError, match="must be 2 finite numbers"):
        core.goal = None


def test_no_step_without_an_episode():
    env = GoalEnv(robot="point", maze="u", render_mode="rgb_array")
    with pytest.raises(RuntimeError, match=r"Call reset\(\) before the first step\(\)"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    env.step(np.zeros(2))
    env.close()
    env.close()
    for call in (env.reset, env.render, lambda: env.step(np.zeros(2))):
        with pytest.raises(RuntimeError, match="The environment is closed"):
            call()


def test_bad_actions():
    env = gym.make("AntU4Maze-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(1, 7\), expected \(1, 8\)"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="env 0 is not finite: number 3 is nan"):
        env.step(np.array([0, 0, 0, np.nan, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="Actions have the data type <U1, expected numbers"):
        env.step(["a"] * 8)
