"""A corpus of hostile and broken weight files, every one of them read by one process that is watched while it reads."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

Once = Callable[[str, Callable[[Path], None]], Path]
_WEIGHTS = {"weight": torch.arange(600.0).reshape(20, 30), "bias": torch.ones(20)}
_MOST_BYTES = 2 << 30
_MOST_SECONDS = 12.0  # 2 s are the most that one takes alone; other tests beside it slow it down
_MANY = 48_000  # calls in one file, a third of what the limit on operations lets through
_CANARY = "canary"
_WATCHED = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|remove|rename|mkdir|rmdir|link|symlink|chmod|truncate|startfile)|"
    r"subprocess\.|socket\.|shutil\.|tempfile\.|ctypes\.|webbrowser\.|urllib\.|pty\.|import|compile|exec|marshal\.|"
    r"pickle\.find_class|code\.__new__|function\.__new__|sqlite3|ftplib|smtplib|http\."
)


# ---- pickles, opcode by opcode


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def values(*items: object) -> bytes:
    return pickle.dumps(tuple(items), protocol=2)[2:-1]


def call(module: str, name: str, *arguments: object) -> bytes:
    return named(module, name) + values(*arguments) + b"R"


def as_pickle(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(listed: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, listed)) + b"t"


def storage(numel: int = 600, key: bytes = text("0"), kind: str = "FloatStorage", tail: bytes = b"") -> bytes:
    return b"(" + text("storage") + named("torch", kind) + key + text("cpu") + number(numel) + tail + b"tQ"


def tensor(source: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = b"(" + source + number(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks + b"t"
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def state_dict(body: bytes) -> bytes:
    return as_pickle(b"}" + text("layer.weight") + body + b"s")


def saved(content: object = _WEIGHTS, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


# ---- containers around a pickle


def in_zip(pickled: bytes, *more: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        archive.writestr("vit/data.pkl", pickled)
        for name, content in (("vit/version", b"3\n"), *more):
            archive.writestr(name, content)
    return buffer.getvalue()


def in_old(pickled: bytes, *, keys: tuple[str, ...] = (), tail: bytes = b"") -> bytes:
    return b"".join(old_headers()) + pickled + pickle.dumps(list(keys), protocol=2) + tail


def old_headers() -> list[bytes]:
    return [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]


def beside_weights(pickled: bytes) -> bytes:
    """A state dict that is good but for one more entry."""
    good = saved(zipped=True)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    body = members.pop("data.pkl")[:-1] + text("more") + pickled + b"s."
    return in_zip(body, *((f"vit/{name}", content) for name, content in members.items() if name != "version"))


# ---- what an attacker would call; whatever succeeds leaves a file named canary


def gadgets(canary: str) -> dict[str, bytes]:
    touch, write = f"touch {canary}", f"open({canary!r}, 'w').close()"
    module = call("builtins", "__import__", "os")
    chain = named("builtins", "getattr") + b"(" + module + text("system") + b"tR" + values(touch) + b"R"
    listed: list[tuple[str, str, tuple[object, ...]]] = [
        *((module, "system", (touch,)) for module in ("os", "posix", "nt")),
        *((module, name, (write,)) for module in ("builtins", "__builtin__") for name in ("exec", "eval")),
        *(("os", name, (touch,)) for name in ("popen",)),
        *(("os", name, ("/bin/touch", ["touch", canary])) for name in ("execv", "execvp")),
        *((module, "posix_spawn", ("/bin/touch", ["touch", canary], {})) for module in ("os", "posix")),
        *(("subprocess", name, (["touch", canary],)) for name in ("Popen", "run", "call", "check_output")),
        *(("subprocess", name, (touch,)) for name in ("getoutput", "getstatusoutput")),
        *((module, "open", (canary, "w")) for module in ("builtins", "io", "_io")),
        *(("importlib", name, ("antigravity",)) for name in ("import_module", "__import__")),
        ("builtins", "__import__", ("antigravity",)),
        ("runpy", "run_path", (canary,)),
        ("runpy", "_run_code", (write, {})),
        ("pty", "spawn", (["touch", canary],)),
        ("torch.hub", "load", ("evil/repo", "model")),
        ("torch.hub", "download_url_to_file", ("http://127.0.0.1:9/", canary)),
        ("torch.jit", "load", (canary,)),
        ("torch", "load", (canary,)),
        ("torch.serialization", "load", (canary,)),
        ("torch.storage", "_load_from_bytes", (b"\x80\x02N.",)),
        ("torch.utils.cpp_extension", "load_inline", ("evil", "")),
        ("torch._utils", "_import_dotted_name", ("os.system",)),
        ("torch._dynamo.guards", "eval", (write,)),
        ("functools", "partial", (print,)),
        ("operator", "attrgetter", ("system",)),
        ("operator", "methodcaller", ("system", touch)),
        ("types", "CodeType", (0, 0, 0)),
        ("types", "FunctionType", (0, {})),
        ("numpy", "load", (canary,)),
        ("numpy", "savetxt", (canary, [1])),
        ("numpy.f2py.crackfortran", "myeval", (write,)),
        ("webbrowser", "open", ("http://127.0.0.1:9/",)),
        ("socket", "create_connection", (("127.0.0.1", 9),)),
        ("shutil", "copyfile", ("/etc/hostname", canary)),
        ("ctypes", "CDLL", ("libc.so.6",)),
        ("code", "InteractiveInterpreter", ()),
        ("timeit", "timeit", (write,)),
        ("cProfile", "run", (write,)),
        ("pdb", "run", (write,)),
        ("pickle", "loads", (b"N.",)),
        ("marshal", "loads", (b"N",)),
        ("pip", "main", (["install", "evil"],)),
        ("logging.config", "dictConfig", ({"version": 1},)),
        ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
        ("multiprocessing.util", "spawnv_passfds", (b"/bin/touch", [canary], ())),
        ("pathlib", "Path.touch", (canary,)),
        ("collections", "OrderedDict.fromkeys", ("ab",)),
    ]
    found = {f"{module}.{name}": call(module, name, *arguments) for module, name, arguments in listed}
    return found | {"getattr chain": chain}


def hostile_pickles(canary: str) -> Iterator[tuple[str, bytes]]:
    containers: tuple[Callable[[bytes], bytes], ...] = (
        lambda body: in_zip(as_pickle(body)),
        lambda body: in_old(as_pickle(body)),
        as_pickle,
        beside_weights,
    )
    for turn, (name, body) in enumerate(gadgets(canary).items()):
        yield f"gadget {name}.pth", containers[turn % 4](body)
    system = call("posix", "system", f"touch {canary}")
    for kind, container in zip(("zip", "old", "raw", "nested"), containers, strict=True):
        yield f"system {kind}.pth", container(system)
    yield "system renamed.safetensors", in_zip(as_pickle(system))
    for protocol in range(6):
        yield f"protocol {protocol}.pkl", pickle.dumps(Gadget(f"touch {canary}"), protocol=protocol)
        yield f"protocol {protocol} in zip.pth", in_zip(pickle.dumps(Gadget(f"touch {canary}"), protocol=protocol))
    yield "inst.pth", in_zip(b"(" + text("touch") + b"iposix\nsystem\n.")
    yield "extension.pth", in_zip(as_pickle(b"\x82\x01" + values("x") + b"R"))
    one_value = tensor(storage(), (1,), (1,))
    reconstruct = call("numpy._core.multiarray", "_reconstruct")
    for kind, body in {
        "object array": reconstruct + b"(K\x01K\x01\x85" + call("numpy", "dtype", "O8") + b"\x89]" + system + b"atb",
        "build state": named("argparse", "Namespace") + b")\x81}" + text("lr") + system + b"sb",
        "stub argument": named("pathlib", "PosixPath") + system + b"\x85R",
        "storage key": tensor(storage(key=system), (1,), (1,)),
        "persistent id": system + b"Q",
        "dict key": b"}" + system + b"Ns",
        "hook": named("torch._utils", "_rebuild_parameter") + b"(" + one_value + b"\x88" + system + b"tR",
        "from type": named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("posix", "system") + b"NN}tR",
        "ordered dict state": named("collections", "OrderedDict") + b")R}" + text("_metadata") + system + b"sb",
    }.items():
        yield f"in {kind}.pth", in_zip(state_dict(body), ("vit/data/0", bytes(2400)))
    for turn in range(3):
        headers = old_headers()
        headers[turn] = as_pickle(system)
        yield f"in old header {turn}.pth", b"".join(headers) + as_pickle(b"}") + as_pickle(b"]")
    yield "in old keys.pth", b"".join(old_headers()) + as_pickle(b"}") + as_pickle(system)
    module = b"(" + text("module") + named("torch.nn", "Linear") + text("a.py") + text("class Linear: pass") + b"tQ"
    yield "old module source.pth", in_old(state_dict(module))


class Gadget:
    """What calls os.system when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def bombs() -> Iterator[tuple[str, bytes]]:
    data = ("vit/data/0", bytes(2400))
    marks = [bytes([at]) for at in range(1, 60)]
    doubled = b")" + b"".join(b"q" + at + b"h" + at + b"\x86" for at in marks)  # 2^59 empty tuples at the bottom
    lists, dicts = b"]", b"}"
    for at in marks:
        lists = b"]" + lists + b"q" + at + b"ah" + at + b"a"
        dicts = b"}" + text("a") + dicts + b"q" + at + b"s" + text("b") + b"h" + at + b"s"
    yield "deflated.pth", deflate_bomb()
    for kind, body in {
        "claim of 2^40": tensor(storage(1 << 40), (1 << 40,), (1,)),
        "claim of 2^70": tensor(storage(1 << 70), (1,), (1,)),
        "claim of less": tensor(storage(599), (1,), (1,)),
        "stride 0": tensor(storage(), (1 << 36, 4), (0, 1)),
        "stride 0 of 1 GB": tensor(storage(), (1 << 28,), (0,)),
        "beyond its storage": tensor(storage(), (601,), (1,)),
        "negative stride": tensor(storage(), (2,), (-1,)),
        "negative offset": tensor(storage(), (2,), (1,), -1),
        "negative size": tensor(storage(), (-1,), (1,)),
        "missing storage": tensor(storage(key=text("7")), (600,), (1,)),
        "storage outside": tensor(storage(key=text("../version")), (1,), (1,)),
        "quantised": tensor(storage(kind="QInt8Storage"), (1,), (1,)),
        "tuple bomb as key": b"}" + doubled + b"Ns",
        "tuple bomb in a set": named("builtins", "set") + b"](" + doubled + b"e\x85R",
        "tuple bomb called": doubled + b")R",
        "dict bomb": dicts,
        "dict circle": b"}q\x01" + text("a") + b"h\x01s",
        "dicts 10000 deep": (b"}" + text("a")) * 10_000 + b"N" + b"s" * 10_000,
        "bytearray of 2^40": call("builtins", "bytearray", 1 << 40),
        "set of an endless tensor": named("builtins", "set") + tensor(storage(), (1 << 36,), (0,)) + b"\x85R",
        "arguments from a tensor": named("torch", "Size") + tensor(storage(), (600,), (1,)) + b"R",
        "encoded by bz2": call("_codecs", "encode", "a", "bz2"),
        "tensor of 2^40": call("torch", "Tensor", 1 << 40),
        "sparse": named("torch._utils", "_rebuild_sparse_tensor") + b"(" + named("torch", "sparse_coo") + b"NtR",
        "meta": call("torch._utils", "_rebuild_meta_tensor_no_storage", 1),
        "defaultdict": named("collections", "defaultdict") + b")R" + text("a") + b"Ns",
    }.items():
        yield f"bomb {kind}.pth", in_zip(state_dict(body), data)
        if "claim" in kind or "beyond" in kind:
            tail = struct.pack("<Q", 600) + bytes(2400)
            yield f"bomb old {kind}.pth", in_old(state_dict(body), keys=("0",), tail=tail)
    text_1mb = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
    once = named("_codecs", "encode") + b"q\x02h\x01" + text("latin1") + b"\x86q\x03Ra"
    yield "bomb copies.pth", in_zip(as_pickle(b"]" + text_1mb + b"a" + once + b"h\x02h\x03Ra" * 20_000))
    yield "bomb 2 million opcodes.pth", in_zip(as_pickle(b"]" + b"Na" * 1_000_000))
    yield "bomb 1 million opcodes.pth", in_zip(as_pickle(b"]" + b"q\x01" * 999_000))
    ordered, stub = named("collections", "OrderedDict"), named("argparse", "Namespace")
    yield "bomb calls.pth", in_zip(as_pickle(b"]" + ordered + b"q\x01a" + b"h\x01)Ra" * _MANY))
    yield "bomb stubs.pth", in_zip(as_pickle(b"]" + stub + b"q\x01a" + b"h\x01)\x81a" * _MANY))
    maker = named("torch._utils", "_rebuild_tensor_v2")
    one = tensor(storage(), (600,), (1,))[len(maker) : -1] + b"q\x02a"
    yield "bomb tensors.pth", in_zip(as_pickle(b"]" + maker + b"q\x01a" + one + b"h\x01h\x02Ra" * _MANY), data)
    yield "list root.pth", in_zip(as_pickle(lists))


def deflate_bomb() -> bytes:
    """1 GB of zeros in 1 MB, without holding the 1 GB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("vit/data.pkl", state_dict(tensor(storage(1 << 26), (1 << 26,), (1,))))
        with archive.open("vit/data/0", "w") as member:
            for _ in range(64):
                member.write(bytes(1 << 22))
    return buffer.getvalue()


def damaged_zips() -> Iterator[tuple[str, bytes]]:
    good = saved()
    for share in (1, 10, 50, 90, 99):
        yield f"zip cut at {share} %.pth", good[: len(good) * share // 100]
    yield "zip less one byte.pth", good[:-1]
    yield "zip and one byte.pth", good + b"\0"
    yield "zip behind a byte.pth", b"\0" + good
    yield "zip behind a zip.pth", good + good
    yield "zip of 4 bytes.pth", good[:4]
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        directory = archive.start_dir
    for member, place in (("data.pkl", 30), ("data/0", 1000), ("data/1", 5)):
        name_bytes, extra_bytes = struct.unpack_from("<2H", good, entries[member].header_offset + 26)
        yield (
            f"flip in {member.replace('/', '.')}.pth",
            flipped(good, entries[member].header_offset + 30 + name_bytes + extra_bytes + place),
        )
    for field, place in (
        ("crc", 16),
        ("packed size", 20),
        ("size", 24),
        ("name", 50),
        ("header offset", 42),
        ("method", 10),
    ):
        yield f"flip in directory {field}.pth", flipped(good, directory + place)
    for field, place in (("magic", 0), ("name", 31), ("method", 8), ("extra bytes", 28)):
        yield f"flip in local {field}.pth", flipped(good, entries["data/0"].header_offset + place)
    body = state_dict(tensor(storage(), (600,), (1,)))
    data = ("vit/data/0", bytes(2400))
    yield "duplicate member.pth", in_zip(body, data, data)
    yield "duplicate pickle.pth", in_zip(body, data, ("vit/data.pkl", as_pickle(call("posix", "system", "true"))))
    yield "duplicate but for case.pth", in_zip(body, data, ("vit/DATA.PKL", as_pickle(call("posix", "system", "true"))))
    for name in ("../evil", "vit/../../evil", "/etc/evil", "vit\\evil", "C:/evil", "vit//evil", "other/evil"):
        yield f"member {name.replace('/', '|')}.pth", in_zip(body, data, (name, b"x"))
    buffer = io.BytesIO(in_zip(body, data))
    with zipfile.ZipFile(buffer, "a") as archive:
        link = zipfile.ZipInfo("vit/link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    yield "member symlink.pth", buffer.getvalue()
    buffer = io.BytesIO(in_zip(body, data))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"a comment"
    yield "zip comment.pth", buffer.getvalue()
    overlapping = bytearray(in_zip(body, data))
    claiming = bytes(overlapping[:-14] + struct.pack("<2H", 65000, 65000) + overlapping[-10:])
    yield "zip claiming 65000 members.pth", claiming


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def other_files() -> Iterator[tuple[str, bytes]]:
    good = saved()
    old = saved(zipped=False)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    npz = io.BytesIO()
    np.savez(npz, weight=np.ones(2))
    polyglot = bytearray(old_headers()[0].ljust(512, b"\0"))
    polyglot[148:156] = b" " * 8
    polyglot[148:156] = b"%06o\0 " % sum(polyglot)
    yield from {
        "empty.pth": b"",
        "one byte.pth": b"\x80",
        "zeros.pth": bytes(4096),
        "html.pth": b"<!DOCTYPE html><title>404</title>",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 343000000\n",
        "gzip.pth": gzip.compress(good),
        "bzip2.pth": bz2.compress(good),
        "xz.pth": lzma.compress(good),
        "zstd.pth": b"\x28\xb5\x2f\xfd" + bytes(100),
        "7z.pth": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "tar.pth.tar": tar.getvalue(),
        "tar and pickle.pth": bytes(polyglot) + old,
        "torchscript.pt": script.getvalue(),
        "exported.pt2": in_zip(as_pickle(b"}"), ("vit/archive_format", b"pt2"), ("vit/models/model.json", b"{}")),
        "arrays.npz": npz.getvalue(),
        "model.onnx": b"\x08\x07\x12\x07pytorch" + bytes(100),
        "index.json": b'{"weight_map": {}}',
        "script.sh": b"#!/bin/sh\ntouch canary\n",
        "random.pth": np.random.default_rng(0).bytes(5000),
        "deep list.pkl": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "endless string.pkl": b"\x80\x02X\xff\xff\xff\xffabc",
        "endless line.pkl": b"\x80\x02cos" + b"a" * 100_000,
        "no stack.pkl": b"\x80\x02R.",
        **{f"old cut at {share} %.pth": old[: len(old) * share // 100] for share in (5, 20, 30, 60, 99)},
        "old and one byte.pth": old + b"\0",
    }.items()


def broken_safetensors() -> Iterator[tuple[str, bytes]]:
    good = safetensors.torch.save(_WEIGHTS)
    for share in (10, 50, 99):
        yield f"cut at {share} %.safetensors", good[: len(good) * share // 100]
    yield "and one byte.safetensors", good + b"\0"
    one = '"dtype":"F32","shape":[2],"data_offsets":'
    for name, header in {
        "duplicate": f'{{"a":{{{one}[0,8]}},"a":{{{one}[8,16]}}}}',
        "overlap": f'{{"a":{{{one}[0,8]}},"b":{{{one}[4,12]}}}}',
        "hole": f'{{"a":{{{one}[0,8]}},"b":{{{one}[12,20]}}}}',
        "beyond": f'{{"a":{{{one}[0,8]}},"b":{{{one}[8,1099511627784]}}}}',
        "huge shape": '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}',
        "negative": '{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        "bool shape": '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        "type": '{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}',
        "metadata": '{"__metadata__":{"a":1}}',
        "nesting": "[" * 100_000,
        "nested dicts": '{"a":' * 100_000,
        "no json": "{" + "a" * 20,
        "long integer": f'{{"a":{"9" * 5000}}}',
    }.items():
        data = bytes(20 if name != "metadata" else 0)
        yield f"{name}.safetensors", struct.pack("<Q", len(header)) + header.encode() + data


def write_corpus(folder: Path) -> list[Path]:
    canary = str(folder.parent / _CANARY)
    folder.mkdir()
    for make in (hostile_pickles(canary), bombs(), damaged_zips(), other_files(), broken_safetensors()):
        for name, content in make:
            assert not (folder / name).exists(), name
            (folder / name).write_bytes(content)
    for name, content in (
        ("flipped old.pth", saved(zipped=False)),
        ("flipped.safetensors", safetensors.torch.save(_WEIGHTS)),
    ):
        (folder / name).write_bytes(flipped(content, len(content) - 9))
        (folder / f"{name}.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    os.mkfifo(folder / "fifo.pth")
    (folder / "zero device.pth").symlink_to("/dev/zero")
    (folder / "nowhere link.pth").symlink_to("/nowhere")
    (folder / "folder.pth").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(folder / "socket.pth"))
    listener.close()
    return sorted(path for path in (*folder.iterdir(), folder / "missing.pth") if path.suffix != ".sha256")


# ---- the process that reads


def read_all(folder: Path) -> None:
    """Read every file under an audit hook, and print the outcomes and the peak memory as JSON."""
    from msn_eval.checkpoints.formats.read import read_weight_file
    from msn_eval.errors import CheckpointError

    for name in ("good.pth", "good old.pth", "good.safetensors", "bad.pth"):
        try:
            read_weight_file(folder.parent / name)
        except CheckpointError as error:
            str(error)
    "".encode("raw_unicode_escape")  # the codec of protocol 0 is imported on its first use
    events: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if watching and (writes or _WATCHED.match(event)):
            events.append(f"{event} {arguments!r}"[:300])

    sys.addaudithook(watch)
    outcomes: list[dict[str, Any]] = []
    for path in json.loads((folder.parent / "corpus.json").read_text()):
        events.clear()
        started = time.thread_time()
        try:
            outcome = {"accepted": str(read_weight_file(Path(path)))[:100]}
        except BaseException as error:
            outcome = {"kind": type(error).__name__, "text": str(error), "exit_code": getattr(error, "exit_code", None)}
            outcome["hint"] = getattr(error, "hint", "")
        outcomes.append({"path": path, "seconds": time.thread_time() - started, "events": list(events), **outcome})
    watching = False
    print(json.dumps({"files": outcomes, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Return the peak memory of this process; `getrusage` would include the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


REASONS = {
    "gadget": "found: ",
    "system": r"found: posix\.system",
    "protocol": r"found: posix\.system",
    "in ": r"found: .*posix\.system",
    "bomb claim": "claims|does not have the size|should have|reaches beyond",
    "bomb old claim": "claims|wrong byte size|should end|reaches beyond",
    "bomb stride": "reaches beyond|in fewer bytes",
    "bomb beyond": "reaches beyond",
    "bomb negative": "reaches beyond",
    "bomb missing": "should have",
    "bomb storage": "should have",
    "bomb tuple bomb as key": "keys that are not plain values",
    "bomb tuple bomb in": "keys that are not plain values",
    "bomb tuple bomb called": "not a named function",
    "bomb dict": "values nested",
    "bomb set of": "reaches beyond|calls builtins.set",
    "bomb arguments": "not a named function",
    "bomb copies": "more values than",
    "bomb calls": "holds a list",
    "bomb stubs": "holds a list",
    "bomb tensors": "holds a list",
    "bomb 1 million": "holds a list",
    "bomb 2 million": "1,000,000 operations",
    "bomb quantised": "found: torch.QInt8Storage",
    "bomb sparse": "dense tensors",
    "bomb defaultdict": "collections.defaultdict",
    "deflated": "compressed",
    "zip cut": "truncated zip: no central directory",
    "flip in data": "checksum",
    "flip in directory": "checksum|zip archive with",
    "duplicate ": "two members of one name",
    "member ": "zip archive with",
    "flipped": "beside it describes",
    "fifo": "pipe",
}


@pytest.fixture(scope="module")
def corpus(once: Once) -> list[Path]:
    return [Path(path) for path in json.loads((once("hostile", write_all) / "corpus.json").read_text())]


def write_all(place: Path) -> None:
    paths = write_corpus(place / "corpus")
    (place / "good.pth").write_bytes(saved())
    (place / "good old.pth").write_bytes(saved(zipped=False))
    (place / "good.safetensors").write_bytes(safetensors.torch.save(_WEIGHTS))
    (place / "bad.pth").write_bytes(in_zip(b"a"))
    (place / "corpus.json").write_text(json.dumps([str(path) for path in paths]))


@pytest.fixture(scope="module")
def report(corpus: list[Path], once: Once) -> dict[str, Any]:
    """Return the outcome of every file; one process reads them for all test workers."""
    here = Path(__file__)

    def read(place: Path) -> None:
        child = subprocess.run(
            [sys.executable, str(here), str(corpus[0].parent)],
            env=os.environ | {"PYTHONPATH": str(here.parents[1])},
            cwd=corpus[0].parent.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        assert child.returncode == 0, child.stderr[-2000:]
        (place / "readings.json").write_text(child.stdout)

    outcomes: dict[str, Any] = json.loads((once("hostile readings", read) / "readings.json").read_text())
    return outcomes


def find_violations(report: dict[str, Any], keeps: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [f"{Path(record['path']).name}: {record}"[:600] for record in report["files"] if not keeps(record)]


PROMISES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "an error of ours": lambda record: record.get("kind") == "CheckpointError" and record["exit_code"] == 20,
    "nothing run, written, imported, connected": lambda record: not record["events"],
    "file and hint": lambda record: Path(record["path"]).name in record["text"] and len(record["hint"]) > 10,
    "no advice to trust": lambda record: not re.search("weights_only|safe_globals|file an issue", record["text"]),
    "no escape sequences": lambda record: "\x1b" not in record["text"] and r"\x1b" not in record["text"],
    "short": lambda record: len(record["text"]) < 2500,
    "in time": lambda record: record["seconds"] < _MOST_SECONDS,
}


def test_corpus_is_complete(corpus: list[Path]) -> None:
    assert len(corpus) == 222


@pytest.mark.parametrize("promise", PROMISES)
def test_every_refusal_keeps_the_promise(report: dict[str, Any], promise: str) -> None:
    assert not find_violations(report, PROMISES[promise])


@pytest.mark.parametrize(("start", "reason"), REASONS.items())
def test_files_are_refused_for_what_is_wrong_with_them(report: dict[str, Any], start: str, reason: str) -> None:
    files = [record for record in report["files"] if Path(record["path"]).name.startswith(start)]
    assert [record for record in files if not re.search(reason, record["text"])] == []


def test_no_file_leaves_a_canary(report: dict[str, Any], corpus: list[Path]) -> None:
    assert report
    assert not list(corpus[0].parent.parent.rglob(_CANARY))


def test_no_file_takes_much_memory(report: dict[str, Any]) -> None:
    assert report["peak_bytes"] < _MOST_BYTES


@pytest.mark.parametrize(
    "name", ["system zip.pth", "system old.pth", "zip cut at 50 %.pth", "bomb stride 0.pth", "html.pth"]
)
def test_command_line_refuses_in_one_block(
    corpus: list[Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from msn_eval.cli import main  # not by the process that is watched

    monkeypatch.setenv("MSN_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", str(corpus[0].parent / name), "--data", "digits", "--subset", "1img", "--device", "cpu"]

    code = main(words)

    message = capsys.readouterr().err
    assert (code, "Traceback" in message, name in message) == (20, False, True), message


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
