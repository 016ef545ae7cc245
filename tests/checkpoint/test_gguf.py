"""A GGUF file becomes a checkpoint with the right tokenizer: a file of SmolLM2's kind, written here, two heads wide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from megatron_smol import cli
from megatron_smol.checkpoint.convert import from_hf, to_hf
from megatron_smol.checkpoint.folder import read_checkpoint
from megatron_smol.checkpoint.hf import HfFolder
from megatron_smol.data.gguf_tokenizer import EXPECTED_IDS, VOCABULARY_SIZE
from megatron_smol.data.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
HIDDEN, FFN, HEADS, KV_HEADS = 16, 24, 2, 1


def quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY_SIZE)
    tokens = [*EXPECTED_IDS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab"]
    tokens += [f"filler{index}" for index in range(VOCABULARY_SIZE - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in EXPECTED_IDS else 1 for token in tokens])
    writer.add_token_merges(["1 2", "a b"])
    for role, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_chat_template("{{ messages }}")
    for name, array in _weights().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights() -> dict[str, np.ndarray]:
    """By llama.cpp's names, [rows, columns]."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (VOCABULARY_SIZE, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
        "output_norm.weight": (HIDDEN,),
    }
    random = np.random.default_rng(3)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def test_an_import_with_its_tokenizer(gguf_file: Path, tmp_path: Path) -> None:
    from_hf(str(gguf_file), tmp_path / "imported", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
    state = read_checkpoint(tmp_path / "imported").state
    assert state["special_ids"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert (state["rope_base"], state["model"]["norm_eps"]) == (100000.0, 1e-5)
    words = load_tokenizer(
        state["tokenizer"]
    )  # lies in the checkpoint; digits one by one, although 12 is a merge
    assert Path(state["tokenizer"]).is_relative_to(tmp_path / "imported")
    assert len(words.encode_batch(["12"])[0]) == 2 and len(words.encode_batch(["ab"])[0]) == 1
    to_hf(tmp_path / "imported", tmp_path / "hf", say=quiet)
    found, given = HfFolder.open(tmp_path / "hf"), _weights()
    for name, stored in (("embed_tokens", "token_embd"), ("layers.0.mlp.up_proj", "blk.0.ffn_up")):
        expected = torch.from_numpy(given[f"{stored}.weight"])
        assert torch.equal(found.tensor(f"model.{name}.weight"), expected)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_command_writes_a_hugging_face_folder(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["smol", "convert", "gguf-to-hf", str(gguf_file), str(tmp_path / "hf")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    HfFolder.open(tmp_path / "hf").require_all()
    roles = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (roles["bos_token"], roles["eos_token"]) == ("<|im_start|>", "<|im_end|>")
