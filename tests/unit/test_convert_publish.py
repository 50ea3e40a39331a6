"""The commit of an import or a merge: only what is there as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.convert import publish
from engine.directory.listing import list_checkpoints
from engine.errors import SaveFailedError
from engine.storage.local import LocalStorage
from tests.support.conversions import import_checkpoint


@pytest.mark.parametrize("lost", ["shard-00000.safetensors", "shard-00000.json"])
def test_a_file_that_is_gone_by_the_commit_allows_none(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage that reports success and loses a file; what is left of the attempt goes, too."""
    torch.save({"model": {"w": torch.ones(4, 4)}}, tmp_path / "w.pt")
    real = publish.write_rank

    def loses(storage: Any, attempt: str, *args: Any, **more: Any) -> Any:
        receipt = real(storage, attempt, *args, **more)
        storage.delete_file(f"{attempt}/{lost}")
        return receipt

    monkeypatch.setattr(publish, "write_rank", loses)
    monkeypatch.setattr(publish, "CONFIRM_SECS", 0.0)
    with pytest.raises(SaveFailedError, match=f"wrote {lost} with .* rank 0 does not see it"):
        import_checkpoint(str(tmp_path / "w.pt"), str(tmp_path / "run"))
    assert list_checkpoints(LocalStorage(tmp_path / "run")) == []
