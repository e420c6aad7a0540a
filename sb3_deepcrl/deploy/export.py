"""
Files with which a policy acts where there is neither this package nor Stable-Baselines3.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from torch import nn
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass

from sb3_deepcrl.common.torch_layers import residual_blocks, residual_towers
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK, atomic_path, check_choice

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Through these observations pass as they are, or as the policy passes them too
TRANSPARENT = (VecCheckNan, VecMonitor, VecTransposeImage, VecVideoRecorder)
# Name of the input where observations have no keys
OBSERVATION = "observation"


class _RawPolicy(nn.Module):
    """
    From observations as the env gives them to actions as it takes them: what ``VecNormalize``, ``VecTransposeImage`` and
    ``predict`` do, as operations on tensors.
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: BasePolicy, raw_spaces: dict[str, spaces.Space], vec_normalize: VecNormalize | None):
        super().__init__()
        self.policy = policy
        self.keys = list(raw_spaces)
        self.normalized: list[str] = []
        if vec_normalize is not None:
            statistics = vec_normalize.obs_rms
            self.normalized = list(vec_normalize.norm_obs_keys or self.keys)
            self.clip_obs = vec_normalize.clip_obs
            for key in self.normalized:
                of_key = statistics[key] if isinstance(statistics, dict) else statistics
                # In double precision, as VecNormalize does
                self.register_buffer(f"mean_{key}", th.as_tensor(of_key.mean))
                self.register_buffer(f"std_{key}", th.as_tensor(np.sqrt(of_key.var + vec_normalize.epsilon)))
        if isinstance(policy.action_space, spaces.Box):
            self.register_buffer("low", th.as_tensor(policy.action_space.low))
            self.register_buffer("high", th.as_tensor(policy.action_space.high))

    def _prepare(self, key: str, values: th.Tensor) -> th.Tensor:
        if key in self.normalized:
            mean, std = getattr(self, f"mean_{key}"), getattr(self, f"std_{key}")
            values = (_reorder(values, mean.shape) - mean) / std
            values = values.clamp(-self.clip_obs, self.clip_obs).float()
        return _reorder(values, _by_key(self.policy.observation_space)[key].shape)

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        obs = {key: self._prepare(key, values) for key, values in zip(self.keys, observations, strict=True)}
        is_dict = isinstance(self.policy.observation_space, spaces.Dict)
        actions = self.policy._predict(obs if is_dict else obs[OBSERVATION], deterministic=True)
        actions = actions.reshape(-1, *self.policy.action_space.shape)  # type: ignore[misc]
        if not isinstance(self.policy.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        return th.minimum(th.maximum(actions.to(self.low.dtype), self.low), self.high)


def _by_key(space: spaces.Space) -> dict[str, spaces.Space]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {OBSERVATION: space}


def _reorder(images: th.Tensor, shape: tuple[int, ...] | None) -> th.Tensor:
    """Images with the channels first, unless they are of the right shape already."""
    return images if images.shape[1:] == shape else images.permute(0, 3, 1, 2)


def _find_raw(space: spaces.Space, env: VecEnv | None) -> tuple[dict[str, spaces.Space], VecNormalize | None]:
    """Spaces of the observations that come from the env, and what normalizes them."""
    found, vec_normalize = env.observation_space if env is not None else space, None
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            vec_normalize = env if env.norm_obs else vec_normalize
        elif not isinstance(env, TRANSPARENT):
            break
        env = env.venv
        # Statistics that were read from a file have no env
        found = found if env is None else env.observation_space
    hidden = None if env is None else unwrap_vec_normalize(env)
    if hidden is not None and hidden.norm_obs:
        raise ValueError(
            f"The policy cannot be exported with its VecNormalize, because {type(env).__name__} changes observations between "
            "them: give the env without it"
        )
    raw_spaces = _by_key(found)
    for key, wanted in _by_key(space).items():
        raw = raw_spaces.get(key)
        if env is None and is_image_space(wanted) and is_image_space_channels_first(wanted):  # type: ignore[arg-type]
            assert isinstance(wanted, spaces.Box)
            # Nearly all envs have the channels last, which Stable-Baselines3 changes
            low, high = (np.moveaxis(bound, 0, -1) for bound in (wanted.low, wanted.high))
            raw = raw_spaces[key] = spaces.Box(low, high, dtype=np.uint8)
        if raw is None or sorted(raw.shape or ()) != sorted(wanted.shape or ()):
            raise ValueError(f"The model was trained with `{key}` in {wanted}, but the env gives {raw}: give its own env")
    return {key: raw_spaces[key] for key in _by_key(space)}, vec_normalize


def describe_policy(model: BaseAlgorithm, env: VecEnv | None = None) -> dict[str, str]:
    """
    Say what a policy is, for those who find its file.

    :param model: Its model
    :param env: Its env, by default that of the model
    :return: Versions, algorithm, env id, number of env steps, depth and width of the network that acts, spaces
    """
    import sb3_deepcrl

    env = env or model.get_env()
    facts: dict[str, Any] = {
        "sb3_deepcrl": sb3_deepcrl.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "torch": th.__version__,
        "algorithm": type(model).__name__,
        "num_timesteps": model.num_timesteps,
        "observation_space": model.observation_space,
        "action_space": model.action_space,
    }
    # VecEnvs of simulators raise all kinds of errors and may return anything
    with contextlib.suppress(Exception):
        facts["env_id"] = str(env.get_attr("spec")[0].id)  # type: ignore[union-attr]
    if towers := residual_towers(model.policy):
        # The network that acts is the first one of all policies
        facts |= {"depth": LAYERS_PER_BLOCK * len(towers[0].blocks), "width": towers[0].stem[0].out_features}
    return {name: str(value) for name, value in facts.items()}


@contextlib.contextmanager
def _plain(policy: BasePolicy) -> Iterator[None]:
    """Let a policy act in float32, without anything compiled."""
    towers, saved = residual_towers(policy), []
    for module in (*towers, *residual_blocks(policy)):
        saved.append((module, module._compiled_call_impl))
        module._compiled_call_impl = None
    precisions = [tower.autocast_dtype for tower in towers]
    checkpointed = [tower.checkpoint_activations for tower in towers]
    for tower in towers:
        tower.autocast_dtype, tower.checkpoint_activations = None, False
    validates = th.distributions.Distribution._validate_args
    # Looks at numbers, which are not there
    th.distributions.Distribution.set_default_validate_args(False)
    policy.set_training_mode(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(validates)
        for module, compiled in saved:
            module._compiled_call_impl = compiled
        for tower, dtype, checkpoint in zip(towers, precisions, checkpointed, strict=True):
            tower.autocast_dtype, tower.checkpoint_activations = dtype, checkpoint


def _drop_unused(program: th.export.ExportedProgram) -> None:
    """Drop parameters that have no part in the actions, such as those of the critic."""
    unused = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    specs = program.graph_signature.input_specs
    kept = []
    for spec in specs:
        node = unused.get(spec.arg.name) if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) else None  # type: ignore[union-attr]
        if node is None:
            kept.append(spec)
            continue
        program.graph.erase_node(node)
        for tensors in (program.state_dict, program.constants):
            tensors.pop(spec.target, None)
    specs[:] = kept


def _trace(model: BaseAlgorithm, env: VecEnv | None) -> tuple[th.export.ExportedProgram, list[str]]:
    """The policy as a program of tensors, and the names of its inputs."""
    raw_spaces, vec_normalize = _find_raw(model.observation_space, env or model.get_env())
    policy = model.policy
    network = _RawPolicy(policy, raw_spaces, vec_normalize).to(policy.device)
    # Two rows, as a single one would be taken for a constant
    shapes = {key: (2, *(space.shape or ())) for key, space in raw_spaces.items()}
    examples = [th.as_tensor(np.zeros(shapes[key], raw_spaces[key].dtype), device=policy.device) for key in raw_spaces]
    batch = th.export.Dim("batch")
    with _plain(policy):
        program = th.export.export(
            network, tuple(examples), dynamic_shapes=(tuple({0: batch} for _ in examples),), strict=False
        )
    _drop_unused(program)
    return move_to_device_pass(program, "cpu"), list(raw_spaces)


def export_policy(model: BaseAlgorithm, path: str | Path, format: str = "onnx", env: VecEnv | None = None) -> Path:
    """
    Write the deterministic policy of a model to a file that needs neither this package nor Stable-Baselines3: from
    observations as the env gives them (an input for each key, or ``observation``; images with the channels where the env has
    them) to actions as the env takes them (the output ``action``), for any number of rows. All that is done in between is in
    it: statistics of ``VecNormalize``, preprocessing, network, squashing and scaling or clipping.

    The network computes in float32, also where the model does in bfloat16.

    :param model: Model of any algorithm of Stable-Baselines3 or sb3-contrib without recurrent policy or action masks
    :param path: Where to write it. Weights of more than 1.5 GB are beside an ONNX file, in one of its name and ``.data``
    :param format: ``"onnx"``, or ``"torch"`` for a file of ``torch.export`` that ``torch.export.load`` reads
    :param env: Env with which the policy was trained, for its ``VecNormalize`` and the layout of images, by default that of
        the model. A ``VecNormalize`` that was unpickled will do. Without any, images have the channels last.
    :return: The path
    :raises ValueError: if there is no such format, the path has the suffix of another one, or the env does not fit
    :raises ImportError: if onnx or onnxscript is missing
    """
    check_choice(format, tuple(FORMATS), "format")
    path = Path(path)
    if path.suffix != FORMATS[format] and path.suffix in (*FORMATS.values(), ".zip"):
        raise ValueError(f"{path} has the suffix of another format, that of {format!r} is {FORMATS[format]}: change one")
    path = path if path.suffix else path.with_suffix(FORMATS[format])
    if format == "onnx":
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f'{error}: install the extra "export", in a clone by `pip install -e ".[export]"`') from None
    facts = describe_policy(model, env)
    with warnings.catch_warnings():
        # Of PyTorch about itself
        warnings.simplefilter("ignore")
        program, keys = _trace(model, env)
        if format == "torch":
            with atomic_path(path, FORMATS[format]) as temporary, temporary.open("wb") as file:
                th.export.save(program, file, extra_files={"metadata.json": json.dumps(facts)})
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # With its own name, by which a file finds its weights
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            logger = logging.getLogger("torch.onnx")
            level = logger.level
            logger.setLevel(logging.ERROR)
            try:
                onnx_program = th.onnx.export(
                    program,
                    input_names=keys,
                    output_names=["action"],
                    dynamic_shapes=(tuple({0: "batch"} for _ in keys),),
                    dynamo=True,
                    verbose=False,
                )
            finally:
                logger.setLevel(level)
            assert onnx_program is not None
            onnx_program.model.metadata_props.update(facts)
            onnx_program.save(Path(folder) / path.name)
            # The weights first, if they are in a file of their own
            for written in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(written, path.with_name(written.name))
    return path
