"""Names that timm itself converts: of OpenAI, open_clip, Microsoft, Meta and others, by the filter of its architecture."""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from msn_eval.checkpoints.networks import StoredNetwork
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import Architecture
from msn_eval.models.build import outline_network

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
        sources = frozenset[str]().union(*(leaf.made_of for leaf in _list_traced((args, kwargs))))
        for leaf in _list_traced(result):
            leaf.made_of = sources
        return result


def _list_traced(values: object) -> Iterator[_Traced]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, _Traced))


def convert_names(network: StoredNetwork, architecture: Architecture) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert the names of a network's weights by timm's filter for an architecture.

    Returns:
        The weights by timm's names, and the file's names of what is left out: heads, and other networks beside this one.

    Raises:
        CheckpointError: The filter would lose weights.
        ValueError: It does not fit the names, or would change weights.
    """
    outline, convert = _find_filter(architecture)
    traced: dict[str, _Traced] = {}
    for name, tensor in network.tensors.items():
        traced[name] = tensor.as_subclass(_Traced)
        traced[name].made_of = frozenset({name})
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            converted = dict(convert(dict(traced), outline))
    except Exception as error:  # a filter expects the names that it was made for
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"timm cannot convert its names for {architecture.name}: {reason}") from error
    heads = getattr(outline, "pretrained_cfg", {}).get("classifier") or ()
    starts = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    kept = {name: tensor for name, tensor in converted.items() if not name.startswith(starts)}
    used, on_head = (
        frozenset[str]().union(*(getattr(converted[name], "made_of", ()) for name in names))
        for names in (kept.keys(), converted.keys() - kept.keys())
    )
    words = zip(*(name.split(".")[:-1] for name in used), strict=False)
    home = ".".join(
        level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, words)
    )  # `visual` of CLIP
    left_out = tuple(name for name in network.tensors if name not in used)
    for name in left_out:
        is_beside = bool(home) and not name.startswith(f"{home}.")
        is_expected = is_beside or name in on_head or _COMPUTED.search(name)
        if not is_expected and bool((network.tensors[name] != 0).any()):
            hint = "Use the architecture of timm that has it; `msn-eval inspect` lists what the file holds."
            raise CheckpointError(f"timm's {architecture.name} has no place for {name}", hint=hint)
    return {name: tensor.as_subclass(Tensor) for name, tensor in kept.items()}, left_out


def _find_filter(architecture: Architecture) -> tuple[nn.Module, Callable[..., Mapping[str, Tensor]]]:
    """Return the network without memory, and the function by which timm reads its published weights."""
    with mock.patch("timm.models._builder.load_pretrained") as load:
        outline = outline_network(architecture, pretrained=True)
    convert = load.call_args.kwargs.get("filter_fn") if load.called else None
    return outline, convert or (lambda weights, model: weights)
