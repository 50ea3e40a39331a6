"""`merge`: the weighted average of what several checkpoints hold, with its parents on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer, CheckpointRecord
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.merge import merge_checkpoints, shares_of
from engine.convert.tensors import whole
from engine.directory.listing import read_manifest
from engine.directory.verify import verify_checkpoint
from engine.errors import ConfigError, DamagedError, StateMismatchError
from engine.storage.local import LocalStorage
from tests.support.tiny_gpt2 import new_model, new_optimizer, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CheckpointRecord]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, train(directory, steps=3)[1]


def merge(
    directory: Path, records: list[CheckpointRecord], target: Path, weights: list[float] | None = None
) -> dict[str, torch.Tensor]:
    storage = LocalStorage(directory)
    record = merge_checkpoints([(storage, r.id) for r in records], LocalStorage(target), weights=weights)
    return tensors(target, record.id)


def tensors(directory: Path, id: str) -> dict[str, torch.Tensor]:
    with CheckpointTensors(LocalStorage(directory), id) as source:
        return {name: whole(source, name) for name in source.infos}


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
def test_every_weight_is_the_average(
    trained: tuple[Path, list[CheckpointRecord]],
    tmp_path: Path,
    weights: list[float] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.convert.tensors.WINDOW_BYTES", 1000)
    directory, records = trained
    merged = merge(directory, records, tmp_path, weights)
    given = [tensors(directory, record.id) for record in records]
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    assert merged.keys() == {name for name in given[0] if name.startswith("model.")}
    for name, found in merged.items():
        expected = sum(t[name].double() * share for t, share in zip(given, shares, strict=True))
        # One rounding at most, in the last place: thirds are no exact numbers.
        torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0, msg=name)
    if weights == [0.0, 1.0, 0.0]:
        assert all(torch.equal(found, given[1][name]) for name, found in merged.items())


def test_the_result_is_a_checkpoint_to_start_from(
    trained: tuple[Path, list[CheckpointRecord]], tmp_path: Path
) -> None:
    directory, records = trained
    storage = LocalStorage(directory)
    target = LocalStorage(tmp_path)
    record = merge_checkpoints([(storage, r.id) for r in records[:2]], target)
    manifest = read_manifest(target, record.id)
    assert manifest.parents == (records[0].id, records[1].id)
    assert (manifest.reasons, manifest.parent, manifest.step) == (("merge",), None, 2)
    assert (manifest.tokens, dict(manifest.metrics)) == (48, {})
    assert manifest.config == read_manifest(storage, records[0].id).config
    assert verify_checkpoint(target, record.id).ok
    model = new_model(seed=8)
    with Checkpointer(tmp_path, {"model": model, "optimizer": new_optimizer(model)}) as checkpointer:
        assert checkpointer.restore(model_only=True) is not None


def test_into_the_directory_of_its_parents(
    trained: tuple[Path, list[CheckpointRecord]], tmp_path: Path
) -> None:
    records = train(tmp_path, steps=2)[1]
    storage = LocalStorage(tmp_path)
    record = merge_checkpoints([(storage, r.id) for r in records], storage)
    assert record.sequence == records[-1].sequence + 1


def test_whole_numbers_come_from_the_first_and_equal_tensors_stay_as_they_are(tmp_path: Path) -> None:
    records = []
    for count in (3, 5):
        module = torch.nn.BatchNorm1d(4)
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.fill_(count)
        module.weight.data.fill_(0.1)  # a third of it three times is not a tenth
        with Checkpointer(tmp_path / "run", {"model": module}, retention=None) as checkpointer:
            record = checkpointer.save(count).result()
        assert record is not None
        records.append(record)
    merged = merge(tmp_path / "run", records, tmp_path / "new", [1.0, 2.0])
    assert merged["model.num_batches_tracked"].item() == 3
    assert torch.equal(merged["model.weight"], torch.full((4,), 0.1))


def test_every_difference_between_architectures_is_named(tmp_path: Path) -> None:
    def save(module: torch.nn.Module, config: dict[str, Any]) -> CheckpointRecord:
        with Checkpointer(tmp_path / "run", {"model": module}, retention=None, config=config) as ckpt:
            record = ckpt.save(1).result()
        assert record is not None
        return record

    one = save(torch.nn.Linear(3, 2), {"model": "nano", "n_head": 2})
    two = save(torch.nn.Linear(4, 2, bias=False), {"model": "gpt2", "n_head": 4})
    three = save(torch.nn.Sequential(torch.nn.Linear(3, 2)), {})
    with pytest.raises(StateMismatchError) as caught:
        merge(tmp_path / "run", [one, two, three], tmp_path / "new")
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        f"{two.id}: lacks model.bias",
        f"{two.id}: model.weight is F32 [2, 4], not F32 [2, 3]",
        f"{two.id}: its model is 'gpt2', not 'nano'",
        f"{two.id}: its n_head is 4, not 2",
        f"{three.id}: also has model.0.weight",
    ):
        assert part in said, part
    assert not (tmp_path / "new").exists()


def test_damage_commits_nothing(tmp_path: Path) -> None:
    records = train(tmp_path / "run", steps=2)[1]
    file = tmp_path / "run" / records[1].id / "shard-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[5000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedError):
        merge(tmp_path / "run", records, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lease-00000001"]


@pytest.mark.parametrize(
    ("weights", "count", "words"),
    [
        (None, 1, "needs at least two checkpoints"),
        ([1.0], 2, "1 weights for 2 checkpoints"),
        ([1.0, -1.0], 2, "0 or more"),
        ([0.0, 0.0], 2, "not all 0"),
        ([1.0, float("nan")], 2, "1,nan"),
        ([1.0, float("inf")], 2, "1,inf"),
        ([1e308, 1e308], 2, "0 or more"),
    ],
)
def test_weights_that_cannot_work(weights: list[float] | None, count: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shares_of(weights, count)


def test_only_ratios_of_weights_matter() -> None:
    assert shares_of([1, 1, 2], 3) == [0.25, 0.25, 0.5]
    assert shares_of(None, 2) == [0.5, 0.5]
