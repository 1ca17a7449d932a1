"""The stages that ship with vidpipe: one file each, found by `builtin`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from stages.base import Stage


def builtin() -> dict[str, type[Stage[Any, Any]]]:
    """Every stage class of this package by name. A new stage is a new file, and nothing else."""
    found: dict[str, type[Stage[Any, Any]]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.ispkg:
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Stage)
                and value.__module__ == module.__name__
                and hasattr(value, "name")
            ):
                found[value.name] = value
    return found
