"""Text to token ids and back: Hugging Face's tokenizer is the reference, splintr-rs the fast path.

data/tokenize.py encodes with it, the trainer and the exporter carry it. A tokenizer is a local folder with
tokenizer.json, or a hub name. Text is text: `<|im_start|>` written in a web page is spelled out, never the
control token. splintr-rs gives the same ids about 15 times faster; it is used only after it agreed with
Hugging Face on the very input (`choose_backend`), and documents it treats otherwise go to Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
import tokenizers

from megatron_smol.data.boundary import Cuts, cuts_of
from megatron_smol.errors import DataError, UserError

Backend = Literal["splintr", "hf"]
IdArray = np.ndarray[Any, np.dtype[Any]]

DOCUMENT_END = "<|endoftext|>"
# The files that make up a tokenizer for transformers.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Open a local folder (or its tokenizer.json), or fetch a hub name."""
    path = Path(name_or_path).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        path = _fetch(str(name_or_path))
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"the tokenizer folder {path} has no tokenizer.json; save it with transformers' "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(folder) first"
        )
    files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    return Tokenizer(str(name_or_path), files)


def _fetch(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"no tokenizer folder {name}: give a folder with tokenizer.json, or a hub name (OWNER/NAME)"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # the hub client raises a dozen kinds: offline, not found, gated, no cache
        raise UserError(
            f"could not fetch the tokenizer {name} from the hub ({type(error).__name__}), and no local "
            f"folder has that name; go online, or give a local folder with tokenizer.json"
        ) from error


class Encoded(NamedTuple):
    """Texts as ids, back to back."""

    ids: IdArray
    lengths: IdArray  # ids of each text
    dropped: int  # characters that the vocabulary cannot write: six control characters for SmolLM2


class Tokenizer:
    """A tokenizer for pretraining text. Pickles by its files, so each worker process builds its own."""

    def __init__(self, name: str, files: dict[str, bytes], backend: Backend = "hf") -> None:
        self.name = name
        self.files = files
        self.backend: Backend = backend
        reference = self._reference  # first: it says best what is wrong with a file
        self._json: dict[str, Any] = orjson.loads(files["tokenizer.json"])
        vocab = reference.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eod_token = self._end_of_document(vocab)
        self.eod_id: int = vocab[self.eod_token]
        self._missing_bytes = _missing_bytes(self._json, vocab)
        self._splintr = _load_splintr(self._json) if backend == "splintr" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.name, self.files, self.backend)

    def on_splintr(self) -> Tokenizer:
        """The same tokenizer on the fast backend. Raises what splintr raises when it cannot load the file."""
        fast = object.__new__(Tokenizer)  # sharing all else: opening a tokenizer costs a tenth of a second
        fast.__dict__ |= self.__dict__ | {"backend": "splintr", "_splintr": _load_splintr(self._json)}
        return fast

    @cached_property
    def cuts(self) -> Cuts | None:
        """Where a text may be cut so that the ids of the pieces are the ids of the whole; None: not known."""
        return cuts_of(self._json)

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """Ids of each text; no special tokens are added."""
        encoded = self.encode_flat(texts)
        return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> Encoded:
        """The same in one array, for speed."""
        dropped = self._dropped_characters("".join(texts))
        if self._splintr is None:
            return Encoded(*self._encode_reference(texts), dropped)
        ids, lengths = _encode_splintr(self._splintr, texts)
        if not dropped:
            return Encoded(ids, lengths, 0)
        # splintr drops an unknown byte after merging, Hugging Face before: the reference decides.
        odd = [index for index, text in enumerate(texts) if self._dropped_characters(text)]
        odd_ids, odd_lengths = self._encode_reference([texts[index] for index in odd])
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        for index, part in zip(odd, np.split(odd_ids, np.cumsum(odd_lengths)[:-1]), strict=True):
            parts[index] = part
        lengths[odd] = odd_lengths
        return Encoded(np.concatenate(parts), lengths, dropped)

    def _encode_reference(self, texts: Sequence[str]) -> tuple[IdArray, IdArray]:
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = np.empty(int(lengths.sum()), dtype=np.uint32)
        start = 0
        for encoding, length in zip(encodings, lengths.tolist(), strict=True):
            ids[start : start + length] = encoding.ids
            start += length
        return ids, lengths

    def _dropped_characters(self, text: str) -> int:
        data = text.encode()  # raises for half a surrogate pair, which no backend can encode
        return len(data) - len(data.translate(None, self._missing_bytes))

    def decode(self, ids: Sequence[int] | IdArray) -> str:
        """Text with its control tokens spelled out."""
        return str(self._reference.decode([int(token) for token in ids], skip_special_tokens=False))

    @cached_property
    def sha256(self) -> str:
        """Identity of the text-to-ids mapping: equal for two files that differ only in layout or chat
        settings."""
        return hashlib.sha256(_canonical(self._json).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers' AutoTokenizer needs."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        files = dict(self.files)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eod_token}
        files.setdefault("tokenizer_config.json", json.dumps(config, indent=2).encode())
        for name, content in files.items():
            (target / name).write_bytes(content)

    @cached_property
    def _reference(self) -> tokenizers.Tokenizer:
        try:
            reference = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {self.name}: its tokenizer.json cannot be read: {error}") from error
        reference.encode_special_tokens = True  # spell `<|im_start|>` out
        reference.no_truncation()
        reference.no_padding()
        return reference

    def _end_of_document(self, vocab: dict[str, int]) -> str:
        special = {token["content"] for token in self._json.get("added_tokens", []) if token.get("special")}
        config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        for candidate in (DOCUMENT_END, eos):
            if candidate in special and candidate in vocab:
                return str(candidate)
        raise UserError(
            f"tokenizer {self.name} has no end-of-document token: neither {DOCUMENT_END} nor its eos_token "
            f"({eos!r}) is a special token of its vocabulary (found: "
            f"{', '.join(sorted(special)) or 'none'}); set eos_token in its tokenizer_config.json"
        )


def choose_backend(tokenizer: Tokenizer, sample: Sequence[str]) -> Tokenizer:
    """The tokenizer on splintr-rs when that gives Hugging Face's ids on `sample` and on awkward strings."""
    try:
        fast = tokenizer.on_splintr()
    except Exception:  # a tokenizer.json that splintr cannot load, or splintr not installed
        return tokenizer
    return fast if disagreement(fast, [*_AWKWARD, *sample]) is None else tokenizer


def disagreement(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text that the tokenizer's backend encodes otherwise than Hugging Face, if any."""
    if not texts:
        return None
    ours = tokenizer.encode_batch(texts)
    ids, lengths = tokenizer._encode_reference(texts)
    theirs = np.split(ids, np.cumsum(lengths)[:-1])
    return next(
        (text for text, a, b in zip(texts, ours, theirs, strict=True) if not np.array_equal(a, b)), None
    )


_AWKWARD = (
    "",
    " ",
    "  \t\n\r\n   x\n\n\n y ",
    "0123456789 1,234.56 ٣٤ Ⅷ ½ 2²",
    "don't we'LL I'Ve <|endoftext|> <|im_start|>user <s></s>",
    "naïve e\u0301 ﬁ İ ß 東京 ไทย हिन्दी 👩‍👩‍👧 \u200b\u00a0\u3000\ufeff\u2028",
    "".join(map(chr, range(1, 0x180))),
    "\u0004a\u0006b\u0013c \U00040000 \U000bffff \U0010ffff",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n\n\tif x>=10:\n\t\tpass\n",
)


def _load_splintr(document: dict[str, Any]) -> Any:
    import splintr

    # Only non-special added tokens are text; without this, splintr turns `<|im_start|>` into the control
    # token.
    plain = [token for token in document.get("added_tokens", []) if not token.get("special")]
    trimmed = {**document, "added_tokens": plain, "post_processor": None, "truncation": None, "padding": None}
    return splintr.from_json_bytes(orjson.dumps(trimmed))


def _encode_splintr(encoder: Any, texts: Sequence[str]) -> tuple[IdArray, IdArray]:
    ids, offsets = encoder.encode_batch_flat(list(texts))  # u32 ids; u64 bounds, one more than texts
    return np.frombuffer(ids, dtype=np.uint32), np.diff(np.frombuffer(offsets, dtype=np.uint64)).astype(
        np.int64
    )


def _missing_bytes(document: dict[str, Any], vocab: dict[str, int]) -> bytes:
    """Bytes that a byte-level vocabulary has no token for (21 of SmolLM2's, most of them never valid UTF-8)."""
    if "ByteLevel" not in json.dumps([document.get("pre_tokenizer"), document.get("decoder")]):
        return b""
    return bytes(byte for byte, symbol in byte_symbols().items() if symbol not in vocab)


def byte_symbols() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable Latin-1 as itself, the others from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + rank) for rank, byte in enumerate(others)
    }


def _canonical(document: dict[str, Any]) -> str:
    """tokenizer.json reduced to what decides the ids of text, so that re-saving it does not change its
    identity."""
    model = {key: value for key, value in document["model"].items() if value not in (None, False)}
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    model["merges"] = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])
    ]
    added = sorted(
        (token["id"], token["content"], token.get("special", False)) for token in document["added_tokens"]
    )
    parts = [document.get("normalizer"), document.get("pre_tokenizer"), model, added]
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))
