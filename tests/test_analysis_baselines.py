import json

import pytest
from sb3_contrib import TQC
from stable_baselines3 import SAC, HerReplayBuffer

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import BaselinesStudy, DepthStudy
from sb3_deepcrl.analysis.baselines import first_update
from sb3_deepcrl.analysis.runs import make_env, make_model
from tests.studies import STEPS, results_of_scores, run_study, table_of


def test_all_but_the_algorithm_is_the_same():
    study = BaselinesStudy(
        env="PointUMaze-v0",
        depths=[4],
        n_envs=8,
        batch_size=32,
        env_kwargs={"max_episode_steps": 50},
        baseline_hyperparams={"tau": 0.1},
    )
    models = {}
    for label, run in study.settings().items():
        env = make_env(run.env, run.n_envs, run.seed, run.env_kwargs)
        models[label] = make_model(run, env)
        env.close()
    assert [type(model) for model in models.values()] == [DeepCRL, SAC, TQC]
    deepcrl, *baselines = models.values()
    for model in baselines:
        for name in ("n_envs", "batch_size", "train_freq", "gradient_steps", "gamma", "learning_rate", "ent_coef", "seed"):
            assert getattr(model, name) == getattr(deepcrl, name), name
        assert model.learning_starts == 8 * 50 and model.tau == 0.1
        assert isinstance(model.replay_buffer, HerReplayBuffer) and model.replay_buffer.n_sampled_goal == 4
    runs = list(study.settings().values())
    assert all(vars(run) == {**vars(runs[0]), "algorithm": run.algorithm, "hyperparams": run.hyperparams} for run in runs)


def test_deepcrl_is_that_of_the_depth_study():
    settings = BaselinesStudy(depths=[4, 16]).settings()
    assert [settings[f"DeepCRL, depth {depth}"] for depth in (4, 16)] == list(DepthStudy(depths=[4, 16]).settings().values())


def test_first_update():
    assert first_update(64, 300, 1_000_000, None) == 19_200
    assert first_update(64, 300, 1_000_000, 30_000) == 30_000
    assert first_update(64, None, 1_000_000, 500) == 500
    for arguments, message in {
        (64, 300, 1_000_000, 19_199): "is 19199.*64 envs and episodes of 300 steps use at least 19200",
        (64, 300, 19_200, None): "`steps` must be more than the 19200.*got 19200: use more steps or fewer envs",
        (64, None, 1_000_000, None): "no limit of steps.*learning_starts:10000",
    }.items():
        with pytest.raises(ValueError, match=message):
            first_update(*arguments)


def test_report_of_known_scores(tmp_path):
    study = BaselinesStudy(depths=[4, 8], seeds=3, n_envs=8, env_kwargs={"max_episode_steps": 50})
    scores = {
        "DeepCRL, depth 4": [10.0, 11.0, 12.0],
        "DeepCRL, depth 8": [40.0, 41.0, 42.0],
        "SAC+HER": [5.0, 6.0, 7.0],
        "TQC+HER": [11.0, 12.0, 13.0],
    }
    report = study.report(results_of_scores(scores), tmp_path)
    assert [(row[""], row["time at goal"].mean, row["success"].mean, row["seconds"]) for row in report.table] == [
        (label, seeds[1], 1.0, "12") for label, seeds in scores.items()
    ]
    assert report.notes[2:] == [
        "Time at goal of DeepCRL at depth 4 against TQC+HER, the best of the others: intervals overlap.",
        "Time at goal of DeepCRL at depth 8 against TQC+HER, the best of the others: higher.",
    ]
    assert "learning_starts=400" in report.notes[1] and "batch_size=1024" in report.notes[1]
    steps, seconds = report.figure.axes[:2]
    assert [line.get_label() for line in steps.lines] == list(scores)
    assert [line.get_ydata()[-1] for line in seconds.lines] == [11, 41, 6, 12]
    assert list(steps.lines[0].get_xdata()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert list(seconds.lines[0].get_xdata()) == [2, 4, 6, 8, 10, 12]


def test_command(tmp_path):
    options = (
        *("--depths", "4", "--seeds", "1", "--width", "8", "--hyperparams", "learning_starts:80"),
        # A dict that Stable-Baselines3 writes into
        *("--baseline-hyperparams", "policy_kwargs:{'net_arch': [8]}"),
    )
    rows, text = run_study(tmp_path, "baselines", *options)
    table = table_of(text)
    assert [row[""] for row in table] == ["DeepCRL, depth 4", "SAC+HER", "TQC+HER"]
    assert {row["time at goal"] for row in table} == {str(STEPS)} and {row["success"] for row in table} == {"1.00"}
    # Random steps until the first episodes of all four envs have ended, then an update for 40 transitions
    assert len({(row["timesteps"], row["updates"]) for row in rows}) == 2
    assert all((320 - 80) // 40 - int(row["updates"]) in (0, 1) for row in table)
    paths = list((tmp_path / "runs").glob("*/seed-0/run.json"))
    assert len(paths) == 3
    for path in paths:
        run = json.loads(path.read_text())
        if run["algorithm"] != "DeepCRL":
            assert run["hyperparams"]["policy_kwargs"] == {"net_arch": [8]} and run["hyperparams"]["learning_starts"] == 80


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=[3]), "multiple of 4"),
        (dict(baselines=["SAC+HER", "DDPG"]), r"Unknown baseline 'DDPG'. Choose from: SAC\+HER, TQC\+HER"),
        (dict(baselines=[]), "`baselines` must hold at least one value"),
        (
            dict(baseline_hyperparams={"depth": 4}),
            "must be arguments of SAC, but 'depth' is none that can be set",
        ),
        (dict(baseline_hyperparams={"learning_starts": 10}), "`learning_starts` of the baselines is 10, but HER"),
        (dict(steps=400, n_envs=8, env_kwargs={"max_episode_steps": 50}), "`steps` must be more than the 400"),
        (dict(hyperparams={"depth": 8}), "`hyperparams` holds `depth=8`.*use `depths`"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BaselinesStudy(**kwargs)
