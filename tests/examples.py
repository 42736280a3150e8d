"""The Python examples of README and docs: the names that each takes as given, and what it gives."""

import logging
from pathlib import Path

import examples_serving as serving
import pytest
import torch
from qwen_vl.checkpoints import write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from upstream import UpstreamModel
from vlm.tiny import (
    TinyEncoder,
    tiny_language_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

import visproj
from benchmarks.published import Holder, MiniCPM
from visproj import PerceiverProjector, PretrainedProjector


def projector(monkeypatch):
    return {
        "checkpoint": PerceiverProjector(1024, 4096).state_dict(),
        "features": torch.randn(2, 257, 1024),
        "wide_features": torch.randn(1, 769, 1024).bfloat16(),
        "text_embeds": torch.randn(2, 4, 4096),
        "input_ids": torch.tensor([[1, 7, 2, 3], [7, 4, 5, 6]]),
        "images_per_sample": [1, 1],
        "image_token_id": 7,
    }


def projector_done(names):
    assert names["sequence"].attention_mask.sum(1).tolist() == [259, 259]
    assert names["attention"].shape == (1, 32, 256, 768)
    torch.testing.assert_close(names["attention"].sum(-1), torch.ones(1, 32, 256))


def converted(monkeypatch):
    """A model that holds one of the resamplers which `convert` finds."""
    return {"model": Holder(MiniCPM(vis_dim=24, dim=32, max_size=(32, 32)).eval())}


def converted_done(names):
    assert visproj.revert(names["model"]) == ["resampler"]
    assert type(names["model"].resampler) is MiniCPM


def visualchat(monkeypatch):
    model = UpstreamModel("perceiver")
    weight = model.projection.kv_proj.weight
    features = torch.randn(2, 257, weight.shape[1], dtype=weight.dtype)
    before = [p.detach().clone() for p in model.projection.parameters()]
    return {"model": model, "features": features, "before": before}


def visualchat_done(names):
    projection = names["model"].projection
    assert names["names"] == ["projection"]
    assert type(projection).__name__ == "UpstreamPerceiver"
    learned = [p for p in projection.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    after = projection.parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, names["before"], strict=True))


def checkpoint(monkeypatch):
    model = UpstreamModel("perceiver")
    Path("checkpoint").mkdir()
    torch.save(model.state_dict(), "checkpoint/pytorch_model.bin")
    return {"visproj": visproj, "expected": model.projection.state_dict()}


def checkpoint_done(names):
    assert isinstance(names["projector"], PerceiverProjector)
    got = names["projector"].state_dict()
    assert got.keys() == names["expected"].keys()
    assert all(torch.equal(got[key], value) for key, value in names["expected"].items())


def building(monkeypatch):
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=4096,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=32,
        )
    )
    input_ids = torch.tensor([[1, 7, 2, 7], [0, 7, 5, 6]])
    return {
        "language_model": language_model,
        "features": torch.randn(3, 257, 1024),
        "input_ids": input_ids,
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
        "text_embeds": language_model.get_input_embeddings()(input_ids),
    }


def building_done(names):
    assert names["sequence"].attention_mask.sum(1).tolist() == [2 + 2 * 256, 2 + 256]
    assert names["sequence"].attention_mask[1, :256].sum() == 0  # padding is on the left
    assert names["logits"].shape == (2, 514, 11)
    assert names["logits"].isfinite().all()


def models(monkeypatch):
    model = Holder(MiniCPM(vis_dim=24, dim=32, max_size=(32, 32)).eval())
    return {
        "visproj": visproj,
        "model": model,
        "features": torch.randn(2, 20, 24),
        "tgt_sizes": torch.tensor([[4, 5], [2, 3]], dtype=torch.int32),
        "first": torch.randn(32 * 32, 24),
        "second": torch.randn(24 * 18, 24),
        "rows": torch.randn(32 * 32 + 24 * 18, 24),
        "starts": torch.tensor([0, 1024, 1456], dtype=torch.int32),
    }


def models_done(names):
    assert names["visual"].shape == (2, 5, 32)
    assert visproj.revert(names["model"]) == ["resampler"]


def folding(monkeypatch):
    if not torch.cuda.is_available():  # there is no CUDA graph to record
        monkeypatch.setattr(visproj, "graphed", lambda folded, features: folded)
    projector = PerceiverProjector(32, 64)
    return {"visproj": visproj, "projector": projector, "features": torch.randn(1, 577, 32)}


def folding_done(names):
    expected = names["projector"](names["features"])
    with torch.no_grad():
        got = names["call"](names["features"])
    # Exact up to fp32's rounding of other products.
    torch.testing.assert_close(got, expected.detach(), rtol=1e-3, atol=1e-4)
    assert not names["folded"].is_stale(names["projector"])


def qwen_encoder(monkeypatch):
    write_checkpoint(Path("checkpoint"))
    visproj.extract_vision_encoder("checkpoint", "encoder")
    return {"photograph": tiny_photograph()}


def qwen_encoder_done(names):
    assert names["visual"].shape == (1, 16, 4096)  # the small checkpoint has 16 queries


def trained(monkeypatch):
    tiny_projector("perceiver").save_pretrained("visproj-train/perceiver/projector")
    language_model = ("tiny-llama", tiny_language_model(), tiny_tokenizer())
    monkeypatch.setattr("visproj.vlm.encoders.load_encoder", TinyEncoder)
    monkeypatch.setattr("visproj.vlm.language.load_language_model", lambda: language_model)
    return {"photograph": tiny_photograph()}


def trained_done(names):
    assert isinstance(names["model"].projector, PretrainedProjector)
    assert type(names["folded"]).__name__ == "FoldedPerceiver"


def logged(monkeypatch):
    monkeypatch.setattr(LOGGER, "level", LOGGER.level)
    monkeypatch.setattr(logging, "basicConfig", lambda: None)  # pytest's handlers stay
    return {}


def logged_done(names):
    assert LOGGER.isEnabledFor(logging.DEBUG)


def timed(monkeypatch):
    return {}


def timed_done(names):
    assert names["dtype"] is torch.bfloat16
    assert names["timer"].timeit(1).median > 0


LOGGER = logging.getLogger("visproj")
# By a line that only this block has.
EXAMPLES = {
    "sequence = insert_visual_tokens(text_embeds, input_ids, visual, images": (
        projector,
        projector_done,
    ),
    "visproj.convert(model)  # to train": (converted, converted_done),
    "names = visproj.convert(model)": (visualchat, visualchat_done),
    "visproj.load_visualchat_projector(": (checkpoint, checkpoint_done),
    "visual = model.resampler(features, tgt_sizes)": (models, models_done),
    "CLIPVisionConfig(hidden_size=1024": (building, building_done),
    "folded.is_stale(projector)": (folding, folding_done),
    "encoder = QwenVisionTransformer.from_pretrained(": (qwen_encoder, qwen_encoder_done),
    "model.generate([photograph]": (trained, trained_done),
    'logging.getLogger("visproj").setLevel(': (logged, logged_done),
    "from torch.utils.benchmark import Timer": (timed, timed_done),
    **serving.EXAMPLES,
}
MARKS = {
    **dict.fromkeys(serving.SLOW, pytest.mark.slow),
    **dict.fromkeys(serving.DISTRIBUTED, pytest.mark.distributed),
    # At released sizes, of which some CPUs take seconds per product in bf16.
    "sequence = insert_visual_tokens(text_embeds, input_ids, visual, images": pytest.mark.slow,
    "CLIPVisionConfig(hidden_size=1024": pytest.mark.slow,
    "from torch.utils.benchmark import Timer": pytest.mark.slow,
}
