"""Models and training states on disk: complete or absent, never pickled, refused if foreign.

A model folder is a Hugging Face folder (config.json, model.safetensors, generation_config.json,
tokenizer) with `minigrpo.json`, the manifest: what the model was trained for and how. A checkpoint,
checkpoints/step-000100, is a model folder plus `trainer.safetensors`: AdamW's moments by parameter
name. Its step is in the metadata of model.safetensors. A run publishes its best model into the run
folder itself.

What is written is written beside its place, synced, then renamed: the rename marks completeness.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from minigrpo.config import PRESETS, GRPOConfig, Resolved, SFTConfig, Value
from minigrpo.data import SFTBatch, Task, make_task
from minigrpo.distributed import collected, cut_like, from_rank_zero, rank, whole
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import (
    load_shape,
    load_transformer,
    save_tensors,
    save_transformer,
    typed,
)
from minigrpo.lora import adapters, merged_weights
from minigrpo.lqr import QuadraticCost
from minigrpo.prompts import Codec, wording
from minigrpo.rollout import Rollout
from minigrpo.runs import on_rank_zero, printable
from minigrpo.tokenizer import (
    encode_completion,
    encode_prompt,
    load_tokenizer,
    pad_id,
    save_tokenizer,
)
from minigrpo.transformer import Transformer, TransformerConfig

SomeConfig = TypeVar("SomeConfig", SFTConfig, GRPOConfig)
Record = TypeVar("Record", DoubleIntegrator, QuadraticCost, Codec)
Described = TypeVar("Described", "Manifest", TransformerConfig)
ADAPTER = "adapter."


@dataclass(frozen=True)
class Manifest:
    """What a model was trained for and how: minigrpo.json."""

    stage: Literal["sft", "grpo"]
    preset: str
    plant: DoubleIntegrator
    cost: QuadraticCost
    codec: Codec
    config: dict[str, Value]  # resolved settings of the run
    sources: dict[str, str]  # where each of them came from
    # Of the start at rest at the origin: chat template and tokenizer have a say too.
    prompt_tokens: list[int] | None = None  # None: an earlier version did not keep them

    @classmethod
    def of_run(
        cls, stage: Literal["sft", "grpo"], preset: str, task: Task, resolved: Resolved[SomeConfig]
    ) -> Manifest:
        """That of a model which a run with these settings trains for this task."""
        settings = vars(resolved.config).copy()
        task_parts = task.plant, task.cost, task.codec
        return cls(stage, preset, *task_parts, settings, resolved.sources, origin_prompt(task))

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"wording": wording(self.plant, self.codec)}

    @classmethod
    def from_json(cls, values: object) -> Manifest:
        """Every key is known and none is missing, or a ValueError says which.

        So is a model that was trained on prompts in other words than today's.
        """
        wanted = {item.name for item in fields(cls)} | {"wording"}
        earlier = {"prompt_tokens": None} | typed(dict, values, "manifest")
        found = _checked_keys(earlier, wanted, "manifest")
        presets = sorted({name for name, _ in PRESETS}, reverse=True)
        for name, known in (("stage", ["sft", "grpo"]), ("preset", presets)):
            if found[name] not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {found[name]!r}")
        for name in ("config", "sources"):
            typed(dict, found[name], name)
        found["plant"] = _record(DoubleIntegrator, found["plant"], "plant")
        found["cost"] = _record(QuadraticCost, found["cost"], "cost")
        found["codec"] = _record(Codec, found["codec"], "codec")
        said = found.pop("wording")
        manifest = cls(**found)  # type: ignore[arg-type]  # checked above
        if said != (says := wording(manifest.plant, manifest.codec)):
            raise ValueError(
                f"prompts must be worded as in training, {said!r}; this version says {says!r}: "
                "train again, or use the commit in its provenance.json"
            )
        return manifest


def origin_prompt(task: Task) -> list[int]:
    """Tokens of the prompt of the start at rest at the origin."""
    state = torch.zeros(2, dtype=torch.float64)
    return encode_prompt(task.tokenizer, state, task.plant, task.codec)


def differing(wanted: Described, got: Described, names: Sequence[str] = ()) -> str:
    """What two records disagree in, of these of their fields or of all; empty: in nothing."""
    ours, theirs = asdict(wanted), asdict(got)
    found = []
    for name in names or ours:
        pairs = {name: (ours[name], theirs[name])}
        if isinstance(ours[name], dict) and theirs[name] is not None:  # a record
            pairs = {f"{name}.{key}": (ours[name][key], theirs[name][key]) for key in ours[name]}
        found += [f"{key} must be {a}, got {b}" for key, (a, b) in pairs.items() if a != b]
    return "; ".join(found)


def _checked_keys(values: object, expected: set[str], place: str) -> dict[str, object]:
    found = typed(dict, values, place)
    if unknown := found.keys() - expected:
        raise ValueError(f"{place} has unknown {', '.join(sorted(unknown))}")
    if missing := expected - found.keys():
        raise ValueError(f"{place} lacks {', '.join(sorted(missing))}")
    return found.copy()


def _record(kind: type[Record], values: object, place: str) -> Record:
    kinds = {name: type(default) for name, default in asdict(kind()).items()}
    found = _checked_keys(values, set(kinds), place)
    return kind(**{k: typed(kinds[k], value, f"{place}.{k}") for k, value in found.items()})


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a model folder. ValueError: there is none, or it is not one of ours."""
    path = folder / "minigrpo.json"
    if not path.is_file():
        found = "no minigrpo.json in it" if folder.is_dir() else "no such folder"
        found = "a file" if folder.is_file() else found
        advice = "train_sft.py makes one, train_grpo.py trains it on"
        inner = sorted(other.parent for other in folder.glob("*/minigrpo.json"))
        complete = [other for other in inner if other.suffix != ".tmp"]  # no draft of a kill
        if (folder / "config.json").is_file():
            advice = f"train_sft.py --model {folder} --save-dir OTHER makes one of this model"
        elif complete:
            advice = f"did you mean {complete[-1]}?"
        raise ValueError(f"{folder} must be a model folder, found {found}; {advice}")
    try:
        return Manifest.from_json(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def saved_config(folder: Path, stage: str) -> dict[str, Value] | None:
    """The settings of the run in this folder at its newest checkpoint or, if it has none yet, at
    its start; None where none was begun.

    ValueError: it is of another stage, or its published model is damaged, which the next evaluation
    would stumble over.
    """
    newest, begun = _latest(folder), folder / "provenance.json"
    if newest is None and begun.is_file():
        try:
            record = typed(dict, json.loads(begun.read_text()), "provenance")
            kind, config = record["stage"], typed(dict, record["config"], "config")
        except (ValueError, KeyError, RecursionError) as error:
            found = f"{begun} must be the record of a run, got {error!r}"
            raise ValueError(f"{found}; --overwrite begins anew") from error
    elif (place := newest or folder).joinpath("minigrpo.json").is_file():
        manifest = load_manifest(place)
        kind, config = manifest.stage, manifest.config
    else:
        return None
    if kind != stage:
        raise ValueError(
            f"save_dir must hold a run of stage {stage} to be resumed, {folder} holds one of "
            f"{kind}: choose another"
        )
    try:
        published(folder)
    except ValueError as error:
        advice = "delete it, and the next evaluation publishes the model that it has then"
        raise ValueError(f"{error}; {advice}") from error
    return config


def load_task(folder: Path) -> tuple[TransformerConfig, Task, Manifest]:
    """All of a model folder but its weights. ValueError: missing, damaged, foreign."""
    manifest, shape = load_manifest(folder), load_shape(folder)
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    try:
        task = make_task(manifest.plant, manifest.cost, manifest.codec, tokenizer)
        tokens = origin_prompt(task)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if manifest.prompt_tokens not in (None, tokens):
        raise ValueError(
            f"{folder}: a prompt must have the tokens that it had in training, got others: its "
            "tokenizer or chat template was changed, or is read differently by another version of "
            "transformers (provenance.json has that of the training)"
        )
    return shape, task, manifest


def load_model(folder: Path) -> tuple[Transformer, Task, Manifest]:
    """The model (float32, CPU), its task, its manifest. ValueError: missing, damaged, foreign."""
    _, task, manifest = load_task(folder)
    return load_transformer(folder), task, manifest


def publish_model(
    folder: Path, model: Transformer, task: Task, manifest: Manifest, step: int, score: float
) -> None:
    """Make this the folder's model; called on every rank. A reader gets the old one or this one.

    The weights come last, by one rename, and carry the step and the score that they stand for. The
    files beside them don't change during a run.
    """
    weights = collected(merged_weights(model))
    draft = folder / "publish.tmp"

    def write() -> None:
        with _drafted(draft):
            metadata = {"step": str(step), "score": repr(score)}
            _write_model(draft, weights, model, task, manifest, metadata)
        files = [path for path in draft.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "model.safetensors"):
            place = folder / path.relative_to(draft)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
        shutil.rmtree(draft)
        _sync(folder)

    on_rank_zero(write)


def published(folder: Path) -> tuple[int, float] | None:
    """Step and score of the folder's model, or None before the first."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return None
    metadata = _metadata(path, "step", "score")
    return int(metadata["step"]), float(metadata["score"])


def step_of(folder: Path) -> int | None:
    """The step that a folder's weights are of; None: another program wrote them since."""
    path = folder / "model.safetensors"
    step = _metadata(path).get("step", "") if path.is_file() else ""
    return int(step) if step.isdecimal() else None


def is_best(folder: Path, step: int, score: float, before: Sequence[float]) -> bool:
    """Shall the model of this step be published, with this score, after those `before`?

    If it beats the published one. That may be of this step or a later one, which a resumed run does
    again, perhaps by other settings: then a score as good as all before it replaces what no line
    of metrics.jsonl stands for. Rank 0 looks, so that ranks with one score agree.
    """
    best = from_rank_zero(lambda: published(folder))
    if best is None or score > best[1]:
        return True
    return best[0] >= step and score >= max(before, default=score)


def save_checkpoint(
    run_folder: Path,
    step: int,
    model: Transformer,
    optimizer: Optimizer,
    task: Task,
    manifest: Manifest,
    base: str | None = None,
) -> Path:
    """Write checkpoints/step-000100, all or nothing; called on every rank.

    `base` is the `base_digest` of the frozen model that the run must find again: the KL reference,
    or, with adapters, the model itself. OSError: a full disk, say; what was saved before is intact.
    """
    own = [(f"{ADAPTER}{name}", value) for name, value in adapters(model).items()]
    weights, trained = collected(merged_weights(model)), collected(own)
    trained |= collected(_moments(model, optimizer))
    described = {} if base is None else {"base": base}
    final = run_folder / "checkpoints" / f"step-{step:06d}"
    draft, replaced = final.with_suffix(".tmp"), final.with_suffix(".old.tmp")

    def write() -> None:
        for stale in final.parent.glob("*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)  # see prune_checkpoints
        with _drafted(draft):
            _write_model(draft, weights, model, task, manifest, {"step": str(step)})
            save_tensors(trained, draft / "trainer.safetensors", described)
        if final.exists():  # damaged, or saved twice
            final.rename(replaced)
        draft.rename(final)
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    on_rank_zero(write)
    return final


def prune_checkpoints(run_folder: Path, keep_last: int) -> None:
    """Delete all but the newest; called on every rank, after the newest was saved.

    On NFS a file that a process still reads, an evaluation perhaps, keeps its folder from being
    deleted; a later save tries again.
    """

    def delete() -> None:
        for path in _complete(run_folder)[:-keep_last]:
            doomed = path.with_suffix(".tmp")  # half deleted must not look complete
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    on_rank_zero(delete)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that can be read, None if there is none yet. Called on every rank.

    Damaged ones are reported; ValueError: all are, and to begin anew would cut the logs away.
    """
    return from_rank_zero(lambda: _latest(run_folder))


def _latest(run_folder: Path) -> Path | None:
    found = _complete(run_folder)
    for path in reversed(found):
        try:
            load_manifest(path)
            load_shape(path)
            for name in ("model.safetensors", "trainer.safetensors"):
                _metadata(path / name)
        except ValueError as error:
            print(printable(f"{path} is damaged and not used: {error}"), file=sys.stderr)
        else:
            return path
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {run_folder} can be read: put one back, or "
            "begin anew with --overwrite"
        )
    return None


def _complete(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints, oldest first; a `.tmp` is none."""
    found = (run_folder / "checkpoints").glob("step-*")
    complete = [path for path in found if path.name[5:].isdecimal()]
    return sorted(complete, key=lambda path: int(path.name[5:]))


def check_tokens(folder: Path, task: Task) -> None:
    """ValueError: this checkpoint's tokenizer writes the task's text in other tokens."""
    theirs = load_task(folder)[1].tokenizer
    plan = torch.linspace(-task.plant.control_bound, task.plant.control_bound, task.plant.horizon)
    state = torch.full((2,), task.plant.start_bound, dtype=torch.float64)

    def words_of(tokenizer: PreTrainedTokenizerFast) -> object:
        prompt = encode_prompt(tokenizer, state, task.plant, task.codec)
        return prompt, encode_completion(tokenizer, plan, task.codec), tokenizer.get_vocab()

    if words_of(theirs) != words_of(task.tokenizer):
        raise ValueError(f"{folder}: its tokenizer must be that of the model the run starts from")


def load_trainer(
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    manifest: Manifest,
    base: str | None = None,
) -> int:
    """Put a checkpoint's weights and AdamW state in place, bit for bit, and return its step.

    ValueError, with nothing changed: it is damaged, or was made for another task, model or base.
    """
    saved = load_manifest(folder)
    if differ := differing(manifest, saved, ("stage", "preset", "plant", "cost", "codec")):
        raise ValueError(f"{folder}: {differ}")
    loaded = load_transformer(folder)
    if differ := differing(model.config, loaded.config):
        raise ValueError(f"{folder}: {differ}")
    step = int(_metadata(folder / "model.safetensors", "step")["step"])
    path = folder / "trainer.safetensors"
    described = _metadata(path)
    if base is not None and (got := described.get("base", base)) != base:
        raise ValueError(
            f"{folder}: the base model or KL reference must be the one at hand, sha256 "
            f"{base}, got {got}; was the folder it came from trained again?"
        )
    tensors = load_file(path)
    _check_trainer(tensors, model, path)
    own = adapters(model)
    weights = {name: tensors.pop(f"{ADAPTER}{name}") for name in own} or loaded.state_dict()
    alpha, theirs = (made.config.get("lora_alpha") for made in (manifest, saved))
    if own and theirs != alpha:
        raise ValueError(f"{folder}: lora_alpha must be {alpha}, got {theirs}")
    places = model.state_dict()
    cut = {name: cut_like(value, places[name]) for name, value in weights.items()}
    model.load_state_dict(cut, strict=not own)
    _put_moments(tensors, model, optimizer)
    return step


def base_of(folder: Path) -> str | None:
    """The `base` that a checkpoint was saved with."""
    return _metadata(folder / "trainer.safetensors").get("base")


def _check_trainer(tensors: dict[str, Tensor], model: Transformer, path: Path) -> None:
    """ValueError: other adapters than the model's, or AdamW's moments are not of what it trains."""
    shapes = {f"{ADAPTER}{name}": tuple(value.shape) for name, value in adapters(model).items()}
    if any(not name.startswith(ADAPTER) for name in tensors):  # there are none before a first step
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shape = tuple(parameter.shape)
                shapes |= {f"exp_avg.{name}": shape, f"exp_avg_sq.{name}": shape}
                shapes[f"step.{name}"] = ()
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(shapes.keys() | found.keys()):
        wanted, got = (sizes.get(name, "none") for sizes in (shapes, found))
        if got != wanted:
            is_adapter = name.startswith(ADAPTER)
            advice = "; lora_rank and lora_targets are those of the run" if is_adapter else ""
            raise ValueError(f"{path}: {name} must have shape {wanted}, got {got}{advice}")


def base_digest(model: Transformer) -> str:
    """SHA-256 over a model without its adapters, bit for bit; called on every rank."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            digest.update(name.encode())
            digest.update(whole(parameter).detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _moments(model: Transformer, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """AdamW's tensors as `exp_avg.blocks.0...`; none before the first step."""
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            yield f"{kind}.{name}", value


def _put_moments(moments: dict[str, Tensor], model: Transformer, optimizer: Optimizer) -> None:
    """`_moments`, in place of what the optimizer has.

    Copies, for the optimizer keeps what it is given, and a tensor of a file keeps the file open.
    """
    optimizer.state.clear()
    for name, value in moments.items():
        kind, _, path = name.partition(".")
        parameter = model.get_parameter(path)
        part = cut_like(value, parameter)
        optimizer.state[parameter][kind] = part.to(parameter.device, copy=True)


def save_batch(run_folder: Path, step: int, batch: Rollout | SFTBatch) -> None:
    """Keep a batch whose gradient was not finite, each rank its rows, to look into it."""
    folder = run_folder / "skipped"
    folder.mkdir(exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in _tensors_of(batch)}
    save_file(tensors, folder / f"step-{step:06d}-rank-{rank()}.safetensors")


def _tensors_of(record: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Those of a record and of the records in it, as credit.choices.values."""
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif is_dataclass(value):
            yield from _tensors_of(value, f"{prefix}{name}.")


def _write_model(
    folder: Path,
    weights: dict[str, Tensor],
    model: Transformer,
    task: Task,
    manifest: Manifest,
    metadata: dict[str, str],
) -> None:
    generation = {
        "max_new_tokens": task.max_completion_length,
        "eos_token_id": int(task.tokenizer.eos_token_id),
        "pad_token_id": pad_id(task.tokenizer),
    }
    for name, record in {"minigrpo": manifest.to_json(), "generation_config": generation}.items():
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    save_tokenizer(task.tokenizer, folder)
    save_transformer(model, folder, weights, metadata)


@contextmanager
def _drafted(folder: Path) -> Iterator[None]:
    """A new folder to write in, synced at the end; if writing fails it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
        _sync(*folder.rglob("*"), folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        message = f"{folder} could not be written ({error}); what was saved before is intact"
        raise OSError(message) from error


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # There are file systems that sync files alone and answer so for a folder.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _metadata(path: Path, *expected: str) -> dict[str, str]:
    """What a safetensors file says of itself; opening it finds out if it is missing or cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    for name in expected:
        if name not in metadata:
            raise ValueError(f"{path} must have {name} in its metadata, got {metadata}")
    return metadata
