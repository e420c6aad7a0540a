"""
Random and idle robots beside those of the paper's released code: how long they stay up, how far they come and how fast their
joints turn. Nothing is timed::

    python benchmarks/robots.py
"""

import gymnasium as gym
import numpy as np

from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import GoalTask

# Number of env steps at most
MAX_STEPS = {"Ant": 100, "Humanoid": 300}
# Frequency in Hz, amplitude and whether they are sines or jump from one end to the other
WAVES = {"waves": (1, 0.3, True), "strong waves": (2, 0.6, True), "quick waves": (4, 1.0, True), "jumps": (4, 0.6, False)}
MEASURES = ("steps up", "fallen within 60 steps (%)", "distance (m)", "joint velocity (rad/s)")
# behavior() of 128 robots of the released code (commit 8516075 of scaling-crl, with the physics of brax 0.10.1)
RELEASED = {
    ("AntGoal-v0", "random"): (100.0, 0.0, 1.44, 3.51),
    ("AntGoal-v0", "idle"): (100.0, 0.0, 0.0916, 0.125),
    # Those with waves of 512 robots
    ("AntGoal-v0", "waves"): (100.0, 0.0, 1.46, 2.02),
    ("AntGoal-v0", "strong waves"): (90.2, 11.3, 2.36, 3.92),
    ("AntGoal-v0", "quick waves"): (99.9, 0.2, 2.31, 4.72),
    ("AntGoal-v0", "jumps"): (99.7, 0.4, 2.08, 3.81),
    ("AntUMaze-v0", "random"): (99.9, 0.0, 1.05, 3.50),
    ("AntUMaze-v0", "idle"): (100.0, 0.0, 0.0916, 0.125),
    ("HumanoidGoal-v0", "random"): (40.3, 97.7, 0.51, 1.43),
    ("HumanoidGoal-v0", "idle"): (54.0, 100.0, 0.793, 0.109),
    ("HumanoidUMaze-v0", "random"): (88.8, 0.8, 0.566, 1.20),
    ("HumanoidUMaze-v0", "idle"): (107.0, 0.0, 0.769, 0.115),
}


def behavior(env_id: str, actions: str, n_robots: int = 256) -> tuple[float, ...]:
    """
    Means of ``MEASURES`` over the first episodes of robots whose actions are "random", uniform in [-1, 1], "idle", or one of
    ``WAVES``, for each motor with a random phase. An episode ends with the fall or after ``MAX_STEPS``. The distance is that
    from the start, the velocity a root mean square.
    """
    simulation, rng = Simulation(GoalTask(**gym.spec(env_id).kwargs), n_robots, 1), np.random.default_rng(0)
    for i in range(n_robots):
        simulation.seed(i, np.random.default_rng(i))
    simulation.reset(np.arange(n_robots))
    qpos, qvel = simulation.batch.bind("qpos"), simulation.batch.bind("qvel")
    start, up = qpos[:, :2].copy(), np.ones(n_robots, dtype=bool)
    steps, distance, squares = np.zeros(n_robots), np.zeros(n_robots), []
    shape = (n_robots, simulation.task.robot.action_dim)
    phases = np.random.default_rng(1).uniform(0, 2 * np.pi, shape)
    for step in range(next(n for name, n in MAX_STEPS.items() if env_id.startswith(name))):
        action = rng.uniform(-1, 1, shape) if actions == "random" else np.zeros(shape)
        if actions in WAVES:
            frequency, amplitude, is_sine = WAVES[actions]
            wave = np.sin(2 * np.pi * frequency * step * simulation.task.dt + phases)
            action = amplitude * (wave if is_sine else np.sign(wave))
        terminated = simulation.step(action).terminated
        steps += up
        distance[up] = np.linalg.norm(qpos[up, :2] - start[up], axis=1)
        up &= ~terminated
        squares.append(qvel[up, 6:] ** 2)
        if not up.any():
            break
    return steps.mean(), 100 * (~up & (steps <= 60)).mean(), distance.mean(), np.concatenate(squares).mean() ** 0.5


if __name__ == "__main__":
    print(f"| env | actions | {' | '.join(MEASURES)} |\n|---|---|{'---|' * len(MEASURES)}")
    for (env_id, actions), released in RELEASED.items():
        cells = [f"{ours:.3g} ({theirs:g})" for ours, theirs in zip(behavior(env_id, actions), released, strict=True)]
        print(f"| `{env_id}` | {actions} | {' | '.join(cells)} |", flush=True)
