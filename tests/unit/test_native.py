"""The compiled loops do what Python's do, for every alignment and size, and can be done without."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.format import digest
from engine.native import kernels
from engine.save import digesting_copy
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_copy import Batch, Copier, copy_digesting

DATA = np.random.default_rng(1).integers(0, 256, 400_000, dtype=np.uint8)

compiled = pytest.mark.skipif(kernels.library is None, reason="the loops are not built")
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

HERE = Path(kernels.__file__).parent
NARROW, WIDE = (kernels._open(HERE, name)[0] for name in ("_kernels", "_kernels_avx2"))
USABLE = [NARROW] if NARROW is None or not NARROW.holdfast_runs_avx2() else [NARROW, WIDE]


@pytest.fixture(params=USABLE, ids=["any processor", "AVX2"][: len(USABLE)], scope="module", autouse=True)
def build(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is for every build that this processor runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", request.param)
        yield


def test_they_are_there_where_there_is_a_compiler() -> None:
    """Or this suite would quietly test the slower way alone."""
    if shutil.which("cc") or shutil.which("gcc"):
        assert kernels.library is not None, kernels.missing_because
        assert WIDE is not None or platform.machine() != "x86_64"


SYMBOLS = ("fill", "block_digests", "scatter", "read_at_hand")


@pytest.mark.parametrize(
    ("runs", "wide_version", "chosen"),
    [
        (1, kernels.SOURCE_VERSION, "_kernels_avx2"),
        (0, kernels.SOURCE_VERSION, "_kernels"),
        (1, 1, "_kernels"),
    ],
)
@compiler
def test_the_wide_build_is_chosen_where_the_processor_runs_it(
    tmp_path: Path, runs: int, wide_version: int, chosen: str
) -> None:
    for name, version in (("_kernels", kernels.SOURCE_VERSION), ("_kernels_avx2", wide_version)):
        functions = "".join(f"void holdfast_{symbol}(void) {{}}" for symbol in SYMBOLS)
        compile_at(
            library_at(tmp_path, name),
            f"int holdfast_version(void) {{ return {version}; }}"
            f"int holdfast_runs_avx2(void) {{ return {runs}; }} {functions}",
        )
    found, reason = kernels.load(tmp_path)
    assert found is not None
    assert Path(found._name) == library_at(tmp_path, chosen)
    assert reason == ""


def page_aligned(size: int) -> np.ndarray:
    """A file as it lies in the staging buffer: on a page boundary, with bytes of its own."""
    whole = np.zeros(size + 4096, np.uint8)
    file = whole[-whole.ctypes.data % 4096 :][:size]
    file[:] = np.resize(DATA[::-1], size)
    return file


def packed(file: np.ndarray, block_bytes: int) -> bytes:
    blocks = [file[begin : begin + block_bytes].tobytes() for begin in range(0, len(file), block_bytes)]
    return b"".join(map(xxhash.xxh3_64_digest, blocks))


@compiled
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 130), st.integers(0, 130)), max_size=5),
        max_size=4,
    ),
    st.integers(0, 5000),
    st.sampled_from([1, 64, 100, 241, 4096, 5000, 65536]),
    st.integers(1, 70),
)
def test_files_are_filled_by_runs_of_any_size_and_digested(
    spans: Sequence[Sequence[tuple[int, int, int]]], tail: int, block_bytes: int, threads: int
) -> None:
    """Span by span, as a snapshot does: each begins where the one before ended, amid a block."""
    size = tail + sum(run_bytes + skip for span in spans for run_bytes, skip, _ in span)
    file = page_aligned(size)
    wanted, at, begin = file.copy(), 0, 0
    digests = bytearray(-(-size // block_bytes) * 8)
    for number, span in enumerate([*spans, []]):
        runs = []
        for run_bytes, skip, source in span:
            at += skip
            runs.append((file.ctypes.data + at, DATA.ctypes.data + source, run_bytes))
            wanted[at : at + run_bytes] = DATA[source : source + run_bytes]
            at += run_bytes
        end = size if number == len(spans) else at
        kernels.fill(
            *(file.ctypes.data, size, begin - begin % block_bytes, end), runs, block_bytes, threads, digests
        )
        begin = end
    assert np.array_equal(file, wanted)
    assert bytes(digests) == packed(wanted, block_bytes)


@compiled
def test_nothing_outside_of_a_span_is_touched() -> None:
    """Its last block is not whole yet: neither its bytes nor its digest are this call's to write."""
    file, digests = page_aligned(20_000), bytearray(b"x" * 40)
    before = file.copy()
    run = (file.ctypes.data + 5000, DATA.ctypes.data, 3500)
    kernels.fill(file.ctypes.data, 20_000, 4096, 8500, [run], 4096, 2, digests)
    assert np.array_equal(file[5000:8500], DATA[:3500])
    assert np.array_equal(file[:5000], before[:5000])
    assert np.array_equal(file[8500:], before[8500:])
    assert bytes(digests) == b"x" * 8 + xxhash.xxh3_64_digest(file[4096:8192].tobytes()) + b"x" * 24


@compiled
@given(
    st.lists(st.tuples(st.integers(0, 9000), st.booleans()), max_size=6),
    st.sampled_from([1, 100, 241, 4096, 65536]),
)
def test_bytes_are_scattered_and_digested(parts: Sequence[tuple[int, bool]], block_bytes: int) -> None:
    size = sum(part_bytes for part_bytes, _ in parts)
    source = DATA[:size].copy()
    to = [np.zeros(part_bytes, np.uint8) if wanted else part_bytes for part_bytes, wanted in parts]
    places = [(0, place) if isinstance(place, int) else kernels.place_of(memoryview(place)) for place in to]
    assert kernels.scatter(memoryview(source), places, block_bytes) == packed(source, block_bytes)
    at = 0
    for place, (part_bytes, _) in zip(to, parts, strict=True):
        assert isinstance(place, int) or np.array_equal(place, source[at : at + part_bytes])
        at += part_bytes


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


LEAST = digesting_copy.LEAST_BYTES


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
def test_which_tensors_are_copied_past_the_caches(source: torch.Tensor, streams: bool) -> None:
    """All are copied, whichever way, and the digests are of what lies there then."""
    header, small = 40, torch.ones(3)
    file = page_aligned(header + source.nbytes + small.nbytes)
    at = torch.from_numpy(file)
    to = at[header : header + source.nbytes].view(source.dtype).view(source.shape)
    last = at[header + source.nbytes :]
    pairs = [(to, source), (last, small.view(torch.uint8))]
    runs, rest = digesting_copy.plain_runs(pairs)
    assert [size for _, _, size in runs] == ([source.nbytes] if streams else [])
    assert len(runs) + len(rest) == 2
    digests: dict[str, bytearray] = {}
    copy_digesting(pairs, digesting_copy.Span("f", file.ctypes.data, file.size, 0, file.size), digests)
    assert bits(to) == bits(source)
    assert bits(last) == bits(small)
    assert bytes(digests["f"]) == digest.block_digests(file.tobytes())


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def test_a_source_on_a_device_is_left_to_torch() -> None:
    assert not digesting_copy._plain(torch.empty(9, device="meta"))


def test_without_them_nothing_is_digested_by_copying_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(kernels, "missing_because", "there is no compiler")
    with caplog.at_level("INFO"):
        copier = Copier(None, [], digest=True)
    assert "the C loops are not available: there is no compiler" in caplog.text
    to, source, staged = torch.zeros(LEAST), torch.rand(LEAST), StagedSnapshot()
    span = digesting_copy.Span("f", to.data_ptr(), to.nbytes, 0, to.nbytes)
    copier.copy([Batch(((to, source),), to.nbytes, span)], [], staged)
    assert torch.equal(to, source)
    assert staged.digests_of("f") is None


def test_nothing_built_is_said_with_what_to_do(tmp_path: Path) -> None:
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert "install Holdfast again where there is a C compiler" in reason


def test_what_cannot_be_loaded_is_not_used(tmp_path: Path) -> None:
    library_at(tmp_path).write_bytes(b"not a library")
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert "cannot be loaded" in reason


@compiler
@pytest.mark.parametrize(
    ("source", "sentence"),
    [("int holdfast_version(void) { return 999; }", "version 999"), ("int other;", "cannot be loaded")],
)
def test_what_was_built_from_other_source_is_not_used(tmp_path: Path, source: str, sentence: str) -> None:
    compile_at(library_at(tmp_path), source)
    found, reason = kernels.load(tmp_path)
    assert found is None
    assert sentence in reason


def library_at(folder: Path, name: str = "_kernels") -> Path:
    return folder / f"{name}{kernels.EXTENSION_SUFFIXES[0]}"


def compile_at(file: Path, source: str) -> None:
    file.with_suffix(".c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", file, file.with_suffix(".c")], check=True)


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
