"""`smol data card`: what a source is, on one page, for the person who must decide whether to train on it.

Writes card.md and card.html beside the manifest. It costs little: the manifest, the document tables of at most
64 shards, and a few documents are read. `smol preprocess` writes it when it is done.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from megatron_smol.data.files import require_folder, write_whole
from megatron_smol.data.indexed import document_lengths, idx_path
from megatron_smol.data.manifest import FOLDER_MANIFEST, Manifest, locate
from megatron_smol.data.source import TokenSource, load_source, shard_files
from megatron_smol.data.stores import is_remote
from megatron_smol.data.tokenizer import Tokenizer, load_tokenizer
from megatron_smol.errors import DataError, UserError

_MOST_SHARDS = 64  # whose document tables are read
_SAMPLES, _SAMPLE_TOKENS = 2, 160  # at each end
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_LONG = (2048, 8192)
_MOST_INPUTS = 20  # listed by name
# Of the manifest, worded below; whatever else it records is listed as it is.
_WORDED = {
    "version",
    "source",
    "tokenizer",
    "dtype",
    "tokens",
    "documents",
    "append_eod",
    "json_key",
    "seed",
} | {
    *(
        "empty_documents",
        "bad_lines",
        "dropped_characters",
        "shards",
        "inputs",
        "versions",
        "packed",
        "sentences",
    ),
    "keep_newlines",
}


@dataclass
class Card:
    """What the page says; `facts` and `lengths` are (what, value) pairs."""

    name: str
    facts: list[tuple[str, str]]
    lengths: list[tuple[str, str]]
    lengths_of: str  # which documents were counted
    histogram: str  # inline SVG
    samples: list[tuple[str, str]]
    inputs: list[tuple[str, str, str]]
    inputs_left_out: int
    epochs: list[tuple[str, str, str]] = field(default_factory=list)
    recipe: str = ""


def write_card(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    recipe: Path | None = None,
    output: Path | None = None,
) -> Path:
    """Write the card of a source; returns the path of card.html (card.md lies beside it)."""
    where, stem = _place(source, output)
    opened = load_source(source)
    card = _card(opened, tokenizer)
    if recipe is not None:
        card.recipe, card.epochs = _epochs(source, recipe)
    where.mkdir(parents=True, exist_ok=True)
    write_whole(where / f"{stem}.md", _markdown(card))
    write_whole(where / f"{stem}.html", _html(card))
    return where / f"{stem}.html"


def _place(source: str | Path, output: Path | None) -> tuple[Path, str]:
    if output is not None:
        require_folder(output)
        return output, "card"
    if is_remote(source):
        raise UserError(f"{source} is not a local folder: say where the card goes with --output")
    where, manifest = locate(source)
    if manifest is None:
        return where.parent, f"{where.name}.card"
    if (where / FOLDER_MANIFEST).is_file():
        return where, "card"
    return where, f"{manifest.shards[0].prefix}.card"


def _card(source: TokenSource, tokenizer: str | Path | Tokenizer | None) -> Card:
    lengths, counted, first, last = _document_lengths(source)
    manifest = source.manifest
    inputs = manifest.inputs if manifest else ()
    return Card(
        name=source.name,
        facts=_facts(source),
        lengths=_statistics(lengths),
        lengths_of=counted,
        histogram=_histogram(lengths),
        samples=_samples(source, tokenizer, first, last),
        inputs=[(one.path, f"{one.bytes:,}", one.sha256[:16]) for one in inputs[:_MOST_INPUTS]],
        inputs_left_out=max(0, len(inputs) - _MOST_INPUTS),
    )


def _facts(source: TokenSource) -> list[tuple[str, str]]:
    facts = [("tokens", f"{source.tokens:,}"), ("documents", f"{source.documents:,}")]
    manifest = source.manifest
    if manifest is None:
        return [
            *facts,
            ("manifest", "none: these files were made by other tools"),
            ("stored as", str(source.dtype)),
        ]
    tokenizer, packed = manifest.tokenizer, manifest.packed
    size = sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards)
    end = f"id {tokenizer.eod_id} after each" if manifest.append_eod else "no end-of-document id"
    order = "that of the input" if manifest.seed is None else f"shuffled, seed {manifest.seed}"
    read = sum(one.bytes for one in manifest.inputs)
    facts += [
        ("shards", f"{len(manifest.shards):,} ({decimal(size)}, {manifest.dtype})"),
        ("tokenizer", f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256[:16]})"),
        ("documents end with", end),
        ("order of the documents", order),
        ("text field", manifest.json_key),
        ("inputs", f"{len(manifest.inputs):,} ({decimal(read)})"),
        ("empty documents skipped", f"{manifest.empty_documents:,}"),
        ("bad lines skipped", f"{manifest.bad_lines:,}"),
        ("characters dropped", f"{manifest.dropped_characters:,} (not in the vocabulary)"),
    ]
    if manifest.sentences:
        facts.append(("split into sentences", manifest.sentences))
    if packed:
        padding = packed["padding_tokens"]
        facts.append(
            (
                "packed",
                f"windows of {packed['length']:,} hold whole documents; {packed['documents']:,} documents, "
                f"{packed['cut_documents']:,} of them longer and cut; {padding:,} tokens of padding "
                f"({padding / manifest.tokens:.2%})",
            )
        )
    facts += _unworded(manifest)
    facts.append(("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())))
    return facts


def _unworded(manifest: Manifest) -> list[tuple[str, str]]:
    rest = manifest.model_dump(mode="json", exclude=_WORDED, exclude_none=True)
    texts = {name: json.dumps(value) for name, value in rest.items() if value not in ([], {}, "")}
    return [
        (name.replace("_", " "), text if len(text) < 300 else text[:297] + "...")
        for name, text in texts.items()
    ]


# --- lengths -----------------------------------------------------------------------------------------------


def _document_lengths(
    source: TokenSource,
) -> tuple[NDArray[np.int64], str, NDArray[np.int64], NDArray[np.int64]]:
    """(lengths of the documents, which ones these are, those of the first shard, those of the last)."""
    manifest = source.manifest
    if manifest is None:
        tables = [document_lengths(idx_path(shard.prefix)) for shard in source.shards]
        return _of_tokens(tables), "all documents", tables[0], tables[-1]
    count = len(manifest.shards)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, _MOST_SHARDS))})
    tables = [document_lengths(source.store.local(shard_files(manifest.shards[i])[1])) for i in chosen]
    lengths = _of_tokens(tables)
    if manifest.packed:
        return lengths, "pieces of documents and stretches of padding", tables[0], tables[-1]
    which = (
        "all documents"
        if len(chosen) == count
        else f"{len(lengths):,} documents of {len(chosen)} shards, evenly spread"
    )
    return lengths, which, tables[0], tables[-1]


def _of_tokens(tables: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Lengths of the documents that have tokens: others have no place on an axis that doubles."""
    lengths = np.concatenate(tables)
    return lengths[lengths > 0]


def _statistics(lengths: NDArray[np.int64]) -> list[tuple[str, str]]:
    rows = [("mean", f"{lengths.mean():,.0f} tokens"), ("shortest", f"{lengths.min():,}")]
    values = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    rows += [
        ("median" if share == 50 else f"{share} % are at most", f"{int(value):,}")
        for share, value in zip(_PERCENTILES, values, strict=True)
    ]
    rows.append(("longest", f"{lengths.max():,}"))
    for bound in _LONG:
        long = lengths[lengths >= bound]
        rows.append(
            (
                f"{bound:,} tokens or more",
                f"{long.size / lengths.size:.2%} of documents, {long.sum() / lengths.sum():.2%} of tokens",
            )
        )
    return rows


def _histogram(lengths: NDArray[np.int64]) -> str:
    """Share of documents and of tokens by length, in bins that double, as inline SVG."""
    import matplotlib

    from megatron_smol.report.style import STYLE, inline_svg, short

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    low, high = int(np.log2(lengths.min())), int(np.log2(lengths.max())) + 1
    bounds = 2.0 ** np.arange(low, high + 1)
    documents = np.histogram(lengths, bounds)[0] / lengths.size
    tokens = np.histogram(lengths, bounds, weights=lengths)[0] / lengths.sum()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots()
        place = np.arange(len(documents))
        axes.bar(place - 0.2, 100 * documents, 0.4, color="#9db8d6", label="of the documents")
        axes.bar(place + 0.2, 100 * tokens, 0.4, color="#1f4e79", label="of the tokens")
        axes.set_xticks(np.arange(len(bounds)) - 0.5, [short(bound) for bound in bounds])
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel("%")
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False)
        return inline_svg(figure, "lengths", "Share of documents and of tokens by document length")


# --- samples -----------------------------------------------------------------------------------------------


def _samples(
    source: TokenSource,
    tokenizer: str | Path | Tokenizer | None,
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> list[tuple[str, str]]:
    """The first and the last documents, as far as they are short; token ids where no tokenizer is at hand."""
    decoder, problem = _decoder(source, tokenizer)
    samples = []
    start = 0
    for number, length in enumerate(first[:_SAMPLES].tolist()):
        samples.append((f"document {number + 1:,}", start, length))
        start += length
    end, tail = source.tokens, []
    for back, length in enumerate(last[::-1][:_SAMPLES].tolist()):
        number, end = source.documents - back, end - length
        if number > _SAMPLES:
            tail.append((f"document {number:,}", end, length))
    shown = []
    for title, begin, length in (*samples, *tail[::-1]):
        ids = source.read(begin, min(length, _SAMPLE_TOKENS))
        text = decoder.decode(ids) if decoder else " ".join(map(str, ids.tolist()))
        more = f", the first {_SAMPLE_TOKENS}" if length > _SAMPLE_TOKENS else ""
        shown.append((f"{title}: {length:,} tokens{more}{problem}", text))
    return shown


def _decoder(source: TokenSource, tokenizer: str | Path | Tokenizer | None) -> tuple[Tokenizer | None, str]:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer, ""
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
        source.check_tokenizer(found)
        return found, ""
    if source.manifest is None:
        return None, " (as ids: name the tokenizer with --tokenizer to read them)"
    try:
        found = load_tokenizer(source.manifest.tokenizer.name)
        source.check_tokenizer(found)
    except (UserError, DataError):
        return None, " (as ids: the manifest's tokenizer is not at hand, name it with --tokenizer)"
    return found, ""


# --- a recipe ----------------------------------------------------------------------------------------------


def _epochs(source: str | Path, recipe_path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """(name of the recipe, rows: stage, tokens it reads here, epochs of the source when it ends)."""
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    recipe = load_recipe(recipe_path)
    names = [name for name, other in recipe.sources.items() if _same(other.path, source)]
    if not names:
        paths = ", ".join(other.path for other in recipe.sources.values())
        raise UserError(f"no source of {recipe_path} lies at {source}; its sources are at {paths}")
    plan = make_plan(recipe, resolve_sizes(recipe))
    rows = [
        (stage.name, f"{stage.tokens_drawn(name):,}", f"{plan.epochs(stage)[name]:.3g}")
        for name in names
        for stage in plan.stages
    ]
    return recipe.name, rows


def _same(one: str | Path, other: str | Path) -> bool:
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


# --- pages -------------------------------------------------------------------------------------------------


def _html(card: Card) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("megatron_smol", "report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
    )
    return environment.get_template("card.html").render(card=card, histogram=Markup(card.histogram))


def _markdown(card: Card) -> str:
    lines = [f"# {card.name}", "", *_table(("", ""), card.facts), "", "## Document lengths", ""]
    lines += [
        f"{card.lengths_of.capitalize()}, the end-of-document id included.",
        "",
        *_table(("", ""), card.lengths),
    ]
    if card.epochs:
        lines += ["", f"## In the recipe {card.recipe}", ""]
        lines += _table(("stage", "tokens read from this source", "epochs at its end"), card.epochs)
    lines += ["", "## Samples", ""]
    for title, text in card.samples:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += [f"**{title}**", "", fence, text, fence, ""]
    if card.inputs:
        lines += ["## Inputs", "", *_table(("file", "bytes", "sha256 begins"), card.inputs)]
    if card.inputs_left_out:
        lines += ["", f"and {card.inputs_left_out:,} more, all in the manifest."]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    def cells(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [cells(head), "|" + " --- |" * len(head), *map(cells, rows)]
