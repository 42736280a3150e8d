"""The cases under DeepSpeed ZeRO. The functions that tests call run in workers."""

from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from distributed.training import (
    ADAM,
    AFTER,
    BEFORE,
    IMAGES,
    WORLD,
    Result,
    batch,
    build,
    fresh,
    initial_state,
    mean,
    train,
    trainable,
)

from visproj import save_projector


def settings(case, stage):
    """PyTorch's Adam, gradients not clipped, and every parameter partitioned however small."""
    return {
        "train_micro_batch_size_per_gpu": IMAGES // WORLD,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.dtype == torch.bfloat16},
        "optimizer": {
            "type": "Adam",
            "params": {**ADAM, "torch_adam": True, "adam_w_mode": False, "weight_decay": 0.0},
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def engine_of(model, case, stage):
    config = settings(case, stage)
    return deepspeed.initialize(model=model, model_parameters=trainable(model), config=config)[0]


def updater(engine):
    def update(loss):
        engine.backward(loss)
        engine.step()

    return update


def result_of(engine, losses, calls):
    """Weights as the optimizer has them, in fp32."""
    state = gathered(engine.module)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state[name] = safe_get_full_fp32_param(parameter).clone()
    return Result(losses, state, calls)


def gathered(module):
    """A plain state dict, on every rank."""
    partitioned = any(hasattr(p, "ds_id") for p in module.parameters())
    gather = deepspeed.zero.GatheredParameters if partitioned else nullcontext
    with gather(list(module.parameters())):
        return {name: tensor.float().clone() for name, tensor in module.state_dict().items()}


def trained(case, stage, model=None):
    engine = engine_of(build(case) if model is None else model, case, stage)
    result = result_of(engine, *train(case, engine, updater(engine)))
    engine.destroy()
    return result


def trained_from_zero_init(case, stage):
    """Built in pieces, given the plain weights, trained: the fresh weights and the result."""
    with deepspeed.zero.Init(config_dict_or_path=settings(case, stage)):
        torch.manual_seed(0)
        model = fresh(case)
    assert all(p.numel() == 0 for p in model.parameters()), "nothing is held whole"
    own_weights = gathered(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        if dist.get_rank() == 0:
            model.load_state_dict(initial_state(case))
    return own_weights, trained(case, stage, model)


def interrupted(case, directory, stage):
    """Half of the steps, a checkpoint, and the other half in a new engine that has loaded it."""
    engine = engine_of(build(case), case, stage)
    losses, calls = train(case, engine, updater(engine), BEFORE)
    engine.save_checkpoint(directory)
    engine.destroy()
    engine = engine_of(build(case), case, stage)
    path, _ = engine.load_checkpoint(directory)
    assert path is not None, "there is a checkpoint"
    more_losses, more_calls = train(case, engine, updater(engine), AFTER)
    result = result_of(engine, losses + more_losses, calls + more_calls)
    engine.destroy()
    return result


def loaded(case, state, stage):
    """A plain state dict put in and taken out again, and the loss with it of the first batch."""
    engine = engine_of(build(case, state), case, stage)
    with torch.no_grad():
        loss = mean(engine(*batch(case, 0, dist.get_rank())))
    taken_out = gathered(engine.module)
    engine.destroy()
    return loss, taken_out


def saved(case, path, stage):
    """The projector alone, written from its pieces."""
    engine = engine_of(build(case), case, stage)
    save_projector(engine.module.projector, path)
    engine.destroy()
