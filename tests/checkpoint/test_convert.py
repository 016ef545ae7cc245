"""Conversion both ways: byte-equal, published only when right, and nothing left behind when not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_smol import cli
from megatron_smol.checkpoint import convert, hf, store, weights
from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.convert import from_hf, to_hf
from megatron_smol.checkpoint.folder import COMPLETE, read_checkpoint
from megatron_smol.checkpoint.shards import SHARD_SIZE, SINGLE
from megatron_smol.checkpoint.verify import TEXT
from megatron_smol.checkpoint.weights import Weight, weight_map
from megatron_smol.errors import CheckpointError, DataError, UserError
from megatron_smol.recipe.schema import Model
from tests.checkpoint import shapes
from tests.helpers import run_ranks


def quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("run") / "one-00000003"
    shapes.save_checkpoint(path, shapes.small_model(), tokenizer_folder)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    to_hf(checkpoint, out, say=quiet)
    return out


# Shrinking a failure would take minutes.
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    model=shapes.models(),
    name=st.sampled_from(["fp32", "bf16"]),
    interleaved=st.booleans(),
    shard=st.sampled_from([SHARD_SIZE, "30KB"]),
)
def test_round_trips_are_byte_equal(
    tokenizer_folder: Path, model: Model, name: str, interleaved: bool, shard: str
) -> None:
    with TemporaryDirectory() as folder:
        first, out, second, again = (Path(folder) / part for part in ("a", "b", "c", "d"))
        (text := Path(folder) / "text").write_text(TEXT[:300])  # the gate's own tests read more
        shapes.save_checkpoint(first, model, tokenizer_folder, name)
        to_hf(first, out, rope_interleaved=interleaved, max_shard_size=shard, text=text, say=quiet)
        from_hf(str(out), second, rope_interleaved=interleaved, text=text, say=quiet)
        to_hf(
            second, again, max_shard_size=shard, text=text, say=quiet
        )  # an import remembers its order of rows
        assert shapes.equal(stored(first, name), stored(second, name))  # Megatron -> HF -> Megatron
        assert stored_dtypes(first) == stored_dtypes(second) == {hf.DTYPES[name]}
        names = {file.name for file in out.iterdir()}
        assert names == {file.name for file in again.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json"} < names
        for file in names:  # HF -> Megatron -> HF
            assert (out / file).read_bytes() == (again / file).read_bytes()


def stored(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as they are on disk."""
    saved = read_checkpoint(path)
    gpt = shapes.build(Model(**saved.state["model"]), seed=9)
    gpt.to(hf.DTYPES[name])
    store.load_model(gpt, saved)
    return shapes.weights(gpt)


def stored_dtypes(path: Path) -> set[torch.dtype]:
    entries = FileSystemReader(path).read_metadata().state_dict_metadata.values()
    return {entry.properties.dtype for entry in entries if isinstance(entry, TensorStorageMetadata)}


@pytest.mark.parametrize(
    ("tp", "pp", "name"),
    [(1, 1, "fp32"), (2, 1, "bf16"), (1, 2, "fp32")],
    ids=["dp2", "tp2 bf16", "pp2 untied"],
)
def test_any_layout_is_read_by_one_process(
    tmp_path: Path, tokenizer_folder: Path, tp: int, pp: int, name: str
) -> None:
    source, out = tmp_path / "one-00000003", tmp_path / "hf"
    run_ranks(shapes.save_from_ranks, 2, str(source), str(tokenizer_folder), tp, pp, name)
    to_hf(source, out, say=quiet)
    theirs = hf.HfFolder.open(out)
    assert theirs.dtype() is hf.DTYPES[name]
    whole = shapes.build(theirs.described.model, seed=42)  # initial weights do not depend on the layout
    expected = weights.megatron_tensors(dict(whole.named_parameters()))
    for weight in weight_map(theirs.described.model):
        if len(weight.shape) == 2:  # each rank drew its own norms
            found = theirs.trainer_tensor(weight)
            assert torch.equal(found, expected[weight.megatron].to(hf.DTYPES[name])), weight.megatron


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp2", "pp2", "dp2"])
def test_an_import_is_loaded_at_any_layout_and_comes_back(
    exported: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    from_hf(str(exported), tmp_path / "imported", say=quiet)
    run_ranks(shapes.relayout, 2, str(tmp_path / "imported"), str(tmp_path / "saved"), tp, pp)
    to_hf(tmp_path / "saved", tmp_path / "hf", say=quiet)
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (exported / SINGLE).read_bytes()


def test_the_export_works_in_plain_transformers(exported: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(exported))
    text = pipe("def mean(", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("def mean(")
    assert transformers.AutoTokenizer.from_pretrained(exported)("a 12 b", add_special_tokens=False)[
        "input_ids"
    ]


def test_the_folder_is_complete_and_nothing_lies_beside_it(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_report_says_what_was_compared(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_hf(checkpoint, tmp_path / "hf", report=tmp_path / "good.json", dtype="bf16", say=quiet)
    good = json.loads((tmp_path / "good.json").read_text())
    assert good["published"] and good["tensors"] == {"megatron": 14, "hugging_face": 20}
    found = good["compared"]
    assert found["tokens"] == found["same_top"] > 800 and found["largest_difference"] < 1e-4
    assert abs(found["loss_trainer"] - found["loss_hf"]) < 1e-5 and "The tide rises" in found["greedy_text"]
    assert good["rounding_fp32_to_bf16"]["relative_difference"] > 1e-4
    assert good["files"]["hugging_face"][SINGLE] == f"sha256:{on_disk.sha256(tmp_path / 'hf' / SINGLE)}"
    listed = json.loads((checkpoint / COMPLETE).read_text())["files"]["state.json"]
    assert good["files"]["checkpoint"]["state.json"] == f"{on_disk.CHECKSUM}:{listed[on_disk.CHECKSUM]}"
    assert set(good["seconds"]) == {"converting", "comparing"}
    text = (tmp_path / "good.txt").read_text()
    assert "published" in text and f"same most likely token at {found['tokens']} of {found['tokens']}" in text
    monkeypatch.setattr(hf, "split_weight", _gate_and_up_swapped)
    with pytest.raises(CheckpointError, match="disagree"):
        to_hf(checkpoint, tmp_path / "bad", report=tmp_path / "bad.json", say=quiet)
    bad = json.loads((tmp_path / "bad.json").read_text())
    assert not bad["published"] and "disagree" in bad["refused_because"]
    assert bad["compared"]["largest_difference"] > 0.1
    assert "REFUSED: exporting" in (tmp_path / "bad.txt").read_text() and not (tmp_path / "bad").exists()
    with pytest.raises(UserError, match=r"--report .*nowhere.*: there is no folder"):
        to_hf(checkpoint, tmp_path / "x", report=tmp_path / "nowhere" / "r.json", say=quiet)


def test_fp32_can_be_written_as_bf16_and_is_judged_twice(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    agreement = to_hf(checkpoint, tmp_path / "hf", dtype="bf16", say=said.append)
    assert agreement.largest_difference < 1e-4
    assert any("rounding fp32 weights to bf16 moved the logits by" in line for line in said)
    folder, full = hf.HfFolder.open(tmp_path / "hf"), stored(checkpoint, "fp32")
    assert folder.dtype() is torch.bfloat16
    assert torch.equal(folder.tensor("model.norm.weight"), full["decoder.final_layernorm.weight"].bfloat16())


def test_bf16_weights_can_be_written_as_fp32(tmp_path: Path, tokenizer_folder: Path) -> None:
    shapes.save_checkpoint(tmp_path / "a", shapes.small_model(), tokenizer_folder, "bf16")
    to_hf(tmp_path / "a", tmp_path / "hf", dtype="fp32", say=quiet)
    assert hf.HfFolder.open(tmp_path / "hf").dtype() is torch.float32


def test_an_import_is_a_checkpoint_that_training_can_load(exported: Path, tmp_path: Path) -> None:
    from_hf(str(exported), tmp_path / "imported", say=quiet)
    saved = read_checkpoint(tmp_path / "imported")
    assert (saved.stage, saved.step, saved.progress) == ("imported", 0, (-1, 0))
    assert saved.state["rope_base"] == shapes.ROPE_BASE and saved.state["seq_length"] == shapes.LENGTH
    assert saved.state["model"] == shapes.small_model().model_dump()
    assert saved.state["special_ids"] == shapes.SPECIAL_IDS | {"bos_token_id": 0, "eos_token_id": 0}


def test_an_instruct_models_special_tokens_come_back(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "instruct")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for file in ("config.json", "generation_config.json"):
        path = tmp_path / "instruct" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    from_hf(str(tmp_path / "instruct"), tmp_path / "imported", say=quiet)
    to_hf(tmp_path / "imported", tmp_path / "again", say=quiet)
    for file in ("config.json", "generation_config.json"):
        assert ids.items() <= json.loads((tmp_path / "again" / file).read_text()).items()


def test_the_longest_stage_sets_the_positions(tmp_path: Path, tokenizer_folder: Path) -> None:
    state = shapes.state(shapes.small_model(), tokenizer_folder)
    state["ledger"]["stages"] = [{"seq_length": 512}, {"seq_length": 64}]
    store.save_model(shapes.build(shapes.small_model()), tmp_path / "a", state)
    to_hf(tmp_path / "a", tmp_path / "hf", say=quiet)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 512


# --- what goes wrong ---------------------------------------------------------------------------------------


def _gate_and_up_swapped(weight: Weight, *arguments: Any) -> dict[str, torch.Tensor]:
    parts = _right_split(weight, *arguments)
    return dict(zip(parts, reversed(parts.values()), strict=True)) if weight.layout == "gate_up" else parts


_right_split = weights.split_weight


def test_a_wrong_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "split_weight", _gate_and_up_swapped)
    with pytest.raises(CheckpointError, match=r"exporting .* disagree: .* nothing was written"):
        to_hf(checkpoint, tmp_path / "hf", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_does_not_come_again_is_told_and_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compare(*arguments: Any) -> Any:
        found = _right_compare(*arguments)
        seen.append(found if seen else replace(found, largest_difference=1.1e-4, largest_logit=10.5))
        return seen[-1]

    monkeypatch.setattr(convert, "compare", compare)
    said: list[str] = []
    to_hf(checkpoint, tmp_path / "hf", report=tmp_path / "r.json", say=said.append)
    assert len(seen) == 2 and (tmp_path / "hf" / "config.json").is_file()
    assert any("largest absolute difference 0.00011, allowed 0.0001" in line for line in said)
    assert "the second comparison agrees: this machine did not compute the same twice" in said
    kept = json.loads((tmp_path / "r.json").read_text())["first_comparison_that_disagreed"]
    assert kept["largest_difference"] == 1.1e-4
    assert "a comparison before that one disagreed: largest difference 1.10e-04" in (
        (tmp_path / "r.txt").read_text()
    )


_right_compare = convert.compare


def test_a_tokenizer_that_autotokenizer_reads_otherwise_stops_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.Tokenizer, "save", _save_without_digit_splitter)
    with pytest.raises(CheckpointError, match=r"AutoTokenizer reads .* otherwise than the trainer"):
        to_hf(checkpoint, tmp_path / "hf", say=quiet)
    assert list(tmp_path.iterdir()) == []


def _save_without_digit_splitter(tokenizer: Any, folder: Path) -> None:
    document = json.loads(tokenizer.files["tokenizer.json"])
    del document["pre_tokenizer"]["pretokenizers"][0]
    document["model"]["vocab"]["16"] = max(document["model"]["vocab"].values()) + 1
    document["model"]["merges"].insert(0, ["1", "6"])
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_bytes(tokenizer.files["tokenizer_config.json"])


def test_a_wrong_import_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_join_qkv", lambda q, k, v, model: torch.cat([q, k, v]))
    with pytest.raises(CheckpointError, match=r"importing .* disagree: .* nothing was written"):
        from_hf(str(exported), tmp_path / "imported", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_does_not_replace_a_right_one(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hf"
    shutil.copytree(exported, out)
    with pytest.raises(UserError, match=r"exists; choose another folder, or replace it with --overwrite"):
        to_hf(checkpoint, out, say=quiet)
    before = (out / SINGLE).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(hf, "split_weight", _gate_and_up_swapped)
        with pytest.raises(CheckpointError):
            to_hf(checkpoint, out, overwrite=True, say=quiet)
    assert (out / SINGLE).read_bytes() == before
    (out / "stale").touch()
    to_hf(checkpoint, out, overwrite=True, say=quiet)
    assert not (out / "stale").exists() and (out / SINGLE).read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_one_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hf, "write_shards", full)
    with pytest.raises(
        CheckpointError, match=r"hf could not be written \(.*No space left.*\); nothing was left"
    ):
        to_hf(checkpoint, tmp_path / "hf", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_its_completion_marker(checkpoint: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(checkpoint, unfinished)
    (unfinished / COMPLETE).unlink()
    with pytest.raises(
        CheckpointError, match=r"unfinished has no complete.json, so it was not written to the end"
    ):
        to_hf(unfinished, tmp_path / "hf", say=quiet)
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have the checksum"):
        to_hf(damaged, tmp_path / "hf", say=quiet)
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_whose_weights_are_another_models(tmp_path: Path, tokenizer_folder: Path) -> None:
    state = shapes.state(shapes.small_model(ffn_size=44), tokenizer_folder)
    store.save_model(shapes.build(shapes.small_model()), tmp_path / "a", state)
    with pytest.raises(
        CheckpointError, match=r"holds weight .*linear_fc1.weight of shape \[80, 48\], .* \[88, 48\]"
    ):
        to_hf(tmp_path / "a", tmp_path / "hf", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_another_models_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    shapes.save_checkpoint(tmp_path / "a", shapes.small_model(vocab_size=500), tokenizer_folder)
    with pytest.raises(CheckpointError, match=r"has 600 ids and the model's vocabulary 500: it is another"):
        to_hf(tmp_path / "a", tmp_path / "hf", say=quiet)


def test_a_tokenizer_with_other_ids_is_refused(
    checkpoint: Path, exported: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]  # as many ids, two of them exchanged
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    wanted = r"tokenizer .*other \(vocabulary 600, .*\) is not the one that the model was trained with"
    with pytest.raises(CheckpointError, match=wanted):
        to_hf(checkpoint, tmp_path / "hf", tokenizer=str(other), say=quiet)
    with pytest.raises(CheckpointError, match=wanted):
        from_hf(str(exported), tmp_path / "imported", tokenizer=str(other), say=quiet)
    from_hf(str(exported), tmp_path / "imported", say=quiet)
    state = json.loads((tmp_path / "imported" / "state.json").read_text())
    shutil.rmtree(tmp_path / "imported")
    store.save_model(  # the model's own is gone, but the checkpoint remembers which it was
        shapes.build(shapes.small_model()),
        tmp_path / "imported",
        state | {"tokenizer": str(tmp_path / "gone")},
    )
    with pytest.raises(CheckpointError, match=wanted):
        to_hf(tmp_path / "imported", tmp_path / "hf", tokenizer=str(other), say=quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "imported"}


def test_a_lost_tokenizer_can_be_named(checkpoint: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    shapes.save_checkpoint(tmp_path / "a", shapes.small_model(), tmp_path / "gone")
    with pytest.raises(UserError, match=r"no tokenizer folder .*with --tokenizer you can name another place"):
        to_hf(tmp_path / "a", tmp_path / "hf", say=quiet)
    to_hf(tmp_path / "a", tmp_path / "hf", tokenizer=str(tokenizer_folder), say=quiet)


def test_arguments_that_cannot_be(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--dtype fp16 is not known; did you mean"):
        to_hf(checkpoint, tmp_path / "hf", dtype="fp16", say=quiet)
    with pytest.raises(UserError, match=r"--text .*gone cannot be read"):
        to_hf(checkpoint, tmp_path / "hf", text=tmp_path / "gone", say=quiet)
    with pytest.raises(CheckpointError, match=r"no checkpoint at"):
        to_hf(tmp_path / "gone", tmp_path / "hf", say=quiet)
    with pytest.raises(UserError, match=r"no file .*gone.gguf: give a GGUF file"):
        from_hf(str(tmp_path / "gone.gguf"), tmp_path / "hf", say=quiet)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(DataError, match=r"text.gguf cannot be read as a GGUF file"):
        from_hf(str(tmp_path / "text.gguf"), tmp_path / "hf", say=quiet)
    (tmp_path / "text.gguf").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        to_hf(checkpoint, tmp_path / "hf", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_commands(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = tmp_path / "text"
    text.write_text(Path(convert.__file__).read_text())
    assert _smol(monkeypatch, "convert", "to-hf", checkpoint, tmp_path / "hf", "--text", text) == 0
    assert "greedy tokens equal" in capsys.readouterr().out
    assert _smol(monkeypatch, "convert", "from-hf", tmp_path / "hf", tmp_path / "back") == 0
    assert _smol(monkeypatch, "convert", "to-hf", tmp_path / "gone", tmp_path / "x") == 4
    assert capsys.readouterr().err.startswith("error: no checkpoint at")


def _smol(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["smol", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
