"""Everything the Space says, in Korean and English."""

LANGUAGES = {"ko": "한국어", "en": "English"}

_TEXTS = {
    # key: (Korean, English)
    "title": ("koclip — 한국어로 그림을 읽는 CLIP", "koclip — a CLIP that reads Korean"),
    "about": (
        "그림과 글을 한 공간에 놓는 모델을 직접 써 보세요. 모델: ",
        "Try a model that puts pictures and texts into one space. Model: ",
    ),
    "language": ("언어", "Language"),
    "tab_classify": ("제로샷 분류", "Zero-shot"),
    "tab_search": ("이미지 검색", "Image search"),
    "tab_caption": ("이미지로 검색 · 설명 찾기", "Search by image"),
    "tab_heatmap": ("어디를 보았나", "Where it looked"),
    "image": ("그림", "Picture"),
    "drop": ("그림을 끌어다 놓거나 눌러서 고르세요", "Drop a picture here or click to choose one"),
    "labels": ("이름 후보", "Labels"),
    "labels_hint": (
        "한 줄에 하나씩 적거나, 한 줄에 쉼표로 나누어 적어 주세요. 한국어와 영어를 섞어도 됩니다.",
        "One per line, or separated by commas on a single line. Korean and English may be mixed.",
    ),
    "template": ("문장 틀", "Template"),
    "template_hint": (
        "{label:을/를}처럼 적으면 조사가 이름에 맞게 붙습니다. 직접 적어도 됩니다.",
        "{label:을/를} adds the Korean particle that fits. You may write your own.",
    ),
    "ensemble": ("여러 문장 틀의 평균으로 (앙상블)", "Average over many templates (ensemble)"),
    "classify": ("분류하기", "Classify"),
    "result": ("결과", "Result"),
    "prompts": ("모델이 읽은 문장", "What the model read"),
    "more_prompts": ("… 그리고 {count}개 더", "… and {count} more"),
    "query": ("찾을 것", "Query"),
    "query_hint": ("예: 빨간 별이 있다, a small blue circle", "Such as: 빨간 별이 있다, a small blue circle"),
    "search": ("검색하기", "Search"),
    "found": ("찾은 그림", "Pictures found"),
    "page": ("쪽", "Page"),
    "previous": ("이전", "Previous"),
    "next": ("다음", "Next"),
    "status": (
        "그림 {total:,}장 가운데 {first:,}–{last:,}번째로 가까운 것",
        "Nearest {first:,}–{last:,} of {total:,} pictures",
    ),
    "captions": ("설명 후보", "Captions"),
    "captions_hint": (
        "한 줄에 하나씩. 비워 두면 모음에 있는 설명에서 고릅니다.",
        "One per line. Left empty, those of the collection are taken.",
    ),
    "caption": ("찾기", "Find"),
    "best_captions": ("어울리는 설명", "Best captions"),
    "caption_column": ("설명", "Caption"),
    "score_column": ("유사도", "Similarity"),
    "near_images": ("비슷한 그림", "Similar pictures"),
    "heat_query": ("무엇을 찾을까요?", "What should it look for?"),
    "heatmap": ("보여 주기", "Show"),
    "heat_result": ("밝을수록 답이 있는 곳", "The brighter, the more it answers"),
    "way": ("어떻게 볼까요?", "How?"),
    "way_hint": (
        "가려 보기: 가렸을 때 유사도가 얼마나 떨어지는지. 조각 비교: 조각마다 찾는 말에 얼마나 가까운지.",
        "Cover: how much similarity is lost when a place is covered. Patches: how near each patch is to the query.",
    ),
    "way_cover": ("가려 보기", "Cover"),
    "way_patches": ("조각 비교", "Patches"),
    "heat_cover": (
        "{rows}×{columns}곳을 차례로 가렸습니다. 유사도가 가장 많이 떨어진 곳은 {high:.2f}만큼입니다.",
        "{rows}×{columns} places were covered in turn. The largest loss of similarity is {high:.2f}.",
    ),
    "heat_patches": (
        "조각 {rows}×{columns}개, 유사도 {low:.2f}~{high:.2f}.",
        "{rows}×{columns} patches, similarity {low:.2f} to {high:.2f}.",
    ),
    "examples": ("눌러 보기", "Examples"),
    "first_frame": ("움직이는 그림은 첫 장면만 봅니다.", "Of a moving picture only the first frame is used."),
    # refusals
    "no_image": ("그림을 먼저 올려 주세요.", "Please add a picture first."),
    "broken_image": (
        "이 파일은 그림으로 읽을 수 없습니다. JPEG, PNG, WebP, GIF로 올려 주세요.",
        "This file cannot be read as a picture. Please use JPEG, PNG, WebP or GIF.",
    ),
    "heavy_image": ("그림 파일은 {limit} MB까지 받습니다.", "Picture files may have up to {limit} MB."),
    "large_image": ("그림은 {limit}백만 화소까지 받습니다.", "Pictures may have up to {limit} million pixels."),
    "small_image": (
        "그림이 너무 작습니다. 한 변이 {limit} 화소는 되어야 합니다.",
        "Too small: at least {limit} pixels a side.",
    ),
    "narrow_image": (
        "그림이 너무 길쭉합니다. 긴 변이 짧은 변의 {limit}배를 넘을 수 없습니다.",
        "Too long and narrow: the longer side may have {limit} times the shorter.",
    ),
    "no_url": (
        "주소로는 그림을 받지 않습니다. 파일로 올려 주세요.",
        "Pictures are not fetched from addresses. Please upload a file.",
    ),
    "no_labels": ("이름을 하나 이상 적어 주세요.", "Please write at least one label."),
    "many_labels": ("이름은 {limit}개까지 받습니다.", "Up to {limit} labels."),
    "long_label": ("이름 하나는 {limit}자까지 받습니다.", "A label may have up to {limit} characters."),
    "no_text": ("찾을 말을 적어 주세요.", "Please write what to look for."),
    "long_text": ("글은 {limit:,}자까지 받습니다.", "Texts may have up to {limit:,} characters."),
    "bad_template": (
        "문장 틀에 {slot} 자리가 필요하고, 다른 중괄호는 쓸 수 없습니다.",
        "A template needs {slot} where the label goes, and no other braces.",
    ),
    "bad_way": ("보는 방법은 {limit} 가운데 하나입니다.", "The way is one of {limit}."),
    "bad_page": ("1에서 {limit} 사이의 쪽을 골라 주세요.", "Please choose a page from 1 to {limit}."),
    "no_patches": (
        "이 모델은 그림을 조각으로 나누어 보지 않아 보여 줄 수 없습니다.",
        "This model does not look at pictures in patches.",
    ),
    "too_slow": (
        "계산이 {limit}초를 넘어 멈추었습니다. 이름이나 문장 틀을 줄여 주세요.",
        "Stopped after {limit} seconds. Please use fewer labels or templates.",
    ),
    "internal": ("문제가 생겨 답하지 못했습니다. 다시 해 보세요.", "Something went wrong. Please try again."),
}


class RefusedError(ValueError):
    """Something that was asked and is not done; `message(language)` says why."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values

    def message(self, language: str) -> str:
        """Return the reason in a language."""
        return say(self.key, language, **self.values)


def say(key: str, language: str, **values: object) -> str:
    """Return a text; a language that is not known is taken for Korean."""
    korean, english = _TEXTS[key]
    text = english if language == "en" else korean
    return text.format(**values) if values else text
