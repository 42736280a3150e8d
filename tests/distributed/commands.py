"""``visproj train`` as a command, alone or under a launcher, between tiny models on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlm.tiny import tiny_language_model, tiny_tokenizer
from vlm.training_models import write_dialogues

from visproj.vlm.pretrained import load_pretrained

ROOT = Path(__file__).parent.parent.parent
RATE = 0.002
RECIPE = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 16, "width": 16},
    "size": {"shortest_edge": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_models(folder):
    """A tiny CLIP, a tiny Llama and LLaVA's JSON with several images and turns."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(RECIPE))
    tiny_language_model().save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    write_dialogues(folder / "data", 17)


def train(folder, out, *arguments, processes=1, variables=None, launcher=None):
    """Run the command to its end."""
    environment = {**os.environ, "VISPROJ_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    environment.update(variables or {})
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={processes}", "-m", "visproj"]
    if processes == 1:
        launch = [sys.executable, "-m", "visproj"]
    command = [*(launcher or launch), "train", "--data", folder / "data" / "llava.json"]
    command += ["--encoder", folder / "clip", "--language-model", folder / "llama", "--out", out]
    command += ["--dtype", "float32", "--workers", "0", "--report-to", "csv", "--queries", "3"]
    command += ["--learning-rate", RATE, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300
    )


def outputs(out):
    """What the trained projector makes of some features."""
    projector = load_pretrained(out)
    features = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return projector(features)


def weights(out):
    return load_file(out / "projector" / "model.safetensors")
