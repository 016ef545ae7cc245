"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="The recipe, such as examples/demo.yaml.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change, as dotted.name=value: lr.peak=1e-3 stages.decay.until=12T", metavar="a.b=c"
    ),
]
