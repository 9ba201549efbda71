"""A simulated CUDA device: tensors that report `cuda:0` and hold their values in host memory.

It refuses operations on tensors of different devices, counts how often the host waits for the device, and delivers asynchronous
copies only when the host waits for them. It knows nothing of kernels, of memory, or of more than one stream, and autocast
changes no dtype on it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[2]
_OURS = tuple(str(_ROOT / package) for package in ("msn_eval", "msn_pretrain"))
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# The result of these, or its size, is needed by the host.
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "_linalg_eigh", "linalg_eigh"),
}


class MixedDevicesError(RuntimeError):
    """An operation that CUDA refuses: its tensors are on different devices."""


class DeviceTensor(Tensor):
    """A tensor on the simulated device; `host` has its values.

    The C++ part of torch sees a tensor on `meta`, for which autograd needs no driver.
    """

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> "DeviceTensor":
        layout = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, layout, requires_grad, device_for_backend_keys=CUDA)
        tensor.host = host.detach()
        return tensor

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu().")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().execute(operation, args, kwargs or {})


class Device:
    """The device as tests see it.

    Attributes:
        waits: How often the host waited for all queued work, by reason and place in the packages.
        event_waits: How often it waited for an event, with later work still queued.
        queued: Copies to the host that are not delivered: destination and values.
        delivered: Copies that are, since the start.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.event_waits = 0
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.delivered = 0
        self.pinned: dict[int, torch.UntypedStorage] = {}

    def measure_waits(self, run: Callable[[], object]) -> int:
        """Return how often the host waits while `run` runs."""
        before = self.waits.total()
        run()
        return self.waits.total() - before

    def check_budget(self, name: str, budgets: dict[str, float], spent: float) -> None:
        listed = "\n".join(f"  {number} {place}" for place, number in self.waits.most_common(12))
        assert spent <= budgets[name], (
            f"{name}: the host waits {spent:g} times, the budget is {budgets[name]}:\n{listed}"
        )

    def wait(self, reason: str) -> None:
        """Count one wait, and deliver everything that is queued."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            frame = frame.f_back  # type: ignore[assignment]
        place = "the test" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[f"{place}: {reason}"] += 1
        self.deliver(self.delivered + len(self.queued))

    def deliver(self, until: int) -> None:
        while self.queued and self.delivered < until:
            destination, values = self.queued.pop(0)
            destination.copy_(values)
            self.delivered += 1

    def copy_later(self, destination: Tensor, values: Tensor) -> None:
        destination.fill_(torch.nan if destination.is_floating_point() else 113)
        self.queued.append((destination, values.to(destination.dtype, copy=True)))

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def execute(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator of ATen on the host values, after the checks of CUDA."""
        name = operation._schema.name.partition("::")[2]
        if name == "_fused_sdp_choice":
            return 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type in ("cuda", "meta")
        if not on_device and not to_device:
            pinned = kwargs.get("pin_memory")
            result = operation(*args, **({**kwargs, "pin_memory": False} if pinned else kwargs))
            return self.pin(result) if pinned else result
        if on_device and name not in _COPIES:
            self._check_devices(name, operation, args, tensors)
            self._count(name, args, kwargs)
        if name == "copy_":
            return self._copy(args[0], args[1], bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False)))
        if name == "_to_copy":
            return self._convert(operation, args[0], kwargs, to_device)
        host_kwargs = tree_map(_host, kwargs)
        if to_device:
            host_kwargs["device"] = torch.device("cpu")
        if name == "mm" and operation._overloadname.startswith("dtype"):  # a CPU has no products of bf16 in float32
            result = _host(args[0]).float() @ _host(args[1]).float()
        else:
            result = operation(*tree_map(_host, args), **host_kwargs)
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            return result
        written = _written_by(operation, args, kwargs)
        if written is not None:
            return written[0] if len(written) == 1 else written
        return tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _check_devices(self, name: str, operation: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        on_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        if name in _INDEXING and isinstance(args[0], DeviceTensor):  # indices are copied to the device
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            on_host = [tensor for tensor in on_host if all(tensor is not index for index in indices)]
            if any(not isinstance(index, DeviceTensor) for index in indices):
                self.wait("an index of the host")
        if on_host:
            raise MixedDevicesError(
                f"{operation} mixes cuda:0 and cpu, with {[tuple(t.shape) for t in on_host]} on cpu"
            )

    def _count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_masked = name in _INDEXING and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
        )
        if name in _WAITING or is_masked or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(f"{name} by a mask" if is_masked else name)

    def _copy(self, destination: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(source, DeviceTensor) and not isinstance(destination, DeviceTensor):
            if non_blocking and self.is_pinned(destination):
                self.copy_later(destination, source.host)
                return destination
            self.wait("copy to the host")
        elif isinstance(destination, DeviceTensor) and not isinstance(source, DeviceTensor) and not non_blocking:
            self.wait("copy to the device")
        _host(destination).copy_(_host(source))
        return destination

    def _convert(self, operation: Any, source: Tensor, kwargs: dict[str, Any], to_device: bool) -> Tensor:
        target = kwargs.get("device")
        options = {**kwargs, "device": torch.device("cpu")} if target is not None else kwargs
        converted = operation(_host(source), **{**options, "non_blocking": False})
        if isinstance(source, DeviceTensor) and target is not None and not to_device:
            if kwargs.get("non_blocking"):  # torch allocates pinned memory for it
                self.copy_later(self.pin(converted), converted.clone())
            else:
                self.wait("copy to the host")
            return converted
        if not isinstance(source, DeviceTensor) and not kwargs.get("non_blocking"):
            self.wait("copy to the device")
        return DeviceTensor(converted)


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, DeviceTensor) else leaf


def _written_by(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the tensors that an in-place operator, or one with `out`, returns; None for an operator that returns new ones."""
    written = [item for item in operation._schema.arguments if item.alias_info is not None and item.alias_info.is_write]
    if not written:
        return None
    outs = tuple(kwargs[item.name] for item in written if item.kwarg_only and item.name in kwargs)
    if outs:
        return outs
    if not operation._schema.returns:
        return (None,)
    return (args[0],) if operation._schema.name.endswith("_") else None


_devices: list[Device] = []


def _active() -> Device:
    return _devices[-1] if _devices else Device()


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().execute(operation, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Gives `cuda` its number, and makes tensors from numbers of Python on the host before they are copied."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        args, kwargs = tuple(map(_numbered, args)), {name: _numbered(value) for name, value in (kwargs or {}).items()}
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") == CUDA:
            return function(*args, **{**kwargs, "device": torch.device("cpu")}).to(CUDA)
        if function is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(CUDA)
        if function is Tensor.cuda:
            return args[0].to(CUDA)
        if function is Tensor.is_pinned:
            return _active().is_pinned(args[0])
        if function is Tensor.pin_memory:
            if isinstance(args[0], DeviceTensor):
                raise RuntimeError("cannot pin a tensor of cuda:0, only dense CPU tensors can be pinned")
            return _active().pin(args[0].clone())
        return function(*args, **kwargs)


def _numbered(value: Any) -> Any:
    return CUDA if isinstance(value, torch.device | str) and str(value) == "cuda" else value


class _Event:
    def __init__(self, **options: Any) -> None:
        self.until = 0

    def record(self, stream: Any = None) -> None:
        device = _active()
        self.until = device.delivered + len(device.queued)

    def synchronize(self) -> None:
        device = _active()
        device.event_waits += 1
        device.deliver(self.until)


def _driver(device: Device) -> dict[str, Any]:
    """Return what replaces the functions of torch.cuda."""
    state, memory = torch.zeros(16, dtype=torch.uint8), 80 << 30
    properties = SimpleNamespace(total_memory=memory, major=9, minor=0, name="simulated")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda number: None,
        "synchronize": lambda number=None: device.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda number=None: (memory, memory),
        "max_memory_allocated": lambda number=None: 0,
        "memory_allocated": lambda number=None: 0,
        "memory_reserved": lambda number=None: 0,
        "reset_peak_memory_stats": lambda number=None: None,
        "get_device_name": lambda number=None: properties.name,
        "get_device_capability": lambda number=None: (properties.major, properties.minor),
        "get_device_properties": lambda number=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda number=None: state.clone(),
        "set_rng_state": lambda values, number=None: None,
        "get_rng_state_all": lambda: [state.clone()],
        "set_rng_state_all": lambda values: None,
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "Event": _Event,
    }


@contextmanager
def simulate() -> Iterator[Device]:
    """Simulate one CUDA device inside the block."""
    device = Device()
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    start = iterator.__init__

    def start_without_pinning(self: Any, loader: Any) -> None:  # its thread needs a driver
        with mock.patch.dict(loader.__dict__, pin_memory=False):
            start(self, loader)

    stream = SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: device.wait("synchronize"))
    with ExitStack() as stack:
        accelerator = {"current_stream": stream, "current_device_index": 0, "set_device_index": None}
        stack.enter_context(mock.patch.multiple(torch.cuda, **_driver(device)))
        for name, value in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, return_value=value))
        stack.enter_context(mock.patch.object(iterator, "__init__", start_without_pinning))
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"))
        stack.enter_context(mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        _devices.append(device)
        stack.callback(_devices.remove, device)
        stack.enter_context(_Dispatch())
        stack.enter_context(_Names())
        yield device


@pytest.fixture
def simulate_cuda() -> Callable[[], Any]:
    """Return a context manager that simulates one CUDA device; it yields the device, whose counts are still there after it."""
    return simulate
