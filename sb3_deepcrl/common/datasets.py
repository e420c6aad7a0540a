"""
Episodes from files: data sets of Minari, of OGBench, and replay buffers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    from minari import MinariDataset


class Episode(NamedTuple):
    """
    An episode as the replay buffer stores it.

    :param observations: All observations by key, arrays of shape ``(n_steps + 1, ...)``
    :param actions: Actions in [-1, 1] or discrete ones, shape ``(n_steps, action_dim)``
    :param rewards: Rewards, shape ``(n_steps,)``
    :param terminated: Whether it ended by termination, not by truncation
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def open_minari(dataset: "str | Path | MinariDataset") -> "MinariDataset":
    """
    Open a data set of Minari that is on this machine.

    :param dataset: Its id, its folder, or the data set itself
    :return: The data set
    :raises ImportError: if Minari is missing
    :raises ValueError: if there is no such data set
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(f'{error}: install the extra "minari", in a clone by `pip install -e ".[minari]"`') from None
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    path = Path(dataset)
    try:
        if path.is_dir():
            return minari.MinariDataset(path / "data" if (path / "data").is_dir() else path)
        return minari.load_dataset(str(dataset))
    except (FileNotFoundError, TypeError, ValueError) as error:
        pickled = path.with_name(f"{path.name}.pkl")
        raise ValueError(
            f"There is no data set {str(dataset)!r} here ({error}): give a file of OGBench (.npz) or a replay buffer (.pkl), "
            "the folder of a data set of Minari, or the id of one that was fetched by `minari download ID`"
            + (f". Did you mean {str(pickled)!r}?" if pickled.is_file() else "")
        ) from None


def read_episodes(
    dataset: "str | Path | MinariDataset",
    observation_space: spaces.Dict,
    action_space: spaces.Space,
    goal_indices: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """
    Read the episodes of a data set. One without goals gets those that its own states reach, which contrastive RL learns from.

    :param dataset: Data set of Minari (id, folder, or object), or file of OGBench, which ends in ``.npz``
    :param observation_space: Observation space of the env, with the keys ``achieved_goal`` and ``desired_goal``
    :param action_space: Action space of the env
    :param goal_indices: Which components of the observation are the goal, where the data have no goals: by default the first
        ones, such as x and y in OGBench's mazes
    :return: The episodes
    :raises ValueError: if there is no such data set, or it does not fit the spaces
    """
    if isinstance(dataset, str | Path) and str(dataset).endswith(".npz"):
        episodes = _read_ogbench(Path(dataset))
    else:
        found = open_minari(dataset).iterate_episodes()
        episodes = ((e.observations, e.actions, e.rewards, bool(e.terminations[-1])) for e in found if len(e) > 0)
    for observations, actions, rewards, terminated in episodes:
        by_key = _with_goals(observations, observation_space, goal_indices)
        yield Episode(by_key, scale_actions(np.asarray(actions), action_space), np.asarray(rewards), terminated)


def _read_ogbench(path: Path) -> Iterator[tuple[Any, ...]]:
    """Episodes of a file of OGBench, where ``terminals`` marks the last state of each, whose action does nothing."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give one of OGBench's data sets, such as pointmaze-medium-navigate-v0.npz")
    with np.load(path) as file:
        if missing := {"observations", "actions", "terminals"} - set(file):
            raise ValueError(f"{path} is no data set of OGBench: it has no {', '.join(sorted(missing))}, only {sorted(file)}")
        observations, actions, ends = file["observations"], file["actions"], np.flatnonzero(file["terminals"])
    if len(ends) == 0:
        raise ValueError(f"{path} holds no whole episode: its `terminals` are all 0")
    for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        if end > start:
            yield observations[start : end + 1], actions[start:end], np.zeros(end - start), False


def _with_goals(
    observations: Any, observation_space: spaces.Dict, goal_indices: Sequence[int] | None
) -> dict[str, np.ndarray]:
    if not isinstance(observations, dict):
        flat = np.asarray(observations)
        goal = flat[:, : observation_space["achieved_goal"].shape[0]] if goal_indices is None else flat[:, goal_indices]  # type: ignore[index]
        observations = {"observation": flat, "achieved_goal": goal}
    by_key = {key: np.asarray(value) for key, value in observations.items()}
    by_key.setdefault("desired_goal", by_key.get("achieved_goal", np.empty(0)))
    for key, space in observation_space.items():
        if key not in by_key or by_key[key].shape[1:] != space.shape:
            found = {name: value.shape[1:] for name, value in by_key.items()}
            raise ValueError(
                f"The env has `{key}` of shape {space.shape}, but the data set {found}: choose the env it was made in"
            )
    return {key: by_key[key] for key in observation_space}


def scale_actions(actions: np.ndarray, action_space: spaces.Space) -> np.ndarray:
    """
    Scale actions as the replay buffer stores them.

    :param actions: Actions as the env takes them, shape ``(n_steps, ...)``
    :param action_space: Action space of the env
    :return: Actions in [-1, 1], or discrete ones, shape ``(n_steps, action_dim)``
    :raises ValueError: if they are not those of the space
    """
    n_steps = len(actions)
    if actions.shape[1:] != action_space.shape:
        raise ValueError(f"The env has {action_space}, but the actions of the data set have shape {actions.shape[1:]}")
    if isinstance(action_space, spaces.Box):
        actions = 2.0 * (actions - action_space.low) / (action_space.high - action_space.low) - 1.0
        if np.abs(actions).max() > 1.0 + 1e-3:
            raise ValueError(f"Actions of the data set are outside of the env's {action_space}: choose the env it was made in")
        actions = actions.clip(-1.0, 1.0)
    return actions.reshape(n_steps, -1)
