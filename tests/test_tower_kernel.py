import ctypes
import os
import pickle
import re
import subprocess
import threading
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_deepcrl import DeepCRL, compile_blocks, uncompile_blocks
from sb3_deepcrl.common import compilation, tower_kernel
from sb3_deepcrl.common.torch_layers import ResidualTower, frozen
from sb3_deepcrl.common.tower_kernel import (
    FlatParameters,
    TowerKernel,
    _check_memory,
    apply_heads,
    fused_info_nce,
    has_kernel,
    load_kernel,
    threads_of_kernel,
)
from tests.envs import GoalReachEnv

has_avx2 = th.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="no AVX2 or no compiler")
needs_bfloat16 = pytest.mark.skipif(
    load_kernel() is None or not load_kernel().width_multiple(True), reason="the processor does not multiply bfloat16"
)
KWARGS = [dict(), dict(residual_scale=0.5), dict(residual=False)]


def make_tower(input_dim=5, output_dim=3, depth=8, width=32, **kwargs) -> ResidualTower:
    """A tower none of whose parameters is 0 or 1."""
    th.manual_seed(0)
    tower = ResidualTower(input_dim, output_dim, depth, width, **kwargs)
    with th.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * th.randn_like(parameter))
    return tower


def on_kernel(tower: ResidualTower) -> ResidualTower:
    """A copy that runs as the kernel, and only as the kernel."""
    tower = deepcopy(tower)
    tower._compiled_call_impl = TowerKernel(load_kernel(), tower)
    tower._call_impl = refuse
    return tower


def refuse(*_):
    raise AssertionError("the kernel should have done this")


def gradients(tower, x, upper):
    """Output and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output = tower(x)
    return [output.detach(), *th.autograd.grad(output, [x, *tower.parameters()], upper)]


def assert_close(actual, expected, tolerance=1e-5):
    for one, wanted in zip(actual, expected, strict=True):
        assert one.dtype == th.float32
        error = (one.double() - wanted).norm()
        # The gradient of a scale is a sum of many numbers of either sign
        assert error <= tolerance * max(wanted.norm(), 0.0 if one.ndim else 1.0), (one.shape, error, wanted.norm())


@pytest.fixture
def n_threads():
    before = th.get_num_threads()
    yield th.set_num_threads
    th.set_num_threads(before)


@pytest.mark.skipif(not has_avx2 or compilation.why_not_compiled("cpu") is not None, reason="no AVX2 or no compiler")
def test_there_is_a_kernel_wherever_there_should_be(monkeypatch):
    assert load_kernel() is not None
    monkeypatch.setattr(compilation, "lean_inductor", refuse)
    tower = ResidualTower(5, 3, depth=8, width=16)
    assert compile_blocks(tower) and has_kernel(tower)
    tower._call_impl = refuse
    tower(th.randn(4, 5)).sum().backward()


@needs_kernel
@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize(
    ("n_rows", "input_dim", "depth", "width"),
    [
        (1, 1, 4, 16),
        (2, 7, 4, 32),
        (3, 40, 8, 48),
        (7, 64, 4, 64),
        (77, 33, 4, 256),
        # Shared by several threads
        (517, 5, 8, 256),
        (1030, 5, 4, 16),
        (129, 20, 64, 32),
        # More terms in a sum than are added up at a time
        (40, 600, 4, 1040),
    ],
)
def test_output_and_gradients(n_rows, input_dim, depth, width, kwargs, n_threads):
    tower = make_tower(input_dim, 3, depth, width, **kwargs)
    x, upper = th.randn(n_rows, input_dim), th.randn(n_rows, 3)
    exact = deepcopy(tower).double()
    expected = gradients(exact, x.double(), upper.double())
    kernel = on_kernel(tower)
    for n in (1, 2, 3):
        n_threads(n)
        actual = gradients(kernel, x, upper)
        # Sums over many layers of a narrow network are no more exact in PyTorch
        assert_close(actual, expected, 1e-5 if depth < 64 else 2e-5)
        assert all(map(th.equal, actual, gradients(kernel, x, upper)))
        # Whatever is left out changes nothing else
        with th.no_grad():
            outputs = [kernel(x)]
        with frozen(kernel):
            inputs = x.clone().requires_grad_()
            outputs.append(kernel(inputs))
            outputs[-1].backward(upper)
        assert all(th.equal(output, actual[0]) for output in outputs)
        assert th.equal(inputs.grad, actual[1])
        # Computing products again gives the same
        kernel.checkpoint_activations = True
        assert_close(gradients(kernel, x, upper), expected, 1e-5 if depth < 64 else 2e-5)
        kernel.checkpoint_activations = False
    assert all(parameter.grad is None for parameter in kernel.parameters())


@needs_kernel
@pytest.mark.parametrize("sizes", [(1,), (17, 17), (3, 300)])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 16), (77, 48), (517, 32)])
def test_other_heads(sizes, n_rows, width, n_threads):
    """One call does them all, also if nobody differentiates one of them."""
    n_threads(2)
    tower = make_tower(5, None, 8, width)
    heads = [nn.Linear(width, size) for size in sizes]
    everything = nn.ModuleList([tower, *heads])
    exact = deepcopy(everything).double()
    kernel = nn.ModuleList([on_kernel(tower), *deepcopy(heads)])
    for head in kernel[1:]:
        head._call_impl = refuse
    x = th.randn(n_rows, 5)

    def differentiate(modules, x, n_used):
        x = x.clone().requires_grad_()
        outputs = apply_heads(modules[0], x, *modules[1:])
        assert [tuple(output.shape) for output in outputs] == [(n_rows, size) for size in sizes]
        loss = sum(output.square().sum() for output in outputs[:n_used])
        inputs = [x, *modules.parameters()]
        return [*outputs, *th.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]

    for n_used in {1, len(sizes)}:
        assert_close(differentiate(kernel, x, n_used), differentiate(exact, x.double(), n_used))
    # What is done to a head, or in place of it, counts
    with th.no_grad():
        kernel[1].weight.zero_()
        assert th.equal(apply_heads(kernel[0], x, *kernel[1:])[0], kernel[1].bias.expand(n_rows, -1))
        other = nn.Linear(width, 2)
        assert_close(apply_heads(kernel[0], x, other), [deepcopy(other).double()(exact[0](x.double()))])


@needs_bfloat16
@pytest.mark.parametrize(("n_rows", "depth", "width"), [(1, 4, 32), (2, 4, 96), (77, 16, 256), (1029, 4, 32), (65, 64, 64)])
@pytest.mark.parametrize("kwargs", KWARGS[::2])
def test_bfloat16(n_rows, depth, width, kwargs):
    """As exact as autocast of PyTorch, and on its own way: what the products add up is not rounded."""
    tower = make_tower(40, None, depth, width, **kwargs)
    x, upper = th.randn(n_rows, 40), th.randn(n_rows, width)
    exact = gradients(deepcopy(tower).double(), x.double(), upper.double())
    tower.autocast_dtype = th.bfloat16
    kernel = on_kernel(tower)
    actual, others = gradients(kernel, x, upper), gradients(tower, x, upper)
    assert all(one.dtype == th.float32 for one in actual)
    # Of all together: one of a few numbers is closer to the truth by chance
    ours, theirs = (
        sum(((one - wanted).norm() / wanted.norm()) ** 2 for one, wanted in zip(found, exact, strict=True) if one.ndim)
        for found in (actual, others)
    )
    assert ours < 1.1 * theirs
    assert sum((one - wanted).norm() > 1e-4 * wanted.norm() for one, wanted in zip(actual, exact, strict=True)) > 10
    assert all(map(th.equal, actual, gradients(kernel, x, upper)))
    # Also if somebody else asks for it
    kernel.autocast_dtype = None
    with th.autocast("cpu", th.bfloat16), th.no_grad():
        assert th.equal(kernel(x), actual[0])


EMULATED = ("_tile_loadd", "_tile_stored", "_tile_zero", "_tile_dpbf16ps")
TILES = """
#include <immintrin.h>
#include <cstdint>
#include <cstring>
static thread_local uint8_t tiles[8][16][64];
static void load_tile(int t, const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tiles[t][i], (const char*)p + i * stride, 64);
}
static void store_tile(int t, void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy((char*)p + i * stride, tiles[t][i], 64);
}
static float term(int t, int row, int i) {
  uint32_t bits = (uint32_t)((uint16_t*)tiles[t][row])[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void multiply_tiles(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n)
      for (int k = 0; k < 32; ++k) ((float*)tiles[c][m])[n] += term(a, m, k) * term(b, k / 2, 2 * n + k % 2);
}
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_zero(t) memset(tiles[t], 0, 1024)
#define _tile_dpbf16ps multiply_tiles
"""


@needs_bfloat16
def test_tiles_of_processors_that_have_them(tmp_path):
    """The code for AMX, on any processor: tiles in plain C++ give what vectors of bfloat16 give."""
    source = Path(tower_kernel.__file__).with_name("tower.cpp").read_text()
    for instruction in ("sttilecfg %0", "ldtilecfg %0", "tilerelease"):
        source = source.replace(f'"{instruction}"', '""')
    source, n = re.subn("const bool has_tiles = .*;", "const bool has_tiles = true;", source)
    assert n == 1
    # Whatever the header has in place of a function
    undefined = "".join(f"#undef {name}\n" for name in EMULATED)
    (tmp_path / "tiles.cpp").write_text(TILES.replace("#define _tile_loadd", undefined + "#define _tile_loadd") + source)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-O2", "-march=native", "-D__AMX_BF16__", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run([*command, "tiles.cpp", "-o", "tiles.so"], cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "tiles.so"))
    tower_kernel._declare(library)
    for n_rows, input_dim, depth, width in ((1, 3, 4, 32), (77, 40, 8, 96), (130, 5, 4, 64)):
        tower = make_tower(input_dim, None, depth, width)
        tower.autocast_dtype = th.bfloat16
        x, upper = th.randn(n_rows, input_dim), th.randn(n_rows, width)
        tiled = on_kernel(tower)
        tiled._compiled_call_impl.library = library
        assert_close(gradients(tiled, x, upper), gradients(on_kernel(tower), x, upper), 5e-3)


@needs_kernel
def test_inputs_that_are_not_contiguous():
    tower = make_tower()
    x, upper = th.randn(5, 10).t(), th.ones(1, 1).expand(10, 3)
    expected = gradients(deepcopy(tower).double(), x.double(), upper.double())
    assert_close(gradients(on_kernel(tower), x, upper), expected)


@needs_kernel
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
@pytest.mark.parametrize("gamma", [1.0, 1e4])
def test_extreme_values(size, gamma):
    """Swish is saturated on either side, rows are constant: as in PyTorch, nothing is infinite that is finite."""
    tower = make_tower(depth=4)
    with th.no_grad():
        for norm in tower.blocks[0].branch[1::3]:
            norm.weight.mul_(gamma)
    x, upper = size * th.randn(5, 5), th.randn(5, 3)
    for actual, wanted in zip(gradients(on_kernel(tower), x, upper), gradients(tower, x, upper), strict=True):
        assert th.isfinite(actual).all()
        assert (actual - wanted).norm() <= 1e-3 * wanted.norm()


@needs_kernel
def test_nan_is_not_lost():
    tower = make_tower()
    x = th.zeros(3, 5)
    x[1, 2] = th.nan
    with th.no_grad():
        assert on_kernel(tower)(x).isnan().all(dim=1).tolist() == [False, True, False]
        tower.blocks[1].branch[3].weight[4, 5] = th.nan
        assert on_kernel(tower)(th.zeros(3, 5)).isnan().all()


def other_norm(width):
    return nn.RMSNorm(width)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def exchange(tower, index, module):
    tower.blocks[1].branch[index] = module


OTHERS = {
    "float64": lambda tower: tower.double(),
    "width": lambda tower: make_tower(width=20),
    "norm": lambda tower: make_tower(norm=other_norm),
    "no norm": lambda tower: make_tower(norm="none"),
    "activation": lambda tower: make_tower(activation_fn=nn.ReLU),
    "subclass": lambda tower: exchange(tower, 3, Doubled(32, 32)),
    "no bias": lambda tower: exchange(tower, 6, nn.Linear(32, 32, bias=False)),
    "no affine": lambda tower: exchange(tower, 4, nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)),
    "eps": lambda tower: exchange(tower, 4, nn.LayerNorm(32, eps=0.1)),
    "no eps": lambda tower: make_tower(norm=partial(nn.LayerNorm, eps=0.0)),
    "parametrized": lambda tower: nn.utils.parametrizations.weight_norm(tower.blocks[0].branch[0]),
    "transposed": lambda tower: setattr(tower.blocks[0].branch[0].weight, "data", tower.blocks[0].branch[0].weight.data.t()),
    "stem": lambda tower: tower.stem.append(nn.Dropout(0.5)),
    "block": lambda tower: tower.blocks.append(nn.Tanh()),
    "shared": lambda tower: setattr(tower.blocks[0].branch[3], "weight", tower.blocks[1].branch[3].weight),
    "hook": lambda tower: tower.blocks[0].branch[3].register_forward_hook(lambda *_: None),
    "hook of a container": lambda tower: tower.blocks.register_forward_pre_hook(lambda *_: None),
    "hook of the head": lambda tower: tower.head.register_forward_hook(lambda *_: None),
    "head": lambda tower: setattr(tower, "head", nn.Sequential(nn.Linear(32, 3), nn.Tanh())),
    "empty head": lambda tower: setattr(tower, "head", nn.Linear(32, 0)),
    "head without bias": lambda tower: setattr(tower, "head", nn.Linear(32, 3, bias=False)),
    "hook of the tower": lambda tower: tower.register_full_backward_hook(lambda *_: None),
}


@needs_kernel
@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_run_as_plain_modules(name):
    """Also if modules or parameters were exchanged after compiling."""
    tower = make_tower()
    assert compile_blocks(tower)
    tower(th.randn(3, 5))
    other = OTHERS[name](tower)
    if isinstance(other, ResidualTower) and other is not tower:
        tower = other
        tower._compiled_call_impl = TowerKernel(load_kernel(), tower)
    called = []
    tower._call_impl = lambda x: called.append(x) or "plain"
    assert tower(th.randn(3, 5, dtype=next(tower.parameters()).dtype)) == "plain"


@needs_kernel
def test_hooks_are_seen_and_forgotten():
    tower = make_tower()
    compile_blocks(tower)
    x = th.randn(3, 5)
    expected = tower(x)
    seen = []
    hook = tower.blocks[1].branch[0].register_forward_hook(lambda *_: seen.append(1))
    th.testing.assert_close(tower(x), expected)
    assert seen == [1]
    hook.remove()
    tower._call_impl = refuse
    th.testing.assert_close(tower(x), expected)


@needs_kernel
def test_what_a_layer_does_may_change():
    x = th.randn(3, 5)

    def residual(tower):
        tower.blocks[0].residual = False

    def epsilon(tower):
        for norm in [module for module in tower.modules() if isinstance(module, nn.LayerNorm)]:
            norm.eps = 0.1

    def replace_forward(name):
        def change(tower):
            module = tower.get_submodule(name)
            module.forward = lambda x, before=module.forward: before(x).sin()

        return change

    for change in (residual, epsilon, *map(replace_forward, ("", "blocks.0", "blocks.0.branch.0"))):
        tower, plain = make_tower(), make_tower()
        plain.load_state_dict(tower.state_dict())
        compile_blocks(tower)
        before = tower(x)
        for changed in (tower, plain):
            change(changed)
        th.testing.assert_close(tower(x), plain(x))
        assert (tower(x) - before).abs().max() > 1e-3


@needs_kernel
def test_other_inputs_run_as_plain_modules():
    tower = make_tower()
    tower._compiled_call_impl = TowerKernel(load_kernel(), tower)
    tower._call_impl = lambda x: "plain"
    for shape in ((2, 3, 5), (5,), (0, 5), (3, 6)):
        assert tower(th.randn(shape)) == "plain"
    assert tower(th.randn(3, 5).double()) == tower(th.randn(3, 5, device="meta")) == "plain"
    with th.autocast("cpu", th.float16):
        assert tower(th.randn(3, 5)) == "plain"
    with th.autocast("cpu", th.bfloat16):
        assert type(tower(th.randn(3, 5))) is th.Tensor
    # A multiple of the lanes of a vector, but not of twice as many, which bfloat16 takes: products stay float32
    tower = make_tower(width=48)
    tower._compiled_call_impl = TowerKernel(load_kernel(), tower)
    tower._call_impl = lambda x: "plain"
    x = th.randn(3, 5)
    expected = tower(x)
    with th.autocast("cpu", th.bfloat16):
        assert th.equal(tower(x), expected)


@needs_kernel
@pytest.mark.parametrize("kwargs", KWARGS)
def test_derivatives_of_the_derivative(kwargs):
    tower = make_tower(depth=4, **kwargs)
    exact = deepcopy(tower).double()
    x = th.randn(3, 5)

    def second(module, x):
        x = x.detach().requires_grad_()
        inputs = [x, *module.parameters()]
        first = th.autograd.grad(module(x).square().sum(), inputs, create_graph=True)
        again = th.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs, allow_unused=True)
        return [*first, *(gradient for gradient in again if gradient is not None)]

    kernel = on_kernel(tower)
    assert_close(second(kernel, x), second(exact, x.double()))
    # Only that of the inputs
    with frozen(kernel):
        inputs = x.clone().requires_grad_()
        (gradient,) = th.autograd.grad(kernel(inputs).square().sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
    assert inputs.grad.isfinite().all() and all(parameter.grad is None for parameter in kernel.parameters())


@needs_kernel
def test_a_parameter_that_changes_between_forward_and_backward_pass_is_an_error():
    tower = on_kernel(make_tower())
    output = tower(th.randn(3, 5)).sum()
    with th.no_grad():
        tower.blocks[0].branch[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@needs_kernel
def test_parameters_that_are_moved_between_forward_and_backward_pass():
    tower = make_tower()
    kernel, x = on_kernel(tower), th.randn(3, 5)
    expected = deepcopy(tower).double()
    output = kernel(x).sum()
    for module in (kernel, tower):
        for parameter in module.parameters():
            parameter.data = th.full_like(parameter, 7.0)
    others = [th.full_like(parameter, th.nan) for parameter in tower.parameters()]
    output.backward()
    assert len(others) > 0
    # As they were
    expected(x.double()).sum().backward()
    for ours, theirs in zip(kernel.parameters(), expected.parameters(), strict=True):
        th.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_several_passes_before_their_backward_passes():
    """What one keeps is its own, though the memory serves again; also if a graph is kept."""
    tower = make_tower()
    kernel = on_kernel(tower)
    xs = [th.randn(9, 5) for _ in range(3)]
    for module in (tower, kernel):
        outputs = [module(x).square().sum() for x in xs]
        outputs[1].backward(retain_graph=True)
        outputs[0].backward()
        module(xs[2]).sum().backward()
        outputs[1].backward()
        outputs[2].backward()
    for parameter, wanted in zip(kernel.parameters(), tower.parameters(), strict=True):
        th.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_several_python_threads_which_compute_alone_what_they_would_together(n_threads):
    n_threads(2)
    tower = on_kernel(make_tower(depth=16, width=128))
    x, upper, representations, numbers = (th.randn(shape) for shape in ((512, 5), (512, 3), (2, 512, 64), (4, 400_000)))

    def compute():
        values, *others = numbers.clone().abs()
        norm = load_kernel().adam(
            *[flat.data_ptr() for flat in (values, *others)], len(values), 1e-3, 0.9, 0.999, 1.0, 1e-8, 0.0, 0.0, 2
        )
        return [
            *gradients(tower, x, upper),
            *fused_info_nce(*representations, 0.1, True),
            values,
            th.tensor(norm, dtype=th.float64),
        ]

    expected = compute()
    outcomes = []

    def run():
        outcomes.extend(all(map(th.equal, compute(), expected)) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 60


@needs_kernel
def test_a_forked_process_has_threads_of_its_own(n_threads):
    n_threads(2)
    tower = on_kernel(make_tower(output_dim=None, depth=16, width=128))
    x = th.randn(512, 5)
    with th.no_grad():
        expected = tower(x)
        pid = os.fork()
        if pid == 0:
            # Hangs if it waits for threads that there are not; so would PyTorch, compared to NumPy
            os._exit(0 if (tower(x).numpy() == expected.numpy()).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def loads_kernel_again():
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


def raise_error(error):
    raise error


@needs_kernel
@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (lambda: raise_error(OSError("x.so cannot be opened")), "OSError: .* cannot be opened"),
        (lambda: raise_error(RuntimeError("C++ compile error\n\nx.cpp:1: error: no good\n")), "RuntimeError: .*no good"),
        (lambda: ctypes.CDLL(None), "undefined symbol"),
    ],
)
def test_without_a_kernel_there_is_one_warning(load, reason, monkeypatch, loads_kernel_again):
    load_kernel.cache_clear()
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", lambda source: load())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (16, 32):
            tower = ResidualTower(5, 3, depth=4, width=width)
            plain = deepcopy(tower)
            compile_blocks(tower)
            x = th.randn(3, 5)
            th.testing.assert_close(tower(x), plain(x))
    messages = [str(warning.message) for warning in caught if "kernel" in str(warning.message)]
    assert len(messages) == 1 and re.search(reason, messages[0])


def test_where_there_is_no_kernel_there_is_no_warning(monkeypatch, loads_kernel_again):
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernel() is None


@needs_kernel
def test_copies_are_uncompiled():
    tower = ResidualTower(5, 3, depth=4, width=16)
    keys = list(tower.state_dict())
    compile_blocks(tower)
    x = th.randn(3, 5)
    tower(x).sum().backward()
    for copy in (deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert not has_kernel(copy)
        assert list(copy.state_dict()) == list(tower.state_dict()) == keys
        th.testing.assert_close(copy(x), tower(x))
    # Parameters may be replaced
    with th.no_grad():
        tower.load_state_dict({key: value + 0.1 for key, value in tower.state_dict().items()})
        tower.blocks[0].branch[0].weight = nn.Parameter(th.randn(16, 16))
    th.testing.assert_close(tower(x), deepcopy(tower)(x))
    uncompile_blocks(tower)
    assert not has_kernel(tower)


@needs_kernel
def test_out_of_memory_is_an_error():
    kernel, shape = load_kernel(), tower_kernel._Shape(n_inputs=1, width=2**24, n_blocks=1)
    assert not kernel.tower_forward(shape, 1, False, True, 1, None, None, None)
    assert not kernel.tower_backward(shape, 1, False, True, 1, None, None, None, None)
    with pytest.raises(MemoryError, match=re.escape("inputs of shape (64, 5): use a smaller batch")):
        _check_memory(False, th.zeros(64, 5))
    # The workspace is as it was
    tower, x = make_tower(), th.randn(64, 5)
    assert_close([on_kernel(tower)(x)], [deepcopy(tower).double()(x.double())])


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = make_tower(5, 4), nn.Linear(4, 6), make_tower(6, 2, norm="none")

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@needs_kernel
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 1 - 1e-7)])
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.AdamW])
def test_flat_parameters_do_what_the_optimizer_does(optimizer_class, betas):
    """Also from a state that there is already, with a tower that the kernel does not know, and if others step in between."""
    ours, theirs = TwoTowers(), TwoTowers()
    kwargs = dict(lr=1e-2, eps=1e-3, weight_decay=0.1, betas=betas)
    optimizers = [optimizer_class(module.parameters(), **kwargs) for module in (ours, theirs)]
    compile_blocks(ours.first)
    xs = [th.randn(16, 5) for _ in range(8)]
    flat = None
    for step, x in enumerate(xs):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            if module is ours and step > 1 and step != 5:
                flat = flat if flat is not None and flat.holds() else FlatParameters.make(module, optimizer)
                with flat.in_place():
                    # A hook makes the tower run as plain modules, while its gradients are written in place
                    hook = ours.first.stem.register_forward_hook(lambda *_: None) if step == 6 else None
                    flat.backward(module(x).square().sum())
                    flat.step()
                if hook is not None:
                    hook.remove()
            else:
                optimizer.zero_grad()
                module(x).square().sum().backward()
                optimizer.step()
        if step == 3:
            optimizers[0].load_state_dict(pickle.loads(pickle.dumps(optimizers[0].state_dict())))
            assert not flat.holds()
        if step == 4:
            assert flat.holds()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in ours.parameters())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"] == len(xs)
        th.testing.assert_close(one["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-3, atol=1e-5)


@needs_kernel
def test_optimizers_may_be_replaced():
    settings = dict(depth=4, width=32, batch_size=32, learning_starts=20, compile=True, seed=0)
    model = DeepCRL("MultiInputPolicy", GoalReachEnv(), **settings).learn(60)
    model.actor.optimizer = th.optim.SGD(model.actor.parameters(), lr=0.1)
    model = deepcopy(model)
    before = [parameter.clone() for parameter in model.actor.parameters()]
    model.learn(60)
    assert not any(th.equal(one, other) for one, other in zip(model.actor.parameters(), before, strict=True))


@needs_kernel
def test_what_cannot_be_flat():
    tower = make_tower()
    compile_blocks(tower)
    parameters = list(tower.parameters())
    for optimizer in (
        th.optim.SGD(parameters, lr=0.1),
        th.optim.Adam(parameters, amsgrad=True),
        th.optim.Adam([dict(params=parameters[:3]), dict(params=parameters[3:], lr=0.1)]),
    ):
        assert FlatParameters.make(tower, optimizer) is None
    optimizer = th.optim.Adam(parameters)
    with frozen(tower.blocks[0]):
        assert FlatParameters.make(tower, optimizer) is None
    flat = FlatParameters.make(tower, optimizer)
    for register in (
        optimizer.register_step_post_hook,
        parameters[3].register_hook,
        parameters[3].register_post_accumulate_grad_hook,
    ):
        handle = register(lambda *_: None)
        assert not flat.holds() and FlatParameters.make(tower, optimizer) is None
        handle.remove()
        assert flat.holds()


@needs_kernel
def test_defaults_of_pytorch_change_nothing():
    th.set_default_dtype(th.float64)
    try:
        with th.device("meta"):
            tower, x = make_tower().to_empty(device="cpu").float(), th.ones(3, 5, device="cpu", dtype=th.float32)
            compile_blocks(tower)
            flat = FlatParameters.make(tower, th.optim.Adam(tower.parameters()))
            with flat.in_place():
                flat.backward(tower(x).sum())
                norm = flat.step()
    finally:
        th.set_default_dtype(th.float32)
    assert norm.is_cpu and norm.dtype is th.float32
    kernel = tower._compiled_call_impl
    assert kernel.token.is_cpu and all(kept.is_cpu and kept.dtype is th.float32 for kept in kernel.spare)


def test_trainings_in_several_python_threads_restore_their_own_number_of_threads(n_threads):
    n_threads(2)
    entered, left, errors = threading.Event(), threading.Event(), []

    def train():
        try:
            with threads_of_kernel():
                entered.set()
                left.wait()
        except Exception as error:
            errors.append(error)

    other = threading.Thread(target=train)
    with threads_of_kernel():
        other.start()
        entered.wait()
    left.set()
    other.join()
    assert not errors and th.get_num_threads() == 2


@needs_kernel
def test_what_happens_to_the_optimizer_is_seen():
    tower = make_tower()
    optimizer = th.optim.Adam(tower.parameters())
    compile_blocks(tower)
    flat = FlatParameters.make(tower, optimizer)
    assert flat.holds()
    first = next(tower.parameters())
    for state in ({}, {**optimizer.state[first], "exp_avg": th.zeros_like(first)}):
        whole, optimizer.state[first] = optimizer.state[first], state
        assert not flat.holds()
        optimizer.state[first] = whole
        assert flat.holds()
    optimizer.param_groups[0]["maximize"] = True
    assert not flat.holds()
    optimizer.param_groups[0]["maximize"] = False
    th.optim.lr_scheduler.StepLR(optimizer, 10)
    assert flat.holds()
    optimizer.step = lambda: None
    assert not flat.holds() and FlatParameters.make(tower, optimizer) is None
    del optimizer.step
    optimizer.add_param_group(dict(params=[nn.Parameter(th.zeros(1))]))
    assert not flat.holds()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_kernel)])
def test_models_can_be_pickled(compile):
    settings = dict(depth=4, width=32, batch_size=32, learning_starts=20, compile=compile, seed=0)
    model = DeepCRL("MultiInputPolicy", GoalReachEnv(), **settings).learn(40)
    pickled = pickle.dumps(model)
    # Not a whole network for each parameter
    assert len(pickled) < 4 * sum(value.nbytes for value in model.policy.state_dict().values()) + 200_000
    models = [model, pickle.loads(pickled)]
    observation = model.observation_space.sample()
    outcomes = []
    for each in models:
        action = each.predict(observation, deterministic=True)[0]
        np.random.seed(0)
        th.manual_seed(0)
        each.train(5, 32)
        outcomes.append([th.as_tensor(action), *each.policy.state_dict().values()])
    assert all(map(th.equal, *outcomes))


@needs_kernel
@pytest.mark.parametrize("with_heads", [False, True])
def test_towers_are_called_as_often_as_one_likes(with_heads):
    """Twice before a backward pass, or for nothing."""
    ours, theirs = (nn.ModuleList([make_tower(5, None), nn.Linear(32, 3)]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    compile_blocks(ours[0])
    flat = FlatParameters.make(ours, th.optim.Adam(ours.parameters()))
    x = th.randn(9, 5)

    def loss(modules):
        second = apply_heads(modules[0], 2 * x, modules[1])[0] if with_heads else modules[0](2 * x)
        return modules[0](x).square().sum() + second.sum()

    for _ in range(2):
        with flat.in_place():
            flat.backward(loss(ours))
        theirs.zero_grad()
        loss(theirs).backward()
        assert_close([p.grad for p in ours[0].parameters()], [p.grad for p in theirs[0].parameters()], 1e-4)
    with flat.in_place():
        ours[0](x)
        flat.backward(ours[1].weight.sum())
    assert not any(parameter.grad.any() for parameter in ours[0].parameters())
