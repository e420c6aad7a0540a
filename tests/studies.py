"""
What the tests of the studies share.
"""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from sb3_deepcrl.analysis import Study
from sb3_deepcrl.analysis.report import Report, Results
from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.zoo.provenance import source_digest

# A study that takes seconds
TOY = dict(
    seeds=2,
    steps=160,
    n_evaluations=4,
    n_eval_episodes=4,
    env_kwargs={"max_episode_steps": 20},
    hyperparams=dict(n_envs=4, width=8, batch_size=8, buffer_size=4000, learning_starts=40, train_freq=2, gradient_steps=1),
)
RECORD = {
    **{"num_timesteps": 0, "version": "0.1", "revision": None, "source": source_digest(), "packages": {"torch": "2.13"}},
    **{"processor": "one", "cores": 2, "gpu": None, "threads": 1, "precision": "float32"},
    "arguments": {"depth": 4, "env.maze": "u"},
}


def results_of_scores(scores: dict[str, list[float]], n_evaluations: int = 6) -> Results:
    """
    Make up evaluations, all the same but for the first one, which is 0.

    :param scores: Time at goal of each seed, by setting
    :param n_evaluations: Number of evaluations
    :return: Evaluations of each seed by setting
    """
    number = np.arange(1.0, n_evaluations + 1)
    return {
        label: [
            {
                "timesteps": 100 * number,
                "n_updates": 10 * number,
                "seconds": 2 * number,
                "time_at_goal": np.where(number > 1, score, 0.0),
                "success_any": np.where(number > 1, 1.0, 0.0),
            }
            for score in seeds
        ]
        for label, seeds in scores.items()
    }


def write_run(run: Run, runs: Path, score: float = 10.0, steps: int | None = None, model: DeepCRL | None = None) -> Path:
    """
    Write what the runner leaves in the folder of a run, but for a model that can be loaded.

    :param run: The run
    :param runs: Folder of all runs
    :param score: Time at goal of all evaluations but the first one
    :param steps: Number of env steps so far, by default all
    :param model: The model, by default a file that tells its number of steps alone
    :return: The folder
    """
    steps = run.steps if steps is None else steps
    folder = run.folder(runs) / run.algo / f"{run.env}_1"
    params = folder / run.env
    params.mkdir(parents=True, exist_ok=True)
    n = steps // run.eval_freq
    (seed,) = results_of_scores({"": [score]}, n)[""]
    arrays = {**seed, "timesteps": run.eval_freq * np.arange(1, n + 1)}
    # Of each episode, as the runner does
    arrays["time_at_goal"] = seed["time_at_goal"][:, None] + np.array([-1.0, 1.0])
    np.savez(folder / "evaluations.npz", **arrays)
    config = yaml.safe_load((Path(__file__).parent.parent / "zoo_configs" / f"{run.algo}.yml").read_text())[run.env]
    (params / "config.yml").write_text(yaml.safe_dump({**config, **run.hyperparams}))
    (params / "args.yml").write_text(yaml.safe_dump({"algo": run.algo, "env": run.env, "env_kwargs": run.env_kwargs}))
    (params / "made_with.json").write_text(json.dumps([RECORD]))
    if model is not None:
        model.num_timesteps = steps
        model.save(folder / f"{run.env}.zip")
    else:
        with zipfile.ZipFile(folder / f"{run.env}.zip", "w") as archive:
            archive.writestr("data", json.dumps({"num_timesteps": steps}))
    return folder


def write_all(study: Study, **models: DeepCRL) -> None:
    """
    Write all runs of a study as if they had been trained.

    :param study: The study
    :param models: Models by label, with underscores in place of spaces
    """
    for label, run in study.settings().items():
        for seed in range(study.seeds):
            write_run(replace(run, seed=seed), study.runs, score=10.0 + seed, model=models.get(label.replace(" ", "_")))


def check_files(report: Report) -> str:
    """
    Check that a report has been written.

    :param report: The report
    :return: Its text
    """
    assert report.path is not None
    assert len(report.path.with_suffix(".csv").read_text().splitlines()) == 1 + len(report.rows)
    with Image.open(report.path.with_suffix(".png")) as picture:
        # Not the same color everywhere
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 0
    text = report.path.read_text()
    assert f"]({report.path.stem}.png)" in text
    return text
