"""Documents of the input files: the first block of a pipeline.

datatrove's own readers end a file in silence at its first byte that is not UTF-8; here every line that cannot be
read is counted, with the reason, and the others are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megatron_smol.curate.code import language_of, source_text
from megatron_smol.curate.domains import domain_of
from megatron_smol.curate.warc import WARC, extractor, pages
from megatron_smol.data.corpus import opened
from megatron_smol.data.inputs import InputFile
from megatron_smol.data.records import parse
from megatron_smol.errors import DataError

LONGEST_LINE = (
    64 << 20
)  # bytes; longer lines are counted and left out: a document of that size is no document


class ReadInputs(PipelineStep):
    """The documents of every `world_size`-th file, from the rank's own on, in the files' order."""

    type, name = "read", "inputs"

    def __init__(
        self, files: list[InputFile], text_key: str, extract: str, domains: frozenset[str] | None = None
    ) -> None:
        super().__init__()
        self.files, self.text_key, self.extract, self.domains = files, text_key, extract, domains

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for file in self.files[rank::world_size]:
            if not file.size:
                self.stat_update("empty_files")
                continue
            if file.name.endswith(WARC):
                found = self._warc(file)
            elif file.suffix == ".parquet":
                found = self._parquet(file)
            elif language_of(file.name):
                found = self._code(file.name)
            else:
                found = self._lines(file)
            for document in found:
                self.stat_update("total", "forwarded")
                self.update_doc_stats(document)
                yield document

    def _bad(self, why: str) -> None:
        self.stat_update("total", "dropped", f"dropped_{why}")

    def _document(self, record: Any, name: str) -> Document | None:
        if not isinstance(record, dict) or not isinstance(record.get(self.text_key), str):
            self._bad("no_text")
            return None
        text = record.pop(self.text_key)
        if not text.strip():
            self._bad("empty")
            return None
        identity = str(record.pop("id", name))
        about = record.pop("metadata", None)
        metadata = record | (about if isinstance(about, dict) else {})
        if not self._is_wanted(metadata.get("url")):
            return None
        return Document(text=text, id=identity, metadata=metadata)

    def _lines(self, file: InputFile) -> Iterator[Document]:
        stem = Path(file.name).name
        for number, line in enumerate(_bounded_lines(file), 1):
            if line is None:
                self._bad("line_too_long")
            elif not line.isspace():
                try:
                    record = parse(line)
                except ValueError:
                    self._bad("not_json")
                    continue
                if document := self._document(record, f"{stem}/{number}"):
                    yield document

    def _parquet(self, file: InputFile) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with file.open() as stream:
                for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                    for record in batch.to_pylist():
                        number += 1
                        if document := self._document(record, f"{Path(file.name).name}/{number}"):
                            yield document
        except pa.ArrowInvalid as error:
            raise DataError(f"{file.name} cannot be read as parquet after {number:,} rows: {error}") from None

    def _warc(self, file: InputFile) -> Iterator[Document]:
        """Pages of other domains are left out before the extraction, which is the slow part."""
        extract = extractor(self.extract)
        for page in pages(file, self._bad):
            if not self._is_wanted(page.url):
                continue
            if text := extract(page.html):
                about = {"url": page.url, "date": page.date}
                yield Document(text=text, id=page.identity or page.url or file.name, metadata=about)
            else:
                self._bad("no_text")

    def _code(self, file: str) -> Iterator[Document]:
        text, why = source_text(file)
        if text is None:
            self._bad(why)
        else:
            yield Document(text=text, id=file, metadata={"path": file, "language": language_of(file)})

    def _is_wanted(self, url: object) -> bool:
        if self.domains is None or domain_of(url) in self.domains:
            return True
        self._bad("other_domain")
        return False


def _bounded_lines(file: InputFile) -> Iterator[bytes | None]:
    """Lines; None for one that is longer than LONGEST_LINE, of which nothing is held."""
    try:
        with opened(file) as stream:
            while line := stream.readline(LONGEST_LINE):
                if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                    yield line
                    continue
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_LINE)
                yield None
    except OSError as error:
        raise DataError(f"{file.name} cannot be read to its end: {error}") from error
