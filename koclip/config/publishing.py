"""Settings of `koclip publish`: a trained model, or a set of `koclip curate`."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_pixels
from koclip.config.data import DataConfig
from koclip.config.evaluation import EvalSetConfig

_OF_DATA = ("data", "repo_id", "dry_run", "tag", "private", "message", "licenses", "data_cards")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Check a trained model or a set of `koclip curate`, write its card, and push both to the Hub.

    The token comes from `hf auth login` or from the environment variable HF_TOKEN. With `data`, the only other settings
    are repo_id, dry_run, tag, private, message, licenses and data_cards.

    Args:
        model: Directory of the model; config.yaml and environment.json of its training run must be next to it.
        data: Directory that `koclip curate` wrote, instead of `model`: it becomes a data set on the Hub.
        repo_id: Hub repository to push to: `organisation/name` or `user/name`.
        results: results.json of the training run or of `koclip evaluate`. Default: the file next to `model`. The
            fingerprint in it must match these weights.
        dry_run: Write the card and run all checks, but push nothing. Needs no token. With `data`, the files that
            would be pushed are listed, and nothing is written.
        tag: Name of the release, such as `v1.0`. Default: none. An existing tag is never moved.
        private: Create a new repository as private.
        adapter: Also push the folder adapter/ if it exists.
        message: First line of the commit message.
        clip: Hub id to publish for `model.clip`, if the run loaded it from a local directory.
        text_encoder: Likewise for `model.text_encoder`.
        licenses: Licences of the Hub models that the run started from, by Hub id: an id of SPDX or of the Hub, or
            `unstated`. With any other text, the card shows the text and this model's licence is `other`. Default: the
            licence on the Hub. The licence of a data set always comes from its data card. With `data`: licences of the
            sources without a data card, by source name, instead of those that `koclip curate` was given.
        license: Licence of this model if its sources allow any, as the Hub spells it.
        data_cards: Directory of the cards of your own data sets. Those of koclip are read after it. With `data`,
            default: that of `koclip curate`.
        training_time: Training time to print on the card. Default: the last `seconds` in metrics.jsonl of the run.
        onnx: Also export both towers to ONNX: `fp32`, or `int8` (fp32 and int8). Loads in ONNX Runtime, and in
            transformers.js as CLIPTextModelWithProjection and CLIPVisionModelWithProjection. Needs
            `pip install 'koclip[onnx]'`.
        int8_sets: Data sets on which to measure how much retrieval loses with `int8`. Default: the first 1,000 images
            of each set in `results` with the task `retrieval`, or the built-in scenes if there is none.
        max_image_pixels: Skip images of these sets with more pixels (width x height). Protects from decompression
            bombs.
        sentence_transformers: Add the files with which `SentenceTransformer(repo_id)` loads the model.
        space: Hub Space that shows the model, `organisation/name`; it is created or updated. Default: none.
    """

    model: str = ""
    data: str = ""
    repo_id: str
    results: str | None = None
    dry_run: bool = False
    tag: str | None = None
    private: bool = False
    adapter: bool = True
    message: str = "Publish with koclip"
    clip: str | None = None
    text_encoder: str | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    license: str = "apache-2.0"
    data_cards: str | None = None
    training_time: str | None = None
    onnx: Literal["fp32", "int8"] | None = None
    int8_sets: list[EvalSetConfig] = field(default_factory=list)
    max_image_pixels: int = DataConfig.max_image_pixels
    sentence_transformers: bool = False
    space: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        for key, name in (("repo_id", self.repo_id), ("space", self.space)):
            named = name is None or re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
            check(named, key, name, "expected organisation/name: letters, digits, - _ .")
        check(bool(self.message.strip()), "message", self.message, "expected a text")
        both = bool(self.model) and bool(self.data)
        check(not both, "data", self.data, "expected a model or a data set, not both")
        check(bool(self.model or self.data), "model", self.model, "expected a directory: --model or --data")
        own = self._of_models() if self.data else []
        check(not own, "data", own, "expected none of these settings with data: they are for models")
        check_pixels("max_image_pixels", self.max_image_pixels)
        names = [eval_set.source.short_name for eval_set in self.int8_sets]
        check(not names or self.onnx == "int8", "int8_sets", names, "needs --onnx int8, whose loss it measures")
        fix = "expected a different name for each data set"
        check(len(set(names)) == len(names), "int8_sets[].source.name", names, fix)
        tasks = [eval_set.tasks for eval_set in self.int8_sets]
        check(all("retrieval" in names for names in tasks), "int8_sets[].tasks", tasks, "expected retrieval among them")

    def _of_models(self) -> list[str]:
        """Return the settings that are not the default and that data do not have."""
        plain = PublishConfig(model="model", repo_id="org/name")
        names = {setting.name for setting in dataclasses.fields(self)} - {"model", *_OF_DATA}
        return sorted(name for name in names if getattr(self, name) != getattr(plain, name))
