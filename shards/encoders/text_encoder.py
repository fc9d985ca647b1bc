"""A pretrained transformer that makes rows of texts (paper section 5.3: BGE-large, the [CLS] token).

A row depends on its text alone. On a CPU nothing is padded: a batch has texts of one length, and one shape for it,
filled up with repeated texts, since a product rounds by its shape. On a GPU, whose batches are large, padding is
masked, and rows of texts that were encoded beside others can differ by rounding.

``n`` texts, ``T`` tokens of a batch's texts with padding, ``dim`` the model's width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import TransformersFeature
from shards.encoders.compute import Compute, choose_compute
from shards.encoders.model_folder import find_text_model
from shards.encoders.torchvision_import import make_torchvision_importable

# What a model's config may ask for; any other name, and flash attention that is not installed, is fetched from a hub.
IMPLEMENTATION_KEY = re.compile(r"_?(attn|experts)_implementation(_internal)?")
IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
CPU_TOKENS = 512  # of one forward pass on a CPU: more are hardly faster, and what fills a batch up is wasted


class EncodedTexts(NamedTuple):
    """What :meth:`TextEncoder.encode` returns."""

    rows: np.ndarray  # float16 [n, dim], L2-normalised
    cut: np.ndarray  # bool [n]: longer than the model reads, so that its end plays no part


@dataclass(frozen=True)
class TextEncoder:
    """A model, its tokenizer, and how they make a row of a text."""

    model: Any
    tokenizer: Any
    compute: Compute
    pooling: str  # cls | mean
    max_tokens: int  # special tokens included; longer texts are cut
    batch_tokens: int
    revision: str

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Rows of ``texts``, in their order.

        Raises:
            UserError: the model's output is not finite.
        """
        tokens = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)
        lengths = np.fromiter(map(len, tokens["input_ids"]), np.int64, len(texts))
        rows = np.empty((len(texts), self.dim), np.float16)
        for batch in self._batches(lengths):
            filled = np.resize(batch.texts, batch.num_rows)
            chosen = {name: [values[i] for i in filled] for name, values in tokens.items()}
            padded = self.tokenizer.pad(
                chosen, padding="max_length", max_length=batch.num_tokens, return_tensors="pt"
            ).to(self.compute.device)
            with torch.inference_mode():
                with self.compute.autocast():
                    hidden = self.model(**padded).last_hidden_state
                pooled = pool(hidden, padded["attention_mask"], self.pooling)
                rows[batch.texts] = F.normalize(pooled, dim=1).half().cpu().numpy()[: len(batch.texts)]
        require(bool(np.isfinite(rows).all()), "the text encoder's output is not finite; try precision: fp32")
        return EncodedTexts(rows, self._is_cut(texts, lengths))

    def _is_cut(self, texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
        """Which texts have more tokens than ``max_tokens``, bool [n], given their ``lengths`` once cut, int64 [n]."""
        is_cut = np.zeros(len(texts), np.bool_)
        full = np.flatnonzero(lengths >= self.max_tokens)
        if len(full):
            whole = self.tokenizer([texts[i] for i in full.tolist()], truncation=False, verbose=False)["input_ids"]
            is_cut[full] = [len(tokens) > self.max_tokens for tokens in whole]
        return is_cut

    def _batches(self, lengths: np.ndarray) -> Iterator[TokenBatch]:
        if self.compute.device.type == "cpu":
            return token_batches(lengths, min(self.batch_tokens, CPU_TOKENS), one_shape=True)
        return token_batches(lengths, self.batch_tokens, one_shape=False)


def load_encoder(config: TransformersFeature) -> TextEncoder:
    """The model and tokenizer that ``config`` names, in evaluation mode on the chosen device.

    Raises:
        UserError: they cannot be found or loaded, lack weights, or are not a text encoder.
    """
    folder, revision = find_text_model(config.model, config.revision)
    _check_code(config.model, folder)
    make_torchvision_importable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model, loading = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # noqa: BLE001 - a damaged or unknown model can make the libraries raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"model {config.model!r} cannot be loaded from {folder} ({reason}); expected config.json, "
            "model.safetensors and a tokenizer, of a model that transformers has the code for"
        ) from None
    _check_model(config.model, model, tokenizer, loading["missing_keys"])
    tokenizer.padding_side = "right"  # [CLS] comes first
    compute = choose_compute(config.precision)
    return TextEncoder(
        model=model.to(compute.device).eval(),
        tokenizer=tokenizer,
        compute=compute,
        pooling=config.pooling,
        max_tokens=min(config.max_tokens, _longest_input(model, tokenizer)),
        batch_tokens=config.batch_tokens,
        revision=revision,
    )


def _check_code(model: str, folder: Path) -> None:
    """Refuse a model that names an attention of its own, or is quantized: transformers would fetch and run kernels.

    It would do so even without ``trust_remote_code``.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    parts = [config]
    for part in parts:  # grows: a config may hold those of its parts
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                parts.append(value)
            require(
                key not in QUANTIZATION_KEYS or value is None,
                f"model {model!r}: {folder / 'config.json'} has {key} {shown(value)}; expected a model of float "
                "weights, since a quantized one can run code from a hub",
            )
            if IMPLEMENTATION_KEY.fullmatch(str(key)) and not IMPLEMENTATIONS.issuperset(_words(value)):
                raise UserError(
                    f"model {model!r}: {folder / 'config.json'} has {key} {value!r}; expected one of "
                    f"{', '.join(sorted(IMPLEMENTATIONS))}; remove it, the model then runs with PyTorch's"
                )


def _words(value: Any) -> list[Any]:
    """The attentions that a config names: one, or one for each of its parts."""
    named = list(value.values()) if isinstance(value, dict) else [value]
    return [str(word) for word in named if word is not None]


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector float32 [n, dim] per text: its first token's, or the mean over its tokens without padding.

    Args:
        hidden: [n, T, dim], padded on the right.
        mask: [n, T], 0 where padding.
        pooling: cls or mean.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


class TokenBatch(NamedTuple):
    """One forward pass."""

    texts: np.ndarray  # int64 [n], their positions
    num_tokens: int  # that each is padded to
    num_rows: int  # of the batch; more than texts, if it is filled up


def token_batches(lengths: np.ndarray, budget: int, one_shape: bool) -> Iterator[TokenBatch]:
    """Batches of at most ``budget`` tokens, padding included, the longest texts first.

    A text that is longer than the budget is a batch by itself.

    Args:
        lengths: int64 [n], tokens of the texts.
        budget: tokens of a batch.
        one_shape: a batch holds texts of one length, without padding, and has as many rows as any other of that length,
            whatever texts there are.
    """
    order = np.argsort(-lengths, kind="stable")
    low = 0
    while low < len(order):
        longest = max(1, int(lengths[order[low]]))
        count = max(1, budget // longest)
        batch = order[low : low + count]
        if one_shape:
            batch = batch[lengths[batch] == lengths[batch[0]]]
        yield TokenBatch(batch, longest, count if one_shape else len(batch))
        low += len(batch)


def _check_model(name: str, model: Any, tokenizer: Any, missing: Sequence[str]) -> None:
    # Many checkpoints lack the pooler, and no row depends on it. Any other missing weight would stay random.
    lost = [key for key in missing if not key.startswith("pooler.")]
    if lost:
        raise UserError(f"model {name!r}: its checkpoint lacks {len(lost)} weights, such as {lost[0]}")
    require(
        not model.config.is_encoder_decoder and hasattr(model.config, "hidden_size"),
        f"model {name!r} is a {type(model).__name__}; expected a text encoder, such as a BERT",
    )
    require(
        tokenizer.pad_token is not None, f"model {name!r}: its tokenizer has no padding token; choose another model"
    )


def _longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Most tokens that the model can take: limited by its tokenizer, and by its table of positions."""
    limits = [int(tokenizer.model_max_length)]
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from the row after its padding row.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    return min(limits)
