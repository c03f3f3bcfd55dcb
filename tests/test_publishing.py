"""recipes/publish.py: what goes up comes down as the same model, for programs that have never heard of koclip."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm_python
from hub_repos import Fault
from hub_server import HubServer
from PIL import Image
from runs_to_publish import adapted, pretrained, swapped
from space_server import serving

from koclip.encoders import Encoder, load
from koclip.encoders.transformers import TransformersEncoder
from koclip.publishing import push

ROOT = Path(__file__).parents[1]
PUBLISH = "recipes/publish.py"
EXPORTS = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript", "sentence_transformers"))
TOKEN = "hf_" + "writes" * 6
TEXTS = ["빨간 원", "노란 별 위에 작은 별"]
STRANGER = """
import json, sys
sys.modules["koclip"] = None
if sys.argv[3] == "whole":
    sys.modules["peft"] = None
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

expected = torch.load(sys.argv[1], weights_only=True)
if sys.argv[3] == "adapter":
    from peft import PeftModel
    base = AutoModel.from_pretrained("org/clip")
    model = PeftModel.from_pretrained(base, sys.argv[2], subfolder="adapter").base_model.model.eval()
    info = {}
else:
    model, info = AutoModel.from_pretrained(sys.argv[2], output_loading_info=True)
processor = AutoProcessor.from_pretrained(sys.argv[2])
encoded = processor(text=expected["texts"], images=[Image.open(sys.argv[4])], padding=True, return_tensors="pt")
with torch.inference_mode():
    images = model.get_image_features(pixel_values=encoded["pixel_values"]).pooler_output
    texts = model.get_text_features(encoded["input_ids"], attention_mask=encoded["attention_mask"]).pooler_output
unit = torch.nn.functional.normalize
print(json.dumps({
    "class": type(model).__name__,
    "problems": [key for keys in info.values() for key in keys],
    "image": (unit(images, dim=-1) - expected["image"]).abs().max().item(),
    "text": (unit(texts, dim=-1) - expected["text"]).abs().max().item(),
}))
"""


class Hub:
    """A Hub, and a folder for the homes of its clients."""

    def __init__(self, folder: Path) -> None:
        self.server = HubServer({TOKEN: "write"})
        self.folder = folder
        self.clip = folder / "clip" / "model"  # of the model org/clip

    def run(self, *command: str, token: str | None = TOKEN, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run Python with an empty home, near this Hub. koclip's own recipe need not be a new Python."""
        home = self.folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.server.url, "HF_HOME": str(home)}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
        if command[0] == PUBLISH:
            ran = warm_python.run(command, timeout=300, env=environment, cwd=folder)
        else:
            options: dict[str, Any] = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
            ran = subprocess.run([sys.executable, *command], check=False, timeout=300, **options)
        for file in home.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
        return ran

    def publish(self, model: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        ran = self.run(PUBLISH, "--model", str(model), "--repo_id", f"org/{name}", *options)
        assert TOKEN not in ran.stdout + ran.stderr
        return ran

    def differences(self, name: str, loaded: Any, kind: str = "whole") -> dict[str, Any]:
        """Return what a stranger sees who loads `org/name`, compared with the model and processor `made`."""
        encoder = loaded if isinstance(loaded, Encoder) else TransformersEncoder(*loaded)
        picture = self.folder / "picture.png"
        Image.linear_gradient("L").resize((50, 40)).convert("RGB").save(picture)
        expected = {"texts": TEXTS, "text": encoder.encode_texts(TEXTS)}
        with Image.open(picture) as image:
            expected["image"] = encoder.encode_images([image])
        torch.save(expected, self.folder / "expected.pt")
        torch.set_num_threads(1)
        ran = self.run("-c", STRANGER, str(self.folder / "expected.pt"), f"org/{name}", kind, str(picture), token=None)
        assert ran.returncode == 0, ran.stderr
        return dict(json.loads(ran.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return a Hub that holds one model, org/clip."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    hub.clip = pretrained(hub.folder / "clip")
    ran = hub.publish(hub.clip, "clip", "--tag", "v1.0")
    assert ran.returncode == 0, ran.stderr
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    for file in (path for path in hub.folder.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file
    for repo in hub.server.repos.values():
        assert not any(TOKEN.encode() in content for content in repo.files.values())


def same(seen: dict[str, Any], kind: str, rounding: float = 0.0) -> None:
    """Check that a clean process has the embeddings of this one; `rounding` is the largest difference of a number."""
    assert seen | {"image": 0.0, "text": 0.0} == {"class": kind, "problems": [], "image": 0.0, "text": 0.0}
    assert max(seen["image"], seen["text"]) <= rounding


def test_a_clip_from_random_weights_comes_back(hub):
    same(hub.differences("clip", load(hub.clip, "cpu")), "CLIPModel")
    repo = hub.server.repos["org/clip"]
    assert list(repo.tags) == ["v1.0"]
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= set(repo.files)
    again = hub.publish(hub.clip, "clip", "--tag", "v1.0")
    assert "nothing new, tagged v1.0" in again.stdout
    assert len(repo.commits) == 2


def test_downloads_that_break_off_go_on(hub, monkeypatch):
    monkeypatch.setattr(hub.server, "faults", [Fault("resolve", "half", 1000)])
    same(hub.differences("clip", load(hub.clip, "cpu")), "CLIPModel")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.server.broken


def test_the_cards_examples_run(hub):
    Image.new("RGB", (60, 40), "red").save(hub.folder / "photo.jpg")
    model = shutil.copytree(hub.clip.parent, hub.folder / "copy") / "model"
    formats = ("--onnx", "fp32", "--sentence_transformers") if EXPORTS else ()
    ran = hub.publish(model, "copy", *formats)
    assert ran.returncode == 0, ran.stderr
    card = hub.server.repos["org/copy"].files["README.md"].decode()
    examples = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    assert len(examples) == (5 if EXPORTS else 3)
    ran = hub.run("-c", "\n".join(examples), token=None, folder=hub.folder)
    assert ran.returncode == 0, ran.stderr
    assert "'label': '고양이'" in ran.stdout
    assert ran.stdout.count("tensor([[") == len(examples) - 2
    assert "torch.Size([1, 32])" in ran.stdout


def test_a_joint_model_comes_back(hub):
    model = pretrained(hub.folder / "joint", preset="timm:test_vit", image_size=32)
    ran = hub.publish(model, "joint")
    assert ran.returncode == 0, ran.stderr
    same(hub.differences("joint", load(model, "cpu")), "VisionTextDualEncoderModel")


def test_a_swapped_model_comes_back_under_the_licence_of_its_towers(hub):
    model = swapped(hub.folder / "swapped", "org/clip", "klue/roberta-small")
    ran = hub.publish(model, "swapped", "--licenses", "{klue/roberta-small: cc-by-sa-4.0}")
    assert ran.returncode == 0, ran.stderr
    same(hub.differences("swapped", load(model, "cpu")), "ChineseCLIPModel")
    card = hub.server.repos["org/swapped"].files["README.md"].decode()
    assert "base_model:\n- org/clip\n- klue/roberta-small\n" in card
    assert "license: cc-by-sa-4.0\n" in card
    assert "| org/clip | clip | weights | apache-2.0 | yes | yes | no | huggingface.co/org/clip |" in card  # asked


def test_an_adapter_comes_back_and_so_does_the_merged_model(hub):
    model, trained = adapted(hub.folder / "adapted", "org/clip", hub.clip)
    ran = hub.publish(model, "adapted")
    assert ran.returncode == 0, ran.stderr
    loaded = load(model, "cpu")
    same(hub.differences("adapted", loaded), "CLIPModel")
    # On one thread some CPUs round by where weights lie in memory; in one of both they are mapped from the file.
    same(hub.differences("adapted", (trained, loaded.processor), "adapter"), "CLIPModel", rounding=1e-7)


def test_a_dry_run_needs_no_token_and_pushes_nothing(hub):
    calls = sum(hub.server.calls.values())
    ran = hub.run(PUBLISH, "--model", str(hub.clip), "--repo_id", "org/dry", "--dry_run", token=None)
    assert ran.returncode == 0, ran.stderr
    assert "embeddings are koclip's, to 0.0" in ran.stdout
    assert "org/dry" not in hub.server.repos
    assert sum(hub.server.calls.values()) == calls


def test_a_model_that_fails_the_checks_is_not_pushed(hub):
    model = pretrained(hub.folder / "broken")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    ran = hub.publish(model, "broken")
    assert ran.returncode == 2
    assert "1 of 13 checks failed, so nothing was pushed. no pickles, no foreign files: pytorch_model.bin" in ran.stderr
    assert "org/broken" not in hub.server.repos


def test_a_space_shows_the_model_that_was_pushed(hub, tmp_path):
    import gradio_client

    hub.server.faults = [Fault("set_variable", "500")]
    ran = hub.publish(hub.clip, "clip", "--space", "org/show")
    assert ran.returncode == 0, ran.stderr
    assert f"{hub.server.url}/spaces/org/show at commit" in ran.stdout
    shown = hub.server.repos["spaces/org/show"]
    assert set(shown.files) == {
        path.name for path in (ROOT / "space").glob("*") if path.suffix in (".py", ".md", ".txt")
    }
    assert shown.variables == {"KOCLIP_MODEL": "org/clip"}
    assert "\ntitle: show\n" in shown.files["README.md"].decode()
    assert "\nmodels:\n- org/clip\n" in shown.files["README.md"].decode()
    for name, content in shown.files.items():
        (tmp_path / name).write_bytes(content)
    settings = {"HF_ENDPOINT": hub.server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with serving(tmp_path, tmp_path / "app.py", **settings, **shown.variables) as started:
        client = gradio_client.Client(started.url, verbose=False)
        gallery, status, _ = client.predict("빨간 원", 1, "ko", api_name="/search")
    assert len(gallery) == 12
    assert "240" in status
    asked = hub.server.calls["set_variable"]
    again = hub.publish(hub.clip, "clip", "--space", "org/show")
    assert again.stdout.count("nothing new") == 2
    assert hub.server.calls["set_variable"] == asked
    shown.commit(shown.trees[shown.commits[-1]] | {"index/index.json": (b"{}", False), "app.py": (b"old", False)})
    shown.variables["KOCLIP_MODEL"] = "org/other"
    changed = hub.publish(hub.clip, "clip", "--space", "org/show")
    assert "1 files, 0 deleted" in changed.stdout
    assert shown.files["index/index.json"] == b"{}"  # what is not the app's stays
    assert shown.files["app.py"] == (ROOT / "space" / "app.py").read_bytes()
    assert shown.variables["KOCLIP_MODEL"] == "org/clip"


def test_a_space_installs_the_commit_that_it_comes_from_once_that_is_pushed(tmp_path):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def pinned() -> str:
        file = tmp_path / "copy.txt"
        file.write_text("gradio==6.31.0\nkoclip[search] @ git+https://github.com/koclip/koclip\n", encoding="utf-8")
        push._pin(file, tmp_path)
        return file.read_text(encoding="utf-8").removeprefix("gradio==6.31.0\nkoclip[search] @ ")

    assert pinned() == "git+https://github.com/koclip/koclip\n"  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "One")
    assert pinned() == "git+https://github.com/koclip/koclip\n"  # nobody else has it
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert pinned() == f"git+https://github.com/koclip/koclip@{git('rev-parse', 'HEAD')}\n"


def test_a_space_that_may_not_be_written_stops_everything(hub):
    ran = hub.publish(hub.clip, "unwritten", "--space", "readers/show")
    assert ran.returncode == 2
    assert "space: got 'readers/show'" in ran.stderr
    assert "org/unwritten" not in hub.server.repos
