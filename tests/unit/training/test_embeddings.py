"""Embeddings that are gathered while they are used, with parameters that gather and partition as they are told."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from qz3_widgets.training.sharding.embeddings import gather_head_when_read, let_input_embedding_go


class Partitioned(nn.Parameter):
    """As DeepSpeed makes them, on one of two ranks."""

    ds_id = 0
    ds_persist = False
    ds_status = ZeroParamStatus.NOT_AVAILABLE
    ds_active_sub_modules: set[int] = set()  # noqa: RUF012 - none is active
    gathered = 0

    @property
    def ds_numel(self) -> int:
        return self.numel()

    @property
    def ds_tensor(self) -> torch.Tensor:
        return self.data.view(-1)[: self.numel() // 2]

    def all_gather(self) -> None:
        assert self.ds_status == ZeroParamStatus.NOT_AVAILABLE
        self.ds_status, self.gathered = ZeroParamStatus.AVAILABLE, self.gathered + 1

    def partition(self) -> None:
        assert self.ds_status == ZeroParamStatus.AVAILABLE
        self.ds_status = ZeroParamStatus.NOT_AVAILABLE


class Alone(Partitioned):
    """On one rank, which has all of it: nothing is to be gathered."""

    @property
    def ds_shape(self) -> torch.Size:
        return self.shape

    @property
    def ds_tensor(self) -> torch.Tensor:
        return self.data.view(-1)

    def all_gather(self) -> None:
        raise AssertionError("DeepSpeed would copy it")


class Model(nn.Module):
    """A causal model whose loss reads the head's weight without calling the head."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4).requires_grad_(False)
        self.model = Backbone()
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = Partitioned(self.head.weight.data, requires_grad=False)
        self.seen: list[ZeroParamStatus] = []
        parameters = ZeROOrderedDict(self.head)
        parameters["weight"] = self.head._parameters["weight"]
        self.head._parameters = parameters

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.model(self.embed(tokens))[0]
        weight: Any = self.head.weight
        self.seen.append(weight.ds_status)
        return (hidden @ weight.T).sum()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.head._parameters._in_forward = True  # the engine's doing
        loss: torch.Tensor = self(tokens)
        self.head._parameters._in_forward = False
        return loss


class Backbone(nn.Module):
    """One trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(hidden),)


TOKENS = torch.tensor([[1, 2, 3]])


def head_of(model: Model) -> Any:
    return dict(model.head.named_parameters())["weight"]


def test_the_head_is_there_for_the_loss_and_its_gradient_only() -> None:
    model = Model()
    assert gather_head_when_read(model)
    before_layers: list[ZeroParamStatus] = []
    model.model.layer.weight.register_hook(lambda grad: before_layers.append(head_of(model).ds_status))
    for count in (1, 2):
        loss = model.step(TOKENS)
        assert head_of(model).ds_status == ZeroParamStatus.AVAILABLE
        loss.backward()
        assert head_of(model).ds_status == ZeroParamStatus.NOT_AVAILABLE
        assert head_of(model).gathered == count
    assert model.seen == [ZeroParamStatus.AVAILABLE] * 2
    assert before_layers == [ZeroParamStatus.NOT_AVAILABLE] * 2
    assert model.model.layer.weight.grad is not None


def test_one_rank_uses_its_part_as_it_is() -> None:
    model = Model()
    model.head._parameters["weight"] = Alone(head_of(model).data, requires_grad=False)
    assert gather_head_when_read(model)
    model.step(TOKENS).backward()
    assert model.seen == [ZeroParamStatus.AVAILABLE]
    assert head_of(model).ds_status == ZeroParamStatus.NOT_AVAILABLE


def test_without_a_backward_it_goes_after_the_forward() -> None:
    model = Model()
    assert gather_head_when_read(model)
    with torch.no_grad():
        model.step(TOKENS)
    assert model.seen == [ZeroParamStatus.AVAILABLE]
    assert head_of(model).ds_status == ZeroParamStatus.NOT_AVAILABLE


def test_outside_of_a_forward_nothing_is_gathered() -> None:
    model = Model()
    assert gather_head_when_read(model)
    assert model.head.weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    assert list(model.head.state_dict()) == ["weight"]
    assert [name for name, _ in model.named_parameters() if name.startswith("head")] == ["head.weight"]


def test_a_head_that_is_trained_or_whole_is_left_alone() -> None:
    trained = Model()
    trained.head.weight.requires_grad_(True)
    persistent = Model()
    head_of(persistent).ds_persist = True
    whole = Model()
    whole.head._parameters = {"weight": nn.Parameter(torch.zeros(10, 4), requires_grad=False)}  # type: ignore[assignment]
    for model in (trained, persistent, whole):
        before = model.head._parameters
        assert not gather_head_when_read(model)
        assert model.head._parameters is before


def test_the_input_embedding_asks_for_a_gradient_after_deepspeed_has_looked() -> None:
    model = Model()
    seen = []

    def require_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    def deepspeeds(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.append(output.requires_grad)

    deepspeeds.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.embed.register_forward_hook(require_gradient)
    model.embed.register_forward_hook(deepspeeds)
    assert let_input_embedding_go(model) == 1
    assert model.embed(TOKENS).requires_grad
    assert seen == [False]


def test_a_trained_input_embedding_keeps_its_backward() -> None:
    model = Model()
    model.embed.requires_grad_(True)
    model.embed.register_forward_hook(lambda module, inputs, output: None)
    assert let_input_embedding_go(model) == 0
