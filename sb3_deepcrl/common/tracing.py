"""
When compiled code has to be the plain one: while operations are traced, transformed or watched, and not only computed.
"""

import torch as th
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

# Other classes stand for something else than numbers in memory, for instance while a network is exported
PLAIN_TENSORS = (th.Tensor, nn.Parameter)


def is_traced(*tensors: th.Tensor) -> bool:
    """
    Whether somebody sees the operations on these tensors one by one: ``th.compile``, ``th.jit.trace``, ``th.export``,
    ``torch.fx``, ``th.func``, forward-mode differentiation, a dispatch or function mode. Whatever is done at once, in code
    that none of them knows, would be wrong or fail then. It is asked at each call, so it takes less than a microsecond.
    PyTorch has no public names of most of it.
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
    """Whether the memory of a tensor, if any, does not hold its numbers: they are negated, or one of several."""
    return type(tensor) not in PLAIN_TENSORS or tensor.is_neg() or th._C._functorch.is_legacy_batchedtensor(tensor)


def is_watched(*modules: nn.Module) -> bool:
    """
    Whether somebody wants to be called when one of these modules, without those in them, runs, one of them does something
    else than its class, or their parameters are more than numbers. There is no public name of the hooks.
    """
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return True
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if "forward" in vars(module):
            return True
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in PLAIN_TENSORS:
                return True
    return False
