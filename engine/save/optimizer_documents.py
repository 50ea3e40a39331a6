"""One document for optimizers that hold different parameters on different ranks. Pure."""

from __future__ import annotations

from typing import Any

from engine.errors import StateError


def merge_documents(key: str, documents: list[Any]) -> Any:
    """The union by parameter names. Groups with equal hyperparameters become one.

    Raises: StateError when two ranks say different things of one parameter.
    """
    groups: list[dict[str, Any]] = []
    counters: dict[str, Any] = {}
    home: dict[str, dict[str, Any]] = {}
    for document in documents:
        for group in document["param_groups"]:
            told = {name: value for name, value in group.items() if name != "params"}
            same = next((g for g in groups if {**g, "params": 0} == {**told, "params": 0}), None)
            if same is None:
                same = {**told, "params": []}
                groups.append(same)
            for name in group["params"]:
                if home.setdefault(name, same) is not same:
                    raise StateError(f"{key}: the hyperparameters of {name} differ between ranks")
                if name not in same["params"]:
                    same["params"].append(name)
        for name, value in document.get("counters", {}).items():
            if counters.setdefault(name, value) != value:
                raise StateError(f"{key}.{name} is {counters[name]} on one rank and {value} on another")
    return {"param_groups": groups, **({"counters": counters} if counters else {})}
