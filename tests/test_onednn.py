"""Linear layers of inference through oneDNN: the same numbers, and only where they are what it computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unimodal.onednn import FEWEST_ROWS, inference

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Calls(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def convolved(work) -> bool:
    with Calls() as calls, inference():
        work()
    return any(name.startswith("conv") for name in calls.names)


@ONEDNN
@pytest.mark.parametrize("shape", [(FEWEST_ROWS,), (4, 40), (2, 3, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_one_in_double_precision(shape, bias) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(*shape, 24)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with inference():
        found = layer(x)
    assert convolved(lambda: layer(x))
    assert found.shape == (*shape, 40) and found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@ONEDNN
def test_rows_that_do_not_lie_side_by_side() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8), torch.randn(24, 100).t()
    with inference():
        found = layer(x)
    torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)


def test_all_else_is_left_to_torch() -> None:
    layer, x = nn.Linear(24, 8), torch.randn(100, 24)
    assert not convolved(lambda: layer(x[:1]))
    assert not convolved(lambda: layer(x[:0]))
    assert not convolved(lambda: F.linear(x.bfloat16(), layer.weight.bfloat16()))
    assert not convolved(lambda: F.linear(x.double(), layer.weight.double()))
    assert not convolved(lambda: F.linear(x, layer.weight[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolved(lambda: layer(x))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not convolved(lambda: layer(x))
    with Calls() as calls:
        layer(x)
    assert not any(name.startswith("conv") for name in calls.names)


def test_it_is_inference_and_ends() -> None:
    layer, x = nn.Linear(24, 8), torch.randn(100, 24)

    @inference()
    def read() -> torch.Tensor:
        return layer(x)

    assert read().is_inference() and not layer(x).is_inference()
    with pytest.raises(TypeError):
        inference()(lambda: layer(x, x))()
    assert layer(x).requires_grad
