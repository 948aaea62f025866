"""Which gathered 4-bit weights are alive during a step, against those that DeepSpeed has not released.

DeepSpeed's bookkeeping says "released" when it has let go of its own reference; autograd may keep the storage all the
same. So every storage that is gathered into is watched by a weak reference, from the places through which all of them
come: our own gathering of layers, and the coordinator's ``fetch_sub_module`` for what DeepSpeed gathers; in forward,
recomputation and backward.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..sharding.layers import GatheredLayer, LayerGather
from .census import Weight


class GatheredWatch:
    """Watches the 4-bit weights and their scales while it is on. It holds no storage alive."""

    def __init__(self, engine: Any, weights: Collection[Weight]) -> None:
        """``weights`` are the base model's; nothing is watched before :meth:`start`."""
        offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
        self._coordinator: Any = None if offload is None else offload.get_param_coordinator()
        self._layers: LayerGather | None = getattr(offload, "layer_gather", None)
        watched = [weight for weight in weights if weight.state is not None or weight.is_statistics]
        self._names = {id(weight.parameter): weight.name for weight in watched if weight.is_partitioned}
        self.whole_bytes = sum(weight.whole_bytes for weight in watched)
        self.seconds = 0.0
        self._units: dict[int, list[Any]] = {}
        self._alive: dict[int, tuple[Any, int, Callable[[], int], int]] = {}
        self._lock = threading.Lock()  # autograd may fetch from several threads
        self._peaks: list[dict[str, Any]] = []
        self._leaked_bytes = 0
        self._largest_unit_bytes = 0
        self._num_fetches = 0

    @property
    def is_possible(self) -> bool:
        """Whether there is a ZeRO-3 engine with partitioned 4-bit weights."""
        return bool(self._names) and hasattr(self._coordinator, "fetch_sub_module")

    def begin_step(self) -> None:
        """What is found from now on counts for a new step."""
        self._peaks.append({"alive_bytes": 0, "needed_bytes": 0})

    def start(self) -> None:
        """Begin: the coordinator's method is covered by one of this object's own."""
        self.begin_step()
        fetch = self._coordinator.fetch_sub_module

        def watched_fetch(submodule: nn.Module, forward: bool) -> None:
            fetch(submodule, forward=forward)
            self._note(submodule, forward)

        self._coordinator.fetch_sub_module = watched_fetch
        if self._layers is not None:
            self._layers.watchers.append(self._note_layer)

    def stop(self) -> None:
        """End; what was found stays."""
        if self._coordinator is not None:
            self._coordinator.__dict__.pop("fetch_sub_module", None)
        if self._layers is not None and self._note_layer in self._layers.watchers:
            self._layers.watchers.remove(self._note_layer)
        self._alive.clear()

    def report(self) -> dict[str, Any]:
        """For each step the moment with the most bytes alive; and the most bytes that outlived their release."""
        return {
            "peaks": list(self._peaks),
            "leaked_bytes": self._leaked_bytes,
            "model_bytes": self.whole_bytes,
            "largest_unit_bytes": self._largest_unit_bytes,
            "fetches": self._num_fetches,
        }

    def _note(self, submodule: nn.Module, forward: bool) -> None:
        """DeepSpeed has gathered the parameters of ``submodule``."""
        begin = time.perf_counter()
        with self._lock:
            unit = self._units.get(id(submodule))
            if unit is None:
                inside = submodule.parameters(recurse=z3_leaf_module(submodule))
                unit = self._units[id(submodule)] = [each for each in inside if id(each) in self._names]
            if unit:
                size = sum(int(each.ds_numel) * each.element_size() for each in unit)
                for parameter in unit:
                    self._watch(parameter.untyped_storage(), parameter.data_ptr)
                self._compare(size, self._names[id(unit[0])].rpartition(".")[0], forward)
            self.seconds += time.perf_counter() - begin

    def _note_layer(self, layer: GatheredLayer, forward: bool) -> None:
        """Our own gathering has ``layer`` whole, and perhaps the next one under way."""
        begin = time.perf_counter()
        with self._lock:
            inside = [each for each in layer.frozen if id(each) in self._names]
            if inside and layer.whole_bytes and self._layers is not None:
                for each in self._layers.layers:
                    if each.whole is not None:
                        self._watch(each.whole.untyped_storage(), partial(_address, each))
                where = _common_module(self._names[id(each)] for each in inside)
                self._compare(layer.whole_bytes, where, forward)
            self.seconds += time.perf_counter() - begin

    def _compare(self, unit_bytes: int, where: str, forward: bool) -> None:
        self._num_fetches += 1
        self._largest_unit_bytes = max(self._largest_unit_bytes, unit_bytes)
        alive, needed = self._count()
        self._leaked_bytes = max(self._leaked_bytes, alive - needed)
        if alive > self._peaks[-1]["alive_bytes"]:
            # Inside a backward pass a forward is a recomputation.
            recomputing = forward and torch._C._current_graph_task_id() != -1
            when = "recomputation" if recomputing else "forward" if forward else "backward"
            self._peaks[-1] = {"alive_bytes": alive, "needed_bytes": needed, "when": when, "where": where}

    def _watch(self, storage: Any, address: Callable[[], int]) -> None:
        """Watch ``storage``, which is needed as long as ``address()`` says that it holds what was gathered."""
        # While its weak reference is kept, a storage's record is given to no other.
        if storage._cdata not in self._alive and (size := storage.nbytes()):
            self._alive[storage._cdata] = (StorageWeakRef(storage), size, address, address())

    def _count(self) -> tuple[int, int]:
        """Bytes alive, and among them those that are still held for a parameter."""
        alive = needed = 0
        gone = []
        for record, (reference, size, address, was) in self._alive.items():
            if reference.expired():
                gone.append(record)
                continue
            alive += size
            if address() == was:
                needed += size
        for record in gone:
            del self._alive[record]
        return alive, needed


def _common_module(names: Iterable[str]) -> str:
    """The module that all parameters of these names are in."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _address(layer: GatheredLayer) -> int:
    return 0 if layer.whole is None else layer.whole.data_ptr()
