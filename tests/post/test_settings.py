"""Settings of the tail: SmolLM2's for the model's size, the recipe's, the command line's, in that order."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smol.errors import UserError
from megatron_smol.post.settings import SIZES, accumulation, fill, nearest_size, read_tail
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.schema import Dpo, Sft

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize(("name", "lr", "epochs"), [("1.7b", 3e-4, 3), ("360m", 1e-3, 2), ("135m", 1e-3, 2)])
def test_the_sizes_are_the_recipes(name: str, lr: float, epochs: int) -> None:
    parameters = load_recipe(EXAMPLES / f"smollm2_{name}.yaml").model.parameters()
    size = nearest_size(parameters)
    assert (size.name.lower(), size.parameters) == (name, parameters)
    sft, notes = fill(Sft(), parameters, 8192, on_gpu=True)
    assert (sft.lr, sft.epochs, sft.seq_length, sft.precision, sft.global_batch, notes) == (
        lr,
        2,
        8192,
        "bf16",
        128,
        [],
    )
    dpo, notes = fill(Dpo(), parameters, 8192, on_gpu=False)
    assert isinstance(dpo, Dpo) and notes == []
    assert (dpo.lr, dpo.epochs, dpo.beta, dpo.seq_length, dpo.prompt_length) == (1e-6, epochs, 0.5, 1024, 512)
    assert (dpo.precision, dpo.dataset) == ("fp32", "HuggingFaceH4/ultrafeedback_binarized")


def test_nothing_is_left_open() -> None:
    for section in (Sft(), Dpo()):
        filled, _ = fill(section, SIZES[0].parameters, 8192, on_gpu=True)
        assert None not in filled.model_dump().values()


def test_the_users_word_wins_over_the_size() -> None:
    filled, _ = fill(Sft(lr=5e-5, dataset="mine.jsonl"), SIZES[1].parameters, 8192, on_gpu=False)
    assert (filled.lr, filled.dataset) == (5e-5, "mine.jsonl")


def test_notes_say_what_was_chosen_for_the_user() -> None:
    filled, notes = fill(Sft(), 7_000_000, 1024, on_gpu=False)
    assert filled.seq_length == 1024
    assert "seq_length 1,024 tokens" in notes[0] and "settings of the nearest, 135M" in notes[1]


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"seq_length is 2,048 and the model reads at most 1,024"):
        fill(Sft(seq_length=2048), 7_000_000, 1024, on_gpu=False)
    with pytest.raises(UserError, match="prompt_length is 512 and seq_length 512: nothing is left"):
        fill(Dpo(seq_length=512, prompt_length=512), 7_000_000, 1024, on_gpu=False)


def test_overrides_and_recipe() -> None:
    section = read_tail("sft", None, ["lr=1e-4", "save_every=7 steps", "packing=false"])
    assert isinstance(section, Sft) and (section.lr, section.save_every, section.packing) == (1e-4, 7, False)
    section = read_tail("dpo", EXAMPLES / "smollm2_1.7b.yaml", ["beta=0.1"])
    assert isinstance(section, Dpo) and (section.beta, section.epochs) == (0.1, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lrr=1", "'tail.sft' has no field 'lrr'; did you mean 'lr'?"),
        ("lr", "not of the form"),
        ("epochs=-1", "tail.sft.epochs is -1"),
        ("loss_on=user", "'all' or 'assistant'"),
        ("lr={", "override 'tail.sft.lr={'"),
        ("save_every=5M", "only steps are allowed here"),
    ],
)
@pytest.mark.parametrize("recipe", [None, EXAMPLES / "smollm2_1.7b.yaml"])
def test_a_wrong_setting_is_one_sentence(override: str, message: str, recipe: Path | None) -> None:
    with pytest.raises(UserError) as error:
        read_tail("sft", recipe, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_batch_divides() -> None:
    section = Sft(global_batch=128, micro_batch=4)
    assert accumulation(section, 8) == 4  # SmolLM2's 4 x 4 x 8
    with pytest.raises(UserError, match="global_batch 128 is no multiple of micro_batch 4 x 3 ranks = 12"):
        accumulation(section, 3)
