"""The work of one rank: data, model, adapter, trainer, adapter saved; each in its phase."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from ..config.schema import RunConfig
from ..runs.layout import RunLayout
from ..trace.records import TraceWriter
from . import model as models
from .activation_offload import ActivationOffloadCallback
from .arguments import checkpointing_kwargs, collective_timeout, sft_kwargs
from .data import load_examples
from .flops import count_flops
from .operators import are_missing, prepare_cpu_operators
from .probes.callback import ProbeCallback
from .probes.probe import RankProbe
from .profiler import ProfileCallback
from .recorder import MemoryRecorder
from .rehearsal import WithoutArithmetic, computes, connect_alone, random_examples, take_the_loss_as_on_a_gpu
from .session import RankIdentity
from .sharding.embeddings import EmbeddingsCallback
from .step_clock import StepClock, WaitClock
from .tokenizers import make_tokenizer
from .trainer import EngineCallback, LayerGatherCallback, RecordedTrainer, RecordingCallback, make_callbacks
from .zero_settings import apply_settings, computed_settings


def quiet_progress_bars() -> None:
    """Bars that redraw a line are for terminals; in a log file they are noise. Phases and steps tell the progress."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


@dataclass(frozen=True)
class Work:
    """One rank's part of a run."""

    config: RunConfig
    layout: RunLayout
    recorder: MemoryRecorder
    metrics: TraceWriter | None
    device: str
    resume: bool
    identity: RankIdentity

    def run(self) -> None:
        """Train and save the adapter.

        Raises:
            ValueError: the data, the model or a field does not fit, in words for the user.
        """
        config, recorder = self.config, self.recorder
        recorder.enter("data")
        quiet_progress_bars()
        has_eval = config.data.eval_source is not None or config.data.eval_fraction > 0
        self._connect()
        # DeepSpeed's configuration must be known before the model is made; TrainingArguments registers it.
        args = SFTConfig(**sft_kwargs(config, self.layout, device=self.device, has_eval=has_eval))
        base = models.find_base(config)
        tokenizer = make_tokenizer(config, random_model=base.random)
        if self.identity.rehearsal:
            train, held_out = random_examples(config, base.shape.get_text_config().vocab_size), None
        else:
            train, held_out = load_examples(config)
        if held_out is None:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        self._say(f"{len(train)} examples to train on, {0 if held_out is None else len(held_out)} held out")

        recorder.enter("load")
        if not computes():
            self._say("a rehearsal without arithmetic: memory is taken, and nothing is computed")
            take_the_loss_as_on_a_gpu()
        probe = RankProbe(config, self.layout, recorder, self.identity)
        arithmetic = nullcontext if computes() else WithoutArithmetic
        with arithmetic():
            model = models.load_base(config, base, recorder.mark)
        recorder.adopt(model)
        recorder.enter("attach")
        probe.loaded(model)
        peft_model = models.attach_adapter(config, model)
        recorder.enter("data")
        trainer = self._make_trainer(peft_model, args, tokenizer, train, held_out)
        trainer.around_step = arithmetic
        if config.zero.zero_stage == 3 and config.zero.release_gathered:
            trainer.add_callback(EmbeddingsCallback(trainer.waits.waiting))
            if config.zero.fused_gather:
                trainer.add_callback(LayerGatherCallback(trainer, config, self._say, probe))
        trainer.add_callback(ActivationOffloadCallback(config, self._say, probe.chosen))
        if config.training.profile_steps is not None:
            path = self.layout.profile(self.identity.rank)
            trainer.add_callback(ProfileCallback(path, config.training.profile_steps, self.device, self._say))
        trainer.add_callback(EngineCallback(trainer))
        trainer.add_callback(ProbeCallback(probe, engine=lambda: trainer.model_wrapped))
        self._settle(peft_model, args, probe)
        recorder.enter("engine")
        trainer.train(resume_from_checkpoint=self.resume or None)
        if held_out is not None and not trainer.evaluated_at(trainer.state.global_step):
            trainer.evaluate()
        if not self.identity.rehearsal:  # there is nothing to keep of noise, and nobody to gather it from
            self._save(trainer)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            # Without this, ranks can abort at exit after a good run.
            torch.distributed.destroy_process_group()

    def _settle(self, model: Any, args: SFTConfig, probe: RankProbe) -> None:
        """Compute what the configuration leaves to the model's sizes, before the engine is built."""
        probe.counted(count_flops(model, self.config.data.max_length).to_json())
        if self.config.zero.zero_stage != 3:
            return
        computed = computed_settings(self.config, model, model.config.get_text_config().hidden_size)
        apply_settings(computed.settings, args.hf_deepspeed_config.config)
        probe.settled(computed.to_json())
        if str(computed):
            self._say(f"computed from the model: {computed}")

    def _save(self, trainer: RecordedTrainer) -> None:
        self.recorder.enter("save")
        trainer.save_model(str(self.layout.adapter_dir))
        # The Trainer's arguments as a pickle: nobody needs them to use the adapter, and run.yaml has them.
        (self.layout.adapter_dir / "training_args.bin").unlink(missing_ok=True)
        self._say(f"adapter saved in {self.layout.adapter_dir}")

    def _connect(self) -> None:
        if self.config.zero.zero_stage == 0:
            return  # accelerate has connected the ranks when it made the TrainingArguments' device
        import deepspeed

        if self.device == "cpu":
            with self.recorder.doing("operator_build" if are_missing() else "operator_load"):
                prepare_cpu_operators(announce=self.metrics is not None)
        if self.identity.rehearsal:
            connect_alone(self.identity)
        backend = "gloo" if self.device == "cuda" and self.config.launch.ranks_per_gpu > 1 else None
        deepspeed.init_distributed(dist_backend=backend, timeout=collective_timeout(self.config), verbose=False)

    def _make_trainer(
        self, model: Any, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, train: Any, held_out: Any
    ) -> RecordedTrainer:
        evaluates = held_out is not None and self.config.training.eval_steps is not None
        clock, waits = StepClock(self.device), WaitClock(self.device)
        recording = RecordingCallback(
            self.recorder,
            self.metrics,
            clock,
            waits,
            logging_steps=self.config.training.logging_steps,
            rehearsal=self.identity.rehearsal,
        )
        trainer = RecordedTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[recording, *make_callbacks(self.config, evaluates=evaluates)],
        )
        models.cast_adapter(self.config, model)
        trainer.recorder, trainer.clock, trainer.waits = self.recorder, clock, waits
        trainer.remove_callback(PrinterCallback)  # our own callback prints, by logging_steps
        if len(trainer.train_dataset) == 0:
            raise ValueError(
                f"data.max_length: no example has a token that counts within {self.config.data.max_length} tokens; "
                "raise it, or check data.loss_on"
            )
        # Set only now: TRL would switch to reentrant checkpointing under ZeRO-3 with PEFT, for the sake of a DeepSpeed
        # older than ours, and the choice decides how much memory a step takes. The Trainer reads it in train().
        trainer.args.activation_checkpointing_kwargs = checkpointing_kwargs(self.config)
        return trainer

    def _say(self, text: str) -> None:
        if self.metrics is not None:
            print(text)
