"""TRL's trainer, with phases and metrics recorded, and with the callbacks that the configuration asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer

from ..config.schema import RunConfig
from ..trace.records import MetricsRecord, TraceWriter
from ..units import format_bytes
from .probes.probe import RankProbe
from .recorder import MemoryRecorder
from .sharding.layers import gather_layers
from .step_clock import StepClock, WaitClock


class RecordedTrainer(SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` that tells the recorder where it is; the arithmetic is TRL's."""

    recorder: MemoryRecorder
    clock: StepClock
    waits: WaitClock
    _ops_per_token: int | None = None
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch."""
        with self.around_step():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.clock.lap("backward")
        self.recorder.mark("backward_end")
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.clock.lap("forward")
            self.recorder.mark("forward_end")
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, but that the parameters are counted once: a walk over all modules takes a while."""
        if self._ops_per_token is None:
            tokens = inputs["input_ids"].numel()
            self._ops_per_token = super().floating_point_ops(inputs) // tokens
        return self._ops_per_token * int(inputs["input_ids"].numel())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step."""
        with self.clock.fetching():
            return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation, as a phase of its own."""
        with self.recorder.within("eval"):
            result: dict[str, float] = super().evaluate(*args, **kwargs)
        return result

    def evaluated_at(self, step: int) -> bool:
        """Whether there was an evaluation after this step."""
        return any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.recorder.within("save"):
            super()._save_checkpoint(*args, **kwargs)


class RecordingCallback(TrainerCallback):  # type: ignore[misc]
    """Writes memory events on every rank, and metrics on rank 0."""

    def __init__(
        self,
        recorder: MemoryRecorder,
        metrics: TraceWriter | None,
        clock: StepClock,
        waits: WaitClock,
        *,
        logging_steps: int,
        rehearsal: bool = False,
    ) -> None:
        """``metrics`` is ``None`` on ranks other than 0; every ``logging_steps`` a line is printed."""
        self._clock, self._waits = clock, waits
        self._parts: dict[str, float] = {}
        self._rehearsal = rehearsal
        self._recorder = recorder
        self._metrics = metrics
        self._logging_steps = logging_steps
        self._step_began = 0.0
        self._step_seconds = 0.0
        self._tokens_before = 0.0
        self._num_tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run goes on counting tokens where its checkpoint was; TRL counts each attempt from 0."""
        counted = [float(entry["num_tokens"]) for entry in state.log_history if "num_tokens" in entry]
        self._num_tokens = self._tokens_before = counted[-1] if counted else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An optimizer step begins."""
        self._recorder.begin_step(state.global_step + 1)
        self._step_began = time.monotonic()
        self._clock.begin_step()
        self._waits.begin_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, the optimizer comes."""
        self._clock.lap("other")  # with DeepSpeed the optimizer's turn is over here
        self._recorder.mark("optimizer_begin")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An optimizer step is over."""
        self._clock.lap("optimizer")
        self._recorder.mark("step_end")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Metrics of a step or an evaluation."""
        if logs is None:
            return
        if "loss" in logs:
            # Here and not at the step's end: to log the loss, the Trainer has waited for the GPU.
            self._step_seconds = time.monotonic() - self._step_began
            self._parts = self._clock.end_step()
            waited = self._waits.end_step()
            if waited is not None:
                self._parts["gather_wait_seconds"] = waited
        if self._metrics is None:
            return
        common: MetricsRecord = {
            "kind": "metrics",
            "step": state.global_step,
            "epoch": float(state.epoch or 0.0),
            "max_steps": state.max_steps,
        }
        if "eval_loss" in logs:
            self._write_evaluation(common, logs)
        elif "loss" in logs:
            self._write_step(common, logs, state)

    def _write_evaluation(self, common: MetricsRecord, logs: dict[str, float]) -> None:
        record: MetricsRecord = {
            **common,
            "event": "eval",
            "eval_loss": logs["eval_loss"],
            "eval_seconds": logs.get("eval_runtime", 0.0),
        }
        self._append(record)
        print(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}")

    def _write_step(self, common: MetricsRecord, logs: dict[str, float], state: TrainerState) -> None:
        if self._rehearsal:
            # Losses, gradients and counts went through collectives that do nothing: only the time is real.
            self._append({**common, "event": "step", "step_seconds": self._step_seconds, **self._told_parts()})
            print(f"step {state.global_step} of {state.max_steps}: {self._step_seconds:.2f} s without communication")
            return
        # TRL counts the tokens of all ranks since the attempt's start; the difference is this step's.
        num_tokens = self._tokens_before + float(logs.get("num_tokens", 0.0))
        if self._tokens_before and state.log_history:
            state.log_history[-1]["num_tokens"] = num_tokens  # what the next checkpoint keeps
        tokens, self._num_tokens = num_tokens - self._num_tokens, num_tokens
        record: MetricsRecord = {
            **common,
            "event": "step",
            "loss": float(logs["loss"]),
            "learning_rate": float(logs.get("learning_rate", 0.0)),
            "num_tokens": int(num_tokens),
            "step_seconds": self._step_seconds,
            **self._told_parts(),
            "tokens_per_second": tokens / self._step_seconds if self._step_seconds > 0 else 0.0,
        }
        if "grad_norm" in logs:
            record["grad_norm"] = float(logs["grad_norm"])
        self._append(record)
        if state.global_step % self._logging_steps == 0 or state.global_step == state.max_steps:
            print(
                f"step {state.global_step} of {state.max_steps}: loss {record['loss']:.4f}, "
                f"{self._step_seconds:.2f} s, {record['tokens_per_second']:.0f} tokens/s"
            )

    def _told_parts(self) -> MetricsRecord:
        names = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "gather_wait_seconds")
        return {name: round(self._parts[name], 6) for name in names if name in self._parts}  # type: ignore[return-value]

    def _append(self, record: MetricsRecord) -> None:
        if self._metrics is not None:
            self._metrics.append(record)


class EngineCallback(TrainerCallback):  # type: ignore[misc]
    """Has the clock see the engine's steps, once it stands."""

    def __init__(self, trainer: RecordedTrainer) -> None:
        """``trainer`` makes the engine when training begins."""
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine stands; without DeepSpeed the wrapped model is none."""
        engine = self._trainer.model_wrapped
        if self._trainer.is_deepspeed_enabled and hasattr(engine, "step"):
            self._trainer.clock.watch(engine)
            self._trainer.waits.watch(engine)


class LayerGatherCallback(TrainerCallback):  # type: ignore[misc]
    """Takes the decoder layers out of DeepSpeed's keeping as soon as the engine stands."""

    def __init__(
        self, trainer: RecordedTrainer, config: RunConfig, say: Callable[[str], None], probe: RankProbe
    ) -> None:
        """``trainer`` makes the engine when training begins; ``say`` prints on one rank; ``probe`` notes it."""
        self._trainer, self._zero, self._say, self._probe = trainer, config.zero, say, probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine stands; there was no forward yet."""
        prefetch = self._zero.overlap_comm and self._zero.stage3_prefetch_bucket_size != 0
        gather = gather_layers(kwargs["model"], self._trainer.model_wrapped, device=args.device, prefetch=prefetch)
        if gather is not None:
            gather.waiting = self._trainer.waits.waiting
            self._probe.chosen(gathered_layers=len(gather.layers), gathered_layer_bytes=gather.largest_bytes)
            self._say(f"{len(gather.layers)} layers are gathered whole, {format_bytes(gather.largest_bytes)} each")


class TimeLimit(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which the time is over; rank 0's clock decides for all."""

    def __init__(self, seconds: float) -> None:
        """The clock starts now."""
        self._deadline = time.monotonic() + seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask rank 0 whether the time is over: ranks that disagreed would wait for each other for ever."""
        over = torch.tensor([float(time.monotonic() >= self._deadline)], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(over, src=0)
        if over.item() > 0:
            control.should_training_stop = True


def make_callbacks(config: RunConfig, *, evaluates: bool) -> list[TrainerCallback]:
    """The callbacks behind the early limits of the configuration."""
    callbacks: list[TrainerCallback] = []
    if config.training.max_duration_seconds is not None:
        callbacks.append(TimeLimit(config.training.max_duration_seconds))
    if config.training.early_stopping_patience is not None and evaluates:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.training.early_stopping_patience))
    return callbacks
