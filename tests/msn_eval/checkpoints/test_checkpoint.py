"""Checkpoints: from a file or a scheme to a network with every weight in its place."""

import hashlib
import importlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from msn_eval.checkpoints import ENCODERS, read_schemes, split_label
from msn_eval.checkpoints.checkpoint import check_checkpoint_names, own_code_sha256, read_checkpoint, weights_sha256
from msn_eval.checkpoints.convert import convert_checkpoint
from msn_eval.checkpoints.msn_release import MSN_RELEASES
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.features.encoder import build_encoder

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
FactoryWriter = Callable[..., str]
TINY = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"
MODULE = """
from functools import partial
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.mean((2, 3))

"""


def refusal(name: str | Path, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(name), **options)
    return caught.value


def saved(folder: Path, content: object, *, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FactoryWriter:
    """Return a function that writes a module with `factory` to the working folder and returns its checkpoint name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str = "factory = Mean", *, module: str = "own_encoder") -> str:
        sys.modules.pop(module, None)
        (tmp_path / f"{module}.py").write_text(MODULE + body)
        return f"py:{module}:factory"

    return write


# The MSN release.


def test_msn_release_is_described_and_loaded_in_full(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    path, weights = msn_file(name="vitb16_600ep.pth.tar"), vit_weights()
    checkpoint = read_checkpoint(str(path))
    state = checkpoint.network.state_dict()
    assert (checkpoint.format, checkpoint.key, checkpoint.epoch, checkpoint.matched) == (
        "msn",
        "target_encoder",
        600,
        1.0,
    )
    assert (checkpoint.name, checkpoint.path) == ("vitb16_600ep", str(path))
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.params == sum(tensor.numel() for tensor in weights.values())
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not any(module.training for module in checkpoint.network.modules())


def test_native_size_is_that_of_the_positions(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    checkpoint = read_checkpoint(str(msn_file(vit_weights(image=56, patch=14))))
    assert (checkpoint.image_pixels, checkpoint.arch) == (56, "vit_width192_depth2_patch14_56")


def test_either_network_of_an_msn_snapshot_can_be_chosen(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    online = vit_weights() | {"norm.bias": torch.full((192,), 5.0), "fc.fc1.weight": torch.ones(8, 192)}
    path = msn_file(encoder={f"module.{name}": tensor for name, tensor in online.items()})
    checkpoint = read_checkpoint(str(path), key="encoder")
    assert (checkpoint.key, checkpoint.network.norm.bias.mean().item()) == ("encoder", 5.0)


def test_weights_hash_is_the_same_in_another_container_and_the_files_hash_is_not(
    tmp_path: Path, msn_file: MSNWriter, vit_weights: WeightMaker
) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit_weights(), path)
    converted, original = read_checkpoint(str(path)), read_checkpoint(str(msn_file()))
    assert converted.weights_sha256 == original.weights_sha256
    assert converted.sha256 != original.sha256


# The hash over weights.


def test_weights_hash_does_not_depend_on_order_or_layout() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    assert weights_sha256({"a": square, "b": torch.ones(1)}) == weights_sha256(
        {"b": torch.ones(1), "a": square.T.contiguous().T}
    )


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0).reshape(3, 2)},
        {"a": torch.arange(6).reshape(2, 3)},
        {"a": torch.tensor([[0.0, 1, 2], [3, 4, 5.000001]])},
        {"a": torch.tensor([[-0.0, 1, 2], [3, 4, 5]])},
        {},
    ],
    ids=["name", "shape", "dtype", "one value", "sign of a zero", "absence"],
)
def test_weights_hash_depends_on(other: Weights) -> None:
    assert weights_sha256(other) != weights_sha256({"a": torch.arange(6.0).reshape(2, 3)})


# Other families.


@pytest.mark.parametrize(
    ("prefix", "stem"), [("", "cifar"), ("backbone.", "cifar_padded")], ids=["plain", "solo-learn"]
)
def test_residual_network_for_small_images_is_read(tmp_path: Path, prefix: str, stem: str) -> None:
    theirs = torchvision.models.resnet18().state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    content = {prefix + name: tensor for name, tensor in theirs.items() if not name.startswith("fc.")}
    beside = {"classifier.weight": torch.zeros(10, 512), "classifier.bias": torch.zeros(10)} if prefix else {}

    checkpoint = read_checkpoint(str(saved(tmp_path, {"state_dict": content | beside})))

    assert (checkpoint.arch, checkpoint.matched, checkpoint.image_pixels) == (f"resnet18?stem={stem}", 1.0, 32)


def test_file_of_old_pytorch_without_batch_counts_is_read(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    older = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert read_checkpoint(str(saved(tmp_path, older))).matched == 1.0


# Weights that do not fit.


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def poisoned(name: str, value: float) -> Callable[[Weights], Weights]:
    def poison(weights: Weights) -> Weights:
        tensor = weights[name].clone()
        tensor.view(-1)[3] = value
        return weights | {name: tensor}

    return poison


MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no block that counts": (without(*(f"blocks.0.norm1.{kind}" for kind in ("weight", "bias"))), "2 of 30 weights"),
    "NaN": (
        poisoned("blocks.1.mlp.fc1.weight", math.nan),
        "NaN or infinite values (blocks.1.mlp.fc1.weight: 1 of 147,456)",
    ),
    "infinite": (poisoned("norm.weight", math.inf), "NaN or infinite values (norm.weight: 1 of 192)"),
    "a relative of the family": (lambda weights: {f"{name}.lora": weights[name] for name in weights}, "--arch"),
    "unknown width": (lambda weights: weights | {"patch_embed.proj.weight": torch.ones(200, 3, 8, 8)}, "--arch"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_what_is_wrong(
    tmp_path: Path, vit_weights: WeightMaker, kind: str
) -> None:
    change, text = MISFITS[kind]
    error = refusal(saved(tmp_path, change(vit_weights())))
    assert text in str(error)
    assert (error.exit_code, error.where, len(error.hint) > 10) == (20, str(tmp_path / "vit.pth"), True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensor: tensor * torch.tensor(1 + 1j), "blocks.0.mlp.fc1.weight"),
        (lambda tensor: (20 * tensor).to(torch.int8), "blocks.0.mlp.fc1.weight"),
    ],
    ids=["complex", "integers"],
)
def test_weight_that_is_not_a_real_number_is_refused(
    tmp_path: Path, vit_weights: WeightMaker, change: Callable[[Tensor], Tensor], text: str
) -> None:
    weights = vit_weights()
    changed = {"blocks.0.mlp.fc1.weight": change(weights["blocks.0.mlp.fc1.weight"])}
    assert text in refusal(saved(tmp_path, weights | changed)).what


def test_position_embeddings_of_another_size_are_refused_and_not_interpolated(
    tmp_path: Path, vit_weights: WeightMaker
) -> None:
    error = refusal(saved(tmp_path, vit_weights(image=64)), arch=TINY.replace("depth=1", "depth=2"))
    assert "pos_embed: file (1, 65, 192), model (1, 17, 192)" in str(error)


def test_weights_that_may_be_missing_stay_as_drawn_and_are_counted(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    path = saved(tmp_path, without("blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias")(weights))
    checkpoint = read_checkpoint(str(path), allow_missing=("blocks.1.mlp.fc2.*",))
    total = sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.matched == pytest.approx(1 - (768 * 192 + 192) / total, abs=1e-12)


# msn: and hf:, folders, and hashes beside files.


@pytest.fixture
def released(msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small file where the released ViT-S/16 is kept, offline."""
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    return msn_file(name="vits16_800ep.pth.tar")


def test_released_network_is_read_from_the_folder_of_weights(released: Path) -> None:
    checkpoint = read_checkpoint("msn:vits16")
    assert checkpoint.weights_sha256 == read_checkpoint(str(released)).weights_sha256
    assert (checkpoint.name, checkpoint.path, checkpoint.format) == ("msn_vits16", "msn:vits16", "msn")
    assert checkpoint.sha256 == hashlib.sha256(released.read_bytes()).hexdigest()


@pytest.mark.parametrize("check", [lambda name: check_checkpoint_names(("pixels", name)), read_checkpoint])
def test_unknown_released_network_is_refused_with_the_nearest(check: Callable[[str], object]) -> None:
    with pytest.raises(CheckpointError, match=r"msn:vits61: .*Did you mean vits16\?"):
        check("msn:vits61")


@pytest.fixture
def hub_folder(msn_file: MSNWriter, tmp_path: Path) -> Path:
    """Write a folder in Hugging Face layout that states a mean and std of its own."""
    folder = tmp_path / "folder"
    convert_checkpoint(msn_file(), folder, to="hf")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}')
    return folder


@pytest.mark.parametrize("scheme", ["hf:", ""], ids=["by scheme", "by path"])
def test_hugging_face_folder_is_read_with_its_normalisation(hub_folder: Path, msn_file: MSNWriter, scheme: str) -> None:
    checkpoint = read_checkpoint(f"{scheme}{hub_folder}")
    assert checkpoint.weights_sha256 == read_checkpoint(str(msn_file())).weights_sha256
    assert (checkpoint.mean, checkpoint.std, checkpoint.name) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "folder")


def test_folder_without_a_processor_is_normalised_as_imagenet(hub_folder: Path) -> None:
    (hub_folder / "preprocessor_config.json").unlink()
    checkpoint = read_checkpoint(str(hub_folder))
    assert (checkpoint.mean, checkpoint.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_untrained_network_of_a_folder_has_the_folders_normalisation(hub_folder: Path) -> None:
    assert read_checkpoint(f"random:{hub_folder}").mean == (0.5, 0.4, 0.3)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return a function that returns the warnings so far, whatever set up logging."""
    monkeypatch.setattr(logging.getLogger("msn_eval"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="msn_eval")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_alarms_are_warnings_that_name_the_file(
    tmp_path: Path, vit_weights: WeightMaker, warned: Callable[[], list[str]]
) -> None:
    weights = vit_weights()
    zero = {"blocks.0.mlp.fc1.weight": torch.zeros_like(weights["blocks.0.mlp.fc1.weight"])}
    path = saved(tmp_path, weights | zero | {"head.weight": torch.ones(10, 192)})
    read_checkpoint(str(path), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert warned() == [
        f"{path}: nothing but zeros in blocks.0.mlp.fc1.weight",
        f"{path}: a classifier of 10 classes is on top: the weights were trained or fine-tuned with labels",
    ]


# Mean and std.


def test_mean_and_std_of_a_lone_timm_file_are_those_of_the_named_entry(
    tmp_path: Path, vit_weights: WeightMaker, warned: Callable[[], list[str]]
) -> None:
    checkpoint = read_checkpoint(str(saved(tmp_path, vit_weights(depth=1))), arch=TINY)
    assert (checkpoint.mean, checkpoint.std, warned()) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), [])


def test_assumed_mean_and_std_are_a_warning_with_the_options(
    tmp_path: Path, vit_weights: WeightMaker, warned: Callable[[], list[str]]
) -> None:
    path = saved(tmp_path, vit_weights(depth=1))
    assert read_checkpoint(str(path)).mean == IMAGENET_MEAN
    assert warned() == [f"{path}: mean and std are ImageNet's, assumed; --mean and --std set others"]


def test_published_mean_and_std_are_no_warning(msn_file: MSNWriter, warned: Callable[[], list[str]]) -> None:
    checkpoint = read_checkpoint(str(msn_file()), arch="vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2")
    assert (checkpoint.mean, checkpoint.normalisation.source, warned()) == (
        IMAGENET_MEAN,
        "ImageNet's, as published for msn",
        [],
    )


def test_file_of_msn_pretrain_that_states_no_mean_was_normalised_as_imagenet(warned: Callable[[], list[str]]) -> None:
    checkpoint = read_checkpoint("demo")
    assert (checkpoint.mean, checkpoint.normalisation.source, warned()) == (IMAGENET_MEAN, "msn-pretrain", [])


@pytest.mark.parametrize("scheme", ["demo", "pixels", "random:vit_tiny_patch16_224"])
def test_mean_and_std_by_hand_replace_any_other(scheme: str) -> None:
    checkpoint = read_checkpoint(scheme, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (checkpoint.mean, checkpoint.std, checkpoint.normalisation.source) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "--mean and --std",
    )


@pytest.mark.parametrize(
    ("stated", "what"),
    [
        ({"msn_eval.mean": "0.5,0.5,0.5"}, "msn_eval.std is not three finite numbers: None"),
        ({"msn_eval.mean": "0.5,x,0.5", "msn_eval.std": "1,1,1"}, "msn_eval.mean is not three finite numbers: 0.5,x"),
        ({"msn_eval.mean": "0.5,0.5,0.5", "msn_eval.std": "1,0,1"}, "msn_eval.std [1.0, 0.0, 1.0] is not positive"),
    ],
)
def test_impossible_mean_or_std_of_a_file_is_refused(
    tmp_path: Path, vit_weights: WeightMaker, stated: dict[str, str], what: str
) -> None:
    safetensors.torch.save_file(vit_weights(depth=1), tmp_path / "vit.safetensors", metadata=stated)
    assert what in refusal(tmp_path / "vit.safetensors").what


# random: and pixels


def test_random_architecture_takes_keywords() -> None:
    checkpoint = read_checkpoint(f"random:{TINY}")
    assert (checkpoint.arch, checkpoint.image_pixels, checkpoint.sha256) == (TINY, 32, None)


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (read_checkpoint(f"random:{TINY}", seed=seed).weights_sha256 for seed in (1, 1, 2))
    assert (first == again, first == other) == (True, False)


def test_random_checkpoint_has_the_files_architecture_and_none_of_its_weights(msn_file: MSNWriter) -> None:
    path = str(msn_file())
    trained, untrained = read_checkpoint(path), read_checkpoint(f"random:{path}")
    assert untrained.arch == trained.arch
    assert not torch.equal(untrained.network.cls_token, trained.network.cls_token)


def test_pixels_are_a_checkpoint_without_weights() -> None:
    checkpoint = read_checkpoint("pixels")
    assert (checkpoint.image_pixels, checkpoint.params, checkpoint.sha256) == (32, 0, None)


# py:


def test_own_module_is_the_factorys_and_gets_imagenets_normalisation(factory: FactoryWriter) -> None:
    checkpoint = read_checkpoint(factory())
    assert (checkpoint.format, checkpoint.name, checkpoint.params) == ("py", "own_encoder:factory", 3)
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.std) == (224, IMAGENET_MEAN, IMAGENET_STD)


def test_own_modules_attributes_replace_imagenets(factory: FactoryWriter) -> None:
    name = factory(
        "def factory():\n"
        "    network = Mean()\n"
        "    network.image_pixels, network.mean, network.std = 96, (0.5, 0.4, 0.3), [0.1, 0.2, 0.3]\n"
        "    return network\n"
    )
    checkpoint = read_checkpoint(name)
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.std) == (96, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_own_module_is_put_into_eval_mode_and_float32(factory: FactoryWriter) -> None:
    network = read_checkpoint(factory("def factory(): return Mean().double().train()")).network
    assert (network.training, network.scale.dtype) == (False, torch.float32)


def test_weights_hash_of_an_own_module_follows_the_factorys_source(factory: FactoryWriter) -> None:
    before = read_checkpoint(factory()).weights_sha256
    same = read_checkpoint(factory()).weights_sha256
    after = read_checkpoint(factory("factory = Mean  # another line")).weights_sha256
    assert (before == same, before == after) == (True, False)


def test_weights_hash_of_an_own_module_follows_its_weights(factory: FactoryWriter) -> None:
    name = factory("import os\ndef factory(): return Mean(int(os.environ['OWN_WIDTH']))")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_WIDTH", "1")
        before = read_checkpoint(name).weights_sha256
        patch.setenv("OWN_WIDTH", "3")
        assert read_checkpoint(name).weights_sha256 != before


def test_factory_may_be_any_callable(factory: FactoryWriter) -> None:
    assert read_checkpoint(factory("factory = partial(Mean, 3)")).params == 3


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("def factory(): raise KeyError('width')", "the factory failed: KeyError: 'width'"),
        ("def factory(): return [1]", "the factory returned a list, not an nn.Module"),
        ("factory = 3", "the factory failed: TypeError"),
        ("", "the factory failed: AttributeError"),
        ("def factory(:", "the factory failed: SyntaxError"),
        ("import no_such_package\nfactory = Mean", "the factory failed: ModuleNotFoundError"),
        ("def factory():\n    network = Mean()\n    network.mean = (0.5, 0.5)\n    return network", "mean"),
        ("def factory():\n    network = Mean()\n    network.std = ('a', 'b', 'c')\n    return network", "std"),
        ("def factory():\n    network = Mean()\n    network.image_pixels = 'big'\n    return network", "image_pixels"),
    ],
    ids=["raises", "no module", "no callable", "absent", "syntax", "import", "mean", "std", "image_pixels"],
)
def test_factory_that_gives_no_encoder_is_refused(factory: FactoryWriter, body: str, text: str) -> None:
    error = refusal(factory(body))
    assert (text in error.what, error.where, bool(error.hint)) == (True, "py:own_encoder:factory", True)


@pytest.mark.parametrize("name", ["py:own_encoder", "py:"])
def test_factory_without_a_function_is_refused(name: str) -> None:
    assert "py:package.module:factory" in refusal(name).what


# timm:


def test_timm_name_that_does_not_exist_is_refused_with_the_nearest() -> None:
    assert "Did you mean vit_tiny_patch16_224?" in str(refusal("timm:vit_tiny_patch16_242"))


def test_timm_weights_without_cache_and_network_are_refused_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "import timm\n"
        "from msn_eval.checkpoints.checkpoint import read_checkpoint\n"
        "from msn_eval.errors import CheckpointError\n"
        "started = time.perf_counter()\n"
        "try:\n"
        "    read_checkpoint('timm:vit_tiny_patch16_224')\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code if time.perf_counter() - started < 10 else 99)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, "HF_HUB_CACHE" in ended.stdout) == (20, True), ended.stdout + ended.stderr


@pytest.fixture
def timm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the snapshot folder of timm's smallest network in an offline hub cache, with random weights."""
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    network = timm.create_model("test_vit.r160_in1k")
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot


def test_timm_weights_come_from_the_hubs_cache_with_their_hash(timm_cache: Path) -> None:
    checkpoint = read_checkpoint("timm:test_vit.r160_in1k")
    stored = safetensors.torch.load_file(timm_cache / "model.safetensors")
    digest = hashlib.sha256((timm_cache / "model.safetensors").read_bytes()).hexdigest()
    assert (checkpoint.sha256, checkpoint.format, checkpoint.name) == (digest, "timm", "test_vit.r160_in1k")
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.matched) == (160, (0.1, 0.2, 0.3), 1.0)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in checkpoint.network.state_dict().items())


# Names, before any work.


@pytest.mark.parametrize("name", ["pixels", "timm:resnet18", "random:resnet18", "py:own:factory", "msn:vits16"])
def test_schemes_pass_the_check_of_names(name: str) -> None:
    check_checkpoint_names((name,))


@pytest.mark.parametrize(
    "name", ["nowhere.pth", "tim:resnet18", "random:nowhere.pth", "timm:resnet1", "timm:", "random:"]
)
def test_name_that_leads_nowhere_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint_names(("pixels", name))
    assert caught.value.hint


def test_missing_file_is_refused_with_the_schemes() -> None:
    with pytest.raises(CheckpointError, match=r"^No such checkpoint file: nowhere\.pth") as caught:
        check_checkpoint_names(("nowhere.pth",))
    assert all(scheme in caught.value.hint for scheme in ("timm", "random", "py", "pixels"))


def test_unknown_scheme_is_refused_with_the_nearest() -> None:
    assert "'tim'. Did you mean timm?" in refusal("tim:resnet18").what


def test_importing_the_table_of_schemes_does_not_import_torch() -> None:
    program = "import sys, msn_eval.checkpoints; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_table_lists_the_released_networks() -> None:
    (released,) = (entry for entry in ENCODERS if entry.name == "msn")
    assert released.summary.endswith(", ".join(MSN_RELEASES))


# Plug-ins.


@pytest.fixture
def plug_in(factory: FactoryWriter, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write a module, and install it as a distribution that adds the scheme `toy:`."""

    def install(body: str) -> None:
        factory(body)
        monkeypatch.syspath_prepend(Path.cwd())
        point = SimpleNamespace(
            name="toy", value="own_encoder:factory", dist=SimpleNamespace(name="toy-encoders", version="1.2")
        )
        monkeypatch.setattr("msn_eval.registry.entry_points", lambda group: [point] if "encoders" in group else [])

    return install


def test_plug_in_gets_the_rest_of_the_name_and_is_described(plug_in: Callable[[str], None]) -> None:
    plug_in("def factory(rest):\n    network = Mean()\n    network.image_pixels = int(rest)\n    return network\n")
    check_checkpoint_names(("toy:96",))
    checkpoint = read_checkpoint("toy:96")
    assert (checkpoint.image_pixels, checkpoint.format, checkpoint.name) == (96, "plugin", "toy:96")
    assert (checkpoint.distribution, checkpoint.code_sha256 is not None) == ("toy-encoders 1.2", True)


def test_plug_in_has_the_tap_of_its_output_even_as_a_transformer_of_timm(plug_in: Callable[[str], None]) -> None:
    plug_in("import timm\ndef factory(rest): return timm.create_model(rest, img_size=32, num_classes=0)\n")
    checkpoint = read_checkpoint("toy:vit_tiny_patch16_224")
    assert build_encoder(checkpoint, device=torch.device("cpu"), precision="fp32").taps == ("out",)


def test_plug_in_is_listed(plug_in: Callable[[str], None]) -> None:
    plug_in("factory = None")
    assert read_schemes()["toy"].summary == "plug-in of toy-encoders 1.2"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("def factory(rest): raise KeyError(rest)", "the factory failed: KeyError: '96'"),
        ("def factory(rest): return rest", "the factory returned a str, not an nn.Module"),
        ("1 / 0", "the factory failed: UsageError"),
    ],
)
def test_plug_in_that_fails_is_refused(plug_in: Callable[[str], None], body: str, text: str) -> None:
    plug_in(body)
    assert text in refusal("toy:96").what


@pytest.mark.parametrize(("name", "text"), [("", "No such checkpoint"), (".", "holds none of model.safetensors")])
def test_empty_folder_or_empty_name_is_refused(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in refusal(name).what


def test_checking_names_reads_no_file(msn_file: MSNWriter) -> None:
    path = msn_file()
    path.write_bytes(b"")
    started = time.perf_counter()
    check_checkpoint_names((str(path),))
    assert time.perf_counter() - started < 1


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file of a loaded module of the user."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "helper_of_mine.py"
    file.write_text("scale = 1\n")
    importlib.import_module("helper_of_mine")
    yield file
    del sys.modules["helper_of_mine"]


def test_changed_module_changes_the_hash(own_module: Path) -> None:
    before = own_code_sha256()
    own_module.write_text("scale = 2\n")
    assert own_code_sha256() != before


def test_installed_and_own_packages_do_not_count(own_module: Path) -> None:
    before = own_code_sha256()
    importlib.import_module("wave")
    importlib.import_module("omegaconf.resolvers")
    importlib.import_module("msn_eval.commands.ls")
    assert own_code_sha256() == before


def test_order_of_imports_does_not_count(own_module: Path) -> None:
    own_module.with_name("another_of_mine.py").write_text("scale = 3\n")
    importlib.import_module("another_of_mine")
    before = own_code_sha256()
    sys.modules["helper_of_mine"] = sys.modules.pop("helper_of_mine")
    after = own_code_sha256()
    del sys.modules["another_of_mine"]
    assert after == before


@pytest.mark.parametrize(
    ("text", "label", "checkpoint"),
    [
        ("ours=vit.pth", "ours", "vit.pth"),
        ("our ViT-S=py:package.module:factory", "our ViT-S", "py:package.module:factory"),
        ("raw=pixels", "raw", "pixels"),
        ("random:vit_tiny_patch16_224?img_size=32", None, "random:vit_tiny_patch16_224?img_size=32"),
        ("runs/lr=0.1/vit.pth", None, "runs/lr=0.1/vit.pth"),
        ("vit.pth", None, "vit.pth"),
    ],
)
def test_label_stands_before_a_checkpoint(text: str, label: str | None, checkpoint: str) -> None:
    assert split_label(text) == (label, checkpoint)


def test_file_with_an_equals_sign_has_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1.pth").touch()

    assert split_label("lr=0.1.pth") == (None, "lr=0.1.pth")


def test_two_checkpoints_of_one_label_are_refused() -> None:
    with pytest.raises(UsageError, match="several checkpoints are called a"):
        check_checkpoint_names(("a=pixels", "a=demo"))
