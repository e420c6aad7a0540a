import gymnasium as gym
import pytest
import torch as th
from torch.utils.flop_counter import FlopCounterMode

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import DepthStudy, ScaleStudy
from sb3_deepcrl.analysis.scale import Size, _make_policy, _nearest, count_operations
from tests.studies import results_of_scores

MATCHES = ("parameters", "operations", "batch")

NETWORKS = [
    dict(depth=4, width=16),
    dict(depth=12, width=8, repr_dim=5),
    dict(depth=4, actor_depth=8, width=8),
    dict(depth=4, critic_depth=8, width=8, energy="dot"),
    dict(depth=8, width=8, norm="none", residual_scale=1, activation_fn=th.nn.ReLU),
]


def spaces_of(env_id):
    env = gym.make(env_id)
    return env.observation_space, env.action_space


@pytest.mark.parametrize("policy_kwargs", NETWORKS)
@pytest.mark.parametrize("env_id", ["PointU4Maze-v0", "AntU4Maze-v0"])
def test_counts_are_those_of_a_real_update(env_id, policy_kwargs):
    batch_size = 24
    kwargs = dict(buffer_size=2000, batch_size=batch_size, device="cpu", compile=False, policy_kwargs=policy_kwargs)
    model = DeepCRL("MultiInputPolicy", env_id, **kwargs)
    policy = _make_policy(model.observation_space, model.action_space, policy_kwargs)
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in model.policy.parameters())
    observations = {key: th.randn(batch_size, *space.shape) for key, space in model.observation_space.items()}
    actions = th.rand(batch_size, *model.action_space.shape)
    with FlopCounterMode(display=False) as counter:
        model._update(observations, actions)
    assert count_operations(policy, batch_size) == counter.get_total_flops()


def test_a_layer_is_passed_11_times():
    spaces = spaces_of("AntU4Maze-v0")
    width, batch_size = 64, 32
    counts = [count_operations(_make_policy(*spaces, dict(depth=depth, width=width)), batch_size) for depth in (8, 12, 1000)]
    assert counts[1] - counts[0] == 11 * 2 * 4 * width**2 * batch_size
    # First and last layers and logits matter less and less
    assert counts[2] / (11 * 2 * 1000 * width**2 * batch_size) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("target", "number"), [(0, 1), (2, 1), (3, 2), (9, 3), (12, 3), (13, 4), (16, 4), (10_001, 100)])
def test_nearest_number(target, number):
    assert _nearest(lambda value: value**2, target) == number


@pytest.mark.parametrize("env_id", ["PointU4Maze-v0", "AntU4Maze-v0"])
@pytest.mark.parametrize("match", MATCHES)
def test_matches_are_equal_within_one_unit(env_id, match):
    study = ScaleStudy(env=env_id, depth=4, width=64, depths=[16, 64], match=[match])
    for depth in study.depths:
        deeper, size = Size(depth, 64, study.shallow.batch_size), study.matches[depth, match]

        def count(size: Size) -> int:
            return study.count(size, match)

        assert size.depth == 4
        if match == "batch":
            assert size.width == 64 and size.batch_size > study.shallow.batch_size
            one_more, one_less = (Size(4, 64, size.batch_size + unit) for unit in (1, -1))
        else:
            assert size.width > 64 and size.batch_size == study.shallow.batch_size
            one_more, one_less = (Size(4, size.width + unit, size.batch_size) for unit in (1, -1))
        target = count(deeper)
        assert count(one_less) < target < count(one_more)
        assert abs(count(size) - target) <= min(count(one_more) - target, target - count(one_less))


def test_wider_by_the_square_root_of_the_depth():
    # Parameters and operations of large networks are in proportion to depth times squared width
    study = ScaleStudy(depth=16, width=256, depths=[64], match=["parameters", "operations"])
    for (depth, _), size in study.matches.items():
        assert size.width == pytest.approx(256 * (depth / 16) ** 0.5, rel=0.01)


def test_settings_are_shared():
    options = dict(depths=[16], match=["batch"], batch_size=256)
    study = ScaleStudy(**options, batch_sizes=[256, 512])
    names = list(study.sizes.values())
    assert names == [["shallow"], ["deeper"], ["larger batch, operations of depth 16"], ["other batch"], ["other batch"]]
    size = study.matches[16, "batch"]
    assert ["other batch"] not in ScaleStudy(**options, batch_sizes=[256]).sizes.values()
    assert ScaleStudy(**options, batch_sizes=[size.batch_size, 256]).sizes[size] == names[2]


def test_runs_are_those_of_the_depth_study():
    # The point has width 32 and minibatches of 256 in zoo_configs
    settings, depths = ScaleStudy(match=("batch",)).settings(), DepthStudy(depths=(4, 16)).settings()
    assert settings["depth 4, width 32, batch 256"] == depths["depth 4"]
    assert settings["depth 16, width 32, batch 256"] == depths["depth 16"]
    assert settings["depth 16, width 32, batch 1024"].hyperparams == {"depth": 16, "batch_size": 1024}


def test_report_of_known_scores():
    study = ScaleStudy(depths=[8], width=16, batch_size=32, batch_sizes=[32, 64], seeds=3)
    sizes = {match: study.matches[8, match] for match in MATCHES}
    scores = {str(size): [10.0, 11.0, 12.0] for size in study.sizes}
    scores["depth 8, width 16, batch 32"] = [20.0, 21.0, 22.0]
    scores[str(sizes["operations"])] = [30.0, 31.0, 32.0]
    scores[str(sizes["batch"])] = [19.0, 21.0, 23.0]
    scores["depth 8, width 16, batch 64"] = [50.0, 51.0, 52.0]
    report = study.report(results_of_scores(scores))

    verdicts = [note.rpartition(": ")[2] for note in report.notes[1:]]
    assert verdicts == ["higher.", "lower.", "intervals overlap.", "intervals overlap.", "higher."]
    assert report.notes[2].startswith(f"Time at goal of depth 8, width 16, batch 32 against {sizes['operations']}, which")
    assert [row[""] for row in report.table] == list(scores)
    assert [row["time at goal"].mean for row in report.table] == [11.0, 21.0, 11.0, 31.0, 21.0, 11.0, 51.0]
    assert len(report.rows) == len(scores) * 3 * 6
    assert {row["parameters"] for row in report.rows if row["depth"] == 8} == {study.count(Size(8, 16, 32), "parameters")}

    parameters, operations, batches = report.figure.axes
    assert [len(ax.containers) for ax in (parameters, operations, batches)] == [2, 3, 2]
    deep = batches.containers[1].lines[0]
    assert list(deep.get_xdata()) == [32, 64] and list(deep.get_ydata()) == [21.0, 51.0]
    wider = parameters.containers[1].lines[0]
    assert list(wider.get_xdata()) == sorted(
        study.count(size, "parameters") / 1e6 for size in {study.shallow, *list(sizes.values())[:2]}
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=[6]), "got 6: use 4 or 8"),
        (dict(depths=[4, 8]), r"`depths` must be larger than `depth`, got \[4, 8\] and 4"),
        (dict(hyperparams={"width": 64}), "`hyperparams` holds `width=64`, which this study sets itself"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScaleStudy(**kwargs).settings()
