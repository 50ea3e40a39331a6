"""Buffers for tensors that cannot be read into directly: they are filled first, and copied at the end.

Those are tensors whose elements share memory (expanded ones), tensors that overlap with each other (views of
one storage), and lazily conjugated or negated ones. Values and strides stay exact: where the checkpoint holds
different values for the same memory, the restore fails and names the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from engine.errors import RestoreFailedError
from engine.state.local_boxes import carries_boxes
from engine.state.tensor_format import bytes_of

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
Span = tuple[int, int, str]
"""(first address, one after the last, name) of a tensor's memory."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BounceBuffers:
    """Buffers for those of the destinations that need one.

    Attributes:
        tensors: all destinations, with buffers in place of such tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        spans: list[Span] = []
        odd: dict[str, torch.Tensor] = {}
        self._shares: dict[str, str] = {}
        for name, tensor in tensors.items():  # there may be 10,000: one pass, and little work for each
            if type(tensor) not in _PLAIN_TYPES or carries_boxes(tensor):
                continue
            if tensor.is_contiguous():
                span_bytes = tensor.nbytes
            else:
                span_bytes = _span_bytes(tensor)
                if may_overlap(tensor):
                    self._shares[name] = name
            if span_bytes:
                begin = tensor.data_ptr()
                spans.append((begin, begin + span_bytes, name))
            if tensor.is_neg() or tensor.is_conj():
                odd[name] = tensor
        self._shares.update(neighbours(spans))
        odd.update({name: tensors[name] for name in self._shares})
        self._live = {name: tensor.detach() for name, tensor in odd.items()}
        self._beside = {name: _plain_copy(tensor) for name, tensor in self._live.items()}
        self.tensors = {**tensors, **self._beside}

    def finish(self) -> None:
        """Copy the buffers into the live tensors.

        Raises: RestoreFailedError when tensors that share memory were saved with different values.
        """
        for name, live in self._live.items():
            _write(live, self._beside[name])
        for name, other in self._shares.items():
            if not torch.equal(_bits(self._live[name]), _bits(self._beside[name])):
                which = f"{name} and {other} share" if name != other else f"elements of {name} share"
                raise RestoreFailedError(
                    f"{which} memory here, but the checkpoint holds different values for it: the state is "
                    "now undefined; give the tensor memory of its own with clone() and restore again"
                )


def may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may lie in the same memory."""
    if tensor.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def neighbours(spans: Iterable[Span]) -> dict[str, str]:
    """The tensors that overlap with another one, each with that one's name."""
    found: dict[str, str] = {}
    farthest: Span = (0, 0, "")
    for span in sorted(spans):
        begin, end, name = span
        if begin < farthest[1]:
            found.setdefault(name, farthest[2])
            found.setdefault(farthest[2], name)
        if end > farthest[1]:
            farthest = span
    return found


def _span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a strided tensor to the end of its last."""
    if not tensor.numel():
        return 0
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in dims)) * tensor.element_size()


def _plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in contiguous memory of their own."""
    return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _write(live: torch.Tensor, values: torch.Tensor) -> None:
    if not may_overlap(live):
        live.copy_(values)
        return
    # Element by element into the memory behind it: where elements share memory, any of them may win.
    if not (live.is_conj() or live.is_neg()):
        word = _WORDS[live.element_size()]
        live, values = live.view(word), values.view(word)
    places = torch.zeros((), dtype=torch.int64, device=live.device)
    for size, stride in zip(live.shape, live.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size, device=live.device) * stride
    memory = live.as_strided((int(places.max()) + 1,), (1,))
    memory[places.reshape(-1)] = values.reshape(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return bytes_of(_plain_copy(tensor))
