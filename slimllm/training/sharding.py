"""A model to train whose decoder is shared out over the processes of a run, by torch's fully_shard (FSDP2).

Of every weight each process holds some rows, in float32, and so of its gradient and its moments. A layer is gathered for as long as
it is computed, forwards and once more backwards.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from ..models.adapter import LayerAdapter
from ..utils import processes


def sharded(student, names: Collection[str], device: torch.device, compute: torch.dtype, offload: bool):
    """A copy of ``student`` to train on ``device``, by all processes together; the student stays as it is, and where it is.

    ``names``: the parameters that are trained: all those of the layers and of the final norm. Of each the copy holds the rows of this
    process, a DTensor in float32, with ``offload`` in the memory of the host; the last processes hold fewer where all cannot have as many.
    It gathers them in ``compute``. All else it holds whole, on ``device``, in ``compute`` or float32. Gradients are sums over the
    processes, in float32. Each process must run the copy as often as the others, forwards and backwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    trained = {id(student.get_parameter(name)) for name in names}
    in_copy = {}
    for parameter in student.parameters():
        own = torch.float32 if parameter.dtype == torch.float32 else compute
        as_it_is = id(parameter) in trained  # until its layer is sharded: there is never a whole copy of all
        in_copy[id(parameter)] = parameter if as_it_is else nn.Parameter(parameter.data.to(device, own), requires_grad=False)
    model = copy.deepcopy(student, in_copy)
    settings = dict(
        mesh=init_device_mesh(device.type, (processes.count(),)),
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(compute, torch.float32),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    adapter = LayerAdapter(student.config)
    decoder, layers = adapter.decoder(model), adapter.layers(model)
    for index, layer in enumerate(layers):
        layers[index] = fully_shard(_to_train(layer), **settings)
    setattr(decoder, adapter.family.final_norm, _to_train(adapter.final_norm(model)))
    fully_shard(decoder, ignored_params={one for one in decoder.parameters() if not one.requires_grad}, **settings)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):  # whose gradients are means over the processes otherwise
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum of multiples
    return model


def _to_train(module: nn.Module) -> nn.Module:
    """A copy whose parameters are in float32, and get gradients."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return module


def is_share(tensor: torch.Tensor) -> bool:
    """Whether this process holds some rows of the tensor only."""
    return hasattr(tensor, "to_local")  # a DTensor, whose class takes a second to import


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory: some rows of a sharded one, all of any other."""
    return tensor.to_local() if is_share(tensor) else tensor


def own_rows(tensor: torch.Tensor) -> slice:
    """Which rows those are."""
    if not is_share(tensor):
        return slice(None)
    begin = processes.rank() * -(-len(tensor) // processes.count())
    return slice(begin, begin + len(tensor.to_local()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a sharded one in every process, each of which has to ask for it."""
    return tensor.full_tensor() if is_share(tensor) else tensor
