"""Captions → embeddings, by the text encoders that image models are trained with: CLIP's and T5's, of transformers.

Captions go to the tokenizer as they are: nothing is cleaned, lower-cased or translated beforehand.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastlatent.encoders.weights import tensors_digest
from fastlatent.store.records import RAGGED, Field

# The class that a folder's config.json names → the class that reads it; of a whole T5 the encoder is taken.
MODELS = {
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "T5EncoderModel": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
    "UMT5EncoderModel": "UMT5EncoderModel",
    "UMT5ForConditionalGeneration": "UMT5EncoderModel",
}
_DECODER = ("decoder.", "lm_head.")  # weights of a whole T5 that the encoder has no use for
BATCH_SIZE = 16  # captions per forward pass, always: a matrix product's last bits depend on it
T5_TOKENS = 256  # what the published tokenizers allow, 512 and more, is rarely filled, and costs twice the time
MAX_FLOAT16 = 65504.0

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Any one of these sets is a vocabulary. Without one, transformers makes an empty tokenizer and says nothing.
_VOCABULARIES = {
    "CLIP": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5": (("tokenizer.json",), ("spiece.model",)),
}
_TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip
# Entries of config.json that say where it came from or how it is run; they change no byte of the output.
_NOT_IDENTITY = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class TextEmbedding:
    """Of one caption, on the CPU. tokens: float32 [L, D], the last hidden state after the final norm. pooled: float32
    [P], CLIP's state of the end-of-text token (projected, where the model projects it), or None."""

    tokens: Tensor
    pooled: Tensor | None


class TextEncoder:
    """A text encoder; evaluation mode, no gradients. `load_text_encoder` makes it.

    Every forward pass has BATCH_SIZE rows of max_length tokens (short batches are filled up with empty captions), so
    that a caption's embedding does not depend on its neighbours.

    Attributes:
        columns: the tensors that it adds to each row of a dataset. CLIP: "text" [max_length, D], of all tokens, the
            padding included, as diffusion models use it (no attention mask), and "text_pooled" [P]. T5: "text"
            [L, D] of the caption's own tokens, the end-of-sentence token included, with the padding masked.
        max_length: tokens of a caption at most, those that begin and end it included.
        truncated: captions so far that were longer, and lost what came after.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, identity: dict[str, Any]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0
        self._identity = identity
        self._clip = type(model).__name__.startswith("CLIP")
        config = model.config
        if not self._clip:
            self.columns: tuple[Field, ...] = (Field("text", "F16", (RAGGED, config.d_model)),)
            return
        projected = type(model).__name__ == "CLIPTextModelWithProjection"
        self.columns = (
            Field("text", "F16", (max_length, config.hidden_size)),
            Field("text_pooled", "F16", (config.projection_dim if projected else config.hidden_size,)),
        )

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """One embedding per caption, in their order.

        Raises:
            ValueError: a caption is no text, or its embedding holds NaN or numbers that float16 cannot hold.
        """
        embeddings: list[TextEmbedding] = []
        for begin in range(0, len(captions), BATCH_SIZE):
            batch = list(captions[begin : begin + BATCH_SIZE])
            ids, mask = self._tokens(batch)
            tokens, pooled = self._forward(ids, mask)
            for i, caption in enumerate(batch):
                length = self.max_length if self._clip else int(mask[i].sum())
                one = TextEmbedding(tokens[i, :length].clone(), None if pooled is None else pooled[i].clone())
                _check_range(one, caption)
                embeddings.append(one)
        return embeddings

    def identity(self) -> dict[str, Any]:
        """What changes its output: class, config, lengths, SHA-256 of the tensors and of the tokenizer's files."""
        return self._identity

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [BATCH_SIZE, max_length]."""
        for caption in captions:
            if not isinstance(caption, str) or not _is_unicode(caption):
                raise ValueError(f"text encoder: expected captions of Unicode text, got {caption!r:.100}")
        # verbose=False: a caption that is too long is counted, not warned about.
        whole = self.tokenizer(captions, verbose=False)["input_ids"]
        self.truncated += sum(len(ids) > self.max_length for ids in whole)
        cut = self.tokenizer(
            captions + [""] * (BATCH_SIZE - len(captions)),
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return cut["input_ids"], cut["attention_mask"]

    @torch.inference_mode()
    def _forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """float32 [BATCH_SIZE, max_length, D] and, of CLIP, [BATCH_SIZE, P], on the CPU."""
        device = self.model.device
        if not self._clip:
            out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            return out.last_hidden_state.float().cpu(), None
        out = self.model(input_ids=ids.to(device))
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return out.last_hidden_state.float().cpu(), pooled.float().cpu()


def load_text_encoder(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    max_length: int | None = None,
) -> TextEncoder:
    """Load a text encoder and its tokenizer from a local folder; nothing is downloaded, no code of the folder is run.

    Args:
        path: folder with config.json, safetensors weights and the tokenizer's files; of a diffusers pipeline its
            text_encoder, text_encoder_2 …, whose tokenizer is the folder tokenizer, tokenizer_2 … beside it.
        dtype: that it runs in. T5's activations overflow float16.
        max_length: tokens per caption; None: what CLIP was trained with (77), 256 for T5.

    Raises:
        ValueError: transformers is not installed; the folder is not there, incomplete, or of another kind of model;
            its weights or its tokenizer do not fit its config; float16 for T5; max_length is more than it takes.
    """
    folder = Path(path)
    config = _read_config(folder)
    name = _model_class(folder, config)
    family = "CLIP" if name.startswith("CLIP") else "T5"
    if family == "T5" and dtype == torch.float16:
        raise ValueError(f"text encoder {folder}: T5's activations overflow float16; run it in bfloat16 or float32")
    files = _tokenizer_files(folder, family)
    weights = _weight_files(folder)
    transformers = _transformers()
    tokenizer = _load_tokenizer(transformers, files[0].parent)
    model, digest = _load_model(getattr(transformers, name), folder, weights, dtype)
    _check_tokenizer(folder, tokenizer, model.config, family)
    length = _max_length(folder, tokenizer, model.config, family, max_length)
    identity = {
        "class": name,
        "config": {k: v for k, v in sorted(config.items()) if k not in _NOT_IDENTITY and not k.startswith("_")},
        "weights": digest,
        "tokenizer": _files_digest(files),
        "max_length": length,
        "batch_size": BATCH_SIZE,
    }
    return TextEncoder(model.to(device), tokenizer, max_length=length, identity=identity)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")  # 2 to 5 seconds
    except ImportError as error:
        raise ValueError(f"text encoders need transformers: pip install 'fastlatent[text]' ({error})") from None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(
            f"text encoder: expected a local folder, got {folder}: nothing is downloaded, so fetch the model first"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(one.name for one in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"text encoder: expected config.json in {folder}, found {found}") from None
    except ValueError as error:
        raise ValueError(f"text encoder: {folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"text encoder: expected a JSON object in {folder / 'config.json'}, got {config!r:.100}")
    return config


def _model_class(folder: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures")
    if not (isinstance(named, list) and len(named) == 1 and named[0] in MODELS):
        raise ValueError(
            f"text encoder: expected {folder / 'config.json'} of one of {', '.join(MODELS)}, got architectures "
            f"{named!r:.100}; save the text part of a larger model with its class's save_pretrained"
        )
    return MODELS[named[0]]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        found = ", ".join(sorted(one.name for one in folder.iterdir())[:8])
        raise ValueError(
            f"text encoder: expected {WEIGHTS} or {WEIGHTS_INDEX} in {folder}, found {found}; other formats: load it "
            "with transformers and save_pretrained it"
        )
    try:
        names = sorted(set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"text encoder: {folder / WEIGHTS_INDEX} is no index of weights: {error!r}") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"text encoder: {folder / WEIGHTS_INDEX} names {missing[:3]}, not there")
    return [folder / name for name in names]


def _tokenizer_files(folder: Path, family: str) -> list[Path]:
    """The tokenizer's files, all in one folder: the model's own or, of a diffusers pipeline, the one beside it."""
    choices = [folder]
    if folder.resolve().name.startswith("text_encoder"):
        choices.append(folder.resolve().parent / folder.resolve().name.replace("text_encoder", "tokenizer"))
    for choice in choices:
        if any(all((choice / name).is_file() for name in names) for names in _VOCABULARIES[family]):
            return [choice / name for name in _TOKENIZER_FILES if (choice / name).is_file()]
    wanted = ", or ".join(" and ".join(names) for names in _VOCABULARIES[family])
    raise ValueError(f"text encoder: expected the tokenizer's {wanted} in {' or '.join(map(str, choices))}")


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds; every one means that these files are no tokenizer
        raise ValueError(f"text encoder: the tokenizer in {folder} does not load: {_short(error)}") from error


def _load_model(cls: Any, folder: Path, weights: list[Path], dtype: torch.dtype) -> tuple[Any, str]:
    """The model, and the SHA-256 of its tensors as they are stored, whatever dtype it runs in."""
    try:
        model, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
        digest = _weights_digest(weights)
    except Exception as error:  # as above
        raise ValueError(f"text encoder: {folder} does not load: {_short(error)}") from error
    # transformers fills what is missing with random numbers and only warns.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info[what] if not str(key).startswith(_DECODER))
        if wrong:
            raise ValueError(f"text encoder: the weights in {folder} do not fit its config.json: {what} {wrong[:3]}")
    return model, digest


def _weights_digest(weights: list[Path]) -> str:
    tensors: dict[str, Tensor] = {}
    for file in weights:
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if not name.startswith(_DECODER)}  # noqa: SIM118
    return tensors_digest(tensors)


def _check_tokenizer(folder: Path, tokenizer: Any, config: Any, family: str) -> None:
    """Raise ValueError where the tokenizer is not this model's: it would make ids that mean something else."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"text encoder {folder}: expected a tokenizer of at most {config.vocab_size} tokens, as the model has, "
            f"got one of {len(tokenizer)}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"text encoder {folder}: expected a tokenizer with a pad_token, got one without")
    # 2 is what CLIP's first configs said, wrongly; transformers then looks for the largest id.
    ends = (2, tokenizer.eos_token_id) if family == "CLIP" else (tokenizer.eos_token_id,)
    if config.eos_token_id not in ends:
        raise ValueError(
            f"text encoder {folder}: expected a tokenizer whose eos_token has the model's id {config.eos_token_id}, "
            f"got {tokenizer.eos_token_id}"
        )


def _max_length(folder: Path, tokenizer: Any, config: Any, family: str, wanted: int | None) -> int:
    # transformers gives tokenizers without a limit of their own one of 10^30.
    limit = int(tokenizer.model_max_length)
    if family == "CLIP":
        limit = min(limit, config.max_position_embeddings)
    least = tokenizer.num_special_tokens_to_add() + 1
    length = (limit if family == "CLIP" else min(limit, T5_TOKENS)) if wanted is None else wanted
    if not least <= length <= limit:
        raise ValueError(f"text encoder {folder}: expected a max_length from {least} to {limit}, got {length}")
    return length


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _check_range(embedding: TextEmbedding, caption: str) -> None:
    for values in (embedding.tokens, embedding.pooled):
        if values is not None and not values.abs().max() <= MAX_FLOAT16:  # NaN fails too
            raise ValueError(
                f"text encoder: the embedding of {caption!r:.100} holds NaN or numbers beyond ±{MAX_FLOAT16:g}; run it "
                "in float32 or bfloat16"
            )


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: file names of other bytes come as lone surrogates, which tokenizers refuse."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
