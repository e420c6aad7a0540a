import pytest
from torch import nn

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import AblationStudy, DepthStudy
from sb3_deepcrl.analysis.runs import make_env, make_model, with_modules
from tests.studies import STEPS, results_of_scores, run_study, table_of

ALL = ["complete", "no-residual", "no-norm", "relu", "plain", "unscaled"]


def test_networks():
    hyperparams = {"policy_kwargs": {"optimizer_kwargs": {"eps": 1e-5}}}
    study = AblationStudy(depths=[8], variants=ALL, width=8, hyperparams=hyperparams)
    found = {}
    for label, run in study.settings().items():
        env = make_env(run.env, 1, 0)
        model = make_model(run, env)
        env.close()
        for tower in (model.actor.tower, model.critic.sa_encoder, model.critic.g_encoder):
            block = tower.blocks[1]
            found.setdefault(label, set()).add(
                (block.residual, type(block.branch[1]), type(block.branch[2]), isinstance(block.scale, nn.Parameter))
            )
        # What the user asks for is in all of them
        assert model.actor.optimizer.param_groups[0]["eps"] == 1e-5
    assert found == {
        "complete, depth 8": {(True, nn.LayerNorm, nn.SiLU, True)},
        "no-residual, depth 8": {(False, nn.LayerNorm, nn.SiLU, False)},
        "no-norm, depth 8": {(True, nn.Identity, nn.SiLU, True)},
        "relu, depth 8": {(True, nn.LayerNorm, nn.ReLU, True)},
        "plain, depth 8": {(False, nn.Identity, nn.ReLU, False)},
        "unscaled, depth 8": {(True, nn.LayerNorm, nn.SiLU, False)},
    }


def test_complete_network_is_that_of_the_depth_study():
    settings, depths = AblationStudy(depths=[4, 16]).settings(), DepthStudy(depths=[4, 16]).settings()
    assert [settings[f"complete, depth {depth}"] for depth in (4, 16)] == list(depths.values())


def test_report_of_known_scores(tmp_path):
    study = AblationStudy(depths=[4, 16], variants=["complete", "no-norm", "relu"], seeds=3)
    scores = {label: [10.0, 11.0, 12.0] for label in study.settings()}
    scores["complete, depth 16"] = [40.0, 41.0, 42.0]
    scores["no-norm, depth 16"] = [50.0, 50.0, 53.0]
    report = study.report(results_of_scores(scores), tmp_path)
    assert report.notes[1:] == [
        "Time at goal at depth 4 against the complete network: no-norm: intervals overlap; relu: intervals overlap.",
        "Time at goal at depth 16 against the complete network: no-norm: higher; relu: lower.",
    ]
    assert [(row["network"], row["depth"], row["time at goal"].mean) for row in report.table] == [
        ("complete", 4, 11.0),
        ("no-norm", 4, 11.0),
        ("relu", 4, 11.0),
        ("complete", 16, 41.0),
        ("no-norm", 16, 51.0),
        ("relu", 16, 11.0),
    ]
    assert {row["time_at_goal"] for row in report.rows if (row["network"], row["depth"]) == ("no-norm", 16)} == {
        "0.0",
        "50.0",
        "53.0",
    }
    points, shallow, deep = report.figure.axes
    assert [list(container.lines[0].get_ydata()) for container in points.containers] == [[11, 41], [11, 51], [11, 11]]
    assert [line.get_ydata()[-1] for line in deep.lines] == [41, 51, 11]
    assert shallow.get_title() == "depth 4"


def test_command(tmp_path):
    options = ("--depths", "8", "--variants", *ALL, "--seeds", "1", "--width", "8", "--hyperparams", "learning_starts:80")
    rows, text = run_study(tmp_path, "ablation", *options)
    assert [(row["network"], row["depth"]) for row in table_of(text)] == [(variant, "8") for variant in ALL]
    assert {float(row["time_at_goal"]) for row in rows} == {STEPS}
    models = [DeepCRL.load(path) for path in (tmp_path / "runs").glob("*/seed-0/model.zip")]
    assert len(models) == len(ALL) and sum(type(model.actor.tower.stem[2]) is nn.ReLU for model in models) == 2
    # A second time there is nothing to train
    assert run_study(tmp_path, "ablation", *options) == (rows, text)


@pytest.mark.parametrize("name", ["ReLu", "Linear", "forward"])
def test_unknown_activation(name):
    with pytest.raises(ValueError, match=f"activation function of torch.nn, such as ReLU, got '{name}'"):
        with_modules({"policy_kwargs": {"activation_fn": name}})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=[3]), "multiple of 4"),
        (dict(variants=["complete", "no-swish"]), "Unknown variant 'no-swish'. Choose from: complete, no-residual"),
        (dict(hyperparams={"policy_kwargs": {"norm": "none"}}), "`hyperparams` holds `norm='none'`.*use `variants`"),
        (dict(variants=["complete"], hyperparams={"policy_kwargs": {"norm": "none"}}), "`norm='none'`.*use `variants`"),
        (dict(hyperparams={"actor_depth": 8}), "`hyperparams` holds `actor_depth=8`.*use `depths`"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AblationStudy(**kwargs)
