"""Decoder: how an image file becomes the pixels that an encoder takes, by Pillow, by torchvision or by a GPU's nvJPEG.

Which files are refused, and which pixels anything but a plain JPEG gives, is Pillow's word under every decoder.
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

from msn_eval.config.request import DECODERS
from msn_eval.data.images import (
    BadImageError,
    EvalTransform,
    crop_corner,
    decode_image,
    read_header,
    resize_and_crop,
    resized_size,
)
from msn_eval.errors import UsageError

Pixels = NDArray[np.uint8]  # (crop, crop, 3)
_DECODED_AT_ONCE = 64  # on the device, before they are resized: a GPU's memory is for the encoder
# Inside the data of a scan, 255 is followed by 0 or by the number of a restart. Anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_END_OF_IMAGE = b"\xff\xd9"


def decoder_version(decoder: str) -> str:
    """Give the decoder with its version, as records show it."""
    # Without the build's suffix: the same libjpeg decodes beside every CUDA.
    torchvision = version("torchvision").partition("+")[0]
    match decoder:
        case "pillow":
            return f"pillow {_pillow_version}"
        case "torchvision":
            return f"torchvision {torchvision}"
        case _:
            assert decoder in DECODERS
            return f"nvjpeg of torchvision {torchvision}, CUDA {torch.version.cuda}"


def check_decoder(decoder: str, device: torch.device) -> None:
    """Raise UsageError where a decoder cannot work with this device or this torchvision, by decoding a JPEG with it."""
    assert decoder in DECODERS
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
            f"--decoder {decoder}: the installed torchvision {version('torchvision')} decodes no JPEG with it: {reason}",
            hint="Choose --decoder pillow, or install the torchvision that was made for this torch.",
        ) from error


def decode_pixels(content: bytes, transform: EvalTransform, decoder: str) -> Pixels:
    """Give the pixels of one image file by a decoder that works on the CPU, `pillow` or `torchvision`.

    returns: (crop, crop, 3) uint8
    Raises BadImageError for the same files under both. EXIF orientation is ignored.
    """
    match decoder:
        case "pillow":
            return _by_pillow(content, transform)
        case "torchvision":
            return _by_torchvision(content, transform)
        case _:
            raise AssertionError(f"{decoder} decodes no single image on the CPU")


def _by_pillow(content: bytes, transform: EvalTransform) -> Pixels:
    return resize_and_crop(decode_image(content), transform)


def _by_torchvision(content: bytes, transform: EvalTransform) -> Pixels:
    header = read_header(content)
    if header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return _by_pillow(content, transform)
    (decoded,) = _decoded_or_none([content], torch.device("cpu"))
    if decoded is None or decoded.shape != (3, header.height, header.width):
        # Of damaged files libjpeg's two users take different ones; what the one refuses is the other's to judge.
        return _by_pillow(content, transform)
    width, height = resized_size(header.width, header.height, transform)
    # The channels stay last, as they were decoded: so torch resizes uint8 at once, in integers as Pillow does but with
    # shorter weights. A batch made by image[None] would have strides that torch takes for channels first.
    batch = decoded.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    resized = interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
    return cast(Pixels, _cropped(resized, transform).contiguous().numpy())


def _cropped(image: Tensor, transform: EvalTransform) -> Tensor:
    """Give the centre crop of a (3, height, width) image with its channels last."""
    left, top = crop_corner(image.shape[2], image.shape[1], transform)
    return image[:, top : top + transform.crop, left : left + transform.crop].permute(1, 2, 0)


def undecoded(content: bytes, transform: EvalTransform) -> bytes | Pixels:
    """Give a file's bytes as they are where a GPU may decode them, else its pixels by the rule of `torchvision`.

    Left to the GPU are JPEGs that nothing can be asked about: whole, one scan, in the colours YCbCr.
    Raises BadImageError.
    """
    header = read_header(content)
    return content if _is_plain_jpeg(header, content) else _by_torchvision(content, transform)


def _is_plain_jpeg(header: ImageFile.ImageFile, content: bytes) -> bool:
    """Tell whether a JPEG says plainly what its colours are, and has one scan that goes on to the end of the file.

    nvJPEG takes stored RGB for YCbCr, and grey filling for the rest of a torn file.
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
    """Give the pixels of a batch that `undecoded` prepared, on the device, in the order of the batch.

    returns: (b, crop, crop, 3) uint8, zeros for files that cannot be used; and by their rows, why they cannot
    """
    pixels = torch.zeros(len(batch), transform.crop, transform.crop, 3, dtype=torch.uint8, device=device)
    failures: dict[int, str] = {}
    files = [(row, item) for row, item in enumerate(batch) if isinstance(item, bytes)]
    here = [(row, item) for row, item in enumerate(batch) if not isinstance(item, bytes)]
    if here:
        rows = torch.tensor([row for row, _ in here], device=device)
        pixels[rows] = torch.from_numpy(np.stack([item for _, item in here])).to(device)
    for start in range(0, len(files), _DECODED_AT_ONCE):
        some = files[start : start + _DECODED_AT_ONCE]
        images = _decoded_or_none([content for _, content in some], device)
        for (row, content), image in zip(some, images, strict=True):
            try:
                pixels[row] = _resized_on_device(content, image, transform, device)
            except BadImageError as error:
                failures[row] = str(error)
    return pixels, failures


def _resized_on_device(
    content: bytes, decoded: Tensor | None, transform: EvalTransform, device: torch.device
) -> Tensor:
    if decoded is None or decoded.ndim != 3 or len(decoded) != 3:
        return torch.from_numpy(_by_pillow(content, transform).copy()).to(device)
    width, height = resized_size(decoded.shape[2], decoded.shape[1], transform)
    # Rounded after either direction, as Pillow does: both at once would part from it by one level in a value of five.
    image = decoded.float()
    for size in ((decoded.shape[1], width), (height, width)):
        image = (interpolate(image[None], size, mode="bilinear", antialias=True)[0] + 0.5).floor_()
    return _cropped(image, transform).to(torch.uint8)


def _decoded_or_none(contents: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs, giving None for those that are refused."""
    try:
        return list(_decode_jpegs(contents, device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # no fault of the files
        raise
    except RuntimeError:
        if len(contents) == 1:
            return [None]
        return [image for content in contents for image in _decoded_or_none([content], device)]


def _decode_jpegs(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to (3, height, width) uint8 on a device. Raises RuntimeError where one of them is refused."""
    # Importing torchvision takes a second, which only those pay who decode with it.
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the whole of torchvision.io, once an image
        files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        return cast("list[Tensor]", decode_jpeg(files, mode=ImageReadMode.RGB, device=device))
