"""
A long run on the ant in the U maze at the paper's update ratio: one update for 40 transitions, three million env steps.

After each ``--eval-freq`` steps it is evaluated on the goals of training and on the far goals behind the wall, and model,
replay buffer and results are saved. Stopped at any time, the same command goes on from there::

    python benchmarks/ant.py
"""

import argparse
import time
from pathlib import Path

import torch as th
from experiments import draw_curve, machine

from sb3_deepcrl import DeepCRL, evaluate_goals, mean_of_episodes
from sb3_deepcrl.analysis.runs import read_rows, write_rows
from sb3_deepcrl.envs import BatchVecEnv

TRANSITIONS_PER_UPDATE = 40
N_ENVS = 64
# Evaluation envs have their own seed, the same for all training seeds
EVAL_SEED = 10_000


def evaluate(model: DeepCRL, env_id: str, n_episodes: int, n_threads: int) -> dict[str, float]:
    """
    :param model: What to evaluate
    :param env_id: Where
    :param n_episodes: Number of episodes, all of them side by side
    :param n_threads: Number of native threads
    :return: Means of the measures of the episodes
    """
    env = BatchVecEnv(env_id, n_episodes, n_threads)
    env.seed(EVAL_SEED)
    means = mean_of_episodes(evaluate_goals(model, env, n_episodes))
    env.close()
    return means


def train(folder: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """
    Train up to ``args.steps`` env steps, from the last checkpoint where there is one.

    :param folder: Folder of the checkpoint and of the results
    :param args: Arguments of the command line
    :return: One row an evaluation
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_path, buffer_path, results = folder / "model.zip", folder / "buffer.pkl", folder / "results.csv"
    env = BatchVecEnv(args.env, N_ENVS, args.n_threads)
    if model_path.exists():
        model = DeepCRL.load(model_path, env, device="cpu")
        model.load_replay_buffer(buffer_path)
        # The results are written before the model, so they may hold an evaluation more
        rows = [row for row in read_rows([results]) if int(row["timesteps"]) <= model.num_timesteps]
    else:
        # So many steps of all envs are as many updates as asked for, 40 / gcd(40, 64) = 5
        steps = 5
        model = DeepCRL(
            "MultiInputPolicy",
            env,
            depth=args.depth,
            batch_size=args.batch_size,
            learning_starts=10_000,
            train_freq=steps,
            gradient_steps=steps * N_ENVS // TRANSITIONS_PER_UPDATE,
            compile=True,
            precision=args.precision,
            seed=args.seed,
            device="cpu",
        )
        rows = []
    seconds = float(rows[-1]["seconds"]) if rows else 0.0
    while model.num_timesteps < args.steps:
        start = time.process_time()
        model.learn(args.eval_freq, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
        seconds += time.process_time() - start
        for env_id in (args.env, args.eval_env):
            means = evaluate(model, env_id, args.eval_episodes, args.n_threads)
            row = {
                "env": env_id,
                "seed": args.seed,
                "timesteps": model.num_timesteps,
                "updates": model._n_updates,
                "seconds": round(seconds, 1),
                **{name: round(value, 4) for name, value in means.items()},
                **{
                    name: round(model.logger.name_to_value[f"train/{name}"], 4)
                    for name in ("critic_loss", "categorical_accuracy", "ent_coef", "entropy")
                },
            }
            rows.append({name: str(value) for name, value in row.items()})
            print(rows[-1], flush=True)
        write_rows(results, rows)
        model.save_replay_buffer(buffer_path)
        model.save(model_path)
    return rows


def report(rows: list[dict[str, str]], output: Path, args: argparse.Namespace) -> None:
    """
    Write the table, the CSV file and the figure.

    :param rows: All evaluations
    :param output: Path of the table
    :param args: Arguments of the command line
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(output.with_suffix(".csv"), rows)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    lines = [
        f"# {args.env}: a long run at the paper's update ratio",
        "",
        f"DeepCRL, depth {args.depth}, batch size {args.batch_size}, precision {args.precision}, "
        f"{N_ENVS} envs, one update for {TRANSITIONS_PER_UPDATE} transitions, seed {args.seed}, {args.eval_episodes} episodes "
        f"an evaluation. Seconds are CPU seconds of `learn()`, without the evaluations. {machine(1)}",
        "",
        "Printed by `python benchmarks/ant.py`.",
        "",
        "| env | env steps | updates | CPU seconds | success at any step | at the last step | time at goal (steps) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for env_id in (args.env, args.eval_env):
        chosen = [row for row in rows if row["env"] == env_id]
        for ax, column in zip(axes, ("success_any", "time_at_goal"), strict=True):
            draw_curve(ax, [chosen], column, label=env_id)
        for row in chosen:
            lines.append(
                f"| {env_id} | {int(row['timesteps']):,} | {int(row['updates']):,} | {float(row['seconds']):,.0f} | "
                f"{float(row['success_any']):.2f} | {float(row['success_last']):.2f} | {float(row['time_at_goal']):.1f} |"
            )
    axes[0].set(ylabel="success at any step")
    most = max(float(row["time_at_goal"]) for row in rows)
    axes[1].set(ylabel="time at goal (steps)", ylim=(0, 1.05 * most or 1.0))
    axes[0].legend()
    fig.savefig(output.with_suffix(".png"), dpi=120)
    output.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="AntUMaze-v0")
    parser.add_argument("--eval-env", default="AntUMazeEval-v0", help="the same task with the far goals")
    parser.add_argument("--steps", type=int, default=3_000_000)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--precision", default="auto", help="bfloat16 where the processor has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-freq", type=int, default=100_000)
    parser.add_argument("--eval-episodes", type=int, default=64)
    parser.add_argument("--n-threads", type=int, default=1, help="threads of the simulation and of torch")
    parser.add_argument("--runs", type=Path, default=Path("runs/ant"), help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ant.md"))
    args = parser.parse_args()
    th.set_num_threads(args.n_threads)
    folder = args.runs / f"{args.env}-depth{args.depth}-batch{args.batch_size}-seed{args.seed}"
    report(train(folder, args), args.output, args)


if __name__ == "__main__":
    main()
