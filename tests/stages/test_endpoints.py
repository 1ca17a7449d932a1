"""The openai engine against servers that misbehave, and the rules by which it picks them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from moody import FAULTS, Moody, at_random
from web import Request as Web_Request
from web import Web

from stages.base import StageError
from stages.engines.base import Answer, EngineFailure, Request, Result, SamplingSettings, ask
from stages.engines.endpoints import MISSES, ROUND, START, Endpoint
from stages.engines.openai import OpenAIEngine

SAMPLING = SamplingSettings(max_tokens=64)
RETRIES = 4


@pytest.fixture
def engines() -> Iterator[list[OpenAIEngine]]:
    """Closed at the end."""
    made: list[OpenAIEngine] = []
    yield made
    for engine in made:
        engine.close()


def engine(made: list[OpenAIEngine], *servers: Moody, **changes: object) -> OpenAIEngine:
    settings = {
        "model": "served",
        "label": "served",
        "key": None,
        "concurrency": 64,
        "timeout": 0.3,
        "retries": RETRIES,
        "backoff": 0.01,
        "template_args": {},
    }
    made.append(OpenAIEngine([s.url for s in servers], **{**settings, **changes}))
    return made[-1]


def prompts(n: int) -> list[Request]:
    return [Request(f"clip {i}", i) for i in range(n)]


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("servers", [1, 2])
def test_every_clip_has_a_caption_or_a_reason(servers: int, engines: list[OpenAIEngine]) -> None:
    a = Moody(at_random(0.3, 1), delay=0.005, patience=3.0, retry_ms=5)
    b = Moody(at_random(0.3, 2), delay=0.005, patience=3.0, retry_ms=5)
    with a, b:
        # Long enough that the server has read, and counted, what is given up.
        made = engine(engines, *(a, b)[:servers], timeout=1.0)
        results = ask(made, prompts(300), SAMPLING)
    asked = a.asked + b.asked
    assert set(a.met) == {*FAULTS, "none"}
    assert max(asked.values()) <= 1 + RETRIES
    for number, result in enumerate(results):
        if isinstance(result, Answer):
            assert result == Answer(f"re: clip {number}", 5, False, 20, 12)
        else:
            assert asked[f"clip {number}"] == 1 + RETRIES
    assert sum(isinstance(r, Answer) for r in results) >= 290


def test_an_endpoint_that_dies_and_comes_back(engines: list[OpenAIEngine]) -> None:
    with Moody(delay=0.01) as a, Moody(delay=0.01) as b:
        made = engine(engines, a, b, concurrency=4)
        seen: list[Result] = []
        while_dead = 0
        for _, result in made.stream(iter(enumerate(prompts(400))), SAMPLING):
            seen.append(result)
            if len(seen) == 100:
                b.close()
                while_dead = b.asked.total()
            if len(seen) == 200:
                assert b.asked.total() == while_dead
                b.open()
        assert b.asked.total() > while_dead + 20, "it works again"
    assert len(seen) == 400
    assert all(isinstance(r, Answer) for r in seen)
    assert max((a.asked + b.asked).values()) <= 2, "what b had when it died is asked at a"


def test_the_only_server_may_restart(engines: list[OpenAIEngine]) -> None:
    with Moody(delay=0.01) as server:
        made = engine(engines, server, concurrency=4, backoff=0.1)
        count = 0
        for _, result in made.stream(iter(enumerate(prompts(60))), SAMPLING):
            count += 1
            assert isinstance(result, Answer)
            if count == 20:
                server.close()
                threading.Timer(0.2, server.open).start()
    assert count == 60


def test_where_the_only_server_dies_what_was_answered_stands(engines: list[OpenAIEngine]) -> None:
    with Moody(delay=0.01) as server:
        made = engine(engines, server, concurrency=4, retries=1)
        numbers: list[int] = []
        with pytest.raises(StageError, match=r"\(engine_unreachable\).*No row is settled by that"):
            for number, result in made.stream(iter(enumerate(prompts(100))), SAMPLING):
                assert isinstance(result, Answer)
                numbers.append(number)
                if len(numbers) == 30:
                    server.close()
        assert 30 <= len(numbers) < 40
        server.open()
        rest = [r for i, r in enumerate(prompts(100)) if i not in numbers]
        assert len(ask(made, rest, SAMPLING)) == len(rest), "and it is asked again"


def test_a_broken_endpoint_is_set_aside(engines: list[OpenAIEngine]) -> None:
    with Moody(lambda prompt, nth: "500") as broken, Moody(delay=0.002) as fine:
        made = engine(engines, broken, fine, backoff=5.0)
        results = ask(made, prompts(300), SAMPLING)
    assert all(isinstance(r, Answer) for r in results)
    assert MISSES <= broken.asked.total() <= MISSES + START


def test_an_endpoint_that_refuses_the_key_is_set_aside(engines: list[OpenAIEngine]) -> None:
    def refuse(request: Web_Request) -> None:
        request.reply(401, b'{"error": "no such key"}')

    with Web(refuse) as other, Moody() as fine:
        made = OpenAIEngine(
            (other.url, fine.url), "m", "m", None, 64, 5.0, RETRIES, 5.0, template_args={}
        )
        engines.append(made)
        results = ask(made, prompts(200), SAMPLING)
        assert all(isinstance(r, Answer) for r in results)
        assert len(other.requests) <= MISSES + START


def test_only_few_are_taken_ahead_of_the_server(engines: list[OpenAIEngine]) -> None:
    taken: list[int] = []

    def requests() -> Iterator[tuple[int, Request]]:
        for number, request in enumerate(prompts(200)):
            taken.append(number)
            yield number, request

    with Moody(delay=0.001) as server:
        made, done = engine(engines, server, concurrency=4), 0
        for _ in made.stream(requests(), SAMPLING):
            done += 1
            assert len(taken) - done <= 6
        assert (done, server.most) == (200, 4)


def test_more_may_come_of_an_answer(engines: list[OpenAIEngine]) -> None:
    later: list[tuple[int, Request]] = []

    def requests() -> Iterator[tuple[int, Request] | None]:
        yield from enumerate(prompts(5))
        while len(results) < 10:
            yield later.pop() if later else None

    results: dict[int, Result] = {}
    with Moody() as server:
        for number, result in engine(engines, server).stream(requests(), SAMPLING):
            results[number] = result
            if number < 5:
                later.append((number + 5, Request("again", 0)))
    assert sorted(results) == list(range(10))


def test_one_connection_serves_many_streams(engines: list[OpenAIEngine]) -> None:
    with Moody() as server:
        made = engine(engines, server, concurrency=1)
        for _ in range(3):
            ask(made, prompts(3), SAMPLING)
        session = made._session
        made.close()
    assert session.closed
    made.close()


# ---------------------------------------------------------------------------- rules


def fault(error: str) -> EngineFailure:
    return EngineFailure(error, "no")


def endpoint(most: int = 64, patience: int = 4) -> Endpoint:
    return Endpoint("http://h", most, 1.0, patience, lambda text: None)


def rounds(one: Endpoint, faults: str, answers: int) -> None:
    """So many tries: `faults` (one letter each: o is overloaded, n is not), and answers."""
    tries = [one.begin() for _ in range(len(faults) + answers)]
    for letter in faults:
        error = "http_429" if letter == "o" else "bad_answer"
        one.failed(tries.pop(), fault(error), None, 0.0)
    for each in tries:
        one.answered(each)
    one.flying = 0


def test_the_limit_doubles_until_it_is_too_much_and_then_grows_by_one() -> None:
    one = endpoint()
    seen = [one.limit]
    for faults in ("", "", "o" * 17, "", "o" * 8, "n" * 9, "o" * 9):
        rounds(one, faults, ROUND - faults.count("o"))
        seen.append(one.limit)
    assert seen == [8, 16, 32, 16, 17, 18, 19, 17]


def test_answers_of_an_earlier_round_do_not_count() -> None:
    one = endpoint()
    late = [one.begin() for _ in range(ROUND)]
    rounds(one, "o" * ROUND, 0)
    assert one.limit == 4
    for each in late:
        one.failed(each, fault("http_429"), None, 0.0)
    assert one.limit == 4


def test_retry_after_holds_for_the_endpoint() -> None:
    one = endpoint()
    one.failed(one.begin(), fault("http_429"), 7.0, now=100.0)
    assert not one.free(106.9)
    assert one.free(107.1)


def test_one_that_is_set_aside_gets_one_request_at_a_time() -> None:
    one = endpoint(patience=2)
    gone = [one.begin() for _ in range(5)]
    for each in gone:
        one.failed(each, fault("engine_unreachable"), None, now=100.0)
    one.flying = 0
    assert (one.asides, one.free(100.4), one.free(101.6)) == (1, False, True)
    probe = one.begin()
    assert not one.free(200.0)
    one.failed(probe, fault("engine_unreachable"), None, now=200.0)
    one.flying = 0
    assert (one.asides, one.free(200.9), one.given_up) == (2, False, False)
    one.failed(one.begin(), fault("engine_unreachable"), None, now=300.0)
    assert one.given_up
    one.flying = 0
    one.once_more()
    assert one.free(300.0)
    one.answered(one.begin())
    assert (one.asides, one.limit) == (0, START)
