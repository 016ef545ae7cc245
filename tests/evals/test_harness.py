"""The figures are lm-eval's own: against lm-eval called directly, and one log-likelihood by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.evals.harness import Harness, Settings, max_length, require_chat_template
from megatron_smol.evals.suites import OURS, listed_tasks
from megatron_smol.evals.tasks import load_tasks
from tests.evals.conftest import CONTEXT, write_rows
from tests.evals.direct import LM_EVAL_TASKS, directly


def ask(model: Path, task: str, data: Path, limit: int | None = None, **settings: Any) -> Any:
    (question,) = load_tasks(listed_tasks([task], limit).items, data)
    return Harness(model, "a model", Settings(**settings)).ask(question)


@pytest.mark.parametrize("chat", [False, True])
def test_arc_is_what_lm_eval_finds(model: Path, data: Path, tmp_path: Path, chat: bool) -> None:
    row, samples = ask(model, "arc_easy", data, chat_template=chat)
    files = {"test": data / "arc_easy" / "test.jsonl"}
    found = directly(
        model, LM_EVAL_TASKS / "arc" / "arc_easy.yaml", files, tmp_path, apply_chat_template=chat
    )
    theirs = found["results"]["direct"]
    for metric in ("acc", "acc_norm"):
        assert row["metrics"][metric]["value"] == theirs[f"{metric},none"]
        assert row["metrics"][metric]["stderr"] == theirs[f"{metric}_stderr,none"]
    assert [s["answers"] for s in samples] == [s["filtered_resps"] for s in found["samples"]["direct"]]
    assert [s["prompt"] for s in samples] == [s["arguments"][0][0] for s in found["samples"]["direct"]]
    assert row["n"] == 6 and row["shots"] == 0 and row["metric"] == "acc_norm" and row["cut"] == 0
    assert samples[0]["prompt"].startswith("<|im_start|>user\nQuestion: Which" if chat else "Question: Which")


def test_examples_are_those_of_lm_eval(model: Path, data: Path, tmp_path: Path) -> None:
    files = {split: data / "smollm2_gsm8k" / f"{split}.jsonl" for split in ("train", "test")}
    (question,) = load_tasks(listed_tasks(["smollm2_gsm8k"]).items, data)
    question.task.set_config(key="generation_kwargs", value={"max_gen_toks": 8}, update=True)
    row, samples = Harness(model, "a model", Settings()).ask(question)
    found = directly(model, OURS / "gsm8k.yaml", files, tmp_path, gen_kwargs={"max_gen_toks": 8})
    assert [s["prompt"] for s in samples] == [s["arguments"][0][0] for s in found["samples"]["direct"]]
    assert [s["answers"] for s in samples] == [s["filtered_resps"] for s in found["samples"]["direct"]]
    assert samples[0]["prompt"].count("Question:") == 6 and row["shots"] == 5


def test_a_log_likelihood_by_hand(model: Path, data: Path) -> None:
    _, samples = ask(model, "arc_easy", data, limit=1, batch_size=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    for choice, (found, _) in zip(samples[0]["choices"], samples[0]["answers"], strict=True):
        prompt = tokenizer(samples[0]["prompt"])["input_ids"]
        ids = tokenizer(samples[0]["prompt"] + choice)["input_ids"]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            chances = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
        by_hand = sum(float(chances[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
        assert found == pytest.approx(by_hand, abs=1e-4)
    per_character = [
        ll / len(c.strip()) for (ll, _), c in zip(samples[0]["answers"], samples[0]["choices"], strict=True)
    ]
    best = per_character.index(max(per_character))
    assert samples[0]["scores"]["acc_norm"] == float(best == samples[0]["target"])


def test_prompts_longer_than_the_context(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"task arc_easy: 24 of 24 prompts are longer than the context of 12 tokens"
    ):
        ask(model, "arc_easy", data, max_length=12)
    with pytest.raises(
        UserError, match=r"task smollm2_gsm8k: 3 of 3 prompts are longer .* \(the longest has \d+"
    ):
        ask(model, "smollm2_gsm8k", data)
    with pytest.raises(UserError, match=r"an answer of \d+ tokens does not fit the model's context of 2"):
        ask(model, "arc_easy", data, max_length=2)
    rows = [
        {"goal": "count " * (2 * CONTEXT if i == 0 else 1), "sol1": "a", "sol2": "b", "label": 0}
        for i in range(3)
    ]
    write_rows(tmp_path / "piqa" / "validation.jsonl", rows)
    row, _ = ask(model, "piqa", tmp_path)
    assert row["cut"] == 2  # both choices of the first question


def test_the_context_is_never_longer_than_the_models(model: Path) -> None:
    assert max_length(model, None) == max_length(model, 2048) == CONTEXT
    assert max_length(model, 100) == 100


def test_a_base_model_has_no_chat_template(model: Path, other_model: Path) -> None:
    require_chat_template(model, "first")
    with pytest.raises(UserError, match=r"tokenizer of second has no chat template, .*--no-chat"):
        require_chat_template(other_model, "second")


def test_a_model_that_does_not_load(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="broken cannot be loaded: "):
        Harness(tmp_path, "broken", Settings())
