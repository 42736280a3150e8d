"""A vision-language model small enough for a test: random weights, the same ones every time."""

import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from visproj.vlm.encoders import EncoderConfig, VisionEncoder
from visproj.vlm.language import build_tokenizer
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.pretrained import PretrainedProjector

WIDTH = 64  # of the language model; a Perceiver of it has one head
PROMPT = "What is this?"
END = "<|end|>"
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn['role'] }}|>{{ turn['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MERGES = ["Ġ a", "Ġ c", "a t", "Ġc at", "o g", "d og", "r e", "re d"]


class TinyEncoder(VisionEncoder):
    """4 x 4 patches, 32 wide: a fixed random map of each patch's pixels, CLS their mean."""

    def __init__(self, name="tiny", side=16, has_cls=True):
        self.name = name
        self.has_cls = has_cls
        self.config = EncoderConfig(
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
            image_size=side,
            patch_size=side // 4,
        )
        self.batches = []  # how many images each call of `encode` had

    def encode(self, pixels):
        self.batches.append(len(pixels))
        side = self.config.patch_size
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # [N, 3, 4, 4, side, side]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [N, 16, 3 * side²]
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(patches.shape[-1], 32, generator=generator)
        features = torch.tanh(patches @ weights / weights.shape[0] ** 0.5)
        return torch.cat([features.mean(1, keepdim=True), features], 1)[:, not self.has_cls :]


def tiny_tokenizer(template=TEMPLATE):
    """Byte-level BPE: every byte, a few words, three marks of a chat."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]
    special = ["<|user|>", "<|assistant|>", END]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer([*tokens, *special], MERGES, special), eos_token=END
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_language_model(width=WIDTH, seed=0):
    """Two layers, four heads, weights large enough for logits that differ."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_projector(kind="baseline", encoder=None, width=WIDTH, seed=0):
    """A checkpoint's projector with noise in every weight that trains."""
    encoder = encoder or TinyEncoder()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        projector = PretrainedProjector(
            kind, vars(encoder.config), width, encoder.name, "tiny-llama", PROMPT
        )
        with torch.no_grad():
            for parameter in projector.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return projector.eval()


def tiny_model(kind="baseline", template=TEMPLATE):
    """All of it together."""
    encoder = TinyEncoder()
    return VisualLanguageModel(
        encoder,
        tiny_projector(kind, encoder),
        tiny_language_model(),
        tiny_tokenizer(template),
    )


def tiny_photograph(seed=0, size=(40, 24)):
    """Random RGB pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
