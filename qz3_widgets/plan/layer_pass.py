"""What one decoder layer takes while it computes: its recomputation and its backward, tensor by tensor.

Written down from transformers' decoder layers (norms that compute in fp32, attention by ``sdpa``, a gated feed-forward
or fused experts), PEFT's adapted layers in our lean form, and our 4-bit layer, in the order in which they take and give
back memory on a :class:`~.tape.Tape`. ``t`` is tokens of a micro-batch, ``e`` bytes of an element of activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .shapes import Block, Weight
from .state import Setting
from .tape import Tape

LOSS_TOKENS, LOSS_WORDS = 4096, 32768
"""Logits that exist at once: TRL's tile of tokens by vocabulary (``trl/kernels/chunked_logprob.py``)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer as it computes."""

    inputs: int
    outputs: int
    quantized: bool
    adapted: bool

    @property
    def numel(self) -> int:
        """Weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder layer that its memory depends on, by their names in transformers."""

    attention: tuple[Linear, ...]  # in the order of the forward, without the last
    attention_out: Linear | None
    feed_forward: tuple[Linear, ...]  # gate and up, or the first of two, or both in one
    feed_forward_out: Linear | None
    norms_after: bool  # Gemma 3: norms behind attention and feed-forward too
    norms_of_heads: bool  # Qwen3, Gemma 3: norms of queries and keys
    expert_width: int  # of fused experts; 0: none

    @classmethod
    def of(cls, setting: Setting, block: Block) -> Anatomy:
        """Read from the parameters' names and shapes."""
        found: dict[str, Linear] = {}
        experts = 0
        for weight in block.weights:
            leaf = weight.module.rpartition(".")[2]
            if weight.linear and len(weight.shape) == 2:
                found[f"{weight.module.partition('.')[0]}.{leaf}"] = _linear(setting, weight)
            elif len(weight.shape) == 3 and "down" in weight.name:
                experts = min(weight.shape[1:])
                experts = weight.shape[2] if weight.shape[1] == setting.shape.fact("hidden_size") else experts
        outs = ("o_proj", "out_proj", "dense", "c_proj")
        attention = {name: each for name, each in found.items() if "attn" in name or "attention" in name}
        rest = {name: each for name, each in found.items() if name not in attention}
        ends = [name for name in attention if name.endswith(outs)]
        downs = [name for name in rest if name.endswith(("down_proj", "c_proj", "fc2", "w2"))]
        names = [weight.name for weight in block.weights]
        return cls(
            attention=tuple(each for name, each in attention.items() if name not in ends),
            attention_out=attention[ends[0]] if ends else None,
            feed_forward=tuple(each for name, each in rest.items() if name not in downs),
            feed_forward_out=rest[downs[0]] if downs else None,
            norms_after=any("post_feedforward" in name for name in names),
            norms_of_heads=any("q_norm" in name for name in names),
            expert_width=experts,
        )


def _linear(setting: Setting, weight: Weight) -> Linear:
    outputs, inputs = weight.shape
    return Linear(inputs, outputs, weight.quantized, setting.is_adapted(weight))


class LayerPass:
    """One layer on a tape. What autograd saves has names that begin with ``saved``."""

    def __init__(self, setting: Setting, block: Block, tape: Tape, tokens: int) -> None:
        """``tokens`` of a micro-batch."""
        self._setting, self._tape, self._t = setting, tape, tokens
        self._e = setting.compute_bytes
        self._r = setting.config.lora.r
        self._scaled = setting.config.lora.lora_alpha != setting.config.lora.r
        self._anatomy = Anatomy.of(setting, block)
        fused = sorted((each.numel for each in block.weights if len(each.shape) == 3), reverse=True)
        self._updated = tuple(fused) if setting.adapts_experts else ()  # gate and up, down
        self._facts = setting.shape
        hidden = setting.shape.fact("hidden_size")
        self._h = hidden
        self._q = setting.shape.fact("num_attention_heads") * setting.shape.fact("head_dim")
        self._kv = setting.shape.fact("num_key_value_heads") * setting.shape.fact("head_dim")
        self._heads = setting.shape.fact("num_attention_heads")
        self._casts = self._e != 4

    def forward(self, *, saves: bool) -> None:
        """From the layer's input, which is held elsewhere, to its output, named ``hidden``.

        Args:
            saves: whether autograd saves: in a recomputation, and where nothing is recomputed.
        """
        tape, t, e, parts = self._tape, self._t, self._e, self._anatomy
        self._norm("norm 1", saves)
        for place, linear in enumerate(parts.attention):
            self._linear(f"qkv {place}", linear, saves)
        self._keep_input("norm 1", any(each.adapted for each in parts.attention), saves)
        if parts.norms_of_heads:
            self._cast_norm("q norm", self._q, saves)
            self._cast_norm("k norm", self._kv, saves)
        # Rotary embeddings make new queries and keys; halves that are turned are alive for a moment.
        with tape.during(rotating=1.5 * t * self._q * e):
            tape.take(self._name("rotated", saves), t * (self._q + self._kv) * e)
        values = t * self._kv * e
        tape.give("qkv 0", "qkv 1", "qkv 2")
        tape.take(self._name("values", saves), values)
        tape.take(self._name("attended", saves), t * self._q * e)
        tape.take(self._name("log sums", saves), t * self._heads * 4)
        if not saves:
            tape.give("rotated", "values", "log sums")
        if parts.attention_out is not None:
            self._linear("attention out", parts.attention_out, saves)
            if not saves:
                tape.give("attended")
        if parts.norms_after:
            self._cast_norm("norm after attention", self._h, saves)
        tape.take("residual", t * self._h * e)
        tape.give("attention out")
        self._norm("norm 2", saves)
        if parts.expert_width and saves:
            self._experts()
        elif parts.expert_width:
            self._experts_in_turn()
        else:
            self._gated(saves)
        if parts.norms_after:
            self._cast_norm("norm after feed-forward", self._h, saves)

    def _gated(self, saves: bool) -> None:
        tape, t, e, parts = self._tape, self._t, self._e, self._anatomy
        width = parts.feed_forward_out.inputs if parts.feed_forward_out is not None else 0
        for place, linear in enumerate(parts.feed_forward):
            self._linear(f"up {place}", linear, saves)
            if place == 0 and len(parts.feed_forward) > 1:
                tape.take("activated", t * width * e)  # of the gate, before the other one is computed
                if not saves:
                    tape.give("up 0")
        if len(parts.feed_forward) == 1:
            tape.take("activated", t * width * e)
        self._keep_input("norm 2", any(each.adapted for each in parts.feed_forward), saves)
        if saves:
            # silu saves its input, the product both its factors: they stay where they are.
            tape.give("up 0", "up 1", "activated")
            tape.take("saved gate", t * sum(each.outputs for each in parts.feed_forward) * e + t * width * e)
        tape.take("product", t * width * e)
        tape.give("up 0", "up 1", "activated")
        if parts.feed_forward_out is not None:
            self._linear("hidden", parts.feed_forward_out, saves)
            if saves and parts.feed_forward_out.adapted:
                tape.give("product")
                tape.take("saved product", t * width * e)
        tape.give("product")

    def _experts_in_turn(self) -> None:
        """As :meth:`_experts`, each piece gone when it has been used; adapted ones with the update and the sum."""
        tape, e, width = self._tape, self._e, self._anatomy.expert_width
        rows = self._t * max(1, self._facts.fact("num_experts_per_tok"))
        first, second = (*self._updated, 0, 0)[:2]
        tape.take("rows", rows * self._h * e)
        self._update_experts(first)
        tape.take("gate and up", rows * 2 * width * e)
        tape.give("updated experts")
        tape.take("activated", rows * width * e)
        tape.take("product", rows * width * e)
        tape.give("activated")
        self._update_experts(second)
        tape.take("rows out", rows * self._h * e)
        tape.take("hidden", self._t * self._h * e)
        tape.give("updated experts", "rows", "gate and up", "product", "rows out", "norm 2")

    def _update_experts(self, numel: int) -> None:
        """PEFT makes the update of adapted experts as a weight, and adds it to the frozen one."""
        self._tape.take("updated experts", 2 * numel * self._e)
        self._tape.give("updated experts")
        self._tape.take("updated experts", numel * self._e)

    def _experts(self) -> None:
        """Fused experts: rows of tokens as often as each is sent to one; frozen, in 16 bit."""
        tape, e, width = self._tape, self._e, self._anatomy.expert_width
        rows = self._t * max(1, self._facts.fact("num_experts_per_tok"))
        tape.take("rows", rows * self._h * e)
        tape.take("gate and up", rows * 2 * width * e)
        tape.take("activated", rows * width * e)
        tape.take("product", rows * width * e)
        tape.take("rows out", rows * self._h * e)
        tape.take("hidden", self._t * self._h * e)
        tape.give("rows", "gate and up", "activated", "product", "rows out")
        tape.take("saved experts", rows * (3 * width + self._h) * e)
        tape.give("norm 2")

    def backward(self) -> None:
        """From the gradient of the output, held as ``gradient``, to that of the input; after a recomputation."""
        tape, t, e, parts = self._tape, self._t, self._e, self._anatomy
        tape.give("hidden", "residual")
        if parts.norms_after:
            self._cast_norm_backward("norm after feed-forward")
        if parts.expert_width:
            self._experts_backward()
        else:
            self._gated_backward()
        self._norm_backward("norm 2")
        if parts.norms_after:
            self._cast_norm_backward("norm after attention")
        if parts.attention_out is not None:
            self._linear_backward("attended gradient", parts.attention_out)
        tape.take("qkv gradient", t * (self._q + 2 * self._kv) * e)
        tape.give("saved rotated", "saved values", "saved attended", "saved log sums", "attended gradient")
        with tape.during(rotating=1.5 * t * self._q * e):
            tape.take("turned gradient", t * (self._q + self._kv) * e)
        tape.give("turned gradient", "saved q norm", "saved k norm")
        for place, linear in enumerate(reversed(parts.attention)):
            self._linear_backward("norm 1 gradient" if place == 0 else "further", linear)
            tape.give("further")
        tape.give("qkv gradient")
        self._norm_backward("norm 1")

    def _gated_backward(self) -> None:
        tape, t, e, parts = self._tape, self._t, self._e, self._anatomy
        if parts.feed_forward_out is None:
            return
        width = parts.feed_forward_out.inputs
        self._linear_backward("product gradient", parts.feed_forward_out, input_name="saved product")
        # Of the product: a gradient for each factor.
        tape.take("factor gradients", 2 * t * width * e)
        tape.give("product gradient", "saved gate")
        tape.take("saved gate", t * width * e)  # silu's input is still needed
        if len(parts.feed_forward) > 1:
            self._linear_backward("norm 2 gradient", parts.feed_forward[1])
        tape.take("gate gradient", t * width * e)
        tape.give("factor gradients", "saved gate")
        self._linear_backward("further" if len(parts.feed_forward) > 1 else "norm 2 gradient", parts.feed_forward[0])
        tape.give("further", "gate gradient")

    def _experts_backward(self) -> None:
        tape, e, width = self._tape, self._e, self._anatomy.expert_width
        rows = self._t * max(1, self._facts.fact("num_experts_per_tok"))
        tape.take("rows gradient", 2 * rows * self._h * e)
        tape.take("product gradient", rows * width * e)
        tape.take("factor gradients", 2 * rows * width * e)
        tape.give("product gradient")
        tape.take("gate and up gradient", rows * 2 * width * e)
        tape.give("factor gradients")
        tape.take("norm 2 gradient", self._t * self._h * e)
        tape.give("rows gradient", "gate and up gradient", "saved experts")

    def _name(self, what: str, saves: bool) -> str:
        return f"saved {what}" if saves else what

    def _keep_input(self, name: str, adapted: bool, saves: bool) -> None:
        """An adapted layer's A saves its input; otherwise it goes."""
        self._tape.give(name)
        if saves and adapted:
            self._tape.take(f"saved {name}", self._t * self._h * self._e)

    def _norm(self, name: str, saves: bool) -> None:
        """A norm in fp32: a copy of its input, which is saved, its square for a moment, the scaled copy, the result."""
        tape, elements = self._tape, self._t * self._h
        cast = elements * 4 if self._casts else 0
        tape.take(f"saved {name} cast" if saves else "cast", cast)
        with tape.during(square=elements * 4):
            pass
        with tape.during(scaled=elements * 4, rounded=elements * self._e if self._casts else 0):
            tape.take(name, elements * self._e)
        tape.give("cast")

    def _cast_norm(self, name: str, width: int, saves: bool) -> None:
        """A norm whose input is not the residual: in place of it."""
        tape, elements = self._tape, self._t * width
        tape.take(f"saved {name}" if saves else "cast", elements * 4)
        with tape.during(square=elements * 4, scaled=elements * 4):
            pass
        if saves:
            tape.take(f"saved {name}", elements * 4 if width == self._h else 0)
        tape.give("cast")

    def _norm_backward(self, name: str) -> None:
        """Gradients in fp32: of the scaled copy, through the square, and of the copy; then rounded and added."""
        tape, elements = self._tape, self._t * self._h
        with tape.during(rounded_gradient=elements * self._e, norm_gradients=3 * elements * 4):
            tape.give(f"{name} gradient")
        tape.give(f"saved {name} cast", f"saved {name}")
        with tape.during(cast_gradient=elements * self._e):
            pass

    def _cast_norm_backward(self, name: str) -> None:
        tape, elements = self._tape, self._t * self._h
        with tape.during(norm_gradients=3 * elements * 4):
            pass
        tape.give(f"saved {name}")

    def _weight_copies(self, linear: Linear) -> dict[str, float]:
        """A 4-bit weight while it is used: its parts in one piece, its scales in fp32, its values."""
        sizes = self._setting.sizes
        if not linear.quantized:
            return {}
        found: dict[str, float] = {"dequantized": linear.numel * self._e}
        scales = sizes.num_scales(linear.numel)
        if self._setting.fused and self._setting.num_ranks > 1:
            found["packed copy"] = sizes.packed(linear.numel) * sizes.storage_bytes
            if self._setting.shards_statistics:
                found["scales copy"] = sizes.statistics(linear.numel) * sizes.storage_bytes
        if sizes.double_quant:
            found["scales"] = 4 * scales
        return found

    def _linear(self, name: str, linear: Linear, saves: bool) -> None:
        """The frozen product, and the adapter's update beside it."""
        tape, t, e = self._tape, self._t, self._e
        copies = self._weight_copies(linear)
        for key, size in copies.items():
            tape.take(key, size)
        tape.take(name, t * linear.outputs * e)
        tape.give(*copies)
        if not linear.adapted:
            return
        tape.take("saved low rank" if saves else "low rank", t * self._r * e)
        tape.take("update", t * linear.outputs * e)
        tape.give("low rank")
        if self._scaled:
            tape.take("scaled update", t * linear.outputs * e)
            tape.give("update")
        tape.take("sum", t * linear.outputs * e)
        tape.give("update", "scaled update", "sum")  # the sum stands for the product from here on

    def _linear_backward(self, name: str, linear: Linear, input_name: str = "") -> None:
        """To the gradient of the input, ``name``: the adapter's way first, then through the frozen weight."""
        tape, t, e = self._tape, self._t, self._e
        if linear.adapted:
            if self._scaled:
                tape.take("scaled gradient", t * linear.outputs * e)
            with tape.during(low_rank=t * self._r * e, b_gradient=self._r * linear.outputs * e):
                pass
            tape.take("low rank gradient", t * self._r * e)
            tape.give("scaled gradient")
            tape.take(name, t * linear.inputs * e)
            tape.give("low rank gradient", input_name)
        copies = self._weight_copies(linear)
        for key, size in copies.items():
            tape.take(key, size)
        tape.give("scales")  # they have been used when the product begins
        tape.take("through the weight" if linear.adapted else name, t * linear.inputs * e)
        tape.give(*copies, "through the weight")


def saved_by_a_layer(setting: Setting, block: Block, tokens: int) -> int:
    """What autograd keeps of a layer that is not recomputed."""
    tape = Tape(setting.sizes.rounded)
    layer = LayerPass(setting, block, tape, tokens)
    layer.forward(saves=True)
    return math.ceil(sum(size for name, size in tape.held.items() if name.startswith("saved")))


def rotary_bytes(setting: Setting, tokens: int) -> int:
    """Cosines and sines of so many places, which every layer reads."""
    return 2 * setting.sizes.rounded(tokens * setting.shape.fact("head_dim") * setting.compute_bytes)


def tile_of_logits(setting: Setting, tokens: int) -> int:
    """The only logits that the fused loss has at once, of so many tokens at most."""
    return setting.sizes.rounded(min(tokens, LOSS_TOKENS) * LOSS_WORDS * setting.compute_bytes)
