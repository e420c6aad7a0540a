"""
Updates and predictions as CUDA graphs, and optimizers whose steps can be captured.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn

from sb3_deepcrl.common.tracing import is_traced


def can_capture(optimizers: Iterable[th.optim.Optimizer], required: bool = False) -> bool:
    """Whether the steps of optimizers can be captured in a CUDA graph. Where it is required, it is an error if not."""
    others = [type(o).__name__ for o in optimizers if not all("capturable" in group for group in o.param_groups)]
    if others and required:
        raise ValueError(
            f'`cuda_graph=True` needs optimizers that know `capturable`, which {others[0]} does not: leave it at "auto", '
            "or use th.optim.Adam"
        )
    return not others


def graph_key(
    settings: Iterable[Hashable],
    network: nn.Module,
    optimizers: Iterable[th.optim.Optimizer],
    tensors: Iterable[th.Tensor] = (),
) -> tuple[Hashable, ...]:
    """
    All that the graph of an update keeps besides its minibatch: numbers that are read on the host, and where parameters and
    the state of the optimizers are. Another key means that it has to be captured anew. Settings are what the update reads on
    the host, tensors what it reads besides the network.
    """
    hyperparameters: list[Hashable] = []
    in_graph: list[Any] = [*network.parameters(), *tensors]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            hyperparameters += [(name, value) for name, value in group.items() if name not in ("params", "lr")]
            in_graph.append(group["lr"])
            in_graph += [value for p in group["params"] for value in optimizer.state.get(p, {}).values()]
    addresses = tuple(t.data_ptr() if isinstance(t, th.Tensor) else t for t in in_graph)
    trained = tuple(parameter.requires_grad for parameter in network.parameters())
    return (*settings, *hyperparameters, hash(addresses), hash(trained))


def prepare_optimizer(optimizer: th.optim.Optimizer, capturable: bool) -> None:
    """
    Let an optimizer be captured in a CUDA graph, or not: with its learning rate and step counts on the device, so that
    the graph reads them, or as PyTorch has them otherwise. It does not matter what kind was loaded into it.
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
    """Like SB3's ``update_learning_rate``, but a learning rate that a CUDA graph reads is changed where it is."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class CudaGraphBackend:
    """CUDA graphs of PyTorch, on one GPU."""

    def __init__(self, device: th.device):
        self.device = device
        self.stream = th.cuda.Stream(device)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Context in which a function runs as it will be captured: on the side stream, in order with the current one."""
        current = th.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with th.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], th.Tensor]) -> tuple[th.cuda.CUDAGraph, th.Tensor]:
        """Record what a function does, without doing it. Gives the graph, and the tensor that each replay fills."""
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
        backend: CudaGraphBackend,
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
        Call the function, or replay its graph, which depends on the inputs and the key. Later calls do not change what it
        returns.
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
        """Forget the graph and give its memory back. The next calls warm up and capture again."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._signature, self._n_calls = None, None, 0
        self._inputs, self._output = {}, th.empty(0)
