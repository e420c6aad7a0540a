"""
How a deep forward pass runs: compiled, in bfloat16, as a CUDA graph. What it computes is elsewhere.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch as th
from torch import nn

from sb3_deepcrl.common.losses import check_choice
from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower
from sb3_deepcrl.common.tower_kernel import TowerKernel, describe_error, load_kernel, tower_kernels
from sb3_deepcrl.common.tracing import CompiledBlock, is_traced

PRECISIONS = ("float32", "bfloat16", "auto")

# With compile="auto" on a CPU, so many layers have to be updated (updates times depth) to earn the start-up, which takes
# seconds.
MIN_COMPILED_LAYERS = 4_000

# Blocks of all models of a process share their code, so each width, batch size and precision counts as a recompilation
RECOMPILE_LIMIT = 128


def check_switch(value: bool | str, name: str) -> bool | str:
    """
    :param value: What the user chose
    :param name: What it is called in the error message
    :return: The same value
    :raises ValueError: if it is neither True, False nor "auto"
    """
    if value not in (True, False, "auto") or not isinstance(value, (bool, str)):
        raise ValueError(f'`{name}` must be True, False or "auto", got {value!r}')
    return value


@functools.cache
def why_not_compiled(device_type: str) -> str | None:
    """
    Compile a small function and its gradient, to find out whether there is a compiler that works.

    :param device_type: "cpu" or "cuda"
    :return: What went wrong, None if nothing did
    """
    try:
        with th.enable_grad():
            x = th.ones(16, device=device_type, requires_grad=True)
            th.compile(nn.functional.silu, backend=lean_inductor)(x).sum().backward()
    except Exception as error:  # whatever is missing: compiler, headers, triton, the option of lean_inductor
        return describe_error(error)
    return None


@functools.cache
def can_compile(device_type: str) -> bool:
    """
    :param device_type: "cpu" or "cuda"
    :return: Whether there is a compiler that works. If not, the first call warns.
    """
    reason = why_not_compiled(device_type)
    if reason is not None:
        warnings.warn(
            f"The networks run uncompiled, because torch.compile fails here ({reason}). Install a C++ compiler, or do "
            "without (`compile=False` of DeepCRL)"
        )
    return reason is None


def compile_pays(device: th.device, n_layers: int) -> bool:
    """
    Whether ``compile="auto"`` compiles. On a CPU it does for the kernel of the towers.

    :param device: Where the blocks run
    :param n_layers: Number of layers to be updated: updates times depth
    :return: Whether the start-up is earned
    """
    if device.type == "cpu":
        return n_layers >= MIN_COMPILED_LAYERS and load_kernel() is not None
    return can_compile(device.type)


def residual_blocks(module: nn.Module) -> list[ResidualBlock]:
    """
    :param module: Any network
    :return: Its residual blocks
    """
    return [block for block in module.modules() if isinstance(block, ResidualBlock)]


def residual_towers(module: nn.Module) -> list[ResidualTower]:
    """
    :param module: Any network
    :return: Its residual towers
    """
    return [tower for tower in module.modules() if isinstance(tower, ResidualTower)]


def lean_inductor(graph: th.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """
    PyTorch's default compiler, told to keep only the outcome of each matrix product for the backward pass. By itself it also
    keeps what the next product multiplies, though it can be had again for a few elementwise operations: twice the memory, and
    on CPUs more time, since writing and reading activations is what deep towers wait for besides matrix products.

    :param graph: The function to compile
    :param example_inputs: Its inputs
    :return: The compiled function
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
        block._compiled_call_impl = CompiledBlock(block, th.compile(block._call_impl, backend=lean_inductor))
    return True


def uncompile_blocks(module: nn.Module) -> None:
    """
    Undo :func:`compile_blocks`, in place.

    :param module: Any network
    """
    for compiled in (*residual_blocks(module), *residual_towers(module)):
        compiled._compiled_call_impl = None


def has_native_bfloat16(device: th.device) -> bool:
    """
    :param device: Where the networks run
    :return: Whether matrices of bfloat16 are multiplied faster there than those of float32
    """
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
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
    for tower in module.modules():
        if isinstance(tower, ResidualTower):
            tower.autocast_dtype = th.bfloat16 if low else None


def prepare_optimizer(optimizer: th.optim.Optimizer, capturable: bool) -> None:
    """
    Let an optimizer be captured in a CUDA graph, or not: with its learning rate and step counts on the device, so that
    the graph reads them, or as PyTorch has them otherwise. It does not matter what kind was loaded into it.

    :param optimizer: The optimizer, changed in place
    :param capturable: Whether its steps are captured
    """
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = capturable
        learning_rate = float(group["lr"])
        device = group["params"][0].device
        group["lr"] = th.tensor(learning_rate, device=device) if capturable else learning_rate
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                on_device = capturable or group.get("fused")
                step = th.as_tensor(state["step"], dtype=th.float32)
                state["step"] = step.to(parameter.device if on_device else "cpu")


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """
    Like SB3's ``update_learning_rate``, but a learning rate that a CUDA graph reads is changed where it is.

    :param optimizer: The optimizer
    :param learning_rate: Its new learning rate
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class GraphBackend(Protocol):
    """What :class:`GraphedFunction` needs of CUDA. Tests put a stand-in here."""

    device: th.device

    def warm_up(self) -> AbstractContextManager[None]:
        """
        :return: Context in which a function runs as it will be captured: on a stream of its own
        """

    def capture(self, function: Callable[[], th.Tensor]) -> tuple[Any, th.Tensor]:
        """
        Record what a function does, without doing it.

        :param function: A function of tensors that stay where they are
        :return: The graph, with ``replay()`` and ``reset()``, and the tensor that each replay fills
        """


class CudaGraphBackend:
    """
    CUDA graphs of PyTorch.

    :param device: The GPU
    """

    def __init__(self, device: th.device):
        self.device = device
        self.stream = th.cuda.Stream(device)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """
        :return: Context with the side stream, in order with the current one
        """
        current = th.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with th.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], th.Tensor]) -> tuple[th.cuda.CUDAGraph, th.Tensor]:
        """
        :param function: A function of tensors that stay where they are
        :return: The graph and the tensor that each replay fills
        """
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, stream=self.stream):
            output = function()
        return graph, output


class GraphedFunction:
    """
    Run a function of tensors as a CUDA graph: a thousand kernels are launched by one call.

    The first calls run it as it is, on a side stream (libraries set themselves up then, optimizers make their state).
    The next one captures it, and from then on it is replayed on copies of the inputs. It is captured anew when inputs have
    other shapes, or when the key changes: it has to hold all else that the graph keeps, i.e. numbers that are read on
    the host and the addresses of parameters.

    :param function: Takes a dict of tensors and returns a tensor. It waits for nothing on the device
        and what it changes stays at its address.
    :param backend: Who captures
    :param n_warmup: Number of calls before the capture
    :param required: Whether a function that cannot be captured is an error. Else there is a warning, and it runs as it is.
    """

    def __init__(
        self,
        function: Callable[[dict[str, th.Tensor]], th.Tensor],
        backend: GraphBackend,
        n_warmup: int = 3,
        required: bool = False,
    ):
        self.function = function
        self.backend = backend
        self.n_warmup = n_warmup
        self.required = required
        self._can_be_captured = True
        self._signature: Hashable = None
        self._n_calls = 0
        self._graph: Any = None
        self._inputs: dict[str, th.Tensor] = {}
        self._output = th.empty(0)

    def __call__(self, inputs: dict[str, th.Tensor], key: Hashable = None) -> th.Tensor:
        """
        :param inputs: Tensors by name
        :param key: What the graph depends on besides them
        :return: What the function returns; later calls do not change it
        """
        devices = {value.device.type for value in inputs.values()}
        if not self._can_be_captured or devices != {self.backend.device.type} or is_traced(*inputs.values()):
            # A graph of what runs elsewhere, for instance after `policy.to("cpu")`, would hold nothing
            return self.function(inputs)
        signature = (key, tuple((name, value.shape, value.dtype, value.device) for name, value in inputs.items()))
        if signature != self._signature:
            self.invalidate()
            self._signature = signature
        if self._n_calls < self.n_warmup:
            self._n_calls += 1
            with self.backend.warm_up():
                return self.function(inputs)
        if self._graph is None:
            self._inputs = {name: value.clone() for name, value in inputs.items()}
            try:
                self._graph, self._output = self.backend.capture(lambda: self.function(self._inputs))
            except RuntimeError as error:
                if self.required:
                    raise
                warnings.warn(
                    f"Runs without a CUDA graph, because something in it cannot be captured ({str(error).splitlines()[0]}): "
                    "a features extractor of your own may read values on the host. `cuda_graph=False` ends this warning"
                )
                self._can_be_captured = False
                self.invalidate()
                return self.function(inputs)
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return self._output.clone()

    def invalidate(self) -> None:
        """
        Forget the graph and give its memory back. The next calls warm up and capture again.
        """
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._signature, self._n_calls = None, None, 0
        self._inputs, self._output = {}, th.empty(0)
