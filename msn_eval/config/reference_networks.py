"""Reference networks: what the MSN authors' repository calls its encoders, and what timm does.

Source: github.com/facebookresearch/msn, src/deit.py.
"""

from msn_eval.errors import UsageError, nearest

# Their name -> ours, behind timm's the keywords that make it the same network.
NETWORKS = {
    "deit_tiny": "vit_tiny_patch16_224",
    "deit_small": "vit_small_patch16_224",
    "deit_small_p8": "vit_small_patch8_224",
    "deit_small_p7": "vit_small_patch16_224?patch_size=7",
    "deit_base": "vit_base_patch16_224",
    "deit_base_p8": "vit_base_patch8_224",
    "deit_base_p7": "vit_base_patch16_224?patch_size=7",
    "deit_base_p4": "vit_base_patch16_224?patch_size=4",
    "deit_large": "vit_large_patch16_224",
    "deit_large_p8": "vit_large_patch16_224?patch_size=8",
    "deit_large_p7": "vit_large_patch16_224?patch_size=7",
    "deit_huge": "vit_huge_patch14_224?patch_size=16",
    "deit_huge_p10": "vit_huge_patch14_224?patch_size=10",
    "deit_huge_p8": "vit_huge_patch14_224?patch_size=8",
    "deit_huge_p7": "vit_huge_patch14_224?patch_size=7",
}


def network_of(name: str, *, where: str) -> str:
    """Give the architecture behind a name of theirs. Raises UsageError naming the file `where` it stands."""
    if name not in NETWORKS:
        raise UsageError(
            f"meta.model_name: {name!r} cannot be mapped.{nearest(name, NETWORKS)}",
            where=where,
            remedy=f"Known: {', '.join(NETWORKS)}.",
        )
    return NETWORKS[name]
