"""Errors that end a run, by who can mend them. Those of a layer stand in that layer."""


class RunError(Exception):
    """The run as a whole failed (not a row, not a unit); the message says why and what to do."""
