"""
Deep policies without the residual blocks that contribute least.
"""

from typing import Any

import torch as th
from torch import nn

from sb3_deepcrl.common.torch_layers import ResidualTower
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK, check_depth
from sb3_deepcrl.deepcrl.deepcrl import SHORTCUTS, DeepCRL


def block_contributions(model: DeepCRL, observations: dict[str, th.Tensor], actions: th.Tensor) -> dict[str, list[float]]:
    """
    Measure what each residual block adds to the sum that passes through a tower: the factor of its branch times the branch.

    :param model: The model
    :param observations: Observations by key, as the policy takes them, shape ``(batch_size, ...)``
    :param actions: Actions in [-1, 1], shape ``(batch_size, action_dim)``
    :return: For each tower of the policy, by its name, the mean Euclidean norm of what each of its blocks adds
    """
    towers = {name: module for name, module in model.policy.named_modules() if isinstance(module, ResidualTower)}
    found: dict[str, list[float]] = {name: [] for name in towers}
    handles = []

    def measure(contributions: list[float]) -> Any:
        def hook(block: nn.Module, inputs: tuple[th.Tensor], output: th.Tensor) -> None:
            contributions.append(float((output - inputs[0]).norm(dim=1).mean()))

        return hook

    for name, tower in towers.items():
        handles += [block.register_forward_hook(measure(found[name])) for block in tower.blocks]
    try:
        with th.no_grad():
            model.actor(observations, deterministic=True)
            model.critic(observations, actions)
    finally:
        for handle in handles:
            handle.remove()
    return found


def prune_blocks(teacher: DeepCRL, student: DeepCRL, observations: dict[str, th.Tensor], actions: th.Tensor) -> None:
    """
    Give a model the parameters of a deeper one, but for the blocks that contribute least: each tower keeps as many as the
    student has, in their order.

    :param teacher: The deeper model
    :param student: The model, of the same width
    :param observations: Observations by key on which the blocks are measured, see :func:`block_contributions`
    :param actions: Actions that belong to them
    """
    state = teacher.policy.state_dict()
    for name, contributions in block_contributions(teacher, observations, actions).items():
        tower = student.policy.get_submodule(name)
        assert isinstance(tower, ResidualTower)
        by_contribution = sorted(range(len(contributions)), key=contributions.__getitem__, reverse=True)
        kept = sorted(by_contribution[: len(tower.blocks)])
        prefix = f"{name}.blocks."
        of_blocks = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for key, value in of_blocks.items():
            index, _, rest = key.removeprefix(prefix).partition(".")
            if int(index) in kept:
                state[f"{prefix}{kept.index(int(index))}.{rest}"] = value
    student.policy.load_state_dict(state)


def policy_kwargs_without_size(model: DeepCRL) -> dict[str, Any]:
    """The ``policy_kwargs`` of a model but for depths and width, and what is an argument of ``DeepCRL`` too."""
    left_out = (*SHORTCUTS, "actor_depth", "critic_depth")
    return {name: value for name, value in model.policy_kwargs.items() if name not in left_out}


def pruned_kwargs(model: DeepCRL, depth: int) -> dict[str, Any]:
    """Arguments of a student that takes over blocks. A ValueError tells if there can be none."""
    n_blocks = check_depth(depth)
    towers = [module for module in model.policy.modules() if isinstance(module, ResidualTower)]
    shallowest = min(len(tower.blocks) for tower in towers)
    if n_blocks > shallowest:
        raise ValueError(f"`depth` must be at most that of the model, {LAYERS_PER_BLOCK * shallowest}, got {depth}")
    settings = model.policy.tower_kwargs
    if not settings["residual"]:
        raise ValueError("The model has `residual=False`: without identity paths none of its blocks can be dropped")
    if settings["residual_scale"] != "1/N":
        return {}
    if len({len(tower.blocks) for tower in towers}) > 1:
        raise ValueError('`residual_scale="1/N"` is not the same in actor and critic, whose depths differ: a student has one')
    # Of as many blocks as there were
    return {"policy_kwargs": {**policy_kwargs_without_size(model), "residual_scale": 1.0 / shallowest}}
