import ctypes
import pickle
import re
import warnings
from copy import deepcopy

import pytest
import torch as th
from torch import nn

from sb3_deepcrl import compile_blocks
from sb3_deepcrl.common import acceleration
from sb3_deepcrl.common.block_kernel import KernelBlock, check_memory, load_kernel
from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower, frozen

has_avx512 = th.backends.cpu.get_cpu_capability() == "AVX512"
has_bfloat16 = th.cpu._is_avx512_bf16_supported() and not th.cpu._is_amx_tile_supported()
needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="no AVX-512 or no compiler")


def make_block(width=32, **kwargs) -> ResidualBlock:
    """A block none of whose parameters is 0 or 1."""
    th.manual_seed(0)
    block = ResidualBlock(width, **kwargs)
    with th.no_grad():
        for parameter in block.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.5 * th.randn_like(parameter))
    return block


def refuse(*args):
    raise AssertionError("the kernel should have done this")


def on_kernel(block: ResidualBlock) -> KernelBlock:
    return KernelBlock(load_kernel(), block, refuse)


def gradients(function, x, block, upper):
    """Output and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output = function(x)
    return [output.detach(), *th.autograd.grad(output, [x, *block.parameters()], upper)]


def assert_close(actual, expected):
    for one, wanted in zip(actual, expected, strict=True):
        assert one.dtype == th.float32
        error = (one.double() - wanted).norm()
        assert error <= 1e-5 * wanted.norm(), (one.shape, error, wanted.norm())


@pytest.mark.skipif(not has_avx512 or acceleration.why_not_compiled("cpu") is not None, reason="no AVX-512 or no compiler")
def test_there_is_a_kernel_wherever_there_should_be(monkeypatch):
    assert load_kernel() is not None
    monkeypatch.setattr(acceleration, "lean_inductor", refuse)
    tower = ResidualTower(5, 3, depth=8, width=16)
    assert compile_blocks(tower)
    tower(th.randn(4, 5)).sum().backward()
    with pytest.raises(Exception, match="the kernel should have done this"):
        tower.double()(th.randn(4, 5, dtype=th.float64))


@needs_kernel
@pytest.mark.parametrize("kwargs", [dict(learn_scale=True, scale=0.3), dict(scale=0.5), dict(residual=False)])
@pytest.mark.parametrize(("n_rows", "width"), [(0, 16), (1, 16), (3, 48), (7, 64), (9, 32), (77, 256), (512, 64), (1030, 16)])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_output_and_gradients(n_rows, width, kwargs, n_threads):
    block = make_block(width, **kwargs)
    x, upper = th.randn(n_rows, width), th.randn(n_rows, width)
    exact = deepcopy(block).double()
    expected = gradients(exact, x.double(), exact, upper.double())
    n_threads_before = th.get_num_threads()
    th.set_num_threads(n_threads)
    try:
        actual = gradients(on_kernel(block), x, block, upper)
        again = gradients(on_kernel(block), x, block, upper)
        with th.no_grad():
            outputs = [on_kernel(block)(x)]
        with frozen(block):
            inputs = x.clone().requires_grad_()
            outputs.append(on_kernel(block)(inputs))
            outputs[-1].backward(upper)
    finally:
        th.set_num_threads(n_threads_before)
    assert_close(actual, expected)
    assert all(map(th.equal, actual, again))
    # Whatever is left out changes nothing else
    assert all(th.equal(output, actual[0]) for output in outputs)
    assert th.equal(inputs.grad, actual[1])
    assert all(parameter.grad is None for parameter in block.parameters())


@needs_kernel
@pytest.mark.skipif(not has_bfloat16, reason="the processor does not multiply bfloat16, or PyTorch is faster at it")
@pytest.mark.parametrize(("n_rows", "width"), [(1, 32), (9, 96), (77, 256), (1029, 32)])
@pytest.mark.parametrize("kwargs", [dict(learn_scale=True, scale=0.3), dict(residual=False)])
def test_bfloat16(n_rows, width, kwargs):
    """As exact as autocast of PyTorch, and on its own way: what the products add up is not rounded."""
    block = make_block(width, **kwargs)
    x, upper = th.randn(n_rows, width), th.randn(n_rows, width)
    exact = gradients(block, x, block, upper)

    def rounded(function):
        def run(x):
            with th.autocast("cpu", th.bfloat16):
                return function(x)

        return gradients(run, x, block, upper)

    actual = rounded(on_kernel(block))
    for one, other, wanted in zip(actual, rounded(block), exact, strict=True):
        assert one.dtype == th.float32 and not th.equal(one, wanted)
        # One number is closer to the truth by chance
        assert one.ndim == 0 or (one - wanted).norm() < 1.1 * (other - wanted).norm()
        assert (one - wanted).norm() < 0.05 * wanted.norm() + 1e-3
    assert all(map(th.equal, actual, rounded(on_kernel(block))))
    with frozen(block), th.autocast("cpu", th.bfloat16):
        inputs = x.clone().requires_grad_()
        on_kernel(block)(inputs).backward(upper)
    assert th.equal(inputs.grad, actual[1])


@needs_kernel
def test_wide_blocks_and_large_batches():
    """More terms in a sum than are added up at a time."""
    block = make_block(1040)
    exact = deepcopy(block).double()
    x, upper = th.randn(40, 1040), th.randn(40, 1040)
    assert_close(gradients(on_kernel(block), x, block, upper), gradients(exact, x.double(), exact, upper.double()))


@needs_kernel
def test_inputs_that_are_not_contiguous():
    block = make_block()
    exact = deepcopy(block).double()
    x, upper = th.randn(32, 10).t(), th.ones(1, 1).expand(10, 32)
    assert_close(gradients(on_kernel(block), x, block, upper), gradients(exact, x.double(), exact, upper.double()))


@needs_kernel
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
@pytest.mark.parametrize("gamma", [1.0, 1e4])
def test_extreme_values(size, gamma):
    """Swish is saturated on either side, rows are constant: as in PyTorch, nothing is infinite that is finite."""
    block = make_block()
    with th.no_grad():
        for norm in block.branch[1::3]:
            norm.weight.mul_(gamma)
    x, upper = size * th.randn(5, 32), th.randn(5, 32)
    for actual, wanted in zip(gradients(on_kernel(block), x, block, upper), gradients(block, x, block, upper), strict=True):
        assert th.isfinite(actual).all()
        assert (actual - wanted).norm() <= 1e-3 * wanted.norm()


@needs_kernel
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_tower(checkpointed, monkeypatch):
    monkeypatch.setattr(acceleration, "lean_inductor", refuse)
    tower = ResidualTower(5, 3, depth=16, width=32)
    tower.checkpoint_activations = checkpointed
    x, upper = th.randn(20, 5), th.randn(20, 3)
    exact = deepcopy(tower).double()
    expected = gradients(exact, x.double(), exact, upper.double())
    compile_blocks(tower)
    assert_close(gradients(tower, x, tower, upper), expected)
    with frozen(tower):
        inputs = x.clone().requires_grad_()
        tower(inputs).backward(upper)
    assert_close([inputs.grad], [expected[1]])


def other_norm(width):
    return nn.RMSNorm(width)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def exchange(block, index, module):
    block.branch[index] = module


OTHERS = {
    "float64": lambda block: block.double(),
    "width": lambda block: ResidualBlock(20),
    "norm": lambda block: ResidualBlock(32, norm=other_norm),
    "no norm": lambda block: ResidualBlock(32, norm="none"),
    "activation": lambda block: ResidualBlock(32, nn.ReLU),
    "subclass": lambda block: exchange(block, 3, Doubled(32, 32)),
    "no bias": lambda block: exchange(block, 6, nn.Linear(32, 32, bias=False)),
    "no affine": lambda block: exchange(block, 4, nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)),
    "eps": lambda block: exchange(block, 4, nn.LayerNorm(32, eps=0.1)),
    "parametrized": lambda block: nn.utils.parametrizations.weight_norm(block.branch[0]),
    "transposed": lambda block: setattr(block.branch[0].weight, "data", block.branch[0].weight.data.t()),
}


@needs_kernel
@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_run_otherwise(name):
    """Also if modules or parameters were exchanged after compiling."""
    block = make_block()
    kernel_block = KernelBlock(load_kernel(), block, lambda: lambda x: "otherwise")
    assert isinstance(kernel_block(th.randn(3, 32)), th.Tensor)
    other = OTHERS[name](block)
    if isinstance(other, ResidualBlock) and other is not block:
        kernel_block.block = other
    parameter = next(kernel_block.block.parameters())
    assert kernel_block(th.randn(3, parameter.shape[-1], dtype=parameter.dtype)) == "otherwise"


@needs_kernel
def test_other_inputs_run_otherwise():
    kernel_block = KernelBlock(load_kernel(), make_block(), lambda: lambda x: "otherwise")
    for x in (th.randn(2, 3, 32), th.randn(32), th.randn(3, 32).double(), th.randn(3, 32, device="meta")):
        assert kernel_block(x) == "otherwise"
    with th.autocast("cpu", th.float16):
        assert kernel_block(th.randn(3, 32)) == "otherwise"
    with th.autocast("cpu", th.bfloat16):
        assert (type(kernel_block(th.randn(3, 32))) is th.Tensor) == has_bfloat16
    # A multiple of the lanes of a vector, but not of twice as many
    kernel_block = KernelBlock(load_kernel(), make_block(48), lambda: lambda x: "otherwise")
    assert type(kernel_block(th.randn(3, 48))) is th.Tensor
    with th.autocast("cpu", th.bfloat16):
        assert kernel_block(th.randn(3, 48)) == "otherwise"


@needs_kernel
@pytest.mark.parametrize("kwargs", [dict(learn_scale=True, scale=0.3), dict(scale=0.5), dict(residual=False)])
def test_derivatives_of_the_derivative(kwargs):
    block = make_block(**kwargs)
    # Layers may share parameters
    block.branch[3].weight = block.branch[9].weight
    exact = deepcopy(block).double()
    x = th.randn(3, 32)

    def second(function, module, x):
        x = x.detach().requires_grad_()
        inputs = [x, *module.parameters()]
        first = th.autograd.grad(function(x).square().sum(), inputs, create_graph=True)
        again = th.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs, allow_unused=True)
        return [*first, *(gradient for gradient in again if gradient is not None)]

    assert_close(second(on_kernel(block), block, x), second(exact, exact, x.double()))
    # Only that of the inputs
    with frozen(block):
        inputs = x.clone().requires_grad_()
        (gradient,) = th.autograd.grad(on_kernel(block)(inputs).square().sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
    assert inputs.grad.isfinite().all() and all(parameter.grad is None for parameter in block.parameters())


@needs_kernel
def test_a_parameter_that_changes_between_forward_and_backward_pass_is_an_error():
    block = make_block()
    output = on_kernel(block)(th.randn(3, 32)).sum()
    with th.no_grad():
        block.branch[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.fixture
def loads_kernel_again():
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


def short_vectors(library):
    library.n_lanes = lambda: 8
    return library


def raise_error(error):
    raise error


@needs_kernel
@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (lambda path: raise_error(OSError(f"{path} cannot be opened")), "OSError: .* cannot be opened"),
        (lambda path: raise_error(RuntimeError("C++ compile error\n\nx.cpp:1: error: no good\n")), "RuntimeError: .*no good"),
        (lambda path: ctypes.CDLL(None), "undefined symbol"),
        (lambda path: short_vectors(ctypes.CDLL(path)), "8 numbers instead of 16"),
    ],
)
def test_without_a_kernel_there_is_one_warning(load, reason, monkeypatch, loads_kernel_again):
    path = load_kernel()._name
    load_kernel.cache_clear()
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", lambda source: load(path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (16, 32):
            tower = ResidualTower(5, 3, depth=4, width=width)
            plain = deepcopy(tower)
            assert compile_blocks(tower)
            x = th.randn(3, 5)
            th.testing.assert_close(tower(x), plain(x))
    messages = [str(warning.message) for warning in caught if "kernel" in str(warning.message)]
    assert len(messages) == 1 and re.search(reason, messages[0])


def test_where_there_is_no_kernel_there_is_no_warning(monkeypatch, loads_kernel_again):
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernel() is None


@needs_kernel
def test_copies_are_uncompiled():
    tower = ResidualTower(5, 3, depth=4, width=16)
    keys = list(tower.state_dict())
    compile_blocks(tower)
    x = th.randn(3, 5)
    for copy in (deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert copy.blocks[0]._compiled_call_impl is None
        assert list(copy.state_dict()) == list(tower.state_dict()) == keys
        th.testing.assert_close(copy(x), tower(x))
    # Parameters may be replaced
    with th.no_grad():
        tower.load_state_dict({key: value + 0.1 for key, value in tower.state_dict().items()})
        tower.blocks[0].branch[0].weight = nn.Parameter(th.randn(16, 16))
    th.testing.assert_close(tower(x), deepcopy(tower)(x))


@needs_kernel
def test_out_of_memory_is_an_error():
    kernel, width = load_kernel(), 2**24
    assert not kernel.residual_block_forward(None, None, None, 1e-6, None, None, None, 1, width, 1, False)
    assert not kernel.residual_block_backward(*[None] * 9, 1, width, 1, False)
    x = th.randn(64, 32)
    with pytest.raises(MemoryError, match=re.escape("inputs of shape (64, 32): use a smaller batch")):
        check_memory(False, x)
    # The workspace is as it was
    block = make_block()
    assert_close([on_kernel(block)(x)], [deepcopy(block).double()(x.double())])
