import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium.utils import seeding
from mujoco.batch import Batch, SimulationError

from sb3_deepcrl.envs.task import GoalTask

# Beyond this a number in an observation can only come from a diverging simulation (meters, radians, seconds and products)
MAX_OBSERVATION = 1e6


class Transition(NamedTuple):
    """What one step of all environments leads to. Every array is new, so callers may keep and change it."""

    #: Entries "observation", "achieved_goal" and "desired_goal" in float32
    observation: dict[str, np.ndarray]
    reward: np.ndarray
    #: Whether the robot fell
    terminated: np.ndarray
    #: Whether the physics broke down
    diverged: np.ndarray
    #: Measures of each environment by name, as lists of Python numbers
    info: dict[str, list[Any]]


class Simulation:
    """
    n environments of one task on ``mujoco.batch.Batch``. Each environment has its own random numbers and its own state,
    so what it does depends neither on the number of environments nor on the number of threads.
    """

    def __init__(self, task: GoalTask, n_envs: int, n_threads: int):
        self.task = task
        self.n_envs = n_envs
        self.n_threads = n_threads
        self.generators: list[np.random.Generator] = [seeding.np_random()[0] for _ in range(n_envs)]
        #: Goals in meters, shape (n_envs, goal_dim)
        self.goals = np.zeros((n_envs, task.robot.goal_dim), dtype=np.float32)
        #: Number of simulations that broke down so far
        self.n_diverged = 0
        self._open()
        # A state row is all that a simulation remembers, so writing this row is a complete reset
        self.batch.reset(stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self._fresh_row = self.batch.state[0].copy()
        self._observation = np.zeros((n_envs, task.robot.observation_dim), dtype=np.float32)
        self._running = False
        # Numbers that chose start and goal of a fixed goal; NaN where they are still to be drawn
        self._fixed = np.full((n_envs, task.scene.n_uniform), np.nan)

    def _open(self) -> None:
        # Not persistent: one MjData a thread, instead of one an environment, stays in the cache and was faster for every robot
        self._batch: Batch | None = Batch(self.task.model, self.n_envs, self.n_threads)
        self._state = {name: self.batch.bind(name) for name in ("qpos", "qvel", "ctrl", *self.task.robot.derived_fields)}
        self._warnings = self.batch.warning[:, :, 1]

    def __getstate__(self) -> dict[str, Any]:
        # A batch can neither be copied nor pickled; a closed one is none
        rows = None if self._batch is None else self.batch.state.copy()
        return {**self.__dict__, "_batch": rows, "_state": {}, "_warnings": self._warnings.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if (rows := state["_batch"]) is not None:
            self._open()
            self.batch.state[:] = rows

    @property
    def batch(self) -> Batch:
        """The simulations themselves, as long as the environments are open."""
        self.check_open()
        assert self._batch is not None
        return self._batch

    def seed(self, index: int, generator: np.random.Generator) -> None:
        """Give an environment other random numbers, from its next reset on."""
        self.generators[index] = generator
        self._fixed[index] = np.nan

    def reset(
        self, indices: np.ndarray, given: Sequence[tuple[np.ndarray | None, np.ndarray | None]] = ()
    ) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
        """
        Start a new episode in some environments, with sorted indices, at a start and goal for each of them as
        ``check_options`` returns them; without, all are drawn. The result are their observations and measures.
        """
        batch, task = self.batch, self.task
        self._running = True
        uniform, *noise = task.draw([self.generators[i] for i in indices])
        if task.goal_mode == "fixed":
            kept = self._fixed[indices]
            uniform = self._fixed[indices] = np.where(np.isnan(kept), uniform, kept)
        start, goal = task.scene.draw(uniform)
        exact = np.full(len(indices), task.scene.exact_start)
        for k, (given_start, given_goal) in enumerate(given):
            if given_start is not None:
                start[k], exact[k] = given_start, True
            if given_goal is not None:
                goal[k] = given_goal
        qpos, qvel = task.start_states(start, exact, *noise)
        batch.state[indices] = self._fresh_row
        self._state["qpos"][indices] = qpos
        self._state["qvel"][indices] = qvel
        self._warnings[indices] = 0
        self.goals[indices] = goal
        if task.robot.derived_fields:
            batch.forward(indices, stage=int(mujoco.mjtStage.mjSTAGE_VEL))
        state = {name: values[indices] for name, values in self._state.items()}
        observation = task.robot.observation(state)
        self._observation[indices] = observation
        observations = self._with_goals(observation, self.goals[indices])
        distance = task.goal_distance(observations["achieved_goal"], observations["desired_goal"])
        return observations, _lists(task.measures(distance, task.is_healthy(state["qpos"])))

    def step(self, actions: np.ndarray) -> Transition:
        """Advance all environments by one control step with actions of shape (n_envs, action_dim)."""
        batch, task = self.batch, self.task
        if not self._running:
            raise RuntimeError("No episode is running. Call reset() before the first step().")
        self._state["ctrl"][:] = task.robot.control(self.check_actions(actions).clip(-1.0, 1.0))
        failed: np.ndarray | list[int] = []
        try:
            batch.step(nstep=task.frame_skip, stage=int(task.robot.derived_stage))
        except SimulationError as error:
            failed = error.ids
        observation = task.robot.observation(self._state)
        diverged = np.zeros(self.n_envs, dtype=bool)
        healthy = task.is_healthy(self._state["qpos"])
        # A comparison with NaN is false, so this also finds NaN
        if len(failed) or self._warnings.any() or not np.abs(observation).max() < MAX_OBSERVATION:
            diverged |= ~(np.abs(observation).max(axis=1) < MAX_OBSERVATION) | self._warnings.any(axis=1)
            diverged[failed] = True
            self._report(diverged)
            # The last sound observation stands in for the broken one
            observation[diverged] = self._observation[diverged]
            healthy |= diverged
        self._observation[:] = observation
        observations = self._with_goals(observation, self.goals)
        distance = task.goal_distance(observations["achieved_goal"], self.goals)
        info = _lists(task.measures(distance, healthy))
        if task.goal_mode == "continuing" and len(reached := np.flatnonzero(info["is_success"])):
            # What the step led to belongs to the goal that was pursued in it; the next action is for the new one
            uniform = np.array([self.generators[i].random(task.scene.n_uniform) for i in reached])
            self.goals[reached] = task.scene.next_goals(uniform, self.goals[reached])
            observations["desired_goal"] = self.goals.copy()
        terminated = ~healthy if task.terminate_when_unhealthy else np.zeros(self.n_envs, dtype=bool)
        reward = task.reward_from_distance(distance).astype(np.float32)
        return Transition(observations, reward, terminated, diverged, info)

    def _with_goals(self, observation: np.ndarray, goals: np.ndarray) -> dict[str, np.ndarray]:
        achieved = observation[:, : self.task.robot.goal_dim].copy()
        return {"observation": observation, "achieved_goal": achieved, "desired_goal": goals.copy()}

    def data(self, index: int, data: mujoco.MjData | None = None) -> mujoco.MjData:
        """Copy the simulation of an environment, with computed kinematics, for rendering or any other function of MuJoCo."""
        data = self.batch.get_data(index, data)
        mujoco.mj_forward(self.task.model, data)
        return data

    def close(self) -> None:
        """End the threads and free the simulations. Whatever needs them is refused from then on."""
        self._batch = None
        # Views of its memory, which would keep it alive
        self._state, self._warnings = {}, np.zeros((0, 0))

    def check_open(self) -> None:
        """Refuse whatever needs a simulation once the environments are closed."""
        if self._batch is None:
            raise RuntimeError("The environment is closed, it cannot be used any more. Make a new one.")

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Refuse actions that are no finite numbers of shape (n_envs, action_dim)."""
        actions = np.asarray(actions)
        if actions.dtype.kind not in "fiu":
            raise ValueError(f"Actions have the data type {actions.dtype}, expected numbers in [-1, 1], e.g. float32.")
        expected = (self.n_envs, self.task.robot.action_dim)
        if actions.shape != expected:
            raise ValueError(
                f"Actions have shape {actions.shape}, expected {expected}: "
                f"{expected[0]} environments with {expected[1]} numbers each for the {self.task.robot.name}."
            )
        if not np.isfinite(actions).all():
            row, column = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(
                f"The action of env {row} is not finite: number {column} is {actions[row, column]}. "
                "Look for a diverging policy, or clean the actions before step()."
            )
        return actions

    def _report(self, diverged: np.ndarray) -> None:
        if self.n_diverged == 0:
            warnings.warn(
                f"The physics of env {np.flatnonzero(diverged).tolist()} diverged. Such an episode is truncated and reset, "
                "the other environments go on. The info holds diverged=True, and n_diverged counts them; this is said once."
            )
        self.n_diverged += int(diverged.sum())


def _lists(measures: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in measures.items()}
