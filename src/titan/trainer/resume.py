"""Going on with a run, or beginning one from weights that are there already."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan.checkpoint.files import TensorInfo, read_metadata, tensor_infos
from titan.checkpoint.first_rank import on_first_rank
from titan.checkpoint.hugging_face import is_hugging_face
from titan.checkpoint.manifest import NAME, Damaged, Manifest
from titan.checkpoint.state import (
    CURSORS,
    MODEL,
    OPTIMIZER,
    create_optimizer_state,
    fill_copies,
    optimizer_state,
    rng_name,
    set_rng_state,
    weights_state,
)
from titan.checkpoint.store import CONFIG, CheckpointStore, Saved
from titan.config.continuation import changed_keys, refused_keys
from titan.config.initial_load import excused_keys, fits_any
from titan.config.keys import override
from titan.config.load import load_config, load_model
from titan.config.schema import CheckpointContent
from titan.errors import CheckpointError, ConfigError, Problem
from titan.log import logger
from titan.trainer.build import Trainer
from titan.trainer.hugging_face import compare_models, load_hugging_face
from titan.trainer.saving import describe_data
from titan.trainer.state import TrainState

T = TypeVar("T")


def resume(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint of the run, if it has one; else take `initial_load`, if that is set.

    Raises:
        CheckpointError: If there are checkpoints but none can be used, or one does not fit.
        ConfigError: If the newest was saved by a run that this config would not continue.
    """
    settings, store = trainer.config.checkpoint, trainer.store
    saved = None
    if store is not None:
        run = on_first_rank(trainer.directory.read_identity)
        saved = store.find(run)
        _identify(trainer, run, saved)
        if saved is not None:
            _check_continues(trainer, saved)
            load_checkpoint(trainer, store, saved.path, saved.manifest, CheckpointContent.all)
            trainer.resumed_step = trainer.state.step
            logger.info(f"resumed at step {trainer.state.step}")
        elif step := on_first_rank(trainer.directory.last_saved_step):
            raise CheckpointError(
                f"{trainer.directory.path} had saved step {step}, but {store.folder} holds no checkpoint any more\n"
                "  Try  run.dir=ANOTHER   to begin anew, or bring the checkpoints back"
            )
    if saved is None and settings.initial_load is not None:
        load_initial(trainer, Path(settings.initial_load))


def load_checkpoint(
    trainer: Trainer,
    store: CheckpointStore,
    folder: Path,
    manifest: Manifest,
    content: CheckpointContent,
    exclude: Sequence[str] = (),
) -> None:
    """Fill the trainer from a checkpoint that has been verified, on any mesh.

    Args:
        trainer: Built.
        store: Whose ranks load together.
        folder: The checkpoint's.
        manifest: Its.
        content: What to take; all takes optimizer, generators, step and tokens too.
        exclude: Patterns of names of tensors to leave alone.

    Raises:
        CheckpointError: If it does not fit.
    """
    takes_all = content is CheckpointContent.all
    metadata = read_metadata(folder)
    infos = tensor_infos(metadata)
    has_optimizer = any(name.startswith(OPTIMIZER) and not fits_any(name, exclude) for name in infos)  # not at step 0
    state = weights_state(trainer.parameters)
    if takes_all and has_optimizer:
        if not trainer.optimizer.state:
            create_optimizer_state(trainer.optimizer)
        state |= optimizer_state(trainer.parameters, trainer.optimizer)
    elif takes_all:  # a run that goes back to its first step has taken others since
        trainer.optimizer.state.clear()
    state = {name: tensor for name, tensor in state.items() if not fits_any(name, exclude)}
    cursors = _cursors(trainer, manifest, infos, exclude) if takes_all else {}
    prefixes = (MODEL, OPTIMIZER, *cursors) if takes_all else (MODEL,)

    def is_wanted(name: str) -> bool:
        return name.startswith(prefixes) and not fits_any(name, exclude)

    # the generators are those of ranks; on another mesh there are others, and nothing that they draw is missed
    is_same_mesh = takes_all and manifest.mesh == trainer.mesh.degrees
    generators = _generators(infos) if is_same_mesh and not exclude else {}
    # weights that another run begins from may have any format, moments that this one keeps in another too
    store.load(
        folder,
        state | cursors | generators,
        is_wanted,
        can_cast=lambda name: not takes_all or name.startswith(OPTIMIZER),
        metadata=metadata,
    )
    if line := _describe_conversion(state, infos):
        logger.info(line)
    fill_copies(trainer.parameters, trainer.optimizer if takes_all and has_optimizer else None)
    trainer.weights_changed()
    for tensor in generators.values():
        set_rng_state(tensor)
    if cursors:
        trainer.data.cursors = cursors[CURSORS].numpy()
    if takes_all:
        trainer.state = TrainState(step=manifest.step, tokens=manifest.tokens)


def load_initial(trainer: Trainer, folder: Path) -> None:
    """Begin a run from a checkpoint of another, or from a Hugging Face folder.

    Raises:
        CheckpointError: If it is damaged or does not fit.
    """
    settings, model = trainer.config.checkpoint, trainer.config.model
    without = f", without {', '.join(settings.exclude)}" * bool(settings.exclude)
    excused = excused_keys(settings.exclude)
    if on_first_rank(lambda: is_hugging_face(folder)):
        wanted = [named for named in trainer.parameters if not fits_any(f"{MODEL}{named[0]}", settings.exclude)]
        differences = load_hugging_face(wanted, folder, model, excused)
        trainer.weights_changed()
        what = "weights"
    else:
        store = trainer.store or CheckpointStore(folder.parent, settings)
        manifest = verify_foreign(store, folder)
        if manifest.content == "weights" and settings.initial_content is CheckpointContent.all:
            raise CheckpointError(
                f"{folder} holds weights alone, but checkpoint.initial_content = all\n"
                "  Try  checkpoint.initial_content=weights"
            )
        path = folder / CONFIG
        differences = compare_models(model, load_model(path), folder, excused) if path.is_file() else []
        load_checkpoint(trainer, store, folder, manifest, settings.initial_content, settings.exclude)
        what = "weights" if settings.initial_content is CheckpointContent.weights else f"all of step {manifest.step}"
    for line in differences:
        logger.info(line)
    logger.info(f"initial load: {what} of {folder}{without}")


def verify_foreign(store: CheckpointStore, folder: Path) -> Manifest:
    """Return the manifest of a checkpoint that is not this run's, once all ranks together have verified it.

    One without a manifest, of another program that writes PyTorch's format, is taken for its weights, unverified.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not on_first_rank((folder / NAME).exists):
        infos = tensor_infos(read_metadata(folder))
        if not any(name.startswith(MODEL) for name in infos):
            raise CheckpointError(f"{folder} has no tensor whose name begins with {MODEL}")
        logger.warning(f"{folder} has no {NAME}: it cannot be verified")
        return Manifest(0, 0, "weights", "", {})
    try:
        manifest = Manifest.read(folder)
    except Damaged as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    if wrong := store.check(Saved(manifest, folder)):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(wrong)}")
    return manifest


def _describe_conversion(state: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> str:
    """Say that the optimizer's state was saved in another format than it is kept in; nothing where it was not."""
    pairs = {
        (infos[name].dtype, tensor.dtype)
        for name, tensor in state.items()
        if name.startswith(OPTIMIZER) and infos[name].dtype != tensor.dtype
    }
    changes = [" to ".join(str(dtype).removeprefix("torch.") for dtype in pair) for pair in sorted(pairs, key=str)]
    return f"the optimizer's moments were converted from {', '.join(changes)}" if changes else ""


def _generators(infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
    """Return something to read this rank's generators into, if the checkpoint has them."""
    name = rng_name(dist.get_rank())
    return {name: torch.zeros(infos[name].shape, dtype=torch.uint8)} if name in infos else {}


def _cursors(
    trainer: Trainer, manifest: Manifest, infos: dict[str, TensorInfo], exclude: Sequence[str]
) -> dict[str, Tensor]:
    """Return something to read the streams' cursors into, if they are of the data that this run streams."""
    if trainer.data.cursors is None or fits_any(CURSORS, exclude):
        return {}
    if manifest.data.get("digest") != trainer.data.identity["digest"]:
        logger.info(f"step {manifest.step} was trained on other data: this run's begins at its beginning")
        return {}
    if CURSORS not in infos:
        raise CheckpointError(f"step {manifest.step} has no {CURSORS}, so nobody knows where its data goes on")
    return {CURSORS: torch.zeros(trainer.data.cursors.shape, dtype=torch.int64)}


def _check_continues(trainer: Trainer, saved: Saved) -> None:
    """Hold the config and the data of a checkpoint against the run's."""
    before = load_config(saved.path / CONFIG)
    changes = changed_keys(before, trainer.config)
    if refused := refused_keys(changes):
        lines = [f"{override(key, changes[key][1])}, but it has {override(key, changes[key][0])}" for key in refused]
        raise ConfigError(
            [
                Problem(
                    f"{saved.path} was saved by a run that this config does not continue",
                    "\n".join(lines),
                    " ".join(override(key, changes[key][0]) for key in refused) + "   or  run.dir=ANOTHER",
                )
            ]
        )
    now = describe_data(trainer)
    if saved.manifest.data.get("digest") != now["digest"]:
        raise ConfigError(
            [
                Problem(
                    f"data.path = {trainer.config.data.path} has changed since step {saved.manifest.step} was saved",
                    _describe_change(saved.manifest.data.get("tokens"), now["tokens"]),
                    f"run.dir=ANOTHER checkpoint.initial_load={saved.path} checkpoint.initial_content=all",
                )
            ]
        )


def _describe_change(before: int | None, now: int | None) -> str:
    if before is None or now is None:
        return "Its files are others, or of another size, so every row would be another."
    return f"It made {before:,} tokens then and makes {now:,} now, so every row would be another."


def _identify(trainer: Trainer, run: str, saved: Saved | None) -> None:
    """Give the run an identity, which its checkpoints carry: the one it has, or that of what it goes on from."""
    new = run or (saved.manifest.run if saved is not None else "") or uuid.uuid4().hex
    trainer.run_identity = on_first_rank(lambda: new)
    if not run and dist.get_rank() == 0:
        trainer.directory.write_identity(trainer.run_identity)
