"""
Residual blocks as one function in C++, ``residual_block.cpp``: all that PyTorch does one operation after the other, matrix
products included, is done for a few rows at a time, which stay in the cache meanwhile.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_deepcrl.common.torch_layers import LAYERS_PER_BLOCK, ResidualBlock
from sb3_deepcrl.common.tracing import is_traced

# Numbers of float32 in a vector of AVX-512
N_LANES = 16

_MODULES = [nn.Linear, nn.LayerNorm, nn.SiLU] * LAYERS_PER_BLOCK
_N_PARAMETERS = 4 * LAYERS_PER_BLOCK
_ADDRESS, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_Addresses = _ADDRESS * _N_PARAMETERS


def describe_error(error: Exception) -> str:
    """
    :param error: What ``torch.compile`` or a compiler raised
    :return: One line: the type, and the first error that the compiler found, or else the beginning of the message
    """
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: " + next((line.strip() for line in lines if "error: " in line), lines[0])


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """
    Compile ``residual_block.cpp`` with the compiler of ``torch.compile``, which keeps the outcome on the disk.

    :return: The library, None where it is not known to be faster (without AVX-512), or, with a warning, if there is none
    """
    if th.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(Path(__file__).with_name("residual_block.cpp").read_text())
        assert isinstance(library, ctypes.CDLL)
        _declare(library)
        if library.n_lanes() != N_LANES:
            raise RuntimeError(f"it was compiled for vectors of {library.n_lanes()} numbers instead of {N_LANES}")
    except Exception as error:  # the cache is no public interface of PyTorch: torch.compile does the blocks then
        warnings.warn(
            f"Residual blocks run slower than they could, because their C++ kernel is missing ({describe_error(error)}): "
            "torch.compile does them instead. Look for a C++ compiler that knows AVX-512 (`CXX`) and for settings of "
            "torch._inductor"
        )
        return None
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Set the types of the functions of the kernel."""
    library.n_lanes.restype = _INTEGER
    library.has_bfloat16.restype = ctypes.c_bool
    library.residual_block_forward.argtypes = [
        *[_ADDRESS] * 3,
        ctypes.c_float,
        *[_ADDRESS] * 3,
        *[_INTEGER] * 3,
        ctypes.c_bool,
    ]
    library.residual_block_backward.argtypes = [*[_ADDRESS] * 9, *[_INTEGER] * 3, ctypes.c_bool]
    library.residual_block_forward.restype = library.residual_block_backward.restype = ctypes.c_bool


def check_memory(enough_memory: bool, x: th.Tensor) -> None:
    """
    :param enough_memory: What the kernel returned
    :param x: Its input
    :raises MemoryError: if there was not enough
    """
    if not enough_memory:
        raise MemoryError(f"Not enough memory for a residual block with inputs of shape {tuple(x.shape)}: use a smaller batch")


def _addresses(tensors: tuple[th.Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return _Addresses(*[tensor.data_ptr() for tensor in tensors])


def _forward(
    kernel: ctypes.CDLL,
    x: th.Tensor,
    scale: th.Tensor | None,
    eps: float,
    bfloat16: bool,
    parameters: tuple[th.Tensor, ...],
    keep: bool,
) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
    """
    :return: The output and what the backward pass needs: matrix products, means and deviations, None unless ``keep``
    """
    n_rows, width = x.shape
    output = th.empty_like(x)
    products = x.new_empty(LAYERS_PER_BLOCK, n_rows, width) if keep else None
    statistics = x.new_empty(LAYERS_PER_BLOCK, n_rows, 2) if keep else None
    enough_memory = kernel.residual_block_forward(
        x.data_ptr(),
        _addresses(parameters),
        None if scale is None else scale.data_ptr(),
        eps,
        output.data_ptr(),
        None if products is None else products.data_ptr(),
        None if statistics is None else statistics.data_ptr(),
        n_rows,
        width,
        th.get_num_threads(),
        bfloat16,
    )
    check_memory(enough_memory, x)
    return output, products, statistics


def _plain(x: th.Tensor, scale: th.Tensor | None, eps: float, bfloat16: bool, parameters: Sequence[th.Tensor]) -> th.Tensor:
    """What the kernel computes, with PyTorch's own operations."""
    branch = x
    with th.autocast("cpu", th.bfloat16, enabled=bfloat16):
        for i in range(0, _N_PARAMETERS, 4):
            weight, bias, gamma, beta = parameters[i : i + 4]
            branch = F.silu(F.layer_norm(F.linear(branch, weight, bias), x.shape[1:], gamma, beta, eps))
    branch = branch.to(x.dtype)
    return branch if scale is None else th.addcmul(x, branch, scale)


class _Block(th.autograd.Function):
    """The kernel as a function that can be differentiated. Derivatives of the derivative are PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: ctypes.CDLL,
        x: th.Tensor,
        scale: th.Tensor | None,
        eps: float,
        bfloat16: bool,
        *parameters: th.Tensor,
    ) -> Any:
        output, products, statistics = _forward(kernel, x, scale, eps, bfloat16, parameters, keep=True)
        ctx.kernel, ctx.eps, ctx.bfloat16 = kernel, eps, bfloat16
        ctx.save_for_backward(x, scale, products, statistics, *parameters)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> Any:
        x, scale, products, statistics, *parameters = ctx.saved_tensors
        # With create_graph=True there are gradients to be had of what is computed here
        if th.is_grad_enabled() or is_traced(gradient):
            return _Block._plain_backward(ctx, gradient, x, scale, parameters)
        n_rows, width = x.shape
        gradient = gradient.contiguous()
        dx = th.empty_like(x)
        # In a frozen network none of them is needed, else all are
        needed = any(ctx.needs_input_grad[2:])
        gradients = tuple(map(th.empty_like, parameters)) if needed else ()
        dscale = th.empty_like(scale) if needed and scale is not None else None
        enough_memory = ctx.kernel.residual_block_backward(
            x.data_ptr(),
            gradient.data_ptr(),
            products.data_ptr(),
            statistics.data_ptr(),
            _addresses(parameters),
            None if scale is None else scale.data_ptr(),
            dx.data_ptr(),
            _addresses(gradients) if needed else None,
            None if dscale is None else dscale.data_ptr(),
            n_rows,
            width,
            th.get_num_threads(),
            ctx.bfloat16,
        )
        check_memory(enough_memory, x)
        return None, dx, dscale, None, None, *(gradients if needed else [None] * _N_PARAMETERS)

    @staticmethod
    def _plain_backward(
        ctx: Any, gradient: th.Tensor, x: th.Tensor, scale: th.Tensor | None, parameters: Sequence[th.Tensor]
    ) -> tuple[th.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:3] + ctx.needs_input_grad[5:]
        with th.enable_grad():
            # Aliases, since layers may share a parameter: each input has a gradient of its own
            x, *parameters = (tensor.view_as(tensor) for tensor in (x, *parameters))
            scale = None if scale is None else scale.view_as(scale)
            output = _plain(x, scale, ctx.eps, ctx.bfloat16, parameters)
        pairs = zip((x, scale, *parameters), needed, strict=True)
        inputs = [tensor for tensor, is_needed in pairs if tensor is not None and is_needed]
        gradients = iter(th.autograd.grad(output, inputs, gradient, create_graph=th.is_grad_enabled()))
        dx, dscale, *others = (next(gradients) if is_needed else None for is_needed in needed)
        return None, dx, dscale, None, None, *others


class KernelBlock:
    """
    What a residual block does when it is called: run as the kernel wherever that does the same, i.e. for blocks of Dense,
    LayerNorm and Swish in float32, with products of bfloat16 where autocast asks for them. It looks at modules and
    parameters at each call, since all of them may be exchanged.

    :param kernel: See :func:`load_kernel`
    :param block: The residual block
    :param compile_block: Makes what is called where the kernel does not do the same. It takes time and is hardly needed, so
        that it waits for the first such call.
    """

    def __init__(
        self, kernel: ctypes.CDLL, block: ResidualBlock, compile_block: Callable[[], Callable[[th.Tensor], th.Tensor]]
    ):
        self.kernel = kernel
        self.block = block
        self.compile_block = compile_block
        # Where there are units for whole matrices of bfloat16, PyTorch's products use them
        self.knows_bfloat16 = kernel.has_bfloat16() and not th.cpu._is_amx_tile_supported()

    @functools.cached_property
    def otherwise(self) -> Callable[[th.Tensor], th.Tensor]:
        """What to call where the kernel does not do the same."""
        return self.compile_block()

    def __call__(self, x: th.Tensor) -> th.Tensor:
        bfloat16 = th.is_autocast_enabled("cpu")
        eps_and_parameters = self._eps_and_parameters(x, bfloat16)
        if eps_and_parameters is None:
            return self.otherwise(x)
        eps, parameters = eps_and_parameters
        scale = self.block.scale if self.block.residual else None
        x = x.contiguous()
        tensors = (x, *parameters) if scale is None else (x, scale, *parameters)
        if th.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            output = _Block.apply(self.kernel, x, scale, eps, bfloat16, *parameters)
            assert isinstance(output, th.Tensor)
            return output
        return _forward(self.kernel, x, scale, eps, bfloat16, parameters, keep=False)[0]

    def _eps_and_parameters(self, x: th.Tensor, autocast: bool) -> tuple[float, tuple[th.Tensor, ...]] | None:
        """
        :param x: Input of the block
        :param autocast: Whether products are computed in another type than that of the parameters
        :return: The epsilon of the LayerNorms and the parameters in the order of the kernel, None if it cannot do the block
        """
        if x.dtype is not th.float32 or not x.is_cpu or x.ndim != 2:
            return None
        width = x.shape[1]
        if autocast and not (self.knows_bfloat16 and th.get_autocast_dtype("cpu") is th.bfloat16):
            return None
        if width % (2 * N_LANES if autocast else N_LANES):
            return None
        modules = list(self.block.branch)
        if [type(module) for module in modules] != _MODULES:
            return None
        tensors: list[th.Tensor | None] = []
        for dense, norm in zip(modules[::3], modules[1::3], strict=True):
            # Without an entry if it is computed from other parameters
            tensors += [module._parameters.get(name) for module in (dense, norm) for name in ("weight", "bias")]
        parameters = tuple(tensor for tensor in tensors if tensor is not None)
        shapes = [(width, width), (width,), (width,), (width,)] * LAYERS_PER_BLOCK
        if [parameter.shape for parameter in parameters] != shapes or len({norm.eps for norm in modules[1::3]}) > 1:
            return None
        for tensor in (self.block.scale, *parameters):
            if tensor.dtype is not th.float32 or not tensor.is_cpu or not tensor.is_contiguous():
                return None
        assert isinstance(modules[1], nn.LayerNorm)
        return modules[1].eps, parameters
