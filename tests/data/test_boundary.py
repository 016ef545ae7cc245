"""Cut anywhere that `Cuts` names, the ids of the pieces are the ids of the whole: both backends, four splitters."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_smol.data import boundary
from megatron_smol.data.boundary import cuts_of
from megatron_smol.data.tokenizer import Tokenizer, choose_backend

BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split_by(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


SPLITTERS = {
    "SmolLM2": {"type": "Sequence", "pretokenizers": [DIGITS, {**BYTES_ONLY, "use_regex": True}]},
    "GPT-2": {**BYTES_ONLY, "use_regex": True},
    **{
        f"expression {number}": {"type": "Sequence", "pretokenizers": [split_by(expression), BYTES_ONLY]}
        for number, expression in enumerate(sorted(boundary._EXPRESSIONS))
    },
}
# Weighted to what the expressions treat specially.
TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            " \t\n\r'’\u00a0\u3000\u2028\u0301\u200d\x04" + string.punctuation + "0123aAsStTlLé字。、한٣Ⅷ½😀"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.fixture(scope="module", params=SPLITTERS)
def backends(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> list[Tokenizer]:
    """The same tokenizer with another splitter, and merges across what should be split, on both backends."""
    document = json.loads(tokenizer.files["tokenizer.json"]) | {"pre_tokenizer": SPLITTERS[request.param]}
    _merge_across_cuts(document)
    made = Tokenizer(request.param, {"tokenizer.json": json.dumps(document).encode()})
    fast = choose_backend(made, [])
    return [made, fast] if fast.backend == "splintr" else [made]


def _merge_across_cuts(document: dict[str, Any]) -> None:
    """Without a split in between, these pairs would become one token: a wrong cut shows in the ids."""
    model = document["model"]
    letters, others = "aAsStTlL", " 0123\t\n'.,(-"
    spelled = {" ": "Ġ", "\t": "ĉ", "\n": "Ċ"}
    pairs = [(a, b) for a in letters for b in others] + [(b, a) for a in letters for b in others]
    pairs += [(a, b) for a in others for b in others] + [(a, b) for a in letters for b in letters]
    for pair in pairs:
        left, right = (spelled.get(sign, sign) for sign in pair)
        if left + right not in model["vocab"]:
            model["vocab"][left + right] = len(model["vocab"])
            model["merges"].append([left, right])


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text="a  b \n c\t d . e")
@example(text="it's we'll I'D 's' x's.y 'll9")
@example(text="3.14159 26535x8979")
@example(text="字。字、한글 123字4")
def test_ids_of_the_pieces_are_those_of_the_whole(text: str, backends: list[Tokenizer]) -> None:
    for tokenizer in backends:
        assert tokenizer.cuts is not None
        edges = [0, *tokenizer.cuts.all(text), len(text)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise(edges)]
        whole = tokenizer.encode_flat([text]).ids
        assert np.array_equal(tokenizer.encode_flat(pieces).ids, whole), (tokenizer.backend, pieces)


def test_the_last_cut(tokenizer: Tokenizer) -> None:
    cuts = tokenizer.cuts
    assert cuts is not None
    assert cuts.last("one two three") == 7
    assert cuts.last("one two", 4) == 0  # not before `start`
    assert cuts.last("one two" + "x" * 100_000) == 3  # far from the end too
    assert cuts.last("日本語。日本語") == 3 and cuts.last("ab12") == 3
    assert cuts.last("\n\n  \n") == cuts.last("") == cuts.last("xxxx") == 0


def test_tokenizers_that_are_not_known_are_not_cut(tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer.files["tokenizer.json"])
    plain = {
        "id": 9,
        "content": "x",
        "special": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
    assert cuts_of(document) is not None
    with_tool = cuts_of({**document, "added_tokens": [{**plain, "content": "<tool_call>"}]})
    assert with_tool is not None and with_tool.all("<tool_call> a.b c") == [11, 15]
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": DIGITS},
        {"pre_tokenizer": BYTES_ONLY},
        {"pre_tokenizer": {**BYTES_ONLY, "use_regex": True, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": split_by(r"\s+|\S+")},
        {"pre_tokenizer": {**split_by(sorted(boundary._EXPRESSIONS)[0]), "behavior": "Removed"}},
        {"added_tokens": [{**plain, "content": "two words"}]},
        {"added_tokens": [{**plain, "rstrip": True}]},
    ):
        assert cuts_of({**document, **change}) is None, change


def test_smollm2s_own_settings_are_known(tokenizer_folder: Path) -> None:
    document = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    assert document["pre_tokenizer"]["pretokenizers"][0] == DIGITS
    assert cuts_of(document) is not None
