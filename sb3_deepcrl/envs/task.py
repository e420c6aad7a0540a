import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium import spaces

from sb3_deepcrl.envs.ant import Ant
from sb3_deepcrl.envs.arm import TABLES, Arm, Table
from sb3_deepcrl.envs.humanoid import GOAL_HEIGHT, Humanoid
from sb3_deepcrl.envs.layouts import Layout, make_layout
from sb3_deepcrl.envs.point import Point
from sb3_deepcrl.envs.robot import Robot
from sb3_deepcrl.envs.scenes import Maze, OpenField, Scene

# Allowed values of attributes that may be set on a running task
CHOICES = {"reward_type": ("sparse", "dense"), "goal_mode": ("resample", "fixed", "continuing")}
# All attributes that may be set on a running task
SETTABLE = (*CHOICES, "success_threshold")
ROBOTS = ("point", "ant", "humanoid", "arm")
# Goals of the open field: the ant's lie on a circle, the humanoid's in a ring (metres)
FIELDS = {"ant": (10.0, 10.0), "humanoid": (1.0, 5.0)}
# The released code steps the humanoid at 0.015 s in mazes, but at 0.03 s on the open field
HUMANOID_FIELD_FRAME_SKIP = 10


class Draw(NamedTuple):
    """
    The random numbers of one reset, one row an environment.

    :param scene: Chooses start and goal, shape (n, n_uniform)
    :param position: Start noise of ``qpos`` in [0, 1), shape (n, nq), or (n, 0) without noise
    :param velocity: Start noise of ``qvel``, standard normal, shape (n, nv), or (n, 0) without noise
    """

    scene: np.ndarray
    position: np.ndarray
    velocity: np.ndarray


class GoalTask:
    """
    The law of a goal-reaching task, written once for any number of environments: model, spaces, start, goal, success,
    termination and reward. ``GoalEnv`` and ``BatchVecEnv`` are its two faces.

    :param robot: "point", "ant", "humanoid" or "arm"
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
        "dense" is the negative distance to the goal in metres
    :param success_threshold: Distance to the goal in metres below which a step is a success. None takes the released code's:
        0.5 for locomotion, 0.1 for the arm
    :param terminate_when_unhealthy: Whether an episode terminates when the torso leaves ``healthy_z_range``
    :param healthy_z_range: Lowest and highest allowed height of the torso in metres. None takes the released code's:
        0.2 to 1.0 for the ant, 1.0 to 2.0 for the humanoid; point and arm have none
    :param reset_noise_scale: Start noise: uniform in +-scale on every position, scale times a standard normal on every
        velocity. None takes the released code's: 0.1 for the ant, 0 for the humanoid and the arm
    :param frame_skip: Physics steps of one env step. None takes the robot's: 0.05 s for ant and arm, 0.1 s for the
        point, 0.015 s for the humanoid in mazes and 0.03 s on the field
    :param cell_size: Side of a maze cell in metres. None takes 4 for the ant, 2 for humanoid and point
    :param wall_height: Height of the walls in metres. None takes half a cell
    """

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
        _check_choice("goal", goal, CHOICES["goal_mode"])
        _check_choice("reward_type", reward_type, CHOICES["reward_type"])
        _check_positive("success_threshold", success_threshold)
        _check_positive("cell_size", cell_size)
        _check_positive("wall_height", wall_height)
        for name, value in (("terminate_when_unhealthy", terminate_when_unhealthy), ("random_start", random_start)):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name}={value!r}: expected True or False.")
        check_count("frame_skip", frame_skip)
        check_count("stitching", stitching)
        if reset_noise_scale is not None and not (is_number(reset_noise_scale) and 0 <= reset_noise_scale < np.inf):
            raise ValueError(f"reset_noise_scale={reset_noise_scale!r}: expected a finite number that is not negative.")
        if maze is None:
            given = {
                "goal_set": goal_set != "train",
                "stitching": stitching,
                "random_start": random_start,
                "cell_size": cell_size,
                "wall_height": wall_height,
            }
            for name, given_value in given.items():
                if given_value is not None and given_value is not False:
                    raise ValueError(f"{name} describes a maze, but no maze is given. Pass maze=..., or leave {name} out.")
        if random_start and stitching is not None:
            raise ValueError(
                f"random_start and stitching={stitching} contradict each other, both say where episodes start: "
                "pass random_start=False, or leave stitching out."
            )

        self.robot = _make_robot(robot, maze, table)
        self.scene = self._make_scene(maze, table, goal_set, stitching, random_start, cell_size, wall_height)
        self.goal_mode = goal
        self.reward_type = reward_type
        self.success_threshold = self.robot.success_threshold if success_threshold is None else success_threshold
        self.terminate_when_unhealthy = terminate_when_unhealthy
        self.healthy_z_range = self._check_healthy_z_range(healthy_z_range)
        self.reset_noise_scale = self.robot.reset_noise_scale if reset_noise_scale is None else reset_noise_scale
        if isinstance(self.scene, Maze):
            room = self.scene.cell_size / 2 - self.robot.radius
            if self.reset_noise_scale > room:
                raise ValueError(
                    f"reset_noise_scale={self.reset_noise_scale} puts the {self.robot.name} into walls: a cell of "
                    f"{self.scene.cell_size} m leaves it {room:.3g} m to each side. Use a smaller reset_noise_scale or a "
                    "larger cell_size."
                )
        field_skip = HUMANOID_FIELD_FRAME_SKIP if robot == "humanoid" and maze is None else self.robot.frame_skip
        self.frame_skip = field_skip if frame_skip is None else frame_skip

        spec = self.robot.make_spec()
        self.scene.build(spec)
        self.model: mujoco.MjModel = spec.compile()
        self.dt = self.frame_skip * self.model.opt.timestep
        self._home = self.robot.home()
        free = int(mujoco.mjtJoint.mjJNT_FREE)
        self._quaternions = [
            int(joint.qposadr[0]) + 3 for joint in map(self.model.joint, range(self.model.njnt)) if int(joint.type[0]) == free
        ]

        def box(n: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, (n,), np.float32)

        self.observation_space = spaces.Dict(
            {
                "observation": box(self.robot.observation_dim),
                "achieved_goal": box(self.robot.goal_dim),
                "desired_goal": box(self.robot.goal_dim),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (self.robot.action_dim,), np.float32)

    def _make_scene(
        self,
        maze: str | Sequence[str] | Layout | None,
        table: str | None,
        goal_set: str,
        stitching: int | None,
        random_start: bool,
        cell_size: float | None,
        wall_height: float | None,
    ) -> Scene:
        tail = (GOAL_HEIGHT,) if isinstance(self.robot, Humanoid) else ()
        if table is not None:
            return Table(table)
        if maze is None:
            return OpenField(FIELDS[self.robot.name], tail)
        size = self.robot.cell_size if cell_size is None else cell_size
        if size / 2 < self.robot.radius:
            raise ValueError(
                f"cell_size={size} m is too narrow for the {self.robot.name}: use at least {2 * self.robot.radius} m."
            )
        # Half a cell is the released code's choice: 2 m for the ant, 1 m for the humanoid
        height = size / 2 if wall_height is None else wall_height
        return Maze(make_layout(maze), size, height, goal_set, stitching, tail, random_start)

    def _check_healthy_z_range(self, healthy_z_range: tuple[float, float] | None) -> tuple[float, float] | None:
        if healthy_z_range is None:
            return self.robot.healthy_z_range
        if self.robot.healthy_z_range is None:
            raise ValueError(f"healthy_z_range={healthy_z_range}: the {self.robot.name} cannot fall. Leave it out.")
        heights = tuple(healthy_z_range) if isinstance(healthy_z_range, Iterable) else ()
        if len(heights) != 2 or not all(map(is_number, heights)):
            raise ValueError(f"healthy_z_range={healthy_z_range!r}: expected two heights in metres, e.g. (0.2, 1.0).")
        low, high = heights
        if not low < high:
            raise ValueError(f"healthy_z_range={healthy_z_range}: the first height must be below the second one.")
        return low, high

    def __setattr__(self, name: str, value: Any) -> None:
        # Also reached by set_attr of a vectorized environment
        if name in CHOICES:
            _check_choice(name, value, CHOICES[name])
        if name == "success_threshold":
            _check_positive(name, value, required=True)
        if name == "goal_mode" and value == "continuing" and isinstance(self.scene, Maze) and self.scene.stitching:
            raise ValueError(
                f"goal='continuing' and stitching={self.scene.stitching} contradict each other, both choose among the goals: "
                "pass goal='resample', or leave stitching out."
            )
        super().__setattr__(name, value)

    # --- Start and goal -----------------------------------------------------------------------------------------------

    def draw(self, generators: Sequence[np.random.Generator]) -> Draw:
        """
        :param generators: One generator an environment
        :return: The random numbers of one reset each
        """
        n_position, n_velocity = (self.model.nq, self.model.nv) if self.reset_noise_scale > 0 else (0, 0)
        uniform = np.array([rng.random(self.scene.n_uniform + n_position) for rng in generators])
        normal = np.array([rng.standard_normal(n_velocity) for rng in generators])
        return Draw(uniform[:, : self.scene.n_uniform], uniform[:, self.scene.n_uniform :], normal)

    def start_states(self, draw: Draw, starts: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param draw: The random numbers
        :param starts: Start positions in metres, shape (n, 2)
        :param exact: Whether a start is to be met exactly, without noise on its two coordinates, shape (n,)
        :return: ``qpos`` and ``qvel``
        """
        n = len(starts)
        qpos = np.repeat(self._home[None], n, axis=0)
        qvel = np.zeros((n, self.model.nv))
        if self.reset_noise_scale > 0:
            noise = self.reset_noise_scale * (2 * draw.position - 1)
            noise[exact, self.robot.start_address] = 0
            qpos += noise
            for address in self._quaternions:
                quaternion = qpos[:, address : address + 4]
                quaternion /= np.sqrt((quaternion * quaternion).sum(axis=1, keepdims=True))
            qvel += self.reset_noise_scale * draw.velocity
        qpos[:, self.robot.start_address] += starts
        return qpos, qvel

    def check_options(self, options: Mapping[str, Any] | None, where: str = "") -> tuple[np.ndarray | None, np.ndarray | None]:
        """
        :param options: Options of ``reset``: "start" (x and y) and "goal", both in metres
        :param where: Place for the messages, e.g. the env index
        :return: Start and goal, None where not given
        :raises ValueError: If an option is unknown, has a wrong shape, is not finite or lies in a wall, or if no way leads
            from the start to the goal
        """
        if options is None:
            return None, None
        if not isinstance(options, Mapping):
            raise ValueError(f"The reset options {options!r}{where} are no dict: pass {{'start': ..., 'goal': ...}} or None.")
        unknown = set(options) - {"start", "goal"}
        if unknown:
            raise ValueError(f"Unknown reset options {sorted(unknown)}{where}. Known options: 'start' and 'goal'.")
        start = self._check_position("start", options.get("start"), 2, where)
        goal = self._check_position("goal", options.get("goal"), self.robot.goal_dim, where)
        self.scene.check(start, goal, self.robot.radius, where)
        self.scene.check_way(start, goal, where)
        return start, goal

    def check_goal(self, goal: Any, where: str = "") -> np.ndarray:
        """
        :param goal: Goal for a running episode in metres
        :param where: Place for the messages, e.g. the env index
        :return: The goal, shape (goal_dim,)
        :raises ValueError: If it has a wrong shape, is not finite or lies in a wall
        """
        checked = self._check_position("goal", () if goal is None else goal, self.robot.goal_dim, where)
        assert checked is not None
        self.scene.check(None, checked, self.robot.radius, where)
        return checked

    @staticmethod
    def _check_position(name: str, value: Any, size: int, where: str) -> np.ndarray | None:
        if value is None:
            return None
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != (size,) or not np.isfinite(array).all():
            raise ValueError(f"The {name} {value!r}{where} must be {size} finite numbers in metres.")
        return array

    # --- Success, reward and the end of an episode --------------------------------------------------------------------

    @staticmethod
    def goal_distance(achieved_goal: np.ndarray, desired_goal: np.ndarray) -> np.ndarray:
        """
        :param achieved_goal: Goals reached, shape (..., goal_dim)
        :param desired_goal: Goals wanted, shape (..., goal_dim)
        :return: Distances in metres, shape (...)
        """
        difference = np.asarray(achieved_goal) - np.asarray(desired_goal)
        return np.sqrt((difference * difference).sum(axis=-1))

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """
        :param achieved_goal: Goals reached, shape (..., goal_dim)
        :param desired_goal: Goals wanted, shape (..., goal_dim)
        :param info: Unused, the reward depends on the goals alone
        :return: Rewards in float32, shape (...)
        """
        return self.reward_from_distance(self.goal_distance(achieved_goal, desired_goal))

    def reward_from_distance(self, distance: np.ndarray) -> np.ndarray:
        """
        :param distance: Distances to the goal in metres
        :return: Rewards in float32 of the same shape
        """
        return (distance < self.success_threshold if self.reward_type == "sparse" else -distance).astype(np.float32)

    def compute_terminated(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """
        Goals never end an episode, a fall does; whether the robot had fallen is in the info of the step.

        :param achieved_goal: Goals reached, shape (..., goal_dim)
        :param desired_goal: Goals wanted, shape (..., goal_dim)
        :param info: Info of the step, or a sequence of them
        :return: Whether the episode terminates, shape (...)
        """
        shape = np.broadcast_shapes(np.shape(achieved_goal), np.shape(desired_goal))[:-1]
        if not self.terminate_when_unhealthy or self.healthy_z_range is None:
            return np.zeros(shape, dtype=bool)
        return ~_read_info(info, "is_healthy", True, shape)

    def compute_truncated(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """
        No goal truncates an episode, diverging physics does; the time limit is kept outside of the task.

        :param achieved_goal: Goals reached, shape (..., goal_dim)
        :param desired_goal: Goals wanted, shape (..., goal_dim)
        :param info: Info of the step, or a sequence of them
        :return: Whether the episode is truncated, shape (...)
        """
        shape = np.broadcast_shapes(np.shape(achieved_goal), np.shape(desired_goal))[:-1]
        return _read_info(info, "diverged", False, shape).copy()


def _read_info(info: Any, key: str, default: bool, shape: tuple[int, ...]) -> np.ndarray:
    """
    :param info: Info of a step, or a sequence of them
    :param key: Key of a truth value
    :param default: What holds where the key is missing
    :param shape: Shape of the goals that the infos belong to, without their last axis
    :return: The truth values, shape ``shape``
    """
    values = info.get(key, default) if isinstance(info, Mapping) else [step.get(key, default) for step in info]
    return np.broadcast_to(np.asarray(values, dtype=bool), shape)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}. Choose one of: {', '.join(choices)}.")


def check_count(name: str, value: int | None) -> None:
    """
    :param name: Name of an argument
    :param value: Its value; None is accepted
    :raises ValueError: If it is not an integer from 1 on
    """
    if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}={value!r}: expected an integer that is at least 1.")


def is_number(value: Any) -> bool:
    """
    :param value: Any object
    :return: Whether it is a real number; True and False are none
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_positive(name: str, value: float | None, required: bool = False) -> None:
    if (value is not None or required) and not (is_number(value) and 0 < value < np.inf):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: expected a positive number of metres.")


def refuse_setting(name: str, *others: str) -> None:
    """
    :param name: Name of an attribute of the task that cannot be changed any more
    :param others: Names that the caller can set besides those of the task
    :raises ValueError: Always, with the names that can be set
    """
    raise ValueError(
        f"{name!r} is fixed when the environment is made: pass it to gym.make or BatchVecEnv. "
        f"Attributes that can be set later are {', '.join((*SETTABLE, *others))}."
    )


def check_task_arguments(face: Callable[..., Any], arguments: Iterable[str]) -> None:
    """
    :param face: The class that was called
    :param arguments: Names of the arguments that it hands on to ``GoalTask``
    :raises TypeError: If ``GoalTask`` does not know one of them, with the names that ``face`` takes
    """
    known = [*inspect.signature(GoalTask).parameters]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        own = [name for name in inspect.signature(face).parameters if name != "task_kwargs"]
        raise TypeError(f"{face.__name__} has no argument {', '.join(unknown)}. Its arguments are {', '.join(own + known)}.")


def _make_robot(robot: str, maze: Any, table: str | None) -> Robot:
    if robot == "arm":
        if table is None or maze is not None:
            raise ValueError(f"The arm works on a table, not in a maze: pass table= one of {', '.join(TABLES)}, and no maze.")
        _check_choice("table", table, tuple(TABLES))
        return Arm()
    if table is not None:
        raise ValueError(f"table={table!r} is for the arm, but the robot is {robot!r}. Leave table out.")
    if robot == "ant":
        return Ant(on_field=maze is None)
    if robot == "humanoid":
        return Humanoid()
    if maze is None:
        raise ValueError("The point acts in mazes only: pass maze= a name or a maze as text.")
    return Point()
