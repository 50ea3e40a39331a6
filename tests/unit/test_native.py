"""The compiled loops do what Python's do, for every alignment and size, and can be done without."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.format import digest
from engine.native import kernels
from engine.snapshot import streaming
from engine.snapshot.copy import Copier, copy_pairs

DATA = np.random.default_rng(1).integers(0, 256, 400_000, dtype=np.uint8)

compiled = pytest.mark.skipif(kernels.library is None, reason="nothing is compiled")


def test_they_are_there_where_there_is_a_compiler() -> None:
    """Or this suite would quietly test the slower way alone."""
    if shutil.which("cc") or shutil.which("gcc"):
        assert kernels.library is not None, kernels.missing_because


@compiled
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 130), st.integers(0, 130)), max_size=6),
    st.integers(1, 70),
)
def test_runs_of_any_size_and_alignment_are_copied_and_nothing_else(
    runs: Sequence[tuple[int, int, int]], threads: int
) -> None:
    to, wanted = np.zeros(40_000, np.uint8), np.zeros(40_000, np.uint8)
    orders, at = [], 0
    for size, skip, source in runs:
        at += skip
        orders.append((to.ctypes.data + at, DATA.ctypes.data + source, size))
        wanted[at : at + size] = DATA[source : source + size]
        at += size
    kernels.copy_runs(orders, threads)
    assert np.array_equal(to, wanted)


@compiled
def test_more_bytes_than_threads_can_share_evenly() -> None:
    to = np.zeros_like(DATA)
    kernels.copy_runs([(to.ctypes.data, DATA.ctypes.data, DATA.size)], 7)
    assert np.array_equal(to, DATA)


@compiled
@given(st.integers(0, 3000), st.integers(0, 70), st.sampled_from([1, 16, 64, 100, 240, 241, 1024, 5000]))
def test_digests_are_those_of_the_xxhash_package(size: int, offset: int, block_bytes: int) -> None:
    view = memoryview(DATA)[offset : offset + size]
    blocks = [bytes(view[begin : begin + block_bytes]) for begin in range(0, size, block_bytes)]
    assert kernels.block_digests(view, block_bytes) == b"".join(map(xxhash.xxh3_64_digest, blocks))


@compiled
def test_files_are_digested_by_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = kernels.block_digests
    monkeypatch.setattr(kernels, "block_digests", lambda *args: calls.append(args) or real(*args))
    fast = digest.block_digests(DATA.tobytes())
    monkeypatch.setattr(kernels, "library", None)
    assert digest.block_digests(DATA.tobytes()) == fast
    assert len(calls) == 1


class Noted:
    """Stands in for `copy_runs`: notes the sizes of what is copied past the caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.real = kernels.copy_runs
        monkeypatch.setattr(kernels, "copy_runs", self)

    def __call__(self, runs: Sequence[kernels.Run], threads: int) -> None:
        assert threads == torch.get_num_threads()
        self.sizes += [size for _, _, size in runs]
        self.real(runs, threads)


LEAST = streaming.LEAST_BYTES


@compiled
@pytest.mark.parametrize(
    ("source", "streams"),
    [
        (torch.rand(LEAST // 4), True),
        (torch.rand(LEAST // 4 - 1), False),
        (torch.rand(300, 400).to(torch.bfloat16), True),
        (torch.rand(300, 400).to(torch.float8_e4m3fn), True),
        (torch.rand(400, 800)[7:107], True),
        (torch.rand(400, 800).t(), False),
        (torch.rand(400, 800)[:, ::2], False),
        (torch.rand(1, 400).expand(300, 400), False),
        (torch.rand(300, 400, dtype=torch.complex64).conj(), False),
        (torch.rand(300, 400, dtype=torch.complex64).conj().imag, False),
        (torch.nn.Parameter(torch.rand(300, 400)), True),
    ],
    ids=range(11),
)
def test_which_tensors_are_copied_past_the_caches(
    source: torch.Tensor, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(monkeypatch)
    to = torch.zeros(source.shape, dtype=source.dtype)
    small = torch.zeros(3), torch.ones(3)
    copy_pairs([(to, source), small], non_blocking=False)
    assert noted.sizes == ([source.nbytes] if streams else [])
    assert bits(to) == bits(source)
    assert bits(small[0]) == bits(small[1])


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def test_a_source_on_a_device_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of a side stream may not be made here and now."""
    monkeypatch.setattr(streaming, "stream_pairs", lambda pairs: pytest.fail("not for overlapped copies"))
    monkeypatch.setattr("engine.snapshot.copy.stream_pairs", streaming.stream_pairs)
    to, source = torch.zeros(LEAST), torch.rand(LEAST)
    copy_pairs([(to, source)], non_blocking=True)
    assert torch.equal(to, source)
    assert not streaming._plain(torch.empty(9, device="meta"))


def test_without_them_everything_is_left_to_torch_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(kernels, "missing_because", "there is no compiler")
    with caplog.at_level("INFO"):
        Copier(None, [])
    assert "slower way, without the loops in C: there is no compiler" in caplog.text
    to, source = torch.zeros(LEAST), torch.rand(LEAST)
    assert streaming.stream_pairs([(to, source)]) == [(to, source)]
    copy_pairs([(to, source)], non_blocking=False)
    assert torch.equal(to, source)


def test_nothing_built_is_said_with_what_to_do(tmp_path: Path) -> None:
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert "install Holdfast again where there is a C compiler" in reason


def test_what_cannot_be_loaded_is_not_used(tmp_path: Path) -> None:
    library_at(tmp_path).write_bytes(b"not a library")
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert "cannot be loaded" in reason


@compiled
@pytest.mark.parametrize(
    ("source", "sentence"),
    [("int holdfast_version(void) { return 999; }", "version 999"), ("int other;", "cannot be loaded")],
)
def test_what_was_built_from_other_source_is_not_used(tmp_path: Path, source: str, sentence: str) -> None:
    file = library_at(tmp_path)
    (tmp_path / "other.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", file, tmp_path / "other.c"], check=True)
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert sentence in reason


def library_at(folder: Path) -> Path:
    return folder / f"_kernels{kernels.EXTENSION_SUFFIXES[0]}"


def test_an_installation_without_a_compiler_succeeds() -> None:
    """What setup.py promises: the extension is optional."""
    pytest.importorskip("setuptools")
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder],
            cwd=root,
            env={"CC": "/nonexistent/cc", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert not list(Path(folder).rglob("*.so"))
