import pytest
import torch as th

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import CollectorStudy
from sb3_deepcrl.analysis.cli import main
from sb3_deepcrl.analysis.collector import conclusions, rows_of_learner
from sb3_deepcrl.analysis.runs import COLLECTOR, is_complete, learner_path, load_model, read_rows, results_of, train
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from tests.test_analysis_runs import TOY_COUNTERS, TOY_OPTIONS, Stop, n_stored, toy_run

LEARNERS = {"depth-8": {"depth": 8}, "depth-4": {"depth": 4}}


def parameters(model: DeepCRL) -> dict[str, th.Tensor]:
    return model.policy.state_dict()


def same(first: DeepCRL, second: DeepCRL) -> bool:
    values = parameters(second)
    return all(th.equal(value, values[name]) for name, value in parameters(first).items())


def rows_by_learner(run, folder) -> dict[str, list[tuple[int, int]]]:
    rows = results_of(run, folder)
    return {
        name: [(int(row["timesteps"]), int(row["updates"])) for row in rows if row["learner"] == name]
        for name in dict.fromkeys(row["learner"] for row in rows)
    }


def test_the_collector_learns_what_it_learns_alone(tmp_path):
    alone, watched = toy_run(), toy_run(learners=LEARNERS)
    train(alone, tmp_path)
    train(watched, tmp_path)
    assert same(load_model(alone, tmp_path), load_model(watched, tmp_path))
    (rows,) = rows_of_learner([results_of(watched, tmp_path)], COLLECTOR)
    for row, expected in zip(rows, results_of(alone, tmp_path), strict=True):
        # Seconds are those of all models together
        assert {**row, "seconds": ""} == {"learner": COLLECTOR, **expected, "seconds": ""}


@pytest.mark.parametrize("n_before", [0, 80])
def test_learners_see_the_data_of_the_collector_as_often(tmp_path, monkeypatch, n_before):
    run = toy_run(learners=LEARNERS)
    if n_before:
        train(toy_run(learners=LEARNERS, steps=n_before), tmp_path)
    seen = []
    sample = ContrastiveReplayBuffer.sample_contrastive

    def spy(self, batch_size, env=None):
        observations, actions = sample(self, batch_size, env)
        seen.append((self, int((self.remaining != 0).sum()), batch_size, actions))
        return observations, actions

    monkeypatch.setattr(ContrastiveReplayBuffer, "sample_contrastive", spy)
    train(run, tmp_path)
    # Three models and 15 updates, or the 10 that are left
    start = max(n_before, 40) + 8
    assert len(seen) == 3 * len(range(start, 161, 8))
    assert len({id(buffer) for buffer, *_ in seen}) == 1
    n_updates = iter(range(start, 161, 8))
    for start in range(0, len(seen), 3):
        assert [(stored, size) for _, stored, size, _ in seen[start : start + 3]] == [(next(n_updates), 8)] * 3
        # On minibatches of their own
        batches = [actions for *_, actions in seen[start : start + 3]]
        assert not any(th.equal(batches[i], batches[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert rows_by_learner(run, tmp_path) == dict.fromkeys([*LEARNERS, COLLECTOR], TOY_COUNTERS)
    # Nobody but the collector acted
    assert n_stored(run, tmp_path) == 160


def test_learners_are_what_was_asked_for(tmp_path):
    run = toy_run(learners={**LEARNERS, "wide": {"width": 16, "batch_size": 4}})
    train(run, tmp_path)
    deep, shallow, wide = (DeepCRL.load(learner_path(run.folder(tmp_path), name, 160)) for name in run.learners)
    settings = [(model.depth, model.width, model.batch_size) for model in (deep, shallow, wide)]
    assert settings == [(8, 8, 8), (4, 8, 8), (4, 16, 4)]
    assert [(model.num_timesteps, model._n_updates) for model in (deep, shallow, wide)] == [(160, 15)] * 3
    # Not a copy of the collector, though of the same depth and seed
    assert not same(shallow, load_model(run, tmp_path))
    # Another learner makes no difference to the others
    train(toy_run(learners=LEARNERS), tmp_path)
    folder = toy_run(learners=LEARNERS).folder(tmp_path)
    assert same(deep, DeepCRL.load(learner_path(folder, "depth-8", 160)))
    assert same(shallow, DeepCRL.load(learner_path(folder, "depth-4", 160)))


def test_learners_need_deepcrl(tmp_path):
    with pytest.raises(ValueError, match=r"Learners share the replay buffer of DeepCRL, but the algorithm is SAC\+HER"):
        train(toy_run(algorithm="SAC+HER", learners=LEARNERS), tmp_path)


@pytest.mark.parametrize(
    "method, n, after, saved",
    [
        # In the second evaluation: before the replay buffer, after it, after one learner, after the other, after the model
        ("save_replay_buffer", 2, False, 1),
        ("save", 4, False, 1),
        ("save", 4, True, 1),
        ("save", 5, True, 1),
        ("save", 6, True, 1),
        # In an update of the collector, and of a learner
        ("_update", 3 * 7 + 1, False, 2),
        ("_update", 3 * 7 + 2, False, 2),
    ],
)
def test_stopped_learners_go_on(tmp_path, monkeypatch, method, n, after, saved):
    run = toy_run(learners=LEARNERS)
    with monkeypatch.context() as patch:
        patch.setattr(DeepCRL, method, Stop(getattr(DeepCRL, method), n, after))
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path)
    expected = dict.fromkeys([*LEARNERS, COLLECTOR], TOY_COUNTERS[:saved])
    assert rows_by_learner(run, tmp_path) == expected
    assert not is_complete(run, tmp_path)
    train(run, tmp_path)
    assert rows_by_learner(run, tmp_path) == dict.fromkeys([*LEARNERS, COLLECTOR], TOY_COUNTERS)
    assert n_stored(run, tmp_path) == 160
    names = {path.name for path in run.folder(tmp_path).iterdir()}
    learners = {"learner-depth-4-160.zip", "learner-depth-8-160.zip"}
    assert names == {"buffer-160.pkl", "lock", "model.zip", "results.csv", "run.json", *learners}


def test_the_learning_of_learners_goes_on(tmp_path):
    run = toy_run(learners=LEARNERS, steps=80)
    train(run, tmp_path)
    before = DeepCRL.load(learner_path(run.folder(tmp_path), "depth-8", 80))
    train(toy_run(learners=LEARNERS), tmp_path)
    after = DeepCRL.load(learner_path(run.folder(tmp_path), "depth-8", 160))
    assert (before._n_updates, after._n_updates) == (5, 15)
    steps = [next(iter(model.critic.optimizer.state_dict()["state"].values()))["step"].item() for model in (before, after)]
    assert steps == [5, 15]


def test_collector_study(tmp_path):
    options = [*TOY_OPTIONS, "--deep", "8", "--shallow", "4", "--seeds", "2"]
    main(["collector", *options, "--runs", str(tmp_path), "--jobs", "1"])
    rows = read_rows([tmp_path / "collector-PointUMaze-v0.csv"])
    assert [(row["setting"], row["seed"], row["learner"], int(row["timesteps"]), int(row["updates"])) for row in rows] == [
        (f"collector depth {depth}", str(seed), learner, *counters)
        for depth in (8, 4)
        for seed in range(2)
        for counters in TOY_COUNTERS
        for learner in ("depth-8", "depth-4", COLLECTOR)
    ]
    text = (tmp_path / "collector-PointUMaze-v0.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    names = ("collector itself", "depth 8", "depth 4")
    assert table[1:] == [[f"depth {depth}", name] for depth in (8, 4) for name in names]
    assert "From the data of collector 4, learner 8 against 4: " in text
    assert (tmp_path / "collector-PointUMaze-v0.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_known_results(tmp_path):
    # Only a deep learner makes something of the data of a deep collector
    score = {(32, "depth-32"): 100, (32, "depth-4"): 20, (32, COLLECTOR): 90}
    score |= {(4, "depth-32"): 12, (4, "depth-4"): 10, (4, COLLECTOR): 11}
    results = {
        f"collector depth {depth}": [
            [
                {
                    "learner": learner,
                    "timesteps": str(100 * (evaluation + 1)),
                    "updates": str(evaluation),
                    "time_at_goal": str(score[depth, learner] + 2 * seed),
                    "success_any": "0.5",
                }
                for evaluation in range(6)
                for learner in ("depth-32", "depth-4", COLLECTOR)
            ]
            for seed in range(3)
        ]
        for depth in (32, 4)
    }
    report = CollectorStudy(env="PointUMaze-v0").report(results, tmp_path)
    means = {(row["collector"], row["learner"]): row["time at goal"].mean for row in report.table}
    assert means[("depth 32", "depth 32")] == 102
    assert means[("depth 32", "collector itself")] == 92
    assert means[("depth 4", "depth 32")] == 14
    assert [note.rsplit(", ", 1)[1] for note in report.notes[1:]] == ["higher.", "intervals overlap.", "higher.", "higher."]
    assert [ax.get_title() for ax in report.figure.axes] == ["Deep collector (depth 32)", "Shallow collector (depth 4)"]
    deep, shallow, _ = report.figure.axes[0].lines
    assert deep.get_label() == "learner, depth 32"
    assert list(deep.get_ydata()) == [102] * 6
    assert list(shallow.get_ydata()) == [22] * 6
    assert list(deep.get_xdata()) == pytest.approx([0.1 * (i + 1) for i in range(6)])


def test_conclusions():
    low, high, wide = Estimate(1, 0, 2), Estimate(5, 4, 6), Estimate(3, 1, 5)
    scores = {(8, 8): high, (8, 4): low, (4, 8): wide, (4, 4): high}
    verdicts = [sentence.rsplit(", ", 1)[1] for sentence in conclusions(scores, 8, 4)]
    assert verdicts == ["higher.", "intervals overlap.", "intervals overlap.", "lower."]
    assert conclusions(scores, 8, 4)[0] == (
        "From the data of collector 8, learner 8 against 4: 5.00 (4.00 to 6.00) against 1.00 (0.00 to 2.00), higher."
    )
    # One seed has no interval
    unknown = Estimate(9, float("nan"), float("nan"))
    assert conclusions({**scores, (8, 8): unknown}, 8, 4)[0].endswith("one seed tells nothing.")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(deep=4, shallow=8), "`deep` must be larger than `shallow`, got 4 and 8"),
        (dict(deep=4, shallow=4), "`deep` must be larger than `shallow`, got 4 and 4"),
        (dict(deep=6), "`depth` must be a positive multiple of 4, .* got 6"),
        (dict(hyperparams={"critic_depth": 8}), "holds `critic_depth=8`, which this study sets itself: use `deep`"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CollectorStudy(**options)
