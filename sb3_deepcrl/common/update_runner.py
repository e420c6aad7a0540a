"""
How the updates of actor and critic run, whatever they compute.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch as th
from torch import nn

from sb3_deepcrl.common.compilation import CastParameters, compile_blocks, set_precision, tf32_products, uncompile_blocks
from sb3_deepcrl.common.cuda_graphs import (
    BRANCHES,
    Branch,
    GraphedFunction,
    can_capture,
    cuda_graph_backend,
    prepare_optimizer,
)
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.torch_layers import residual_towers
from sb3_deepcrl.common.tower_kernel import FlatParameters, has_kernel, load_kernel, threads_of_kernel
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK, check_choice

# Name of the actions in a minibatch, next to those of the observations
ACTION_KEY = "__action__"
# With compile="auto" on a CPU, so many layers have to be updated (updates times depth) to earn the start-up, which takes
# seconds
MIN_COMPILED_LAYERS = 4_000


class UpdateRunner:
    """
    Runs updates in the fastest way that there is: as a CUDA graph, with the kernel for CPUs, or as they are.

    :param update: Function of the observations and actions of a minibatch that returns a tensor, and steps its optimizers by
        :meth:`backward` and :meth:`step`. Nothing in it waits for the device or depends on a value.
    :param policy: Policy with ``actor`` and ``critic``, each with its ``optimizer``, and ``graph_actor``
    :param optimizers: Function that returns all optimizers of an update
    :param ranks: The ranks that do the updates together. With several, updates are not captured in CUDA graphs.
    """

    def __init__(
        self,
        update: Callable[[dict[str, th.Tensor], th.Tensor], th.Tensor],
        policy: Any,
        optimizers: Callable[[], list[th.optim.Optimizer]],
        ranks: Ranks,
    ):
        # What runs now: a callback may put something else in its place until the end of a training
        self.update = self.own_update = update
        self.policy = policy
        self.optimizers = optimizers
        self.ranks = ranks
        self.towers = residual_towers(policy)
        self.graph: GraphedFunction | None = None
        #: What the update may do beside the rest, in a graph
        self.branches = BRANCHES
        self._is_compiled = False
        self._tf32 = False
        self._cast: CastParameters | None = None
        # With which the graphs, and what is in them, were made
        self._settings: tuple[Hashable, ...] = ()
        # What is stepped at once, by optimizer: by the kernel for CPUs, or in a graph
        self._flat: dict[th.optim.Optimizer, FlatParameters] = {}
        # How to wait for the gradients of all ranks
        self._sums: dict[th.optim.Optimizer, Callable[[], None]] = {}

    def release(self) -> None:
        """Let each parameter have memory of its own until the next update, unless a CUDA graph knows where it is."""
        for optimizer, flat in list(self._flat.items()):
            if flat.library is not None:
                self._flat.pop(optimizer).release()

    def __getstate__(self) -> dict[str, Any]:
        # Branches are those of all models, and parameters of a copy are laid out anew
        return {**self.__dict__, "branches": (), "_flat": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, branches=BRANCHES)
        if self._is_compiled:
            # Copies of modules are plain
            compile_blocks(self.policy)

    def set_up(
        self,
        compile: bool | str,
        cuda_graph: bool | str,
        precision: str,
        checkpoint_activations: bool,
        n_updates: int | None = None,
    ) -> None:
        """
        Choose how networks and updates run, as the arguments of :class:`~sb3_deepcrl.deepcrl.deepcrl.DeepCRL` say. What takes
        time waits until there are updates ahead, on whose number ``compile="auto"`` depends.
        """
        self.update = self.own_update
        check_choice(compile, (True, False, "auto"), "compile")
        check_choice(checkpoint_activations, (True, False), "checkpoint_activations")
        device = next(self.policy.parameters()).device
        if cuda_graph is True and self.ranks.size > 1:
            raise ValueError(f'`cuda_graph=True` needs a single rank, got {self.ranks.size}: leave it at "auto"')
        self._tf32 = set_precision(self.policy, precision, device)
        for tower in self.towers:
            tower.checkpoint_activations = checkpoint_activations
        # Where it may run, as a model that only acts has no use for it
        layers = (
            [module for tower in self.towers for module in tower.modules()] if checkpoint_activations and n_updates else []
        )
        if counting := [layer for layer in layers if getattr(layer, "running_mean", None) is not None]:
            name = type(counting[0]).__name__
            raise ValueError(f"`checkpoint_activations=True` would update the statistics of {name} twice: leave it at False")
        if n_updates is None:
            return
        n_layers = n_updates * LAYERS_PER_BLOCK * max(len(tower.blocks) for tower in self.towers)
        pays = device.type != "cpu" or (n_layers >= MIN_COMPILED_LAYERS and load_kernel() is not None)
        if compile is True or (compile == "auto" and pays):
            self._is_compiled = compile_blocks(self.policy)
        elif compile is False:
            uncompile_blocks(self.policy)
            self._is_compiled = False
        settings = (device, cuda_graph, precision, checkpoint_activations, self._is_compiled)
        if settings != self._settings:
            self._settings = settings
            # The kernel for CPUs casts them by itself
            is_low = device.type == "cuda" and self.towers[0].autocast_dtype is not None
            self._cast = CastParameters(self.towers) if is_low else None
            self._set_up_graphs(device, cuda_graph)

    def _set_up_graphs(self, device: th.device, cuda_graph: bool | str) -> None:
        required = cuda_graph is True
        backend = cuda_graph_backend(device) if device.type == "cuda" and cuda_graph is not False else None
        self.graph = None
        if backend is not None and self.ranks.size == 1 and can_capture(self.optimizers(), required):
            self.graph = GraphedFunction(self.update_minibatch, backend, required=required)
        self.policy.graph_actor(backend, required)
        self.prepare_optimizers()

    def prepare_optimizers(self) -> None:
        """Let the optimizers step in a new graph, or without it: what was loaded into them may come from another device."""
        if self.graph is not None:
            self.graph.invalidate()
        for optimizer in self.optimizers():
            prepare_optimizer(optimizer, capturable=self.graph is not None)
        if self.graph is not None:
            # Before it keeps the addresses of parameters
            self._lay_out()

    def _lay_out(self) -> None:
        """Lay out the parameters of each optimizer in one tensor, where it pays, unless they are."""
        # Optimizers may have been replaced
        before, self._flat = self._flat, {}
        on_gpu = self.graph is not None and self.graph.backend.device.type == "cuda"
        if not on_gpu and not has_kernel(*self.towers):
            return
        networks = {network.optimizer: network for network in (self.policy.actor, self.policy.critic)}
        for optimizer in self.optimizers():
            flat = before.get(optimizer)
            if flat is None or not flat.holds():
                # It moves parameters and reads counts of steps, for which a capture has no place
                is_captured = on_gpu and th.cuda.is_current_stream_capturing()
                flat = None if is_captured else FlatParameters.make(networks.get(optimizer), optimizer)
            if flat is not None:
                self._flat[optimizer] = flat

    def update_minibatch(self, minibatch: dict[str, th.Tensor]) -> th.Tensor:
        """The update, with the actions among the observations."""
        observations = dict(minibatch)
        with ExitStack() as stack:
            self._lay_out()
            for flat in self._flat.values():
                stack.enter_context(flat.in_place())
            if self._cast is not None:
                stack.enter_context(self._cast.in_place())
            return self.update(observations, observations.pop(ACTION_KEY))

    def run(self, observations: dict[str, th.Tensor], actions: th.Tensor, key: Hashable = None) -> th.Tensor:
        """
        Do an update on a minibatch. The key is what a graph keeps besides it, see
        :func:`~sb3_deepcrl.common.cuda_graphs.graph_key`.
        """
        with ExitStack() as stack:
            if self._tf32:
                stack.enter_context(tf32_products(True))
            if self.graph is not None:
                return self._run_graph(self.graph, {**observations, ACTION_KEY: actions}, (self.update, key))
            if has_kernel(*self.towers):
                stack.enter_context(threads_of_kernel())
            return self.update_minibatch({**observations, ACTION_KEY: actions})

    def _run_graph(self, graph: GraphedFunction, minibatch: dict[str, th.Tensor], key: Hashable) -> th.Tensor:
        try:
            return graph(minibatch, key)
        except BaseException:
            # Gradients may lie in the memory of a graph that was not finished
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            raise

    def float32_products(self) -> AbstractContextManager[None]:
        """Context in which an update multiplies float32 as such, whatever the precision of the networks."""
        return tf32_products(False) if self._tf32 else nullcontext()

    def fork(self) -> tuple[Branch, Branch]:
        """Let the branches of the update, for goals and critic, start here."""
        for branch in self.branches:
            branch.fork()
        return self.branches

    def join(self) -> None:
        """Wait for the branches of the update."""
        for branch in self.branches:
            branch.join()

    def backward(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        """
        Compute the gradients of a loss, in place of the last ones. Those of several ranks are added until :meth:`step`, so
        that they travel while something else is computed.
        """
        flat = self._active(optimizer)
        if self.ranks.size > 1:
            loss = loss * self.ranks.weight
        if flat is not None and flat.library is not None:
            flat.backward(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            if self._cast is not None:
                self._cast.give_gradients({} if flat is None else dict(zip(flat.parameters, flat.gradients, strict=True)))
            if flat is not None:
                flat.gather()
        if self.ranks.size > 1:
            self._sums[optimizer] = self.ranks.start_sum(self._gradients(optimizer))

    def step(self, *optimizers: th.optim.Optimizer) -> list[th.Tensor]:
        """Step optimizers along the gradients that :meth:`backward` computed. Gives their norms."""
        norms = []
        for optimizer in optimizers:
            if self.ranks.size > 1:
                self._sums.pop(optimizer)()
            flat = self._active(optimizer)
            if flat is not None:
                norms.append(flat.step())
            else:
                optimizer.step()
                norms.append(nn.utils.get_total_norm(self._gradients(optimizer)))
        return norms

    def _gradients(self, optimizer: th.optim.Optimizer) -> list[th.Tensor]:
        if (flat := self._active(optimizer)) is not None:
            return [flat.flat[1]]
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _active(self, optimizer: th.optim.Optimizer) -> FlatParameters | None:
        """The parameters of an optimizer in one tensor, within an update that has them so."""
        flat = self._flat.get(optimizer)
        return flat if flat is not None and flat.is_active else None
