"""
When a compiled block has to be the plain one: while operations are traced, transformed or watched, and not only computed.
"""

from collections.abc import Callable

import torch as th
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from sb3_deepcrl.common.torch_layers import ResidualBlock

# Other classes stand for something else than numbers in memory, for instance while a network is exported
PLAIN_TENSORS = (th.Tensor, nn.Parameter)


def is_traced(*tensors: th.Tensor) -> bool:
    """
    Whether somebody sees the operations on these tensors one by one: ``th.compile``, ``th.jit.trace``, ``th.export``,
    ``torch.fx``, ``th.func``, forward-mode differentiation, a dispatch or function mode. Whatever is done at once, in code
    that none of them knows, would be wrong or fail then. It is asked at each call, so it takes less than a microsecond.

    :param tensors: Inputs of the operations
    :return: Whether to compute them with PyTorch's own operations
    """
    return (
        th.compiler.is_compiling()
        or any(map(_is_view_of_numbers, tensors))
        or th._C._get_tracing_state() is not None
        or th._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or th._C._len_torch_dispatch_stack() > 0
        # `th.set_default_device` and `with th.device(...)` are modes too, but change no operation on what there is
        or any(type(th._C._get_function_stack_at(i)) is not DeviceContext for i in range(th._C._len_torch_function_stack()))
    )


def _is_view_of_numbers(tensor: th.Tensor) -> bool:
    """
    :param tensor: Any tensor
    :return: Whether its memory, if there is any, does not hold its numbers: they are negated, or one of several
    """
    return type(tensor) not in PLAIN_TENSORS or tensor.is_neg() or th._C._functorch.is_legacy_batchedtensor(tensor)


def is_watched(block: ResidualBlock) -> bool:
    """
    :param block: A residual block
    :return: Whether somebody wants to be called when one of its layers runs, or its parameters are more than numbers
    """
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return True
    for module in (block, *block.branch):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in PLAIN_TENSORS:
                return True
    return False


class CompiledBlock:
    """
    What a compiled residual block does when it is called. It is the plain one where :func:`is_traced` or :func:`is_watched`
    says so; looked at in each call, since all of it may change.

    :param block: The residual block
    :param compiled: What else to call
    """

    def __init__(self, block: ResidualBlock, compiled: Callable[[th.Tensor], th.Tensor]):
        self.block = block
        self.compiled = compiled

    def __call__(self, x: th.Tensor) -> th.Tensor:
        if is_traced(x) or is_watched(self.block):
            return self.block._call_impl(x)
        return self.compiled(x)
