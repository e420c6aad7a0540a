"""
What an exported policy costs: time to write the file, its size, and a call with one observation through onnxruntime, beside
``predict``, each on one CPU core. The actions are compared on 1,000 observations. Run it on an idle machine::

    python benchmarks/export.py --output docs/results/export.md
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch as th

from sb3_deepcrl import DeepCRL, __version__
from sb3_deepcrl.common.utils import processor
from sb3_deepcrl.deploy import export_policy


def median_ms(call: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a call."""
    times: list[float] = []
    call()
    while sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(depth: int, args: argparse.Namespace, folder: Path) -> str:
    """Row of the table for one depth."""
    # The critic has no part in it
    policy_kwargs = {"critic_depth": 4}
    model = DeepCRL("MultiInputPolicy", args.env, depth=depth, policy_kwargs=policy_kwargs, device="cpu", seed=0)
    start = time.process_time()
    path = export_policy(model, folder / "policy.onnx")
    seconds = time.process_time() - start
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    spaces = model.observation_space.spaces
    many = {key: np.stack([space.sample() for _ in range(1000)]) for key, space in spaces.items()}
    difference = np.abs(session.run(None, many)[0] - model.predict(many, deterministic=True)[0]).max()
    one = {key: values[:1] for key, values in many.items()}
    predict = median_ms(lambda: model.predict(one, deterministic=True), args.seconds)
    run = median_ms(lambda: session.run(None, one), args.seconds)
    size = path.stat().st_size / 1e6
    return f"| {depth} | {seconds:.1f} | {size:.1f} | {predict:.2f} | {run:.2f} | {predict / run:.1f} | {difference:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PointUMaze-v0")
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64, 256, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    parser.add_argument("--output", type=Path, help="file for the table (it is always printed)")
    args = parser.parse_args()
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(depth, args, Path(folder)) for depth in args.depths]
    given = "".join(
        f" --{name} {value}" for name, value in vars(args).items() if value != parser.get_default(name) and name != "depths"
    )
    depths = " ".join(map(str, args.depths))
    text = "\n".join(
        [
            "# Exported policies",
            "",
            f"Printed by `python benchmarks/export.py --depths {depths}{given}`. {processor()}, one thread, float32, "
            f"width 256, "
            f"{args.env}; sb3_deepcrl {__version__}, torch {th.__version__}, onnxruntime {onnxruntime.__version__}. "
            "A call has one observation; medians.",
            "",
            "| depth | export (CPU s) | file (MB) | predict (ms) | onnxruntime (ms) | times as fast | largest difference |",
            "|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
        ]
    )
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
