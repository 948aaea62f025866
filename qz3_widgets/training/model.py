"""The model of a run: base found, loaded, made safe to train, and given its adapter."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel, set_seed

from ..config.schema import RunConfig
from ..config.shapes import RANDOM_PREFIX, read_shape
from ..config.strategy import resolve_load_strategy
from .arguments import PRECISIONS, local_or_hub, lora_kwargs, model_kwargs
from .loading import LOADERS, BaseModel
from .zero_settings import decoder_layer_names


def find_base(config: RunConfig) -> BaseModel:
    """Read the base model's configuration, from the hub, a folder or, for ``random:``, from a file or a known shape.

    Raises:
        ValueError: a ``random:`` name that is neither a known shape nor a ``config.json``.
    """
    name = config.model.name_or_path
    options = model_kwargs(config)
    if not name.startswith(RANDOM_PREFIX):
        folder = local_or_hub(name)
        shape = AutoConfig.from_pretrained(
            folder, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
        )
        return BaseModel(folder, shape, random=False)
    values = read_shape(name.removeprefix(RANDOM_PREFIX))
    kind = values.pop("model_type")
    shape = AutoConfig.for_model(kind, **values)
    return BaseModel(name, shape, random=True)


def load_base(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """Load by the configured strategy, and close the traps that would end training without an error."""
    model = LOADERS[resolve_load_strategy(config)](config, base, mark)
    keep_weights_trainable_on_cpu(model)
    model.config.use_cache = False
    return model


def keep_weights_trainable_on_cpu(model: torch.nn.Module) -> int:
    """Forbid bitsandbytes to repack 4-bit weights for its inference kernel; returns the number of layers.

    On CPUs with AVX512-BF16 a forward in eval mode repacks the weight in place for a kernel without a backward, and
    ``train()`` does not undo it: from then on no gradient flows, without an error
    (``bitsandbytes/nn/modules.py``, ``Linear4bit.forward``). It would break a partitioned weight as well.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def attach_adapter(config: RunConfig, model: PreTrainedModel) -> PeftModel:
    """Wrap the model with LoRA, the same initial weights on every rank.

    Raises:
        ValueError: a name in ``lora.target_modules``, ``lora.modules_to_save`` or ``zero.leaf_modules`` that the model
            does not have.
    """
    model.enable_input_require_grads()
    set_seed(config.training.seed)
    try:
        peft_model = get_peft_model(model, LoraConfig(**lora_kwargs(config)))
    except ValueError as error:
        raise ValueError(f"lora.target_modules: {error}") from error
    _set_leaves(config, peft_model)
    return peft_model


def cast_adapter(config: RunConfig, model: torch.nn.Module) -> int:
    """Give the adapter of a quantized base the run's precision; returns the number of tensors that had another one.

    ``SFTTrainer`` turns it into bf16 whatever the precision is. Under fp16 the engine can't reduce that, and in fp32 on
    a CPU without bf16 arithmetic a layer of it takes twenty times as long (9.4 ms against 0.4 ms).
    """
    if not config.quantization.load_in_4bit:
        return 0
    wanted = PRECISIONS[config.training.precision]
    cast = 0
    for name, parameter in model.named_parameters():
        # DoRA's magnitudes change by less than 16 bit can tell.
        if not parameter.requires_grad or (wanted != torch.float32 and "lora_magnitude_vector" in name):
            continue
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
            cast += 1
    return cast


def _set_leaves(config: RunConfig, model: torch.nn.Module) -> None:
    wanted = config.zero.leaf_modules
    if config.zero.zero_stage != 3 or wanted == "none":
        return
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(module).__name__: type(module) for module in model.modules()}
    names = decoder_layer_names(model) if wanted == "auto" else wanted
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ValueError(
            f"zero.leaf_modules: the model has no class {', '.join(unknown)}; it has {', '.join(sorted(classes))}"
        )
    if names:
        set_z3_leaf_modules(model, [classes[name] for name in names])
