"""The data card: right numbers, text that cannot break out of the page, and little reading."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_smol.data.card import write_card
from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.source import TokenSource
from megatron_smol.errors import DataError, UserError
from tests.data.test_source import SHARDS, write_source
from tests.tiny import TinyRun, environment, smol


class Page(html.parser.HTMLParser):
    """Collects the text, and refuses anything that loads or runs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe"), tag
        for name, value in attributes:
            assert not name.startswith("on") and not (value or "").startswith("http"), (name, value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_numbers_of_the_card(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 100, 2048, 9000]
    write_source(tmp_path, [[[7] * (size - 1) + [3] for size in lengths[i::2]] for i in range(2)])
    path = write_card(tmp_path)
    assert path == tmp_path / "card.html"
    markdown = (tmp_path / "card.md").read_text()
    for row in (
        "| tokens | 11,154 |",
        "| documents | 6 |",
        "| mean | 1,859 tokens |",
        "| shortest | 1 |",
        "| median | 3 |",
        "| longest | 9,000 |",
        "| 2,048 tokens or more | 33.33% of documents, 99.05% of tokens |",
        "| 8,192 tokens or more | 16.67% of documents, 80.69% of tokens |",
    ):
        assert row in markdown, row
    page = Page(path.read_text())
    assert "11,154" in page.text and "99.05% of tokens" in page.text and "<svg" in path.read_text()
    assert "the manifest's tokenizer is not at hand" in page.text, "samples as ids"


def test_samples_are_decoded_and_inputs_listed(tmp_path: Path, tokenizer_folder: Path) -> None:
    from megatron_smol.data.tokenize import preprocess

    texts = ["First.", "<script>alert('x')</script> & ```fences``` | pipes", "Third.", "Fourth.", "Last one."]
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([rows], tmp_path / "web", tokenizer_folder, workers=1, seed=None)
    page = Page(write_card(tmp_path / "web").read_text())
    for text in ("First.", texts[1], "Fourth.", "Last one."):
        assert text in page.text
    assert "Third." not in page.text
    assert "document 5" in page.text and str(rows) in page.text
    markdown = (tmp_path / "web" / "card.md").read_text()
    assert "\n````\n<script>" in markdown, "a fence longer than the text's own"
    again = write_card(tmp_path / "web", output=tmp_path / "elsewhere")
    assert again.read_text() == (tmp_path / "web" / "card.html").read_text(), "the same card twice"


def test_preprocessing_ends_with_the_card(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.txt").write_text("One document.")
    command = smol(
        "preprocess", tmp_path / "in.txt", "--output", tmp_path / "a", "--tokenizer", tokenizer_folder
    )
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "One document." in (tmp_path / "a/card.html").read_text()


def test_a_card_reads_a_few_windows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path, [[[7] * 5000 + [3]] for _ in range(4)])
    read: list[int] = []
    original = TokenSource.read

    def counted(self: TokenSource, start: int, count: int) -> np.ndarray:
        read.append(count)
        return original(self, start, count)

    monkeypatch.setattr(TokenSource, "read", counted)
    monkeypatch.setattr(
        "megatron_smol.data.indexed.IndexedReader.ids",
        property(lambda _: pytest.fail("all tokens were mapped")),
    )
    write_card(tmp_path)
    assert 0 < sum(read) <= 4 * 160


def test_many_shards_are_sampled(tmp_path: Path) -> None:
    write_source(tmp_path, [[[7] * (number % 9) + [3]] for number in range(130)])
    write_card(tmp_path)
    assert "64 documents of 64 shards, evenly spread" in (tmp_path / "card.md").read_text()


def test_a_bare_prefix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "web_text_document", np.uint16) as writer:
        writer.add_document([5, 6, 7])
        writer.finalize()
    path = write_card(tmp_path / "web")
    assert path == tmp_path / "web_text_document.card.html"
    assert "made by other tools" in Page(path.read_text()).text and "5 6 7" in Page(path.read_text()).text


def test_other_tools_write_documents_without_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "web_text_document", np.uint16) as writer:
        for document in ([], [5, 6, 7], []):
            writer.add_document(document)
        writer.finalize()
    write_card(tmp_path / "web")
    markdown = (tmp_path / "web_text_document.card.md").read_text()
    assert "| documents | 3 |" in markdown and "| shortest | 3 |" in markdown


def test_what_cannot_be_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_source(tmp_path / "web", SHARDS)
    with pytest.raises(UserError, match="say where the card goes with --output"):
        write_card(f"file://{tmp_path}/web")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the output .*file is a file; give a folder"):
        write_card(tmp_path / "web", output=tmp_path / "file")
    with pytest.raises(DataError, match="another tokenizer"):
        write_card(tmp_path / "web", tokenizer=tokenizer_folder)


def test_the_command_tells_the_epochs_of_a_recipe(tiny: TinyRun) -> None:
    command = smol("data", "card", tiny.data / "maths", "--recipe", tiny.recipe, "--output", tiny.folder)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tiny.folder / "card.html")
    markdown = (tiny.folder / "card.md").read_text()
    # Stage two reads 48 windows of 32 tokens, a fifth of them from here.
    assert re.search(r"\| two \| (288|320) \|", markdown) and "In the recipe tiny" in markdown
    other = smol(
        "data", "card", tiny.data / "maths", "--recipe", "examples/demo.yaml", "--output", tiny.folder
    )
    done = subprocess.run(other, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no source of examples/demo.yaml lies at" in done.stderr
