"""Every command in an interpreter of its own, where nothing has been imported before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from qwen_vl.checkpoints import snapshot, write_checkpoint
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from vlm.tiny import tiny_language_model, tiny_photograph, tiny_tokenizer

from visproj import __version__
from visproj.files import cache_folder

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "extract", "train", "chat", "bench", "info")


@pytest.fixture
def folder(tmp_path):
    """Where commands run."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def environment(tmp_path):
    """No network, no settings of the user's, a home without anything in it."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    (tmp_path / "home").mkdir()
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def run(folder, environment):
    """Run ``python -m visproj`` to its end: exit status, stdout, stderr."""

    def call(*arguments, **settings):
        done = subprocess.run(
            [sys.executable, "-m", "visproj", *map(str, arguments)],
            cwd=folder,
            env={**environment, **settings},
            capture_output=True,
            timeout=600,
        )
        encoding = settings.get("PYTHONIOENCODING", "utf-8")
        return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)

    return call


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_help(run, encoding):
    status, stdout, stderr = run("--help", PYTHONIOENCODING=encoding)
    assert (status, stderr) == (0, "")
    assert all(f" {command} " in stdout for command in COMMANDS)
    assert all(len(line) <= 80 for line in stdout.splitlines())
    assert "\x1b" not in stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run, command):
    status, stdout, stderr = run(command, "--help", PYTHONIOENCODING="ascii")
    assert (status, stderr) == (0, "")
    assert "usage: " in stdout.lower()


def test_without_arguments_there_is_help(run):
    assert run() == run("--help")


WITHOUT_TORCH = """
import sys
from visproj.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    ("arguments", "settings", "printed"),
    [
        (["--version"], {}, [f"visproj {__version__}"]),
        ([], {"COMP_WORDS": "visproj tr", "COMP_CWORD": "1"}, ["train"]),
        ([], {"COMP_WORDS": "visproj train --le", "COMP_CWORD": "2"}, ["--learning-rate"]),
        (
            [],
            {"COMP_WORDS": "visproj train --backend ", "COMP_CWORD": "3"},
            ["auto", "triton", "torch"],
        ),
        (
            [],
            {"COMP_WORDS": "visproj demo --kind ", "COMP_CWORD": "3"},
            ["baseline", "vit", "perceiver"],
        ),
    ],
    ids=["version", "commands", "options", "choices", "repeated choices"],
)
def test_quick_answers_do_not_wait_for_torch(folder, environment, arguments, settings, printed):
    """Completion is called at every press of the tab key."""
    if settings:
        settings = {**settings, "_VISPROJ_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=folder,
        env={**environment, **settings},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:-1] == printed
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_show_completion(run, shell, environment):
    """The script completes the command's own name however it was started."""
    status, stdout, stderr = run("--show-completion", SHELL=f"/bin/{shell}")
    if status:  # typer looks at the parent process, which need not be a shell
        status, stdout, stderr = run("--show-completion", shell)
    assert (status, stderr) == (0, "")
    assert "_VISPROJ_COMPLETE=complete_" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--kind", "q-former"], "'--kind': 'q-former' is not one of 'baseline', 'vit'"),
        (["extract"], "missing argument 'SOURCE'"),
        (["train", "--backend", "cuda"], "'--backend': 'cuda' is not one of 'auto', 'triton'"),
        (["chat", "--image", "a.png"], "missing option '--projector'"),
        (["info", "more"], "got unexpected extra argument"),
        (["trian"], "no such command 'trian'"),
    ],
)
def test_arguments_that_cannot_be_read(run, folder, arguments, message):
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--image", "nowhere.jpg", "--out", "out"], "nowhere.jpg"),
        (["extract", "nobody/nothing", "encoder"], "nobody/nothing"),
        (["train", "--data", "nowhere", "--out", "out"], "nowhere"),
        (["chat", "--projector", "nowhere", "--image", "a.jpg"], "nowhere"),
        (["bench", "--device", "cuda:99", "--out", "out"], "cuda:99"),
    ],
    ids=["demo", "extract", "train", "chat", "bench"],
)
def test_bad_input(run, folder, arguments, named):
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert named in stderr
    assert stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_extract(run, tmp_path):
    source = write_checkpoint(tmp_path / "full")
    before = snapshot(source)
    status, stdout, stderr = run("extract", source, "encoder", PYTHONIOENCODING="ascii")
    assert (status, stderr) == (0, "")
    assert f"{source} -> {tmp_path / 'work' / 'encoder'}\n" in stdout
    files = {path.name for path in (tmp_path / "work" / "encoder").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert snapshot(source) == before


def test_info(run, folder, tmp_path):
    kept = tmp_path / "kept [/b] :smile:"
    (kept / "features").mkdir(parents=True)
    (kept / "features" / "one.safetensors").write_bytes(bytes(3 * 2**20))
    status, stdout, stderr = run("info", VISPROJ_CACHE_DIR=str(kept), PYTHONIOENCODING="ascii")
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"visproj {__version__} in {ROOT / 'visproj'}"
    assert f"  torch {torch.__version__}" in lines
    assert f"  VISPROJ_CACHE_DIR={kept}" in lines
    assert f"  {kept}: 1 files, 3.0 MiB" in lines
    assert "    features: 1 files, 3.0 MiB" in lines
    assert any(line.startswith("  cpu: ") and "PyTorch (backend auto: " in line for line in lines)
    assert list(folder.iterdir()) == []


def test_info_of_models(run):
    status, stdout, stderr = run("info", "--models")
    assert (status, stderr) == (0, "")
    (line,) = (line for line in stdout.splitlines() if line.startswith("MiniCPM-V-2.6 "))
    assert line.split() == ["MiniCPM-V-2.6", "33.47", "6.60", "5.07", "absorbed"]


def test_info_with_a_broken_package(run, tmp_path):
    for name in ("torch", "transformers"):
        package = tmp_path / "broken" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
    path = os.pathsep.join([str(tmp_path / "broken"), str(ROOT)])
    status, stdout, stderr = run("info", PYTHONPATH=path)
    assert (status, stderr) == (0, "")
    assert "  cannot be determined: OSError: libcudart.so: no such file\n" in stdout
    assert "settings:\n" in stdout


@pytest.mark.skipif(os.name != "posix", reason="signals are sent in another way")
def test_ctrl_c_while_importing(folder, environment):
    """At any moment once the interpreter is up; torch takes seconds to import."""
    begun = folder / "begun"
    code = (
        "import pathlib, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': pathlib.Path('begun').touch()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from visproj.__main__ import main; main()"
    )
    for delay in (0.0, 0.3, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "demo"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not begun.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout, stderr) == (130, "", "stopped\n")
        begun.unlink()
    assert list(folder.iterdir()) == []


def test_a_closed_pipe_is_no_error(folder, environment):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "visproj", "--version"],
        cwd=folder,
        env=environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(folder, environment):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "visproj", "--version"],
            cwd=folder,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_demo(run, folder):
    settings = {"PYTHONIOENCODING": "cp1252", "VISPROJ_CACHE_DIR": str(cache_folder())}
    status, stdout, stderr = run("demo", "--kind", "baseline", "--out", "out", **settings)
    assert (status, stderr) == (0, "")
    assert "3 pictures in out\n" in stdout
    assert "projector" in stdout
    assert {path.name for path in folder.iterdir()} == {"out"}


def write_models(folder):
    """A vision encoder, a language model and captioned photographs, as small as they get."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    CLIPVisionModel(config).save_pretrained(folder / "encoder")
    size = {"height": 16, "width": 16}
    recipe = CLIPImageProcessor(crop_size=size, size={"shortest_edge": 16})
    recipe.save_pretrained(folder / "encoder")
    tiny_language_model().save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    (folder / "data").mkdir()
    lines = []
    for name in ("a", "b"):
        tiny_photograph(seed=ord(name), size=(64, 48)).save(folder / "data" / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "captions": [f"a cat {name}"]}))
    (folder / "data" / "captions.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_train_and_chat(run, folder):
    write_models(folder)
    models = ("--encoder", "encoder", "--language-model", "language")
    status, stdout, _ = run(
        "train", "--kind", "baseline", "--data", "data", "--out", "o", "--epochs", 1, *models
    )
    assert status == 0
    assert stdout.endswith("projector, checkpoints, log and loss curve in o\n")
    assert (folder / "o" / "projector" / "model.safetensors").is_file()

    question = ("--image", "data/a.png", "--max-new-tokens", 8)
    status, stdout, stderr = run(
        "chat", "--projector", "o", *question, *models, PYTHONIOENCODING="ascii"
    )
    assert (status, stderr) == (0, "")
    assert stdout.endswith("\n")
