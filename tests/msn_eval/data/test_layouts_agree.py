from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from msn_eval.cli import main
from msn_eval.data import read_dataset, read_split
from msn_eval.data.hashing import content_sha256, hash_images

Pictures = Mapping[str, Mapping[str, bytes]]
Store = Callable[..., str]

LAYOUTS = {
    "class folders": {"train": "folders", "val": "folders"},
    "train and valid": {"train": "folders", "val": "folders in valid"},
    "train and validation": {"train": "folders", "val": "folders in validation"},
    "train and test": {"train": "folders", "val": "folders in test"},
    "Tiny ImageNet": {"layout": "tiny"},
    "Tiny ImageNet, sorted into folders": {"layout": "tiny sorted"},
    "csv": {"layout": "csv"},
    "flat val with synset file": {"train": "folders", "val": "flat", "labels": "synsets"},
    "flat val with names and classes": {"train": "folders", "val": "flat", "labels": "named"},
    "flat val with devkit": {"train": "folders", "val": "flat", "labels": "devkit"},
    "flat val with packed devkit": {"train": "folders", "val": "flat", "labels": "packed devkit"},
    "flat val with all labels": {
        "train": "folders",
        "val": "flat",
        "labels": "synsets,named,kaggle,devkit,packed devkit",
    },
    "class tars": {"train": "class tars", "val": "folders"},
    "as downloaded": {"train": "tar", "val": "tar", "labels": "packed devkit"},
    "as downloaded, sorted into folders": {"train": "tar in train", "val": "tar in val", "labels": "synsets"},
    "class tars and flat val": {"train": "class tars", "val": "flat", "labels": "kaggle"},
    "kaggle": {"layout": "kaggle"},
    "webdataset": {"layout": "webdataset"},
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def data_name(request: pytest.FixtureRequest, store_pictures: Store, tmp_path: Path) -> str:
    return store_pictures(tmp_path / "imagenet", **request.param)


def test_ids_labels_classes_and_bytes_are_the_same_in_every_layout(data_name: str, stored_pictures: Pictures) -> None:
    data = read_dataset(data_name)
    assert data.classes == ("n01440764", "n01443537", "n02012849")
    for split, images in (("train", data.train), ("val", data.val)):
        assert images.ids == tuple(sorted(stored_pictures[split]))
        assert [images.classes[label] for label in images.labels] == [name.partition("/")[0] for name in images.ids]
        assert {name: images.source.read(name) for name in images.ids} == stored_pictures[split]


def store_nested(root: Path, form: str, images: Mapping[str, bytes], write_tar: Callable[..., Path]) -> str:
    """Store training images by their ids `CLASS/SUB/FILE`, and return the name of the data set."""
    classes = sorted({name.partition("/")[0] for name in images})
    of_class = {wnid: [row for row in images.items() if row[0].startswith(wnid)] for wnid in classes}
    match form:
        case "folders":
            for image_id, content in images.items():
                (root / "train" / image_id).parent.mkdir(parents=True, exist_ok=True)
                (root / "train" / image_id).write_bytes(content)
        case "class tars of paths":
            for wnid, rows in of_class.items():
                write_tar(root / "train" / f"{wnid}.tar", [(name.replace(wnid, ".", 1), data) for name, data in rows])
        case "class tars of class folders":
            for wnid, rows in of_class.items():
                write_tar(root / "train" / f"{wnid}.tar", rows)
        case "tar of class tars":
            inner = root / "inner.tar"
            tars = [
                (f"{wnid}.tar", write_tar(inner, [(f"/data/{name}", data) for name, data in rows]).read_bytes())
                for wnid, rows in of_class.items()
            ]
            write_tar(root / "ILSVRC2012_img_train.tar", tars)
        case _:
            labels = [
                (f"all/{name.removesuffix('.JPEG')}.cls", b"%d" % classes.index(name.partition("/")[0]))
                for name in images
            ]
            write_tar(root / "train-000000.tar", [*((f"all/{name}", data) for name, data in images.items()), *labels])
            (root / "classes.txt").write_text("\n".join(classes))
            return f"wds:{root}"
    return str(root)


@pytest.mark.parametrize(
    "form",
    ["folders", "class tars of paths", "class tars of class folders", "tar of class tars", "webdataset"],
)
def test_image_in_a_folder_below_its_class_has_the_same_id_in_every_layout(
    form: str, stored_pictures: Pictures, write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    below = ["/", "/more/", "/more/and/more/"]
    train = {
        name.replace("/", below[row % 3]): content
        for row, (name, content) in enumerate(stored_pictures["train"].items())
    }
    images = read_split(store_nested(tmp_path / "nested", form, train, write_tar), "train")
    assert {name: images.source.read(name) for name in images.ids} == train


def test_content_hash_is_the_same_in_every_layout(data_name: str, store_pictures: Store, tmp_path: Path) -> None:
    plain = read_dataset(store_pictures(tmp_path / "plain", train="folders", val="folders"))
    data = read_dataset(data_name)
    for one, other in ((plain.train, data.train), (plain.val, data.val)):
        assert content_sha256(one.ids, hash_images(one, cache_dir=None)) == content_sha256(
            other.ids, hash_images(other, cache_dir=tmp_path / "memory")
        )


def test_one_split_alone_is_that_of_the_data_set(data_name: str) -> None:
    data = read_dataset(data_name)
    assert [read_split(data_name, split).ids for split in ("train", "val")] == [data.train.ids, data.val.ids]


def test_cached_listing_is_the_listing(data_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.data.index._FEWEST_IMAGES", 0)
    monkeypatch.setattr("msn_eval.data.index._SETTLED_NS", 0)
    first = read_dataset(data_name, cache_dir=tmp_path / "memory")
    again = read_dataset(data_name, cache_dir=tmp_path / "memory")
    for one, other in ((first.train, again.train), (first.val, again.val)):
        assert (one.ids, one.labels, one.passed_over) == (other.ids, other.labels, other.passed_over)
        assert [one.source.read(name) for name in one.ids] == [other.source.read(name) for name in one.ids]


def test_splits_have_separate_hash_caches(data_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.data.hashing._SETTLED_NS", 0)
    data = read_dataset(data_name)
    for images in (data.train, data.val):
        hash_images(images, cache_dir=tmp_path / "memory")
    assert len(list((tmp_path / "memory" / "hashes").iterdir())) == 2


@pytest.fixture
def parquet_name(stored_pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the pictures as Parquet files, as the Hugging Face hub has data sets."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub cache")
    classes = sorted({name.partition("/")[0] for name in stored_pictures["train"]})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    (tmp_path / "parquet").mkdir()
    for split, called in (("train", "train"), ("val", "validation")):
        rows = [
            {
                "image": {"bytes": content, "path": name.partition("/")[2]},
                "label": classes.index(name.partition("/")[0]),
            }
            for name, content in stored_pictures[split].items()
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / "parquet" / f"{called}-00000-of-00001.parquet")
    return f"hf:{tmp_path / 'parquet'}"


def evaluated(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[bytes], str]:
    """Evaluate raw pixels; return the names of the results, their predictions, and stderr."""
    out = folder / "runs" / str(len(list((folder / "runs").glob("*"))))
    arguments = [
        "--checkpoint",
        "pixels",
        "--data",
        data,
        "--subset",
        "1img",
        "--probe",
        "ncm,logistic",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--out", str(out), "--cache", str(folder / "cache")]) == 0
    results = sorted(out.glob("*.npz"))
    return [path.name for path in results], [path.read_bytes() for path in results], capsys.readouterr().err


def test_evaluation_is_the_same_in_every_layout_and_needs_the_features_once(
    data_name: str, store_pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = store_pictures(tmp_path / "plain", train="folders", val="folders")
    first, second = (evaluated(name, tmp_path, capsys) for name in (plain, data_name))
    assert first[:2] == second[:2]
    assert " 0 images to read" in second[2]


def test_evaluation_of_parquet_is_that_of_folders(
    parquet_name: str, store_pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = store_pictures(tmp_path / "plain", train="folders", val="folders")
    first, second = (evaluated(name, tmp_path, capsys) for name in (plain, parquet_name))
    assert first[:2] == second[:2]
    assert " 0 images to read" in second[2]
