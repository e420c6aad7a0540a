import errno
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym

# Says something when it is imported
import gymnasium_robotics  # noqa: F401
import numpy as np
import pytest
import torch as th
from gymnasium.envs.registration import EnvSpec
from rich.console import Console
from rliable.metrics import aggregate_iqm
from stable_baselines3.common.save_util import load_from_pkl

import sb3_deepcrl
from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import DepthStudy, cli, provenance, runs
from sb3_deepcrl.analysis.cli import main
from sb3_deepcrl.analysis.runs import (
    Evaluations,
    Run,
    check_hyperparams,
    derived_seed,
    eval_env_of,
    is_complete,
    load_model,
    locked,
    make_env,
    make_model,
    make_single_env,
    random_numbers,
    read_rows,
    records_of,
    results_of,
    train,
    train_all,
    train_side_by_side,
    update_schedule,
    write_rows,
)
from sb3_deepcrl.analysis.statistics import N_LAST, Estimate, critical_depth, curves_of, final_scores, interquartile_mean
from sb3_deepcrl.common.utils import is_for_user
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.envs.task import GoalTask
from tests.envs import GoalReachEnv, add_package

TOY_HYPERPARAMS = {"width": 8, "batch_size": 8, "learning_starts": 40, "buffer_size": 4000, "precision": "float32"}
TOY_OPTIONS = [
    *("--env", "PointUMaze-v0", "--steps", "160", "--n-evaluations", "4", "--n-eval-episodes", "4", "--n-envs", "4"),
    *("--transitions-per-update", "8", "--width", "8", "--batch-size", "8", "--precision", "float32"),
    *("--env-kwargs", "max_episode_steps:20", "--hyperparams", "learning_starts:40", "buffer_size:4000"),
]
# With one update after every 8 steps from 48 on
TOY_COUNTERS = [(40, 0), (80, 5), (120, 10), (160, 15)]


def toy_run(**settings) -> Run:
    hyperparams = {**TOY_HYPERPARAMS, "depth": 4, **settings.pop("hyperparams", {})}
    episode = {"max_episode_steps": 20}
    defaults = dict(env="PointUMaze-v0", steps=160, eval_freq=40, eval_env="PointUMazeEval-v0", n_eval_episodes=4, n_envs=4)
    return Run(
        **{**defaults, "transitions_per_update": 8, "env_kwargs": episode, "eval_kwargs": episode, **settings},
        hyperparams=hyperparams,
    )


def counters(run: Run, folder: Path) -> list[tuple[int, int]]:
    return [(int(row["timesteps"]), int(row["updates"])) for row in results_of(run, folder)]


def n_stored(run: Run, folder: Path) -> int:
    (path,) = run.folder(folder).glob("buffer*.pkl")
    return int(np.count_nonzero(load_from_pkl(path).remaining))


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs, transitions", [(64, 40), (1, 16), (16, 16), (48, 1), (5, 7)])
def test_update_schedule(n_envs, transitions):
    schedule = update_schedule(n_envs, transitions)
    collected = schedule["train_freq"] * n_envs
    assert collected == transitions * schedule["gradient_steps"]
    assert collected == np.lcm(n_envs, transitions)


def test_eval_env():
    assert eval_env_of("AntU4Maze-v0") == "AntU4MazeEval-v0"
    assert eval_env_of("PointUMazeStitch-v0") == "PointUMazeStitchEval-v0"
    for same in ("AntHardestMaze-v0", "HumanoidGoal-v0", "AntU4MazeEval-v0", "PointMaze_UMaze-v3"):
        assert eval_env_of(same) == same


def test_make_env():
    env = make_env("PointUMaze-v0", 3, 5, {"max_episode_steps": 7})
    assert isinstance(env, BatchVecEnv)
    assert env.num_envs == 3
    assert env.get_attr("max_episode_steps") == [7, 7, 7]
    first, other = env.reset()["desired_goal"], make_env("PointUMaze-v0", 3, 5, {"max_episode_steps": 7}).reset()
    assert (first == other["desired_goal"]).all()
    env.close()
    env = make_env("PointMaze_UMaze-v3", 2, 0, {"max_episode_steps": 7})
    env.reset()
    *_, infos = env.step(np.zeros((2, 2)))
    assert all("is_success" in info for info in infos)
    env.close()
    for env_id in ("PointUMaze-v0", "PointMaze_UMaze-v3"):
        for make in (lambda env_id, kwargs: make_env(env_id, 1, 0, kwargs), make_single_env):
            with pytest.raises(ValueError, match=rf"^{env_id} cannot be made with `env_kwargs` {{'walls': 3}}: .*'walls'\."):
                make(env_id, {"walls": 3})


class HandsOn(GoalReachEnv):
    def __init__(self, error=None, walls=0, **kwargs):
        if error is not None:
            raise error("unexpected keyword argument 'walls'" if error is TypeError else "a bug")
        super().__init__(**kwargs)


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError])
def test_bugs_of_an_env_are_not_blamed_on_its_arguments(monkeypatch, error):
    monkeypatch.setitem(gym.registry, "HandsOn-v0", EnvSpec("HandsOn-v0", HandsOn))
    with pytest.raises(error, match=r"a bug|unexpected keyword"):
        make_env("HandsOn-v0", 1, 0, {"error": error, "walls": 3})
    with pytest.raises(ValueError, match=r"it has no argument 'max_step'\. Did you mean 'max_steps'\?"):
        make_env("HandsOn-v0", 1, 0, {"max_step": 3})


class ReadsItself(GoalReachEnv):
    def __init__(self, **kwargs):
        self.walls = kwargs.pop("walls", 0)
        super().__init__(**kwargs)


def test_argument_that_an_env_reads_from_its_kwargs(monkeypatch):
    monkeypatch.setitem(gym.registry, "ReadsItself-v0", EnvSpec("ReadsItself-v0", ReadsItself))
    assert make_env("ReadsItself-v0", 1, 0, {"walls": 3, "max_steps": 7}).get_attr("walls") == [3]
    with pytest.raises(ValueError, match=r"it has no argument 'max_step'\. Did you mean 'max_steps'\?"):
        make_env("ReadsItself-v0", 1, 0, {"max_step": 3})


@pytest.mark.parametrize("algorithm", ["SAC+HER", "TQC+HER"])
def test_other_algorithms_go_on_too(tmp_path, algorithm):
    hyperparams = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "learning_starts": 80, "buffer_size": 4000}
    run = replace(toy_run(steps=120), algorithm=algorithm, hyperparams=hyperparams)
    train(run, tmp_path)
    train(replace(run, steps=160), tmp_path)
    assert counters(replace(run, steps=160), tmp_path) == [(40, 0), (80, 0), (120, 5), (160, 10)]


def test_unknown_algorithm():
    run = toy_run(algorithm="PPO")
    with pytest.raises(ValueError, match=r"Unknown algorithm 'PPO'. Choose one of: DeepCRL, SAC\+HER, TQC\+HER"):
        make_model(run, make_env(run.env, 4, 0))


def test_hyperparams_are_arguments():
    check_hyperparams({"gamma": 0.9, "width": 8, "policy_kwargs": {"norm": "none", "net_arch": [8]}})
    with pytest.raises(ValueError, match=r"'widht' is none that can be set. Did you mean 'width'?"):
        check_hyperparams({"widht": 8})
    with pytest.raises(ValueError, match=r"'seed' is none that can be set. Choose from: learning_rate, "):
        check_hyperparams({"seed": 1})
    for algorithm, hyperparams, message in [
        ("DeepCRL", {"policy_kwargs": {"nrom": 1}}, "`policy_kwargs` in `hyperparams` .*'nrom'.* Did you mean 'norm'?"),
        ("DeepCRL", {"replay_buffer_kwargs": {"gama": 1}}, "`replay_buffer_kwargs` in .* Did you mean 'gamma'?"),
        ("SAC+HER", {"policy_kwargs": {"net_archh": [8]}}, "arguments of SAC, but 'net_archh'.* Did you mean 'net_arch'?"),
        ("TQC+HER", {"policy_kwargs": 3}, "`policy_kwargs` in `hyperparams` must be a dict, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_hyperparams(hyperparams, algorithm)


def test_folder_of_a_run():
    plain = dict(env="PointUMaze-v0", steps=160, eval_freq=40, eval_env="PointUMazeEval-v0", n_eval_episodes=4, n_envs=4)
    run = Run(**plain, transitions_per_update=8, hyperparams={"depth": 4})
    # That of all runs that were made so far
    assert run.folder(Path("runs")) == Path("runs/PointUMaze-v0-DeepCRL-56dfc9ab41/seed-0")
    folder = run.folder(Path()).parent
    assert replace(run, seed=1).folder(Path()) == folder / "seed-1"
    assert replace(run, steps=1000).folder(Path()) == folder / "seed-0"
    others = [
        replace(run, **{name: value})
        for name, value in {
            "env": "PointU2Maze-v0",
            "eval_freq": 41,
            "eval_env": "PointUMaze-v0",
            "n_eval_episodes": 5,
            "n_envs": 5,
            "transitions_per_update": 9,
            "algorithm": "SAC+HER",
            "hyperparams": {"depth": 8},
            "env_kwargs": {"cell_size": 3.0},
            "eval_kwargs": {"cell_size": 3.0},
            "learners": {"deep": {"depth": 8}},
        }.items()
    ]
    assert len(others) == len(vars(run)) - 2
    assert len({other.folder(Path()) for other in [run, *others]}) == len(others) + 1


def test_results_up_to_the_steps(tmp_path):
    run = toy_run(steps=80)
    assert results_of(run, tmp_path) == []
    assert not is_complete(run, tmp_path)
    path = run.folder(tmp_path) / "results.csv"
    write_rows(path, [{"timesteps": steps} for steps in (40, 79)])
    assert not is_complete(run, tmp_path)
    # A longer run has others; not all evaluations are exactly at a multiple of their frequency
    write_rows(path, [{"timesteps": steps} for steps in (40, 80, 88, 120, 120)])
    assert [row["timesteps"] for row in results_of(run, tmp_path)] == ["40", "80"]
    assert is_complete(run, tmp_path)
    assert [row["timesteps"] for row in results_of(replace(run, steps=85), tmp_path)] == ["40", "80", "88"]
    # All models of the last evaluation
    assert len(results_of(replace(run, steps=120), tmp_path)) == 5
    assert not is_complete(replace(run, steps=121), tmp_path)


def test_rows_are_written_as_a_whole(tmp_path):
    rows = [{"a": 1, "b": "x, y"}, {"a": 2, "b": ""}]
    write_rows(tmp_path / "rows.csv", rows)
    with pytest.raises(ValueError, match="c"):
        write_rows(tmp_path / "rows.csv", [*rows, {"a": 3, "c": 4}])
    assert read_rows([tmp_path / "rows.csv"] * 2) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}] * 2


def test_derived_seeds():
    seeds = [derived_seed(seed, steps) for seed in range(10) for steps in (0, 40, 80)]
    assert len(set(seeds)) == 30
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(1, 40) == derived_seed(1, 40)
    # Collector and learners of a run that goes on
    assert len({derived_seed(1, 40), derived_seed(1, 40, 1), derived_seed(1, 40, 2)}) == 3


def test_random_numbers_of_their_own():
    def draw() -> list[float]:
        return [np.random.random(), th.rand(1).item()]

    np.random.seed(0)
    th.manual_seed(0)
    expected = [draw() for _ in range(3)]
    np.random.seed(0)
    th.manual_seed(0)
    state: list = []
    found, own = [draw()], []
    for _ in range(2):
        with random_numbers(state):
            own.append(draw())
        found.append(draw())
    assert found == expected
    # They start where the others are, and go on by themselves
    assert own == expected[1:]


# --- Training that stops and goes on ----------------------------------------------------------------------------------


def test_a_run(tmp_path):
    run = toy_run()
    train(run, tmp_path)
    assert counters(run, tmp_path) == TOY_COUNTERS
    rows = results_of(run, tmp_path)
    assert [row["critic_loss"] == "" for row in rows] == [True, False, False, False]
    assert all(float(row["episode_length"]) == 20 for row in rows)
    assert all(0 <= float(row["time_at_goal"]) <= 20 for row in rows)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    model = load_model(run, tmp_path)
    assert (model.num_timesteps, model._n_updates) == TOY_COUNTERS[-1]
    assert n_stored(run, tmp_path) == 160
    # The same again, and nothing happens
    before = (run.folder(tmp_path) / "model.zip").stat().st_mtime_ns
    train(run, tmp_path)
    assert (run.folder(tmp_path) / "model.zip").stat().st_mtime_ns == before


def test_evaluations_do_not_change_the_training(tmp_path):
    for folder, eval_freq in (("often", 40), ("once", 160)):
        train(toy_run(eval_freq=eval_freq), tmp_path / folder)
    often, once = (
        load_model(toy_run(eval_freq=eval_freq), tmp_path / folder).policy.state_dict()
        for folder, eval_freq in (("often", 40), ("once", 160))
    )
    assert all(th.equal(often[name], once[name]) for name in once)


class Stop:
    """
    Raises KeyboardInterrupt in place of the nth call of a method, or after it.

    :param method: The method
    :param n: Which call
    :param after: Whether the call is still done
    """

    def __init__(self, method, n: int, after: bool = False):
        self.method, self.n, self.after, self.calls = method, n, after, 0

    def __get__(self, instance, owner):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.n and not self.after:
                raise KeyboardInterrupt
            result = self.method(instance, *args, **kwargs)
            if self.calls == self.n:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize(
    "owner, method, n, after, saved",
    [
        (Evaluations, "_on_step", 2, False, 0),
        (Evaluations, "_on_step", 25, False, 2),
        (Evaluations, "evaluate", 2, False, 1),
        (Evaluations, "evaluate", 2, True, 2),
        (DeepCRL, "save_replay_buffer", 2, False, 1),
        # Between replay buffer and model: the model says which buffer counts
        (DeepCRL, "save", 2, False, 1),
        # Between model and results: evaluated again
        (DeepCRL, "save", 2, True, 1),
        (DeepCRL, "save", 4, True, 3),
        (DeepCRL, "train", 7, False, 2),
    ],
)
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, owner, method, n, after, saved):
    run = toy_run()
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, Stop(getattr(owner, method), n, after))
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path)
    assert counters(run, tmp_path) == TOY_COUNTERS[:saved]
    assert not is_complete(run, tmp_path)
    train(run, tmp_path)
    assert counters(run, tmp_path) == TOY_COUNTERS
    assert n_stored(run, tmp_path) == 160
    names = {path.name for path in run.folder(tmp_path).iterdir()}
    assert names == {"buffer-160.pkl", "lock", "model.zip", "results.csv", "run.json"}


def test_a_killed_run_goes_on(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sb3_deepcrl import DeepCRL\n"
        "from sb3_deepcrl.analysis import runs\n"
        "from tests.test_analysis_runs import toy_run\n"
        "save = DeepCRL.save\n"
        "def save_or_die(self, file):\n"
        "    if self.num_timesteps == 120:\n"
        "        file.write(b'half a file')\n"
        "        file.flush()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self, file)\n"
        "DeepCRL.save = save_or_die\n"
        "runs.train(toy_run(), Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, script, tmp_path / "runs"], env=environment, cwd=root, check=False)
    assert result.returncode == -signal.SIGKILL
    run = toy_run()
    assert counters(run, tmp_path / "runs") == TOY_COUNTERS[:2]
    assert len(list(run.folder(tmp_path / "runs").glob("buffer*.pkl"))) == 2
    train(run, tmp_path / "runs")
    assert counters(run, tmp_path / "runs") == TOY_COUNTERS
    assert n_stored(run, tmp_path / "runs") == 160


def test_more_steps_go_on(tmp_path):
    train(toy_run(steps=80), tmp_path)
    rows = results_of(toy_run(steps=80), tmp_path)
    train(toy_run(), tmp_path)
    assert counters(toy_run(), tmp_path) == TOY_COUNTERS
    assert results_of(toy_run(), tmp_path)[:2] == rows
    assert results_of(toy_run(steps=80), tmp_path) == rows


def test_a_continued_run_draws_other_random_numbers(tmp_path):
    # As many random actions at the start of the second part as at that of the first
    run = toy_run(hyperparams={"learning_starts": 1000}, steps=80)
    train(run, tmp_path)
    train(replace(run, steps=160), tmp_path)
    (path,) = run.folder(tmp_path).glob("buffer*.pkl")
    buffer = load_from_pkl(path)
    actions = buffer.actions.reshape(160, -1)
    assert len(np.unique(actions, axis=0)) == 160
    goals = buffer.observations["desired_goal"].reshape(160, -1)
    # 8 episodes of different goals; some goals are drawn twice by chance, but not all of them in the same order
    assert not (goals[:80] == goals[80:]).all()


def test_one_process_a_run(tmp_path):
    run = toy_run(steps=40)
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path; from sb3_deepcrl.analysis.runs import locked\n"
        "folder = Path(sys.argv[1])\n"
        "with locked(folder): print('locked', flush=True); time.sleep(2); (folder / 'last').touch()"
    )
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with locked(folder):
            # It went first
            assert (folder / "last").exists()


# --- What runs were made with -------------------------------------------------------------------------------------------


def set_default(monkeypatch, function, **defaults) -> None:
    """Change defaults of a function for the time of a test."""
    signature = inspect.signature(function)
    values = [
        defaults.get(name, parameter.default)
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    ]
    monkeypatch.setattr(function, "__defaults__", tuple(values))


# A part of the message by what is other
OTHER_CODE = {
    "default": r"`logsumexp_coef` was 0\.1, now 0\.2",
    "policy": r"`policy_kwargs\.norm` was 'layer', now 'none'",
    "env": r"`env\.terminate_when_unhealthy` was True, now False; `eval_env\.terminate_when_unhealthy` was True, now False",
    "registered": r"`eval_env\.goal_set` was 'eval', now 'train'",
    "version": r"the version of sb3_deepcrl was .*, now 9\.9",
    "source": r"its source was \w+, now other",
}


def change_code(monkeypatch, what: str) -> None:
    if what == "default":
        set_default(monkeypatch, DeepCRL.__init__, logsumexp_coef=0.2)
    elif what == "policy":
        set_default(monkeypatch, DeepCRL.policy_aliases["MultiInputPolicy"].__init__, norm="none")
    elif what == "env":
        set_default(monkeypatch, GoalTask.__init__, terminate_when_unhealthy=False)
    elif what == "registered":
        monkeypatch.setitem(gym.spec("PointUMazeEval-v0").kwargs, "goal_set", "train")
    elif what == "version":
        monkeypatch.setattr(sb3_deepcrl, "__version__", "9.9")
    else:
        monkeypatch.setattr(provenance, "source_digest", lambda: "other")


def test_what_a_run_was_made_with(tmp_path):
    threads = th.get_num_threads()
    run = toy_run()
    train(run, tmp_path)
    (record,) = records_of(run, tmp_path)
    assert record["version"] == sb3_deepcrl.__version__
    assert record["source"] == provenance.source_digest()
    assert (record["threads"], record["precision"], record["cores"]) == (threads, "float32", provenance.n_usable_cores())
    assert record["packages"]["torch"] == th.__version__
    assert record["processor"] == provenance.processor() != ""
    found = record["arguments"]
    # What the run says, defaults of DeepCRL, of its policy and of its replay buffer, and of both envs
    assert (found["depth"], found["batch_size"], found["train_freq"]) == (4, 8, 2)
    assert (found["logsumexp_coef"], found["policy_kwargs.norm"]) == (0.1, "layer")
    assert found["replay_buffer_kwargs.on_device"] is False
    assert (found["env.goal"], found["eval_env.goal"], found["env.max_episode_steps"]) == ("continuing", "resample", 20)
    assert set(inspect.signature(GoalTask).parameters) <= {name.removeprefix("env.") for name in found}
    left_out = set(inspect.signature(DeepCRL).parameters) - {name.partition(".")[0] for name in found}
    assert left_out == {"seed", "device", "_init_setup_model"}
    # All that is known of a run that goes on is kept, once
    train(replace(run, steps=200), tmp_path)
    assert records_of(replace(run, steps=200), tmp_path) == [record]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[bool, Path]:
    """Folders of runs of the same study, by whether they are complete."""
    folders = {False: tmp_path_factory.mktemp("half"), True: tmp_path_factory.mktemp("complete")}
    run = DepthStudy(env="PointUMaze-v0", depths=[4], **TOY_STUDY).settings()["depth 4"]
    train(replace(run, steps=80), folders[False])
    train(run, folders[True])
    return folders


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("what", OTHER_CODE)
def test_runs_of_other_code_are_not_reused(trained, monkeypatch, what, complete):
    folder = trained[complete]
    study = DepthStudy(env="PointUMaze-v0", depths=[4], **TOY_STUDY)
    run = study.settings()["depth 4"]
    before = results_of(run, folder)
    change_code(monkeypatch, what)
    name = re.escape(str(run.folder(folder)))
    message = rf"{name} was made with other code \({OTHER_CODE[what]}\)\. .* or `reuse_other_code` .*"
    for call in (
        lambda: train(run, folder),
        lambda: train_all({"": [run]}, folder, console=Console(file=io.StringIO())),
        lambda: study.run(folder, console=Console(file=io.StringIO())),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert results_of(run, folder) == before
    assert not list(folder.glob("*.md"))


def test_the_user_may_reuse_other_code(tmp_path, trained, monkeypatch, capsys):
    shutil.copytree(trained[False], tmp_path, dirs_exist_ok=True)
    change_code(monkeypatch, "version")
    change_code(monkeypatch, "default")
    options = [*TOY_OPTIONS, "--depths", "4", "--seeds", "1", "--jobs", "1", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["depth", *options])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--reuse-other-code" in error
    main(["depth", *options, "--reuse-other-code", "--output", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    version = Path(sb3_deepcrl.__file__).with_name("version.txt").read_text().strip()
    assert f"Made with sb3_deepcrl {version} (" in text and "; then sb3_deepcrl 9.9 (" in text
    assert "Not with the code that wrote this report: PointUMaze-v0-DeepCRL-" in text
    assert f"the version of sb3_deepcrl was {version}, now 9.9" in text
    # The model that went on has brought its own
    assert "logsumexp_coef=0.1, " in text


def test_records_belong_to_the_steps_that_were_made_with_them(tmp_path, monkeypatch):
    run = toy_run(steps=40)
    train(run, tmp_path)
    change_code(monkeypatch, "version")
    longer = replace(run, steps=80)
    with monkeypatch.context() as context:
        context.setattr(DeepCRL, "learn", fail)
        with pytest.raises(RuntimeError, match="killed before it was saved"):
            train(longer, tmp_path, reuse_other_code=True)
    assert [record["timesteps"] for record in records_of(longer, tmp_path)] == [0]
    change_code(monkeypatch, "source")
    train(longer, tmp_path, reuse_other_code=True)
    assert [record["timesteps"] for record in records_of(longer, tmp_path)] == [0, 40]
    # A shorter run ended before
    assert [record["timesteps"] for record in records_of(run, tmp_path)] == [0]


def fail(*args, **kwargs):
    raise RuntimeError("killed before it was saved")


def test_a_run_from_before_records_is_of_unknown_code(tmp_path, trained):
    shutil.copytree(trained[False], tmp_path, dirs_exist_ok=True)
    study = DepthStudy(env="PointUMaze-v0", depths=[4], **TOY_STUDY)
    run = study.settings()["depth 4"]
    path = run.folder(tmp_path) / "run.json"
    settings = json.loads(path.read_text())
    del settings["made_with"]
    path.write_text(json.dumps(settings))
    assert records_of(run, tmp_path) == [{"timesteps": 0}]
    with pytest.raises(ValueError, match=r"was made with unknown code, before runs recorded it\. Use another folder"):
        train(run, tmp_path)
    report = study.run(tmp_path, console=Console(file=io.StringIO()), reuse_other_code=True)
    text = report.path.read_text()
    assert "Made with unknown code on an unknown machine, before runs recorded both; then sb3_deepcrl " in text
    # What was trained since then does not make the beginning known
    with pytest.raises(ValueError, match="unknown code"):
        train(run, tmp_path)


def test_a_report_is_of_its_runs_and_not_of_its_writer(tmp_path, monkeypatch):
    def report() -> str:
        study = DepthStudy(env="PointUMaze-v0", depths=[4, 8], **TOY_STUDY)
        return study.run(tmp_path, jobs=1, console=Console(file=io.StringIO())).path.read_text()

    text = report()
    assert f"torch {th.__version__}, " in text and f"on {provenance.processor()}, " in text
    assert "precision float32." in text and "depth=4 or 8, " in text and "logsumexp_coef=0.1, " in text
    assert "Arguments of env, defaults included: `id='PointUMaze-v0', " in text
    monkeypatch.setattr(provenance, "processor", lambda: "another")
    monkeypatch.setattr(runs, "dependencies", lambda: {"torch": "0.1"})
    assert report() == text
    # One more run, on that machine
    study = DepthStudy(env="PointUMaze-v0", depths=[4, 8, 12], **TOY_STUDY)
    text = study.run(tmp_path, jobs=1, console=Console(file=io.StringIO())).path.read_text()
    assert "2 of 3 runs were made with sb3_deepcrl " in text and "1 of 3 runs were made with sb3_deepcrl " in text
    assert ", torch 0.1, on another, " in text


def test_digest_and_revision_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "sb3_deepcrl"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    digest, revision = provenance.source_digest.__wrapped__, provenance.revision.__wrapped__
    assert digest() == provenance.source_digest()
    (package / "zoo" / "cli.py").write_text("# Has no part in a run")
    assert digest() == provenance.source_digest()
    digests = [digest()]
    for name in ("losses.py", "residual_block.cpp"):
        with (package / "common" / name).open("a") as file:
            file.write("\n")
        digests.append(digest())
    assert len(set(digests)) == 3
    # In no repository, in one that does not know it, in its own, changed
    assert revision() is None
    git = ["git", "-C", str(package.parent), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (package.parent / "file").touch()
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "theirs"], check=True)
    assert revision() is None
    subprocess.run([*git, "add", "sb3_deepcrl"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "ours"], check=True)
    commit = subprocess.run([*git, "log", "-1", "--format=%h"], check=True, capture_output=True, text=True).stdout.strip()
    assert revision() == commit
    (package / "version.txt").write_text("0.2")
    assert revision() == f"{commit}+"


# --- Many runs --------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_trained(tmp_path):
    trained = []

    def record(run, folder, n_threads):
        trained.append((run.hyperparams["depth"], run.seed, n_threads))
        train(run, folder, n_threads)

    study = DepthStudy(env="PointUMaze-v0", depths=[4], **TOY_STUDY)
    study.train_run = record
    assert study.run(tmp_path, jobs=1, console=Console(file=io.StringIO())).path == tmp_path / "depth-PointUMaze-v0.md"
    assert trained == [(4, 0, None)]
    first = {path.name: path.read_bytes() for path in tmp_path.glob("depth-*")}
    assert len(first) == 3
    more = DepthStudy(env="PointUMaze-v0", depths=[4, 8], **{**TOY_STUDY, "seeds": 2})
    more.train_run = record
    more.run(tmp_path, jobs=1, console=Console(file=io.StringIO()))
    assert trained[1:] == [(4, 1, None), (8, 0, None), (8, 1, None)]
    assert len(read_rows([tmp_path / "depth-PointUMaze-v0-2.csv"])) == 2 * 2 * 4
    # The report of the first stays, and each goes to its own file the next time too
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    for again, name in ((more, "depth-PointUMaze-v0-2.md"), (study, "depth-PointUMaze-v0.md")):
        assert again.run(tmp_path, jobs=2, console=Console(file=io.StringIO())).path == tmp_path / name


TOY_STUDY = dict(
    seeds=1,
    steps=160,
    n_evaluations=4,
    n_eval_episodes=4,
    n_envs=4,
    transitions_per_update=8,
    width=8,
    batch_size=8,
    precision="float32",
    env_kwargs={"max_episode_steps": 20},
    hyperparams={"learning_starts": 40, "buffer_size": 4000},
)


def test_two_runs_side_by_side(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    output = io.StringIO()
    train(toy_run(), alone)
    settings = {"one": [toy_run(), toy_run(seed=1)]}
    train_all(settings, together, jobs=2, console=Console(file=output, width=120))
    for seed in range(2):
        assert counters(toy_run(seed=seed), together) == TOY_COUNTERS
    same, other = (load_model(toy_run(seed=seed), together).policy.state_dict() for seed in range(2))
    expected = load_model(toy_run(), alone).policy.state_dict()
    # Up to the order of sums, as the number of threads may differ
    assert all(th.allclose(same[name], expected[name], atol=1e-4) for name in expected)
    assert not all(th.allclose(other[name], expected[name], atol=1e-4) for name in expected)
    # Not a terminal: a line for each run that starts or gets on
    first, *lines = output.getvalue().splitlines()
    assert first == "2 runs, 2 to train"
    for seed in range(2):
        told = [line for line in lines if f"one, seed {seed}, " in line]
        assert re.fullmatch(rf"0:00:\d\d one, seed {seed}, time at goal \d+, 160 of 160 env steps; \d+ % of all", told[-1])
    assert lines[-1].endswith("100 % of all")
    output = io.StringIO()
    train_all(settings, together, console=Console(file=output, width=120), train_function=None)  # type: ignore[arg-type]
    assert output.getvalue() == "2 runs, 0 to train\n"


def test_progress_on_a_terminal(tmp_path):
    train(toy_run(), tmp_path)
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, force_interactive=True)
    train_all({"one": [toy_run()]}, tmp_path, console=console, train_function=None)  # type: ignore[arg-type]
    assert "env steps" in output.getvalue()
    assert "100%" in output.getvalue()
    assert "to train" not in output.getvalue()


def fail_in_process(run, folder, n_threads):
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("function", "message", "note"),
    [
        (train, r"`gamma` must be between 0 and 1, got 2\.0", None),
        (fail_in_process, "a bug", 'in fail_in_process\n    raise ValueError("a bug")'),
    ],
)
def test_errors_of_other_processes_are_raised(tmp_path, function, message, note):
    call = ("", (toy_run(hyperparams={"gamma": 2.0}), tmp_path, None))
    with pytest.raises(ValueError, match=message) as caught:
        train_side_by_side([call], function, 1, lambda: None)
    # A bug has its traceback with it
    assert is_for_user(caught.value) == (note is None)
    assert note is None or note in caught.value.__notes__[0]


def kill_process(run, folder, n_threads):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_processes_are_told(tmp_path):
    settings = {"depth 4": [toy_run(seed=seed) for seed in range(2)]}
    with pytest.raises(ChildProcessError, match=r"of 'depth 4, seed .' ended with exit code -9\. .* use fewer `jobs`"):
        train_all(settings, tmp_path, jobs=2, train_function=kill_process, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_study_is_that_of_its_processes(tmp_path, number):
    options = [*TOY_OPTIONS, "--seeds", "2", "--depths", "4", "--steps", "1000000", "--n-evaluations", "25000"]
    command = [sys.executable, "-m", "sb3_deepcrl.analysis", "depth", *options, "--runs", str(tmp_path), "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*/seed-*/model.zip"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        # To this process alone, as `kill` does; those of a terminal go to the others, too
        process.send_signal(number)
        # The pipe ends with the last process that may write to it
        _, errors = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Stopped. The same command goes on from the last evaluations." in errors.splitlines()
        assert "Traceback" not in errors
    for folder in tmp_path.glob("*/seed-*"):
        with locked(folder):
            pass
        assert read_rows([folder / "results.csv"])


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_seeds", [2, 3, 4, 8, 11])
def test_interquartile_mean(n_seeds):
    curves = np.random.default_rng(0).normal(5.0, 2.0, (n_seeds, 3))
    estimates = interquartile_mean(curves)
    assert [estimate.mean for estimate in estimates] == pytest.approx([aggregate_iqm(column) for column in curves.T])
    for estimate, column in zip(estimates, curves.T, strict=True):
        assert column.min() <= estimate.low <= estimate.mean <= estimate.high <= column.max()
        assert estimate.low < estimate.high


def test_interquartile_mean_by_hand():
    scores = np.array([[0.0], [1.0], [3.0], [100.0]])
    assert interquartile_mean(scores)[0].mean == 2.0
    # Without quarters to cut off it is the mean
    assert interquartile_mean(scores[:3])[0].mean == pytest.approx(4 / 3)
    (same,) = interquartile_mean(np.full((5, 1), 7.0))
    assert same == (7.0, 7.0, 7.0)


def test_interquartile_mean_is_reproducible():
    scores = np.random.default_rng(0).normal(size=(6, 1))
    np.random.seed(1)
    first = interquartile_mean(scores, n_resamples=100)
    number = np.random.random()
    np.random.seed(1)
    assert np.random.random() == number, "the global generator must be left as it was"
    assert interquartile_mean(scores, n_resamples=100) == first
    assert interquartile_mean(scores, n_resamples=100, seed=1) != first


def test_one_seed_has_no_interval():
    (estimate,) = interquartile_mean(np.array([[3.0]]))
    assert estimate.mean == 3.0
    assert np.isnan([estimate.low, estimate.high]).all()
    assert str(estimate) == "3.00"
    assert str(Estimate(123.4, 100.2, 150.7)) == "123 (100 to 151)"
    for curves in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"must have the shape \(n_seeds, n_points\) with at least one of each, got"):
            interquartile_mean(curves)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (Estimate(5, 4, 6), Estimate(2, 1, 3), "higher"),
        (Estimate(2, 1, 3), Estimate(5, 4, 6), "lower"),
        (Estimate(5, 3, 7), Estimate(4, 2, 6), "intervals overlap"),
        (Estimate(5, 4, 6), Estimate(7, 6, 8), "intervals overlap"),
        (Estimate(5, np.nan, np.nan), Estimate(2, 1, 3), "one seed tells nothing"),
        (Estimate(5, 4, 6), Estimate(2, np.nan, np.nan), "one seed tells nothing"),
    ],
)
def test_comparison(first, second, words):
    assert first.compare(second) == words


def test_critical_depth():
    def estimates(**intervals) -> dict[int, Estimate]:
        return {int(depth[1:]): Estimate(sum(interval) / 2, *interval) for depth, interval in intervals.items()}

    assert critical_depth(estimates(d4=(0, 1), d8=(0.5, 2), d16=(3, 4), d32=(5, 6))) == 16
    assert critical_depth(estimates(d16=(3, 4), d4=(0, 1), d8=(1.5, 2))) == 8
    assert critical_depth(estimates(d4=(0, 1), d8=(0.5, 2), d16=(1.5, 4))) is None
    assert critical_depth(estimates(d4=(3, 4), d8=(0, 1), d16=(2, 3.5))) is None
    assert critical_depth({4: Estimate(0, np.nan, np.nan), 8: Estimate(9, np.nan, np.nan)}) is None
    assert critical_depth(estimates(d4=(0, 1))) is None


def test_scores_of_runs():
    seeds = [[{"score": str(value)} for value in values] for values in (range(10), range(100, 108))]
    assert final_scores(seeds, "score").tolist() == [7.0, 105.0]
    assert N_LAST == 5
    assert curves_of(seeds, "score").tolist() == [list(range(8)), list(range(100, 108))]


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("PointU4Maze-v0", ("PointU4MazeEval-v0", 0.95, 32, 1024)),
        ("AntU4Maze-v0", ("AntU4MazeEval-v0", 0.99, 256, 256)),
        # Not of this package
        ("PointMaze_UMaze-v3", ("PointMaze_UMaze-v3", 0.99, 256, 256)),
    ],
)
def test_defaults_follow_the_env(env_id, expected):
    study = DepthStudy(env=env_id)
    run = study.settings()["depth 4"]
    assert (run.eval_env, *(run.hyperparams[name] for name in ("gamma", "width", "batch_size"))) == expected
    assert study.command() == f"python -m sb3_deepcrl.analysis depth --env {env_id}"
    eval_env, gamma, width, batch_size = expected
    other = DepthStudy(env=env_id, width=2 * width, batch_size=batch_size, gamma=gamma, eval_env=eval_env)
    assert other.settings()["depth 4"].hyperparams["width"] == 2 * width
    assert other.command().endswith(f"{env_id} --width {2 * width}")


def test_depth_study(tmp_path, capsys):
    options = [*TOY_OPTIONS, "--depths", "4,8", "--parts", "both,actor", "critic", "--seeds", "2", "--steps", "1.6e2"]
    main(["depth", *options, "--runs", str(tmp_path), "--output", str(tmp_path / "report" / "depth.md"), "--jobs", "1"])
    assert f"Written to {tmp_path / 'report' / 'depth.md'}" in capsys.readouterr().out.replace("\n", "")
    labels = [f"{part}depth {depth}" for part in ("", "actor ", "critic ") for depth in (4, 8)]
    rows = read_rows([tmp_path / "report" / "depth.csv"])
    assert [(row["setting"], row["seed"], int(row["timesteps"]), int(row["updates"])) for row in rows] == [
        (label, str(seed), *row) for label in labels for seed in range(2) for row in TOY_COUNTERS
    ]
    text = (tmp_path / "report" / "depth.md").read_text()
    table = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert table == ["", *labels]
    for part in ("", " of the actor", " of the critic"):
        assert f"Critical depth{part}, the smallest" in text
    assert "![Depth on PointUMaze-v0](depth.png)" in text
    assert (tmp_path / "report" / "depth.png").read_bytes().startswith(b"\x89PNG")
    # What the runs are
    study = DepthStudy(env="PointUMaze-v0", depths=[4, 8], parts=["both", "actor", "critic"], **TOY_STUDY)
    depths = {label: (model.actor_depth or model.depth, model.critic_depth or model.depth) for label, model in (
        (label, load_model(run, tmp_path)) for label, run in study.settings().items()
    )}  # fmt: skip
    assert list(depths.values()) == [(4, 4), (8, 8), (4, 4), (8, 4), (4, 4), (4, 8)]
    # The command of the report makes the same report, now without training
    command = re.search(r"Command: `python -m sb3_deepcrl.analysis (.*?)`", text).group(1)  # type: ignore[union-attr]
    main([*command.split(), "--runs", str(tmp_path), "--jobs", "1"])
    assert (tmp_path / "depth-PointUMaze-v0.md").read_text() == text.replace("(depth.png)", "(depth-PointUMaze-v0.png)")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--env", "PointVMaze-v0"], r"There is no env 'PointVMaze-v0' \(.*\): use an id such as PointU4Maze-v0"),
        (["--depths", "6"], "`depth` must be a positive multiple of 4, .*, got 6: use 4 or 8"),
        (["--depths", "4", "4"], r"`depths` holds a value twice: \[4, 4\]"),
        (["--depths", "four"], "argument --depths: expected a whole number such as 4 or 1e6, got 'four'"),
        (["--depths", "4,8.5"], r"argument --depths: expected a whole number such as 4 or 1e6, got '8\.5'"),
        (["--depths", "4,4"], r"`depths` holds a value twice: \[4, 4\]"),
        (["--depths", "-4"], r"`depths` must be at least 1, got \[-4\]"),
        (["--detphs", "4"], r"there is no option '--detphs'\. Did you mean '--depths'\?"),
        (["--steps", "1.5"], r"argument --steps: expected a whole number such as 4 or 1e6, got '1\.5'"),
        (["--steps", "-5"], "`steps` must be at least 1, got -5"),
        (["--steps", "inf"], "argument --steps: expected a whole number such as 4 or 1e6, got 'inf'"),
        (["--jobs", "two"], "argument --jobs: expected a whole number such as 4 or 1e6, got 'two'"),
        (["--learning-rate", "small"], "argument --learning-rate: expected a number such as 3e-4, got 'small'"),
        (["--learning-rate", "inf"], "`learning_rate` must be positive, got inf"),
        (["--output", "depth.csv"], "`output` must be a Markdown file, .* got 'depth.csv': use 'depth.md'"),
        (["--output", f"{__file__}/depth.md"], f"`output`: '{__file__}' cannot be written to \\(.*\\): choose another place"),
        (["--runs", __file__], f"`runs`: '{__file__}' cannot be written to \\(.*\\): choose another place"),
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--steps", "19"], "`n_evaluations` must be at most the number of steps 19, got 20"),
        (["--jobs", "0"], "`jobs` must be at least 1, got 0"),
        (["--hyperparams", "learning_rate:1e-3"], "`hyperparams` holds `learning_rate=0.001`, which .* use `learning_rate`"),
        (["--hyperparams", "width:8"], "`hyperparams` holds `width=8`, which this study sets itself: use `width`"),
        (["--width", "0"], "`width` must be at least 1, got 0"),
        (["--gamma", "1.5"], "`gamma` must be between 0 and 1, got 1.5"),
        (["--gamma", "0"], "`gamma` must be between 0 and 1, got 0.0"),
        (["--learning-rate", "0"], "`learning_rate` must be positive, got 0.0"),
        (["--parts", "both,none"], r"argument --parts: invalid choice: 'none' \(choose from both, actor, critic\)"),
        (["--hyperparams", "widht:3"], r"`hyperparams` .* 'widht' is none that can be set. Did you mean 'width'\?"),
        (["--hyperparams", "width=3"], "argument --hyperparams: expected key:value, got 'width=3'"),
        ([*TOY_OPTIONS, "--env-kwargs", "walls:3"], r"PointUMaze-v0 cannot be made with `env_kwargs` {'walls': 3}: .*"),
        ([*TOY_OPTIONS, "--hyperparams", "repr_dim:wide"], "`repr_dim` must be a positive integer, got 'wide'"),
        ([*TOY_OPTIONS, "--env-kwargs", "cell_size:wide"], "cell_size='wide': expected a positive number of metres."),
    ],
)
def test_errors_take_one_line(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(["depth", "--jobs", "1", "--runs", str(tmp_path), *options])
    assert error.value.code == 2
    assert re.fullmatch(f"python -m sb3_deepcrl.analysis depth: error: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize("names", [["elsewhere:ElsewhereReach-v0"], ["ElsewhereReach-v0", "--gym-packages", "elsewhere"]])
def test_env_of_another_package(names, tmp_path, monkeypatch):
    add_package(tmp_path, monkeypatch)
    options = [*TOY_OPTIONS, "--env-kwargs", "max_steps:5", "--depths", "4", "8", "--seeds", "1"]
    # In processes of their own, which have to import the package too
    main(["depth", *options, "--env", *names, "--jobs", "2", "--runs", str(tmp_path)])
    text = (tmp_path / "depth-ElsewhereReach-v0.md").read_text()
    assert "--env ElsewhereReach-v0" in text and "--gym-packages elsewhere" in text


def test_id_with_the_module_of_this_package():
    study = DepthStudy(env="sb3_deepcrl:PointUMaze-v0")
    assert (study.env, study.eval_env, study.width) == ("PointUMaze-v0", "PointUMazeEval-v0", 32)
    env = make_env("sb3_deepcrl:PointUMaze-v0", 2, 0)
    assert isinstance(env, BatchVecEnv)
    env.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the first argument must be a study, got none. Choose from: depth, scale, "),
        (["--env", "PointUMaze-v0", "depth"], "the first argument must be a study, got --env. Choose from: depth, scale, "),
        (["dpeth"], "there is no study 'dpeth'. Did you mean 'depth'?"),
        (["value-map"], "there is no study 'value-map'. Did you mean 'value_map'?"),
    ],
)
def test_which_study(capsys, argv, message):
    with pytest.raises(SystemExit):
        main(argv)
    error = capsys.readouterr().err
    assert error.startswith(f"python -m sb3_deepcrl.analysis: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(errno.ENOSPC, "No space left", "a.csv"), "No space left: 'a.csv': free some"), (ValueError("a bug"), None)],
)
def test_what_goes_wrong_in_training(tmp_path, capsys, monkeypatch, error, message):
    def fail(*args):
        raise error

    monkeypatch.setattr(runs, "write_rows", fail)
    with pytest.raises(SystemExit if message else ValueError) as caught:
        main(["depth", *TOY_OPTIONS, "--jobs", "1", "--runs", str(tmp_path)])
    if message:
        assert message in capsys.readouterr().err
    else:
        assert caught.traceback[-1].name == "fail"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_a_study(tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(runs, "make_model", lambda *args: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as error:
        main(["depth", *TOY_OPTIONS, "--jobs", "1", "--runs", str(tmp_path)])
    assert error.value.code == 128 + number
    assert capsys.readouterr().err == "Stopped. The same command goes on from the last evaluations.\n"


def test_a_bug_keeps_its_traceback_and_tells_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_model", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError) as error:
        main(["depth", *TOY_OPTIONS, "--jobs", "1", "--runs", str(tmp_path)])
    assert error.value.__notes__ == ["The same command goes on from the last evaluations."]


def test_command_of_dicts():
    hyperparams = {"energy": "dot", "buffer_size": 4000, "ent_coef": "0.1", "policy_kwargs": {"norm": "none"}}
    command = DepthStudy(hyperparams=hyperparams).command()
    words = shlex.split(command)
    assert " --hyperparams energy:dot buffer_size:4000 " in command
    assert dict(map(cli.key_value, words[words.index("--hyperparams") + 1 :])) == hyperparams


def test_keys_and_values():
    assert [cli.key_value(text) for text in ("gamma:0.9", "energy:dot", "a:b:c", "kwargs:{'x': 1}", "flag:True")] == [
        ("gamma", 0.9),
        ("energy", "dot"),
        ("a", "b:c"),
        ("kwargs", {"x": 1}),
        ("flag", True),
    ]
