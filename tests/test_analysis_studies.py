import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sb3_deepcrl.analysis import (
    STUDIES,
    AblationStudy,
    BaselinesStudy,
    CollectorStudy,
    DepthStudy,
    DistillationStudy,
    GridStudy,
    OfflineStudy,
    RepresentationStudy,
    StitchingStudy,
    ValueMapStudy,
)
from sb3_deepcrl.analysis.__main__ import key_value, main
from sb3_deepcrl.analysis.report import describe_origin
from sb3_deepcrl.analysis.study import find_eval_env
from tests.studies import RECORD, TOY, check_files, results_of_scores, write_all

TOY_OPTIONS = [
    *("--steps", "160", "--n-evaluations", "4", "--n-eval-episodes", "4", "--env-kwargs", "max_episode_steps:20"),
    *("--hyperparams", "n_envs:4", "width:8", "batch_size:8", "buffer_size:4000", "learning_starts:40", "train_freq:2"),
    "gradient_steps:1",
]


# --- Settings -----------------------------------------------------------------------------------------------------------


def test_eval_env():
    assert find_eval_env("AntU4Maze-v0") == "AntU4MazeEval-v0"
    assert find_eval_env("PointUMazeStitch-v0") == "PointUMazeStitchEval-v0"
    for same in ("AntHardestMaze-v0", "HumanoidGoal-v0", "AntU4MazeEval-v0", "PointMaze_UMaze-v3"):
        assert find_eval_env(same) == same


def test_settings_are_shared():
    """What is trained for one study need not be trained for another."""
    depths = DepthStudy(depths=(4, 16), parts=("both", "actor", "critic")).settings()
    grid = GridStudy().settings()
    assert grid["actor 4, critic 4"] == depths["depth 4"] == depths["actor depth 4"] == depths["critic depth 4"]
    assert grid["actor 16, critic 16"] == depths["depth 16"]
    assert grid["actor 16, critic 4"] == depths["actor depth 16"]
    assert grid["actor 4, critic 16"] == depths["critic depth 16"]
    assert AblationStudy().settings()["complete, depth 16"] == depths["depth 16"]
    assert BaselinesStudy().settings()["DeepCRL, depth 16"] == depths["depth 16"]
    assert ValueMapStudy(depths=(4,)).settings()["depth 4"] == depths["depth 4"]


def test_hyperparams():
    run = DepthStudy(hyperparams={"width": 8, "policy_kwargs": {"norm": "none"}}, parts=("actor",)).settings()["actor depth 8"]
    assert run.hyperparams == {"width": 8, "policy_kwargs": {"norm": "none", "actor_depth": 8}, "depth": 4}
    settings = AblationStudy(depths=(8,)).settings()
    assert settings["plain, depth 8"].hyperparams == {
        "depth": 8,
        "policy_kwargs": {"residual": False, "norm": "none", "activation_fn": "nn.ReLU"},
    }
    settings = AblationStudy(table="departures", variants=("default", "ent_coef=auto")).settings()
    assert {label: run.hyperparams for label, run in settings.items()} == {
        "default, depth 16": {"depth": 16, "transitions_per_update": 16},
        "ent_coef=auto, depth 16": {"depth": 16, "transitions_per_update": 16, "ent_coef": "auto"},
    }


def test_ids_without_version():
    assert DepthStudy(env="PointUMaze").settings() == DepthStudy(env="PointUMaze-v0").settings()
    assert DepthStudy(env="sb3_deepcrl:PointUMaze").eval_env == "sb3_deepcrl:PointUMazeEval-v0"


def test_students_of_printed_commands(tmp_path, capsys):
    study = DistillationStudy(depths=(), pruned_depths=(4,), teacher_depth=8, runs=tmp_path, dry_run=True, seeds=1)
    study.run()
    teacher, student = capsys.readouterr().out.splitlines()
    folder = shlex.split(teacher)[shlex.split(teacher).index("-f") + 1]
    assert f"{folder}/deepcrl/PointBigMaze-v0_1/PointBigMaze-v0.zip" in student and ".." not in student


def test_baselines():
    study = BaselinesStudy(depths=(4, 8), baselines=("sac", "td3"), baseline_hyperparams={"tau": 0.1})
    settings = study.settings()
    assert list(settings) == ["DeepCRL, depth 4", "DeepCRL, depth 8", "SAC+HER", "TD3+HER"]
    deepcrl, _, sac, _ = settings.values()
    # All but the algorithm is the same, with the settings that zoo_configs has for each
    assert sac == replace(deepcrl, algo="sac", hyperparams={"tau": 0.1})
    deep = replace(study, deep_baselines=True).settings()["SAC+HER, depth 8"]
    assert deep.hyperparams == {"tau": 0.1, "policy": "DeepMultiInputPolicy", "policy_kwargs": {"depth": 8}}


def test_offline():
    study = OfflineStudy(hyperparams={"width": 8}, agent_steps=50, learner_hyperparams={"bc_coef": 0.1}, seeds=1)
    agent, learner = study.settings().values()
    assert (agent.hyperparams, agent.steps, agent.eval_freq) == ({"width": 8}, 50, 50)
    assert learner.hyperparams == {"width": 8, "bc_coef": 0.1} and learner.data_of == agent
    # What was learned before the first step and after the last one
    report = study.report(results_of_scores({label: [7.0] for label in study.settings()}))
    assert [row["time at goal"].mean for row in report.table] == [7, 0, 7]


def test_collector_names_its_learners():
    run = CollectorStudy(deep=8, **TOY).settings()["collector depth 8"]
    (callback,) = run.hyperparams["callback"]
    (arguments,) = callback.values()
    assert list(callback) == ["sb3_deepcrl.analysis.collector.Learners"]
    assert (arguments["depths"], arguments["eval_freq"]) == ((8, 4), 40)
    (word,) = (word for word in run.command(Path("runs")) if word.startswith("callback:"))
    assert f"'folder': '{run.folder(Path('runs'))}'" in word


@pytest.mark.parametrize(
    ("study", "kwargs", "message"),
    [
        (DepthStudy, dict(env="PointVMaze-v0"), r"There is no env 'PointVMaze-v0' \(.*\): use an id such as PointU4Maze-v0"),
        (DepthStudy, dict(depths=(6,)), "`depth` must be a positive multiple of 4, .*, got 6: use 4 or 8"),
        (DepthStudy, dict(depths=(4, 4)), r"`depths` holds a value twice: \(4, 4\)"),
        (DepthStudy, dict(steps=-5), "`steps` must be at least 1, got -5"),
        (DepthStudy, dict(depths=()), "There is nothing to train: give at least one value of each option"),
        (GridStudy, dict(actor_depths=()), "There is nothing to train"),
        (DepthStudy, dict(hyperparams={"n_envs": "x"}), "`n_envs` must be a positive integer, got 'x'"),
        (ValueMapStudy, dict(hyperparams={"normalize": True}), "`normalize` cannot be looked into without their env"),
        (ValueMapStudy, dict(hyperparams={"frame_stack": 2}), "`frame_stack` cannot be looked into without their env"),
        (
            DepthStudy,
            dict(env="PointUMaze-v0", eval_env="Pendulum-v1"),
            r"Pendulum-v1 has no goals \(.*\), or reports neither `is_success`",
        ),
        (DepthStudy, dict(jobs=0), "`jobs` must be at least 1, got 0"),
        (DepthStudy, dict(steps=300), "`n_evaluations` must be at most 4, got 20: 64 envs make `steps=300` in so many calls"),
        (DepthStudy, dict(hyperparams={"depth": 8}), "`hyperparams` holds `depth=8`, which this study sets itself"),
        (GridStudy, dict(actor_depths=(4, 5)), "`actor_depths` must be a positive multiple of 4.*got 5: use 4 or 8"),
        (AblationStudy, dict(variants=("no-swish",)), "`variants` must be one of 'complete', .*, got 'no-swish'"),
        (AblationStudy, dict(hyperparams={"policy_kwargs": {"norm": "none"}}), "holds `norm='none'`, which this study sets"),
        (DepthStudy, dict(output="depth.csv"), "`output` must be a Markdown file, .* got 'depth.csv'"),
        (DepthStudy, dict(output=f"{__file__}/depth.md"), r"cannot be written to \(.*\): choose another place"),
        (DepthStudy, dict(runs=__file__), f"'{__file__}' cannot be written to \\(.*\\): choose another place"),
    ],
)
def test_bad_options(tmp_path, study, kwargs, message):
    with pytest.raises(ValueError, match=message):
        study(**{"runs": tmp_path, "dry_run": True, **kwargs}).run()


# --- Reports of known scores --------------------------------------------------------------------------------------------


def test_depth_report():
    study = DepthStudy(depths=(4, 8, 16), seeds=3)
    scores = {"depth 4": [10.0, 11.0, 12.0], "depth 8": [11.0, 12.0, 13.0], "depth 16": [40.0, 41.0, 42.0]}
    report = study.report(results_of_scores(scores))
    assert [(row[""], row["time at goal"].mean, row["seconds"], row["steps to 90 %"]) for row in report.table] == [
        (label, seeds[1], "12", "200") for label, seeds in scores.items()
    ]
    assert report.notes[1].endswith("all smaller ones: 16.")
    steps, seconds = report.figure.axes[:2]
    assert [line.get_label() for line in steps.lines] == list(scores)
    assert [line.get_ydata()[-1] for line in seconds.lines] == [11, 12, 41]
    assert list(steps.lines[0].get_xdata()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert list(seconds.lines[0].get_xdata()) == [2, 4, 6, 8, 10, 12]
    measures = {"critic_loss": 1.0, "actor_output": 2.0, "actor_grad_norm": 3.0}
    results = results_of_scores(scores)
    for number, seeds in enumerate(results.values(), start=1):
        for seed in seeds:
            seed.update({name: np.full(6, 10 * value + number) for name, value in measures.items()})
            seed["critic_grad_norm"] = np.full(6, 100.0**number)
    axes = replace(study, networks=True).report(results).figure.axes[4:]
    assert [(ax.get_ylabel(), ax.get_yscale(), [line.get_ydata()[-1] for line in ax.lines]) for ax in axes] == [
        ("critic loss", "linear", [11, 12, 13]),
        ("|actor output| before tanh", "linear", [21, 22, 23]),
        ("gradient norm, actor", "linear", [31, 32, 33]),
        ("gradient norm, critic", "log", [100, 10_000, 1_000_000]),
    ]


def test_paper_curve_beside_the_depths(tmp_path):
    kwargs = dict(runs=tmp_path, depths=(4, 12, 16), seeds=1)
    study = DepthStudy(env="AntHardestMaze-v0", steps=12_000_000, **kwargs)
    report = study.report(results_of_scores({"depth 4": [60.0], "depth 12": [70.0], "depth 16": [90.0]}))
    *ours, shallow, deep = report.figure.axes[0].lines
    assert len(ours) == 3 and [shallow.get_color(), deep.get_color()] == [ours[0].get_color(), ours[2].get_color()]
    # After 1, 2, ... million steps, drawn over thousands of them
    np.testing.assert_allclose(shallow.get_xydata()[[0, 1, 11]], [[1000, 1.02], [2000, 7.2], [12000, 69.1]], rtol=5e-3)
    assert any("69.1 at depth 4, 141 at depth 16" in note for note in report.notes)
    # Neither for another env, nor before its first evaluation, nor where actor or critic alone is deeper
    for other in (
        DepthStudy(env="AntU2Maze-v0", steps=12_000_000, **kwargs),
        DepthStudy(env="AntHardestMaze-v0", steps=900_000, **kwargs),
        DepthStudy(env="AntHardestMaze-v0", steps=12_000_000, parts=("actor",), **kwargs),
    ):
        assert not other.paper_curves()


def test_grid_report():
    study = GridStudy(actor_depths=(16, 4), critic_depths=(4, 8, 32), seeds=2)
    scores = {f"actor {a}, critic {c}": [float(a + 10 * c), float(a + 10 * c) + 1] for c in (4, 8, 32) for a in (4, 16)}
    # A deeper actor makes the variance larger alone
    scores["actor 16, critic 4"] = [20.0, 70.0]
    report = study.report(results_of_scores(scores))
    verdicts = {note.partition(" (")[0]: note.rpartition(": ")[2] for note in report.notes[1:]}
    assert verdicts == {
        "Deeper actor and critic": "higher.",
        "Deeper actor": "intervals overlap.",
        "Deeper critic": "higher.",
    }
    finals = {(row["actor_depth"], row["critic_depth"], row["seed"]): row["time_at_goal"] for row in report.rows}
    assert finals[16, 8, 1] == 97.0 and len(finals) == 12
    ax = report.figure.axes[0]
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "44", (1, 0): "45", (0, 1): "84", (1, 1): "96", (0, 2): "324", (1, 2): "336"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "8", "32"]
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # The deepest critic at the top


def test_teachers_are_trained_first(tmp_path, monkeypatch):
    trained = []

    def stop(runs_by_label, *args):
        trained.append(list(runs_by_label))
        if len(trained) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sb3_deepcrl.analysis.study.train_all", stop)
    study = DistillationStudy(runs=tmp_path / "runs", hyperparams={"normalize": True})
    with pytest.raises(KeyboardInterrupt):
        study.run()
    assert trained == [["teacher, depth 64"], list(study.settings())]
    (callback,) = study.settings()["student, depth 4"].hyperparams["callback"]
    assert next(iter(callback.values()))["vec_normalize"].endswith("PointBigMaze-v0_1/PointBigMaze-v0/vecnormalize.pkl")
    # Not for a report that cannot be written
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        DistillationStudy(runs=tmp_path / "runs", output=tmp_path / "file" / "report.md").run()
    assert len(trained) == 2


def test_comparisons():
    study = AblationStudy(depths=(4,), variants=("complete", "no-norm", "relu"), seeds=3)
    scores = {
        "complete, depth 4": [40.0, 41.0, 42.0],
        "no-norm, depth 4": [50.0, 51.0, 53.0],
        "relu, depth 4": [1.0, 2.0, 3.0],
    }
    assert study.report(results_of_scores(scores)).notes[1:] == [
        "Time at goal of no-norm, depth 4, against complete: higher.",
        "Time at goal of relu, depth 4, against complete: lower.",
    ]
    scores = {"DeepCRL, depth 4": [10.0, 11.0, 12.0], "SAC+HER": [5.0, 6.0, 7.0], "TQC+HER": [11.0, 12.0, 13.0]}
    assert BaselinesStudy(depths=(4,)).report(results_of_scores(scores)).notes[1:] == [
        "Time at goal of DeepCRL, depth 4 against TQC+HER, the best of the others: intervals overlap."
    ]


def test_origin():
    other = {**RECORD, "num_timesteps": 80, "processor": "another", "arguments": {"depth": 8, "env.maze": "u"}}
    made, *arguments = describe_origin([("deepcrl", [RECORD]), ("deepcrl", [RECORD, other])])
    assert made.startswith("1 of 2 runs made with sb3_deepcrl 0.1 (source ") and "; then sb3_deepcrl" in made
    assert arguments == [
        "Arguments of deepcrl, defaults included: `depth=4 or 8`.",
        "Arguments of env, defaults included: `maze='u'`.",
    ]


# --- The command line ---------------------------------------------------------------------------------------------------


def test_command_makes_the_same_report(tmp_path, capsys):
    study = DepthStudy(env="PointUMaze-v0", depths=(4, 8), runs=tmp_path, output=tmp_path / "here" / "report.md", **TOY)
    write_all(study)
    report = study.run()
    text = check_files(report)
    assert "2 seeds with 95 % bootstrap intervals" in text and "4 of 4 runs made with sb3_deepcrl 0.1" in text
    assert len(report.rows) == 2 * 2 * 4 and set(report.rows[0]) > {"setting", "seed", "timesteps", "time_at_goal", "seconds"}
    command = shlex.split(re.search(r"Command: `(.*)`\.", text)[1])[3:]
    assert command[:5] == ["depth", "--env", "PointUMaze-v0", "--env-kwargs", "max_episode_steps:20"]
    main([*command, "--runs", str(tmp_path)])
    assert f"Written to {tmp_path / 'depth-PointUMaze-v0.md'}" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "depth-PointUMaze-v0.md").read_text() == text.replace("(report.png)", "(depth-PointUMaze-v0.png)")
    # Other options have a report of their own
    main([*command, "--seeds", "1", "--runs", str(tmp_path)])
    assert (tmp_path / "depth-PointUMaze-v0.md").read_text().count("2 seeds") > 0
    assert "One seed" in (tmp_path / "depth-PointUMaze-v0-2.md").read_text()


def test_dry_run(tmp_path, capsys):
    options = ["depth", "--env", "PointUMaze-v0", "--depths", "4", "8", "--seeds", "2", "--runs", str(tmp_path), *TOY_OPTIONS]
    main([*options, "--parts", "both", "actor", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    # The shallow setting of both parts is the same
    assert len(lines) == 6 and all(shlex.split(line)[:4] == ["python", "-m", "sb3_deepcrl.zoo", "train"] for line in lines)
    assert not list(tmp_path.iterdir())
    write_all(DepthStudy(env="PointUMaze-v0", depths=(4,), runs=tmp_path, **TOY))
    main([*options, "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["dpeth"], 2, "Available subcommands: depth, scale, grid"),
        (["depth", "--detphs", "4"], 2, "Perhaps you meant"),
        (["depth", "--depths", "four"], 2, "expected a whole number such as 4 or 1e6, got 'four'"),
        (["depth", "--hyperparams", "width=3"], 2, "expected key:value, got 'width=3'"),
        (["depth", "--parts", "none"], 2, "both"),
        (["depth", "--depths", "6"], 2, "`depth` must be a positive multiple of 4"),
    ],
)
def test_errors_of_the_command_line(capsys, argv, code, message):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == code
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", "").split())


@pytest.mark.parametrize("name", STUDIES)
def test_help(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert "--hyperparams KEY:VALUE" in text and "--dry-run" in text
    assert STUDIES[name].__doc__.split()[0] in text


def test_help_has_a_line_for_each_study(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if "•" in line)
    for line, (name, study) in zip(lines[start:], STUDIES.items(), strict=False):
        assert line.partition("•")[2].split()[0] == name
        assert study.__doc__.strip().partition("\n")[0] in line


def test_keys_and_values():
    texts = ("gamma:0.9", "contrastive_loss:symmetric", "a:b:c", "kwargs:{'x': 1}", "flag:True")
    expected = [("gamma", 0.9), ("contrastive_loss", "symmetric"), ("a", "b:c"), ("kwargs", {"x": 1}), ("flag", True)]
    assert [key_value(text) for text in texts] == expected
    hyperparams = {"contrastive_loss": "symmetric", "buffer_size": 4000, "ent_coef": "0.1", "policy_kwargs": {"norm": "none"}}
    words = shlex.split(DepthStudy(hyperparams=hyperparams).command())
    assert dict(map(key_value, words[words.index("--hyperparams") + 1 :])) == hyperparams


# --- With the real runner -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_stop_and_read(tmp_path):
    """One training for all: it is stopped and goes on, and other studies look into its models."""
    options = ["--env", "PointUMazeStitch-v0", "--depths", "4", "8", "--seeds", "1", *TOY_OPTIONS, "--runs", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_deepcrl.analysis", "depth", *options, "--steps", "1e6", "--n-evaluations", "25000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*/seed-0/deepcrl/*_1/evaluations.npz"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        # The pipe ends with the last process that may write to it
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped. The same command goes on from the last evaluations." in errors and "Traceback" not in errors
    study = DepthStudy(env="PointUMazeStitch-v0", depths=(4, 8), runs=tmp_path, **{**TOY, "seeds": 1})
    before = [run.read(tmp_path).num_timesteps for run in study.settings().values()]
    assert all(0 < steps < 1e6 for steps in before)
    # As many steps as both have, and a few more
    n = max(before) // 40 + 2
    study = replace(study, steps=40 * n, n_evaluations=n)
    report = study.run()
    check_files(report)
    for run in study.settings().values():
        found = run.evaluations(tmp_path)
        assert found["timesteps"].tolist() == list(range(40, 40 * n + 1, 40))
        assert (np.diff(found["n_updates"]) > 0).all() and (np.diff(found["seconds"]) > 0).all()
        assert len(run.made_with(tmp_path)) == 2
    depths = {found.load_model().policy.depth for run in study.settings().values() if (found := run.read(tmp_path))}
    assert depths == {4, 8}
    for study_class in (ValueMapStudy, StitchingStudy, RepresentationStudy):
        other = study_class(
            env=study.env, depths=(4, 8), runs=tmp_path, **{**TOY, "seeds": 1, "steps": 40 * n, "n_evaluations": n}
        )
        assert other.settings() == study.settings()
        check_files(other.run())


@pytest.mark.slow
def test_train_learners_and_baselines(tmp_path):
    toy = {**TOY, "seeds": 1, "runs": tmp_path}
    collector = CollectorStudy(env="PointUMaze-v0", deep=8, **toy).run()
    check_files(collector)
    assert len({row["updates"] for row in collector.table}) == 1 and len(collector.table) == 6
    small = {**TOY["hyperparams"], "learning_starts": 80}
    del small["width"]
    baselines = BaselinesStudy(env="PointUMaze-v0", depths=(4,), baselines=("sac",), baseline_hyperparams=small, **toy)
    for study in (baselines, replace(baselines, deep_baselines=True)):
        report = study.run()
        check_files(report)
        assert all(float(row["updates"]) > 0 for row in report.table) and len(report.table) == 2
