"""Peak anonymous memory on a checkpoint ten times the encoder, measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from qwen_vl.checkpoints import PREFIX, full_state

from visproj.qwen_vl import QwenVisionConfig, expected_shapes

BLOCK = {
    "heads": 16,
    "image_size": 448,
    "layers": 5,
    "mlp_ratio": 4.6,
    "output_dim": 1024,
    "patch_size": 14,
    "width": 1024,
}
CONFIG = QwenVisionConfig.from_visual_block(BLOCK)
LANGUAGE_BYTES = 2_700_000_000
MEASURE = """
import json, sys, threading, time
import torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

start = peak = anonymous()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
task, *arguments = sys.argv[1:]
if task == "merge":
    from visproj.qwen_vl import merge_into
    merge_into(*arguments)
elif task == "load":
    from visproj.qwen_vl import QwenVisionTransformer
    encoder = QwenVisionTransformer.from_pretrained(*arguments)
else:
    from visproj import extract_vision_encoder
    source, target, format, dtype = arguments
    extract_vision_encoder(source, target, format=format, dtype=dtype or None)
seconds = time.perf_counter() - began
running = False
thread.join()
print(json.dumps({"bytes": peak - start, "seconds": seconds}))
"""


def measure(*arguments):
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed)


def write_big(folder, format):
    """One file of 3 GB: visual tensors between zeros, holes in the file where the format can."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"visual": BLOCK}))
    shapes = {PREFIX + name: shape for name, shape in expected_shapes(CONFIG).items()}
    rows = LANGUAGE_BYTES // 4 // 2 // 4096
    shapes = {"transformer.wte.weight": (rows, 4096), **shapes, "lm_head.weight": (rows, 4096)}
    if format == "bin":
        backing = folder.parent / "zeros"
        with backing.open("wb") as file:
            file.truncate(rows * 4096 * 4)
        zeros = torch.from_file(str(backing), shared=False, size=rows * 4096).view(rows, 4096)
        state = {
            key: torch.randn(shape) if "visual" in key else zeros.view(shape)
            for key, shape in shapes.items()
        }
        state["lm_head.weight"] = torch.from_file(str(backing), size=rows * 4096).view(rows, 4096)
        torch.save(state, folder / "pytorch_model.bin")
        backing.unlink()
        return folder
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, shape in shapes.items():
            if "visual" in key:
                file.seek(8 + len(encoded) + header[key]["data_offsets"][0])
                file.write(torch.randn(shape).numpy())
        file.truncate(8 + len(encoded) + end)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_peak_memory(tmp_path, format):
    """At most the encoder's own size plus 500 MB beyond an imported torch; merging, too."""
    source = write_big(tmp_path / "full", format)
    encoder_bytes = 4 * sum(torch.Size(shape).numel() for shape in expected_shapes(CONFIG).values())
    whole = sum(path.stat().st_size for path in source.iterdir())
    assert 290e6 < encoder_bytes < 310e6
    assert 2.9e9 < whole < 3.1e9
    print(f"\n{format}: {whole / 1e6:.0f} MB, of which the encoder {encoder_bytes / 1e6:.0f} MB")
    for output in ("safetensors", "bin"):
        for dtype in ("", "bfloat16"):
            target = tmp_path / f"encoder-{output}-{dtype}"
            used = measure("extract", source, target, output, dtype)
            print(
                f"  extract --format {output} --dtype {dtype or 'as stored'}: "
                f"{used['bytes'] / 1e6:.0f} MB, {used['seconds']:.1f} s"
            )
            assert used["bytes"] <= encoder_bytes + 500e6
    used = measure("load", tmp_path / "encoder-safetensors-")
    print(f"  from_pretrained: {used['bytes'] / 1e6:.0f} MB, {used['seconds']:.1f} s")
    assert encoder_bytes <= used["bytes"] <= encoder_bytes + 500e6  # the measurement sees it all
    used = measure("merge", source, tmp_path / "encoder-bin-", tmp_path / "merged")
    print(f"  merge_into: {used['bytes'] / 1e6:.0f} MB, {used['seconds']:.1f} s")
    assert used["bytes"] <= encoder_bytes + 500e6
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()


def test_small_checkpoint_needs_little(tmp_path):
    """The same measurement on a checkpoint of kilobytes: what the imports cost, 500 MB at most."""
    from qwen_vl.checkpoints import write_checkpoint

    source = write_checkpoint(tmp_path / "full", state=full_state())
    assert measure("extract", source, tmp_path / "encoder", "bin", "")["bytes"] < 500e6
