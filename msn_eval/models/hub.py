"""Networks that transformers builds, loads and runs, by the config.json of their folder."""

import contextlib
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from msn_eval.errors import CheckpointError, format_count, list_first
from msn_eval.models.architectures import IMAGE_CHANNELS, check_channels, check_square

_WRAP = "Wrap the network: py:package.module:factory."
# What does not change the network, or names code and files that are not in the folder.
_IGNORED = re.compile(
    r"_?attn_implementation|_?experts_implementation|(torch_)?dtype|_name_or_path|transformers_version|id2label|label2id"
)
_FORBIDDEN = ("quantization_config", "backbone", "backbone_config", "use_timm_backbone", "use_pretrained_backbone")
_CLASS_TOKEN = re.compile(r"(cls|class)_(token|emb)")
_POSITIONS = re.compile(r"pos(ition|_emb)")
_PIXELS = 224
_MAX_SHOWN = 5


class HubNetwork(nn.Module):
    """The image tower of a network of transformers.

    Attributes:
        tower: It maps normalised images to tokens or maps, and where it pools, to pooled features.
        norm: Norm that the model applies to the tower's tokens, as BEiT's for pre-training does.
        settings: Its config: what no weight shows.
        pretrained_cfg: Its image size, as timm's networks state theirs.
        patch_embed: Sides of its patches, and of the images that its positions are for; likewise.
    """

    def __init__(self, tower: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.norm = norm
        config: Any = tower.config
        stated = {name: value for name, value in config.to_dict().items() if not _IGNORED.fullmatch(name)}
        self.settings = json.dumps(stated, sort_keys=True, default=str)
        self._takes_patches = "spatial_shapes" in inspect.signature(tower.forward).parameters
        check_channels(getattr(config, "num_channels", IMAGE_CHANNELS))
        side = getattr(config, "image_size", None) or _PIXELS
        if self._takes_patches:
            side = round(config.num_patches**0.5) * config.patch_size
        check_square("image_size", side)
        sides = {*side} if isinstance(side, list | tuple) else {side}
        self.pretrained_cfg = {"input_size": (3, *sides, *sides)}
        has_positions = any(_POSITIONS.search(name) for name, _ in tower.named_parameters())
        patch = getattr(config, "patch_size", None) if hasattr(config, "hidden_size") else None
        self.patch_embed = SimpleNamespace(
            img_size=(*sides,) if has_positions else None,
            patch_size=(patch,) if isinstance(patch, int) else patch and (*patch,),
        )

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last tokens (b, n, d) or maps (b, d, h, w), and the pooled features (b, d), None where it has none.

        Args:
            images: (b, 3, S, S), normalised.
        """
        output = self._call(images)
        last, pooled = self.norm(output.last_hidden_state), getattr(output, "pooler_output", None)
        if pooled is not None and pooled[0].numel() == pooled.shape[1]:
            return last, pooled.flatten(1)
        if last.dim() == 4 and last.shape[2] != last.shape[3]:
            raise ValueError(f"its last maps are not (images, channels, side, side): {tuple(last.shape)}")
        return last, last.mean(dim=(2, 3)) if last.dim() == 4 else None

    def count_prefix(self, images: Tensor, last: Tensor) -> tuple[int | None, bool]:
        """Return the number of tokens before the patches, None for maps, and whether the first is the class token.

        Tokens that are the same for all images belong to no patch; the class token changes with the parameter of its name.

        Raises:
            ValueError: The order of the tokens is another one, or the same images give other tokens than `last`.
        """
        if (self.run(images)[0] - last).abs().max() > 1e-3 * last.abs().max():
            raise ValueError(
                "two passes over the same images give different features, as where patches are masked at random"
            )
        first = self._embed(images)
        if first is None or first.dim() != 3:
            return None, False
        constant = (first == self._embed(images * 2 + 1)).all(dim=-1).all(dim=0)
        prefix, tokens = int(constant.sum()), first.shape[1]
        candidates = [weight for name, weight in self.tower.named_parameters() if _CLASS_TOKEN.search(name)]
        if tokens != last.shape[1] and (prefix or candidates):
            raise ValueError("its class token joins the patches between blocks")
        if not constant[:prefix].all():
            raise ValueError("it has tokens behind those of the patches")
        if math.isqrt(tokens - prefix) ** 2 != tokens - prefix:
            raise ValueError(f"its {tokens} tokens, {prefix} of them the same for all images, are no square of patches")
        changed = []
        for weight in candidates if prefix else ():
            own = weight.data.clone()
            weight.data[..., 0] += 1  # a norm would remove what is added to all
            changed += (first != self._embed(images)).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
            weight.data.copy_(own)
        return prefix, changed == [0]

    def _embed(self, images: Tensor) -> Any:
        hidden = self._call(images, output_hidden_states=True).hidden_states
        return hidden[0] if hidden else None

    def _call(self, images: Tensor, **options: bool) -> Any:
        if not self._takes_patches:
            return self.tower(pixel_values=images, **options)
        config: Any = self.tower.config
        patch, grid = int(config.patch_size), images.shape[-1] // int(config.patch_size)
        patches = (
            images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
        )
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device)
        shapes = torch.full((len(images), 2), grid, device=images.device)
        return self.tower(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes, **options)


def build_hub(config: Mapping[str, object]) -> HubNetwork:
    """Build the image tower of the network that a config.json describes, with random weights.

    Raises:
        CheckpointError: transformers does not know it, or it has no image tower.
    """
    with _quiet(config):
        model_class, described = _find_class(config)
        return _find_tower(model_class(described), described)


def load_hub(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> tuple[HubNetwork, tuple[str, ...]]:
    """Load a network by transformers, which renames the weights of its earlier versions.

    Args:
        config: The content of config.json.
        tensors: All weights of the folder.

    Returns:
        The image tower, and the names of the model's weights that are not in it: heads and text towers.

    Raises:
        CheckpointError: Not every weight of the model came from the file, or not every one of the file has its place.
    """
    with _quiet(config):
        model_class, described = _find_class(config)
        model, report = model_class.from_pretrained(
            None, config=described, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True
        )
    lines = [f"{name}: missing in the file" for name in sorted(report["missing_keys"])]
    lines += [f"{name}: no place in the model" for name in sorted(report["unexpected_keys"])]
    lines += [f"{name}: of another shape" for name, *_ in sorted(report["mismatched_keys"])]
    if lines:
        listed = list_first(lines, _MAX_SHOWN, "\n  ")
        count = format_count(len(lines), "weight does", "weights do")
        what = f"{count} not fit transformers' {model_class.__name__}\n  {listed}"
        raise CheckpointError(what, hint="The folder mixes two checkpoints, or is incomplete; download it again.")
    network = _find_tower(model, described)
    own = set(map(id, network.parameters()))
    return network.eval(), tuple(name for name, weight in model.named_parameters() if id(weight) not in own)


def _find_class(config: Mapping[str, object]) -> tuple[Any, Any]:
    """Return the class of transformers that wrote a folder, and its config; never code of the folder."""
    import transformers

    if forbidden := [name for name in _FORBIDDEN if config.get(name)]:
        raise ValueError(f"{forbidden[0]} in its config.json is not supported")
    model_type, names = str(config.get("model_type")), config.get("architectures")
    described = transformers.CONFIG_MAPPING[model_type].from_dict(_remove_ignored(config))
    name = str(names[0]) if isinstance(names, list) and names else ""
    model_class: Any = getattr(transformers, name, None)
    if not name:
        model_class = transformers.MODEL_MAPPING[type(described)]
    elif not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {name!r:.60}")
    elif getattr(model_class, "config_class", None) is not type(described):
        raise ValueError(f"{name} is not a model of the type {model_type}")
    return model_class, described


def _remove_ignored(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _remove_ignored(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not _IGNORED.fullmatch(name)
    }


def _find_tower(model: Any, described: Any) -> HubNetwork:
    """Return the part of a model that maps images to tokens or maps."""
    import transformers

    wanted = type(getattr(described, "vision_config", described))
    for module in model.modules():
        is_model = isinstance(module, transformers.PreTrainedModel) and type(module).__name__.endswith("Model")
        if is_model and type(module.config) is wanted and module.main_input_name == "pixel_values":
            on_top = getattr(model, "layernorm", None) if module is not model else None
            return HubNetwork(module, on_top or nn.Identity())
    raise ValueError(f"{type(model).__name__} has no part that takes images alone")


@contextlib.contextmanager
def _quiet(config: Mapping[str, object]) -> Iterator[None]:
    """Keep transformers from writing to stderr, and turn what it raises into CheckpointErrors."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        what = f"transformers runs networks of the type {config.get('model_type')!r:.60}, and is not installed"
        raise CheckpointError(what, hint="pip install 'msn-eval[hf]'") from error
    level, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers does not catch what a config causes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"transformers cannot build the network of type {config.get('model_type')!r:.60}: {reason}"
        raise CheckpointError(what, hint=_WRAP) from error
    finally:
        logging.set_verbosity(level)
        if shows_progress:
            logging.enable_progress_bar()
