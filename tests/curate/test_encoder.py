"""Documents as vectors of a frozen model: what it says of its tokens counts, and who shares a batch does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_smol.commands.classifier import classifier
from megatron_smol.curate.classifier import Classifier
from megatron_smol.curate.encoder import Encoder
from megatron_smol.curate.endpoint import completion
from megatron_smol.curate.local_model import LocalModel
from megatron_smol.errors import UserError
from tests.curate.test_classifier import labelled
from tests.data.conftest import train_tokenizer

SIZES = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
TEXTS = ["a short one", "the cat sat on the mat, and then it slept " * 4, "one", "two words"]


def folder_of(kind: str, folder: Path) -> Path:
    """bert: every token sees all others; llama: those before it."""
    train_tokenizer(folder)
    torch.manual_seed(0)
    model = (
        transformers.BertModel(transformers.BertConfig(**SIZES))
        if kind == "bert"
        else transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: folder_of(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "llama")}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_document_has_the_same_vector_in_any_company(
    kind: str, pooling: str, folders: dict[str, Path]
) -> None:
    if (kind, pooling) == ("llama", "first"):
        with pytest.raises(UserError, match=r"sees nothing of the text that follows.*use `mean`"):
            Encoder(str(folders[kind]), "first", 32)
        return
    encoder = Encoder(str(folders[kind]), pooling, 32)  # type: ignore[arg-type]
    together = encoder(TEXTS)
    alone = np.concatenate([encoder([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS), 64) and np.abs(together - alone).max() < 1e-5
    assert np.abs(together[0] - together[3]).max() > 1e-3
    assert np.allclose(encoder([TEXTS[1], TEXTS[1] + "more"])[0], together[1], atol=1e-5), (
        "32 tokens are seen"
    )


def test_the_model_says_how_its_tokens_become_one_vector(folders: dict[str, Path], tmp_path: Path) -> None:
    assert Encoder(str(folders["llama"]), None, 32).pooling == "mean"
    assert Encoder(str(folders["bert"]), None, 32).pooling == "first"
    folder = folder_of("bert", tmp_path / "said")
    (folder / "1_Pooling").mkdir()
    about = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(about))
    assert Encoder(str(folder), None, 32).pooling == "mean"
    assert Encoder(str(folder), "first", 32).pooling == "first"
    with pytest.raises(UserError, match=rf"^encoder {tmp_path}: no Hugging Face model can be loaded"):
        Encoder(str(tmp_path), None, 32)


def test_a_model_that_fails_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> None:
        raise OSError

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", failing)
    with pytest.raises(UserError, match=r"can be loaded from there \(OSError\)"):
        Encoder(str(tmp_path), None, 32)


def test_the_cpu_where_it_is_asked_for(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOL_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Encoder(str(folders["bert"]), "mean", 32)(TEXTS).shape == (len(TEXTS), 64)
    assert LocalModel(folders["llama"])(completion("the cat", max_tokens=2)).prompt_tokens > 0


def test_a_head_on_a_frozen_language_model(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, scores = labelled(400, 0)
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": t, "score": s}) + "\n" for t, s in zip(texts, scores, strict=True)))  # fmt: skip
    classifier(path, tmp_path / "made", encoder=str(folders["llama"]), folds=4, length=96)
    assert "400 held out, each once, in 4 parts" in capsys.readouterr().out
    made = Classifier.load(tmp_path / "made")
    assert made.settings.pooling == "mean" and made.report["held_out"] == made.report["documents"] == 400
    assert made.report["macro_f1_above_length_95"][0] > 0, (
        "weights that were drawn keep which words there are"
    )
    assert np.corrcoef(made.scores(texts), scores)[0, 1] > 0.5
