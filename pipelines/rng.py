"""Counter-based random numbers: the same bits from numpy on the host and from torch on any device.

Every random number of a sample is a pure function of (seed, epoch, position in the epoch's order, purpose, draw): no
state, no stream, hence exact resume, any sharding, and the same crops from every backend. The function is Philox4x32-10
(Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), checked against the known values
of Random123.

Layout, on which stored targets depend and which therefore never changes:
    counter = (position mod 2^32, position div 2^32, epoch, purpose + draw * 2^16)
    key = (seed mod 2^32, seed div 2^32)
One counter gives four words; `draw` asks for further words of the same purpose.

Shapes: N samples, or any shape of `position`; the four words are the last axis.
"""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Word = TypeVar("Word", npt.NDArray[Any], torch.Tensor)

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_CHUNK = 1 << 14  # samples per numpy pass: its dozen uint64 temporaries stay in a core's cache


class Purpose(enum.IntEnum):
    """What a random number is for. Stored targets depend on the numbers: never change or reuse one, add at the end."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    SHIFT = 3
    ERASE = 4
    ERASE_NOISE = 5
    MIX = 6
    RANDAUGMENT = 7
    JITTER = 8
    DROP_PATH = 9
    CONVERT_ORDER = 10
    CONVERT_MODE = 11
    TRIVIAL_AUGMENT = 12
    THREE_AUGMENT = 13


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds over four counter words (numpy uint64 or torch int64 arrays that hold 0..2^32-1) -> four such words.

    A product of two words needs 64 bits: it is exact in uint64; in int64 it wraps, which leaves its bits, and so both
    halves, as they are.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def words(
    seed: int, epoch: int | torch.Tensor, position: torch.Tensor, last: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words of each counter of the layout above, int64 holding 0..2^32-1, on the position's device.

    last: the counter's last word, purpose + draw * 2^16; a tensor of them broadcasts to the position.
    """
    wide = position.to(torch.int64)
    zero = torch.zeros_like(wide)
    counter = (wide & _LOW, (wide >> 32) & _LOW, zero + epoch, zero + last)
    return philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))


def bits(seed: int, epoch: int | torch.Tensor, position: Word, purpose: int, draw: int | torch.Tensor = 0) -> Word:
    """Random words [N, 4]: numpy uint32 for a numpy `position`, torch int64 holding 0..2^32-1 for a torch one.

    seed: any integer, taken modulo 2^64.
    epoch: 0..2^32-1; with a torch position it may be a 0-dim int64 tensor, so that compiled code does not depend on it.
    position: integers [N], taken modulo 2^64 (so the padding position -1 is legal).
    purpose, draw: 0..2^16-1; with a torch position `draw` may be an int64 tensor that broadcasts to it, not checked.
    The torch twin is elementwise int64 arithmetic on the position's device, without host synchronisation.
    Raises ValueError for a purpose, draw or epoch out of range.
    """
    purpose = int(purpose)  # torch.compile does not compare members of an enum
    if not (0 <= purpose < 1 << 16 and (isinstance(draw, torch.Tensor) or 0 <= draw < 1 << 16)):
        raise ValueError(f"purpose {purpose} and draw {draw} must lie in 0..65535")
    if not isinstance(epoch, torch.Tensor) and not 0 <= epoch <= _LOW:
        raise ValueError(f"epoch {epoch} must lie in 0..2^32-1")
    last = purpose | draw << 16
    if isinstance(position, torch.Tensor):
        return torch.stack(words(seed, epoch, position, last), dim=-1)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    flat = np.asarray(position).astype(np.int64, copy=False).view(np.uint64).reshape(-1)
    out = np.empty((flat.size, 4), np.uint32)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        counter = (part & _LOW, part >> 32, np.full_like(part, int(epoch)), np.full_like(part, last))
        for word, values in enumerate(philox4x32(counter, key)):
            out[start : start + _CHUNK, word] = values
    return out.reshape(*np.shape(position), 4)


def uniform(seed: int, epoch: int | torch.Tensor, position: Word, purpose: int, draw: int | torch.Tensor = 0) -> Word:
    """Uniform float32 [N, 4] in [0, 1): the top 24 bits of `bits` times 2^-24, exact and so equal in both twins."""
    if isinstance(position, torch.Tensor):
        return (bits(seed, epoch, position, purpose, draw) >> 8).to(torch.float32) * 2.0**-24
    if isinstance(epoch, torch.Tensor) or isinstance(draw, torch.Tensor):
        raise TypeError("a tensor epoch or draw needs a tensor position: pass integers on the host")
    return (bits(seed, epoch, position, purpose, draw) >> 8).astype(np.float32) * np.float32(2.0**-24)
