"""Cached features: computed once, by any number of ranks, and never those of another image or network."""

import gc
import hashlib
import io
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.checkpoints.normalisation import Normalisation
from msn_eval.data.images import BadImageError, ImageSet
from msn_eval.distributed.group import ALONE, Group
from msn_eval.errors import DataError, MsnEvalError, NumericalError, ResourceError, StoreError
from msn_eval.features import extraction as features_module
from msn_eval.features.cache import FeatureKey
from msn_eval.features.encoder import Encoder, build_encoder
from msn_eval.features.extraction import Extraction, Loading, extract_features, feature_key

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
CPU = torch.device("cpu")
RunRanks = Callable[[int, Callable[[Group], object]], list[object]]
LOADING = Loading(batch_size=8, workers=0)


@dataclass(frozen=True)
class NumberSource:
    """Images whose names are in their pixels: `0/n` holds n. `log` lists each image that is read."""

    root: Path
    bad: frozenset[int] = frozenset()

    @property
    def log(self) -> Path:
        return self.root / "read"

    def read(self, image_id: str) -> bytes:
        with self.log.open("ab", buffering=0) as log:
            log.write(f"{image_id}\n".encode())
        return self.content(image_id)

    def content(self, image_id: str) -> bytes:
        return image_id.partition("/")[2].encode()

    def decode(self, content: bytes) -> Image.Image:
        number = int(content)
        if number in self.bad:
            raise BadImageError("damaged")
        return Image.new("RGB", (8, 8), (number % 256, number // 256, 7))

    def place(self, image_id: str) -> str:
        return image_id

    def stamp(self, image_id: str) -> tuple[int, ...]:
        return (0,)


class Reading(nn.Module):
    """Returns the number that an image holds, its half, and a weight; NaN for one image."""

    def __init__(self, *, weight: float = 1.0, not_finite_at: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.not_finite_at = not_finite_at

    def forward(self, images: Tensor) -> Tensor:
        means = (images.mean((2, 3)) * 255).round()
        number = means[:, 0] + 256 * means[:, 1]
        number = torch.where(number == self.not_finite_at, torch.nan, number)
        return torch.stack([number, number / 2, self.weight.expand_as(number)], dim=1)


def encoder_of(network: nn.Module, *, weights: str = "a") -> Encoder:
    pixels = read_checkpoint("pixels")
    own = replace(pixels, name="own", path="py:own:factory", format="py", arch="own", network=network.eval())
    own = replace(
        own,
        weights_sha256=weights,
        image_pixels=8,
        normalisation=Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), source="test"),
    )
    return build_encoder(own, device=CPU, precision="fp32")


def numbers(root: Path, which: Sequence[int], *, bad: Sequence[int] = ()) -> ImageSet:
    ids = tuple(f"0/{number:04d}" for number in which)
    return ImageSet(ids=ids, labels=(0,) * len(ids), classes=("0",), source=NumberSource(root, frozenset(bad)))


class JpegSource(NumberSource):
    """Real JPEGs, for decoders that take files."""

    def content(self, image_id: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (9 * int(image_id.partition("/")[2]), 0, 7)).save(file, "JPEG")
        return file.getvalue()


def hashes_of(images: ImageSet) -> dict[str, str]:
    return {name: hashlib.sha256(images.source.content(name)).hexdigest() for name in images.ids}


def kept(
    images: ImageSet,
    cache: Path | None,
    *,
    encoder: Encoder | None = None,
    group: Group = ALONE,
    loading: Loading = LOADING,
) -> Extraction:
    return extract_features(
        encoder or encoder_of(Reading()),
        images,
        taps=["out"],
        hashes=hashes_of(images),
        loading=loading,
        cache=cache,
        group=group,
    )


def numbers_in(extraction: Extraction) -> list[int]:
    return [int(number) for number in extraction.features["out"].values[:, 0]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_CPU_SHARD_ROWS", 16)


def test_cached_features_equal_those_without_a_cache(tmp_path: Path, cache: Path) -> None:
    images = numbers(tmp_path, range(50))
    fresh, first, second = kept(images, None), kept(images, cache), kept(images, cache)
    assert torch.equal(fresh.features["out"].values, first.features["out"].values)
    assert torch.equal(fresh.features["out"].values, second.features["out"].values)


@pytest.mark.parametrize("shards", [0, 1])
def test_run_goes_on_with_one_warning_when_the_cache_cannot_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shards: int
) -> None:
    kept(numbers(tmp_path, range(5)), cache)
    written: list[object] = []
    write = features_module.write_shard

    def refuse(*given: object) -> None:
        if len(written) == shards:
            raise StoreError("could not write: No space left on device", where="disk")
        written.append(given)
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(features_module, "write_shard", refuse)

    extraction = kept(numbers(tmp_path, range(40)), cache)

    assert numbers_in(extraction) == list(range(40))
    assert caplog.messages == [
        "disk: could not write: No space left on device; this run continues without caching new features"
    ]


def test_read_only_cache_serves_without_a_warning(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept(numbers(tmp_path, range(20)), cache)

    def refuse(*given: object, **named: object) -> None:
        raise StoreError("cannot be written: Read-only file system", where=str(cache))

    monkeypatch.setattr(features_module, "open_feature_folder", refuse)
    monkeypatch.setattr(features_module, "write_shard", refuse)

    extraction = kept(numbers(tmp_path, range(20)), cache)

    assert (numbers_in(extraction), extraction.read, caplog.messages) == (list(range(20)), 0, [])


def test_second_list_reads_only_new_images(tmp_path: Path, cache: Path) -> None:
    kept(numbers(tmp_path, range(0, 60, 2)), cache)
    more = kept(numbers(tmp_path, range(0, 60, 3)), cache)
    assert (numbers_in(more), more.read, more.reused) == (list(range(0, 60, 3)), 10, 10)


def test_images_of_the_same_bytes_are_encoded_once(tmp_path: Path, cache: Path) -> None:
    once, twice = numbers(tmp_path, range(5)), numbers(tmp_path, range(5))
    ids = (*once.ids, *(name.replace("0/", "1/", 1) for name in twice.ids))
    both = replace(once, ids=ids, labels=(0,) * 5 + (1,) * 5, classes=("0", "1"))
    assert (numbers_in(kept(both, cache)), kept(both, cache).reused) == ([*range(5), *range(5)], 10)
    assert len((tmp_path / "read").read_text().split()) == 5


@pytest.mark.parametrize("other", ["weights", "code", "precision", "size", "decoder"])
def test_features_of_another_encoder_are_not_reused(tmp_path: Path, cache: Path, other: str) -> None:
    images = numbers(tmp_path, range(20))
    kept(images, cache)
    encoder, loading = encoder_of(Reading(weight=2.0)), LOADING
    match other:
        case "weights":
            encoder = encoder_of(Reading(weight=2.0), weights="b")
        case "code":
            encoder = replace(encoder, checkpoint=replace(encoder.checkpoint, code_sha256="b"))
        case "precision":
            encoder = build_encoder(encoder.checkpoint, device=CPU, precision="bf16")
        case "size":
            encoder = build_encoder(encoder.checkpoint, device=CPU, precision="fp32", image_pixels=16)
        case "decoder":
            loading = replace(LOADING, decoder="torchvision")
            images = replace(images, source=JpegSource(tmp_path))
    values = kept(images, cache, encoder=encoder, loading=loading).features["out"].values
    assert values[:, 2].tolist() == [2.0] * 20


def test_interrupted_extraction_continues_at_the_next_shard(tmp_path: Path, cache: Path) -> None:
    class Interrupted(Reading):
        left = 6  # batches of eight: two shards of sixteen, and what is lost

        def forward(self, images: Tensor) -> Tensor:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().forward(images)

    images = numbers(tmp_path, range(80))
    with pytest.raises(KeyboardInterrupt):
        kept(images, cache, encoder=encoder_of(Interrupted()))
    rest = kept(images, cache)
    assert (numbers_in(rest), rest.reused) == (list(range(80)), 32)


def test_damaged_shard_is_computed_again_with_a_warning(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = numbers(tmp_path, range(40))
    kept(images, cache)
    shard = sorted(cache.rglob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING, "msn_eval"):
        again = kept(images, cache)
    assert (numbers_in(again), again.read in (8, 16), "quarantine" in caplog.text) == (list(range(40)), True, True)


def test_all_bad_images_are_listed_and_good_ones_stay_cached(tmp_path: Path, cache: Path) -> None:
    images = numbers(tmp_path, range(64), bad=[40, 60])
    with pytest.raises(DataError, match="2 images cannot be used:\n  0/0040: damaged\n  0/0060: damaged"):
        kept(images, cache)
    assert kept(numbers(tmp_path, range(64)), cache).reused == 40


def test_features_that_are_not_finite_are_not_cached(tmp_path: Path, cache: Path) -> None:
    images = numbers(tmp_path, range(40))
    with pytest.raises(NumericalError, match="0/0037"):
        kept(images, cache, encoder=encoder_of(Reading(not_finite_at=37)))
    assert numbers_in(kept(images, cache)) == list(range(40))


# Memory.


def out_of_memory_above(limit: int, error: type[Exception] = torch.OutOfMemoryError) -> nn.Module:
    class Hungry(Reading):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > limit:
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB. can't allocate memory")
            return super().forward(images)

    return Hungry()


class SilentMemoryError(MemoryError):
    def __init__(self, text: str) -> None:
        super().__init__()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, SilentMemoryError])
def test_batches_shrink_until_memory_is_enough(tmp_path: Path, error: type[Exception]) -> None:
    found = kept(numbers(tmp_path, range(40)), None, encoder=encoder_of(out_of_memory_above(3, error)))
    assert (numbers_in(found), found.batch_size) == (list(range(40)), 2)


def test_a_failed_attempt_holds_no_memory_while_the_next_one_runs(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    seen: list[int] = []

    class Holding(Reading):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(sum(tensor() is not None for tensor in alive))
            large = images + 1
            alive.append(weakref.ref(large))
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(large - 1)

    gc.disable()
    try:
        kept(numbers(tmp_path, range(8)), None, encoder=encoder_of(Holding()))
    finally:
        gc.enable()
    assert seen[1] == 0


def test_image_that_does_not_fit_into_memory_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="one image does not fit into the memory") as refusal:
        kept(numbers(tmp_path, range(8)), None, encoder=encoder_of(out_of_memory_above(0)))
    assert refusal.value.exit_code == 30


def test_features_that_do_not_fit_into_memory_are_refused_after_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "available_bytes", lambda: 40 * 3 * 4 - 1)
    with pytest.raises(ResourceError, match="40 images need 480 bytes of memory; 479 are available"):
        kept(numbers(tmp_path, range(40)), None)


# Ranks.


@pytest.fixture
def run_ranks(on_ranks: Callable[..., list[object]]) -> RunRanks:
    """Return a function that runs `do` on every rank and returns what it returned, or the text of its error."""

    def run(world: int, do: Callable[[Group], object]) -> list[object]:
        def body() -> object:
            try:
                return do(Group(rank=distributed.get_rank(), world=world))
            except MsnEvalError as error:
                return f"{type(error).__name__}: {error}"

        return on_ranks(body, world=world)

    return run


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_encodes_every_image_once_to_the_same_features(
    tmp_path: Path, run_ranks: RunRanks, world: int
) -> None:
    counts = sorted({1, world - 1, world, world + 1, 997} - {0})

    def extract_all(group: Group) -> list[list[list[float]] | None]:
        found = []
        for count in counts:
            extraction = kept(numbers(tmp_path / str(count), range(count)), tmp_path / f"cache{count}", group=group)
            found.append(extraction.features["out"].values.tolist() if group.rank == 0 else None)
        return found

    for count in counts:
        (tmp_path / str(count)).mkdir()
    answers = run_ranks(world, extract_all)
    for index, count in enumerate(counts):
        read = (tmp_path / str(count) / "read").read_text().split()
        alone = kept(numbers(tmp_path / str(count), range(count)), None).features["out"].values.tolist()
        assert (sorted(read), len(set(read))) == ([f"0/{number:04d}" for number in range(count)], count)
        assert isinstance(answers[0], list)
        assert answers[0][index] == alone


def test_ranks_share_the_work(tmp_path: Path, cache: Path, run_ranks: RunRanks) -> None:
    (tmp_path / "both").mkdir()

    def count(group: Group) -> int:
        mine = tmp_path / str(group.rank)
        mine.mkdir()
        kept(numbers(mine, range(64)), cache, group=group)
        return len((mine / "read").read_text().split())

    assert run_ranks(2, count) == [32, 32]


def test_bad_images_of_all_ranks_are_listed_together(tmp_path: Path, cache: Path, run_ranks: RunRanks) -> None:
    images = numbers(tmp_path, range(64), bad=[3, 60])
    answers = run_ranks(2, lambda group: kept(images, cache, group=group).read)
    assert "2 images cannot be used:\n  0/0003: damaged\n  0/0060: damaged" in str(answers[0])


def test_nan_on_one_rank_is_an_error_on_rank_0(tmp_path: Path, cache: Path, run_ranks: RunRanks) -> None:
    images = numbers(tmp_path, range(64))
    failing = encoder_of(Reading(not_finite_at=60))
    answers = run_ranks(2, lambda group: kept(images, cache, encoder=failing, group=group).read)
    assert str(answers[0]).startswith(
        "NumericalError: own: features at tap out are not finite for 1 image, first 0/0060"
    )


def test_rank_takes_complete_batches(tmp_path: Path, cache: Path) -> None:
    second = Group(rank=1, world=2, local_rank=1, host="localhost")
    kept(numbers(tmp_path, range(40)), cache, group=second)
    read = sorted((tmp_path / "read").read_text().split())  # threads take turns within a batch
    assert read == [f"0/{number:04d}" for number in range(16, 40)]


def test_rows_that_another_rank_did_not_write_are_an_error(tmp_path: Path, cache: Path) -> None:
    first = Group(rank=0, world=2, local_rank=0, host="localhost")
    with pytest.raises(StoreError, match="missing: 24 of 40 rows that were just written"):
        kept(numbers(tmp_path, range(40)), cache, group=first)


def test_only_the_first_rank_looks_for_what_is_missing(tmp_path: Path, cache: Path, run_ranks: RunRanks) -> None:
    images = numbers(tmp_path, range(64))

    def refuse(*given: object) -> None:
        raise StoreError("looked", where="here", hint="")

    def extract(group: Group) -> int:
        if group.rank != 0:
            features_module.read_rows = refuse  # in this process alone
        return kept(images, cache, group=group).read

    assert run_ranks(2, extract) == [64, 64]


# Addresses.


def address(encoder: Encoder) -> FeatureKey:
    return feature_key(encoder, "out", decoder="pillow", embedded=False)


@pytest.mark.parametrize("name", ["arch", "key", "code_sha256", "mean", "std"])
def test_same_weights_read_differently_have_another_key(name: str) -> None:
    plain = encoder_of(Reading())
    changed = {name: "other"}
    if name in ("mean", "std"):
        changed = {"normalisation": replace(plain.checkpoint.normalisation, **{name: (0.1, 0.2, 0.3)})}
    other = build_encoder(replace(plain.checkpoint, **changed), device=CPU, precision="fp32")
    assert address(other) != address(plain)


@pytest.mark.parametrize(
    "given", [{"device": torch.device("cuda")}, {"compiled": True}, {"precision": "fp16"}], ids=str
)
def test_same_network_run_differently_has_another_key(given: dict[str, object]) -> None:
    plain = encoder_of(Reading())
    assert address(replace(plain, **given)) != address(plain)


def test_embedded_images_have_one_key_for_all_decoders() -> None:
    first, second = (
        feature_key(encoder_of(Reading()), "out", decoder=decoder, embedded=True)
        for decoder in ("pillow", "torchvision")
    )
    assert first == second


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("msn_eval.features.extraction.EXTRACTOR", 99),
        ("msn_eval.features.extraction.version", lambda package: "other"),
        ("torch.__version__", "other"),
    ],
)
def test_other_software_versions_have_another_key(what: str, other: object, monkeypatch: pytest.MonkeyPatch) -> None:
    before = address(encoder_of(Reading()))
    monkeypatch.setattr(what, other)
    assert address(encoder_of(Reading())) != before


def test_memory_is_checked_after_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "available_bytes", lambda: 1)
    with pytest.raises(ResourceError):
        kept(numbers(tmp_path, range(80)), None)
    assert len((tmp_path / "read").read_text().split()) == 16  # the next batch is under way by then


def test_image_that_the_device_refuses_leaves_no_row(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = replace(numbers(tmp_path, range(8)), source=JpegSource(tmp_path))
    hashes = hashes_of(images)
    loading = Loading(batch_size=4, decoder="nvjpeg", workers=0)

    def refuse_one(part: Sequence[object], *given: object) -> tuple[Tensor, dict[int, str]]:
        return torch.zeros(len(part), 8, 8, 3, dtype=torch.uint8), {2: "torn"}

    monkeypatch.setattr(features_module, "decode_on_device", refuse_one)
    with pytest.raises(DataError, match="0/0002: torn"):
        extract_features(encoder_of(Reading()), images, taps=["out"], hashes=hashes, loading=loading, cache=cache)
    assert list(cache.rglob("*.safetensors")) == []
