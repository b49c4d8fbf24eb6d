"""What goes into an extracted adapter: its factors, whole modules and biases, and the configuration that fits them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ...adapter_files.backbone import METADATA_KEY, codes_digest, combine
from ...adapter_files.combined_config import rank_fields
from ...adapter_files.folder import PREFIX
from ...checkpoints.model_folder import task_type
from ...checkpoints.pair import CheckpointPair, norm
from ...checkpoints.stored_names import tied_names
from ...codecs import codec_for
from ...config.checks import check_names, failure
from ...config.lora import LoraConfig
from ...errors import StorageError, TargetError, closest
from ...injection.biases import bias_parameters
from ...injection.engine import Plan, PlanEntry, make_plan
from ...injection.heads import fitting_task
from ...injection.targets import resolve_saved, shortest_names
from ...injection.ties import refuse_tied, sharing, tied_tables, ties_among
from ...naming import Tree
from .report import BIAS, LEFT, WHOLE, OtherTensor

#: In place of names of modules to store whole: all that differ.
CHANGED = "changed"


class Contents:
    """An adapter while it is put together. Whatever can't work is found out when this is made.

    Args:
        target_modules, exclude_modules, whole: see ``qlora_kit.folders.extract.run.extract_folders``.

    Attributes:
        entries: the targeted modules. saved: paths of those to be stored whole.
        factors: tensors under the keys of the file. ranks: of the branches that were added, by path.

    Raises:
        ConfigError, TargetError: the targets or ``whole`` make no sense, match nothing, or match a tied weight.
        StorageError: a tensor that is targeted or wanted whole isn't stored, is quantized, or isn't finite; or one that
            is no difference (new, resized) isn't wanted whole.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        target_modules: Sequence[str] | str,
        exclude_modules: Sequence[str] | str | None,
        whole: Sequence[str] | str | None,
    ) -> None:
        self.pair, self.changed = pair, whole == CHANGED
        self.tied = tied_names(pair.model)
        self.factors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self._measured: dict[str, tuple[float, float]] = {}  # size of the difference and of the base's tensor
        self._seen: set[str] = set()
        if isinstance(whole, str) and not self.changed:
            raise failure("whole", f"{CHANGED!r} or a list of module names", whole, f"pass whole=[{whole!r}]")
        names = None if self.changed else check_names("whole", whole, regex=False)
        config = LoraConfig(
            r=1,
            target_modules=target_modules,  # type: ignore[arg-type]
            exclude_modules=exclude_modules,  # type: ignore[arg-type]
        )
        plan = _plan(pair.model, config, names or [])
        self._check_targets(plan.entries)
        if self.changed and (owners := self._owners_of_changes(plan.entries)):
            plan = _plan(pair.model, config, owners)
        self.entries, self.saved, self._tied_as_one = plan.entries, plan.modules_to_save, bool(plan.ties)
        self._check_saved()
        self._measure(self.entries)

    def difference(self, entry: PlanEntry) -> tuple[Tensor, float]:
        """A module's tuned weight minus its base's, float32 (out, in), and the Frobenius norm of the base's."""
        found, base_size = self.pair.difference(f"{entry.path}.weight")
        module = copy.copy(self.pair.model.get_submodule(entry.path))
        module._parameters = {"weight": nn.Parameter(found, requires_grad=False)}
        return codec_for(module, entry.path).read(module), base_size

    def add_(self, entry: PlanEntry, A: Tensor, B: Tensor) -> None:
        """Take up a module's branch A (rank, in), B (out, rank), in the shapes and under the keys of its family."""
        rank, key = A.shape[0], f"{PREFIX}{entry.path}"
        if entry.family == "embedding":
            named = {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
        else:
            kernel = tuple(self.pair.model.get_parameter(f"{entry.path}.weight").shape[1:])
            if entry.family == "conv":
                A, B = A.reshape(rank, *kernel), B.reshape(-1, rank, *(1,) * len(kernel[1:]))
            named = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        self.factors.update({name: factor.contiguous() for name, factor in named.items()})
        self.ranks[entry.path] = rank

    def others(self) -> list[OtherTensor]:
        """Tensors that differ beside the branches, and how the adapter stores them."""
        new = [OtherTensor(name, None, None, WHOLE) for name in (*self.pair.only_tuned, *self.pair.resized)]
        biases = set(self._biases())
        found = []
        for name, (size, base_size) in self._measured.items():
            how = WHOLE if self._within_saved(name) else BIAS if name in biases else LEFT
            shown = self.pair.tuned.extra.get(name, name)
            found.append(OtherTensor(shown, size, size / base_size if base_size else float("inf"), how))
        return sorted([*found, *new], key=lambda tensor: tensor.name)

    def config(self, base: str | os.PathLike[str]) -> LoraConfig:
        """The configuration that selects exactly the modules with a branch, and says where the rest belongs."""
        entries = [entry for entry in self.entries if entry.path in self.ranks]
        linears = [entry for entry in entries if entry.family == "linear"]
        return LoraConfig(
            target_modules=shortest_names([p for e in entries for p in (e.path, *e.aliases)], self.pair.model),
            modules_to_save=_saved_names(self.saved, self.pair.model) or None,
            ensure_weight_tying=self._tied_as_one,
            bias=self._bias_mode(),
            fan_in_fan_out=bool(linears) and all(entry.codec == "conv1d" for entry in linears),
            task_type=fitting_task(Tree(self.pair.model), task_type(self.pair.model), self.saved),
            base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else str(base),
            **rank_fields(self.ranks),
        )

    def copies(self) -> dict[str, Tensor]:
        """The tensors of whole modules and biases, as the tuned checkpoint has them, under the keys of the file."""
        found = {PREFIX + name: self.pair.tuned.tensor(self._first(name)) for name in self._saved_tensors()}
        for name in self._biases():
            path = name.removesuffix(".bias")
            key = f"{PREFIX}{path}.base_layer.bias" if path in self.ranks else PREFIX + name
            found[key] = self.pair.tuned.tensor(name)
        return {key: tensor.contiguous() for key, tensor in found.items()}

    def metadata(self) -> dict[str, str] | None:
        """The fingerprint of a quantized base, on which alone the branches are right."""
        names = {path: f"{path}.weight" for path in self.ranks}
        if not any(name in self.pair.base.parts for name in names.values()):
            return None
        reader, stored = self.pair.base.reader, self.pair.base.names
        return {METADATA_KEY: combine({path: codes_digest(reader.tensor(stored[n])) for path, n in names.items()})}

    # -- what differs ------------------------------------------------------------------------------------

    def _measure(self, entries: Iterable[PlanEntry]) -> None:
        """Note the difference of every tensor that both have and ``entries`` don't adapt."""
        adapted = {f"{entry.path}.weight" for entry in entries}
        for name in self.pair.shared:
            if name not in adapted and name not in self._seen:
                self._seen.add(name)
                difference, base_size = self.pair.difference(name)
                if difference.any():
                    self._measured[name] = norm(difference), base_size

    def _owners_of_changes(self, entries: Sequence[PlanEntry]) -> list[str]:
        """The modules to store whole, so that all that ``entries`` don't adapt is as tuned."""
        self._measure(entries)
        changed = [name for name in self._measured if not self._is_bias(name) and name not in self.pair.tuned.extra]
        paths = sorted({name.rpartition(".")[0] for name in (*changed, *self.pair.only_tuned, *self.pair.resized)})
        if "" in paths:
            names = [name for name in changed if "." not in name]
            raise TargetError(
                f"whole={CHANGED!r}: expected parameters of the model's modules, found {names} at its root, which no "
                "adapter can hold; name the modules to store whole instead"
            )
        paths = [path for path in paths if _may_be_whole(self.pair.model, path)]
        return [path for path in paths if not any(path.startswith(f"{above}.") for above in paths)]

    def _is_bias(self, name: str) -> bool:
        path, _, kind = name.rpartition(".")
        return kind == "bias" and name in self.pair.tuned.names and _has_bias(self.pair.model.get_submodule(path))

    def _bias_mode(self) -> str:
        """Which of PEFT's sets of trained biases holds all that changed."""
        changed = [n for n in self._measured if self._is_bias(n) and not self._within_saved(n)] if self.changed else []
        if not changed:
            return "none"
        return "lora_only" if all(name.removesuffix(".bias") in self.ranks for name in changed) else "all"

    def _biases(self) -> list[str]:
        """Names of the biases that the adapter's file must hold."""
        mode = self._bias_mode()
        names: dict[int, str] = {}
        for path, parameter in bias_parameters(self.pair.model, "all").items() if mode != "none" else ():
            name = f"{path}.bias"
            if (mode == "all" or path in self.ranks) and not self._within_saved(name):
                names.setdefault(id(parameter), name)
        return list(names.values())

    # -- what is stored whole ----------------------------------------------------------------------------

    def _first(self, name: str) -> str:
        return self.tied.get(name, name)

    def _within_saved(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.saved)

    def _saved_tensors(self) -> list[str]:
        model = self.pair.model
        return [f"{path}.{suffix}" for path in self.saved for suffix in model.get_submodule(path).state_dict()]

    def _check_targets(self, entries: Iterable[PlanEntry]) -> None:
        base, tuned = self.pair.base, self.pair.tuned
        comparable = {*self.pair.shared, *self.pair.only_tuned, *self.pair.resized}
        for name in (f"{entry.path}.weight" for entry in entries):
            if name not in comparable:
                side = base if name in tuned.names else tuned
                raise StorageError(
                    f"{side.folder}: expected the targeted weight {name!r}, found no such tensor; the closest are "
                    f"{closest(name, side.reader)}; targeted modules must be stored as they stand in the model: save "
                    "it with transformers' save_pretrained, or take them out of the targets"
                )
            for side in (base, tuned):
                if name in side.names and name not in side.parts:
                    dtype = side.types[side.names[name]][0]
                    if not dtype.is_floating_point:
                        raise StorageError(
                            f"{side.folder}: {name}: expected a floating-point weight, or all parts of a quantized "
                            f"one, found {dtype} alone; pass the model as transformers saves it"
                        )

    def _check_saved(self) -> None:
        tuned, base = self.pair.tuned, self.pair.base
        for name in self.pair.only_tuned:
            if not self._within_saved(name):
                path = name.rpartition(".")[0]
                raise StorageError(
                    f"{name}: expected it in both checkpoints, found it in {tuned.folder} alone, so that there is no "
                    f"difference; store it whole (whole=[{path!r}])"
                )
        for name in self.pair.resized:
            if not self._within_saved(name):
                path = name.rpartition(".")[0]
                raise StorageError(
                    f"{name}: expected the base's shape {base.shape(name)}, found {tuned.shape(name)} in "
                    f"{tuned.folder}, as after resize_token_embeddings; store it whole (whole=[{path!r}], and "
                    "resize the base before the adapter is loaded), or cut it back"
                )
        for name in self._saved_tensors():
            if self._first(name) not in tuned.names:
                raise StorageError(
                    f"{name}: expected it in {tuned.folder}, whence it is to be stored whole, found none; the closest "
                    f"are {closest(name, tuned.reader)}; leave its module out of whole"
                )


def _plan(model: nn.Module, config: LoraConfig, whole: Sequence[str]) -> Plan:
    """The modules to adapt and to store whole; what can't be whole is said in the user's words."""
    tree = Tree(model)
    try:
        saved = resolve_saved(tree, whole)
    except TargetError as error:
        raise TargetError(str(error).replace("modules_to_save: ", "whole: ", 1)) from error
    ensured = bool(ties_among(tree, saved))  # tables that are tied are stored as one
    plan = make_plan(tree, replace(config, modules_to_save=list(whole) or None, ensure_weight_tying=ensured))
    tables = tied_tables(tree)
    refuse_tied(tree, [path for path in saved if path not in tables])
    refuse_tied(tree, [entry.path for entry in plan.entries])
    return plan


def _may_be_whole(model: nn.Module, path: str) -> bool:
    """Not where a weight is tied to another module's, which a copy would part from it; but for tables of words."""
    tree = Tree(model)
    try:
        tables = tied_tables(tree)
        return not sharing(tree, [saved for saved in resolve_saved(tree, [path]) if saved not in tables])
    except TargetError:
        return False


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _saved_names(paths: Sequence[str], model: nn.Module) -> list[str]:
    """Names that select ``paths`` and no others also for PEFT, which compares plain ends of ``modules_to_save``: there
    "norm" would select ``input_layernorm`` too."""
    others = [path for path in Tree(model).modules if path and path not in paths]
    names = set()
    for path in paths:
        pieces = path.split(".")
        suffixes = (".".join(pieces[-count:]) for count in range(1, len(pieces) + 1))
        names.add(next((s for s in suffixes if not any(other.endswith(s) for other in others)), path))
    return sorted(names)
