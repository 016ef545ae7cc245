"""What a source of tokens consists of: the JSON written beside its shards once all of them are complete.

data/tokenize.py writes it last, so a source without one was interrupted. recipe/plan.py asks `tokens_on_disk`
(no numpy, no shard is opened); data/source.py opens the shards it names.

A source is a folder (`<folder>/manifest.json` beside `shard-00000.bin`, ...) or a Megatron prefix
(`<prefix>.manifest.json` beside `<prefix>.bin`). A prefix without a manifest is one shard of other tools.
"""

from __future__ import annotations

import glob
import struct
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_smol.data.files import write_whole
from megatron_smol.errors import DataError

FOLDER_MANIFEST = "manifest.json"
PREFIX_MANIFEST = ".manifest.json"
# What Megatron's preprocessing appends to --output-prefix: the JSON key and the level.
_MEGATRON_SUFFIXES = ("_*_document", "_*_sentence")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerRecord(_Record):
    name: str
    sha256: str  # Tokenizer.sha256: of what decides the ids, not of the file
    vocab_size: int
    eod_id: int


class ShardRecord(_Record):
    prefix: str  # relative to the manifest's folder
    tokens: int
    documents: int
    sequences: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    docs_sha256: str | None = None  # of <prefix>.docs.npy (data/origins.py), when it was asked for


class InputRecord(_Record):
    path: str
    bytes: int
    sha256: str  # empty for a URL whose store has a version of its own
    etag: str | None = None  # that version


class Manifest(_Record):
    version: Literal[1] = 1
    source: str
    tokenizer: TokenizerRecord
    dtype: str
    tokens: int
    documents: int
    append_eod: bool
    json_key: str
    sentences: str | None  # language, when documents are split into sentences, one sequence each
    keep_newlines: bool
    seed: int | None  # of the document shuffle; null: the order of the input
    empty_documents: int  # skipped
    bad_lines: int  # skipped, only with skip_bad
    dropped_characters: int  # in the input, but not in the vocabulary
    shards: tuple[ShardRecord, ...]
    inputs: tuple[InputRecord, ...]
    versions: dict[str, str]
    min_doc_tokens: int | None = None  # filters, on tokens without the end of document
    max_doc_tokens: int | None = None
    short_documents: int = 0  # left out by the filters
    long_documents: int = 0
    filtered_tokens: int = 0
    packed: dict[str, int] | None = None  # data/packing.py: length, padding_tokens, ...; null: end to end

    def write(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=2) + "\n")


def read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is not a manifest of this version: {field}: {first['msg']}; run `smol preprocess` "
            "again with --overwrite"
        ) from None


def locate(path: str | Path) -> tuple[Path, Manifest | None]:
    """Where a source lives: (folder, its manifest), or (prefix of the single shard, None)."""
    found = _find(Path(path))
    if found is None:
        given = Path(path)
        if given.is_dir():
            raise DataError(
                f"the folder {given} has no {FOLDER_MANIFEST}: its preprocessing did not finish, or this "
                f"is not a folder of tokens; run `smol preprocess` (again)"
            )
        raise DataError(
            f"no tokens at {given}: expected a folder with {FOLDER_MANIFEST}, or a Megatron prefix with "
            f".bin and .idx beside it; run `smol preprocess INPUT --output {given}`"
        )
    return found


def tokens_on_disk(path: str | Path) -> int | None:
    """Tokens of a source, or None when nothing is there yet, or not within reach. Reads one small file."""
    if "://" in str(path):
        from megatron_smol.data.stores import open_remote  # which needs this module

        with suppress(DataError):
            return open_remote(str(path))[1].tokens
        return None
    found = _find(Path(path))
    if found is None:
        return None
    where, manifest = found
    return manifest.tokens if manifest else _tokens_of_prefix(where)


def _find(path: Path) -> tuple[Path, Manifest | None] | None:
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if (path / FOLDER_MANIFEST).is_file():
        return path, read_manifest(path / FOLDER_MANIFEST)
    for prefix in (path, *_with_megatron_suffix(path)):
        manifest = prefix.with_name(prefix.name + PREFIX_MANIFEST)
        if manifest.is_file():
            return prefix.parent, read_manifest(manifest)
        if any(prefix.with_name(prefix.name + end).is_file() for end in (".idx", ".bin")):
            return prefix, None
    return None


def _with_megatron_suffix(path: Path) -> list[Path]:
    name = glob.escape(path.name)
    found = [file for suffix in _MEGATRON_SUFFIXES for file in path.parent.glob(name + suffix + ".idx")]
    if len(found) > 1:
        choices = ", ".join(str(file.with_suffix("")) for file in sorted(found))
        raise DataError(f"{path} could mean several sets of tokens: {choices}; name one of them in full")
    return [file.with_suffix("") for file in found]


def _tokens_of_prefix(prefix: Path) -> int:
    # Not through IndexedReader: a plan is printed without numpy's shards being opened.
    try:
        with prefix.with_name(prefix.name + ".idx").open("rb") as stream:
            code = struct.unpack_from("<B", stream.read(18), 17)[0]
        item_bytes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
        return prefix.with_name(prefix.name + ".bin").stat().st_size // item_bytes
    except (OSError, struct.error, KeyError):
        raise DataError(
            f"{prefix}.idx and {prefix}.bin are not a complete pair: copy both again, or preprocess again"
        ) from None
