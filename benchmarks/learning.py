"""
DeepCRL against SAC+HER and TQC+HER: the same env steps, the same evaluation episodes.

Each baseline is run with two settings: those of RL Zoo for reaching with HER (FetchReach in its sac.yml and tqc.yml:
one env, one update a step), and with DeepCRL's own number of envs, update ratio, learning rate and first temperature.
The zoo's settings for pushing (batch 2048, three layers of 512) are not run: one of their updates takes about sixty
times as long.

    python benchmarks/learning.py --jobs 2
"""

import argparse
from pathlib import Path

import numpy as np
from experiments import (
    draw_curve,
    machine,
    make_env,
    run_all,
    run_folder,
    runs_of,
    train_and_log,
    use_one_thread,
)
from sb3_contrib import TQC
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.runs import read_rows, write_rows

SUCCESS_THRESHOLD = 0.9
N_ENVS = 16
HER = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"))
ZOO = dict(learning_rate=1e-3, buffer_size=1_000_000, learning_starts=1000, batch_size=256, gamma=0.95, ent_coef="auto")
SAME = dict(learning_rate=3e-4, batch_size=256, gamma=0.99, ent_coef="auto_0.1", gradient_steps=4)


def make_model(name: str, env_id: str, seed: int) -> OffPolicyAlgorithm:
    """
    :param name: One of ``SETTINGS``
    :param env_id: Id of the env
    :param seed: Seed of env and model
    :return: The model
    """
    if name == "DeepCRL":
        env = make_env(env_id, N_ENVS, seed)
        kwargs = dict(depth=4, batch_size=256, train_freq=1, gradient_steps=4)
        return DeepCRL("MultiInputPolicy", env, seed=seed, device="cpu", **kwargs)
    algorithm, settings = name.split(" ", 1)
    algorithm_class: type[SAC] = {"SAC+HER": SAC, "TQC+HER": TQC}[algorithm]
    if settings == "(zoo)":
        env = VecNormalize(make_env(env_id, 1, seed))
        policy_kwargs: dict = dict(net_arch=[64, 64])
        if algorithm_class is TQC:
            policy_kwargs["n_critics"] = 1
        return algorithm_class("MultiInputPolicy", env, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **HER, **ZOO)
    # HerReplayBuffer samples finished episodes only: the first one must have ended
    kwargs = {**HER, **SAME, "learning_starts": 300 * N_ENVS}
    return algorithm_class("MultiInputPolicy", make_env(env_id, N_ENVS, seed), seed=seed, device="cpu", **kwargs)


SETTINGS = ("DeepCRL", "SAC+HER (zoo)", "SAC+HER (same)", "TQC+HER (zoo)", "TQC+HER (same)")


def file_name(name: str, seed: int) -> str:
    """
    :param name: One of ``SETTINGS``
    :param seed: Seed of the run
    :return: Name of its CSV file
    """
    return f"{name.replace(' ', '').replace('(', '-').replace(')', '')}-{seed}.csv"


def reached(
    rows: list[dict[str, str]], column: str, in_a_row: int = 1, threshold: float = SUCCESS_THRESHOLD, of: str = "success_any"
) -> float:
    """
    :param rows: Evaluations of one run, in order
    :param column: ``timesteps`` or ``seconds``
    :param in_a_row: How many evaluations in a row must be good
    :param threshold: How good
    :param of: What is measured
    :return: The column at the first of them, infinity if there are none
    """
    good = [float(row[of]) >= threshold for row in rows]
    for index in range(len(rows) - in_a_row + 1):
        if all(good[index : index + in_a_row]):
            return float(rows[index][column])
    return np.inf


def summarize(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """
    :param rows: All evaluations
    :param args: Arguments of the command line
    :return: The report
    """

    def show(value: float, limit: float) -> str:
        return f"{value:,.0f}" if np.isfinite(value) else f"> {limit:,.0f}"

    lines = [
        "| | median success reaches 90 % at | env steps to 90 % | each seed | to 90 % twice in a row | each seed | "
        "seconds to 90 % | final success | final time at goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    # Of the curve of medians, and of the steps that each seed needs for one and for two evaluations in a row
    curves: dict[str, float] = {}
    medians: dict[int, dict[str, float]] = {1: {}, 2: {}}
    for name in SETTINGS:
        runs = runs_of(rows, name)
        limit, seconds_limit = float(runs[0][-1]["timesteps"]), float(np.median([float(run[-1]["seconds"]) for run in runs]))
        median_run = [
            {"timesteps": rows[0]["timesteps"], "success_any": str(np.median([float(row["success_any"]) for row in rows]))}
            for rows in zip(*runs, strict=True)
        ]
        curves[name] = reached(median_run, "timesteps")
        cells = [show(curves[name], limit)]
        for in_a_row, median in medians.items():
            steps = [reached(run, "timesteps", in_a_row) for run in runs]
            median[name] = float(np.median(steps))
            cells += [show(median[name], limit), ", ".join(show(step, limit) for step in steps)]
        cells.append(show(float(np.median([reached(run, "seconds") for run in runs])), seconds_limit))
        cells.append(f"{np.median([float(run[-1]['success_any']) for run in runs]):.2f}")
        cells.append(f"{np.median([float(run[-1]['time_at_goal_fraction']) for run in runs]):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def ratio(needed: dict[str, float]) -> str:
        best = min(needed[name] for name in SETTINGS[1:])
        more = "" if np.isfinite(best) else "more than "
        return f"{more}{(best if np.isfinite(best) else args.steps) / needed['DeepCRL']:.1f} times"

    return "\n".join(
        [
            f"# DeepCRL against SAC+HER and TQC+HER on {args.env}",
            "",
            f"Command: `python benchmarks/learning.py --env {args.env} --steps {args.steps} --seeds {args.seeds} "
            f"--eval-freq {args.eval_freq} --jobs {args.jobs}`. Medians over {args.seeds} seeds; success is reaching the "
            f"goal at any step, over {args.eval_episodes} evaluation episodes; time at goal is a fraction of the episode; "
            f"seconds are those of the training alone. {machine(args.jobs)}",
            "",
            *lines,
            "",
            "DeepCRL: depth 4, batch 256, 16 envs, one update for 4 transitions, all else default. "
            "(zoo): RL Zoo's settings of FetchReach with HER, one env, one update a step. "
            "(same): DeepCRL's 16 envs, one update for 4 transitions, batch size, learning rate, gamma and first "
            "temperature, SB3's default networks.",
            "",
            f"Until the median success reaches 90 %, the best baseline needs {ratio(curves)} DeepCRL's env steps; in the "
            f"median of what each seed needs, {ratio(medians[1])} as many to reach 90 % in one evaluation and "
            f"{ratio(medians[2])} as many to reach it in two in a row.",
            "",
            "![Success over env steps](learning.png)",
            "",
        ]
    )


def plot(rows: list[dict[str, str]], path: Path, seeds: int) -> None:
    """
    :param rows: All evaluations
    :param path: Where to save the figure
    :param seeds: Number of seeds
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, name in enumerate(SETTINGS):
        for ax, column in zip(axes, ("success_any", "time_at_goal_fraction"), strict=True):
            draw_curve(ax, runs_of(rows, name), column, label=name, lw=2.5 if index == 0 else 1.5)
    axes[0].set_ylabel("success rate (any step)")
    axes[1].set_ylabel("fraction of the episode at the goal")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"Median and range of {seeds} seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PointMaze_UMaze-v3")
    parser.add_argument("--steps", type=int, default=40_000, help="env steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-freq", type=int, default=2_500)
    parser.add_argument("--eval-episodes", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the single runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--only", nargs=2, metavar=("SETTING", "SEED"), help="do this one run")
    args = parser.parse_args()
    folder = run_folder(args.runs, args)

    if args.only is not None:
        use_one_thread()
        name, seed = args.only[0], int(args.only[1])
        train_and_log(
            make_model(name, args.env, seed),
            args.env,
            args.steps,
            folder / file_name(name, seed),
            args.eval_freq,
            args.eval_episodes,
            dict(setting=name, seed=seed),
        )
        return

    common = ["--env", args.env, "--steps", str(args.steps), "--eval-freq", str(args.eval_freq)]
    common += ["--eval-episodes", str(args.eval_episodes), "--runs", str(args.runs)]
    runs = [
        (folder / file_name(name, seed), [*common, "--only", name, str(seed)])
        for seed in range(args.seeds)
        for name in SETTINGS
    ]
    run_all(__file__, runs, args.jobs)
    rows = read_rows(path for path, _ in runs)
    args.results.mkdir(parents=True, exist_ok=True)
    write_rows(args.results / "learning.csv", rows)
    plot(rows, args.results / "learning.png", args.seeds)
    report = summarize(rows, args)
    (args.results / "learning.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
