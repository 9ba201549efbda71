"""The evaluation pipeline: checkpoint -> encoder -> features -> probe -> result."""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, cast

import torch

from msn_eval.checkpoints import split_label
from msn_eval.checkpoints.checkpoint import read_checkpoint, shorten_name
from msn_eval.config.recipes import AugmentedRecipe, FinetuneRecipe, LinearRecipe
from msn_eval.config.request import EvaluationConfig, read_channels
from msn_eval.config.yaml_config import read_config
from msn_eval.data.hashing import content_sha256
from msn_eval.data.images import ImageSet
from msn_eval.data.subsets import merge_subsets
from msn_eval.distributed.group import ALONE, Group, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import CheckpointError, NumericalError, format_count
from msn_eval.evaluation.canary import choose_labels, judge_canary, refuse_leaks
from msn_eval.evaluation.eval_set import EvalSet
from msn_eval.evaluation.measurement import (
    NO_EXTRACTION,
    Measurement,
    find_result,
    find_taps,
    label_only,
    make_predictions,
)
from msn_eval.evaluation.plan import Plan, Task, cache_folder, list_all_bad_images, make_plan
from msn_eval.evaluation.progress import draw_progress
from msn_eval.features.augmented import AugmentedImages
from msn_eval.features.collapse import Spectrum
from msn_eval.features.encoder import Encoder, build_encoder, check_frozen
from msn_eval.features.extraction import (
    Extraction,
    Features,
    Loading,
    choose_batch_size,
    extract_features,
    read_spectrum,
)
from msn_eval.features.patch_drop import PatchDrop, check_patch_drop
from msn_eval.files.atomic import prepare_folder
from msn_eval.probes.base import FeatureProbe, FittedProbe, TrainsOn, WorkerGroup, describe_collapse, fit_probe
from msn_eval.probes.distributed import serve, shutdown
from msn_eval.probes.linear import Linear
from msn_eval.probes.linear_augmented import LinearAugmented, fit_augmented
from msn_eval.probes.training_state import StateFiles, remove_states
from msn_eval.results.record import Predictions, Result, TimingInfo, write_result
from msn_eval.results.row_names import RefusedCheckpoint, name_networks
from msn_eval.results.table import get_cell_key
from msn_eval.version import __version__

_log = logging.getLogger(__name__)
_UNCONVERGED = "the solver did not converge"
_NO_IMAGES = Extraction(
    features={}, read=0, reused=0, seconds=0.0, decode_seconds=0.0, encode_seconds=0.0, batch_size=1 << 30
)
# Fields of EvaluationConfig by argument, of which a text is one item.
_FIELDS = {"checkpoints": "checkpoint", "tests": "test", "subsets": "subset", "probes": "probe", "arch": "arch"}
Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all
_Outcome = tuple[Result, Predictions | None]


def evaluate(
    checkpoints: str | Sequence[str],
    *,
    data: str | Path | None = None,
    tests: str | Path | Sequence[str | Path] | None = None,
    class_map: str | Path | None = None,
    subsets: str | Sequence[str] | None = None,
    probes: str | Sequence[str] | None = None,
    tap: str | None = None,
    lambda_: float | str | Sequence[float | str] | None = None,
    k: int | Sequence[int] | None = None,
    temperature: float | Sequence[float] | None = None,
    search: str | None = None,
    solver: str | None = None,
    linear: LinearRecipe | Mapping[str, object] | None = None,
    linear_augmented: AugmentedRecipe | Mapping[str, object] | None = None,
    finetune: FinetuneRecipe | Mapping[str, object] | None = None,
    arch: str | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    checkpoint_key: str | None = None,
    allow_missing: str | Sequence[str] | None = None,
    allow_class_mismatch: bool | None = None,
    classes: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch_size: int | str | None = None,
    workers: int | str | None = None,
    compile: bool | None = None,
    decoder: str | None = None,
    image_pixels: int | None = None,
    patch_drop: float | None = None,
    limit: int | None = None,
    seed: int | None = None,
    on_bad_image: str | None = None,
    canary: bool | None = None,
    out: str | Path | None = None,
    save: str | Path | None = None,
    cache: str | Path | None = None,
    no_cache: bool | None = None,
    progress: bool | None = None,
) -> list[Result]:
    """Evaluate checkpoints and return their results, those that `out` already holds included.

    The arguments are the options of `msn-eval`. A single value is accepted for a list of one; None means the default, which
    is that of `EvaluationConfig`. `progress` says whether to draw bars on stderr; None draws them in notebooks only.

    Raises:
        MsnEvalError: One of its subclasses. Results that were finished before are kept in `out`. With canary=True nothing
            is written, and NumericalError is raised if random labels are predicted better than by chance.
    """
    arguments: dict[str, object] = {name: value for name, value in locals().items() if value is not None}
    arguments.pop("progress", None)
    given: dict[str, object] = {}
    for name, value in arguments.items():
        if name in _FIELDS and isinstance(value, str | Path):
            value = [value]
        if isinstance(value, list | tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        given[_FIELDS.get(name, name)] = str(value) if isinstance(value, Path) else value
    plan = make_plan(read_config(EvaluationConfig, given=given))
    with draw_progress(progress) as draw:
        names = plan.config.checkpoint
        measured = (result for name in names for result in evaluate_checkpoint(plan, name, on_progress=draw))
        results = list({result.id: result for result in measured}.values())
    if plan.config.canary:
        refuse_leaks(judge_canary(results))
    return results


class Evaluation(NamedTuple):
    """What `evaluate_all` returns.

    Attributes:
        results: Each once, although two names may lead to the same weights.
        code: The exit code: 0, that of the first refused checkpoint, or that of NumericalError if a result is not `ok`.
        refused: The checkpoints that cannot be used.
    """

    results: list[Result]
    code: int
    refused: tuple[RefusedCheckpoint, ...]


def evaluate_all(
    plan: Plan,
    *,
    prepared: dict[str, "Preparation"] | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate every checkpoint of a plan. A checkpoint that is refused does not stop the others.

    Args:
        plan: The plan.
        prepared: Checkpoints that `prepare` has read, by name; each is removed, so that its memory can be freed.
        group: Ranks that share the work.
        on_progress: Called with what is being done, images done and images in total.
        on_problem: Called with a text for each refused checkpoint and each kind of result that is not `ok`.

    Raises:
        CheckpointError: The plan's only checkpoint is refused.
    """
    report = on_problem or (lambda text: None)
    results: dict[str, Result] = {}
    refused, code = [], 0
    for name in plan.config.checkpoint:
        try:
            ready = (prepared or {}).pop(name, None)
            for result in evaluate_checkpoint(plan, name, prepared=ready, group=group, on_progress=on_progress):
                results[result.id] = result
        except CheckpointError as error:
            if len(plan.config.checkpoint) == 1:
                raise
            if group.rank == 0:
                report(f"{type(error).__name__}: {error}")
            refused.append(_describe_unread(name))
            code = code or error.exit_code
    problems = [result for result in results.values() if result.status != "ok"]
    names = name_networks({get_cell_key(result)[:2]: result.checkpoint for result in results.values()})
    texts = [f"{names[get_cell_key(result)[:2]]}: {result.error or _UNCONVERGED}" for result in problems]
    for text in dict.fromkeys(texts):
        report(text)
    code = code or (NumericalError.exit_code if problems else 0)
    return Evaluation(results=list(results.values()), code=code, refused=tuple(refused))


def _describe_unread(name: str) -> RefusedCheckpoint:
    label, source = split_label(name)
    return RefusedCheckpoint(name=label or shorten_name(source), path=source)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A checkpoint ready to be evaluated under a plan.

    Attributes:
        encoder: The encoder.
        name: Of the checkpoint in the log, with folders where another one of the plan has the same name.
        taps: The encoder's own tap for each tap that a probe names.
        known: Results that the plan's folder already holds.
        pending: The tasks that are left.
    """

    encoder: Encoder
    name: str
    taps: Mapping[str, str]
    known: tuple[Result, ...]
    pending: tuple[Task, ...]

    def pending_on(self, *kinds: TrainsOn) -> tuple[Task, ...]:
        """Return the tasks that are left whose probes train on one of `kinds`."""
        return tuple(task for task in self.pending if task.probe.trains_on in kinds)

    def taps_of(self, tasks: Iterable[Task]) -> tuple[str, ...]:
        """Return the encoder's own taps for some tasks, each once."""
        return tuple({self.taps[tap]: None for task in tasks for tap in task.probe.taps})

    @property
    def scored(self) -> dict[str, EvalSet]:
        """The sets that the frozen tasks score, one for each extraction, by its content."""
        return {task.scored.extracted_sha256: task.scored for task in self.frozen}

    @property
    def frozen(self) -> tuple[Task, ...]:
        """The tasks that are left and keep the encoder as it is; they share the features of what they score."""
        return self.pending_on("features", "augmented features")


def prepare(plan: Plan, name: str) -> Preparation:
    """Read one checkpoint and list what is left to measure. Failed results are tried again.

    Raises:
        CheckpointError, StoreError: The checkpoint or an earlier record is refused.
        UsageError: --patch-drop for a network without patches, a --tap that it does not have, or a fine-tuning that
            `check_finetuning` refuses.
    """
    config = plan.config
    label, source = split_label(name)
    checkpoint = read_checkpoint(
        source,
        arch=config.arch_of(name),
        key=config.checkpoint_key,
        allow_missing=tuple(config.allow_missing),
        seed=config.seed,
        mean=read_channels("--mean", config.mean),
        std=read_channels("--std", config.std),
    )
    if label is not None:
        checkpoint = replace(checkpoint, name=label)
    encoder = build_encoder(
        checkpoint,
        device=plan.device,
        precision=plan.precision,
        image_pixels=config.image_pixels,
        compiled=config.compile,
    )
    if (drop := make_patch_drop(config)) is not None:
        check_patch_drop(encoder, drop)
    ready = _find_results(plan, encoder, _choose_name(plan, name, checkpoint.name))
    if any(task.probe.trains_on == "images" for task in plan.tasks):
        from msn_eval.evaluation.finetune import check_finetuning  # loads timm's training code

        check_finetuning(plan, encoder, ready.pending)
    return ready


def _choose_name(plan: Plan, name: str, own: str) -> str:
    """Return the checkpoint's own name, with its folders where they tell it apart from others of the plan."""
    described = {other: _describe_unread(other) for other in (*plan.config.checkpoint, name)}
    shown = name_networks(described)[name]
    return own if shown == described[name].name else shown


def _find_results(plan: Plan, encoder: Encoder, name: str) -> Preparation:
    """Compare the plan with the results that its folder holds now."""
    config = plan.config
    results = [None if config.canary else find_result(Path(config.out), encoder, task, config) for task in plan.tasks]
    return Preparation(
        encoder=encoder,
        name=name,
        taps={tap: own for task in plan.tasks for tap, own in find_taps(encoder, task, config).items()},
        known=tuple(result for result in results if result is not None),
        pending=tuple(task for task, result in zip(plan.tasks, results, strict=True) if result is None),
    )


def evaluate_checkpoint(
    plan: Plan,
    name: str,
    *,
    prepared: Preparation | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Iterator[Result]:
    """Evaluate one checkpoint under every task of a plan, and yield each result as soon as it is written.

    Results that the plan's folder already holds are yielded and not computed again; failed ones are. Those of a canary are
    neither written nor looked for.

    Args:
        plan: The plan.
        name: The checkpoint.
        prepared: What `prepare` returned for it, if it was called.
        group: Ranks that share the work; rank 0 alone writes and yields.
        on_progress: Called with what is being done, images done and images in total.

    Raises:
        CheckpointError, DataError, ResourceError, StoreError, DistributedError: NumericalError becomes a failed result.
    """
    # A different name for the same weights may have been evaluated since `prepared` was made.
    ready = prepare(plan, name) if prepared is None else _find_results(plan, prepared.encoder, prepared.name)
    encoder, out = ready.encoder, Path(plan.config.out)
    check_equal_across_ranks(group, encoder.checkpoint.name, _describe_run(plan, encoder))
    if group.rank == 0:
        if not plan.config.canary:
            prepare_folder(out, option="--out")
        yield from ready.known
    # Rank 0 reads the result folder and broadcasts what is left: it may write there while others still read.
    own = [index for index, task in enumerate(plan.tasks) if task in ready.pending]
    indices = broadcast_from_rank0(group, "pending", lambda: own)
    if not indices:
        finished = format_count(len(plan.tasks), "finished result")
        _log.info("%s: %s in %s, nothing computed", ready.name, finished, out)
        return
    ready = replace(ready, pending=tuple(plan.tasks[index] for index in indices))
    for result, predictions in _measure(plan, ready, group, on_progress):
        if group.rank == 0:
            if not plan.config.canary:
                result = write_result(out, result, predictions)
            yield result


def _describe_run(plan: Plan, encoder: Encoder) -> dict[str, str]:
    """Return what all ranks must have in common for their features to belong together."""
    checkpoint = encoder.checkpoint
    return {
        "package": __version__,
        "torch": torch.__version__,
        "weights": checkpoint.weights_sha256,
        "architecture": encoder.arch,
        "precision": encoder.precision,
        "device": encoder.device.type,
        "validation images": plan.val_sha256,
        "labelled images": content_sha256(tuple(plan.train_hashes), plan.train_hashes),
        "tasks": " ".join(f"{task.protocol_id}@{task.subset.draw}" for task in plan.tasks),
    }


def _measure(plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None) -> Iterator[_Outcome]:
    """Measure what is left: on the frozen encoder first, then each task that trains the encoder."""
    if ready.frozen:
        yield from _measure_frozen(plan, ready, group, on_progress)
    for task in ready.pending_on("images"):
        yield from _measure_finetuned(plan, ready, task, group, on_progress)


def _measure_frozen(plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None) -> Iterator[_Outcome]:
    """Extract the features that the tasks need, each image once; then fit and score probe by probe."""
    encoder = ready.encoder
    measure = partial(Measurement, plan=plan, encoder=encoder)
    started = time.perf_counter()
    try:
        with check_frozen(encoder):
            train, tests = _extract_splits(plan, ready, group, on_progress)
    except NumericalError as error:
        timing = replace(NO_EXTRACTION, extract=round(time.perf_counter() - started, 4))
        measure = partial(measure, timing=timing, batch_size=plan.config.batch_images or choose_batch_size(encoder))
        yield from ((measure(task=task).make_failure(error), None) for task in ready.frozen)
        return
    extractions = (train, *tests.values())
    timing = _make_timing(extractions, time.perf_counter() - started)
    reused = sum(extraction.reused for extraction in extractions)
    _log.info(
        "%s: features of %d images in %.1f s, %d of them from the cache",
        ready.name, sum(extraction.read for extraction in extractions) + reused, timing.extract, reused,
    )  # fmt: skip
    measure = partial(measure, timing=timing, batch_size=min(extraction.batch_size for extraction in extractions))
    workers = WorkerGroup(group=group, device=plan.device) if group.world > 1 else None
    spectra: dict[str, dict[str, Spectrum]] = {}

    def measure_task(task: Task, degenerate: str | None = None) -> Measurement:
        return measure(task=task, degenerate=degenerate, spectra=spectra.get(task.scored.extracted_sha256, {}))

    if group.rank == 0:
        cache = None if plan.config.no_cache else cache_folder(plan.config)
        read = partial(read_spectrum, encoder, cache=cache, decoder=plan.config.decoder)
        for content, scored in ready.scored.items():
            features = tests[content].features
            spectra[content] = {tap: read(scored.extracted, features[tap], scored.hashes) for tap in features}
        yield from _measure_on_features(plan, ready, train, tests, measure_task, workers)
        if workers is not None:  # if this rank fails, the others learn of that instead
            shutdown(workers)
    elif workers is not None:
        serve(workers)
    for tasks in group_by_fit(ready.pending_on("augmented features")):
        yield from _measure_on_augmented(ready, tests, [measure_task(task) for task in tasks], group)


def _extract_splits(
    plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None
) -> tuple[Extraction, dict[str, Extraction]]:
    """Extract the features of the labelled images, the union of all draws, and of each set that is scored, by its content."""
    config, name, tasks = plan.config, ready.name, ready.pending_on("features")
    loading = make_loading(config)
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(_open_cache(plan, group))
        extract = partial(extract_features, ready.encoder, cache=cache, group=group)
        # Linear takes some rows at a time, so they need not fit into memory.
        beyond_memory = cache is not None and all(isinstance(task.probe, Linear) for task in tasks)
        train, labelled = _NO_IMAGES, pending_images(plan, ready)
        if group.world == 1:  # several ranks list the images of one pass, each its share
            stack.enter_context(
                list_all_bad_images(
                    (labelled, *(scored.extracted for scored in ready.scored.values())), config.worker_count
                )
            )
        if tasks:
            train = extract(
                labelled,
                taps=ready.taps_of(tasks),
                hashes=plan.train_hashes,
                loading=replace(loading, beyond_memory=beyond_memory),
                drop=make_patch_drop(config),
                on_progress=_name_progress(on_progress, f"{name}: labelled images"),
            )
        tests = {
            content: extract(
                scored.extracted,
                taps=ready.taps_of(ready.frozen),
                hashes=scored.hashes,
                loading=loading,
                drop=None,
                on_progress=_name_progress(on_progress, f"{name}: {_name_images(plan, scored)}"),
            )
            for content, scored in ready.scored.items()
        }
    return train, tests


def _name_images(plan: Plan, scored: EvalSet) -> str:
    return "validation images" if scored.extracted_sha256 == plan.val_sha256 else f"images of {scored.name}"


def pending_images(plan: Plan, ready: Preparation) -> ImageSet:
    """Return the labelled images whose features the tasks need that are left, the union of their draws."""
    subsets = {id(task.subset): task.subset for task in ready.pending_on("features")}
    return merge_subsets(list(subsets.values()), plan.train)


def make_loading(config: EvaluationConfig) -> Loading:
    """Return how images are loaded for the encoder."""
    return Loading(decoder=config.decoder, batch_size=config.batch_images, workers=config.worker_count)


def make_patch_drop(config: EvaluationConfig) -> PatchDrop | None:
    """Return which patches of the labelled images are dropped. Validation images keep all of theirs."""
    return PatchDrop(share=config.patch_drop, seed=config.seed) if config.patch_drop else None


@contextlib.contextmanager
def _open_cache(plan: Plan, group: Group) -> Iterator[Path | None]:
    """Yield the cache folder. With --no-cache it is None, or a temporary folder through which ranks exchange rows."""
    if not plan.config.no_cache:
        yield cache_folder(plan.config)
    elif group.world == 1:
        yield None
    else:
        # A later run recognises by this name what a killed one has left.
        name = f".features.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        folder = Path(plan.config.out) / broadcast_from_rank0(group, "folder", lambda: name)
        try:
            yield folder
        finally:
            if group.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)


def _name_progress(on_progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if on_progress is None else partial(on_progress, name)


def _make_timing(extractions: Sequence[Extraction], seconds: float) -> TimingInfo:
    timing = replace(NO_EXTRACTION, extract=round(seconds, 4))
    images, total, decoding, encoding = (
        sum(getattr(extraction, name) for extraction in extractions)
        for name in ("read", "seconds", "decode_seconds", "encode_seconds")
    )
    if not images:
        return timing
    return replace(
        timing,
        images_per_second=round(images / total, 2),
        decode_share=round(decoding / total, 4),
        encode_share=round(encoding / total, 4),
    )


def group_by_fit(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Group the tasks that one fit serves: those of one draw and one probe."""
    for _, group in groupby(tasks, key=lambda task: (id(task.subset), task.probe)):
        yield list(group)


def _measure_on_features(
    plan: Plan,
    ready: Preparation,
    train: Extraction,
    tests: Mapping[str, Extraction],
    measure: Callable[..., Measurement],
    workers: WorkerGroup | None,
) -> Iterator[_Outcome]:
    """Fit and score every probe that takes cached features."""
    problems = _check_collapse(plan, ready, train, tests)
    for tasks in group_by_fit(ready.pending_on("features")):
        taps, draw = ready.taps_of(tasks), tasks[0].subset.image_ids
        measurements = []
        for task in tasks:
            found = [problems.get((content, tap)) for tap in taps for content in ("", task.scored.extracted_sha256)]
            measurements.append(measure(task=task, degenerate="; ".join(filter(None, found)) or None))
        offered = _select_features(tasks, taps, tests)
        first = tasks[0].scored
        pairs = [
            choose_labels(plan, train.features[tap].only(draw), features)
            for tap, features in zip(taps, offered[first], strict=True)
        ]
        offered[first] = [features for _, features in pairs]
        labelled, *other_taps = (features for features, _ in pairs)
        probe = cast(FeatureProbe, tasks[0].probe)
        fit = partial(fit_probe, probe, labelled, plan.device, workers=workers, other_taps=other_taps)
        yield from _fit_and_score(measurements, fit, offered)


def _select_features(
    tasks: Sequence[Task], taps: Sequence[str], tests: Mapping[str, Extraction]
) -> dict[EvalSet, list[Features]]:
    """Return the features at each tap of every set that some tasks score."""
    return {
        scored: [scored.select(tests[scored.extracted_sha256].features[tap]) for tap in taps]
        for scored in dict.fromkeys(task.scored for task in tasks)
    }


def _check_collapse(
    plan: Plan, ready: Preparation, train: Extraction, tests: Mapping[str, Extraction]
) -> dict[tuple[str, str], str]:
    """Warn of degenerate features, and return the texts for the records by content (empty for labelled images) and tap."""
    splits = [("", "labelled images", train)]
    splits += [(content, _name_images(plan, ready.scored[content]), split) for content, split in tests.items()]
    texts = {}
    for content, images, split in splits:
        for tap, features in split.features.items():
            if problem := describe_collapse(features.values):
                _log.warning("%s: tap %s, %s: %s", ready.name, tap, images, problem)
                texts[content, tap] = f"{images}: {problem}"
    return texts


def _measure_on_augmented(
    ready: Preparation, tests: Mapping[str, Extraction], measurements: Sequence[Measurement], group: Group
) -> Iterator[_Outcome]:
    """Train layers on augmented images of one draw, all ranks together; rank 0 scores them."""
    plan, encoder, task = measurements[0].plan, ready.encoder, measurements[0].task
    probe = task.probe
    assert isinstance(probe, LinearAugmented)
    (tap,) = ready.taps_of([task])
    images = plan.train.only(task.subset.image_ids)
    labelled, _ = choose_labels(plan, label_only(images, tap), label_only(plan.val.only([]), tap))
    offered: dict[EvalSet, list[Features]] = {}
    if group.rank == 0:  # the other ranks have no features of what is scored
        offered = _select_features([measurement.task for measurement in measurements], [tap], tests)
        (features,) = offered[task.scored]
        offered[task.scored] = [choose_labels(plan, label_only(images, tap), features)[1]]
    augmented = AugmentedImages(
        images=images,
        labels=labelled.labels,
        hashes=plan.train_hashes,
        encoder=encoder,
        tap=tap,
        loading=make_loading(plan.config),
    )
    files = None
    if not plan.config.canary:
        facts = _describe_run(plan, encoder) | {"tap": tap, "transform": str(encoder.transform)}
        facts |= {"probe": str(probe), "draw": task.split_sha256}
        files = StateFiles(out=Path(plan.config.out), facts=facts)

    def fit() -> FittedProbe:
        with check_frozen(encoder):
            return fit_augmented(probe, augmented, group=group, files=files)

    if group.rank != 0:
        with contextlib.suppress(NumericalError):  # rank 0 gets it too, and records it
            fit()
        return
    yield from _fit_and_score(measurements, fit, offered)
    if files is not None:
        remove_states(files)  # only now: each result was written before the next was asked for


def _fit_and_score(
    measurements: Sequence[Measurement], fit: Callable[[], FittedProbe], offered: Mapping[EvalSet, Sequence[Features]]
) -> Iterator[_Outcome]:
    """Fit once, and score the configurations of the measurements on every set.

    Args:
        measurements: Those of one fit; other configurations of it were finished by an earlier run.
        fit: Fits the probe.
        offered: Of each set to score, the features at each tap that the probe was given.
    """
    pending = {(measurement.task.scored, str(measurement.task.params)): measurement for measurement in measurements}
    started = time.perf_counter()
    try:
        fitted = fit()
        fit_seconds = time.perf_counter() - started
        for scored, at_taps in offered.items():
            (test,) = (features for features in at_taps if fitted.tap in (None, features.tap))
            started = time.perf_counter()
            for config, scores in zip(fitted.settings, fitted.scores(test.values), strict=True):
                key = scored, str(dict(config.params))
                if key not in pending:
                    continue
                measurement = pending.pop(key)
                probe = measurement.task.probe
                predictions = make_predictions(probe, test.image_ids, test.labels, scored.restrict(scores))
                seconds = fit_seconds + time.perf_counter() - started
                dim = test.values.shape[1]
                yield measurement.make_result(config, predictions, dim=dim, seconds=seconds, tap=test.tap), predictions
                started = time.perf_counter()
        reasons = {str(dict(params)): reason for params, reason in fitted.failures}
        for key in [key for key in pending if key[1] in reasons]:
            yield pending.pop(key).make_failure(reasons[key[1]]), None
    except NumericalError as error:
        yield from ((measurement.make_failure(error), None) for measurement in pending.values())


def _measure_finetuned(
    plan: Plan, ready: Preparation, task: Task, group: Group, on_progress: Progress | None
) -> Iterator[_Outcome]:
    """Fine-tune the encoder for one task, all ranks together; rank 0 yields."""
    from msn_eval.evaluation.finetune import finetune_task, make_state_files  # loads timm's training code

    encoder, batch_size = ready.encoder, choose_batch_size(ready.encoder)
    measurement = Measurement(plan=plan, encoder=encoder, task=task, timing=NO_EXTRACTION, batch_size=batch_size)
    name = f"{ready.name}: fine-tuning on {task.subset.name}@{task.subset.draw}"
    try:
        yield finetune_task(measurement, group=group, on_progress=_name_progress(on_progress, name))
    except NumericalError as error:
        yield measurement.make_failure(error), None
    else:
        if group.rank == 0:
            remove_states(make_state_files(plan, encoder, task))
