"""What a file is by its first bytes, before any library opens it."""

from typing import Literal

Container = Literal["zip", "pickle", "safetensors"]

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "Run `git lfs pull` where it came from."),
    (b"<", "a web page or XML, not weights", "The download went wrong; fetch the file again."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first (gunzip or tar -xzf)."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first."),
    (b"\x93NUMPY", "a NumPy array", "Give a PyTorch or safetensors file."),
    (b"\x89HDF", "an HDF5 file", "Convert it to a PyTorch state dict first."),
)
_TAR_MAGIC_AT = 257


def sniff_container(head: bytes) -> Container | tuple[str, str]:
    """Give the container that `head`, the first 512 bytes, announces, or what is wrong and what to do about it."""
    if not head:
        return "the file is empty", "The download or copy went wrong; fetch it again."
    if not head.strip(b"\0"):
        return "the file starts with zeros, as after a crash while writing", "Fetch it again."
    for magic, what, remedy in _NOT_WEIGHTS:
        if head.startswith(magic):
            return what, remedy
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "a tar archive", "Unpack it first; a PyTorch checkpoint named .pth.tar is no tar archive."
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    return (
        f"no checkpoint format that is known (first bytes {head[:4].hex(' ')})",
        "Give a PyTorch or safetensors file.",
    )
