"""FSDP2: each process keeps a part of every parameter, of its gradient and of its optimizer state (Zhao et al. 2023, arXiv 2304.11277).

A block (`unimodal.blocks`) is whole only while it runs; what belongs to no block is whole during a step. Parameters without
a dimension (temperatures, gates) cannot be cut: every process has them whole and averages their gradients.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from unimodal.blocks import blocks
from unimodal.layers import Attention


def shard(module: nn.Module, mesh: DeviceMesh, steps: Iterable[str], dtype: torch.dtype | None = None) -> None:
    """Cut the parameters of a module among the processes of a mesh, in place.

    Args:
        module: the same, with the same values, on every process.
        mesh: one-dimensional.
        steps: the methods of `module` that use its parameters; all processes must call them alike.
        dtype: what blocks compute and are exchanged in, for example bfloat16; gradients are averaged in float32. None leaves all as it is.
    """
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    for block in blocks(module):
        reader = getattr(block, "cross_attention", None)
        if isinstance(reader, Attention):  # it projects a memory before its block runs
            fully_shard(reader, mesh=mesh, mp_policy=policy, ignored_params=scalars)
            register_fsdp_forward_method(reader, "project")
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    for step in steps:
        register_fsdp_forward_method(module, step)
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(dist.get_world_size())


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut this module."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which must all ask; any other is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, put together tensor by tensor on the CPU of the first process; empty on the others."""
    state = {}
    for name, tensor in module.state_dict().items():
        together = whole(tensor)
        if dist.get_rank() == 0:
            state[name] = together.cpu()
    return state


def replicate(tensor: Tensor) -> Tensor:
    """As `whole`, but the result still mixes with tensors in parts."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every process, cut as `parameter` is and on its device."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=parameter.placements)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Scale gradients, some in parts and some whole, so that the norm of all together is at most `max_norm`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = ([g for g in gradients if isinstance(g, DTensor)], [g for g in gradients if not isinstance(g, DTensor)])
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.stack(norms).norm())
