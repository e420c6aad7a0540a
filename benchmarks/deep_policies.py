"""
Does depth help SAC, TD3 and DeepCRL alike? And does a shallow residual tower learn as well as SB3's default network?

``maze``: SAC+HER and TD3+HER with the deep residual policy, and DeepCRL, at three depths on the point maze, with the same
env steps, update ratio, batch size, width, learning rate and discount.
``pendulum``: SAC with the deep residual policy of depth 4 against SB3's default networks.

    python benchmarks/deep_policies.py maze --jobs 1
    python benchmarks/deep_policies.py pendulum --jobs 1
"""

import argparse
import csv
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from experiments import (
    draw_curve,
    machine,
    make_env,
    run_all,
    runs_of,
    train_and_log,
    use_one_thread,
)
from learning import HER, reached
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.runs import read_rows, write_rows

MAZE = "PointMaze_UMaze-v3"
EPISODE_LENGTH = 300
N_ENVS = 8
DEPTHS = (4, 16, 64)
WIDTH = 64
ALGORITHMS = ("SAC+HER", "TD3+HER", "DeepCRL")
# HerReplayBuffer samples finished episodes only: the first ones must have ended
SAME = dict(
    learning_rate=3e-4, batch_size=128, gamma=0.99, train_freq=1, gradient_steps=1, learning_starts=EPISODE_LENGTH * N_ENVS
)

# Width of the towers on Pendulum: twin critics of about as many parameters as SB3's two layers of 256
PENDULUM_WIDTH = 128
PENDULUM = {"SB3's default": ("MlpPolicy", {}), "depth 4": ("DeepMlpPolicy", dict(depth=4, width=PENDULUM_WIDTH))}
PENDULUM_SOLVED = -200.0

# Settings, env steps of a run, env steps between two evaluations, evaluation episodes, seeds
STUDIES = {
    "maze": ([f"{algorithm}, depth {depth}" for depth in DEPTHS for algorithm in ALGORITHMS], 24_000, 3_000, 50, 3),
    "pendulum": (list(PENDULUM), 6_000, 500, 20, 5),
}


def make_model(setting: str, seed: int) -> OffPolicyAlgorithm:
    """
    :param setting: One of the maze's settings
    :param seed: Seed of env and model
    :return: The model
    """
    algorithm, depth = setting.split(", depth ")
    env = make_env(MAZE, N_ENVS, seed)
    if algorithm == "DeepCRL":
        kwargs = dict(depth=int(depth), policy_kwargs=dict(width=WIDTH), compile=False)
        return DeepCRL("MultiInputPolicy", env, seed=seed, device="cpu", **SAME, **kwargs)
    kwargs = dict(policy_kwargs=dict(depth=int(depth), width=WIDTH), seed=seed, device="cpu", **SAME, **HER)
    if algorithm == "SAC+HER":
        return SAC("DeepMultiInputPolicy", env, ent_coef="auto_0.1", **kwargs)
    # The noise of RL Zoo's settings of TD3
    action_noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
    return TD3("DeepMultiInputPolicy", env, action_noise=action_noise, **kwargs)


def run_pendulum(setting: str, seed: int, steps: int, eval_freq: int, n_eval_episodes: int, path: Path) -> None:
    """
    :param setting: One of ``PENDULUM``
    :param seed: Seed of env and model
    :param steps: Number of env steps
    :param eval_freq: Env steps between two evaluations
    :param n_eval_episodes: Number of evaluation episodes
    :param path: The CSV file, which appears when the run is complete
    """
    policy, policy_kwargs = PENDULUM[setting]
    # Learning rate of RL Zoo's settings for Pendulum
    model = SAC(policy, gym.make("Pendulum-v1"), 1e-3, batch_size=128, policy_kwargs=policy_kwargs, seed=seed, device="cpu")
    rows, seconds = [], 0.0
    while model.num_timesteps < steps:
        start = time.process_time()
        model.learn(eval_freq, reset_num_timesteps=False)
        seconds += time.process_time() - start
        eval_env = make_vec_env("Pendulum-v1", n_eval_episodes, seed=10_000)
        mean_return = evaluate_policy(model, eval_env, n_eval_episodes)[0]
        rows.append(
            {
                "setting": setting,
                "seed": seed,
                "timesteps": model.num_timesteps,
                "seconds": round(seconds, 1),
                "return": round(float(mean_return), 1),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(path)


def show_steps(steps: list[float], limit: float) -> str:
    """
    :param steps: For each seed the env steps it needed, infinity if it never got there
    :param limit: Env steps of a run
    :return: Median and each of them
    """

    def show(value: float) -> str:
        return f"{value:,.0f}" if np.isfinite(value) else f"> {limit:,.0f}"

    return f"{show(float(np.median(steps)))} ({', '.join(show(value) for value in steps)})"


def show_values(values: list[float], digits: int = 2) -> str:
    """
    :param values: A number for each seed
    :param digits: Number of decimals
    :return: Median and each of them
    """
    return f"{np.median(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def summarize(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """
    :param rows: All evaluations
    :param args: Arguments of the command line
    :return: The report
    """
    settings = STUDIES[args.study][0]
    command = (
        f"Command: `python benchmarks/deep_policies.py {args.study} --steps {args.steps} --seeds {args.seeds} "
        f"--eval-freq {args.eval_freq} --eval-episodes {args.eval_episodes} --jobs {args.jobs}`. "
        f"Median (each of {args.seeds} seeds)."
    )
    seconds = "Seconds are those of the processor, without evaluations. " + machine(args.jobs)
    if args.study == "pendulum":
        lines = ["| | env steps to -200 | mean return of all evaluations | final return | seconds |", "|---|---|---|---|---|"]
        for setting in settings:
            runs = runs_of(rows, setting)
            steps = [reached(run, "timesteps", threshold=PENDULUM_SOLVED, of="return") for run in runs]
            mean_returns = [float(np.mean([float(row["return"]) for row in run])) for run in runs]
            lines.append(
                f"| {setting} | {show_steps(steps, args.steps)} | {show_values(mean_returns, 0)} | "
                f"{show_values([float(run[-1]['return']) for run in runs], 0)} | "
                f"{np.median([float(run[-1]['seconds']) for run in runs]):.0f} |"
            )
        head = (
            "# SAC on Pendulum-v1: residual towers of depth 4 against SB3's default networks",
            "",
            f"{command} Returns are means of {args.eval_episodes} evaluation episodes. SAC with learning rate 1e-3 and batch "
            f"128, all else default; towers of width {PENDULUM_WIDTH}. {seconds}",
        )
        tail = "![Return over env steps](deep_policies_pendulum.png)"
    else:
        lines = [
            "| | env steps to 50 % success | env steps to 90 % success | mean success over the run | final success | "
            "final time at goal | updates | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for setting in settings:
            runs = runs_of(rows, setting)
            steps = [
                show_steps([reached(run, "timesteps", in_a_row=2, threshold=threshold) for run in runs], args.steps)
                for threshold in (0.5, 0.9)
            ]
            mean_success = [float(np.mean([float(row["success_any"]) for row in run])) for run in runs]
            lines.append(
                f"| {setting} | {steps[0]} | {steps[1]} | {show_values(mean_success)} | "
                f"{show_values([float(run[-1]['success_any']) for run in runs])} | "
                f"{show_values([float(run[-1]['time_at_goal_fraction']) for run in runs])} | {runs[0][-1]['updates']} | "
                f"{np.median([float(run[-1]['seconds']) for run in runs]):.0f} |"
            )
        head = (
            f"# Depth and algorithm on {MAZE}",
            "",
            f"{command} Success is reaching the goal at any step, over {args.eval_episodes} evaluation episodes; env steps "
            "are those of the first of two evaluations in a row that are as good; time at goal is a fraction of the episode. "
            f"{seconds}",
            "",
            f"The same for all: {N_ENVS} envs, one update for {N_ENVS} transitions from {SAME['learning_starts']:,} on, "
            f"batch {SAME['batch_size']}, width {WIDTH}, learning rate {SAME['learning_rate']}, gamma {SAME['gamma']}. "
            "HER with 4 future goals, SAC and DeepCRL start at a temperature of 0.1, TD3 explores with noise of 0.1; "
            "all else default. The budget is small, so that depth 64 can be run on a CPU: it says who learns something early, "
            "not what each can reach.",
        )
        tail = "![Success over env steps](deep_policies_maze.png)"
    return "\n".join([*head, "", *lines, "", tail, ""])


def plot(rows: list[dict[str, str]], path: Path, args: argparse.Namespace) -> None:
    """
    :param rows: All evaluations
    :param path: Where to save the figure
    :param args: Arguments of the command line
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if args.study == "pendulum":
        figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
        for setting in PENDULUM:
            draw_curve(ax, runs_of(rows, setting), "return", label=setting)
        ax.set_ylabel("mean return")
        ax.autoscale(axis="y")
        ax.legend(loc="lower right")
    else:
        figure, axes = plt.subplots(1, len(ALGORITHMS), figsize=(12, 3.8), layout="constrained")
        for ax, algorithm in zip(axes, ALGORITHMS, strict=True):
            for depth in DEPTHS:
                draw_curve(ax, runs_of(rows, f"{algorithm}, depth {depth}"), "success_any", label=f"depth {depth}")
            ax.set_title(algorithm)
        axes[0].set_ylabel("success rate (any step)")
        axes[0].legend(loc="upper left")
    figure.suptitle(f"Median and range of {args.seeds} seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--steps", type=int, help="env steps of each run")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--eval-freq", type=int, help="env steps between two evaluations")
    parser.add_argument("--eval-episodes", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/deep_policies"), help="folder of the single runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--only", nargs=2, metavar=("SETTING", "SEED"), help="do this one run")
    args = parser.parse_args()
    settings, *defaults = STUDIES[args.study]
    for name, default in zip(("steps", "eval_freq", "eval_episodes", "seeds"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or default)
    # Complete runs are only taken up again for the same question
    folder = args.runs / f"{args.study}-{args.steps}-{args.eval_freq}-{args.eval_episodes}"

    def path_of(setting: str, seed: int) -> Path:
        return folder / f"{setting.replace(', ', '-').replace(' ', '')}-{seed}.csv"

    if args.only is not None:
        use_one_thread()
        setting, seed = args.only[0], int(args.only[1])
        path = path_of(setting, seed)
        if args.study == "pendulum":
            run_pendulum(setting, seed, args.steps, args.eval_freq, args.eval_episodes, path)
        else:
            labels = dict(setting=setting, seed=seed)
            train_and_log(make_model(setting, seed), MAZE, args.steps, path, args.eval_freq, args.eval_episodes, labels)
        return

    common = [args.study, "--steps", str(args.steps), "--eval-freq", str(args.eval_freq)]
    common += ["--eval-episodes", str(args.eval_episodes), "--runs", str(args.runs)]
    runs = [
        (path_of(setting, seed), [*common, "--only", setting, str(seed)]) for seed in range(args.seeds) for setting in settings
    ]
    run_all(__file__, runs, args.jobs)
    rows = read_rows(path for path, _ in runs)
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"deep_policies_{args.study}"
    write_rows(args.results / f"{name}.csv", rows)
    plot(rows, args.results / f"{name}.png", args)
    report = summarize(rows, args)
    (args.results / f"{name}.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
