"""Pixel batches: the same for every number of workers; workers that die are replaced once."""

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from msn_eval.data import images as images_module
from msn_eval.data import loader as pixel_loader
from msn_eval.data.images import EvalTransform, decode_image, read_image
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.errors import ResourceError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers are forked")
# Torch leaves the connection to a worker that died in the middle of a hand-over to the garbage collector; and where it
# looks into that, opening files in /tmp to see whether there are too many, the word of the death interrupts it.
half_open = pytest.mark.filterwarnings(
    "ignore:unclosed <socket:ResourceWarning", "ignore:.*unclosed <socket:pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning",
    "ignore:unclosed file <_io.BufferedRandom name='/tmp':ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO name='/tmp':pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip
TRANSFORM = EvalTransform(resize=9, crop=8)


@dataclass(frozen=True)
class GreySource:
    """Images of which the one called `n` is grey of brightness n; `root` is where a test leaves marks."""

    root: Path

    def read(self, image_id: str) -> bytes:
        return image_id.encode()

    def decode(self, content: bytes) -> Image.Image:
        return Image.new("RGB", (12, 12), (int(content),) * 3)

    def place(self, image_id: str) -> str:
        return f"grey {image_id}"

    def stamp(self, image_id: str) -> tuple[int, ...]:
        return (0,)

    def is_first_time(self, what: str) -> bool:
        try:
            (self.root / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class DyingOnce(GreySource):
    """Kills the first process that reads image 5, as the kernel does when memory runs out."""

    def read(self, image_id: str) -> bytes:
        if image_id == "5" and self.is_first_time("dead"):
            os.kill(os.getpid(), signal.SIGKILL)
        return image_id.encode()


class DyingAlways(GreySource):
    """Kills every process that reads image 5."""

    def read(self, image_id: str) -> bytes:
        if image_id == "5":
            os._exit(1)
        return image_id.encode()


class HangingOnce(GreySource):
    """Keeps the first process that reads image 5 for ever, as a network disk may."""

    def read(self, image_id: str) -> bytes:
        if image_id == "5" and self.is_first_time("hanging"):
            time.sleep(20)
        return image_id.encode()


class Stalling(GreySource):
    """Fails to read as a network disk does, `failures` times."""

    failures = 2
    number = errno.ESTALE

    def read(self, image_id: str) -> bytes:
        if any(self.is_first_time(f"stall {count}") for count in range(self.failures)):
            raise OSError(self.number, os.strerror(self.number))
        return image_id.encode()


class Refusing(Stalling):
    """Fails for a reason that time does not mend."""

    number = errno.EACCES


class WithoutDescriptors(Stalling):
    """Cannot open any file, whatever the image."""

    number = errno.EMFILE


class OutOfMemory(GreySource):
    """Has no memory to decode one image."""

    def decode(self, content: bytes) -> Image.Image:
        if content == b"5":
            raise MemoryError
        return super().decode(content)


def greys(source: GreySource, count: int = 8, *, hashes: dict[str, str] | None = None) -> PixelList:
    return PixelList(
        source=source, image_ids=[str(number) for number in range(count)], transform=TRANSFORM, hashes=hashes
    )


def brightness(images: PixelList, *, batch_size: int = 3, workers: int = 0) -> list[int]:
    batches = [batch.pixels for batch in load_pixels(images, batch_size=batch_size, workers=workers)]
    return [int(one) for one in torch.cat(batches)[:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("source", "what"),
    [(WithoutDescriptors, r"grey \d: out of open files: "), (OutOfMemory, "grey 5: out of memory: ")],
)
def test_exhausted_resource_is_no_fault_of_the_image(
    tmp_path: Path, source: type[GreySource], what: str, workers: int
) -> None:
    with pytest.raises(ResourceError, match=what) as caught:
        brightness(greys(source(tmp_path)), workers=workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*_MultiProcessingDataLoaderIter")  # torch's half-built loader
def test_workers_that_cannot_all_be_started_leave_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = multiprocessing.Process.start

    def start_one(process: multiprocessing.Process) -> None:
        if multiprocessing.active_children():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start_one)
    with pytest.raises(ResourceError, match="decoding processes cannot be started: out of open files"):
        brightness(greys(GreySource(tmp_path)), workers=2)
    assert multiprocessing.active_children() == []


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_READ_DELAYS_SECONDS", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_images_come_in_order_each_once(tmp_path: Path, batch_size: int, workers: int) -> None:
    assert brightness(greys(GreySource(tmp_path)), batch_size=batch_size, workers=workers) == list(range(8))


def test_image_with_another_hash_is_reported_by_its_id(tmp_path: Path) -> None:
    hashes = dict.fromkeys("01234567", "0" * 64)
    batch = next(load_pixels(greys(GreySource(tmp_path), hashes=hashes), batch_size=1, workers=0))
    ((image_id, reason),) = batch.failures
    assert (image_id, reason.startswith("it changed since it was hashed")) == ("0", True)


@half_open
def test_worker_that_dies_once_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    levels = brightness(greys(DyingOnce(tmp_path)), batch_size=2, workers=1)
    assert (levels, "grey 5; starting new ones" in caplog.text) == (list(range(8)), True)


@half_open
def test_worker_that_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_loader, "_WORKER_TIMEOUT_SECONDS", 2.0)
    assert brightness(greys(HangingOnce(tmp_path)), batch_size=2, workers=1) == list(range(8))
    assert "in read" in capfd.readouterr().err, "the stack of the hanging worker says where it hangs"


@half_open
def test_worker_that_always_dies_is_a_resource_error_with_the_images_it_was_at(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"twice at the same place(.|\n)*images:\n  grey 5\n") as refusal:
        brightness(greys(DyingAlways(tmp_path)), batch_size=2, workers=1)
    assert (refusal.value.exit_code, "--workers 0" in refusal.value.hint) == (30, True)


def test_workers_leave_signals_to_their_parent(tmp_path: Path) -> None:
    class Signalled(GreySource):
        def read(self, image_id: str) -> bytes:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return image_id.encode()

    assert brightness(greys(Signalled(tmp_path)), workers=2) == list(range(8))


def test_read_that_stalls_for_good_fails(tmp_path: Path, no_delays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stalling, "failures", 4)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        read_image(Stalling(tmp_path), "7")


def test_read_that_is_refused_is_not_tried_again(tmp_path: Path, no_delays: None) -> None:
    with pytest.raises(PermissionError):
        read_image(Refusing(tmp_path), "7")


def test_read_that_hangs_without_workers_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_loader, "_WORKER_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ResourceError, match=r"no image arrived for 0\.5 s, between grey 4 and grey 5"):
        brightness(greys(HangingOnce(tmp_path)), batch_size=2)
    assert "in read" in capfd.readouterr().err


def test_threads_leave_the_filters_of_warnings_as_they_were(tmp_path: Path) -> None:
    before = warnings.filters[:]
    content = io.BytesIO()
    Image.new("RGB", (60, 60)).save(content, "PNG")

    class Files(GreySource):
        def decode(self, unused: bytes) -> Image.Image:
            return decode_image(content.getvalue())

    brightness(greys(Files(tmp_path), 64), batch_size=32)
    assert warnings.filters == before


@half_open
def test_death_of_a_worker_does_not_interrupt_the_user_of_the_pixels(tmp_path: Path) -> None:
    batches = load_pixels(greys(DyingOnce(tmp_path)), batch_size=2, workers=1)
    first = next(batches)
    deadline = time.monotonic() + 1.0  # in which the worker, two batches ahead, dies
    while time.monotonic() < deadline:
        first.pixels.float().mean()
    assert [int(batch.pixels[0, 0, 0, 0]) for batch in batches] == [2, 4, 6]
    assert (tmp_path / "dead").exists()


@half_open
def test_death_is_noticed_after_an_unfinished_pass(tmp_path: Path) -> None:
    left = load_pixels(greys(GreySource(tmp_path)), batch_size=2, workers=1)
    next(left)
    other = load_pixels(greys(GreySource(tmp_path)), batch_size=2, workers=1)
    next(other)
    del left
    assert len(list(other)) == 3
    assert brightness(greys(DyingOnce(tmp_path)), batch_size=2, workers=1) == list(range(8))


@half_open
def test_workers_that_die_at_two_places_are_replaced_at_both(tmp_path: Path) -> None:
    class DyingTwice(DyingOnce):
        def read(self, image_id: str) -> bytes:
            if image_id == "1" and self.is_first_time("dead before"):
                os._exit(1)
            return super().read(image_id)

    images = greys(DyingTwice(tmp_path), 12)
    assert brightness(images, batch_size=1, workers=1) == list(range(12))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_read_that_stalls_three_times_comes_at_last(
    tmp_path: Path, no_delays: None, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Stalling, "failures", 3)
    monkeypatch.setattr(Stalling, "number", number)
    assert read_image(Stalling(tmp_path), "7") == b"7"


def test_images_that_are_not_files_are_left_to_their_source_by_every_decoder(tmp_path: Path) -> None:
    embedded = replace(greys(GreySource(None)), decoder="torchvision")  # type: ignore[arg-type]
    assert brightness(embedded) == list(range(8))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_pixels_come_in_a_thread_that_no_signal_reaches(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(brightness, greys(GreySource(tmp_path)), workers=1).result() == list(range(8))


def test_signal_handler_of_torch_is_back_after_the_pass(tmp_path: Path) -> None:
    brightness(greys(GreySource(tmp_path)), workers=1)
    assert signal.getsignal(signal.SIGCHLD) is pixel_loader._sigchld.torch_handler


class DyingLate(GreySource):
    """Kills the first process that reads image 1, when nobody waits for it."""

    def read(self, image_id: str) -> bytes:
        if image_id == "1" and self.is_first_time("dead"):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return image_id.encode()


@half_open
def test_death_between_batches_is_noticed_at_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pixel_loader, "_WORKER_TIMEOUT_SECONDS", 5.0)
    batches = load_pixels(greys(DyingLate(tmp_path), 3), batch_size=1, workers=1)
    next(batches)
    time.sleep(0.8)
    assert (len(list(batches)), "timed out" in caplog.text, "died" in caplog.text) == (2, False, True)


@half_open
def test_death_is_noticed_after_another_pass_has_waited_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pixel_loader, "_WORKER_TIMEOUT_SECONDS", 5.0)
    batches = load_pixels(greys(DyingLate(tmp_path), 3), batch_size=1, workers=1)
    next(batches)
    time.sleep(0.8)
    multiprocessing.active_children()

    assert (len(list(batches)), "ended with exit code -9" in caplog.text) == (2, True)


@half_open
def test_death_interrupts_nothing_after_another_pass_has_ended(tmp_path: Path) -> None:
    batches = load_pixels(greys(DyingLate(tmp_path), 3), batch_size=1, workers=1)
    next(batches)
    brightness(greys(GreySource(tmp_path), 2), workers=1)
    time.sleep(0.8)
    assert ((tmp_path / "dead").exists(), len(list(batches))) == (True, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_that_comes_while_workers_are_forked_is_handled_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class StoppedError(Exception):
        """What the handler raises."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError

    real = pixel_loader.DataLoader

    def signalled(*arguments: object, **options: object) -> object:
        with contextlib.suppress(StoppedError):  # as Python suppresses what is raised in the middle of a fork
            signal.raise_signal(number)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pixel_loader, "DataLoader", signalled)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(StoppedError):
            brightness(greys(GreySource(tmp_path)), workers=1)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("images", "cuda", "cores", "workers"),
    [
        (511, True, 8, 0),  # few images
        (5000, False, 8, 0),  # the encoder needs the cores
        (512, True, 8, 8),
        (512, True, 200, 16),
    ],
)
def test_workers_follow_images_and_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    cuda: bool,
    cores: int,
    workers: int,
) -> None:
    monkeypatch.setattr(pixel_loader, "cores_per_rank", lambda: cores)
    assert automatic_workers(greys(GreySource(tmp_path), images), batch_size=16, cuda=cuda) == workers


def test_embedded_images_get_no_workers() -> None:
    embedded = GreySource(None)  # type: ignore[arg-type]
    assert automatic_workers(greys(embedded, 5000), batch_size=16, cuda=True) == 0
