"""Colours and numbers of the report's charts; and, for a data set's card, a matplotlib figure as inline SVG.

Text stays text in the SVG, so it is sharp, searchable and in the page's own typeface.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_smol.report.collect import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, HAIRLINE = "#1f2933", "#66737f", "#e3e8ec"
# The trunk darkens along the run; branches stand out against it.
TRUNK_FROM, TRUNK_TO = np.array([0x5E, 0x93, 0xC8]), np.array([0x10, 0x33, 0x5A])
BRANCHES = ("#d9622b", "#8a4fbe", "#1f8a70", "#c23b6b", "#a67c00")
SOURCES = (
    *("#4269d0", "#efb118", "#e4572e", "#4aa88c", "#a463f2", "#ff8ab7", "#9c6b4e", "#97bbf5", "#3ca951"),
    *("#9498a0", "#2f4b7c", "#d45087", "#7f8f2a", "#00a3b4", "#b07aa1", "#c9ad7f", "#5f6b7a", "#e59a9a"),
)
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.8,
    "xtick.color": "#9aa5b1",
    "ytick.color": "#9aa5b1",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
}


def short(number: float) -> str:
    """Three significant digits and a scale: 150k, 2.5M, 9.89T."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def stage_colours(run: RunRecord) -> dict[str, str]:
    """A colour for each stage: blues for the trunk, warm and distinct ones for branches."""
    trunk = [stage for stage in run.stages if not stage.is_branch]
    branches = [stage for stage in run.stages if stage.is_branch]
    colours = {stage.name: BRANCHES[i % len(BRANCHES)] for i, stage in enumerate(branches)}
    for i, stage in enumerate(trunk):
        mixed = TRUNK_FROM + (TRUNK_TO - TRUNK_FROM) * (i / max(1, len(trunk) - 1))
        colours[stage.name] = "#" + "".join(f"{round(channel):02x}" for channel in mixed)
    return colours


def source_colours(run: RunRecord) -> dict[str, str]:
    return {name: SOURCES[i % len(SOURCES)] for i, name in enumerate(run.source_names)}


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline <svg> that scales with the page and has ids of its own."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, **STYLE}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # No fixed size, so that it scales; no XML prefixes, which HTML does not know; the page's typeface.
    text = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(
        r"<metadata>.*?</metadata>", f"<title>{description}</title>", text, count=1, flags=re.DOTALL
    )
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    # Its style sheet has a rule for every element of the page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    # Element ids ("figure_1", "axes_1") would repeat between figures; only referenced ids are needed.
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend|[A-Z]\w*)_\d+"', "", text
    )
    return re.sub(r"\s*\n\s*", "\n", text)
