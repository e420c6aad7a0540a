"""
Training runs: each is a command of the one runner, ``python -m sb3_deepcrl.zoo train``, in a process of its own.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sb3_deepcrl.zoo.runs import RunFolder

# Time for a run that is stopped to save what it has
SECONDS_TO_SAVE = 60
# In a hyperparameter, where the folder of all runs, that of the run, or its seed, has to stand
RUNS, FOLDER, SEED = "{runs}", "{folder}", "{seed}"


class Expression(str):
    """Python text of a hyperparameter, such as ``nn.ReLU``, which RL Zoo evaluates."""

    __repr__ = str.__str__


@dataclass(frozen=True)
class Run:
    """
    A training run with evaluations after every ``eval_freq`` env steps, with ``hyperparams`` in place of those of the env in
    ``zoo_configs``. Runs that differ in ``seed`` only are seeds of one setting.
    """

    env: str
    eval_env: str
    steps: int
    eval_freq: int
    n_eval_episodes: int
    algo: str = "deepcrl"
    hyperparams: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_env_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    # Whose replay buffer, with the same seed, is learned from before the first step
    data_of: "Run | None" = None
    offline_updates: int = 0

    def folder(self, runs: Path) -> Path:
        """
        Folder that the runner is given. The number of steps has no influence: a longer run goes on where a shorter one
        ended.
        """
        ignored = {"steps", "seed"} if self.eval_env_kwargs else {"steps", "seed", "eval_env_kwargs"}
        if self.data_of is None:
            ignored |= {"data_of", "offline_updates"}
        setting = {name: value for name, value in asdict(self).items() if name not in ignored}
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True, default=repr).encode()).hexdigest()[:10]
        return runs / f"{self.env.rpartition(':')[2]}-{self.algo}-{digest}" / f"seed-{self.seed}"

    def command(self, runs: Path) -> list[str]:
        """Words of the command that trains it, or goes on where it was stopped."""
        folder = self.folder(runs)
        words = [
            *("python", "-m", "sb3_deepcrl.zoo", "train", "--algo", self.algo, "--env", self.env, "-f", str(folder)),
            *("-n", str(self.steps), "--seed", str(self.seed), "--eval-env", self.eval_env),
            *("--eval-freq", str(self.eval_freq), "--eval-episodes", str(self.n_eval_episodes)),
            *("--n-eval-envs", str(min(self.n_eval_episodes, 64))),
            *("--save-freq", str(self.eval_freq), "--save-replay-buffer", "--resume"),
        ]
        if self.data_of is not None:
            words += ["--dataset", str(self.dataset(runs)), "--offline-updates", str(self.offline_updates)]
        options = {"hyperparams": self.hyperparams, "env-kwargs": self.env_kwargs, "eval-env-kwargs": self.eval_env_kwargs}
        for name, values in options.items():
            if values:
                given = [f"{key}:{value!r}" for key, value in values.items()]
                for place, value in ((RUNS, runs), (FOLDER, folder), (SEED, self.seed)):
                    given = [text.replace(place, str(value)) for text in given]
                words += [f"--{name}", *given]
        return words

    def dataset(self, runs: Path) -> Path:
        """Replay buffer with the data that it learns from."""
        assert self.data_of is not None
        folder = replace(self.data_of, seed=self.seed).folder(runs)
        return folder / self.data_of.algo / f"{self.env.rpartition(':')[2]}_1" / "replay_buffer.pkl"

    def read(self, runs: Path) -> "RunFolder":
        """Folder that the runner makes in :meth:`folder`, which may not be there yet."""
        from sb3_deepcrl.zoo.runs import RunFolder

        return RunFolder(next((self.folder(runs) / self.algo).glob("*_1"), self.folder(runs) / self.algo))

    def is_complete(self, runs: Path) -> bool:
        """Whether all its steps have been made, and the last evaluation was not interrupted."""
        n_evaluations = len(self.evaluations(runs).get("timesteps", ()))
        n_wanted = self.steps // self.eval_freq + (self.data_of is not None)
        return self.read(runs).num_timesteps >= self.steps and n_evaluations >= n_wanted

    def evaluations(self, runs: Path) -> dict[str, np.ndarray]:
        """Its evaluations up to its number of steps, as it may have been continued by a longer run."""
        return mean_evaluations(self.read(runs), self.steps)

    def made_with(self, runs: Path) -> list[dict[str, Any]]:
        """A record for each start before its last step."""
        return [record for record in self.read(runs).made_with() if record["num_timesteps"] < self.steps]


def mean_evaluations(folder: "RunFolder", steps: int) -> dict[str, np.ndarray]:
    """Means over the episodes, shape ``(n_evaluations,)`` each, up to a step; empty before the first evaluation."""
    arrays = folder.evaluations()
    n = int((arrays["timesteps"] <= steps).sum()) if arrays else 0
    return {name: values[:n].reshape(n, -1).astype(float).mean(axis=1) for name, values in arrays.items()} if n else {}


def config_entry(algo: str, env_id: str) -> dict[str, Any]:
    """The entry of an env in ``zoo_configs``, empty if there is none."""
    import yaml

    from sb3_deepcrl.zoo.config import find_config

    if (path := find_config(None, algo, env_id)) is None:
        return {}
    entries = yaml.safe_load(Path(path).read_text())
    return dict(entries.get(env_id, entries.get("default", {})))


def check_origin(all_runs: Sequence[Run], runs: Path) -> None:
    """Refuse runs that were made with other code or configs than those that are here."""
    if found := {run.folder(runs): what for run in all_runs if (what := _differences(run, runs))}:
        folder, what = next(iter(found.items()))
        more = f"; and {len(found) - 1} more of these runs" if len(found) > 1 else ""
        raise ValueError(
            f"{folder} was made with {what}{more}. Use another folder (`runs`) to train anew, or `reuse_other_code` "
            "(--reuse-other-code) to take what is there as it is and go on from it"
        )


def _differences(run: Run, runs: Path) -> str:
    """What a run was made with in place of what there is now, in words; nothing if it has not begun."""
    from sb3_deepcrl.zoo.provenance import source_digest

    records = run.made_with(runs)
    sources = dict.fromkeys(record["source"] for record in records if record["source"] != source_digest())
    changes = [f"other code of sb3_deepcrl (source {', '.join(sources)}, now {source_digest()})"] if sources else []
    if records:
        then = run.read(runs).config()
        changes += [
            f"`{name}={then.get(name)!r}`, where zoo_configs has {value!r} now"
            for name, value in config_entry(run.algo, run.env.rpartition(":")[2]).items()
            if name not in run.hyperparams and name not in ("n_timesteps", "env_kwargs") and then.get(name) != value
        ]
    return "; ".join(changes)


# The runs in training that this process has started, so that they can be stopped
_is_stopped = threading.Event()
_processes: set[subprocess.Popen[bytes]] = set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[tuple[int, ...]]:
    """Wait until nobody else trains in a folder, such as another study with the same run; yields the lock's descriptor."""
    if os.name != "posix":
        yield ()
        return
    import fcntl

    with (folder / "lock").open("w") as file:
        while not _is_stopped.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _is_stopped.wait(1)
        yield (file.fileno(),)


def _train(command: Sequence[str], folder: Path, n_threads: int) -> None:
    """Train one run, with all that it says in ``train.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock, (folder / "train.log").open("ab+") as log:
        if _is_stopped.is_set():
            return
        start = log.tell()
        # With the lock, which it keeps should this process be killed. In a group of its own: Ctrl-C stops it from here
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(n_threads)},
            pass_fds=lock,
            process_group=0 if os.name == "posix" else None,
        )
        _processes.add(process)
        if _is_stopped.is_set():
            # A moment ago
            process.terminate()
        code = process.wait()
        _processes.discard(process)
        if code != 0 and not _is_stopped.is_set():
            log.seek(start)
            raise ChildProcessError(_describe_failure(code, log.read().decode(errors="replace"), folder))


def _stop() -> None:
    """Stop all of them, with time to save what they have."""
    _is_stopped.set()
    processes = list(_processes)
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait(SECONDS_TO_SAVE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()


def _describe_failure(code: int, said: str, folder: Path) -> str:
    lines = said.strip().splitlines()
    if code in (1, 2) and lines and ": error: " in lines[-1]:
        # It is for the user
        return lines[-1].partition(": error: ")[2]
    how = f"was killed by signal {-code}: for lack of memory, use fewer `jobs`" if code < 0 else f"failed with code {code}"
    return "\n".join([f"A run {how}. The end of {folder / 'train.log'}:", *lines[-20:]])


def train_all(
    runs_by_label: Mapping[str, Sequence[Run]],
    runs: Path,
    jobs: int | None = None,
    backend: str = "threading",
    scheduler: str | None = None,
    console: Console | None = None,
) -> None:
    """
    Train all runs that are not complete, several side by side, each with an equal part of the cores. If one fails, or this
    process is interrupted, all that it started are stopped. ``backend`` is joblib's: ``"threading"`` starts all of them
    here, by default as many at a time as there are cores.
    """
    from joblib import Parallel, cpu_count, delayed, effective_n_jobs, parallel_config

    all_runs = [(f"{label}, seed {run.seed}", run) for label, seeds in runs_by_label.items() for run in seeds]
    # A run that belongs to two settings is trained once
    open_runs = list({run.folder(runs): run for _, run in all_runs if not run.is_complete(runs)}.values())
    with contextlib.ExitStack() as stack:
        if backend == "dask":
            from distributed import Client

            stack.enter_context(Client(scheduler))
        elif backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        default = cpu_count() if backend == "threading" else -1
        stack.enter_context(parallel_config(backend=backend, n_jobs=jobs or default))
        n_jobs = max(1, min(effective_n_jobs(), len(open_runs)))
        n_threads = max(1, cpu_count() // n_jobs)
        stack.enter_context(_progress(all_runs, runs, len(open_runs), console or get_console()))
        _is_stopped.clear()
        stack.callback(_stop)
        where = runs.absolute()
        calls = (delayed(_train)(run.command(where), run.folder(where), n_threads) for run in open_runs)
        try:
            Parallel(n_jobs=n_jobs, batch_size=1)(calls)
        except ChildProcessError as error:
            # Without the way that it took through joblib
            raise ChildProcessError(str(error)) from None


@contextlib.contextmanager
def _progress(all_runs: Sequence[tuple[str, Run]], runs: Path, n_open: int, console: Console) -> Iterator[None]:
    """Show how far all runs are: a line for each evaluation, and on a terminal a bar below."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console.print(f"{len(all_runs)} runs, {n_open} to train", highlight=False)
    start, is_over, done = time.monotonic(), threading.Event(), dict.fromkeys((name for name, _ in all_runs), 0)
    with Progress(*columns, console=console, disable=not (console.is_interactive or console.is_jupyter)) as progress:
        bar = progress.add_task("env steps", total=sum(run.steps for _, run in all_runs))

        def refresh() -> None:
            for name, run in all_runs:
                found = run.evaluations(runs)
                steps = int(found["timesteps"][-1]) if found else 0
                if steps == done[name]:
                    continue
                progress.advance(bar, steps - done[name])
                done[name] = steps
                if n_open:
                    elapsed, part = timedelta(seconds=int(time.monotonic() - start)), progress.tasks[bar].percentage
                    reached = f"time at goal {found['time_at_goal'][-1]:.0f}, {steps:,} of {run.steps:,} env steps"
                    console.print(f"{elapsed} {name}, {reached}; {part:.0f} % of all", soft_wrap=True, highlight=False)

        def watch() -> None:
            # Reading all files takes time from the runs
            while not is_over.wait(5):
                refresh()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
            refresh()
