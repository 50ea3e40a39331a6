"""Writes a folder atomically: it appears complete or not at all.

Everything is written into a hidden sibling, which is renamed when complete. A lock (flock, which the kernel
releases however the process ends) marks the sibling as in use. The next run removes what a dead run left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import OutputError


@contextmanager
def staged_folder(
    out: Path, *, incomplete: str, may_replace: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A new folder to write into; it becomes `out` when the block ends without an exception.

    Until then it contains a file called `incomplete`. An empty `out` is replaced; a non-empty one only if
    `may_replace` returns True. Raises OutputError if `out` exists, cannot be written, or is being written by
    another process.
    """
    out = Path(os.path.realpath(out.expanduser()))
    staging = out.with_name(f".{out.name}.preparing")
    try:
        _check_free(out, may_replace)
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(staging, out)
    except OSError as error:
        raise output_error(out, error) from error
    try:
        _recover(out)
        _check_free(out, may_replace)
        _clear(staging)
        (staging / incomplete).touch()
        yield staging
        (staging / incomplete).unlink()
        _sync(staging)
        _check_free(out, may_replace)
        _put_in_place(staging, out)
    except BaseException as error:
        # Only on failure: after the rename, another process may already use the name.
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise output_error(out, error) from error
        raise
    finally:
        os.close(lock)


def output_error(out: Path, error: OSError) -> OutputError:
    """`error` as an OutputError about `out`, in one sentence."""
    if isinstance(error, OutputError):
        return error
    return OutputError(
        f"cannot write the dataset {out}: {error.strerror or error}; nothing there was changed"
    )


def _check_free(out: Path, may_replace: Callable[[Path], bool] | None) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"the output {out} exists and is not a folder: choose another --out")
    if not any(out.iterdir()):
        return
    if may_replace is None:
        raise OutputError(
            f"the output {out} already exists: choose another --out, or replace it with --force"
        )
    if not may_replace(out):
        raise OutputError(
            f"the output {out} contains more than a prepared dataset, so --force does not replace it"
        )


def _lock(staging: Path, out: Path) -> int:
    """Create and lock the staging folder. Returns the descriptor that holds the lock."""
    while True:
        with contextlib.suppress(FileExistsError):
            staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                f"another process is preparing {out}: wait for it, or choose another --out"
            ) from error
        # The last lock holder may have renamed or removed the folder between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(staging)):
                return descriptor
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename `staging`; move an old `out` aside first, because a rename replaces only an empty folder."""
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(_old(out), ignore_errors=True)
        os.rename(out, _old(out))
    try:
        os.rename(staging, out)
    except OSError:
        _recover(out)
        raise
    _sync(out.parent)
    shutil.rmtree(_old(out), ignore_errors=True)


def _recover(out: Path) -> None:
    """Move back the folder that an interrupted run moved aside and did not replace."""
    if _old(out).exists() and not out.exists():
        os.rename(_old(out), out)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
