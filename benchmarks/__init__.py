"""The figures of docs/measurements.md: `python -m benchmarks.NAME`, for programs with --json."""
