"""The records of scans: which units count, and which source the rows in a workdir are of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

from manifests.redact import split_secret
from manifests.schema import digest
from manifests.sources import SourceSettings
from manifests.store import Store, StoreError

SCANS = "source/scans"
_SPEED = {"watch"}  # settings that change no row
_PLACES = {"path", "root", "videos"}


@dataclass(frozen=True)
class Scan:
    """What reading the source once came to."""

    signature: str  # of the source and how it is read: equal means that nothing can have changed
    rows: int
    new: int
    changed: int
    gone: int
    units: list[str] = field(default_factory=list)  # the new ones
    secrets: int = 0  # rows whose URI holds some: they are in `manifests.credentials`
    source: str = ""  # which source that is, whatever is in it now; records of before have none
    path: str = ""  # of the source, without secrets


def scans(store: Store) -> list[Scan]:
    """Every scan so far, in order. Raises StoreError for a damaged record."""
    found: list[Scan] = []
    for name in store.find(SCANS):
        if not name.endswith(".json"):
            continue  # what a crash left of a record that was being written
        if not name.endswith(f"/{len(found):06d}.json"):
            raise StoreError(
                f"{store.path(SCANS)} has no record {len(found):06d}: "
                "`vidpipe verify --repair` has the source read anew"
            )
        try:
            found.append(Scan(**json.loads(store.read(name))))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{store.path(name)} is no record of a scan any more ({error}): "
                "`vidpipe verify --repair` has the source read anew"
            ) from error
    return found


def last_scan(store: Store) -> Scan | None:
    return next(reversed(scans(store)), None)


def pool_units(store: Store) -> set[str]:
    """The units that count: those that a scan's record names."""
    return {unit for scan in scans(store) for unit in scan.units}


def which(written: SourceSettings) -> tuple[str, str]:
    """Which source that is and how it is read, as a digest, and its path without secrets.

    `written` has paths as the configuration has them: a project may be elsewhere, or mounted
    elsewhere, where it is trained.
    """
    told = written.model_dump(mode="json", exclude=_SPEED, exclude_defaults=True)
    for name in _PLACES & told.keys():
        place = told[name]
        told[name] = split_secret(place)[0] if "://" in place else os.path.normpath(place)
    return digest(told), told["path"]
