"""Text to token ids: the tiny model's number tokenizer, pretrained ones with their chat template.

SFT, GRPO and evaluation all build a prompt with `encode_prompt` and a demonstration with
`encode_completion`, so prompt ids followed by completion ids are what supervised training saw.
Sampled ids are never decoded and encoded again.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.prompts import Codec, format_number, prompt_text, render_controls, system_text

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
# The vocabulary is filled up to a multiple of this with words that are never written: rows of
# logits then begin on cache lines, and the head takes half the time on a CPU (607 -> 640 tokens).
MULTIPLE = 64
# For templates that print today's date, as Llama 3's do: a prompt must be the same on all days.
ONE_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def number_tokenizer(plant: DoubleIntegrator, codec: Codec) -> PreTrainedTokenizerFast:
    """One token for each control within the bound that the codec can write, and each prompt word.

    An ordinary Hugging Face fast tokenizer that splits at white space; `save_pretrained` writes it.
    """
    numbers = control_words(plant, codec)
    values = dict.fromkeys(plant.start_grid()[:, 0].tolist())  # with them every word of a prompt
    prompts = " ".join(prompt_text(torch.tensor([v, v]), plant, codec) for v in values)
    words = [word for word in dict.fromkeys(prompts.split()) if word not in numbers]
    tokens = [PAD, EOS, UNKNOWN, *words, *numbers]
    tokens += [f"<unused_{i}>" for i in range(-len(tokens) % MULTIPLE)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def control_words(plant: DoubleIntegrator, codec: Codec) -> dict[str, float]:
    """Every control within the bound that the codec can write, m/s^2, by how it is written."""
    scale = 10**codec.decimals
    steps = round(plant.control_bound * scale)
    if not math.isclose(steps, plant.control_bound * scale):
        raise ValueError(
            f"control_bound must have {codec.decimals} decimals, or saturation has no token; "
            f"got {plant.control_bound}"
        )
    words = (format_number(i / scale, codec.decimals) for i in range(-steps, steps + 1))
    return {word: float(word) for word in words}


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder, never its code.

    tokenizer.json is taken as it is: from its parts transformers' classes of some families build
    another one (Llama 2, and in 5.17 the distilled Llamas of DeepSeek-R1).
    ValueError: none, no EOS, or more tokens than the model beside it has rows.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # for some families transformers would make an empty one
        raise ValueError(f"{folder} must hold a tokenizer, tokenizer.json, found none")
    is_whole = (folder / "tokenizer.json").is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if is_whole else AutoTokenizer).from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises nothing narrower for a foreign file
        raise ValueError(
            f"{folder} must hold a tokenizer that transformers can load: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder} must hold a fast tokenizer, found {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer must have an end-of-sequence token, found none; name it as "
            "eos_token in tokenizer_config.json"
        )
    num_rows = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if num_rows > vocab_size:
        raise ValueError(
            f"{folder}: tokens must be at most the model's {vocab_size}, got {num_rows}"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it under the name of a class that AutoTokenizer of transformers 4 knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(settings.get("extra_special_tokens"), list):  # it has another name for them
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills rows up; EOS if there is no pad token, harmless as masks come from positions."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, state: Tensor, plant: DoubleIntegrator, codec: Codec
) -> list[int]:
    """Ids of the prompt for one initial state [2]: plain text, or the chat template for `words`.

    The answer is no thought: models that can think are told not to, and of one that always does the
    thought is closed, empty.
    """
    text = prompt_text(state, plant, codec)
    if codec.style == "numbers":
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        if tokenizer.unk_token_id in ids:  # starts would look alike
            raise ValueError(f"the tokenizer must know every word of {text!r}")
        return ids
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"{system_text(plant, codec)}\n{text}\n"))
    messages = [
        {"role": "system", "content": system_text(plant, codec)},
        {"role": "user", "content": text},
    ]
    try:
        chat = str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=ONE_DAY + tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # Qwen3
            )
        )
    except Exception as error:  # a foreign template may raise anything
        raise ValueError(
            f"the chat template must take a system and a user message, got {error!r}"
        ) from error
    if chat.endswith("<think>\n"):  # DeepSeek-R1, Qwen3-Thinking
        chat += "\n</think>\n\n"
    if not all(message["content"] in chat for message in messages):
        raise ValueError(f"the chat template must keep both messages as they are, got {chat!r}")
    return list(tokenizer.encode(chat, add_special_tokens=False))


def encode_completion(
    tokenizer: PreTrainedTokenizerFast, controls: Tensor, codec: Codec
) -> list[int]:
    """Ids of controls [T] in text, then EOS: stopping is learned like any other token."""
    ids = tokenizer.encode(render_controls(controls, codec), add_special_tokens=False)
    return [*ids, int(tokenizer.eos_token_id)]


def decode_completions(
    tokenizer: PreTrainedTokenizerFast, tokens: Tensor, mask: Tensor
) -> list[str]:
    """Texts of completions [N, C] within the mask, without the EOS that ends a row.

    Any other special token stays visible, and an id that no token has is the replacement character:
    dropped, they would turn malformed text into valid text.
    """
    rows = []
    for row, length in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True):
        ended = length > 0 and row[length - 1] == tokenizer.eos_token_id  # it can only be the last
        rows.append(row[: length - ended])
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    unknown = {i for i in set().union(*rows) if tokenizer.convert_ids_to_tokens(i) is None}
    both = zip(texts, rows, strict=True)
    return [text if unknown.isdisjoint(row) else f"{text}\ufffd" for text, row in both]


def token_values(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Tensor:
    """The number that each token of the number tokenizer stands for, [V] float64, NaN for words."""
    values = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
    for token, index in tokenizer.get_vocab().items():
        if re.fullmatch(r"-?\d+(\.\d+)?", token):
            values[index] = float(token)
    return values


def control_values(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, plant: DoubleIntegrator, codec: Codec
) -> Tensor:
    """`token_values` of the tokens that an answer may hold, NaN for all others.

    A prompt has other numbers if starts go beyond the control bound or have other decimals.
    """
    values, vocabulary = torch.full((vocab_size,), torch.nan).double(), tokenizer.get_vocab()
    for word, control in control_words(plant, codec).items():
        values[vocabulary[word]] = control
    return values


def number_kernel(values: Tensor, width: float) -> Tensor:
    """How alike tokens are, [V, V]: exp(-(v_i - v_j)^2 / (2 width^2)) of two numbers, else i == j.

    `values` [V] holds the number each token stands for, NaN for words. Width 0 is the identity.
    """
    identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
    if width == 0:
        return identity
    # [V, V], NaN where either is no number
    distance = rearrange(values, "v -> v 1") - rearrange(values, "w -> 1 w")
    return torch.where(distance.isnan(), identity, torch.exp(-0.5 * (distance / width).square()))


def gradient_kernel(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, width: float, device: torch.device
) -> Tensor | None:
    """S = D^-1/2 K D^-1/2 in float32, [V, V]; K = `number_kernel`, D its row sums; None: width 0.

    Symmetric with eigenvalues from 0 to 1 and the identity among words, so that -S G is never
    uphill and smooth over numbers (`optim.smooth_gradients`).
    """
    if width == 0:
        return None
    kernel = number_kernel(token_values(tokenizer, vocab_size), width)
    scale = kernel.sum(dim=1).rsqrt()
    return (rearrange(scale, "v -> v 1") * kernel * scale).float().to(device)


def number_features(values: Tensor, width: int) -> Tensor:
    """Start values of embedding and head rows, [V, width]: sines and cosines of the token's number.

    width / 2 frequencies, geometric from 0.3 (the whole range is one slope) to 20 rad per m/s^2
    (0.05 apart differ by 1 rad), so close numbers start with close vectors. Higher ones would tell
    0.01 apart better, but a model that is unsure takes a period for the number: two peaks where one
    wide one belongs. Words (NaN) get 0.
    """
    frequencies = torch.logspace(math.log10(0.3), math.log10(20.0), width // 2)
    angles = rearrange(values.float(), "v -> v 1") * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).nan_to_num(0.0)
