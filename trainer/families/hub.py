"""Models on the Hugging Face hub, fetched into its cache: at once, or an error that says why not.

diffusers by itself asks for each file again and again where there is no network, for a minute, and
then says that the file is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config import SettingsError


def local(path: str) -> Path | None:
    """The folder that `path` names; None where it is an id on the hub. Raises SettingsError where
    it can be neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise SettingsError(
            f"train.model.path: there is no folder {path}, and a hub id reads owner/name"
        )
    return None


def fetch(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a model on the hub with the files of `patterns`, of what was fetched before
    where there is no network now. Raises SettingsError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    told = f"revision {revision} of " * bool(revision) + path
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*.fp16.*", "*.bf16.*", "*.non_ema.*"],  # of the same weights
            )
        )
    except GatedRepoError as error:
        why, remedy = "its owner grants access", "ask for it on the hub, then set HF_TOKEN"
        cause: Exception = error
    except RepositoryNotFoundError as error:
        why, remedy = "the hub has no such model, or it is private", "check the id, or set HF_TOKEN"
        cause = error
    except RevisionNotFoundError as error:
        why, remedy, cause = "there is no such revision", "check train.model.revision", error
    except HFValidationError as error:
        why = f"there is no such folder, and no id on the hub reads so ({error})"
        remedy, cause = "correct it", error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        why = f"it was not fetched before, and the hub can't be reached ({first[0]})"
        remedy = "fetch it where there is a network and name its folder, or set HF_ENDPOINT"
        cause = error
    raise SettingsError(f"train.model.path: {told} can't be fetched: {why}; {remedy}") from cause
