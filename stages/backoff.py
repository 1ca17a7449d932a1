"""How long to wait before something is tried again: one rule for files and for captions."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 120.0  # seconds between two tries, whatever a server asks for
_DOUBLINGS = 20


def pause(first: float, tries: int, asked: float | None = None) -> float:
    """Seconds to wait after so many tries: `first` after one, doubled with each, give or take a
    half, so that those who failed together don't come back together; at least what the server
    `asked` for, at most LONGEST_WAIT."""
    wait = first * 2.0 ** min(tries - 1, _DOUBLINGS) * random.uniform(0.5, 1.5)
    return min(LONGEST_WAIT, max(wait, asked or 0.0))


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None: not given."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
