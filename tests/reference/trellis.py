"""Rotated rows and trellis codes in float64 numpy: the rotation as a matrix, codes bit by bit, and paths one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np


def signs(width: int) -> np.ndarray:
    """-1 where murmur3's finalizer of i + width * 0x9E3779B9, in 32 bits, is odd."""
    found = []
    for i in range(width):
        h = (i + width * 0x9E3779B9) % 2**32
        h = (h ^ (h // 2**16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h // 2**13)) * 0xC2B2AE35 % 2**32
        h ^= h // 2**16
        found.append(-1.0 if h % 2 else 1.0)
    return np.array(found)


def rotation(width: int) -> np.ndarray:
    """The orthogonal (width, width) matrix T of x -> T x: entry (i, j) of a Hartley matrix of the odd part m, times
    (-1)^(number of ones that i and j have in common) / sqrt(2^k) of the rest, after signs."""
    twos = 1
    while width % (2 * twos) == 0:
        twos *= 2
    odd, sign = width // twos, signs(width)
    matrix = np.empty((width, width))
    for i, j in itertools.product(range(width), repeat=2):
        angle = 2 * math.pi * ((i // twos) * (j // twos) % odd) / odd
        parity = bin((i % twos) & (j % twos)).count("1") % 2
        hartley = (math.cos(angle) + math.sin(angle)) / math.sqrt(odd)
        matrix[i, j] = hartley * (-1) ** parity / math.sqrt(twos) * sign[j]
    return matrix


def value_numbers(codes: Iterable[int], bits: int, memory: int) -> list[int]:
    """What each code of a row is looked up by: the ``memory`` bits of the row's stream that end with it, the last the
    highest; before the row there are zeros."""
    stream = "0" * memory
    found = []
    for code in codes:
        stream += f"{code:0{bits}b}"[::-1]
        found.append(int(stream[-memory:][::-1], 2))
    return found


def look_up(codes: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """The values of (rows, width) codes."""
    memory = round(math.log2(len(table)))
    return np.array([[table[n] for n in value_numbers(row, bits, memory)] for row in codes.tolist()]).reshape(
        codes.shape
    )


def best_codes(
    goal: np.ndarray, table: np.ndarray, bits: int, before: tuple[int, ...] = (), keep: int | None = None
) -> tuple[list[int], float]:
    """Of all codes for one row of ``goal``, those whose values are nearest, and how much farther the next are; each is
    tried.

    Args:
        before: codes of the row that are decided already.
        keep: so many of the codes are what matters: the next are the next with others of these.
    """
    memory = round(math.log2(len(table)))
    keep = len(goal) if keep is None else keep
    least: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for codes in itertools.product(range(2**bits), repeat=len(goal)):
        numbers = value_numbers((*before, *codes), bits, memory)[len(before) :]
        cost = sum((g - table[n]) ** 2 for g, n in zip(goal, numbers, strict=True))
        if codes[:keep] not in least or cost < least[codes[:keep]][0]:
            least[codes[:keep]] = cost, codes
    ranked = sorted(least.values())
    return list(ranked[0][1][:keep]), ranked[1][0] - ranked[0][0]


def triangle(moments: np.ndarray) -> np.ndarray:
    """The upper triangular F with F F^T = ``moments`` and a positive diagonal, column by column from the last."""
    size = len(moments)
    factor = np.zeros((size, size))
    for j in reversed(range(size)):
        for i in reversed(range(j + 1)):
            rest = moments[i, j] - sum(factor[i, k] * factor[j, k] for k in range(j + 1, size))
            factor[i, j] = math.sqrt(rest) if i == j else rest / factor[j, j]
    return factor


def fed_back(
    goal: np.ndarray, moments: np.ndarray, table: np.ndarray, bits: int, piece: int, view: int
) -> tuple[list[int], float]:
    """The codes of one row, ``piece`` columns at a time with ``view`` more in view, each column's goal moved by the
    errors of all pieces before; and the least margin that a decision had. ``moments`` are of the row's own inputs."""
    unit = triangle(moments)
    unit = unit / np.diag(unit)
    codes: list[int] = []
    errors: list[float] = []
    margin = math.inf
    memory = round(math.log2(len(table)))
    for begin in range(0, len(goal), piece):
        seen = range(begin, min(begin + piece + view, len(goal)))
        moved = np.array([goal[k] + sum(errors[j] * unit[j, k] for j in range(begin)) for k in seen])
        count = min(piece, len(goal) - begin)
        found, ahead = best_codes(moved, table, bits, tuple(codes), count)
        margin = min(margin, ahead)
        codes += found
        numbers = value_numbers(codes, bits, memory)
        errors += [goal[k] - table[numbers[k]] for k in range(begin, begin + count)]
    return codes, margin


def fitted_scale(goal: np.ndarray, read: np.ndarray, moments: np.ndarray) -> float:
    """The s of least (goal - s read) moments (goal - s read)^T."""
    return float(goal @ moments @ read) / float(read @ moments @ read)
