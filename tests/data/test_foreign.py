"""Files of other tools are read as they are: megatron-core's builder, and datatrove's Megatron writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_smol.data.indexed import document_lengths
from megatron_smol.data.source import load_source
from megatron_smol.data.tokenizer import load_tokenizer
from megatron_smol.data.verify import verify_source

TEXTS = ["A first document of 12 words.\n", "Another one; it's longer: " + "word " * 300, "", "The last."]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_cores_builder(tmp_path: Path, dtype: type) -> None:
    random = np.random.default_rng(0)
    documents = [[random.integers(0, 900, n) for n in sizes] for sizes in ([5, 1], [700], [3, 3, 3])]
    builder = IndexedDatasetBuilder(str(tmp_path / "web_text_document.bin"), dtype=dtype)
    for sentences in documents:
        builder.add_document(torch.from_numpy(np.concatenate(sentences)), list(map(len, sentences)))
    builder.finalize(str(tmp_path / "web_text_document.idx"))
    source = load_source(tmp_path / "web")
    everything = np.concatenate([sentence for document in documents for sentence in document])
    assert (source.tokens, source.documents, source.dtype) == (len(everything), 3, np.dtype(dtype))
    np.testing.assert_array_equal(source.read(0, source.tokens), everything)
    np.testing.assert_array_equal(source.read(4, 100), everything[4:104])
    assert source.shards[0].document(2).tolist() == np.concatenate(documents[2]).tolist()
    assert document_lengths(tmp_path / "web_text_document.idx").tolist() == [6, 700, 9]
    assert verify_source(str(tmp_path / "web"), deep=True).damages == []


def test_datatroves_megatron_writer(tmp_path: Path, tokenizer_folder: Path) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    writer = MegatronDocumentTokenizer(
        output_folder=str(tmp_path / "out"),
        tokenizer_name_or_path=str(tokenizer_folder / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    writer.run((Document(text=text, id=str(i)) for i, text in enumerate(TEXTS)), rank=0, world_size=1)
    (prefix,) = [path.with_suffix("") for path in (tmp_path / "out").glob("*.idx")]
    source = load_source(prefix)
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = [[*ids.tolist(), tokenizer.eod_id] for ids in tokenizer.encode_batch(TEXTS)]
    expected = [document for document in expected if len(document) > 1]
    found = [source.shards[0].document(i).tolist() for i in range(source.documents)]
    assert [document for document in found if len(document) > 1] == expected
    assert source.read(0, source.tokens).tolist() == [token for document in found for token in document]
    theirs = IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == found
    assert verify_source(str(prefix), deep=True).damages == []
    del theirs
