"""Models on the Hugging Face hub, fetched into its cache; or an error that says why not.

A library that is handed an id itself asks the hub for each file again and again where there is no
network, for a minute, and then says that the file is missing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The hub's rules for names, which huggingface_hub tells only once it fetches.
_NAME = r"\b[\w.-]{1,96}\b"
_ID = re.compile(rf"(?!.*(--|\.\.))(?!.*\.git\Z){_NAME}/{_NAME}", re.ASCII)
_FULL = {errno.ENOSPC, errno.EDQUOT}
PATIENCE = 30.0  # seconds for which a hub may say nothing


class HubError(Exception):
    """A model can't be fetched: which, why, and what to do."""


def is_id(name: str) -> bool:
    """Whether `name` can be a model's id, `owner/name`. Touches no network."""
    return bool(_ID.fullmatch(name))


def fetch(
    name: str,
    revision: str | None = None,
    wanted: Sequence[str] | None = None,
    unwanted: Sequence[str] = (),
) -> Path:
    """The folder of the model `name` with its files that match a pattern of `wanted` (default:
    all) and none of `unwanted`; of what was fetched before where there is no network now.

    Raises HubError.
    """
    from huggingface_hub import get_session, snapshot_download

    hooks = get_session().event_hooks["request"]
    if _impatient not in hooks:
        hooks.append(_impatient)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if wanted is None else list(wanted),
                ignore_patterns=list(unwanted),
            )
        )
    except Exception as error:  # of its HTTP library, of Xet, of answers that are not a hub's
        told = f"revision {revision} of " * bool(revision) + name
        why, remedy = _reason(error)
        raise HubError(f"{told} can't be fetched: {why}; {remedy}") from error


def _impatient(request: Any) -> None:
    """Limits the time of a request that has no limit, as those that ask what a model consists of:
    a hub or proxy that accepts and says nothing holds for ever otherwise."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {n: PATIENCE if s is None else s for n, s in limits.items()}


def _reason(error: Exception) -> tuple[str, str]:
    """Why, and what to do."""
    from huggingface_hub import errors

    # Where nothing was fetched before, what asking the hub gave is its cause.
    not_here = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if not_here and error.__cause__ else error
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access", "ask for it on the hub, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such folder, and the hub has no such model, or it is private"
        return why, "correct it, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision", "correct it"
    if isinstance(error, errors.HFValidationError):
        return f"there is no such folder, and no id on the hub reads so ({said})", "correct it"
    if isinstance(error, OSError) and (error.filename or error.errno in _FULL):
        return f"the hub's cache can't be written ({said})", "make room, or set HF_HOME elsewhere"
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"the hub refuses it ({said})", "set HF_TOKEN to a token that may read it"
    if not_here:
        here = "there is no such folder, nor all of it among what was fetched before"
        hub = "the hub fails" if status else "the hub can't be reached"
        remedy = "fetch it where there is a network and name its folder, or set HF_ENDPOINT"
        return f"{here}, and {hub} ({said})", remedy
    why = f"the hub breaks off, or what answers is no hub ({type(error).__name__}: {said})"
    return why, "try again, or look at HF_ENDPOINT and the proxy"
