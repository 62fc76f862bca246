"""The order of an epoch, and the part of it that each process reads.

A position is a place in the epoch's order, 0..n-1; an index is a place in the dataset. Everything random about a sample
is keyed by its position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines import rng
from pipelines.errors import UserError


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> npt.NDArray[np.int64]:
    """Dataset indices in the order of the epoch: int64 [n], a permutation (the identity without `shuffle`).

    The samples are sorted by a 64-bit random key, ties by index: the order depends on Philox alone, not on numpy's
    generators.
    """
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    words = rng.bits(seed, epoch, np.arange(n, dtype=np.int64), rng.Purpose.ORDER)
    keys = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def repeated(order: npt.NDArray[np.int64], repeats: int) -> npt.NDArray[np.int64]:
    """Repeated augmentation (Hoffer et al. 2020; DeiT): the order [n], in which an image stands `repeats` times.

    As with DeiT's RASampler the epoch is as long as without, so it shows the first n / repeats images of the order
    (rounded up to a multiple of 4; the last 4 fewer times), and the repeats of an image stand close together: those of
    four images fill 4 `repeats` consecutive positions. Each aligned group of four has all four, turned against each
    other so that the partners of an image at position XOR 1 (mixup) and XOR 2 (MINE) are other images, and in three
    repeats three different ones. RASampler gives the repeats to different GPUs; here, where the number of GPUs changes
    no batch, they are mostly on one.
    """
    chunk, within = np.divmod(np.arange(len(order), dtype=np.int64), 4 * repeats)
    turn, slot = np.divmod(within, 4)
    image = np.where(slot == 0, 0, 1 + (slot - 1 + turn) % 3)
    return order[(4 * chunk + image) % len(order)]


@dataclass(frozen=True)
class Shard:
    """This process among those that share a run. Raises UserError when rank lies outside 0..world-1."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"shard: rank {self.rank} must lie in 0..{self.world - 1} (world {self.world})")


@dataclass(frozen=True)
class BatchSampler:
    """The positions of each step on this shard: step s covers `global_batch` consecutive ones, in equal parts by rank.

    With drop_last (training) the incomplete last batch is dropped and the local batch must be even, so that the partner
    of position p in mixup, p XOR 1, lies in the same batch of the same shard. Without it (evaluation) every position
    occurs exactly once over all shards, all of which make the same number of steps; places past the end hold -1.
    `aug_repeats` (see `repeated`) acts where `shuffle` is set.
    Raises UserError for a batch that is not positive, not a multiple of the number of shards, odd where it must be
    even, or larger than the dataset.
    """

    n: int
    global_batch: int
    shard: Shard
    seed: int
    shuffle: bool
    drop_last: bool
    aug_repeats: int = 1

    def __post_init__(self) -> None:
        batch, world = self.global_batch, self.shard.world
        if self.n < 1:
            raise UserError("the dataset is empty: give one with at least one sample")
        if batch < 1 or batch % world:
            field = "run.batch" if self.shuffle else "run.eval_batch"
            raise UserError(f"{field}: {batch} must be a positive multiple of the number of processes, {world}")
        if self.drop_last and self.local_batch % 2:
            raise UserError(
                f"run.batch: {batch} over {world} process(es) must be even on each, because neighbours are mixed: "
                f"take {batch + world}"
            )
        if self.drop_last and batch > self.n:
            unit = 4 * world  # a recipe's batch is a multiple of 4 on each process
            most = self.n // unit * unit
            fix = f"take at most {most}" if most else f"give at least {unit} samples"
            raise UserError(f"run.batch: {batch} is larger than the dataset ({self.n} samples): {fix}")

    @property
    def local_batch(self) -> int:
        """Samples per step on this shard."""
        return self.global_batch // self.shard.world

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.global_batch if self.drop_last else -(-self.n // self.global_batch)

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """This shard's positions at `step`: int64 [B_local], -1 for no sample. Raises IndexError past the end."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} outside the epoch's 0..{self.steps_per_epoch - 1}")
        start = step * self.global_batch + self.shard.rank * self.local_batch
        positions = np.arange(start, start + self.local_batch, dtype=np.int64)
        return np.where(positions < self.n, positions, -1)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Dataset index at each position of the epoch: int64 [n]. Compute it once per epoch."""
        order = epoch_order(self.n, self.seed, epoch, self.shuffle)
        return repeated(order, self.aug_repeats) if self.shuffle and self.aug_repeats > 1 else order


def indices_at(order: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Dataset indices at these positions of an order: int64 [B], -1 where the position is -1."""
    return np.where(positions < 0, -1, order[np.maximum(positions, 0)])
