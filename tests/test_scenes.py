"""koclip.data.formats.scenes: what is told is what is drawn, and nothing of the zero-shot test is shown in training."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from koclip.data.formats import scenes
from koclip.data.formats.scenes import COLOURS, HELD_OUT, PAIRS, RELATIONS, SHAPES, Scene, Thing

MANY = 2_000


def drawn(scene: Scene) -> np.ndarray:
    return scenes.draw(scene, background=0).astype(int)


def mask(scene: Scene, colour: str) -> np.ndarray:
    """Return where a scene's picture has a colour (H, W)."""
    return (np.abs(drawn(scene) - COLOURS[colour][0]).sum(axis=-1) < 60).astype(bool)


def test_scenes_and_pictures_are_functions_of_part_seed_and_index() -> None:
    scenes.scene.cache_clear()
    first = [scenes.scene("train", 0, index) for index in range(50)]
    scenes.scene.cache_clear()
    np.random.seed(1)  # global state must not matter
    assert [scenes.scene("train", 0, index) for index in range(50)] == first
    assert [scenes.scene("train", 1, index) for index in range(50)] != first
    assert [scenes.scene("test", 0, index) for index in range(50)] != first
    np.testing.assert_array_equal(scenes.draw(first[0], 7), scenes.draw(first[0], 7))
    assert (scenes.draw(first[0], 7) != scenes.draw(first[0], 8)).any()
    assert scenes.draw(first[0], 7).shape == (48, 48, 3)
    assert scenes.draw(first[0], 7).dtype == np.uint8


@pytest.mark.parametrize("part", ["train", "test"])
def test_held_out_pairs_never_occur(part) -> None:
    pairs = {(thing.colour, thing.shape) for index in range(MANY) for thing in scenes.scene(part, 0, index).things}
    assert pairs == set(PAIRS) - HELD_OUT
    all_captions = [scenes.captions(scenes.scene(part, 0, index)) for index in range(MANY)]
    words = {text for captions in all_captions for texts in captions.values() for text in texts}
    for colour, shape in HELD_OUT:
        assert not any(f"{colour} {shape}" in text or scenes.korean(colour, shape) in text for text in words)
    assert {pair for pair, _ in HELD_OUT} < set(COLOURS)


def test_unseen_pairs_show_held_out_pairs_only() -> None:
    things = [scenes.unseen_pair(1, n).things[0] for n in range(200)]
    shown = {(thing.colour, thing.shape) for thing in things}
    assert shown == HELD_OUT


def test_every_colour_and_shape_is_seen_in_training() -> None:
    assert {colour for colour, _ in scenes.SEEN_PAIRS} == set(COLOURS)
    assert {shape for _, shape in scenes.SEEN_PAIRS} == set(SHAPES)


def test_objects_are_drawn_where_the_scene_says_whole_and_apart() -> None:
    for index in range(300):
        scene = scenes.scene("train", 0, index)
        for thing in scene.things:
            rows, columns = np.nonzero(mask(Scene("single", (thing,)), thing.colour))
            assert rows.size > 12
            assert min(rows.min(), columns.min()) > 0  # nothing is cut off at the edge
            assert max(rows.max(), columns.max()) < 47
            assert abs(columns.mean() / 48 - thing.x) < 0.03
        apart = [
            np.hypot(a.x - b.x, a.y - b.y) - (a.radius + b.radius)
            for number, a in enumerate(scene.things)
            for b in scene.things[:number]
        ]
        assert all(gap > -0.02 for gap in apart)


@pytest.mark.parametrize(
    ("shape", "corners"),
    [
        ("circle", [(0.95 * np.cos(t), 0.95 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 60)]),
        ("square", [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
        ("triangle", [(0, -1.1), (0.95, 0.55), (-0.95, 0.55)]),
        (
            "star",
            [(r * np.sin(n * np.pi / 5), -r * np.cos(n * np.pi / 5)) for n in range(10) for r in [(1.05, 0.45)[n % 2]]],
        ),
    ],
)
@pytest.mark.parametrize("radius", [0.12, 0.25])
def test_shapes_have_their_outlines(shape, corners, radius) -> None:
    picture = scenes.draw(Scene("single", (Thing("black", shape, 0.5, 0.52, radius),)), 0).astype(float).mean(axis=-1)
    cover = (picture[0, 0] - picture) / (picture[0, 0] - 25)
    large = Image.new("L", (480, 480))
    outline = [(480 * (0.5 + radius * x), 480 * (0.52 + radius * y)) for x, y in corners]
    ImageDraw.Draw(large).polygon(outline, fill=255)
    expected = np.asarray(large.resize((48, 48), Image.Resampling.BOX)) / 255
    assert np.abs(cover - expected).max() < 0.45  # a corner's pixel
    assert np.abs(cover - expected).sum() < 0.05 * expected.sum() + 2


def test_relations_hold_in_the_picture() -> None:
    seen = set()
    for index in range(MANY):
        scene = scenes.scene("test", 0, index)
        if scene.kind != "relation":
            continue
        first, second = scene.things
        dx, dy = RELATIONS[scene.relation][2]
        assert (first.x - second.x) * dx + (first.y - second.y) * dy > 0.4
        seen.add(scene.relation)
        english = scenes.captions(scene)["en"][0]
        assert english.startswith(f"a {first.colour} {first.shape} {RELATIONS[scene.relation][0]} a {second.colour}")
    assert seen == set(RELATIONS)


def test_twins_differ_in_one_fact_that_the_captions_tell() -> None:
    changes = set()
    for index in range(0, MANY, 2):
        first_scene, twin = scenes.scene("train", 0, index), scenes.scene("train", 0, index + 1)
        assert first_scene.kind == twin.kind
        captions, twin_captions = scenes.captions(first_scene), scenes.captions(twin)
        for language in ("ko", "en"):
            assert set(captions[language]) != set(twin_captions[language])
        kinds = [
            {
                "count": len(s.things),
                "size": s.size,
                "relation": s.relation,
                "pairs": {(t.colour, t.shape) for t in s.things},
            }
            for s in (first_scene, twin)
        ]
        changed = [fact for fact in kinds[0] if kinds[0][fact] != kinds[1][fact]]
        assert len(changed) == 1
        changes.add((first_scene.kind, *changed))
    assert changes == {
        *(("single", "size"), ("single", "pairs")),
        *(("relation", "relation"), ("relation", "pairs"), ("count", "count")),
    }


def test_captions_are_true_and_korean_particles_fit() -> None:
    circle, star = Thing("red", "circle", 0.3, 0.5, 0.2), Thing("black", "star", 0.7, 0.5, 0.2)
    assert scenes.captions(Scene("relation", (circle, star), relation="left")) == {
        "ko": ["빨간 원이 검은 별 왼쪽에 있다"],
        "en": ["a red circle to the left of a black star"],
    }
    single = scenes.captions(Scene("single", (star,), size="small"))
    assert {"검은 별", "작은 검은 별", "작은 검은 별이 있다"} <= set(single["ko"])
    assert {"a black star", "a small black star"} <= set(single["en"])
    assert not [text for texts in single.values() for text in texts if re.search("큰|large|빨간|red|원|circle", text)]
    assert scenes.captions(Scene("count", (circle, circle, circle))) == {
        "ko": ["빨간 원 세 개", "빨간 원이 세 개 있다"],
        "en": ["three red circles"],
    }
    for index in range(MANY):
        for text in scenes.captions(scenes.scene("train", 0, index))["ko"]:
            assert not re.search(r"[(){}]", text)


def test_sizes_can_be_told_apart() -> None:
    radii = {"large": [], "small": []}
    for index in range(MANY):
        scene = scenes.scene("train", 0, index)
        if scene.kind == "single":
            radii[scene.size].append(scene.things[0].radius)
    assert min(radii["large"]) > 1.3 * max(radii["small"])


@pytest.mark.parametrize(
    ("question", "kind", "choices"),
    [
        (scenes.pair_question, "single", 40),
        (scenes.relation_question, "relation", 4),
        (scenes.size_question, "single", 2),
        (scenes.count_question, "count", 3),
    ],
)
def test_questions_have_one_right_answer(question, kind, choices) -> None:
    answers = set()
    for index in range(MANY):
        scene = scenes.scene("test", 0, index)
        if scene.kind != kind:
            continue
        texts, answer = question(scene)
        captions = scenes.captions(scene)
        for language in ("ko", "en"):
            assert len(set(texts[language])) == len(texts[language]) == choices
            true = [place for place, text in enumerate(texts[language]) if text in captions[language]]
            assert true in ([answer], [])  # "en" tells counts and sizes in the same words
        assert set(texts["en"]) & set(captions["en"])
        answers.add(answer)
    expected = {PAIRS.index(pair) for pair in scenes.SEEN_PAIRS} if choices == 40 else set(range(choices))
    assert answers == expected
