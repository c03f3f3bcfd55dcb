"""A training run, from its first step to its report, in one stage or several. All recipes share this loop."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

import koclip
from koclip import distributed, storage, training
from koclip.config import (
    AlignConfig,
    ConfigError,
    PretrainConfig,
    Stage,
    Stopped,
    TokenizerConfig,
    check_changes,
    check_data,
    to_dict,
)
from koclip.data.batches import Assembler, Batch, Precomputed
from koclip.data.loader import Start, train_loader, training_captions
from koclip.data.order import BatchPart
from koclip.data.survey import CaptionLengths
from koclip.data.transforms import PixelLimit, views_for
from koclip.encoders.transformers import TransformersEncoder
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report.write import Source, report
from koclip.evaluation.run import evaluate, open_all
from koclip.evaluation.sets import EvalSet
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import save_stock_model
from koclip.runs import checkpoints
from koclip.runs.checkpoints import Checkpoints, Progress
from koclip.runs.directory import RunDirectory, Samples, survey_sources
from koclip.text import tokenizers

NEXT = """Next:
  koclip evaluate --model {model}   # on built-in images; on yours: --sets
  koclip index --model {model} --images photos/ --output_dir index/
  koclip space --model {model} --index index/
  koclip publish --model {model} --repo_id your-name/your-model --dry_run
  tensorboard --logdir {run}"""
FOREIGN_NUMBERS = (
    "Note: the training data are yours, but the evaluation uses the built-in scenes, so its numbers say nothing about "
    'your data. Set --eval.sets "[{source: {path: validation.csv, image: file, captions: {ko: caption}}}]"'
)


class Session:
    """A run: its directory, its checkpoints and its training state.

    Raises:
        ConfigError: the directory holds a run and `resume` is off, or `config` differs from the configuration of the
            checkpoint in a way that changes the result.
        RunError: all checkpoints are damaged.
    """

    def __init__(self, recipe: str, config: PretrainConfig | AlignConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.directory = RunDirectory(recipe, config.output_dir, resume=config.resume == "auto")
        self.path = self.directory.path
        self.eval_sets: list[EvalSet] = []
        self.state: training.TrainState | None = None
        self._data: list[dict[str, Any]] = []  # facts that identify the data
        self._lengths: list[CaptionLengths | None] = []
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        newest = self.checkpoints.newest_intact() if distributed.rank() == 0 else None
        self._checkpoint = distributed.gather_objects(newest)[0]  # None after it has been loaded
        self._facts = checkpoints.read_facts(self._checkpoint) if self._checkpoint else None
        if self._facts is not None:
            self._check_changes(self._facts)
        self.samples = Samples(self.directory, begins=self._checkpoint is None)
        accelerator.project_configuration.logging_dir = str(self.path)
        accelerator.init_trackers("tracker")
        self.directory.begin(config, self.step)

    @classmethod
    def open(cls, recipe: str, config: PretrainConfig | AlignConfig) -> "Session":
        """Start or continue a run, and open its evaluation sets.

        Raises:
            ConfigError: see the class; or an evaluation set cannot be opened or is too small.
        """
        session = cls(recipe, config, training.start(config.train))
        session.eval_sets = open_all(config.eval, PixelLimit(config.data.max_image_pixels))
        if session.accelerator.is_main_process:
            session.directory.list_skipped(skip for eval_set in session.eval_sets for skip in eval_set.all_skipped())
        if measures_other_data(config):
            session.accelerator.print(FOREIGN_NUMBERS)
        return session

    @property
    def next_steps(self) -> str:
        """The commands that evaluate, index, show and publish the model."""
        return NEXT.format(model=shlex.quote(str(self.path / "model")), run=shlex.quote(str(self.path)))

    @property
    def step(self) -> int:
        """Step of the checkpoint that will be loaded; 0 without a checkpoint or after it has been loaded."""
        return 0 if self._facts is None else int(self._facts["step"])

    def tokenizer(self, config: TokenizerConfig, encoder: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer: from tokenizer/ if the run is resumed, else loaded or trained as in `config`.

        Also reads the captions once: their lengths, and facts that show whether the data has changed. `encoder` is the
        configuration of the text encoder; default: CLIP's text transformer.

        Raises:
            ConfigError: the tokenizer cannot be used, or the data has changed since the checkpoint and `resume_with`
                does not name `data.sources`.
        """
        directory = self.path / "tokenizer"
        if distributed.rank() == 0 and not directory.exists():
            with storage.atomic(directory) as partial:
                tokenizers.create(config, training_captions(self.config.data), encoder).save_pretrained(partial)
        distributed.barrier()
        tokenizer = tokenizers.load(str(directory), config.max_tokens, encoder, probes=())  # `create` has checked it
        surveys = survey_sources(self.config.data, tokenizer, self.directory)
        self._data = [survey.facts for survey in surveys]
        self._lengths = [survey.lengths for survey in surveys]
        if self._facts is not None:
            _print_changes(check_data(self._facts.get("data"), self._data, self.config.resume_with))
        return tokenizer

    def stages(self) -> Iterator[Stage]:
        """Yield the stages that are not finished. The optimizer of a stage is released before the next stage."""
        *earlier, last = self.config.stages
        for stage in earlier:
            if self.step < stage.end:
                yield stage
                training.release(self._trained())
                self.state = None
        yield last

    def fit(
        self,
        dual_encoder: DualEncoder,
        processor: ProcessorMixin,
        stage: Stage,
        precomputed: Precomputed | None = None,
    ) -> None:
        """Train one stage, from its first step or from the checkpoint. `state` holds the result.

        `precomputed` are embeddings of the data by frozen towers.

        Raises:
            Stopped: a signal asked the run to stop. Its checkpoint is on disk.
            DivergedError: too many steps in a row had no finite loss and gradient.
            SkippedError: too many samples could not be used.
            RunError: a checkpoint could not be written.
        """
        train = self.config.train
        self.state = state = training.prepare(self.accelerator, dual_encoder, self.config, stage)
        progress = self.load(state, stage.start)
        batches = self._batches(processor, stage, precomputed or Precomputed(), progress)
        steps = training.steps(state, batches, progress.step, stage.end, train.log_every)
        quiet = not self.accelerator.is_main_process
        bar = tqdm(steps, stage.name, stage.end, initial=progress.step, disable=quiet)
        with training.stop_requests(self.accelerator.device) as asked_to_stop:
            for step, stats in bar:
                ends, stopping = step == stage.end, asked_to_stop()
                if stats:
                    self.log(step, stats)
                    bar.set_postfix_str(_progress(stats))
                self.directory.list_events(state.health.take_events())
                self.checkpoints.stop_if_failed()
                if _due(step, train.eval_every) and step != train.num_steps:
                    self.log(step, self._measure(state, processor))
                if ends or stopping or _due(step, train.save_every):
                    self.save(state, step, train.keep_checkpoints, wait=ends or stopping)
                if stopping and step != train.num_steps:
                    message = f"Stopped at step {step}; to continue, add: --resume auto --output_dir {self.path}"
                    self.accelerator.print(message)
                    raise Stopped(message)

    def finish(
        self,
        processor: ProcessorMixin,
        write: Callable[..., None] = save_stock_model,
        source: Source | None = None,
    ) -> Path:
        """Save the trained model, load it with `koclip.load`, evaluate it and write the report.

        `write(directory, model, processor, weights)` writes the model. The report compares it with a `source`.

        Returns:
            The model's directory.
        """
        directory = self.save_model(self._trained(), processor, write)
        if self.accelerator.is_main_process:
            embedder = Embedder(koclip.load(directory), self.config.eval.batch_size)
            report(self.path, embedder, self.eval_sets, source)
        return directory

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, send it to the tracker, and list newly skipped samples."""
        self.samples.list_skipped()
        self.accelerator.log(stats, step=step)
        self.directory.log(step, stats)

    def save(self, state: training.TrainState, step: int, keep: int, wait: bool = False) -> None:
        """Write checkpoints/step-<step>/, complete or not at all; keep the newest `keep` checkpoints.

        Training waits for a copy in host memory. With `wait`, it also waits for the disk.

        Raises:
            RunError: this or the previous checkpoint could not be written.
        """
        self.samples.save()
        partial = self.checkpoints.begin(step) if distributed.rank() == 0 else self.path
        partial = distributed.gather_objects(partial)[0]
        progress = Progress(step, tuple(self.samples.positions.values()))
        launch = {"config": to_dict(self.config), "data": self._data}
        snapshot = checkpoints.collect(partial, state, progress, launch)
        if distributed.rank() == 0:
            self.checkpoints.finish(partial, snapshot.write, keep)
        if wait:
            self.checkpoints.wait()
            distributed.barrier()

    def load(self, state: training.TrainState, start: int = 0) -> Progress:
        """Load the checkpoint into `state`. Without a checkpoint, the stage begins at step `start`."""
        progress = checkpoints.restore(self._checkpoint, state, start) if self._checkpoint else Progress(start)
        self._checkpoint = self._facts = None
        self.samples.positions = {position.reader: position for position in progress.positions}
        self.directory.rewind(progress.step)
        return progress

    def save_model(
        self, state: training.TrainState, processor: ProcessorMixin, write: Callable[..., None] = save_stock_model
    ) -> Path:
        """Write the stock model to model/, in fp32. See `finish`."""
        weights = checkpoints.weights(state) if state.ema is None else state.averaged.state_dict()
        directory = self.path / "model"
        if distributed.rank() == 0:
            with storage.atomic(directory) as partial:
                write(partial, state.dual_encoder.model, processor, weights)
        distributed.barrier()
        return directory

    def _batches(self, processor: Any, stage: Stage, precomputed: Precomputed, progress: Progress) -> Iterator[Batch]:
        """Yield this process's batches of a stage, and record the samples."""
        config, train = self.config.data, self.config.train
        views = views_for(config, processor.image_processor) if stage.images else None
        if stage.distill is None:
            precomputed = precomputed._replace(teacher=None)
        loader = train_loader(
            Assembler(config, processor.tokenizer, views, precomputed),
            BatchPart(train.batch_size, distributed.rank(), distributed.world_size(), train.micro_batch_size),
            Start(progress.step, progress.all_positions, stage.start),
            self._lengths,
        )
        return self.samples.watch(loader, config.max_skipped_fraction)

    def _measure(self, state: training.TrainState, processor: ProcessorMixin) -> dict[str, float]:
        with state.evaluating() as model:
            embedder = Embedder(TransformersEncoder(model, processor), self.config.eval.batch_size)
            return {name: metric.value for name, metric in evaluate(embedder, self.eval_sets).items()}

    def _trained(self) -> training.TrainState:
        if self.state is None:
            raise RuntimeError("no stage has been trained: call `fit` first")
        return self.state

    def _check_changes(self, facts: dict[str, Any]) -> None:
        """Compare this launch with the launch that wrote the checkpoint, and print the changes.

        Raises:
            ConfigError: a change would change the result.
        """
        before, current = facts["num_processes"], distributed.world_size()
        if before != current and any(facts["positions"]):
            raise ConfigError(
                f"resume: got {current} processes, expected {before} as in the checkpoint, because streamed data "
                f"continues in the same order only then: launch {before} processes"
            )
        changes = check_changes(facts["config"], to_dict(self.config), (before, current), self.config.resume_with)
        if before != current:
            changes.append(f"processes: {before} -> {current}; dropout and patch dropout draw different random numbers")
        _print_changes(changes)


def measures_other_data(config: PretrainConfig | AlignConfig) -> bool:
    """Return whether all evaluation sets are the built-in scenes, but no training data are."""
    measured = {eval_set.source.path for eval_set in config.eval.sets}
    return measured == {"scenes"} and all(source.path != "scenes" for source in config.data.sources)


def _due(step: int, every: int) -> bool:
    """Return whether an action of every `every` steps is due at `step`. 0: never."""
    return every > 0 and step % every == 0


def _progress(stats: dict[str, float]) -> str:
    rates = f"{stats['images_per_second']:,.0f} pairs/s, {stats['memory_gib']:.1f} GiB"
    return f"loss {stats['loss']:.3f}, accuracy {stats['accuracy']:.0%}, {rates}"


def _print_changes(changes: list[str]) -> None:
    if changes and distributed.rank() == 0:
        tqdm.write("\n  ".join(["Changed since the checkpoint:", *changes]))
