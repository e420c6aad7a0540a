import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Real
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK, check_choice, check_depth, check_positive_int

# Name of a normalization, or what makes the module from the number of features
Norm = str | Callable[[int], nn.Module]
# Epsilon of the reference code (Flax), PyTorch's default is 1e-5
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": partial(nn.LayerNorm, eps=1e-6), "none": nn.Identity}


def lecun_uniform_(layer: nn.Linear) -> nn.Linear:
    """
    Initialize a Dense layer as the paper's code does: weights from ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``
    (variance ``1 / (3 * fan_in)``), bias zero. Gives the same layer.
    """
    bound = layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def _make_module(make: Any, args: tuple[Any, ...], wanted: str) -> nn.Module:
    """Make what the user chose, a class or a function, with an error if it makes no module of these arguments."""
    module, reason = None, None
    try:
        module = make(*args)
    except TypeError as error:
        reason = error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{wanted}, got {make!r}") from reason
    return module


def _dense_layer(in_dim: int, width: int, activation_fn: type[nn.Module], norm: Norm) -> list[nn.Module]:
    """One layer of the tower: Dense, normalization, activation."""
    make_norm = NORMS.get(norm, norm) if isinstance(norm, str) else norm
    return [
        lecun_uniform_(nn.Linear(in_dim, width)),
        _make_module(make_norm, (width,), '`norm` must be "layer", "none", or a class such as `th.nn.RMSNorm`'),
        _make_module(activation_fn, (), "`activation_fn` must be the class of an activation, such as `th.nn.ReLU`"),
    ]


class ResidualBlock(nn.Module):
    """
    Four times [Dense, normalization, activation], the identity added after the last activation:
    ``x + scale * F(x)`` (section 3 and figure 2 of the paper, where ``scale`` is 1).

    :param width: Number of features, in and out
    :param activation_fn: Class of the activation
    :param norm: see :class:`ResidualTower`
    :param residual: Whether to add the identity (False for the ablation: the output is then ``F(x)``)
    :param scale: Factor of the residual branch, or its initial value
    :param learn_scale: Whether the factor is a parameter
    """

    scale: th.Tensor

    def __init__(
        self,
        width: int,
        activation_fn: type[nn.Module] = nn.SiLU,
        norm: Norm = "layer",
        residual: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
    ):
        super().__init__()
        layers = [layer for _ in range(LAYERS_PER_BLOCK) for layer in _dense_layer(width, width, activation_fn, norm)]
        self.branch = nn.Sequential(*layers)
        self.residual = residual
        if residual and learn_scale:
            self.scale = nn.Parameter(th.tensor(float(scale)))
        else:
            # A tensor and not a number, so that blocks of towers of different depths are the same code.
            # Not in the state dict: it follows from the depth.
            self.register_buffer("scale", th.tensor(float(scale)), persistent=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Features of the next block, of shape ``(batch_size, width)`` as those of this one."""
        branch = (self._unfused_branch(x) if th.compiler.is_compiling() else self.branch(x)).to(x.dtype)
        return th.addcmul(x, branch, self.scale) if self.residual else branch

    def _unfused_branch(self, x: th.Tensor) -> th.Tensor:
        """
        The same as ``branch``, but each bias is added after the matrix product, which lets a compiler add it on the way
        to the normalization: the fused product copies it to all rows first.
        """
        for layer in self.branch:
            # Not a subclass, and nothing that hooks change or look at, or a `forward` of its own
            is_watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
            if type(layer) is nn.Linear and layer.bias is not None and not is_watched:
                product = F.linear(x, layer.weight)
                x = product + layer.bias.to(product.dtype)
            else:
                x = layer(x)
        return x


def _parse_residual_scale(residual_scale: float | str, n_blocks: int) -> tuple[float, bool]:
    """The (initial) factor of the residual branches, and whether it is learned."""
    if residual_scale in ("1/N", "learnable"):
        return 1.0 / n_blocks, residual_scale == "learnable"
    if isinstance(residual_scale, Real) and not isinstance(residual_scale, bool) and 0 < residual_scale < math.inf:
        return float(residual_scale), False
    raise ValueError(f'`residual_scale` must be a positive number, "1/N" or "learnable", got {residual_scale!r}')


class ResidualTower(nn.Module):
    """
    The paper's network (section 3): Dense + normalization + activation, then ``depth / 4`` residual blocks,
    then a linear head. There is no normalization after the last block.

    ``depth`` counts the Dense layers inside the residual blocks; the first layer and the head are not counted.

    :param input_dim: Number of input features
    :param output_dim: Number of outputs, or None for a tower without head
        (its outputs are then the ``width`` features)
    :param depth: Number of Dense layers inside the residual blocks, a positive multiple of 4
    :param width: Number of features of every hidden layer
    :param activation_fn: Class of the activation, Swish (``nn.SiLU``) in the paper
    :param norm: ``"layer"`` (the paper), ``"none"``, or what makes another module from the number of features
    :param residual: Whether the blocks add the identity (False for the ablation)
    :param residual_scale: Factor of the residual branches: a number (the paper's is 1), ``"1/N"`` for one over
        the number of blocks, or ``"learnable"`` for one parameter a block that starts at ``1/N``.
        The outputs of a Swish have a positive mean, so that with a factor of 1 the residual sum grows in proportion
        to the number of blocks; from ``1/N`` outputs and gradients start at the same size whatever the depth.
    :raises ValueError: if the depth, the width, the normalization or the scale is not one of those
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None,
        depth: int = 16,
        width: int = 256,
        activation_fn: type[nn.Module] = nn.SiLU,
        norm: Norm = "layer",
        residual: bool = True,
        residual_scale: float | str = "learnable",
    ):
        super().__init__()
        n_blocks = check_depth(depth)
        check_positive_int(width, "width")
        check_choice(residual, (True, False), "residual")
        scale, learn_scale = _parse_residual_scale(residual_scale, n_blocks)
        self.output_dim = width if output_dim is None else output_dim
        self.stem = nn.Sequential(*_dense_layer(input_dim, width, activation_fn, norm))
        self.blocks = nn.Sequential(
            *(ResidualBlock(width, activation_fn, norm, residual, scale, learn_scale) for _ in range(n_blocks))
        )
        #: Whether a block may draw random numbers: dropout, or modules that are not PyTorch's. A checkpointed block draws the
        #: same ones again then, which no CUDA graph can capture: set it to False if yours draw none.
        self.is_random = not all(
            type(module).__module__.startswith("torch.nn.") and not isinstance(module, _DropoutNd | nn.RReLU)
            for block in self.blocks
            for layer in block.branch  # type: ignore[operator, union-attr]
            for module in layer.modules()
        )
        self.head = nn.Identity() if output_dim is None else lecun_uniform_(nn.Linear(width, output_dim))
        #: Type of the matrix products inside the tower, None for that of the inputs.
        #: The residual sum keeps the type of the inputs: in bfloat16 it would forget what the first of many blocks added.
        self.autocast_dtype: th.dtype | None = None
        #: Whether to keep only the input of each block for the backward pass and compute the rest of it again
        self.checkpoint_activations = False

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Outputs of shape ``(batch_size, output_dim)`` for inputs of shape ``(batch_size, input_dim)``."""
        return self.head(self.features(x))

    def features(self, x: th.Tensor) -> th.Tensor:
        """Outputs of the last block, shape ``(batch_size, width)``, without the head."""
        checkpointed = self.checkpoint_activations and th.is_grad_enabled()
        with nullcontext() if self.autocast_dtype is None else th.autocast(x.device.type, self.autocast_dtype):
            features = self.stem(x).to(x.dtype)
            for block in self.blocks:
                if checkpointed:
                    # Looking at the random state would wait for the device, where nothing is random in a block
                    features = checkpoint(block, features, use_reentrant=False, preserve_rng_state=self.is_random)
                else:
                    features = block(features)
        return features


def residual_blocks(module: nn.Module) -> list[ResidualBlock]:
    """All residual blocks of a network."""
    return [block for block in module.modules() if isinstance(block, ResidualBlock)]


def residual_towers(module: nn.Module) -> list[ResidualTower]:
    """All residual towers of a network."""
    return [tower for tower in module.modules() if isinstance(tower, ResidualTower)]


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """``module.parameters()`` without names, for which the update of a deep and narrow network would wait."""
    modules, found = [module], list[nn.Parameter | None]()
    for part in modules:
        modules += [child for child in part._modules.values() if child is not None]
        found += part._parameters.values()
    return [parameter for parameter in found if parameter is not None]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Compute no gradients of the parameters of a network. Forward and backward pass belong into the context: compiled and
    checkpointed blocks decide in both what to compute.
    """
    parameters = [parameter for parameter in parameters_of(module) if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def set_training_mode(module: nn.Module, mode: bool) -> None:
    """What ``module.train(mode)`` does, in a fraction of its time: with a thousand modules it takes milliseconds."""
    modules = [module]
    for part in modules:
        # Some features extractors let a part of them be as it is
        if type(part).train is not nn.Module.train and part is not module:
            part.train(mode)
            continue
        part.__dict__["training"] = mode
        if part._modules:
            modules += [child for child in part._modules.values() if child is not None]
