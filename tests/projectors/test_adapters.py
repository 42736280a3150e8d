"""PEFT's LoRA on every child, and the line in the log that says why a child is called."""

import copy
import gc
import logging

import peft
import pytest
import torch
from helpers import children_called, features, is_plain, rms_error, small
from torch import nn

from visproj import LinearProjector, fusion, use_backend

TARGETS = {
    "baseline": ["0"],
    "vit": [
        *(f"vis_layer.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *("vis_layer.mlp.fc1", "vis_layer.mlp.fc2", "projection.0"),
    ],
    "perceiver": ["kv_proj", "attn", "attn.out_proj", "projection.1"],
}
CASES = [
    *(
        pytest.param(kind, [target], id=f"{kind}-{target}")
        for kind, targets in TARGETS.items()
        for target in targets
    ),
    pytest.param("vit", TARGETS["vit"], id="vit-all"),
    pytest.param("perceiver", ["kv_proj", "attn", "projection.1"], id="perceiver-all"),
]
# A dozen products: fp64 with PyTorch, fp32 through the kernels; another weight shows as 1e-2.
BACKENDS = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}


def adapt(projector, targets, dtype):
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(projector, config).to(dtype)


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_lora(kind, targets, backend, device):
    dtype, allowed = BACKENDS[backend]
    projector = small(kind, dtype, device)
    x = features(2, 17, dtype=dtype, device=device)
    before = projector(x)
    adapted = adapt(projector, targets, dtype)
    exact = copy.deepcopy(projector).double()
    wanted = children_called(exact, x.double())
    with use_backend(backend):
        out = adapted(x)
    assert rms_error(out, wanted) < allowed
    assert rms_error(out, before) > 1e-2, "the adapter must be visible"

    upstream = torch.randn_like(wanted)
    out.backward(upstream.to(dtype))
    wanted.backward(upstream)
    assert all("lora_" in name for name in trained(adapted))
    assert [name for name, p in adapted.named_parameters() if p.grad is not None] == list(
        trained(adapted)
    )
    for name, parameter in trained(exact).items():
        # Three times as much for gradients, as an op's contract has it.
        assert rms_error(trained(projector)[name].grad, parameter.grad) < 3 * allowed, name

    merged = adapted.merge_and_unload()
    assert merged is projector
    with use_backend(backend):
        assert rms_error(merged(x), wanted) < allowed
    for target in targets:
        child = projector.get_submodule(target)
        assert is_plain(child, type(child)), f"{target} may be read again"


@pytest.mark.parametrize("target", ["0", "kv_proj", "attn.out_proj"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_compiles_whole(target, backend, device):
    """Neither the reason nor the line in the log breaks the graph."""
    torch._dynamo.reset()
    projector = small("baseline" if target == "0" else "perceiver", torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    adapted = adapt(projector, [target], torch.float32)
    with use_backend(backend):
        wanted = adapted(x)
        out = torch.compile(adapted, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)  # another order of fp32 sums


def with_hook(projector):
    projector.kv_proj.register_forward_hook(lambda *_: None)


def with_forward(projector):
    projector.projection[0].forward = lambda x: x


def with_int8(projector):
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    linear.forward = lambda x: x
    projector.projection[1] = linear


def with_dropout(projector):
    projector.attn.dropout = 0.5


def with_lora(projector):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["attn.out_proj"]), projector)


def without_gain(projector):
    projector.ln_kv = nn.LayerNorm(64, elementwise_affine=False)


def with_zero_key(projector):
    projector.attn.add_zero_attn = True


def with_another_tail(projector):
    projector.projection = nn.Linear(64, 64)


def with_weight_norm(projector):
    nn.utils.parametrizations.weight_norm(projector.kv_proj)


LORA = "peft.tuners.lora.layer.Linear"
REASONS = {
    with_hook: ["kv_proj: it has forward_hooks"],
    with_forward: ["projection.0: its forward was replaced"],
    with_int8: ["projection.1: its weight is a Parameter of torch.int8"],
    with_dropout: ["attn: its dropout is active"],
    with_lora: [f"attn.out_proj: it is a {LORA}"],
    without_gain: ["ln_kv: it has no gain"],
    with_zero_key: ["attn: it adds rows to keys and values (bias_k or add_zero_attn)"],
    with_another_tail: ["projection: it is a torch.nn.modules.linear.Linear"],
    with_weight_norm: ["kv_proj: it is a torch.nn.utils.parametrize.ParametrizedLinear"],
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_why_a_child_is_called_is_logged_once(change, caplog):
    projector = small("perceiver", torch.float32)
    x = features(2, 17, dtype=torch.float32)
    with caplog.at_level(logging.DEBUG, "visproj"):
        projector(x)
        assert not caplog.messages
        change(projector.float())
        projector(x)
        projector(x)
    assert caplog.messages == [f"PerceiverProjector calls {reason}" for reason in REASONS[change]]


@pytest.mark.parametrize(
    ("kind", "child"), [("baseline", "0"), ("baseline", "1"), ("vit", "projection.1")]
)
def test_every_projector_logs(kind, child, caplog):
    projector = small(kind)
    handle = projector.get_submodule(child).register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.DEBUG, "visproj"):
        projector(features(2, 17))
        handle.remove()
        replaced = projector.get_submodule(child)
        replaced.forward = type(replaced).forward.__get__(replaced)
        projector(features(2, 17))
    name = type(projector).__name__
    assert caplog.messages == [
        f"{name} calls {child}: it has forward_hooks",
        f"{name} calls {child}: its forward was replaced",
    ]


def test_nothing_is_logged_or_kept_at_other_levels(caplog):
    projector = small("baseline")
    with_hooks = projector[0]
    with_hooks.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "visproj"):
        projector(features(2, 17))
    assert not caplog.messages
    assert projector not in fusion._logged


def test_what_was_told_goes_with_the_module(caplog):
    projector = LinearProjector(32, 64).double()
    projector[0].register_forward_hook(lambda *_: None)
    gc.collect()
    before = len(fusion._logged)
    with caplog.at_level(logging.DEBUG, "visproj"):
        projector(features(2, 17))
    assert len(fusion._logged) == before + 1
    del projector
    gc.collect()
    assert len(fusion._logged) == before
