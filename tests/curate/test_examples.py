"""The shipped curation files, each carried out on a small real sample: documentation and sources of the Python here.

What a laptop has not (models, benchmark files, the size of the web) is replaced by small ones of the same kind: the
classifiers are trained here, on how often sentences say "the", which no module, language or length gives away.
"""

from __future__ import annotations

import html
import importlib
import inspect
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from megatron_smol.curate.classifier import Settings, train
from megatron_smol.curate.config import load_curation
from megatron_smol.curate.pipeline import curate
from megatron_smol.curate.reading import opened
from megatron_smol.recipe.load import load_yaml
from tests.data.conftest import train_tokenizer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "curate"
MODULES = (
    "argparse", "bisect", "calendar", "codecs", "collections", "concurrent.futures", "configparser", "contextlib", "csv",
    "datetime", "decimal", "difflib", "email.message", "enum", "fractions", "functools", "hashlib", "heapq", "http.client",
    "inspect", "io", "itertools", "json", "logging", "math", "optparse", "os", "pathlib", "pickle", "random", "re", "shutil",
    "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "timeit", "typing",
    "unittest", "urllib.request", "uuid", "zipfile",
)  # fmt: skip
NAMES = (
    "fineweb-edu", "dclm-mix", "dclm-edu", "finemath-pages", "finemath", "finemath-4plus", "infi-webmath", "stack-edu",
    "long-context",
)  # fmt: skip
FORMULA = "a^2 + b^2 = c^2"


def docstrings() -> Iterator[tuple[str, str]]:
    """(module, documentation) of modules and of their classes and functions, the longer ones, each once."""
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        things = [module, *(thing for _, thing in sorted(vars(module).items()) if callable(thing))]
        for thing in things:
            text = inspect.getdoc(thing) or ""
            if len(text) > 250 and text not in seen:
                seen.add(text)
                yield name, text


def quantile_scores(texts: list[str], kinds: int) -> list[float]:
    """0 to kinds - 1, as many of each: the documents in the order of how often they say "the"."""
    share = [len(re.findall(r"\bthe\b", text.lower())) / len(text) for text in texts]
    order = sorted(range(len(texts)), key=share.__getitem__)
    scores = [0.0] * len(texts)
    for rank, number in enumerate(order):
        scores[number] = float(rank * kinds // len(texts))
    return scores


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw.warc.gz, code/, models/, leak.jsonl, tokenizer/: what the shipped files name."""
    folder = tmp_path_factory.mktemp("sample")
    found = list(docstrings())
    texts = [text for _, text in found]
    with (folder / "raw.warc.gz").open("wb") as stream:
        writer = WARCWriter(stream, gzip=True)
        for number, (module, text) in enumerate(found):
            formula = (
                f"<p>So <script type='math/tex'>{FORMULA}</script> holds.</p>" if module == "math" else ""
            )
            page = f"<html><body><nav>Home</nav><article><h1>{module}</h1>" + "".join(
                f"<p>{html.escape(paragraph)}</p>" for paragraph in text.split("\n\n")
            )
            headers = StatusAndHeaders(
                "200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0"
            )
            writer.write_record(
                writer.create_warc_record(
                    f"https://{module}.example.org/{number}", "response", http_headers=headers,
                    payload=io.BytesIO(f"{page}{formula}</article></body></html>".encode()),
                )
            )  # fmt: skip
    (folder / "code").mkdir()
    for number, name in enumerate(MODULES):
        source = getattr(importlib.import_module(name), "__file__", None)
        if source and source.endswith(".py"):
            (folder / "code" / f"{number}.py").write_text(Path(source).read_text()[:50_000])
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "csrc").glob("*.cpp")]:
        (folder / "code" / path.name).write_bytes(path.read_bytes()[:50_000])
    for name in ("edu", "maths", "stack-edu/Python", "stack-edu/C++"):
        train(texts, quantile_scores(texts, 6), Settings(), 3).save(folder / "models" / name)
    train(texts, quantile_scores(texts, 4), Settings(), 2).save(folder / "models" / "maths-page")
    binary = train(texts, quantile_scores(texts, 2), Settings(kind="binary"), 1)
    binary.save(folder / "models" / "dclm")
    longest = max(texts, key=len)
    (folder / "leak.jsonl").write_text(json.dumps({"question": longest, "problem": longest}) + "\n")
    train_tokenizer(folder / "tokenizer")
    return folder


def carried_out(name: str, sample: Path, output: Path, paths: Path, **domains: Any) -> list[dict[str, Any]]:
    """The documents that examples/curate/NAME.yaml leaves of `paths`."""
    settings = load_yaml(EXAMPLES / f"{name}.yaml") | {"output": str(output), "tasks": 2, "workers": 1}
    settings["inputs"] = settings["inputs"] | {"paths": str(paths)} | domains
    settings["steps"] = [at_hand(step, sample) for step in settings["steps"]]
    config = output.parent / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert curate(load_curation(config)) == output / "card.html"
    found = []
    for path in sorted((output / "documents").glob("*")):
        with opened(path) as stream:
            found += [json.loads(line) for line in stream]
    return found


def at_hand(step: Any, sample: Path) -> Any:
    """A step of a shipped file with the sample's models, benchmark and tokenizer in place of those it names."""
    name, given = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    instead = {
        "url_filter": {"lists": False},
        "language": {"detector": "py3langid"},
        "decontaminate": {"files": [str(sample / "leak.jsonl")]},
        "length": {"tokenizer": str(sample / "tokenizer"), "min_tokens": 1000},
    }.get(name, {})
    if name == "score" and "model" in given:
        instead = {"model": str(sample / given["model"])}
        if not given.get("rounded", True):
            instead["keep"] = 0.5  # DCLM's own 0.018 is of DCLM's own classifier
    return {name: given | instead}


def funnel(output: Path) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in json.loads((output / "card.json").read_text())["funnel"]}


def test_fineweb_edu(sample: Path, tmp_path: Path) -> None:
    found = carried_out("fineweb-edu", sample, tmp_path / "out", sample / "raw.warc.gz")
    rows = funnel(tmp_path / "out")
    assert 0 < len(found) < rows["read"]["kept"]
    assert all(row["metadata"]["score"] >= 2.5 and row["metadata"]["language"] == "en" for row in found)
    assert rows["Gopher quality"]["dropped"] and rows["score"]["dropped"]


def test_dclm_and_dclm_edu(sample: Path, tmp_path: Path) -> None:
    found = carried_out("dclm-mix", sample, tmp_path / "dclm", sample / "raw.warc.gz")
    assert found and all(0.5 <= row["metadata"]["dclm_score"] <= 1 for row in found)
    assert funnel(tmp_path / "dclm")["score"]["dropped"]
    thinned = carried_out("dclm-edu", sample, tmp_path / "edu", tmp_path / "dclm/documents")
    assert thinned and all(
        row["metadata"]["score"] >= 0.5 and row["metadata"]["dclm_score"] for row in thinned
    )
    assert {row["id"] for row in thinned} <= {row["id"] for row in found}


def test_finemath_in_two_passes_and_4plus(sample: Path, tmp_path: Path) -> None:
    pages = carried_out("finemath-pages", sample, tmp_path / "pages", sample / "raw.warc.gz")
    assert not any("$" in row["text"] for row in pages if "math." in row["metadata"]["url"]), (
        "formulas come later"
    )
    listed = [json.loads(line) for line in (tmp_path / "pages/domains.jsonl").read_text().splitlines()]
    assert sum(row["pages"] for row in listed) == len(pages)
    rule = {"files": [str(tmp_path / "pages/domains.jsonl")], "min_score": 2, "min_pages": 3}
    chosen = {row["domain"] for row in listed if sum(n for s, n in row["scores"].items() if int(s) >= 2) >= 3}
    assert 0 < len(chosen) < len(listed)
    found = carried_out("finemath", sample, tmp_path / "3plus", sample / "raw.warc.gz", domains=rule)
    assert found and all(row["metadata"]["score"] >= 2.5 for row in found)
    assert {row["metadata"]["url"].split("/")[2] for row in found} <= chosen
    rows = funnel(tmp_path / "3plus")
    assert rows["read"]["reasons"]["other_domain"] and rows["contamination"]["documents_in"]
    assert all(FORMULA in row["text"] for row in found if "//math." in row["metadata"]["url"])
    better = carried_out("finemath-4plus", sample, tmp_path / "4plus", tmp_path / "3plus/documents")
    assert len(better) == sum(round(row["metadata"]["score"]) >= 4 for row in found)


def test_infi_webmath(sample: Path, tmp_path: Path) -> None:
    texts = [text for _, text in docstrings()]
    path = tmp_path / "infi.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = carried_out("infi-webmath", sample, tmp_path / "out", path)
    assert 0 < len(found) < len(texts)
    leaked = json.loads((sample / "leak.jsonl").read_text())["question"]
    assert leaked not in [row["text"] for row in found]


def test_stack_edu(sample: Path, tmp_path: Path) -> None:
    found = carried_out("stack-edu", sample, tmp_path / "out", sample / "code")
    assert found and {row["metadata"]["language"] for row in found} <= {"Python", "C++"}
    assert all(row["metadata"]["score"] >= 2.5 for row in found)
    reasons = funnel(tmp_path / "out")["score"]["reasons"]
    assert reasons["no_score"] == len(list((sample / "code").glob("*.md"))), "no head for Markdown here"


def test_long_context(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    texts = sorted((path.read_text() for path in (ROOT / "docs").glob("*.md")), key=len)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "too short", texts[-1]]))
    found = carried_out("long-context", sample, tmp_path / "out", path)
    rows = funnel(tmp_path / "out")
    assert rows["length"]["reasons"]["too_few_tokens"] and rows["exact duplicates"]["dropped"] == 1
    assert texts[-1] in [row["text"] for row in found]


def test_shipped_files_are_valid() -> None:
    for name in NAMES:
        assert load_curation(EXAMPLES / f"{name}.yaml").steps
