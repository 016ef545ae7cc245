"""Documents of a window under Transformer Engine's attention: changing one must move no logit of another.

python3 -m bench.gpu.leak [--dry-run]. A row a precision: how many logits of other documents moved (must be 0), how far the
document itself moved (must be more), and how far a document in the middle is from itself alone. While this has not passed on a
GPU, `smol train` refuses `document_mask` there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.gpu.common import Options, options, run_rows

LENGTHS = (384, 512, 640, 512)  # of the documents of one window


def main() -> None:
    given = options(__doc__, seconds=240)
    precisions = given.rest or (["bf16"] if given.dry_run else ["bf16", "fp8-tensorwise"])
    run_rows("leak", [(name, partial(_row, given, name)) for name in precisions], given)


def _row(given: Options, precision: str) -> dict[str, Any]:
    import torch

    from megatron_smol.data.batch import Documents
    from megatron_smol.model.backend import backend
    from megatron_smol.model.packing import packed
    from megatron_smol.train.step import Engine

    setting = given.setting(precision, sum(LENGTHS), sum(LENGTHS))
    recipe = setting.recipe
    lengths = [length // 64 for length in LENGTHS] if given.dry_run else list(LENGTHS)
    gpt = Engine(recipe, sum(lengths), 10000.0, precision).gpt.eval()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, recipe.model.vocab_size, (length,), generator=generator) for length in lengths]
    other = torch.randint(1, recipe.model.vocab_size, (lengths[1],), generator=generator)

    @torch.no_grad()
    def logits(parts: list[torch.Tensor]) -> torch.Tensor:
        row = torch.cat([torch.cat([part[:-1], torch.zeros(1, dtype=part.dtype)]) for part in parts])[None]
        documents = Documents.of(row.numpy(), 0).to(backend().device)
        tokens, _, bounds = packed(row.to(backend().device), row, documents)
        return gpt(tokens, None, None, packed_seq_params=bounds)[0].float().cpu()  # [t, vocabulary]

    begin, end = lengths[0], lengths[0] + lengths[1]
    plain, changed = logits(ids), logits([ids[0], other, *ids[2:]])
    moved = (plain != changed).any(1)
    alone = logits([ids[2]])
    middle = plain[end : end + lengths[2]]
    found = {
        "other_documents_moved": int(moved[:begin].sum() + moved[end:].sum()),
        "itself_moved": int(moved[begin:end].sum()),
        "away_from_alone": float((middle - alone).abs().max() / alone.abs().max()),
        "attention": backend().describe(),
    }
    if found["other_documents_moved"] or not found["itself_moved"]:
        raise RuntimeError(f"a document is seen by another, or changed nothing: {found}")
    return found


if __name__ == "__main__":
    main()
