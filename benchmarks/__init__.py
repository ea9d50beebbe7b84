"""The measurements behind docs/results, each one command: ``python -m benchmarks.NAME --help``."""
