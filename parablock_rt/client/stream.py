"""Batches for as long as a run lasts: a loader's, epoch after epoch.

Takes no steps itself, and knows of a run only whether it is over and how many steps it has taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from parablock_rt.errors import ConfigError, ParaBlockError

_MOST_SKIPPED = 10  # raises after this many times `accumulate` batches in a row without a step

Batch = TypeVar("Batch")


def stream(
    loader: Iterable[Batch], *, is_over: Callable[[], bool], steps_taken: Callable[[], int], accumulate: int
) -> Iterator[Batch]:
    """Yields the loader's batches, until the run is over; see `Run.stream`.

    Raises:
        ConfigError: `accumulate` is below 1; the loader is empty, or can be iterated only once and is exhausted.
        ParaBlockError: `10 * accumulate` batches in a row without a step; what `steps_taken` raises.
    """
    if accumulate < 1:
        raise ConfigError(f"expected accumulate to be at least 1 batch per step, found {accumulate}")
    seen, without_step = 0, 0
    while not is_over():
        before = seen
        for batch in loader:
            seen += 1
            steps_before = steps_taken()
            yield batch
            if is_over():
                return
            without_step = without_step + 1 if steps_taken() == steps_before else 0
            if without_step == _MOST_SKIPPED * accumulate:
                raise ParaBlockError(
                    f"{without_step} of run.stream's batches in a row were used without run.train_step or "
                    "run.step; take one step per batch, or pass accumulate to run.stream"
                )
        if seen == before:
            raise ConfigError(
                f"the loader gave no batch after {seen}: it is empty, or it can be iterated only once; pass a "
                "loader that can be iterated again, such as a DataLoader, or an endless iterator"
            )
