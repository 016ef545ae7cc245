"""The client for language models against a real server: answers, cache, retries, failures, kills."""

from __future__ import annotations

import errno
import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_smol.curate.endpoint import Answer, Endpoint, EndpointSettings, Failed, chat, completion
from megatron_smol.errors import DataError, DiskError, RunError, UserError
from tests.curate.language_server import Body, Reply, serving


def settings(url: str, **more: object) -> EndpointSettings:
    return EndpointSettings.model_validate({"model": "m", "url": url, "retry_seconds": 0} | more)


def say(text: str, seed: int = 0) -> object:
    return chat([{"role": "user", "content": text}], seed=seed)


def echo(path: str, body: Body) -> str:
    asked = body["prompt"] if path == "completions" else body["messages"][-1]["content"]
    return f"{asked} to you too, {body['seed']}"


def test_answers_in_order_and_each_paid_once(tmp_path: Path) -> None:
    requests = [say(f"hi {n}", seed=n) for n in range(30)] + [completion("plain", seed=7)]
    expected = [f"hi {n} to you too, {n}" for n in range(30)] + ["plain to you too, 7"]
    price = {"dollars_per_million_prompt_tokens": 10, "dollars_per_million_completion_tokens": 100}
    with serving(echo) as server:
        with Endpoint(settings(server.url, **price), tmp_path / "a.jsonl") as model:
            assert [answer.text for answer in model.map(model.ask, requests)] == expected
            used = model.usage()
        assert used["answers"] == 31 and used["from_disk"] == 0
        assert (used["prompt_tokens"], used["completion_tokens"]) == (61, 30 * 6 + 5)
        assert used["dollars"] == pytest.approx((61 * 10 + 185 * 100) / 1e6)
        assert all(body["model"] == "m" for _, body in server.seen) and len(server.seen) == 31
        with Endpoint(settings("http://nobody.invalid/v1"), tmp_path / "a.jsonl") as model:
            assert [answer.text for answer in model.map(model.ask, requests)] == expected
            assert model.usage()["from_disk"] == 31 and model.usage()["answers"] == 31
        assert len(server.seen) == 31


def test_another_seed_model_or_temperature_is_another_request(tmp_path: Path) -> None:
    with serving(echo) as server:
        for model in ("m", "n"):
            with Endpoint(settings(server.url, model=model), tmp_path / "a.jsonl") as endpoint:
                for seed in (1, 2):
                    for temperature in (0.2, 0.8):
                        endpoint.ask(completion("x", seed=seed, temperature=temperature))
        assert len(server.seen) == 8


def test_the_same_request_at_once_is_paid_once(tmp_path: Path) -> None:
    came, go = threading.Event(), threading.Event()

    def slow(path: str, body: Body) -> str:
        came.set()
        go.wait()
        return "one"

    with serving(slow) as server, Endpoint(settings(server.url), tmp_path / "a.jsonl") as model:
        found: list[object] = []
        threads = [threading.Thread(target=lambda: found.append(model.ask(say("x")))) for _ in range(4)]
        for thread in threads:
            thread.start()
        came.wait()
        go.set()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and len(set(found)) == 1 and len(server.seen) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Reply(status=500), "status 500"),
        (Reply(status=429, headers={"Retry-After": "0"}), "status 429"),
        (Reply(body=b"<html>busy</html>"), "no answer in the response"),
        (Reply(body=b'{"choices": []}'), "no answer in the response"),
        (Reply(body=b'{"choices": [{"message": {"content": null}}]}'), "no answer in the response"),
        (Reply(body=b"[1]"), "no answer in the response"),
    ],
)
def test_what_passes_is_asked_again_and_what_stays_is_counted(
    tmp_path: Path, bad: Reply, reason: str
) -> None:
    tries: list[Body] = []

    def rule(path: str, body: Body) -> Reply | str:
        tries.append(body)
        return bad if body["seed"] == 13 or len(tries) < 3 else "fine"

    with serving(rule) as server, Endpoint(settings(server.url, retries=2), tmp_path / "a.jsonl") as model:
        assert model.ask(say("x", seed=1)) == Answer("fine", "stop", 1, 1)
        assert model.ask(say("x", seed=13)) == Failed(reason)
        used = model.usage()
        assert used["retried"] == {reason: 4} and used["failed"] == {reason: 1} and used["answers"] == 1
    with Endpoint(settings("http://nobody.invalid/v1"), tmp_path / "a.jsonl") as model:
        assert model.usage() | {"from_disk": 0} == used, "totals are those of all runs"


def test_time_outs_and_closed_doors(tmp_path: Path) -> None:
    with (
        serving(lambda path, body: Reply(hang=True)) as server,
        Endpoint(settings(server.url, retries=1, timeout_seconds=0.2), tmp_path / "a.jsonl") as model,
    ):
        assert model.ask(say("x")) == Failed("timed out")
        assert model.usage()["retried"] == {"timed out": 1}
    with Endpoint(settings(server.url, retries=0), tmp_path / "b.jsonl") as model:
        assert model.ask(say("x")) == Failed("no connection (ConnectionError)")


def test_a_request_the_server_refuses_is_not_sent_again(tmp_path: Path) -> None:
    with serving(lambda path, body: Reply("too long", status=400)) as server:
        with Endpoint(settings(server.url), tmp_path / "a.jsonl") as model:
            assert model.ask(say("x")) == Failed("status 400")
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (403, "MY_KEY"), (404, "no model 'm'")]
)
def test_what_no_retry_can_mend_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    with serving(lambda path, body: Reply(status=status, body=b"no such\nthing")) as server:
        with (
            Endpoint(settings(server.url, key_variable="MY_KEY"), tmp_path / "a.jsonl") as model,
            pytest.raises(UserError, match=message) as found,
        ):
            list(model.map(model.ask, [say("x")]))
        assert "\n" not in str(found.value) and "sesame" not in str(found.value)
        assert server.headers[0]["Authorization"] == "Bearer sesame"


def test_nobody_there_stops_the_run_and_answers_stay(tmp_path: Path) -> None:
    def rule(path: str, body: Body) -> Reply | str:
        return "yes" if body["seed"] < 4 else Reply(status=503)

    with serving(rule) as server:
        few = settings(server.url, retries=0, give_up_after=5, concurrency=1)
        with (
            Endpoint(few, tmp_path / "a.jsonl") as model,
            pytest.raises(RunError, match="5 requests in a row"),
        ):
            list(model.map(model.ask, (say("x", seed=seed) for seed in range(100))))
        assert len(server.seen) < 20
        with Endpoint(few, tmp_path / "a.jsonl") as model:
            assert model.ask(say("x", seed=3)).text == "yes" and model.usage()["from_disk"] == 1


class Said(io.StringIO):
    """Standard error that another thread may look at (capsys loses what is written while it is read)."""

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


def test_nobody_there_is_told_at_once_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests on their way as one likes: what it ends with is the number that it waits for."""
    told = Said()
    monkeypatch.setattr(sys, "stderr", told)

    def rule(path: str, body: Body) -> Reply:
        if body["seed"] == 0 and not told.lines:  # the first to come back; the others are held up by it
            return Reply(status=503)
        answered.wait(20)
        return Reply(status=503)

    answered = threading.Event()
    with serving(rule) as server:
        many = settings(server.url, retries=1, give_up_after=5, concurrency=32, retry_seconds=0.01)
        with Endpoint(many, tmp_path / "a.jsonl") as model:
            found: list[BaseException] = []

            def ask() -> None:
                try:
                    list(model.map(model.ask, (say("x", seed=seed) for seed in range(100))))
                except RunError as error:
                    found.append(error)

            asking = threading.Thread(target=ask)
            asking.start()
            while not told.lines and asking.is_alive():
                time.sleep(0.001)
            assert not answered.is_set(), "told while all others wait"
            answered.set()
            asking.join()
        assert told.lines == [f"{server.url}: status 503; each such request is tried again, up to 1 times"]
        assert "5 requests in a row" in str(found[0])
        asked = len(server.seen)
    assert asked < 80, "requests that were not on their way are not begun"


def test_a_line_cut_short_is_asked_again_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with serving(echo) as server:
        with Endpoint(settings(server.url), path) as model:
            for seed in range(3):
                model.ask(say("x", seed=seed))
        path.write_bytes(path.read_bytes()[:-20])
        with Endpoint(settings(server.url), path) as model:
            assert [model.ask(say("x", seed=seed)).text for seed in range(3)] == [
                f"x to you too, {seed}" for seed in range(3)
            ]
            assert model.usage()["from_disk"] == 2
        assert len(server.seen) == 4
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    path.write_bytes(b"{}x\n" + path.read_bytes())
    with pytest.raises(DataError, match="damaged at byte 0"):
        Endpoint(settings(server.url), path)


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    elsewhere = settings("http://x.invalid/v1")
    with (
        Endpoint(elsewhere, tmp_path / "a.jsonl"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        Endpoint(elsewhere, tmp_path / "a.jsonl")


def test_locks_that_fail_are_not_told_as_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(stream: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", failing)
    with pytest.raises(DiskError, match=r"a\.jsonl has no file locks \(No locks available\)"):
        Endpoint(settings("http://x.invalid/v1"), tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "localhost:8000"}, "give an address"),
        ({"url": None, "model": "none"}, "no model folder none"),
    ],
)
def test_no_such_model(tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Endpoint(settings("x").model_copy(update=given), tmp_path / "a.jsonl")


def test_work_that_asks_several_times(tmp_path: Path) -> None:
    with serving(echo) as server, Endpoint(settings(server.url), tmp_path / "a.jsonl") as model:
        ask: Callable[[str, int], str] = lambda text, seed: model.ask(say(text, seed)).text  # noqa: E731
        made = list(model.map(lambda n: ask(ask(f"hi {n}", 1), 2), range(20)))
    assert made == [f"hi {n} to you too, 1 to you too, 2" for n in range(20)]
