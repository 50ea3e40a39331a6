"""Which checkpoint a selector means, in the directory or its mirror, without damaged ones. Runs on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from engine.directory.listing import Directory, Listed, committed
from engine.directory.record import CheckpointRecord, from_manifest
from engine.directory.resolve import checkpoint_at, log_passed_over, resolve
from engine.directory.selectors import Selector, choose, parse_selector
from engine.errors import DamagedError, NotFoundError, SelectorError
from engine.format.manifest import Manifest
from engine.format.names import parse_attempt_name
from engine.mirror.tiers import Tier, Tiers, both_tiers
from engine.storage.base import Storage
from engine.storage.open import open_storage


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint to restore.

    target: the directory or URI to open, or "" for the run's own directory or its mirror, as `tier` says.
    name: the checkpoint's directory there, which a copy may have renamed.
    """

    target: str
    name: str
    record: CheckpointRecord
    manifest: Manifest
    tier: Tier = "local"


def in_mirror(id: str) -> str:
    """The name of the mirror's copy among the copies that are passed over."""
    return f"mirror/{id}"


def copy_name(id: str, tier: Tier) -> str:
    """The name of one tier's copy among the copies that are passed over."""
    return in_mirror(id) if tier == "mirror" else id


def storage_of(
    target: str, tier: Tier, local: Storage, mirror: Storage | None, options: Mapping[str, str] | None
) -> Storage:
    """The storage of a `Choice` with this target and tier."""
    if tier == "mirror":
        assert mirror is not None, "every rank is given the same mirror"
        return mirror
    return open_storage(target, options) if target else local


def choose_checkpoint(
    storage: Storage,
    selector_text: str,
    *,
    passed_over: Collection[str] = (),
    options: Mapping[str, str] | None = None,
    mirror: Storage | None = None,
    listing: Directory | None = None,
) -> Choice | None:
    """The checkpoint that the selector means; None when `latest` finds nothing at all.

    Reads only what decides it: a listing, the manifest of each checkpoint that may be meant, and from the
    mirror only those that are not whole here.

    Args:
        passed_over: copies that have just failed to restore (`copy_name`); `latest` passes over them.
        listing: of `storage`, if the caller has a recent one.
        mirror: the second tier: the newest whole checkpoint of both tiers is chosen, the local copy first.
    Raises: SelectorError listing what there is; DamagedError when everything there is damaged or partial;
        StorageError when the storage cannot be listed: an outage is not "no checkpoints".
    """
    selector = parse_selector(selector_text)
    if selector.kind == "path":
        return _at_path(selector.text, options)
    where = storage.uri if mirror is None else f"{storage.uri} (and its mirror {mirror.uri})"
    view = _View(listing or _look(storage), mirror, selector, frozenset(passed_over))
    tiers = view.candidates()
    tiers = _without_void_marks(view, tiers, selector)
    try:
        found = resolve(tiers.listed, selector, where)
    except SelectorError:
        tiers = view.everything()  # to say what there is
        if selector.kind == "latest" and not committed(tiers.listed):
            if not tiers.listed:
                return None
            raise DamagedError(_nothing_whole(where, list(tiers.listed))) from None
        found = resolve(tiers.listed, selector, where)
    record = found.record
    untold = [item for item in found.passed_over if item.id not in view.passed_over]
    log_passed_over([view.directory(tiers, item.id).explained(item) for item in untold])
    tier: Tier = "mirror" if record.id in tiers.from_mirror else "local"
    return Choice("", record.id, record, view.directory(tiers, record.id).manifest(record.id), tier)


@dataclass(slots=True)
class _View:
    """What one choice sees of both tiers, each of them listed once."""

    local: Directory | None
    mirror: Storage | None
    selector: Selector
    passed_over: frozenset[str]
    _mirrored: Directory | None = field(init=False, default=None)
    _looked_at_mirror: bool = field(init=False, default=False)

    def candidates(self) -> Tiers:
        """The checkpoints that may be meant. The mirror is not asked for those that are whole here."""
        wanted = _may_match(self.selector)
        mine = _read(self.local, lambda name: wanted(name) and name not in self.passed_over)
        whole = {item.id for item in mine if item.status == "committed"}
        if whole and self.selector.kind == "id":
            return both_tiers(mine, [])  # decided: a mirror that does not answer must not matter
        theirs = _read(
            self._see_mirror(),
            lambda name: wanted(name) and name not in whole and in_mirror(name) not in self.passed_over,
        )
        return both_tiers(mine, theirs)

    def everything(self) -> Tiers:
        """All checkpoints of both tiers."""
        mine, theirs = (
            [] if directory is None else directory.everything()
            for directory in (self.local, self._see_mirror())
        )
        return both_tiers(
            [_unless_passed_over(item, item.id in self.passed_over) for item in mine],
            [_unless_passed_over(item, in_mirror(item.id) in self.passed_over) for item in theirs],
        )

    def directory(self, tiers: Tiers, id: str) -> Directory:
        """The directory of the copy that `tiers` has."""
        found = self._mirrored if id in tiers.from_mirror else self.local
        assert found is not None
        return found

    def _see_mirror(self) -> Directory | None:
        if self.mirror is not None and not self._looked_at_mirror:
            self._mirrored = _look(self.mirror)
            self._looked_at_mirror = True
        return self._mirrored


def _look(storage: Storage) -> Directory | None:
    try:
        return Directory(storage)
    except NotFoundError:
        return None


def _read(directory: Directory | None, wanted: Callable[[str], bool]) -> list[Listed]:
    return [] if directory is None else directory.read([name for name in directory.names if wanted(name)])


def _may_match(selector: Selector) -> Callable[[str], bool]:
    """Tells names of directories that the selector may mean."""
    match selector.kind:
        case "id":
            return lambda name: name == selector.text
        case "step":
            return lambda name: (parse_attempt_name(name) or (None,))[0] == selector.number
    return lambda name: True


def _unless_passed_over(item: Listed, passed_over: bool) -> Listed:
    if not passed_over:
        return item
    return replace(item, status="damaged", reason=item.reason or "failed to restore just now")


def _at_path(text: str, options: Mapping[str, str] | None) -> Choice:
    found = checkpoint_at(text, options)
    record = from_manifest(found.manifest, found.storage.uri, name=found.name)
    return Choice(found.parent, found.name, record, found.manifest)


def _nothing_whole(where: str, listed: list[Listed]) -> str:
    lines = [f"{item.id}: {item.reason}" for item in listed if item.status != "committed"]
    return (
        f"{where} holds no whole checkpoint, only damaged or unfinished ones ({'; '.join(lines)}). "
        "Nothing was deleted. Repair one, or start over in another --checkpoint_dir"
    )


def _without_void_marks(view: _View, tiers: Tiers, selector: Selector) -> Tiers:
    """The same without damage marks that are void. Only marks that change the answer are checked."""
    for marked in [item for item in tiers.listed if item.status == "damaged" and not item.reason]:
        if marked.record is None:
            continue
        whole = committed(tiers.listed)
        if _answer(whole, selector) == _answer([*whole, marked.record], selector):
            continue
        explained = view.directory(tiers, marked.id).explained(marked)
        listed = tuple(explained if item is marked else item for item in tiers.listed)
        tiers = replace(tiers, listed=listed)
    return tiers


def _answer(records: list[CheckpointRecord], selector: Selector) -> str | None:
    try:
        return choose(records, selector).id
    except SelectorError:
        return None
