"""Checkpoints: exact, all or nothing, and refused if foreign.

A kill is an exception that nobody catches; cut files and a limit on their size are real.
"""

import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import untrained_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim import AdamW
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_grpo
import train_sft
from minigrpo import checkpoint, training
from minigrpo.checkpoint import (
    Manifest,
    base_digest,
    base_of,
    is_best,
    latest_checkpoint,
    load_manifest,
    load_model,
    load_trainer,
    origin_prompt,
    prune_checkpoints,
    publish_model,
    published,
    save_checkpoint,
    saved_config,
)
from minigrpo.data import Task, make_task
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import load_transformer
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.optim import adamw
from minigrpo.prompts import Codec
from minigrpo.tokenizer import encode_completion, number_tokenizer
from minigrpo.transformer import Transformer, TransformerConfig, logits

PLANT, COST, CODEC = DoubleIntegrator(horizon=3), QuadraticCost(), Codec()
TOKENIZER = number_tokenizer(PLANT, CODEC)
TASK = make_task(PLANT, COST, CODEC, TOKENIZER)
MANIFEST = Manifest(
    "sft", "tiny", PLANT, COST, CODEC, {"steps": 7, "learning_rate": 1e-3}, {"steps": "flag"}
)
SHAPE = TransformerConfig(
    model_type="llama", vocab_size=len(TOKENIZER), width=8, mlp_width=12, num_layers=2,
    num_heads=2, num_kv_heads=1, head_size=4, tied_head=False,
)  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: no handler of ours catches it."""


def make_model(seed: int = 0, shape: TransformerConfig = SHAPE) -> tuple[Transformer, AdamW]:
    torch.manual_seed(seed)
    model = Transformer(shape)
    return model, adamw(model, 1e-2, (0.9, 0.99), 0.1)


def train(model: Transformer, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(
            SHAPE.vocab_size, (3, 5), generator=torch.Generator().manual_seed(step)
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        scores = model(tokens[:, :-1], None, None, logits)
        torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def save(folder: Path, step: int, model: Transformer, optimizer: AdamW) -> Path:
    return save_checkpoint(folder, step, model, optimizer, TASK, MANIFEST)


def everything(model: Transformer, optimizer: AdamW) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for place, moments in optimizer.state_dict()["state"].items():
        state |= {f"{place}.{name}": value.clone() for name, value in moments.items()}
    return state


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond the limit; the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_three_steps_and_resume_and_three_are_six_steps_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make_model()
    train(model, optimizer, range(6))

    first, first_optimizer = make_model()
    train(first, first_optimizer, range(3))
    save(tmp_path, 3, first, first_optimizer)
    second, second_optimizer = make_model(seed=1)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    step = load_trainer(folder, second, second_optimizer, MANIFEST)
    train(second, second_optimizer, range(step, 6))

    assert step == 3
    assert_same(everything(second, second_optimizer), everything(model, optimizer))


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = make_model()
    folder = save(tmp_path, 0, model, optimizer)
    other, other_optimizer = make_model(seed=1)
    train(other, other_optimizer, range(1))
    load_trainer(folder, other, other_optimizer, MANIFEST)
    assert_same(everything(other, other_optimizer), everything(model, optimizer))


def test_a_checkpoint_is_json_and_safetensors_that_others_may_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, *make_model())
    assert folder == tmp_path / "checkpoints" / "step-000001"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    modes = {path.stat().st_mode for path in folder.iterdir() if path.name != "tokenizer.json"}
    assert len(modes) == 1


@pytest.mark.parametrize("victim", ["save_transformer", "_sync", "rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make_model()
    train(model, optimizer, range(1))
    save(tmp_path, 1, model, optimizer)
    expected = everything(model, optimizer)
    train(model, optimizer, range(1, 2))

    def kill(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path if victim == "rename" else checkpoint, victim, kill)
        with pytest.raises(Killed):
            save(tmp_path, 2, model, optimizer)
    assert (tmp_path / "checkpoints" / "step-000002.tmp").is_dir()
    folder = latest_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-000001"
    other, other_optimizer = make_model(seed=1)
    load_trainer(folder, other, other_optimizer, MANIFEST)
    assert_same(everything(other, other_optimizer), expected)

    save(tmp_path, 3, model, optimizer)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000001", "step-000003"]


def test_what_gets_its_name_is_on_the_disk_before_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a folder that looks complete could have empty files in it after a power cut."""
    synced: list[int] = []  # inodes; 0 is a renaming
    sync = os.fsync

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def watched(change: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def checked(path: Path, target: Path) -> Path:
            assert {part.stat().st_ino for part in (path, *path.rglob("*"))} <= set(synced)
            synced.append(0)
            return change(path, target)

        return checked

    monkeypatch.setattr(os, "fsync", watched_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    save(tmp_path, 1, *make_model())
    assert synced[-2:] == [0, (tmp_path / "checkpoints").stat().st_ino]
    publish_model(tmp_path, make_model()[0], TASK, MANIFEST, 1, 1.0)
    assert synced[-2:] == [0, tmp_path.stat().st_ino]


@pytest.mark.parametrize(
    ("number", "of_folders", "is_saved"),
    [(errno.EINVAL, True, True), (errno.EINVAL, False, False), (errno.EIO, True, False)],
)
def test_a_file_system_that_cannot_sync_folders_is_good_enough_and_a_broken_one_is_not(
    tmp_path: Path, number: int, of_folders: bool, is_saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, refused = os.fsync, []

    def failing_sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_sync)
    if is_saved:
        assert save(tmp_path, 1, *make_model()) == latest_checkpoint(tmp_path)
    else:
        with pytest.raises(OSError, match="could not be written"):
            save(tmp_path, 1, *make_model())
    assert refused


def test_a_file_system_without_permissions_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: int, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "chmod", refuse)
    assert save(tmp_path, 1, *make_model()) == latest_checkpoint(tmp_path)


@pytest.mark.parametrize("limit", [20_000, 45_000])  # the weights fail, the moments fail
def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before(
    tmp_path: Path, limit: int
) -> None:
    model, optimizer = make_model()
    train(model, optimizer, range(1))
    folder = save(tmp_path, 1, model, optimizer)
    assert limit < (folder / "trainer.safetensors").stat().st_size
    with (
        full_disk(limit),
        pytest.raises(OSError, match=r"step-000002.tmp could not be written.*intact"),
    ):
        save(tmp_path, 2, model, optimizer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert latest_checkpoint(tmp_path) == folder


def test_a_full_disk_leaves_the_published_model(tmp_path: Path) -> None:
    model, _ = make_model()
    publish_model(tmp_path, model, TASK, MANIFEST, 1, 2.5)
    with full_disk(20_000), pytest.raises(OSError, match="intact"):
        publish_model(tmp_path, make_model(seed=1)[0], TASK, MANIFEST, 2, 3.5)
    assert published(tmp_path) == (1, 2.5)
    assert not (tmp_path / "publish.tmp").exists()
    assert_same(dict(load_model(tmp_path)[0].state_dict()), dict(model.state_dict()))


def damage_by_cutting(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_by_emptying(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_emptying, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer.safetensors", "minigrpo.json", "config.json"]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    model, optimizer = make_model()
    train(model, optimizer, range(1))
    first = save(tmp_path, 1, model, optimizer)
    second = save(tmp_path, 2, model, optimizer)
    if damage is damage_by_cutting and name.endswith("json"):
        os.truncate(second / name, 40)  # its last byte is only the end of the line
    else:
        damage(second / name)
    assert latest_checkpoint(tmp_path) == first
    assert f"{second} is damaged" in capsys.readouterr().err
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* can be read: put one"):
        latest_checkpoint(tmp_path)


def test_the_latest_checkpoint_is_the_highest_complete_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    model, optimizer = make_model()
    for step in (1_000_000, 999_999, 7):  # written last is not latest, nor the last by name
        save(tmp_path, step, model, optimizer)
    shutil.copytree(
        tmp_path / "checkpoints" / "step-000007", tmp_path / "checkpoints" / "step-2000000.tmp"
    )
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    prune_checkpoints(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-1000000", "step-2000000.tmp", "step-999999"]
    prune_checkpoints(tmp_path, 2)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_kill_while_pruning_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, *make_model())

    def kill(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", kill)
        prune_checkpoints(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000001.tmp", "step-000002", "step-000003"]


def test_a_checkpoint_that_cannot_be_deleted_yet_is_deleted_by_a_later_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that somebody still reads under another name, and with it the folder."""
    model, optimizer = make_model()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer)
    remove = os.rmdir

    def refuse(path: str | Path, **options: int) -> None:
        if Path(path).name == "step-000001.tmp":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        prune_checkpoints(tmp_path, 2)
        save(tmp_path, 4, model, optimizer)
        assert (tmp_path / "checkpoints" / "step-000001.tmp").is_dir()
        save(tmp_path, 1, model, optimizer)  # a folder of this draft is still there
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000004"
    (tmp_path / "checkpoints" / "step-000000.tmp").mkdir()
    save(tmp_path, 5, model, optimizer)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-00000{step}" for step in (1, 2, 3, 4, 5)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_resumed_run_keeps_no_file_of_its_checkpoint_open(tmp_path: Path) -> None:
    model, optimizer = make_model()
    train(model, optimizer, range(1))
    folder = save(tmp_path, 1, model, optimizer)
    other, other_optimizer = make_model(seed=1)
    load_trainer(folder, other, other_optimizer, MANIFEST)
    assert_same(everything(other, other_optimizer), everything(model, optimizer))
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = make_model()
    train(model, optimizer, range(1))
    folder = save(tmp_path, 1, model, optimizer)
    damage_by_emptying(folder / "model.safetensors")
    train(model, optimizer, range(1, 2))
    save(tmp_path, 1, model, optimizer)
    other, other_optimizer = make_model(seed=1)
    load_trainer(folder, other, other_optimizer, MANIFEST)
    assert_same(everything(other, other_optimizer), everything(model, optimizer))
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]


FOREIGN = {
    "stage": replace(MANIFEST, stage="grpo"),
    "preset": replace(MANIFEST, preset="pretrained"),
    "plant": replace(MANIFEST, plant=DoubleIntegrator(horizon=4)),
    "cost": replace(MANIFEST, cost=QuadraticCost(control=0.2)),
    "codec": replace(MANIFEST, codec=Codec(decimals=3)),
}


DIFFERENCES = {
    "stage": "stage must be grpo, got sft",
    "preset": "preset must be pretrained, got tiny",
    "plant": "plant.horizon must be 4, got 3",
    "cost": "cost.control must be 0.2, got 0.1",
    "codec": "codec.decimals must be 3, got 2",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_another_task_is_refused_and_changes_nothing(
    tmp_path: Path, name: str
) -> None:
    trained, trained_optimizer = make_model()
    train(trained, trained_optimizer, range(1))
    folder = save(tmp_path, 1, trained, trained_optimizer)
    model, optimizer = make_model(seed=1)
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as caught:
        load_trainer(folder, model, optimizer, FOREIGN[name])
    assert str(caught.value) == f"{folder}: {DIFFERENCES[name]}"
    assert_same(everything(model, optimizer), before)


def test_other_settings_of_the_run_are_no_reason_to_refuse(tmp_path: Path) -> None:
    model, optimizer = make_model()
    folder = save(tmp_path, 1, model, optimizer)
    other = replace(MANIFEST, config={"steps": 8, "lora_alpha": 8.0})  # and it has no adapters
    assert load_trainer(folder, model, optimizer, other) == 1


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, *make_model())
    model, optimizer = make_model(shape=replace(SHAPE, num_layers=1))
    with pytest.raises(ValueError, match=r"step-000001: num_layers must be 1, got 2$"):
        load_trainer(folder, model, optimizer, MANIFEST)


def test_moments_of_other_parameters_are_refused_and_change_nothing(tmp_path: Path) -> None:
    trained, trained_optimizer = make_model()
    train(trained, trained_optimizer, range(1))
    folder = save(tmp_path, 1, trained, trained_optimizer)
    path = folder / "trainer.safetensors"
    moments = load_file(path)
    model, optimizer = make_model(seed=1)
    before = everything(model, optimizer)
    name = "exp_avg_sq.blocks.1.mlp.down.weight"
    lacking = {key: value for key, value in moments.items() if key != name}
    cases = {
        f"{name} must have shape (8, 12), got none": lacking,
        "more must have shape none, got (1,)": {**moments, "more": torch.zeros(1)},
        f"{name} must have shape (8, 12), got (12, 8)": {
            **moments,
            name: moments[name].T.contiguous(),
        },
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError) as caught:
            load_trainer(folder, model, optimizer, MANIFEST)
        assert str(caught.value) == f"{path}: {message}"
        assert_same(everything(model, optimizer), before)
    save_file(moments, path)
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        load_trainer(folder, model, optimizer, MANIFEST)
    assert str(caught.value) == f"{path} must have step in its metadata, got {{'format': 'pt'}}"
    assert_same(everything(model, optimizer), before)


def test_a_published_model_loads_as_it_was(tmp_path: Path) -> None:
    model, _ = make_model()
    publish_model(tmp_path, model, TASK, MANIFEST, 4, -1.25)
    loaded, task, manifest = load_model(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert manifest == MANIFEST
    assert (task.plant, task.cost, task.codec) == (PLANT, COST, CODEC)
    assert task.max_completion_length == TASK.max_completion_length
    text = "position 0.50 velocity -0.30 controls 1.20 -3.00"
    assert task.tokenizer.encode(text) == TOKENIZER.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == TOKENIZER.encode(text)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
        "max_new_tokens": 4,
    }


def test_the_best_model_is_the_one_with_the_highest_score(tmp_path: Path) -> None:
    assert published(tmp_path) is None and is_best(tmp_path, 0, -1e9, [])
    publish_model(tmp_path, make_model()[0], TASK, MANIFEST, 4, 1.5)
    assert published(tmp_path) == (4, 1.5)
    for score, expected in ((1.75, True), (1.5, False), (1.25, False)):
        assert is_best(tmp_path, 5, score, [1.0]) == expected
    for step, score, before, expected in (
        (4, 1.25, [1.0, 1.25], True),  # step 4 is done again
        (3, 1.25, [1.0], True),
        (3, 1.25, [1.0, 1.375], False),  # less than what came before it
        (0, -1.0, [], True),  # the run begins anew
    ):
        assert is_best(tmp_path, step, score, before) == expected
    publish_model(tmp_path, make_model()[0], TASK, MANIFEST, 5, 1 / 3)
    assert published(tmp_path) == (5, 1 / 3)  # to the last bit, or it would beat itself
    assert not is_best(tmp_path, 6, 1 / 3, [])


def test_a_kill_while_publishing_leaves_one_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_model()[0], make_model(seed=1)[0]
    publish_model(tmp_path, old, TASK, MANIFEST, 1, 1.0)
    num_files = len(list(tmp_path.iterdir()))
    rename = Path.replace
    for num_renamed in range(num_files + 1):
        calls = 0

        def replace_some(path: Path, target: Path, allowed: int = num_renamed) -> Path:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Killed
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace_some)
            if num_renamed < num_files:
                with pytest.raises(Killed):
                    publish_model(tmp_path, new, TASK, MANIFEST, 2, 2.0)
            else:
                publish_model(tmp_path, new, TASK, MANIFEST, 2, 2.0)
        step, expected = (1, old) if num_renamed < num_files else (2, new)
        assert published(tmp_path) == (step, float(step))
        assert_same(dict(load_model(tmp_path)[0].state_dict()), dict(expected.state_dict()))
    assert len(list(tmp_path.iterdir())) == num_files


def test_a_manifest_survives_json() -> None:
    plant = DoubleIntegrator(dt=0.2, horizon=7, state_bound=2, start_bound=0.5, start_decimals=1)
    manifest = Manifest(
        "grpo", "pretrained", plant, QuadraticCost(control=0.3), Codec("words", 3),
        {"a": True, "b": 2, "c": 0.1, "d": "text"}, {"a": "flag"},
    )  # fmt: skip
    text = json.dumps(manifest.to_json())
    assert Manifest.from_json(json.loads(text)) == manifest


def changed(**values: object) -> dict[str, object]:
    return {**MANIFEST.to_json(), **values}


def changed_plant(**values: object) -> dict[str, object]:
    return changed(plant={**asdict(PLANT), **values})


def changed_codec(**values: object) -> dict[str, object]:
    return changed(codec={**asdict(CODEC), **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "manifest must be of type dict, got []"),
        (changed(stages=1), "manifest has unknown stages"),
        ({k: v for k, v in changed().items() if k != "preset"}, "manifest lacks preset"),
        (changed(stage="dpo"), "stage must be sft or grpo, got 'dpo'"),
        (changed(preset="Tiny"), "preset must be tiny or pretrained, got 'Tiny'"),
        (changed(config=[1]), "config must be of type dict, got [1]"),
        (changed(cost={}), "cost lacks control, position, terminal, velocity"),
        (changed_plant(mass=1.0), "plant has unknown mass"),
        (changed_plant(dt="0.1"), "plant.dt must be of type float, got '0.1'"),
        (changed_plant(horizon=3.5), "plant.horizon must be of type int, got 3.5"),
        (changed_plant(horizon=True), "plant.horizon must be of type int, got True"),
        (changed_plant(dt=-1.0), "dt must be between 0.001 and 1000, got -1.0"),
        (
            changed(cost=vars(QuadraticCost()) | {"control": 10**400}),
            f"cost.control must be of type float, got {10**400}",
        ),
        (
            changed_plant(control_bound=10**400),
            f"plant.control_bound must be of type float, got {10**400}",
        ),
        (changed_plant(horizon=10**7), "horizon must be between 1 and 1000, got 10000000"),
        (
            changed_plant(start_decimals=4),
            "start_bound must be at most 1000 steps of a decimal, got 0.8",
        ),
        (changed_codec(decimals=9), "decimals must be between 1 and 6, got 9"),
    ],
)
def test_a_foreign_manifest_is_refused_by_the_name_of_what_is_wrong(
    values: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / "minigrpo.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:
        load_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'minigrpo.json'}: {message}"


def test_a_prompt_of_other_tokens_than_in_training_is_refused(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, prompt_tokens=origin_prompt(TASK))
    publish_model(tmp_path, make_model()[0], TASK, manifest, 1, 1.0)
    assert load_model(tmp_path)[2] == manifest
    path = tmp_path / "minigrpo.json"
    saved = json.loads(path.read_text())
    saved["prompt_tokens"] = saved["prompt_tokens"][1:]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="must have the tokens that it had in training"):
        load_model(tmp_path)
    del saved["prompt_tokens"]  # as an earlier version wrote it
    path.write_text(json.dumps(saved))
    assert load_model(tmp_path)[2] == MANIFEST


def test_what_is_no_model_folder_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ValueError) as caught:
        load_model(missing)
    assert f"{missing} must be a model folder, found no such folder" in str(caught.value)
    assert str(caught.value).endswith("; train_sft.py makes one, train_grpo.py trains it on")
    with pytest.raises(ValueError, match=r"must be a model folder, found a file; train_sft.py"):
        load_model(Path(__file__))
    (tmp_path / "config.json").write_text("{}")  # a Hugging Face folder, but not one of ours
    with pytest.raises(ValueError, match=r"found no minigrpo.json in it; train_sft.py --model"):
        load_model(tmp_path)
    (tmp_path / "minigrpo.json").write_text("{")
    with pytest.raises(ValueError, match=r"minigrpo\.json: Expecting property name"):
        load_model(tmp_path)
    (tmp_path / "minigrpo.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"minigrpo\.json: .*recursion"):
        load_model(tmp_path)


def test_a_tokenizer_of_another_model_or_codec_is_refused(tmp_path: Path) -> None:
    publish_model(
        tmp_path, make_model()[0], TASK, replace(MANIFEST, codec=Codec(decimals=3)), 1, 1.0
    )
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    plan = "'-3.000 -2.000 -1.000'"
    message = f"{tmp_path}: the tokenizer must keep {plan}... as it is, got '<unk> <unk> <unk>'"
    assert str(caught.value) == message
    shutil.rmtree(tmp_path)
    small = make_model(shape=replace(SHAPE, vocab_size=100))[0]
    publish_model(tmp_path, small, TASK, MANIFEST, 1, 1.0)
    with pytest.raises(ValueError, match=f"at most the model's 100, got {len(TOKENIZER)}"):
        load_model(tmp_path)


def test_the_longest_completion_holds_every_plan() -> None:
    assert TASK.max_completion_length == 3 + 1  # numbers and EOS, each one token
    plant, codec = DoubleIntegrator(horizon=50), Codec("words", 3)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(
        models.BPE({"<eos>": 0} | {c: i + 1 for i, c in enumerate(sorted(alphabet))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    task: Task = make_task(plant, COST, codec, bytewise)
    plans = lqr_controls(plant.start_grid()[::1000], plant, COST, decimals=3)
    worst = torch.full((50,), -2.999)
    lengths = [len(encode_completion(bytewise, plan, codec)) for plan in [*plans, worst]]
    # a tenth more than the longest: other tokenizers merge the digits of some numbers only
    assert 1.09 * max(lengths) < task.max_completion_length < 1.11 * max(lengths)


def test_the_saved_settings_are_those_of_the_newest_save(tmp_path: Path) -> None:
    assert saved_config(tmp_path, MANIFEST.stage) is None
    model, optimizer = make_model()
    publish_model(tmp_path, model, TASK, MANIFEST, 1, 1.0)
    assert saved_config(tmp_path, MANIFEST.stage) == MANIFEST.config
    newer = replace(MANIFEST, config={"steps": 9})
    folder = save_checkpoint(tmp_path, 2, model, optimizer, TASK, newer)
    assert saved_config(tmp_path, MANIFEST.stage) == {"steps": 9} == load_manifest(folder).config


def test_a_damaged_published_model_is_found_before_the_run_goes_on(tmp_path: Path) -> None:
    model, optimizer = make_model()
    publish_model(tmp_path, model, TASK, MANIFEST, 1, 1.0)
    save(tmp_path, 2, model, optimizer)
    path = tmp_path / "model.safetensors"
    damage_by_cutting(path)
    with pytest.raises(ValueError, match=rf"{path} is not a readable .*; delete it, and the next"):
        saved_config(tmp_path, MANIFEST.stage)
    path.unlink()
    assert saved_config(tmp_path, MANIFEST.stage) == MANIFEST.config and is_best(
        tmp_path, 0, -1e9, []
    )


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigrpo.runs.rank", lambda: 1)
    save(tmp_path, 1, *make_model())
    publish_model(tmp_path, make_model()[0], TASK, MANIFEST, 1, 1.0)
    prune_checkpoints(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_all_ranks_resume_what_rank_0_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that tells late of a rename another rank might find an older one."""
    of_rank_zero = save(tmp_path / "of rank 0", 2, *make_model())
    save(tmp_path, 1, *make_model())
    monkeypatch.setattr(checkpoint, "from_rank_zero", lambda read: of_rank_zero)
    assert latest_checkpoint(tmp_path) == of_rank_zero


def grpo_flags(sft: Path, folder: Path) -> list[str]:
    flags = (
        f"--init {sft} --save-dir {folder} --device cpu --prompts-per-step 3 "
        "--num-minibatches 1 --group-size 2 --eval-cases 8 --temperature 1"
    )
    return flags.split()


def train_again(sft: Path) -> None:
    """Other weights under the same path."""
    weights = load_file(sft / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, sft / "model.safetensors", metadata={"format": "pt"})


def test_a_run_is_not_resumed_with_another_kl_reference(tmp_path: Path) -> None:
    """An SFT folder that was trained again while the run was away looks the same by its path."""
    sft = untrained_checkpoint(tmp_path / "sft")
    flags = grpo_flags(sft, tmp_path / "grpo")
    train_grpo.main([*flags, "--kl-beta", "0.1", "--steps", "1"])
    train_again(sft)
    with pytest.raises(ValueError, match="KL reference must be the one at hand"):
        train_grpo.main([*flags, "--resume", "--steps", "2"])
    train_grpo.main([*flags, "--resume", "--steps", "2", "--kl-beta", "0"])  # none is needed
    with pytest.raises(ValueError, match="KL reference must be the one at hand"):  # not forgotten
        train_grpo.main([*flags, "--resume", "--steps", "3", "--kl-beta", "0.1"])


def test_a_run_without_a_reference_so_far_may_get_that_it_began_from(tmp_path: Path) -> None:
    sft, folder = untrained_checkpoint(tmp_path / "sft"), tmp_path / "grpo"
    flags = grpo_flags(sft, folder)
    train_grpo.main([*flags, "--kl-beta", "0", "--steps", "1"])
    base = base_of(latest_checkpoint(folder))
    assert base == base_digest(load_transformer(sft))
    train_grpo.main([*flags, "--resume", "--steps", "2", "--kl-beta", "0.1"])
    assert base_of(latest_checkpoint(folder)) == base
    shutil.rmtree(folder)
    train_grpo.main([*flags, "--kl-beta", "0", "--steps", "1"])
    train_again(sft)
    with pytest.raises(ValueError, match="KL reference must be the one at hand"):
        train_grpo.main([*flags, "--resume", "--steps", "2", "--kl-beta", "0.1"])


def test_a_run_that_saved_nothing_is_resumed_with_the_settings_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its first evaluation, say, which takes long with a large model."""
    run = tmp_path / "run"
    flags = (
        "--horizon 2 --num-demonstrations 4 --batch-size 2 --width 8 --mlp-width 8 --steps 1 "
        f"--eval-cases 8 --device cpu --save-dir {run}"
    ).split()

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    for more in (["--seed", "3"], ["--resume", "--seed", "7"]):  # the last attempt counts
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(training, "validation_metrics", killed)
            train_sft.main([*flags, *more])
        assert ("nothing to resume" in capsys.readouterr().out) == ("--resume" in more)
    assert not (run / "minigrpo.json").exists()
    with pytest.raises(ValueError, match="of stage grpo to be resumed"):
        saved_config(run, "grpo")
    train_sft.main(["--save-dir", str(run), "--resume", "--batch-size", "3"])
    manifest = load_manifest(run)
    assert (manifest.plant.horizon, manifest.config["seed"], manifest.config["width"]) == (2, 7, 8)
    assert manifest.config["batch_size"] == 3 and manifest.sources["seed"] == "resume"

    (run / "provenance.json").write_text("{}")
    (run / "minigrpo.json").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"provenance.json must be the record of a run, got Key"):
        saved_config(run, "sft")


def test_a_model_without_a_manifest_is_to_be_trained_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no minigrpo.json in it; train_sft.py makes one"):
        load_manifest(tmp_path)
    for name in ("step-000001", "step-000002", "step-000003.tmp"):  # the folder of what was meant
        (tmp_path / name).mkdir()
        (tmp_path / name / "minigrpo.json").write_text("{}")
    with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'step-000002'}\\?$"):
        load_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"train_sft.py --model {tmp_path} --save-dir OTHER"):
        load_manifest(tmp_path)
