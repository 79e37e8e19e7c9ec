"""Everything that is decided before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..base.checkpoint import BaseCheckpoint
from ..config.resolve import resolve_config
from ..config.sections import Config
from ..data.buckets import BucketRules, Placement
from ..data.examine import ExaminedImage, dataset_digest
from ..data.findings import Finding, findings_from, raise_errors
from ..data.kept_images import KeptImages
from ..errors import CompatibilityError, ConfigError, LoraFileError
from ..lint.dataset import ExaminedDataset
from ..lint.run import examine_dataset
from ..progress import Progress, Silence
from .batches import BatchPlan
from .checkpoint import RunIdentity
from .length import Length, length_in_words, planned_steps
from .module_choice import choice_problems, choose_modules, part_of, with_unchosen_frozen
from .objective import range_problem
from .optimizers.trial import check_optimizer
from .start_values import StartValues, read_start
from .training_set import TrainingSet, plan_training_set


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that can start."""

    config: Config
    """With every folder of images in ``data.sets``, with what ``data.dataset_config`` says, with the defaults of the base's
    family, and with its length in ``train.steps``."""
    base: BaseCheckpoint
    rules: tuple[BucketRules, ...]
    """Bucket rules, one for each resolution."""
    training: TrainingSet
    findings: tuple[Finding, ...]
    """Findings about images and captions; none is an error."""
    kept: KeptImages
    """Decoded images that wait for their encoding."""
    start: StartValues | None
    """What training starts from, where that is a file."""
    identity: RunIdentity
    length: Length
    length_by_images: bool
    """Whether nothing but the number of images decided the length, so that a run that is there already keeps its own."""

    @property
    def resolution(self) -> int:
        """Side in pixels of the square bucket's area; the largest of several."""
        return max(rules.resolution for rules in self.rules)

    @property
    def items(self) -> tuple[ExaminedImage, ...]:
        """Images of all roles."""
        return self.training.items

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Placements of each training image, one for each resolution."""
        return self.training.placements

    @property
    def batches(self) -> BatchPlan:
        """The images of each batch."""
        return self.training.batches

    @property
    def images(self) -> int:
        """Number of training images."""
        return sum(item.source.role == "train" for item in self.items)

    @property
    def start_in_words(self) -> tuple[str, ...]:
        """A line on what starts from the file of ``lora.start_from``; none without one."""
        return () if self.start is None else (self.start.in_words(choose_modules(self.base, self.config)),)

    @property
    def steps(self) -> int:
        """Steps in all, those of extensions too."""
        return self.length.steps

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return self.steps / self.batches.batches_per_epoch

    @property
    def length_in_words(self) -> str:
        """How long the run is."""
        return length_in_words(self.length, self.training, by_images=self.length_by_images)

    def with_length(self, planned: int, extensions: tuple[int, ...]) -> RunPlan:
        """The same run of ``planned`` steps, extended by each of ``extensions``."""
        length = Length.of(planned, extensions)
        return replace(
            self,
            config=_in_steps(self.config, length.steps),
            identity=self.identity.with_length(planned, extensions),
            length=length,
            length_by_images=self.length_by_images and planned == self.length.planned,
        )


def plan_run(config: Config, dataset: ExaminedDataset) -> RunPlan:
    """Place every image of ``dataset``, which ``examine_dataset`` returned for ``config``.

    Raises:
        DataError: with one line for each finding that is an error.
        ConfigError: nothing would be trained, or a setting does not fit the base.
    """
    config = resolve_config(config, dataset.base.family)
    if config.optimizer.learning_rate == 0 and config.optimizer.text_encoder_rate(dataset.base.family) == 0:
        raise ConfigError(
            "optimizer.learning_rate and optimizer.text_encoder_learning_rate are both 0: nothing would be trained"
        )
    check_optimizer(config.optimizer)
    start = _start_values(config, dataset.base)
    config = with_unchosen_frozen(dataset.base, config)
    if problem := range_problem(config.objective, dataset.base.schedule.timesteps):
        raise ConfigError(problem)
    if config.optimizer.text_encoder_stop is not None and "unet" not in map(
        part_of, choose_modules(dataset.base, config)
    ):
        reason = (
            "no module of the UNet is trained" if config.optimizer.learning_rate else "optimizer.learning_rate is 0"
        )
        raise ConfigError(
            f"optimizer.text_encoder_stop = {config.optimizer.text_encoder_stop}: {reason}, so nothing would be trained "
            "after it; lower train.steps instead"
        )
    raise_errors(dataset.findings)
    training = plan_training_set(
        dataset.images,
        dataset.rules,
        kept=dataset.kept,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        prior_loss_weight=config.objective.prior_loss_weight,
    )
    steps, by_images = planned_steps(config, training), config.train.steps is None and config.train.epochs is None
    config = _in_steps(config, steps)
    return RunPlan(
        config=config,
        base=dataset.base,
        rules=dataset.rules,
        training=training,
        findings=(*dataset.findings, *_unused_regularisation(training)),
        kept=dataset.kept,
        start=start,
        identity=RunIdentity.of(
            config,
            dataset=dataset_digest(dataset.images),
            base=dataset.base,
            start=None if start is None else start.digest,
        ),
        length=Length.of(steps),
        length_by_images=by_images,
    )


def _in_steps(config: Config, steps: int) -> Config:
    """``config`` with its length in ``train.steps`` alone, so that the same length is the same run."""
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "epochs": None})})


def _start_values(config: Config, base: BaseCheckpoint) -> StartValues | None:
    """The content of ``lora.start_from``.

    Raises:
        ConfigError: with one line for each setting of the LoRA's modules that does not fit ``base``.
    """
    problems, start = list(choice_problems(base, config)), None
    if config.lora.start_from is not None:
        try:
            start = read_start(base, Path(config.lora.start_from))
        except (LoraFileError, CompatibilityError) as error:
            problems += [f"lora.start_from: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return start


def plan_config(config: Config, progress: Progress | None = None) -> RunPlan:
    """Examine the images of ``config``, then plan its run.

    Raises:
        BaseModelError, DataError, ConfigError: with everything that is wrong with that input.
    """
    return plan_run(config, examine_dataset(config, progress=progress or Silence()))


def _unused_regularisation(training: TrainingSet) -> list[Finding]:
    """As in kohya's trainer, an epoch shows no more regularisation images than training images."""
    every = {number for number, image in enumerate(training.items) if image.source.role == "regularisation"}
    never = every - {views.item for views, times in zip(training.shown, training.batches.repeats, strict=True) if times}
    message = never and (
        f"{len(never)} of {len(every)} regularisation images are never shown: an epoch shows as many as training images"
    )
    remedy = "raise the repeats of the training sets, or remove what is not needed"
    return list(findings_from(None, ("regularisation-unused", "warning", message, remedy)))
