"""What every test may rely on: no network, one thread, a fixed seed, empty caches."""

import os
import socket
import tempfile

import numpy as np
import pytest
import torch

# huggingface_hub reads these once, at its own import, which comes later.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="unimodal-test-hf-")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="unimodal-test-cache-")
# Compiled kernels of another run may be for another kind of processor, and end the process.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="unimodal-test-inductor-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

torch.set_num_threads(1)

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _refuse_outside(family: int, address) -> None:
    local = family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
    if not local:
        raise OSError(f"tests run without a network; something tried to reach {address}")


def _guarded_connect(self, address):
    _refuse_outside(self.family, address)
    return _connect(self, address)


def _guarded_connect_ex(self, address):
    _refuse_outside(self.family, address)
    return _connect_ex(self, address)


def _guarded_getaddrinfo(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
        raise OSError(f"tests run without a network; something looked up {host!r}")
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded_connect_ex  # type: ignore[method-assign]
socket.getaddrinfo = _guarded_getaddrinfo


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
