"""
What an exported policy costs: time to write the file, its size, and a call with one observation through onnxruntime, beside
``predict``, each on one CPU core. The actions are compared on 1,000 observations. Run it on an idle machine::

    python benchmarks/export.py --output docs/results/export.md
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch as th
from harness import machine, make_parser, medians, write_report
from update import seconds_of

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.deploy import export_policy


def measure(depth: int, args: argparse.Namespace) -> dict[str, float]:
    """What was measured for one depth, by name."""
    # The critic has no part in it
    policy_kwargs = {"critic_depth": 4}
    model = DeepCRL("MultiInputPolicy", args.env, depth=depth, policy_kwargs=policy_kwargs, device="cpu", seed=0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        path = export_policy(model, Path(folder) / "policy.onnx")
        found = {"export (CPU s)": time.process_time() - start, "file (MB)": path.stat().st_size / 1e6}
        session = onnxruntime.InferenceSession(path, options)
    spaces = model.observation_space.spaces
    many = {key: np.stack([space.sample() for _ in range(1000)]) for key, space in spaces.items()}
    difference = np.abs(session.run(None, many)[0] - model.predict(many, deterministic=True)[0]).max()
    one = {key: values[:1] for key, values in many.items()}
    calls = {
        "predict (ms)": lambda: model.predict(one, deterministic=True),
        "onnxruntime (ms)": lambda: session.run(None, one),
    }
    found |= {name: 1000 * median(seconds_of(call, "cpu", args.seconds, 2)) for name, call in calls.items()}
    times_as_fast = found["predict (ms)"] / found["onnxruntime (ms)"]
    return {**found, "times as fast": times_as_fast, "largest difference": float(difference)}


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--env", default="PointUMaze-v0")
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64, 256, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = [{"depth": depth, **medians([measure(depth, args) for _ in range(args.rounds)])} for depth in args.depths]
    note = (
        f"`{args.env}`, width 256, float32; {machine('cpu', 1)}, onnxruntime {onnxruntime.__version__}. A call has one "
        f"observation; medians of the calls and of {args.rounds} rounds."
    )
    write_report("Exported policies", note, [rows], args.output)


if __name__ == "__main__":
    main()
