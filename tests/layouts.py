"""The layouts that must train like one process: tests/model/test_layouts.py runs them, `make parity` writes the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """`ranks` processes; `parallel` as in a recipe; data parallel is what remains."""

    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    document_mask: bool = False
    micro_batch: int = 1
    tied: bool = True

    @property
    def name(self) -> str:
        """TP2-PP2-DP2 and so on."""
        given = self.parallel
        sizes = {key: given.get(key, 1) for key in ("tp", "pp", "vpp", "cp")}
        sizes["dp"] = self.ranks // (sizes["tp"] * sizes["pp"] * sizes["cp"])
        parts = [f"{key.upper()}{size}" for key, size in sizes.items() if size > 1] or ["one process"]
        words = {
            "SP": given.get("sequence_parallel"),
            "all-gather": given.get("cp_comm") == "all_gather",
            "recompute " + given.get("recompute", ""): "recompute" in given,
            "replicated optimizer": given.get("distributed_optimizer") is False,
            "overlap": given.get("overlap"),
            "document mask": self.document_mask,
            "untied": not self.tied,
            f"micro-batch {self.micro_batch}": self.micro_batch != 1,
        }
        return ", ".join(["-".join(parts), *(word for word, said in words.items() if said)])

    @property
    def reference(self) -> Layout:
        """One process that computes the same."""
        return Layout(1, document_mask=self.document_mask, tied=self.tied)


def _layout(
    ranks: int, /, document_mask: bool = False, micro_batch: int = 1, tied: bool = True, **parallel: Any
) -> Layout:
    return Layout(ranks, parallel, document_mask, micro_batch, tied)


LAYOUTS = [
    _layout(1, micro_batch=4),
    _layout(1, recompute="selective"),
    _layout(1, recompute="full"),
    _layout(2, tp=2),
    _layout(2, tp=2, sequence_parallel=True),
    _layout(2, tp=2, document_mask=True),
    _layout(2, tp=2, sequence_parallel=True, recompute="full"),
    _layout(2, pp=2),
    _layout(2, pp=2, tied=False),
    _layout(2, pp=2, vpp=2),
    _layout(2, pp=2, vpp=4, recompute="full"),
    _layout(4, pp=4),
    _layout(4, pp=4, vpp=2),
    _layout(4, pp=4, vpp=2, tied=False),
    _layout(2),
    _layout(2, micro_batch=2),
    _layout(2, document_mask=True),
    _layout(2, distributed_optimizer=False),
    _layout(2, overlap=True),
    _layout(4),
    _layout(4, overlap=True, distributed_optimizer=False),
    _layout(2, cp=2),
    _layout(2, cp=2, cp_comm="all_gather"),
    _layout(2, cp=2, document_mask=True),
    _layout(4, cp=4),
    _layout(4, tp=2),
    _layout(4, pp=2),
    _layout(4, cp=2),
    _layout(4, tp=2, pp=2, sequence_parallel=True),
    _layout(4, tp=2, cp=2),
    _layout(4, tp=2, cp=2, sequence_parallel=True, document_mask=True),
    _layout(4, pp=2, cp=2),
    _layout(4, pp=2, vpp=2, overlap=True),
    _layout(8, tp=2, pp=2),
    _layout(8, tp=2, pp=2, cp=2, sequence_parallel=True),
    _layout(8, tp=2, pp=2, vpp=2, cp=2, document_mask=True),
    _layout(8, pp=4, vpp=2),
    _layout(8, tp=2, cp=2, sequence_parallel=True, distributed_optimizer=False),
]

# What every test run looks at; the other products, of many processes each, are `make parity`'s.
IN_EVERY_RUN = [
    layout
    for layout in LAYOUTS
    if layout.ranks <= 2
    or layout
    in (
        _layout(4, pp=4, vpp=2),
        _layout(4, tp=2, pp=2, sequence_parallel=True),
        _layout(4, tp=2, cp=2, sequence_parallel=True, document_mask=True),
        _layout(4, pp=2, vpp=2, overlap=True),
        _layout(8, tp=2, pp=2),
    )
]
