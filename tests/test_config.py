"""Settings: precedence, ranges, flags; and every setting is read by somebody."""

import ast
import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import train_grpo
import train_sft
from minigrpo import training
from minigrpo.config import (
    LIMITS,
    OF_ONE_PROCESS,
    PRESETS,
    EvalConfig,
    GRPOConfig,
    RunSettings,
    Settings,
    SFTConfig,
    Value,
    check_saved,
    parse_flags,
    resolve,
)
from minigrpo.reward import RewardWeights

ROOT = Path(__file__).parent.parent
KINDS = [SFTConfig, GRPOConfig, EvalConfig]


def limits_of(kind: type[Settings], name: str) -> dict[str, object]:
    limits = kind.__dataclass_fields__[name].metadata["limits"]
    assert isinstance(limits, dict)
    none = dict.fromkeys(LIMITS)
    return none | limits | {"choices": get_args(get_type_hints(kind)[name])}


@pytest.mark.parametrize(
    ("given", "saved", "preset", "value", "source"),
    [
        ({}, None, "tiny", 20, "default"),
        ({}, None, "pretrained", 5, "preset pretrained"),
        ({}, {"warmup_steps": 3}, "pretrained", 3, "resume"),
        ({}, {"warmup_steps": 3}, "tiny", 3, "resume"),
        ({}, {"steps": 3}, "pretrained", 5, "preset pretrained"),
        ({"warmup_steps": 2}, {"warmup_steps": 3}, "pretrained", 2, "flag"),
        ({"warmup_steps": 20}, {"warmup_steps": 3}, "tiny", 20, "flag"),
        ({"warmup_steps": 2}, None, "pretrained", 2, "flag"),
        ({"warmup_steps": 2}, None, "tiny", 2, "flag"),
    ],
)
def test_a_flag_beats_the_saved_config_beats_the_preset_beats_the_default(
    given: dict[str, Value],
    saved: dict[str, Value] | None,
    preset: str,
    value: int,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert SFTConfig.warmup_steps == 20
    monkeypatch.setitem(PRESETS, ("tiny", SFTConfig), {})
    monkeypatch.setitem(PRESETS, ("pretrained", SFTConfig), {"warmup_steps": 5})
    resolved = resolve(SFTConfig, given, preset, saved)
    assert (resolved.config.warmup_steps, resolved.sources["warmup_steps"]) == (value, source)
    assert resolved.sources.keys() == vars(resolved.config).keys()


def test_what_belongs_to_one_process_is_not_resumed() -> None:
    values: list[Value] = [True, True, "elsewhere", 5.0]
    saved = dict(zip(OF_ONE_PROCESS, values, strict=True))
    config = resolve(GRPOConfig, {"resume": True}, "tiny", {**saved, "steps": 3}).config
    assert (config.overwrite, config.resume, config.save_dir) == (False, True, GRPOConfig.save_dir)
    assert (config.stop_after_minutes, config.steps) == (0.0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_json(kind: type[Settings]) -> None:
    config = resolve(kind, {"seed": 3, "device": "cpu"}, "pretrained").config
    saved = json.loads(json.dumps(vars(config)))
    again = resolve(kind, {}, "tiny", saved).config
    kept = {name: value for name, value in saved.items() if name not in OF_ONE_PROCESS}
    assert kept.items() <= vars(again).items()
    assert [type(value) for value in vars(again).values()] == [
        type(value) for value in vars(config).values()
    ]


def test_the_table_shows_value_and_source() -> None:
    lines = resolve(GRPOConfig, {"clip_eps_high": 0.28}, "tiny").table().splitlines()
    assert "  clip_eps_high            0.28                   flag" in lines
    assert len(lines) == len(dataclasses.fields(GRPOConfig))


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}),
        (["--clip-eps-low", "0.1"], {"clip_eps_low": 0.1}),
        (["--clip_eps_low=0.1"], {"clip_eps_low": 0.1}),
        (["--overwrite", "--no-tensorboard"], {"overwrite": True, "tensorboard": False}),
        (["--learning-rate", "1e-5", "--steps", "7"], {"learning_rate": 1e-5, "steps": 7}),
        (["--save-dir", "a b"], {"save_dir": "a b"}),
        (["--resume", "--steps", "7"], {"resume": True, "steps": 7}),
        (["--resume", "auto"], {"resume": True}),
        (["--resume=auto", "--no-resume"], {"resume": False}),
    ],
)
def test_flags_are_what_was_given_and_nothing_else(
    flags: list[str], given: dict[str, Value]
) -> None:
    assert parse_flags(GRPOConfig, flags) == given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (  # two flags begin like this
            ["--clip-eps", "0.1"],
            "unrecognized arguments: --clip-eps 0.1 "
            "(did you mean --clip-eps-low or --clip-eps-high?)",
        ),
        (  # one flag does
            ["--temperatur=1"],
            "unrecognized arguments: --temperatur=1 "
            "(did you mean --temperature or --final-temperature?)",
        ),
        (["--horizon=10"], "unrecognized arguments: --horizon=10 (--horizon: of train_sft.py)"),
        (["--best_of", "4"], "arguments: --best-of 4 (--best-of: of evaluate.py)"),
        (["--nothing-like-it"], "unrecognized arguments: --nothing-like-it\n"),
        (["--steps", "1e3"], "argument --steps: invalid int value"),
        (["--aggregation", "mean"], "argument --aggregation: invalid choice"),
        (["stray"], "unrecognized arguments: stray"),
        (["--resume", "step-000100"], "argument --resume/--no-resume: invalid choice"),
        (["--overwrite", "auto"], "unrecognized arguments: auto"),
    ],
)
def test_a_flag_that_is_unknown_abbreviated_or_no_number_ends_with_status_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(GRPOConfig, flags)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 2  # a line that says where to look, one that says what is wrong


def test_a_usual_misspelling_of_mpc_is_understood() -> None:
    assert parse_flags(EvalConfig, ["--skip-mcp"]) == {"skip_mpc": True}
    assert parse_flags(EvalConfig, ["--skip-mpc"]) == {"skip_mpc": True}


def test_a_batch_scripts_run_dir_stands_for_save_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_DIR", "runs/grpo-18")
    assert parse_flags(GRPOConfig, []) == {"save_dir": "runs/grpo-18"}
    assert parse_flags(GRPOConfig, ["--save-dir", "x"]) == {"save_dir": "x"}
    assert parse_flags(EvalConfig, []) == {}
    saved: dict[str, Value] = {"save_dir": "runs/other"}
    resolved = resolve(GRPOConfig, parse_flags(GRPOConfig, []), "tiny", saved)
    assert resolved.config.save_dir == "runs/grpo-18"
    assert resolved.sources["save_dir"] == "environment"
    assert resolve(GRPOConfig, {"save_dir": "x"}, "tiny").sources["save_dir"] == "flag"


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_every_field_with_its_text_and_its_defaults(
    kind: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as caught:
        parse_flags(kind, ["--help"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(kind):
        assert f"--{item.name.replace('_', '-')}" in printed
        text = " ".join(str(item.metadata["help"]).split())
        differ = [
            f"; {preset}: {values[item.name]}"
            for (preset, of_kind), values in PRESETS.items()
            if of_kind is kind and item.name in values and values[item.name] != item.default
        ]
        default = item.default if item.default != "" else "none"
        assert f"{text} (default: {default}{''.join(differ)})".strip() in printed
    if kind is GRPOConfig:
        assert "(default: 32; tiny: 512)" in printed
        assert "(default: 128; pretrained: 8)" in printed


def test_help_begins_with_what_the_command_alone_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parse_flags(GRPOConfig, ["--help"])
    printed = capsys.readouterr().out
    heads = ["Flags of this command:", "--init STR ", "What both trainers share:"]
    heads += ["--matmul-precision {auto,", "What every command has:", "--device {auto,cpu,cuda}"]
    places = [printed.index(head) for head in heads]
    assert places == sorted(places)
    assert "--group_size" not in printed  # understood, but not worth a line of its own


def test_underscores_of_a_value_stay() -> None:
    assert parse_flags(GRPOConfig, ["--save_dir=a_b", "--init", "c_d"]) == {
        "save_dir": "a_b",
        "init": "c_d",
    }


def just_outside(kind: type[Settings], name: str) -> list[tuple[Value, str]]:
    """Values next to the limits of a field, on the wrong side, and what is said about each."""
    limits, default = limits_of(kind, name), getattr(kind, name)
    cases: list[tuple[Value, str]] = []
    if limits["choices"]:
        assert isinstance(limits["choices"], tuple)
        cases.append(("else", f"{name} must be one of {', '.join(limits['choices'])}, got else"))
    step = 1 if isinstance(default, int) else 1e-6
    for limit, words, sign in (("at_least", "at least", -1), ("at_most", "at most", 1)):
        edge = limits[limit]
        if isinstance(edge, int | float):
            value = type(default)(edge + sign * step)
            cases.append((value, f"{name} must be {words} {edge}, got {value}"))
    if isinstance(edge := limits["above"], int | float):
        value = type(default)(edge)
        cases.append((value, f"{name} must be above {edge}, got {value}"))
    if isinstance(default, float):
        cases += [(value, f"{name} must be finite, got {value}") for value in (math.nan, math.inf)]
    return cases


@pytest.mark.parametrize(
    ("kind", "num_cases"), [(SFTConfig, 40), (GRPOConfig, 80), (EvalConfig, 10)]
)
def test_a_value_just_outside_its_range_is_an_error_that_says_the_range(
    kind: type[Settings], num_cases: int
) -> None:
    cases = [
        (item.name, *case)
        for item in dataclasses.fields(kind)
        for case in just_outside(kind, item.name)
    ]
    assert len(cases) > num_cases
    for name, value, message in cases:
        with pytest.raises(ValueError) as caught:
            resolve(kind, {name: value}, "tiny")
        assert str(caught.value) == message


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_at_the_edge_of_its_range_is_fine(kind: type[Settings]) -> None:
    for name in (item.name for item in dataclasses.fields(kind)):
        limits = limits_of(kind, name)
        choices = limits["choices"]
        edges = [limits[key] for key in ("at_least", "at_most") if limits[key] is not None]
        for value in [*edges, *(choices if isinstance(choices, tuple) else ())]:
            assert isinstance(value, int | float | str)
            # With credit for each control, the preset, one of the divisors is refused.
            more = {"credit": "completion"} if name == "advantage_std" else {}
            more |= {"lora_rank": 1} if name == "lora_alpha" else {}
            assert getattr(resolve(kind, {name: value, **more}, "tiny").config, name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"group_size": 2.0}, "group_size must be of type int, got 2.0"),
        ({"resume": 1}, "resume must be of type bool, got 1"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"temperature": "1"}, "temperature must be of type float, got '1'"),
        # beyond these AdamW multiplies by what float32 cannot hold
        ({"learning_rate": 1e39}, "learning_rate must be at most 1000, got 1e+39"),
        ({"final_norm_rate": 1e38}, "final_norm_rate must be at most 1000, got 1e+38"),
        ({"weight_decay": 1e39}, "weight_decay must be at most 1000, got 1e+39"),
        ({"clip_eps_high": 1e39}, "clip_eps_high must be at most 1000000.0, got 1e+39"),
        ({"save_dir": ""}, "save_dir must not be empty"),
        # no float holds these, and no tensor is so wide
        ({"micro_batch_size": 2**63}, f"micro_batch_size must be at most {2**53}, got {2**63}"),
        ({"warmup_steps": 10**400}, f"warmup_steps must be at most {2**53}, got {10**400}"),
        ({"lora_rank": 10**9}, "lora_rank must be at most 100000000, got 1000000000"),
        ({"lora_alpha": 8.0}, "lora_alpha must be left out with lora_rank 0"),
        ({"lora_targets": "q_proj"}, "lora_targets must be left out with lora_rank 0"),
        (
            {"lora_targets": "q_proj", "lora_alpha": 8.0},
            "lora_alpha, lora_targets must be left out with lora_rank 0",
        ),
    ],
)
def test_a_wrong_type_or_a_setting_without_effect_is_an_error(
    given: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(GRPOConfig, given, "tiny")
    assert str(caught.value) == message


def test_a_whole_number_will_do_for_a_float() -> None:
    config = resolve(GRPOConfig, {"temperature": 1}, "tiny").config
    assert config.temperature == 1.0 and isinstance(config.temperature, float)


@pytest.mark.parametrize(("preset", "kind"), PRESETS)
def test_presets_are_settings_within_their_ranges(preset: str, kind: type[Settings]) -> None:
    config = resolve(kind, {}, preset).config
    assert PRESETS[preset, kind].items() <= vars(config).items()


@cache
def names_and_config_fields() -> list[tuple[set[str], set[str]]]:
    """For each file but config.py: names in it, and attributes read from a name `config`."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "minigrpo").glob("*.py")]:
        if path.name != "config.py":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
            read = {
                node.attr
                for node in attributes
                if isinstance(node.ctx, ast.Load)
                and isinstance(node.value, ast.Name)
                and node.value.id == "config"
            }
            found.append((names, read))
    return found


def fields_read(kind: type[Settings]) -> set[str]:
    """What is read of a `config` in the files that know its class, or the trainers' base."""
    known = {kind.__name__} | ({"RunSettings"} if issubclass(kind, RunSettings) else set())
    return set().union(*(read for names, read in names_and_config_fields() if names & known))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_read_by_somebody(kind: type[Settings]) -> None:
    declared = {item.name for item in dataclasses.fields(kind)}
    assert declared - fields_read(kind) == set()


def test_a_run_saved_by_another_version_is_refused() -> None:
    saved = dataclasses.asdict(GRPOConfig())
    check_saved(GRPOConfig, saved, {})
    check_saved(GRPOConfig, {k: v for k, v in saved.items() if k != "save_dir"}, {})
    del saved["credit"]
    with pytest.raises(ValueError, match=r"it lacks \['credit'\] and has none besides: resume"):
        check_saved(GRPOConfig, saved, {})
    saved = dataclasses.asdict(GRPOConfig()) | {"control_variate": "none"}
    with pytest.raises(ValueError, match=r"it lacks none and has \['control_variate'\] besides"):
        check_saved(GRPOConfig, saved, {})


@pytest.mark.parametrize("trainer, kind", [(train_grpo, GRPOConfig), (train_sft, SFTConfig)])
def test_both_trainers_refuse_to_resume_it(trainer, kind, monkeypatch, tmp_path) -> None:
    saved = dataclasses.asdict(kind()) | {"control_variate": "none"}
    monkeypatch.setattr(training, "saved_config", lambda folder, stage: saved)
    with pytest.raises(ValueError, match="the saved run must have the settings of this version"):
        trainer.main(["--save-dir", str(tmp_path / "run"), "--resume"])


@pytest.mark.parametrize("trainer, kind", [(train_grpo, GRPOConfig), (train_sft, SFTConfig)])
def test_scores_of_other_validation_starts_are_not_compared(
    trainer, kind, monkeypatch, tmp_path
) -> None:
    saved = dataclasses.asdict(kind(eval_cases=8))
    monkeypatch.setattr(training, "saved_config", lambda folder, stage: saved)
    flags = ["--save-dir", str(tmp_path / "run"), "--resume", "--eval-cases"]
    with pytest.raises(ValueError, match=r"eval_cases must be 8 to resume this run, .* got 64: "):
        trainer.settings([*flags, "64"])
    check_saved(kind, saved, {"eval_cases": 8})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--width 64 --num-heads 5", "width must be a multiple of num_heads=5, got 64"),
        ("--width 8 --num-heads 16", "width must be a multiple of num_heads=16, got 8"),
        (
            "--width 60 --num-heads 4",
            "head_size must be positive and even, got 15",
        ),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused_before_anything_is_written(
    flags: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        train_sft.main([*flags.split(), "--save-dir", str(tmp_path / "run"), "--device=cpu"])
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_the_settings_have_the_weights_of_the_reward_with_their_ranges_and_defaults() -> None:
    names = {item.name for item in dataclasses.fields(RewardWeights)} - {"terminal_rate"}
    assert names == {
        name.removeprefix("reward_") for name in vars(GRPOConfig()) if name.startswith("reward_")
    }
    for name in names:
        with pytest.raises(ValueError, match=f"^reward_{name} must be at least 0, got -1e-06"):
            GRPOConfig(**{f"reward_{name}": -1e-6})
        with pytest.raises(ValueError, match=f"^reward_{name} must be finite, got inf"):
            GRPOConfig(**{f"reward_{name}": math.inf})
        # Evaluation scores by the one, training by the other.
        assert getattr(RewardWeights, name) == getattr(GRPOConfig, f"reward_{name}")


@pytest.mark.parametrize(
    ("flags", "saved", "preset", "source"),
    [
        ("", None, "tiny", "default"),
        ("--preset tiny", None, "tiny", "flag"),
        ("--model X", None, "pretrained", "flag"),  # which says it
        ("--model X --preset pretrained", None, "pretrained", "flag"),
        ("--resume", {}, "tiny", "resume"),
        ("--resume", {"preset": "pretrained", "model": "X"}, "pretrained", "resume"),
        ("--resume --model Y", {"preset": "pretrained", "model": "X"}, "pretrained", "resume"),
        ("--resume", None, "tiny", "default"),
        ("--resume --model X", None, "pretrained", "flag"),
    ],
)
def test_the_source_of_the_preset_is_where_it_came_from(
    flags: str,
    saved: dict[str, Value] | None,
    preset: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if saved is not None:
        name = str(saved.get("preset", "tiny"))
        saved = vars(resolve(SFTConfig, saved, name).config)
    monkeypatch.setattr(training, "saved_config", lambda folder, stage: saved)
    resolved = train_sft.settings(flags.split())
    assert (resolved.config.preset, resolved.sources["preset"]) == (preset, source)
    assert resolved.config.learning_rate == (4e-3 if preset == "tiny" else 2e-5)


def test_choices_are_not_divided_by_the_spread_of_their_group() -> None:
    with pytest.raises(ValueError, match="advantage_std must be batch or none with credit choice"):
        GRPOConfig(credit="choice", advantage_std="group")


def test_what_credit_for_a_whole_completion_does_not_read_is_refused_with_it() -> None:
    message = "credit_lambda, follow_policy must be left out with credit completion"
    with pytest.raises(ValueError, match=message):
        GRPOConfig(credit="completion", credit_lambda=0.3, follow_policy=False)


@pytest.mark.parametrize("name", ["reward_baseline", "reward_constraints_cap", "adaptive_terminal"])
def test_what_the_punishing_reward_does_not_read_is_refused_with_it(name: str) -> None:
    value: bool | float = True if name == "adaptive_terminal" else 7.0
    assert GRPOConfig(**{name: value}).reward == "progress"
    assert GRPOConfig(reward="punishment").reward_baseline == 50.0
    with pytest.raises(ValueError, match=f"^{name} must be left out with reward punishment$"):
        GRPOConfig(reward="punishment", **{name: value})
