"""Web pages of WARC files as text, by trafilatura; with `latex`, their formulas first become text (formulas.py).

A record that cannot be read is counted, and reading goes on at the next one: in .gz files, where every record is a
gzip member of its own, at the next member's first bytes, else at the next line that begins a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from megatron_smol.data.inputs import InputFile

WARC = (".warc", ".warc.gz", ".arc", ".arc.gz")
_GZIP_MEMBER, _RECORD = b"\x1f\x8b\x08", b"WARC/1."
_BLOCK_BYTES = 1 << 20


class Page(NamedTuple):
    """An HTTP response: identity of its record, address, date of the crawl, body."""

    identity: str | None
    url: str | None
    date: str | None
    html: bytes


def pages(file: InputFile, bad: Callable[[str], None]) -> Iterator[Page]:
    """All responses that can be read; `bad` is called once for each place where reading broke."""
    from warcio.archiveiterator import ArchiveIterator

    mark = _GZIP_MEMBER if file.suffix == ".gz" else _RECORD
    with file.open() as stream:
        start: int | None = 0
        while start is not None:
            stream.seek(start)
            archive = ArchiveIterator(stream)
            records = iter(archive)
            try:
                while (record := next(records, None)) is not None:
                    if record.rec_type == "response":
                        about = record.rec_headers.get_header
                        html = record.content_stream().read()
                        yield Page(
                            about("WARC-Record-ID"), about("WARC-Target-URI"), about("WARC-Date"), html
                        )
                return
            except Exception:  # warcio, zlib and http parsing each raise their own
                bad("broken_warc")
                start = _find(stream, mark, max(start, archive.offset) + 1)


def _find(stream: BinaryIO, mark: bytes, start: int) -> int | None:
    """Place of the next `mark` from `start` on."""
    stream.seek(start)
    kept = b""
    while block := stream.read(_BLOCK_BYTES):
        window = kept + block
        if (place := window.find(mark)) >= 0:
            return start + place
        start += len(window) - len(mark) + 1
        kept = window[len(window) - len(mark) + 1 :]
    return None


def extractor(kind: str) -> Callable[[bytes], str | None]:
    """HTML to text. kind: `trafilatura` as FineWeb (precision first), `latex` keeps formulas and more of the page.

    Paragraphs that came twice already are left out; trafilatura remembers them for the whole process, so that memory is
    emptied here: what a file gives must not hang on what was read before it.
    """
    from trafilatura import extract
    from trafilatura.meta import reset_caches

    reset_caches()
    options: dict[str, Any] = {"include_comments": False, "deduplicate": True}
    if kind == "latex":
        from megatron_smol.curate.formulas import keep_formulas

        return lambda html: extract(keep_formulas(_decoded(html)), **options)
    return lambda html: extract(_decoded(html), favor_precision=True, **options)


def _decoded(html: bytes) -> str:
    """By the page's own charset where it says one, else UTF-8 with replacement."""
    from trafilatura.utils import decode_file

    return str(decode_file(html))
