"""Formulas of a web page as LaTeX in its text, before the page is extracted: what OpenWebMath and FineMath did.

Where pages keep the source of a formula: `<script type="math/tex">` (MathJax 2), `<annotation encoding=
"application/x-tex">` in MathML (KaTeX, MediaWiki), the `alttext` of `<math>` (LaTeXML), the `alt` of an image of class
tex, latex or mwe-math (WordPress, older MediaWiki). `$...$` and `\\(...\\)` in the text stay as they are.
"""

from __future__ import annotations

from typing import Any

from lxml import html as parser

_TEX_IMAGES = (
    "tex",
    "latex",
    "mwe-math-fallback-image-inline",
    "mwe-math-fallback-image-display",
    "mathcode",
)


def keep_formulas(page: str) -> str:
    """The page with every formula whose source is in it as `$...$` (or `$$...$$` where it stands alone)."""
    try:
        tree = parser.document_fromstring(page)
    except (parser.etree.ParserError, ValueError):
        return page
    for node in list(tree.iter("script", "math", "img", "span")):
        if (found := _source(node)) is not None:
            source, display = found
            mark = "$$" if display else "$"
            _replace(node, f" {mark}{' '.join(source.split())}{mark} ")
    return str(parser.tostring(tree, encoding="unicode"))


def _source(node: Any) -> tuple[str, bool] | None:
    """(LaTeX, whether it stands alone) of a node that is a formula."""
    if node.tag == "script":
        kind = node.get("type", "")
        return (node.text or "", "mode=display" in kind) if kind.startswith("math/tex") else None
    classes = (node.get("class") or "").split()
    if node.tag == "img":
        alt = node.get("alt")
        return (
            (alt, any("display" in name for name in classes))
            if alt and set(classes) & set(_TEX_IMAGES)
            else None
        )
    if node.tag == "span" and "katex" not in classes:
        return None
    for note in node.iter("annotation"):
        if note.get("encoding") == "application/x-tex" and note.text:
            return note.text, node.get("display") == "block" or "katex-display" in _classes_above(node)
    if node.tag == "math" and node.get("alttext"):
        return node.get("alttext"), node.get("display") == "block"
    return None


def _classes_above(node: Any) -> str:
    parent = node.getparent()
    return "" if parent is None else parent.get("class") or ""


def _replace(node: Any, text: str) -> None:
    """Put text in the place of a node; what follows the node stays."""
    parent = node.getparent()
    if parent is None:
        return
    text += node.tail or ""
    before = node.getprevious()
    if before is None:
        parent.text = (parent.text or "") + text
    else:
        before.tail = (before.tail or "") + text
    parent.remove(node)
