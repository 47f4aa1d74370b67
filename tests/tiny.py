"""A model folder in no time, for tests of the scripts."""

from pathlib import Path

import torch

from minigrpo.checkpoint import Manifest, publish_model
from minigrpo.data import make_task
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost
from minigrpo.prompts import Codec
from minigrpo.tokenizer import number_tokenizer
from minigrpo.transformer import Transformer, TransformerConfig, initialise


def untrained_checkpoint(folder: Path) -> Path:
    """A model that writes numbers from 7 and EOS at random, sometimes two and then EOS."""
    plant = DoubleIntegrator(horizon=2, control_bound=0.3, start_decimals=1, start_bound=0.3)
    codec = Codec("numbers", 1)
    tokenizer = number_tokenizer(plant, codec)
    shape = TransformerConfig("llama", len(tokenizer), 12, 10, 2, 2, 2, 6, tied_head=False)
    model = Transformer(shape)
    initialise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embed.weight[:, 0] = 1.0  # which all tokens have in common
        model.head.weight[:, 0] = -5.0
        for token, i in tokenizer.get_vocab().items():
            if i == tokenizer.eos_token_id or token[-1].isdigit():
                model.head.weight[i, 0] = 0.5 if i == tokenizer.eos_token_id else 0.0
    task = make_task(plant, QuadraticCost(), codec, tokenizer)
    manifest = Manifest("sft", "tiny", plant, task.cost, codec, {}, {})
    folder.mkdir()
    publish_model(folder, model, task, manifest, 0, 0.0)
    return folder
