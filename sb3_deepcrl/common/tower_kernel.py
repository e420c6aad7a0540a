"""
Residual towers, InfoNCE and Adam on CPUs: what ``tower.cpp`` does, as part of PyTorch.
"""

import ctypes
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.utils.hooks import RemovableHandle

from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower
from sb3_deepcrl.common.tracing import PLAIN_TENSORS, is_traced, is_watched
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK

_LAYER = [nn.Linear, nn.LayerNorm, nn.SiLU]
_ADDRESS, _INTEGER, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
# Numbers in a line of the cache
_LINE = 16

# Threads of the kernel, None for as many as PyTorch has
_n_threads: int | None = None


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
    Compile ``tower.cpp`` with the compiler of ``torch.compile``, which keeps the outcome on the disk.

    :return: The library, None where it does not apply (without AVX2), or, with a warning, if there is none
    """
    if th.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(Path(__file__).with_name("tower.cpp").read_text())
        assert isinstance(library, ctypes.CDLL)
        _declare(library)
    except Exception as error:  # the cache is no public interface of PyTorch
        warnings.warn(
            f"Deep networks run at half the speed or less, because their C++ kernel is missing ({describe_error(error)}). "
            "Look for a C++ compiler that knows this processor (`CXX`) and for settings of torch._inductor, or do without "
            "(`compile=False` of DeepCRL)"
        )
        return None
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Set the types of the functions of the kernel."""
    sizes: list[Any] = [_INTEGER] * 4
    library.width_multiple.argtypes = [_BOOL]
    library.tower_kept_size.argtypes = [*sizes, _BOOL, _BOOL]
    library.width_multiple.restype = library.tower_kept_size.restype = _INTEGER
    settings: list[Any] = [ctypes.c_float, _BOOL, _BOOL, _INTEGER]
    library.tower_forward.argtypes = [*[_ADDRESS] * 4, *sizes, *settings]
    library.tower_backward.argtypes = [*[_ADDRESS] * 5, *sizes, *settings]
    library.info_nce.argtypes = [_ADDRESS, _ADDRESS, _INTEGER, _INTEGER, ctypes.c_float, *[_ADDRESS] * 3, _INTEGER]
    library.adam.argtypes = [*[_ADDRESS] * 4, _INTEGER, *[ctypes.c_float] * 7, _INTEGER]
    library.adam.restype = None
    library.tower_forward.restype = library.tower_backward.restype = library.info_nce.restype = _BOOL


def n_threads() -> int:
    """
    :return: Number of threads that the kernel may use
    """
    return th.get_num_threads() if _n_threads is None else _n_threads


def check_memory(enough_memory: bool, x: th.Tensor) -> None:
    """
    :param enough_memory: What the kernel returned
    :param x: Its input
    :raises MemoryError: if there was not enough
    """
    if not enough_memory:
        raise MemoryError(f"Not enough memory for inputs of shape {tuple(x.shape)}: use a smaller batch")


def _addresses(tensors: list[th.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (_ADDRESS * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


class Layout:
    """
    Where the parameters of a residual tower are, in the order of the kernel, as long as nobody changes the tower.

    :param tower: The residual tower
    :raises ValueError: if there is anything in it that the kernel does not know
    """

    def __init__(self, tower: ResidualTower):
        self.n_handles = RemovableHandle.next_id
        blocks = [block for block in tower.blocks if type(block) is ResidualBlock]
        if type(tower) is not ResidualTower or len(blocks) < len(tower.blocks):
            raise ValueError("others than residual blocks, or subclasses, which may do something else")
        branches = [block.branch for block in blocks]
        layers = [list(layers) for layers in (tower.stem, *branches)]
        if [[*map(type, modules)] for modules in layers] != [_LAYER, *[_LAYER * LAYERS_PER_BLOCK] * len(blocks)]:
            raise ValueError("other layers than Dense, LayerNorm and Swish")
        # What may be exchanged: modules in modules, parameters in modules
        containers: tuple[nn.Module, ...] = (tower, tower.stem, tower.blocks, *blocks, *branches)
        if is_watched(*containers, *(module for modules in layers for module in modules)):
            raise ValueError("somebody wants to be called when one of its layers runs")
        self.modules = [(module._modules, tuple(module._modules.values())) for module in containers]
        self.slots: list[tuple[dict[str, Any], str] | None] = []
        for index, modules in enumerate(layers):
            for dense, norm in zip(modules[::3], modules[1::3], strict=True):
                self.slots += [(module._parameters, name) for module in (dense, norm) for name in ("weight", "bias")]
            if index > 0:
                block = blocks[index - 1]
                where = block._parameters if "scale" in block._parameters else block._buffers
                self.slots.append((where, "scale") if block.residual else None)
        # None where it is computed from others, as by a parametrization
        tensors = [None if slot is None else slot[0].get(slot[1]) for slot in self.slots]
        dense = tower.stem[0]
        assert isinstance(dense, nn.Linear)
        self.n_inputs, self.width, self.n_blocks = dense.in_features, dense.out_features, len(blocks)
        norms = [norm for modules in layers for norm in modules[1::3]]
        self.eps = norms[0].eps
        shapes: list[tuple[int, ...] | None] = [(self.width, self.n_inputs), *[(self.width,)] * 3]
        for block in blocks:
            shapes += [(self.width, self.width), *[(self.width,)] * 3] * LAYERS_PER_BLOCK
            shapes.append(() if block.residual else None)
        if [None if tensor is None else tuple(tensor.shape) for tensor in tensors] != shapes:
            raise ValueError("parameters of other shapes")
        if any(norm.eps != self.eps for norm in norms):
            raise ValueError("several epsilons")
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in PLAIN_TENSORS or tensor.dtype is not th.float32 or not tensor.is_cpu:
                raise ValueError("parameters that are not float32 on the CPU")
            if not tensor.is_contiguous():
                raise ValueError("parameters that are not contiguous")
        self.tensors = tensors
        self.parameters: list[nn.Parameter] = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        if len({*map(id, self.parameters)}) < len(self.parameters):
            raise ValueError("layers that share parameters")
        self.pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.addresses = _addresses(tensors)

    def holds(self) -> bool:
        """
        :return: Whether all is as it was
        """
        try:
            tensors = [None if slot is None else slot[0][slot[1]] for slot in self.slots]
        except KeyError:
            return False
        return (
            RemovableHandle.next_id == self.n_handles
            and all(map(is_, tensors, self.tensors))
            and [0 if tensor is None else tensor.data_ptr() for tensor in tensors] == self.pointers
            and all([tensor is None or tensor.is_contiguous() for tensor in tensors])
            and all([tuple(modules.values()) == found for modules, found in self.modules])
        )


class Gradients(NamedTuple):
    """Where the gradients of the parameters of a tower are written, in place of giving them to autograd."""

    layout: Layout
    views: list[th.Tensor]
    addresses: ctypes.Array[ctypes.c_void_p]


class _Memory:
    """
    What one forward pass keeps for its backward pass. Its memory serves again: new one would have to be mapped page by page.

    :param size: Number of floats
    :param spare: Where what was used before waits
    """

    def __init__(self, size: int, spare: list[th.Tensor]):
        self.spare = spare
        while spare and len(spare[-1]) != size:
            spare.pop()
        self.values = spare.pop() if spare else th.empty(size)

    def __del__(self) -> None:
        self.spare.append(self.values)


class _Call(NamedTuple):
    """How a tower runs."""

    kernel: "TowerKernel"
    layout: Layout
    bfloat16: bool
    keep_products: bool
    gradients: Gradients | None

    def sizes(self, x: th.Tensor) -> tuple[int, int, int, int]:
        """
        :param x: Inputs of the tower
        :return: Sizes in the order of the kernel
        """
        return len(x), self.layout.n_inputs, self.layout.width, self.layout.n_blocks

    def forward(self, x: th.Tensor, kept: th.Tensor | None) -> th.Tensor:
        """
        :param x: Inputs of shape ``(n_rows, n_inputs)``
        :param kept: Where to keep what the backward pass needs
        :return: Features of shape ``(n_rows, width)``
        """
        layout = self.layout
        features = x.new_empty(len(x), layout.width)
        enough_memory = self.kernel.library.tower_forward(
            x.data_ptr(),
            layout.addresses,
            features.data_ptr(),
            None if kept is None else kept.data_ptr(),
            *self.sizes(x),
            layout.eps,
            self.bfloat16,
            self.keep_products,
            n_threads(),
        )
        check_memory(enough_memory, x)
        return features


class _Tower(th.autograd.Function):
    """
    The kernel as a function that can be differentiated. Derivatives of the derivative are PyTorch's.

    Its inputs are the parameters, or one token in place of them all: their gradients are then written in place, and not
    added. For autograd each further input costs as much as a small layer.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: th.Tensor, *parameters: th.Tensor) -> Any:
        kernel = call.kernel
        ctx.memory = _Memory(kernel.library.tower_kept_size(*call.sizes(x), call.bfloat16, call.keep_products), kernel.spare)
        ctx.call = call
        ctx.save_for_backward(x, *(parameters if call.gradients is None else ()))
        return call.forward(x, ctx.memory.values)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> Any:
        call: _Call = ctx.call
        kernel, layout = call.kernel, call.layout
        x, *parameters = ctx.saved_tensors
        # With create_graph=True there are gradients to be had of what is computed here
        if th.is_grad_enabled() or is_traced(gradient):
            return _Tower._plain_backward(ctx, gradient, x, parameters)
        gradient = gradient.contiguous()
        dx = th.empty_like(x) if ctx.needs_input_grad[1] else None
        gradients: list[th.Tensor] = []
        addresses = None
        if any(ctx.needs_input_grad[2:]):
            if call.gradients is not None:
                addresses = call.gradients.addresses
            else:
                gradients = [th.empty_like(parameter) for parameter in parameters]
                of = iter(gradients)
                addresses = _addresses([next(of) if isinstance(t, nn.Parameter) else None for t in layout.tensors])
        enough_memory = kernel.library.tower_backward(
            gradient.data_ptr(),
            layout.addresses,
            ctx.memory.values.data_ptr(),
            None if dx is None else dx.data_ptr(),
            addresses,
            *call.sizes(x),
            layout.eps,
            call.bfloat16,
            call.keep_products,
            n_threads(),
        )
        check_memory(enough_memory, x)
        return None, dx, *(gradients or (None,) * (len(ctx.needs_input_grad) - 2))

    @staticmethod
    def _plain_backward(
        ctx: Any, gradient: th.Tensor, x: th.Tensor, parameters: list[th.Tensor]
    ) -> tuple[th.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with th.enable_grad():
            # An alias, since it may be a parameter too: each input has a gradient of its own
            inputs = [x.view_as(x), *parameters]
            output = ctx.call.kernel.tower.features(inputs[0])
        gradients = iter(
            th.autograd.grad(
                output,
                [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed],
                gradient,
                create_graph=th.is_grad_enabled(),
            )
        )
        return None, *(next(gradients) if is_needed else None for is_needed in needed)


class TowerKernel:
    """
    What a residual tower does when it is called: stem and blocks run as the kernel wherever that does the same, i.e. for
    layers of Dense, LayerNorm and Swish in float32, with products of bfloat16 where autocast asks for them. What it does not
    know, and what traces or transforms, gets the plain modules. This is decided here, once for each change of the tower.

    :param library: See :func:`load_kernel`
    :param tower: The residual tower
    """

    def __init__(self, library: ctypes.CDLL, tower: ResidualTower):
        self.library = library
        self.tower = tower
        self.multiples = {bfloat16: library.width_multiple(bfloat16) for bfloat16 in (False, True)}
        self._layout: Layout | None = None
        self.gradients: Gradients | None = None
        self.token = th.zeros((), requires_grad=True)
        self.spare: list[th.Tensor] = []

    def layout(self, bfloat16: bool = False) -> Layout | None:
        """
        :param bfloat16: Whether products are in bfloat16
        :return: The layout of the tower, None if the kernel does not know it
        """
        if self._layout is None or not self._layout.holds():
            try:
                layout = Layout(self.tower)
            except ValueError:
                self._layout = None
                return None
            if self._layout is None or layout.pointers != self._layout.pointers:
                self._layout = layout
            else:  # somebody registered a hook somewhere
                vars(self._layout).update(vars(layout))
        multiple = self.multiples[bfloat16]
        return None if self._layout is None or not multiple or self._layout.width % multiple else self._layout

    def __call__(self, x: th.Tensor) -> th.Tensor:
        tower = self.tower
        autocast = tower.autocast_dtype or (th.get_autocast_dtype("cpu") if th.is_autocast_enabled("cpu") else None)
        layout = None
        if x.is_cpu and x.dtype is th.float32 and x.ndim == 2 and len(x) > 0 and autocast in (None, th.bfloat16):
            layout = None if is_traced(x) else self.layout(autocast is th.bfloat16)
        gradients = self.gradients
        if gradients is not None and gradients.layout is not layout:
            # Autograd adds to them
            th._foreach_zero_(gradients.views)
            gradients = None
        if layout is None or x.shape[1] != layout.n_inputs:
            return tower._call_impl(x)
        call = _Call(self, layout, autocast is th.bfloat16, not tower.checkpoint_activations, gradients)
        x = x.contiguous()
        if th.is_grad_enabled():
            trained = any([parameter.requires_grad for parameter in layout.parameters])
            if trained or x.requires_grad:
                parameters = layout.parameters if gradients is None else [self.token] if trained else []
                return tower.head(_Tower.apply(call, x, *parameters))
        return tower.head(call.forward(x, None))


def has_kernel(*towers: ResidualTower) -> bool:
    """
    :param towers: Residual towers
    :return: Whether one of them runs as the kernel
    """
    return any([isinstance(tower._compiled_call_impl, TowerKernel) for tower in towers])


def tower_kernels(module: nn.Module) -> list[TowerKernel]:
    """
    :param module: Any network
    :return: The kernels of its towers
    """
    kernels = [tower._compiled_call_impl for tower in module.modules() if isinstance(tower, ResidualTower)]
    return [kernel for kernel in kernels if isinstance(kernel, TowerKernel)]


class FlatParameters:
    """
    Parameters of a network, their gradients and Adam's moments, each in one tensor: what is done to all of them takes one
    call. Parameters and the state of the optimizer stay what they were to all others, as views of these tensors.

    :param library: See :func:`load_kernel`
    :param module: The network
    :param optimizer: Its optimizer
    """

    def __init__(self, library: ctypes.CDLL, module: nn.Module, optimizer: th.optim.Optimizer):
        self.library = library
        self.optimizer = optimizer
        self.parameters = list(module.parameters())
        # Each begins at a line of the cache. The numbers between stay zero.
        sizes = [-(-parameter.numel() // _LINE) * _LINE for parameter in self.parameters]
        self.values, self.gradients, self.exp_avg, self.exp_avg_sq = (th.zeros(sum(sizes)) for _ in range(4))
        self.steps = th.zeros(len(sizes))
        offsets = th.tensor([0, *sizes]).cumsum(0).tolist()
        self.views = [
            [
                flat[offset : offset + parameter.numel()].view_as(parameter)
                for offset, parameter in zip(offsets, self.parameters, strict=False)
            ]
            for flat in (self.values, self.gradients, self.exp_avg, self.exp_avg_sq)
        ]
        with th.no_grad():
            for parameter, value in zip(self.parameters, self.views[0], strict=True):
                value.copy_(parameter)
                parameter.data = value
        self.pointers = [parameter.data_ptr() for parameter in self.parameters]
        #: Whether the gradients are written in place now
        self.is_active = False
        self._adopt_state()
        of = {id(parameter): gradient for parameter, gradient in zip(self.parameters, self.views[1], strict=True)}
        self.kernels: list[tuple[TowerKernel, Gradients]] = []
        for kernel in tower_kernels(module):
            layout = kernel.layout()
            if layout is not None:
                views = [of[id(parameter)] for parameter in layout.parameters]
                addresses = _addresses([of.get(id(tensor)) for tensor in layout.tensors])
                self.kernels.append((kernel, Gradients(layout, views, addresses)))
        # Those to which autograd adds
        written = {id(view) for _, gradients in self.kernels for view in gradients.views}
        self.added = [gradient for gradient in self.views[1] if id(gradient) not in written]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # Copies of the parameters have memory of their own, and are laid out anew
        return None

    @classmethod
    def make(cls, module: nn.Module, optimizer: th.optim.Optimizer) -> "FlatParameters | None":
        """
        :param module: The network
        :param optimizer: Its optimizer
        :return: Its parameters as flat tensors, None if another optimizer than Adam or only a part of them is trained, or if
            towers share them
        """
        parameters = list(module.parameters())
        kernels = tower_kernels(module)
        layouts = [layout for layout in [kernel.layout() for kernel in kernels] if layout is not None]
        in_kernels = [id(parameter) for layout in layouts for parameter in layout.parameters]
        groups = optimizer.param_groups
        if (
            not kernels
            or type(optimizer) not in (th.optim.Adam, th.optim.AdamW)
            or [[*map(id, group["params"])] for group in groups] != [[*map(id, parameters)]]
            or any(groups[0][name] for name in ("amsgrad", "maximize", "differentiable", "capturable"))
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or not all(p.requires_grad and p.is_cpu and p.dtype is th.float32 and p.is_contiguous() for p in parameters)
            or len(in_kernels) != len(set(in_kernels))
            or len({float(optimizer.state.get(p, {}).get("step", 0.0)) for p in parameters}) > 1
        ):
            return None
        return cls(kernels[0].library, module, optimizer)

    def _adopt_state(self) -> None:
        """Let the state of the optimizer be views too."""
        for index, parameter in enumerate(self.parameters):
            state = self.optimizer.state[parameter]
            ours = {"step": self.steps[index], "exp_avg": self.views[2][index], "exp_avg_sq": self.views[3][index]}
            for name, value in ours.items():
                value.copy_(th.as_tensor(state[name])) if name in state else value.zero_()
            state.update(ours)
        last = self.optimizer.state[self.parameters[-1]]
        self.state = (last, last["exp_avg"])

    def holds(self) -> bool:
        """
        :return: Whether parameters and optimizer are still those
        """
        optimizer = self.optimizer
        last = optimizer.state.get(self.parameters[-1], {})
        return (
            [parameter.data_ptr() for parameter in self.parameters] == self.pointers
            and all([parameter.requires_grad for parameter in self.parameters])
            and not self.optimizer._optimizer_step_pre_hooks
            and not self.optimizer._optimizer_step_post_hooks
            and last is self.state[0]
            and last.get("exp_avg") is self.state[1]
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """
        :return: Context in which the towers write the gradients of their parameters and add nothing
        """
        for kernel, gradients in self.kernels:
            kernel.gradients = gradients
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False
            for kernel, _ in self.kernels:
                kernel.gradients = None

    def step(self, loss: th.Tensor) -> None:
        """
        One step of the optimizer, from the gradients of a loss, within :meth:`in_place`.

        :param loss: The loss, a scalar
        """
        for parameter, gradient in zip(self.parameters, self.views[1], strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        th._foreach_zero_(self.added)
        loss.backward()
        group = self.optimizer.param_groups[0]
        self.steps += 1
        n_steps = self.steps[0].item()
        learning_rate, decay = float(group["lr"]), group["weight_decay"]
        decoupled = group.get("decoupled_weight_decay", False)
        beta1, beta2 = map(float, group["betas"])
        self.library.adam(
            self.values.data_ptr(),
            self.gradients.data_ptr(),
            self.exp_avg.data_ptr(),
            self.exp_avg_sq.data_ptr(),
            len(self.values),
            learning_rate / (1.0 - beta1**n_steps),
            beta1,
            beta2,
            (1.0 - beta2**n_steps) ** -0.5,
            group["eps"],
            0.0 if decoupled else decay,
            learning_rate * decay if decoupled else 0.0,
            n_threads(),
        )


def fused_info_nce(x: th.Tensor, y: th.Tensor, logsumexp_coef: float, needed: bool) -> tuple[th.Tensor, ...]:
    """
    InfoNCE of negative distances, forward, as one function.

    :param x: Representations of state-action pairs, float32 of shape ``(batch_size, repr_dim)``
    :param y: Representations of their goals, same shape
    :param logsumexp_coef: Coefficient of the log-sum-exp penalty
    :param needed: Whether gradients are
    :return: Loss and metrics, shape ``(5,)``, and the gradients of ``x`` and ``y`` if they are needed
    """
    library = load_kernel()
    assert library is not None
    x, y = x.contiguous(), y.contiguous()
    outcome = x.new_empty(5)
    gradients = (th.empty_like(x), th.empty_like(y)) if needed else ()
    enough_memory = library.info_nce(
        x.data_ptr(),
        y.data_ptr(),
        *x.shape,
        logsumexp_coef,
        *([gradient.data_ptr() for gradient in gradients] or (None, None)),
        outcome.data_ptr(),
        n_threads(),
    )
    check_memory(enough_memory, x)
    return outcome, *gradients


@contextmanager
def threads_of_kernel() -> Iterator[None]:
    """
    :return: Context in which the kernel has all threads and PyTorch one. OpenMP's threads, which PyTorch uses, look for work
        for milliseconds after each operation, in the way of the kernel's, and on busy cores in the way of each other.
    """
    global _n_threads
    before, _n_threads = _n_threads, n_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(_n_threads)
        _n_threads = before
