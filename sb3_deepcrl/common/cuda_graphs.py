"""
Updates and predictions as CUDA graphs, and optimizers whose steps can be captured.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch as th

from sb3_deepcrl.common.tracing import is_traced
from sb3_deepcrl.common.utils import check_choice

# Calls before the capture: libraries set themselves up, optimizers make their state
N_WARM_UP = 3
# Shapes of the inputs, such as those of training and evaluation, whose graphs are kept
MAX_GRAPHS = 4
# Calls until the next capture, after one for which there was too little memory
CALLS_WITHOUT_MEMORY = 10_000


def can_capture(optimizers: Iterable[th.optim.Optimizer], required: bool = False) -> bool:
    """Whether the steps of optimizers can be captured in a CUDA graph. Where it is required, it is an error if not."""
    others = [type(o).__name__ for o in optimizers if not all("capturable" in group for group in o.param_groups)]
    if others and required:
        raise ValueError(
            f'`cuda_graph=True` needs optimizers that know `capturable`, which {others[0]} does not: leave it at "auto", '
            "or use th.optim.Adam"
        )
    return not others


def check_cuda_graph(cuda_graph: bool | str, device: th.device) -> bool | str:
    """Check whether an algorithm that is made may capture graphs; one that is loaded on a CPU goes on without."""
    if check_choice(cuda_graph, (True, False, "auto"), "cuda_graph") is True and device.type != "cuda":
        raise ValueError(f'`cuda_graph=True` needs a GPU, but the device is {device}: leave it at "auto", which is off there')
    return cuda_graph


def graph_key(
    settings: Iterable[Hashable], optimizers: Iterable[th.optim.Optimizer], tensors: Iterable[th.Tensor] = ()
) -> tuple[Hashable, ...]:
    """
    All that the graph of an update keeps besides its minibatch: numbers that are read on the host, and where parameters and
    the state of the optimizers are. Another key means that it has to be captured anew. It takes less than 0.1 ms for a
    thousand parameters, as it looks at the state of the last one of each group only: states are made and loaded together.

    :param settings: What the update reads on the host
    :param optimizers: The optimizers that it steps
    :param tensors: What it reads besides their parameters
    """
    key: list[Hashable] = [*settings, *map(th.Tensor.data_ptr, tensors)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters = group["params"]
            key += [value for name, value in group.items() if name not in ("params", "lr")]
            state = [group["lr"], *optimizer.state.get(parameters[-1], {}).values()]
            key += [value.data_ptr() if isinstance(value, th.Tensor) else value for value in state]
            key.append(hash(tuple(map(th.Tensor.data_ptr, parameters))))
            key.append(hash(tuple(map(attrgetter("requires_grad"), parameters))))
    return tuple(key)


def prepare_optimizer(optimizer: th.optim.Optimizer, capturable: bool) -> None:
    """
    Let an optimizer be captured in a CUDA graph, or not: with its learning rate and step counts on the device, so that
    the graph reads them, or as PyTorch has them otherwise. It does not matter what kind was loaded into it.
    """
    # Private: PyTorch warns of the steps before the capture, also where its constructor was told of it, if that was copied
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = capturable
        learning_rate, device = group["lr"], group["params"][0].device
        if not capturable:
            group["lr"] = float(learning_rate)
        elif not isinstance(learning_rate, th.Tensor) or learning_rate.device != device:
            group["lr"] = th.tensor(float(learning_rate), device=device)
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


class Branch(threading.local):
    """
    A part of a function that does not depend on the rest of it, from :meth:`fork` to :meth:`join`. In a CUDA graph it runs
    beside the rest: kernels of small matrices leave most of a GPU idle. Elsewhere all is done in the order of the code.

    What it uses of the rest, or gives to it, must live until the end of the function.
    """

    def __init__(self) -> None:
        #: Set while this thread captures a function
        self.stream: th.cuda.Stream | None = None

    def fork(self) -> None:
        """Let the branch start here."""
        if self.stream is not None:
            self.stream.wait_stream(th.cuda.current_stream(self.stream.device))

    def beside(self) -> AbstractContextManager[Any]:
        """Context of what is done in the branch."""
        return nullcontext() if self.stream is None else th.cuda.stream(self.stream)

    def join(self) -> None:
        """Wait for what was done in the branch."""
        if self.stream is not None:
            th.cuda.current_stream(self.stream.device).wait_stream(self.stream)


#: The branches that functions may have
BRANCHES = (Branch(), Branch())


class CudaGraphBackend:
    """CUDA graphs of PyTorch on one GPU, all captured on one stream. See :func:`cuda_graph_backend`."""

    def __init__(self, device: th.device):
        self.device = device
        self.stream, *self._side_streams = (th.cuda.Stream(device) for _ in range(3))
        #: Captures that failed, after which random numbers are those of another state: all graphs have to be made anew
        self.n_failures = 0
        # One thread at a time
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        # Streams can neither be copied nor pickled, nor need to be
        return cuda_graph_backend, (self.device,)

    @contextmanager
    def _branching(self) -> Iterator[None]:
        with self._lock:
            for branch, stream in zip(BRANCHES, self._side_streams, strict=True):
                branch.stream = stream
            try:
                yield
            finally:
                for branch in BRANCHES:
                    branch.stream = None

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Context in which a function runs as it will be captured: on the side stream, in order with the current one."""
        current = th.cuda.current_stream(self.device)
        with self._branching():
            self.stream.wait_stream(current)
            with th.cuda.stream(self.stream):
                yield
            current.wait_stream(self.stream)

    def capture(self, function: Callable[[], th.Tensor]) -> tuple[th.cuda.CUDAGraph, th.Tensor]:
        """
        Record what a function does, without doing it. Gives the graph, and the tensor that each replay fills. If it fails,
        the current stream and the random numbers are as before.
        """
        graph, current = th.cuda.CUDAGraph(), th.cuda.current_stream(self.device)
        try:
            # Other threads may allocate memory meanwhile
            with self._branching(), th.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                output = function()
        except BaseException:
            # If the end of the capture raises, PyTorch leaves its stream the current one, and up to version 2.11 a generator
            # that takes itself for captured, and refuses all random numbers
            self.n_failures += 1
            th.cuda.set_stream(current)
            generator = th.cuda.default_generators[current.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, output


@functools.cache
def cuda_graph_backend(device: th.device) -> CudaGraphBackend:
    """The one of a GPU: each further stream would keep workspaces of cuBLAS as long as the process lives."""
    return CudaGraphBackend(device)


class _Captured(NamedTuple):
    """A graph, what it reads, and what it fills."""

    graph: Any
    inputs: dict[str, th.Tensor]
    output: th.Tensor


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether it came of too little memory. The end of a capture may raise another error then."""
    return error is not None and (isinstance(error, th.OutOfMemoryError) or _lacked_memory(error.__context__))


class GraphedFunction:
    """
    Run a function of tensors as a CUDA graph: a thousand kernels are launched by one call.

    The first calls run it as it is, on a side stream. The next one captures it, and from then on it is replayed on copies of
    the inputs. Each of a few shapes of the inputs has a graph of its own. All are captured anew when the key changes: it has
    to hold all else that a graph keeps, i.e. numbers that are read on the host and the addresses of parameters. A copy has
    no graphs yet.

    :param function: Takes a dict of tensors and returns a tensor. It waits for nothing on the device
        and what it changes stays at its address.
    :param backend: Who captures
    :param required: Whether a function that cannot be captured is an error. Else there is a warning, and it runs as it is, or
        for a while where memory is short.
    """

    def __init__(
        self, function: Callable[[dict[str, th.Tensor]], th.Tensor], backend: CudaGraphBackend, required: bool = False
    ):
        self.function = function
        self.backend = backend
        self.required = required
        self._can_be_captured = True
        self._key: Hashable = None
        #: By shape of the inputs: the number of calls so far, until there is a graph
        self.graphs: dict[Hashable, int | _Captured] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graphs": {}}

    def __call__(self, inputs: dict[str, th.Tensor], key: Hashable = None) -> th.Tensor:
        """
        Call the function, or replay its graph, which depends on the inputs and the key. Later calls do not change what it
        returns.
        """
        devices = {value.device for value in inputs.values()}
        if not self._can_be_captured or devices != {self.backend.device} or is_traced(*inputs.values()):
            # A graph of what runs elsewhere, for instance after `policy.to("cpu")`, would hold nothing
            return self.function(inputs)
        key = (key, self.backend.n_failures)
        if key != self._key:
            self.invalidate()
            self._key = key
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        captured = self.graphs.get(shapes, 0)
        if isinstance(captured, int):
            if shapes not in self.graphs and len(self.graphs) >= MAX_GRAPHS:
                self.invalidate()
            self.graphs[shapes] = captured + 1
            if captured < N_WARM_UP:
                with self.backend.warm_up():
                    return self.function(inputs)
            static = {name: value.clone() for name, value in inputs.items()}
            try:
                graph, output = self.backend.capture(lambda: self.function(static))
                captured = _Captured(graph, static, output)
            except RuntimeError as error:
                self.invalidate()
                if self.required:
                    raise
                self._can_be_captured = _lacked_memory(error)
                hint = "a features extractor of your own may read values on the host"
                warnings.warn(
                    f"Runs without a CUDA graph, because something in it cannot be captured ({str(error).splitlines()[0]}): "
                    f"{'there is too little memory' if self._can_be_captured else hint}. `cuda_graph=False` ends this warning"
                )
                # With the failure, which would be another key in the next call
                self._key = (key[0], self.backend.n_failures)
                captured = N_WARM_UP - CALLS_WITHOUT_MEMORY
            self.graphs[shapes] = captured
            if isinstance(captured, int):
                # Not in the handler of the error, which holds what was captured
                return self.function(inputs)
        for name, value in inputs.items():
            captured.inputs[name].copy_(value)
        captured.graph.replay()
        return captured.output.clone()

    def invalidate(self) -> None:
        """Forget the graphs and give their memory back. The next calls warm up and capture again."""
        for captured in self.graphs.values():
            if not isinstance(captured, int):
                captured.graph.reset()
        self.graphs = {}
