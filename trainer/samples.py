"""Videos of fixed prompts while a model trains, by the sampler of `trainer.sample`.

All processes call the model, as it may be spread over them, each for its part of the prompts; the
first one alone has the VAE, in the machine's memory but while it decodes, and writes. Noise comes
from generators of its own, and nothing of the training is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from manifests.shards import Index
from trainer.config import FamilySettings, ModelConfig, SettingsError, TrainSettings
from trainer.data import Loader
from trainer.families import Family
from trainer.losses import Traits, shift_of
from trainer.models import Text, VideoDiT
from trainer.pictures import check_vae, decode, load_vae, save
from trainer.prompts import text_of
from trainer.sample import denoise
from trainer.trackers import Trackers, first_line
from trainer.validation import by_draw

FOLDER = "samples"  # in the output folder

T = TypeVar("T")


class Samples:
    """The prompts of a run, with all that videos of them take.

    Raises SettingsError where the VAE, the text encoder or the clips to go on from are missing, or
    others than the run's. Loading draws random numbers: it is built before the model's weights are.
    """

    def __init__(
        self,
        settings: TrainSettings,
        config: ModelConfig,
        held: Index | None,
        accelerator: Accelerator,
    ) -> None:
        self._settings, self._config, self._accelerator = settings, config, accelerator
        chosen = settings.samples
        clips: Index | None = None
        if isinstance(chosen.prompts, int):
            assert held is not None  # settings without are refused
            clips = captioned(held, config.shape, chosen.prompts)
            self.prompts: list[str] = clips.table.column("caption").to_pylist()
        else:
            self.prompts = list(chosen.prompts)
        # As many for each process: the last prompt fills up.
        world, rank = accelerator.num_processes, accelerator.process_index
        each, last = -(-len(self.prompts) // world), len(self.prompts) - 1
        mine = [min(n, last) for n in range(rank * each, (rank + 1) * each)]
        at_once = max(1, settings.batch_size // 2)  # rows with and without the prompt: a batch
        self._groups = [mine[n : n + at_once] for n in range(0, each, at_once)]
        self._first = self._first_frames(clips) if chosen.first_frame and clips else None
        self._texts = of_first(accelerator, self._read)
        if accelerator.is_main_process:
            self._vae = load_vae(self._vae_folder, config.latents)

    @property
    def _vae_folder(self) -> str:
        return str(self._settings.samples.vae or self._config.latents["vae"])

    def check(self, model: VideoDiT | Family) -> None:
        """Raises SettingsError where the model needs a picture that it would not get."""
        if isinstance(model, Family) and model.needs_picture and self._first is None:
            raise SettingsError(
                f"train.samples.prompts are prompts alone, but this {model.kind} goes on from a "
                "picture: set train.samples.first_frame, and prompts to a number of clips that "
                "are held back, or leave train.samples out"
            )

    def make(
        self,
        model: nn.Module,
        traits: Traits,
        step: int,
        tracked: Trackers,
        say: Callable[[str], None],
    ) -> None:
        """Samples with the model as it is, writes, and shows it to the trackers. All processes
        call it. What fails once the model has done its part is said, and ends no training."""
        latents = self._sample(model, traits)
        if not self._accelerator.is_main_process:
            return
        chosen = self._settings.samples
        file = self._settings.output / FOLDER / f"step_{step:06}.{chosen.format}"
        fps = self._config.latents["sampling"].get("fps", 16)
        try:
            frames = save(file, self._decode(latents), self.prompts, fps)
        except Exception as error:  # noqa: BLE001  a VAE, a codec and a disk each have their own
            reason = first_line(error)
            say(f"step {step}: no samples, as they cannot be decoded or written: {reason}")
            return
        say(f"step {step}/{self._settings.steps}  samples in {file}")
        tracked.show(FOLDER, file, frames, fps, self.prompts, step)

    def _sample(self, model: nn.Module, traits: Traits) -> Tensor:
        """Latents of all prompts."""
        device, chosen = self._accelerator.device, self._settings.samples
        training = model.training
        model.eval()
        shift = shift_of(self._settings, traits.tokens(self._config.shape))
        made = []
        for group in self._groups:
            first = self._first[group].to(device) if self._first is not None else None
            text = of_prompts(self._texts, group, len(self.prompts), device)
            seeds = [chosen.seed] * len(group)
            z = denoise(
                model, self._config, text, seeds, chosen.steps, chosen.guidance, device, first,
                shift=shift,
            )  # fmt: skip
            if first is not None and traits.clean_frame:
                z[:, :, :1] = first  # it stood there, whatever the model made of it
            made.append(z)
        model.train(training)
        gathered: Tensor = self._accelerator.gather(torch.cat(made))
        return gathered[: len(self.prompts)]

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> list[np.ndarray]:
        try:
            vae = self._vae.to(latents.device)
            return [decode(vae, one, self._config.latents) for one in latents]
        finally:
            self._vae.to("cpu")

    def _read(self) -> Text:
        """The text of all prompts, then as often that of none, on the CPU; the text encoder is gone
        again. Looks at the VAE as well."""
        chosen = self._settings.samples
        check_vae(self._vae_folder, self._config.latents, "train.samples.vae", exact=True)
        texts = [*self.prompts, *[""] * len(self.prompts)]
        return text_of(
            texts, self._config, "cpu", chosen.text_encoder, chosen.tokenizer, exact=True
        )

    def _first_frames(self, clips: Index) -> Tensor:
        """Those of the prompts' clips (prompts, C, 1, H, W). Raises SettingsError, ShardError."""
        settings = self._settings
        if not isinstance(settings.model, FamilySettings) or not settings.model.first_frame:
            raise SettingsError(
                "train.samples.first_frame is set, but train.model.first_frame is not, so the "
                "model goes on from no picture: set that, or leave this out"
            )
        one = {"batch_size": 1, "captions": {}, "seed": 0, "lanes": 1}
        loader = Loader(clips, settings.model_copy(update=one))
        found: dict[str, Tensor] = {}
        with closing(loader.batches(loader.start())) as batches:
            for batch in islice(batches, len(loader)):
                first = batch.first_frames()
                assert first is not None
                found[batch.clip_ids[0]] = first[0]
        return torch.stack([found[clip] for clip in clips.table.column("clip_id").to_pylist()])


def captioned(held: Index, shape: tuple[int, ...], count: int) -> Index:
    """The first clips of the shape, by their draw, with captions that are no two alike. Raises
    SettingsError where there is none."""
    table = held.table.take(by_draw(held.table))
    seen: set[str] = set()
    rows = []
    for row, (caption, stored) in enumerate(
        zip(table.column("caption").to_pylist(), table.column("shape").to_pylist())
    ):
        if caption and caption not in seen and tuple(stored[1:]) == shape[1:]:
            seen.add(caption)
            rows.append(row)
    if not rows:
        raise SettingsError(
            f"train.samples.prompts is {count}, but no clip of shape {list(shape)} that is held "
            "back has a caption: raise train.validation.share, or list prompts"
        )
    return replace(held, table=table.take(rows[:count]))


def of_prompts(texts: Text, group: list[int], prompts: int, device: torch.device) -> Text:
    """The texts of a group of prompts, with and without."""
    rows = [*group, *(prompts + n for n in group)]
    if isinstance(texts, Tensor):
        return texts[rows].to(device)
    values, mask = texts
    return values[rows].to(device), mask[rows].to(device)


def of_first(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What the first process makes, on all of them, and so is its SettingsError."""
    told: list[T | str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = make()
        except SettingsError as error:
            told[1] = str(error)
    made, wrong = broadcast_object_list(told)
    if wrong is not None:
        raise SettingsError(wrong)
    return made  # type: ignore[no-any-return]
