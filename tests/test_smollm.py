"""SmolLM2-135M-Instruct against transformers: make smollm converts the weights and runs this."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minigrpo.data import demonstrations, make_prompts, make_task
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import load_transformer
from minigrpo.lqr import QuadraticCost
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import Codec
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.tokenizer import load_tokenizer
from minigrpo.transformer import logits

pytestmark = [
    pytest.mark.smollm,
    pytest.mark.skipif("SMOLLM" not in os.environ, reason="$SMOLLM names no folder"),
]
FOLDER = Path(os.environ.get("SMOLLM", "."))


def test_it_is_the_model_that_transformers_loads() -> None:
    ours, theirs = load_transformer(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
    assert ours.num_parameters() == 134_515_008
    plant = DoubleIntegrator(horizon=5)
    tokenizer = load_tokenizer(FOLDER, ours.config.vocab_size)
    task = make_task(plant, QuadraticCost(), Codec("words", 3), tokenizer)
    starts = plant.start_grid()[::9000]

    data = demonstrations(starts, task)
    assert "<|im_start|>system\nYou steer" in tokenizer.decode(data.tokens[0])  # its own template
    with torch.no_grad():
        got, expected = ours(data.tokens, None, None, logits), theirs(data.tokens).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()

    prompts = make_prompts(starts[:1], torch.arange(1), task)
    eos = int(tokenizer.eos_token_id)
    written = sample_completions(
        ours, prompts.tokens, prompts.mask, 1, ActingPolicy(), StopRule((eos,), eos, 60), None
    )
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = eos
    generated = theirs.generate(
        prompts.tokens, attention_mask=prompts.mask, do_sample=False, max_new_tokens=60
    )
    text = tokenizer.decode(written.tokens[0][written.mask[0]])
    assert len(text) > 50
    assert text == tokenizer.decode(generated[0, prompts.tokens.shape[1] :])
