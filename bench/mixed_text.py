"""Real text for bench/tokenize.py that any user has: no hub, nothing fetched.

The demo's sources when `make demo` has made them (prose, code, reST, word problems), and from every
environment that can run the bench: source code and docstrings (reST) of Python's standard library and of the
installed packages, their C and C++ headers, READMEs and licences, and HTML that pydoc renders.
Which packages there are decides the bytes, so a result carries their hash.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import json
import pydoc
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bench.common import ROOT, say

DEMO = ROOT / "data" / "demo"
END = "<|endoftext|>"
_DOCSTRING = re.compile(r'"""(.{400,}?)"""', re.DOTALL)
_LARGEST_BYTES = 1_000_000
# kind: (megabytes, file endings)
_KINDS = {
    "python": (22, (".py",)),
    "docstrings": (14, (".py",)),
    "headers": (12, (".h", ".hpp", ".cuh")),
    "c-and-cython": (8, (".c", ".cpp", ".pyx", ".pxd")),
    "readmes": (8, ("METADATA", ".md", ".rst", ".txt")),
}
_HTML_MEGABYTES = 5


@dataclass(frozen=True)
class MixedText:
    files: tuple[Path, ...]  # JSONL, one a kind of text
    documents: int
    bytes: int
    sha256: str

    @property
    def kinds(self) -> str:
        return ", ".join(file.stem for file in self.files)


def make(folder: Path) -> MixedText:
    """Write the JSONL files to `folder` and name them, with the demo's."""
    folder.mkdir(parents=True)
    files = [_write(folder / f"{kind}.jsonl", texts) for kind, texts in _kinds()]
    files += sorted((DEMO / "raw").glob("*.jsonl"))
    data = [file.read_bytes() for file in files]
    digest = hashlib.sha256(b"".join(data)).hexdigest()
    return MixedText(tuple(files), sum(part.count(b"\n") for part in data), sum(map(len, data)), digest)


def _kinds() -> Iterator[tuple[str, Iterator[str]]]:
    for kind, (megabytes, endings) in _KINDS.items():
        texts = _texts(endings)
        if kind == "docstrings":
            texts = ("\n\n".join(found) for text in texts if (found := _DOCSTRING.findall(text)))
        yield kind, _up_to(megabytes, texts)
    yield "html", _up_to(_HTML_MEGABYTES, _rendered())


def _texts(endings: tuple[str, ...]) -> Iterator[str]:
    """Files of the standard library and of the installed packages, in an order that mixes the packages."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    found = {file for root in roots for file in root.rglob("*") if file.name.endswith(endings)}
    for file in sorted(found, key=lambda file: hashlib.sha256("/".join(file.parts[-3:]).encode()).digest()):
        if file.is_file() and 400 <= file.stat().st_size <= _LARGEST_BYTES:
            try:
                yield file.read_bytes().decode()
            except UnicodeDecodeError:
                continue


def _rendered() -> Iterator[str]:
    """pydoc's HTML pages of the standard library."""
    page = pydoc.HTMLDoc()
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_", "idlelib", "this", "antigravity", "lib2to3", "test")):
            continue
        quiet = io.StringIO()
        try:
            with redirect_stdout(quiet), redirect_stderr(quiet):
                yield pydoc.html.page(name, page.document(importlib.import_module(name)))
        except Exception:  # a module of another system, or one without a graphical desktop
            continue


def _up_to(megabytes: int, texts: Iterable[str]) -> Iterator[str]:
    """Different texts until there are so many megabytes."""
    left = megabytes * 1_000_000
    seen: set[bytes] = set()
    for text in texts:
        fingerprint = hashlib.sha256(text.encode(errors="replace")).digest()
        if text.strip() and fingerprint not in seen:
            seen.add(fingerprint)
            left -= len(text)
            yield text
        if left <= 0:
            return


def _write(path: Path, texts: Iterable[str]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return path


def tokenizer(folder: Path, text: MixedText) -> Path:
    """The demo's (SmolLM2's) if it is there, else one of its kind that is trained on some of the text."""
    if (DEMO / "tokenizer" / "tokenizer.json").is_file():
        return DEMO / "tokenizer"
    say("no demo data here: training a tokenizer on the text")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_384, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_some(text), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(folder)
    return folder


def _some(text: MixedText) -> Iterator[str]:
    """Every eighth document."""
    for file in text.files:
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in itertools.islice(lines, 0, None, 8))
