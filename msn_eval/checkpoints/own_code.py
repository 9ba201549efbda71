"""The source of the user's own modules: what a network that they build depends on besides its weights."""

import hashlib
import site
import sys
import sysconfig
from pathlib import Path


def own_code_sha256() -> str:
    """Give the SHA-256 over name and source of every loaded module that is neither Python's, nor installed, nor ours.

    What a network imports only while it runs, and data that it reads, are not covered.
    """
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed += [*site.getsitepackages(), site.getusersitepackages()]
    foreign = {Path(place).resolve() for place in installed} | {Path(__file__).resolve().parents[1]}
    whole = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        if foreign.isdisjoint(path.parents) and path.is_file():
            whole.update(f"{name}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
