from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces

from sb3_deepcrl.envs.ant import Ant
from sb3_deepcrl.envs.arm import Arm
from sb3_deepcrl.envs.humanoid import GymnasiumHumanoid, Humanoid, UnscaledHumanoid
from sb3_deepcrl.envs.layouts import Layout, make_layout
from sb3_deepcrl.envs.point import Point
from sb3_deepcrl.envs.robot import Robot
from sb3_deepcrl.envs.scenes import TABLES, Maze, OpenField, Scene, Table

ROBOTS: dict[str, type[Robot]] = {
    robot.name: robot for robot in (Point, Ant, Humanoid, GymnasiumHumanoid, UnscaledHumanoid, Arm)
}
# Height in meters above the floor of a robot that is lifted out of it, so that rounding does not decide whether it touches
CLEARANCE = 1e-4
REWARD_TYPES = ("sparse", "dense")
GOAL_MODES = ("resample", "fixed", "continuing")
# Attributes of a task that may change while it runs
SETTABLE = ("reward_type", "goal_mode", "success_threshold")


class GoalTask:
    """
    The law of a goal-reaching task, written once for any number of environments: model, spaces, start, goal, success,
    termination and reward. ``GoalEnv`` and ``BatchVecEnv`` are its two faces.

    :param robot: "point", "ant", "humanoid" or "arm". "humanoid_gymnasium" has the joints, gears and inertia of Gymnasium's
        model instead of the released code's, "humanoid_unscaled" observes actuator forces in Nm, as the released code does
    :param maze: Name of a maze, or a maze as text (one string a row, see ``layouts``). None puts the ant and the humanoid
        on an open field
    :param table: What the arm works on: "push_easy", "push_hard" or "binpick_hard". For the arm only
    :param goal_set: Goals of a maze: "train" or "eval"
    :param stitching: For a maze: k restricts training to starts and goals at most k cells apart, and evaluation to goals
        more than k cells from the start (figure 11 of the paper)
    :param random_start: For a maze: whether an episode starts in any free cell but that of the goal, each equally likely,
        instead of in the start cell
    :param goal: "resample" draws a new start and goal each episode; "fixed" keeps the pair drawn at the first reset and
        after each reset with a seed, as the released code does in training; "continuing" is "resample" with another goal each
        time that one was reached, as ``reset_target`` in the mazes of gymnasium-robotics: reward, success and distance of that
        step are those of the goal that was reached, and its observation holds the new one, so that only there the reward is
        not ``compute_reward`` of the goals in the observation
    :param reward_type: "sparse" is 1 within ``success_threshold`` of the goal and 0 elsewhere (section 4.1 of the paper);
        "dense" is the negative distance to the goal in meters
    :param success_threshold: Distance to the goal in meters below which a step is a success. None takes the released code's:
        0.5 for locomotion, 0.1 for the arm
    :param terminate_when_unhealthy: Whether an episode terminates when the torso leaves ``healthy_z_range``
    :param healthy_z_range: Lowest and highest allowed height of the torso in meters. None takes the released code's:
        0.2 to 1.0 for the ant, 1.0 to 2.0 for the humanoid; point and arm have none
    :param reset_noise_scale: Start noise: uniform in +-scale on every position, scale times a standard normal on every
        velocity, of the arm's seven joints only. None takes the released code's: 0.1 for the ant, 0 for the humanoid and the
        arm. A robot that can fall is lifted as far as the noise pushed it into the floor
    :param frame_skip: Physics steps of one env step. None takes the robot's: 0.05 s for ant and arm, 0.1 s for the
        point, 0.015 s for the humanoid in mazes and 0.03 s on the field
    :param cell_size: Side of a maze cell in meters. None takes 4 for the ant, 2 for humanoid and point
    :param wall_height: Height of the walls in meters. None takes half a cell
    :raises ValueError: if an argument is out of its range, or is not one of this robot or scene
    """

    goal_mode: str

    def __init__(
        self,
        robot: str,
        maze: str | Sequence[str] | Layout | None = None,
        table: str | None = None,
        goal_set: str = "train",
        stitching: int | None = None,
        random_start: bool = False,
        goal: str = "resample",
        reward_type: str = "sparse",
        success_threshold: float | None = None,
        terminate_when_unhealthy: bool = True,
        healthy_z_range: tuple[float, float] | None = None,
        reset_noise_scale: float | None = None,
        frame_skip: int | None = None,
        cell_size: float | None = None,
        wall_height: float | None = None,
    ):
        _check_choice("robot", robot, ROBOTS)
        _check_choice("goal_set", goal_set, ("train", "eval"))
        _check_choice("goal", goal, GOAL_MODES)
        _check_choice("reward_type", reward_type, REWARD_TYPES)
        lengths = {"success_threshold": success_threshold, "cell_size": cell_size, "wall_height": wall_height}
        for name, length in lengths.items():
            if length is not None:
                _check_positive(name, length)
        for name, value in (("terminate_when_unhealthy", terminate_when_unhealthy), ("random_start", random_start)):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name}={value!r}: expected True or False.")
        check_counts(frame_skip=frame_skip, stitching=stitching)
        if stitching is not None and (random_start or goal == "continuing"):
            raise ValueError(
                f"stitching={stitching} chooses starts and goals itself: pass random_start=False and goal='resample' too, or "
                "stitching=None."
            )
        if reset_noise_scale is not None and not (_is_number(reset_noise_scale) and 0 <= reset_noise_scale < np.inf):
            raise ValueError(f"reset_noise_scale={reset_noise_scale!r}: expected a finite number that is not negative.")

        self.robot = ROBOTS[robot](on_field=maze is None)
        maze_kwargs = {"goal_set": goal_set, "stitching": stitching, "random_start": random_start}
        self.scene = _make_scene(self.robot, maze, table, {**maze_kwargs, "cell_size": cell_size, "wall_height": wall_height})
        self.reward_type = reward_type
        self.success_threshold = self.robot.success_threshold if success_threshold is None else success_threshold
        self.set("goal_mode", goal)
        self.terminate_when_unhealthy = terminate_when_unhealthy
        self.healthy_z_range = self._check_healthy_z_range(healthy_z_range)
        self.reset_noise_scale = self.robot.reset_noise_scale if reset_noise_scale is None else reset_noise_scale
        self.frame_skip = self.robot.frame_skip if frame_skip is None else frame_skip
        if isinstance(self.scene, Maze) and self.reset_noise_scale > (room := self.scene.cell_size / 2 - self.robot.radius):
            raise ValueError(
                f"reset_noise_scale={self.reset_noise_scale} puts the {robot} into walls: a cell of {self.scene.cell_size} m "
                f"leaves it {room:.3g} m to each side. Use a smaller reset_noise_scale or a larger cell_size."
            )

        spec = self.robot.make_spec()
        self.scene.build(spec)
        self.model: mujoco.MjModel = spec.compile()
        self.dt = self.frame_skip * self.model.opt.timestep
        # A video of none cannot be written
        self.render_fps = max(1, round(1 / self.dt))
        self._home = self.robot.home()
        free = self.model.jnt_type == int(mujoco.mjtJoint.mjJNT_FREE)
        self._quaternions = (self.model.jnt_qposadr[free] + 3).tolist()

        observation = spaces.Box(-np.inf, np.inf, (self.robot.observation_dim,), np.float32)
        goal_space = spaces.Box(-np.inf, np.inf, (self.robot.goal_dim,), np.float32)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal_space, desired_goal=goal_space)
        self.action_space = spaces.Box(-1.0, 1.0, (self.robot.action_dim,), np.float32)

    def _check_healthy_z_range(self, heights: tuple[float, float] | None) -> tuple[float, float] | None:
        if heights is None:
            return self.robot.healthy_z_range
        if self.robot.healthy_z_range is None:
            raise ValueError(f"healthy_z_range={heights}: the {self.robot.name} cannot fall. Leave it out.")
        if np.shape(heights) != (2,) or not all(map(_is_number, heights)) or not heights[0] < heights[1]:
            raise ValueError(f"healthy_z_range={heights!r}: expected a lower and a higher height in meters, e.g. (0.2, 1.0).")
        if not heights[0] <= (height := self.robot.home()[2]) <= heights[1]:
            raise ValueError(f"healthy_z_range={heights}: the {self.robot.name} starts at {height} m, which must be within.")
        return heights[0], heights[1]

    def set(self, name: str, value: Any) -> None:
        """Change one of the ``SETTABLE`` attributes while episodes run."""
        if name == "success_threshold":
            _check_positive(name, value)
        else:
            _check_choice(name, value, GOAL_MODES if name == "goal_mode" else REWARD_TYPES)
        if value == "continuing" and isinstance(self.scene, Maze) and (k := self.scene.stitching):
            raise ValueError(f"goal='continuing' and stitching={k} both choose goals: pass only one of them.")
        setattr(self, name, value)

    # --- Start and goal -----------------------------------------------------------------------------------------------

    def draw(self, generators: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Draw the random numbers of one reset: those in [0, 1) that choose start and goal, shape (n, n_uniform), and start
        noise, if there is any: of ``qpos`` in [-1, 1), shape (n, nq), and of ``qvel``, standard normal, shape (n, nv).
        """
        n_position, n_velocity = (self.model.nq, self.model.nv) if self.reset_noise_scale > 0 else (0, 0)
        uniform = np.array([rng.random(self.scene.n_uniform + n_position) for rng in generators])
        normal = np.array([rng.standard_normal(n_velocity) for rng in generators])
        return uniform[:, : self.scene.n_uniform], 2 * uniform[:, self.scene.n_uniform :] - 1, normal

    def start_states(
        self, starts: np.ndarray, exact: np.ndarray, position_noise: np.ndarray, velocity_noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``qpos`` and ``qvel`` of robots at their starts, shape (n, 2), without noise on those that are exact."""
        qpos = np.repeat(self._home[None], len(starts), axis=0)
        qvel = np.zeros((len(starts), self.model.nv))
        if self.reset_noise_scale > 0:
            noise = self.reset_noise_scale * position_noise
            noise[exact, self.robot.start_address] = 0
            qpos[:, self.robot.noise_address] += noise[:, self.robot.noise_address]
            for address in self._quaternions:
                quaternion = qpos[:, address : address + 4]
                quaternion /= np.sqrt((quaternion * quaternion).sum(axis=1, keepdims=True))
            qvel[:, self.robot.noise_address] += self.reset_noise_scale * velocity_noise[:, self.robot.noise_address]
        qpos[:, self.robot.start_address] += starts
        if self.reset_noise_scale > 0 and self.robot.healthy_z_range is not None:
            self._lift_out_of_floor(qpos)
        return qpos, qvel

    @cached_property
    def _kinematics(self) -> mujoco.MjData:
        # Kept, as to make one takes as long as eight steps of an ant
        return mujoco.MjData(self.model)

    def _lift_out_of_floor(self, qpos: np.ndarray) -> None:
        """Lift robots that reach into the floor. MuJoCo would throw them up, out of their healthy range."""
        data, floor = self._kinematics, self.model.geom("floor").id
        for row in qpos:
            data.qpos[:] = row
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_collision(self.model, data)
            on_floor = (data.contact.geom == floor).any(axis=1)
            depth = -data.contact.dist[on_floor].min(initial=0.0)
            if depth > 0:
                row[2] += depth + CLEARANCE

    def check_options(self, options: Mapping[str, Any] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Check the options of a reset: "start" (x and y) and "goal" in meters, each None in the result if not given."""
        if options is None:
            return None, None
        if not isinstance(options, Mapping):
            raise ValueError(f"The reset options {options!r} are no dict: pass {{'start': ..., 'goal': ...}} or None.")
        if unknown := sorted(set(options) - {"start", "goal"}):
            raise ValueError(f"Unknown reset options {unknown}. Known options: 'start' and 'goal'.")
        start, goal = (
            None if options.get(name) is None else _check_position(name, options[name], size)
            for name, size in (("start", 2), ("goal", self.robot.goal_dim))
        )
        self.scene.check(start, goal, self.robot.radius)
        self.scene.check_way(start, goal)
        return start, goal

    def check_goal(self, goal: Any, position: np.ndarray) -> np.ndarray:
        """Check a goal in meters for a running episode, with the position, x and y, from where it is to be reached."""
        checked = _check_position("goal", goal, self.robot.goal_dim)
        self.scene.check(None, checked, self.robot.radius)
        self.scene.check_way(position, checked)
        return checked

    # --- Success, reward and the end of an episode --------------------------------------------------------------------

    # All but the last one take NumPy's arrays and PyTorch's tensors

    @staticmethod
    def goal_distance(achieved_goal: Any, desired_goal: Any) -> Any:
        """Distances in meters between goals of shape (..., goal_dim)."""
        difference = achieved_goal - desired_goal
        return (difference * difference).sum(axis=-1) ** 0.5

    def reward_from_distance(self, distance: Any) -> Any:
        """Rewards, of any number type, for distances to the goal in meters."""
        return distance < self.success_threshold if self.reward_type == "sparse" else -distance

    def is_healthy(self, qpos: Any) -> Any:
        """Whether robots are within ``healthy_z_range``, shape (n,), by ``qpos`` of shape (n, nq)."""
        if self.healthy_z_range is None:
            return qpos[:, 0] < np.inf
        low, high = self.healthy_z_range
        return (qpos[:, 2] >= low) & (qpos[:, 2] <= high)

    def measures(self, distance: Any, healthy: Any) -> dict[str, Any]:
        """What the info of a step holds, arrays of shape (n,) by name."""
        success = distance < self.success_threshold
        # Stable-Baselines3 reads is_success, gymnasium-robotics' mazes write success
        measures = {"is_success": success, "success": success, "distance": distance}
        measures |= {name: distance < threshold for name, threshold in self.robot.extra_thresholds.items()}
        return measures if self.healthy_z_range is None else {**measures, "is_healthy": healthy}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """Rewards in float32, shape (...), of goals of shape (..., goal_dim), whatever happened on the way. HER calls it."""
        distance = self.goal_distance(np.asarray(achieved_goal), np.asarray(desired_goal))
        return np.asarray(self.reward_from_distance(distance), dtype=np.float32)


def _make_scene(robot: Robot, maze: Any, table: str | None, maze_kwargs: dict[str, Any]) -> Scene:
    if robot.on_table:
        if table is None or maze is not None:
            tables = ", ".join(TABLES)
            raise ValueError(f"The {robot.name} works on a table, not in a maze: pass table= one of {tables}, and maze=None.")
    elif table is not None:
        raise ValueError(f"table={table!r} is for the arm, but the robot is {robot.name!r}. Pass table=None.")
    elif maze is None and robot.field_distance is None:
        raise ValueError(f"The {robot.name} acts in mazes only: pass maze= a name or a maze as text.")
    if maze is None:
        for name, value in maze_kwargs.items():
            if value != (default := {"goal_set": "train", "random_start": False}.get(name)):
                maze_too = "" if robot.on_table else "maze=..., or "
                raise ValueError(f"{name} describes a maze, but no maze is given. Pass {maze_too}{name}={default!r}.")
    if table is not None:
        _check_choice("table", table, TABLES)
        return Table(table, robot.goal_tail)
    if maze is None:
        assert robot.field_distance is not None
        return OpenField(robot.field_distance, robot.goal_tail)
    size = robot.cell_size if maze_kwargs["cell_size"] is None else maze_kwargs["cell_size"]
    if size / 2 < robot.radius:
        raise ValueError(f"cell_size={size} m is too narrow for the {robot.name}: use at least {2 * robot.radius} m.")
    if isinstance(maze, str) and maze.lower() == "big" and robot.name.startswith("humanoid"):
        # The released code evaluates the humanoid on one goal more in this maze
        maze = "big_humanoid"
    return Maze(make_layout(maze), goal_tail=robot.goal_tail, **{**maze_kwargs, "cell_size": size})


def check_counts(**values: int | None) -> None:
    """Refuse arguments that are neither None nor an integer from 1 on."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r}: expected an integer that is at least 1.")


def _check_position(name: str, value: Any, size: int) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(f"The {name} {value!r} must be {size} finite numbers in meters.")
    return array


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"Unknown {name} {value!r}. Choose one of: {', '.join(choices)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value < np.inf):
        raise ValueError(f"{name}={value!r}: expected a positive number of meters.")
