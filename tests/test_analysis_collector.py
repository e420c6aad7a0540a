from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import CollectorStudy
from sb3_deepcrl.analysis.collector import Learners, _learner_folder
from sb3_deepcrl.analysis.episodes import make_envs
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.zoo.runs import RunFolder
from tests.studies import TOY, results_of_scores

EPISODES = {"max_episode_steps": 20}
KWARGS = dict(width=8, batch_size=8, buffer_size=4000, learning_starts=40, train_freq=2, gradient_steps=1, device="cpu")


def make_learners(folder: Path) -> Learners:
    return Learners([8, 4], str(folder), "PointUMazeEval-v0", eval_freq=40, n_eval_episodes=4, env_kwargs=EPISODES)


def make_collector(**kwargs) -> DeepCRL:
    return DeepCRL("MultiInputPolicy", make_envs("PointUMaze-v0", 4, EPISODES, seed=0), depth=4, seed=0, **KWARGS, **kwargs)


def same(first: DeepCRL, second: DeepCRL) -> bool:
    values = second.policy.state_dict()
    return all(th.equal(value, values[name]) for name, value in first.policy.state_dict().items())


def evaluations(folder: Path, depth: int) -> list[tuple[int, int]]:
    arrays = RunFolder(_learner_folder(folder, depth)).evaluations()
    return list(zip(arrays["timesteps"].tolist(), arrays["n_updates"].tolist(), strict=True))


def test_the_collector_learns_what_it_learns_alone(tmp_path):
    alone = make_collector().learn(160)
    watched, learners = make_collector(), make_learners(tmp_path)
    watched.learn(160, callback=learners)
    assert same(alone, watched)
    deep, shallow = learners.learners.values()
    assert (deep.policy.depth, shallow.policy.depth) == (8, 4)
    # One of the same depth is another network, which has learned other things
    assert not same(shallow, watched)
    assert shallow._n_updates == deep._n_updates == watched._n_updates > 0
    assert evaluations(tmp_path, 8) == evaluations(tmp_path, 4)
    assert [steps for steps, _ in evaluations(tmp_path, 8)] == [40, 80, 120, 160]


def test_learners_see_the_data_of_the_collector_as_often(tmp_path, monkeypatch):
    seen = []
    sample = ContrastiveReplayBuffer.sample_contrastive

    def spy(self, batch_size, env=None):
        observations, actions = sample(self, batch_size, env)
        seen.append((id(self), len(actions), actions.sum().item()))
        return observations, actions

    monkeypatch.setattr(ContrastiveReplayBuffer, "sample_contrastive", spy)
    collector = make_collector()
    collector.learn(160, callback=make_learners(tmp_path))
    assert len(seen) == 3 * collector._n_updates and len({buffer for buffer, *_ in seen}) == 1
    # Minibatches of their own
    assert len({total for *_, total in seen}) == len(seen)


def test_learners_normalize_as_the_collector(tmp_path):
    collector, learners = make_collector(normalize_observations=True), make_learners(tmp_path)
    collector.learn(160, callback=learners)
    for learner in learners.learners.values():
        assert th.equal(learner.actor.normalizer.mean, collector.actor.normalizer.mean)
        assert learner.actor.normalizer.count == 160


@pytest.mark.parametrize("n_collected", [80, 100])
def test_a_stopped_run_goes_on(tmp_path, n_collected):
    # Stopped at an evaluation, where the learners are saved, or after it
    first, learners = make_collector(), make_learners(tmp_path)
    first.learn(n_collected, callback=learners)
    first.save(tmp_path / "model.zip")
    first.save_replay_buffer(tmp_path / "buffer.pkl")
    model = DeepCRL.load(tmp_path / "model.zip", make_envs("PointUMaze-v0", 4, EPISODES))
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    # They are not ahead of the collector, even if it was killed before it was saved
    ahead = learners.learners[8]
    ahead.save(_learner_folder(tmp_path, 8) / "120.zip")
    again = make_learners(tmp_path)
    model.learn(160 - model.num_timesteps, callback=again, reset_num_timesteps=False)
    assert [learner._n_updates for learner in again.learners.values()] == [model._n_updates] * 2
    assert [steps for steps, _ in evaluations(tmp_path, 4)] == [40, 80, 120, 160]
    updates = [n_updates for _, n_updates in evaluations(tmp_path, 4)]
    assert updates == sorted(updates) and updates[-1] > 0
    assert {path.name for path in _learner_folder(tmp_path, 8).glob("*.zip")} == {"120.zip", "160.zip"}


def test_report_of_known_scores(monkeypatch):
    study = CollectorStudy(env="PointUMaze-v0", **{**TOY, "seeds": 3})
    scores = {
        "collector depth 32, itself": [91.0, 92.0, 93.0],
        "collector depth 32, learner depth 32": [101.0, 102.0, 103.0],
        "collector depth 32, learner depth 4": [21.0, 22.0, 23.0],
        "collector depth 4, itself": [11.0, 12.0, 13.0],
        "collector depth 4, learner depth 32": [13.0, 14.0, 15.0],
        "collector depth 4, learner depth 4": [11.0, 12.0, 13.0],
    }
    results = results_of_scores(scores)
    # Those of the learners are in folders of their own
    collectors = {label.removesuffix(", itself"): seeds for label, seeds in results.items() if "itself" in label}
    learners = [seed for label, seeds in results.items() if "learner" in label for seed in seeds]
    monkeypatch.setattr("sb3_deepcrl.analysis.collector.mean_evaluations", lambda folder, steps: learners.pop(0))
    report = study.report(collectors)
    assert {row[""]: row["time at goal"].mean for row in report.table} == {label: seeds[1] for label, seeds in scores.items()}
    assert [note.rsplit(", ", 1)[1] for note in report.notes[1:]] == ["higher.", "intervals overlap.", "higher.", "higher."]
    assert [ax.get_title() for ax in report.figure.axes] == ["Deep collector (depth 32)", "Shallow collector (depth 4)"]
    deep, shallow, _ = report.figure.axes[0].lines
    assert deep.get_label() == "learner, depth 32"
    assert list(deep.get_ydata()) == [0] + [102] * 5 and list(shallow.get_ydata()) == [0] + [22] * 5


def test_conclusions():
    low, high, wide = Estimate(1, 0, 2), Estimate(5, 4, 6), Estimate(3, 1, 5)
    scores = {(8, 8): high, (8, 4): low, (4, 8): wide, (4, 4): high}
    study = CollectorStudy(deep=8, shallow=4)

    def conclusions(scores):
        return study.compare({f"collector depth {pair[0]}, learner depth {pair[1]}": score for pair, score in scores.items()})

    verdicts = [sentence.rsplit(", ", 1)[1] for sentence in conclusions(scores)]
    assert verdicts == ["higher.", "intervals overlap.", "intervals overlap.", "lower."]
    assert conclusions(scores)[0] == (
        "From the data of collector 8, learner 8 against 4: 5.00 (4.00 to 6.00) against 1.00 (0.00 to 2.00), higher."
    )
    # One seed has no interval
    unknown = Estimate(9, np.nan, np.nan)
    assert conclusions({**scores, (8, 8): unknown})[0].endswith("one seed tells nothing.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(deep=4, shallow=8), "`deep` must be larger than `shallow`, got 4 and 8"),
        (dict(deep=6), "`deep` must be a positive multiple of 4, .* got 6"),
        (dict(hyperparams={"depth": 8}), "holds `depth=8`, which this study sets itself"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CollectorStudy(**options).settings()
