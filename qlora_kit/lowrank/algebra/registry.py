"""The combination types by name, what each one takes, and the recipe that chooses among them.

A type of one's own is a function of branches and weights:

    @register_combination("mine")
    def mine(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined: ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...config.checks import check_choice, check_int, failure
from ...errors import AdapterError
from .records import Branch, Combined

Function = Callable[[list[Branch], list[float], "Recipe"], Combined]


@dataclass(frozen=True)
class Kind:
    """A registered type, and which fields of a recipe it reads.

    Attributes:
        ranked: ``rank`` cuts the result. largest_rank: without one, it is the largest of the sources' ranks.
        density: needed. energy, clamp: read. equal_ranks: branches of one module must have one rank.
    """

    name: str
    function: Function
    ranked: bool = False
    largest_rank: bool = False
    density: bool = False
    energy: bool = False
    clamp: bool = False
    equal_ranks: bool = False


_registry: dict[str, Kind] = {}


def register_combination(
    name: str,
    *,
    ranked: bool = False,
    largest_rank: bool = False,
    density: bool = False,
    energy: bool = False,
    clamp: bool = False,
    equal_ranks: bool = False,
) -> Callable[[Function], Function]:
    """Decorator: ``combination_type=name`` calls this function. See ``Kind`` for what the flags say."""

    def register(function: Function) -> Function:
        _registry[name] = Kind(name, function, ranked, largest_rank, density, energy, clamp, equal_ranks)
        return function

    return register


def combination_types() -> tuple[str, ...]:
    """The names that ``combination_type`` may be."""
    return tuple(sorted(_registry))


@dataclass(frozen=True)
class Recipe:
    """How to combine, checked when it is made.

    Attributes:
        combination_type: one of ``combination_types()``.
        rank: of the result, for types that cut it; None is the largest of the sources' for "svd" and "..._svd", and
            all that there is for "exact", "knots" and "iso_c".
        density: share of entries that pruning keeps, in (0, 1]; the types that prune need it.
        majority_sign: how TIES elects: "total", the sign of the sum of values, or "frequency", of the sum of signs.
        clamp: quantile in (0.5, 1] at which the factors of the SVD types are cut off.
        energy: in place of ``rank`` for "svd" and "exact": the smallest rank that keeps this share, in (0, 1].
        seed: of DARE's masks.

    Raises:
        ConfigError: a value that can't work, one that is missing, or one that the type doesn't read.
    """

    combination_type: str = "svd"
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    clamp: float | None = None
    energy: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = combination_types()
        check_choice("combination_type", self.combination_type, known, f"pass one of {', '.join(known)}")
        name, kind = self.combination_type, self.kind
        check_choice("majority_sign_method", self.majority_sign, ("total", "frequency"), "pass 'total'")
        check_int("seed", self.seed, 0, "pass a whole number such as seed=0")
        if kind.density and self.density is None:
            fix = "pass density=0.5 to keep the half of largest magnitude, or to drop the other half at random"
            raise failure("density", f"a share of entries to keep, since {name!r} prunes", None, fix)
        for field, value, read in (
            ("svd_rank", self.rank, kind.ranked),
            ("density", self.density, kind.density),
            ("svd_clamp", self.clamp, kind.clamp),
            ("energy", self.energy, kind.energy),
        ):
            if value is not None and not read:
                raise failure(field, f"None with combination_type={name!r}, which has no use for it", value, "leave it")
        if self.rank is not None:
            check_int("svd_rank", self.rank, 1, "pass a rank such as 8, or None")
        if self.rank is not None and self.energy is not None:
            raise failure("energy", f"None beside svd_rank={self.rank}", self.energy, "pass one of the two")
        for field, share in (("density", self.density), ("energy", self.energy)):
            if share is not None and not (_is_number(share) and 0 < share <= 1):
                raise failure(field, "a share in (0, 1]", share, f"pass one such as {field}=0.5")
        if self.clamp is not None and not (_is_number(self.clamp) and 0.5 < self.clamp <= 1):
            raise failure("svd_clamp", "a quantile in (0.5, 1]", self.clamp, "pass one such as svd_clamp=0.99")

    @property
    def kind(self) -> Kind:
        return _registry[self.combination_type]

    def generator(self) -> torch.Generator:
        """The source of random masks, on the CPU: what is drawn doesn't depend on the device."""
        return torch.Generator().manual_seed(self.seed)

    def for_layer(self, path: str) -> Recipe:
        """This recipe with a seed of the layer's own, which no other layer's presence or order changes."""
        digest = hashlib.sha256(f"{self.seed} {path}".encode()).digest()
        return dataclasses.replace(self, seed=int.from_bytes(digest[:7], "little"))


def check_weights(weights: Sequence[float], count: int, where: str) -> list[float]:
    """``weights`` as a list of ``count`` floats.

    Raises:
        AdapterError: another number of weights, or one that isn't a finite number.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != count:
        found = f"{len(weights)} ({weights!r})" if isinstance(weights, Sequence) else repr(weights)
        raise AdapterError(f"{where}: expected {count} weights, one for each adapter, found {found}; pass one for each")
    for weight in weights:
        if not (_is_number(weight) and math.isfinite(weight)):
            raise AdapterError(f"{where}: expected finite numbers as weights, found {weight!r}; pass one such as 0.5")
    return [float(weight) for weight in weights]


def check_together(branches: Sequence[Branch], names: Sequence[str], kind: Kind, where: str) -> None:
    """Refuse branches that can't be combined with each other.

    Raises:
        AdapterError: no branch, two shapes, or two ranks where the type needs one.
    """
    if not branches:
        raise AdapterError(f"{where}: expected at least one adapter to combine, found none; name one")
    shapes = {name: branch.shape for name, branch in zip(names, branches, strict=True)}
    if len(set(shapes.values())) > 1:
        raise AdapterError(
            f"{where}: expected adapters of one module, of one (out, in), found {shapes}; combine adapters of the "
            "same base model"
        )
    ranks = {name: branch.rank for name, branch in zip(names, branches, strict=True)}
    if kind.equal_ranks and len(set(ranks.values())) > 1:
        raise AdapterError(
            f"{where}: expected adapters of one rank, since {kind.name!r} works on the factors entry by entry, found "
            f"{ranks}; take 'exact', 'svd', 'cat' or a type that ends in '_svd'"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
