"""The options of a Checkpointer, grouped by subject as validated values, without torch.

Each group is one value, like `Retention`. A keyword of `Checkpointer` sets one field of a group; give either
the keyword or the group, not both.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, cast, get_args

from engine.errors import ConfigError

OnFailure = Literal["warn", "raise"]
ReplicaCheck = Literal["sampled", "full", "off"]

_SHORT_CHARS = 80

Group = TypeVar("Group")


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach a directory or store.

    client: options of the fsspec file system, by name, such as {"endpoint_url": "http://localhost:9000"}.
    """

    client: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.client, Mapping):
            raise ConfigError(f"storage_options is {shown(self.client)}: it must be a dict, or None")


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """A second directory or URI that receives copies in the background.

    freq: copy interval and manual checkpoints only at multiples of this step, or never if it is 0. All other
        checkpoints are always copied.
    """

    directory: str | os.PathLike[str]
    freq: int = 1

    def __post_init__(self) -> None:
        check_addresses(mirror=self.directory)
        if not is_whole(self.freq) or self.freq < 0:
            raise ConfigError(
                f"mirror_freq is {shown(self.freq)}: it must be a whole number of steps, 0 or more"
            )


@dataclass(frozen=True, slots=True)
class Checks:
    """Checks of every save, beyond sizes and digests.

    replicas: "sampled" compares the values that several ranks hold: all of them at the first save and the
        first after a restore, then small tensors and samples of large ones. "full" compares all of them at
        every save. "off" compares JSON values only. True and False mean "full" and "off".
    snapshots: read every save back and fail it unless it equals, to the bit, the state at the call of
        `save`. Slow; for finding code that changes weights while they are copied.
    """

    replicas: ReplicaCheck = "sampled"
    snapshots: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", _replica_check(self.replicas))
        check_switches(check_snapshots=self.snapshots)


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What happens after a save fails because of storage or coordination.

    on_failure: "warn" logs the failure and passes it to `on_event`; the next save tries again. "raise" makes
        the next call raise it.
    max_failures: with "warn", this many failures in a row raise, on all ranks alike.
    """

    on_failure: OnFailure = "warn"
    max_failures: int = 3

    def __post_init__(self) -> None:
        if self.on_failure not in get_args(OnFailure):
            raise ConfigError(f"on_failure is {shown(self.on_failure)}: it must be 'warn' or 'raise'")
        if not is_whole(self.max_failures) or self.max_failures < 1:
            raise ConfigError(
                f"max_failures is {shown(self.max_failures)}: it must be a whole number, 1 or more"
            )


def checks_of(checks: Checks | None, check_replicas: str | bool, check_snapshots: bool) -> Checks:
    """The checks that the keywords ask for. Raises ConfigError for an invalid one."""
    keywords: dict[str, tuple[str, Any]] = {
        "check_replicas": ("replicas", check_replicas),
        "check_snapshots": ("snapshots", check_snapshots),
    }
    return _grouped(Checks, "checks", checks, keywords)


def failure_policy(failures: FailurePolicy | None, on_failure: str, max_failures: int) -> FailurePolicy:
    """The policy that the keywords ask for. Raises ConfigError for an invalid one."""
    keywords = {"on_failure": ("on_failure", on_failure), "max_failures": ("max_failures", max_failures)}
    return _grouped(FailurePolicy, "failures", failures, keywords)


def mirror_options(
    mirror: str | os.PathLike[str] | MirrorOptions | None, mirror_freq: int
) -> MirrorOptions | None:
    """The mirror that the keywords ask for. Raises ConfigError for an invalid one."""
    if isinstance(mirror, MirrorOptions):
        return _grouped(MirrorOptions, "mirror", mirror, {"mirror_freq": ("freq", mirror_freq)})
    if mirror is None:
        MirrorOptions("", mirror_freq)  # an invalid interval is an error without a mirror, too
        return None
    return MirrorOptions(mirror, mirror_freq)


def storage_options(options: Mapping[str, str] | StorageOptions | None) -> StorageOptions:
    """Storage options as a value. Raises ConfigError for invalid ones."""
    if isinstance(options, StorageOptions):
        return options
    return StorageOptions() if options is None else StorageOptions(options)


def check_addresses(**addresses: object) -> None:
    """ConfigError unless each is a path or URI in UTF-8: ranks send each other the paths of checkpoints."""
    for name, address in addresses.items():
        if not isinstance(address, str | os.PathLike) or isinstance(os.fspath(address), bytes):
            raise ConfigError(f"{name} is {shown(address)}: it must be a path or a URI")
        try:
            os.fspath(address).encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{address!a} is not text in UTF-8: give another directory") from None


def check_switches(**given: object) -> None:
    """ConfigError unless each is True or False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {shown(value)}: it must be True or False")


def is_whole(value: object) -> bool:
    """Whether this is a whole number of Python, NumPy or torch, and not a bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False
    return str(getattr(value, "dtype", "")) not in ("bool", "torch.bool")


def shown(value: object) -> str:
    """A value for a message: short ones as they are, others by their class."""
    items = value if isinstance(value, tuple | list | set) else (value,)
    if all(isinstance(item, str | int | float | None) for item in items):
        text = ascii(value)
        if len(text) <= _SHORT_CHARS:
            return text
    return f"a {type(value).__name__}"


def _grouped(kind: type[Group], name: str, group: object, keywords: Mapping[str, tuple[str, Any]]) -> Group:
    """One group of options, given as a group or by single keywords.

    Args:
        name: the keyword that takes the group.
        keywords: keyword -> (field of the group, value given).
    Raises: ConfigError for a value of another class, and for a keyword given beside the group.
    """
    if group is None:
        return kind(**dict(keywords.values()))
    if not isinstance(group, kind):
        raise ConfigError(f"{name} is {shown(group)}: it must be a {kind.__name__}, or None")
    defaults = {each.name: each.default for each in fields(cast(Any, kind))}
    for keyword, (to, value) in keywords.items():
        if value != defaults[to]:
            raise ConfigError(
                f"{name} and {keyword} are both given: use {name}={kind.__name__}({to}=...) alone"
            )
    return group


def _replica_check(setting: object) -> ReplicaCheck:
    named = {True: "full", False: "off"}.get(setting) if isinstance(setting, bool) else setting
    if named in get_args(ReplicaCheck):
        return cast(ReplicaCheck, named)
    raise ConfigError(f'check_replicas is {setting!r}: it must be "sampled", "full" or "off"')
