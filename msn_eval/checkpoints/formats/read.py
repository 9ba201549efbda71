"""Weight files as plain data. Nothing from a file is executed."""

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.safetensors import read_metadata, read_tensors
from msn_eval.checkpoints.formats.torch_file import check_pickles, check_zip, load_checked
from msn_eval.errors import CheckpointError, name_place

Container = Literal["zip", "pickle", "safetensors"]
Content: TypeAlias = "Tensor | int | float | str | dict[str, Content]"

_FETCH, _UNPACK, _USE = "Fetch the file again.", "Unpack it first.", "Use a PyTorch or safetensors file."
_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "Run `git lfs pull` where it came from."),
    (b"<", "a web page or XML, not weights", f"The download went wrong. {_FETCH}"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first (gunzip or tar -xzf)."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "Fetch the file again, or save it again with torch.save."),
    (b"\x93NUMPY", "a NumPy array", _USE),
    (b"\x89HDF", "an HDF5 file", "Convert it to a PyTorch state dict first."),
    (b"GGUF", "a GGUF file", "Use the PyTorch or safetensors file that it was made from."),
    (b"#!", "a script, not weights", _USE),
)
# Protobuf field 1 (a small version number) and then field 2, 3 or 7: the first fields of ONNX and of a SavedModel.
_PROTOBUF_MODEL = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x3a]")
# How protocols 0 and 1 begin: a global, a marked container, or an empty container that is remembered.
_PICKLE_WITHOUT_VERSION = re.compile(rb"c[\w.]+\n[\w.]+\n|\((?:[dlt]|i[\w.]+\n|c[\w.]+\n|q)|[\]})](?:q|\.)")
_MIN_TORCH = (2, 10)  # earlier ones have holes in weights_only loading (CVE-2025-32434, CVE-2026-24747)
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 100
_SLACK_BYTES = 1 << 20
_SAVE_PLAINLY = "Save model.state_dict()."
_SHA256 = re.compile(r"\b[0-9a-fA-F]{64}\b")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file's tensors and plain values, notes for the user, and what a safetensors file states about itself."""

    content: Mapping[str, Content]
    sha256: str
    container: Container
    file_bytes: int
    notes: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


def sniff_container(head: bytes) -> Container | tuple[str, str]:
    """Return the container that `head`, the first 512 bytes, announces, or what the file is instead and a hint."""
    if not head.strip(b"\0"):
        return ("the file starts with zeros, as after a crash while writing" if head else "the file is empty"), _FETCH
    if _is_tar(head):
        return "a tar archive", "Unpack it first; a PyTorch checkpoint named .pth.tar is not a tar archive."
    for magic, what, hint in _NOT_WEIGHTS:
        if head.startswith(magic):
            return what, hint
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[:1] == b"\x80" or _PICKLE_WITHOUT_VERSION.match(head):
        return "pickle"
    if _PROTOBUF_MODEL.match(head):
        return "an ONNX or TensorFlow model", "Use the PyTorch or safetensors file that it was made from."
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON text, not weights", "Use the weight file itself; an index only names the files that hold them."
    return f"not a checkpoint format that is known (first bytes {head[:4].hex(' ')})", _USE


def _is_tar(head: bytes) -> bool:
    """Whether torch would take the file for a tar archive; a pickle can be written to be both."""
    try:
        tarfile.TarInfo.frombuf(head.ljust(tarfile.BLOCKSIZE, b"\0"), "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        return head[257:262] == b"ustar"
    return True


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch or safetensors file into memory, once, without executing anything from it.

    Raises:
        CheckpointError: The file is missing, damaged, changing, hostile, or of another kind.
    """
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < _MIN_TORCH:
        raise CheckpointError(f"torch {torch.__version__} loads files unsafely", hint="Install torch 2.10 or newer.")
    with name_place(str(path)):
        try:
            return _read_regular_file(path)
        except FileNotFoundError:
            hint = 'Check the path; "msn-eval ls checkpoints" lists the schemes.'
            raise CheckpointError("no such checkpoint file", hint=hint) from None
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            raise CheckpointError(what, hint="Check the path and its permissions.") from error


def _read_regular_file(path: Path) -> WeightFile:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe could make the reader wait for ever
        what = "is a folder" if stat.S_ISDIR(mode) else "is a pipe, device or socket"
        raise CheckpointError(f"{what}, not a checkpoint file", hint="Name the file.")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        size = before.st_size
        container = sniff_container(file.read(512))
        if isinstance(container, tuple):
            raise CheckpointError(container[0], hint=container[1])
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        notes: tuple[str, ...] = ()
        metadata: dict[str, str] = {}
        if container == "safetensors":
            loaded: object = read_tensors(path)
            metadata = read_metadata(path)
        else:
            check = check_zip if container == "zip" else check_pickles
            notes = check(file, file_bytes=size, sha256=sha256)
            loaded = load_checked(file)
        for after in (os.fstat(file.fileno()), path.stat()):
            if (after.st_size, after.st_mtime_ns, after.st_ino) != (size, before.st_mtime_ns, before.st_ino):
                raise CheckpointError("changed while it was being read", hint="Wait until it is written in full.")
    notes += _check_sidecar(path, sha256)
    content = _plain_content(loaded, file_bytes=size)
    return WeightFile(
        content=content, sha256=sha256, container=container, file_bytes=size, notes=notes, metadata=metadata
    )


def _check_sidecar(path: Path, sha256: str) -> tuple[str, ...]:
    """Compare with the hash in FILE.sha256, if there is one."""
    sidecar = path.with_name(path.name + ".sha256")
    if not os.path.isfile(sidecar) or sidecar.is_symlink():  # noqa: PTH113 - Path.is_file raises on too long names
        return ()
    stated = _SHA256.search(sidecar.read_bytes()[:4096].decode("ascii", "replace"))
    described = stated.group() if stated is not None else "no SHA-256 in it"
    if described.lower() != sha256:
        what = f"is not the file that {sidecar.name} beside it describes"
        what += f"\n  its SHA-256: {sha256}\n  described:   {described}"
        raise CheckpointError(what, hint="One of the two is damaged or of another version; fetch both again.")
    return (f"sha256 matches {sidecar.name}",)


def _plain_content(loaded: object, *, file_bytes: int) -> dict[str, Content]:
    """Return the mappings with text keys, tensors and plain values of `loaded`, with parameters as plain tensors."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a state dict", hint=_SAVE_PLAINLY)
    content: dict[str, Content] = {}
    tensor_bytes: dict[tuple[object, ...], int] = {}
    pending: list[tuple[Mapping[object, object], dict[str, Content], int]] = [(loaded, content, 1)]
    n_values = 0
    while pending:
        source, target, depth = pending.pop()
        n_values += len(source)  # what is shared counts each time: the result is a tree
        if n_values > _MAX_VALUES or depth > _MAX_DEPTH:
            what = f"holds more than {_MAX_VALUES:,} values, or values nested more than {_MAX_DEPTH} deep"
            raise CheckpointError(what, hint=_SAVE_PLAINLY)
        for name, value in source.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor):
                target[name] = tensor = _check_dense(value, name)
                identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                tensor_bytes[identity] = tensor.nbytes
            elif isinstance(value, bool | int | float | str):
                target[name] = value
            elif isinstance(value, Mapping):
                inner: dict[str, Content] = {}
                target[name] = inner
                pending.append((value, inner, depth + 1))
    if (total := sum(tensor_bytes.values())) > 2 * file_bytes + _SLACK_BYTES:
        hint = "Expanded tensors are refused; where it was made, save them with .contiguous()."
        raise CheckpointError(f"holds tensors of {total:,} bytes in a file of {file_bytes:,}", hint=hint)
    return content


def _check_dense(tensor: Tensor, name: str) -> Tensor:
    is_strided = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested and tensor.layout == torch.strided
    is_plain = is_strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}, {tensor.device}"
        what = f"holds tensor {name!r:.80}, which is not dense ({kind}) or has {tensor.numel():,} values in fewer bytes"
        raise CheckpointError(what, hint="Where it was made, save it with .to_dense().contiguous().")
    return tensor.detach()
