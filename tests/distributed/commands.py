"""``visproj train`` as a command, alone or under a launcher, between tiny models on disk."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from vlm.test_moved_models import write_encoder
from vlm.tiny import tiny_language_model, tiny_tokenizer
from vlm.training_models import write_dialogues

from visproj.vlm.pretrained import load_pretrained

ROOT = Path(__file__).parent.parent.parent
RATE = 0.002


def write_models(folder):
    """A tiny CLIP, a tiny Llama and LLaVA's JSON with several images and turns."""
    write_encoder(folder / "clip")
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
