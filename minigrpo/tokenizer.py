"""Text to token ids: the tiny model's word-level number tokenizer, and pretrained ones with their chat template.

SFT, GRPO and evaluation all build a prompt with `encode_prompt` and a demonstration with `encode_completion`, so prompt ids followed by
completion ids are what supervised training saw. Sampled ids are never decoded and encoded again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.prompts import Codec, prompt_text, render_controls, system_text

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def number_tokenizer(plant: DoubleIntegrator, codec: Codec) -> PreTrainedTokenizerFast:
    """One token for each number of the codec's grid in [-control_bound, control_bound], and for each word of the prompt.

    An ordinary Hugging Face fast tokenizer: words split at white space, `save_pretrained` writes it.
    """
    steps = round(plant.control_bound * 10**codec.decimals)
    grid = torch.arange(-steps, steps + 1, dtype=torch.float64) / 10**codec.decimals
    numbers = render_controls(grid, codec).split()
    words = [word for word in prompt_text(torch.zeros(2), plant, codec).split() if word not in numbers]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *dict.fromkeys(words), *numbers])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder; never its code. ValueError: there is none, or it cannot end a text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} must hold a tokenizer that transformers can load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must have an end-of-sequence token, found none")
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills rows up; EOS where there is no pad token, which is harmless since masks come from positions."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, state: Tensor, plant: DoubleIntegrator, codec: Codec) -> list[int]:
    """Ids of the prompt for one initial state [2]: plain text for `numbers`, the chat template for `words`."""
    text = prompt_text(state, plant, codec)
    if codec.style == "numbers":
        return list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"{system_text(plant, codec)}\n{text}\n"))
    messages = [{"role": "system", "content": system_text(plant, codec)}, {"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(str(chat), add_special_tokens=False))


def encode_completion(tokenizer: PreTrainedTokenizerFast, controls: Tensor, codec: Codec) -> list[int]:
    """Ids of controls [T] in text, then EOS: stopping is learned like any other token."""
    return [*tokenizer.encode(render_controls(controls, codec), add_special_tokens=False), int(tokenizer.eos_token_id)]


def decode_completions(tokenizer: PreTrainedTokenizerFast, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of completions [N, C] without what lies outside the mask and without special tokens."""
    lengths = mask.sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_values(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Tensor:
    """The number that each token of the number tokenizer stands for, [V] float64, NaN for words."""
    values = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
    for token, index in tokenizer.get_vocab().items():
        if token.lstrip("-")[:1].isdigit():
            values[index] = float(token)
    return values


def number_features(values: Tensor, width: int) -> Tensor:
    """Start values for embedding and head rows: sines and cosines of the number at width / 2 frequencies, [V, width].

    Frequencies are geometric from 0.3 (the whole range is one slope) to 60 rad per m/s^2 (neighbours 0.01 apart differ), so close
    numbers start with close vectors. Words (NaN) get zeros.
    """
    frequencies = torch.logspace(torch.tensor(0.3).log10().item(), torch.tensor(60.0).log10().item(), width // 2)
    angles = rearrange(values.float(), "v -> v 1") * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).nan_to_num(0.0)
