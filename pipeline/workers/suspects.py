"""Which clip of a unit kills its workers: found by splitting what was in flight when one died."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.workers.watch import Verdict

GROUPS = 8
# A clip that dies alone is given up after so many deaths, those in company counted in.
DEATHS = 3


@dataclass(frozen=True)
class Death:
    """How a worker's process ended. `code` is negative for a signal, as of `subprocess`."""

    code: int
    silent: float | None = None  # seconds without a sign of life, for which it was ended

    @property
    def how(self) -> str:
        if self.silent is not None:
            return f"gave no sign of life for {self.silent:g} s"
        if self.code >= 0:
            return f"left with exit code {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = f"signal {-self.code}"
        return f"was killed by {name}"

    def verdict(self, stage: str, attempts: int) -> Verdict:
        if self.silent is not None:
            return Verdict(
                "time_limit",
                f"no sign of life for {self.silent:g} s in {attempts} attempts, the last one "
                f"alone: raise time_limit of {stage} if such clips need longer",
                attempts,
            )
        memory = ", most often the kernel's memory killer" if self.code == -signal.SIGKILL else ""
        return Verdict(
            "killed_worker",
            f"its worker {self.how}{memory} in {attempts} attempts, the last one alone",
            attempts,
        )


@dataclass
class Suspects:
    """What the deaths in one unit have shown so far."""

    deaths: dict[str, int] = field(default_factory=dict)
    apart: list[list[str]] = field(default_factory=list)
    condemned: dict[str, Verdict] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        return bool(self.apart or self.condemned)

    def died(self, stage: str, ids: Sequence[str], death: Death) -> None:
        """A worker died on `ids`, which are one batch. Alone, a clip is condemned once it has been
        in enough deaths; a batch is split, down to single clips."""
        for clip in ids:
            self.deaths[clip] = self.deaths.get(clip, 0) + 1
        gone = set(ids)
        self.apart = [rest for g in self.apart if (rest := [c for c in g if c not in gone])]
        if len(ids) > 1:
            n = min(GROUPS, len(ids))
            self.apart += [list(ids[i * len(ids) // n : (i + 1) * len(ids) // n]) for i in range(n)]
        elif self.deaths[ids[0]] >= DEATHS:
            self.condemned[ids[0]] = death.verdict(stage, self.deaths[ids[0]])
        else:
            self.apart.append(list(ids))
