"""Being one rank of many on one device: collectives that do nothing, and data that nobody has to have."""

from __future__ import annotations

import os

import torch
from datasets import Dataset
from deepspeed.runtime.zero import utils as checks
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..config.schema import RunConfig
from .session import RankIdentity


def connect_alone(identity: RankIdentity) -> None:
    """Make the default process group one whose collectives return at once, with whatever their buffers held."""
    os.environ.update(RANK=str(identity.rank), WORLD_SIZE=str(identity.world_size), LOCAL_WORLD_SIZE="1")
    # DeepSpeed compares some counts with rank 0's, which nobody sends: what this rank has is what rank 0 would have.
    checks.get_lst_from_rank0 = list
    checks.assert_lst_len_same_as_other_ranks = lambda lst: None
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=identity.rank, world_size=identity.world_size)


def random_examples(config: RunConfig, vocab_size: int) -> Dataset:
    """Token sequences of full length, enough for every step: what they say has no influence on memory."""
    training = config.training
    # Data-parallel samplers deal the examples out to all ranks, the absent ones too; a few more than needed cost
    # nothing.
    world_size = torch.distributed.get_world_size()
    count = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    count *= (training.max_steps or 1) + 1
    generator = torch.Generator().manual_seed(training.seed)
    tokens = torch.randint(0, vocab_size, (count, config.data.max_length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})
