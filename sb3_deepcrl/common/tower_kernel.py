"""
Residual towers, InfoNCE and Adam on CPUs: what ``tower.cpp`` does, as part of PyTorch. And, for GPUs too, all parameters of
an optimizer in one tensor.

Private names of PyTorch: hooks have no public ones, and ``named_parameters`` makes names, for which the update of a deep and
narrow network would wait. ``_compiled_call_impl`` is what ``nn.Module.compile()`` sets, ``_call_impl`` what it compiles.
"""

import ctypes
import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from torch import nn
from torch.optim.adam import adam
from torch.utils.hooks import RemovableHandle

from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower, residual_towers
from sb3_deepcrl.common.tracing import PLAIN_TENSORS, is_traced, is_watched
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK

_LAYER = [nn.Linear, nn.LayerNorm, nn.SiLU]
_ADDRESS, _INTEGER, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
# Numbers in a line of the cache
_LINE = 16


class _Threads(threading.local):
    """Threads of the kernel, None for as many as PyTorch has. Each Python thread may train a model."""

    n: int | None = None


_threads = _Threads()


class _Shape(ctypes.Structure):
    """A tower as the kernel wants it described, and what it points to."""

    arrays: tuple[ctypes.Array[Any], ...]
    _fields_ = (
        ("n_inputs", _INTEGER),
        ("width", _INTEGER),
        ("n_blocks", _INTEGER),
        ("n_heads", _INTEGER),
        ("head_sizes", _ADDRESS),
        ("parameters", _ADDRESS),
        ("eps", ctypes.c_float),
    )


def describe_error(error: Exception) -> str:
    """Say in one line what ``torch.compile`` or a compiler raised: its type, and the first error found or the first line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: " + next((line.strip() for line in lines if "error: " in line), lines[0])


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """
    Compile ``tower.cpp`` with the compiler of ``torch.compile``, which keeps the outcome on the disk. There is none without
    AVX2, nor, with a warning, where it cannot be compiled.
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
    how: list[Any] = [ctypes.POINTER(_Shape), _INTEGER, _BOOL, _BOOL]
    library.width_multiple.argtypes = [_BOOL]
    library.tower_kept_size.argtypes = how
    library.width_multiple.restype = library.tower_kept_size.restype = _INTEGER
    library.tower_forward.argtypes = [*how, _INTEGER, *[_ADDRESS] * 3]
    library.tower_backward.argtypes = [*how, _INTEGER, *[_ADDRESS] * 4]
    library.info_nce.argtypes = [_ADDRESS, _ADDRESS, _INTEGER, _INTEGER, ctypes.c_float, *[_ADDRESS] * 3, _INTEGER]
    library.adam.argtypes = [*[_ADDRESS] * 4, _INTEGER, *[ctypes.c_double] * 7, _INTEGER]
    library.squashed_gaussian.argtypes = [*[_ADDRESS] * 3, _INTEGER, _INTEGER, _ADDRESS, _ADDRESS]
    library.adam.restype, library.squashed_gaussian.restype = ctypes.c_double, None
    library.tower_forward.restype = library.tower_backward.restype = library.info_nce.restype = _BOOL


def _count_threads() -> int:
    """Number of threads that the kernel may use."""
    return th.get_num_threads() if _threads.n is None else _threads.n


def _check_memory(enough_memory: bool, x: th.Tensor) -> None:
    """Raise the error that cannot leave C++, which returns whether there was enough memory."""
    if not enough_memory:
        raise MemoryError(f"Not enough memory for inputs of shape {tuple(x.shape)}: use a smaller batch")


def _addresses(tensors: list[th.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (_ADDRESS * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


class _Layout:
    """
    Where the parameters of a residual tower are, in the order of the kernel, as long as nobody changes the tower. A ValueError
    says what there is in it that the kernel does not know.
    """

    def __init__(self, tower: ResidualTower, heads: tuple[nn.Module, ...]):
        self.n_handles = RemovableHandle.next_id
        self.heads = heads
        blocks = [block for block in tower.blocks if type(block) is ResidualBlock]
        if type(tower) is not ResidualTower or len(blocks) < len(tower.blocks):
            raise ValueError("others than residual blocks, or subclasses, which may do something else")
        branches = [block.branch for block in blocks]
        layers = [list(layers) for layers in (tower.stem, *branches)]
        if [[*map(type, modules)] for modules in layers] != [_LAYER, *[_LAYER * LAYERS_PER_BLOCK] * len(blocks)]:
            raise ValueError("other layers than Dense, LayerNorm and Swish")
        dense_heads = [head for head in heads if type(head) is nn.Linear and head.out_features > 0]
        if len(dense_heads) < len(heads):
            raise ValueError("other heads than Dense")
        # What may be exchanged: modules in modules, parameters in modules
        containers: tuple[nn.Module, ...] = (tower, tower.stem, tower.blocks, *blocks, *branches)
        all_modules = (*containers, tower.head, *heads, *(module for modules in layers for module in modules))
        if is_watched(*all_modules):
            raise ValueError("somebody wants to be called when one of its layers runs, or has replaced what it does")
        self.attributes = [vars(module) for module in all_modules]
        self.modules = [(module._modules, tuple(module._modules.values())) for module in containers]
        dense = tower.stem[0]
        assert isinstance(dense, nn.Linear)
        n_inputs, width = dense.in_features, dense.out_features
        norms: list[Any] = [norm for modules in layers for norm in modules[1::3]]
        # Rows that fill a block of them up are constant
        if any(norm.eps != norms[0].eps for norm in norms) or norms[0].eps < th.finfo(th.float32).tiny:
            raise ValueError("several epsilons, or none")

        # What says how they compute
        self.settings = [(vars(block), "residual", block.residual) for block in blocks]
        self.settings += [(vars(norm), "eps", norm.eps) for norm in norms]
        # Dictionary and name of each parameter, and its shape; None for the scale of a block that adds nothing
        self.slots: list[tuple[dict[str, Any], str] | None] = []
        shapes: list[tuple[int, ...] | None] = []
        for index, modules in enumerate(layers):
            for dense, norm in zip(modules[::3], modules[1::3], strict=True):
                self.slots += [(module._parameters, name) for module in (dense, norm) for name in ("weight", "bias")]
                shapes += [(width, width if index else n_inputs), *[(width,)] * 3]
            if index > 0:
                block = blocks[index - 1]
                where = block._parameters if "scale" in block._parameters else block._buffers
                self.slots.append((where, "scale") if block.residual else None)
                shapes.append(() if block.residual else None)
        for head in dense_heads:
            self.slots += [(head._parameters, name) for name in ("weight", "bias")]
            shapes += [(head.out_features, width), (head.out_features,)]
        # None where it is computed from others, as by a parametrization
        tensors = [None if slot is None else slot[0].get(slot[1]) for slot in self.slots]
        if [None if tensor is None else tuple(tensor.shape) for tensor in tensors] != shapes:
            raise ValueError("parameters of other shapes")
        found = [tensor for tensor in tensors if tensor is not None]
        if not all([type(t) in PLAIN_TENSORS and t.dtype is th.float32 and t.is_cpu and t.is_contiguous() for t in found]):
            raise ValueError("parameters that are not float32 on the CPU, one after the other")
        self.tensors = tensors
        self.parameters: list[nn.Parameter] = [tensor for tensor in found if isinstance(tensor, nn.Parameter)]
        self.ids = {*map(id, self.parameters)}
        if len(self.ids) < len(self.parameters):
            raise ValueError("layers that share parameters")
        self.pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        # Kept for backward passes where parameters got other memory after the forward pass
        self.memory = [tensor.detach() for tensor in found]
        self.n_outputs = [head.out_features for head in dense_heads] or [width]
        sizes, pointers = (_INTEGER * len(heads))(*self.n_outputs[: len(heads)]), _addresses(tensors)
        arrays = ctypes.addressof(sizes), ctypes.addressof(pointers)
        self.shape = _Shape(n_inputs, width, len(blocks), len(heads), *arrays, norms[0].eps)
        # They live as long as it points to them
        self.shape.arrays = (sizes, pointers)

    def holds(self) -> bool:
        """Whether all is as it was."""
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
            and all([attributes[name] == value for attributes, name, value in self.settings])
            and not any(["forward" in attributes for attributes in self.attributes])
        )


class _Memory:
    """What a forward pass keeps for its backward pass, in memory that serves again: new one is mapped page by page."""

    def __init__(self, size: int, spare: list[th.Tensor], x: th.Tensor):
        self.spare = spare
        while spare and len(spare[-1]) != size:
            spare.pop()
        self.values = spare.pop() if spare else x.new_empty(size)

    def __del__(self) -> None:
        self.spare.append(self.values)


class _Tower(th.autograd.Function):
    """
    The kernel as a function that can be differentiated. Derivatives of the derivative are PyTorch's.

    Its inputs are the parameters, or one token in place of them all: their gradients are then written in place, and not
    added. For autograd each further input costs as much as a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: "TowerKernel",
        layout: _Layout,
        bfloat16: bool,
        gradients: ctypes.Array[ctypes.c_void_p] | None,
        x: th.Tensor,
        *parameters: th.Tensor,
    ) -> Any:
        ctx.kernel, ctx.layout, ctx.gradients, ctx.flat = kernel, layout, gradients, kernel.flat
        ctx.how = (layout.shape, len(x), bfloat16, not kernel.tower.checkpoint_activations)
        ctx.memory = _Memory(kernel.library.tower_kept_size(*ctx.how), kernel.spare, x)
        ctx.save_for_backward(x, *(parameters if gradients is None else ()))
        return kernel.forward(layout, ctx.how, x, ctx.memory.values.data_ptr())

    @staticmethod
    def backward(ctx: Any, *of_outputs: th.Tensor) -> Any:
        layout: _Layout = ctx.layout
        x, *parameters = ctx.saved_tensors
        # With create_graph=True there are gradients to be had of what is computed here
        if th.is_grad_enabled() or is_traced(*of_outputs):
            return _Tower._plain_backward(ctx, of_outputs, x, parameters)
        of_outputs = tuple([gradient.contiguous() for gradient in of_outputs])
        dx = th.empty_like(x) if ctx.needs_input_grad[4] else None
        gradients: list[th.Tensor] = []
        addresses, flat = ctx.gradients, ctx.flat
        # Of this pass alone, where another has written already
        is_added = addresses is not None and not layout.ids <= flat.pending
        if is_added or (addresses is None and any(ctx.needs_input_grad[5:])):
            gradients = [th.empty_like(parameter) for parameter in layout.parameters]
            of = iter(gradients)
            addresses = _addresses([next(of) if isinstance(t, nn.Parameter) else None for t in layout.tensors])
        enough_memory = ctx.kernel.library.tower_backward(
            *ctx.how,
            _count_threads(),
            _addresses(list(of_outputs)),
            ctx.memory.values.data_ptr(),
            None if dx is None else dx.data_ptr(),
            addresses,
        )
        _check_memory(enough_memory, x)
        if is_added:
            flat._zero_pending(layout.ids)
            th._foreach_add_([p.grad for p in layout.parameters if p.grad is not None], gradients)
            gradients = []
        elif ctx.gradients is not None:
            flat.pending -= layout.ids
        return *[None] * 4, dx, *(gradients or (None,) * (len(ctx.needs_input_grad) - 5))

    @staticmethod
    def _plain_backward(ctx: Any, of_outputs: tuple[th.Tensor, ...], x: th.Tensor, parameters: list[th.Tensor]) -> Any:
        needed = ctx.needs_input_grad[4:]
        with th.enable_grad():
            # An alias, since it may be a parameter too: each input has a gradient of its own
            inputs = [x.view_as(x), *parameters]
            features = ctx.kernel.tower.features(inputs[0])
            outputs = [head(features) for head in ctx.layout.heads] or [features]
        gradients = iter(
            th.autograd.grad(
                outputs,
                [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed],
                of_outputs,
                create_graph=th.is_grad_enabled(),
            )
        )
        return *[None] * 4, *(next(gradients) if is_needed else None for is_needed in needed)


class TowerKernel:
    """
    What a residual tower does when it is called: stem, blocks and heads run as the kernel wherever that does the same, i.e.
    for layers of Dense, LayerNorm and Swish in float32, with products of bfloat16 where autocast asks for them and processor
    and width allow them. What it does not know, and what traces or transforms, gets the plain modules. This is decided here,
    once for each change of the tower.

    :param library: See :func:`load_kernel`
    :param tower: The residual tower
    """

    def __init__(self, library: ctypes.CDLL, tower: ResidualTower):
        self.library = library
        self.tower = tower
        self.multiples = {bfloat16: library.width_multiple(bfloat16) for bfloat16 in (False, True)}
        self._layout: _Layout | None = None
        #: Who wants the gradients of the parameters written in place, while that lasts
        self.flat: FlatParameters | None = None
        # Stands for all parameters where their gradients are written in place
        self.token = th.zeros((), device="cpu", requires_grad=True)
        self.spare: list[th.Tensor] = []

    def layout(self, heads: tuple[nn.Module, ...] = (), bfloat16: bool = False) -> _Layout | None:
        """
        Look at the tower, unless it is as it was, with the Dense layers that take its output if it has no head. Gives where
        its parameters are, None if the kernel does not know it.
        """
        if type(self.tower.head) is not nn.Identity:
            if heads:
                return None
            heads = (self.tower.head,)
        if self._layout is None or self._layout.heads != heads or not self._layout.holds():
            try:
                self._layout = _Layout(self.tower, heads)
            except ValueError:
                self._layout = None
                return None
        multiple = self.multiples[bfloat16]
        return self._layout if multiple and self._layout.shape.width % multiple == 0 else None

    def forward(self, layout: _Layout, how: tuple[Any, ...], x: th.Tensor, kept: int | None) -> tuple[th.Tensor, ...]:
        """Output of each head, or the features; ``how`` are the first arguments of all functions of the kernel."""
        outputs = tuple([x.new_empty(len(x), n_outputs) for n_outputs in layout.n_outputs])
        enough_memory = self.library.tower_forward(*how, _count_threads(), x.data_ptr(), _addresses(list(outputs)), kept)
        _check_memory(enough_memory, x)
        return outputs

    def __call__(self, x: th.Tensor, *heads: nn.Module) -> Any:
        tower = self.tower
        autocast = tower.autocast_dtype or (th.get_autocast_dtype("cpu") if th.is_autocast_enabled("cpu") else None)
        bfloat16 = autocast is th.bfloat16
        layout = None
        is_known = x.is_cpu and x.dtype is th.float32 and x.ndim == 2 and len(x) > 0 and (autocast is None or bfloat16)
        if is_known and not is_traced(x):
            layout = self.layout(heads, bfloat16)
            if layout is None and bfloat16:
                # Float32 in the kernel takes less time than bfloat16 without it
                bfloat16, layout = False, self.layout(heads)
        if layout is None or x.shape[1] != layout.shape.n_inputs:
            output = tower._call_impl(x)
            return tuple([head(output) for head in heads]) if heads else output
        x = x.contiguous()
        trained = th.is_grad_enabled() and any([parameter.requires_grad for parameter in layout.parameters])
        if trained or (th.is_grad_enabled() and x.requires_grad):
            gradients = self.flat._write_gradients(layout) if self.flat is not None and trained else None
            parameters: list[Any] = layout.parameters if self.flat is None or trained else []
            if gradients is not None:
                parameters = [self.token]
            outputs = _Tower.apply(self, layout, bfloat16, gradients, x, *parameters)
        else:
            outputs = self.forward(layout, (layout.shape, len(x), bfloat16, True), x, None)
        return outputs if heads else outputs[0]


def apply_heads(tower: ResidualTower, x: th.Tensor, *heads: nn.Module) -> tuple[th.Tensor, ...]:
    """Let Dense heads take the features of a tower without one, in one call where it runs as the kernel."""
    if isinstance(tower._compiled_call_impl, TowerKernel):
        return tower._compiled_call_impl(x, *heads)
    features = tower(x)
    return tuple([head(features) for head in heads])


def has_kernel(*towers: ResidualTower) -> bool:
    """Whether one of these towers runs as the kernel."""
    return any([isinstance(tower._compiled_call_impl, TowerKernel) for tower in towers])


def tower_kernels(module: nn.Module) -> list[TowerKernel]:
    """The kernels of the towers in a network."""
    kernels = [tower._compiled_call_impl for tower in residual_towers(module)]
    return [kernel for kernel in kernels if isinstance(kernel, TowerKernel)]


def _have_hooks(parameters: list[th.Tensor]) -> bool:
    """Whether somebody wants to see the gradients that autograd makes."""
    return any([parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters])  # type: ignore[attr-defined]


def _is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    """Whether Adam does nothing unusual in a step. Schedulers of the learning rate only count its steps."""
    group, step = optimizer.param_groups[0], vars(optimizer).get("step")
    return not (
        (step is not None and not hasattr(step, "_wrapped_by_lr_sched"))
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or group["amsgrad"]
        or group["maximize"]
        or group["differentiable"]
    )


class FlatParameters:
    """
    Parameters of an optimizer, their gradients and Adam's moments, each in one tensor: what is done to all of them takes one
    call, and on a GPU that call has work for all of it. Parameters and the state of the optimizer stay what they were to all
    others, as views of these tensors.

    :param optimizer: The optimizer
    :param kernels: Kernels of the towers that it trains
    """

    def __init__(self, optimizer: th.optim.Optimizer, kernels: list[TowerKernel]):
        self.optimizer = optimizer
        self.kernels = kernels
        self.n_handles = RemovableHandle.next_id
        self.parameters: list[th.Tensor] = optimizer.param_groups[0]["params"]
        self.library = load_kernel() if self.parameters[0].is_cpu else None
        # Each begins at a line of the cache. The numbers between stay zero.
        sizes = [-(-parameter.numel() // _LINE) * _LINE for parameter in self.parameters]
        # Values, gradients, and the two moments
        self.flat = [self.parameters[0].new_zeros(sum(sizes)) for _ in range(4)]
        values, self.gradients, *moments = (
            [
                part[: parameter.numel()].view_as(parameter)
                for part, parameter in zip(flat.split(sizes), self.parameters, strict=True)
            ]
            for flat in self.flat
        )
        with th.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                value.copy_(parameter)
                parameter.data = value
        self.pointers = [parameter.data_ptr() for parameter in self.parameters]
        # The state of the optimizer is a view too
        self.steps = self.parameters[0].new_zeros(len(sizes))
        for parameter, *state in zip(self.parameters, self.steps, *moments, strict=True):
            ours = dict(zip(("step", "exp_avg", "exp_avg_sq"), state, strict=True))
            for name, value in ours.items():
                if name in optimizer.state[parameter]:
                    value.copy_(th.as_tensor(optimizer.state[parameter][name]))
            optimizer.state[parameter].update(ours)
        self.states: list[dict[str, th.Tensor]] = [*optimizer.state.values()]
        self.averages = [state.get("exp_avg") for state in self.states]
        #: Whether an update has them so now
        self.is_active = False
        # Where towers write their gradients, and those (by id of the parameter) that will be written and not added to
        self.addresses: WeakKeyDictionary[_Layout, ctypes.Array[ctypes.c_void_p]] = WeakKeyDictionary()
        self.pending: set[int] = set()

    def release(self) -> None:
        """Give parameters and moments memory of their own again: a view is pickled with all that it is a part of."""
        for parameter in self.parameters:
            parameter.data, parameter.grad = parameter.data.clone(), None
            state = self.optimizer.state[parameter]
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, th.Tensor)})

    @classmethod
    def make(cls, module: nn.Module | None, optimizer: th.optim.Optimizer) -> "FlatParameters | None":
        """
        Lay out the parameters of an optimizer, and of the network that it trains, if there are towers in it. Gives None unless
        it is Adam and does nothing unusual, and no towers share parameters.
        """
        groups = optimizer.param_groups
        parameters = groups[0]["params"]
        kernels = [] if module is None else tower_kernels(module)
        layouts = [layout for kernel in kernels if (layout := kernel.layout()) is not None]
        in_towers = [id(parameter) for layout in layouts for parameter in layout.parameters]
        device = parameters[0].device
        if (
            (device.type == "cpu" and load_kernel() is None)
            or type(optimizer) not in (th.optim.Adam, th.optim.AdamW)
            or len(groups) > 1
            or _have_hooks(parameters)
            or not _is_plain_adam(optimizer)
            or groups[0]["capturable"] != (device.type == "cuda")
            or not all(p.requires_grad and p.dtype is th.float32 and p.is_contiguous() for p in parameters)
            or any(parameter.device != device for parameter in parameters)
            or len(in_towers) > len(set(in_towers))
            or len({float(optimizer.state.get(p, {}).get("step", 0.0)) for p in parameters}) > 1
        ):
            return None
        return cls(optimizer, kernels)

    def holds(self) -> bool:
        """Whether parameters and optimizer are still those."""
        optimizer = self.optimizer
        return (
            len(optimizer.param_groups) == 1
            and _is_plain_adam(optimizer)
            and [parameter.data_ptr() for parameter in self.parameters] == self.pointers
            and all([parameter.requires_grad for parameter in self.parameters])
            and (RemovableHandle.next_id == self.n_handles or not _have_hooks(self.parameters))
            and len(optimizer.state) == len(self.states)
            and all(map(is_, optimizer.state.values(), self.states))
            and all(map(is_, [state.get("exp_avg") for state in self.states], self.averages))
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context of an update, in which towers of the kernel write the gradients of their parameters and add nothing."""
        for kernel in self.kernels:
            kernel.flat = self
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False
            self.pending.clear()
            for kernel in self.kernels:
                kernel.flat = None

    def _write_gradients(self, layout: _Layout) -> ctypes.Array[ctypes.c_void_p] | None:
        """Where a tower writes its gradients in the next :meth:`backward`, None if it has others than these parameters."""
        if layout not in self.addresses:
            of = {id(parameter): gradient for parameter, gradient in zip(self.parameters, self.gradients, strict=True)}
            if any(id(parameter) not in of for parameter in layout.parameters):
                return None
            self.addresses[layout] = _addresses([of.get(id(tensor)) for tensor in layout.tensors])
        self.pending |= layout.ids
        return self.addresses[layout]

    def backward(self, loss: th.Tensor) -> None:
        """Compute the gradients of a loss, in place of the last ones, within :meth:`in_place`, where there is the kernel."""
        added = []
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if id(parameter) not in self.pending:
                added.append(gradient)
        if added:
            # What `zero_grad` calls
            th._foreach_zero_(added)
        loss.backward()
        self._zero_pending(self.pending)

    def _zero_pending(self, ids: set[int]) -> None:
        """Let nothing be the gradients of those parameters that nobody has written yet."""
        if missing := self.pending & ids:
            pairs = zip(self.parameters, self.gradients, strict=True)
            th._foreach_zero_([gradient for parameter, gradient in pairs if id(parameter) in missing])
            self.pending -= missing

    def gather(self) -> None:
        """Copy the gradients that autograd made. In place, it would add each of them to zeros."""
        pairs = [(gradient, parameter.grad) for parameter, gradient in zip(self.parameters, self.gradients, strict=True)]
        new = [(gradient, other) for gradient, other in pairs if other is not None and other is not gradient]
        if missing := [gradient for gradient, other in pairs if other is None]:
            th._foreach_zero_(missing)
        if new:
            th._foreach_copy_([gradient for gradient, _ in new], [other for _, other in new])
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def step(self) -> th.Tensor:
        """One step of the optimizer along these gradients. Gives their norm."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        learning_rate, decay = group["lr"], group["weight_decay"]
        decoupled = group.get("decoupled_weight_decay", False)
        if self.library is None:
            values, gradients, *moments = self.flat
            # It counts the first one itself
            self.steps[1:].add_(1)
            adam(
                [values],
                [gradients],
                [moments[0]],
                [moments[1]],
                [],
                [self.steps[0]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=learning_rate,
                weight_decay=decay,
                eps=group["eps"],
                maximize=False,
                capturable=group["capturable"],
                decoupled_weight_decay=decoupled,
            )
            return gradients.norm()
        self.steps += 1
        n_steps = self.steps[0].item()
        beta1, beta2, learning_rate = float(beta1), float(beta2), float(learning_rate)
        norm: float = self.library.adam(
            *[flat.data_ptr() for flat in self.flat],
            len(self.flat[0]),
            learning_rate / (1.0 - beta1**n_steps),
            beta1,
            beta2,
            (1.0 - beta2**n_steps) ** -0.5,
            group["eps"],
            0.0 if decoupled else decay,
            learning_rate * decay if decoupled else 0.0,
            _count_threads(),
        )
        return self.flat[0].new_tensor(norm)


def fused_info_nce(x: th.Tensor, y: th.Tensor, logsumexp_coef: float, needed: bool) -> tuple[th.Tensor, ...]:
    """
    InfoNCE of negative distances, forward, as one function of float32 representations. Gives loss and metrics, shape ``(5,)``,
    and the gradients of ``x`` and ``y`` if they are needed.
    """
    library = load_kernel()
    assert library is not None
    x, y = x.contiguous(), y.contiguous()
    outcome = x.new_empty(5)
    gradients = (th.empty_like(x), th.empty_like(y)) if needed else ()
    addresses = tuple([gradient.data_ptr() for gradient in gradients]) or (None, None)
    enough_memory = library.info_nce(
        x.data_ptr(), y.data_ptr(), *x.shape, logsumexp_coef, *addresses, outcome.data_ptr(), _count_threads()
    )
    _check_memory(enough_memory, x)
    return outcome, *gradients


def fused_squashed_gaussian(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, ...]:
    """What :func:`~sb3_deepcrl.common.distributions.squashed_gaussian` gives, as one function of float32 tensors."""
    library = load_kernel()
    assert library is not None
    inputs = [value.contiguous() for value in (mean, log_std, noise)]
    outputs = th.empty_like(inputs[0]), mean.new_empty(len(mean))
    addresses = [value.data_ptr() for value in (*inputs, *outputs)]
    library.squashed_gaussian(*addresses[:3], *mean.shape, *addresses[3:])
    return outputs


@contextmanager
def threads_of_kernel() -> Iterator[None]:
    """
    Context in which the kernel has all threads and PyTorch one. OpenMP's threads, which PyTorch uses, look for work for
    milliseconds after each operation, in the way of the kernel's, and on busy cores in the way of each other.
    """
    before, n_threads = _threads.n, th.get_num_threads()
    _threads.n = _count_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)
        _threads.n = before
