"""
Shallow policies that learn from deep ones.
"""

import inspect
import io
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv, TrainFreq, TrainFrequencyUnit

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.losses import info_nce
from sb3_deepcrl.common.utils import WITHOUT_BUFFER, check_positive_int, keep_normalization
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deepcrl.offline import read_replay_buffer
from sb3_deepcrl.deepcrl.policies import GOAL_KEY
from sb3_deepcrl.deploy.pruning import policy_kwargs_without_size, prune_blocks, pruned_kwargs

# A student has a stationary target: it may be updated so many times as often as its teacher was
MORE_UPDATES = 4
# Transitions on which the blocks of a teacher are measured
N_MEASURED = 4096


def make_student(teacher: DeepCRL, depth: int, width: int | None = None, env: GymEnv | None = None, **kwargs: Any) -> DeepCRL:
    """
    Make a model with the settings of another one and networks of another size, which has four updates where the other had one
    (unless that was given ``train_freq`` or ``gradient_steps``).

    :param teacher: The other model
    :param depth: Depth of actor and critic
    :param width: Their width, by default that of the teacher
    :param env: Env of the student, by default that of the teacher
    :param kwargs: Arguments of :class:`~sb3_deepcrl.deepcrl.deepcrl.DeepCRL` in place of the teacher's
    :return: The student, which has learned nothing yet
    :raises ValueError: if the other one is no DeepCRL, there is no env, or no network of that depth
    """
    if not isinstance(teacher, DeepCRL):
        raise ValueError(f"Only DeepCRL has students, not {type(teacher).__name__}")
    env = env or teacher.get_env()
    if env is None:
        raise ValueError("The teacher was loaded without an env, where the student learns: give it as `env`")
    settings = {name: getattr(teacher, name) for name in inspect.signature(DeepCRL).parameters if hasattr(teacher, name)}
    if teacher.transitions_per_update is not None:
        # These follow from it
        del settings["train_freq"], settings["gradient_steps"]
        settings["transitions_per_update"] = updates_of_student(teacher.transitions_per_update)
    else:
        del settings["transitions_per_update"]
    settings.update(policy=type(teacher.policy), policy_kwargs=policy_kwargs_without_size(teacher), env=env)
    return DeepCRL(**{**settings, "depth": depth, "width": width or teacher.width, **kwargs})


def updates_of_student(transitions_per_update: int) -> int:
    """Number of transitions for each update of a student, from that of its teacher."""
    return max(transitions_per_update // MORE_UPDATES, 1)


class Distillation(BaseCallback):
    """
    Callback for :meth:`~sb3_deepcrl.deepcrl.deepcrl.DeepCRL.learn` that lets a model learn from another one, in place of the
    losses of contrastive RL. The student acts, and learns on states of the teacher's replay buffer and on those that it visits
    itself (DAgger, https://arxiv.org/abs/1011.0686), with goals drawn as in training. Its actor minimizes the divergence
    KL(teacher || student) of the distributions of actions; its critic the
    squared distance to the representations of the teacher's critic, so that it can go on to learn by itself afterwards.
    ``train/actor_loss`` and ``train/critic_loss`` are these.

    A training that was stopped goes on with the same callback. Until it ends, statistics of ``VecNormalize`` stay those of the
    teacher; with ``normalize_observations``, those of the student begin as those of the teacher.

    :param teacher: Model, or file of a model, with the same spaces, ``repr_dim`` and ``energy``
    :param replay_buffer: File with the replay buffer of the teacher, by default the one that the model has
    :param vec_normalize: File with the statistics of ``VecNormalize`` of the teacher, by default those of the env that the
        model has
    :param teacher_steps: Number of env steps that the teacher makes before the student does, if it has no replay buffer
    :param prune: Whether the student begins as the teacher without the residual blocks that contribute least, see
        :func:`~sb3_deepcrl.deploy.pruning.prune_blocks`
    :raises ValueError: if the teacher does not fit
    """

    model: DeepCRL

    def __init__(
        self,
        teacher: DeepCRL | str | Path,
        replay_buffer: str | Path | None = None,
        vec_normalize: str | Path | None = None,
        teacher_steps: int = 20_000,
        prune: bool = False,
    ):
        super().__init__()
        self.replay_buffer = replay_buffer
        self.teacher_buffer: ContrastiveReplayBuffer | None = None
        if not isinstance(teacher, DeepCRL):
            file: Any = teacher
        else:
            # A model of its own, which nobody trains meanwhile
            file = io.BytesIO()
            teacher.save(file)
            file.seek(0)
            if replay_buffer is None and teacher.replay_buffer is not None and teacher.replay_buffer.size() > 0:
                self.teacher_buffer = deepcopy(teacher.replay_buffer)
        self.teacher = DeepCRL.load(file, device="cpu", custom_objects=WITHOUT_BUFFER)
        normalized = teacher.get_vec_normalize_env() if isinstance(teacher, DeepCRL) else None
        if vec_normalize is not None:
            normalized = load_from_pkl(vec_normalize)
        # There are none without `norm_obs`
        self.statistics = deepcopy(normalized.obs_rms) if normalized is not None and normalized.norm_obs else None
        self.teacher_steps = check_positive_int(teacher_steps, "teacher_steps")
        self.prune = prune

    def _init_callback(self) -> None:
        student, teacher = self.model, self.teacher
        if not isinstance(student, DeepCRL):
            raise ValueError(f"Only DeepCRL learns from a teacher, not {type(student).__name__}")
        if student._ranks.size > 1:
            raise ValueError(f"A teacher teaches a single rank, not {student._ranks.size}: start it without torchrun")
        for name in ("observation_space", "action_space"):
            if getattr(student, name) != getattr(teacher, name):
                raise ValueError(f"The teacher has another `{name}`, {getattr(teacher, name)}: use an env like its own")
        for name in ("repr_dim", "energy"):
            if (found := getattr(student.policy, name)) != (wanted := getattr(teacher.policy, name)):
                raise ValueError(f"`{name}` must be that of the teacher, {wanted!r}, got {found!r}")
        if self.prune and student.width != teacher.width:
            raise ValueError(
                f"`width` must be that of the teacher, whose blocks are kept, {teacher.width}, got {student.width}"
            )

    def _on_training_start(self) -> None:
        student, teacher = self.model, self.teacher
        teacher.device = student.device
        teacher.policy.to(student.device)
        teacher.policy.set_training_mode(False)
        teacher.compile, teacher.cuda_graph = student.compile, False
        assert isinstance(student.train_freq, TrainFreq)
        rollout = student.train_freq.frequency * student.n_envs
        teacher._setup_acceleration(self.locals["total_timesteps"] * max(student.gradient_steps, 1) // rollout)
        vec_normalize = student.get_vec_normalize_env()
        with keep_normalization(vec_normalize):
            if vec_normalize is not None and self.statistics is not None:
                vec_normalize.obs_rms = deepcopy(self.statistics)
            self._on_rollout_start()
            # Not where a training goes on, whatever its number of steps
            if student._n_updates == 0:
                self._begin()
        student._runner.update = self._update

    def _on_rollout_start(self) -> None:
        if (vec_normalize := self.model.get_vec_normalize_env()) is not None:
            # Until the end of the rollout
            vec_normalize.training = None  # type: ignore[assignment]

    def _on_step(self) -> bool:
        return True

    def _act(self) -> None:
        """Let the teacher act, which fills the replay buffer of the student."""
        student, teacher = self.model, self.teacher
        assert student.replay_buffer is not None
        teacher.set_logger(Logger(None, []))
        # What its own training owes is not ours
        teacher.n_envs, teacher._missing_steps = student.n_envs, 0
        teacher.set_env(self.training_env)
        teacher.replay_buffer, teacher.buffer_size = student.replay_buffer, student.buffer_size
        _, callback = teacher._setup_learn(self.teacher_steps)
        n_steps = TrainFreq(math.ceil(self.teacher_steps / student.n_envs), TrainFrequencyUnit.STEP)
        teacher.collect_rollouts(self.training_env, callback, n_steps, student.replay_buffer)
        # As at the beginning of `learn()`: the envs are the student's again
        student._last_obs = self.training_env.reset()  # type: ignore[assignment]
        if (vec_normalize := student.get_vec_normalize_env()) is not None:
            student._last_original_obs = vec_normalize.get_original_obs()  # type: ignore[assignment]

    def _begin(self) -> None:
        student, teacher = self.model, self.teacher
        assert student.replay_buffer is not None
        student.learning_starts = 0
        statistics = deepcopy(teacher.actor.normalizer)
        if self.replay_buffer is not None:
            self.teacher_buffer = read_replay_buffer(self.replay_buffer, student)
        if self.teacher_buffer is None:
            self._act()
        elif (
            self.teacher_buffer.n_envs != student.n_envs
            or self.teacher_buffer.buffer_size != student.replay_buffer.buffer_size
        ):
            raise ValueError(
                f"The replay buffer of the teacher is that of {self.teacher_buffer.n_envs} envs with "
                f"{self.teacher_buffer.buffer_size} transitions each, but the student has {student.n_envs} with "
                f"{student.replay_buffer.buffer_size}: make the student with the same `n_envs` and `buffer_size`"
            )
        else:
            self.teacher_buffer.device = student.device
            student.replay_buffer, self.teacher_buffer = self.teacher_buffer, None
            student.replay_buffer.on_device = student.replay_buffer_kwargs.get("on_device", "auto")
        student.replay_buffer.truncate_last_trajectory()
        for model in (student, teacher):
            # Also those of the teacher, which learn from what it sees while it acts
            if statistics is not None and model.actor.normalizer is not None:
                model.actor.normalizer.load_state_dict(statistics.state_dict())
        if student.log_ent_coef is not None and teacher.log_ent_coef is not None:
            with th.no_grad():
                student.log_ent_coef.copy_(teacher.log_ent_coef)
        if self.prune:
            sample = student.replay_buffer.sample_contrastive(N_MEASURED, student.get_vec_normalize_env())
            prune_blocks(teacher, student, *sample)

    def _update(self, observations: dict[str, th.Tensor], actions: th.Tensor) -> th.Tensor:
        """What :meth:`DeepCRL._update` is in contrastive RL, with the same arguments and metrics."""
        student, teacher = self.model, self.teacher
        n_random = int(student.random_goals * len(actions))
        goals = observations[GOAL_KEY]
        # As in training, the actor practices goals of other rows too
        of_actor = {**observations, GOAL_KEY: th.cat([goals.roll(-1, 0)[:n_random], goals[n_random:]])}
        with th.no_grad():
            target = teacher.actor.get_action_dist_params(of_actor)
            target_state_action = teacher.critic.encode_state_action(
                teacher.critic.extract_state_features(observations), actions
            )
            target_goal = teacher.critic.encode_goal(observations)

        params = student.actor.get_action_dist_params(of_actor)
        actor_loss = student.actor.kl_divergence(target, params).mean()
        student._runner.backward(student.actor.optimizer, actor_loss)

        state_features = student.critic.extract_state_features(observations)
        state_action, goal = (
            student.critic.encode_state_action(state_features, actions),
            student.critic.encode_goal(observations),
        )
        distances = (state_action - target_state_action).square() + (goal - target_goal).square()
        critic_loss = distances.sum(dim=1).mean()
        student._runner.backward(student.critic.optimizer, critic_loss)
        grad_norms = student._runner.step(student.actor.optimizer, student.critic.optimizer)

        with th.no_grad():
            _, contrastive_metrics = info_nce(
                state_action, goal, student.critic.energy, student.contrastive_loss, student.logsumexp_coef
            )
            _, log_prob = student.actor.expected_value(params, lambda actions: th.zeros(len(actions), device=actions.device))
            ent_coef = student.ent_coef_tensor if student.log_ent_coef is None else student.log_ent_coef.exp()
            ent_coef_losses = [] if student.ent_coef_optimizer is None else [th.zeros_like(actor_loss)]
            losses = [actor_loss, critic_loss, ent_coef.squeeze(), -log_prob.mean()]
            return th.stack([*losses, params[0].abs().mean(), *grad_norms, *contrastive_metrics, *ent_coef_losses])


def distill(
    model: DeepCRL,
    depth: int = 8,
    width: int | None = None,
    steps: int = 250_000,
    env: GymEnv | None = None,
    callback: list[BaseCallback] | BaseCallback | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> DeepCRL:
    """
    Let a shallow student learn the distribution of actions of a deep teacher, see :class:`Distillation`.

    What it does is ``make_student(...).learn(..., callback=Distillation(model))``, which can be interrupted, saved and gone
    on with as any training.

    :param model: The teacher. Its replay buffer is used if it has one.
    :param depth: Depth of the student
    :param width: Width of the student, by default that of the teacher
    :param steps: Number of env steps of the student
    :param env: Env of the student, by default that of the teacher
    :param callback: What else is called at each step, for instance a ``GoalEvalCallback``
    :param progress_bar: Whether to show a progress bar
    :param kwargs: Arguments of :class:`Distillation`
    :return: The student, which is a model as all others
    :raises ValueError: if there is no env, no network of that depth, or the teacher does not fit
    """
    others = callback if isinstance(callback, list) else [callback] if callback else []
    student = make_student(model, depth, width, env, **(pruned_kwargs(model, depth) if kwargs.get("prune") else {}))
    return student.learn(steps, callback=[Distillation(model, **kwargs), *others], progress_bar=progress_bar)


def prune(model: DeepCRL, depth: int = 16, steps: int = 250_000, **kwargs: Any) -> DeepCRL:
    """
    Drop the residual blocks that contribute least, from actor and critic, and let what is left learn from the whole model, see
    :class:`Distillation`.

    :param model: The deep model. Its replay buffer is used if it has one.
    :param depth: Depth that is left
    :param steps: Number of env steps of learning, 0 for none
    :param kwargs: Other arguments of :func:`distill`, but for the width
    :return: The pruned model, which is one as all others
    :raises ValueError: if the model is not as deep, or has no identity paths or no factors that fit
    """
    return distill(model, depth, model.width, steps, prune=True, **kwargs)
