"""`smol convert --report FILE`: what was converted and compared, as JSON and, beside it, as text.

Written whether the two models agreed or not; a report that says "refused" is what to send to someone who helps.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.verify import Agreement
from megatron_smol.checkpoint.weights import Weight
from megatron_smol.data.files import write_whole
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.train.state import versions


@dataclass
class Record:
    """Filled while a conversion goes on.

    agreement: with equal weights on both sides; rounded: fp32 against bf16; not_repeated: a first comparison that
    disagreed, where there was a second.
    """

    kind: Literal["export", "import"]
    source: str
    out: str
    parameters: int
    dtype: str
    agreement: Agreement | None = None
    rounded: Agreement | None = None
    not_repeated: Agreement | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    _folders: tuple[Path, Path] | None = None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Seconds of a part, and the most memory this process has had by its end."""
        begin = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - begin, 3)
        self.peak_memory_bytes[what] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def files(self, checkpoint: Path, hf_folder: Path, weights: Sequence[Weight]) -> None:
        """Where the two sides lie while they are compared."""
        self._folders = checkpoint, hf_folder
        self.tensors = {"megatron": len(weights), "hugging_face": sum(len(weight.hf) for weight in weights)}

    @contextmanager
    def kept_in(self, path: Path | None, words: Tokenizer) -> Iterator[None]:
        """Write the report when the block ends, well or refused; nothing without a path."""
        if path is not None and not path.parent.is_dir():
            raise UserError(f"--report {path}: there is no folder {path.parent}; make it first")
        refused: str | None = None
        try:
            yield
        except CheckpointError as error:
            refused = str(error)
            raise
        finally:
            if path is not None and (refused or self.agreement):
                written = self._to_json(words, refused)
                write_whole(path, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
                write_whole(path.with_suffix(".txt"), _text(written))

    def _to_json(self, words: Tokenizer, refused: str | None) -> dict[str, Any]:
        compared = None
        if self.agreement:
            ids = [*self.agreement.prompt_ids, *self.agreement.greedy_ids]
            compared = asdict(self.agreement) | {"greedy_text": words.decode(ids)}
        return {
            "kind": self.kind,
            "source": self.source,
            "out": self.out,
            "published": refused is None,
            "refused_because": refused,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "dtype": self.dtype,
            "tokenizer": {"name": words.name, "ids": words.vocab_size, "sha256": words.sha256},
            "compared": compared,
            "rounding_fp32_to_bf16": asdict(self.rounded) if self.rounded else None,
            "first_comparison_that_disagreed": asdict(self.not_repeated) if self.not_repeated else None,
            "seconds": self.seconds,
            "peak_memory_bytes_at_the_end_of": self.peak_memory_bytes,
            "files": self._files(),
            "versions": versions(),
        }

    def _files(self) -> dict[str, dict[str, str]]:
        """Kind and value of a hash of every file of both folders: a checkpoint's own, which its complete.json has and which
        have been checked or made, and the SHA-256 by which a hub knows a file."""
        if self._folders is None:
            return {}
        checkpoint, hf_folder = self._folders
        listed = json.loads((checkpoint / on_disk.COMPLETE).read_text())["files"]
        files = sorted(file for file in hf_folder.iterdir() if file.is_file())
        return {
            "checkpoint": {name: _hash_of(entry) for name, entry in listed.items()},
            "hugging_face": {file.name: f"sha256:{on_disk.sha256(file)}" for file in files},
        }


def _hash_of(entry: dict[str, Any]) -> str:
    kind = next(key for key in entry if key != "bytes")
    return f"{kind}:{entry[kind]}"


def _text(report: dict[str, Any]) -> str:
    """For people: a line a fact."""
    verdict = "published" if report["published"] else f"REFUSED: {report['refused_because']}"
    lines = [
        f"{report['kind']} of {report['source']} as {report['out']}: {verdict}",
        "",
        f"{report['parameters']:,} parameters in {report['dtype']}; tensors: {report['tensors']}",
        f"tokenizer {report['tokenizer']['name']}, {report['tokenizer']['ids']:,} ids",
    ]
    if found := report["compared"]:
        lines += [
            "",
            f"compared in fp32 on {found['tokens']} tokens of text ({found['windows']} windows):",
            f"  logits: largest difference {found['largest_difference']:.2e}, RMS over their spread "
            f"{found['relative_difference']:.2e}",
            f"  loss: trainer {found['loss_trainer']:.6f}, transformers {found['loss_hf']:.6f} nats per token",
            f"  same most likely token at {found['same_top']} of {found['tokens']} positions",
            f"  greedy continuation: {found['greedy_equal']} of {found['greedy_tokens']} tokens equal",
            "",
            *(f"  | {line}" for line in found["greedy_text"].splitlines()),
        ]
    if first := report["first_comparison_that_disagreed"]:
        lines += [
            "",
            f"a comparison before that one disagreed: largest difference {first['largest_difference']:.2e}, "
            f"{first['same_top']} of {first['tokens']} most likely tokens the same",
        ]
    if rounded := report["rounding_fp32_to_bf16"]:
        lines += [
            "",
            f"rounding to bf16: logits {rounded['relative_difference']:.2%} of their spread, loss "
            f"{rounded['loss_trainer']:.6f} to {rounded['loss_hf']:.6f}",
        ]
    peaks = report["peak_memory_bytes_at_the_end_of"]
    lines += [
        "",
        *(f"{what}: {s:.1f} s, peak {peaks[what] / 1e6:,.0f} MB" for what, s in report["seconds"].items()),
    ]
    for side, hashes in report["files"].items():
        lines += ["", f"files, {side}:", *(f"  {digest}  {name}" for name, digest in hashes.items())]
    return "\n".join(lines) + "\n"
