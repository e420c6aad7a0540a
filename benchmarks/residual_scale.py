"""
Which factor of the residual branches learns best: the paper's 1, one over the number of blocks N,
or a learnable one that starts there, at several depths.

    python benchmarks/residual_scale.py --jobs 2
"""

import argparse
import platform
from pathlib import Path

import numpy as np
from runs import draw_curve, make_env, read_rows, run_all, runs_of, train_and_log, use_one_thread, write_rows

from sb3_deepcrl import DeepCRL

SCALES = ("1", "1/N", "learnable")
N_ENVS = 16


def setting_name(depth: int, scale: str) -> str:
    """
    :param depth: Depth of all networks
    :param scale: One of ``SCALES``
    :return: Name of the setting in the CSV file
    """
    return f"depth {depth}, scale {scale}"


def summarize(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """
    :param rows: All evaluations
    :param args: Arguments of the command line
    :return: The report
    """

    def each(values: list[float]) -> str:
        return f"{np.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"

    lines = [
        "| depth | factor | mean success over the run | success at the end | time at goal at the end | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for depth in args.depths:
        for scale in SCALES:
            runs = runs_of(rows, setting_name(depth, scale))
            mean_success = [float(np.mean([float(row["success_any"]) for row in run])) for run in runs]
            lines.append(
                f"| {depth} | {scale} | {each(mean_success)} | "
                f"{each([float(run[-1]['success_any']) for run in runs])} | "
                f"{each([float(run[-1]['time_at_goal_fraction']) for run in runs])} | "
                f"{np.median([float(run[-1]['seconds']) for run in runs]):.0f} |"
            )
    return "\n".join(
        [
            "# Factor of the residual branches",
            "",
            f"Command: `python benchmarks/residual_scale.py --env {args.env} --steps {args.steps} --seeds {args.seeds} "
            f"--depths {' '.join(map(str, args.depths))} --eval-freq {args.eval_freq} --jobs {args.jobs}`. "
            f"Median (each of {args.seeds} seeds). Success is reaching the goal at any step, over {args.eval_episodes} "
            f"evaluation episodes. DeepCRL with batch 256, all else default. Machine: {platform.machine()}, one thread a "
            f"run, {args.jobs} runs side by side.",
            "",
            *lines,
            "",
            "![Success over env steps](residual_scale.png)",
            "",
        ]
    )


def plot(rows: list[dict[str, str]], path: Path, args: argparse.Namespace) -> None:
    """
    :param rows: All evaluations
    :param path: Where to save the figure
    :param args: Arguments of the command line
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(args.depths), figsize=(4 * len(args.depths), 3.6), layout="constrained", squeeze=False)
    for ax, depth in zip(axes[0], args.depths, strict=True):
        for scale in SCALES:
            draw_curve(ax, runs_of(rows, setting_name(depth, scale)), "success_any", label=scale)
        ax.set_title(f"depth {depth}")
    axes[0, 0].set_ylabel("success rate (any step)")
    axes[0, 0].legend(title="factor", loc="lower right")
    figure.suptitle(f"Median and range of {args.seeds} seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PointMaze_UMaze-v3")
    parser.add_argument("--steps", type=int, default=12_000, help="env steps of each run")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-freq", type=int, default=2_000)
    parser.add_argument("--eval-episodes", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/residual_scale"), help="folder of the single runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--only", nargs=3, metavar=("DEPTH", "SCALE", "SEED"), help="do this one run")
    args = parser.parse_args()

    def path_of(depth: int, scale: str, seed: int) -> Path:
        return args.runs / f"depth{depth}-{scale.replace('/', '_')}-{seed}.csv"

    if args.only is not None:
        use_one_thread()
        depth, scale, seed = int(args.only[0]), args.only[1], int(args.only[2])
        residual_scale = 1.0 if scale == "1" else scale
        model = DeepCRL(
            "MultiInputPolicy",
            make_env(args.env, N_ENVS, seed),
            depth=depth,
            batch_size=256,
            policy_kwargs=dict(residual_scale=residual_scale),
            seed=seed,
            device="cpu",
        )
        labels = dict(setting=setting_name(depth, scale), seed=seed)
        path = path_of(depth, scale, seed)
        train_and_log(model, args.env, args.steps, path, args.eval_freq, args.eval_episodes, labels)
        return

    common = ["--env", args.env, "--steps", str(args.steps), "--eval-freq", str(args.eval_freq)]
    common += ["--eval-episodes", str(args.eval_episodes), "--runs", str(args.runs)]
    runs = [
        (path_of(depth, scale, seed), [*common, "--only", str(depth), scale, str(seed)])
        for depth in args.depths
        for seed in range(args.seeds)
        for scale in SCALES
    ]
    run_all(__file__, runs, args.jobs)
    rows = read_rows(path for path, _ in runs)
    args.results.mkdir(parents=True, exist_ok=True)
    write_rows(args.results / "residual_scale.csv", rows)
    plot(rows, args.results / "residual_scale.png", args)
    report = summarize(rows, args)
    (args.results / "residual_scale.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
