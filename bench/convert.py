"""Conversion both ways against transformers' loading and saving of the same model: time, and peak memory.

Two models in bf16: SmolLM2-135M (the real one when SMOL_REAL_MODEL names its folder or GGUF file, else random weights of
its shape) and the 1.7B's shape with random weights (3.4 GB; the bench needs 15 GB of disk for a while). Every turn is
a process of its own, so that its peak memory is its own. Our time has what makes a conversion safe (hashes checked,
files flushed); the gate that compares both models is measured apart, as nothing at the peer does its work.

The law: peak memory at most 1.3 x the largest shard + 500 MB, the gate included; time at most twice the peer's.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common import CORES, ROOT, Outcome, Seconds, Spread, Turns, peak_memory_bytes, run, say, take_turns

TURNS = 4
MEMORY_FACTOR, MEMORY_EXTRA_BYTES = 1.3, 500_000_000
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"layers": 30, "hidden_size": 576, "heads": 9, "kv_heads": 3, "ffn_size": 1536},
    "1.7B": {"layers": 24, "hidden_size": 2048, "heads": 32, "kv_heads": 32, "ffn_size": 8192},
}
LENGTH, ROPE_BASE, TEXT_CHARACTERS = 2048, 130000.0, 256


def measure() -> Outcome:
    found = {}
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as where:
            found[name] = _measure(name, Path(where))
    large = found["1.7B"]
    ratio: Spread = large["export"]["turns"].ratio
    details = {name: _details(result) for name, result in found.items()}
    return Outcome(
        ratio=ratio,
        ratio_of="seconds to export the 1.7B in bf16 (law: at least 0.5)",
        peer_is="transformers from_pretrained + save_pretrained, model and tokenizer",
        ours=f"{large['export']['ours_s']:.1f} s, {large['export']['peak'] / 1e6:,.0f} MB at the peak",
        peer=f"{large['export']['peer_s']:.1f} s, {large['peer_peak'] / 1e6:,.0f} MB",
        details=details,
        settings={"shapes": SHAPES, "dtype": "bf16", "threads": CORES},
        notes=[note for name, result in found.items() for note in _notes(name, result)],
    )


def _measure(name: str, where: Path) -> dict[str, Any]:
    original, checkpoint = where / "original", where / "imported"
    say(f"{name}: making the model")
    _process("make", name, original)
    largest = max(file.stat().st_size for file in original.glob("*.safetensors"))
    gate: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}

    def convert(direction: str) -> Seconds:
        source, out = (original, checkpoint) if direction == "import" else (checkpoint, where / "exported")
        # The gate once: it is no part of the time that is compared.
        result = _process(direction, "0" if direction in gate else "1", source, out)
        gate.setdefault(direction, result["gate"])
        peaks[direction] = max(peaks.get(direction, 0), result["peak"])
        return Seconds(result["wall"], result["cpu"])

    def peer() -> Seconds:
        result = _process("peer", original, where / "peer")
        peaks["peer"] = max(peaks.get("peer", 0), result["peak"])
        return Seconds(result["wall"], result["cpu"])

    found: dict[str, Any] = {"largest_shard": largest}
    for direction in ("import", "export"):
        say(f"{name}: {direction}, {TURNS} turns")
        turns = take_turns(lambda d=direction: convert(d), peer, TURNS, "wall")  # type: ignore[misc]
        found[direction] = {
            "turns": turns,
            "ours_s": _median_wall(turns.ours),
            "peer_s": _median_wall(turns.peer),
            "peak": peaks[direction],
            "gate": gate[direction],
        }
    found["peer_peak"] = peaks["peer"]
    there, back = (folder / "model.safetensors" for folder in (original, where / "exported"))
    assert filecmp.cmp(there, back, shallow=False), "there and back is not byte-equal"
    return found


def _median_wall(turns: Sequence[Seconds]) -> float:
    """What the law is about; the median of rates turned over would be a harmonic mean, which is smaller."""
    return statistics.median(one.wall for one in turns)


def _details(result: dict[str, Any]) -> dict[str, Any]:
    limit = MEMORY_FACTOR * result["largest_shard"] + MEMORY_EXTRA_BYTES
    shown: dict[str, Any] = {"largest_shard_bytes": result["largest_shard"], "memory_limit_bytes": limit}
    for direction in ("import", "export"):
        one = result[direction]
        turns: Turns = one["turns"]
        shown[direction] = {
            **turns.to_json(),
            "ratio": turns.ratio.to_json(),
            "peak_memory_bytes": one["peak"],
            "gate": one["gate"],
        }
    return shown | {"peer_peak_memory_bytes": result["peer_peak"]}


def _notes(name: str, result: dict[str, Any]) -> list[str]:
    limit = MEMORY_FACTOR * result["largest_shard"] + MEMORY_EXTRA_BYTES
    notes = []
    for direction in ("import", "export"):
        one = result[direction]
        notes.append(
            f"{name} {direction}: {one['ours_s']:.1f} s against {one['peer_s']:.1f} s (law: at most twice), peak "
            f"{one['peak'] / 1e6:,.0f} MB (law: at most {limit / 1e6:,.0f} MB); the gate's own cost: peak "
            f"{one['gate']['peak'] / 1e6:,.0f} MB, {one['gate']['seconds']:.0f} s for {one['gate']['tokens']} tokens"
        )
        peak = max(one["peak"], one["gate"]["peak"])
        for what, holds in (("memory", peak <= limit), ("time", one["ours_s"] <= 2 * one["peer_s"])):
            if not holds:
                notes.append(f"{name} {direction}: the law of {what} does NOT hold here")
    return notes


# --- processes ---------------------------------------------------------------------------------------------


def _process(*arguments: object) -> dict[str, Any]:
    """Run one part in a process of its own; what it prints last is its result."""
    command = [sys.executable, "-m", "bench.convert", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make(name: str, folder: str) -> dict[str, Any]:
    """The model as a Hugging Face folder in bf16, with a byte-level tokenizer of the model's vocabulary."""
    import torch

    from megatron_smol.checkpoint import hf
    from megatron_smol.checkpoint.gguf import write_hf_folder
    from megatron_smol.recipe.schema import Model

    out, real = Path(folder), os.environ.get("SMOL_REAL_MODEL")
    out.mkdir()
    if name == "135M" and real:
        source = Path(real)
        if source.suffix == ".gguf":
            source = out.parent / "gguf"
            source.mkdir()
            write_hf_folder(Path(real), source)
        read_from = hf.HfFolder.open(source)
        described = read_from.described
        weights = {weight.megatron: weight for weight in hf.weight_map(described.model)}
        hf.write_folder(out, described, lambda name: read_from.trainer_tensor(weights[name]), torch.bfloat16)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (out / file).write_bytes((source / file).read_bytes())
        return {"real": True}
    model = Model(**SHAPES[name], tied_embeddings=True)
    described = hf.Description(model, ROPE_BASE, LENGTH, {"bos_token_id": 0, "eos_token_id": 0})
    shapes = {weight.megatron: weight.shape for weight in hf.weight_map(model)}
    generator = torch.Generator().manual_seed(1)

    def draw(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name])
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, model.init_std, generator=generator)

    hf.write_folder(out, described, draw, torch.bfloat16)
    _write_tokenizer(out)
    return {"real": False}


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={"<|endoftext|>": 0, **{c: 1 + i for i, c in enumerate(alphabet)}}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def convert(direction: str, with_gate: str, source: str, out: str) -> dict[str, Any]:
    """One conversion, timed without the gate's comparison (which is left out where it is not asked for)."""
    from megatron_smol.prepare import prepare_libraries

    prepare_libraries()
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from megatron_smol.checkpoint import convert as conversion
    from megatron_smol.checkpoint import verify

    gate: dict[str, Any] = {"seconds": 0.0, "cpu": 0.0}

    def as_gate(part: Callable[..., Any]) -> Callable[..., Any]:
        """The same, its time counted as the gate's."""

        def timed_part(*arguments: Any) -> Any:
            gate.setdefault("peak_before", peak_memory_bytes())
            began, cpu = time.perf_counter(), time.process_time()
            result = part(*arguments)
            gate["seconds"] += time.perf_counter() - began
            gate["cpu"] += time.process_time() - cpu
            gate["peak"] = peak_memory_bytes()
            return result

        return timed_part

    def compare(*arguments: Any) -> verify.Agreement:
        agreement = verify.Agreement(0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0)
        if with_gate == "1":
            agreement = verify.compare(*arguments)
        gate["tokens"] = agreement.tokens
        return agreement

    for name, part in (
        ("compare", compare),
        ("trainer_model", conversion.trainer_model),
        ("transformers_model", conversion.transformers_model),
    ):
        setattr(conversion, name, as_gate(part))
    text = Path(out).parent / "text"
    text.write_text(verify.TEXT[:TEXT_CHARACTERS])
    shutil.rmtree(out, ignore_errors=True)  # of the turn before
    began, cpu = time.perf_counter(), time.process_time()
    if direction == "import":
        conversion.from_hf(source, Path(out), overwrite=True, text=text, say=lambda _: None)
    else:
        conversion.to_hf(Path(source), Path(out), overwrite=True, text=text, say=lambda _: None)
    return {
        "wall": time.perf_counter() - began - gate["seconds"],
        "cpu": time.process_time() - cpu - gate["cpu"],
        "peak": gate["peak_before"],
        "gate": gate,
    }


def peer(source: str, out: str) -> dict[str, Any]:
    """Model and tokenizer by from_pretrained and save_pretrained, as everyone does it; imports are timed on neither side."""
    import torch  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(out, ignore_errors=True)  # of the turn before
    began, cpu = time.perf_counter(), time.process_time()
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "peak": peak_memory_bytes(),
    }


if __name__ == "__main__":
    if len(sys.argv) == 1:
        run("convert", measure)
    else:
        part, *rest = sys.argv[1:]
        parts: dict[str, Any] = {"make": make, "peer": peer}
        result = parts[part](*rest) if part in parts else convert(part, *rest)
        print(json.dumps(result))
