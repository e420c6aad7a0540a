import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sb3_deepcrl.analysis.runs import Expression, Run, check_origin, train_all
from tests.studies import RECORD, write_run

RUN = Run("PointUMaze-v0", "PointUMazeEval-v0", steps=160, eval_freq=40, n_eval_episodes=4, hyperparams={"depth": 4})
# A process that does what its first argument says, in place of the runner: it copies runs that were made before
WORKER = """
import os, shutil, signal, sys, time
what, whole, half, folder = sys.argv[1:]
def copy(source):
    shutil.copytree(source, folder, dirs_exist_ok=True)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail":
    sys.exit("sb3-deepcrl train: error: `gamma` must be between 0 and 1, got 2.0")
if what == "bug":
    1 / 0
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (copy(half), sys.exit(143)))
    open(f"{folder}/started", "w")
    time.sleep(60)
copy(whole)
print("trained", os.environ["OMP_NUM_THREADS"], os.getpid())
"""


def use_worker(monkeypatch, tmp_path: Path, what: str) -> None:
    for seed in range(3):
        write_run(replace(RUN, seed=seed), tmp_path / "whole", score=10 + seed)
        write_run(replace(RUN, seed=seed), tmp_path / "half", steps=80)

    def command(run: Run, runs: Path) -> list[str]:
        return [
            "python",
            "-c",
            WORKER,
            what,
            *(str(run.folder(place)) for place in (tmp_path / "whole", tmp_path / "half", runs)),
        ]

    monkeypatch.setattr(Run, "command", command)


def train(runs: Path, n_seeds: int = 1, **kwargs) -> str:
    output = io.StringIO()
    seeds = [replace(RUN, seed=seed) for seed in range(n_seeds)]
    train_all({"depth 4": seeds}, runs, console=Console(file=output, width=120), **kwargs)
    return output.getvalue()


# --- What a run is ------------------------------------------------------------------------------------------------------


def test_command():
    hyperparams = {"contrastive_loss": "symmetric", "policy_kwargs": {"activation_fn": Expression("nn.ReLU"), "norm": "none"}}
    run = replace(RUN, algo="sac", hyperparams={**hyperparams, "callback": ["{folder}"]}, env_kwargs={"maze": "u"}, seed=3)
    run = replace(run, eval_env_kwargs={"maze": "u4"})
    folder = str(run.folder(Path("runs")))
    assert run.command(Path("runs")) == [
        *("python", "-m", "sb3_deepcrl.zoo", "train", "--algo", "sac", "--env", "PointUMaze-v0", "-f", folder),
        *("-n", "160", "--seed", "3", "--eval-env", "PointUMazeEval-v0", "--eval-freq", "40", "--eval-episodes", "4"),
        *("--n-eval-envs", "4", "--save-freq", "40", "--save-replay-buffer", "--resume"),
        *("--hyperparams", "contrastive_loss:'symmetric'", "policy_kwargs:{'activation_fn': nn.ReLU, 'norm': 'none'}"),
        *(f"callback:['{folder}']", "--env-kwargs", "maze:'u'", "--eval-env-kwargs", "maze:'u4'"),
    ]


def test_folder():
    folder = RUN.folder(Path("runs")).parent
    assert str(folder).startswith("runs/PointUMaze-v0-deepcrl-")
    # More steps and seeds are the same setting
    assert replace(RUN, steps=1000).folder(Path("runs")) == folder / "seed-0"
    assert replace(RUN, seed=1).folder(Path("runs")) == folder / "seed-1"
    others = dict(
        env="PointU2Maze-v0",
        eval_env="PointUMaze-v0",
        eval_freq=41,
        n_eval_episodes=5,
        algo="sac",
        hyperparams={"depth": 8},
        env_kwargs={"cell_size": 3.0},
        eval_env_kwargs={"cell_size": 3.0},
        data_of=RUN,
    )
    folders = {replace(RUN, **{name: value}).folder(Path("runs")).parent for name, value in others.items()}
    folders |= {folder, replace(RUN, data_of=RUN, offline_updates=1).folder(Path("runs")).parent}
    assert len(folders) == len(vars(RUN)) - 2 + 1


def test_evaluations_up_to_the_steps(tmp_path):
    assert RUN.evaluations(tmp_path) == {} and not RUN.is_complete(tmp_path)
    write_run(RUN, tmp_path, score=5.0)
    found = RUN.evaluations(tmp_path)
    assert found["timesteps"].tolist() == [40, 80, 120, 160] and found["time_at_goal"].tolist() == [0, 5, 5, 5]
    assert RUN.is_complete(tmp_path)
    # Of a longer run
    assert replace(RUN, steps=100).evaluations(tmp_path)["timesteps"].tolist() == [40, 80]
    assert not replace(RUN, steps=200).is_complete(tmp_path)
    assert replace(RUN, steps=39).evaluations(tmp_path) == {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("source", r"was made with other code of sb3_deepcrl \(source other, now \w+\)\. Use another folder"),
        ("config", r"`gamma=0\.5`, where zoo_configs has 0\.95 now; and 1 more of these runs\. Use another folder"),
    ],
)
def test_runs_of_other_code_are_not_taken(tmp_path, what, message):
    runs = [replace(RUN, seed=seed) for seed in range(3)]
    for run in runs[:2]:
        params = write_run(run, tmp_path) / RUN.env
    check_origin(runs, tmp_path)
    if what == "source":
        (params / "made_with.json").write_text(json.dumps([RECORD, {**RECORD, "num_timesteps": 80, "source": "other"}]))
        # What was made later is of no interest for a shorter run
        check_origin([replace(run, steps=80) for run in runs], tmp_path)
    else:
        for run in runs[:2]:
            path = run.folder(tmp_path) / "deepcrl" / f"{RUN.env}_1" / RUN.env / "config.yml"
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "gamma": 0.5, "n_timesteps": 3}))
    with pytest.raises(ValueError, match=message):
        check_origin(runs, tmp_path)


# --- Many runs ----------------------------------------------------------------------------------------------------------


def test_side_by_side_what_is_missing(tmp_path, monkeypatch):
    use_worker(monkeypatch, tmp_path, "train")
    write_run(RUN, tmp_path / "runs", score=1.0)
    output = train(tmp_path / "runs", n_seeds=3, jobs=2)
    first, *lines = output.splitlines()
    assert first == "3 runs, 2 to train"
    assert any("depth 4, seed 2, time at goal 12, 160 of 160 env steps; " in line for line in lines)
    assert lines[-1].endswith("100 % of all")
    assert RUN.evaluations(tmp_path / "runs")["time_at_goal"][-1] == 1.0
    said = [(replace(RUN, seed=seed).folder(tmp_path / "runs") / "train.log").read_text().split() for seed in (1, 2)]
    assert all(words[0] == "trained" for words in said) and said[0][2] != said[1][2]
    # Nothing is left to do
    monkeypatch.setattr(Run, "command", None)
    assert train(tmp_path / "runs", n_seeds=3) == "3 runs, 0 to train\n"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fail", r"^`gamma` must be between 0 and 1, got 2\.0$"),
        ("kill", r"^A run was killed by signal 9: for lack of memory, use fewer `jobs`\. The end of .*train\.log:$"),
        ("bug", r"(?s)^A run failed with code 1\. The end of .*train\.log:\n.*ZeroDivisionError: division by zero$"),
    ],
)
def test_errors(tmp_path, monkeypatch, what, message):
    use_worker(monkeypatch, tmp_path, what)
    with pytest.raises(ChildProcessError, match=message):
        train(tmp_path / "runs")


def test_ctrl_c_stops_all_and_lets_them_save(tmp_path, monkeypatch):
    use_worker(monkeypatch, tmp_path, "wait")

    def interrupt() -> None:
        while len(list(tmp_path.glob("runs/*/seed-*/started"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "runs", n_seeds=3, jobs=2)
    assert [replace(RUN, seed=seed).read(tmp_path / "runs").num_timesteps for seed in range(3)] == [80, 80, 0]
    # The same call goes on
    use_worker(monkeypatch, tmp_path, "train")
    train(tmp_path / "runs", n_seeds=3)
    assert all(replace(RUN, seed=seed).is_complete(tmp_path / "runs") for seed in range(3))


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_one_process_a_run(tmp_path, monkeypatch):
    use_worker(monkeypatch, tmp_path, "train")
    folder = RUN.folder(tmp_path / "runs")
    folder.mkdir(parents=True)
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); time.sleep(1.5); open(sys.argv[2], 'w')"
    )
    arguments = [sys.executable, "-c", code, str(folder / "lock"), str(folder / "last")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        train(tmp_path / "runs")
        # It went first
        assert (folder / "last").stat().st_mtime < (folder / "train.log").stat().st_mtime


@pytest.mark.slow
def test_a_cluster_of_two_workers(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    use_worker(monkeypatch, tmp_path, "train")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        train(tmp_path / "runs", n_seeds=3, backend="dask", scheduler=cluster.scheduler_address)
        assert all(replace(RUN, seed=seed).is_complete(tmp_path / "runs") for seed in range(3))
        use_worker(monkeypatch, tmp_path, "fail")
        with pytest.raises(ChildProcessError, match=r"^`gamma` must be between 0 and 1, got 2\.0$"):
            train(tmp_path / "other", backend="dask", scheduler=cluster.scheduler_address)


def test_progress_on_a_terminal(tmp_path):
    write_run(RUN, tmp_path)
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, force_interactive=True)
    train_all({"depth 4": [RUN]}, tmp_path, console=console)
    assert "1 runs, 0 to train" in output.getvalue() and "100%" in output.getvalue()
