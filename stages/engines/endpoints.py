"""Which server gets the next request, and how many at once each gets.

An endpoint's limit adapts as TCP's does (RFC 5681): doubled with each round that goes well until
the first that does not, then one more a round; halved where most of a round's answers say that it
is too much (429, time-outs, 5xx), an eighth less where over a quarter do. Fewer are noise, which
fewer requests would not lessen. One that is not there, or has not answered for long, is set aside,
and tried with a single request from time to time until it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from stages.backoff import LONGEST_WAIT, pause
from stages.engines.base import EngineFailure

START = 8  # requests at once, at first
ROUND = 32  # answers that make a round, at least: of fewer, chance says too much
MANY, TOO_MANY = 1 / 4, 1 / 2  # of a round
MISSES = 10  # faults in a row after which an endpoint is set aside
ABSENT = "engine_unreachable"
# What all requests meet alike: a key or a model that it does not know.
REFUSED = ("bad_url", "http_401", "http_403", "http_404")
_OVERLOADED = ("timeout", "http_408", "http_425", "http_429")


@dataclass(frozen=True)
class Try:
    """One request to an endpoint, and when, in the endpoint's own counting, it began."""

    endpoint: Endpoint
    round: int
    era: int


class Endpoint:
    """`most`: requests at once; `backoff`: seconds that it is set aside at first; `patience`: times
    in a row that it may be set aside before it is given up."""

    def __init__(
        self,
        url: str,
        most: int,
        backoff: float,
        patience: int,
        told: Callable[[str], None],
    ) -> None:
        self.url = url
        self.limit = min(most, START)
        self.until = 0.0  # it gets nothing before
        self.flying = 0
        self.asides = 0  # in a row
        self._most, self._backoff, self._patience = most, backoff, patience
        self._told = told
        self.fault: EngineFailure | None = None  # the last one
        self._doubling = True
        self._round = self._answers = self._overloads = 0
        self._era = self._misses = 0
        self._refused = False  # the last fault

    @property
    def given_up(self) -> bool:
        return self.asides > self._patience or (self.asides > 0 and self._refused)

    def free(self, now: float) -> bool:
        """Whether it may get another request."""
        return now >= self.until and self.flying < (1 if self.asides else self.limit)

    def sound(self, now: float) -> bool:
        """Whether it may get another request, once it has a place."""
        return now >= self.until and not self.asides

    def once_more(self) -> None:
        """One that was given up may be tried with one request."""
        if self.given_up:
            self.asides, self.until, self._refused = self._patience, 0.0, False

    def begin(self) -> Try:
        self.flying += 1
        return Try(self, self._round, self._era)

    def answered(self, one: Try) -> None:
        if self.asides:
            self._told("answers again")
        self._misses = self.asides = 0
        self._refused = False
        self._count(one, False)

    def failed(self, one: Try, fault: EngineFailure, wait: float | None, now: float) -> None:
        """`wait`: seconds that the server asked for."""
        self.fault, error = fault, fault.error
        if error in _OVERLOADED or error.startswith("http_5"):
            self._count(one, True)
        if wait is not None:
            self.until = max(self.until, now + min(LONGEST_WAIT, wait))
        if error == "http_429":  # it is there, and says so
            return
        self._misses += 1
        if one.era < self._era:
            return  # it was begun before the endpoint was set aside
        self._refused = error in REFUSED
        if error == ABSENT or self._misses >= MISSES or self.asides:
            self._era += 1
            self.asides += 1
            self.until = max(self.until, now + pause(self._backoff, self.asides))
            self.limit, self._doubling = min(self._most, START), True
            self._renew()
            if self.asides == 1:
                self._told(f"does not answer ({error}), and is set aside")

    def _count(self, one: Try, overloaded: bool) -> None:
        if one.round < self._round:
            return  # it was begun under another limit
        self._answers += 1
        self._overloads += overloaded
        if self._answers < max(ROUND, self.limit):
            return
        share = self._overloads / self._answers
        if share > MANY:
            less = self.limit // (2 if share > TOO_MANY else 8)
            self.limit, self._doubling = max(1, self.limit - max(1, less)), False
        else:
            more = self.limit if self._doubling else 1
            self.limit = min(self._most, self.limit + more)
        self._renew()

    def _renew(self) -> None:
        self._round += 1
        self._answers = self._overloads = 0


class Nobody(Exception):
    """No endpoint takes a request."""


class Endpoints:
    """Hands out places at endpoints, in turn. Its coroutines run in one event loop."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.all = tuple(endpoints)
        self._turn = 0
        # No asyncio.Condition: cancelled while it is waited for, its lock may stay locked (3.11).
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def room(self) -> int:
        """Requests that they take at once."""
        return sum(1 if e.asides else e.limit for e in self.all)

    def another(self, than: Collection[Endpoint]) -> bool:
        """Whether there is another one that is at work."""
        now = time.monotonic()
        return any(e.sound(now) for e in self.all if e not in than)

    @property
    def given_up(self) -> bool:
        return all(e.given_up for e in self.all)

    async def place(self, tried: Collection[Endpoint], barred: Collection[Endpoint]) -> Try:
        """Waits for a place: at one of `tried` only where no other is at work, at one of `barred`
        never. Raises Nobody where there is none to be hoped for."""
        while True:
            open_ = [e for e in self._in_turn() if e not in barred]
            if not open_ or self.given_up:
                raise Nobody
            now = time.monotonic()
            others = [e for e in open_ if e not in tried]
            if any(e.sound(now) for e in others):
                open_ = others
            chosen = next((e for e in open_ if e.free(now)), None)
            if chosen is not None:
                self._turn = self.all.index(chosen) + 1
                return chosen.begin()
            later = [e.until - now for e in open_ if e.until > now]
            change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(change)
            try:
                await asyncio.wait([change], timeout=min(later, default=None))
            finally:
                self._waiting.discard(change)

    def leave(self, one: Try) -> None:
        """The place is free again, and what is known of its endpoint may have changed."""
        one.endpoint.flying -= 1
        for change in self._waiting:
            if not change.done():
                change.set_result(None)

    def _in_turn(self) -> tuple[Endpoint, ...]:
        start = self._turn % len(self.all)
        return self.all[start:] + self.all[:start]
