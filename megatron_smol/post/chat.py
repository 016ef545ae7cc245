"""`smol chat`: talk to a model in a terminal.

The last box of the flow for a person: what SFT and DPO wrote, or a run's folder, answers word by word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from megatron_smol.errors import CheckpointError
from megatron_smol.post.generate import load_model
from megatron_smol.post.output import RECORD
from megatron_smol.post.template import TURN_END

HELP = (
    "/reset forgets the conversation, /system TEXT sets the system turn, /quit leaves; Ctrl-C stops an answer"
)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. SmolLM2's cards suggest temperature 0.2 and top_p 0.9."""

    max_new_tokens: int = 512
    temperature: float = 0.2
    top_p: float = 0.9
    seed: int | None = None


@dataclass
class Chat:
    """A model, and the turns so far."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0  # of the oldest turns, to fit the model's window

    @classmethod
    def open(cls, folder: Path, sampling: Sampling, system: str | None = None) -> Chat:
        """Load a chat model; CheckpointError for what is none."""
        model, tokenizer = load_model(folder)
        if not tokenizer.chat_template:
            raise CheckpointError(
                f"{folder} has no chat template, so it is a base model: `smol generate` continues text with it, "
                "`smol sft` makes it a chat model"
            )
        return cls(model, tokenizer, sampling, system)

    def reset(self) -> None:
        self.turns, self.dropped = [], 0

    def reply(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece as it is made. Closing the iterator stops the model.

        What was said until then stays in the conversation.
        """
        from transformers import TextIteratorStreamer

        self.turns.append({"role": "user", "content": text})
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        failed: list[BaseException] = []
        worker = threading.Thread(
            target=self._generate, args=(self._prompt(), streamer, stop, failed), daemon=True
        )
        worker.start()
        said = ""
        try:
            for piece in streamer:
                said += piece
                yield piece
        finally:
            stop.set()
            worker.join()
            self.turns.append({"role": "assistant", "content": said})
        if failed:
            raise failed[0]

    def _prompt(self) -> Any:
        """Ids of the conversation [1, s]; the oldest turns are dropped while the answer would not fit."""
        limit = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        while True:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            encoded = self.tokenizer.apply_chat_template(
                system + self.turns[self.dropped :],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            if encoded["input_ids"].size(1) <= limit or self.dropped >= len(self.turns) - 1:
                return encoded
            self.dropped += 2  # a question and its answer

    def _generate(
        self, prompt: Any, streamer: Any, stop: threading.Event, failed: list[BaseException]
    ) -> None:
        import torch
        from transformers import StoppingCriteriaList

        sampling = self.sampling
        how = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.temperature
            else {"do_sample": False}
        )
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed + len(self.turns))
            self.model.generate(
                **prompt,
                streamer=streamer,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self.end_ids(),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList(
                    [lambda ids, _: torch.full((len(ids),), stop.is_set())]
                ),
                **how,
            )
        except BaseException as error:  # told by the thread that reads the stream
            failed.append(error)
            streamer.end()

    def end_ids(self) -> list[int]:
        """What ends an answer: the model's own end tokens, and the end of a turn."""
        own = self.model.generation_config.eos_token_id
        ids = set(own if isinstance(own, list) else [own]) | {self.tokenizer.convert_tokens_to_ids(TURN_END)}
        return sorted(
            ids - {None, self.tokenizer.unk_token_id if TURN_END not in self.tokenizer.get_vocab() else None}
        )


@contextmanager
def chat_model(path: Path, console: Console) -> Iterator[Path]:
    """The Hugging Face folder to talk to: `path` itself, the furthest of a run's tail, or a checkpoint exported."""
    if (path / "config.json").is_file():
        yield path
        return
    for stage in ("dpo", "sft"):
        if (path / stage / RECORD).is_file():
            console.print(f"talking to {path / stage}", style="dim")
            yield path / stage
            return
    if not path.is_dir():
        raise CheckpointError(
            f"there is no model folder {path}; give a Hugging Face folder or a run's folder"
        )
    from megatron_smol.prepare import prepare_libraries

    prepare_libraries()
    from megatron_smol.checkpoint.convert import to_hf

    with TemporaryDirectory() as folder:
        to_hf(path, Path(folder) / "hf", say=lambda text: console.print(text, style="dim", markup=False))
        yield Path(folder) / "hf"


def answer_once(chat: Chat, prompt: str) -> None:
    """One question, the answer alone on stdout: for scripts."""
    for piece in chat.reply(prompt):
        print(piece, end="", flush=True)
    print()


def converse(chat: Chat, console: Console) -> None:
    """Read, answer, repeat, until /quit or the end of the input."""
    console.print(HELP, style="dim")
    while True:
        try:
            text = console.input("[bold]you  [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            chat.reset()
            console.print("a new conversation", style="dim")
        elif command == "/system":
            chat.system = rest.strip() or None
            chat.reset()
            console.print(
                f"system turn: {chat.system or 'the default'}; a new conversation", style="dim", markup=False
            )
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            _answer(chat, text, console)


def _answer(chat: Chat, text: str, console: Console) -> None:
    dropped = chat.dropped
    console.print("[bold]model [/]", end="")
    pieces = chat.reply(text)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        console.print(" [dim](stopped)[/]", end="")
    console.print()
    if chat.dropped > dropped:
        console.print("(the oldest turns no longer fit and were dropped)", style="dim")
