"""Resamplers of MiniCPM-V, Qwen-VL, Aria and Kosmos-2 converted, folded and put back."""

import copy
import io

import peft
import pytest
import torch
from helpers import features, rms_error
from resamplers import (
    MAKERS,
    RESIZED,
    aria_config,
    calls,
    kosmos2_config,
    not_causal,
    output,
    published,
    state,
)
from torch import nn
from transformers import AriaForConditionalGeneration, Kosmos2ForConditionalGeneration
from upstream import KINDS, UpstreamModel

import visproj
from benchmarks.published import Holder, MiniCPM, QwenVL
from visproj.errors import InputError
from visproj.recognition import PROJECTORS

NAMES = tuple(MAKERS)
FORMS = ("keys", "absorbed")


def close(got, wanted, name):
    """fp64 chains of a dozen products, the largest number as the measure."""
    bound = 1e-6 if name in RESIZED else 1e-12
    assert (got - wanted).abs().max() <= bound * wanted.abs().max()


def same(got, wanted, name):
    """Results of one call, whatever its kind."""
    assert type(got) is type(wanted)
    close(output(got), output(wanted), name)
    if isinstance(got, tuple):
        assert (got[1] is None) == (wanted[1] is None)
        if got[1] is not None:
            close(got[1], wanted[1], name)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    module = published(name)
    model = Holder(module)
    named = [(key, id(p)) for key, p in model.named_parameters()]
    before = state(model)
    wanted = [module(*call) for call in calls_of(name)]
    assert visproj.convert(model) == ["resampler"]
    assert isinstance(model.resampler, PROJECTORS)
    assert [(key, id(p)) for key, p in model.named_parameters()] == named
    assert list(model.state_dict()) == list(before)
    for call, expected in zip(calls_of(name), wanted, strict=True):
        same(model(*call), expected, "exactly" if name != "minicpm-v-1.0" else name)
    assert visproj.revert(model) == ["resampler"]
    assert model.resampler is module
    assert [(key, id(p)) for key, p in model.named_parameters()] == named
    after = state(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    for call, expected in zip(calls_of(name), wanted, strict=True):
        assert torch.equal(output(module(*call)), output(expected))


def calls_of(name):
    torch.manual_seed(1)
    return calls(name)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    model = Holder(published(name))
    gradients = []
    for change in (lambda model: None, visproj.convert):
        change(model)
        for call in calls_of(name)[:3]:
            x = call[0].clone().requires_grad_()
            model.zero_grad()
            output(model(x, *call[1:])).square().sum().backward()
            found = [p.grad for p in model.resampler.parameters() if p.grad is not None]
            gradients.append([x.grad, *(grad.clone() for grad in found)])
    half = len(gradients) // 2
    for plain, converted in zip(gradients[:half], gradients[half:], strict=True):
        assert len(plain) == len(converted)
        largest = max(grad.abs().max() for grad in plain)
        for one, other in zip(plain, converted, strict=True):
            # Some gradients are zero but for roundings of what cancels in the softmax.
            assert (one - other).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folded(name, form, tmp_path):
    model = Holder(published(name))
    wanted = [model(*call) for call in calls_of(name)]
    visproj.convert(model)
    folded = visproj.fold(model.resampler, form=form)
    assert folded.config["form"] == form
    folded.save(tmp_path / "folded.safetensors")
    loaded = visproj.load_folded(tmp_path / "folded.safetensors")
    assert loaded.config == folded.config
    assert not folded.is_stale(model.resampler)
    for call, expected in zip(calls_of(name), wanted, strict=True):
        same(folded(*call), expected, name)
        same(loaded(*call), expected, name)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_convert_and_fold(name):
    module = published(name)
    model, call = Holder(module), calls_of(name)[0]
    wanted = model(*call)
    assert visproj.convert(model, fold=True) == ["resampler"]
    same(model(*call), wanted, name)
    with pytest.raises(InputError, match=r"resampler was folded .* keep=True"):
        model.state_dict()
    with pytest.raises(InputError, match="load the model before"):
        model.load_state_dict(state(Holder(module)))
    assert model.resampler.state_dict()
    with pytest.raises(InputError, match="folded without keep=True"):
        visproj.revert(model)
    same(model(*call), wanted, name)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keep(name):
    module = published(name)
    model, call = Holder(module), calls_of(name)[0]
    before = state(model)
    wanted = model(*call)
    visproj.convert(model, fold=True, keep=True)
    same(model(*call), wanted, name)
    other = copy.deepcopy(model)
    for one in (model, other):
        kept = one.state_dict()
        assert list(kept) == list(before)
        assert all(torch.equal(kept[key], before[key]) for key in before)
        file = io.BytesIO()
        torch.save(kept, file)
        assert visproj.revert(one) == ["resampler"]
        one.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        assert torch.equal(output(one(*call)), output(wanted))
    assert model.resampler is module


def test_what_is_ours_already_is_folded():
    model = Holder(published("minicpm-v-2.6"))
    visproj.convert(model)
    ours = model.resampler
    assert visproj.convert(model) == []
    assert visproj.convert(model, fold=True, keep=True, dtype=torch.float32) == ["resampler"]
    assert model.resampler.like.dtype == torch.float32
    assert visproj.convert(model, fold=True) == []
    assert visproj.revert(model) == ["resampler"]
    assert type(model.resampler) is MiniCPM
    projector = Holder(visproj.PerceiverProjector(8, 16, query_grid=(2, 2), num_heads=2))
    ours = projector.resampler
    visproj.convert(projector, fold=True, keep=True)
    assert visproj.revert(projector) == ["resampler"]
    assert projector.resampler is ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [False, True])
@torch.no_grad()
def test_projectors_of_visualchat_fold_in_place(kind, keep):
    model, x = UpstreamModel(kind), features(2, 17)
    model.eval()
    wanted, before = model(x), state(model)
    assert visproj.convert(model, fold=True, keep=keep) == ["projection"]
    close(model(x), wanted, kind)
    if keep:
        assert list(model.state_dict()) == list(before)
        assert visproj.revert(model) == ["projection"]
        assert torch.equal(model(x), wanted)
    else:
        assert model.projection.state_dict()
        with pytest.raises(InputError, match="projection was folded"):
            model.state_dict()


def test_keep_follows_casts_and_moves():
    model = Holder(published("aria"))
    visproj.convert(model, fold=True, keep=True)
    model.float()
    assert model.state_dict()["resampler.query"].dtype == torch.float32


@pytest.mark.parametrize("option", [{"keep": True}, {"dtype": torch.float16}])
def test_options_of_folding_alone(option):
    with pytest.raises(InputError, match="pass fold=True"):
        visproj.convert(Holder(QwenVL()), **option)


def aria():
    torch.manual_seed(0)
    model = AriaForConditionalGeneration(aria_config()).eval()
    nn.init.normal_(model.model.multi_modal_projector.query)
    ids = torch.randint(8, 99, (2, 9))
    ids[:, 1:5] = 7
    pixels = torch.randn(2, 3, 12, 12)
    return model, {"input_ids": ids, "pixel_values": pixels}, "model.multi_modal_projector"


def kosmos2(implementation):
    torch.manual_seed(0)
    config = kosmos2_config(implementation)
    model = Kosmos2ForConditionalGeneration(config).eval()
    not_causal(model.image_to_text_projection)
    ids = torch.randint(8, 99, (2, 9))
    mask = torch.zeros(2, 9, dtype=torch.long)
    mask[:, 1:6] = 1
    pixels = torch.randn(2, 3, 12, 12)
    arguments = {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_embeds_position_mask": mask,
        "attention_mask": torch.ones_like(ids),
    }
    return model, arguments, "image_to_text_projection"


MODELS = {
    "aria": aria,
    "kosmos-2": lambda: kosmos2("sdpa"),
    "kosmos-2, eager": lambda: kosmos2("eager"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fold", [False, True])
def test_whole_models_generate_the_same(name, fold, tmp_path):
    model, arguments, path = MODELS[name]()
    logits = model(**arguments).logits
    tokens = model.generate(**arguments, max_new_tokens=8, do_sample=False)
    before = state(model)
    assert visproj.convert(model, fold=fold, keep=fold) == [path]
    with torch.no_grad():  # fp32: transformers' own layers do not take fp64
        torch.testing.assert_close(model(**arguments).logits, logits)
    assert torch.equal(model.generate(**arguments, max_new_tokens=8, do_sample=False), tokens)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    if name != "aria":
        not_causal(loaded.image_to_text_projection)
    after = loaded.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**arguments).logits, logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_too_many_is_refused(name):
    module = published(name)
    module.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"resampler is built like .* its extra is \[3\]"):
        visproj.convert(Holder(module))


def reordered(module):
    """The same layers, registered the other way round."""
    children = dict(reversed(module._modules.items()))
    module._modules.clear()
    module._modules.update(children)


def exchanged_norm(module):
    module.ln_kv = nn.LayerNorm(24, eps=1e-6)


def another_type(module):
    module.ln_q = nn.RMSNorm(32, eps=1e-6)


def more_attention(module):
    module.attn.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reordered, "its layers come in another order"),
        (exchanged_norm, r"its ln_kv.bias is \[24\], but should be \[32\]"),
        (another_type, "its ln_q is a .*RMSNorm"),
        (more_attention, r"its attn.extra.bias is \[2\], but should be absent"),
    ],
)
def test_almost_a_resampler_is_refused(change, message):
    module = published("minicpm-v-2.6, own attention")
    change(module)
    with pytest.raises(ValueError, match=message):
        visproj.convert(Holder(module))
    assert type(module) is MiniCPM


def test_hooks_on_an_attention_that_is_exchanged_are_refused():
    module = published("minicpm-v-2.6, own attention")
    module.attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"resampler\.attn has forward_hooks"):
        visproj.convert(Holder(module))


@pytest.mark.parametrize("name", ["minicpm-v-2.6", "qwen-vl", "aria", "kosmos-2"])
def test_adapters_are_called_and_refused_by_fold(name):
    model, call = Holder(published(name)), calls_of(name)[0]
    visproj.convert(model)
    target = {"aria": "linear", "kosmos-2": "dense"}.get(name, "kv_proj")
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    plain = output(model(*call))
    adapted = peft.get_peft_model(model, config)
    adapted.double()
    found = output(model(*call))
    assert rms_error(found, plain) > 1e-3, "the adapter must be visible"
    with pytest.raises(ValueError, match="cannot fold"):
        visproj.fold(model.resampler)
    merged = adapted.merge_and_unload()
    close(output(merged(*call)), found.detach(), "exactly")


@pytest.mark.filterwarnings("ignore:torch.*deprecated")
@pytest.mark.parametrize("name", ["minicpm-v-2.6", "qwen-vl", "aria", "kosmos-2"])
@torch.no_grad()
def test_quantised_weights_are_called_and_refused_by_fold(name):
    torch.manual_seed(1)
    model, call = Holder(published(name).float()), calls(name, torch.float32)[0]
    plain = output(model(*call))
    visproj.convert(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    found = output(quantised(*call))
    # int8 weights: an error that can be seen, and not another function.
    assert 1e-4 < rms_error(found, plain) < 0.5
    with pytest.raises(ValueError, match="cannot fold"):
        visproj.fold(quantised.resampler)


@pytest.mark.parametrize(
    ("name", "path"), [("aria", "cross_attn"), ("kosmos-2", "x_attn"), ("minicpm-v-2.6", "attn")]
)
def test_hooks_on_containers_run(name, path):
    model, call = Holder(published(name)), calls_of(name)[0]
    plain = output(model(*call))
    visproj.convert(model)
    ran = []
    container = model.resampler.get_submodule(path)
    handle = container.register_forward_hook(lambda *_: ran.append(1))
    close(output(model(*call)), plain, name)
    assert ran
    with pytest.raises(ValueError, match="cannot fold"):
        visproj.fold(model.resampler)
    handle.remove()


def test_dropout_of_kosmos_folds_in_eval_mode():
    model = Holder(published("kosmos-2"))
    visproj.convert(model)
    model.resampler.x_attn.dropout = 0.5
    assert visproj.fold(model.resampler)
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        visproj.fold(model.resampler)
    x = calls_of("kosmos-2")[0][0]
    assert not torch.equal(model(x)[0], model(x)[0])


def test_attention_of_kosmos_that_is_taken_for_causal():
    """Transformers before 5: the same numbers by calling it, and no fold."""
    module = published("kosmos-2")
    right = module(*calls_of("kosmos-2")[1])
    del module.x_attn.is_causal
    model, call = Holder(module), calls_of("kosmos-2")[1]
    wanted = model(*call)
    assert rms_error(wanted[0], right[0]) > 1e-3, "the difference must be visible"
    visproj.convert(model)
    same(model(*call), wanted, "kosmos-2")
    with pytest.raises(ValueError, match="its attention is causal"):
        visproj.fold(model.resampler)


def test_aria_refuses_an_unknown_number_of_patches():
    model = Holder(published("aria"))
    visproj.convert(model)
    for module in (model.resampler, model.resampler.fold()):
        with torch.no_grad(), pytest.raises(KeyError, match="Number of patches 13 not found"):
            module(torch.randn(1, 13, 24).double())


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize(
    "name",
    [
        "minicpm-v-2.6",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen-vl", "minicpm-v-2.0", "aria", "kosmos-2")
        ),
    ],
)
@torch.no_grad()
def test_exported_for_any_number_of_images(name, form):
    model = Holder(published(name))
    visproj.convert(model)
    module = model.resampler if form is None else visproj.fold(model.resampler, form=form)
    call = calls_of(name)[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple(
        {0: batch} if isinstance(value, torch.Tensor) else (None, None) for value in call
    )
    exported = torch.export.export(module, call, dynamic_shapes=shapes).module()
    for images in (1, 3):
        several = [torch.cat([v, v])[:images] if isinstance(v, torch.Tensor) else v for v in call]
        close(output(exported(*several)), output(module(*several)), name)
