"""Benchmarks. Each is a script (`python -m bench.codec --json FILE`) and a pytest-benchmark module."""
