"""Decoders: how an image file becomes the pixels that an encoder takes, by Pillow, torchvision or a GPU's nvJPEG.

Under every decoder, Pillow decides which files are refused, and decodes everything except plain JPEGs.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL import __version__ as _pillow_version
from torch import Tensor
from torch.nn.functional import interpolate

from msn_eval.data.images import (
    BadImageError,
    EvalTransform,
    compute_crop_corner,
    compute_resized_size,
    decode_image,
    read_header,
    resize_and_crop,
)
from msn_eval.errors import UsageError

Pixels = NDArray[np.uint8]  # (crop, crop, 3)
_DECODED_AT_ONCE = 64  # on the device, before they are resized: a GPU's memory is for the encoder
_RESIZED_AT_ONCE = 1 << 24  # pixels, in float32
# In the data of a scan, 255 is followed by 0 or by the number of a restart. Anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_END_OF_IMAGE = b"\xff\xd9"


def decoder_version(decoder: str) -> str:
    """Return the decoder with its version, as in records."""
    # Without the build's suffix: the same libjpeg is built for every CUDA.
    torchvision = version("torchvision").partition("+")[0]
    versions = {
        "pillow": f"pillow {_pillow_version}",
        "torchvision": f"torchvision {torchvision}",
        "nvjpeg": f"nvjpeg of torchvision {torchvision}, CUDA {torch.version.cuda}",
    }
    return versions[decoder]


def check_decoder(decoder: str, device: torch.device) -> None:
    """Decode a JPEG. Raises UsageError where the decoder does not work with this device or this torchvision."""
    if decoder == "pillow":
        return
    if decoder == "nvjpeg" and device.type != "cuda":
        raise UsageError(
            f"--decoder nvjpeg: it decodes on a CUDA device, and this run computes on {device.type}.",
            hint="Choose --decoder torchvision or pillow, or --device cuda where there is one.",
        )
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decode_jpegs([file.getvalue()], device if decoder == "nvjpeg" else torch.device("cpu"))
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"--decoder {decoder}: the installed torchvision {version('torchvision')} cannot decode a JPEG: {reason}",
            hint="Choose --decoder pillow, or install the torchvision that was built for this torch.",
        ) from error


def decode_pixels(content: bytes, transform: EvalTransform, decoder: str) -> Pixels:
    """Decode one image file on the CPU, by `pillow` or `torchvision`. EXIF orientation is ignored.

    Returns:
        (crop, crop, 3) uint8.

    Raises:
        BadImageError: The file cannot be used. Both decoders refuse the same files.
    """
    decoded = _decode_plain_jpeg(content) if decoder == "torchvision" else None
    if decoded is None:
        return resize_and_crop(decode_image(content), transform)
    width, height = compute_resized_size(decoded.shape[2], decoded.shape[1], transform)
    # The channels stay last, as decoded: so torch resizes uint8 directly, in integers as Pillow does but with shorter
    # weights. A batch made by image[None] would have strides that torch takes for channels first.
    batch = decoded.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    resized = interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
    return cast(Pixels, _crop(resized, transform).contiguous().numpy())


def decode_tensor(content: bytes) -> Tensor:
    """Decode one image file on the CPU by torchvision, or by Pillow what is not a plain JPEG. EXIF orientation is ignored.

    Returns:
        (height, width, 3) uint8, contiguous.

    Raises:
        BadImageError: The file cannot be used. Pillow refuses the same files.
    """
    decoded = _decode_plain_jpeg(content)
    return (
        torch.from_numpy(np.array(decode_image(content))) if decoded is None else decoded.permute(1, 2, 0).contiguous()
    )


def _decode_plain_jpeg(content: bytes) -> Tensor | None:
    """Return the (3, height, width) pixels of a JPEG, or None where Pillow has to decide.

    Pillow and torchvision accept different damaged files, though both use libjpeg.

    Raises:
        BadImageError: The header is refused.
    """
    header = read_header(content)
    if header.format == "JPEG" and header.mode in ("RGB", "L"):
        (decoded,) = _try_decode_jpegs([content], torch.device("cpu"))
        if decoded is not None and decoded.shape == (3, header.height, header.width):
            return decoded
    return None


def _crop(image: Tensor, transform: EvalTransform) -> Tensor:
    """Return the centre crop of a (3, height, width) image with its channels last."""
    left, top = compute_crop_corner(image.shape[2], image.shape[1], transform)
    return image[:, top : top + transform.crop, left : left + transform.crop].permute(1, 2, 0)


def prepare_for_device(content: bytes, transform: EvalTransform) -> bytes | Pixels:
    """Return a file's bytes unchanged where a GPU may decode them, else the pixels of decoder `torchvision`.

    The GPU decodes unambiguous JPEGs: complete, one scan, in the colours YCbCr.

    Raises:
        BadImageError: The file cannot be used.
    """
    header = read_header(content)
    return content if _is_plain_jpeg(header, content) else decode_pixels(content, transform, "torchvision")


def _is_plain_jpeg(header: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether a JPEG states its colours and has one scan that continues to the end of the file.

    nvJPEG takes stored RGB for YCbCr, and fills the rest of a truncated file with grey.
    """
    if header.format != "JPEG" or header.mode != "RGB":
        return False
    transform = header.info.get("adobe_transform")
    if transform == 0 or (transform is None and "jfif" not in header.info):
        return False
    assert header.fp is not None
    scan_end = _SCAN_END.search(content, header.fp.tell())
    return scan_end is not None and content[scan_end.start() :] == _END_OF_IMAGE


def decode_on_device(
    batch: Sequence[bytes | Pixels], transform: EvalTransform, device: torch.device
) -> tuple[Tensor, Mapping[int, str]]:
    """Decode a batch of `prepare_for_device` on a device.

    Returns:
        (b, crop, crop, 3) uint8 on the device, in the order of the batch, zeros for files that cannot be used; and the
        reasons by their rows.
    """
    on_host: list[tuple[int, Pixels]] = [(row, item) for row, item in enumerate(batch) if not isinstance(item, bytes)]
    files = [(row, item) for row, item in enumerate(batch) if isinstance(item, bytes)]
    failures: dict[int, str] = {}
    rows: list[int] = []
    resized: list[Tensor] = []  # parts of the batch, in the order of `rows`
    for start in range(0, len(files), _DECODED_AT_ONCE):
        chunk = files[start : start + _DECODED_AT_ONCE]
        by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for (row, content), image in zip(
            chunk, _try_decode_jpegs([content for _, content in chunk], device), strict=True
        ):
            if image is not None:
                by_size.setdefault(tuple(image.shape), []).append((row, image))
                continue
            try:
                on_host.append((row, decode_pixels(content, transform, "pillow")))
            except BadImageError as error:
                failures[row] = str(error)
                on_host.append((row, np.zeros((transform.crop, transform.crop, 3), dtype=np.uint8)))
        for (_, height, width), group in by_size.items():
            count = max(1, _RESIZED_AT_ONCE // (height * width))
            for first in range(0, len(group), count):
                part = group[first : first + count]
                rows += [row for row, _ in part]
                resized.append(_resize_on_device(torch.stack([image for _, image in part]), transform))
    if on_host:
        rows += [row for row, _ in on_host]
        stacked = torch.from_numpy(np.stack([item for _, item in on_host]))
        resized.append(stacked.to(device, non_blocking=True))
    order = torch.tensor(rows).argsort().to(device, non_blocking=True)
    return torch.cat(resized)[order], failures


def _resize_on_device(images: Tensor, transform: EvalTransform) -> Tensor:
    """Resize and crop (k, 3, height, width) uint8 images of one size to (k, crop, crop, 3)."""
    width, height = compute_resized_size(images.shape[3], images.shape[2], transform)
    left, top = compute_crop_corner(width, height, transform)
    # Rounded after each direction, as Pillow does: both at once would differ from it by one level in a value of five.
    wide = interpolate(images.float(), (images.shape[2], width), mode="bilinear", antialias=True)
    wide = (wide[..., left : left + transform.crop] + 0.5).floor_()
    high = interpolate(wide, (height, transform.crop), mode="bilinear", antialias=True)
    high = (high[:, :, top : top + transform.crop] + 0.5).floor_()
    return high.permute(0, 2, 3, 1).to(torch.uint8)


def _try_decode_jpegs(contents: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs, with None for those that are refused."""
    try:
        return list(_decode_jpegs(contents, device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # not caused by the files
        raise
    except RuntimeError:
        if len(contents) == 1:
            return [None]
        return [image for content in contents for image in _try_decode_jpegs([content], device)]


def _decode_jpegs(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to (3, height, width) uint8 on a device. Raises RuntimeError where one of them is refused."""
    # Importing torchvision takes a second, so only runs that decode with it do.
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision.io as a module, once per image
        files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        if device.type == "cuda":
            # torchvision decodes on a stream of its own, which does not wait for this one. The memory that it is given may
            # still be read by queued kernels, since torch reuses it in the order of this stream.
            torch.cuda.current_stream(device).synchronize()
        return cast("list[Tensor]", decode_jpeg(files, mode=ImageReadMode.RGB, device=device))
