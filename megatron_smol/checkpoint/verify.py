"""The gate: nothing is converted unless transformers and the trainer compute the same on real text.

`compare` runs megatron-core's model and the Hugging Face folder over the same tokens in fp32: every logit, the
most likely token at every position, the loss, and greedy continuation through transformers' `generate` (key/value
cache and generation config included). Both models borrow their weights layer by layer (checkpoint/layerwise.py),
so the gate fits where the conversion does. checkpoint/convert.py publishes only after `Agreement.require`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_smol.checkpoint.layerwise import Borrowing
from megatron_smol.errors import CheckpointError

MAX_TOKENS, MIN_TOKENS = 2048, 32
PROMPT_TOKENS, NEW_TOKENS = 24, 16
ROWS_AT_ONCE = 16  # of logits in fp64: a row is the whole vocabulary


@dataclass(frozen=True)
class Limits:
    """What may differ: logits (largest absolute, and RMS relative to the logits' spread), loss in nats.

    The absolute limit is for logits up to LARGE and grows with larger ones, as fp32's steps do.

    greedy: whether the most likely token must be the same everywhere, and the continuation with it.
    """

    logits: float = float("inf")
    relative: float = float("inf")
    loss: float = float("inf")
    greedy: bool = False


# Both sides compute in fp32 with the same weights and differ in the order of additions, if at all. The
# relative limit is for small logits: nearly untrained, a wrong RoPE base moves them by less than 1e-4.
SAME_WEIGHTS = Limits(logits=1e-4, relative=2e-5, loss=1e-5, greedy=True)
LARGE = 20.0  # beyond, 5e-6 of the largest logit; shapes drawn at random show up to 1e-6 of it
TIE = 2 * SAME_WEIGHTS.logits
# Rounding fp32 weights to bf16 (relative error up to 2^-9 each) moves the logits by about 1 % of their spread
# (0.8 % for SmolLM2-135M, and its loss by less than 0.0001).
ROUNDED_TO_BF16 = Limits(relative=0.05, loss=0.02)


@dataclass(frozen=True)
class Agreement:
    """What was compared and by how much the two differ; losses in nats per token.

    same_top: positions at which both find the same token most likely (or two that rounding cannot tell apart);
    largest_logit: by absolute value.
    """

    tokens: int
    windows: int
    largest_difference: float
    relative_difference: float
    loss_trainer: float
    loss_hf: float
    same_top: int
    greedy_equal: int
    greedy_tokens: int
    prompt_ids: tuple[int, ...] = ()
    greedy_ids: tuple[int, ...] = ()  # as transformers continued
    largest_logit: float = 0.0

    def describe(self) -> str:
        where = f"{self.tokens} tokens in {self.windows} window{'s' if self.windows > 1 else ''}"
        logits = (
            f"largest logit difference {self.largest_difference:.1e}"
            if self.largest_difference
            else "logits bit-equal"
        )
        losses = f"loss {self.loss_trainer:.6f} against {self.loss_hf:.6f}"
        return (
            f"{where}: {logits}, {losses}, same most likely token at {self.same_top} of {self.tokens}, "
            f"{self.greedy_equal} of {self.greedy_tokens} greedy tokens equal"
        )

    def require(self, limits: Limits, what: str) -> None:
        """Raise CheckpointError with the first measure that differs by more than `limits` allow."""
        loss_difference = abs(self.loss_trainer - self.loss_hf)
        largest = limits.logits * max(1.0, self.largest_logit / LARGE)
        measures = (
            ("logits", "largest absolute difference", self.largest_difference, largest),
            ("logits", "RMS difference relative to their spread", self.relative_difference, limits.relative),
            ("loss", "difference in nats per token", loss_difference, limits.loss),
        )
        for name, measure, found, limit in measures:
            if not found <= limit:  # catches NaN too
                raise CheckpointError(
                    f"{what}: the {name} of transformers and of the trainer disagree: {measure} {found:.3g}, "
                    f"allowed {limit:g} ({self.describe()}); nothing was written"
                )
        if limits.greedy and self.same_top < self.tokens:
            raise CheckpointError(
                f"{what}: transformers and the trainer find the same token most likely at {self.same_top} of "
                f"{self.tokens} positions only; nothing was written"
            )
        if limits.greedy and self.greedy_equal < self.greedy_tokens:
            raise CheckpointError(
                f"{what}: greedy continuation by transformers and by the trainer agree on "
                f"{self.greedy_equal} tokens, and {self.greedy_tokens} were made; nothing was written"
            )


def text_windows(ids: Sequence[int], seq_length: int) -> list[Tensor]:
    """Real text as windows [1, s] of up to the model's length, at most MAX_TOKENS in all."""
    tokens = torch.tensor([int(token) for token in ids[:MAX_TOKENS]])
    if len(tokens) < MIN_TOKENS:
        raise CheckpointError(
            f"the text to compare on has {len(tokens)} tokens; give --text a file of at least {MIN_TOKENS}"
        )
    return [window.unsqueeze(0) for window in tokens.split(seq_length) if len(window) > 1]


@torch.no_grad()
def compare(
    trainer: Borrowing, theirs: Borrowing, windows: Sequence[Tensor], new_tokens: int = NEW_TOKENS
) -> Agreement:
    """Run both models over `windows` [1, s] of token ids, then continue the beginning of the first greedily."""
    sums = torch.zeros(5, dtype=torch.float64)
    largest = largest_logit = 0.0
    for window in windows:
        hidden = trainer.hidden(window)[0], theirs.hidden(window)[0]  # [s, h] each
        with trainer.head(None) as head, theirs.head(head):
            for rows in torch.arange(window.size(1)).split(ROWS_AT_ONCE):
                a, b = trainer.logits(hidden[0][rows]).double(), theirs.logits(hidden[1][rows]).double()
                largest = max(largest, float((a - b).abs().max().nan_to_num(float("inf"))))
                largest_logit = max(largest_logit, float(b.abs().max()))
                sums += _row_sums(a, b, window[0, rows[0] + 1 : rows[-1] + 2])
    squares, spread, loss, loss_hf, same_top = sums.tolist()
    predicted = sum(window.size(1) - 1 for window in windows)
    prompt = windows[0][:, :PROMPT_TOKENS]
    generated = _continue(theirs, prompt, new_tokens)
    return Agreement(
        tokens=sum(window.size(1) for window in windows),
        windows=len(windows),
        largest_difference=largest,
        relative_difference=(squares / spread) ** 0.5 if spread else float("nan"),
        loss_trainer=loss / predicted,
        loss_hf=loss_hf / predicted,
        same_top=int(same_top),
        greedy_equal=_agreed(trainer, prompt, generated),
        greedy_tokens=len(generated),
        prompt_ids=tuple(prompt[0].tolist()),
        greedy_ids=tuple(generated),
        largest_logit=largest_logit,
    )


def _row_sums(a: Tensor, b: Tensor, following: Tensor) -> Tensor:
    """Of logits [rows, vocabulary]: squared differences, squared spread, both losses in nats, same most likely."""
    loss, loss_hf = (
        F.cross_entropy(logits[: len(following)], following, reduction="sum") for logits in (a, b)
    )
    top = (gap_to_top(a, b.argmax(1)) <= TIE).sum().double()
    return torch.stack(
        [(a - b).square().sum(), (a - a.mean(1, keepdim=True)).square().sum(), loss, loss_hf, top]
    )


def gap_to_top(logits: Tensor, chosen: Tensor) -> Tensor:
    """How far the chosen ids [rows] lie below the most likely ones of `logits` [rows, vocabulary]."""
    return logits.amax(1) - logits.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _continue(theirs: Borrowing, prompt: Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation of `prompt` [1, s] by transformers' `generate`, as it stops."""
    with theirs.head(None):
        generated: Tensor = theirs.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    found: list[int] = generated[0, prompt.size(1) :].tolist()
    return found


def _agreed(trainer: Borrowing, prompt: Tensor, generated: list[int]) -> int:
    """How many of transformers' greedy tokens are the trainer's.

    One pass is enough: as long as each token is the trainer's most likely one after those before it, the trainer
    continues alike. Of two candidates closer than rounding either will do.
    """
    ids = torch.cat([prompt, prompt.new_tensor([generated])], dim=1)
    hidden = trainer.hidden(ids)[0, prompt.size(1) - 1 : -1]
    with trainer.head(None):
        gaps = gap_to_top(trainer.logits(hidden), torch.tensor(generated))
    wrong = (~(gaps <= TIE)).nonzero()
    return int(wrong[0]) if len(wrong) else len(generated)


def require_same_tokenizer(folder: Path, text: str, ids: Sequence[int]) -> None:
    """The written tokenizer files, opened by AutoTokenizer, must give the trainer's ids."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        raise CheckpointError(f"AutoTokenizer cannot use {folder}: {error}") from error
    if list(found) != [int(token) for token in ids]:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids))
        )
        raise CheckpointError(
            f"AutoTokenizer reads {folder} otherwise than the trainer: token {at} of the text differs; check "
            "tokenizer_class in the tokenizer's tokenizer_config.json (PreTrainedTokenizerFast reads "
            "tokenizer.json as it is)"
        )


# What the two models read unless the user gives --text: prose, figures, code, a table, another script.
TEXT = """\
The tide rises twice a day because the Moon pulls on the near side of the Earth more strongly than
on its centre, and on the centre more strongly than on the far side. Two bulges of water form, and
the planet turns beneath them. When the Sun stands in line with the Moon, its weaker pull is added
and the tides are called spring tides; when the two pull at right angles, we have neap tides. A
harbour master needs more than this simple picture. Depth, the shape of the coast, wind and air
pressure move the hour of high water and its height, so tables are made from long records of each
port rather than from the sky alone.

In 1687 a pendulum clock lost about 2 minutes and 28 seconds a day when it was carried from Paris to
Cayenne, at 4.9 degrees north. Nobody had tampered with it: gravity is a little weaker near the
equator, where the ground is farther from the centre of the Earth. The period of a pendulum of
length L is T = 2 * pi * sqrt(L / g), so a change of g by 0.35% changes the period by half as much,
0.175%, which is 151 seconds in a day of 86,400 seconds.

def mean_and_variance(values):
    \"\"\"Welford's method: one pass, no catastrophic cancellation.\"\"\"
    mean, squares = 0.0, 0.0
    for count, value in enumerate(values, start=1):
        delta = value - mean
        mean += delta / count
        squares += delta * (value - mean)
    return mean, squares / max(1, count - 1)

Question: A baker sells 48 loaves in the morning and half as many in the afternoon. How many loaves
is that in all?
Answer: In the afternoon she sells 48 / 2 = 24 loaves. In all she sells 48 + 24 = 72 loaves.

"Why do you write everything down?" asked the boy. "Because," said the old keeper of the lighthouse,
"the sea remembers nothing. If the lamp failed on a night in March, only this book will know it, and
only the book can tell whoever comes after me to look at the third lens, which is cracked, and not
at the oil, which is good." He closed the book, wiped the pen, and put both into the drawer where he
kept his bread.

| metal    | density (g/cm3) | melts at (C) |
|----------|-----------------|--------------|
| tin      | 7.31            | 231.9        |
| copper   | 8.96            | 1084.6       |
| tungsten | 19.25           | 3422         |

Les mots voyagent : "naïve", "café", "Übung", "señor" se lisent dans bien des langues, and a good
tokenizer must write all of them.
"""
