"""Batches as a function of the step."""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

AHEAD = 2  # batches that a thread prepares meanwhile; changes none of them


@runtime_checkable
class Dataset(Protocol):
    """A finite collection that returns whole batches."""

    def __len__(self) -> int: ...

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        """Return the samples of `indices`, stacked; all that is random about them is from `rng`.

        May be called from another thread, one call at a time.
        """


class Batches:
    """The batch of any step, as a pure function of (seed, step).

    Each epoch is a fresh permutation of the dataset, cut into batches. What does not fill a last
    batch is dropped in that epoch: never repeated, and another remainder each time. With `kinds`,
    all samples of a batch are of one kind, and the rule holds for each kind.

    Args:
        dataset: The samples.
        batch_size: Samples per batch.
        seed: Of the order and of the random choices within samples.
        kinds: A number per sample; only samples of the same number share a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        kinds: Int[np.ndarray, " samples"] | None = None,
    ) -> None:
        self._kinds = np.zeros(len(dataset), np.int64) if kinds is None else kinds
        counts = np.unique_counts(self._kinds).counts
        self.batches_per_epoch = int((counts // batch_size).sum())
        self.left_out = int(counts[counts < batch_size].sum())
        """Samples of kinds that never fill a batch."""
        if not self.batches_per_epoch:
            most = f"the dataset has {len(dataset)} samples"
            if len(counts) > 1:
                most += f", at most {counts.max()} of one size"
            raise ValueError(
                f"{most}, but one batch takes {batch_size}: add samples or lower batch_size"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._order = functools.lru_cache(1)(self._batches_of)
        self._ready: dict[int, Future[dict[str, Any]]] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def indices(self, step: int) -> list[int]:
        """Return which samples are taken at `step`."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._order(epoch)[position].tolist()

    def _batches_of(self, epoch: int) -> Int[np.ndarray, "batches samples"]:
        """Permute the samples and fill batches; one stands where its last sample does."""
        samples = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        places = []
        for kind in np.unique(self._kinds):
            (found,) = np.nonzero(self._kinds[samples] == kind)
            whole = len(found) // self.batch_size * self.batch_size
            places.append(found[:whole].reshape(-1, self.batch_size))
        full = np.concatenate(places)
        return samples[full[np.argsort(full[:, -1])]]

    def batch(self, step: int) -> dict[str, Any]:
        """Return the batch of `step`, and have the next ones prepared meanwhile."""
        wanted = range(step, step + 1 + AHEAD)
        for stale in self._ready.keys() - set(wanted):
            self._ready.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._ready:
                self._ready[ahead] = self._executor.submit(self._make, ahead)
        return self._ready.pop(step).result()

    def _make(self, step: int) -> dict[str, Any]:
        # The third word keeps these streams apart from the two-word ones of the permutations.
        rng = np.random.default_rng([self.seed, step, 1])
        return self.dataset.get(self.indices(step), rng)
