"""What the Space answers and refuses, without Gradio."""

import io
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_encoder import COLOURS, ColourEncoder
from PIL import Image

SPACE = Path(__file__).parents[1] / "space"
sys.path.insert(0, str(SPACE))

import answers  # noqa: E402
import examples  # noqa: E402
import guard  # noqa: E402
import texts  # noqa: E402

from koclip.config import IndexConfig  # noqa: E402
from koclip.encoders import NoPatchesError  # noqa: E402
from koclip.encoders.transformers import TransformersEncoder, patch_embeddings  # noqa: E402
from koclip.search import build, open_index  # noqa: E402


def picture(colour=(250, 5, 5), size=(40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def app(tmp_path: Path) -> answers.Answers:
    """Return answers over 30 pictures of four colours."""
    for number in range(30):
        colour = list(COLOURS.values())[number % 4]
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(tuple(max(0, value - number // 4) for value in colour)).save(tmp_path / "photos" / f"{number:02d}.png")
    config = IndexConfig(model="colours", images=str(tmp_path / "photos"))
    build.build(config, ColourEncoder(), tmp_path / "index")
    return answers.Answers(ColourEncoder(), open_index(tmp_path / "index"))


def test_labels_are_ranked_and_prompts_have_their_particles(app):
    classified = app.classify(picture(), "파랑, 빨강、초록，, 빨강", "{label:을/를} 찍은 사진", False)
    assert next(iter(classified.scores)) == "빨강"
    assert sum(classified.scores.values()) == pytest.approx(1)
    assert classified.prompts == ["파랑을 찍은 사진", "빨강을 찍은 사진", "초록을 찍은 사진"]
    assert app.classify(picture(), "사과", "{label:을/를} 찍은 사진", False).prompts == ["사과를 찍은 사진"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("고양이, 강아지", ["고양이", "강아지"]),
        ("고양이，강아지、새", ["고양이", "강아지", "새"]),
        ("고양이\n강아지\r\n새\n", ["고양이", "강아지", "새"]),
        ("고양이,\n강아지,\n새", ["고양이", "강아지", "새"]),
        ("고양이, 강아지\n", ["고양이", "강아지"]),
        ("1,000원 지폐\n5,000원 지폐", ["1,000원 지폐", "5,000원 지폐"]),
        ("1,000원 지폐, 5,000원 지폐,1,234,567원", ["1,000원 지폐", "5,000원 지폐", "1,234,567원"]),
        ("사과,1,000원", ["사과", "1,000원"]),
        ("1,2,34,5678", ["1", "2", "34", "5678"]),
        ("서울, 대한민국\n부산, 대한민국", ["서울, 대한민국", "부산, 대한민국"]),
        (" 새 ,, 새 ", ["새"]),
        ("\u1112\u1161\u11ab, 새", ["한", "새"]),
    ],
)
def test_labels_are_lines_or_parts_of_one_line(app, text, labels):
    assert app.classify(picture(), text, "{label}", False).prompts == labels


def test_an_ensemble_reads_templates_of_each_labels_language(app):
    classified = app.classify(picture(), "빨강, blue", "not looked at", True)
    assert next(iter(classified.scores)) == "빨강"
    korean, english = answers.templates_for("빨강"), answers.templates_for("blue")
    assert len(classified.prompts) == len(korean) + len(english)
    assert "빨강을 찍은 사진" in classified.prompts
    assert "a photo of a blue." in classified.prompts


def test_search_pages_go_on_where_the_last_ended(app):
    first, start = app.search("파랑", 1)
    second, then = app.search("파랑", 2)
    assert (start, then) == (0, 12)
    assert len(first) == len(second) == 12
    assert {int(hit.caption[:2]) % 4 for hit in first[:7]} == {2}
    scores = [hit.score for hit in [*first, *second]]
    assert scores == sorted(scores, reverse=True)
    assert len({hit.caption for hit in [*first, *second]}) == 24
    assert len(app.search("파랑", 3)[0]) == 6
    assert first[0].picture is not None
    assert app.similar(picture(COLOURS["초록"]))[0].score == pytest.approx(1, abs=1e-3)


@pytest.fixture
def calibrated(app) -> answers.Answers:
    """Return the answers with thresholds for Korean: 0.1 lets only near pictures through, 0.2 every picture."""
    thresholds = {"0.05": None, "0.1": 0.999, "0.2": -1.0}
    app.index.facts["calibration"] = {"languages": {"ko": {"images": 9, "thresholds": thresholds}}}
    return app


def test_only_matches_are_shown(calibrated):
    plain = calibrated.search("파랑", 1)[0]
    matching, first = calibrated.search("파랑", 1, 0.1)
    assert first == 0
    assert [hit.caption for hit in matching] == [hit.caption for hit in plain if hit.score > 0.999]
    assert calibrated.search("파랑", 2, 0.2)[0][0].caption == calibrated.search("파랑", 2)[0][0].caption
    assert calibrated.search("없는 말", 1, 0.1) == ([], 0)
    assert len(calibrated.search("없는 말", 1)[0]) == 12


@pytest.mark.parametrize(
    ("query", "page", "alpha", "key"),
    [
        ("파랑", 1, 0.05, "bad_matches"),  # too few queries
        ("파랑", 1, 0.3, "bad_matches"),
        ("파랑", 1, "0.1", "bad_matches"),
        ("파랑", 1, [0.1], "bad_matches"),
        ("blue", 1, 0.1, "bad_matches"),  # not calibrated for English
        ("없는 말", 2, 0.1, "bad_page"),
        ("파랑", 4, 0.2, "bad_page"),
    ],
)
def test_a_promise_that_the_index_does_not_give_is_refused(calibrated, query, page, alpha, key):
    with pytest.raises(texts.RefusedError) as refused:
        calibrated.search(query, page, alpha)
    assert refused.value.key == key


def test_captions_are_those_that_are_given(app):
    scores = app.captions(picture(COLOURS["파랑"]), "빨강이다\n파랑이다\n\n 노랑이다 ")
    assert next(iter(scores)) == "파랑이다"
    assert len(scores) == 3
    assert app.captions(picture(), "") == {}  # the collection's pictures have none


def test_examples_are_images_of_the_index_with_general_words(app, tmp_path):
    """The pictures have no captions."""
    given = examples.examples(app.index, tmp_path / "examples")
    thumbnails = [app.index.entry(place).thumbnail for place in range(len(app.index))]
    shown = [Image.open(io.BytesIO(thumbnail)).convert("RGB").tobytes() for thumbnail in thumbnails]
    paths = {row[0] for tab in ("classify", "caption", "heatmap") for row in given[tab]}
    assert len(paths) == 4
    assert all(Image.open(path).tobytes() in shown for path in paths)
    assert given["search"] == [["사람"], ["음식"], ["a person"], ["food"]]
    for path, labels, template, whole in given["classify"]:
        assert len(app.classify(Image.open(path), labels, template, whole).scores) == 4
    for path, query in given["heatmap"]:
        app.heat(Image.open(path), query, "cover")


@pytest.mark.parametrize("thumbnail_size", [64, 0])
def test_examples_have_the_captions_of_the_images(thumbnail_size, tmp_path):
    """Without thumbnails, they are drawn images and their captions."""
    options = {"images": "scenes", "max_images": 20, "thumbnail_size": thumbnail_size}
    build.build(IndexConfig(model="colours", **options), ColourEncoder(), tmp_path / "index")
    index = open_index(tmp_path / "index")
    given = examples.examples(index, tmp_path / "examples")
    records = [index.entry(place).record for place in range(20)]
    own = {text for record in records for texts in record["captions"].values() for text in texts}
    texts_shown = {row[0] for row in given["search"]} | {row[1] for row in given["heatmap"]}
    texts_shown |= {label for row in given["classify"] for label in row[1].split("\n")}
    assert len(texts_shown) > 4
    assert (texts_shown <= own) == bool(thumbnail_size)
    assert given["caption"][0][1] == ""


def test_captions_are_else_those_of_the_collection(tmp_path):
    build.build(IndexConfig(model="colours", images="scenes", max_images=20), ColourEncoder(), tmp_path / "index")
    index = open_index(tmp_path / "index")
    scores = answers.Answers(ColourEncoder(), index).captions(picture(), " ")
    texts_of_all = [
        text for place in range(20) for texts in index.entry(place).record["captions"].values() for text in texts
    ]
    assert len(scores) == 10
    assert set(scores) <= set(texts_of_all)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda app: app.classify(picture(), "", "{label}", False), "no_labels"),
        (lambda app: app.classify(picture(), " ,\n,\u200b", "{label}", True), "no_labels"),
        (lambda app: app.classify(picture(), None, "{label}", True), "no_labels"),
        (lambda app: app.classify(picture(), ",".join(map(str, range(10_000))), "{label}", False), "many_labels"),
        (lambda app: app.classify(picture(), "가" * 1_000_000, "{label}", False), "many_labels"),
        (lambda app: app.classify(picture(), "가" * 201, "{label}", False), "long_label"),
        (lambda app: app.classify(picture(), "빨강", "no slot", False), "bad_template"),
        (lambda app: app.classify(picture(), "빨강", "{label} {nonsense}", False), "bad_template"),
        (lambda app: app.classify(picture(), "빨강", "{label.__class__}", False), "bad_template"),
        (lambda app: app.classify(picture(), "빨강", None, False), "bad_template"),
        (lambda app: app.classify(picture(), "빨강", "{label}" * 1_000, False), "long_label"),
        (lambda app: app.search("", 1), "no_text"),
        (lambda app: app.search("\u200b\x00", 1), "no_text"),
        (lambda app: app.search("가" * 10_001, 1), "long_text"),
        (lambda app: app.search("빨강", 0), "bad_page"),
        (lambda app: app.search("빨강", 4), "bad_page"),
        (lambda app: app.search("빨강", 1.5), "bad_page"),
        (lambda app: app.search("빨강", None), "bad_page"),
        (lambda app: app.search("빨강", float("nan")), "bad_page"),
        (lambda app: app.search("빨강", float("inf")), "bad_page"),
        (lambda app: app.heat(picture(), "빨강", "patches"), "no_patches"),
        (lambda app: app.heat(picture(), "빨강", "<b>"), "bad_way"),
        (lambda app: app.heat(picture(), " ", "cover"), "no_text"),
    ],
)
def test_what_cannot_be_done_is_refused_in_both_languages(app, call, key):
    with pytest.raises(texts.RefusedError) as caught:
        call(app)
    assert caught.value.key == key
    korean, english = caught.value.message("ko"), caught.value.message("en")
    assert re.search("[가-힣]", korean)
    assert english.isascii()
    assert len(korean) < 120
    assert "{" not in korean.replace("{label}", "")


def test_probabilities_have_the_models_own_scale(app):
    def odds(scale):
        app.encoder.scale = scale
        scores = app.classify(picture((200, 60, 5)), "빨강, 초록", "{label}", False).scores
        return np.log(scores["빨강"] / scores["초록"])

    assert odds(4.0) == pytest.approx(2 * odds(2.0), rel=1e-4)
    assert odds(2.0) > 0.1


def test_what_takes_too_long_is_stopped(app):
    ticks = iter(range(0, 1_000, 15))
    app.clock = lambda: next(ticks)
    with pytest.raises(texts.RefusedError, match="too_slow"):
        app.classify(picture(), ",".join(f"빨강 {number}" for number in range(200)), "{label}", False)
    with pytest.raises(texts.RefusedError, match="too_slow"):
        app.heat(picture(), "빨강", "cover")


def file(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "upload").write_bytes(content)
    return tmp_path / "upload"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of this size in its header, a few bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"", "broken_image"),
        (b"\x00" * 1_000, "broken_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "broken_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "broken_image"),
        (encoded(picture(size=(64, 64)), "JPEG")[:300], "broken_image"),
        (encoded(picture(size=(64, 64)), "PNG")[:60], "broken_image"),
        (bomb(100, 100), "broken_image"),
        (bomb(6_000, 6_000), "large_image"),
        (bomb(60_000, 60_000), "large_image"),
        (bomb(2**31 - 1, 2**31 - 1), "large_image"),
        (encoded(picture(size=(1, 1)), "PNG"), "small_image"),
        (encoded(picture(size=(4_000, 10)), "PNG"), "narrow_image"),
        (b"\xff" * (8 * 2**20 + 1), "heavy_image"),
    ],
)
def test_bad_pictures_are_refused(tmp_path, content, key):
    with pytest.raises(texts.RefusedError) as caught:
        guard.read_picture(file(tmp_path, content))
    assert caught.value.key == key


def test_unusual_pictures_are_read(tmp_path):
    for image, kind in (
        (Image.new("CMYK", (40, 30), (0, 200, 200, 0)), "JPEG"),
        (Image.new("L", (40, 30), 90), "PNG"),
        (Image.new("I;16", (40, 30), 9_000), "PNG"),
        (Image.new("RGBA", (40, 30), (250, 0, 0, 90)), "WEBP"),
        (Image.new("P", (40, 30), 3), "GIF"),
    ):
        read, moves = guard.read_picture(file(tmp_path, encoded(image, kind)))
        assert (read.mode, read.size, moves) == ("RGB", (40, 30), False)
    moving = encoded(picture(), "GIF", save_all=True, append_images=[picture((0, 0, 250))])
    read, moves = guard.read_picture(file(tmp_path, moving))
    assert moves
    pixel = read.getpixel((5, 5))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 200


def test_a_covered_place_loses_what_was_asked_for(app):
    scene = Image.new("RGB", (70, 70), (120, 120, 120))
    scene.paste((250, 5, 5), (50, 50, 70, 70))
    heat = app.heat(scene, "빨강", "cover")
    assert heat.scores.shape == (7, 7)
    assert heat.scores.min() >= 0
    row, column = np.unravel_index(heat.scores.argmax(), (7, 7))
    assert row >= 5
    assert column >= 5
    assert heat.picture.size == (480, 480)


def test_the_map_lies_over_what_the_model_sees():
    image = Image.new("RGB", (900, 300), (255, 255, 255))
    assert answers.seen(image, (1.0, 1.0)) == (300, 0, 600, 300)
    assert answers.seen(image, (0.875, 0.875)) == (319, 19, 581, 281)
    assert answers.seen(image, None) == (0, 0, 900, 300)
    scores = np.array([[0.0, 0.0], [0.0, 1.0]])
    shown = np.asarray(answers.overlay(image, scores, (1.0, 1.0)).convert("L"), dtype=float)
    assert shown.shape == (240, 720)
    assert shown[:, :230].max() < 100  # not seen: dimmed
    assert shown[200, 460] > shown[40, 260] + 50
    answers.overlay(image, np.zeros((2, 2)), None)  # nothing stands out


def test_patches_are_read_as_the_class_token_is():
    from tiny import tiny_config, tiny_tokenizer

    from koclip.models.dual_encoder import from_scratch

    built, processor = from_scratch(tiny_config(), tiny_tokenizer())
    model: Any = built.eval()
    encoder = TransformersEncoder(model, processor)
    patches = encoder.patches(picture(size=(80, 60)))
    assert patches.shape == (4, 4, 32)
    assert torch.allclose(patches.norm(dim=-1), torch.ones(4, 4), atol=1e-5)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        state = model.vision_model(pixel_values=pixels).last_hidden_state
        expected = model.visual_projection(model.vision_model.post_layernorm(state[1, 1 + 4 * 2 + 3]))
        patches = patch_embeddings(model, pixels)
    assert torch.allclose(patches[1, 2, 3], torch.nn.functional.normalize(expected, dim=-1), atol=1e-6)
    assert encoder.view == (1.0, 1.0)
    assert encoder.scale == pytest.approx(model.logit_scale.exp().item())


def test_a_resnet_has_no_patches():
    from tiny import tiny_config, tiny_tokenizer

    from koclip.models.dual_encoder import from_scratch

    model, _ = from_scratch(tiny_config(preset="timm:test_resnet", image_size=32), tiny_tokenizer())
    with pytest.raises(NoPatchesError):
        patch_embeddings(model, torch.zeros(1, 3, 32, 32))


def test_every_text_is_there_in_both_languages():
    for key, (korean, english) in texts._TEXTS.items():
        assert korean, key
        assert english, key
        assert sorted(re.findall(r"{\w+[^}]*}", korean)) == sorted(re.findall(r"{\w+[^}]*}", english))
        assert re.search("[가-힣]", korean) or key == "title"
    used = {
        key for source in SPACE.glob("*.py") for key in re.findall(r'"([a-z_]+)"', source.read_text(encoding="utf-8"))
    }
    assert not [key for key in texts._TEXTS if key not in used and not key.startswith(("way_", "heat_"))]


def test_the_space_has_its_front_matter():
    import yaml

    text = (SPACE / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---")[1])
    assert facts["sdk"] == "gradio"
    assert facts["app_file"] == "app.py"
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={facts['sdk_version']}" in lines
    for endpoint in ("/classify", "/search", "/caption", "/heatmap"):
        assert endpoint in text


def test_the_files_stay_short():
    for source in SPACE.glob("*.py"):
        assert source.read_text(encoding="utf-8").count("\n") <= 300, source.name
