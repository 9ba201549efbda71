"""Simulated CUDA devices: tensors that report `cuda:0` and hold their values in host memory.

A simulation refuses operations on tensors of different devices, counts how often the host waits for the device, and delivers
asynchronous copies only when the host waits for them. It logs copies, kernels and events with their streams, and refuses
races: work that uses a tensor which another stream may still write, memory that is used again too early, and page-locked
memory that the host changes while it is copied. Autocast casts as on CUDA, and NCCL is replaced by gloo. It knows nothing of
kernels or of memory.
"""

import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ROOT = Path(__file__).parents[2]
_OURS = tuple(str(_ROOT / package) for package in ("msn_eval", "msn_pretrain"))
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}
# The result of these, or its size, is needed by the host.
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "_linalg_eigh", "linalg_eigh"),
}


class MixedDevicesError(RuntimeError):
    """An operation that CUDA refuses: its tensors are on different devices."""


class RaceError(RuntimeError):
    """An operation whose result depends on how fast the streams and the host are."""


Clock = dict["Stream", int]  # how many operations of each stream have ended


def _advance(clock: Clock, other: Mapping["Stream", int]) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


class Stream:
    """A queue of work; number 0 is the default stream.

    Attributes:
        number: Of the stream.
        started: Operations that were queued so far.
        known: What has ended when the next operation starts.
        freed: Uses by other streams of memory that this stream allocated and that was freed.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, streams: "list[Stream] | None" = None) -> None:
        streams = _active().streams if streams is None else streams
        self.device = torch.device("cuda", _index_of(device))
        self.number = len(streams)
        streams.append(self)
        self.started = 0
        self.known: Clock = {}
        self.freed: list[Clock] = []

    def __enter__(self) -> "Stream":
        self._outer = _active().current_stream(self.device)
        _active().set_stream(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active().set_stream(self._outer)

    def wait_event(self, event: "Event") -> None:
        _active().note("wait", self)
        _advance(self.known, event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _active().wait("synchronize a stream", dict(self.known))

    def query(self) -> bool:
        """Whether the host knows that all work has ended; the work of a simulated stream ends as late as it can."""
        return _active().host.get(self, 0) >= self.started

    def is_capturing(self) -> bool:
        return False


class Event:
    """A point in the work of a stream."""

    def __init__(self, **options: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _active().current_stream()
        _active().note("record", stream)
        self.clock = dict(stream.known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _active().current_stream()).wait_event(self)

    def query(self) -> bool:
        return all(_active().host.get(stream, 0) >= number for stream, number in self.clock.items())

    def synchronize(self) -> None:
        cuda = _active()
        cuda.event_waits += 1
        cuda.deliver(self.clock)


class Usage:
    """Who uses the memory of a tensor and its views.

    Attributes:
        owner: The stream that allocated it.
        written: Stream and number of the last operation that wrote it.
        read: The last operation of each stream that read it since.
        recorded: Streams whose work the allocator awaits before it uses the memory again, by `record_stream`.
    """

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.written = (owner, owner.started)
        self.read: Clock = {}
        self.recorded: set[Stream] = {owner}

    def __del__(self) -> None:
        uses = dict([self.written]) | self.read
        foreign = {stream: number for stream, number in uses.items() if stream not in self.recorded}
        if foreign:
            self.owner.freed.append(foreign)


@dataclass(kw_only=True)
class Entry:
    """A line of the log.

    Attributes:
        kind: `upload` or `download`, copies to and from the device; `kernels`, one or several in a row; `record` and `wait`, of
            a stream for an event; `fetch`, the moment at which the host has the values of an asynchronous download;
            `host waits`, for all work of a stream.
        stream: Number of the stream.
        shape: Of the tensor that is copied.
        dtype: Of the tensor that is copied.
        pinned: Whether the host's side of the copy is page-locked.
        queue: The stream.
        last: Number of the last operation.
        known: What had ended when the first operation started.
    """

    kind: str
    stream: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    pinned: bool = False
    queue: Stream = field(repr=False)
    last: int = field(default=0, repr=False)
    known: Clock = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        shown = f"{self.kind} on stream {self.stream}"
        return f"{shown}: {self.dtype} {self.shape}{' pinned' if self.pinned else ''}" if self.dtype else shown


class DeviceTensor(Tensor):
    """A tensor on the simulated device; `host` has its values.

    The C++ part of torch sees a tensor on `meta`, for which autograd needs no driver.
    """

    host: Tensor
    usage: Usage
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, host: Tensor, index: int, usage: Usage | None = None) -> "DeviceTensor":
        layout = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, layout, False, device_for_backend_keys=torch.device("cuda", index))
        tensor.host = host.detach()
        tensor.index = index
        tensor.usage = usage or _active().allocate(index)
        return tensor

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def record_stream(self, stream: Stream) -> None:
        self.usage.recorded.add(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu().")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().execute(operation, args, kwargs or {})


@dataclass(kw_only=True)
class _Copy:
    """An asynchronous copy that the host does not know to have ended.

    Attributes:
        stream: It is queued there.
        number: Of the operation.
        target: The tensor of the host: destination of a download, source of an upload.
        values: What arrives there, or what was there when the copy was queued.
        is_download: The direction.
    """

    stream: Stream
    number: int
    target: Tensor
    values: Tensor
    is_download: bool

    def check_unchanged(self) -> None:
        now, then = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (self.target, self.values))
        if not torch.equal(now, then):
            raise RaceError(
                f"page-locked memory {tuple(self.target.shape)} was changed while it was copied to the device"
            )


class Device:
    """The devices that a process sees, as tests see them.

    Attributes:
        visible: The GPUs of the machine that are `cuda:0`, `cuda:1` and so on.
        waits: How often the host waited for all work of a stream, by reason and place in the packages.
        event_waits: How often it waited for an event, with later work still queued.
        log: Copies, kernels and events in the order in which the host queued them.
        host: What the host knows to have ended.
        copies: Asynchronous copies of which the host does not know this.
        pinning: How many tensors were page-locked, by the current device of the thread that did it.
        products: How many matrix products and convolutions were computed, by dtype of their first argument.
        communicators: Process groups whose ranks are known to use different GPUs.
    """

    def __init__(self, visible: Sequence[int] = (0,)) -> None:
        self.visible = tuple(visible)
        self.waits: Counter[str] = Counter()
        self.event_waits = 0
        self.log: list[Entry] = []
        self.host: Clock = {}
        self.copies: list[_Copy] = []
        self.pinned: dict[int, torch.UntypedStorage] = {}
        self.pinning: Counter[int] = Counter()
        self.products: Counter[torch.dtype] = Counter()
        self.communicators: set[str] = set()
        self.streams: list[Stream] = []
        self.defaults = [Stream(index, streams=self.streams) for index in range(len(visible))]
        self._local = threading.local()

    @property
    def current(self) -> int:
        """The index of the current device of this thread."""
        return getattr(self._local, "index", 0)

    def set_device(self, device: Any) -> int:
        before, self._local.index = self.current, _index_of(device)
        return before

    @contextmanager
    def use_device(self, device: Any) -> Iterator[None]:
        before = self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.current if device is None else _index_of(device)
        return getattr(self._local, "streams", {}).get(index, self.defaults[index])

    def set_stream(self, stream: Stream) -> None:
        self._local.streams = {**getattr(self._local, "streams", {}), stream.device.index: stream}

    def positions(self, kind: str, *, dtype: torch.dtype | None = None, stream: int | None = None) -> list[int]:
        """Return where the log has entries of a kind."""
        return [
            position
            for position, entry in enumerate(self.log)
            if entry.kind == kind and dtype in (None, entry.dtype) and stream in (None, entry.stream)
        ]

    def check_ahead(self, first: Sequence[int], then: Sequence[int], *, by: int = 1) -> None:
        """Check that the host queues entry i + `by` of `first` before entry i of `then`, for every i.

        With uploads of batches and fetches of their results, the device has work while the host handles results.

        Args:
            first: Positions in the log, as returned by `positions`.
            then: As many positions, at least `by` + 1.
            by: Number of batches that are ahead.
        """
        listed = "\n".join(f"  {position} {entry}" for position, entry in enumerate(self.log[:60]))
        assert len(first) == len(then) > by, f"{len(first)} entries before {len(then)} entries:\n{listed}"
        late = [number for number, position in enumerate(then[:-by]) if first[number + by] > position]
        assert not late, (
            f"{len(late)} of {len(then) - by} times entry {by} ahead comes too late, first at {then[late[0]]}:\n{listed}"
        )

    def may_overlap(self, one: int, other: int) -> bool:
        """Whether the device may work on two entries of the log at the same time: neither waits for the end of the other."""
        a, b = self.log[one], self.log[other]
        return b.known.get(a.queue, 0) < a.last and a.known.get(b.queue, 0) < b.last

    def note(self, kind: str, stream: Stream, tensor: Tensor | None = None, *, pinned: bool = False) -> None:
        """Add what a stream does next to the log; consecutive kernels are one entry."""
        last = self.log[-1] if self.log else None
        if kind == "kernels" and last is not None and last.kind == kind and last.queue is stream:
            last.last = stream.started + 1
            return
        entry = Entry(kind=kind, stream=stream.number, queue=stream, last=stream.started + 1, known=dict(stream.known))
        if tensor is not None:
            entry.shape, entry.dtype, entry.pinned = tuple(tensor.shape), tensor.dtype, pinned
        self.log.append(entry)

    def allocate(self, index: int) -> Usage:
        """Return the usage of new memory. Any memory that the stream allocated before, and that was freed, may be used for it."""
        stream = self.current_stream(index)
        for uses in stream.freed:
            busy = [other.number for other, number in uses.items() if stream.known.get(other, 0) < number]
            if busy:
                raise RaceError(f"stream {stream.number} allocates memory again that stream {busy[0]} may still use")
        stream.freed.clear()
        return Usage(stream)

    def queue(
        self,
        kind: str,
        index: int,
        *,
        read: Sequence[Tensor] = (),
        written: Sequence[Tensor] = (),
        copied: Tensor | None = None,
    ) -> int:
        """Queue one operation on the current stream of a device, and return its number there.

        Args:
            kind: As in the log.
            index: Of the device.
            read: Tensors of the device that it reads.
            written: Tensors of the device that it writes.
            copied: The tensor of the host, for a copy.
        """
        stream = self.current_stream(index)
        _advance(stream.known, self.host)
        for tensor in (*read, *written):
            writer, number = tensor.usage.written  # type: ignore[attr-defined]
            if writer is not stream and stream.known.get(writer, 0) < number:
                raise RaceError(
                    f"stream {stream.number} uses {tuple(tensor.shape)} that stream {writer.number} may still write"
                )
        for tensor in written:
            for reader, number in tensor.usage.read.items():  # type: ignore[attr-defined]
                if reader is not stream and stream.known.get(reader, 0) < number:
                    raise RaceError(
                        f"stream {stream.number} overwrites {tuple(tensor.shape)} that stream {reader.number} may still read"
                    )
        self.note(kind, stream, copied, pinned=copied is not None and self.is_pinned(copied))
        stream.started += 1
        stream.known[stream] = stream.started
        for tensor in read:
            tensor.usage.read[stream] = stream.started  # type: ignore[attr-defined]
        for tensor in written:
            tensor.usage.written = (stream, stream.started)  # type: ignore[attr-defined]
            tensor.usage.read = {}  # type: ignore[attr-defined]
        return stream.started

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

    def wait(self, reason: str, clock: Clock | None = None) -> None:
        """Count one wait, by default for the current stream, and deliver what is queued there."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            frame = frame.f_back  # type: ignore[assignment]
        place = "the test" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[f"{place}: {reason}"] += 1
        self.deliver(clock or self.current_stream().known)

    def wait_for_all_streams(self) -> None:
        self.wait("synchronize", {stream: stream.started for stream in self.streams})

    def deliver(self, clock: Clock) -> None:
        """Let the host know what has ended, and complete the asynchronous copies among it."""
        self.note("synchronize", self.current_stream())
        _advance(self.host, clock)
        ended = [copy for copy in self.copies if self.host.get(copy.stream, 0) >= copy.number]
        self.copies = [copy for copy in self.copies if self.host.get(copy.stream, 0) < copy.number]
        for copy in ended:
            if copy.is_download:
                copy.target.copy_(copy.values)
                self.note("fetch", copy.stream, copy.target)
            else:
                copy.check_unchanged()

    def download_later(self, destination: Tensor, source: "DeviceTensor") -> Tensor:
        number = self.queue("download", source.index, read=[source], copied=destination)
        destination.fill_(torch.nan if destination.is_floating_point() else 113)
        values = source.host.to(destination.dtype, copy=True)
        stream = self.current_stream(source.index)
        self.copies.append(_Copy(stream=stream, number=number, target=destination, values=values, is_download=True))
        return destination

    def upload(self, source: Tensor, index: int, *, into: "DeviceTensor | None" = None, non_blocking: bool) -> None:
        number = self.queue("upload", index, written=[] if into is None else [into], copied=source)
        if not non_blocking:
            self.wait("copy to the device", self.current_stream(index).known)
        elif self.is_pinned(source):  # other memory is copied before the call returns
            stream, values = self.current_stream(index), source.clone()
            self.copies.append(_Copy(stream=stream, number=number, target=source, values=values, is_download=False))

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        self.pinning[self.current] += 1
        return tensor

    def pin_copy(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DeviceTensor):
            raise RuntimeError(f"cannot pin a tensor of {tensor.device}, only dense CPU tensors can be pinned")  # noqa: TRY004
        return self.pin(tensor.clone())

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def execute(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator of ATen on the host values, after the checks of CUDA."""
        name = operation._schema.name.partition("::")[2]
        if name == "_fused_sdp_choice":
            return 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type in ("cuda", "meta")
        if not ours and not to_device:
            pinned = kwargs.get("pin_memory")
            result = operation(*args, **({**kwargs, "pin_memory": False} if pinned else kwargs))
            return self.pin(result) if pinned else result
        index = (
            _index_of(target) if to_device and torch.device(target).type == "cuda" else ours[0].index if ours else None
        )
        index = self.current if index is None else index
        if name == "copy_":
            return self._copy(args[0], args[1], bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False)))
        if name == "_to_copy":
            return self._convert(operation, args[0], kwargs, index if to_device else None)
        if name not in _COPIES:
            self._check_devices(name, operation, args, tensors, index)
        if operation.namespace == "c10d":
            return self._communicate(operation, args, kwargs, ours)
        traits = _traits(operation)
        if not traits.is_view:
            changed = [args[at] if at < len(args) else kwargs.get(item) for at, item in traits.written]
            written = [leaf for leaf in tree_leaves(changed) if isinstance(leaf, DeviceTensor)]
            self.queue("kernels", index, read=ours, written=written)
            if name in _PRODUCTS:
                self.products[args[0].dtype] += 1
            if ours:
                self._count(name, args, kwargs)
        host_kwargs = tree_map(_host, kwargs)
        if to_device:
            host_kwargs["device"] = torch.device("cpu")
        if name == "mm" and operation._overloadname.startswith("dtype"):  # a CPU has no products of bf16 in float32
            result = _host(args[0]).float() @ _host(args[1]).float()
        else:
            result = operation(*tree_map(_host, args), **host_kwargs)
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            return result
        outs = [kwargs[item] for item in traits.outs if item in kwargs]
        if outs:
            return outs[0] if len(outs) == 1 else tuple(outs)
        if traits.returns != "new":
            return args[0] if traits.returns == "written" else None
        usage = args[0].usage if traits.is_view else None
        return tree_map(lambda leaf: DeviceTensor(leaf, index, usage) if isinstance(leaf, Tensor) else leaf, result)

    def _check_devices(
        self, name: str, operation: Any, args: tuple[Any, ...], tensors: list[Tensor], index: int
    ) -> None:
        elsewhere = [tensor for tensor in tensors if tensor.device.index != index and (tensor.is_cuda or tensor.dim())]
        if name in _INDEXING and isinstance(args[0], DeviceTensor):  # indices are copied to the device
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor) and not leaf.is_cuda]
            elsewhere = [tensor for tensor in elsewhere if all(tensor is not item for item in indices)]
            if indices:
                self.wait("an index of the host")
        if elsewhere:
            places, shapes = {str(tensor.device) for tensor in elsewhere}, [tuple(tensor.shape) for tensor in elsewhere]
            listed = ", ".join(sorted(places))
            raise MixedDevicesError(f"{operation} mixes cuda:{index} and {listed}, with {shapes} on {listed}")

    def _communicate(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list["DeviceTensor"]
    ) -> Any:
        """Run a collective of NCCL by gloo, after NCCL's check that each rank has a GPU of its own."""
        group = next(item for item in args if isinstance(item, torch.ScriptObject))
        group = distributed.ProcessGroup.unbox(group)
        if group.group_name not in self.communicators:
            gpus = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
            own = torch.tensor([self.visible[tensors[0].index]])
            group.allgather([gpus], [own]).wait()
            ranks_of = Counter(int(gpu) for gpu in gpus)
            if len(ranks_of) < group.size():
                raise RuntimeError(f"Duplicate GPU detected: {ranks_of.most_common(1)[0][1]} ranks use one")
            self.communicators.add(group.group_name)
        self.queue("kernels", tensors[0].index, read=tensors, written=tensors)
        result = operation(*tree_map(_host, args), **tree_map(_host, kwargs))
        if isinstance(result, tuple | list):
            return (args[0], result[-1])
        return result

    def _count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_masked = name in _INDEXING and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
        )
        if name in _WAITING or is_masked or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(f"{name} by a mask" if is_masked else name)

    def _copy(self, destination: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if not isinstance(destination, DeviceTensor):
            assert isinstance(source, DeviceTensor)
            if non_blocking and self.is_pinned(destination):
                return self.download_later(destination, source)
            self.queue("download", source.index, read=[source], copied=destination)
            self.wait("copy to the host", self.current_stream(source.index).known)
        elif isinstance(source, DeviceTensor):
            self.queue("kernels", source.index, read=[source], written=[destination])
        else:
            self.upload(source, destination.index, into=destination, non_blocking=non_blocking)
        _host(destination).copy_(_host(source))
        return destination

    def _convert(self, operation: Any, source: Tensor, kwargs: dict[str, Any], index: int | None) -> Tensor:
        """Copy a tensor, to the device with the index, to the host, or for None without a `device` to where it is."""
        non_blocking = bool(kwargs.get("non_blocking"))
        options = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
        converted = operation(_host(source), **{**options, "non_blocking": False})
        if not isinstance(source, DeviceTensor):
            assert index is not None
            self.upload(source, index, non_blocking=non_blocking)
        elif index is not None or kwargs.get("device") is None:
            index = source.index if index is None else index
            self.queue("kernels", source.index, read=[source])
        elif non_blocking:  # torch allocates pinned memory for it
            return self.download_later(self.pin(converted), source)
        else:
            self.queue("download", source.index, read=[source], copied=converted)
            self.wait("copy to the host", self.current_stream(source.index).known)
            return converted
        return DeviceTensor(converted, index)


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, DeviceTensor) else leaf


class _Traits(NamedTuple):
    """What the schema of an operator says.

    Attributes:
        is_view: It returns views of its first argument.
        written: Position and name of each argument that it writes.
        outs: Names of its `out` arguments.
        returns: `written` for an operator that returns what it writes first, `nothing`, or `new` tensors.
    """

    is_view: bool
    written: tuple[tuple[int, str], ...]
    outs: tuple[str, ...]
    returns: str


@cache
def _traits(operation: Any) -> _Traits:
    schema = operation._schema
    written = [
        (position, item)
        for position, item in enumerate(schema.arguments)
        if item.alias_info is not None and item.alias_info.is_write
    ]
    returns = "new"
    if written and not schema.returns:
        returns = "nothing"
    elif written and schema.name.endswith("_"):
        returns = "written"
    return _Traits(
        is_view=operation.is_view or schema.name == "aten::_unsafe_view",
        written=tuple((position, item.name) for position, item in written),
        outs=tuple(item.name for _, item in written if item.kwarg_only),
        returns=returns,
    )


_devices: list[Device] = []


def _active() -> Device:
    return _devices[-1] if _devices else Device()


def _index_of(device: Any) -> int:
    """Return the index of a device that is given by a number, a name or a device; without one, the current device's."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return (_active().current if _devices else 0) if index is None else index


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().execute(operation, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Gives `cuda` its number, and makes tensors from numbers of Python on the host before they are copied."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        args, kwargs = tuple(map(_numbered, args)), {name: _numbered(value) for name, value in (kwargs or {}).items()}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None:
            return function(*args, **{**kwargs, "device": torch.device("cpu")}).to(device)
        if function is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if function is Tensor.cuda:
            return args[0].to(torch.device("cuda", _index_of(args[1] if len(args) > 1 else device)))
        return function(*args, **kwargs)


def _numbered(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value) == "cuda":
        return torch.device("cuda", _active().current)
    return value


def _autocast_rules() -> Iterator[tuple[Any, str]]:
    """Yield every operator that autocast changes on CUDA and how, from the lists that torch itself is compiled with."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    for rule in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        listed = re.search(rf"#define AT_FORALL_{rule}\(_\)((?:.*\\\n)*.*)\n", header)
        assert listed is not None
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", listed[1]):
            yield getattr(getattr(torch.ops.aten, name), overload or "default"), rule
    yield torch.ops.aten.norm.Scalar, "FP32_SET_OPT_DTYPE"
    yield torch.ops.aten.norm.ScalarOpt_dim, "FP32_SET_OPT_DTYPE"


@contextmanager
def compute_as_simulated() -> Iterator[None]:
    """Let a CPU compute what the simulated device computes, to the last bit: with autocast of CUDA and plain attention."""
    with autocast_as_on_cuda("cpu"), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def autocast_as_on_cuda(device_type: str) -> Iterator[None]:
    """Let autocast change the operators of CUDA inside the block. torch's own takes no simulated tensor for one of CUDA."""
    casts: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for operation, rule in _autocast_rules():
            changed = _autocast(device_type, operation, rule, casts)
            library.impl(operation, changed, f"Autocast{device_type.upper()}", allow_override=True)
        clear = torch.clear_autocast_cache

        def clear_casts() -> None:
            casts.clear()
            clear()

        with mock.patch.object(torch, "clear_autocast_cache", clear_casts):
            yield


def _autocast(
    device_type: str, operation: Any, rule: str, casts: dict[int, tuple[Tensor, Tensor]]
) -> Callable[..., Any]:
    key = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{device_type.upper()}"))

    def is_eligible(leaf: Any) -> bool:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
        return is_float and leaf.device.type == device_type

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        is_weight = tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
        if dtype == torch.float32 or not is_weight or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if id(tensor) not in casts:
            casts[id(tensor)] = tensor, tensor.to(dtype)
        return casts[id(tensor)][1]

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            eligible = list(filter(is_eligible, tree_leaves((args, kwargs))))
            if not eligible:
                return operation(*args, **kwargs)
            if rule == "FP32_SET_OPT_DTYPE":
                if operation in (torch.ops.aten.norm.Scalar, torch.ops.aten.norm.ScalarOpt_dim):
                    return operation(args[0].float(), *args[1:], **kwargs)
                at = [item.name for item in operation._schema.arguments].index("dtype")
                if is_eligible(args[0]) and (args[at] if at < len(args) else kwargs.get("dtype")) is None:
                    args, kwargs = (*args[:at], *args[at + 1 :]), kwargs | {"dtype": torch.float32}
                return operation(*args, **kwargs)
            low = torch.get_autocast_dtype(device_type)
            is_wide = rule == "FP32" or (rule == "PROMOTE" and any(leaf.dtype == torch.float32 for leaf in eligible))
            dtype = torch.float32 if is_wide else low
            args, kwargs = tree_map(lambda leaf: cast(leaf, dtype) if is_eligible(leaf) else leaf, (args, kwargs))
            return operation(*args, **kwargs)

    return run


def _driver(device: Device) -> dict[str, Any]:
    """Return what replaces the functions of torch.cuda."""
    state, memory = torch.zeros(16, dtype=torch.uint8), 80 << 30
    properties = SimpleNamespace(total_memory=memory, major=9, minor=0, name="simulated")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: len(device.visible),
        "current_device": lambda: device.current,
        "set_device": lambda number: device.set_device(number) and None,
        "device": device.use_device,
        "synchronize": lambda number=None: device.wait_for_all_streams(),
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
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext() if stream is None else stream,
        "current_stream": device.current_stream,
        "default_stream": lambda number=None: device.defaults[_index_of(number)],
        "set_stream": device.set_stream,
    }


@contextmanager
def simulate(*, visible: Sequence[int] = (0,)) -> Iterator[Device]:
    """Simulate CUDA devices inside the block, one for each of the GPUs that the process sees."""
    cuda = Device(visible)
    join = distributed.init_process_group

    def join_by_gloo(backend: str, **options: Any) -> None:
        join(backend.replace("nccl", "gloo"), **options)

    with ExitStack() as stack:
        patch = lambda owner, **values: stack.enter_context(mock.patch.multiple(owner, **values))  # noqa: E731
        patch(torch.cuda, **_driver(cuda))
        patch(
            torch.accelerator,
            current_stream=cuda.current_stream,
            current_device_index=lambda: cuda.current,
            set_device_index=cuda.set_device,
        )
        patch(distributed, init_process_group=join_by_gloo)
        patch(Tensor, pin_memory=lambda self, device=None: cuda.pin_copy(self), is_pinned=cuda.is_pinned)
        patch(torch, inference_mode=torch.no_grad)
        patch(torch.optim.Optimizer, _accelerator_graph_capture_health_check=lambda self: None)
        patch(torch.__future__, _overwrite_module_params_on_conversion=True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(autocast_as_on_cuda("cuda"))
        _devices.append(cuda)
        stack.callback(_devices.remove, cuda)
        stack.enter_context(_Dispatch())
        stack.enter_context(_Names())
        yield cuda
        for copy in cuda.copies:
            if not copy.is_download:
                copy.check_unchanged()
