"""What a rank holds between steps: weights, statistics, adapter, gradients, optimizer, each with where it comes from.

All figures are bytes that torch's allocator has handed out on one rank. Every function says in words what it adds up;
the formulas are those of bitsandbytes' packing, DeepSpeed's partition (:mod:`.sizes`) and of our own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..config.schema import RunConfig
from ..config.shapes import RANDOM_PREFIX
from ..config.strategy import resolve_load_strategy
from .shapes import ModelShape, Weight
from .sizes import ITEMSIZE, PART_ALIGNMENT, WHOLE_ALIGNMENT, Sizes, round_up

MAX_REDUCE_BUCKET = 20_000_000
"""Elements; what ``zero.reduce_bucket_size: auto`` stands for at most (``training.zero_settings``)."""

MAX_RESIDENT_ADAPTER_BYTES = 2**29
"""An adapter up to this size stays whole on every rank (``training.sharding.resident``)."""

NOISE_BYTES = 2 * (2**20 + 7)
"""The pool that random weights are made from (``training.loading.noise``)."""

CODE_TABLES = (16 * 4, 256 * 4)
"""fp32 values of the 4-bit type and of the scales' own quantization: one of each for a device."""

CUBLAS_WORKSPACE = 2**25
"""What torch hands to each of cuBLAS' handles, of which a thread has its own: on Hopper (8 MiB before)."""

ADAPTED_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Model types whose fused experts PEFT adapts."""

Components = dict[str, int]


@dataclass(frozen=True)
class Setting:
    """A run as the memory model sees it: what its configuration and its model's sizes come to."""

    config: RunConfig
    shape: ModelShape
    sizes: Sizes

    @property
    def num_ranks(self) -> int:
        """Over all machines."""
        return self.sizes.num_ranks

    @cached_property
    def strategy(self) -> str:
        """How the model gets onto the ranks."""
        return resolve_load_strategy(self.config)

    @cached_property
    def zero3(self) -> bool:
        """Whether parameters are partitioned."""
        return self.config.zero.zero_stage == 3

    @cached_property
    def is_random(self) -> bool:
        """Whether its weights are made, not read."""
        return self.config.model.name_or_path.startswith(RANDOM_PREFIX)

    @cached_property
    def lets_go(self) -> bool:
        """Whether a gathered layer is let go between its forward and its backward."""
        return self.zero3 and self.config.zero.release_gathered

    @cached_property
    def fused(self) -> bool:
        """Whether layers are gathered whole, past DeepSpeed's hooks (``training.sharding.layers``)."""
        zero = self.config.zero
        return self.lets_go and zero.fused_gather and zero.leaf_modules != "none"

    @cached_property
    def shards_statistics(self) -> bool:
        """Whether the scales are partitioned with the weights."""
        return self.lets_go and self.config.zero.shard_statistics

    @cached_property
    def offloads_parameters(self) -> bool:
        """Whether shards live on the host, which on a CPU is where everything lives."""
        return self.config.zero.offload_param_device == "cpu" and self.sizes.device == "cuda"

    @cached_property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lives on the host."""
        return self.config.zero.offload_optimizer_device == "cpu" and self.sizes.device == "cuda"

    @cached_property
    def copies_gathered(self) -> bool:
        """Whether ranks share a GPU and so talk over gloo, which brings together in a buffer of its own."""
        return self.sizes.device == "cuda" and self.num_ranks > 1 and self.config.launch.ranks_per_gpu > 1

    @cached_property
    def compute_bytes(self) -> int:
        """Of an element of activations."""
        return ITEMSIZE[self.config.training.precision]

    @cached_property
    def threshold(self) -> int:
        """Parameters up to so many elements stay whole on every rank under ZeRO-3."""
        given = self.config.zero.stage3_param_persistence_threshold
        return 10 * self.shape.fact("hidden_size") if isinstance(given, str) else given

    @cached_property
    def adapter(self) -> tuple[tuple[int, int], ...]:
        """(numel, how often) of each adapter matrix, A and B of each adapted layer."""
        r = self.config.lora.r
        found = []
        for weight, count in self.shape.weights():
            if self.is_adapted(weight):
                outputs, inputs = weight.shape
                found += [(r * inputs, count), (r * outputs, count)]
            elif self.adapts_experts and len(weight.shape) == 3:
                experts, outputs, inputs = weight.shape
                rank = r * (2 if "gate_up" in weight.name else 1) * experts  # gate and up have a rank of their own
                found += [(rank * inputs, count), (rank * outputs, count)]
            elif self.adapts_experts and weight.name.endswith("mlp.gate.weight"):
                found += [(r * weight.shape[1], count), (r * weight.shape[0], count)]
        return tuple(found)

    @cached_property
    def adapts_experts(self) -> bool:
        """Whether fused experts and their router get an adapter: PEFT does so where ``all-linear`` meets a model whose
        experts were linear layers once (``peft/utils/transformers_weight_conversion.py``).
        """  # noqa: D205 - one sentence
        fused = any(len(weight.shape) == 3 for weight, _ in self.shape.weights())
        return fused and self.config.lora.target_modules == "all-linear" and self.shape.model_type in ADAPTED_EXPERTS

    def is_adapted(self, weight: Weight) -> bool:
        """Whether LoRA is attached to it: ``all-linear`` leaves the head out, names are ends of module names (PEFT)."""
        targets = self.config.lora.target_modules
        if not weight.linear:
            return False
        if isinstance(targets, str):
            return weight.role is None
        return any(weight.module == name or weight.module.endswith(f".{name}") for name in targets)

    @cached_property
    def num_trained(self) -> int:
        """Elements that are trained."""
        saved = self.config.lora.modules_to_save or ()
        whole = sum(
            weight.numel * count
            for weight, count in self.shape.weights()
            if any(weight.module == name or weight.module.endswith(f".{name}") for name in saved)
        )
        return sum(numel * count for numel, count in self.adapter) + whole

    @cached_property
    def num_trained_here(self) -> int:
        """Elements of one rank's parts of what is trained."""
        parts = self.num_ranks if self.zero3 else 1
        pieces = sum(-(-numel // parts) * count for numel, count in self.adapter)
        rest = self.num_trained - sum(numel * count for numel, count in self.adapter)
        return pieces + -(-rest // parts)

    @cached_property
    def adapter_is_resident(self) -> bool:
        """Whether the adapter is whole on every rank all the time."""
        return not self.zero3 or (self.fused and self.num_trained * self.compute_bytes <= MAX_RESIDENT_ADAPTER_BYTES)

    @cached_property
    def reduces_together(self) -> bool:
        """Whether the adapter's gradients stay whole until the backward is over (``training.sharding.gradients``)."""
        return self.zero3 and self.fused and self.adapter_is_resident and not self.offloads_optimizer

    @property
    def whole_gradient_bytes(self) -> int:
        """Of all gradients of a backward that are reduced together."""
        if not self.reduces_together:
            return 0
        return per_tensor([(numel * self.compute_bytes, count) for numel, count in self.adapter], self.sizes.rounded)

    def persists(self, weight: Weight) -> bool:
        """Whether ZeRO-3 keeps a parameter whole: small ones, but never packed weights or scales of our own layers."""
        return self.zero3 and weight.numel <= self.threshold and not (weight.quantized and self.fused)


def per_tensor(entries: Iterable[tuple[float, int]], rounded: Callable[[float], int]) -> int:
    """Sum of (bytes, how often), each rounded as a tensor of its own."""
    return sum(rounded(size) * count for size, count in entries)


def loaded(setting: Setting) -> Components:
    """Settled after the load, before the adapter.

    Sharded: of every parameter its part, packed in 4 bit or in ``model.dtype``; of the statistics their part, and the
    nested ones whole. Stock, replicated, device_map: everything whole.
    """
    sizes, shape = setting.sizes, setting.shape
    sharded = setting.strategy == "sharded"
    weights4, statistics, nested, weights16 = [], [], [], []
    for weight, count in shape.weights():
        if weight.quantized:
            packed, scales = sizes.packed(weight.numel), sizes.statistics(weight.numel)
            width = sizes.storage_bytes
            weights4.append((sizes.part(packed, width) if sharded else packed * width, count))
            if sharded and setting.shards_statistics:
                statistics.append((sizes.part(scales, width), count))
            elif setting.shards_statistics:  # stock loading, with the scales taken off
                statistics.append((scales * width, count))
            else:
                statistics.append((sizes.scale_bytes(weight.numel), count))
            nested += [(size, count) for size in sizes.nested(weight.numel)]
            if not sharded:
                nested.append((CODE_TABLES[0], count))  # bitsandbytes makes the code anew for each weight
        else:
            size = sizes.part(weight.numel, sizes.dtype_bytes) if sharded else weight.numel * sizes.dtype_bytes
            weights16.append((size, count))
    found = {
        "weights_4bit": per_tensor(weights4, sizes.rounded),
        "statistics": per_tensor([*statistics, *nested], sizes.rounded),
        "weights_16bit": per_tensor(weights16, sizes.rounded),
        "buffers": sizes.rounded(shape.buffer_bytes) if shape.buffer_bytes else 0,
    }
    if found["weights_4bit"]:
        tables = CODE_TABLES if sharded else CODE_TABLES[1:]
        found["statistics"] += sum(map(sizes.rounded, tables if sizes.double_quant else CODE_TABLES[:1]))
    if setting.is_random:
        found["noise"] = sizes.rounded(NOISE_BYTES)
    if setting.offloads_parameters and sharded:
        found["weights_4bit"] = found["weights_16bit"] = 0
        found["statistics"] = per_tensor(nested, sizes.rounded)
    return found


def ready(setting: Setting) -> Components:
    """Settled when the engine stands, before the first step: ZeRO-3's parts, what stays whole, the adapter's state."""
    sizes = setting.sizes
    found = dict(loaded(setting))
    if setting.zero3:
        found |= _partitioned(setting)
        found["kept_whole"] = _kept_whole(setting)
    trained, width = setting.num_trained_here, setting.compute_bytes
    found["batch"] = batch_bytes(setting)
    if not setting.zero3:
        # Plain torch: the adapter whole; gradients and Adam's state come with the first step.
        found["adapter"] = per_tensor([(numel * width, count) for numel, count in setting.adapter], sizes.rounded)
        return found
    whole = 0
    if setting.adapter_is_resident and setting.num_ranks > 1:
        whole = sizes.rounded(setting.num_ranks * trained * width)
    elif setting.adapter_is_resident and sizes.device == "cpu":
        whole = sizes.rounded(trained * width)  # of a single rank; on a GPU it is the engine's own
    own = 0 if setting.offloads_parameters else sizes.rounded(trained * width)
    found["adapter"] = own + whole  # the engine's flat part, and all of it beside
    state = 0 if setting.offloads_optimizer else sizes.rounded(trained * 4) if width != 4 else 0
    found["optimizer"] = state  # fp32 copy of the part that the optimizer steps
    found["gradients"] = 0 if setting.offloads_optimizer else sizes.rounded(trained * width)
    found["reduce_bucket"] = 0 if setting.reduces_together else reduce_bucket_bytes(setting)
    return found


def reduce_bucket_bytes(setting: Setting) -> int:
    """The buffer that DeepSpeed's engine begins with, into which gradients are copied as they come."""
    if not setting.config.zero.contiguous_gradients:
        return 0
    return setting.sizes.rounded(_bucket(setting) * setting.compute_bytes)


def after_a_step(setting: Setting) -> Components:
    """Settled after an optimizer step: as when ready, and Adam's two moments."""
    found = dict(ready(setting))
    sizes, trained = setting.sizes, setting.num_trained_here
    found["workspaces"] = 2 * CUBLAS_WORKSPACE if sizes.device == "cuda" else 0  # forward's thread and backward's
    per_element = {"adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0}.get(setting.config.training.optim, 8)
    if setting.offloads_optimizer:
        return found
    if setting.zero3:
        # One flat tensor for each moment, and a step's number.
        found["optimizer"] += 2 * sizes.rounded(trained * per_element / 2)
    else:
        width = setting.compute_bytes * 2 if per_element == 8 else per_element
        found["optimizer"] = 2 * per_tensor(
            [(numel * width / 2, count) for numel, count in setting.adapter], sizes.rounded
        )
    return found


def batch_bytes(setting: Setting) -> int:
    """Tokens, labels and mask (or positions), int64 each, of the micro-batches of a step and of the next one."""
    training = setting.config.training
    tokens = training.per_device_train_batch_size * setting.config.data.max_length
    return (training.gradient_accumulation_steps + 1) * 3 * setting.sizes.rounded(tokens * 8)


def _bucket(setting: Setting) -> int:
    given = setting.config.zero.reduce_bucket_size
    return max(1, min(MAX_REDUCE_BUCKET, setting.num_trained)) if isinstance(given, str) else given


def _partitioned(setting: Setting) -> Components:
    """Parts of all parameters once the engine stands; of a gathered layer they lie side by side, aligned."""
    sizes, shape = setting.sizes, setting.shape
    found = {"weights_4bit": 0, "statistics": 0, "weights_16bit": 0}
    nested: list[tuple[float, int]] = []
    alignment = WHOLE_ALIGNMENT if setting.num_ranks == 1 else PART_ALIGNMENT
    for block in shape.blocks:
        total = 0
        for weight in block.weights:
            for name, size in parts_of(setting, weight).items():
                if setting.fused and not (name == "weights_16bit" and setting.persists(weight)):
                    size = round_up(size, alignment)  # noqa: PLW2901 - the same size, where it lies
                    total += size
                else:
                    size = sizes.rounded(size)  # noqa: PLW2901
                found[name] += size * block.count
            if weight.quantized:
                nested += [(size, block.count) for size in sizes.nested(weight.numel)]
        if setting.fused:
            # One layer takes a segment of its own, the next one what the parts of the one before have left.
            found["weights_4bit"] += (sizes.segment(total) - total) * block.count // 2
    for weight in shape.outside:
        for name, size in parts_of(setting, weight).items():
            found[name] += sizes.rounded(size)
        if weight.quantized:
            nested += [(size, 1) for size in sizes.nested(weight.numel)]
    if setting.offloads_parameters:
        found = dict.fromkeys(found, 0)
    found["statistics"] += per_tensor(nested, sizes.rounded)
    if shape.num_quantized:
        tables = CODE_TABLES if sizes.double_quant else CODE_TABLES[:1]
        found["statistics"] += sum(map(sizes.rounded, tables))
    return found


def parts_of(setting: Setting, weight: Weight) -> Mapping[str, int]:
    """Bytes of one rank's parts of a parameter, by component."""
    sizes = setting.sizes
    if not weight.quantized:
        return {"weights_16bit": sizes.part(weight.numel, sizes.dtype_bytes)}
    scales = sizes.statistics(weight.numel)
    return {
        "weights_4bit": sizes.part(sizes.packed(weight.numel), sizes.storage_bytes),
        "statistics": sizes.part(scales, sizes.storage_bytes)
        if setting.shards_statistics
        else sizes.scale_bytes(weight.numel),
    }


def _kept_whole(setting: Setting) -> int:
    """Small parameters, which every rank has whole beside its part: norms, biases, routers of few experts."""
    if setting.num_ranks == 1:
        return 0  # the part is the whole
    sizes = setting.sizes
    entries: list[tuple[float, int]] = []
    for weight, count in setting.shape.weights():
        if not setting.persists(weight):
            continue
        if weight.quantized:
            entries.append((sizes.packed(weight.numel) * sizes.storage_bytes, count))
            if setting.shards_statistics:
                entries.append((sizes.statistics(weight.numel) * sizes.storage_bytes, count))
        else:
            entries.append((weight.numel * sizes.dtype_bytes, count))
    return per_tensor(entries, sizes.rounded)
