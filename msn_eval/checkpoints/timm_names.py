"""Names that timm itself converts: of OpenAI, open_clip, Microsoft, Meta and others, by the filter of its architecture."""

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from msn_eval.checkpoints.networks import StoredNetwork
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import Architecture

# What a filter may do to weights: rename, cut, join and reorder them. DINOv2's adds a position to the class token. Others
# would interpolate positions for another image size.
_MOVES = re.compile(
    r"__(get|set|delete)__|__(getitem|len|iter|bool|hash|eq|format|repr)__|__?i?r?add(__)?|add_?|reshape|view|flatten|"
    r"(un)?squeeze|(swap|move)?(transpose|permute|axes|axis|dim|dims)|t|T|chunk|split|unbind|cat|stack|concat|clone|"
    r"contiguous|detach|size|numel|dim|new_zeros|zeros_like|to|float|half"
)
# What a filter may drop: computed tables, and parts that only pre-training has.
_COMPUTED = re.compile(
    r"mask_token|attn_mask|(relative_position|_)index|periods|bias_mask|rope|inv_freq|pre_logits|num_batches"
)


class _Traced(Tensor):
    """A tensor that knows the weights of the file that it was made of."""

    made_of: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _MOVES.fullmatch(func.__name__):
            raise ValueError(f"timm would change weights ({func.__name__}), as for images of another size")
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        for leaf in tree_leaves(result):
            if isinstance(leaf, _Traced):
                leaf.made_of = _list_sources((args, kwargs))
        return result


def _list_sources(values: object) -> frozenset[str]:
    """Return the names of the file's weights that tensors were made of."""
    return frozenset(name for leaf in tree_leaves(values) for name in getattr(leaf, "made_of", ()))


def convert_names(network: StoredNetwork, architecture: Architecture) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert the names of a network's weights by timm's filter for an architecture.

    Returns:
        The weights by timm's names, and the file's names of what is left out: heads, and other networks beside this one.

    Raises:
        CheckpointError: The filter would lose weights.
        ValueError: It does not fit the names, or would change weights.
    """
    traced: dict[str, _Traced] = {}
    for name, tensor in network.tensors.items():
        traced[name] = tensor.as_subclass(_Traced)
        traced[name].made_of = frozenset({name})
    try:
        outline, convert = _find_filter(architecture)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            converted = dict(convert(dict(traced), outline))
    except Exception as error:  # a filter expects the names that it was made for
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"timm cannot convert its names for {architecture.name}: {reason}") from error
    heads = getattr(outline, "pretrained_cfg", {}).get("classifier") or ()
    starts = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    kept = {name: tensor for name, tensor in converted.items() if not name.startswith(starts)}
    used, used_with_heads = _list_sources(kept), _list_sources(converted)
    common = os.path.commonprefix([*used])  # noqa: RUF071 - the next line cuts it at a dot
    home = common.rpartition(".")[0]  # `visual` of CLIP
    left_out = tuple(name for name in network.tensors if name not in used)
    for name in left_out:
        is_beside = bool(home) and not name.startswith(f"{home}.")
        is_expected = is_beside or name in used_with_heads or _COMPUTED.search(name)
        if not is_expected and bool((network.tensors[name] != 0).any()):
            hint = "Use the architecture of timm that has it; `msn-eval inspect` lists what the file holds."
            raise CheckpointError(f"timm's {architecture.name} has no place for {name}", hint=hint)
    return {name: tensor.as_subclass(Tensor) for name, tensor in kept.items()}, left_out


def _find_filter(architecture: Architecture) -> tuple[nn.Module, Callable[..., Mapping[str, Tensor]]]:
    """Return the network without memory, and the function by which timm reads its published weights.

    timm keeps that function nowhere: it is an argument of `load_pretrained`, for which another one stands in here.
    """
    import timm
    from timm.models import _builder

    found: list[Callable[..., Mapping[str, Tensor]] | None] = [None]
    load_pretrained = _builder.load_pretrained
    _builder.load_pretrained = lambda *_, filter_fn=None, **__: found.append(filter_fn)
    try:
        with torch.device("meta"):
            name, keywords = str(architecture.timm_name), architecture.keywords
            outline = timm.create_model(name, pretrained=True, num_classes=0, **keywords)
    finally:
        _builder.load_pretrained = load_pretrained
    return outline, found[-1] or (lambda weights, model: weights)
