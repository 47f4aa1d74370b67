"""Pretrained models: a folder that transformers made, through both trainers and the evaluation."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_hugging_face import CLASSES
from tiny import untrained_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import evaluate
import train_grpo
import train_sft
from minigrpo.checkpoint import load_manifest, load_model
from minigrpo.config import SFTConfig
from minigrpo.data import demonstrations
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import find_pretrained, load_transformer
from minigrpo.prompts import Codec, wording
from minigrpo.transformer import logits

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pretrained(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A random model of this family with a bytewise tokenizer and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=260, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
    )  # fmt: skip
    model_class(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SFT = [
    "--device=cpu", "--steps=2", "--batch-size=4", "--micro-batch-size=3", "--horizon=2",
    "--num-demonstrations=8", "--eval-every=2", "--eval-cases=8", "--save-every=2",
    "--learning-rate=1e-2", "--warmup-steps=0",
]  # fmt: skip
GRPO = [
    "--device=cpu", "--steps=1", "--prompts-per-step=2", "--group-size=2", "--micro-batch-size=3",
    "--num-minibatches=1", "--eval-every=2", "--eval-cases=8", "--learning-rate=1e-2",
    "--warmup-steps=0",
]  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ["--precision=bfloat16"]),
        ("qwen2", ["--lora-rank=2", "--gradient-checkpointing"]),
        ("qwen3", ["--lora-rank=2", "--lora-targets=q_proj,down_proj", "--precision=bfloat16"]),
    ],
)
def test_a_pretrained_folder_goes_through_sft_and_grpo(
    family: str, flags: list[str], tmp_path: Path
) -> None:
    base = pretrained(tmp_path / "base", family)
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    train_sft.main(["--model", str(base), "--save-dir", str(sft), *SFT, *flags])
    losses = [row["loss/total"] for row in rows_of(sft)[1:]]
    assert losses[-1] < losses[0]
    train_grpo.main(["--init", str(sft), "--save-dir", str(grpo), *GRPO, *flags])
    assert rows_of(grpo)[1]["update/grad_norm"] >= 0
    for folder in (sft, grpo):
        model, task, manifest = load_model(folder)
        assert (manifest.preset, task.codec) == ("pretrained", Codec("words", 3))
        assert task.tokenizer.chat_template == TEMPLATE
        assert all(p.dtype == torch.float32 for p in model.parameters())
        theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        data = demonstrations(task.plant.start_grid()[:2], task)
        with torch.no_grad():
            expected = theirs(data.tokens).logits
            got = model(data.tokens, None, None, logits)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        text = AutoTokenizer.from_pretrained(folder).decode(data.tokens[0][data.mask[0]])
        assert text.startswith("<system>You steer") and "<eos><user>The position is" in text
        assert text.endswith("</CONTROLS><eos>") and "<assistant><CONTROLS>" in text
    trained = load_transformer(sft / "checkpoints" / "step-000002").state_dict()
    before = load_transformer(base).state_dict()
    moved = {name for name in before if not torch.equal(trained[name], before[name])}
    if family == "llama":
        assert moved == set(before)
    elif family == "qwen2":  # merged adapters
        assert moved == {
            n for n in before if n.endswith(("qkv.weight", "out.weight")) or ".mlp." in n
        }
    else:
        assert moved == {n for n in before if n.endswith(("qkv.weight", "down.weight"))}


def test_the_evaluation_takes_codec_and_prompt_from_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sft = pretrained(tmp_path / "base"), tmp_path / "sft"
    train_sft.main(["--model", str(base), "--save-dir", str(sft), *SFT])
    evaluate.main(["--model-path", str(sft), "--num-cases", "4", "--skip-mpc", "--device=cpu"])
    assert json.loads((sft / "evaluation" / "evaluation.json").read_text())["num_cases"] == 4
    with pytest.raises(ValueError, match=r"^credit must be completion with codec style words"):
        flags = [
            "--save-dir",
            str(tmp_path / "grpo"),
            "--credit=choice",
            "--advantage-std=batch",
            *GRPO,
        ]
        train_grpo.main(["--init", str(sft), *flags])
    assert not (tmp_path / "grpo").exists()
    manifest = json.loads((sft / "minigrpo.json").read_text())
    manifest["codec"] = {"style": "numbers", "decimals": 2}
    (sft / "minigrpo.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="prompts must be worded as in training, 'You steer a"):
        load_model(sft)
    manifest["wording"] = wording(DoubleIntegrator(**manifest["plant"]), Codec("numbers"))
    (sft / "minigrpo.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="a prompt must have the tokens that it had in training"):
        load_model(sft)
    del manifest["prompt_tokens"]
    (sft / "minigrpo.json").write_text(json.dumps(manifest))
    assert load_model(sft)[1].codec.style == "numbers"  # nothing but the manifest decides


def test_half_precision_weights_become_float32_masters(tmp_path: Path) -> None:
    base, sft = pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "sft"
    flags = ["--precision=bfloat16", "--learning-rate=1e-6", "--steps=1"]
    train_sft.main(["--model", str(base), "--save-dir", str(sft), *SFT, *flags])
    trained = load_transformer(sft / "checkpoints" / "step-000001").state_dict()
    before = load_transformer(base).state_dict()
    shares = [float((trained[name] != before[name]).float().mean()) for name in before]
    assert min(shares) > 0.3  # bfloat16 weights would round a step of 1e-6 away, nearly all of them
    assert not torch.equal(trained["norm.weight"], trained["norm.weight"].bfloat16().float())


def test_a_hub_name_is_found_in_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    cache = tmp_path / "models--somebody--tiny"
    pretrained(cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_pretrained("somebody/tiny") == cache / "snapshots" / "0123abc"
    shape, _, weights = train_sft.describe(SFTConfig(preset="pretrained", model="somebody/tiny"))
    assert weights == cache / "snapshots" / "0123abc" and shape.vocab_size == 260
    message = r"'somebody/other' is no folder .*download config\.json, tokenizer files and \*\.safe"
    with pytest.raises(ValueError, match=message):
        train_sft.main(["--model", "somebody/other", "--save-dir", str(tmp_path / "no"), *SFT])
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(ValueError, match="at most the model's 256, got 257"):
        train_sft.main(["--model", str(base), "--save-dir", str(tmp_path / "sft"), *SFT])


def test_adapters_on_random_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_rank must be 0 with preset tiny"):
        train_sft.main(["--save-dir", str(tmp_path / "sft"), "--lora-rank=2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model X --demonstration-noise 0.2", "demonstration_noise must be 0 with {}, got 0.2"),
        ("--model X --weight-noise 0.2", "weight_noise must be 0 with {}, got 0.2"),
        ("--model X --smoothing-width 0.03", "smoothing_width must be 0 with {}, got 0.03"),
        (
            "--model X --gradient-smoothing-width 0.1",
            "gradient_smoothing_width must be 0 with {}, got 0.1",
        ),
        ("--model X --width 64", "width must not be given with {}, got 64"),  # be it the default
        ("--model X --mlp-width 32", "mlp_width must not be given with {}, got 32"),
        ("--model X --num-layers 3", "num_layers must not be given with {}, got 3"),
        ("--model X --num-heads 2", "num_heads must not be given with {}, got 2"),
        ("--model X --rope-theta 1e4", "rope_theta must not be given with {}, got 10000.0"),
        ("--model X --no-tied-head", "tied_head must not be given with {}, got False"),
        ("--preset pretrained", "model must name a folder or hub model with {}, got nothing"),
        ("--preset tiny --model X", "model must not be given with preset tiny, got X"),
    ],
)
def test_a_flag_that_the_preset_has_no_use_for_is_refused_before_anything_is_written(
    flags: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        train_sft.main([*flags.split(), "--save-dir", str(tmp_path / "sft"), *SFT])
    assert str(caught.value) == message.format("preset pretrained")
    assert not list(tmp_path.iterdir())


def test_the_settings_of_a_saved_run_are_no_flags_when_it_is_resumed(tmp_path: Path) -> None:
    base, resume = pretrained(tmp_path / "base"), ["--resume", "--save-dir", str(tmp_path / "sft")]
    train_sft.main(["--model", str(base), *resume, *SFT])
    saved = load_manifest(tmp_path / "sft" / "checkpoints" / "step-000002").config
    assert saved["width"] == SFTConfig.width
    with pytest.raises(ValueError, match="width must not be given with preset pretrained, got 64"):
        train_sft.main([*resume, "--width=64"])
    train_sft.main([*resume, "--steps=3"])
    assert [row["step"] for row in rows_of(tmp_path / "sft")] == [0, 1, 2, 3]
    train_sft.main(["--model", str(base), *resume, *SFT, "--steps=4"])  # as a batch script does
    assert rows_of(tmp_path / "sft")[-1]["step"] == 4
    train_sft.main([*(resume := ["--resume", "--save-dir", str(tmp_path / "tiny")]), *SFT])
    with pytest.raises(ValueError, match="model must not be given with preset tiny, got"):
        train_sft.main([*resume, "--model", str(base)])


def test_a_tiny_model_is_no_pretrained_one(tmp_path):
    tiny = untrained_checkpoint(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"model must be a pretrained one, .*tiny is a tiny model"):
        train_sft.main(["--model", str(tiny), "--save-dir", str(tmp_path / "run")])


def test_a_run_is_not_resumed_with_another_tokenizer(tmp_path):
    """Two digits exchange their ids: the same weights would read and write other numbers."""
    base, run = pretrained(tmp_path / "base"), tmp_path / "run"
    train_sft.main([*SFT, "--model", str(base), "--save-dir", str(run)])
    content = json.loads((base / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    before = (run / "metrics.jsonl").read_bytes()

    def is_refused():
        message = "step-000002: its tokenizer must be that of the model"
        with pytest.raises(ValueError, match=message):
            train_sft.main([*SFT, "--save-dir", str(run), "--resume", "--steps=3"])
        assert (run / "metrics.jsonl").read_bytes() == before

    for one, other in (("1", "7"), ("#", "~")):  # these two are in no prompt and in no plan
        vocab[one], vocab[other] = vocab[other], vocab[one]
        (base / "tokenizer.json").write_text(json.dumps(content))
        is_refused()
        vocab[one], vocab[other] = vocab[other], vocab[one]
    (base / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<model>")
    tokenizer.save_pretrained(base)
    is_refused()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    train_sft.main([*SFT, "--save-dir", str(run), "--resume", "--steps=3"])


def test_a_run_with_several_chat_templates_can_be_overwritten(tmp_path):
    base, run = pretrained(tmp_path / "base"), tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": TEMPLATE, "other": "{{ messages }}"}
    tokenizer.save_pretrained(base)
    for more in ([], ["--overwrite"]):
        train_sft.main([*SFT, "--model", str(base), "--save-dir", str(run), *more])
    assert (run / "additional_chat_templates" / "other.jinja").is_file()


def test_credit_for_choices_is_refused_at_once_for_words(tmp_path):
    train_sft.main(
        [*SFT, "--model", str(pretrained(tmp_path / "b")), "--save-dir", f"{tmp_path}/s"]
    )
    with pytest.raises(ValueError, match="credit must be completion with codec style words"):
        train_grpo.main([*GRPO, "--init", f"{tmp_path}/s", "--credit=choice"])
