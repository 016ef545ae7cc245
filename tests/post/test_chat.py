"""The terminal chat: streaming, history, commands, and Ctrl-C that ends an answer and not the program."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_smol import cli
from megatron_smol.errors import CheckpointError
from megatron_smol.post import chat as chat_module
from megatron_smol.post.chat import Chat, Sampling, chat_model, converse

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


class Typed:
    """A console that reads these lines; an exception among them is raised."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self.console = Console(file=io.StringIO(), width=200)
        self.console.input = self._next  # type: ignore[method-assign]

    def _next(self, *_: Any) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    @property
    def shown(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined]


def test_an_answer_comes_in_pieces_and_stays_in_the_conversation(tuned: Path) -> None:
    chat = Chat.open(tuned, GREEDY)
    pieces = list(chat.reply("Colour of 7 grass?"))
    assert "".join(pieces) == "green"
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert chat.turns[1]["content"] == "green"
    list(chat.reply("Colour of 7 coal?"))
    prompt = chat.tokenizer.decode(chat._prompt()["input_ids"][0])
    assert "green<|im_end|>" in prompt and prompt.count("<|im_start|>user") == 2
    chat.reset()
    assert chat.turns == []


def test_the_system_turn_is_the_templates_or_the_users(tuned: Path) -> None:
    chat = Chat.open(tuned, GREEDY)
    chat.turns = [{"role": "user", "content": "Hi?"}]
    assert "named SmolLM" in chat.tokenizer.decode(chat._prompt()["input_ids"][0])
    chat.system = "Be brief."
    prompt = chat.tokenizer.decode(chat._prompt()["input_ids"][0])
    assert "Be brief." in prompt and "SmolLM" not in prompt


def test_old_turns_make_room(tuned: Path) -> None:
    chat = Chat.open(tuned, GREEDY)
    for _ in range(6):
        list(chat.reply("Colour of 7 grass?"))
    assert chat.dropped > 0 and chat.dropped % 2 == 0
    assert chat._prompt()["input_ids"].size(1) <= 128 - 12
    assert chat.turns[-1]["content"] == "green"


def test_closing_the_answer_stops_the_model(tuned: Path) -> None:
    chat = Chat.open(tuned, Sampling(max_new_tokens=60, temperature=5.0, top_p=1.0, seed=1))
    chat.end_ids = lambda: [639]  # type: ignore[method-assign]  # an id that text has no token for
    pieces: Iterator[str] = chat.reply("Colour of 7 grass?")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    said = len(chat.tokenizer(chat.turns[-1]["content"])["input_ids"])
    assert said < 50 and chat.turns[-1]["role"] == "assistant"


def test_a_failure_while_answering_is_told(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat.open(tuned, GREEDY)
    monkeypatch.setattr(
        chat.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.reply("Hi?"))


def test_the_commands(tuned: Path) -> None:
    typed = Typed("Colour of 7 snow?", "/reset", "/system Be brief.", "/what", "", "/quit", "never read")
    chat = Chat.open(tuned, GREEDY)
    converse(chat, typed.console)
    assert "white" in typed.shown and "a new conversation" in typed.shown
    assert "system turn: Be brief." in typed.shown and typed.shown.count(chat_module.HELP) == 2
    assert (chat.turns, chat.system) == ([], "Be brief.")


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_ends_it(tuned: Path, end: type[BaseException]) -> None:
    converse(Chat.open(tuned, GREEDY), Typed(end, "never read").console)


def test_ctrl_c_stops_an_answer_and_not_the_program(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = Typed("Colour of 7 snow?", "Colour of 7 coal?")
    chat = Chat.open(tuned, GREEDY)
    show, interrupted = typed.console.print, []

    def interrupt_once(text: Any = "", *arguments: Any, **options: Any) -> None:
        show(text, *arguments, **options)
        if str(text).startswith("w") and not interrupted:
            interrupted.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(typed.console, "print", interrupt_once)
    converse(chat, typed.console)
    assert interrupted and "(stopped)" in typed.shown and "black" in typed.shown
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2


def test_one_question_for_scripts(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", tuned, "--prompt", "Colour of 7 sky?", "--temperature", 0, "--max-new-tokens", 9]
    monkeypatch.setattr("sys.argv", ["smol", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capfd.readouterr().out == "blue\n"


def test_a_base_model_is_no_chat_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template, so it is a base model: `smol generate`"):
        Chat.open(base, GREEDY)
    with (
        pytest.raises(CheckpointError, match="there is no model folder"),
        chat_model(tmp_path / "none", Console(quiet=True)),
    ):
        pass


def test_a_runs_folder_is_its_furthest_tail(tuned: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    shutil.copytree(tuned, tmp_path / "sft")
    with chat_model(tmp_path, quiet) as folder:
        assert folder == tmp_path / "sft"
    (tmp_path / "dpo").mkdir()  # begun and not finished
    with chat_model(tmp_path, quiet) as folder:
        assert folder == tmp_path / "sft"
    (tmp_path / "dpo" / "tail.json").write_text(json.dumps({}))
    with chat_model(tmp_path, quiet) as folder:
        assert folder == tmp_path / "dpo"
