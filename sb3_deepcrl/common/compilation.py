"""
How a deep forward pass runs: compiled, in lower precision. What it computes is elsewhere.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn

from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower, parameters_of, residual_blocks, residual_towers
from sb3_deepcrl.common.tower_kernel import TowerKernel, describe_error, load_kernel, tower_kernels
from sb3_deepcrl.common.tracing import is_traced, is_watched
from sb3_deepcrl.common.utils import check_choice

PRECISIONS = ("float32", "tf32", "bfloat16", "auto")

# Blocks of all models of a process share their code, so each width, batch size, precision and set of frozen parameters counts
# as a recompilation
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


def _block(block: ResidualBlock, x: th.Tensor, trained: str) -> th.Tensor:
    """
    The function that is compiled.

    :param trained: Which parameters need gradients. In some versions of PyTorch (2.11 is one, see its issue 139476) code for
        frozen parameters goes on after they were released in place, as guards on parameters are skipped where no module
        has changed. An argument is always looked at.
    """
    # If the function reads it
    bool(trained)
    return block._call_impl(x)


def _run_block(
    block: ResidualBlock, compiled: Callable[[ResidualBlock, th.Tensor, str], th.Tensor], x: th.Tensor
) -> th.Tensor:
    """What a compiled residual block does: it is the plain one where somebody sees its operations."""
    if is_traced(x) or is_watched(block, *block.branch):
        return block._call_impl(x)
    return compiled(block, x, str([parameter.requires_grad for parameter in parameters_of(block)]))


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
            is_new = not isinstance(tower._compiled_call_impl, TowerKernel)
            if is_new and (kernel := TowerKernel(library, tower)).layout() is not None:
                tower._compiled_call_impl = kernel
    in_kernels = {block for kernel in tower_kernels(module) for block in kernel.tower.blocks}
    blocks = [block for block in blocks if block not in in_kernels]
    if not blocks or not can_compile(device_type):
        return bool(in_kernels)
    th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    th._dynamo.config.accumulated_recompile_limit = max(th._dynamo.config.accumulated_recompile_limit, 8 * RECOMPILE_LIMIT)
    compiled = th.compile(_block, backend=lean_inductor)
    for block in blocks:
        # What nn.Module.compile() would put there
        if block._compiled_call_impl is None:
            block._compiled_call_impl = functools.partial(_run_block, block, compiled)
    return True


def uncompile_blocks(module: nn.Module) -> None:
    """Undo :func:`compile_blocks`, in place."""
    for compiled in (*residual_blocks(module), *residual_towers(module)):
        compiled._compiled_call_impl = None


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 faster than those of float32."""
    # There are no public names
    return bool(th.cpu._is_avx512_bf16_supported() or th.cpu._is_amx_tile_supported())


def set_precision(module: nn.Module, precision: str, device: th.device) -> bool:
    """
    Choose the precision of the matrix products of all residual towers of a network. Parameters, residual sums and whatever is
    done with the outputs stay in float32. TF32, in which GPUs multiply float32 with 10 bits of the mantissa at several times
    the speed, is a setting of all products on a GPU: see :func:`tf32_products`.

    :param module: Any network
    :param precision: ``"float32"``, ``"tf32"`` (on a CPU the same), ``"bfloat16"``, or ``"auto"`` for what is fast: TF32 on
        GPUs, bfloat16 on CPUs that have it
    :param device: Where the network runs
    :return: Whether the products that it trains with are to be TF32
    :raises ValueError: if there is no such precision
    """
    check_choice(precision, PRECISIONS, "precision")
    on_gpu = device.type == "cuda"
    low = precision == "bfloat16" or (precision == "auto" and not on_gpu and has_native_bfloat16())
    for tower in residual_towers(module):
        tower.autocast_dtype = th.bfloat16 if low else None
    return on_gpu and precision in ("tf32", "auto")


class CastParameters:
    """
    Parameters of all Dense layers inside of residual towers in bfloat16, cast at once for an update. By itself, autocast casts
    each of them in each forward pass: on a GPU a kernel each, that takes as long as a matrix product.

    :param towers: The towers
    """

    def __init__(self, towers: Sequence[ResidualTower]):
        layers = [layer for tower in towers for part in (tower.stem, tower.blocks) for layer in part.modules()]
        dense: list[dict[str, Any]] = [layer._parameters for layer in layers if type(layer) is nn.Linear]
        self.slots = [(of, name) for of in dense for name, parameter in of.items() if parameter is not None]
        self.parameters: list[Any] = [of[name] for of, name in self.slots]
        self.copies: list[Any] = [nn.Parameter(parameter.detach().bfloat16()) for parameter in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context of an update, in which the layers have the copies."""
        self.parameters = [of[name] for of, name in self.slots]
        with th.no_grad():
            th._foreach_copy_(self.copies, self.parameters)
        for (of, name), parameter, copy in zip(self.slots, self.parameters, self.copies, strict=True):
            of[name] = copy.requires_grad_(parameter.requires_grad)
        try:
            yield
        finally:
            for (of, name), parameter in zip(self.slots, self.parameters, strict=True):
                of[name] = parameter

    def give_gradients(self, places: Mapping[th.Tensor, th.Tensor]) -> None:
        """Move the gradients of the copies to the parameters, where there is a place for them or to new tensors."""
        pairs = [(p, c) for p, c in zip(self.parameters, self.copies, strict=True) if c.grad is not None]
        for parameter, _ in pairs:
            parameter.grad = places[parameter] if parameter in places else th.empty_like(parameter)
        if pairs:
            th._foreach_copy_([parameter.grad for parameter, _ in pairs], [copy.grad for _, copy in pairs])
        for _, copy in pairs:
            copy.grad = None


@contextmanager
def tf32_products(enabled: bool) -> Iterator[None]:
    """Context in which products of float32 matrices on a GPU are TF32, or are not."""
    try:
        before = th.get_float32_matmul_precision()
    except RuntimeError:  # it does not know what was set by its successor
        before = "high" if th.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    th.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        th.set_float32_matmul_precision(before)
