"""Small models of transformers, adapted by PEFT: what the tests of merging and of adapters compare with."""

import functools

import numpy as np
import peft
import torch
import transformers

from tests.support.configs import TORCH_SIZES

SIZES = TORCH_SIZES | {"num_hidden_layers": 2}
IDS = np.random.default_rng(0).integers(0, 72, (3, 29))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@functools.cache
def mixtral():
    config = transformers.MixtralConfig(intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    return config, transformers.MixtralForCausalLM


@functools.cache
def mistral():
    return transformers.MistralConfig(intermediate_size=48, **SIZES), transformers.MistralForCausalLM


def noise(parameters, scale=1.0):
    with torch.no_grad():
        for parameter in parameters:
            values = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * values if parameter.ndim == 1 else scale * values * parameter.shape[-1] ** -0.5)


@functools.cache
def base(kind, directory):
    """A model directory with lively weights, made once."""
    torch.manual_seed(0)
    config, architecture = kind()
    model = architecture(config).eval()
    noise(model.parameters())
    model.save_pretrained(directory / kind.__name__)
    return directory / kind.__name__


def opened(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapt(directory, target, **options):
    """Saves an adapter as if trained: neither factor is zero. Returns PEFT's model."""
    options = {"r": 3, "lora_alpha": 6} | options
    model = peft.get_peft_model(opened(directory), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    noise([tensor for name, tensor in model.named_parameters() if tensor.requires_grad], 0.7)
    model.save_pretrained(target)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()
