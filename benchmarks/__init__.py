"""Measurements that go into docs/results; each is run as ``python -m benchmarks.NAME``."""
