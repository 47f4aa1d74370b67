"""Numbers as tokens, prompts as chat, and the way back to text."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from minigrpo.data import Task, demonstrations, make_prompts, make_task, prompt_lengths
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import save_transformer
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.prompts import Codec, parse_controls, prompt_text, render_controls, system_text
from minigrpo.tokenizer import (
    control_values,
    decode_completions,
    encode_completion,
    encode_prompt,
    gradient_kernel,
    load_tokenizer,
    number_features,
    number_tokenizer,
    pad_id,
    save_tokenizer,
    token_values,
)
from minigrpo.transformer import Transformer, TransformerConfig

PLANT, NUMBERS, WORDS = DoubleIntegrator(), Codec(), Codec("words", 3)
NUMBER_TOKENIZER = number_tokenizer(PLANT, NUMBERS)
CPU = torch.device("cpu")
STARTS = torch.tensor([[0.5, -0.3], [0.0, 0.0], [-0.8, 0.8], [0.07, -0.01]], dtype=torch.float64)
CHAT_ML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHAT_ML) -> PreTrainedTokenizerFast:
    """Byte-level pairs learned from a few prompts; like Llama's it puts BOS before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [prompt_text(start, PLANT, WORDS) for start in STARTS] + [system_text(PLANT, WORDS)]
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=template,
    )


def messages_of(start: torch.Tensor) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": system_text(PLANT, WORDS)},
        {"role": "user", "content": prompt_text(start, PLANT, WORDS)},
    ]


def test_every_number_of_the_grid_is_one_token_and_comes_back():
    texts = [f"{n / 100:.2f}" for n in range(-300, 301)]
    texts[300] = "0.00"
    ids = [NUMBER_TOKENIZER.encode(text) for text in texts]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == 601
    assert [NUMBER_TOKENIZER.decode(row) for row in ids] == texts
    # pad, eos, unknown; position, velocity, controls; filled up to a multiple of 64
    assert len(NUMBER_TOKENIZER) == 601 + 3 + 3 + 33 == 640
    unused = [token for token in NUMBER_TOKENIZER.get_vocab() if token.startswith("<unused_")]
    assert len(unused) == 33
    text = NUMBER_TOKENIZER.decode(NUMBER_TOKENIZER.encode(unused[0] + " 0.10"))
    parsed = parse_controls([text], torch.tensor([True]), DoubleIntegrator(horizon=1), NUMBERS)
    assert text == unused[0] + " 0.10" and not parsed.is_valid.item()  # seen, so malformed
    assert NUMBER_TOKENIZER.unk_token_id not in {row[0] for row in ids}


def test_a_completion_may_be_a_tenth_longer_where_a_number_is_several_tokens():
    plan, words = torch.linspace(-3, -1, 50), chat_tokenizer()
    length = len(encode_completion(words, plan, WORDS))
    task = make_task(DoubleIntegrator(), QuadraticCost(), WORDS, words)
    assert length > 100 and task.max_completion_length == length + length // 10
    task = make_task(DoubleIntegrator(), QuadraticCost(), NUMBERS, NUMBER_TOKENIZER)
    assert task.max_completion_length == 51


def test_a_prompt_with_a_word_that_is_no_token_is_refused():
    """Two such starts would be one to the model."""
    with pytest.raises(ValueError, match=r"^the tokenizer must know every word of 'position -0.8 "):
        encode_prompt(
            NUMBER_TOKENIZER, -STARTS[0].sign() * 0.8, DoubleIntegrator(start_decimals=1), NUMBERS
        )


@pytest.mark.parametrize("is_chat", [False, True])
def test_prompt_lengths_are_those_of_all_prompts(is_chat):
    """To the chat tokenizer one number is a single token, so its prompts are not equally long."""
    plant = DoubleIntegrator(start_decimals=1)
    tokenizer, codec = number_tokenizer(plant, NUMBERS), NUMBERS
    if is_chat:
        tokenizer, codec = chat_tokenizer(), WORDS
        tokenizer.add_tokens(["+0.5"])
    every = [len(encode_prompt(tokenizer, s, plant, codec)) for s in plant.start_grid()]
    found = prompt_lengths(Task(plant, QuadraticCost(), codec, tokenizer, 51))
    assert (len(found) > 1) == (len(set(every)) > 1) == is_chat
    assert max(found) == max(every)


@pytest.mark.parametrize(
    "plant, codec",
    [
        (PLANT, NUMBERS),
        (DoubleIntegrator(start_decimals=3, start_bound=0.011), NUMBERS),  # finer than controls
        (PLANT, Codec(decimals=1)),
        (DoubleIntegrator(control_bound=0.5), NUMBERS),  # starts beyond the controls
        (DoubleIntegrator(control_bound=0.29, start_bound=0.1), NUMBERS),  # times 100 is 28.999...
    ],
)
def test_no_prompt_and_no_control_holds_an_unknown_word(plant, codec):
    tokenizer = number_tokenizer(plant, codec)
    grid = plant.start_grid()
    for start in (grid[0], grid[-1], grid[len(grid) // 3], grid[len(grid) // 2]):
        ids = encode_prompt(tokenizer, start, plant, codec)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == prompt_text(start, plant, codec)
    plan = lqr_controls(grid[:1], plant, QuadraticCost(), decimals=codec.decimals)[0]
    whole = encode_completion(tokenizer, plan, codec)
    assert tokenizer.unk_token_id not in whole
    assert tokenizer.decode(whole[:-1]) == render_controls(plan, codec)
    limit = round(plant.control_bound * 10**codec.decimals)
    for n in range(-limit, limit + 1):
        control = torch.tensor([n / 10**codec.decimals])
        assert tokenizer.unk_token_id not in encode_completion(tokenizer, control, codec)
    largest = max(limit / 10**codec.decimals, plant.start_bound)  # starts are written too
    beyond = torch.tensor([largest + 10**-codec.decimals])
    assert tokenizer.unk_token_id in encode_completion(tokenizer, beyond, codec)


def test_the_number_tokenizer_is_for_numbers():
    with pytest.raises(ValueError, match=r"must keep '<CONTROLS>-3\.000, .*got '<unk>"):
        make_task(PLANT, QuadraticCost(), WORDS, number_tokenizer(PLANT, WORDS))


def test_a_bound_that_text_would_round_is_refused():
    """Saturated demonstrations would hold 0.26 or 0.25, where the actuator applies 0.255."""
    with pytest.raises(ValueError, match="control_bound must have 2 decimals"):
        number_tokenizer(DoubleIntegrator(control_bound=0.255, start_bound=0.1), NUMBERS)


def test_a_completion_is_one_token_for_each_control_and_eos():
    plan = lqr_controls(STARTS[:1], PLANT, QuadraticCost(), decimals=2)[0]
    ids = encode_completion(NUMBER_TOKENIZER, plan, NUMBERS)
    assert len(ids) == PLANT.horizon + 1
    assert ids[-1] == NUMBER_TOKENIZER.eos_token_id and ids.count(ids[-1]) == 1
    assert [float(NUMBER_TOKENIZER.decode([token])) for token in ids[:-1]] == pytest.approx(
        plan.tolist(), abs=1e-9
    )


@pytest.mark.parametrize("style", ["numbers", "words"])
def test_prompt_and_completion_ids_are_what_supervised_training_sees(style):
    """The rows of SFT begin with the ids that GRPO and evaluation are given as a prompt."""
    codec = NUMBERS if style == "numbers" else WORDS
    tokenizer = NUMBER_TOKENIZER if style == "numbers" else chat_tokenizer()
    task = Task(PLANT, QuadraticCost(), codec, tokenizer, 999)
    data, prompts = demonstrations(STARTS, task), make_prompts(STARTS, torch.arange(4), task)
    plans = lqr_controls(STARTS, PLANT, QuadraticCost(), decimals=codec.decimals)
    for n in range(4):
        prompt = prompts.tokens[n][prompts.mask[n]].tolist()
        assert prompt == encode_prompt(tokenizer, STARTS[n], PLANT, codec)
        whole = data.tokens[n][data.mask[n]].tolist()
        assert whole == prompt + encode_completion(tokenizer, plans[n], codec)
        assert prompts.mask[n].tolist() == sorted(prompts.mask[n].tolist())  # padding is left
        assert prompts.texts[n] == prompt_text(STARTS[n], PLANT, codec)


def test_the_chat_prompt_is_the_template_applied_once():
    tokenizer = chat_tokenizer()
    for start in STARTS:
        ids = encode_prompt(tokenizer, start, PLANT, WORDS)
        expected = tokenizer.apply_chat_template(
            messages_of(start), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == expected
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation():
    tokenizer = chat_tokenizer()
    plan = lqr_controls(STARTS[:1], PLANT, QuadraticCost(), decimals=3)[0]
    answer = {"role": "assistant", "content": render_controls(plan, WORDS)}
    conversation = tokenizer.apply_chat_template(
        [*messages_of(STARTS[0]), answer], tokenize=True, return_dict=False
    )
    ids = encode_prompt(tokenizer, STARTS[0], PLANT, WORDS)
    ids += encode_completion(tokenizer, plan, WORDS)
    assert conversation[: len(ids)] == ids
    assert tokenizer.decode(conversation[len(ids) :]) == "\n"  # the template's, after the answer


THINKS = "{% if not (enable_thinking is defined and not enable_thinking) %}{{ 'HM' }}{% endif %}"


@pytest.mark.parametrize(
    "end, expected",
    [
        (f"assistant\n{THINKS}<think>\n\n</think>\n\n", "assistant\n<think>\n\n</think>\n\n"),
        ("assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n"),
        ("assistant\n", "assistant\n"),
    ],
)
def test_the_answer_of_a_model_that_can_think_is_no_thought(end, expected):
    tokenizer = chat_tokenizer(CHAT_ML.replace("assistant\n", end))
    text = tokenizer.decode(encode_prompt(tokenizer, STARTS[0], PLANT, WORDS))
    assert text.endswith(f"<|im_end|>\n<|im_start|>{expected}")


def test_without_a_chat_template_system_and_question_are_two_lines_after_bos():
    tokenizer = chat_tokenizer(template=None)
    ids = encode_prompt(tokenizer, STARTS[0], PLANT, WORDS)
    system, question = (message["content"] for message in messages_of(STARTS[0]))
    assert tokenizer.decode(ids) == f"<|bos|>{system}\n{question}\n"


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_reloads_the_number_tokenizer_with_equal_ids_and_text(with_model, tmp_path):
    """Also beside a config.json, whose model_type could make transformers pick another class."""
    if with_model:
        config = TransformerConfig("llama", len(NUMBER_TOKENIZER), 8, 8, 1, 1, 1, 8)
        save_transformer(Transformer(config), tmp_path)
    NUMBER_TOKENIZER.save_pretrained(tmp_path)
    prompt = prompt_text(STARTS[0], PLANT, NUMBERS)
    answer = render_controls(lqr_controls(STARTS[:1], PLANT, QuadraticCost())[0], NUMBERS)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, 10_000)):
        assert again.get_vocab() == NUMBER_TOKENIZER.get_vocab()
        for text in (prompt, answer):
            ids = again.encode(text)
            assert ids == NUMBER_TOKENIZER.encode(text)
            assert again.decode(ids) == text
        for name in ("eos_token_id", "pad_token_id", "unk_token_id", "padding_side"):
            assert getattr(again, name) == getattr(NUMBER_TOKENIZER, name)
        assert again.padding_side == "left"


def test_a_chat_tokenizer_survives_the_folder(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, 10_000)
    for start in STARTS:
        ids = encode_prompt(again, start, PLANT, WORDS)
        assert ids == encode_prompt(tokenizer, start, PLANT, WORDS)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's file has it: every text, after a special token too, begins with a space."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(space)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    backend.train_from_iterator([system_text(PLANT, WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [("LlamaTokenizer", metaspace_tokenizer), ("Qwen2Tokenizer", chat_tokenizer)],
)
def test_the_tokenizer_is_its_file_whatever_class_is_named_beside_it(name, make, tmp_path):
    """transformers builds one of that class from parts of the file, which has other ids here."""
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    again, raw = load_tokenizer(tmp_path, 10_000), Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    texts = [system_text(PLANT, WORDS), "<s> [INST] 1.5", "<|im_start|> 1.5, -0.25", "  a\n b"]
    assert [again.encode(text) for text in texts] == [raw.encode(text).ids for text in texts]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in texts] != [raw.encode(text).ids for text in texts]


def test_what_we_save_is_in_names_that_earlier_transformers_know(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}  # as Qwen2.5 has
    path.write_text(json.dumps(json.loads(path.read_text()) | special))
    tokenizer = load_tokenizer(tmp_path, 10_000)
    for _ in range(2):
        save_tokenizer(tokenizer, tmp_path)
        settings = json.loads(path.read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == special["additional_special_tokens"]
        assert "extra_special_tokens" not in settings  # transformers 4 fails at a list of that name
        for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, 10_000)):
            for start in STARTS:
                ids = encode_prompt(chat_tokenizer(), start, PLANT, WORDS)
                assert encode_prompt(again, start, PLANT, WORDS) == ids
        tokenizer = again


def padded(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    mask = torch.tensor([[c < len(row) for c in range(width)] for row in rows])
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows]), mask


@pytest.mark.parametrize("style", ["numbers", "words"])
@pytest.mark.parametrize("fill", ["pad", "eos"])
def test_what_is_encoded_decodes_to_the_same_text_and_parses(style, fill):
    codec = NUMBERS if style == "numbers" else WORDS
    tokenizer = NUMBER_TOKENIZER if style == "numbers" else chat_tokenizer()
    plans = lqr_controls(STARTS, PLANT, QuadraticCost(), decimals=codec.decimals)
    rows = [encode_completion(tokenizer, plan, codec) for plan in plans]
    tokens, mask = padded(rows, getattr(tokenizer, f"{fill}_token_id"))
    texts = decode_completions(tokenizer, tokens, mask)
    assert texts == [render_controls(plan, codec) for plan in plans]
    parsed = parse_controls(texts, torch.ones(4).bool(), PLANT, codec)
    assert parsed.is_valid.all()
    assert torch.allclose(parsed.controls, plans.round(decimals=codec.decimals), atol=1e-12)


@pytest.mark.parametrize("style", ["numbers", "words"])
def test_a_special_token_inside_a_completion_spoils_it(style):
    """Dropped silently, it would be free filler that the reward can't see."""
    codec = NUMBERS if style == "numbers" else WORDS
    tokenizer = NUMBER_TOKENIZER if style == "numbers" else chat_tokenizer()
    plan = lqr_controls(STARTS[:1], PLANT, QuadraticCost(), decimals=codec.decimals)[0]
    good = encode_completion(tokenizer, plan, codec)
    stray = tokenizer.pad_token_id
    rows = [good, [stray, *good], [*good[:9], stray, *good[9:]], [*good[:-1], stray, good[-1]]]
    rows.append([*good[:9], good[-1], *good[9:]])  # an EOS that is not the end
    rows.append([*good[:9], len(tokenizer) + 3, *good[9:]])  # of a model with more rows than tokens
    texts = decode_completions(tokenizer, *padded(rows, stray))
    parsed = parse_controls(texts, torch.ones(6).bool(), PLANT, codec)
    assert parsed.is_valid.tolist() == [True, False, False, False, False, False]


def test_a_row_that_was_cut_off_keeps_its_last_token_and_an_empty_one_is_empty():
    five, eos = NUMBER_TOKENIZER.encode("1.20 -0.35 0.00 2.99 -3.00"), NUMBER_TOKENIZER.eos_token_id
    tokens = torch.tensor([five, [*five[:2], eos, eos, eos], [eos] * 5, [*five[:4], eos]])
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [0]])
    assert decode_completions(NUMBER_TOKENIZER, tokens, mask) == [
        "1.20 -0.35 0.00 2.99 -3.00",
        "1.20 -0.35",
        "",
        "",
    ]


def test_spaces_stay_where_the_model_wrote_them():
    """What transformers calls cleaning up would make one number, 1.25, of these two words."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "1": 1, ".25": 2}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    tokens = torch.tensor([[1, 2, 0]])
    assert decode_completions(tokenizer, tokens, torch.ones(1, 3).bool()) == ["1 .25"]


def test_pad_falls_back_to_eos():
    tokenizer = chat_tokenizer()
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        load_tokenizer(tmp_path, 10_000)
    tokenizer = number_tokenizer(PLANT, NUMBERS)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="end-of-sequence"):
        load_tokenizer(tmp_path, 10_000)
    # What a later version of tokenizers may write is a plain Exception there, not a ValueError.
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"WordLevel"', '"WordLevel2"'))
    with pytest.raises(ValueError, match="must hold a tokenizer that transformers can load"):
        load_tokenizer(tmp_path, 10_000)


def test_a_tokenizer_in_plain_python_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold a fast tokenizer, found ByT5Tokenizer$"):
        load_tokenizer(tmp_path, 10_000)


def test_a_qwen_folder_without_tokenizer_is_refused(tmp_path):
    """transformers would make an empty one of the config alone."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"must hold a tokenizer, tokenizer\.json, found none"):
        load_tokenizer(tmp_path, 10_000)


def test_a_prompt_is_the_same_on_all_days():
    """The template of Llama 3 prints the date, by default today's."""
    asked = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    )
    for date in (asked + "{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"):
        ids = encode_prompt(chat_tokenizer(date + CHAT_ML), STARTS[0], PLANT, WORDS)
        assert chat_tokenizer().decode(ids).startswith("26 Jul 2024<|bos|>")


def test_a_template_that_refuses_a_system_message_is_named():
    refusing = "{{ raise_exception('System role not supported') }}"
    broken = "{{ messages[0].nothing.more }}", "{% if %}", "{{ 1 // 0 }}", "{{ messages[0] + 1 }}"
    for template in (refusing, *broken):
        with pytest.raises(ValueError, match=r"must take a system and a user message, got .*Error"):
            encode_prompt(chat_tokenizer(template), STARTS[0], PLANT, WORDS)


def holed(moved_to: int | None) -> PreTrainedTokenizerFast:
    """The number tokenizer with 0.50 at another id, or nowhere."""
    values = json.loads(NUMBER_TOKENIZER.backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    del vocabulary["0.50"]
    if moved_to is not None:
        vocabulary["0.50"] = moved_to
    backend = Tokenizer.from_str(json.dumps(values))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def test_an_id_among_others_that_no_token_has_is_seen_in_the_text():
    ids = NUMBER_TOKENIZER.get_vocab()
    row = [ids["0.25"], ids["0.50"], ids["-0.25"], ids["<eos>"]]
    tokens = torch.tensor([row, [row[0], *row[2:], 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    whole, gap = (decode_completions(t, tokens, mask) for t in (NUMBER_TOKENIZER, holed(None)))
    assert whole == ["0.25 0.50 -0.25", "0.25 -0.25"]
    assert gap[0].endswith("\ufffd") and gap[1] == whole[1]


def test_the_largest_id_counts_and_not_how_many_there_are(tmp_path):
    num_rows = len(NUMBER_TOKENIZER)
    holed(num_rows + 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"at most the model's {num_rows}, got {num_rows + 6}"):
        load_tokenizer(tmp_path, num_rows)
    load_tokenizer(tmp_path, num_rows + 6)


def test_a_template_that_drops_a_message_is_refused():
    """As those do that expect a list of parts where we have a string; the model would be blind."""
    of_parts = (
        "{% for m in messages %}{% for part in m.content if part.text is defined %}{{ part.text }}"
        "{% endfor %}{% endfor %}<assistant>"
    )
    for template in (of_parts, "{{ messages[0].content }}", "{{ messages[1].content }}", "hello"):
        with pytest.raises(ValueError, match="chat template must keep both messages as they are"):
            encode_prompt(chat_tokenizer(template), STARTS[0], PLANT, WORDS)


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path):
    NUMBER_TOKENIZER.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": [None, "evil.Evil"]},
    }
    path.write_text(json.dumps(values))
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    try:
        load_tokenizer(tmp_path, 10_000)
    except ValueError:
        pass
    assert not marker.exists()
    assert not list(Path(tmp_path).glob("__pycache__"))


def test_token_values_are_the_numbers_and_nothing_else():
    values = token_values(NUMBER_TOKENIZER, 645)
    vocabulary = NUMBER_TOKENIZER.get_vocab()
    assert len(values) == 645
    for token, index in vocabulary.items():
        if token[0].isalpha() or token[0] == "<":
            assert values[index].isnan()
        else:
            assert f"{values[index]:.2f}" == token
    assert values[607:].isnan().all()


@pytest.mark.parametrize("width", [0.01, 0.1, 2.0])
def test_the_gradient_kernel_is_a_slow_loops_and_never_uphill(width: float) -> None:
    size = len(NUMBER_TOKENIZER) + 2  # a model may have more rows than there are tokens
    got = gradient_kernel(NUMBER_TOKENIZER, size, width, CPU)
    assert got is not None and got.dtype == torch.float32
    values = token_values(NUMBER_TOKENIZER, size).tolist()
    numbers = [i for i, value in enumerate(values) if not math.isnan(value)]

    def kernel(i: int, j: int) -> float:
        return math.exp(-((values[i] - values[j]) ** 2) / (2 * width**2))

    sums = {i: sum(kernel(i, j) for j in numbers) for i in numbers}
    for i in (*numbers[:2], numbers[300], numbers[-1]):
        wanted = torch.zeros(size)
        for j in numbers:
            wanted[j] = kernel(i, j) / math.sqrt(sums[i] * sums[j])
        assert torch.allclose(got[i], wanted, rtol=0, atol=1e-6)
    words = torch.tensor([math.isnan(value) for value in values])
    assert torch.equal(got[words], torch.eye(size)[words])
    assert torch.equal(got, got.T)
    eigenvalues = torch.linalg.eigvalsh(got.double())
    assert eigenvalues.min() > -1e-6 and abs(eigenvalues.max() - 1) < 1e-6
    assert gradient_kernel(NUMBER_TOKENIZER, size, 0.0, CPU) is None


def test_number_features_have_frequencies_from_0_3_to_20():
    features = number_features(torch.tensor([0.0, 0.001], dtype=torch.float64), 8)
    assert torch.allclose(features[1, [0, 3]], torch.tensor([0.0003, 0.02]).sin())


def test_number_features_are_near_for_near_numbers_and_zero_for_words():
    values = token_values(NUMBER_TOKENIZER, len(NUMBER_TOKENIZER))
    features = number_features(values, 32)
    assert features.shape == (640, 32)
    assert not features[values.isnan()].any()
    place = NUMBER_TOKENIZER.get_vocab()

    def distance(a: str, b: str) -> float:
        return float((features[place[a]] - features[place[b]]).norm())

    assert 0 < distance("1.20", "1.21") < distance("1.20", "1.25") < distance("1.20", "1.60")
    assert distance("1.20", "1.60") < distance("1.20", "-2.80")
    assert abs(distance("0.10", "0.11") - distance("-2.51", "-2.50")) < 1e-4  # the same anywhere


def test_only_what_an_answer_may_hold_is_a_control():
    """Starts beyond the control bound, or with other decimals, are numbers of prompts alone."""
    for plant in (
        DoubleIntegrator(horizon=1, control_bound=0.5),
        DoubleIntegrator(horizon=1, start_decimals=1),
    ):
        tokenizer = number_tokenizer(plant, Codec())
        size = len(tokenizer)
        controls = control_values(tokenizer, size, plant, Codec())
        bound, place = plant.control_bound, tokenizer.get_vocab()
        wanted = torch.arange(-round(100 * bound), round(100 * bound) + 1).double() / 100
        assert torch.equal(controls[~controls.isnan()].sort().values, wanted)
        assert controls[place["0.50"]] == 0.5 and token_values(tokenizer, size).nan_to_num()[
            place["0.8" if plant.start_decimals == 1 else "0.80"]
        ] == pytest.approx(0.8)


def test_a_word_that_begins_with_a_digit_is_no_number():
    words = {"<eos>": 0, "2nd": 1, "-0.5": 2, "3.": 3, "12": 4, "1.5.2": 5, "--1.0": 6}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), eos_token="<eos>"
    )
    values = token_values(tokenizer, 8)
    assert values[[2, 4]].tolist() == [-0.5, 12.0]
    assert values[[0, 1, 3, 5, 6, 7]].isnan().all()
