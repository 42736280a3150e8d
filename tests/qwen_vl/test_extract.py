import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import Recorder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from qwen_vl.checkpoints import (
    BLOCK,
    CONFIG,
    FORMATS,
    PREFIX,
    full_state,
    shard_name,
    snapshot,
    visual_tensors,
    write_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file

import visproj
from visproj import files as files_module
from visproj.qwen_vl import (
    QwenVisionConfig,
    QwenVisionTransformer,
    extract_vision_encoder,
    render_summary,
)

LAYOUTS = [(1, False), (2, True), (4, True), (4, False)]


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shards", "index"), LAYOUTS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_layout(tmp_path, format, shards, index, dtype):
    """The result is what upstream's script keeps, bit for bit."""
    state = full_state(dtype=dtype)
    source = write_checkpoint(tmp_path / "full", format, shards, index, state)
    before = snapshot(source)
    summary = extract_vision_encoder(source, tmp_path / "encoder")
    kept = {
        key.replace(PREFIX, ""): tensor
        for key, tensor in state.items()
        if "visual" in key and f"{PREFIX}proj" not in key
    }
    same(load_file(tmp_path / "encoder" / "model.safetensors"), kept)
    same(QwenVisionTransformer.from_pretrained(tmp_path / "encoder").state_dict(), kept)
    assert QwenVisionConfig.from_pretrained(tmp_path / "encoder") == CONFIG
    assert snapshot(source) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert summary.tensors == len(kept) == 41
    assert summary.parameters == sum(tensor.numel() for tensor in kept.values())
    assert summary.bytes_read == sum(tensor.nbytes for tensor in kept.values())
    weights = [path for path in source.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert summary.checkpoint_bytes == sum(path.stat().st_size for path in weights)
    assert summary.files == ("config.json", "model.safetensors", "preprocessor_config.json")
    assert summary.notes == ()


def test_what_is_written_runs(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    extract_vision_encoder(source, tmp_path / "encoder")
    direct = QwenVisionTransformer(CONFIG)
    direct.load_state_dict(visual_tensors())
    loaded = QwenVisionTransformer.from_pretrained(tmp_path / "encoder")
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(loaded(images), direct(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_reexported_and_lazy():
    """``visproj`` names the function, and importing it loads none of what the function needs."""
    assert visproj.extract_vision_encoder is extract_vision_encoder
    assert "extract_vision_encoder" in dir(visproj)
    code = "import sys, visproj; print(*[m for m in sys.modules if '.' not in m])"
    loaded = run_python(code).stdout.split()
    assert not {"transformers", "triton", "safetensors", "huggingface_hub", "rich"} & set(loaded)
    assert "visproj" in loaded


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_only_visual_shards_are_opened(tmp_path, format, monkeypatch):
    """Language shards may be absent; the boundary shard is opened for its visual tensors alone."""
    source = write_checkpoint(tmp_path / "full", format)
    (source / shard_name(format, 1, 4)).unlink()
    opened, read = [], []
    real_open, real_tensor = files_module.TensorFile.__init__, files_module.TensorFile.tensor

    def record_open(self, path):
        opened.append(path.name)
        real_open(self, path)

    def record_tensor(self, key):
        read.append(key)
        return real_tensor(self, key)

    monkeypatch.setattr(files_module.TensorFile, "__init__", record_open)
    monkeypatch.setattr(files_module.TensorFile, "tensor", record_tensor)
    summary = extract_vision_encoder(source, tmp_path / "encoder")
    assert opened == [shard_name(format, number, 4) for number in (2, 3, 4)]
    assert all(key.startswith(PREFIX) for key in read)
    total = json.loads((source / f"{shard_name(format)}.index.json").read_text())["metadata"]
    assert summary.checkpoint_bytes == total["total_size"]


def test_bin_for_deepspeed_visualchat(tmp_path):
    """Loads strictly into the module, with upstream's keys, and holds no other bytes."""
    source = write_checkpoint(tmp_path / "full", "bin", state=full_state(dtype=torch.bfloat16))
    summary = extract_vision_encoder(source, tmp_path / "encoder", format="bin")
    assert "pytorch_model.bin" in summary.files
    path = tmp_path / "encoder" / "pytorch_model.bin"
    state = torch.load(path, map_location="cpu", weights_only=True)
    same(state, visual_tensors(dtype=torch.bfloat16))
    QwenVisionTransformer(CONFIG).load_state_dict(state, strict=True)
    assert path.stat().st_size < 1.3 * summary.bytes_read
    (tmp_path / "encoder" / "model.safetensors").unlink()
    same(QwenVisionTransformer.from_pretrained(tmp_path / "encoder").state_dict(), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", torch.float16], ids=str)
def test_casting(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "full")
    summary = extract_vision_encoder(source, tmp_path / "encoder", dtype=dtype)
    wanted = files_module.parse_dtype(dtype)
    expected = {name: tensor.to(wanted) for name, tensor in visual_tensors().items()}
    same(load_file(tmp_path / "encoder" / "model.safetensors"), expected)
    assert summary.dtypes == (str(wanted).removeprefix("torch."),)


def test_casting_never_makes_an_infinity(tmp_path):
    state = full_state()
    state[f"{PREFIX}ln_post.weight"][3] = 7e4
    source = write_checkpoint(tmp_path / "full", state=state)
    with pytest.raises(ValueError, match=r"ln_post.weight holds numbers up to 7e\+04"):
        extract_vision_encoder(source, tmp_path / "encoder", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    extract_vision_encoder(source, tmp_path / "encoder", dtype="bfloat16")


def test_mixed_dtypes_stay_and_are_said(tmp_path):
    state = full_state(dtype=torch.bfloat16)
    state[f"{PREFIX}ln_pre.weight"] = state[f"{PREFIX}ln_pre.weight"].float()
    source = write_checkpoint(tmp_path / "full", state=state)
    summary = extract_vision_encoder(source, tmp_path / "encoder")
    assert summary.dtypes == ("bfloat16", "float32")
    assert "several dtypes" in summary.notes[0]
    written = load_file(tmp_path / "encoder" / "model.safetensors")
    assert torch.equal(written["ln_pre.weight"], state[f"{PREFIX}ln_pre.weight"])
    loaded = QwenVisionTransformer.from_pretrained(tmp_path / "encoder", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("with_config", [True, False])
def test_architecture_from_shapes_is_said(tmp_path, with_config):
    source = write_checkpoint(tmp_path / "full", block=None)
    if not with_config:
        (source / "config.json").unlink()
    summary = extract_vision_encoder(source, tmp_path / "encoder")
    assert "assuming 16 heads and images of 448 px" in render_summary(summary)
    config = QwenVisionConfig.from_pretrained(tmp_path / "encoder")
    assert config.to_dict() == {**CONFIG.to_dict(), "image_size": 448}


@pytest.mark.parametrize("wrapper", ["module.", "base_model.model."])
def test_wrapped_checkpoint(tmp_path, wrapper):
    source = write_checkpoint(tmp_path / "full", state=full_state(prefix=wrapper + PREFIX))
    extract_vision_encoder(source, tmp_path / "encoder")
    same(load_file(tmp_path / "encoder" / "model.safetensors"), visual_tensors())


def test_summary_in_words(tmp_path):
    source, progress = write_checkpoint(tmp_path / "full"), Recorder()
    text = render_summary(extract_vision_encoder(source, tmp_path / "encoder", progress=progress))
    assert progress.stages == [("opening the checkpoint", 0, 0), ("copying tensors", 41, 0)]
    assert progress.advances == [2] * 41
    assert f"{source} -> {tmp_path / 'encoder'}" in text
    parameters = sum(tensor.numel() for tensor in visual_tensors().values())
    assert f"tensors: 41, parameters: {parameters:,}, float32" in text
    assert "encoder: 2 layers, width 32, 16 heads, 56 px -> 16 tokens of 48" in text
    assert "MiB in the checkpoint" in text
    assert "time: " in text


# The destination


def test_existing_destination_needs_overwrite(tmp_path):
    source, target = write_checkpoint(tmp_path / "full"), tmp_path / "encoder"
    extract_vision_encoder(source, target)
    before = snapshot(target)
    with pytest.raises(FileExistsError, match="exists"):
        extract_vision_encoder(source, target, dtype="float16")
    assert snapshot(target) == before
    extract_vision_encoder(source, target, dtype="float16", overwrite=True)
    assert QwenVisionTransformer.from_pretrained(target).conv1.weight.dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "full"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take two renames")
def test_overwriting_is_one_step(tmp_path, monkeypatch):
    """The destination is never without a directory, so no kill can find it so."""
    source, target = write_checkpoint(tmp_path / "full"), tmp_path / "encoder"
    extract_vision_encoder(source, target)

    def refuse(first, second):
        raise AssertionError("the old encoder must not be moved away first")

    monkeypatch.setattr(files_module.os, "rename", refuse)
    extract_vision_encoder(source, target, dtype="float16", overwrite=True)
    assert QwenVisionTransformer.from_pretrained(target).conv1.weight.dtype == torch.float16


def test_overwriting_without_an_atomic_exchange(tmp_path, monkeypatch):
    """Where the system cannot swap two names, two renames do, and a failing one is undone."""
    monkeypatch.setattr(files_module, "_exchange", lambda first, second: False)
    source, target = write_checkpoint(tmp_path / "full"), tmp_path / "encoder"
    extract_vision_encoder(source, target)
    extract_vision_encoder(source, target, dtype="float16", overwrite=True)
    before = snapshot(target)
    assert QwenVisionTransformer.from_pretrained(target).conv1.weight.dtype == torch.float16

    real, calls = files_module.os.rename, []

    def fail_once(first, second):
        calls.append(first)
        if len(calls) == 2:
            raise PermissionError(13, "no")
        real(first, second)

    monkeypatch.setattr(files_module.os, "rename", fail_once)
    with pytest.raises(PermissionError, match="cannot write"):
        extract_vision_encoder(source, target, overwrite=True)
    assert snapshot(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "full"]


@pytest.mark.parametrize("what", ["notes", "source", "file", "full-checkpoint"])
def test_overwriting_spares_what_is_no_encoder(tmp_path, what):
    source, target = write_checkpoint(tmp_path / "full", shards=1), tmp_path / "encoder"
    if what == "notes":
        extract_vision_encoder(source, target)
        (target / "notes.txt").write_text("keep me")
    elif what == "source":
        target = source
    elif what == "file":
        target.write_text("a file")
    else:
        write_checkpoint(target, shards=1)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError):
        extract_vision_encoder(source, target, overwrite=True)
    assert snapshot(tmp_path) == before


def test_destination_through_a_link_and_in_new_folders(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    summary = extract_vision_encoder(source, tmp_path / "a" / "b" / "encoder")
    (tmp_path / "link").symlink_to(summary.destination)
    again = extract_vision_encoder(source, tmp_path / "link", overwrite=True)
    assert again.destination == summary.destination
    assert (tmp_path / "link").is_symlink()


FAILURES = """
import os, resource, signal, sys
from pathlib import Path
from visproj import files
from visproj.qwen_vl import extract_vision_encoder, storage

source, root = Path(sys.argv[1]), Path(sys.argv[2])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_tensor():
    real, count = files.tensor_bytes, []
    def stop(tensor):
        count.append(1)
        return die() if len(count) == 20 else real(tensor)
    files.tensor_bytes = stop

def before_replacing():
    files._replace = die

def after_replacing():
    files.shutil.rmtree = die
    real = files._replace
    def stop(*arguments):
        real(*arguments)
        die()
    files._replace = stop

def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def full_disk_for_bin():
    real = storage.save_bin
    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        real(*arguments)
    storage.save_bin = limited

for stage in (at_tensor, before_replacing, after_replacing, full_disk, full_disk_for_bin):
    for kind in ("fresh", "old"):
        target = root / f"{stage.__name__}-{kind}" / "encoder"
        child = os.fork()
        if not child:
            stage()
            try:
                extract_vision_encoder(source, target, format="bin", overwrite=True)
            except OSError as error:
                print(stage.__name__, kind, type(error).__name__, error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_killed_runs_and_full_disks(tmp_path):
    """Whatever stops a run, the destination is the old one, the new one or not there."""
    source, root = write_checkpoint(tmp_path / "full"), tmp_path / "runs"
    extract_vision_encoder(source, tmp_path / "new", format="bin")
    new = load_file(tmp_path / "new" / "model.safetensors")
    extract_vision_encoder(source, tmp_path / "old", dtype="float16")
    old = snapshot(tmp_path / "old")
    stages = ("at_tensor", "before_replacing", "after_replacing", "full_disk", "full_disk_for_bin")
    for stage in stages:
        extract_vision_encoder(source, root / f"{stage}-old" / "encoder", dtype="float16")
    printed = run_python(FAILURES, source, root).stdout
    for stage in stages:
        fresh, replaced = root / f"{stage}-fresh" / "encoder", root / f"{stage}-old" / "encoder"
        if stage == "after_replacing":
            for target in (fresh, replaced):
                same(load_file(target / "model.safetensors"), new)
        else:
            assert not fresh.exists()
            assert snapshot(replaced) == old
        if stage.startswith("full_disk"):
            for target in (fresh, replaced):
                kind = "fresh" if target is fresh else "old"
                line = f"{stage} {kind} OSError cannot write {target}: File too large"
                assert line in printed
                assert not list(target.parent.glob(".*"))


def test_read_only_destination(tmp_path, monkeypatch):
    """Also as root, whom permission bits do not stop: then the system call is made to fail."""
    source = write_checkpoint(tmp_path / "full")
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    real = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.parent == folder:
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError) as caught:
        extract_vision_encoder(source, folder / "encoder")
    assert str(caught.value) == f"cannot write {folder / 'encoder'}: Permission denied"
    assert list(folder.iterdir()) == []


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "full")

    def interrupt(tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files_module, "tensor_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract_vision_encoder(source, tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# The hub


class Hub:
    """Serves a directory in the place of ``huggingface_hub.hf_hub_download``."""

    def __init__(self, folder, offline=False):
        self.folder, self.offline, self.asked = folder, offline, []

    def __call__(self, repo_id, filename, *, revision=None):
        self.asked.append((repo_id, filename, revision))
        path = self.folder / filename
        if path.is_file():
            return str(path)
        if self.offline:
            raise LocalEntryNotFoundError("Cannot reach the hub.\nCheck your connection.")
        raise EntryNotFoundError(f"404: no {filename}")

    @property
    def given(self):
        return [name for _, name, _ in self.asked if (self.folder / name).is_file()]


@pytest.fixture
def hub(monkeypatch):
    def start(folder, **options):
        server = Hub(folder, **options)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", server)
        return server

    return start


@pytest.mark.parametrize("offline", [False, True], ids=["online", "cached"])
@pytest.mark.parametrize("format", FORMATS)
def test_downloads_the_visual_shards_alone(tmp_path, hub, format, offline):
    server = hub(write_checkpoint(tmp_path / "full", format), offline=offline)
    summary = extract_vision_encoder("Qwen/Qwen-VL-Chat", tmp_path / "encoder", revision="v1")
    index = f"{shard_name(format)}.index.json"
    shards = [shard_name(format, number, 4) for number in (2, 3, 4)]
    assert server.given == ["config.json", index, *shards]
    assert {(repo, revision) for repo, _, revision in server.asked} == {("Qwen/Qwen-VL-Chat", "v1")}
    same(load_file(tmp_path / "encoder" / "model.safetensors"), visual_tensors())
    assert summary.source == "Qwen/Qwen-VL-Chat"
    assert summary.checkpoint_bytes == sum(tensor.nbytes for tensor in full_state().values())


@pytest.mark.parametrize("format", FORMATS)
def test_downloads_a_single_file(tmp_path, hub, format):
    server = hub(write_checkpoint(tmp_path / "full", format, shards=1))
    extract_vision_encoder("Qwen/Qwen-VL-Chat", tmp_path / "encoder")
    assert server.given == ["config.json", shard_name(format)]
    same(load_file(tmp_path / "encoder" / "model.safetensors"), visual_tensors())


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot reach the hub.\nCheck your connection."),
        OSError("401 Client Error.\n\nRepository Not Found for url: https://hub/x."),
        RuntimeError(""),
    ],
    ids=["no-network", "unknown", "silent"],
)
def test_hub_trouble_is_one_line(tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConnectionError) as caught:
        extract_vision_encoder("nobody/nothing", tmp_path / "encoder")
    assert "\n" not in str(caught.value)
    assert "nobody/nothing is not a local directory, and" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_the_hub_lacks(tmp_path, hub):
    source = write_checkpoint(tmp_path / "full")
    (source / shard_name("safetensors", 3, 4)).unlink()
    hub(source)
    with pytest.raises(FileNotFoundError, match=r"lacks the file model-00003-of-00004.safetensors"):
        extract_vision_encoder("Qwen/Qwen-VL-Chat", tmp_path / "encoder")
    hub(source, offline=True)
    with pytest.raises(ConnectionError, match=r"model-00003-of-00004.safetensors of .* could not"):
        extract_vision_encoder("Qwen/Qwen-VL-Chat", tmp_path / "encoder")


def test_written_header_is_aligned(tmp_path):
    """Other readers map the tensors in place: offsets are multiples of the widest number."""
    source = write_checkpoint(tmp_path / "full")
    extract_vision_encoder(source, tmp_path / "encoder")
    path = tmp_path / "encoder" / "model.safetensors"
    with path.open("rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((source / "config.json").read_text())["visual"] == BLOCK
