"""Pre-flight: every defect of the release list is found, named, and told how to mend."""

import getpass
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs_to_publish import adapted, pretrained
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from koclip.align import lora
from koclip.align.lora import AdapterBase
from koclip.config import ConfigError
from koclip.publishing import checks as file_checks
from koclip.publishing import preflight
from koclip.publishing.checks import BUILT, Check, check_files, name_base, publishable
from koclip.publishing.preflight import print_checks, refuse
from koclip.publishing.push import check_base

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory that passes."""
    model = pretrained(tmp_path_factory.mktemp("sound"))
    (model / "README.md").write_text(CARD, encoding="utf-8")
    return model


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def failing(checks: list[Check]) -> dict[str, str]:
    return {check.name: "; ".join(check.problems) for check in checks if check.problems}


def edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        read = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(read | values), encoding="utf-8")

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content, encoding="utf-8")

    return change


def halve(model: Path) -> None:
    weights = {name: weight.half() for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def cut(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])


def label(**metadata: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"} | metadata)

    return change


TOKEN = "hf_" + "abcDEF123" * 4
DEFECTS = {
    "a missing file": (lambda model: (model / "tokenizer.json").unlink(), "files are complete", "tokenizer.json is"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "files are complete", "model*.safetensors is"),
    "broken JSON": (write("config.json", '{"a": '), "files are complete", "config.json cannot be read: Expecting"),
    "a broken adapter": (write("adapter/a.json", "{"), "files are complete", "adapter/a.json cannot be read: E"),
    "a pickle": (write("pytorch_model.bin", "x"), "no pickles, no foreign files", "pytorch_model.bin is a pickle"),
    "a pickle below": (write("adapter/a.pt", "x"), "no pickles, no foreign files", "adapter/a.pt is a pickle"),
    "code": (write("modeling.py", "x"), "no pickles, no foreign files", "modeling.py is not a file of a model"),
    "a folder": (write("logs/a.json", "{}"), "no pickles, no foreign files", "logs/a.json is not a file"),
    "auto_map": (edit("config.json", auto_map={"AutoModel": "a.B"}), "no remote code", "config.json has auto_map"),
    "half precision": (halve, "weights are fp32", "model.safetensors has F16"),
    "torn weights": (cut, "weights are fp32", "model.safetensors cannot be read"),
    "padding": (edit("tokenizer.json", padding={"direction": "Left"}), "tokenizer.json: no padding set", '"padding"'),
    "truncation": (edit("tokenizer.json", truncation={"a": 3}), "tokenizer.json: no padding set", "truncation"),
    "a path": (edit("config.json", _name_or_path="/home/me/run"), "no private paths or names", "the path /home/me/run"),
    "a relative path": (edit("config.json", _name_or_path="tests/tiny.py"), "no private paths or names", "tiny.py"),
    "a path of Windows": (edit("config.json", a="C:\\Users\\me"), "no private paths or names", "C:\\Users\\me"),
    "a path after auto:": (edit("config.json", a="auto:/home/kim/clip"), "no private paths or names", "/home/kim/clip"),
    "a path of a file:": (edit("config.json", a="file:/home/kim/x"), "no private paths or names", "file:/home/kim/x"),
    "a path of Windows, /": (edit("config.json", a="C:/Users/kim"), "no private paths or names", "C:/Users/kim"),
    "a path of nfs": (edit("config.json", a="/nfs/kim/x"), "no private paths or names", "/nfs/kim/x"),
    "a path of storage": (edit("config.json", a="/storage/kim"), "no private paths or names", "/storage/kim"),
    "a path of data2": (edit("config.json", a="at=/data2/kim"), "no private paths or names", "/data2/kim"),
    "a path in weights": (label(base="/home/kim/x"), "no private paths or names", "the path /home/kim/x"),
    "a path in the card": (write("README.md", CARD + "see /data/x.csv"), "no private paths or names", "/data/x.csv"),
    "a user": (edit("config.json", made_by="jihoon.kim"), "no private paths or names", "the user name jihoon.kim"),
    "a user in a path": (edit("config.json", a="x/jihoon.kim/y"), "no private paths or names", "user name jihoon"),
    "a token": (edit("config.json", a=f"see {TOKEN}"), "no token", "config.json has an access token"),
    "a token in weights": (label(note=TOKEN), "no token", "model.safetensors has an access token"),
    "a token in vocab.txt": (write("vocab.txt", f"a\n{TOKEN}\n"), "no token", "vocab.txt has an access token"),
    "a token in vocab.json": (write("vocab.json", f'{{"{TOKEN}": 1}}'), "no token", "vocab.json has an access token"),
    "a token after a word": (write("README.md", CARD + "토큰" + TOKEN), "no token", "README.md has an access token"),
    "a token in the card": (write("README.md", CARD + TOKEN), "no token", "README.md has an access token"),
    "no card": (lambda model: (model / "README.md").unlink(), "licence is stated", "README.md is missing"),
    "no licence": (write("README.md", "---\nlanguage: ko\n---\n"), "licence is stated", "has no license"),
    "other": (write("README.md", "---\nlicense: other\n---\n"), "licence is stated", "needs license_name"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_of_the_files_is_found_alone(model, defect, monkeypatch, capsys):
    monkeypatch.setattr(getpass, "getuser", lambda: "jihoon.kim")
    monkeypatch.chdir(Path(__file__).parents[1])
    harm, name, message = DEFECTS[defect]
    assert failing(check_files(model)) == {}
    harm(model)
    checks = check_files(model)
    problems = failing(checks)
    assert list(problems) == [name]
    assert message in problems[name]
    with pytest.raises(ConfigError, match="model: 1 of 9 ") as raised:
        refuse(checks)
    print_checks(checks)
    assert TOKEN not in str(raised.value) + capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/x",
        "see (https://huggingface.co/data/x), s3://data/x or hf://datasets/a/b",
        "http://localhost:8080/home/x, ../data/x, and/or, /dev/null",
        r"(?s:\s+)|\p{L}+|D:/ :/ ~ /",
    ],
)
def test_urls_and_ordinary_words_are_no_alarm(model, text):
    edit("config.json", a=text)(model)
    write("README.md", CARD + text)(model)
    write("vocab.txt", "/home/\nhf_\n##hf_a\nC:/a\n" + text)(model)
    assert failing(check_files(model)) == {}


def test_the_own_token_is_found_whatever_it_looks_like(model, monkeypatch):
    monkeypatch.setattr(file_checks, "get_token", lambda: "shibboleth")
    assert failing(check_files(model)) == {}
    edit("config.json", a="shibboleth")(model)
    assert "no token" in failing(check_files(model))


def test_hidden_files_stay_here_and_so_does_an_adapter_that_is_not_wanted(model):
    write(".cache/x.bin", "x")(model)
    write("adapter/adapter_config.json", "{}")(model)
    assert "adapter/adapter_config.json" in publishable(model)
    assert "adapter's base can be found" in failing(check_files(model))
    assert failing(check_files(model, adapter=False)) == {}
    assert not [name for name in publishable(model, adapter=False) if name.startswith((".", "adapter"))]


def test_an_adapter_whose_base_is_a_directory_is_refused_until_it_is_named(sound, tmp_path):
    model, _ = adapted(tmp_path, str(sound), sound)
    (model / "README.md").write_text(CARD, encoding="utf-8")
    named = f"adapter/adapter_config.json has {str(sound)!r}, which is not a Hub id"
    problems = failing(check_files(model))
    assert problems.pop("adapter's base can be found") == named
    assert set(problems) <= {"no private paths or names"}  # pytest's folder may hold no name of a user
    name_base(model, "org/base", None)
    assert failing(check_files(model)) == {}
    settings = json.loads((model / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "org/base"
    assert 'from_pretrained("org/base")' in (model / "adapter" / "README.md").read_text(encoding="utf-8")
    assert lora.read_base(model / "adapter") == AdapterBase("org/base", "same", "LoRA")
    edit("adapter/adapter_config.json", base_model_name_or_path="/home/me/base")(model)
    assert {"adapter's base can be found", "no private paths or names"} == set(failing(check_files(model)))


def test_a_base_that_koclip_builds_is_said_to_be_in_no_repository(sound, tmp_path):
    """Loading it by its name alone fails, with these words in the error."""
    model, _ = adapted(tmp_path, str(sound), sound)
    (model / "README.md").write_text(CARD, encoding="utf-8")
    AdapterBase(base_model=None, text_encoder=None, method="LoRA").write(model / "adapter")
    write("adapter/README.md", "load_image_side('<model.clip>'), load_text_encoder('<model.text_encoder>')")(model)
    name_base(model, None, "org/text")
    settings = json.loads((model / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == BUILT
    assert failing(check_files(model)) == {
        "adapter's base can be found": "adapter/ does not state its base: <model.clip> is missing"
    }
    name_base(model, "org/base", "org/text")
    assert failing(check_files(model)) == {}
    readme = (model / "adapter" / "README.md").read_text(encoding="utf-8")
    assert readme == "load_image_side('org/base'), load_text_encoder('org/text')"
    assert lora.read_base(model / "adapter") == AdapterBase("org/base", "org/text", "LoRA")
    check_base(model)  # asks nobody
    with pytest.raises(OSError, match=BUILT):
        AutoModel.from_pretrained(model / "adapter")


def test_a_broken_adapter_config_is_left_to_the_checks(sound, tmp_path):
    model, _ = adapted(tmp_path, str(sound), sound)
    (model / "README.md").write_text(CARD, encoding="utf-8")
    (model / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")
    name_base(model, "org/base", None)
    assert "adapter/adapter_config.json cannot be read" in failing(preflight.preflight(model))["files are complete"]


def test_ids_that_are_not_the_tokenizers_are_found(model):
    text = json.loads((model / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit("config.json", text_config=text | {"eos_token_id": 7})(model)
    problems = failing([preflight._ids(model)])["the tokenizer's ids are config.json's"]
    assert "text_config.eos_token_id is 7, the tokenizer's" in problems
    edit("config.json", text_config=text | {"vocab_size": 100})(model)
    problems = failing([preflight._ids(model)])["the tokenizer's ids are config.json's"]
    assert "text_config.vocab_size is 100" in problems


def test_weights_that_the_class_does_not_know_are_found(model):
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"extra": torch.zeros(2)}, model / "model.safetensors", metadata={"format": "pt"})
    problems = failing(preflight.preflight(model))
    assert list(problems) == ["loads by stock libraries alone"]
    assert "unexpected_keys: extra" in problems["loads by stock libraries alone"]


def test_embeddings_that_differ_are_found(model, monkeypatch):
    load = preflight.load

    def other(path, device):
        encoder = load(path, device)
        with torch.no_grad():
            encoder.model.text_projection.weight[0, 0] += 1e-4
        return encoder

    monkeypatch.setattr(preflight, "load", other)
    torch.set_num_threads(1)
    problems = failing(preflight.preflight(model))
    assert list(problems) == ["embeddings are koclip's, to 0.0"]
    assert "text embeddings differ by" in problems["embeddings are koclip's, to 0.0"]
    assert "image" not in problems["embeddings are koclip's, to 0.0"]


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model: got .*config\.json"):
        publishable(tmp_path)
