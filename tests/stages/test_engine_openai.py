from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest
from web import Request as Web_Request
from web import Web

from stages.base import Context, Failed, StageError
from stages.engines.base import Answer, EngineFailure, Request, SamplingSettings, ask
from stages.engines.openai import OpenAIEngine, chat_url, read_answer, said
from stages.recaption import Recaption, RecaptionSettings

SAMPLING = SamplingSettings(max_tokens=64, temperature=0.5, top_p=0.9)


def completion(text: str | None, finish: str = "stop", tokens: int = 5) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


def asked(request: Web_Request) -> dict[str, object]:
    return json.loads(request.body)


def prompt(request: Web_Request) -> str:
    return asked(request)["messages"][0]["content"]


def echo(request: Web_Request) -> None:
    request.reply(200, completion(f"re: {prompt(request)}"))


def engine(*urls: str, **changes: object) -> OpenAIEngine:
    settings = {
        "model": "served",
        "label": "served",
        "key": None,
        "concurrency": 8,
        "timeout": 20.0,
        "retries": 2,
        "backoff": 0.0,
        "template_args": {},
    }
    return OpenAIEngine(urls, **{**settings, **changes})


def pose(web: Web, *prompts: str, **changes: object) -> list[object]:
    return ask(engine(web.url, **changes), [Request(p, 7) for p in prompts], SAMPLING)


def test_the_request_says_what_the_settings_say() -> None:
    seen: list[dict[str, object]] = []
    headers: list[str | None] = []

    def answer(request: Web_Request) -> None:
        seen.append(asked(request))
        headers.append(request.headers.get("Authorization"))
        request.reply(200, completion("A dog.", "length", 64))

    with Web(answer) as web:
        (got,) = pose(web, "dog", key="hunter2", template_args={"enable_thinking": False})
        pose(web, "dog")
    assert got == Answer("A dog.", 64, truncated=True)
    expected = {
        "model": "served",
        "messages": [{"role": "user", "content": "dog"}],
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
    }
    assert seen == [{**expected, "chat_template_kwargs": {"enable_thinking": False}}, expected]
    assert headers == ["Bearer hunter2", None]
    assert web.requests == ["POST /v1/chat/completions"] * 2


@pytest.mark.parametrize("base", ["http://h:8000", "http://h:8000/", "http://h:8000/v1/"])
def test_an_endpoint_may_end_with_the_version(base: str) -> None:
    assert chat_url(base) == "http://h:8000/v1/chat/completions"


def test_a_schema_and_a_requests_own_temperature_go_along() -> None:
    seen: list[dict[str, object]] = []

    def answer(request: Web_Request) -> None:
        seen.append(asked(request))
        request.reply(200, completion("{}"))

    schema = {"type": "object", "properties": {"short": {"type": "string"}}}
    with Web(answer) as web:
        ask(engine(web.url), [Request("dog", 7, 0.7)], SamplingSettings(64, schema=schema))
    assert seen[0]["temperature"] == 0.7
    assert seen[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "caption", "strict": True, "schema": schema},
    }


def test_answers_stand_in_the_order_of_the_requests() -> None:
    def answer(request: Web_Request) -> None:
        time.sleep(0.05 if prompt(request).endswith("0") else 0)
        echo(request)

    prompts = [str(i) for i in range(30)]
    with Web(answer) as web:
        answers = pose(web, *prompts)
    assert [a.text for a in answers] == [f"re: {p}" for p in prompts]


def test_as_many_as_concurrency_at_once() -> None:
    now = most = 0
    lock, three = threading.Lock(), threading.Barrier(3)

    def answer(request: Web_Request) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        three.wait(20)
        with lock:
            now -= 1
        echo(request)

    with Web(answer) as web:
        answers = pose(web, *map(str, range(12)), concurrency=3)
    assert [a.text for a in answers] == [f"re: {i}" for i in range(12)]
    assert most == 3


def cut(request: Web_Request) -> None:
    request.cut(200, b'{"choices": [', 5000)


def slow(request: Web_Request) -> None:
    time.sleep(2.0)
    echo(request)


FAULTS: dict[str, tuple[Callable[[Web_Request], None], str, int]] = {
    # name: what the server does, the class of the failure, how often it is asked
    "429": (lambda r: r.reply(429, b"slow down", Retry_After="0"), "http_429", 3),
    "500": (lambda r: r.reply(500, b"<html>"), "http_500", 3),
    "400": (lambda r: r.reply(400, b'{"error": {"message": "too long"}}'), "http_400", 1),
    "401": (lambda r: r.reply(401, b'{"error": "no key"}'), "http_401", 1),
    "cut": (cut, "network", 3),
    "slow": (slow, "timeout", 3),
    "not JSON": (lambda r: r.reply(200, b"<html>"), "bad_answer", 3),
    "other JSON": (lambda r: r.reply(200, b'{"choices": []}'), "bad_answer", 3),
    "a list": (lambda r: r.reply(200, b"[]"), "bad_answer", 3),
    "nothing": (lambda r: r.reply(200, b""), "bad_answer", 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_request_and_a_passing_one_none(fault: str) -> None:
    misbehave, error, times = FAULTS[fault]
    counts: dict[str, int] = {}

    def answer(request: Web_Request) -> None:
        text = prompt(request)
        n = counts[text] = counts.get(text, 0) + 1
        if text == "doomed" or (text == "once" and n == 1 and times > 1):
            misbehave(request)
        else:
            echo(request)

    with Web(answer) as web:
        fine, doomed, once = pose(
            web, "fine", "doomed", "once", timeout=0.5 if fault == "slow" else 20.0
        )
    assert fine.text == "re: fine"
    assert once.text == "re: once"
    assert isinstance(doomed, EngineFailure)
    assert doomed.error == error
    assert counts["doomed"] == times


def test_the_servers_own_words_are_told() -> None:
    with Web(lambda r: r.reply(400, b'{"error": {"message": "prompt is\\ntoo long"}}')) as web:
        (failure,) = pose(web, "dog")
    assert failure.message.endswith("prompt is too long")
    assert said(b'{"detail": "x"}') == '{"detail": "x"}'
    assert said(b"\xff" * 900).__len__() == 300


def test_endpoints_take_turns_and_stand_in_for_each_other() -> None:
    with Web(echo) as a, Web(echo) as b:
        both = ask(engine(a.url, b.url), [Request(str(i), 0) for i in range(10)], SAMPLING)
        assert (len(a.requests), len(b.requests)) == (5, 5)
    assert all(isinstance(x, Answer) for x in both)
    with Web(echo) as alive:
        half = ask(engine(a.url, alive.url), [Request(str(i), 0) for i in range(6)], SAMPLING)
    assert [x.text for x in half] == [f"re: {i}" for i in range(6)]


def test_nobody_there_stops_the_stage_and_settles_no_row() -> None:
    with Web(echo) as web:
        url = web.url
    settings = RecaptionSettings(
        engine="openai",
        model="m",
        endpoints=[f"{url}/v1"],
        retries=1,
        backoff=0,
        prompt="{caption}",
    )
    stage = Recaption(settings, Context("/work"))
    stage.check()
    rows = [{"clip_id": str(i), "caption": "x"} for i in range(3)]
    with pytest.raises(StageError, match=r"\(engine_unreachable\): .*start it, or mend"):
        stage.process(rows, stage.setup())


def test_a_refused_key_stops_the_stage_until_it_is_taken() -> None:
    taken = False

    def answer(request: Web_Request) -> None:
        echo(request) if taken else request.reply(401, b'{"error": "no such key"}')

    requests = [Request(str(i), 0) for i in range(3)]
    with Web(answer) as web:
        made = engine(web.url)
        with pytest.raises(StageError, match=r"http_401.*no such key"):
            ask(made, requests, SAMPLING)
        taken = True
        assert [a.text for a in ask(made, requests, SAMPLING)] == ["re: 0", "re: 1", "re: 2"]


def test_a_server_that_is_down_is_not_waited_for_again() -> None:
    asked = []

    def answer(request: Web_Request) -> None:
        asked.append(1)
        request.reply(*((503, b"") if len(asked) > 3 else (404, b"no such model")))

    with Web(answer) as web:
        made = engine(web.url)
        with pytest.raises(StageError, match="no such model"):
            ask(made, [Request(str(i), 0) for i in range(3)], SAMPLING)
        (failure,) = ask(made, [Request("x", 0)], SAMPLING)
        assert (failure.error, len(asked)) == ("http_503", 4), "one try"
        ask(made, [Request("x", 0)], SAMPLING)
        assert len(asked) == 7, "it answers, if only so: three tries"


def test_an_empty_answer_fails_its_row() -> None:
    def answer(request: Web_Request) -> None:
        request.reply(200, completion(None if prompt(request) == "none" else '"A dog."'))

    with Web(answer) as web:
        settings = RecaptionSettings(
            engine="openai",
            model="m",
            endpoints=[web.url],
            prompt="{caption}",
            quality={"fallback": "keep"},
        )
        stage = Recaption(settings, Context("/work"))
        rows = [{"clip_id": c, "caption": c} for c in ("none", "dog")]
        empty, fine = stage.process(rows, stage.setup())
    assert isinstance(empty, Failed)
    assert empty.error == "empty_answer"
    assert (fine["recaption"], fine["recaption_model"]) == ("A dog.", "m")


def test_no_message_bears_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDPIPE_TEST_KEY", "hunter2")
    with Web(lambda r: r.reply(403, b"no")) as web:
        host = web.url.removeprefix("http://")
        settings = RecaptionSettings(
            engine="openai",
            model="m",
            endpoints=[f"http://user:hunter2@{host}"],
            retries=0,
        )
        stage = Recaption(settings, Context("/work"))
        with pytest.raises(StageError, match="http_403") as refused:
            stage.process([{"clip_id": "a", "caption": "x"}], stage.setup())
    assert "hunter2" not in str(refused.value)


def test_a_server_may_leave_out_the_usage() -> None:
    assert read_answer(b'{"choices": [{"message": {"content": "x"}}]}') == Answer("x", None, False)
