"""Sets of torchvision, from small archives in the formats of the real ones, on a local server."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as tv
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from msn_eval.data import read_dataset, torchvision_sets
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError, UsageError

Pixels = NDArray[np.uint8]
Splits = dict[str, dict[str, Pixels]]  # split -> id -> pixels
Patch = Callable[[Any, str, object], None]
LABELS = {"train": [1, 0, 1, 0], "val": [0, 1, 1]}


@dataclass
class Server:
    """What a web server has, by file name, and the names that were asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)
    sent_bytes: int | None = None  # then the connection breaks

    def add(self, name: str, content: bytes) -> str:
        """Publish a file and return its MD5."""
        self.files[name] = content
        return hashlib.md5(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    published = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            content = published.files.get(name, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.headers.get("Method") != "HEAD":  # a header of torchvision, which looks for redirections first
                published.requested.append(name)
                self.wfile.write(content[: published.sent_bytes])

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = False  # so that closing the server waits for them
    published.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield published
    http.shutdown()
    http.server_close()
    thread.join()


def picture(number: int, side: int, channels: int = 3) -> Pixels:
    shape = (side, side, 3) if channels == 3 else (side, side)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def pictures(split: str, side: int, channels: int = 3) -> Pixels:
    return np.stack([picture(10 * len(split) + row, side, channels) for row in range(len(LABELS[split]))])


def array_ids(names: list[str], side: int, channels: int = 3) -> Splits:
    """Return the images of a set of arrays: the name of each is its row in its split."""
    return {
        split: {
            f"{names[label]}/{row:06d}.png": np.broadcast_to(image.reshape(side, side, -1), (side, side, 3))
            for row, (label, image) in enumerate(zip(labels, pictures(split, side, channels), strict=True))
        }
        for split, labels in LABELS.items()
    }


def encode(pixels: Pixels, kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def decode(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def tgz(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return content.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def mat(**values: object) -> bytes:
    content = io.BytesIO()
    savemat(content, values, do_compression=True)
    return content.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def publish_cifar(server: Server, patch: Patch, cls: Any, kind: str, files: Mapping[str, str]) -> Splits:
    names = ["bird", "cat"]
    content = {}
    batches: dict[str, tuple[Pixels, list[int]]] = {}
    for split in ("train", "val"):
        parts = [file for file, of in files.items() if of == split]
        rows = pictures(split, 32).transpose(0, 3, 1, 2).reshape(-1, 3072)
        for file, some, labels in zip(
            parts, np.array_split(rows, len(parts)), np.array_split(LABELS[split], len(parts)), strict=True
        ):
            batches[file] = some, labels.tolist()
    for file, (some, labels) in batches.items():
        content[file] = pickle.dumps({"data": some, f"{kind}labels": labels}, protocol=2)
    content[cls.meta["filename"]] = pickle.dumps({f"{kind}label_names": names}, protocol=2)
    patch(
        cls,
        "tgz_md5",
        server.add(cls.filename, tgz({f"{cls.base_folder}/{file}": data for file, data in content.items()})),
    )
    patch(cls, "url", f"{server.url}/{cls.filename}")
    for attribute, split in (("train_list", "train"), ("test_list", "val")):
        patch(cls, attribute, [[file, md5(content[file])] for file, of in files.items() if of == split])
    patch(cls, "meta", {**cls.meta, "key": f"{kind}label_names", "md5": md5(content[cls.meta["filename"]])})
    return array_ids(names, 32)


def cifar10(server: Server, patch: Patch) -> Splits:
    files = {"data_batch_1": "train", "data_batch_2": "train", "test_batch": "val"}
    return publish_cifar(server, patch, tv.CIFAR10, "", files)


def cifar100(server: Server, patch: Patch) -> Splits:
    return publish_cifar(server, patch, tv.CIFAR100, "fine_", {"train": "train", "test": "val"})


def stl10(server: Server, patch: Patch) -> Splits:
    content = {}
    for split, called in (("train", "train"), ("val", "test")):
        content[f"{called}_X.bin"] = np.ascontiguousarray(pictures(split, 96).transpose(0, 3, 2, 1)).tobytes()
        content[f"{called}_y.bin"] = bytes(label + 1 for label in LABELS[split])
    content["unlabeled_X.bin"] = content["test_X.bin"]
    files = {f"stl10_binary/{name}": data for name, data in content.items()}
    archive = tgz({**files, "stl10_binary/class_names.txt": b"bird\ncat\n"})
    patch(tv.STL10, "tgz_md5", server.add("stl10_binary.tar.gz", archive))
    patch(tv.STL10, "url", f"{server.url}/stl10_binary.tar.gz")
    for attribute in ("train_list", "test_list"):
        patch(tv.STL10, attribute, [[name, md5(content[name])] for name, _ in getattr(tv.STL10, attribute)])
    return array_ids(["bird", "cat"], 96)


def svhn(server: Server, patch: Patch) -> Splits:
    table = dict(tv.SVHN.split_list)
    for split, called in (("train", "train"), ("val", "test")):
        labels = np.array([[label or 10] for label in LABELS[split]], dtype=np.uint8)
        file = f"{called}_32x32.mat"
        content = mat(X=pictures(split, 32).transpose(1, 2, 3, 0), y=labels)
        table[called] = [f"{server.url}/{file}", file, server.add(file, content)]
    patch(tv.SVHN, "split_list", table)
    return array_ids(["0", "1"], 32)


def publish_mnist(server: Server, patch: Patch, cls: Any, names: list[str]) -> Splits:
    resources = []
    for split, called in (("train", "train"), ("val", "t10k")):
        images, count = pictures(split, 28, 1), len(LABELS[split])
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        contents = {"images-idx3": b"\0\0\x08\x03" + sizes + images.tobytes()}
        contents["labels-idx1"] = b"\0\0\x08\x01" + sizes[:4] + bytes(LABELS[split])
        for part, content in contents.items():
            file = f"{called}-{part}-ubyte.gz"
            resources.append((file, server.add(file, gzip.compress(content))))
    patch(cls, "mirrors", [f"{server.url}/gone/", f"{server.url}/"] if cls is tv.MNIST else [f"{server.url}/"])
    patch(cls, "resources", resources)
    return array_ids(names, 28, 1)


def mnist(server: Server, patch: Patch) -> Splits:
    return publish_mnist(server, patch, tv.MNIST, ["0", "1"])


def fashionmnist(server: Server, patch: Patch) -> Splits:
    return publish_mnist(server, patch, tv.FashionMNIST, ["T-shirt_top", "Trouser"])


def jpegs(split: str) -> list[bytes]:
    return [encode(image, "JPEG") for image in pictures(split, 20)]


def file_ids(name: Callable[[str, int, int], str]) -> tuple[Splits, dict[str, bytes]]:
    """Return the images of a set of files by split and id, and their bytes by id; `name(split, row, label)` is an id."""
    content = {
        split: {name(split, row, LABELS[split][row]): data for row, data in enumerate(jpegs(split))} for split in LABELS
    }
    decoded = {split: {image_id: decode(data) for image_id, data in files.items()} for split, files in content.items()}
    return decoded, content["train"] | content["val"]


def number(split: str, row: int) -> int:
    return row + 1 + (len(LABELS["train"]) if split == "val" else 0)


def flowers102(server: Server, patch: Patch) -> Splits:
    names = tv.Flowers102.classes[:2]
    splits, content = file_ids(lambda split, row, label: f"{names[label]}/image_{number(split, row):05d}.jpg")
    rows = {split: [number(split, row) for row in range(len(LABELS[split]))] for split in LABELS}
    labels = [label + 1 for split in ("train", "val") for label in LABELS[split]]
    images = tgz({f"jpg/{image_id.partition('/')[2]}": data for image_id, data in content.items()})
    published = {
        "image": ("102flowers.tgz", images),
        "label": ("imagelabels.mat", mat(labels=np.array([labels]))),
        "setid": ("setid.mat", mat(trnid=[rows["train"]], valid=[rows["train"][:1]], tstid=[rows["val"]])),
    }
    patch(tv.Flowers102, "_download_url_prefix", f"{server.url}/")
    patch(tv.Flowers102, "_file_dict", {key: (file, server.add(file, data)) for key, (file, data) in published.items()})
    return splits


def oxfordpets(server: Server, patch: Patch) -> Splits:
    stems = ["Abyssinian", "american_bulldog"]
    names = ["Abyssinian", "American Bulldog"]
    splits, content = file_ids(lambda split, row, label: f"{names[label]}/{stems[label]}_{number(split, row)}.jpg")
    lists = {}
    for split, called in (("train", "trainval"), ("val", "test")):
        rows = zip(splits[split], LABELS[split], strict=True)
        lines = [f"{image_id.partition('/')[2][:-4]} {label + 1} 1 1" for image_id, label in rows]
        lists[f"annotations/{called}.txt"] = ("\n".join(lines) + "\n").encode()
    archives = {
        "images.tar.gz": tgz({f"images/{image_id.partition('/')[2]}": data for image_id, data in content.items()}),
        "annotations.tar.gz": tgz({**lists, "annotations/README": b"", "annotations/trimaps/a.png": b""}),
    }
    resources = tuple((f"{server.url}/{file}", server.add(file, data)) for file, data in archives.items())
    patch(tv.OxfordIIITPet, "_RESOURCES", resources)
    return splits


def dtd(server: Server, patch: Patch) -> Splits:
    names = ["banded", "zigzagged"]
    splits, content = file_ids(lambda split, row, label: f"{names[label]}/{names[label]}_{number(split, row):04d}.jpg")
    files = {f"dtd/images/{image_id}": data for image_id, data in content.items()}
    for split, called in (("train", "train"), ("val", "test")):
        files[f"dtd/labels/{called}1.txt"] = "".join(f"{image_id}\n" for image_id in splits[split]).encode()
    patch(tv.DTD, "_MD5", server.add("dtd-r1.0.1.tar.gz", tgz(files)))
    patch(tv.DTD, "_URL", f"{server.url}/dtd-r1.0.1.tar.gz")
    return splits


def food101(server: Server, patch: Patch) -> Splits:
    names = ["apple_pie", "waffles"]
    splits, content = file_ids(lambda split, row, label: f"{names[label]}/{number(split, row)}.jpg")
    files = {f"food-101/images/{image_id}": data for image_id, data in content.items()}
    for split, called in (("train", "train"), ("val", "test")):
        listed = {name: [image_id[:-4] for image_id in splits[split] if image_id.startswith(name)] for name in names}
        files[f"food-101/meta/{called}.json"] = json.dumps(listed).encode()
    patch(tv.Food101, "_MD5", server.add("food-101.tar.gz", tgz(files)))
    patch(tv.Food101, "_URL", f"{server.url}/food-101.tar.gz")
    return splits


def aircraft(server: Server, patch: Patch) -> Splits:
    names = ["707-320", "F/A-18"]
    safe = ["707-320", "F_A-18"]
    splits, content = file_ids(lambda split, row, label: f"{safe[label]}/{number(split, row):07d}.jpg")
    folder = "fgvc-aircraft-2013b/data"
    files = {f"{folder}/images/{image_id.partition('/')[2]}": data for image_id, data in content.items()}
    files[f"{folder}/variants.txt"] = "".join(f"{name}\n" for name in names).encode()
    for split, called in (("train", "train"), ("val", "test")):
        rows = zip(splits[split], LABELS[split], strict=True)
        lines = [f"{image_id.partition('/')[2][:-4]} {names[label]}\n" for image_id, label in rows]
        files[f"{folder}/images_variant_{called}.txt"] = "".join(lines).encode()
    patch(torchvision_sets, "_AIRCRAFT_MD5", server.add("fgvc-aircraft-2013b.tar.gz", tgz(files)))
    patch(tv.FGVCAircraft, "_URL", f"{server.url}/fgvc-aircraft-2013b.tar.gz")
    return splits


def gtsrb(server: Server, patch: Patch) -> Splits:
    names = ["00000", "00001"]
    splits: Splits = {"train": {}, "val": {}}
    training, testing, truth = {}, {}, ["Filename;Width;ClassId"]
    for split in splits:
        for row, (label, image) in enumerate(zip(LABELS[split], pictures(split, 20), strict=True)):
            splits[split][f"{names[label]}/{row:05d}.ppm"] = image
            path = f"{names[label]}/{row:05d}.ppm" if split == "train" else f"{row:05d}.ppm"
            (training if split == "train" else testing)[path] = encode(image, "PPM")
            truth += [f"{row:05d}.ppm;20;{label}"] if split == "val" else []
    md5s = {
        name: server.add(name, zipped(files))
        for name, files in {
            "GTSRB-Training_fixed.zip": {f"GTSRB/Training/{path}": data for path, data in training.items()},
            "GTSRB_Final_Test_Images.zip": {f"GTSRB/Final_Test/Images/{path}": data for path, data in testing.items()},
            "GTSRB_Final_Test_GT.zip": {"GT-final_test.csv": "\r\n".join(truth).encode()},
        }.items()
    }
    original = tv.gtsrb.download_and_extract_archive

    def from_server(
        url: str, download_root: str, md5: str
    ) -> None:  # the addresses are inside of torchvision's function
        file = url.rpartition("/")[2]
        original(f"{server.url}/{file}", download_root, md5=md5s[file])

    patch(tv.gtsrb, "download_and_extract_archive", from_server)
    return splits


def pcam(server: Server, patch: Patch) -> Splits:
    h5py = pytest.importorskip("h5py")
    table = {}
    for split, called in (("train", "train"), ("val", "test")):
        table[called] = {}
        labels = np.array(LABELS[split], dtype=np.uint8).reshape(-1, 1, 1, 1)
        for kind, key, values in (("images", "x", pictures(split, 96)), ("targets", "y", labels)):
            file, content = f"camelyonpatch_level_2_split_{called}_{key}.h5", io.BytesIO()
            with h5py.File(content, "w") as written:
                written[key] = values
            table[called][kind] = (file, "unused", server.add(f"{file}.gz", gzip.compress(content.getvalue())))
    patch(tv.PCAM, "_FILES", table)
    patch(torchvision_sets, "_PCAM_URL", server.url)
    return array_ids(["0", "1"], 96)


def imagenette(server: Server, patch: Patch) -> Splits:
    names = ["n01440764", "n02102040"]
    splits, content = file_ids(lambda split, row, label: f"{names[label]}/{split}_{row}.JPEG")
    files = {f"imagenette2/{name}": b"" for name in ("noise_imagenette.csv",)}
    files |= {f"imagenette2/{split}/{image_id}": content[image_id] for split in splits for image_id in splits[split]}
    archive = server.add("imagenette2.tgz", tgz(files))
    patch(tv.Imagenette, "_ARCHIVES", {**tv.Imagenette._ARCHIVES, "full": (f"{server.url}/imagenette2.tgz", archive)})
    return splits


PUBLISHED = (cifar10, cifar100, stl10, svhn, mnist, fashionmnist, flowers102, oxfordpets, dtd, food101, aircraft, gtsrb, pcam,
             imagenette)  # fmt: skip


@pytest.fixture
def published(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Splits]:
    publish = getattr(request, "param", dtd)
    return f"tv:{publish.__name__}", publish(server, monkeypatch.setattr)


def pixels_by_id(images: ImageSet) -> dict[str, list[object]]:
    source = images.source
    return {name: np.asarray(source.decode(source.read(name))).tolist() for name in images.ids}


def test_every_set_is_published_here() -> None:
    assert [publish.__name__ for publish in PUBLISHED] == list(torchvision_sets.SETS)


@pytest.mark.parametrize("published", PUBLISHED, indirect=True, ids=lambda publish: publish.__name__)
def test_set_is_downloaded_once_and_has_the_official_splits(
    published: tuple[str, Splits], server: Server, tmp_path: Path
) -> None:
    name, expected = published
    for _ in range(2):
        data = read_dataset(name, cache_dir=tmp_path)
        assert {file: server.requested.count(file) for file in server.files} == dict.fromkeys(server.files, 1)
        assert data.name == name.partition(":")[2]
        for split, images in (("train", data.train), ("val", data.val)):
            assert [data.classes[label] for label in images.labels] == [
                image_id.partition("/")[0] for image_id in images.ids
            ]
            assert pixels_by_id(images) == {image_id: pixels.tolist() for image_id, pixels in expected[split].items()}


def test_unknown_set_is_a_usage_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tv:CIFAR-10: no such data set\. Did you mean cifar10\?") as caught:
        read_dataset("tv:CIFAR-10", cache_dir=tmp_path)
    assert all(f"tv:{name}" in caught.value.hint for name in torchvision_sets.SETS)


def download_of(tmp_path: Path) -> Path:
    return tmp_path / "torchvision" / "dtd" / "download" / "dtd" / "dtd-r1.0.1.tar.gz"


@pytest.mark.parametrize("reason", ["offline", "refused", "missing"])
def test_failed_download_names_the_address_and_where_to_put_the_file(
    published: tuple[str, Splits], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    address = f"{server.url}/dtd-r1.0.1.tar.gz"
    if reason == "offline":
        monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    elif reason == "refused":
        address = "http://127.0.0.1:1/dtd-r1.0.1.tar.gz"
        monkeypatch.setattr(tv.DTD, "_URL", address)
    else:
        server.files.clear()
    with pytest.raises(DataError) as caught:
        read_dataset(published[0], cache_dir=tmp_path)
    assert (caught.value.exit_code, caught.value.where) == (21, address)
    assert f"Download {address} on a machine with a network and put it at {download_of(tmp_path)}," in caught.value.hint
    assert not server.requested or reason != "offline"


def test_file_placed_by_hand_needs_no_network(
    published: tuple[str, Splits], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    download_of(tmp_path).parent.mkdir(parents=True)
    download_of(tmp_path).write_bytes(server.files["dtd-r1.0.1.tar.gz"])
    assert len(read_dataset(published[0], cache_dir=tmp_path).train) == 4
    assert server.requested == []


def test_other_file_placed_by_hand_is_refused_and_said_to_be_another(
    published: tuple[str, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    download_of(tmp_path).parent.mkdir(parents=True)
    download_of(tmp_path).write_bytes(b"something else")
    with pytest.raises(DataError) as caught:
        read_dataset(published[0], cache_dir=tmp_path)
    assert caught.value.hint.endswith("The file that is there now is not the published one, by its MD5.")


@pytest.mark.parametrize("published", [dtd, cifar10, aircraft, mnist, gtsrb], indirect=True)
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_download_is_refused_and_the_next_one_is_whole(
    published: tuple[str, Splits], server: Server, tmp_path: Path, damage: str
) -> None:
    whole = dict(server.files)
    if damage == "truncated":
        server.sent_bytes = 100
    else:
        server.files |= {name: bytes([content[0] ^ 1]) + content[1:] for name, content in whole.items()}
    with pytest.raises(DataError) as caught:
        read_dataset(published[0], cache_dir=tmp_path)
    assert caught.value.exit_code == 21
    server.sent_bytes = None
    server.files |= whole
    assert pixels_by_id(read_dataset(published[0], cache_dir=tmp_path).val).keys() == published[1]["val"].keys()


@pytest.mark.parametrize("published", [dtd, food101, imagenette, gtsrb, stl10], indirect=True)
def test_unpacking_that_was_killed_is_done_again_from_the_same_download(
    published: tuple[str, Splits], server: Server, tmp_path: Path
) -> None:
    name, expected = published
    read_dataset(name, cache_dir=tmp_path)
    folder = tmp_path / "torchvision" / name.partition(":")[2]
    for path in [*folder.glob("*.csv"), *folder.glob("*.tar")]:  # written last
        path.unlink()
    for path in [path for path in folder.rglob("*") if path.suffix in (".JPEG", ".jpg", ".ppm", ".bin")][1:]:
        path.unlink()
    server.requested.clear()
    data = read_dataset(name, cache_dir=tmp_path)
    assert (set(pixels_by_id(data.train)), server.requested) == (set(expected["train"]), [])


def test_two_at_once_download_once(
    published: tuple[str, Splits], server: Server, tmp_path: Path, fork_process: Any
) -> None:
    children = [fork_process(lambda: len(read_dataset(published[0], cache_dir=tmp_path).val)) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.requested == ["dtd-r1.0.1.tar.gz"]


def test_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs h5py") as caught:
        read_dataset("tv:pcam", cache_dir=tmp_path)
    assert caught.value.hint == "pip install 'msn-eval[pcam]'"
