"""Text to token ids `[BOS] text EOS`: BOS where the tokenizer adds one, EOS always; specials stay text."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from lacuna.config import ConfigError, ModelConfig, Source, blame
from lacuna.data.batch import Tokens


class TextEncoder:
    """Plain text to documents. Other encoders have its `eos`, and its methods from `columns` on."""

    def __init__(self, tokenizer):
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.tokenizer {tokenizer.name_or_path} has no EOS token: set one in its folder")
        self.eos = tokenizer.eos_token_id  # ends documents or turns, and fills what is left of a row
        self.bos = added_bos(tokenizer)
        self.backend = copy.deepcopy(tokenizer).backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids, int32 [n], of each text; a text without any token gives an empty array."""
        self.backend.encode_special_tokens = True  # at every call: a deep copy loses it
        # twice the speed of the tokenizer's own call: no offsets, no masks
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        tokens = [encoding.ids for encoding in encodings]
        return [np.asarray(ids and [*self.bos, *ids, self.eos], dtype=np.int32) for ids in tokens]

    def columns(self, columns: list[str], source: Source) -> list[str]:
        """Those columns that it reads; ConfigError where it can read none."""
        if source.column not in columns:
            raise ConfigError(f"data.sources {source.path} has no column {source.column!r}, only {', '.join(columns)}")
        return [source.column]

    def documents(self, rows: list[dict], source: Source, numbers: Sequence[int]) -> list[Tokens]:
        """The document of each row; ConfigError with the number of one that is no text."""
        values = [row.get(source.column) for row in rows]
        for number, value in zip(numbers, values, strict=True):
            with blame(f"data.sources {source.path}: row {number} of {source.column!r} holds no text"):
                if not isinstance(value, str | None):
                    raise TypeError(type(value).__name__)
                (value or "").encode()  # half a surrogate pair has no bytes
        documents = self.encode([value or "" for value in values])
        return [Tokens(ids, "" if len(ids) else "dropped: no text") for ids in documents]

    def fingerprint(self) -> str:
        """Changes with all that could change a token or a mask: then the token cache is made anew."""
        return digest(self.backend.to_str(), self.bos, self.eos)

    def adapt(self, tokenizer):
        """Make the model's own tokenizer end turns as in training: here it does already."""


def digest(*parts) -> str:
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]  # it makes tokens, too
    return hashlib.sha256(repr((*parts, code)).encode()).hexdigest()[:32]


def load_tokenizer(model: ModelConfig):
    name = model.tokenizer or model.name
    if "/" in name and Path(name).parent.is_dir() and not Path(name).is_dir():
        raise ConfigError(f"model.name or model.tokenizer {name}: no such folder")
    with blame(f"model.name or model.tokenizer {name}: no config.json or tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def added_bos(tokenizer) -> list[int]:
    """BOS, if the tokenizer begins a text with it: some have one and do not use it."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def count_bytes(tokenizer, labels: np.ndarray) -> int:
    """UTF-8 bytes of the text of rows of labels [B, S], without special tokens."""
    rows = [row[row >= 0] for row in labels]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode()) for text in texts)
