"""
What there is to know about a GPU in twelve minutes: does everything run on it, does it compute what it should, and how fast.

Each section is a process of its own with a time limit, the most telling ones first. Whatever fails is in the report, and the
others go on. See docs/guide/machines.md for a machine without network::

    python benchmarks/gpu_check.py --output docs/results/gpu.md

With ``--device cpu`` all sections run small, to find slips of the pen.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch as th
from envs import rate
from harness import machine, table
from learn import watch
from stable_baselines3.common.vec_env import VecEnv
from torch.profiler import ProfilerActivity
from update import ENV, PASSES, Size, make_model

from sb3_deepcrl import DeepCRL, evaluate_goals, mean_of_episodes
from sb3_deepcrl.common.compilation import tf32_products
from sb3_deepcrl.common.cuda_graphs import Branch, cuda_graph_backend
from sb3_deepcrl.common.tensor_env import TensorStep
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.tensor_envs import WarpVecEnv

Rows = Iterator[dict[str, Any]]
N_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DTYPES = {"float32": th.float32, "tf32": th.float32, "bfloat16": th.bfloat16}
# "tf32" first, should the time run out
MODES: dict[str, dict[str, Any]] = {
    "graph, tf32": dict(precision="tf32"),
    "graph, tf32, no branches": dict(precision="tf32"),
    "graph, float32": dict(),
    "graph, bfloat16": dict(precision="bfloat16"),
    "graph, tf32, not compiled": dict(precision="tf32", compile=False),
    "compiled, tf32": dict(precision="tf32", cuda_graph=False),
    "plain": dict(compile=False, cuda_graph=False),
}


def milliseconds(function: Callable[[], object], gpu: bool, seconds: float) -> tuple[float, float]:
    """Median over three blocks of calls: of a call, and of its part that the host is busy with."""
    wait = th.cuda.synchronize if gpu else lambda: None
    start = time.perf_counter()
    function()
    wait()
    n = max(3, int(seconds / 3 / (time.perf_counter() - start)))
    until_free, until_done = [], []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(n):
            function()
        until_free.append(time.perf_counter() - start)
        wait()
        until_done.append(time.perf_counter() - start)
    return 1000 * median(until_done) / n, 1000 * median(until_free) / n


def in_graph(function: Callable[[], th.Tensor], gpu: bool) -> Callable[[], object]:
    """The same without launches, on a GPU."""
    if not gpu:
        return function
    backend = cuda_graph_backend(th.device("cuda", 0))
    with backend.warm_up():
        function()
    graph = backend.capture(function)[0]
    return graph.replay


def floor_ms(depth: int, precision: str, gpu: bool) -> float:
    """What the matrix products of an update take alone, one after the other, without launches."""
    batch_size, width = (512, 256) if gpu else (32, 32)
    x = th.randn(batch_size, width, device="cuda" if gpu else "cpu", dtype=DTYPES[precision])
    weights = [width**-0.5 * th.randn_like(x[:1].expand(width, width)) for _ in range(depth)]

    def products() -> th.Tensor:
        y = x
        for k, weight in itertools.product(range(PASSES), weights):
            # Outputs, gradients of inputs, and a third of them gradients of weights
            if k % 3 == 2:
                x.T @ y
            else:
                y = y @ weight
        return y

    with tf32_products(precision == "tf32"):
        return milliseconds(in_graph(products, gpu), gpu, 0.3 if gpu else 0.01)[0]


def teraflops(n: int, k: int, m: int, precision: str, gpu: bool) -> float:
    """Rate of a matrix product."""
    a = th.randn(n, k, device="cuda" if gpu else "cpu", dtype=DTYPES[precision])
    b = th.randn_like(a[:1].expand(m, k)).T
    with tf32_products(precision == "tf32"):
        replay = in_graph(lambda: th.stack([(a @ b)[0] for _ in range(8)]), gpu)
        return 8 * 2 * n * k * m / milliseconds(replay, gpu, 0.2 if gpu else 0.01)[0] / 1e9


def ceilings(gpu: bool) -> Rows:
    """How fast memory and matrix products are, and what the products of an update of width 256 take alone."""
    x = th.empty(2**30 if gpu else 2**20, device="cuda" if gpu else "cpu")
    yield {"what": "copy, TB/s", "memory": 8 * x.numel() / milliseconds(partial(th.empty_like(x).copy_, x), gpu, 0.2)[0] / 1e9}
    del x
    for size in ((512, 256, 256), (256, 512, 256), (8192, 8192, 8192) if gpu else (64, 64, 64)):
        yield {"what": f"product {'x'.join(map(str, size))}, TFLOP/s", **{p: teraflops(*size, p, gpu) for p in DTYPES}}
    for depth in (16, 64) if gpu else (4,):
        yield {"what": f"floor of an update of depth {depth}, ms", **{p: floor_ms(depth, p, gpu) for p in DTYPES}}


def make_update(gpu: bool, depth: int, mode: str, width: int = 256) -> tuple[DeepCRL, Callable[[], th.Tensor]]:
    """A model of the humanoid in one of the ``MODES``, and what does an update of it, on one minibatch."""
    settings, size, device = {"cuda_graph": True, "compile": True, **MODES[mode]}, Size(depth, width, 512), "cuda"
    if not gpu:
        settings, size, device = {**settings, "cuda_graph": False, "compile": False}, Size(depth, 32, 32), "cpu"
    model, observations, actions = make_model(BatchVecEnv(ENV, 1), size, device, settings)
    if "no branches" in mode:
        model._runner.branches = (Branch(), Branch())
    return model, lambda: model._runner.run(observations, actions)


def update(gpu: bool) -> Rows:
    """Width 256, batch 512: the floor are its matrix products alone, one after the other in one graph."""
    for depth in (16, 64) if gpu else (4,):
        floors = {precision: floor_ms(depth, precision, gpu) for precision in DTYPES}
        for mode in MODES:
            before = th.cuda.mem_get_info()[0] if gpu else 0
            start = time.perf_counter()
            model, run = make_update(gpu, depth, mode)
            for _ in range(5):
                outcome = run()
            finite = bool(th.isfinite(outcome).all())
            start_up = time.perf_counter() - start
            ms, host_ms = milliseconds(run, gpu, 1.0 if gpu else 0.01)
            floor = floors[MODES[mode].get("precision", "float32")]
            gibibytes = (before - th.cuda.mem_get_info()[0]) / 2**30 if gpu else 0
            row = {"depth": depth, "mode": mode, "ms": ms, "host ms": host_ms, "floor ms": floor, "times floor": ms / floor}
            yield {**row, "start-up s": start_up, "GiB": gibibytes, "finite": finite}
            if model._runner.graph is not None:
                model._runner.graph.invalidate()
            del model, run


def equality(gpu: bool) -> Rows:
    """Parameters after 12 updates without noise, graphs compared to plain ones (below 1e-4), and TF32 to float32."""
    for depth in (4, 16) if gpu else (4,):
        outcomes, noise = {}, th.randn_like
        th.randn_like = lambda x: x.new_zeros(x.shape)
        try:
            for mode in ("plain", "graph, float32", "graph, tf32, no branches", "graph, tf32", "compiled, tf32"):
                model, run = make_update(gpu, depth, mode, width=64)
                for _ in range(12):
                    run()
                outcomes[mode] = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().double()
        finally:
            th.randn_like = noise
        for mode in list(outcomes)[1:]:
            for other in ("plain", "graph, tf32, no branches")[: 1 + mode.endswith("tf32")]:
                difference = (outcomes[mode] - outcomes[other]).norm() / outcomes[other].norm()
                yield {"depth": depth, "mode": mode, "compared to": other, "relative difference": difference.item()}


def gpu_tests(gpu: bool) -> Rows:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["tests/test_save_load.py"]
    command += ["tests/test_acceleration.py", "tests/test_tensor_envs.py"] if gpu else ["--collect-only"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR", "E  ")):
            yield {"tests": line}
    yield {"tests": process.stdout.splitlines()[-1], "exit status": process.returncode}


def train_for(model: DeepCRL, seconds: float, n_steps: int) -> float:
    """Train for some seconds, so many env steps at a time. Gives the time that it took."""
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        model.learn(n_steps, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
    return spent


def make_learner(gpu: bool, env: VecEnv, depth: int, steps_kept: int, on_device: bool) -> DeepCRL:
    """A model with one update for 40 transitions, and room for so many steps of each env."""
    return DeepCRL(
        "MultiInputPolicy",
        env,
        depth=depth if gpu else 4,
        width=256 if gpu else 32,
        batch_size=512 if gpu else 32,
        buffer_size=env.num_envs * steps_kept,
        learning_starts=env.num_envs,
        train_freq=5,
        gradient_steps=max(1, 5 * env.num_envs // 40),
        precision="auto" if gpu else "float32",
        compile="auto" if gpu else False,
        seed=0,
        device="cuda" if gpu else "cpu",
        replay_buffer_kwargs=dict(on_device=on_device),
    )


def learn(gpu: bool) -> Rows:
    """
    Milliseconds an update of `learn()`, 512 envs and one update for 40 transitions. `train` waits for the GPU, and has
    `sample`, `key` and one call of `mode` in it.
    """
    n_envs = 512 if gpu else 8
    cases = [("AntUMaze-v0", 16, False), ("AntUMaze-v0", 16, True), ("HumanoidUMaze-v0", 64, True)]
    for env_id, depth, on_device in cases if gpu else cases[:2]:
        env = BatchVecEnv(env_id, n_envs, N_THREADS)
        model = make_learner(gpu, env, depth, 1010, on_device)
        # Everything is compiled and captured
        model.learn(n_envs * 10, log_interval=None)  # type: ignore[arg-type]
        seconds: dict[str, float] = {}
        for owner, name, part in (
            (env, "step", "simulate"),
            (model, "predict", "predict"),
            (model.replay_buffer, "add", "add"),
            (model, "train", "train"),
            (model.replay_buffer, "sample_contrastive", "sample"),
            (model, "_graph_key", "key"),
            (model.policy, "set_training_mode", "mode"),
        ):
            watch(seconds, part, owner, name)
        n_updates, n_steps = model._n_updates, model.num_timesteps
        total = train_for(model, 8.0 if gpu else 0.1, n_envs * 20)
        n_updates, n_steps = model._n_updates - n_updates, model.num_timesteps - n_steps
        row = {"env": env_id, "depth": depth, "replay on the GPU": on_device, "env steps/s": n_steps / total}
        yield {**row, "total": 1000 * total / n_updates, **{part: 1000 * spent / n_updates for part, spent in seconds.items()}}
        env.close()


def profile(gpu: bool) -> Rows:
    """The kernels of one update of depth 64; many run beside each other, so that their sum may be more than the update."""
    run = make_update(gpu, 64 if gpu else 4, "graph, tf32")[1]
    for _ in range(6):
        run()
    with th.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if gpu:
            th.cuda.synchronize()
    of = (lambda event: event.self_device_time_total) if gpu else (lambda event: event.self_cpu_time_total)
    events = sorted(profiler.key_averages(), key=of, reverse=True)
    yield {"kernel": "all", "calls": sum(event.count for event in events), "ms": sum(map(of, events)) / 1000}
    for event in events[:15]:
        yield {"kernel": event.key[:70].replace("|", "/"), "calls": event.count, "ms": of(event) / 1000}


def training(gpu: bool) -> Rows:
    """Short trainings with all arguments at their defaults, but for `precision="auto"`: does it learn at all?"""
    for depth, seconds in ((16, 20.0), (64, 25.0)) if gpu else ((4, 0.1),):
        n_envs = 64 if gpu else 2
        env = BatchVecEnv("PointU4Maze-v0", n_envs, N_THREADS)
        sizes: dict[str, Any] = dict(device="cuda") if gpu else dict(device="cpu", width=16, batch_size=32, learning_starts=64)
        model = DeepCRL("MultiInputPolicy", env, depth=depth, precision="auto", seed=0, **sizes)
        # Everything is compiled and captured
        model.learn(model.learning_starts + 20 * n_envs, log_interval=None)  # type: ignore[arg-type]
        train_for(model, seconds, 20 * n_envs)
        eval_env = BatchVecEnv("PointU4MazeEval-v0", n_envs, N_THREADS, max_episode_steps=None if gpu else 5)
        means = mean_of_episodes(evaluate_goals(model, eval_env, n_envs))
        row = {"depth": depth, "seconds": seconds, "env steps": model.num_timesteps, "updates": model._n_updates}
        yield {**row, "success": means["success_any"], "time at the goal": means["time_at_goal_fraction"]}


def envs(gpu: bool) -> Rows:
    """Env steps a second of `BatchVecEnv` on all cores."""
    for env_id, n_envs in itertools.product(
        ("AntUMaze-v0", "HumanoidUMaze-v0", "ArmPushEasy-v0"), (512, 2048) if gpu else (8,)
    ):
        steps_per_second = rate(BatchVecEnv(env_id, n_envs, N_THREADS), 2.0 if gpu else 0.01)
        yield {"env": env_id, "envs": n_envs, "threads": N_THREADS, "env steps/s": steps_per_second}


def random_step(env: WarpVecEnv) -> tuple[th.Tensor, TensorStep]:
    """Step with random actions. Gives these, and what they led to."""
    actions = 2 * th.rand(env.num_envs, *(env.action_space.shape or ()), device=env.device) - 1
    return actions, env.step_tensors(actions)


def step_errors(env_id: str, warp_env: WarpVecEnv, n_envs: int) -> dict[str, float]:
    """How far the observations of some envs are from those of `BatchVecEnv` after one step from the same states."""
    batch_env = BatchVecEnv(env_id, n_envs, N_THREADS)
    batch_env.reset()
    for name in ("qpos", "qvel"):
        batch_env.simulation.batch.bind(name)[:] = warp_env.state[name][:n_envs].numpy(force=True)
    actions, step = random_step(warp_env)
    observation = step.terminal_observation["observation"][:n_envs].numpy(force=True)
    expected: Any = batch_env.step(actions[:n_envs].numpy(force=True))
    batch_env.close()
    errors = abs(observation - expected[0]["observation"])[~expected[2]]
    return {"error": float(np.median(errors)), "99 % below": float(np.quantile(errors, 0.99))}


def tensor_envs(gpu: bool) -> Rows:
    """
    `WarpVecEnv` (extra `warp`): env steps a second of random actions and of `learn()` at depth 4 with one update for 40
    transitions, all on the GPU. Error, and 99 % below: median and 99th percentile of the difference of observations from those
    of `BatchVecEnv` after one step from the same states.
    """
    n_envs, n_compared = (4096, 64) if gpu else (4, 2)
    for env_id in ("AntUMaze-v0", "HumanoidUMaze-v0", "ArmPushEasy-v0") if gpu else ("PointUMaze-v0",):
        start = time.perf_counter()
        env = WarpVecEnv(env_id, n_envs, device="cuda" if gpu else "cpu", n_threads=N_THREADS)
        env.reset_tensors()
        random_step(env)
        start_up = time.perf_counter() - start
        ms, _ = milliseconds(partial(random_step, env), gpu, 3.0 if gpu else 0.01)
        row = {"env": env_id, "envs": n_envs, "start-up s": start_up, "env steps/s": 1000 * n_envs / ms}
        row |= step_errors(env_id, env, n_compared)
        model = make_learner(gpu, env, 4, 300, on_device=True)
        model.learn(n_envs * 10, log_interval=None)  # type: ignore[arg-type]
        n_updates, n_steps = model._n_updates, model.num_timesteps
        total = train_for(model, 6.0 if gpu else 0.1, n_envs * 10)
        row |= {"learn() env steps/s": (model.num_timesteps - n_steps) / total, "diverged": env.n_diverged}
        yield {**row, "ms an update": 1000 * total / (model._n_updates - n_updates)}
        env.close()


# By the seconds that each may take
SECTIONS: dict[Callable[[bool], Rows], float] = {
    ceilings: 40,
    update: 115,
    equality: 65,
    gpu_tests: 140,
    learn: 65,
    training: 65,
    profile: 30,
    envs: 20,
    tensor_envs: 160,
}


def run_section(name: str, device: str) -> None:
    """Print the rows of a section as JSON, line by line, so that those before a failure are kept."""
    section = {section.__name__: section for section in SECTIONS}[name]
    try:
        for row in section(device == "cuda"):
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=720.0, help="time for all sections")
    parser.add_argument("--output", type=Path, help="file for the report (it is always printed)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return run_section(args.worker, args.device)
    start = time.perf_counter()
    lines = ["# What runs on a GPU", "", f"{machine(args.device, N_THREADS)}. Printed by `python {' '.join(sys.argv)}`."]
    for section, limit in SECTIONS.items():
        if section.__name__ not in args.sections:
            continue
        left = min(limit, args.seconds - (time.perf_counter() - start))
        lines += ["", f"## {section.__name__.replace('_', ' ')}", "", " ".join((section.__doc__ or "").split()), ""]
        with tempfile.TemporaryFile("w+") as output:
            command = [sys.executable, "-W", "ignore", __file__, "--device", args.device, "--worker", section.__name__]
            try:
                subprocess.run(command, stdout=output, timeout=max(left, 0.1), check=True)
                end = ""
            except subprocess.SubprocessError as error:
                end = f"Ended early: {type(error).__name__} after {time.perf_counter() - start:.0f} s of all."
            output.seek(0)
            rows = [json.loads(line) for line in output if line.startswith("{")]
        lines += [*(table(rows) if rows else []), *(["", end] if end else [])]
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
