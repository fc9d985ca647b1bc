"""Text features from a pretrained transformer (paper section 5.3: BGE-large, the [CLS] token).

Texts are sorted by length, longest first, and cut into blocks of a fixed number; a block is tokenized, encoded in
batches under a token budget, and kept (``shards.encoders.encoding``) before the next begins, so a build that is killed
loses at most one block. Nothing but the texts, their order and one block's tensors is held in memory. A row depends on
its text alone, up to rounding: padding is masked.

``V`` items, ``n`` texts of a block, ``T`` tokens of a batch's longest text, ``dim`` the model's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import TransformersFeature
from shards.encoders.compute import Compute, choose_compute
from shards.encoders.encoding import Encoded, EncodedBlocks
from shards.encoders.model_folder import find_model
from shards.encoders.torchvision_import import make_torchvision_importable

BLOCK_ITEMS = 1024  # a minute or so of BGE-large on a CPU core is lost at most; a GPU writes a file a second


@dataclass(frozen=True)
class TextEncoder:
    """A model, its tokenizer, and how a row is made of them."""

    model: Any
    tokenizer: Any
    compute: Compute
    pooling: str  # cls | mean
    max_tokens: int  # longer texts are cut; special tokens included
    batch_tokens: int
    revision: str

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """L2-normalised rows float16 [n, dim] of ``texts``, in their order.

        Raises:
            UserError: the model's output is not finite.
        """
        tokens = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)
        rows = np.empty((len(texts), self.dim), np.float16)
        for batch in token_batches([len(ids) for ids in tokens["input_ids"]], self.batch_tokens):
            chosen = {name: [values[i] for i in batch] for name, values in tokens.items()}
            padded = self.tokenizer.pad(chosen, padding=True, return_tensors="pt").to(self.compute.device)
            with torch.inference_mode():
                with self.compute.autocast():
                    hidden = self.model(**padded).last_hidden_state
                pooled = pool(hidden, padded["attention_mask"], self.pooling)
                rows[batch] = F.normalize(pooled, dim=1).half().cpu().numpy()
        require(bool(np.isfinite(rows).all()), "the text encoder's output is not finite; try precision: fp32")
        return rows


def encode_texts(
    name: str, config: TransformersFeature, texts: list[str], has_text: np.ndarray, encoding: Path
) -> Encoded:
    """Rows of the texts of feature ``name`` where ``has_text`` (bool [V]); other items are absent.

    Finished blocks are kept in the folder ``encoding``; those of an earlier build of the same recipe are taken over.

    Raises:
        UserError: no item has a text, or the model cannot be found or is not a text encoder.
    """
    chosen = np.flatnonzero(has_text)
    require(len(chosen) > 0, f"feature {name!r}: no item has a text; check data.text against the item table")
    encoder = load_encoder(config)
    described = f"transformers:{config.model} {encoder.pooling} {encoder.max_tokens}"
    recipe = {
        "encoder": described,
        "revision": encoder.revision,
        "precision": encoder.compute.precision,
        "block_items": BLOCK_ITEMS,
        "texts": _texts_sha256(texts, has_text),
    }
    order = _longest_first(texts, chosen)
    blocks = EncodedBlocks(encoding, name, recipe, num_blocks=-(-len(order) // BLOCK_ITEMS))
    missing = blocks.missing()
    done = len(order) - sum(len(_block(order, block)) for block in missing)
    print(f"feature {name!r}: {described}, {encoder.compute.precision} on {encoder.compute.device}", flush=True)
    if done:
        num_done = blocks.num_blocks - len(missing)
        print(f"feature {name!r}: {num_done} of {blocks.num_blocks} blocks were done before", flush=True)
    progress = Progress("item", len(order), done, name=name)
    for block in missing:
        ids = _block(order, block)
        blocks.save(block, ids, encoder.encode([texts[i] for i in ids]))
        progress.advance(len(ids))
    progress.close()
    rows, present = blocks.gather(len(texts), encoder.dim)
    return Encoded(rows, present, described, encoder.revision)


def load_encoder(config: TransformersFeature) -> TextEncoder:
    """The model and tokenizer that ``config`` names, in evaluation mode on the device that is chosen for them.

    Raises:
        UserError: they cannot be found or loaded, lack weights, or are not an encoder of texts.
    """
    folder, revision = find_model(config.model, config.revision)
    make_torchvision_importable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model, loading = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # noqa: BLE001 - a damaged or unknown model makes the libraries raise what they like
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"model {config.model!r} cannot be loaded from {folder} ({reason}); expected config.json, "
            "model.safetensors and a tokenizer, of a model that transformers has the code of"
        ) from None
    _check_model(config.model, model, tokenizer, loading["missing_keys"])
    tokenizer.padding_side = "right"  # [CLS] stands first
    compute = choose_compute(config.precision)
    return TextEncoder(
        model.to(compute.device).eval(),
        tokenizer,
        compute,
        config.pooling,
        min(config.max_tokens, _longest_input(model, tokenizer)),
        config.batch_tokens,
        revision,
    )


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector float32 [n, dim] per text: its first token's, or the mean over the tokens that are no padding.

    Args:
        hidden: [n, T, dim], padded on the right.
        mask: [n, T], 0 where padding.
        pooling: cls or mean.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[np.ndarray]:
    """Positions of ``lengths``, longest first, in batches whose count times longest is at most ``budget``.

    A single text that is longer than the budget is a batch of its own.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    low = 0
    while low < len(order):
        count = max(1, budget // max(1, int(sizes[order[low]])))
        yield order[low : low + count]
        low += count


def _check_model(name: str, model: Any, tokenizer: Any, missing: Sequence[str]) -> None:
    # A checkpoint without the pooler is common, and no row depends on it; anything else would stay random.
    lost = [key for key in missing if not key.startswith("pooler.")]
    require(not lost, f"model {name!r}: its checkpoint lacks {len(lost)} weights, such as {(lost or ['none'])[0]}")
    require(
        not model.config.is_encoder_decoder and hasattr(model.config, "hidden_size"),
        f"model {name!r} is a {type(model).__name__}; expected an encoder of texts, such as a BERT",
    )
    require(
        tokenizer.pad_token is not None, f"model {name!r}: its tokenizer has no padding token; choose another model"
    )


def _longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that the model can take: its tokenizer's limit, and the rows of its table of positions."""
    limits = [int(tokenizer.model_max_length)]
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind its padding row.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    return min(limits)


def _longest_first(texts: list[str], chosen: np.ndarray) -> np.ndarray:
    """``chosen`` by length in characters, which is close to that in tokens and needs no tokenizing of the catalogue."""
    lengths = np.fromiter((len(texts[i]) for i in chosen), np.int64, len(chosen))
    return chosen[np.argsort(-lengths, kind="stable")]


def _block(order: np.ndarray, block: int) -> np.ndarray:
    return order[block * BLOCK_ITEMS : (block + 1) * BLOCK_ITEMS]


def _texts_sha256(texts: list[str], has_text: np.ndarray) -> str:
    total = hashlib.sha256(has_text.tobytes())
    for text in texts:
        encoded = text.encode()
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()
