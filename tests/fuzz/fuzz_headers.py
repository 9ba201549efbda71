"""Fuzz the code that reads the headers of untrusted checkpoint files before torch does.

    python tests/fuzz/fuzz_headers.py -max_total_time=60 [CORPUS]

The only allowed exception is CheckpointError. Needs the package atheris. Without a folder of inputs it starts from
small valid files.
"""

import io
import pickle
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["msn_eval.checkpoints", "pickletools"]):
    from msn_eval.checkpoints.formats.pickle_allowlist import scan_pickle
    from msn_eval.checkpoints.formats.pickle_dry_run import rehearse
    from msn_eval.checkpoints.formats.read import sniff_container
    from msn_eval.checkpoints.formats.safetensors import read_header
    from msn_eval.checkpoints.formats.torch_zip import read_archive
    from msn_eval.errors import CheckpointError

import safetensors.torch
import torch

_LARGEST_INPUT = 8192
_WHERE = "fuzzed"


def look_into(data: bytes) -> None:
    """Pass `data` to every header reader. Any exception other than CheckpointError is a finding."""
    sniff_container(data[:512])
    for reader in (
        lambda file: scan_pickle(file, where=_WHERE),
        lambda file: rehearse(file, most_bytes=len(data), where=_WHERE),
        lambda file: read_archive(file, len(data), where=_WHERE),
        lambda file: read_header(file, len(data), where=_WHERE),
    ):
        try:
            reader(io.BytesIO(data))
        except CheckpointError as refusal:
            str(refusal)


def seeds() -> dict[str, bytes]:
    """Return small valid files of every container format, and pickles of every protocol."""
    weights = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3), "none": torch.empty(0)}
    files = {f"pickle{protocol}": pickle.dumps({"a": [1, (2.0, "b")]}, protocol=protocol) for protocol in range(6)}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(weights, buffer, _use_new_zipfile_serialization=zipped)
        files["zip" if zipped else "old"] = buffer.getvalue()
    content = files["old"]
    for _ in range(3):
        content = content[content.index(b".\x80\x02") + 1 :]
    return files | {"content": content, "safetensors": safetensors.torch.save(weights)}


def main() -> None:
    """Fuzz, starting from the corpus in the arguments or from `seeds`."""
    arguments = [f"-max_len={_LARGEST_INPUT}", "-timeout=10", "-rss_limit_mb=4096", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        if all(argument.startswith("-") for argument in arguments):
            for name, content in seeds().items():
                (Path(folder) / name).write_bytes(content)
            arguments.append(folder)
        atheris.Setup([sys.argv[0], *arguments], look_into)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
