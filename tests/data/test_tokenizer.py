"""Ids against Hugging Face's, for both backends; what is a control token and what is text."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.tokenizer import Tokenizer, choose_backend, disagreement, load_tokenizer
from megatron_smol.errors import UserError

from .conftest import MISSING_BYTES, SPECIALS, train_tokenizer

# Weighted to what tokenizers disagree about: white space, digits, apostrophes, controls, combining marks.
AWKWARD = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r'0123aAé\u0301\x04\x1d"))
)


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> Tokenizer:
    chosen = choose_backend(tokenizer, ["some text", "1234"])
    assert chosen.backend == "splintr"
    return chosen


def hf_ids(folder: Path, text: str) -> list[int]:
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    return reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(AWKWARD, max_size=6))
def test_both_backends_give_hugging_faces_ids(
    texts: list[str], tokenizer: Tokenizer, fast: Tokenizer, tokenizer_folder: Path
) -> None:
    expected = [hf_ids(tokenizer_folder, text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert [ids.tolist() for ids in fast.encode_batch(texts)] == expected


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_in_text_are_spelled_out(tokenizer: Tokenizer, fast: Tokenizer, special: str) -> None:
    for backend in (tokenizer, fast):
        (ids,) = backend.encode_batch([f"a {special} b"])
        assert ids.min() >= len(SPECIALS)
        assert backend.decode(ids) == f"a {special} b"


def test_decode_shows_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0, *tokenizer.encode_batch(["hi"])[0], 2]) == "<|endoftext|>hi<|im_end|>"


def test_dropped_characters_are_counted_and_treated_as_hugging_face_does(
    tokenizer: Tokenizer, fast: Tokenizer, tokenizer_folder: Path
) -> None:
    assert set(MISSING_BYTES) == set(tokenizer._missing_bytes)
    # In the second text the quotes are one token only when the byte between them goes before merging.
    texts = ["clean", 'ab "\x04"" the\x1d plan', "", "\U00040000!", "clean again"]
    for backend in (tokenizer, fast):
        encoded = backend.encode_flat(texts)
        assert encoded.dropped == 3
        parts = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        assert [part.tolist() for part in parts] == [hf_ids(tokenizer_folder, text) for text in texts]


def test_a_backend_that_differs_is_noticed_and_not_chosen(tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer.files["tokenizer.json"])
    document["normalizer"] = {"type": "Lowercase"}
    lowering = Tokenizer("lowering", {"tokenizer.json": json.dumps(document).encode()})
    chosen = choose_backend(lowering, ["ABC", "abc"])
    assert chosen.encode_batch(["ABC"])[0].tolist() == chosen.encode_batch(["abc"])[0].tolist()

    broken = Tokenizer("broken", tokenizer.files, "splintr")
    broken._splintr = Tokenizer("other", {"tokenizer.json": _without_merges(tokenizer)}, "splintr")._splintr
    assert disagreement(broken, ["", "the plan of a run"]) == "the plan of a run"


def _without_merges(tokenizer: Tokenizer) -> bytes:
    document = json.loads(tokenizer.files["tokenizer.json"])
    document["model"]["merges"] = document["model"]["merges"][:20]
    return json.dumps(document).encode()


def test_end_of_document_is_the_tokenizers_or_refused(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eod_token, tokenizer.eod_id) == (
        "<|endoftext|>",
        0,
    )  # although its eos_token is <|im_end|>
    text = tokenizer.files["tokenizer.json"].decode().replace("<|endoftext|>", "<unk>")
    other = Tokenizer("other", {**tokenizer.files, "tokenizer.json": text.encode()})
    assert (other.eod_token, other.eod_id) == ("<|im_end|>", 2)
    with pytest.raises(
        UserError, match=r"no end-of-document token: neither <\|endoftext\|> nor its eos_token \('</s>'\)"
    ):
        Tokenizer("x", {"tokenizer.json": text.encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'})
    with pytest.raises(UserError, match=r"eos_token \(None\)"):
        Tokenizer("x", {"tokenizer.json": text.encode()})


def test_identity_survives_resaving_and_changes_with_the_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    document = json.loads(tokenizer.files["tokenizer.json"])
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]  # the older form
    del document["model"]["ignore_merges"]
    document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    document["post_processor"] = None
    resaved = Tokenizer("resaved", {"tokenizer.json": json.dumps(document, indent=1).encode()})
    assert resaved.sha256 == tokenizer.sha256
    assert resaved.encode_batch(["the plan of a run " * 9])[0].size > 8  # its truncation is off

    without_digits = json.loads(tokenizer.files["tokenizer.json"])
    del without_digits["pre_tokenizer"]["pretokenizers"][0]
    assert Tokenizer("x", {"tokenizer.json": json.dumps(without_digits).encode()}).sha256 != tokenizer.sha256
    assert load_tokenizer(train_tokenizer(tmp_path / "other", 590)).sha256 != tokenizer.sha256


def test_a_saved_tokenizer_loads_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.sha256, again.vocab_size, again.eod_id) == (tokenizer.sha256, tokenizer.vocab_size, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("the plan, 128").input_ids == tokenizer.encode_batch(["the plan, 128"])[0].tolist()
    assert len(theirs) == tokenizer.vocab_size

    bare = Tokenizer("bare", {"tokenizer.json": tokenizer.files["tokenizer.json"]})
    bare.save(tmp_path / "bare")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "bare").eos_token == "<|endoftext|>"


def test_it_pickles_with_its_backend(fast: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(fast))
    assert again.backend == "splintr"
    assert again.encode_batch(["the plan"])[0].tolist() == fast.encode_batch(["the plan"])[0].tolist()


def test_what_a_tokenizer_can_be_given_as(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_folder / "tokenizer.json").eod_id == 0
    with pytest.raises(UserError, match=r"no tokenizer folder ./nowhere/at/all: give a folder"):
        load_tokenizer("./nowhere/at/all")
    shutil.copy(tokenizer_folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    code = "from megatron_smol.data.tokenizer import load_tokenizer; load_tokenizer('owner/name')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    error = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    ).stderr
    assert "could not fetch the tokenizer owner/name from the hub" in error
    assert "give a local folder with tokenizer.json" in error
