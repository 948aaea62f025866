"""The memory model: what each rank's allocator will hold in each phase, from load to save; settled and at its peak.

A phase's figures mean what :func:`qz3_widgets.analysis.memory.peaks` measures: bytes that torch's allocator has handed
out, ``settled`` at the end of the phase, ``peak`` the most at once. What comes on top of the allocator (the CUDA
context, NCCL, fragmentation) is :mod:`.overhead`'s. The terms are in :mod:`.state` (what is held between steps),
:mod:`.layer_pass` (what a layer takes while it computes) and :mod:`.gathering` (what is whole for a while); this module
puts them together, moment by moment, and takes the fullest. Evaluation and saving are :mod:`.between_steps`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config.schema import RunConfig
from .between_steps import after_an_evaluation, after_training, evaluates, evaluation_moments, saving_moments
from .gathering import DEQUANTIZED, both_embeddings, gathered, head_bytes, retained, updated_experts, whole_layer
from .layer_pass import LayerPass, rotary_bytes, saved_by_a_layer, tile_of_logits
from .load_peak import load_peak
from .shapes import Block, ModelShape
from .sizes import Sizes
from .state import Components, Setting, after_a_step, loaded, parts_of, ready, reduce_bucket_bytes
from .tape import Tape

PHASES = ("load", "ready", "step")

JOINED_GRADIENTS = 20_000_000
"""Elements of gradients that are reduced at once (``training.sharding.gradients``)."""

WORTHWHILE = 1 / 25
"""``training.activation_offload: auto`` offloads what takes more than this part of the GPU's memory."""

STATED_ERROR: Mapping[str, float] = {"settled": 0.01, "peak": 0.08}
"""How far a measured figure may be from the predicted one before it means that something is wrong."""


@dataclass(frozen=True)
class PhaseForecast:
    """One rank in one phase, by component; components are named in :data:`LABELS`."""

    settled: Mapping[str, int]
    peak: Mapping[str, int]
    moment: str  # at which the peak is, in words

    @property
    def settled_bytes(self) -> int:
        """At the end of the phase."""
        return sum(self.settled.values())

    @property
    def peak_bytes(self) -> int:
        """Most at once."""
        return sum(self.peak.values())

    def to_json(self) -> dict[str, Any]:
        """As ``qz3 plan --json`` tells it; ``components`` add up to the peak."""
        return {
            "settled_bytes": self.settled_bytes,
            "peak_bytes": self.peak_bytes,
            "components": {name: size for name, size in self.peak.items() if size},
            "settled_components": {name: size for name, size in self.settled.items() if size},
            "moment": self.moment,
        }


@dataclass(frozen=True)
class Forecast:
    """All phases of a rank. ZeRO-3's parts are of equal size, so all ranks are alike."""

    phases: Mapping[str, PhaseForecast]
    num_ranks: int

    @property
    def peak_bytes(self) -> int:
        """Of the fullest phase."""
        return max(phase.peak_bytes for phase in self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda name: self.phases[name].peak_bytes)

    def to_json(self) -> dict[str, Any]:
        """By phase."""
        return {name: phase.to_json() for name, phase in self.phases.items()}


LABELS: Mapping[str, str] = {
    "weights_4bit": "4-bit weights",
    "statistics": "quantization statistics",
    "weights_16bit": "16-bit weights",
    "kept_whole": "small parameters, whole",
    "adapter": "LoRA",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reduce_bucket": "reduce bucket",
    "gathered_layers": "gathered layers",
    "retained_layers": "layers that are not let go",
    "on_the_way": "copies while gathering",
    "embeddings": "embedding and head, gathered",
    "dequantized": "dequantized weight",
    "activations": "checkpointed activations",
    "working_set": "a layer's working set",
    "logits": "logits and loss",
    "loading": "what the load passes through",
    "batch": "batch",
    "workspaces": "cuBLAS workspaces",
    "buffers": "buffers",
    "noise": "noise of random weights",
    "whole_model": "model before it is partitioned",
}
"""Component to what it is called; in the order in which they are shown."""


def forecast(
    config: RunConfig,
    shape: ModelShape,
    *,
    device: Literal["cpu", "cuda"],
    world_size: int,
    capacity_bytes: int | None = None,
) -> Forecast:
    """What each rank of a run will hold.

    Args:
        config: the run.
        shape: its model's.
        device: where the ranks run; allocators round differently.
        world_size: ranks over all machines.
        capacity_bytes: of a rank's device; decides what ``training.activation_offload: auto`` does.
    """
    setting = Setting(config, shape, Sizes.of(config, device, world_size))
    start, engine, stepped = loaded(setting), ready(setting), after_a_step(setting)
    offloads = offloads_activations(setting, capacity_bytes)
    phases = {
        "load": PhaseForecast(start, *load_peak(setting, start)),
        "ready": PhaseForecast(engine, *_ready_peak(setting, start, engine)),
        "step": PhaseForecast(stepped, *fullest(step_moments(setting, stepped, offloads=offloads))),
    }
    if evaluates(config):
        evaluated = after_an_evaluation(setting, stepped)
        phases["eval"] = PhaseForecast(evaluated, *fullest(evaluation_moments(setting, stepped)))
    phases["save"] = PhaseForecast(after_training(stepped), *fullest(saving_moments(setting, stepped)))
    return Forecast(phases, world_size)


def fullest(moments: Mapping[str, Components]) -> tuple[Components, str]:
    """The moment that holds most, and its name."""
    name = max(moments, key=lambda each: sum(moments[each].values()))
    return moments[name], name


def offloads_activations(setting: Setting, capacity_bytes: int | None) -> bool:
    """Whether the inputs of layers go to the host (``training.activation_offload``)."""
    wanted, training = setting.config.training.activation_offload, setting.config.training
    if setting.sizes.device != "cuda" or training.activation_checkpointing == "none" or wanted is False:
        return False
    if wanted is True:
        return True
    return capacity_bytes is not None and _activation_bytes(setting) > WORTHWHILE * capacity_bytes


def tokens_of(config: RunConfig) -> int:
    """Tokens of a micro-batch, if all examples are of full length."""
    return config.training.per_device_train_batch_size * config.data.max_length


def _activation_bytes(setting: Setting) -> int:
    elements = setting.shape.num_layers * tokens_of(setting.config) * setting.shape.fact("hidden_size")
    return elements * setting.compute_bytes


# --- From the load to the engine ------------------------------------------------------------------------------------


def _ready_peak(setting: Setting, start: Components, engine: Components) -> tuple[Components, str]:
    """The adapter is attached whole, in fp32; the engine stands; layers are laid side by side; the adapter gathered."""
    sizes, width = setting.sizes, setting.compute_bytes
    moments = {
        "the adapter is attached": {**start, "adapter": sizes.rounded(setting.num_trained * 4)},
        "the engine stands": {name: size for name, size in engine.items() if name != "batch"},
    }
    stands = moments["the engine stands"]
    resident = setting.adapter_is_resident and setting.zero3
    if setting.reduces_together:  # what DeepSpeed makes for gradients is there before the adapter is whole
        own = sizes.rounded(setting.num_trained_here * width)
        made = {"adapter": own, "reduce_bucket": reduce_bucket_bytes(setting)}
        moments["DeepSpeed's engine is made"] = {**stands, **made}
    if setting.zero3 and setting.strategy != "sharded" and setting.shape.embedding is not None:
        embedding = setting.shape.embedding.numel
        part = sizes.rounded(sizes.part(embedding, sizes.dtype_bytes))
        moments["the embedding is partitioned"] = {
            **start, "adapter": sizes.rounded(setting.num_trained * width), "loading": part
        }  # fmt: skip
    whole = sizes.rounded(setting.num_ranks * setting.num_trained_here * width) if resident else 0
    if resident and setting.num_ranks > 1:
        own = sizes.rounded(setting.num_trained_here * width)
        moments["the adapter is gathered"] = {**stands, "loading": (2 if setting.copies_gathered else 1) * whole + own}
    if setting.fused:
        layer = max(_side_by_side(setting, block) for block in setting.shape.blocks)
        laid = {**stands, "adapter": stands["adapter"] - whole, "loading": layer}
        moments["a layer's parts are laid side by side"] = laid
    return fullest(moments)


def _side_by_side(setting: Setting, block: Block) -> int:
    return sum(
        size
        for weight in block.weights
        if weight.quantized or not setting.persists(weight)
        for size in parts_of(setting, weight).values()
    )


# --- A step -----------------------------------------------------------------------------------------------------------


def step_moments(setting: Setting, stepped: Components, *, offloads: bool) -> dict[str, Components]:
    """The moments of a step that can be its fullest, each with all that is held then."""
    moments = {"the loss goes backward": _at_the_loss(setting, stepped, offloads=offloads)}
    if setting.copies_gathered or setting.offloads_parameters:
        moments["the head is gathered"] = _as_the_head_is_gathered(setting, stepped, offloads=offloads)
    for block in {block.kind: block for block in setting.shape.main}.values():
        moments[f"the last {block.kind} goes backward"] = _in_a_backward(setting, stepped, block, offloads=offloads)
    if setting.reduces_together:
        block = setting.shape.main[0]
        moments[f"the first {block.kind} goes backward"] = _at_the_end(setting, stepped, block)
        moments["gradients are brought together"] = _as_gradients_are_joined(setting, stepped)
    if setting.zero3 and not setting.lets_go:
        moments["gradients are reduced"] = _as_gradients_are_reduced(setting, stepped)
    moments["the optimizer steps"] = _at_the_optimizer(setting, stepped)
    return moments


def _activations(setting: Setting, *, offloads: bool, num_layers: int | None = None) -> int:
    """Inputs of ``num_layers`` layers (all), or everything that their forward saves, and what all layers share."""
    config, sizes = setting.config, setting.sizes
    tokens, width = tokens_of(config), setting.compute_bytes
    hidden = sizes.rounded(tokens * setting.shape.fact("hidden_size") * width)
    if config.training.activation_checkpointing == "none":
        saved = [(saved_by_a_layer(setting, block, tokens), block.count) for block in setting.shape.main]
        total = sum(size * count for size, count in saved) if num_layers is None else num_layers * saved[0][0]
    else:
        # Offloaded ones come back one ahead: the one in use and the next.
        wanted = setting.shape.num_layers if num_layers is None else num_layers
        total = hidden * (min(3, wanted) if offloads else wanted)
    return total + rotary_bytes(setting, tokens) + 3 * sizes.rounded(tokens * 8)


def _as_gradients_are_reduced(setting: Setting, stepped: Components) -> Components:
    """As released: at the end of the backward both embeddings are whole, and what was not let go is still there."""
    embeddings = both_embeddings(setting, of_one_rank=True)
    bucket = {"gradients": stepped.get("gradients", 0) + 2 * stepped.get("reduce_bucket", 0)}
    return {**stepped, **bucket, "embeddings": embeddings, "retained_layers": retained(setting)}


def _at_the_end(setting: Setting, stepped: Components, block: Block) -> Components:
    """The first layer's backward: the gradients of the whole adapter are there, of the activations hardly any."""
    held = _in_a_backward(setting, stepped, block, offloads=False, num_layers=1)
    return {**held, "gradients": held.get("gradients", 0) + setting.whole_gradient_bytes}


def _as_gradients_are_joined(setting: Setting, stepped: Components) -> Components:
    """All of them whole, and a piece of them side by side, and a rank's part of that."""
    sizes, width = setting.sizes, setting.compute_bytes
    piece = min(JOINED_GRADIENTS, setting.num_ranks * setting.num_trained_here) * width
    joined = sizes.rounded(piece) + (sizes.rounded(piece // setting.num_ranks) if setting.num_ranks > 1 else 0)
    return {**stepped, "gradients": stepped.get("gradients", 0) + setting.whole_gradient_bytes + joined}


def _in_a_backward(
    setting: Setting, stepped: Components, block: Block, *, offloads: bool, num_layers: int | None = None
) -> Components:
    """The last layer's backward, after it was computed again: all inputs of layers (or ``num_layers``) are there."""
    tokens = tokens_of(setting.config)
    tape = Tape(setting.sizes.rounded)
    tape.take("gradient", tokens * setting.shape.fact("hidden_size") * setting.compute_bytes)
    layer = LayerPass(setting, block, tape, tokens)
    recomputed = setting.config.training.activation_checkpointing != "none"
    activations = _activations(setting, offloads=offloads, num_layers=num_layers)
    layer.forward(saves=True)
    if not recomputed:
        # Its forward is over, and what it saved counts among the activations.
        activations -= sum(size for name, size in tape.held.items() if name.startswith("saved"))
        tape = _only_saved(setting, tape)
        layer = LayerPass(setting, block, tape, tokens)
    layer.backward()
    working = dict(tape.at_peak)
    dequantized = sum(working.pop(name, 0) for name in DEQUANTIZED) + updated_experts(setting, block)
    return {
        **stepped,
        **gathered(setting, block),
        "activations": activations,
        "dequantized": dequantized,
        "working_set": sum(working.values()),
    }


def _only_saved(setting: Setting, before: Tape) -> Tape:
    tape = Tape(setting.sizes.rounded)
    for name, size in before.held.items():
        if name.startswith("saved") or name == "gradient":
            tape.take(name, size)
    return tape


def _at_the_loss(setting: Setting, stepped: Components, *, offloads: bool) -> Components:
    """The backward of the loss: the head, a tile of logits, and the hidden states, their copy and their gradient."""
    shape, sizes, width = setting.shape, setting.sizes, setting.compute_bytes
    tokens, hidden = tokens_of(setting.config), shape.fact("hidden_size")
    states = sizes.rounded(tokens * hidden * width)
    norm = sizes.rounded(tokens * hidden * 4) if width != 4 else 0
    # The norm's copy of the last layer's output in fp32, its result, those of its tokens that count, and the gradient
    # of these in fp32.
    kept = norm + 2 * states
    gradient = sizes.rounded(tokens * hidden * 4)
    return {
        **stepped,
        "embeddings": head_bytes(setting, setting.shape.head),
        "gathered_layers": _gathered_at_the_loss(setting),
        "activations": _activations(setting, offloads=offloads),
        "logits": tile_of_logits(setting, tokens) + kept + gradient,
        "retained_layers": 0 if setting.lets_go or not setting.zero3 else retained(setting),
    }


def _as_the_head_is_gathered(setting: Setting, stepped: Components, *, offloads: bool) -> Components:
    """A part that lives on the host comes to the device first; gloo makes a copy of what it brings together."""
    head = head_bytes(setting, setting.shape.head)
    copies = (head if setting.copies_gathered else 0) + (
        head // setting.num_ranks if setting.offloads_parameters else 0
    )
    return {
        **stepped,
        "embeddings": head if setting.lets_go else both_embeddings(setting),
        "activations": _activations(setting, offloads=offloads),
        "on_the_way": copies,
        "retained_layers": 0 if setting.lets_go or not setting.zero3 else retained(setting),
    }


def _gathered_at_the_loss(setting: Setting) -> int:
    """DeepSpeed's own gathering keeps the last layer for its backward, and has the buffer of what came before it."""
    if setting.fused or not setting.lets_go or not setting.zero3:
        return 0
    return 2 * max(whole_layer(setting, block) for block in setting.shape.main)


def _at_the_optimizer(setting: Setting, stepped: Components) -> Components:
    """The gradients of a rank's part in fp32; then the parts of all ranks, brought together."""
    trained = setting.num_trained_here
    if setting.offloads_optimizer:
        return dict(stepped)
    once = setting.sizes.rounded(trained * 4)
    return {**stepped, "gradients": stepped.get("gradients", 0) + 2 * once}
