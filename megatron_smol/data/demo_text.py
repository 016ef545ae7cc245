"""Which files of a few source distributions become the demo's text, and how they are cleaned.

Stands between pip's downloads and the raw JSONL that `smol preprocess` reads; tools/make_demo_data.py
calls it. Everything here is a function of the archives' bytes: pinned versions give the same JSONL on
every machine.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

PROSE_SUFFIXES = {".rst", ".txt", ".md"}
CODE_SUFFIXES = {".py"}
# Tests, translations and vendored copies repeat what is elsewhere; generated parsers are no one's writing.
SKIPPED_FOLDERS = {"tests", "test", "testing", "locale", "_vendor", "migrations", "benchmarks", "_antlr"}
SMALLEST_BYTES = 400
LARGEST_BYTES = 400_000
# SmolLM2's vocabulary has no token for these six control characters: tokenizers drop them without a word.
UNWRITABLE = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
_UNWRITABLE_TO_NOTHING = dict.fromkeys(UNWRITABLE)


@dataclass(frozen=True)
class Archive:
    """A pinned source distribution and the folders inside it that feed each source."""

    name: str
    version: str
    licence: str
    sha256: str
    folders: dict[str, tuple[str, ...]]  # source -> path prefixes; the first source that matches takes a file
    code_megabytes: float = 0.0  # code is plentiful: take files up to this size

    @property
    def label(self) -> str:
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Document:
    text: str
    origin: str

    @property
    def order_key(self) -> str:
        """A place in the file that depends on the name alone.

        Neighbours are then of different packages, and the last tokens of a source, which a recipe may hold
        out for validation, are a sample of all of it.
        """
        return hashlib.sha256(self.origin.encode()).hexdigest()


@dataclass
class SourceCounts:
    """What one JSONL file holds, and what was left out on the way."""

    documents: int = 0
    characters: int = 0
    duplicates: int = 0
    dropped_control_characters: int = 0
    per_package: dict[str, int] = field(default_factory=dict)  # characters


def source_of(path: str, archive: Archive) -> str | None:
    """The source that `path` (relative to the archive's top folder) belongs to, or None."""
    pure = PurePosixPath(path)
    if SKIPPED_FOLDERS & set(pure.parts[:-1]) or pure.name.startswith(("test_", "conftest")):
        return None
    for source, prefixes in archive.folders.items():
        wanted = CODE_SUFFIXES if source == "code" else PROSE_SUFFIXES
        if pure.suffix in wanted and any(pure.is_relative_to(prefix) for prefix in prefixes):
            return source
    return None


def read_archive(path: Path, archive: Archive) -> dict[str, list[Document]]:
    """Every wanted document of a .tar.gz, by source, in `Document.order_key` order, code within its limit."""
    found: dict[str, list[Document]] = {source: [] for source in archive.folders}
    with tarfile.open(path) as tar:
        for member in tar:
            _, _, inner_path = member.name.partition("/")
            source = source_of(inner_path, archive)
            if source is None or not member.isfile() or not SMALLEST_BYTES <= member.size <= LARGEST_BYTES:
                continue
            content = tar.extractfile(member)
            assert content is not None
            try:
                text = content.read().decode("utf-8")
            except UnicodeDecodeError:
                continue
            found[source].append(Document(text, f"{archive.label}/{inner_path}"))
    for documents in found.values():
        documents.sort(key=lambda document: document.order_key)
    if "code" in found:
        found["code"] = _up_to(found["code"], int(archive.code_megabytes * 1e6))
    return found


def _up_to(documents: list[Document], characters: int) -> list[Document]:
    """The leading documents that fit in `characters`."""
    kept, used = [], 0
    for document in documents:
        if used + len(document.text) > characters:
            break
        kept.append(document)
        used += len(document.text)
    return kept


def strip_unwritable(text: str) -> tuple[str, int]:
    """`text` without the control characters that the vocabulary lacks, and how many there were."""
    clean = text.translate(_UNWRITABLE_TO_NOTHING)
    return clean, len(text) - len(clean)


def unique_clean(documents: Iterable[Document], counts: SourceCounts) -> Iterator[Document]:
    """Documents without unwritable characters and without exact duplicates; both are counted in `counts`."""
    seen: set[bytes] = set()
    for document in documents:
        text, dropped = strip_unwritable(document.text)
        fingerprint = hashlib.sha256(text.strip().encode()).digest()
        if fingerprint in seen:
            counts.duplicates += 1
            continue
        seen.add(fingerprint)
        package = document.origin.partition("/")[0]
        counts.documents += 1
        counts.characters += len(text)
        counts.dropped_control_characters += dropped
        counts.per_package[package] = counts.per_package.get(package, 0) + len(text)
        yield Document(text, document.origin)


def write_jsonl(documents: Iterable[Document], path: Path) -> SourceCounts:
    """Write one source as JSONL with the keys `text` and `origin`, in `Document.order_key` order."""
    counts = SourceCounts()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as output:
        for document in unique_clean(sorted(documents, key=lambda d: d.order_key), counts):
            row = {"text": document.text, "origin": document.origin}
            output.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as rows:
        for row in rows:
            content = json.loads(row)
            yield Document(content["text"], content["origin"])
