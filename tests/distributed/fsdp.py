"""The cases under FSDP2. The functions that tests call run in workers."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.training import ADAM, AFTER, BEFORE, Result, batch, build, mean, train, trainable
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from visproj import save_projector


def shard(model, case, apart=False):
    """Shard the projector and the model around it, and with ``apart`` the projector's children."""
    low = case.dtype != torch.float32
    options = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        # The targets stay in fp32, and gradients are summed in it.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=case.dtype if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        ),
    }
    units = list(units_of(model.projector)) if apart else []
    for module in (*units, model.projector, model):
        fully_shard(module, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def units_of(module):
    """The modules that nothing but their own forward reads, down to Linears and LayerNorms."""
    for child in module.children():
        if isinstance(child, nn.Linear | nn.LayerNorm | nn.MultiheadAttention):
            yield child
        else:
            yield from units_of(child)


def optimizer_of(model):
    return torch.optim.Adam(trainable(model), **ADAM)


def updater(optimizer):
    def update(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def gathered(model):
    """A plain state dict, on every rank."""
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def trained(case, apart=False):
    model = shard(build(case), case, apart)
    losses, calls = train(case, model, updater(optimizer_of(model)))
    return Result(losses, gathered(model), calls)


def interrupted(case, directory):
    """Half of the steps, a checkpoint, and the other half in a new model that has loaded it."""
    model = shard(build(case), case)
    optimizer = optimizer_of(model)
    losses, calls = train(case, model, updater(optimizer), BEFORE)
    dcp.save(state_of(model, optimizer), checkpoint_id=directory)
    model = shard(build(case), case)
    optimizer = optimizer_of(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, **state)
    more_losses, more_calls = train(case, model, updater(optimizer), AFTER)
    return Result(losses + more_losses, gathered(model), calls + more_calls)


def state_of(model, optimizer):
    """What a checkpoint holds, by the names that ``set_state_dict`` has for it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model_state_dict": model_state, "optim_state_dict": optimizer_state}


def loaded(case, state):
    """A plain state dict put in and taken out again, and the loss with it of the first batch."""
    model = shard(build(case), case)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        loss = mean(model(*batch(case, 0, dist.get_rank())))
    return loss, gathered(model)


def saved(case, path):
    """The projector alone, written from its pieces."""
    save_projector(shard(build(case), case).projector, path)
