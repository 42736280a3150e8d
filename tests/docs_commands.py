"""Run the commands of README, CONTRIBUTING and docs as a newcomer would.

``python tests/docs_commands.py`` makes a fresh environment for each install line, in a copy of the
tree. Every command is run unless it is listed below with a reason; an entry below whose command no
document has any more is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Run in a shorter form, or with what needs no model hub: the form, and why.
INSTEAD = {
    "visproj bench": (
        "visproj bench --seconds 0 --minutes 0.5",
        "the whole set takes two to three minutes",
    ),
    "visproj train --kind perceiver": (
        "visproj train --kind perceiver --data photographs --language-model tiny-llama --epochs 1",
        "the default takes a quarter of an hour",
    ),
    "visproj train --kind baseline": (
        "visproj train --kind baseline --data photographs --language-model tiny-llama --epochs 1",
        "the default takes a quarter of an hour",
    ),
    "visproj train --kind baseline --data llava.json --images photographs --held-out 0.02": (
        "visproj train --kind baseline --data llava.json --images photographs --held-out 0.5 "
        "--language-model tiny-llama --out other",
        "of two samples one is held out",
    ),
    "visproj train --data llava.json --images photographs --batch 8 --accumulate 2": (
        "visproj train --data llava.json --images photographs --batch 8 --accumulate 2 "
        "--language-model tiny-llama --out accumulated",
        "with a small language model",
    ),
    "torchrun --nproc_per_node=2 -m visproj train --data llava.json --images photographs": (
        "torchrun --nproc_per_node=2 -m visproj train --data llava.json --images photographs "
        "--language-model tiny-llama --out two-processes",
        "with a small language model",
    ),
    "visproj extract Qwen/Qwen-VL-Chat encoder/": (
        "visproj extract checkpoint encoder/",
        "Qwen-VL-Chat is 19 GB on a model hub; the tests extract its format at reduced size",
    ),
}
STEP = "a step of .ci/run"
GPUS = "needs GPUs; tests/distributed run it on CPUs"
NOT_RUN = {
    "deepspeed --num_gpus 8 --module visproj train --data llava.json --deepspeed zero3.json": GPUS,
    "accelerate launch --config_file zero3.yaml -m visproj train --data llava.json": GPUS,
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=first-node:29500 "
    "-m visproj train --data llava.json --images photographs": GPUS,
    "python -m benchmarks.loading": "takes two minutes; the tests run it with few images",
    "pytest": STEP,
    "pytest -m slow": STEP,
    "pytest -m quick": STEP,
    "MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=default pytest tests/kernels tests/ops "
    "tests/projectors tests/test_folding.py tests/test_positions.py tests/test_rounding.py "
    "tests/qwen_vl/test_model.py": STEP,
    "pytest -m distributed": STEP,
    "pytest -m distributed -n0": STEP,
    "python tests/sanitizer/gate.py -q": STEP,
    "pip install --ignore-requires-python --no-deps ttsem==0.1.0 triton==3.8.0": STEP,
    "python -m benchmarks.codegen --arch 90 --dtype bf16": STEP + ", for all architectures",
    "python -m benchmarks.codegen": STEP + ", on two other versions of Triton",
    "python -m benchmarks.fold": "takes minutes; the tests run it at small sizes",
    "python -m benchmarks.report": "is what `visproj bench` runs",
    "benchmarks/gpu.sh": "needs a GPU",
    "mkdocs serve": "serves until it is stopped; a step of .ci/run builds the site",
    "visproj tune --kind perceiver --batch 1 --batch 32": "needs a GPU; the tests do without",
    "pytest -s tests/test_positions.py": "one file of those that `pytest` runs",
    "python tests/docs_commands.py": "is this",
    "python -m venv .venv": "every environment here is one",
    "source .venv/bin/activate": "every environment here is one",
}
# What the text, rather than a line above it, says a command needs.
INSTALL_OF = {
    "visproj extract": "pip install -c constraints.txt -e .",
    "visproj bench": "pip install -c constraints.txt -e '.[bench]'",
    "pytest benchmarks": "pip install -c constraints.txt -e '.[bench]'",
}
INSTALL = re.compile(r"pip install -c constraints\.txt -e \S+")
SHELLS = ("bash", "console", "sh", "shell")


class Command(NamedTuple):
    """A command, the install line before it, and the document that has it."""

    text: str
    install: str
    document: str


def documents(root: Path = ROOT) -> list[Path]:
    """Every document that shows commands."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/**/*.md"))]


def python_blocks(root: Path = ROOT) -> list[str]:
    """Return the Python blocks of all documents."""
    texts = (path.read_text(encoding="utf-8") for path in documents(root))
    return [
        block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]


def commands(root: Path = ROOT) -> list[Command]:
    """Return every command of the documents, once per install line.

    Raises:
        SystemExit: If one has no install line above it in its document.
    """
    found: dict[Command, None] = {}
    for path in documents(root):
        install = ""
        for text in _texts(path.read_text(encoding="utf-8")):
            if INSTALL.fullmatch(text):
                install = text
                continue
            own = [line for start, line in INSTALL_OF.items() if text.startswith(start)]
            if not (own or install or text in NOT_RUN):
                sys.exit(f"{path.name}: no install line above `{text}`")
            found[Command(text, own[0] if own else install, path.name)] = None
    return list(found)


def _texts(document: str) -> Iterator[str]:
    """Single commands, in the order of the document: of shell blocks and of command columns."""
    fence, column = "", -1
    for line in re.sub(r"\\\n\s*", "", document).splitlines():
        if line.startswith("```"):
            fence = "" if fence else line[3:].strip() or "text"
        elif fence in SHELLS:
            if fence != "console" or line.startswith("$ "):
                yield from _split(line.removeprefix("$ "))
        elif not fence:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not line.startswith("|"):
                column = -1
            elif column < 0:
                column = cells.index("command") if "command" in cells else len(cells)
            elif column < len(cells):
                for code in re.findall(r"`([^`]+)`", cells[column]):
                    yield from _split(code)


def _split(line: str) -> list[str]:
    line = re.sub(r"(^|\s)#.*", "", line)
    return [part.strip() for part in line.split("&&") if part.strip()]


def stale_entries(found: list[Command]) -> list[str]:
    """Entries above that no document has."""
    texts = {command.text for command in found}
    return sorted({*INSTEAD, *NOT_RUN} - texts)


def to_run(found: list[Command]) -> dict[str, list[str]]:
    """By install line, what is run in its environment, each once."""
    chosen: dict[str, dict[str, None]] = {}
    for text, install, _ in found:
        if text not in NOT_RUN:
            form = INSTEAD[text][0] if text in INSTEAD else text
            chosen.setdefault(install, {})[form] = None
    return {install: list(texts) for install, texts in chosen.items()}


def prepare(folder: Path) -> None:
    """Copy the tree and put beside it what the commands name."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "visproj-*")
    shutil.copytree(ROOT, folder, ignore=ignored)


# Made with the first environment's Python: a photograph, a folder to train on, and of reduced size
# a language model and a Qwen-VL checkpoint.
MATERIAL = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
sys.path.insert(0, "tests")
from qwen_vl.checkpoints import write_checkpoint
from vlm.tiny import tiny_language_model, tiny_tokenizer
write_checkpoint(Path("checkpoint"))
tiny_language_model().save_pretrained("tiny-llama")
tiny_tokenizer().save_pretrained("tiny-llama")
torch.manual_seed(0)
Path("photographs").mkdir()
lines = []
for name in ("a", "b"):
    small = torch.randint(256, (6, 8, 3), dtype=torch.uint8).numpy()
    Image.fromarray(small).resize((320, 240), Image.BICUBIC).save(f"photographs/{name}.png")
    lines.append(json.dumps({"image": f"{name}.png", "captions": [f"Picture {name}, coloured."]}))
Path("photographs/captions.jsonl").write_text("\\n".join(lines))
turns = [{"from": "human", "value": "<image>\\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
rows = [{"image": f"{name}.png", "conversations": turns} for name in ("a", "b")]
Path("llava.json").write_text(json.dumps(rows))
Path("questions.jsonl").write_text('{"image": "photographs/a.png", "question": "what is it?"}\\n')
Image.open("photographs/a.png").save("photo.jpg")
"""


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run one command and print its status and seconds; end with its output if it fails."""
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(f"{done.returncode:3d} {time.monotonic() - start:6.1f} s  {command}", flush=True)
    if done.returncode:
        sys.exit(done.stdout[-8000:] or "it printed nothing")


def main() -> None:
    """Check that every command is accounted for, then run those that are to be run."""
    found = commands()
    if stale := stale_entries(found):
        sys.exit(f"no document has: {', '.join(f'`{text}`' for text in stale)}")
    with tempfile.TemporaryDirectory() as work:
        clone = Path(work, "visproj")
        prepare(clone)
        for number, (install, texts) in enumerate(to_run(found).items()):
            venv = Path(work, f"venv{number}")
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
                "VIRTUAL_ENV": str(venv),
                "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "VISPROJ_CACHE_DIR": str(Path(work, "cache")),
                "HF_HUB_OFFLINE": "1",
            }
            run(install, clone, environment)
            if not number:
                subprocess.run(
                    [venv / "bin" / "python", "-c", MATERIAL],
                    cwd=clone,
                    env=environment,
                    check=True,
                )
            for text in texts:
                run(text, clone, environment)
            shutil.rmtree(venv)


if __name__ == "__main__":
    main()
