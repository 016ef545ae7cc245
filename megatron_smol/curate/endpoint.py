"""The one client for language models: any OpenAI-compatible endpoint, or a Hugging Face model on this machine.

    with Endpoint(settings, Path("answers.jsonl")) as model:
        answer = model.ask(chat([{"role": "user", "content": "Hi"}], temperature=0.8, seed=7))
        for answer in model.map(model.ask, requests):         # at once, answers in the order of the requests
            text = answer.text if isinstance(answer, Answer) else None      # else Failed, with its reason
        print(model.usage())                                  # requests, tokens, dollars, retries, failures

Every answer is on the disk before it is used, under a key of model and request (seed included), so that a run that is
killed and given again pays only for what had not been answered. A request that keeps failing (time-out, 429, 5xx, an
answer that makes no sense) is a `Failed`, never an exception: the caller counts it. What no retry can mend (wrong
address, key or model name; nothing answers at all) raises.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field

from megatron_smol.curate.answers import AnswerFile
from megatron_smol.errors import RunError, UserError

CHAT, COMPLETION = "chat/completions", "completions"
_LONGEST_PAUSE_SECONDS = 60.0
Given = TypeVar("Given")
Made = TypeVar("Made")


class EndpointSettings(BaseModel):
    """Where the model is, and how hard to ask it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(description="its name at the endpoint; without `url`, a Hugging Face model folder")
    url: str | None = Field(
        None, description="address up to /v1, such as http://localhost:8000/v1; absent: `model` runs here"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable of the key; unset: none is sent"
    )
    concurrency: int = Field(8, ge=1, description="requests at once")
    timeout_seconds: float = Field(120.0, gt=0, description="wait for an answer")
    retries: int = Field(5, ge=0, description="after time-outs, 408, 429, 5xx and answers that make no sense")
    retry_seconds: float = Field(1.0, ge=0, description="first pause; doubles each time, up to 60 s")
    give_up_after: int = Field(
        32, ge=1, description="requests that failed in a row until the run stops: nobody is there"
    )
    dollars_per_million_prompt_tokens: float = Field(0.0, ge=0)
    dollars_per_million_completion_tokens: float = Field(0.0, ge=0)


class Request(NamedTuple):
    """path: CHAT or COMPLETION. payload: the body of the request, without the model's name."""

    path: str
    payload: dict[str, Any]


class Answer(NamedTuple):
    """finish_reason: "stop", or "length" for a text that was cut off."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Failed(NamedTuple):
    """A request without an answer. reason: one of a few words, to count by ("timed out", "status 500")."""

    reason: str


def chat(messages: list[dict[str, str]], **sampling: Any) -> Request:
    """Of a chat model; sampling: temperature, top_p, max_tokens, seed, ... as the API names them."""
    return Request(CHAT, {"messages": messages} | sampling)


def completion(prompt: str, **sampling: Any) -> Request:
    """Of plain text, nothing put around it; sampling as in `chat`."""
    return Request(COMPLETION, {"prompt": prompt} | sampling)


class Unusable(Exception):
    """A transport's word for one failed attempt. `again`: worth a retry; `pause_seconds`: as the server asked."""

    def __init__(self, reason: str, again: bool = True, pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.again, self.pause_seconds = reason, again, pause_seconds


class Endpoint:
    """A model with its answers on the disk; safe to use from many threads. One process a file of answers."""

    def __init__(self, settings: EndpointSettings, answers: Path) -> None:
        self.settings = settings
        self._send = _transport(settings)
        self._answers = AnswerFile(answers)
        self._lock = threading.Lock()
        self._asking: dict[bytes, Future[Answer | Failed]] = {}
        self._from_disk = self._failed_in_a_row = 0
        self._has_told = False
        self._useless: str | None = None  # why asking on is, once it is
        self._stop = threading.Event()  # set together with it: nobody waits for the next try

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()

    def ask(self, request: Request) -> Answer | Failed:
        """The answer, from the disk when there is one. Raises UserError or RunError when asking on is useless."""
        key = _key(self.settings.model, request)
        with self._lock:
            if record := self._answers.find(key):
                self._from_disk += 1
                return Answer(**record)
            asked = self._asking.get(key)
            if mine := asked is None:
                asked = self._asking[key] = Future()
        assert asked is not None
        if not mine:
            return asked.result()  # the same request is on its way: it is paid once
        try:
            asked.set_result(self._ask(key, request))
        except BaseException as error:
            asked.set_exception(error)
        finally:
            del self._asking[key]
        return asked.result()

    def map(self, work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """`work` on each item in `concurrency` threads, results in order; it may ask several times."""
        waiting: deque[Future[Made]] = deque()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(work, item))
                    if len(waiting) >= 4 * self.settings.concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def usage(self) -> dict[str, Any]:
        """What was paid, in this run and those before it with the same file; `from_disk`: this run's only."""
        sums = self._answers.sums
        prompt, made = sums["prompt_tokens"], sums["completion_tokens"]
        settings = self.settings
        dollars = prompt * settings.dollars_per_million_prompt_tokens
        dollars += made * settings.dollars_per_million_completion_tokens
        return {
            "answers": sums["answers"],
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "dollars": round(dollars / 1e6, 6),
            "from_disk": self._from_disk,
            "retried": dict(self._answers.retried),
            "failed": dict(self._answers.failed),
        }

    def _ask(self, key: bytes, request: Request) -> Answer | Failed:
        settings = self.settings
        for attempt in range(settings.retries + 1):
            if self._useless is not None:
                raise RunError(self._useless)
            try:
                answer = self._send(request)
            except Unusable as error:
                self._tell_first(error)
                if not error.again or attempt == settings.retries:
                    return self._fail(error.reason)
                self._answers.note("retried", error.reason)
                pause = settings.retry_seconds * 2**attempt * (1 + random.random() / 4)
                self._stop.wait(min(_LONGEST_PAUSE_SECONDS, max(pause, error.pause_seconds or 0.0)))
            else:
                self._answers.add(key, answer._asdict())
                self._failed_in_a_row = 0
                return answer
        raise AssertionError("unreachable")

    def _tell_first(self, error: Unusable) -> None:
        """At once: with pauses between the tries, it takes a minute or more until requests count as failed."""
        with self._lock:
            if self._has_told:
                return
            self._has_told = True
        tries = f"is tried again, up to {self.settings.retries} times" if error.again else "counts as failed"
        print(f"{self._where}: {error.reason}; each such request {tries}", file=sys.stderr, flush=True)

    def _fail(self, reason: str) -> Failed:
        self._answers.note("failed", reason)
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self.settings.give_up_after and self._useless is None:
                self._useless = (
                    f"{self._failed_in_a_row} requests in a row to {self._where} failed, the last one: {reason}; see that "
                    "the endpoint works, then give the same command again: what was answered stays"
                )
                self._stop.set()
        if self._useless is not None:
            raise RunError(self._useless)
        return Failed(reason)

    @property
    def _where(self) -> str:
        return self.settings.url or self.settings.model


def _key(model: str, request: Request) -> bytes:
    """Not of the address: the same model may be served elsewhere tomorrow."""
    wanted = [model, request.path, request.payload]
    return hashlib.sha256(orjson.dumps(wanted, option=orjson.OPT_SORT_KEYS)).digest()


# --- transports ----------------------------------------------------------------------------------------------


def _transport(settings: EndpointSettings) -> Callable[[Request], Answer]:
    if settings.url is not None:
        return _Http(settings)
    from megatron_smol.curate.local_model import LocalModel

    return LocalModel(Path(settings.model))


@dataclass
class _Http:
    settings: EndpointSettings

    def __post_init__(self) -> None:
        if not (self.settings.url or "").startswith(("http://", "https://")):
            raise UserError(f"url is '{self.settings.url}'; give an address such as http://localhost:8000/v1")
        self._of_thread = threading.local()
        key = os.environ.get(self.settings.key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def __call__(self, request: Request) -> Answer:
        import requests

        if not hasattr(self._of_thread, "session"):  # requests' sessions are not for sharing
            self._of_thread.session = requests.Session()
        try:
            response = self._of_thread.session.post(
                f"{(self.settings.url or '').rstrip('/')}/{request.path}",
                json={"model": self.settings.model} | request.payload,
                headers=self._headers,
                timeout=self.settings.timeout_seconds,
            )
        except requests.Timeout:
            raise Unusable("timed out") from None
        except requests.RequestException as error:
            raise Unusable(f"no connection ({type(error).__name__})") from None
        if response.status_code != 200:
            self._explain(response)
        return _answer(response.content)

    def _explain(self, response: Any) -> None:
        status = response.status_code
        said = " ".join(response.text.split())[:200]
        if status in (401, 403):
            raise UserError(
                f"{self.settings.url} refuses the key (status {status}: {said}); put a valid one into the environment "
                f"variable {self.settings.key_variable}"
            )
        if status == 404:
            raise UserError(
                f"{self.settings.url} knows no model '{self.settings.model}', or it is no OpenAI-compatible address (status "
                f"404: {said}); mend `url` or `model`"
            )
        raise Unusable(f"status {status}", status in (408, 429) or status >= 500, _asked_pause(response))


def _asked_pause(response: Any) -> float | None:
    try:
        return float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None


def _answer(body: bytes) -> Answer:
    """The first choice of a response; Unusable for anything that holds no text."""
    try:
        response = orjson.loads(body)
        choice = response["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = response.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Unusable("no answer in the response") from None
    if not isinstance(text, str):
        raise Unusable("no answer in the response")
    return Answer(text, str(choice.get("finish_reason") or "stop"), *counts)
