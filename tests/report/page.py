"""What is in a written page: its headings and the data of its charts."""

from __future__ import annotations

import json
import re
from typing import Any


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def charts(page: str) -> list[dict[str, Any]]:
    """The data of every chart, as the browser reads it."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return [json.loads(text) for text in found]


def chart(page: str, y_label: str, title: str = "") -> dict[str, Any]:
    """The one chart with that y label, and title."""
    (found,) = (one for one in charts(page) if one["y_label"] == y_label and one["title"] == title)
    return found


def lines(chart: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {line["label"]: line for line in chart["lines"]}
