import getpass
import os
import random
import signal
import tempfile

import pytest

# Before PyTorch is imported: the workers of pytest-xdist share the cores
if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(n_workers))))
# Compiled code stays where PyTorch keeps it by default, so that it is compiled once for all workers and runs
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))
# A suite in the background (`nohup ... &`) ignores these signals, and so would all processes that tests start. Those that it
# handles are as by default there
for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": lambda *_: None}.items():
    if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def temp_folder(tmp_path_factory):
    """Make pytest's folder the temp folder, as gymnasium-robotics leaves a file there for each maze it makes."""
    folder = str(tmp_path_factory.mktemp("temp"))
    with pytest.MonkeyPatch.context() as patch:
        # Of this process, and of those that it starts
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Give a test that sets no seed the same random numbers each time, those of environments without a seed included."""
    import numpy as np
    from stable_baselines3.common.utils import set_random_seed

    set_random_seed(0)
    # Where NumPy takes the entropy of a generator without a seed from
    monkeypatch.setattr(np.random.bit_generator, "randbits", random.Random(0).getrandbits)
