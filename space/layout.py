"""The page of the Space and its API: Gradio Blocks around `answers.Answers`."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from answers import WAYS, Answers
from guard import MAX_LABEL, MAX_LABELS
from pieces import (
    Texts,
    add_examples,
    answering,
    captioned,
    gallery_box,
    headers,
    matches_box,
    opened,
    picture_box,
    text_box,
    ways,
)
from texts import LANGUAGES, say

from koclip.text.classes import load_templates

FONTS = ["Pretendard", "Apple SD Gothic Neo", "Noto Sans KR", "Noto Sans CJK KR", "NanumGothic", "sans-serif"]
THEME = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=FONTS)
CSS = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: auto !important; }
.gradio-container main { width: 100%; }
.gradio-container, .gradio-container * { word-break: keep-all; overflow-wrap: anywhere; }
#top { align-items: center; }
#top h1 { font-size: 1.35rem; margin: 0 0 .15rem; }
#language .wrap { flex-wrap: nowrap; justify-content: flex-end; }
#language label { flex: none; white-space: nowrap; }
.examples thead { display: none; }
#result { max-height: 30rem; overflow-y: auto; }
.gallery .grid-wrap { max-height: none !important; padding-top: 2.4rem; }  /* below the label */
#pages { align-items: center; }
footer .divider { display: none !important; }  /* it would follow the last link */
/* A short message says what went wrong. The word "Error" on each result would not help. */
[data-testid="status-tracker"] .error { display: none; }
@media (max-width: 640px) {
    #language .wrap { justify-content: flex-start; }
    #top h1 { font-size: 1.15rem; }
    .gallery .grid-container { grid-template-columns: 1fr 1fr !important; }
}
"""
_QUEUED_AT_ONCE = 2  # calls that are answered at the same time: one per core of the smallest Space
_PROMPTS = 12  # prompts that are shown


def blocks(answers: Answers, name: str, examples: dict[str, list[list[Any]]]) -> gr.Blocks:
    """Return the whole page.

    Args:
        answers: Answers the questions.
        name: Name of the model, as the page shows it.
        examples: Example inputs by tab. A click on an example fills the inputs and runs it.
    """
    texts = Texts()
    page = gr.Blocks(title="koclip", analytics_enabled=False)
    with page:
        with gr.Row(elem_id="top"):
            with gr.Column(scale=4, min_width=260):
                heading = gr.Markdown(_heading("ko", name))
            with gr.Column(scale=1, min_width=160):
                pairs = [(shown, code) for code, shown in LANGUAGES.items()]
                language = gr.Radio(pairs, value="ko", show_label=False, container=False, elem_id="language")
        with texts(gr.Tab(say("tab_classify", "ko"), id="classify"), label="tab_classify"):
            _classify_tab(answers, texts, language, examples["classify"])
        with texts(gr.Tab(say("tab_search", "ko"), id="search"), label="tab_search"):
            _search_tab(answers, texts, language, examples["search"])
        with texts(gr.Tab(say("tab_caption", "ko"), id="caption"), label="tab_caption"):
            _caption_tab(answers, texts, language, examples["caption"])
        with texts(gr.Tab(say("tab_heatmap", "ko"), id="heatmap"), label="tab_heatmap"):
            _heatmap_tab(answers, texts, language, examples["heatmap"])

        def switch(code: str, *rows: list[list[Any]]) -> list[Any]:
            return [_heading(code, name), *texts.updates(code, list(rows))]

        inputs, outputs = [language, *texts.tables], [heading, *texts.components]
        language.change(switch, inputs, outputs, api_visibility="private", show_progress="hidden")
    page.queue(max_size=512, default_concurrency_limit=_QUEUED_AT_ONCE)
    return page


def _classify_tab(answers: Answers, texts: Texts, language: gr.Radio, examples: list[list[Any]]) -> None:
    templates = ["{label}", *load_templates("ko")["photo"][:6], load_templates("ko")["drawing"][0]]
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = picture_box(texts, "image")
            labels = text_box(texts, "labels", "labels_hint", lines=3, most=MAX_LABELS * (MAX_LABEL + 2))
            template = gr.Dropdown(
                [*templates, *load_templates("en")["photo"][:3]],
                value=templates[1],
                label=say("template", "ko"),
                info=say("template_hint", "ko"),
                allow_custom_value=True,
            )
            texts(template, label="template", info="template_hint")
            whole = texts(gr.Checkbox(label=say("ensemble", "ko")), label="ensemble")
            button = texts(gr.Button(say("classify", "ko"), variant="primary"), value="classify")
        with gr.Column(min_width=300):
            result = texts(gr.Label(label=say("result", "ko"), elem_id="result"), label="result")
            prompts = gr.Textbox(label=say("prompts", "ko"), lines=4, max_lines=_PROMPTS + 1, interactive=False)
            texts(prompts, label="prompts")

    @answering
    def classify(image: str, labels: str, template: str, ensemble: bool, language: str) -> tuple[Any, str]:
        """Return the probability of each label, as {label, confidences}, and the prompts that the model read.

        Labels: one per line, or all on one line with commas. `template` contains {label}, or {label:을/를} for the
        label with its particle. `ensemble` uses the mean of the built-in templates. Errors are in `language` (ko, en).
        """
        answer = answers.classify(opened(image, language), labels, template, bool(ensemble))
        shown = answer.prompts[:_PROMPTS]
        if more := len(answer.prompts) - len(shown):
            shown.append(say("more_prompts", language, count=more))
        return answer.scores, "\n".join(shown)

    inputs, outputs = [image, labels, template, whole, language], [result, prompts]
    button.click(classify, inputs, outputs, api_name="classify", concurrency_id="model")
    add_examples(texts, examples, inputs[:-1], inputs, outputs, classify)


def _search_tab(answers: Answers, texts: Texts, language: gr.Radio, examples: list[list[Any]]) -> None:
    with gr.Row(equal_height=True):
        query = text_box(texts, "query", "query_hint", scale=5, info=False)
        button = gr.Button(say("search", "ko"), variant="primary", scale=1, min_width=110)
        texts(button, value="search")
    matches = matches_box(texts, answers.index.promises)
    examples_here = gr.Column()
    status = gr.Markdown()
    gallery = gallery_box(texts, "found")
    with gr.Row(elem_id="pages"):
        back = texts(gr.Button(say("previous", "ko"), size="sm", min_width=80), value="previous")
        page = gr.Number(1, label=say("page", "ko"), precision=0, minimum=1, container=False, min_width=80)
        texts(page, label="page")
        forward = texts(gr.Button(say("next", "ko"), size="sm", min_width=80), value="next")

    @answering
    def search(query: str, page: float, language: str, matches: float = 0) -> tuple[list[Any], str, float]:
        """Find the images that are most similar to a text: 12 images on a page. The first page is 1.

        With `matches`, such as 0.1, only images that match: at most this share of the queries that nothing matches
        shows something. Returns the images with caption and cosine similarity, a line about them, and the page.
        """
        hits, first = answers.search(query, page, matches)
        last, total = first + len(hits), len(answers.index)
        line = say("status", language, first=first + 1, last=last, total=total) if hits else say("no_match", language)
        return captioned(hits), line, page

    inputs, outputs = [query, page, language, matches], [gallery, status, page]

    def first_page(query: str, language: str, matches: float) -> Any:
        return search(query, 1, language, matches)

    def moved(step: int) -> Callable[..., Any]:
        return lambda query, page, *others: search(query, max(1, (page or 1) + step), *others)

    hidden: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model"}
    button.click(search, inputs, outputs, api_name="search", concurrency_id="model")
    query.submit(first_page, [query, language, matches], outputs, **hidden)
    page.submit(search, inputs, outputs, **hidden)
    back.click(moved(-1), inputs, outputs, **hidden)
    forward.click(moved(1), inputs, outputs, **hidden)
    for box in (query, matches):
        box.change(lambda: 1, None, page, api_visibility="private", show_progress="hidden")
    with examples_here:
        add_examples(texts, examples, [query], [query, language, matches], outputs, first_page)


def _caption_tab(answers: Answers, texts: Texts, language: gr.Radio, examples: list[list[Any]]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = picture_box(texts, "image")
            captions = text_box(texts, "captions", "captions_hint", lines=4, most=MAX_LABELS * (MAX_LABEL + 2))
            button = texts(gr.Button(say("caption", "ko"), variant="primary"), value="caption")
        with gr.Column(min_width=300):
            best = gr.Dataframe(
                headers=headers("ko"),
                label=say("best_captions", "ko"),
                type="array",
                datatype=["str", "number"],
                interactive=False,
                wrap=True,
                column_widths=["68%", "32%"],
                buttons=[],
            )
            texts(best, label="best_captions")
    gallery = gallery_box(texts, "near_images")

    @answering
    def caption(image: str, captions: str, language: str) -> tuple[Any, list[Any]]:
        """Find the ten best captions for an image, and the images that are most similar to it.

        Captions: one per line. If empty, the captions of the indexed images. Scores are cosine similarities.
        """
        picture = opened(image, language)
        scores = answers.captions(picture, captions)
        rows = [[text, round(score, 3)] for text, score in scores.items()]
        return {"headers": headers(language), "data": rows}, captioned(answers.similar(picture))

    inputs, outputs = [image, captions, language], [best, gallery]
    button.click(caption, inputs, outputs, api_name="caption", concurrency_id="model")
    add_examples(texts, examples, inputs[:-1], inputs, outputs, caption)


def _heatmap_tab(answers: Answers, texts: Texts, language: gr.Radio, examples: list[list[Any]]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = picture_box(texts, "image")
            query = text_box(texts, "heat_query", "query_hint", info=False)
            way = gr.Radio(ways("ko"), value=WAYS[0], elem_id="way", label=say("way", "ko"), info=say("way_hint", "ko"))
            texts(way, ways, label="way", info="way_hint")
            button = texts(gr.Button(say("heatmap", "ko"), variant="primary"), value="heatmap")
        with gr.Column(min_width=300):
            shown = gr.Image(label=say("heat_result", "ko"), interactive=False, format="webp", height=360, buttons=[])
            texts(shown, label="heat_result")
            status = gr.Markdown()

    @answering
    def heatmap(image: str, query: str, way: str, language: str) -> tuple[Any, str]:
        """Return an image under a heat map of a text, and a line about it.

        `way` is cover (how much the similarity drops when a place is covered) or patches (similarity of each patch).
        """
        heat = answers.heat(opened(image, language), query, way)
        rows, columns = heat.scores.shape
        low, high = float(heat.scores.min()), float(heat.scores.max())
        return heat.picture, say(f"heat_{way}", language, rows=rows, columns=columns, low=low, high=high)

    inputs, outputs = [image, query, way, language], [shown, status]
    button.click(heatmap, inputs, outputs, api_name="heatmap", concurrency_id="model")
    query.submit(heatmap, inputs, outputs, api_visibility="private", concurrency_id="model")
    add_examples(texts, examples, [image, query], inputs, outputs, heatmap)


def _heading(language: str, name: str) -> str:
    shown = name.replace("`", "")
    return f"# {say('title', language)}\n{say('about', language)}`{shown}`"
