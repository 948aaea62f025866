"""What a rank takes between steps: to evaluate, and to save. Both begin with what a step has left (:mod:`.state`).

An evaluation is a forward without a gradient (``Trainer.evaluation_loop``, TRL's ``prediction_step``): nothing is saved
for a backward, so of the layers only the one at work is there, whatever ``training.activation_checkpointing`` says.
TRL asks for the loss alone, so neither logits nor predictions are kept from one batch to the next.

To save, DeepSpeed brings the model together module by module, also what is frozen and thrown away at once
(``_zero3_consolidated_16bit_state_dict`` in ``deepspeed/runtime/engine.py``). With an adapter the Trainer does so
whatever ``zero.stage3_gather_16bit_weights_on_model_save`` says, and the optimizer's state is written from where it is.
"""

from __future__ import annotations

from collections import defaultdict

from ..config.schema import RunConfig
from .gathering import DEQUANTIZED, gathered, head_bytes, whole_layer
from .layer_pass import LayerPass, rotary_bytes, tile_of_logits
from .shapes import Block
from .state import Components, Setting, parts_of
from .tape import Tape


def evaluates(config: RunConfig) -> bool:
    """Whether a run holds anything out; then it evaluates at its end at the latest (``training.run``)."""
    return config.data.eval_source is not None or config.data.eval_fraction > 0


def evaluation_tokens(config: RunConfig) -> int:
    """Tokens of a batch, if all examples are of full length."""
    return config.training.per_device_eval_batch_size * config.data.max_length


def after_training(stepped: Components) -> Components:
    """As after a step, but that no batch of the training is there any more."""
    return {**stepped, "batch": 0}


def after_an_evaluation(setting: Setting, stepped: Components) -> Components:
    """As before it: between steps, or, where ``training.eval_steps`` is empty, after the training.

    Where DeepSpeed gathers by itself, what it holds then stays until the next step, or until the model is saved.
    """
    before = dict(stepped) if setting.config.training.eval_steps is not None else after_training(stepped)
    return {**before, **held_by_deepspeed(setting)}


def held_by_deepspeed(setting: Setting) -> Components:
    """Three layers with their adapter, and, where nothing is let go, an embedding: its limit, and the one at work.

    ``stage3_max_live_parameters`` is two layers (``training.zero_settings``). A forward without a backward ends with
    as many; measured as that, in models of 4 and of 8 layers.
    """
    if setting.fused or not setting.zero3 or setting.num_ranks == 1:
        return {}
    found = {"gathered_layers": min(3, setting.shape.num_layers) * _layer_of_deepspeed(setting)}
    return found if setting.lets_go else {**found, "embeddings": head_bytes(setting, setting.shape.head)}


def _layer_of_deepspeed(setting: Setting) -> int:
    """The largest layer as DeepSpeed gathers it: without scales that are not sharded, and with its adapter."""
    gathered = 0
    for block in setting.shape.main:
        weights = [each for each in block.weights if each.quantized or not setting.persists(each)]
        parts = [parts_of(setting, each) for each in weights]
        own = sum(
            size for part in parts for name, size in part.items() if name != "statistics" or setting.shards_statistics
        )
        gathered = max(gathered, setting.sizes.rounded(setting.num_ranks * own))
    adapter = setting.num_trained * setting.compute_bytes // max(1, setting.shape.num_layers)
    return gathered + setting.sizes.rounded(adapter)


def evaluation_moments(setting: Setting, stepped: Components) -> dict[str, Components]:
    """The moments of an evaluation that can be its fullest, each with all that is held then."""
    held = after_an_evaluation(setting, stepped)
    held["batch"] = held.get("batch", 0) + _evaluated_batch(setting)  # and what DeepSpeed holds, as in the end
    moments = {"the loss is computed": _at_the_loss(setting, held)}
    if setting.copies_gathered or setting.offloads_parameters:
        moments["the head is gathered"] = _as_the_head_is_gathered(setting, held)
    for block in {block.kind: block for block in setting.shape.main}.values():
        for place in ("first", "last") if setting.shape.num_layers <= 2 else ("middle",):
            moments[f"the {place} {block.kind} computes"] = _in_a_layer(setting, held, block, place)
    return moments


def saving_moments(setting: Setting, stepped: Components) -> dict[str, Components]:
    """The moments of saving on rank 0 that can be its fullest; the other ranks take part, and keep nothing."""
    held = dict(stepped) if setting.config.training.save_steps is not None else after_training(stepped)
    kept = _state_dict(setting)
    moments = {"the adapter is written": {**held, "loading": kept}}
    left = held_by_deepspeed(setting) if evaluates(setting.config) and not setting.lets_go else {}
    if left:
        one_more = left["gathered_layers"] + _layer_of_deepspeed(setting)
        moments["DeepSpeed lets go of what it holds"] = {**held, **left, "gathered_layers": one_more}
    if setting.zero3:
        name, size = largest_module(setting)
        copies = size if setting.copies_gathered else 0
        moments[f"{name} is brought together"] = {**held, "embeddings": size, "on_the_way": copies, "loading": kept}
    if setting.zero3 and setting.adapter_is_resident and setting.num_ranks > 1:
        own = setting.sizes.rounded(setting.num_trained_here * setting.compute_bytes)
        whole = setting.num_ranks * own * (2 if setting.copies_gathered else 1)
        moments["the adapter is gathered again"] = {**held, "loading": kept + own + whole}
    return moments


def largest_module(setting: Setting) -> tuple[str, int]:
    """Name and bytes of the module whose own parameters, gathered together, take the most."""
    modules: dict[str, int] = defaultdict(int)
    for weight, _ in setting.shape.weights():
        parts = sum(parts_of(setting, weight).values())
        modules[weight.module] += setting.sizes.rounded(setting.num_ranks * parts)
    name = max(modules, key=lambda each: modules[each])
    return name.rpartition(".")[2], modules[name]


def _state_dict(setting: Setting) -> int:
    """What is going to be written: on the host, and so on a CPU beside all else."""
    if setting.sizes.device != "cpu":
        return 0
    if setting.num_ranks == 1 or not setting.zero3:
        return 0  # what is there already
    return setting.sizes.rounded(setting.num_trained * setting.compute_bytes)


def _evaluated_batch(setting: Setting) -> int:
    """Tokens, labels and mask, int64 each, of a batch and, as it is ready, of the next."""
    return 2 * 3 * setting.sizes.rounded(evaluation_tokens(setting.config) * 8)


def _states(setting: Setting) -> int:
    tokens, hidden = evaluation_tokens(setting.config), setting.shape.fact("hidden_size")
    return setting.sizes.rounded(tokens * hidden * setting.compute_bytes)


def _at_the_loss(setting: Setting, held: Components) -> Components:
    """The head, a tile of logits, the hidden states, and a copy of those of them that are scored."""
    tokens = evaluation_tokens(setting.config)
    return {
        **held,
        "embeddings": head_bytes(setting, setting.shape.head),
        "logits": tile_of_logits(setting, tokens) + 2 * _states(setting),
    }


def _as_the_head_is_gathered(setting: Setting, held: Components) -> Components:
    """A part that lives on the host comes to the device first; gloo makes a copy of what it brings together."""
    head = head_bytes(setting, setting.shape.head)
    copies = (head if setting.copies_gathered else 0) + (
        head // setting.num_ranks if setting.offloads_parameters else 0
    )
    return {**held, "embeddings": head, "activations": 2 * _states(setting), "on_the_way": copies}


def _in_a_layer(setting: Setting, held: Components, block: Block, place: str) -> Components:
    """A layer's forward on top of its input and of what the first layer got, which the model's forward holds.

    The first layer's input is just that; the last one has none ahead of it to be gathered.
    """
    tokens = evaluation_tokens(setting.config)
    tape = Tape(setting.sizes.rounded)
    layer = LayerPass(setting, block, tape, tokens)
    layer.forward(saves=False)
    working = dict(tape.at_peak)
    dequantized = sum(working.pop(name, 0) for name in DEQUANTIZED)
    found = gathered(setting, block) if setting.fused else held_by_deepspeed(setting)
    if place == "last" and setting.fused:
        found["gathered_layers"] = min(whole_layer(setting, block), found.get("gathered_layers", 0))
    states = _states(setting) * (1 if place == "first" else 2)
    return {
        **held,
        **found,
        "activations": states + rotary_bytes(setting, setting.config.data.max_length),
        "dequantized": dequantized,
        "working_set": sum(working.values()),
    }
