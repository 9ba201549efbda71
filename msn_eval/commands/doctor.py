"""`msn-eval doctor`: versions, devices, resources, folders and data of this machine, and what is missing."""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from msn_eval.errors import MsnEvalError, ResourceError, format_count, printable
from msn_eval.process import available_bytes, usable_cores

_PACKAGES = ("msn-eval", "torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")
_EXTRAS = {"hf": ("transformers", "datasets"), "slurm": ("submitit",), "tensorboard": ("tensorboard",)}
_SHARED_MEMORY = Path("/dev/shm")
_FEW_DESCRIPTORS = 256
_FEW_BYTES = 1 << 30  # of memory and disk
_FEW_SHARED_BYTES = 64 << 20


class _Line(NamedTuple):
    """What was checked, what was found, and what to do; the last is empty where nothing is wrong."""

    name: str
    found: str
    hint: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--data", metavar="X", help="data set to look for; default $MSN_EVAL_DATA")
    parser.add_argument("--cache", metavar="DIR", help="cache folder to check; default: the user's cache folder")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the findings, and return 0, or 30 where something keeps evaluations from running."""
    problems = 0
    for line in (*_check_versions(), *_check_devices(), *_check_resources(), *_check_folders(options)):
        print(printable(f"{'PROBLEM' if line.hint else 'ok':8}{line.name:20}{line.found}"))
        if line.hint:
            print(printable(f"{'':28}{line.hint}"))
            problems += 1
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if find_spec(name) is None]
        install = f'{", ".join(missing)} not installed; if you need it: pip install "msn-eval[{extra}]"'
        print(f"{'-' if missing else 'ok':8}{f'extra {extra}':20}{install if missing else 'installed'}")
    return ResourceError.exit_code if problems else 0


def _check_versions() -> Iterator[_Line]:
    yield _Line("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            yield _Line(name, version(name))
        except PackageNotFoundError:
            yield _Line(name, "not installed", "Install it: pip install msn-eval")


def _check_devices() -> Iterator[_Line]:
    import torch

    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    for name in names:
        kind = torch.cuda.get_device_name(name) if name != "cpu" else format_count(usable_cores(), "core")
        try:
            ones = torch.ones(64, 64, device=name)
            works = bool(((ones @ ones) == 64).all())
        except RuntimeError as error:
            yield _Line(
                name, f"{kind}: {str(error).partition(chr(10))[0]}", "Choose another --device, or update its driver."
            )
            continue
        hint = "" if works else "Do not use this device: it computes wrong numbers."
        yield _Line(name, f"{kind}: a matrix product is {'right' if works else 'WRONG'}", hint)


def _check_resources() -> Iterator[_Line]:
    free = available_bytes()
    if free is not None:
        yield _Line("memory", f"{free:,} bytes available", "Free memory." if free < _FEW_BYTES else "")
    if hasattr(os, "getloadavg"):
        busy = "; runs are slower while other processes use the cores" if os.getloadavg()[0] > usable_cores() else ""
        yield _Line("load", f"{os.getloadavg()[0]:.1f} on {format_count(usable_cores(), 'core')}{busy}")
    if _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free
        hint = "Enlarge it (docker run --shm-size=1g), or pass --workers 0." if free < _FEW_SHARED_BYTES else ""
        yield _Line(str(_SHARED_MEMORY), f"{free:,} bytes free", hint)
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        enough = limit == resource.RLIM_INFINITY or limit >= _FEW_DESCRIPTORS
        yield _Line("open files", "no limit" if limit < 0 else str(limit), "" if enough else "Raise it: ulimit -n 1024")


def _check_folders(options: argparse.Namespace) -> Iterator[_Line]:
    import platformdirs

    from msn_eval.data import read_dataset
    from msn_eval.data.imagenet_subsets import find_list, read_publication
    from msn_eval.files.atomic import prepare_folder

    cache = Path(options.cache) if options.cache else platformdirs.user_cache_path("msn-eval")
    for name, folder, option in (("cache", cache, "--cache"), ("results", Path.cwd(), "--out")):
        try:
            prepare_folder(folder, option=option)
            free = shutil.disk_usage(folder).free
            hint = f"Free space, or give another {option} folder." if free < _FEW_BYTES else ""
            yield _Line(name, f"{folder}: {free:,} bytes free", hint)
        except MsnEvalError as error:
            yield _Line(name, f"{folder}: {error.what}", error.hint)
    data = options.data or os.environ.get("MSN_EVAL_DATA")
    try:
        found = read_dataset(data, cache_dir=None) if data else None
        text = "$MSN_EVAL_DATA is not set; pass --data to each command"
        if found:
            classes = format_count(len(found.classes), "class", "classes")
            text = f"{data}: {len(found.train):,} train, {len(found.val):,} val, {classes}"
        yield _Line("data", text)
    except MsnEvalError as error:
        yield _Line("data", f"{error.where or data}: {error.what}", error.hint)
    lists = read_publication().lists
    count = sum(find_list(entry) is not None for entry in lists)
    missing = "" if count == len(lists) else "; for ImageNet's low-shot subsets: msn-eval subsets fetch"
    yield _Line("ImageNet lists", f"{count} of {len(lists)} found{missing}")
