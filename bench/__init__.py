"""Benchmarks: `parablock bench NAME`, `python -m bench.NAME` in a checkout, `pytest bench --benchmark-only`.

Installed as `parablock_rt.bench`. Each measures and says nothing of whether what it measures is right: that is the
business of the tests. `result.py` says what a benchmark's module offers.
"""
