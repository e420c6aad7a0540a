"""
How a deep forward pass runs: compiled, in bfloat16. What it computes is elsewhere.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_deepcrl.common.torch_layers import ResidualBlock, residual_blocks, residual_towers
from sb3_deepcrl.common.tower_kernel import TowerKernel, describe_error, load_kernel, tower_kernels
from sb3_deepcrl.common.tracing import is_traced, is_watched
from sb3_deepcrl.common.utils import check_choice

PRECISIONS = ("float32", "bfloat16", "auto")

# With compile="auto" on a CPU, so many layers have to be updated (updates times depth) to earn the start-up, which takes
# seconds.
MIN_COMPILED_LAYERS = 4_000

# Blocks of all models of a process share their code, so each width, batch size and precision counts as a recompilation
RECOMPILE_LIMIT = 128


@functools.cache
def why_not_compiled(device_type: str) -> str | None:
    """Compile a small function and its gradient, and tell what went wrong, None if nothing did."""
    try:
        with th.enable_grad():
            x = th.ones(16, device=device_type, requires_grad=True)
            th.compile(nn.functional.silu, backend=lean_inductor)(x).sum().backward()
    except Exception as error:  # whatever is missing: compiler, headers, triton, the option of lean_inductor
        return describe_error(error)
    return None


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether there is a compiler that works. If not, the first call warns."""
    reason = why_not_compiled(device_type)
    if reason is not None:
        warnings.warn(
            f"The networks run uncompiled, because torch.compile fails here ({reason}). Install a C++ compiler, or do "
            "without (`compile=False` of DeepCRL)"
        )
    return reason is None


def compile_pays(device: th.device, n_layers: int) -> bool:
    """
    Whether ``compile="auto"`` compiles. On a CPU it does for the kernel of the towers, if so many layers will be updated
    (updates times depth) that they earn the start-up.
    """
    if device.type == "cpu":
        return n_layers >= MIN_COMPILED_LAYERS and load_kernel() is not None
    return can_compile(device.type)


class _CompiledBlock:
    """What a compiled residual block does when it is called. It is the plain one where somebody sees its operations."""

    def __init__(self, block: ResidualBlock, compiled: Callable[[th.Tensor], th.Tensor]):
        self.block = block
        self.compiled = compiled

    def __call__(self, x: th.Tensor) -> th.Tensor:
        if is_traced(x) or is_watched(self.block, *self.block.branch):
            return self.block._call_impl(x)
        return self.compiled(x)


def lean_inductor(graph: th.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """
    PyTorch's default compiler, told to keep only the outcome of each matrix product for the backward pass. By itself it also
    keeps what the next product multiplies, though it can be had again for a few elementwise operations: twice the memory, and
    on CPUs more time, since writing and reading activations is what deep towers wait for besides matrix products.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_materialized_backward=False):
        compiled = compile_fx(graph, example_inputs)
    assert callable(compiled)
    return compiled


def compile_blocks(module: nn.Module) -> bool:
    """
    Compile the residual blocks of a network, in place. All of them share one artifact, so that the start-up does not
    depend on the depth. Parameters, ``state_dict`` and pickles stay what they were. While a network is traced, exported or
    transformed (``th.jit.trace``, ``th.export``, ``torch.fx``, ``th.func``, ...), its blocks are the plain ones.

    On CPUs with AVX2 or AVX-512, towers of Dense, LayerNorm and Swish run as one call of ``tower.cpp``. For the blocks of all
    others the code is generated at the first forward pass, and again for another batch size: once as it is, from then on for
    any size.

    :param module: Any network
    :return: Whether it was done. Without a compiler there is a warning, once, and the network stays as it is.
    """
    blocks = residual_blocks(module)
    if not blocks:
        return False
    device_type = next(blocks[0].parameters()).device.type
    if device_type == "cpu" and (library := load_kernel()) is not None:
        for tower in residual_towers(module):
            if (kernel := TowerKernel(library, tower)).layout() is not None:
                tower._compiled_call_impl = kernel
    in_kernels = {block for kernel in tower_kernels(module) for block in kernel.tower.blocks}
    blocks = [block for block in blocks if block not in in_kernels]
    if not blocks or not can_compile(device_type):
        return bool(in_kernels)
    th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    th._dynamo.config.accumulated_recompile_limit = max(th._dynamo.config.accumulated_recompile_limit, 8 * RECOMPILE_LIMIT)
    for block in blocks:
        # What nn.Module.compile() would put there
        block._compiled_call_impl = _CompiledBlock(block, th.compile(block._call_impl, backend=lean_inductor))
    return True


def uncompile_blocks(module: nn.Module) -> None:
    """Undo :func:`compile_blocks`, in place."""
    for compiled in (*residual_blocks(module), *residual_towers(module)):
        compiled._compiled_call_impl = None


def has_native_bfloat16(device: th.device) -> bool:
    """Whether matrices of bfloat16 are multiplied faster on a device than those of float32."""
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
    # There are no public names
    return bool(th.cpu._is_avx512_bf16_supported() or th.cpu._is_amx_tile_supported())


def set_precision(module: nn.Module, precision: str, device: th.device) -> None:
    """
    Choose the precision of the matrix products of all residual towers of a network. Parameters, residual sums, heads and
    whatever is done with the outputs stay in float32.

    :param module: Any network
    :param precision: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for bfloat16 where the hardware has it
    :param device: Where the network runs
    :raises ValueError: if there is no such precision
    """
    check_choice(precision, PRECISIONS, "precision")
    low = precision == "bfloat16" or (precision == "auto" and has_native_bfloat16(device))
    for tower in residual_towers(module):
        tower.autocast_dtype = th.bfloat16 if low else None
