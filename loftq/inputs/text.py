"""The text that calibrated starts look at: a file, rows of tokens, or text that every Python brings along."""

from __future__ import annotations

import hashlib
import inspect
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qlora_kit.config.loftq import AUTO, LoftQConfig
from qlora_kit.errors import ConfigError, StorageError

from .batches import in_parts, rows_in
from .caches import uncached

BUILTIN = "builtin"
# Rows of a batch.
_BATCH = 8
# Characters to read for a token that is wanted: no tokenizer needs more on average, for text in its languages.
_CHARACTERS_PER_TOKEN = 8
# Where a file is longer than needed, at most so many pieces of at least so many characters are taken of it.
_PIECES, _PIECE = 64, 256


def batches_for(
    source: Any,
    model: nn.Module,
    *,
    rows: int,
    window: int,
    batch: int = _BATCH,
    folder: str | os.PathLike[str] | None = None,
    choose: Callable[..., Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Batches to call ``model`` with, on its device.

    Args:
        source: "builtin" (or None, or "auto"), a text file, token ids (n, window), or an iterable of batches
            (dictionaries of tensors).
        rows, window: for text: rows of ``window`` tokens to cut, evenly over the whole of it.
        batch: rows of a batch.
        folder: where the tokenizer is; None is the folder that the model came from.
        choose: which rows of a text to take; None is ``token_rows``.

    Raises:
        ConfigError: a source of another kind, or without a row; tokens that the model has no embeddings for; a batch
            brings a cache along.
        StorageError: no such file, or no tokenizer beside the model.
    """
    source = BUILTIN if _is_none(source) else source
    if isinstance(source, (str, os.PathLike)):
        place = folder or getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        choose = choose or token_rows
        source = choose(source, load_tokenizer(place), rows=rows, window=_fitting(model, window))
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.is_floating_point() or not source.numel():
            raise ConfigError(
                f"calibration: expected token ids of shape (rows, tokens), found {source.dtype} of shape "
                f"{tuple(source.shape)}; pass whole numbers, a row for each text"
            )
        _check_known(model, source)
        source = [{"input_ids": part} for part in source.long().split(batch)]
    if not isinstance(source, Iterable):
        raise ConfigError(
            f"calibration: expected 'builtin', a text file, token ids (rows, tokens) or batches, found "
            f"{type(source).__name__}; pass calibration='builtin'"
        )
    batches = list(source)
    if not batches or not all(isinstance(item, Mapping) for item in batches):
        raise ConfigError(
            f"calibration: expected at least one batch, a dictionary of what the model is called with, found "
            f"{[type(item).__name__ for item in batches[:3]]}; pass [{{'input_ids': ...}}]"
        )
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return [_complete(model, {k: _moved(v, device) for k, v in item.items()}) for item in batches]


def calibration_batches(
    options: LoftQConfig, model: nn.Module, folder: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """``batches_for`` what ``options`` say of the text; of two rows or more at least two batches, for a text's later
    part is what its first is held against."""
    source = options.calibration
    rows = len(source) if isinstance(source, Tensor) else options.calibration_rows
    batches = batches_for(
        source,
        model,
        rows=options.calibration_rows,
        window=options.calibration_tokens,
        batch=max(1, min(_BATCH, (rows + 1) // 2)),
        folder=folder,
    )
    if len(batches) > 1:
        return batches
    # One of the caller's own, or of a text that has fewer rows than were asked for.
    return in_parts(batches[0], max(1, (rows_in(batches[0]) + 1) // 2))


def token_rows(source: str | os.PathLike[str], tokenizer: Any, *, rows: int, window: int) -> Tensor:
    """Up to ``rows`` rows of ``window`` token ids, evenly over the text ``source``, int64 (rows, window).

    Raises:
        StorageError: the file isn't there or isn't text, or has fewer tokens than a row.
    """
    wanted = rows * window * _CHARACTERS_PER_TOKEN
    ids = token_ids(builtin_text(wanted) if source == BUILTIN else _file_text(Path(source), wanted), tokenizer)
    if len(ids) < window:
        raise StorageError(
            f"calibration {source}: expected at least one row of {window} tokens, found {len(ids)} tokens in all; pass "
            "a longer text, or ask for rows of fewer tokens"
        )
    cut = in_rows(ids, window)
    chosen = torch.linspace(0, len(cut) - 1, min(rows, len(cut))).round().long()
    return cut[chosen]


def token_ids(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """The ids of all ``texts``, int64 (n,), each ended by the tokenizer's end of text if it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: a text longer than the model's context is no mistake here, it is cut into rows.
    ids = [i for text in texts for i in (*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, *end)]
    return torch.tensor(ids, dtype=torch.int64)


def in_rows(ids: Tensor, window: int) -> Tensor:
    """``ids`` (n,) as rows (n // window, window); what is left over at the end goes."""
    return ids[: len(ids) // window * window].view(-1, window)


def builtin_text(characters: int) -> Iterator[str]:
    """At least about ``characters`` of Python's own documentation and sources: prose and code, the same on every
    machine of one Python version."""
    from pydoc_data.topics import topics

    prose = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not {"site-packages", "dist-packages", "test", "tests"} & set(name.parts)]
    # In an order that mixes the folders, and doesn't move when a file is added.
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    given = 0
    for number, name in enumerate(names):
        for text in (*prose[number : number + 1], (root / name).read_text(encoding="utf-8", errors="replace")):
            yield text
            given += len(text)
        if given >= characters:
            return


def text_identity(source: Any) -> Any:
    """What tells one calibration text from another, as a JSON value: it changes with the contents."""
    if _is_none(source):
        return None
    if isinstance(source, (str, os.PathLike)):
        if source == BUILTIN:
            return f"{BUILTIN}, Python {sysconfig.get_python_version()}"
        path = Path(source)
        if path.is_file():
            return f"{path.name}, {path.stat().st_size} bytes, {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        return str(source)
    if isinstance(source, (Tensor, list, tuple)):
        leaves, structure = tree_flatten(source)
        digest = hashlib.sha256(str(structure).encode())
        for value in leaves:
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
        return f"{type(source).__name__}, {digest.hexdigest()[:16]}"
    return type(source).__name__


def load_tokenizer(folder: str | os.PathLike[str], *, local: bool = False) -> Any:
    """The tokenizer in a model's folder, or of its name on the Hub; ``local``: only if it is on this machine.

    Raises:
        StorageError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # of any kind, from files of unknown origin
        raise StorageError(
            f"calibration: expected a tokenizer in {str(folder) or 'the folder of the model'!r}, found none "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); put the tokenizer's files beside "
            "the model, or pass token ids or batches as the calibration"
        ) from error


def _is_none(source: Any) -> bool:
    return source is None or (isinstance(source, str) and source == AUTO)


def _file_text(path: Path, characters: int) -> Sequence[str]:
    if not path.is_file():
        raise StorageError(
            f"calibration {path}: expected a text file or 'builtin', found "
            f"{'a folder' if path.is_dir() else 'no such file'}; correct the path"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(
            f"calibration {path}: expected UTF-8 text, found other bytes ({error}); convert it"
        ) from error
    if len(text) <= characters:
        return [text]
    # Pieces from all over the file: its beginning alone may be of one kind.
    count = max(1, min(_PIECES, characters // _PIECE))
    piece = characters // count
    starts = [(len(text) - piece) * number // max(1, count - 1) for number in range(count)]
    return [text[start : start + piece] for start in starts]


def _check_known(model: nn.Module, ids: Tensor) -> None:
    with suppress(AttributeError, NotImplementedError):  # a model without a table of its own
        known = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        if int(ids.max()) >= known or int(ids.min()) < 0:
            raise ConfigError(
                f"calibration: expected token ids from 0 to {known - 1:,}, as many as the model has embeddings, found "
                f"{int(ids.min()):,} to {int(ids.max()):,}; pass those of the model's own tokenizer"
            )


def _fitting(model: nn.Module, window: int) -> int:
    """``window``, or the model's longest context if that is shorter."""
    config: Any = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or window
    # Some encoders count positions from beyond the padding token.
    return max(1, min(window, longest - (2 if longest <= window else 0)))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _complete(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` with what an encoder-decoder needs besides: its own text to go on from. No cache is built."""
    config: Any = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    decodes = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes
    if decodes and "input_ids" in batch and not any("decoder" in key or key == "labels" for key in batch):
        batch["decoder_input_ids"] = batch["input_ids"]
        if "attention_mask" in batch and "decoder_attention_mask" in takes:
            batch["decoder_attention_mask"] = batch["attention_mask"]
    return uncached(model, batch)
