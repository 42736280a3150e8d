"""The examples of docs/serving.md: what each takes as given, and what comes of it."""

import copy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from docs_commands import python_blocks
from helpers import features, make, rms_error
from resamplers import aria_config
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AriaForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from upstream import UpstreamModel
from vlm.tiny import tiny_language_model, tiny_tokenizer

import visproj
from visproj.errors import InputError

# Folded against unfolded in fp32: other products, a softmax between them and a LayerNorm after it.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
IMAGE = 7
RATE = 1e-3  # of the page's optimisers


def images(count, tokens=17):
    return features(count, tokens, dtype=torch.float32)


def perceiver():
    """A Perceiver that is folded into the form that released sizes are; logits of order 1."""
    projector = make("perceiver", dtype=torch.float32, query_grid=(8, 8), num_heads=2)
    with torch.no_grad():
        projector.attn.in_proj_weight[:128] *= 0.25
    return projector.eval()


def serving(monkeypatch):
    torch._dynamo.reset()  # what other tests have compiled counts towards its limits
    return {"projector": perceiver(), "features": images(3)}


def expected(names, x):
    with torch.no_grad():
        return names["projector"](x)


def check_batches(names, call):
    """The block's own result, and other numbers of images."""
    torch.testing.assert_close(
        torch.as_tensor(names["visual"]), expected(names, names["features"]), **CLOSE
    )
    for count in (1, 2, 5):
        x = images(count)
        torch.testing.assert_close(torch.as_tensor(call(x)), expected(names, x), **CLOSE)


def onnx_done(names):
    session = names["session"]
    (given,) = session.get_inputs()
    assert given.shape[1:] == [17, 32]
    check_batches(names, lambda x: session.run(None, {given.name: x.numpy()})[0])


def compiled_ahead_done(names):
    check_batches(names, names["served"])
    with visproj.use_backend("triton"):  # as on a GPU
        given = (names["folded"], (names["features"],))
        assert own_operations(torch.export.export(*given))
        with visproj.use_backend("torch"):
            assert not own_operations(torch.export.export(*given))
    one = (names["features"][:1],)
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        torch.export.export(names["folded"], one, dynamic_shapes=names["dynamic"])


def own_operations(program):
    targets = {str(node.target) for node in program.graph.nodes}
    return {target for target in targets if target.startswith("visproj.")}


def compiled_done(names):
    check_batches(names, names["compiled"])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2, "several images and one"


def recorded(monkeypatch):
    names = serving(monkeypatch)
    if torch.cuda.is_available():
        names["projector"].cuda()
        names["features"] = names["features"].cuda()
    else:  # there is no CUDA graph to record
        monkeypatch.setattr(visproj, "graphed", lambda folded, features: folded)
    return names


def recorded_done(names):
    other = torch.randn_like(names["features"])
    kept = names["visual"].clone()
    torch.testing.assert_close(names["replay"](other), expected(names, other), **CLOSE)
    torch.testing.assert_close(names["visual"], expected(names, names["features"]), **CLOSE)
    assert torch.equal(names["visual"], kept), "a clone"


def answering(monkeypatch):
    return {
        "projector": perceiver(),
        "features": images(3),
        "language_model": tiny_language_model(),
        "tokenizer": tiny_tokenizer(),
    }


def answering_done(names):
    """Each prompt by itself, its images' tokens put in by hand and nothing padded."""
    visual, model, tokenizer = expected(names, names["features"]), *both(names)
    table = model.get_input_embeddings()
    first = 0
    for prompt, answer in zip(names["prompts"], names["answers"], strict=True):
        parts = prompt.split("<image>")
        ids = [tokenizer(part, return_tensors="pt").input_ids.long() for part in parts]
        rows = [table(ids[0])]
        for after in ids[1:]:
            rows += [visual[first : first + 1], table(after)]
            first += 1
        embeds = torch.cat(rows, 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        with torch.no_grad():
            (alone,) = model.generate(
                inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, do_sample=False
            )
        end = tokenizer.eos_token_id
        assert until(answer, end) == until(alone, end)
        assert len(until(alone, end)) > 0
    assert first == 3
    assert (names["rows"].attention_mask == 0)[:, 0].tolist() == [False, True, True]


def both(names):
    return names["language_model"], names["tokenizer"]


def until(ids, end):
    ids = ids.tolist()
    return ids[: ids.index(end)] if end in ids else ids


def quantised_done(names):
    names_of = [name for name, child in names["folded"].named_modules() if type(child) is nn.Linear]
    replaced = [names["quantised"].get_submodule(name) for name in names_of]
    assert len(replaced) == 2, "keys with values, and the output"
    assert all(child.weight().dtype == torch.qint8 for child in replaced)
    # 8 bits per product: 2**-8 of the largest of some 30 to 60 terms, in two products.
    assert 1e-3 < rms_error(names["visual"], expected(names, names["features"])) < 0.1
    with pytest.raises(InputError, match="save before quantising"):
        names["quantised"].save("quantised.safetensors")
    loaded = visproj.load_folded("folded.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in names["folded"].state_dict().items())


def captioner(monkeypatch):
    return {}


def built(names):
    """The page's model between a Linear projector and a small language model."""
    torch.manual_seed(0)
    return names["Captioner"](visproj.LinearProjector(32, 64), tiny_language_model(), IMAGE)


def samples():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        ids = torch.randint(8, 99, (6,), generator=generator)
        ids[1] = IMAGE
        labels = ids.clone()
        labels[:3] = -100
        found.append(
            {
                "features": torch.randn(5, 32, generator=generator),
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
            }
        )
    return found


def batched(given):
    return {name: torch.stack([sample[name] for sample in given]) for name in given[0]}


def captioner_done(names):
    """The loss is that of the sequence put together by hand."""
    model, batch = built(names), batched(samples())
    table = model.language_model.get_input_embeddings()
    text, visual = table(batch["input_ids"]), model.projector(batch["features"])
    embeds = torch.cat([text[:, :1], visual, text[:, 2:]], 1)
    logits = model.language_model(inputs_embeds=embeds).logits[:, :-1]
    labels = torch.cat([torch.full((2, 1 + 5), -100), batch["labels"][:, 2:]], 1)[:, 1:]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    # fp32: the same products, whose rows may be summed up in another order.
    torch.testing.assert_close(model(**batch)["loss"], wanted, rtol=1e-5, atol=1e-6)


def trainer(monkeypatch):
    names = {}
    (block,) = (block for block in python_blocks() if "class Captioner(" in block)
    exec(block, names)
    model = built(names)
    given = {"projector": model.projector, "language_model": model.language_model}
    return {**names, **given, "image": IMAGE, "samples": samples()}


def trainer_done(names):
    """Four steps of AdamW by hand, with Trainer's schedule and clipping, give the same weights."""
    device = next(names["captioner"].parameters()).device  # Trainer takes a GPU if there is one
    model = built(names).to(device)
    batch = {name: value.to(device) for name, value in batched(names["samples"]).items()}
    before = copy.deepcopy(model.language_model.state_dict())
    start = copy.deepcopy(model.projector.state_dict())
    optimizer = torch.optim.AdamW(model.projector.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    got = names["trained"].state_dict()
    for name, wanted in model.projector.state_dict().items():
        # Trainer's batches have the two samples in any order. AdamW divides a gradient by its own
        # size, so a rounding of it moves a weight by that part of a step.
        torch.testing.assert_close(got[name], wanted.cpu(), rtol=0, atol=0.02 * RATE)
        assert (wanted - start[name]).abs().max() > RATE, "it has moved farther than one step"
    after = names["captioner"].language_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Loss(UpstreamModel):
    """A model with DeepSpeed-VisualChat's Perceiver in it, and a loss."""

    def __init__(self):
        super().__init__("perceiver")
        self.float()
        with torch.no_grad():  # logits of order 1, else a softmax is almost one key
            self.projection.attn.in_proj_weight[:128] *= 0.25

    def forward(self, x, target):
        return (super().forward(x) - target).square().mean()


def processes(monkeypatch):
    """One process, started as torchrun starts it."""
    if dist.is_initialized():  # by an example that failed
        dist.destroy_process_group()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in {**settings, **ranks}.items():
        monkeypatch.setenv(name, str(value))
    model = Loss()
    batches = [(images(2), torch.randn(2, 16, 64)) for _ in range(3)]
    return {
        "model": model,
        "before": copy.deepcopy(model),
        "batches": batches,
        "device": "cpu",
    }


def processes_done(names, clip=float("inf")):
    """The weights are those of upstream's module after the same steps without an engine."""
    model = names["before"]
    start = copy.deepcopy(model.projection.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE)
    for batch in names["batches"]:
        optimizer.zero_grad()
        model(*batch).backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    got, wanted = load_file("projector.safetensors"), model.projection.state_dict()
    assert isinstance(visproj.load_projector("projector.safetensors"), visproj.PerceiverProjector)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        found, moved = got[name], (value - start[name]).abs().max()
        if name == "attn.in_proj_bias":
            # A softmax does not see a bias of all keys: its gradient is nothing but rounding, of
            # which AdamW makes a step of full length.
            found, value = (torch.cat([t[:64], t[128:]]) for t in (found, value))
        # AdamW divides a gradient by its own size, so a rounding of it moves a weight by that part
        # of a step.
        torch.testing.assert_close(found, value, rtol=0, atol=0.02 * RATE)
        assert (name == "pos_embed") == (moved == 0)
        assert name == "pos_embed" or moved > RATE, "it has moved farther than one step"
    assert not dist.is_initialized()


def zero3(monkeypatch):
    names = processes(monkeypatch)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return names


def aria(monkeypatch):
    torch.manual_seed(0)
    model = AriaForConditionalGeneration(aria_config()).eval()
    nn.init.normal_(model.model.multi_modal_projector.query)
    model.save_pretrained("aria")
    return {"before": model}


@torch.no_grad()
def aria_done(names):
    before, loaded = names["before"], names["loaded"]
    assert names["replaced"] == ["model.multi_modal_projector"]
    assert type(loaded.model.multi_modal_projector).__module__.startswith("visproj.")
    assert stored("aria").keys() == stored("aria-trained").keys()
    assert all(torch.equal(stored("aria")[k], v) for k, v in stored("aria-trained").items())
    ids = torch.randint(8, 99, (2, 9))
    ids[:, 1:5] = before.config.image_token_index
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 12, 12)}
    # fp32: sums of some thousand terms in another order.
    torch.testing.assert_close(loaded(**given).logits, before(**given).logits)
    chosen = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**given, **chosen), before.generate(**given, **chosen))


def stored(folder):
    return load_file(Path(folder, "model.safetensors"))


def llava(monkeypatch):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "image_size": 12,
        "patch_size": 3,
    }
    text = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 99,
        "initializer_range": 0.2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained("llava")
    return {"before": model}


@torch.no_grad()
def llava_done(names):
    """All weights but the projector's are LLaVA's; what is loaded is what was saved."""
    model, loaded, before = names["llava"].eval(), names["loaded"].eval(), names["before"]
    projector = loaded.model.multi_modal_projector
    assert isinstance(projector, visproj.PerceiverProjector)
    assert not projector.has_cls
    weights, others = model.state_dict(), names["others"]
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    own = {name for name in weights if name.startswith("model.multi_modal_projector.")}
    assert weights.keys() == own | others.keys()
    assert all(torch.equal(weights[name], before.state_dict()[name]) for name in others)
    table = visproj.positions.sincos_position_table(64)
    assert torch.equal(projector.pos_embed, table.float())
    ids = torch.randint(8, 99, (2, 262))
    ids[:, 1:257] = IMAGE  # as many as there are queries
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 12, 12)}
    # fp32: a product of other addresses may be summed up in another order.
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits)
    chosen = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**given, **chosen), model.generate(**given, **chosen))


# By a line that only this block has: the names that it takes as given, and what comes of it.
EXAMPLES = {
    "torch.onnx.export(folded": (serving, onnx_done),
    "torch._inductor.aoti_compile_and_package(": (serving, compiled_ahead_done),
    "torch.compile(folded, fullgraph=True, dynamic=True)": (serving, compiled_done),
    "replay = visproj.graphed(": (recorded, recorded_done),
    'tokenizer.padding_side, tokenizer.pad_token = "left"': (answering, answering_done),
    "quantised = torch.ao.quantization.quantize_dynamic(": (serving, quantised_done),
    "class Captioner(": (captioner, captioner_done),
    "Trainer(captioner, arguments": (trainer, trainer_done),
    "wrapped = DistributedDataParallel(model)": (processes, processes_done),
    "fully_shard(model.projection, mesh=mesh)": (processes, processes_done),
    "deepspeed.initialize(": (zero3, lambda names: processes_done(names, clip=1.0)),
    'AriaForConditionalGeneration.from_pretrained("aria")': (aria, aria_done),
    "class PerceiverLlava(": (llava, llava_done),
}
# More than 5 s: compilers, and what Trainer imports.
SLOW = {
    "torch.onnx.export(folded",
    "torch._inductor.aoti_compile_and_package(",
    "torch.compile(folded, fullgraph=True, dynamic=True)",
    "Trainer(captioner, arguments",
}
# Only the environment of the distributed tests has DeepSpeed.
DISTRIBUTED = {"deepspeed.initialize("}
