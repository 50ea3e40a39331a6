"""A connection to one store through fsspec: paths, mapped errors, retries."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from engine.errors import ConfigError, HoldfastError, NotFoundError
from engine.forks import in_child
from engine.format.names import safe_relative
from engine.storage.deadlines import call
from engine.storage.multipart import Multipart
from engine.storage.options import client_options
from engine.storage.redact import Redactor, redact_uri
from engine.storage.remote_failures import remote_error
from engine.storage.retry import Retry
from engine.storage.stores import multipart_for, settings_check

T = TypeVar("T")

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})


class StoreClient:
    """One fsspec file system and the prefix in it that a storage stands for.

    `uri` is printable, without secrets; `scheme` is its protocol. Constructing contacts nothing.
    ConfigError if the scheme is unknown, its package is not installed, or options do not suit it.
    """

    def __init__(self, uri: str, options: Mapping[str, object], *, retry: Retry | None = None) -> None:
        self.uri = redact_uri(uri).rstrip("/")
        self.scheme = get_protocol(uri)
        self._redactor = Redactor(uri, options)
        self._retry = retry or Retry()
        if "::" in uri:
            raise ConfigError(
                f"{self.uri} chains file systems, and a cache among them hides what others write: give the "
                "URI of a single one"
            )
        try:
            fs, root = url_to_fs(uri, **client_options(self.scheme, options))
        except ImportError as error:
            raise ConfigError(f"{self.uri} needs a package that is not installed: {error}") from None
        except HoldfastError:
            raise
        except Exception as error:
            raise remote_error(error, "open", self.uri, self._redactor.scrub) from None
        if hasattr(fs, "retries"):
            fs.retries = 1  # s3fs loops around its client's tries: three nested loops outlast any deadline
        self.fs: fsspec.AbstractFileSystem = fs
        self._root = str(root).rstrip("/")
        self.multipart: Multipart | None = multipart_for(self.scheme, fs)
        self._check = settings_check(self.scheme, fs, self.uri)
        in_child(self._leave_to_parent)

    def _leave_to_parent(self) -> None:
        """In a forked child: never close the client, because its connections belong to the parent.

        Closing a socket there removes it from the event loop's epoll set, which both share: the parent
        would then wait forever for an answer. aiohttp closes its sockets when it is collected, so the child
        keeps the client alive. s3fs's finalizer would wait a second for a thread that the child lacks.
        """
        # Underscored, but the only way from an object to its finalizers; a test notices when it moves.
        for finalizer, about in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined]
            if about.weakref() is self.fs:
                finalizer.detach()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.fs))

    @property
    def is_object_store(self) -> bool:
        """Whether one PUT is atomic, directories do not exist, and a find() is one flat listing."""
        return self.scheme in _OBJECT_STORES

    def full(self, path: str) -> str:
        """The file system's path; "" is the prefix itself. HostilePathError if it leaves the prefix."""
        return f"{self._root}/{safe_relative(path)}" if path else self._root

    def describe(self, path: str) -> str:
        """Printable address of a path."""
        return f"{self.uri}/{path}" if path else self.uri

    def fresh(self) -> fsspec.AbstractFileSystem:
        """The file system with its cached listings cleared: some of fsspec's cache even when told not to."""
        self.fs.invalidate_cache()
        return self.fs

    @property
    def reads_at_once(self) -> int:
        """How many reads one caller may have in flight: one, if the client has no event loop of its own."""
        if self.multipart is not None:
            return self.multipart.reads_at_once
        return 4 if self.fs.async_impl or self.scheme == "memory" else 1

    def listing(self, name: str, full: str) -> Any:
        """`ls` or `find`, with details and without cached listings."""
        return call(self.fresh(), name, full, detail=True)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The file system's method of that name, with a deadline."""
        return call(self.fs, name, *args, **kwargs)

    def once(self, doing: str, path: str, action: Callable[[], T]) -> T:
        """Run a client call with its errors mapped."""
        try:
            if (check := self._check) is not None:
                check()
                self._check = None
            return action()
        except HoldfastError:
            raise
        except Exception as error:
            # Raised without the original as cause: a traceback would print its text, which may hold secrets.
            raise remote_error(error, doing, self.describe(path), self._redactor.scrub) from None

    def do(
        self, doing: str, path: str, action: Callable[[], T], *, stop: threading.Event | None = None
    ) -> T:
        """Run an idempotent client call with its errors mapped; retry while the store is unavailable."""
        return self._retry.call(lambda: self.once(doing, path, action), stop=stop)

    def briefly(self, doing: str, path: str, action: Callable[[], T]) -> T:
        """The same for clean-up after a failure: it gives up within seconds."""
        return self._retry.brief().call(lambda: self.once(doing, path, action))

    def info(self, path: str) -> dict[str, Any]:
        """What the store knows of an object or prefix. NotFoundError if there is neither."""
        full = self.full(path)
        found: dict[str, Any] = self.do("look at", path, lambda: call(self.fresh(), "info", full))
        return found

    def size(self, path: str) -> int:
        """Size of an object in bytes. NotFoundError if there is none of that name."""
        info = self.info(path)
        if info.get("type") != "file":
            raise NotFoundError(f"could not look at {self.describe(path)}: there is no such object")
        return int(info["size"])
