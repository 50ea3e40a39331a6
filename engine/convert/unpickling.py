"""Loads files of torch.save and pickle: without running code or, if trusted, with missing classes as data."""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from engine.convert.file_kinds import FileKind
from engine.errors import DamagedError, StateError

_SHOWN = 8
_MAX_SCAN_BYTES = 256 << 20


class Unknown:
    """An object of a missing class: its arguments and its state, as data."""

    spelled = "an unknown class"

    def __new__(cls, *args: Any, **_: Any) -> Unknown:
        made = object.__new__(cls)
        made.__dict__.update(args=args, state={}, items=[], entries={})
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing to do: an unpickler may call it or not."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Fills a pickled subclass of list, like `extend`."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    entries: dict[Any, Any]

    def data(self) -> Any:
        """A dict of its attributes and entries, if any; else its items or arguments."""
        state = self.state if isinstance(self.state, tuple) else (self.state,)
        found = {key: value for part in state if isinstance(part, dict) for key, value in part.items()}
        found |= self.entries
        return found or self.items or (self.args[0] if len(self.args) == 1 else list(self.args)) or {}


def load(path: Path, kind: FileKind, *, trust_pickle: bool) -> tuple[Any, tuple[str, ...]]:
    """(a file's contents, its missing classes).

    Raises: StateError if loading it would run code and `trust_pickle` is not set; DamagedError; OSError.
    """
    if not trust_pickle:
        if kind.format == "pickle":
            raise refused(path, kind.words, path.read_bytes())
        return _load_safely(path), ()
    unknown: dict[str, type[Unknown]] = {}
    try:
        if kind.format == "pickle":
            with open(path, "rb") as file:
                return _unpickler(unknown)(file).load(), tuple(unknown)
        return _torch_load(path, unknown), tuple(unknown)
    except OSError as error:
        raise _readable(path, error) from error
    except Exception as error:
        raise DamagedError(f"{path} cannot be loaded: {first_line(error)}") from error


def load_bytes(raw: io.BytesIO, unknown: dict[str, type[Unknown]]) -> Any:
    """Load trusted bytes from torch.save; adds missing classes to `unknown`."""
    return torch.load(raw, map_location="cpu", weights_only=False, pickle_module=_module(unknown))


def refused(path: Path, words: str, pickled: bytes) -> StateError:
    """The error for a pickle that would run code."""
    names = list(dict.fromkeys(name for name in _globals(pickled) if not _harmless(name)))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    detail = f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
    if not names and next(_globals(pickled), None) is None:
        return StateError(
            f"{path} is {words}: refused, because a pickle can run its author's code. If you "
            "trust its author, give --trust_pickle"
        )
    return StateError(
        f"{path} is {words} with objects whose loading runs code of its author's choice{detail}: refused. If "
        "you trust its author, give --trust_pickle"
    )


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load_safely(path: Path) -> Any:
    try:
        return _mapped_if_possible(path, weights_only=True)
    except OSError as error:
        raise _readable(path, error) from error
    except pickle.UnpicklingError as error:
        pickled = _pickled(path)
        if all(map(_harmless, _globals(pickled))) and not _is_newer_protocol(error):
            raise DamagedError(f"{path} is damaged: its pickle cannot be read to the end") from error
        raise refused(path, "a file that torch.save wrote", pickled) from error
    except Exception as error:
        if zipfile.is_zipfile(path) or not _ends_early(error):
            raise DamagedError(f"torch.load cannot read {path}: {first_line(error)}") from error
        raise DamagedError(
            f"{path} is truncated or damaged: write or download it again (torch.load: {first_line(error)})"
        ) from error


def _ends_early(error: Exception) -> bool:
    """Whether torch's reader found the file truncated."""
    return isinstance(error, EOFError) or any(
        words in str(error) for words in ("EOF", "central directory", "invalid header")
    )


def _is_newer_protocol(error: Exception) -> bool:
    """Whether torch's unpickler met an opcode that only pickle knows."""
    operand = re.search(r"Unsupported operand (\d+)", str(error))
    return operand is not None and chr(int(operand[1])) in {opcode.code for opcode in pickletools.opcodes}


def _readable(path: Path, error: OSError) -> Exception:
    """The error itself, or DamagedError: torch reports a truncated file as "invalid argument"."""
    return DamagedError(f"{path} is truncated or damaged") if error.errno == errno.EINVAL else error


def _torch_load(path: Path, unknown: dict[str, type[Unknown]]) -> Any:
    return _mapped_if_possible(path, weights_only=False, pickle_module=_module(unknown))


def _mapped_if_possible(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, **options)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # A file from before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", **options)


def _module(unknown: dict[str, type[Unknown]]) -> Any:
    """A replacement for the module `pickle`, with what torch.load uses."""
    kind = _unpickler(unknown)

    def load(file: BinaryIO, **options: Any) -> Any:
        return kind(file, **options).load()

    return SimpleNamespace(
        Unpickler=kind, load=load, UnpicklingError=pickle.UnpicklingError, __name__="pickle"
    )


def _unpickler(unknown: dict[str, type[Unknown]]) -> type[pickle.Unpickler]:
    class DataUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            spelled = f"{module}.{name}"
            if spelled == "torch._tensor._rebuild_from_type_v2":
                return _rebuild_tensor
            if spelled in unknown:
                return unknown[spelled]
            try:
                return super().find_class(module, name)
            except Exception:  # importing someone else's module may fail in any way
                made = type(name.rpartition(".")[2] or "Unknown", (Unknown,), {"spelled": spelled})
                return unknown.setdefault(spelled, made)

    return DataUnpickler


def _rebuild_tensor(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Rebuild a tensor subclass; for a missing class, the plain tensor in it.

    Replaces torch's private function, which every such pickle names and which would call the class.
    """
    if isinstance(kind, type) and issubclass(kind, Unknown):
        return rebuild(*arguments)
    own: Any = torch._tensor._rebuild_from_type_v2
    return own(rebuild, kind, arguments, state)


def _pickled(path: Path) -> bytes:
    """The pickle in a file of torch.save, if it can be found."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            return archive.read(name) if archive.getinfo(name).file_size <= _MAX_SCAN_BYTES else b""
    except (zipfile.BadZipFile, StopIteration):
        with open(path, "rb") as file:
            return file.read(_MAX_SCAN_BYTES)


def _globals(pickled: bytes) -> Iterator[str]:
    """The names that one or more consecutive pickles import, as far as they can be read."""
    file, strings = io.BytesIO(pickled), [""]
    try:
        while file.tell() < len(pickled):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # damaged, or at the storages after the pickles: keep what was read
        return


_HARMLESS = frozenset({"torch", "collections", "torch._utils", "torch.storage", "torch.nn.parameter"})


def _harmless(name: str) -> bool:
    """Whether torch.load(weights_only=True) roughly accepts it; only for the message."""
    return name.rpartition(".")[0] in _HARMLESS
