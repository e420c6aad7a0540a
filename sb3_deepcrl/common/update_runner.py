"""
How the updates of actor and critic run, whatever they compute.
"""

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch as th

from sb3_deepcrl.common.compilation import compile_blocks, compile_pays, set_precision, uncompile_blocks
from sb3_deepcrl.common.cuda_graphs import CudaGraphBackend, GraphedFunction, can_capture, prepare_optimizer
from sb3_deepcrl.common.torch_layers import residual_towers
from sb3_deepcrl.common.tower_kernel import FlatParameters, has_kernel, threads_of_kernel
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK, check_choice

# Name of the actions in a minibatch, next to those of the observations
ACTION_KEY = "__action__"


class UpdateRunner:
    """
    Runs updates in the fastest way that there is: as a CUDA graph, with the kernel for CPUs, or as they are.

    :param update: Function of the observations and actions of a minibatch that returns a tensor, and steps its optimizers by
        :meth:`step`. Nothing in it waits for the device or depends on a value.
    :param policy: Policy with ``actor`` and ``critic``, each with its ``optimizer``, and ``graph_actor``
    :param optimizers: Function that returns all optimizers of an update
    """

    def __init__(
        self,
        update: Callable[[dict[str, th.Tensor], th.Tensor], th.Tensor],
        policy: Any,
        optimizers: Callable[[], list[th.optim.Optimizer]],
    ):
        self.update = update
        self.policy = policy
        self.optimizers = optimizers
        self.towers = residual_towers(policy)
        self.graph: GraphedFunction | None = None
        # Whether the residual blocks are compiled, None if nobody has tried
        self.is_compiled: bool | None = None
        # What the kernel steps, by optimizer
        self._flat: dict[th.optim.Optimizer, FlatParameters] = {}

    def set_up(
        self, compile: bool | str, cuda_graph: bool | str, precision: str, checkpoint_activations: bool, n_updates: int
    ) -> None:
        """
        Choose how networks and updates run, as the arguments of :class:`~sb3_deepcrl.deepcrl.deepcrl.DeepCRL` say.
        ``compile="auto"`` depends on the number of updates ahead.
        """
        check_choice(compile, (True, False, "auto"), "compile")
        check_choice(cuda_graph, (True, False, "auto"), "cuda_graph")
        check_choice(checkpoint_activations, (True, False), "checkpoint_activations")
        device = next(self.policy.parameters()).device
        set_precision(self.policy, precision, device)
        for tower in self.towers:
            tower.checkpoint_activations = checkpoint_activations
        n_layers = n_updates * LAYERS_PER_BLOCK * max(len(tower.blocks) for tower in self.towers)
        if compile is True or (compile == "auto" and compile_pays(device, n_layers)):
            # Tried once, so that there is one warning where it fails
            if self.is_compiled is None:
                self.is_compiled = compile_blocks(self.policy)
        elif compile is False:
            uncompile_blocks(self.policy)
            self.is_compiled = None
        required = cuda_graph is True
        if required and device.type != "cuda":
            raise ValueError(
                f'`cuda_graph=True` needs a GPU, but the device is {device}: leave it at "auto", which is off there'
            )
        backend = CudaGraphBackend(device) if device.type == "cuda" and cuda_graph is not False else None
        self.graph = None
        if backend is not None and can_capture(self.optimizers(), required):
            self.graph = GraphedFunction(self.update_minibatch, backend, required=required)
        self.policy.graph_actor(backend, required)
        self.prepare_optimizers()

    def prepare_optimizers(self) -> None:
        """Let the optimizers step in the graph, or without it: what was loaded into them may come from another device."""
        for optimizer in self.optimizers():
            prepare_optimizer(optimizer, capturable=self.graph is not None)

    def update_minibatch(self, minibatch: dict[str, th.Tensor]) -> th.Tensor:
        """The update, with the actions among the observations."""
        observations = dict(minibatch)
        return self.update(observations, observations.pop(ACTION_KEY))

    def run(self, observations: dict[str, th.Tensor], actions: th.Tensor, key: Hashable = None) -> th.Tensor:
        """
        Do an update on a minibatch. The key is what a graph keeps besides it, see
        :func:`~sb3_deepcrl.common.cuda_graphs.graph_key`.
        """
        if self.graph is not None:
            return self.graph({**observations, ACTION_KEY: actions}, key)
        if not has_kernel(*self.towers):
            return self.update(observations, actions)
        with ExitStack() as stack:
            stack.enter_context(threads_of_kernel())
            networks = {network.optimizer: network for network in (self.policy.actor, self.policy.critic)}
            for optimizer in self.optimizers():
                flat = self._flat.pop(optimizer, None)
                if flat is None or not flat.holds():
                    flat = FlatParameters.make(networks.get(optimizer), optimizer)
                if flat is not None:
                    self._flat[optimizer] = flat
                    stack.enter_context(flat.in_place())
            return self.update(observations, actions)

    def step(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        """Step an optimizer along the gradient of a loss."""
        flat = self._flat.get(optimizer)
        if flat is not None and flat.is_active:
            flat.step(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
