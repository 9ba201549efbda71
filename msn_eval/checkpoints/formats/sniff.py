"""What a file is by its first bytes, before any library opens it."""

import re
import tarfile
from typing import Literal

Container = Literal["zip", "pickle", "safetensors"]

_NOT_WEIGHTS = (
    (b"<", "a web page or XML, not weights", "The download went wrong; fetch the file again."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first (gunzip or tar -xzf)."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first."),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "Unpack it first."),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it first."),
    (b"PK\x05\x06", "an empty zip archive", "Fetch the file again, or save it again with torch.save."),
    (b"PK\x07\x08", "one part of a split zip archive", "Join its parts first."),
    (b"\x93NUMPY", "a NumPy array", "Give a PyTorch or safetensors file."),
    (b"\x89HDF", "an HDF5 file", "Convert it to a PyTorch state dict first."),
    (b"GGUF", "a GGUF file", "Give the PyTorch or safetensors file that it was made from."),
    (b"\x7fELF", "a program, not weights", "Give a PyTorch or safetensors file."),
    (b"\x89PNG", "an image, not weights", "Give a PyTorch or safetensors file."),
    (b"\xff\xd8\xff", "an image, not weights", "Give a PyTorch or safetensors file."),
    (b"%PDF", "a PDF document, not weights", "Give a PyTorch or safetensors file."),
    (b"#!", "a script, not weights", "Give a PyTorch or safetensors file."),
)
_LFS = b"version https://git-lfs"
_LFS_SIZE = re.compile(rb"\nsize (\d{1,18})\n")
_TAR_MAGIC_AT = 257
# Protobuf field 1 (a small version number) and then field 2, 3 or 7: the first fields of ONNX and of a SavedModel.
_PROTOBUF_MODEL = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x3a]")
# What protocols 0 and 1 begin with: a global, a marked container, or an empty container that is remembered.
_PICKLE_WITHOUT_VERSION = re.compile(rb"c[\w.]+\n[\w.]+\n|\((?:[dlt]|i[\w.]+\n|c[\w.]+\n|q)|[\]})](?:q|\.)")
_LONGEST_SAFETENSORS_HEADER = 1 << 40


def sniff_container(head: bytes) -> Container | tuple[str, str]:
    """Give the container that `head`, the first 512 bytes, announces, or what is wrong and what to do about it."""
    if not head:
        return "the file is empty", "The download or copy went wrong; fetch it again."
    if not head.strip(b"\0"):
        return "the file starts with zeros, as after a crash while writing", "Fetch it again."
    if head.startswith(_LFS):
        return _pointer(head), "Run `git lfs pull` where it came from."
    if _is_tar(head):
        return "a tar archive", "Unpack it first; a PyTorch checkpoint named .pth.tar is no tar archive."
    for magic, what, remedy in _NOT_WEIGHTS:
        if head.startswith(magic):
            return what, remedy
    return _known_container(head) or _unknown(head)


def _known_container(head: bytes) -> Container | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_SAFETENSORS_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" or _PICKLE_WITHOUT_VERSION.match(head):
        return "pickle"
    return None


def _unknown(head: bytes) -> tuple[str, str]:
    if _PROTOBUF_MODEL.match(head):
        return "an ONNX or TensorFlow model", "Give the PyTorch or safetensors file that it was made from."
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "Give the PyTorch or safetensors file that it was made from."
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON text, not weights", "Give the weight file itself; an index only names the files that hold them."
    return (
        f"no checkpoint format that is known (first bytes {head[:4].hex(' ')})",
        "Give a PyTorch or safetensors file.",
    )


def _pointer(head: bytes) -> str:
    size = _LFS_SIZE.search(head)
    of = f" of {int(size.group(1)):,} bytes" if size else ""
    return f"a git-lfs pointer, not the weights{of}"


def _is_tar(head: bytes) -> bool:
    """Tell a tar by its name or, as torch would, by a checksum that fits: a pickle can be written to be both."""
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head.ljust(tarfile.BLOCKSIZE, b"\0"), "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return True
