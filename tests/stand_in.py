"""A GPU to test with where there is none: values and kernels are the CPU's, the rules are CUDA's.

A tensor `OnDevice` keeps its values in a CPU tensor and says that it is on DEVICE, a type that
every build of torch has autograd for and nobody here uses. Operators refuse tensors of both places
together, but for copies and single numbers. `looks` lists what the host waited for. While a `Graph`
is captured a look and a copy from the host are errors, and nothing that exists is changed; a replay
runs the recorded operators again, at the addresses of the capture.

Not seen: which kernels a GPU has and how they round, its streams, its memory, autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("lazy", 0)
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
COPIES = ("copy_", "_to_copy", "_foreach_copy_")


class OnDevice(Tensor):
    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        layout = held.shape, held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(cls, *layout, dtype=held.dtype, device=DEVICE)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return STAND_IN.run(operator, args, kwargs or {})

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()


class Graph:
    """What a decoder uses of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recorded, self.overwritten = [], []

    def record(self, operator, args, kwargs):
        if operator._schema.is_mutable:
            target = kwargs.get("out", args[0])
            self.overwritten.append((target, target.clone()))
        result = operator(*args, **kwargs)
        self.recorded.append((operator, args, kwargs, result))
        return result

    def end(self) -> None:
        """A capture runs nothing."""
        for target, before in reversed(self.overwritten):
            target.copy_(before)

    def replay(self) -> None:
        with _disable_current_modes():
            for operator, args, kwargs, result in self.recorded:
                again = operator(*args, **kwargs)
                for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # they are equal in place and for views
                        old.copy_(new)

    def pool(self) -> None: ...


class Stream:
    def __init__(self, device: torch.device):
        assert device == DEVICE


class StandIn(TorchDispatchMode):
    """As a mode, for what has no tensor of the device among its arguments yet."""

    looks: list[str]
    streams: list[tuple[Graph, object]]  # graphs, and the streams that they were captured on
    graph: Graph | None = None

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.run(operator, args, kwargs or {})

    def run(self, operator, args, kwargs):
        name = operator._schema.name.removeprefix("aten::")
        tensors = tensors_in((args, list(kwargs.values())))
        others = [x for x in tensors if not isinstance(x, OnDevice)]
        has_ours, is_copy = len(others) < len(tensors), name in COPIES
        target = args[0].device if name == "copy_" else kwargs.get("device")
        is_here = has_ours if target is None else torch.device(target).type == DEVICE.type
        if has_ours and not is_copy:
            mixed = [x for x in others if x.ndim or name in ("cat", "stack")]
            assert not mixed, f"{name}: one tensor is on the device, one on the CPU"
        if has_ours and (name in LOOKS or is_masked(name, args) or (is_copy and not is_here)):
            assert self.graph is None, f"{name} waits for the device while a graph is captured"
            self.looks.append(name)
        if is_copy and is_here and others:
            assert self.graph is None, f"{name} reads the host while a graph is captured"
        args_held = changed(args, lambda x: x.held if isinstance(x, OnDevice) else x)
        kwargs_held = {k: x.held if isinstance(x, OnDevice) else x for k, x in kwargs.items()}
        if "device" in kwargs_held:
            kwargs_held["device"] = torch.device("cpu")
        run = self.graph.record if self.graph and is_here else call
        result = run(operator, args_held, kwargs_held)
        if operator._schema.is_mutable:
            return kwargs.get("out", args[0]) if operator._schema.returns else None
        return changed(result, OnDevice) if is_here else result

    @contextmanager
    def capture(self, graph: Graph, pool: None, stream: object) -> Iterator[None]:
        self.streams.append((graph, stream))
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None
            graph.end()


STAND_IN = StandIn()


def call(operator, args, kwargs):
    return operator(*args, **kwargs)


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


def changed(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """Lists of tensors, each changed; the rest as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(changed(part, change) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def is_masked(name: str, args: tuple) -> bool:
    """Indexing by a mask asks how much of it is True, unless all of that becomes one number."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    is_fill = name != "index" and args[2].numel() == 1
    return not is_fill and any(x is not None and x.dtype == torch.bool for x in args[1])


def placed(model: nn.Module) -> nn.Module:
    """The model with its parameters on the device."""
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and not isinstance(own.data, OnDevice):
                module._parameters[name] = nn.Parameter(OnDevice(own.data), own.requires_grad)
    return model


@pytest.fixture(name="gpu")
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, which is at work inside `with gpu`."""
    is_here = property(lambda tensor: tensor.device.type == DEVICE.type)
    monkeypatch.setattr(Tensor, "is_cuda", is_here)
    monkeypatch.setattr("minigrpo.sampling.has_graphs", lambda _, device: device == DEVICE)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", STAND_IN.capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, DEVICE.type, torch.cuda, raising=False)  # for checkpoint
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor copies to the device by an operator
    STAND_IN.looks, STAND_IN.streams = [], []
    yield STAND_IN
    torch._C._set_only_lift_cpu_tensors(before)
