"""Qwen-VL checkpoints of reduced size in the formats that real ones come in."""

import json
from itertools import pairwise

import torch
from safetensors.torch import save_file

from visproj.qwen_vl import QwenVisionConfig, expected_shapes

BLOCK = {
    "heads": 16,
    "image_size": 56,
    "image_start_id": 151857,
    "layers": 2,
    "mlp_ratio": 4.9231,
    "output_dim": 48,
    "patch_size": 14,
    "width": 32,
    "n_queries": 16,
}
CONFIG = QwenVisionConfig.from_visual_block(BLOCK)
PREFIX = "transformer.visual."
FORMATS = ("safetensors", "bin")


def visual_tensors(config=CONFIG, dtype=torch.float32, seed=0):
    """The encoder's tensors under its own names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def full_state(config=CONFIG, dtype=torch.float32, prefix=PREFIX):
    """Language tensors around visual ones, as Qwen-VL-Chat orders them."""
    state = {
        "transformer.wte.weight": torch.randn(50, 16).to(dtype),
        "transformer.h.0.attn.c_attn.weight": torch.randn(48, 16).to(dtype),
        "transformer.h.0.mlp.w1.weight": torch.randn(24, 16).to(dtype),
        "transformer.ln_f.weight": torch.randn(16).to(dtype),
    }
    state |= {prefix + name: t for name, t in visual_tensors(config, dtype).items()}
    dim = config.output_dim
    state[prefix + "proj"] = torch.randn(dim, dim).to(dtype)
    state["lm_head.weight"] = torch.randn(50, 16).to(dtype)
    return state


def write_checkpoint(folder, format="safetensors", shards=4, index=True, state=None, block=BLOCK):
    """Write a checkpoint; the visual tensors begin in the middle of one shard, end in another."""
    folder.mkdir(parents=True, exist_ok=True)
    state = full_state() if state is None else state
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 50}
    if block is not None:
        config["visual"] = block
    (folder / "config.json").write_text(json.dumps(config))
    keys = list(state)
    if shards == 1:
        save_shard(state, folder / shard_name(format))
        return folder
    # 2 language tensors; 2 and some visual; visual only; the rest and the head of the model
    cuts = [0, 2, 12, 30, len(keys)] if shards == 4 else [0, 12, len(keys)]
    weight_map = {}
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        name = shard_name(format, number, len(cuts) - 1)
        save_shard({key: state[key] for key in keys[start:end]}, folder / name)
        weight_map |= dict.fromkeys(keys[start:end], name)
    if index:
        total = sum(tensor.nbytes for tensor in state.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / f"{shard_name(format)}.index.json").write_text(text)
    return folder


def shard_name(format, number=None, count=None):
    stem = "model" if format == "safetensors" else "pytorch_model"
    part = "" if number is None else f"-{number:05d}-of-{count:05d}"
    return f"{stem}{part}.{format}"


def save_shard(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def snapshot(folder):
    """Every file of a folder with its bytes, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
