"""WARC, formulas, languages and other inputs as they come from the web, broken ones too."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path

import pytest
from datatrove.data import Document
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from megatron_smol.curate import reading
from megatron_smol.curate.code import ENDINGS
from megatron_smol.curate.config import Inputs
from megatron_smol.curate.filters import LanguageOf, WithoutControl
from megatron_smol.curate.formulas import keep_formulas
from megatron_smol.curate.kept import FewDropped
from megatron_smol.curate.parts import ReadPart, WritePart
from megatron_smol.curate.pipeline import input_files
from megatron_smol.curate.reading import ReadInputs
from megatron_smol.data.inputs import local_file
from megatron_smol.errors import DataError, UserError
from tests.data.test_corpus import damaged_files

PARAGRAPH = "The area of a triangle is half of its base times its height, which can be seen by cutting a rectangle in two along a line from corner to corner. "
PAGE = "<html><head><title>t</title></head><body><nav>Home About</nav><article><h1>Triangles</h1>{}</article></body></html>"


def warc(path: Path, pages: dict[str, bytes]) -> Path:
    with path.open("wb") as stream:
        writer = WARCWriter(stream, gzip=path.suffix == ".gz")
        for url, body in pages.items():
            headers = StatusAndHeaders(
                "200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0"
            )
            writer.write_record(
                writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=headers)
            )
    return path


def read(*files: Path, extract: str = "trafilatura") -> tuple[list[Document], dict[str, float]]:
    step = ReadInputs([local_file(file) for file in files], "text", extract)
    found = list(step.run(None))
    return found, {name: stat.total for name, stat in step.stats.stats.items()}


def test_pages_of_a_warc_file(tmp_path: Path) -> None:
    body = PAGE.format(f"<p>{PARAGRAPH * 3}</p><p>Œuvre naïve</p>").encode()
    found, _ = read(
        warc(tmp_path / "a.warc.gz", {"https://site.org/a": body, "https://site.org/b": b"<html></html>"})
    )
    assert [document.metadata["url"] for document in found] == ["https://site.org/a"]
    assert (
        PARAGRAPH.strip() in found[0].text
        and "Œuvre naïve" in found[0].text
        and "Home About" not in found[0].text
    )


def test_a_warc_file_that_breaks_off_gives_what_it_has(tmp_path: Path) -> None:
    body = PAGE.format(f"<p>{PARAGRAPH * 3}</p>").encode()
    path = warc(tmp_path / "a.warc.gz", {f"https://site.org/{i}": body for i in range(3)})
    path.write_bytes(path.read_bytes()[:-40])
    found, counts = read(path)
    assert 2 <= len(found) <= 3 and counts.get("dropped_broken_warc", 0) + len(found) >= 3
    path.write_bytes(b"no warc at all\r\n" * 9)
    found, counts = read(path)
    assert found == [] and counts["dropped_broken_warc"] == 1


def test_a_file_gives_the_same_whatever_was_read_before(tmp_path: Path) -> None:
    """trafilatura leaves out paragraphs that the process has seen before."""
    body = PAGE.format(f"<p>{PARAGRAPH * 3}</p>").encode()
    path = warc(tmp_path / "a.warc.gz", {f"https://site.org/{i}": body for i in range(5)})
    first, again = ([document.id for document in read(path)[0]] for _ in range(2))
    assert first == again and 0 < len(first) < 5


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_what_follows_a_broken_record_is_read(tmp_path: Path, name: str) -> None:
    text = PARAGRAPH * 3
    whole = warc(
        tmp_path / name,
        {f"https://site.org/{i}": PAGE.format(f"<p>{i} {text}</p>").encode() for i in range(9)},
    )
    content = bytearray(whole.read_bytes())
    mark = b"\x1f\x8b\x08" if name.endswith("gz") else b"WARC/1.0\r\n"
    starts = [match.start() for match in re.finditer(re.escape(mark), content)]
    assert len(starts) == 9
    content[starts[4] : starts[4] + 60] = b"\0" * 60
    whole.write_bytes(content)
    found, counts = read(whole)
    assert {d.metadata["url"][-1] for d in found} >= set("0123678"), counts
    assert counts["dropped_broken_warc"] >= 1


def test_encodings_of_pages_and_of_lines(tmp_path: Path) -> None:
    """A page says its own, or is guessed; a line of JSON is UTF-8 or counted."""
    says = '<html><head><meta charset="{}"></head><body><article>{}</article></body></html>'
    bodies = {
        "latin": says.format("iso-8859-1", f"<p>{PARAGRAPH * 3}</p><p>Schöne Grüße</p>").encode("iso-8859-1"),
        "japanese": says.format("shift_jis", f"<p>{PARAGRAPH * 3}</p><p>こんにちは世界</p>").encode(
            "shift_jis"
        ),
        "utf16": says.format("utf-16", f"<p>{PARAGRAPH * 3}</p><p>Жизнь</p>").encode("utf-16"),
        "rubbish": bytes(range(128, 256)) * 20,
    }
    found, _ = read(
        warc(tmp_path / "a.warc.gz", {f"https://site.org/{name}": body for name, body in bodies.items()})
    )
    texts = {document.metadata["url"].rsplit("/", 1)[1]: document.text for document in found}
    assert (
        "Schöne Grüße" in texts["latin"]
        and "こんにちは世界" in texts["japanese"]
        and "Жизнь" in texts["utf16"]
    )
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(
        b'{"text": "caf\xe9"}\n' + '{"text": "café"}\n'.encode() + '{"text": "é"}\n'.encode("utf-16")
    )
    found, counts = read(lines)
    assert [document.text for document in found] == ["café"] and counts["dropped_not_json"] >= 2


def test_a_line_of_100_megabytes_is_counted_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "one"}\n{"text": "')
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "two"}\n')
    found, counts = read(path)
    assert [document.text for document in found] == ["one", "two"] and counts["dropped_line_too_long"] == 1


def test_shards_without_bytes_and_parquet_that_is_none(tmp_path: Path) -> None:
    empty = [
        tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.warc.gz", "f.py")
    ]
    for path in empty:
        path.write_bytes(b"")
    assert read(*empty) == ([], {"empty_files": 6})
    broken = tmp_path / "g.parquet"
    broken.write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"g\.parquet cannot be read as parquet"):
        read(broken)


def test_source_files(tmp_path: Path) -> None:
    for name, content in (
        ("a.py", b"print(1)\n"),
        ("b.h", b"int f();\n"),
        ("c.rs", b"\xff\xfe"),
        ("d.go", b" \n"),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.js").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "f.json").write_bytes(b"{}")
    files = input_files(Inputs(paths=(str(tmp_path),), code=True))
    found, counts = read(*(Path(file.name) for file in files))
    assert [(d.metadata["language"], d.text) for d in found] == [
        ("Python", "print(1)\n"),
        ("C", "int f();\n"),
    ]
    assert (counts["dropped_not_utf8"], counts["dropped_empty"], counts["dropped_file_too_long"]) == (1, 1, 1)
    assert len(ENDINGS) == 15


def test_pages_of_other_domains_are_left_out(tmp_path: Path) -> None:
    body = PAGE.format(f"<p>{PARAGRAPH * 3}</p>").encode()
    path = warc(tmp_path / "a.warc.gz", {"https://A.org/1": body, "https://b.org/2": body})
    lines = tmp_path / "b.jsonl"
    lines.write_text(
        '{"text": "one", "url": "http://a.org/3"}\n{"text": "two", "metadata": {"url": "http://c.org"}}\n'
    )
    step = ReadInputs([local_file(path), local_file(lines)], "text", "trafilatura", frozenset({"a.org"}))
    assert [document.metadata["url"] for document in step.run(None)] == ["https://A.org/1", "http://a.org/3"]
    assert step.stats.stats["dropped_other_domain"].total == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('<p>so <script type="math/tex">a^2 + b^2</script> it is</p>', "so $a^2 + b^2$ it is"),
        ('<p>so <script type="math/tex; mode=display">\\frac{1}{2}</script>.</p>', "so $$\\frac{1}{2}$$ ."),
        (
            '<p>x <math><semantics><mi>y</mi><annotation encoding="application/x-tex">y_1</annotation></semantics></math> z</p>',
            "x $y_1$ z",
        ),
        ('<p>x <math alttext="\\alpha"><mi>a</mi></math> z</p>', "x $\\alpha$ z"),
        ('<p>x <img class="latex" alt="e^{i\\pi}" src="a.png"> z</p>', "x $e^{i\\pi}$ z"),
        ('<p>x <img class="photo" alt="a cat"> z \\(k\\)</p>', "x z \\(k\\)"),
    ],
)
def test_formulas_stay(given: str, expected: str) -> None:
    from lxml import html

    text = html.document_fromstring(keep_formulas(PAGE.format(given))).find(".//p").text_content()
    assert " ".join(text.split()) == expected


def test_formulas_through_the_whole_extraction(tmp_path: Path) -> None:
    body = PAGE.format(
        f"<p>{PARAGRAPH * 3}</p><p>{PARAGRAPH} It is <script type='math/tex'>A = bh/2</script> then.</p>"
    )
    path = warc(tmp_path / "a.warc", {"https://site.org/a": body.encode()})
    assert "$A = bh/2$" in read(path, extract="latex")[0][0].text
    assert "bh/2" not in read(path)[0][0].text


def test_a_line_that_is_too_long_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "two"}\n\n{"text": " "}\n')
    found, counts = read(path)
    assert [document.text for document in found] == ["one", "two"]
    assert (counts["dropped_line_too_long"], counts["dropped_empty"]) == (1, 1)


def test_parquet_and_empty_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None, "two"], "url": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("")
    found, counts = read(tmp_path / "a.parquet", tmp_path / "b.jsonl")
    assert [(d.text, d.metadata["url"]) for d in found] == [("one", "a"), ("two", "c")] and counts[
        "dropped_no_text"
    ] == 1


def test_parts_hold_what_was_written_and_the_same_bytes(tmp_path: Path) -> None:
    documents = [
        Document(text=f"text {i} é", id=str(i), metadata={"score": i / 3, "url": "u"}) for i in range(50)
    ]
    for name in ("a", "b"):
        assert list(WritePart(tmp_path / name).run(iter(documents), rank=3)) == []
    assert (tmp_path / "a/00003.jsonl.zst").read_bytes() == (tmp_path / "b/00003.jsonl.zst").read_bytes()
    back = list(ReadPart(tmp_path / "a").run(None, rank=3))
    assert [(d.text, d.id, d.metadata) for d in back] == [(d.text, d.id, d.metadata) for d in documents]


def test_control_characters_that_the_tokenizer_drops_are_removed_and_counted() -> None:
    step = WithoutControl()
    assert step.format("a\x04b\x1dc\td\U00040001e\U0001f600") == "abc\tde\U0001f600"
    assert step.stats.stats["characters_removed"].total == 3


def test_languages(tmp_path: Path) -> None:
    english, french = (
        "the cat sat on the mat and looked at the dog",
        "le chat est sur le tapis et regarde le chien",
    )
    few = FewDropped(tmp_path / "few")
    step = LanguageOf(("en",), 0.65, "py3langid", None, few)
    kept = Document(text=english, id="1")
    assert (
        step.filter(kept) is True
        and kept.metadata["language"] == "en"
        and kept.metadata["language_score"] > 0.9
    )
    assert step.filter(Document(text=french, id="2")) == (False, "language_fr")
    assert LanguageOf(("en",), 1.1, "py3langid", None, few).filter(kept) == (False, "language_unsure")
    with pytest.raises(UserError, match="no language model at"):
        LanguageOf(("en",), 0.65, "fasttext", tmp_path / "no.bin", few)


def test_files_of_an_object_store_are_read_in_place(tmp_path: Path) -> None:
    """WARC, JSONL and parquet by URL give what they give as files, and a hub layout its split."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    body = PAGE.format(f"<p>{PARAGRAPH * 3}</p>").encode()
    warc(tmp_path / "a.warc.gz", {"https://a.org/1": body, "https://b.org/2": body})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n'))
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_bytes(b"")
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/crawl/{path.name}", path.read_bytes())
    found = [
        ReadInputs(input_files(Inputs(paths=(place,))), "text", "trafilatura")
        for place in (f"{tmp_path}/*", "memory://crawl/*")
    ]
    here, there = ([(d.id, d.text, d.metadata) for d in step.run(None)] for step in found)
    assert len(here) == 5 and here == there
    assert all(step.stats.stats["empty_files"].total == 1 for step in found)
    hub = Inputs.model_validate({"hub": {"name": str(tmp_path / "hub")}})
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/train.jsonl").write_text('{"text": "of the hub"}\n')
    assert [d.text for d in ReadInputs(input_files(hub), "text", "trafilatura").run(None)] == ["of the hub"]
    with pytest.raises(ValueError, match="either `paths` or `hub`"):
        Inputs.model_validate({})
    with pytest.raises(UserError, match="cannot read memory://crawl/none"):
        input_files(Inputs(paths=("memory://crawl/none.jsonl",)))


def test_damaged_files_are_told_by_their_names(tmp_path: Path) -> None:
    for path in damaged_files(tmp_path):
        with pytest.raises(DataError, match=rf"{re.escape(path.name)} cannot be decompressed"):
            read(path)
