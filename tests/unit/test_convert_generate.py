"""engine.generate: the weights speak, the same words for the same seed, from whatever they were stored in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import Checkpointer
from engine.convert.export import ExportOptions
from engine.generate import main
from engine.gpt2.load_model import load_model
from engine.gpt2.sample import sample
from engine.storage.local import LocalStorage
from model.config import GPT2Config
from model.gpt2 import GPT2
from tests.support.conversions import export_checkpoint
from tests.support.tiny_gpt2 import CONFIG, TINY, new_model, new_optimizer, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("run")
    return directory, train(directory)[1][-1].id


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_every_way_to_store_a_model_says_the_same(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, id = trained
    for format in ("hf", "torch", "dcp"):
        options = ExportOptions(format=format)
        target = tmp_path / (format + (".pt" if format == "torch" else ""))
        export_checkpoint(LocalStorage(directory), id, str(target), options)
    flags = ["--prompt", "to be ", "--max-new-tokens=20", "--temperature", "1"]
    sources = ["latest", directory / id, tmp_path / "hf", tmp_path / "torch.pt", tmp_path / "dcp"]
    answers = {said(capsys, "--from", s, "--checkpoint_dir", directory, *flags) for s in sources}
    assert len(answers) == 1
    (answer,) = answers
    assert answer.startswith("to be ")
    assert len(answer) > len("to be \n")
    assert said(capsys, "--checkpoint_dir", directory, *flags, "--seed", "7") != answer


def test_what_is_printed_does_nothing_to_the_terminal(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "--checkpoint_dir", trained[0], "--temperature=9", "--max_new_tokens=300")
    assert all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top_k", "-1"], "--top_k is -1"),
        (["--promt", "x"], "--promt"),
        (["--checkpoint_dir", "/nowhere/at/all"], "holds no checkpoint"),
        (["--checkpoint_dir", "/nowhere/at/all", "--from", "best"], "no checkpoint matches 'best'"),
        (["--from", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--from", "newest"], "'newest' is not a selector"),
        (["--storage_options", "hunter2"], "entry 1"),
    ],
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
    said = refused(capsys, *argv)
    assert part in said
    assert "hunter2" not in said


def test_no_cuda_is_said(capsys: pytest.CaptureFixture[str], trained: tuple[Path, str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--device cpu" in refused(capsys, "--device", "cuda", "--checkpoint_dir", trained[0])


def test_a_vocabulary_without_tokenizer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100, block_size=8))
    torch.save({"model": model.state_dict(), "config": CONFIG}, tmp_path / "a.pt")
    assert "a vocabulary of 100" in refused(capsys, "--from", tmp_path / "a.pt")


def test_a_loaded_model_computes_what_was_saved(trained: tuple[Path, str]) -> None:
    directory, id = trained
    loaded = load_model("best", str(directory), "cpu")
    assert loaded.config.n_head == TINY.n_head
    expected = GPT2(TINY)
    state = {"model": expected, "optimizer": new_optimizer(expected)}
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        checkpointer.restore(str(directory / id), model_only=True)
    for (name, one), two in zip(loaded.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two), name


def draw(model: GPT2, prompt: list[int], **given: float) -> list[int]:
    values = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "seed": 1, "known_tokens": 257, "end": 256}
    return sample(model, prompt, **{**values, **given})  # type: ignore[arg-type]


def test_temperature_zero_is_the_likeliest_token() -> None:
    model = new_model(seed=2).eval()
    drawn = draw(model, [3], temperature=0)
    tokens = [3]
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert drawn == tokens[1:]
    assert draw(model, [3], temperature=1.0, top_k=1) == drawn


def test_more_tokens_than_the_model_sees_at_once() -> None:
    assert len(draw(new_model(), [1] * 30, max_new_tokens=20, end=-1)) == 20


def test_it_ends_at_the_end_and_never_draws_padding() -> None:
    model = new_model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300, block_size=8))
    drawn = draw(model, [1], max_new_tokens=300, temperature=50.0, end=-1)
    assert len(drawn) == 300
    assert max(drawn) < 257
    stop = drawn[5]
    first = drawn.index(stop)
    assert draw(model, [1], max_new_tokens=300, temperature=50.0, end=stop) == drawn[:first]


def test_the_global_generator_is_left_alone() -> None:
    model = new_model()
    before = torch.get_rng_state()
    draw(model, [1])
    assert torch.equal(before, torch.get_rng_state())
