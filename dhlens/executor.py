"""Who runs the episodes: this process, or several.

One seam: an `Executor` takes a job and the indices that are left, and yields as many as have just been done. Results
travel through shards on disk, never through the executor, so a cluster scheduler can take its place without a change
above it. Each episode's numbers are independent of who runs it, up to the rounding of other thread counts.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

Job = Callable[[Sequence[int]], Iterable[int]]
"""Does the episodes at these indices and yields each index once its shard is saved."""


@runtime_checkable
class Executor(Protocol):
    """Runs a job over batches of indices that belong together (one haystack window)."""

    def __call__(self, job: Job, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yield the number of episodes done since the last time, at least 0."""
        ...


def serial(job: Job, batches: Sequence[Sequence[int]]) -> Iterator[int]:
    """All batches here, in order."""
    for _ in job([i for batch in batches for i in batch]):
        yield 1


@dataclass(frozen=True)
class Processes:
    """`n` processes on this machine, each with its own model and an even share of the cores.

    Raises:
        ValueError: `n` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"there must be at least 1 process, got {self.n}")

    def __call__(self, job: Job, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """See `Executor`; the job is pickled to the processes."""
        shares = [[i for batch in batches[k :: self.n] for i in batch] for k in range(self.n)]
        shares = [share for share in shares if share]
        # spawn: a fork would inherit torch's thread pool in an unknown state
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // self.n)
        with context.Manager() as manager, ProcessPoolExecutor(len(shares), mp_context=context) as pool:
            done = manager.Queue()
            pending = {pool.submit(_work, job, share, done, threads) for share in shares}
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                yield sum(done.get() for _ in range(done.qsize()))
                for future in finished:
                    future.result()


def _work(job: Job, share: Sequence[int], done: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    for _ in job(share):
        done.put(1)
