import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import randomise, rms_error
from PIL import Image
from qwen_vl.checkpoints import CONFIG
from qwen_vl.oracle import encode_ref
from rounding import rms, roundings, within
from torch import nn
from transformers import CLIPImageProcessor

from visproj import build_projector
from visproj.folding import fold
from visproj.qwen_vl import QwenVisionConfig, QwenVisionTransformer

MEDIUM = QwenVisionConfig(
    image_size=112,
    width=64,
    layers=3,
    heads=4,
    mlp_width=100,
    output_dim=256,
    n_queries=36,
)


def make_encoder(config=CONFIG, dtype=torch.float64):
    encoder = QwenVisionTransformer(config)
    randomise(encoder.requires_grad_())
    return encoder.requires_grad_(False).to(dtype)


def oracle(encoder, images, dtype=torch.float64):
    config = encoder.config
    state = {name: tensor.to(dtype) for name, tensor in encoder.state_dict().items()}
    return torch.stack(
        [
            encode_ref(
                state,
                image.to(dtype),
                heads=config.heads,
                pool_heads=config.pool_heads,
                patch=config.patch_size,
            )
            for image in images
        ]
    )


def pixels(rows, columns, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, 14 * rows, 14 * columns, dtype=dtype)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 1), (16, 16), (20, 17)], ids=str)
@pytest.mark.parametrize(
    "config",
    [CONFIG, MEDIUM, replace(MEDIUM, output_dim=64), replace(CONFIG, positions=9)],
    ids=["small", "medium", "no-kv-proj", "3x3-table"],
)
def test_parity_with_the_oracle(config, grid):
    """fp64 to 1e-12 relative to the largest output, which is of order 1 behind ``ln_post``."""
    encoder, images = make_encoder(config), pixels(*grid)
    got, truth = encoder(images), oracle(encoder, images)
    assert got.shape == (2, config.n_queries, config.output_dim)
    assert (got - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_oracle_sees_the_interleaving():
    """With [q | k | v] laid out block-wise instead of per head the result is another one."""
    encoder, images = make_encoder(), pixels(4, 4)
    before = oracle(encoder, images)
    linear, heads = encoder.transformer.resblocks[0].attn.in_proj, CONFIG.heads
    linear.weight.copy_(linear.weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2))
    assert rms_error(encoder(images), before) > 0.01
    assert rms_error(encoder(images), oracle(encoder, images)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype):
    """At most twice as far from fp64 as the oracle's own steps taken in the same dtype.

    A CPU's kernels for convolution and products may sum up in a better order for the one than for
    the other, so what rounding moves the result is allowed as well.
    """
    encoder = make_encoder(MEDIUM).to(dtype)
    images = pixels(8, 8, dtype=dtype)
    got, truth = encoder(images.float()), oracle(encoder, images)
    assert got.dtype == dtype
    accepted = oracle(encoder, images, dtype) - truth
    within(rms, got - truth, 2 * rms(accepted), lambda: moved(encoder, images, dtype), "features")


def moved(encoder, images, dtype):
    """How far rounding moves the features."""
    return roundings(lambda: [oracle(encoder, images)], dtype)[0]


def test_empty_batch():
    assert make_encoder()(pixels(4, 4, batch=0)).shape == (0, 16, 48)


def test_attention_copies_nothing():
    """q, k and v are views of what ``in_proj`` gave."""
    seen = []
    encoder = make_encoder()
    attention = encoder.transformer.resblocks[0].attn
    attention.in_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    real = nn.functional.scaled_dot_product_attention

    def record(q, k, v, **options):
        seen.extend([q, k, v])
        return real(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", record)
        attention(torch.randn(2, 5, 32, dtype=torch.float64))
    projected, *views = seen
    addresses = {view.untyped_storage().data_ptr() for view in views}
    assert addresses == {projected.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 56, 57), ValueError, "positive multiples of 14, got 56x57"),
        (torch.zeros(1, 3, 0, 56), ValueError, "positive multiples of 14, got 0x56"),
        (torch.zeros(1, 4, 56, 56), ValueError, r"must be \[B, 3, h, w\], got shape \[1, 4"),
        (torch.zeros(3, 56, 56), ValueError, r"must be \[B, 3, h, w\], got shape \[3, 56"),
        (torch.zeros(1, 3, 56, 56).byte(), TypeError, "floating point, got torch.uint8"),
        (np.zeros((1, 3, 56, 56)), TypeError, "must be a tensor, got ndarray"),
        (torch.zeros(1, 3, 56, 56, device="meta"), ValueError, "one device, got meta and cpu"),
    ],
    ids=["side", "empty", "channels", "no-batch", "integer", "numpy", "device"],
)
def test_unsuitable_pixels(images, error, message):
    with pytest.raises(error, match=message):
        make_encoder()(images)


def test_frozen_until_asked():
    encoder = QwenVisionTransformer(CONFIG)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_()
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == ["attn_pool.pos_embed"]


def test_fresh_weights_follow_upstream():
    torch.manual_seed(1)
    encoder = QwenVisionTransformer(replace(MEDIUM, width=256, output_dim=512))
    pool = encoder.attn_pool
    for tensor, deviation in (
        (encoder.positional_embedding, 256**-0.5),
        (pool.query, 0.02),
        (pool.kv_proj.weight, 0.02),
        (pool.attn.out_proj.weight, 0.02),
        (pool.attn.in_proj_weight, (2 / (4 * 512)) ** 0.5),  # Xavier over 1536 x 512
    ):
        assert tensor.std().item() == pytest.approx(deviation, rel=0.05)
    assert not pool.attn.out_proj.bias.any()


def test_gradient_checkpointing_changes_no_gradient():
    images = pixels(4, 4)
    encoder = make_encoder().requires_grad_()
    gradients = []
    for enable in (False, True):
        if enable:
            encoder.gradient_checkpointing_enable()
        assert encoder.is_gradient_checkpointing == enable
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    assert gradients[0]["attn_pool.pos_embed"] is None
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_gradient_checkpointing_keeps_fewer_tensors():
    def kept(encoder):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(pixels(4, 4)).sum()
        return count

    encoder = make_encoder(MEDIUM).requires_grad_()
    plain = kept(encoder)
    encoder.gradient_checkpointing_enable({"preserve_rng_state": False})
    assert kept(encoder) < plain / 2
    encoder.gradient_checkpointing_disable()
    assert kept(encoder) == plain


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)], ids=str)
def test_resized_tables_follow_the_weights(grid):
    """Neither loading, nor writing in place, nor a copy of the module sees an old table."""
    encoder, images = make_encoder(), pixels(*grid)
    with torch.inference_mode():
        encoder(images)
    for change in (
        lambda: encoder.positional_embedding.mul_(2),
        lambda: encoder.load_state_dict(make_encoder().state_dict()),
        lambda: encoder.attn_pool.pos_embed.add_(1),
        lambda: encoder.float().double(),
    ):
        change()
        torch.testing.assert_close(encoder(images), oracle(encoder, images))
    clone = copy.deepcopy(encoder)
    clone.positional_embedding.mul_(3)
    torch.testing.assert_close(clone(images), oracle(clone, images))


def test_training_after_inference_mode():
    encoder, images = make_encoder(), pixels(3, 3)
    with torch.inference_mode():
        encoder(images)
    encoder.ln_post.requires_grad_()
    encoder.conv1.requires_grad_()
    encoder(images).sum().backward()
    assert encoder.conv1.weight.grad is not None


def test_pooling_calls_its_attention_where_that_is_not_plain():
    """A hook on the attention, or something else in its place, is honoured."""
    encoder, images = make_encoder(), pixels(4, 4)
    expected = encoder(images)
    calls = []
    handle = encoder.attn_pool.attn.register_forward_hook(lambda *call: calls.append(call))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-10, atol=1e-12)
    assert len(calls) == 1
    handle.remove()

    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **options):
            out, maps = super().forward(*args, **options)
            return out * 2, maps

    doubled = Doubled(48, 1).double()
    doubled.load_state_dict(encoder.attn_pool.attn.state_dict())
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    plain = encoder.attn_pool(x)
    encoder.attn_pool.attn = doubled
    torch.testing.assert_close(encoder.attn_pool(x), 2 * plain)


@pytest.mark.parametrize("grid", [(6, 6), (3, 5)], ids=str)
def test_pooling_can_be_folded(grid):
    """The pooling folds like any Perceiver, and the encoder runs with the folded one."""
    encoder, images = make_encoder(MEDIUM), pixels(*grid)
    expected = encoder(images)
    encoder.attn_pool = fold(encoder.attn_pool, grid=grid)
    encoder.requires_grad_(False)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-9, atol=1e-10)


def test_autocast():
    encoder, images = make_encoder(MEDIUM).float(), pixels(8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(images)
    truth = oracle(encoder, images)
    accepted = oracle(encoder, images, torch.bfloat16) - truth
    scale = partial(moved, encoder, images, torch.bfloat16)
    within(rms, got - truth, 2 * rms(accepted), scale, "features")


def test_from_a_photograph_to_the_language_model(tmp_path):
    """What is written loads into ``CLIPImageProcessor``, the encoder and the baseline projector."""
    QwenVisionTransformer(CONFIG).save_pretrained(tmp_path / "encoder")
    encoder = QwenVisionTransformer.from_pretrained(tmp_path / "encoder")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "encoder")
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    images = processor(photograph, return_tensors="pt")["pixel_values"]
    assert images.shape == (1, 3, 56, 56)
    projector = build_projector("baseline", encoder.config, 4096, encoder="qwen-vl")
    assert projector(encoder(images)).shape == (1, 16, 4096)


def test_preprocessing_is_upstreams(tmp_path):
    config = QwenVisionConfig(layers=1, width=16, mlp_width=16, output_dim=32)
    QwenVisionTransformer(config).save_pretrained(tmp_path / "encoder")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "encoder")
    upstream = CLIPImageProcessor.from_dict(
        {
            "crop_size": 448,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 448,
        }
    )
    photograph = Image.effect_noise((500, 700), 50).convert("RGB")
    got, expected = (p(photograph, return_tensors="pt") for p in (processor, upstream))
    assert got["pixel_values"].shape == (1, 3, 448, 448)
    assert torch.equal(got["pixel_values"], expected["pixel_values"])


def test_saving_refuses_what_could_not_be_loaded(tmp_path):
    encoder = QwenVisionTransformer(CONFIG)
    encoder.ln_post = nn.Sequential(encoder.ln_post)
    with pytest.raises(ValueError, match=r"missing ln_post\.weight.*unexpected ln_post\.0\.weight"):
        encoder.save_pretrained(tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []
