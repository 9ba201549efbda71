"""The same few pictures, and functions that store them in every layout a data set may have."""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

Pictures = Mapping[str, Mapping[str, bytes]]
Store = Callable[..., str]
TarWriter = Callable[..., Path]

_WNIDS = ("n01440764", "n01443537", "n02012849")
# ILSVRC2012_ID of each class, in another order than the names have.
_DEVKIT_IDS = {"n02012849": 1, "n01440764": 2, "n01443537": 3}


def _picture(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.fixture(scope="session")
def stored_pictures() -> Pictures:
    """Return the bytes of 9 train and 7 val pictures: split -> `WNID/FILE` -> bytes, with ImageNet's names.

    Along their numbers the val pictures are of mixed classes, so that labels in a wrong order show. One is a PNG under a
    JPEG name, as in ImageNet.
    """
    train = {
        f"{wnid}/{wnid}_{number}.JPEG": _picture(10 * row + number, "PNG" if (row, number) == (1, 9) else "JPEG")
        for row, wnid in enumerate(_WNIDS)
        for number in (9, 10, 100)
    }
    val = {
        f"{_WNIDS[row]}/ILSVRC2012_val_{number:08d}.JPEG": _picture(1000 + number, "JPEG")
        for number, row in enumerate((1, 0, 2, 1, 0, 0, 1), 1)
    }
    return {"train": train, "val": val}


def tar_bytes(members: Iterable[tuple[str, bytes]], *, format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return an uncompressed tar of these files, in this order."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture(scope="session")
def write_tar() -> TarWriter:
    """Return a function that writes an uncompressed tar: `write_tar(path, [(name, bytes), ...], format=...)`."""

    def write(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.GNU_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members, format=format))
        return path

    return write


@pytest.fixture(scope="session")
def store_pictures(stored_pictures: Pictures) -> Store:
    """Return a function that stores the pictures below a folder and gives the name to pass as `--data`.

    `store(root, train=FORM, val=FORM, labels=FORM)`, or `store(root, layout="webdataset")`:
    train:  "folders", "class tars", "tar", "tar in train"
    val:    "folders", "folders in valid" (or in validation, test), "flat", "tar", "tar in val"
    labels: any of "synsets", "named", "kaggle", "devkit", "packed devkit", in one string with commas; for flat val
    layout: "webdataset" (two train shards), "kaggle" (its folders and CSV), "tiny" (as Tiny ImageNet), "tiny sorted" (with
            its val images sorted into class folders), or "csv"
    """

    def store(root: Path, *, train: str = "", val: str = "", labels: str = "", layout: str = "") -> str:
        root.mkdir(parents=True, exist_ok=True)
        match layout:
            case "webdataset":
                _store_webdataset(root, stored_pictures)
                return f"wds:{root}"
            case "csv":
                return f"csv:{_store_csv(root, stored_pictures)}"
            case "tiny" | "tiny sorted":
                _store_tiny(root, stored_pictures, is_sorted=layout == "tiny sorted")
                return str(root)
            case "kaggle":
                inside = root / "ILSVRC" / "Data" / "CLS-LOC"
                _store_folders(inside / "train", stored_pictures["train"])
                _store_flat(inside / "val", stored_pictures["val"])
                _store_labels(root, "kaggle", stored_pictures["val"])
                return str(root)
        if train:
            _store_train(root, train, stored_pictures["train"])
        if val:
            _store_val(root, val, stored_pictures["val"])
        for form in filter(None, labels.split(",")):
            _store_labels(root, form.strip(), stored_pictures["val"])
        return str(root)

    return store


def _store_folders(folder: Path, pictures: Mapping[str, bytes]) -> None:
    for image_id, content in pictures.items():
        path = folder / image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _store_flat(folder: Path, pictures: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, content in pictures.items():
        (folder / image_id.partition("/")[2]).write_bytes(content)


def _class_tars(pictures: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    of_class = {
        wnid: [(name.partition("/")[2], data) for name, data in pictures.items() if name.startswith(wnid)]
        for wnid in _WNIDS
    }
    return [(f"{wnid}.tar", tar_bytes(reversed(members))) for wnid, members in of_class.items()]


def _store_train(root: Path, form: str, pictures: Mapping[str, bytes]) -> None:
    match form:
        case "folders":
            _store_folders(root / "train", pictures)
        case "class tars":
            (root / "train").mkdir()
            for name, content in _class_tars(pictures):
                (root / "train" / name).write_bytes(content)
        case "tar" | "tar in train":
            folder = root if form == "tar" else root / "train"
            folder.mkdir(exist_ok=True)
            (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(_class_tars(pictures)))
        case _:
            raise ValueError(form)


def _store_val(root: Path, form: str, pictures: Mapping[str, bytes]) -> None:
    match form:
        case "folders":
            _store_folders(root / "val", pictures)
        case "folders in valid" | "folders in validation" | "folders in test":
            _store_folders(root / form.rpartition(" ")[2], pictures)
        case "flat":
            _store_flat(root / "val", pictures)
        case "tar" | "tar in val":
            folder = root if form == "tar" else root / "val"
            folder.mkdir(exist_ok=True)
            members = [(image_id.partition("/")[2], content) for image_id, content in pictures.items()]
            (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(members))
        case _:
            raise ValueError(form)


def _store_labels(root: Path, form: str, pictures: Mapping[str, bytes]) -> None:
    pairs = sorted((image_id.partition("/")[2], image_id.partition("/")[0]) for image_id in pictures)
    match form:
        case "synsets":
            lines = "".join(f"{wnid}\n" for _, wnid in pairs)
            (root / "imagenet_2012_validation_synset_labels.txt").write_text(lines)
        case "named":
            (root / "val.txt").write_text("".join(f"{file} {wnid}\n" for file, wnid in reversed(pairs)))
        case "kaggle":
            rows = [f"{file.partition('.')[0]},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" for file, wnid in reversed(pairs)]
            (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
        case "devkit" | "packed devkit":
            table = [(number, wnid, 0) for wnid, number in _DEVKIT_IDS.items()]
            fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
            meta = io.BytesIO()
            savemat(meta, {"synsets": np.array(table, dtype=fields).reshape(-1, 1)}, do_compression=True)
            truth = "".join(f"{_DEVKIT_IDS[wnid]}\n" for _, wnid in pairs).encode()
            files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
            _store_devkit(root, files, packed=form == "packed devkit")
        case _:
            raise ValueError(form)


def _store_devkit(root: Path, files: Mapping[str, bytes], *, packed: bool) -> None:
    name = "ILSVRC2012_devkit_t12"
    if packed:
        with tarfile.open(root / f"{name}.tar.gz", "w:gz") as archive:
            for file, content in files.items():
                header = tarfile.TarInfo(f"{name}/data/{file}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return
    (root / name / "data").mkdir(parents=True)
    for file, content in files.items():
        (root / name / "data" / file).write_bytes(content)


def _store_tiny(root: Path, pictures: Pictures, *, is_sorted: bool) -> None:
    """Store the pictures as Tiny ImageNet is distributed: 200 classes are named, boxes are beside the images."""
    for split in ("train", "val") if is_sorted else ("train",):
        for image_id, content in pictures[split].items():
            wnid, _, file = image_id.partition("/")
            folder = root / split / wnid / "images"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
            (folder.parent / f"{wnid}_boxes.txt").write_text(f"{file}\t0\t0\t62\t62\n")
    if not is_sorted:
        _store_flat(root / "val" / "images", pictures["val"])
        rows = [tuple(reversed(image_id.split("/"))) for image_id in pictures["val"]]
        lines = "".join(f"{file}\t{wnid}\t0\t32\t44\t62\n" for file, wnid in rows)
        (root / "val" / "val_annotations.txt").write_text(lines)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(next(iter(pictures["val"].values())))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(_WNIDS)))
    (root / "words.txt").write_text("".join(f"{wnid}\tname of {wnid}, other name\n" for wnid in _WNIDS))


def _store_csv(root: Path, pictures: Pictures) -> Path:
    """Store the pictures in flat folders, with quotes, a byte-order mark and Windows line ends in the file."""
    lines = ["split,note,image,label"]
    for split, of_split in pictures.items():
        _store_flat(root / "all, in one folder" / split, of_split)
        for image_id in of_split:
            wnid, _, file = image_id.partition("/")
            lines.append(f'{split},"a ""note"", quoted","all, in one folder/{split}/{file}",{wnid}')
    (root / "images.csv").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    return root / "images.csv"


def _store_webdataset(root: Path, pictures: Pictures) -> None:
    classes = ["unused", *reversed(_WNIDS)]
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, of_split in pictures.items():
        samples = list(of_split.items())
        half = -(-len(samples) // 2) if split == "train" else len(samples)
        for shard, start in enumerate(range(0, len(samples), half)):
            members = []
            for image_id, content in samples[start : start + half]:
                wnid, _, file = image_id.partition("/")
                members += [
                    (f"{wnid}/{file}", content),
                    (f"{wnid}/{file.partition('.')[0]}.cls", b"%d" % classes.index(wnid)),
                ]
            (root / f"{split}-{shard:06d}.tar").write_bytes(tar_bytes(members))
