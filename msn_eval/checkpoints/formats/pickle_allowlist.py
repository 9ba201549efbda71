"""Allowlist of pickle globals: what tensors are made of, and classes whose values are discarded.

For a class of the second kind the unpickler gets an inert stub of ours, which accepts any arguments and keeps nothing.
"""

import torch

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_TYPES = (
    *("Bool", "Bytes", "Complex128", "Complex64", "Float16", "Float32", "Float64", "Int16", "Int32", "Int64", "Int8"),
    *("LongLong", "Object", "Str", "UInt16", "UInt32", "UInt64", "UInt8", "Void"),
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OMEGACONF_NODES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "InterpolationResult", "Path", "String")


class Dropped:
    """A stub for a value that is discarded."""

    def __init__(self, *_: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Refuse items: of the dropped classes only defaultdict has some, and torch does not load them."""
        raise TypeError("it is a collections.defaultdict with items; save dict(it) instead")


class PlainDict(Dropped):
    """A stub for a dict with attributes: becomes a plain dict, which accepts items."""

    def __new__(cls, *_: object) -> dict[object, object]:  # type: ignore[misc]
        """Return an empty dict."""
        return {}


STUBS: dict[str, type] = {
    "argparse.Namespace": Dropped,
    "collections.defaultdict": Dropped,
    "typing.Any": Dropped,
    **{f"builtins.{kind.__name__}": Dropped for kind in (bool, bytes, dict, float, frozenset, int, list, str, tuple)},
    **{f"{module}.{name}": Dropped for module in _NUMPY for name in ("scalar", "_reconstruct")},
    **{f"numpy.{name}": Dropped for name in ("dtype", "ndarray")},
    **{f"numpy.dtypes.{name}DType": Dropped for name in _NUMPY_TYPES},
    **{f"{module}.{name}": Dropped for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{f"omegaconf.{name}": Dropped for name in ("dictconfig.DictConfig", "listconfig.ListConfig")},
    **{f"omegaconf.base.{name}": Dropped for name in ("ContainerMetadata", "Metadata")},
    **{f"omegaconf.nodes.{name}Node": Dropped for name in _OMEGACONF_NODES},
    "lightning.fabric.utilities.data.AttributeDict": PlainDict,
    "lightning_fabric.utilities.data.AttributeDict": PlainDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": PlainDict,
}

# Listed by name, so that a newer torch does not silently widen what is accepted.
STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
