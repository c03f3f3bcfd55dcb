"""The card: every number is that of results.json, what is missing is named, the licence is that of the sources."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hub_rules import metadata_problems
from huggingface_hub import ModelCard
from runs_to_publish import ENVIRONMENT, METRICS, aligned, beside

from koclip import config
from koclip.config import ConfigError, PublishConfig
from koclip.evaluation.results import records_of
from koclip.evaluation.tasks import SPECS
from koclip.licences import read_data_card
from koclip.metrics import Metric
from koclip.models.stock import LAYOUTS
from koclip.publishing import card_inputs
from koclip.publishing.card import render, write_card
from koclip.publishing.card_inputs import gather
from koclip.publishing.checks import CARD, LICENCE

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden_card.md")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the directory of a run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def settings(run: Path, **changes: object) -> PublishConfig:
    cards = {"data_cards": str(ROOT / "data_cards")}
    return PublishConfig(model=str(run / "model"), repo_id="org/my-clip", **(cards | changes))  # type: ignore[arg-type]


def card_of(run: Path, **changes: object) -> ModelCard:
    cfg = settings(run, **changes)
    return render(cfg, gather(cfg), year=2026)


def change(file: Path, **values: object) -> None:
    """Put values into a JSON or YAML file; None takes one out."""
    kind = json if file.suffix == ".json" else yaml
    read = json.loads(file.read_text()) if kind is json else yaml.safe_load(file.read_text())
    changed = {name: value for name, value in {**read, **values}.items() if value is not None}
    file.write_text(json.dumps(changed) if kind is json else yaml.safe_dump(changed), encoding="utf-8")


def test_the_card_is_as_it_was(run):
    """If a change is wanted, write the new card there: print(as_golden(run))."""
    assert as_golden(run) == GOLDEN.read_text(encoding="utf-8")


def as_golden(run: Path) -> str:
    """Return the card without the weights' fingerprint, which is another where random numbers are."""
    measured = json.loads((run / "results.json").read_text(encoding="utf-8"))["fingerprint"]
    return str(card_of(run)).replace(measured, "0" * 32)


def test_the_hub_takes_its_metadata_and_it_survives_a_round_trip(run):
    card = card_of(run)
    assert metadata_problems(str(card)) == []
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data["pipeline_tag"] == "zero-shot-image-classification"
    assert again.data["language"] == ["ko", "en"]


def test_every_number_is_that_of_the_results(run):
    card = card_of(run)
    shown = [line.split(" | ") for line in re.findall(r"^\| (scenes \| .+ \| .+ \| .+ \| [\d,]+) \|$", card.text, re.M)]
    rows = {(section, label): rest for section, label, *rest in ((cells[0], *cells[1:]) for cells in shown)}
    languages = re.split(r"^### ", card.text.split("## Evaluation")[1].split("## Limits")[0], flags=re.M)[1:]
    assert [heading.split("\n")[0] for heading in languages] == [
        "Korean", "English", "Between the languages", "Korean as people type it", "Images only",
    ]  # fmt: skip
    for name, (value, low, high, n) in METRICS.items():
        (record,) = records_of({name: Metric(value, (low, high), n)}, SPECS)
        label = f"{record.group}: {record.label()}" if record.group else record.label()
        scale = 1 if record.spec.unit == "rank" else 100
        here = [
            cells
            for cells in shown
            if cells[1] == label and cells[4] == f"{n:,}" and number(cells[2]) == rounded(value, scale)
        ]
        assert here, (name, rows)
        assert [number(bound) for bound in here[0][3].split(" to ")] == [rounded(low, scale), rounded(high, scale)]
    worst = len(shown) - len(METRICS)
    assert worst == 1  # the worst rewrite, which stands there twice
    values = {(result.dataset_config, result.metric_name): result.metric_value for result in card.data["eval_results"]}
    for name, (value, *_) in METRICS.items():
        (record,) = records_of({name: Metric(value, (0.0, 1.0), 1)}, SPECS)
        if record.spec.unit == "percent":
            assert values.pop((record.language, record.label())) == value
    assert not values
    summary = card.text.split("라이선스")[0]
    assert "R@10: 45.7 % (95 % 신뢰 구간 43.0~48.0, scenes)" in summary
    assert set(map(float, re.findall(r"(\d+\.\d)", summary))) <= {
        rounded(part, 100) for value, low, high, _ in METRICS.values() for part in (value, low, high)
    }


def test_the_card_says_what_was_forgotten(run):
    """With the share that was kept; without it if the source is at chance. Without a comparison there is no section."""
    assert "was forgotten" not in str(card_of(run))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    own = results["metrics"]["scenes/ko/text_to_image/recall@10"]["value"]
    for language, values in (("ko", {"source_": 0.02, "gain_": own - 0.02}), ("en", {"source_": 0.9, "kept_": 0.75})):
        results["metrics"][f"scenes/{language}/text_to_image/recall@10"] = {"value": own, "ci95": [0.4, 0.5], "n": 900}
        for prefix, value in {"chance_": 0.01, "gain_": own - 0.9, **values}.items():
            metric = {"value": value, "ci95": [value - 0.01, value + 0.01], "n": 900}
            results["metrics"][f"scenes/{language}/{prefix}text_to_image/recall@10"] = metric
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    section = str(card_of(run)).split("## What was forgotten")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| scenes")]
    assert [row[2] for row in rows] == ["ko", "en"]
    texts = [f"{rounded(value, 100):.1f}" for value in (0.02, own)]
    assert [cell.split(" ")[0] for cell in rows[0][4:6]] == texts
    assert (rows[0][7], rows[1][7].split(" ")[0]) == ("source at chance (1.0)", "75.0")


def number(text: str) -> float:
    return float(text.removesuffix(" *").replace(",", ""))


def rounded(value: float, scale: int) -> float:
    return round(value * scale, 1)


def test_nothing_is_empty(run):
    text = str(card_of(run))
    assert not re.search(r"^#+ .+\n+(?=#|\Z)", text, re.M), "a heading without a text"
    assert not re.search(r"\bNone\b(?! known)", text)
    assert "{{" not in text
    assert not re.search(r"\| +\|", text.replace("| | |", ""))


def test_paths_of_this_machine_stay_out(run):
    change(
        run / "environment.json",
        command=["pretrain.py", "--data=/home/me/x.csv", "--model.clip", "openai/clip", "C:\\a\\b"],
    )
    text = str(card_of(run))
    assert "/home/" not in text
    assert "koclip pretrain --data=x.csv --model.clip openai/clip b" in text
    assert str(run) not in text
    assert "recipes/configs/pretrain/scenes.yaml" in GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("environment.json", {"command": None}, "environment.json: command: got None"),
        ("environment.json", {"packages": {}}, r"environment.json: packages: got \{\}"),
        ("results.json", {"metrics": {}}, r"results.json, metrics: got \{\}.*measure it: koclip evaluate"),
        ("results.json", {"data": None}, "results.json, data: got None"),
        ("results.json", {"data": {"unknown": {}}}, "the data card of unknown: got .*unknown.md', no such file; write"),
        ("results.json", {"environment": {"python": "3"}}, "results: environment.packages"),
        ("config.yaml", {"data": None}, "config.yaml: data: got None"),
        ("model/tokenizer_config.json", {"model_max_length": None}, "model_max_length: got None"),
        ("model/preprocessor_config.json", {"crop_size": {}, "size": {}}, r"preprocessor_config.json: size: got \{\}"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(run, file, values, message):
    change(run / file, **values)
    with pytest.raises(ConfigError, match=message):
        card_of(run)


def test_all_missing_data_cards_are_named_at_once(run):
    sources = [{"path": f"{name}.csv", "captions": {"ko": "ko"}} for name in ("pairs", "more")]
    change(run / "config.yaml", data={"sources": sources})
    change(run / "results.json", data={"held_out": {}})
    with pytest.raises(ConfigError) as error:
        card_of(run)
    assert [name for name in ("pairs", "more", "held_out") if f"the data card of {name}" in str(error.value)] == [
        "pairs", "more", "held_out",
    ]  # fmt: skip


def test_only_built_in_data_are_said_to_be_generated(run, tmp_path):
    card = (ROOT / "data_cards" / "scenes.md").read_text(encoding="utf-8")
    (tmp_path / "pairs.md").write_text(card.replace("id: scenes", "id: pairs"), encoding="utf-8")
    change(run / "config.yaml", data={"sources": [{"path": "pairs.csv", "captions": {"ko": "ko"}}]})
    change(run / "results.json", data={"scenes": {"source": {"source": {"path": "scenes"}}}})
    versions = {data.name: data.version for data in gather(settings(run, data_cards=str(tmp_path))).data}
    assert versions == {"pairs": "not stated", "scenes": "generated by koclip"}


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "results.json", "model/tokenizer_config.json"])
def test_a_file_that_is_missing_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(ConfigError, match=name):
        card_of(run)


def test_a_part_of_a_data_set_has_the_card_of_its_folder(run):
    source = {"path": "data/emoji/emoji.parquet", "name": "emoji_blob"}
    change(run / "results.json", data={"emoji_blob": {"source": {"source": source}}})
    assert "| emoji_blob | evaluation | ko, en | noto 1,906," in card_of(run).text
    assert card_of(run).data["license"] == "apache-2.0"  # what it is measured on does not bind it
    for own in ("mine/emoji.parquet", "emoji/own.parquet"):  # a folder of that name is not what `koclip data` built
        source["path"] = own
        change(run / "results.json", data={"emoji_blob": {"source": {"source": source}}})
        with pytest.raises(ConfigError, match=own):
            card_of(run)


def test_data_without_a_card_are_refused_whatever_licences_say(run):
    source = {"path": "org/unknown", "name": "unknown", "captions": {"ko": "ko"}}
    change(run / "config.yaml", data={"sources": [source]})
    with pytest.raises(ConfigError, match=r"data card of unknown: got .*unknown\.md"):
        card_of(run, licenses={"unknown": "mit", "org/unknown": "mit"})
    help_text = " ".join(str(PublishConfig.__doc__).split("license:")[0].split("licenses:")[1].split())
    assert "data card" in help_text


@pytest.mark.parametrize("name", ["environment.json", "model/config.json"])
def test_a_file_that_is_broken_is_named(run, name):
    (run / name).write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"model: .*{name} "):
        card_of(run)


TERMS = """licenses:
  - {part: pictures and captions, id: apache-2.0, source: koclip's LICENSE}
"""


@pytest.mark.parametrize("part", ["**Limits.**", "**Harms.**", TERMS, "languages: [ko, en]"])
def test_a_data_card_that_lacks_something_is_named(run, tmp_path, part):
    shutil.copytree(ROOT / "data_cards", tmp_path / "cards")
    file = tmp_path / "cards" / "scenes.md"
    file.write_text(file.read_text(encoding="utf-8").replace(part, ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cards/scenes.md: (\*\*(Limits|Harms)|licenses|languages)"):
        card_of(run, data_cards=str(tmp_path / "cards"))


def test_a_non_commercial_source_makes_the_model_so_and_the_card_says_it(run):
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"]["sources"].append({"path": "x.parquet", "name": "flickr8k_ko", "captions": {"ko": "ko"}})
    change(run / "config.yaml", data=values["data"])
    cfg = settings(run)
    write_card(cfg, gather(cfg))
    card = ModelCard.load(run / "model" / CARD)
    assert card.data["license"] == "other"
    assert card.data["license_name"] == "non-commercial-sources"
    assert metadata_problems(str(card)) == []
    assert "may not be used commercially: flickr8k_ko. See [LICENSE.md](LICENSE.md)" in card.text
    terms = (
        "| photos | other (“rights stay with the Flickr users, research and education use”) | no | no | not stated |"
    )
    assert terms in card.text
    assert "flickr8k_ko (training), photos: other (“rights stay with" in (run / "model" / LICENCE).read_text(
        encoding="utf-8"
    )
    change(run / "config.yaml", data={"sources": [{"path": "scenes", "captions": {"ko": "ko"}}]})
    write_card(cfg, gather(cfg))
    assert not (run / "model" / LICENCE).exists()


VERDICTS = {
    "apache-2.0": ("scenes",),
    "cc-by-sa-4.0": ("emoji",),
    "terms-of-sources": ("wit_ko", "coco_ko", "crossmodal_3600"),
    "unstated-sources": ("cifar10", "kocc3m", "kocc12m"),
    "non-commercial-sources": ("flickr8k_ko", "tiny_imagenet_ko", "xtd10"),
}


CARDS = sorted(file.stem for file in (ROOT / "data_cards").glob("*.md") if file.stem not in ("README", "class_names"))


@pytest.mark.parametrize("name", CARDS)
def test_the_card_of_a_data_set_binds_the_models_trained_on_it(run, name):
    path = "scenes" if name == "scenes" else "x.parquet"
    change(run / "config.yaml", data={"sources": [{"path": path, "name": name, "captions": {"ko": "ko"}}]})
    card = card_of(run)
    assert name in VERDICTS[card.data.get("license_name") or card.data["license"]]
    (used,) = [data for data in gather(settings(run)).data if data.name == name]
    files = [Path(path).name for path in read_data_card(ROOT / "data_cards" / f"{name}.md").files]
    assert used.version.startswith("generated by" if name == "scenes" else files[0] if files else "not stated")


def test_the_commit_of_a_data_card_is_told_of_data_read_from_the_hub_only(run):
    for path, version in (("QuoQA-NLP/KoCC12M", "revision 5cadc7b3"), ("data/kocc12m/*.tar", "not stated")):
        source = {"path": path, "name": "kocc12m", "captions": {"ko": "txt"}}
        change(run / "config.yaml", data={"sources": [source]})
        (used,) = [data for data in gather(settings(run)).data if data.trained]
        assert used.version.startswith(version)


def test_the_base_trained_here_is_part_of_the_chain(run, tmp_path):
    """Its data bind the model that was made of it, though the run itself saw free data only."""
    base = tmp_path / "base"
    shutil.copytree(run, base)
    source = config.SourceConfig(path="flickr8k_ko", captions={"en": "en"})
    beside(base, config.PretrainConfig(data=config.DataConfig(sources=[source])))
    beside(run, aligned(str(base / "model"), "same", "lora"))
    card = card_of(run)
    assert card.data["license"] == "other"
    assert card.data["base_model"] is None
    assert "| flickr8k_ko | training of the base |" in card.text
    named = card_of(run, clip="org/base", licenses={"org/base": "mit"})
    assert named.data["license"] == "apache-2.0"
    assert named.data["base_model"] == ["org/base"]
    (base / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"model\.clip: got .*--clip <"):
        card_of(run)


def test_a_licence_that_nobody_tells_is_asked_for(run):
    beside(run, aligned("openai/clip-vit-base-patch32", "klue/roberta-base", "frozen_image"))
    with pytest.raises(ConfigError, match=r"licenses: .*openai/clip-vit-base-patch32"):
        card_of(run)
    licenses = {"openai/clip-vit-base-patch32": "unstated", "klue/roberta-base": "cc-by-sa-4.0"}
    assert card_of(run, licenses=licenses).data["license_name"] == "unstated-sources"


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["mit", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ([], "other"),
        ([None], "other"),
    ],
)
def test_a_card_on_the_hub_may_state_several_licences(run, monkeypatch, stated, licence):
    beside(run, aligned("openai/clip-vit-base-patch32", "same", "lora"))
    info = SimpleNamespace(card_data={"license": stated})
    monkeypatch.setattr(card_inputs, "HfApi", lambda: SimpleNamespace(model_info=lambda _: info))
    assert card_of(run).data["license"] == licence


def test_a_licence_that_the_hub_calls_other_is_no_other_whatever_its_name(run, monkeypatch):
    beside(run, aligned("openai/clip-vit-base-patch32", "same", "lora"))
    for words in ({"license_name": "mit"}, {"license_name": "apache-2.0", "license_link": "LICENSE"}, {}):
        info = SimpleNamespace(card_data={"license": "other", **words})
        monkeypatch.setattr(card_inputs, "HfApi", lambda info=info: SimpleNamespace(model_info=lambda _: info))
        card = card_of(run)
        assert card.data["license_name"] == "terms-of-sources"
        assert f"| weights | other (“{' '.join(words.values()) or 'other'}”) |" in card.text


def test_the_card_says_what_becomes_of_long_and_of_unclean_texts(run):
    cfg = settings(run)
    known = gather(cfg)
    assert not known.reads_longer
    said = {
        (longer, cleans): str(render(cfg, replace(known, reads_longer=longer, cleans=cleans), year=2026))
        for longer in (True, False)
        for cleans in (True, False)
    }
    for (longer, cleans), text in said.items():
        assert ("The pipeline embeds them whole" in text, "The pipeline fails on them" in text) == (longer, not longer)
        assert ("The tokenizer removes" in text, "Other libraries do not" in text) == (cleans, not cleans)


def card_of_class(run: Path, name: str) -> str:
    cfg = settings(run)
    known = gather(cfg)
    model = known.model | {"architectures": [name], "projection_dim": None, "vision_config": {"hidden_size": 4321}}
    return str(render(cfg, replace(known, model=model), year=2026))


def test_the_card_of_a_siglip_pads_texts_to_their_length(run):
    """Its embeddings are wrong with other padding, without an error. It has no projection."""
    clip, siglip = (card_of_class(run, name) for name in ("CLIPModel", "SiglipModel"))
    for text, padding, scores in ((clip, "padding=True", "softmax"), (siglip, 'padding="max_length"', "sigmoid")):
        assert padding in text
        assert f"out.logits_per_image.{scores}(" in text
    assert "padding=True" not in siglip
    assert "lower case" in siglip
    assert "4321" in siglip.replace(",", "")


@pytest.mark.parametrize("name", [layout.model_class.__name__ for layout in LAYOUTS])
def test_every_stock_class_has_a_card(run, name):
    assert card_of_class(run, name)


def test_a_card_of_somebody_else_is_kept(run):
    (run / "model" / CARD).write_text("# Mine\n", encoding="utf-8")
    cfg = settings(run)
    with pytest.raises(ConfigError, match=r"model: got .*README\.md"):
        write_card(cfg, gather(cfg))
    assert (run / "model" / CARD).read_text() == "# Mine\n"


def test_time_and_hardware_are_told_if_known(run):
    change(run / "environment.json", gpus=["NVIDIA H200", "NVIDIA H200"], num_processes=2)
    assert "| time | 20.6 minutes, from the start to the last step |" in str(card_of(run))
    text = str(card_of(run, training_time="20 minutes"))
    assert "| time | 20 minutes |" in text
    assert "| hardware | NVIDIA H200 and NVIDIA H200, 2 processes |" in text
    assert str(ENVIRONMENT["commit"])[:12] in text


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"step": 10, "seconds": 7.25}], "7.2 seconds"),
        ([{"step": 10, "seconds": 119.0}], "119.0 seconds"),
        ([{"step": 10, "seconds": 7_190.0}], "119.8 minutes"),
        ([{"step": 10, "seconds": 9.0}, {"step": 20, "seconds": 4_000_000.0}], "1,111.1 hours"),
        ([{"step": 10, "loss": 0.5}], None),  # of a run before koclip kept the time
        ([], None),
    ],
)
def test_the_time_is_the_logs_last(run, lines, words):
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    times = re.findall(r"\| time \| (.+) \|", str(card_of(run)))
    assert times == ([f"{words}, from the start to the last step"] if words else [])
    (run / "metrics.jsonl").unlink()
    assert "| time |" not in str(card_of(run))
