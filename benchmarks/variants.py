"""
Variants of DeepCRL side by side, to choose its defaults by learning curves.

``residual_scale``: the factor of the residual branches (the paper's 1, one over the number of blocks N,
or a learnable one that starts there) at several depths.
``departures``: the default against itself with one departure from the paper taken back.
``precision``: matrix products in bfloat16 against float32.

    python benchmarks/variants.py residual_scale --jobs 2
    python benchmarks/variants.py departures --jobs 2
    python benchmarks/variants.py precision --jobs 2
"""

import argparse
import re
from pathlib import Path
from typing import Any

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

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.runs import read_rows, write_rows

N_ENVS = 16


def residual_scale(depth: int, value: float | str) -> dict[str, Any]:
    """
    :param depth: Depth of all networks
    :param value: Factor of the residual branches
    :return: Arguments of DeepCRL
    """
    return dict(depth=depth, batch_size=256, policy_kwargs=dict(residual_scale=value))


# Name of the study: env steps, and for each panel of the figure its variants
STUDIES: dict[str, tuple[int, dict[str, dict[str, dict[str, Any]]]]] = {
    "residual_scale": (
        12_000,
        {
            f"depth {depth}": {f"scale {value}": residual_scale(depth, value) for value in (1, "1/N", "learnable")}
            for depth in (4, 16, 64)
        },
    ),
    "departures": (
        14_000,
        {
            "depth 4": {
                name: dict(depth=4, batch_size=256, **kwargs)
                for name, kwargs in {
                    "default": dict(),
                    "random_goals=0": dict(random_goals=0.0),
                    "ent_coef=auto": dict(ent_coef="auto"),
                    # 16 envs: every 5 steps 2 updates, one for 40 transitions
                    "1 update for 40 transitions": dict(train_freq=5, gradient_steps=2),
                    "all three": dict(random_goals=0.0, ent_coef="auto", train_freq=5, gradient_steps=2),
                }.items()
            }
        },
    ),
    "precision": (
        14_000,
        {
            f"depth {depth}": {name: dict(depth=depth, batch_size=256, precision=name) for name in ("float32", "bfloat16")}
            for depth in (4, 16)
        },
    ),
}


def summarize(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """
    :param rows: All evaluations
    :param args: Arguments of the command line
    :return: The report
    """

    def each(values: list[float]) -> str:
        return f"{np.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"

    lines = [
        "| | | mean success over the run | success at the end | time at goal at the end | updates | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for panel, variants in STUDIES[args.study][1].items():
        for variant in variants:
            runs = runs_of(rows, f"{panel}, {variant}")
            mean_success = [float(np.mean([float(row["success_any"]) for row in run])) for run in runs]
            lines.append(
                f"| {panel} | {variant} | {each(mean_success)} | "
                f"{each([float(run[-1]['success_any']) for run in runs])} | "
                f"{each([float(run[-1]['time_at_goal_fraction']) for run in runs])} | {runs[0][-1]['updates']} | "
                f"{np.median([float(run[-1]['seconds']) for run in runs]):.0f} |"
            )
    return "\n".join(
        [
            f"# Variants of DeepCRL: {args.study}",
            "",
            f"Command: `python benchmarks/variants.py {args.study} --env {args.env} --steps {args.steps} "
            f"--seeds {args.seeds} --eval-freq {args.eval_freq} --jobs {args.jobs}`. Median (each of {args.seeds} seeds). "
            f"Success is reaching the goal at any step, over {args.eval_episodes} evaluation episodes; time at goal is a "
            "fraction of the episode. DeepCRL with batch 256, all else default but for what is named. " + machine(args.jobs),
            "",
            *lines,
            "",
            f"![Success over env steps]({args.study}.png)",
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

    panels = STUDIES[args.study][1]
    figure, axes = plt.subplots(1, len(panels), figsize=(max(4 * len(panels), 6), 3.8), layout="constrained", squeeze=False)
    for ax, (panel, variants) in zip(axes[0], panels.items(), strict=True):
        for variant in variants:
            draw_curve(ax, runs_of(rows, f"{panel}, {variant}"), "success_any", label=variant)
        ax.set_title(panel)
    axes[0, 0].set_ylabel("success rate (any step)")
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"Median and range of {args.seeds} seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--env", default="PointMaze_UMaze-v3")
    parser.add_argument("--steps", type=int, help="env steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-freq", type=int, default=2_000)
    parser.add_argument("--eval-episodes", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"), help="folder of the single runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--only", nargs=3, metavar=("PANEL", "VARIANT", "SEED"), help="do this one run")
    args = parser.parse_args()
    default_steps, panels = STUDIES[args.study]
    args.steps = args.steps or default_steps

    def path_of(panel: str, variant: str, seed: int | str) -> Path:
        return run_folder(args.runs, args) / f"{re.sub(r'[^a-zA-Z0-9.=]+', '-', f'{args.study}-{panel}-{variant}')}-{seed}.csv"

    if args.only is not None:
        use_one_thread()
        panel, variant, seed = args.only[0], args.only[1], int(args.only[2])
        model = DeepCRL(
            "MultiInputPolicy", make_env(args.env, N_ENVS, seed), seed=seed, device="cpu", **panels[panel][variant]
        )
        labels = dict(setting=f"{panel}, {variant}", seed=seed)
        path = path_of(panel, variant, seed)
        train_and_log(model, args.env, args.steps, path, args.eval_freq, args.eval_episodes, labels)
        return

    common = [args.study, "--env", args.env, "--steps", str(args.steps), "--eval-freq", str(args.eval_freq)]
    common += ["--eval-episodes", str(args.eval_episodes), "--runs", str(args.runs)]
    runs = [
        (path_of(panel, variant, seed), [*common, "--only", panel, variant, str(seed)])
        for panel, variants in panels.items()
        for seed in range(args.seeds)
        for variant in variants
    ]
    run_all(__file__, runs, args.jobs)
    rows = read_rows(path for path, _ in runs)
    args.results.mkdir(parents=True, exist_ok=True)
    write_rows(args.results / f"{args.study}.csv", rows)
    plot(rows, args.results / f"{args.study}.png", args)
    report = summarize(rows, args)
    (args.results / f"{args.study}.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
