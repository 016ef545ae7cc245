"""Selection and cleaning of the demo's text, on a small archive made here."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from megatron_smol.data.demo_text import (
    SMALLEST_BYTES,
    Archive,
    Document,
    read_archive,
    read_jsonl,
    source_of,
    strip_unwritable,
    write_jsonl,
)

FOLDERS = {"textbook": ("docs/intro",), "docs": ("docs",), "code": ("lib",)}
ARCHIVE = Archive("pkg", "1.0", "MIT", "0" * 64, FOLDERS, code_megabytes=1.0)
LONG = "A sentence of documentation. " * 40


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"pkg-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("docs/intro/first.rst", "textbook"),
        ("docs/ref/api.txt", "docs"),
        ("docs/introduction.md", "docs"),  # a prefix is a folder, not the start of a word
        ("lib/core.py", "code"),
        ("docs/conf.py", None),
        ("lib/tests/data.py", None),
        ("lib/test_core.py", None),
        ("README.rst", None),
    ],
)
def test_a_file_belongs_to_the_first_source_whose_folder_holds_it(path: str, source: str | None) -> None:
    assert source_of(path, ARCHIVE) == source


def test_short_files_other_encodings_and_links_are_left_out(tmp_path: Path) -> None:
    files = {
        "docs/good.rst": LONG.encode(),
        "docs/short.rst": b"x" * (SMALLEST_BYTES - 1),
        "docs/latin1.rst": ("é" * 500).encode("latin-1"),
        "docs/intro/one.rst": LONG.encode() + b"one",
    }
    found = read_archive(make_archive(tmp_path / "a.tar.gz", files), ARCHIVE)
    assert [d.origin for d in found["docs"]] == ["pkg-1.0/docs/good.rst"]
    assert [d.origin for d in found["textbook"]] == ["pkg-1.0/docs/intro/one.rst"]


def test_code_stops_at_its_limit_and_prose_does_not(tmp_path: Path) -> None:
    files = {f"lib/m{i}.py": b"x = 1\n" * 100 + str(i).encode() for i in range(20)}
    files |= {f"docs/d{i}.rst": LONG.encode() + str(i).encode() for i in range(20)}
    small = Archive("pkg", "1.0", "MIT", "0" * 64, FOLDERS, code_megabytes=0.003)
    found = read_archive(make_archive(tmp_path / "a.tar.gz", files), small)
    assert len(found["docs"]) == 20
    assert 1 <= len(found["code"]) < 6
    assert sum(len(d.text) for d in found["code"]) <= 3000


def test_the_output_does_not_depend_on_the_order_inside_the_archive(tmp_path: Path) -> None:
    files = {f"docs/d{i}.rst": LONG.encode() + str(i).encode() for i in range(30)}
    backwards = dict(reversed(files.items()))
    outputs = []
    for name, content in (("a", files), ("b", backwards)):
        documents = read_archive(make_archive(tmp_path / f"{name}.tar.gz", content), ARCHIVE)["docs"]
        several_archives = documents[10:] + documents[:10]
        write_jsonl(several_archives if name == "b" else documents, tmp_path / f"{name}.jsonl")
        outputs.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert outputs[0] == outputs[1]


def test_duplicates_and_unwritable_characters_are_removed_and_counted(tmp_path: Path) -> None:
    documents = [
        Document("same text", "p-1/a"),
        Document("same text\n", "p-1/b"),
        Document("ctrl \x04\x06\x13\x14\x16\x1d but \t\x07 stay", "q-1/c"),
    ]
    counts = write_jsonl(documents, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["text"].strip() for row in rows} == {"same text", "ctrl  but \t\x07 stay"}
    assert (counts.documents, counts.duplicates, counts.dropped_control_characters) == (2, 1, 6)
    assert sum(counts.per_package.values()) == counts.characters
    assert {d.text for d in read_jsonl(tmp_path / "out.jsonl")} == {row["text"] for row in rows}


def test_clean_text_is_unchanged() -> None:
    assert strip_unwritable("naïve → 数学\r\n") == ("naïve → 数学\r\n", 0)
