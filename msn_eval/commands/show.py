"""`msn-eval show`: nearest images under masking, attention maps, and a map of the classes."""

import argparse
import base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.config.yaml_config import check_choice
from msn_eval.errors import UsageError, did_you_mean
from msn_eval.program import split_list

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from msn_eval.data.images import ImageSet
    from msn_eval.features.encoder import Encoder
    from msn_eval.reports.style import Theme

    Drawing = Callable[[Theme], Figure]  # what a picture shows is computed once, and drawn for each theme

_PICTURES = {
    "neighbours": "Each image with more and more patches hidden, and the training images nearest to what is left. "
    "✓ and a solid frame: same class. ✗ and a dashed frame: a different class.",
    "attention": "Attention of the class token to the patches in the last block: mean of the heads over the image, then each "
    "head. Each map has its own scale.",
    "classes": "Validation images by the first two principal components of their features.",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--checkpoint", metavar="X", required=True, help="a Vision Transformer; see `ls checkpoints`")
    for name in ("mean", "std"):
        text = f"{name} of the images' channels, on the [0, 1] scale; default: the checkpoint's own"
        parser.add_argument(f"--{name}", metavar="R,G,B", help=text)
    parser.add_argument("--data", metavar="X", help="see `ls datasets`; default $MSN_EVAL_DATA")
    parser.add_argument("--subset", metavar="A", default="5imgs@1", help="training images to search; default 5imgs@1")
    parser.add_argument("--image", metavar="ID", action="append", help="a validation image, CLASS/FILE; repeatable")
    parser.add_argument(
        "--images", metavar="N", type=int, default=4, help="number of images if none is named; default 4"
    )
    parser.add_argument("--masked", metavar="A,B", default="0,50,90", help="percent of patches hidden; default 0,50,90")
    parser.add_argument("--neighbours", metavar="N", type=int, default=5, help="nearest images shown; default 5")
    parser.add_argument("--pictures", metavar="A,B", default=",".join(_PICTURES), help=f"default {','.join(_PICTURES)}")
    parser.add_argument("--limit", metavar="N", type=int, default=50, help="class map: images per class; default 50")
    parser.add_argument(
        "--format", choices=("png", "html"), default="png", help="image files, or one page; default png"
    )
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of hidden patches and untrained weights; default 0"
    )
    parser.add_argument("--out", metavar="DIR", default="pictures", help="default pictures")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Draw the pictures and print their paths."""
    from msn_eval.config.request import parse_channels
    from msn_eval.data import find_data_name, read_dataset
    from msn_eval.data.class_names import describe_classes
    from msn_eval.features.encoder import load_encoder
    from msn_eval.features.patch_drop import check_patches
    from msn_eval.files.atomic import prepare_folder, write_atomically
    from msn_eval.reports.pictures import as_png

    wanted = _parse_pictures(options.pictures)
    masked = _parse_shares(options.masked)
    for name, least in (("images", 1), ("neighbours", 1), ("limit", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)} is out of range", hint=f"Use at least {least}.")
    data_name = find_data_name(options.data)
    folder = Path(options.out)
    prepare_folder(folder, option="--out")
    encoder = load_encoder(
        options.checkpoint,
        device=options.device,
        mean=parse_channels("--mean", options.mean),
        std=parse_channels("--std", options.std),
        seed=options.seed,
    )
    check_patches(encoder)
    data = read_dataset(data_name)
    names = describe_classes(data.classes, Path(data_name) if Path(data_name).is_dir() else None)
    chosen = _choose_images(data.val, options.image, options.images)
    drawings: dict[str, Drawing] = {}
    for name in wanted:
        match name:
            case "neighbours":
                drawings[name] = _draw_neighbours(encoder, data.train, chosen, options, masked, names)
            case "attention":
                drawings[name] = _draw_attention(encoder, chosen, names)
            case _:
                drawings[name] = _draw_classes(encoder, data.val.first_of_each_class(options.limit), names)
    if options.format == "html":
        pictures = {name: (as_png(draw("light")), as_png(draw("dark"))) for name, draw in drawings.items()}
        page = _render_page(f"{encoder.checkpoint.name} on {data.name}", pictures)
        write_atomically(folder / "show.html", page.encode())
        print(folder / "show.html")
        return 0
    for name, draw in drawings.items():
        write_atomically(folder / f"{name}.png", as_png(draw("light")))
        print(folder / f"{name}.png")
    return 0


def _parse_pictures(text: str) -> list[str]:
    wanted = split_list(text)
    for name in wanted or [text]:
        check_choice("--pictures", name, _PICTURES)
    return list(dict.fromkeys(wanted))


def _parse_shares(text: str) -> list[float]:
    """Parse percentages into ascending shares in [0, 1)."""
    try:
        shares = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 <= share < 1 for share in shares):
        raise UsageError(
            f"--masked {text} is out of range", hint="Use percentages from 0 to below 100, such as 0,50,90."
        )
    return shares


def _choose_images(val: "ImageSet", named: Sequence[str] | None, count: int) -> "ImageSet":
    """Return the named images, or the first image of `count` classes, evenly spread over the class list."""
    if named:
        unknown = [image_id for image_id in named if image_id not in val.position]
        if unknown:
            hint = did_you_mean(unknown[0], val.ids)
            raise UsageError(f"--image {unknown[0]} is not a validation image.{hint}", hint="Write CLASS/FILE.")
        return val.only(list(named))
    firsts = [ids[0] for ids in val.ids_by_class if ids]
    number = min(count, len(firsts))
    return val.only([firsts[index * len(firsts) // number] for index in range(number)])


def _draw_neighbours(
    encoder: "Encoder",
    train_images: "ImageSet",
    chosen: "ImageSet",
    options: argparse.Namespace,
    masked: Sequence[float],
    names: Sequence[str],
) -> "Drawing":
    from msn_eval.data.subsets import make_subsets, merge_subsets
    from msn_eval.features.extraction import extract_features
    from msn_eval.features.visualization import find_neighbours, read_pixels
    from msn_eval.reports.pictures import draw_neighbours

    pool = merge_subsets(make_subsets([options.subset], train_images), train_images)
    train = extract_features(encoder, pool, taps=["cls-norm"]).features["cls-norm"]
    pixels = read_pixels(chosen, chosen.ids, encoder.transform)
    neighbours = find_neighbours(encoder, pixels, train, masked=masked, count=options.neighbours, seed=options.seed)
    rows = sorted({row for masking in neighbours for row in masking.nearest.ravel().tolist()})
    images = read_pixels(pool, [train.image_ids[row] for row in rows], encoder.transform).numpy()
    return partial(
        draw_neighbours,
        neighbours,
        labels=chosen.labels,
        train=train,
        train_pixels=dict(zip(rows, images, strict=True)),
        classes=names,
    )


def _draw_attention(encoder: "Encoder", chosen: "ImageSet", names: Sequence[str]) -> "Drawing":
    from msn_eval.features.patch_drop import attention_maps
    from msn_eval.features.visualization import read_pixels
    from msn_eval.reports.pictures import draw_attention

    pixels = read_pixels(chosen, chosen.ids, encoder.transform)
    return partial(draw_attention, attention_maps(encoder, pixels), pixels, [names[label] for label in chosen.labels])


def _draw_classes(encoder: "Encoder", val: "ImageSet", names: Sequence[str]) -> "Drawing":
    from msn_eval.features.extraction import extract_features
    from msn_eval.features.visualization import project
    from msn_eval.reports.pictures import draw_classes

    features = extract_features(encoder, val, taps=["cls-norm"]).features["cls-norm"]
    points, share = project(features)
    return partial(draw_classes, points, features.labels.numpy(), names, share)


def _render_page(title: str, pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """Return an HTML page that embeds the pictures for both themes, and loads nothing from a network."""
    from msn_eval.reports.html.page import render_offline

    shown = [
        (name, _PICTURES[name], *(base64.b64encode(png).decode() for png in pngs)) for name, pngs in pictures.items()
    ]
    return render_offline("show.html", title=title, kicker="pictures of what a checkpoint sees", pictures=shown)
