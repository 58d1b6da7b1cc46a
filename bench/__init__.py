"""Benchmarks: `parablock bench NAME`, `python -m bench.NAME` in a checkout, `pytest bench --benchmark-only`.

Installed as `parablock_rt.bench`. Benchmarks only measure; the tests check that results are right. `result.py` defines
the functions of a benchmark's module.
"""
