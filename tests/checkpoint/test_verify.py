"""The gate lets through what is right and nothing else: each way to get an export wrong is tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_smol.checkpoint import hf, shards, verify
from megatron_smol.checkpoint.layerwise import Borrowing, trainer_model, transformers_model
from megatron_smol.checkpoint.verify import SAME_WEIGHTS, TEXT, compare, require_same_tokenizer, text_windows
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.errors import CheckpointError
from megatron_smol.recipe.schema import Model
from tests.checkpoint.shapes import LENGTH, build, describe, small_model, tensors_of

Tensors = dict[str, torch.Tensor]
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"


@pytest.fixture(scope="module")
def trainer() -> Borrowing:
    return borrowing(small_model())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    hf.write_folder(tmp_path, describe(small_model()), tensors_of(small_model()).__getitem__, torch.float32)
    return tmp_path


def borrowing(model: Model) -> Borrowing:
    return trainer_model(describe(model), tensors_of(model).__getitem__)


def check(trainer: Borrowing, folder: Path, windows: list[torch.Tensor]) -> verify.Agreement:
    """As an export does it."""
    agreement = compare(trainer, transformers_model(hf.HfFolder.open(folder)), windows)
    agreement.require(SAME_WEIGHTS, "test")
    return agreement


@pytest.fixture(scope="module")
def windows(tokenizer: Tokenizer) -> list[torch.Tensor]:
    return text_windows(tokenizer.encode_batch([TEXT])[0].tolist()[:400], LENGTH)


def test_a_right_export_passes(trainer: Borrowing, exported: Path, windows: list[torch.Tensor]) -> None:
    agreement = check(trainer, exported, windows)
    assert agreement.tokens == agreement.same_top == 400 and agreement.windows == 4
    assert agreement.greedy_equal == agreement.greedy_tokens > 0
    assert agreement.largest_difference < 1e-5


def test_both_continuations_stop_at_the_end_of_text(
    trainer: Borrowing, exported: Path, windows: list[torch.Tensor]
) -> None:
    prompt = windows[0][:, : verify.PROMPT_TOKENS]
    end = int(build(small_model())(prompt, None, None)[0, -1].argmax())
    config = exported / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, end]}))
    agreement = check(trainer, exported, windows)
    assert (agreement.greedy_equal, agreement.greedy_tokens) == (1, 1)


def _swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _rows(tensors: Tensors, name: str, order: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Reorder the heads [heads, 8, h] of an attention weight."""
    weight = tensors[name]
    tensors[name] = order(weight.view(-1, 8, weight.size(1))).reshape(weight.shape).contiguous()


def _interleave(heads: torch.Tensor) -> torch.Tensor:
    """Half-split rotary rows as interleaved ones: the classic wrong export."""
    return heads.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


WRONG: dict[str, Callable[[Tensors], None]] = {
    "gate and up swapped": lambda t: _swap(t, f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"),
    "query heads permuted": lambda t: _rows(t, f"{ATTENTION}.q_proj.weight", lambda q: q[[1, 0, 2, 3, 4, 5]]),
    "grouped by key head, not by query": lambda t: _rows(
        t, f"{ATTENTION}.q_proj.weight", lambda q: q.unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1)
    ),
    "key heads swapped": lambda t: _rows(t, f"{ATTENTION}.k_proj.weight", lambda k: k.flip(0)),
    "key and value swapped": lambda t: _swap(t, f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"),
    "interleaved rotary rows": lambda t: (
        _rows(t, f"{ATTENTION}.q_proj.weight", _interleave),
        _rows(t, f"{ATTENTION}.k_proj.weight", _interleave),
    )[0],
    "norms swapped": lambda t: _swap(
        t, "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    ),
    "layers swapped": lambda t: _swap(t, f"{MLP}.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "one embedding row lost": lambda t: t["model.embed_tokens.weight"][100].zero_(),
    "NaN": lambda t: t["model.norm.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_are_refused(
    wrong: str, trainer: Borrowing, exported: Path, windows: list[torch.Tensor]
) -> None:
    tensors = load_file(exported / shards.SINGLE)
    WRONG[wrong](tensors)
    save_file(tensors, exported / shards.SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the logits .* disagree: .* allowed 0.0001"):
        check(trainer, exported, windows)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0},
        {"rms_norm_eps": 1e-2},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=["rope base", "norm eps", "head shape"],
)
def test_a_wrong_config_is_refused(
    change: dict[str, object], trainer: Borrowing, exported: Path, windows: list[torch.Tensor]
) -> None:
    config = exported / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match="the logits"):
        check(trainer, exported, windows)


def test_a_wrong_rope_base_is_seen_in_an_untrained_model(tmp_path: Path, windows: list[torch.Tensor]) -> None:
    model = small_model(init_std=0.01)  # the logits move by 5e-5: only the relative limit sees it
    wrong = replace(describe(model), rope_base=10000.0)
    hf.write_folder(tmp_path, wrong, tensors_of(model).__getitem__, torch.float32)
    with pytest.raises(CheckpointError, match=r"the logits .* RMS difference"):
        check(borrowing(model), tmp_path, windows)


def test_weights_that_transformers_would_invent(
    trainer: Borrowing, exported: Path, windows: list[torch.Tensor]
) -> None:
    tensors = load_file(exported / shards.SINGLE)
    del tensors["model.norm.weight"]  # transformers would put ones there, with a warning only
    save_file(tensors, exported / shards.SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers lacks weight model.norm.weight"):
        check(trainer, exported, windows)
    save_file(tensors | {"model.norm.weight": torch.ones(2)}, exported / shards.SINGLE)
    with pytest.raises(CheckpointError, match=r"transformers has another shape for weight model.norm.weight"):
        check(trainer, exported, windows)
    save_file(tensors | {"model.norm.weight": torch.ones(48), "x": torch.ones(2)}, exported / shards.SINGLE)
    with pytest.raises(CheckpointError, match=r"transformers has no use for weight x"):
        check(trainer, exported, windows)


def test_a_missing_tied_head(tmp_path: Path, windows: list[torch.Tensor]) -> None:
    model = small_model(tied_embeddings=False)
    hf.write_folder(tmp_path, describe(model), tensors_of(model).__getitem__, torch.float32)
    trainer = borrowing(model)
    check(trainer, tmp_path, windows)
    config, tensors = tmp_path / "config.json", load_file(tmp_path / shards.SINGLE)
    untied = config.read_text()
    config.write_text(untied.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(CheckpointError, match=r"the logits .* disagree"):
        check(trainer, tmp_path, windows)  # transformers would use the embedding, whatever lies there as head
    config.write_text(untied)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / shards.SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers lacks weight lm_head.weight"):
        check(trainer, tmp_path, windows)
    config.write_text(untied.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(CheckpointError, match=r"the logits .* disagree"):
        check(trainer, tmp_path, windows)


def test_interleaved_rows_are_judged_by_an_interleaved_trainer(
    tmp_path: Path, windows: list[torch.Tensor]
) -> None:
    model, read = small_model(), tensors_of(small_model()).__getitem__
    described = replace(describe(model), rope_interleaved=True)
    hf.write_folder(tmp_path, described, read, torch.float32)
    check(trainer_model(described, read), tmp_path, windows)
    with pytest.raises(CheckpointError, match=r"the logits .* disagree"):
        check(trainer_model(describe(model), read), tmp_path, windows)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_models_that_borrow_compute_what_whole_models_do(tied: bool, tmp_path: Path) -> None:
    model = small_model(tied_embeddings=tied)
    hf.write_folder(tmp_path, describe(model), tensors_of(model).__getitem__, torch.float32)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(2, 80).unsqueeze(0)
    for borrowed, expected in (
        (borrowing(model), build(model).eval()(ids, None, None)[0]),
        (transformers_model(hf.HfFolder.open(tmp_path)), whole(ids).logits[0]),
    ):
        hidden = borrowed.hidden(ids)[0]
        with borrowed.head(None):
            assert torch.equal(borrowed.logits(hidden), expected)
        assert all(parameter.is_meta for parameter in borrowed.model.parameters())  # all given back


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_two_heads_are_one_table_only_when_they_are_equal(tied: bool, equal: bool, tmp_path: Path) -> None:
    model = small_model(tied_embeddings=tied)
    tensors = dict(tensors_of(model))
    hf.write_folder(tmp_path, describe(model), tensors.__getitem__, torch.float32)
    name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    tensors[name] = tensors[name].clone()
    if not equal:
        tensors[name][-1, -1] += 1
    trainer = trainer_model(describe(model), tensors.__getitem__)
    theirs = transformers_model(hf.HfFolder.open(tmp_path))
    with trainer.head(None) as head, theirs.head(head) as other:
        assert (head.data_ptr() == other.data_ptr()) == equal
        assert torch.equal(head, tensors[name]) and torch.equal(head, other) == equal


def test_each_measure_has_its_word() -> None:
    fine = verify.Agreement(100, 1, 1e-6, 1e-7, 5.0, 5.0, 100, 16, 16)
    fine.require(SAME_WEIGHTS, "test")
    # Logits of 40 may differ by twice as much as those of 20 and less.
    verify.Agreement(**vars(fine) | {"largest_difference": 1.9e-4, "largest_logit": 40.0}).require(
        SAME_WEIGHTS, "test"
    )
    for change, word in (
        ({"largest_difference": 2e-4}, "largest absolute difference 0.0002, allowed 0.0001"),
        ({"largest_difference": 1.1e-4, "largest_logit": 10.5}, "allowed 0.0001"),
        ({"largest_difference": 2.1e-4, "largest_logit": 40.0}, "allowed 0.0002"),
        ({"relative_difference": float("nan")}, "RMS difference relative to their spread nan"),
        ({"loss_hf": 5.001}, "difference in nats per token 0.001"),
        ({"same_top": 99}, "same token most likely at 99 of 100 positions only"),
        ({"greedy_equal": 15}, "agree on 15 tokens"),
    ):
        with pytest.raises(CheckpointError, match=word):
            verify.Agreement(**vars(fine) | change).require(SAME_WEIGHTS, "test")


def test_a_tie_is_not_a_disagreement() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0001, 0.5]]).expand(3, 4).double()
    gaps = verify.gap_to_top(logits, torch.tensor([2, 1, 3]))
    assert (gaps <= verify.TIE).tolist() == [True, True, False]


def test_the_first_token_that_the_trainer_would_not_have_written(
    trainer: Borrowing, exported: Path, windows: list[torch.Tensor]
) -> None:
    theirs, prompt = transformers_model(hf.HfFolder.open(exported)), windows[0][:, :24]
    with torch.no_grad():
        generated = verify._continue(theirs, prompt, 8)
        assert verify._agreed(trainer, prompt, generated) == 8
        assert (
            verify._agreed(trainer, prompt, [*generated[:5], (generated[5] + 1) % 640, *generated[6:]]) == 5
        )


def test_text_becomes_windows_of_the_models_length() -> None:
    assert [w.size(1) for w in text_windows(range(100), 40)] == [40, 40, 20]
    assert [w.size(1) for w in text_windows(range(81), 40)] == [40, 40]  # one token predicts nothing
    assert sum(w.size(1) for w in text_windows(range(10_000), 512)) == verify.MAX_TOKENS
    with pytest.raises(CheckpointError, match="has 5 tokens; give --text a file of at least 32"):
        text_windows(range(5), 40)


def test_a_tokenizer_that_autotokenizer_reads_otherwise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    ids = tokenizer.encode_batch([TEXT])[0].tolist()
    require_same_tokenizer(tmp_path, TEXT, ids)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"] = document["pre_tokenizer"]["pretokenizers"][1:]
    document["model"]["merges"].insert(0, ["1", "6"])
    document["model"]["vocab"]["16"] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        CheckpointError, match=r"AutoTokenizer reads .* otherwise than the trainer: token \d+"
    ):
        require_same_tokenizer(tmp_path, TEXT, ids)
