"""Orchestration: configuration, the plan, the unit, the runners and the command line."""
