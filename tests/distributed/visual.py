"""Encoder, projector and language model together under FSDP2: what workers run, and one process."""

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from vlm.tiny import tiny_model, tiny_photograph
from vlm.training_models import dialogue

from visproj.vlm.loading import Example, Picture, collate, encoded
from visproj.vlm.preparing import DialogueEncoder
from visproj.vlm.samples import Columns, read_sample
from visproj.vlm.trainer import load_projector
from visproj.weights import whole_state

STEPS, SAMPLES = 6, 8
# Not Adam: it makes full steps of gradients that are zero but for rounding, as the keys' bias.
RATE = 0.02


def collated(model, step, share=slice(None)):
    """Conversations with no image, one, or several, and with several turns."""
    encode, columns = DialogueEncoder(model, None), Columns(conversation="conversations")
    examples = []
    for number in range(SAMPLES)[share]:
        sample = read_sample(dialogue(number), columns, "")
        images = [tiny_photograph(100 * step + 10 * number + k) for k in range(number % 3)]
        pictures = [Picture(pixels, "") for pixels in model.encoder.preprocess(images)]
        examples.append(Example(encode(sample, len(images))[0], pictures, []))
    batch = collate(examples)
    del batch["faults"]
    features = encoded(batch.pop("contents"), batch.pop("digests"), model, None)
    return {"features": features, **batch}


def losses_of(model, share=slice(None), world=1, steps=range(STEPS)):
    """Losses of the whole batch over SGD's steps."""
    parameters = [p for p in model.projector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, RATE)
    losses = []
    for step in steps:
        batch = collated(model, step, share)
        count = (batch["labels"] >= 0).sum()
        if world > 1:
            dist.all_reduce(count)
        loss = model.train()(**batch, num_items_in_batch=count)["loss"]
        (loss * world).backward()  # FSDP takes the mean of the processes' gradients
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def alone(kind):
    """One process."""
    model = tiny_model(kind)
    return losses_of(model), dict(model.projector.module.state_dict())


def sharded(kind):
    model = tiny_model(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.projector, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def trained(kind):
    """Losses, and the projector's weights gathered."""
    world = dist.get_world_size()
    model = sharded(kind)
    losses = losses_of(model, slice(dist.get_rank(), None, world), world)
    with whole_state(model.projector.module) as state:
        return losses, {name: tensor.clone() for name, tensor in state.items()}


def loaded(kind, folder):
    """A checkpoint's weights put into a sharded projector and gathered again."""
    model = sharded(kind)
    load_projector(model.projector, folder)
    with whole_state(model.projector.module) as state:
        got = {name: tensor.clone() for name, tensor in state.items()}
    want = load_file(folder / "model.safetensors")
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
