import threading
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sb3_deepcrl import ContrastiveReplayBuffer, DeepCRL, uncompile_blocks
from sb3_deepcrl.common import compilation, cuda_graphs
from sb3_deepcrl.common.compilation import CastParameters, compile_blocks, set_precision, tf32_products
from sb3_deepcrl.common.cuda_graphs import CudaGraphBackend, GraphedFunction, can_capture, prepare_optimizer, set_learning_rate
from sb3_deepcrl.common.losses import info_nce, rowwise_energy
from sb3_deepcrl.common.torch_layers import ResidualTower, frozen, residual_towers
from sb3_deepcrl.common.tower_kernel import FlatParameters, load_kernel
from sb3_deepcrl.deepcrl.deepcrl import UPDATE_METRICS
from tests.envs import GoalReachEnv

needs_compiler = pytest.mark.skipif(
    compilation.why_not_compiled("cpu") is not None, reason=f"torch.compile fails: {compilation.why_not_compiled('cpu')}"
)


def make_model(**kwargs) -> DeepCRL:
    settings = dict(depth=8, width=16, batch_size=32, learning_starts=20, buffer_size=2000, seed=0, device="cpu")
    return DeepCRL("MultiInputPolicy", GoalReachEnv(), **{**settings, **kwargs})


def parameters_after_training(**kwargs) -> th.Tensor:
    model = make_model(**kwargs)
    model.learn(100)
    return th.nn.utils.parameters_to_vector(model.policy.parameters())


def gradients(tower: ResidualTower, x: th.Tensor) -> list[th.Tensor]:
    tower.zero_grad()
    output = tower(x)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in tower.parameters())]


# --- Compile ------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("kwargs", [{}, dict(norm="none", residual_scale="1/N"), dict(residual=False)])
def test_compiled_gradients(kwargs):
    tower = ResidualTower(5, 3, depth=8, width=16, **kwargs).double()
    x = th.randn(6, 5, dtype=th.float64)
    expected = gradients(tower, x)
    assert compile_blocks(tower)
    for actual, wanted in zip(gradients(tower, x), expected, strict=True):
        th.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("depth", [4, 8])
def test_compiled_blocks_are_trained_after_they_were_frozen(depth):
    """An update does so. With PyTorch 2.11 a single block went on as if it were frozen."""
    tower = ResidualTower(5, 3, depth=depth, width=16).double()
    x = th.randn(6, 5, dtype=th.float64)
    expected = gradients(tower, x)
    assert compile_blocks(tower)
    for _ in range(2):
        tower.zero_grad()
        with frozen(tower):
            tower(x.clone().requires_grad_()).sum().backward()
        assert all(parameter.grad is None for parameter in tower.parameters())
        for actual, wanted in zip(gradients(tower, x), expected, strict=True):
            th.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("with_kernel", [True, False])
def test_every_parameter_is_trained(monkeypatch, depth, with_kernel):
    if not with_kernel:
        monkeypatch.setattr(compilation, "load_kernel", lambda: None)
    model = make_model(compile=True, depth=depth)
    before = deepcopy(dict(model.policy.named_parameters()))
    model.learn(60)
    assert [name for name, parameter in model.policy.named_parameters() if th.equal(parameter, before[name])] == []


def test_the_compiler_looks_at_what_is_trained():
    """At the argument that says so, as some versions of PyTorch do not look at the parameters."""
    counter, (block,) = CompileCounter(), ResidualTower(5, 3, depth=4, width=16).blocks
    compiled = th.compile(compilation._block, backend=counter)
    for trained in ("all", "none", "all"):
        compiled(block, th.ones(6, 16), trained)
    assert counter.frame_count == 2


@needs_compiler
def test_one_artifact_for_all_blocks_of_all_towers():
    def graphs_of(depths):
        th._dynamo.reset()
        th._dynamo.utils.counters.clear()
        # In float64, which is PyTorch's to compile everywhere
        towers = th.nn.ModuleList(ResidualTower(5, 3, depth=depth, width=16).double() for depth in depths)
        compile_blocks(towers)
        for tower in towers:
            gradients(tower, th.randn(6, 5, dtype=th.float64, requires_grad=True))
        return th._dynamo.utils.counters["stats"]["unique_graphs"]

    assert 0 < graphs_of([4, 8]) == graphs_of([64, 8, 32])


@needs_compiler
def test_compiled_model_learns_the_same_and_saves_the_same(tmp_path):
    th.testing.assert_close(
        parameters_after_training(compile=True), parameters_after_training(compile=False), rtol=1e-4, atol=1e-5
    )
    model = make_model(compile=True).learn(60)
    observation = model.env.reset()
    for batch in (observation, {key: np.repeat(value, 3, axis=0) for key, value in observation.items()}):
        compiled = model.predict(batch, deterministic=True)[0]
        uncompile_blocks(model.policy)
        np.testing.assert_allclose(model.predict(batch, deterministic=True)[0], compiled, atol=1e-5)
        compile_blocks(model.policy)
    model.save(tmp_path / "model")
    loaded = DeepCRL.load(tmp_path / "model", compile=False)
    assert list(loaded.policy.state_dict()) == list(make_model(compile=False).policy.state_dict())
    np.testing.assert_allclose(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0], atol=1e-5
    )


@needs_compiler
def test_settings_may_change_while_compiled():
    """Nothing is baked into the compiled code."""
    model = make_model(compile=True)
    model.learn(60)
    model.gamma, model.batch_size, model.logsumexp_coef = 0.5, 24, 0.0
    model.lr_schedule = lambda progress: 0.0
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).clone()
    model.train(2, model.batch_size)
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert model.replay_buffer.gamma == 0.5
    model.lr_schedule = lambda progress: 1e-2
    model.train(2, model.batch_size)
    assert not th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))


@needs_compiler
def test_settings_may_change_between_two_calls_of_learn():
    model = make_model(compile=False).learn(40)
    towers = residual_towers(model.policy)
    model.compile, model.precision, model.checkpoint_activations = True, "bfloat16", True
    model.learn(20, reset_num_timesteps=False)
    compiled = [each for tower in towers for each in ([tower] if load_kernel() else tower.blocks)]
    assert all(each._compiled_call_impl is not None for each in compiled)
    assert model.actor.tower.autocast_dtype is th.bfloat16 and model.critic.g_encoder.checkpoint_activations
    model.compile, model.precision, model.checkpoint_activations = False, "float32", False
    model.learn(20, reset_num_timesteps=False)
    assert all(each._compiled_call_impl is None for tower in towers for each in (tower, *tower.blocks))
    assert model.actor.tower.autocast_dtype is None and not model.critic.g_encoder.checkpoint_activations


@needs_compiler
def test_compiler_is_found_without_gradients():
    compilation.why_not_compiled.cache_clear()
    with th.no_grad():
        assert compile_blocks(ResidualTower(5, 3, depth=4, width=16))


def test_without_a_compiler_there_is_one_warning(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(compilation, "load_kernel", lambda: None)
    for function in (compilation.why_not_compiled, compilation.can_compile):
        function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(th, "compile", fail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models = [make_model(compile=True).learn(40) for _ in range(2)]
    for function in (compilation.why_not_compiled, compilation.can_compile):
        function.cache_clear()
    messages = [str(warning.message) for warning in caught if "uncompiled" in str(warning.message)]
    assert len(messages) == 1
    assert "no C++ compiler found" in messages[0] and "compile=False" in messages[0]
    assert all(model._n_updates > 0 for model in models)


# --- Tracing and transforms -----------------------------------------------------------------------------------------------


def parameter_gradients(tower, x):
    parameters = {name: parameter.detach() for name, parameter in tower.named_parameters()}
    return th.func.grad(lambda parameters: functional_call(tower, parameters, (x,)).square().sum())(parameters)


def per_sample_gradients(tower, x):
    parameters = {name: parameter.detach() for name, parameter in tower.named_parameters()}

    def loss(parameters, row):
        return functional_call(tower, parameters, (row[None],)).square().sum()

    return th.func.vmap(th.func.grad(loss), in_dims=(None, 0))(parameters, x)


def ensemble(tower, x):
    parameters = {name: th.stack([parameter, 2 * parameter]) for name, parameter in tower.named_parameters()}
    return th.func.vmap(lambda parameters: functional_call(tower, parameters, (x,)))(parameters)


def forward_mode(tower, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(tower(forward_ad.make_dual(x, th.ones_like(x))))


def jacobian_at_once(tower, x):
    return th.autograd.functional.jacobian(tower, x, vectorize=True)


def number_of_flops(tower, x):
    with FlopCounterMode(display=False) as counter:
        tower(x)
    return th.tensor(counter.get_total_flops())


def products_in_function_mode(tower, x):
    class Count(TorchFunctionMode):
        n = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.n += function is th.nn.functional.linear
            return function(*args, **(kwargs or {}))

    with Count() as mode:
        tower(x)
    return th.tensor(mode.n)


def calls_of_layers(tower, x):
    calls = []
    hook = th.nn.modules.module.register_module_forward_hook(lambda module, *args: calls.append(type(module).__name__))
    tower(x)
    hook.remove()
    return th.tensor(calls.count("Linear"))


def output_in_fake_mode(tower, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = tower(mode.from_tensor(x))
    return th.tensor(output.shape)


def jit_trace(tower, x, **kwargs):
    return th.jit.trace(tower, x[:2], **kwargs)(x)


def jit_trace_without_gradients(tower, x):
    with th.no_grad():
        return jit_trace(tower, x)


TRACERS = {
    "jit.trace": jit_trace,
    "jit.trace, unchecked": lambda tower, x: jit_trace(tower, x, check_trace=False),
    "jit.trace without gradients": jit_trace_without_gradients,
    "export": lambda tower, x: th.export.export(tower, (x,)).module()(x + 1),
    "export, strict": lambda tower, x: th.export.export(tower, (x,), strict=True).module()(x + 1),
    "fx": lambda tower, x: th.fx.symbolic_trace(tower)(x),
    "make_fx": lambda tower, x: make_fx(lambda x: tower(x))(x)(x + 1),
    "compile": lambda tower, x: th.compile(lambda x: 2 * tower(x), backend="eager", fullgraph=True)(x),
    "grad": lambda tower, x: th.func.grad(lambda x: tower(x).square().sum())(x),
    "grad of parameters": parameter_gradients,
    "vmap": lambda tower, x: th.func.vmap(tower)(x),
    "vmap over grad": per_sample_gradients,
    "vmap over parameters": ensemble,
    "jvp": lambda tower, x: th.func.jvp(tower, (x,), (th.ones_like(x),)),
    "hessian": lambda tower, x: th.func.hessian(lambda x: tower(x).sum())(x[0]),
    "forward mode": forward_mode,
    "functional_call": lambda tower, x: functional_call(tower, {"blocks.0.branch.3.weight": th.ones(16, 16)}, (x,)),
    "jacobian": jacobian_at_once,
    "dispatch mode": number_of_flops,
    "function mode": products_in_function_mode,
    "fake tensors": output_in_fake_mode,
    "global hook": calls_of_layers,
    "negated memory": lambda tower, x: tower.blocks(th._neg_view(th.ones(2, 16))),
}


def all_tensors(values) -> list[th.Tensor]:
    return [leaf.detach() for leaf in tree_leaves(values)]


@needs_compiler
# Blocks of the C++ kernel, where there is one, and blocks of torch.compile
@pytest.mark.parametrize("activation_fn", [th.nn.SiLU, th.nn.Tanh])
@pytest.mark.parametrize("name", TRACERS)
def test_what_traces_or_transforms_sees_the_plain_blocks(name, activation_fn):
    if name == "jacobian" and (activation_fn is not th.nn.SiLU or load_kernel() is None):
        pytest.skip("PyTorch cannot batch the backward pass of its compiled code")
    th.manual_seed(0)
    tower = ResidualTower(5, 3, depth=8, width=16, activation_fn=activation_fn)
    plain, x = deepcopy(tower), th.randn(4, 5)
    compile_blocks(tower)
    expected = TRACERS[name](plain, x)
    th.testing.assert_close(all_tensors(TRACERS[name](tower, x)), all_tensors(expected), rtol=1e-4, atol=1e-4)
    # And the compiled ones again
    th.testing.assert_close(tower(x), plain(x), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_trained_policy_can_be_traced():
    model = make_model(compile=True).learn(60)
    observation = {key: th.as_tensor(value, dtype=th.float32) for key, value in model.env.reset().items()}

    class Deterministic(th.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, observation):
            return self.policy(observation, deterministic=True)

    traced = th.jit.trace(Deterministic(model.policy), (observation,))
    other = {key: value + 1 for key, value in observation.items()}
    with th.no_grad():
        expected = model.policy(other, deterministic=True)
    th.testing.assert_close(traced(other).detach(), expected)


@needs_compiler
@pytest.mark.parametrize("activation_fn", [th.nn.SiLU, th.nn.Tanh])
def test_hooks_of_layers_are_called(activation_fn):
    """Also those that change something, as `prune` does, and those that were there when it was compiled."""
    tower = ResidualTower(5, 3, depth=4, width=16, activation_fn=activation_fn)
    prune.l1_unstructured(tower.blocks[0].branch[3], "weight", amount=0.5)
    compile_blocks(tower)
    x = th.randn(4, 5)
    with th.no_grad():
        tower.blocks[0].branch[3].weight_orig.add_(1)
    outputs = [tower(x), th.compile(tower, backend="eager")(x)]
    uncompile_blocks(tower)
    for output in outputs:
        th.testing.assert_close(output, tower(x))


def test_losses_are_one_graph():
    """Neither loss waits for the device, branches on a value or leaves PyTorch: they trace without a break."""
    model = make_model().learn(40)
    observations, actions = model.replay_buffer.sample_contrastive(16)

    def losses(observations, actions):
        features = model.critic.extract_state_features(observations)
        goals = model.critic.encode_goal(observations)
        actor_loss, log_prob, ent_coef, output = model._actor_loss(observations, features.detach(), goals.detach(), actions)
        return actor_loss, log_prob, ent_coef, output, model._critic_loss(features, actions, goals)[0]

    th._dynamo.reset()
    traced = th.compile(losses, backend="eager", fullgraph=True)
    th.manual_seed(0)
    expected = losses(observations, actions)
    th.manual_seed(0)
    for actual, wanted in zip(traced(observations, actions), expected, strict=True):
        th.testing.assert_close(actual, wanted)


class TraceableAdam:
    """
    Steps like the optimizer it is made of. PyTorch keeps tracing out of ``Optimizer.zero_grad`` and puts breaks around
    ``Optimizer.step`` (see ``_use_grad_for_differentiable`` in ``torch/optim/optimizer.py``), whatever is inside of them.
    """

    def __init__(self, optimizer):
        (group,) = optimizer.param_groups
        self.parameters, self.lr, (self.beta1, self.beta2), self.eps = (
            group[name] for name in ("params", "lr", "betas", "eps")
        )
        self.states = [optimizer.state[parameter] for parameter in self.parameters]
        self.param_groups = [{"params": self.parameters}]

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        with th.no_grad():
            adam(
                self.parameters,
                [parameter.grad for parameter in self.parameters],
                *([state[name] for state in self.states] for name in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in self.states],
                foreach=True,
                capturable=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=self.lr,
                weight_decay=0.0,
                eps=self.eps,
                maximize=False,
            )


@pytest.mark.skipif(not hasattr(th._dynamo.config, "trace_autograd_ops"), reason="this PyTorch traces no backward pass")
def test_update_is_one_graph(monkeypatch):
    """
    Forward passes, backward passes and steps of Adam trace without a break, and the graph does the same. Three things are
    left out because PyTorch traces none of them: what ``TraceableAdam`` stands for, and the change of ``requires_grad`` in
    ``frozen``, which only saves work.
    """
    model = make_model(depth=4).learn(64)
    observations, actions = model.replay_buffer.sample_contrastive(16)
    prepared = [model, deepcopy(model)]
    for one in prepared:
        for optimizer in one._optimizers():
            prepare_optimizer(optimizer, capturable=False)
    expected = []
    th.manual_seed(0)
    for _ in range(3):
        expected.append(prepared[0]._update(observations, actions))

    monkeypatch.setattr("sb3_deepcrl.deepcrl.deepcrl.frozen", lambda module: nullcontext())
    traced = prepared[1]
    for optimizer in traced._optimizers():
        prepare_optimizer(optimizer, capturable=True)
    for owner in (traced.actor, traced.critic):
        owner.optimizer = TraceableAdam(owner.optimizer)
    traced.ent_coef_optimizer = TraceableAdam(traced.ent_coef_optimizer)
    th._dynamo.reset()
    update = th.compile(traced._update, backend="eager", fullgraph=True)
    th.manual_seed(0)
    with th._dynamo.config.patch(trace_autograd_ops=True):
        for wanted in expected:
            th.testing.assert_close(update(observations, actions), wanted, rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(traced.policy.parameters(), prepared[0].policy.parameters(), strict=True):
        th.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(compile="yes"), "compile"),
        (dict(compile=1), "compile"),
        (dict(cuda_graph="on"), "cuda_graph"),
        (dict(cuda_graph=True), "needs a GPU"),
        (dict(precision="float16"), "precision"),
    ],
)
def test_wrong_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_model(**kwargs)


def reference_update(model: DeepCRL, observations: dict[str, th.Tensor], actions: th.Tensor) -> None:
    """One update as the paper's code does it: a forward pass for each loss, nothing shared, nothing frozen."""
    actor, critic = model.actor, model.critic
    state, goal = critic.extract_state_features(observations), observations["desired_goal"]
    # The actor takes the goals of the next transition for the first rows
    n_random = int(model.random_goals * len(actions))
    rows = th.arange(len(actions))
    rows[:n_random] = (rows[:n_random] + 1) % len(actions)
    mean, log_std = actor.get_action_dist_params({**observations, "desired_goal": goal[rows]})
    normal = th.distributions.Normal(mean, log_std.exp())
    before_squashing = mean + log_std.exp() * th.randn_like(mean)
    actions_pi = before_squashing.tanh()
    log_prob = (normal.log_prob(before_squashing) - th.log1p(-actions_pi.square())).sum(1)
    ent_coef = model.log_ent_coef.detach().exp()
    distance = (critic.sa_encoder(th.cat([state, actions_pi], 1)) - critic.g_encoder(goal[rows])).norm(dim=1)
    actor.optimizer.zero_grad()
    (ent_coef * log_prob + distance).mean().backward()
    actor.optimizer.step()

    model.ent_coef_optimizer.zero_grad()
    (-model.log_ent_coef.exp() * (log_prob.detach() + model.target_entropy)).mean().backward()
    model.ent_coef_optimizer.step()

    logits = -th.cdist(
        critic.sa_encoder(th.cat([state, actions], 1)),
        critic.g_encoder(goal),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    loss = th.nn.functional.cross_entropy(logits, th.arange(len(actions)))
    critic.optimizer.zero_grad()
    (loss + model.logsumexp_coef * logits.logsumexp(1).square().mean()).backward()
    critic.optimizer.step()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("kwargs", [dict(random_goals=0.0), dict(), dict(checkpoint_activations=True)])
def test_update_equals_the_reference(monkeypatch, kwargs, compiled):
    """Both from the same parameters, in float64, several steps of Adam: parameters, temperature and gradients agree."""
    model, reference = (make_model(compile=False, **kwargs).learn(40) for _ in range(2))
    # It makes float32 of everything
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda obs, *args, **kwargs: obs)
    batch, actions = model.replay_buffer.sample_contrastive(3 * 16)
    batch, actions = {key: value.double() for key, value in batch.items()}, actions.double()
    noise = th.randn(3, 16, actions.shape[1], dtype=th.float64)
    for one in (model, reference):
        one.policy.double()
        one.log_ent_coef = th.log(th.full((1,), 0.1, dtype=th.float64)).requires_grad_()
        for owner, parameters in ((one.actor, one.actor.parameters()), (one.critic, one.critic.parameters())):
            owner.optimizer = th.optim.Adam(parameters, lr=1e-3)
        one.ent_coef_optimizer = th.optim.Adam([one.log_ent_coef], lr=1e-3)
    if compiled:
        assert compile_blocks(model.policy)
    for k in range(3):
        rows = slice(16 * k, 16 * (k + 1))
        monkeypatch.setattr(th, "randn_like", lambda mean, k=k: noise[k])
        observations = {key: value[rows] for key, value in batch.items()}
        model._update(observations, actions[rows])
        reference_update(reference, observations, actions[rows])
        for owner in ("actor", "critic"):
            for actual, wanted in zip(getattr(model, owner).parameters(), getattr(reference, owner).parameters(), strict=True):
                if owner == "critic" or actual.grad is not None:
                    th.testing.assert_close(actual.grad, wanted.grad, rtol=1e-7, atol=1e-10)
                th.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-8)
    th.testing.assert_close(model.log_ent_coef, reference.log_ent_coef, rtol=1e-9, atol=1e-12)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------------


class StandInGraph:
    """Has the interface of ``th.cuda.CUDAGraph``: a replay does again what was captured, at the same addresses."""

    def __init__(self, function, output):
        self.function, self.output, self.n_replays, self.is_reset = function, output, 0, False

    def replay(self):
        assert not self.is_reset
        self.n_replays += 1
        self.output.copy_(self.function())

    def reset(self):
        self.is_reset = True


class StandInBackend:
    """Capturing does nothing but record, as on a GPU."""

    device = th.device("cpu")
    n_failures = 0

    def __init__(self, example_output):
        self.example_output, self.graphs, self.n_warm_ups = example_output, [], 0

    def __deepcopy__(self, memo):
        # As there is one for a device
        return self

    @contextmanager
    def warm_up(self):
        self.n_warm_ups += 1
        yield

    def capture(self, function):
        output = th.full_like(self.example_output, float("nan"))
        self.graphs.append(StandInGraph(function, output))
        return self.graphs[-1], output


def test_a_graph_is_no_part_of_what_is_traced(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "N_WARM_UP", 0)
    backend = StandInBackend(th.empty(3))
    graphed = GraphedFunction(lambda inputs: 2 * inputs["x"], backend)
    traced = th.jit.trace(lambda x: graphed({"x": x}), th.ones(3), check_trace=False)
    assert traced(th.full((3,), 2.0)).tolist() == [4, 4, 4] and not backend.graphs


def test_graphed_function_goes_from_warm_up_to_replay():
    calls = []

    def double(inputs):
        calls.append(inputs["x"].data_ptr())
        return 2 * inputs["x"]

    backend = StandInBackend(th.empty(3))
    graphed = GraphedFunction(double, backend)
    results = []
    for i in range(6):
        results.append(graphed({"x": th.full((3,), float(i))}))
    # Each call does its work once, and later ones leave its result alone
    assert len(calls) == 6
    assert [result[0].item() for result in results] == [0, 2, 4, 6, 8, 10]
    assert (backend.n_warm_ups, len(backend.graphs), backend.graphs[0].n_replays) == (3, 1, 3)
    # Replays read from the same address
    assert len(set(calls[3:])) == 1


@pytest.mark.parametrize("change", ["shape", "dtype", "key", "invalidate", "failure"])
def test_graphed_function_captures_anew(change):
    backend = StandInBackend(th.empty(()))
    graphed = GraphedFunction(lambda inputs: inputs["x"].sum().float(), backend)
    for _ in range(5):
        graphed({"x": th.ones(4)}, key="a")
    old = backend.graphs[0]
    assert not old.is_reset
    if change == "invalidate":
        graphed.invalidate()
        assert old.is_reset
    if change == "failure":  # of the capture of another function
        backend.n_failures += 1
    changed = {"shape": th.ones(5), "dtype": th.ones(4, dtype=th.float64)}.get(change, th.ones(4))
    for _ in range(5):
        result = graphed({"x": changed}, key="b" if change == "key" else "a")
    assert result.item() == len(changed)
    assert (backend.n_warm_ups, len(backend.graphs), backend.graphs[1].n_replays) == (6, 2, 2)
    # Each of a few shapes has its own graph
    assert old.is_reset == (change in ("key", "invalidate", "failure")) and old.n_replays == 2
    if not old.is_reset:
        for _ in range(4):
            graphed({"x": th.ones(4)}, key="a")
            graphed({"x": changed}, key="a")
        assert len(backend.graphs) == 2 and old.n_replays == backend.graphs[1].n_replays == 6
        # But not each of many
        for n in range(10, 20):
            for _ in range(4):
                graphed({"x": th.ones(n)}, key="a")
        assert sum(not one.is_reset for one in backend.graphs) <= cuda_graphs.MAX_GRAPHS


@pytest.mark.parametrize("required", [False, True])
def test_what_cannot_be_captured_runs_as_it_is(required):
    class RefusingBackend(StandInBackend):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedFunction(lambda inputs: 2 * inputs["x"], RefusingBackend(th.empty(3)), required=required)
    for _ in range(3):
        graphed({"x": th.ones(3)})
    if required:
        with pytest.raises(RuntimeError, match="not permitted"):
            graphed({"x": th.ones(3)})
        return
    with pytest.warns(UserWarning, match="not permitted.*cuda_graph=False"):
        result = graphed({"x": th.ones(3)})
    assert result.tolist() == [2, 2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphed({"x": th.full((3,), 2.0)}).tolist() == [4, 4, 4]


def test_too_little_memory_for_a_capture_is_not_for_good(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CALLS_WITHOUT_MEMORY", 10)

    class ShortBackend(StandInBackend):
        n_bytes = 0

        def capture(self, function):
            if self.n_bytes > 0:
                return super().capture(function)
            self.n_failures += 1
            try:
                raise th.OutOfMemoryError("CUDA out of memory")
            finally:
                # What the end of such a capture may raise
                raise RuntimeError("operation failed due to a previous error during capture")

    backend = ShortBackend(th.empty(3))
    graphed = GraphedFunction(lambda inputs: 2 * inputs["x"], backend)
    with pytest.warns(UserWarning, match="there is too little memory"):
        results = [graphed({"x": th.full((3,), float(i))})[0].item() for i in range(4)]
    backend.n_bytes = 1
    results += [graphed({"x": th.full((3,), float(i))})[0].item() for i in range(4, 16)]
    assert results == [2.0 * i for i in range(16)]
    assert len(backend.graphs) == 1 and backend.graphs[0].n_replays == 2


def test_what_runs_elsewhere_is_not_captured():
    backend = StandInBackend(th.empty(3))
    backend.device = th.device("cuda")
    graphed = GraphedFunction(lambda inputs: 2 * inputs["x"], backend)
    assert [graphed({"x": th.full((3,), float(i))})[0].item() for i in range(5)] == [0, 2, 4, 6, 8]
    assert not backend.graphs and not backend.n_warm_ups


class FakeCuda:
    """Streams that do nothing but remember who waits for whom, and a capture whose end fails as PyTorch's does."""

    def __init__(self, monkeypatch):
        self.waits, self.modes, self.generators = [], [], [self]
        cuda = self

        class Stream:
            device = th.device("cuda", 0)

            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                cuda.waits.append((self, other))

        class Graph:
            def __init__(self, graph, stream, capture_error_mode):
                cuda.modes.append(capture_error_mode)
                self.stream = stream

            def __enter__(self):
                cuda.current = self.stream

            def __exit__(self, *exception):
                raise RuntimeError("operation failed due to a previous error during capture")

        @contextmanager
        def stream(stream):
            before, cuda.current = cuda.current, stream
            yield
            cuda.current = before

        self.default = self.current = Stream()
        for name, value in dict(
            Stream=Stream,
            stream=stream,
            graph=Graph,
            CUDAGraph=object,
            current_stream=lambda device: cuda.current,
            set_stream=lambda stream: setattr(cuda, "current", stream),
            default_generators=self.generators,
        ).items():
            monkeypatch.setattr(th.cuda, name, value)

    # The generator
    def clone_state(self):
        return "clean"

    def graphsafe_set_state(self, state):
        self.generators.append(state)


@pytest.mark.parametrize("in_function", [False, True])
def test_a_failed_capture_leaves_no_trace(monkeypatch, in_function):
    """Stream and generator are as before, as are those of the branches, and gradients are gone."""
    model = make_model().learn(40)
    cuda = FakeCuda(monkeypatch)
    backend = CudaGraphBackend(th.device("cpu"))
    model._runner.graph = GraphedFunction(model._runner.update_minibatch, backend, required=True)
    observations, actions = model.replay_buffer.sample_contrastive(16)
    for _ in range(3):
        model._runner.run(observations, actions)
    assert cuda.waits[-1] == (cuda.default, backend.stream) and cuda.current is cuda.default
    if in_function:
        monkeypatch.setattr(model.critic, "extract_state_features", lambda obs: 1 / 0)
    with pytest.raises(RuntimeError, match="during capture"):
        model._runner.run(observations, actions)
    assert cuda.current is cuda.default and cuda.generators[1:] == ["clean"] and cuda.modes == ["thread_local"]
    assert backend.n_failures == 1
    assert all(branch.stream is None for branch in cuda_graphs.BRANCHES)
    assert all(parameter.grad is None for parameter in model.policy.parameters())


def test_branches_of_an_update(monkeypatch):
    """What runs beside what, and that nothing is read before it is there. The outcome does not depend on it."""
    plain, branched = (make_model(compile=False).learn(40) for _ in range(2))
    observations, actions = plain.replay_buffer.sample_contrastive(16)
    th.manual_seed(0)
    expected = plain._runner.run(observations, actions)
    cuda = FakeCuda(monkeypatch)
    backend = CudaGraphBackend(th.device("cpu"))
    goals, critic = backend._side_streams
    done = []

    def note(name):
        done.append((name, {cuda.default: "main", goals: "goals", critic: "critic"}[cuda.current], list(cuda.waits)))

    for name, tower in (
        ("actor", branched.actor.tower),
        ("pairs", branched.critic.sa_encoder),
        ("goals", branched.critic.g_encoder),
    ):
        tower.register_forward_pre_hook(lambda *_, name=name: note(name))
    for name, owner in (("step of the actor", branched.actor), ("step of the critic", branched.critic)):
        owner.optimizer.register_step_pre_hook(lambda *_, name=name: note(name))
    monkeypatch.setattr("sb3_deepcrl.deepcrl.deepcrl.rowwise_energy", lambda *args: note("values") or rowwise_energy(*args))
    monkeypatch.setattr(
        "sb3_deepcrl.deepcrl.deepcrl.info_nce", lambda *args, **kwargs: note("loss") or info_nce(*args, **kwargs)
    )
    th.manual_seed(0)
    with backend._branching():
        # Whatever other threads do meanwhile, for instance another trial of a search
        streams = []
        thread = threading.Thread(target=lambda: streams.extend(branch.stream for branch in cuda_graphs.BRANCHES))
        thread.start()
        thread.join()
        actual = branched._runner.run(observations, actions)
    assert streams == [None, None]
    assert [(name, where) for name, where, _ in done] == [
        ("goals", "goals"),
        ("actor", "main"),
        ("pairs", "main"),
        ("values", "main"),
        ("pairs", "critic"),
        ("loss", "critic"),
        ("step of the actor", "main"),
        ("step of the critic", "main"),
    ]
    waits = {name: waits for name, _, waits in done}
    # The actor waits for nobody, and the branches for nothing but the features
    assert waits["actor"] == [(goals, cuda.default), (critic, cuda.default)]
    assert waits["values"][2:] == [(cuda.default, goals)]
    assert waits["loss"][3:] == [(critic, goals)]
    assert set(waits["step of the critic"][4:]) == {(cuda.default, goals), (cuda.default, critic)}
    assert th.equal(actual, expected)
    for one, other in zip(branched.policy.parameters(), plain.policy.parameters(), strict=True):
        assert th.equal(one, other)


ON_A_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")]
)


def make_graphed_model(device, **kwargs) -> DeepCRL:
    """On the CPU, graphs are stand-ins."""
    model = make_model(device=device, **kwargs).learn(40)
    if device == "cpu":
        graph(model)
        model.policy.graph_actor(StandInBackend(th.empty(1, 2)))
    return model


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_noise_under_replay(device):
    """Random numbers of replays differ, and are those of the generator that the seed sets."""
    model = make_graphed_model(device, learning_rate=0.0)
    observation = model.env.reset()
    observations, actions = model.replay_buffer.sample_contrastive(16)

    def draw(seed):
        model.set_random_seed(seed)
        drawn = [model.predict(observation)[0].tolist() for _ in range(4)]
        # The entropy depends on the actions of the actor
        return drawn, [model._runner.run(observations, actions)[3].item() for _ in range(4)]

    draw(0)
    first, again, other = draw(1), draw(1), draw(2)
    assert all(isinstance(one, cuda_graphs._Captured) for one in model._runner.graph.graphs.values())
    assert first == again
    for drawn in (first[0] + other[0], first[1] + other[1]):
        assert len(drawn) == len({str(one) for one in drawn}) == 8


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_models_with_graphs_can_be_copied(device):
    model = make_graphed_model(device)
    copied = deepcopy(model)
    assert copied._runner.graph is not model._runner.graph and copied._runner.graph.backend is model._runner.graph.backend
    assert not copied._runner.graph.graphs
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).clone()
    copied.train(5, 16)
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert not th.equal(before, th.nn.utils.parameters_to_vector(copied.policy.parameters()))
    observation = model.env.reset()
    policy = deepcopy(model.policy)
    for _ in range(5):
        actions = policy.predict(observation, deterministic=True)[0]
        np.testing.assert_allclose(actions, model.predict(observation, deterministic=True)[0], atol=1e-5)


@needs_compiler
def test_copies_stay_compiled():
    model = make_model(compile=True).learn(40)
    copied = deepcopy(model)
    for tower, original in zip(residual_towers(copied.policy), residual_towers(model.policy), strict=True):
        for one, other in ((tower, original), *zip(tower.blocks, original.blocks, strict=True)):
            assert type(one._compiled_call_impl) is type(other._compiled_call_impl)
            assert one._compiled_call_impl is None or one._compiled_call_impl is not other._compiled_call_impl
    model.train(2, 16)
    before = th.nn.utils.parameters_to_vector(copied.policy.parameters())
    copied.train(2, 16)
    assert not th.equal(before, th.nn.utils.parameters_to_vector(copied.policy.parameters()))


def test_nothing_is_compiled_before_it_is_needed(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("takes time")

    for name in ("load_kernel", "can_compile", "compile_blocks"):
        monkeypatch.setattr(compilation, name, refuse)
    monkeypatch.setattr("sb3_deepcrl.common.update_runner.compile_blocks", refuse)
    model = make_model(compile=True)
    model.predict(model.env.reset())
    model.save(tmp_path / "model")
    DeepCRL.load(tmp_path / "model").predict(model.env.reset())
    with pytest.raises(AssertionError, match="takes time"):
        model.learn(40)


def test_training_mode_of_all_modules():
    class Extractor(CombinedExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.kept = Kept()

    class Kept(th.nn.Module):
        def train(self, mode=True):
            return super().train(False)

    policy = make_model(policy_kwargs=dict(features_extractor_class=Extractor)).policy
    for mode in (True, False, True):
        policy.set_training_mode(mode)
        modes = {type(module): module.training for module in policy.modules()}
        assert modes.pop(Kept) is False and set(modes.values()) == {mode} and len(modes) > 8


def test_optimizer_that_cannot_be_captured():
    assert can_capture(make_model()._optimizers())
    optimizers = make_model(policy_kwargs=dict(optimizer_class=th.optim.SGD))._optimizers()
    assert not can_capture(optimizers)
    with pytest.raises(ValueError, match="SGD"):
        can_capture(optimizers, required=True)


def graph(model: DeepCRL) -> StandInBackend:
    """Give the model's updates to a stand-in, as ``UpdateRunner`` gives them to CUDA."""
    n_metrics = len(UPDATE_METRICS) + (model.ent_coef_optimizer is not None)
    backend = StandInBackend(th.empty(n_metrics))
    model._runner.graph = GraphedFunction(model._runner.update_minibatch, backend)
    return backend


def test_graphed_updates_are_the_same_updates():
    plain, graphed = (make_model().learn(40) for _ in range(2))
    backend = graph(graphed)
    for model in (plain, graphed):
        model.set_random_seed(1)
        for _ in range(4):
            model.train(4, 32)
    for actual, wanted in zip(graphed.policy.parameters(), plain.policy.parameters(), strict=True):
        assert th.equal(actual, wanted)
    assert len(backend.graphs) == 1 and backend.graphs[0].n_replays == 13


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "logsumexp_coef", 0.2),
        lambda model: setattr(model, "random_goals", 0.0),
        lambda model: setattr(model, "target_entropy", -3.0),
        lambda model: setattr(model, "contrastive_loss", "backward"),
        lambda model: model.actor.mu.bias.requires_grad_(False),
        lambda model: model.critic.optimizer.param_groups[0].update(betas=(0.8, 0.99)),
        lambda model: model.set_parameters(deepcopy(model.get_parameters())),
    ],
)
def test_graph_is_captured_anew_when_what_it_keeps_changes(monkeypatch, change):
    model = make_model().learn(40)
    backend = graph(model)
    # The stand-in captures what PyTorch's optimizers refuse to do on a CPU
    monkeypatch.setattr("sb3_deepcrl.common.update_runner.prepare_optimizer", lambda *args, **kwargs: None)
    model.train(5, 32)
    model.train(5, 32)
    assert len(backend.graphs) == 1
    change(model)
    model.train(5, 32)
    assert backend.graphs[0].is_reset and len(backend.graphs) == 2


@pytest.mark.parametrize("ent_coef", [0.1, "auto"])
def test_graph_is_captured_anew_for_another_temperature(ent_coef):
    """The tensor itself, not its value, which a graph reads."""
    model = make_model(ent_coef=ent_coef).learn(40)
    backend = graph(model)
    model.train(5, 32)
    if ent_coef == "auto":
        model.log_ent_coef = model.log_ent_coef.detach().clone().requires_grad_()
    else:
        model.ent_coef_tensor = th.tensor(0.5)
    model.train(5, 32)
    assert backend.graphs[0].is_reset and len(backend.graphs) == 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_graphed_policy_acts_the_same(deterministic):
    model = make_model().learn(40)
    observation = model.env.reset()
    th.manual_seed(0)
    expected = [model.predict(observation, deterministic=deterministic)[0] for _ in range(6)]
    backend = StandInBackend(th.empty(1, 2))
    model.policy.graph_actor(backend)
    th.manual_seed(0)
    for wanted in expected:
        np.testing.assert_array_equal(model.predict(observation, deterministic=deterministic)[0], wanted)
    assert len(backend.graphs) == 1 and backend.graphs[0].n_replays == 3
    # Another head at another address
    with th.no_grad():
        model.actor.mu.weight.data = th.zeros_like(model.actor.mu.weight)
        model.actor.mu.bias.data = th.zeros_like(model.actor.mu.bias)
    for _ in range(4):
        actions = model.predict(observation, deterministic=deterministic)[0]
    assert len(backend.graphs) == 2 and backend.graphs[0].is_reset
    if deterministic:
        assert not actions.any()


def test_graph_reads_the_learning_rate():
    model = make_model().learn(40)
    backend = graph(model)
    for optimizer in model._optimizers():
        optimizer.param_groups[0]["lr"] = th.tensor(1e-3)
    model.train(5, 32)
    assert len(backend.graphs) == 1
    model.lr_schedule = lambda progress: 0.0
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).clone()
    model.train(5, 32)
    assert len(backend.graphs) == 1
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))


def test_optimizers_change_between_captured_and_not():
    parameter = th.nn.Parameter(th.ones(3))
    optimizer = th.optim.Adam([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    prepare_optimizer(optimizer, capturable=True)
    group = optimizer.param_groups[0]
    assert group["capturable"] and isinstance(group["lr"], th.Tensor)
    address = group["lr"].data_ptr()
    set_learning_rate(optimizer, 0.2)
    assert group["lr"].data_ptr() == address and group["lr"].item() == pytest.approx(0.2)
    # As after loading on a CPU what was saved on a GPU
    fresh = th.optim.Adam([parameter], lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    prepare_optimizer(fresh, capturable=False)
    group = fresh.param_groups[0]
    assert not group["capturable"] and isinstance(group["lr"], float) and group["lr"] == pytest.approx(0.2)
    assert fresh.state[parameter]["step"].item() == 1
    parameter.sum().backward()
    fresh.step()
    assert fresh.state[parameter]["step"].item() == 2


def test_graphs_serve_several_calls_of_learn(monkeypatch):
    """With all that they read, for instance copies of parameters; until something else is asked for."""
    model = make_model(precision="bfloat16", compile=False)
    runner, made = model._runner, []
    monkeypatch.setattr(runner, "_set_up_graphs", lambda *args: made.append(args))
    model.learn(40)
    cast = runner._cast = CastParameters(runner.towers)
    model.learn(20, reset_num_timesteps=False)
    assert len(made) == 1 and runner._cast is cast
    model.checkpoint_activations, runner._cast = True, None
    model.learn(20, reset_num_timesteps=False)
    assert len(made) == 2


def test_update_keeps_nothing():
    """No tensor outlives an update but parameters, their gradients and the state of the optimizers."""
    import gc

    model = make_model().learn(60)

    def count():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if isinstance(thing, th.Tensor))

    model.train(2, 32)
    before = count()
    for _ in range(3):
        model.train(2, 32)
    assert count() == before


@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("device", [ON_A_GPU])
def test_cuda_graphs_on_a_gpu(device, depth, tmp_path, monkeypatch):
    # Without noise both do the same updates on the same minibatches
    monkeypatch.setattr(th, "randn_like", lambda x: x.new_zeros(x.shape))
    models = [make_model(device=device, depth=depth, cuda_graph=graph).learn(40) for graph in (False, True)]
    models[1].set_parameters(deepcopy(models[0].get_parameters()))
    models[1].replay_buffer = deepcopy(models[0].replay_buffer)
    for model in models:
        model.set_random_seed(0)
        model.train(20, 32)
    assert models[1]._runner._is_compiled
    assert isinstance(next(iter(models[1]._runner.graph.graphs.values())), cuda_graphs._Captured)
    assert models[0]._runner.graph is None
    for actual, wanted in zip(models[1].policy.parameters(), models[0].policy.parameters(), strict=True):
        th.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    # One graph serves all calls of learn()
    graphs = dict(models[1]._runner.graph.graphs)
    models[1].learn(20, reset_num_timesteps=False)
    assert models[1]._runner.graph.graphs == graphs
    observation = models[1].env.reset()
    for _ in range(5):
        actions = models[1].predict(observation, deterministic=True)[0]
    models[1].save(tmp_path / "model")
    for device in ("cpu", "cuda"):
        loaded = DeepCRL.load(tmp_path / "model", env=GoalReachEnv(), device=device)
        np.testing.assert_allclose(loaded.predict(observation, deterministic=True)[0], actions, atol=1e-4)
        loaded.learn(60)


@pytest.mark.parametrize("device", [ON_A_GPU])
def test_a_failed_capture_on_a_gpu(device):
    """A read of a value cannot be captured. The process goes on, and so does the next capture."""

    def read(inputs):
        return inputs["x"] * float(inputs["x"].sum()) + th.randn_like(inputs["x"])

    backend = cuda_graphs.cuda_graph_backend(th.device(device, 0))
    graphed, x = GraphedFunction(read, backend), th.ones(4, device=device)
    with pytest.warns(UserWarning, match="cannot be captured"):
        results = [graphed({"x": x}) for _ in range(5)]
    assert th.cuda.current_stream() == th.cuda.default_stream()
    assert th.isfinite(th.stack([*results, th.randn(4, device=device)])).all()
    graphed = GraphedFunction(lambda inputs: inputs["x"] + th.randn_like(inputs["x"]), backend)
    results = [graphed({"x": x}).tolist() for _ in range(6)]
    assert results[4] != results[5] and isinstance(*graphed.graphs.values(), cuda_graphs._Captured)


# --- Precision and memory -----------------------------------------------------------------------------------------------


def test_bfloat16_multiplies_only():
    tower = ResidualTower(5, 3, depth=8, width=16)
    x = th.randn(6, 5)
    exact = gradients(tower, x)
    set_precision(tower, "bfloat16", th.device("cpu"))
    dtypes = []
    tower.blocks[0].branch[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    tower.blocks[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    rounded = gradients(tower, x)
    assert dtypes == [th.bfloat16, th.float32]
    for actual, wanted in zip(rounded, exact, strict=True):
        assert actual.dtype == th.float32
        assert not th.equal(actual, wanted)
        assert (actual - wanted).norm() < 0.05 * wanted.norm()
    set_precision(tower, "float32", th.device("cpu"))
    assert all(map(th.equal, gradients(tower, x), exact))


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_follows_the_hardware(monkeypatch, native):
    monkeypatch.setattr(compilation, "has_native_bfloat16", lambda: native)
    tower = ResidualTower(5, 3, depth=4, width=16)
    assert not set_precision(tower, "auto", th.device("cpu"))
    assert tower.autocast_dtype is (th.bfloat16 if native else None)
    assert set_precision(tower, "auto", th.device("cuda"))
    assert tower.autocast_dtype is None


def test_tf32_is_for_products_of_an_update_but_those_of_the_loss(monkeypatch):
    model = make_model(precision="tf32", compile=False).learn(40)
    assert not model._runner._tf32
    model._runner._tf32 = set_precision(model.policy, "tf32", th.device("cuda"))
    found = {}

    def note(name):
        found.setdefault(name, set()).add(th.get_float32_matmul_precision())

    for name, module in (("actor", model.actor.tower), ("critic", model.critic.g_encoder)):
        module.register_full_backward_hook(lambda *_, name=name: note(name))
    monkeypatch.setattr(
        "sb3_deepcrl.deepcrl.deepcrl.info_nce", lambda *args, **kwargs: note("loss") or info_nce(*args, **kwargs)
    )
    observations, actions = model.replay_buffer.sample_contrastive(16)
    model._runner.run(observations, actions)
    assert found == {"actor": {"high"}, "critic": {"high"}, "loss": {"highest"}}
    assert th.get_float32_matmul_precision() == "highest"
    # Also if somebody used the newer interface of PyTorch, which the older one does not understand
    th.backends.cuda.matmul.fp32_precision = "tf32"
    with tf32_products(False):
        assert th.backends.cuda.matmul.fp32_precision == "ieee"
    assert th.backends.cuda.matmul.fp32_precision == "tf32"
    th.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("capturing", [False, True])
def test_nothing_is_laid_out_while_a_graph_is_captured(monkeypatch, capturing):
    """Parameters would move, and counts of steps, which a loaded optimizer has on the GPU, are read."""
    model, tried = make_model(), []
    graph(model).device = th.device("cuda")
    monkeypatch.setattr("sb3_deepcrl.common.update_runner.FlatParameters.make", lambda *args: tried.append(args))
    monkeypatch.setattr(th.cuda, "is_current_stream_capturing", lambda: capturing)
    model._runner._lay_out()
    assert len(tried) == (0 if capturing else 3) and not model._runner._flat


@pytest.mark.parametrize("flat", [False, True])
def test_parameters_are_cast_once_for_an_update(monkeypatch, flat):
    """
    As on GPUs: the same updates as those of autocast, and neither parameters nor their optimizers notice. There, parameters
    are stepped as one tensor.
    """
    plain, cast = (make_model(precision="bfloat16", compile=False).learn(40) for _ in range(2))
    cast._runner._cast = CastParameters(cast._runner.towers)
    if flat:
        monkeypatch.setattr("sb3_deepcrl.common.tower_kernel.load_kernel", lambda: None)
        # One without a part in the loss
        unused = th.nn.Parameter(th.ones(3))
        cast.actor.optimizer.param_groups[0]["params"].append(unused)
        cast._runner._flat = {optimizer: FlatParameters(optimizer, []) for optimizer in cast._optimizers()}
        monkeypatch.setattr(cast._runner, "_lay_out", lambda: None)
    observations, actions = plain.replay_buffer.sample_contrastive(16)
    parameters = list(cast.policy.parameters())
    seen = []
    cast.critic.sa_encoder.blocks[1].branch[3].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    for model in (plain, cast):
        th.manual_seed(0)
        for _ in range(3):
            metrics = dict(zip(UPDATE_METRICS, model._runner.run(observations, actions), strict=False))
        for name, network in (("actor", model.actor), ("critic", model.critic)):
            gradients = th.cat([parameter.grad.flatten() for parameter in network.parameters()])
            th.testing.assert_close(metrics[f"{name}_grad_norm"], gradients.norm())
    assert {weight.dtype for weight in seen} == {th.bfloat16} and len({*map(id, seen)}) == 1
    assert all(one is other for one, other in zip(parameters, cast.policy.parameters(), strict=True))
    for actual, wanted in zip(parameters, plain.policy.parameters(), strict=True):
        assert actual.dtype == th.float32 and actual.grad is not None
        th.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
        th.testing.assert_close(actual.grad, wanted.grad, rtol=1e-3, atol=1e-5)
    if flat:
        assert th.equal(unused, th.ones(3)) and th.equal(unused.grad, th.zeros(3))
        states = (optimizer.state_dict()["state"] for optimizer in cast._optimizers())
        assert {state["step"].item() for of in states for state in of.values()} == {3, cast._n_updates + 3}


def test_precision_of_a_model(tmp_path):
    model = make_model(precision="bfloat16").learn(60)
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = DeepCRL.load(tmp_path / "model")
    assert loaded.actor.tower.autocast_dtype is th.bfloat16
    assert DeepCRL.load(tmp_path / "model", precision="float32").actor.tower.autocast_dtype is None


def saved_bytes(function) -> int:
    """Bytes that autograd keeps for the backward pass of a function."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return total


def test_checkpointed_activations():
    tower = ResidualTower(5, 3, depth=32, width=16).double()
    x = th.randn(64, 5, dtype=th.float64)
    expected, memory = gradients(tower, x), saved_bytes(lambda: tower(x))
    tower.checkpoint_activations = True
    for actual, wanted in zip(gradients(tower, x), expected, strict=True):
        th.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    assert saved_bytes(lambda: tower(x)) < memory / 4
    th.testing.assert_close(
        parameters_after_training(checkpoint_activations=True), parameters_after_training(), rtol=1e-5, atol=1e-6
    )


# --- Replay on the device -------------------------------------------------------------------------------------------------


def samples(buffer, env=None):
    np.random.seed(0)
    observations, actions = buffer.sample_contrastive(64, env=env)
    return [observations[key] for key in sorted(observations)] + [actions]


@pytest.mark.parametrize("normalize", [False, True])
def test_replay_on_the_device_follows_the_storage(normalize):
    """The copy is kept up to date while the rings turn around and episodes end."""
    env = make_vec_env(GoalReachEnv, n_envs=3, seed=0)
    if normalize:
        env = VecNormalize(env, norm_obs_keys=["observation"], clip_obs=1.0)
    kwargs = dict(depth=4, width=8, batch_size=16, learning_starts=30, buffer_size=300, seed=0, device="cpu")
    model = DeepCRL("MultiInputPolicy", env, replay_buffer_kwargs=dict(on_device=True), **kwargs)
    buffer = model.replay_buffer
    for _ in range(6):
        model.learn(90, reset_num_timesteps=False)
        on_device = samples(buffer, model.get_vec_normalize_env())
        buffer.on_device = False
        for actual, wanted in zip(on_device, samples(buffer, model.get_vec_normalize_env()), strict=True):
            th.testing.assert_close(actual, wanted)
        buffer.on_device = True
    buffer.reset()
    assert not buffer._device_copy


def test_replay_on_the_device_has_the_same_file(tmp_path):
    model = make_model(replay_buffer_kwargs=dict(on_device=True)).learn(60)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make_model()
    other.load_replay_buffer(tmp_path / "buffer")
    assert isinstance(other.replay_buffer, ContrastiveReplayBuffer) and other.replay_buffer.on_device == "auto"
    model.replay_buffer.truncate_last_trajectory()
    for actual, wanted in zip(samples(other.replay_buffer), samples(model.replay_buffer), strict=True):
        assert th.equal(actual, wanted)
    assert other.replay_buffer.on_device is False
    plain = make_model().learn(60)
    plain.save_replay_buffer(tmp_path / "plain")
    assert (tmp_path / "plain.pkl").stat().st_size == pytest.approx((tmp_path / "buffer.pkl").stat().st_size, abs=200)


def fake(model: DeepCRL, device: str) -> None:
    """Replace all tensors of a model by fake ones, which have a shape and a device, but no values."""

    def like(tensor):
        return th.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in model.policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = th.nn.Parameter(like(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = like(buffer)
    model.log_ent_coef = like(model.log_ent_coef).requires_grad_()
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), fused=True)
    model.critic.optimizer = th.optim.Adam(model.critic.parameters(), fused=True)
    model.ent_coef_optimizer = th.optim.Adam([model.log_ent_coef], fused=True)


@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(precision="bfloat16"), dict(normalize_observations=True), dict(policy_kwargs=dict(energy="cosine"))],
)
def test_update_reads_no_value(kwargs):
    """With fake tensors, a read of a value (``item()``, a branch) raises: such a read would break a capture."""
    model = make_model(**kwargs).learn(40)
    batch, actions = model.replay_buffer.sample_contrastive(16)
    with FakeTensorMode():
        fake(model, "cpu")
        observations = {key: th.empty(value.shape) for key, value in batch.items()}
        for _ in range(2):
            metrics = model._update(observations, th.empty(actions.shape))
        assert metrics.shape == (12,)
        with pytest.raises(DataDependentOutputException):
            metrics[0].item()


def test_losses_stay_on_the_gpu():
    """All that the losses make is made on the device of their inputs (fake ones have no autograd on a CPU build)."""
    model = make_model().learn(40)
    batch, actions = model.replay_buffer.sample_contrastive(16)
    with FakeTensorMode(), th.no_grad():
        fake(model, "cuda:0")
        observations = {key: th.empty(value.shape, device="cuda:0") for key, value in batch.items()}
        features, goals = model.critic.extract_state_features(observations), model.critic.encode_goal(observations)
        outcomes = (
            *model._actor_loss(observations, features, goals, actions),
            model._critic_loss(features, th.empty(actions.shape, device="cuda:0"), goals)[0],
        )
        assert {outcome.device.type for outcome in outcomes} == {"cuda"}
