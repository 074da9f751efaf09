"""Runs code for a GPU where there is none: shapes, types and devices without a number.

Torch's fake tensors compute what every operation makes of shape, dtype and device, and refuse what
a GPU refuses: operands on two devices, or of types that do not go together. This adds what a build
of torch for CPUs cannot do with them (indexing, autocast, generators, events), and finds what makes
the host wait for the GPU, which a recording of a CUDA graph forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda:0")
aten = torch.ops.aten


class Waits(AssertionError):
    """The host would wait for the GPU here."""


class FakeGpu:
    """What a test may say and ask while fake tensors are in use."""

    def __init__(self) -> None:
        self.strict = False
        """Whether waiting for the GPU is an error now."""
        self.host: Iterator[int] = iter(())
        """The numbers that are asked for, one after the other."""

    def wait(self, what: str) -> None:
        if self.strict:
            raise Waits(what)


@contextmanager
def fake_gpu(monkeypatch: Any) -> Iterator[FakeGpu]:
    """Within, `cuda:0` is a device like any other, and no tensor has numbers."""
    gpu = FakeGpu()
    generator = torch.Generator
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    with FakeTensorMode() as mode, _Dispatched(gpu), _Called(gpu, mode):
        yield gpu


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes with numbers, for what is done before the GPU is given them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _on_gpu(*values: Any) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)


class _Dispatched(TorchDispatchMode):
    """Sees every operation, those that libraries and composite operations make too."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal):
            if _on_gpu(*args):
                self._gpu.wait(str(func))
        elif packet is aten._to_copy and kwargs.get("device") is not None:
            here, there = args[0].device.type, torch.device(kwargs["device"]).type
            if here != there:
                self._gpu.wait(f"a copy from {here} to {there}")
        elif packet is aten.copy_ and args[0].device.type != args[1].device.type:
            late = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not (late and _on_gpu(args[1])):
                self._gpu.wait(f"a copy from {args[1].device.type} to {args[0].device.type}")
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    """Does what torch's own binding would ask a GPU's driver for."""

    def __init__(self, gpu: FakeGpu, mode: FakeTensorMode) -> None:
        super().__init__()
        self._gpu, self._mode = gpu, mode

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and _on_gpu(args[0]):
            return self._index(*args)
        if func is Tensor.__setitem__ and _on_gpu(args[0]):
            part, value = self._index(args[0], args[1]), args[2]
            return part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)
        if func is Tensor.__bool__ and _on_gpu(args[0]):
            self._gpu.wait("a decision by a number of the GPU")
            return True
        if func in (Tensor.item, Tensor.__int__):
            if _on_gpu(args[0]):
                self._gpu.wait("a number of the GPU")
            return next(self._gpu.host)
        if func is Tensor.to and type(args[0]) is Tensor:
            args = (self._mode.from_tensor(args[0]), *args[1:])
        if func is Tensor.contiguous:
            whole = args[0].is_contiguous()
            return args[0] if whole else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.numpy:
            return with_numbers(func)(*args)
        if func in (Tensor.exponential_, torch.multinomial):
            kwargs.pop("generator", None)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == GPU:
            self._gpu.wait("a tensor made of the host's numbers")
            made = with_numbers(func)(*args, **{**kwargs, "device": "cpu"})
            return self._mode.from_tensor(made).to(GPU)
        return func(*args, **kwargs)

    def _index(self, value: Tensor, index: Any) -> Tensor:
        """value[index] by the operations that torch makes of it."""
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            used = sum(part is not None and part is not Ellipsis for part in parts)
            parts = (*parts[:at], *[slice(None)] * (value.dim() - used), *parts[at + 1 :])
        dim, tensors = 0, []
        for part in parts:
            if part is None:
                value = value.unsqueeze(dim)
                dim += 1
            elif isinstance(part, slice):
                end = 2**63 - 1 if part.stop is None else part.stop
                value = aten.slice(value, dim, part.start or 0, end, part.step or 1)
                dim += 1
            elif isinstance(part, Tensor) and part.dim():
                if part.dtype == torch.bool:
                    self._gpu.wait("an index by a mask")
                tensors += [None] * (dim - len(tensors)) + [part]
                dim += 1
            else:
                if isinstance(part, Tensor):
                    self._gpu.wait("an index by a tensor without dimensions")
                    part = 0
                value = value.select(dim, part)
        return aten.index(value, tensors) if tensors else value
