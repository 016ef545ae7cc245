"""A chart as data: lines with axes that say their unit, drawn in the browser by page.js with uPlot.

`training`, `evals` and `tail` make them; `render` puts them into the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Format = Literal["tokens", "number", "percent", "whole"]
DIGITS = 5


@dataclass(frozen=True)
class Line:
    """One line. x ascends. group: lines that the legend hides together; only the first of them is in the legend.

    stack: lines of one stack have the same x and are drawn on top of each other. errors: to each side of y.
    """

    label: str
    x: Any
    y: Any
    colour: str
    group: str = ""
    width: float = 1.8
    alpha: float = 1.0
    dash: tuple[int, ...] = ()
    dots: bool = False
    stepped: bool = False
    stack: str = ""
    fill: bool = False
    errors: Any = None
    named: bool = True  # in the legend

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "label": self.label,
            "x": _numbers(self.x, None),
            "y": _numbers(self.y, DIGITS),
            "colour": self.colour,
            "group": self.group or self.label,
            "width": self.width,
        }
        for name in ("alpha", "dash", "dots", "stepped", "stack", "fill", "named"):
            value = getattr(self, name)
            if value != Line.__dataclass_fields__[name].default:
                told[name] = value
        if self.errors is not None:
            told["errors"] = _numbers(self.errors, DIGITS)
        return told


@dataclass(frozen=True)
class Mark:
    """A vertical line at x: where a stage begins, or an incident."""

    x: float
    label: str
    kind: Literal["stage", "incident"] = "stage"


@dataclass(frozen=True)
class Chart:
    """x_label and y_label name the quantity and its unit. sync: charts that zoom and point together.

    y_range: what is shown of y before anyone zooms, where the whole would hide what matters.
    """

    about: str  # for those who cannot see it
    lines: list[Line]
    x_label: str
    y_label: str
    x_format: Format = "tokens"
    y_format: Format = "number"
    marks: list[Mark] = field(default_factory=list)
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    from_zero: bool = False
    sync: str = ""
    height: int = 260
    title: str = ""

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "lines"}
        told["marks"] = [{"x": m.x, "label": m.label, "kind": m.kind} for m in self.marks]
        return told | {"lines": [line.to_json() for line in self.lines]}


def _numbers(values: Any, digits: int | None) -> list[float | int | None]:
    """Plain numbers; whole ones stay whole, what is not finite is a gap."""
    told: list[float | int | None] = []
    for value in np.asarray(values, np.float64).tolist():
        if not np.isfinite(value):
            told.append(None)
        elif value == int(value) and abs(value) < 2**53:
            told.append(int(value))
        else:
            told.append(float(f"{value:.{digits or 7}g}"))
    return told
