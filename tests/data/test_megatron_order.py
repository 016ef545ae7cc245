"""The door to Megatron's order: every window is bit-equal to what megatron-core's own classes return."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_smol.data.indexed import IndexedReader, IndexedWriter
from megatron_smol.data.ledger import Ledger
from megatron_smol.data.manifest import Manifest, ShardRecord, TokenizerRecord
from megatron_smol.data.source import load_source
from megatron_smol.data.stream import Rows, StageStream, open_stream
from megatron_smol.errors import DataError, UserError
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import Plan, StagePlan, make_plan, resolve_sizes

LENGTH, BATCH, SAMPLES = 16, 4, 400
WEIGHTS = {"web/shard-00000": 0.5, "web/shard-00001": 0.2, "code_text_document": 0.3}
RECIPE = """
name: continued
run_dir: runs/continued
tokenizer: tok
model: {{layers: 1, hidden_size: 8, heads: 1, kv_heads: 1, ffn_size: 8, vocab_size: 512}}
sources: {{web: {{path: {root}/web}}, code: {{path: {root}/code}}}}
training: {{seq_length: 16, global_batch: 4, micro_batch: 1, precision: fp32}}
stages:
  - name: old
    until: 60 steps
    mixture: {{web: 0.7, code: 0.3}}
    megatron_order: {{cache: {root}/cache, start_sample: 100}}
  - {{name: new, tokens: 5 steps, mixture: {{web: 0.5, code: 0.5}}}}
lr: {{peak: 1.0e-3}}
"""


class Words:
    """What megatron-core asks of a tokenizer."""

    vocab_size = 512
    eod = eos = 0
    unique_identifiers = {"class": "Words", "nested": {"of": [1, 0.25]}}  # noqa: RUF012


@dataclass
class OldRun:
    """A run of megatron-core: its data, its cache, and the dataset that it trained on."""

    root: Path
    blend: Any

    def plan(self, *changes: str, **replaced: str) -> Plan:
        text = RECIPE.format(root=self.root)
        for old, new in replaced.items():
            text = text.replace(old, new)
        recipe = parse_recipe(text, "recipe.yaml", changes)
        return make_plan(recipe, resolve_sizes(recipe))


def write_shard(prefix: Path, documents: int, rng: np.random.Generator) -> ShardRecord:
    """Documents of 0 to 70 tokens: windows end on their ends, hold several, and lie inside one."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in rng.choice([0, 1, 3, 15, 16, 17, 33, 70], documents):
            writer.add_document(rng.integers(1, 512, length))
        return ShardRecord(prefix=prefix.name, **vars(writer.finalize()))


def gpt_dataset(prefix: Path, samples: int, cache: Path, seed: int = 1234) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=LENGTH,
        blend=([str(prefix)], None),
        split="90,10,0",
        path_to_cache=str(cache),
        tokenizer=Words(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = IndexedDataset(str(prefix))
    train = np.arange(
        len(tokens) * 9 // 10, dtype=np.int32
    )  # Megatron's split: the last documents are held out
    return GPTDataset(tokens, str(prefix), train, samples, Split.train, config)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> OldRun:
    root = tmp_path_factory.mktemp("old")
    rng = np.random.default_rng(5)
    records = [write_shard(root / "web" / f"shard-0000{n}", 120 + 60 * n, rng) for n in (1, 0)][::-1]
    write_shard(root / "code_text_document", 40, rng)
    Manifest(
        source="web",
        tokenizer=TokenizerRecord(name="words", sha256="0" * 64, vocab_size=512, eod_id=0),
        dtype="uint16",
        tokens=sum(record.tokens for record in records),
        documents=sum(record.documents for record in records),
        append_eod=False,
        json_key="text",
        sentences=None,
        keep_newlines=False,
        seed=None,
        empty_documents=0,
        bad_lines=0,
        dropped_characters=0,
        shards=tuple(records),
        inputs=(),
        versions={},
    ).write(root / "web" / "manifest.json")
    datasets = [gpt_dataset(root / name, SAMPLES, root / "cache") for name in WEIGHTS]
    blend = build_blend(datasets, [*WEIGHTS.values()], SAMPLES)
    return OldRun(root, blend)


def build_blend(datasets: list[GPTDataset], weights: list[float], size: int) -> BlendedDataset:
    """As on rank 0: megatron-core asks for a rank when it writes a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_rank", lambda: 0)
        return BlendedDataset(datasets, weights, size, datasets[0].config)


def windows(plan: Plan, stage: StagePlan, start: int, stop: int) -> tuple[Rows, np.ndarray]:
    stream = open_stream(stage, plan.orders)
    sources = {name: load_source(source.path) for name, source in plan.recipe.sources.items()}
    readers, rows = stream.readers(sources), stream.rows(start, stop)
    read = [
        readers[source].read(window * LENGTH, LENGTH + 1)
        for source, window in zip(rows.source.tolist(), rows.window.tolist(), strict=True)
    ]
    return rows, np.stack(read)


def expected(blend: Any, sample: int) -> np.ndarray:
    item = blend[sample]
    return np.concatenate([item["tokens"].numpy(), item["labels"].numpy()[-1:]])


def test_every_window_is_megatron_cores(old_run: OldRun) -> None:
    plan = old_run.plan()
    rows, read = windows(plan, plan.stages[0], 0, 240)
    assert rows.names == ("web", "web", "code")
    for i in range(240):
        assert rows.source[i] == old_run.blend[100 + i]["dataset_id"]
        np.testing.assert_array_equal(read[i], expected(old_run.blend, 100 + i))
    spread = Counter(rows.source.tolist())
    assert min(spread.values()) > 30 and rows.epoch.max() > 0  # all three shards, and more than one epoch


def test_our_order_is_not_taken_by_mistake(old_run: OldRun) -> None:
    plan = old_run.plan()
    with pytest.raises(ValueError, match="order of an older run: call open_stream"):
        StageStream(plan.stages[0], plan.orders)


def test_windows_are_the_same_however_they_are_asked_for(old_run: OldRun) -> None:
    plan = old_run.plan()
    stage = pickle.loads(pickle.dumps(plan.stages[0]))
    _, whole = windows(plan, stage, 0, 240)
    for start in (0, 1, 77, 236):
        np.testing.assert_array_equal(windows(plan, stage, start, start + 4)[1], whole[start : start + 4])
    reader = stage.foreign_order.readers({n: load_source(old_run.root / n) for n in ("web", "code")})[0]
    row = reader.read(0, 20 * LENGTH)
    for start, count in ((5, 3), (16, 200), (31, 90)):  # not only whole windows
        np.testing.assert_array_equal(reader.read(start, count), row[start : start + count])
    pieces = list(reader.pieces(0, 20 * LENGTH))
    assert sum(count for _, count in pieces) == 20 * LENGTH and all(count > 0 for _, count in pieces)


def test_the_ledger_counts_every_token_by_source(old_run: OldRun) -> None:
    plan = old_run.plan()
    stage = plan.stages[0]
    ledger = Ledger.of(plan)
    for step in range(stage.steps):
        ledger.add(stage.name, LENGTH, open_stream(stage, plan.orders).rows(step * BATCH, (step + 1) * BATCH))
    ledger.check(plan, "old", stage.samples)
    drawn = Counter(int(old_run.blend[100 + i]["dataset_id"]) for i in range(240))
    assert ledger.tokens() == {"web": (drawn[0] + drawn[1]) * LENGTH, "code": drawn[2] * LENGTH}
    assert ledger.tokens() == {name: stage.tokens_after(name) for name in ("web", "code")}
    assert plan.stages[1].tokens_before == ledger.tokens()


def test_our_order_goes_on_with_an_epoch_of_its_own(old_run: OldRun) -> None:
    plan = old_run.plan()
    old, new = plan.stages
    last = {name: max(by_epoch) for name, by_epoch in old.foreign_order.use(old.samples).items()}  # type: ignore[union-attr]
    rows = open_stream(new, plan.orders).rows(0, new.samples)
    for index, name in enumerate(rows.names):
        assert rows.epoch[rows.source == index].tolist() == [last[name] + 1] * int(
            (rows.source == index).sum()
        )
    whole = Ledger.of(plan)
    whole.add("old", LENGTH, open_stream(old, plan.orders).rows(0, old.samples))
    whole.add("new", LENGTH, rows)
    whole.check(plan, "new", new.samples)


def test_every_read_of_a_stretch_of_tokens_is_found(old_run: OldRun) -> None:
    plan = old_run.plan()
    stage = plan.stages[0]
    stream = open_stream(stage, plan.orders)
    rows = stream.rows(0, stage.samples)
    sources = {name: load_source(old_run.root / name) for name in ("web", "code")}
    readers = stream.readers(sources)
    held = [  # by reading all rows: the tokens of the source that are inputs of each
        {
            token
            for first, count in readers[s].pieces(w * LENGTH, LENGTH)
            for token in range(first, first + count)
        }  # type: ignore[attr-defined]
        for s, w in zip(rows.source.tolist(), rows.window.tolist(), strict=True)
    ]
    rng = np.random.default_rng(2)
    found = 0
    for name in ("web", "code"):
        for start in [0, sources[name].tokens - 3, *rng.integers(0, sources[name].tokens, 40).tolist()]:
            stop = start + int(rng.integers(1, 60))
            tokens = set(range(start, stop))
            expected = [
                i for i, row in enumerate(held) if rows.names[rows.source[i]] == name and row & tokens
            ]
            reads = stream.reads_of(name, start, stop, stage.samples)
            assert reads.sample.tolist() == expected
            assert reads.window.tolist() == rows.window[expected].tolist()
            assert reads.epoch.tolist() == rows.epoch[expected].tolist()
            found += len(expected)
    assert found > 100


def test_a_run_of_one_dataset_has_no_blend(tmp_path: Path, old_run: OldRun) -> None:
    dataset = gpt_dataset(old_run.root / "code_text_document", 350, tmp_path)
    plan = old_run.plan("stages.old.mixture={code: 1}", f"stages.old.megatron_order.cache={tmp_path}")
    rows, read = windows(plan, plan.stages[0], 0, 100)
    assert rows.counts() == {"code": 100}
    for i in range(100):
        np.testing.assert_array_equal(read[i], expected(dataset, 100 + i))


def test_two_runs_in_one_cache_are_told_apart(tmp_path: Path, old_run: OldRun) -> None:
    shutil.copytree(old_run.root / "cache", tmp_path, dirs_exist_ok=True)
    datasets = [gpt_dataset(old_run.root / name, SAMPLES, tmp_path, seed=7) for name in WEIGHTS]
    other = build_blend(datasets, [*WEIGHTS.values()], SAMPLES)
    cache = f"stages.old.megatron_order.cache={tmp_path}"
    with pytest.raises(UserError, match=rf"index of 2 runs .*blend: .*{other.unique_description_hash}"):
        old_run.plan(cache)
    for blend in (other, old_run.blend):
        plan = old_run.plan(cache, f"stages.old.megatron_order.blend={blend.unique_description_hash}")
        _, read = windows(plan, plan.stages[0], 0, 8)
        np.testing.assert_array_equal(read, np.stack([expected(blend, 100 + i) for i in range(8)]))


def test_what_does_not_fit_is_said(tmp_path: Path, old_run: OldRun) -> None:
    with pytest.raises(
        UserError, match=r"stages\.old\.megatron_order: the old run mixed .*web: 0\.7, code: 0\.3"
    ):
        old_run.plan("stages.old.mixture={web: 0.6, code: 0.4}")
    with pytest.raises(DataError, match="no index of a training run with sequence length 8"):
        old_run.plan("training.seq_length=8")
    with pytest.raises(UserError, match=r"ends after sample 400, but the stage reads samples 100 to 500"):
        old_run.plan("stages.old.until=100 steps")
    with pytest.raises(DataError, match=r"read .*code_text_document; no shard has that name among .*\(web\)"):
        old_run.plan("stages.old.mixture={web: 1}")
    assert not old_run.plan().problems
    held_out = old_run.plan("data.holdout_tokens=64").problems
    assert any("does not know data.holdout_tokens" in problem.message for problem in held_out)


def test_a_damaged_cache_is_refused(tmp_path: Path, old_run: OldRun) -> None:
    shutil.copytree(old_run.root / "cache", tmp_path, dirs_exist_ok=True)
    cache = f"stages.old.megatron_order.cache={tmp_path}"
    (index,) = tmp_path.glob("*-dataset_index.npy")
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"dataset_index\.npy is not an index file .* truncated"):
        old_run.plan(cache)
    index.unlink()
    with pytest.raises(DataError, match=r"missing index file .*dataset_index\.npy"):
        old_run.plan(cache)
    np.save(index, np.array([{}] * 400, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not an index file of Megatron's"):  # and no pickle was loaded
        old_run.plan(cache)
    description = next(tmp_path.glob("*-BlendedDataset-*-description.txt"))
    description.write_text(json.dumps({"datasets": 3}))
    with pytest.raises(DataError, match="is not a description of Megatron's"):
        old_run.plan(cache)


def test_tokens_of_another_run_are_refused(tmp_path: Path, old_run: OldRun) -> None:
    """The same names, but fewer documents than the index asks for."""
    write_shard(tmp_path / "code_text_document", 3, np.random.default_rng(1))
    plan = old_run.plan(f"sources.code.path={tmp_path}/code_text_document")
    assert IndexedReader(tmp_path / "code_text_document").documents == 3
    with pytest.raises(DataError, match=r"leads beyond the 3 documents .* not the tokens of the old run"):
        windows(plan, plan.stages[0], 0, 40)
