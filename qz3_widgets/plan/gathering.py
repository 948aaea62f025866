"""What is gathered of a partitioned model while it computes: layers, the embeddings, and what is not let go again."""

from __future__ import annotations

from .shapes import Block, Weight
from .state import Components, Setting, parts_of

DEQUANTIZED = ("dequantized", "packed copy", "scales copy", "scales", "updated experts")
"""What a layer's pass (:mod:`.layer_pass`) calls the copies of a weight that is in use."""


def whole_layer(setting: Setting, block: Block) -> int:
    """A layer's frozen parameters while they are gathered: all ranks' parts, padding included."""
    if setting.num_ranks == 1 or not setting.zero3:
        return 0
    parts = sum(
        size
        for weight in block.weights
        if not (setting.persists(weight) and not weight.quantized)
        for size in parts_of(setting, weight).values()
    )
    return setting.sizes.rounded(setting.num_ranks * parts)


def gathered(setting: Setting, block: Block) -> Components:
    """The layer at work, the next one ahead, and copies of what is not ours to read in place."""
    if not setting.zero3:
        return {}
    whole = whole_layer(setting, block)
    ahead = setting.config.zero.overlap_comm and setting.config.zero.stage3_prefetch_bucket_size != 0
    if not setting.lets_go:
        ahead = False  # what it would bring is there already
    found: Components = {"gathered_layers": whole * (2 if ahead and setting.shape.num_layers > 1 else 1)}
    if setting.copies_gathered:
        found["on_the_way"] = whole
    if setting.fused and setting.num_ranks > 1:
        foreign = [each for each in block.weights if not each.quantized and not setting.persists(each)]
        found["gathered_layers"] += sum(
            setting.sizes.rounded(each.numel * setting.sizes.dtype_bytes) for each in foreign
        )
    if not setting.lets_go:
        found["retained_layers"] = retained(setting)
        found["embeddings"] = head_bytes(setting, setting.shape.head)
    return found


def both_embeddings(setting: Setting, *, of_one_rank: bool = False) -> int:
    """As released both are gathered and stay; at the end of a backward a single rank has a copy as well."""
    shape, sizes = setting.shape, setting.sizes
    weights = {id(each): each for each in (shape.head, shape.embedding) if each is not None}.values()
    if setting.num_ranks == 1 and of_one_rank:
        return sum(sizes.rounded(each.numel * sizes.dtype_bytes) for each in weights)
    return sum(head_bytes(setting, each) for each in weights)


def retained(setting: Setting) -> int:
    """As released: every packed weight that was gathered in the forward stays until its layer's backward."""
    if setting.num_ranks == 1:
        return 0
    sizes = setting.sizes
    return sum(
        sizes.rounded(sizes.packed(weight.numel) * sizes.storage_bytes) * block.count
        for block in setting.shape.main
        for weight in block.weights
        if weight.quantized
    )


def head_bytes(setting: Setting, weight: Weight | None) -> int:
    """The head while it is gathered; of a single rank, or without ZeRO-3, it is where it always is."""
    if weight is None or setting.num_ranks == 1 or not setting.zero3 or setting.persists(weight):
        return 0
    sizes = setting.sizes
    return sizes.rounded(setting.num_ranks * sizes.part(weight.numel, sizes.dtype_bytes))


def updated_experts(setting: Setting, block: Block) -> int:
    """PEFT makes the update of adapted experts as a weight, and its sum with the frozen one (``ParamWrapper``)."""
    if not setting.adapts_experts:
        return 0
    largest = max((weight.numel for weight in block.weights if len(weight.shape) == 3), default=0)
    return 2 * setting.sizes.rounded(largest * setting.sizes.dtype_bytes)
