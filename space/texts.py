"""All texts of the Space, in Korean and English."""

LANGUAGES = {"ko": "한국어", "en": "English"}

_TEXTS = {
    # key: (Korean, English)
    "title": ("koclip — 한국어를 이해하는 CLIP", "koclip — a CLIP that understands Korean"),
    "about": (
        "이미지와 텍스트를 한 공간에 놓는 모델을 직접 써 보세요. 모델: ",
        "Try a model that puts images and texts into one space. Model: ",
    ),
    "language": ("언어", "Language"),
    "tab_classify": ("제로샷 분류", "Zero-shot"),
    "tab_search": ("이미지 검색", "Image search"),
    "tab_caption": ("이미지로 검색", "Search by image"),
    "tab_heatmap": ("어디를 보았나", "Where it looked"),
    "image": ("이미지", "Image"),
    "drop": ("이미지를 끌어다 놓거나 눌러서 고르세요", "Drop an image here or click to choose one"),
    "labels": ("레이블", "Labels"),
    "labels_hint": (
        "한 줄에 하나씩, 또는 한 줄에 쉼표로 나누어 적어 주세요. 한국어와 영어를 섞어도 됩니다.",
        "One per line, or all on one line with commas. You may mix Korean and English.",
    ),
    "template": ("템플릿", "Template"),
    "template_hint": (
        "{label} 자리에 레이블이 들어갑니다. {label:을/를}로 적으면 알맞은 조사가 붙습니다. 직접 적어도 됩니다.",
        "The label replaces {label}. {label:을/를} adds the Korean particle that fits. You may write your own.",
    ),
    "ensemble": ("내장 템플릿 여러 개의 평균 (앙상블)", "Average over the built-in templates (ensemble)"),
    "classify": ("분류하기", "Classify"),
    "result": ("결과", "Result"),
    "prompts": ("모델이 읽은 문장", "Sentences that the model read"),
    "more_prompts": ("… 그리고 {count}개 더", "… and {count} more"),
    "query": ("검색어", "Query"),
    "query_hint": ("예: 바닷가를 걷는 사람, a dog on the grass", "For example: 바닷가를 걷는 사람, a dog on the grass"),
    "search": ("검색하기", "Search"),
    "found": ("찾은 이미지", "Images found"),
    "page": ("쪽", "Page"),
    "previous": ("이전", "Previous"),
    "next": ("다음", "Next"),
    "status": (
        "이미지 {total:,}장 중 {first:,}–{last:,}번째, 유사도가 높은 순서입니다.",
        "Images {first:,}–{last:,} of {total:,}, the most similar first.",
    ),
    "matches": ("맞는 그림만 보기", "Only real matches"),
    "matches_hint": (
        "맞는 그림이 없는 검색어 가운데 그래도 그림을 보이는 것의 비율을 이만큼으로 막습니다.",
        "Of the queries that nothing matches, at most this share still shows something.",
    ),
    "matches_off": ("끄기", "Off"),
    "no_match": ("맞는 그림이 없습니다.", "No picture matches."),
    "captions": ("캡션", "Captions"),
    "captions_hint": (
        "한 줄에 하나씩 적어 주세요. 비워 두면 검색 대상 이미지의 캡션에서 고릅니다.",
        "One per line. If empty, the captions of the indexed images are used.",
    ),
    "caption": ("찾기", "Find"),
    "best_captions": ("가장 비슷한 캡션", "Best captions"),
    "caption_column": ("캡션", "Caption"),
    "score_column": ("유사도", "Similarity"),
    "near_images": ("비슷한 이미지", "Similar images"),
    "heat_query": ("무엇을 찾을까요?", "What should it look for?"),
    "heatmap": ("보기", "Show"),
    "heat_result": ("밝을수록 검색어와 관계가 깊은 곳", "Brighter: more related to the query"),
    "way": ("방법", "Method"),
    "way_hint": (
        "가려 보기: 한 곳을 가리면 유사도가 얼마나 떨어지는지 봅니다. 패치 비교: 패치마다 검색어와의 유사도를 봅니다.",
        "Cover: how much the similarity drops when a place is covered. Patches: the similarity of each patch.",
    ),
    "way_cover": ("가려 보기", "Cover"),
    "way_patches": ("패치 비교", "Patches"),
    "heat_cover": (
        "{rows}×{columns}곳을 차례로 가렸습니다. 유사도는 최대 {high:.2f} 떨어졌습니다.",
        "{rows}×{columns} places were covered one after the other. The similarity dropped by at most {high:.2f}.",
    ),
    "heat_patches": (
        "패치 {rows}×{columns}개, 유사도 {low:.2f}~{high:.2f}.",
        "{rows}×{columns} patches, similarity {low:.2f} to {high:.2f}.",
    ),
    "examples": ("예시: 눌러 보세요", "Examples: click to try"),
    "first_frame": ("움직이는 이미지는 첫 장면만 씁니다.", "Only the first frame of an animated image is used."),
    # reasons for refusing an input
    "no_image": ("이미지를 먼저 올려 주세요.", "Please add an image first."),
    "broken_image": (
        "이 파일은 이미지로 읽을 수 없습니다. JPEG, PNG, WebP, GIF로 올려 주세요.",
        "This file cannot be read as an image. Please use JPEG, PNG, WebP or GIF.",
    ),
    "heavy_image": ("이미지 파일은 {limit} MB까지 받습니다.", "An image file may have up to {limit} MB."),
    "large_image": ("이미지는 {limit}백만 화소까지 받습니다.", "An image may have up to {limit} million pixels."),
    "small_image": (
        "이미지가 너무 작습니다. 짧은 변이 {limit}화소 이상이어야 합니다.",
        "This image is too small. Its shorter side must have at least {limit} pixels.",
    ),
    "narrow_image": (
        "이미지가 너무 길쭉합니다. 긴 변은 짧은 변의 {limit}배까지 됩니다.",
        "This image is too narrow. Its longer side may be at most {limit} times its shorter side.",
    ),
    "no_url": (
        "웹 주소로는 이미지를 받지 않습니다. 파일로 올려 주세요.",
        "Images are not downloaded from web addresses. Please upload a file.",
    ),
    "no_labels": ("레이블을 하나 이상 적어 주세요.", "Please write at least one label."),
    "many_labels": ("{limit}개까지 적을 수 있습니다.", "At most {limit} entries are allowed."),
    "long_label": ("하나에 {limit}자까지 적을 수 있습니다.", "Each may have at most {limit} characters."),
    "no_text": ("텍스트를 적어 주세요.", "Please write a text."),
    "long_text": ("텍스트는 {limit:,}자까지 적을 수 있습니다.", "A text may have at most {limit:,} characters."),
    "bad_template": (
        "템플릿에는 {slot}이 있어야 하며, 다른 중괄호는 쓸 수 없습니다.",
        "A template must contain {slot}, and no other braces.",
    ),
    "bad_way": ("방법은 {limit} 중 하나여야 합니다.", "The method must be one of {limit}."),
    "bad_matches": (
        "맞는 그림만 보기는 이 검색어에 쓸 수 없습니다. 쓸 수 있는 것: {limit}.",
        "Only real matches cannot be shown for this query. Available: {limit}.",
    ),
    "bad_page": ("쪽은 1에서 {limit}까지 고를 수 있습니다.", "Please choose a page from 1 to {limit}."),
    "no_patches": (
        "이 모델은 이미지를 패치로 나누지 않아 이 방법을 쓸 수 없습니다.",
        "This model has no patches. Please choose the other method.",
    ),
    "too_slow": (
        "{limit}초가 지나 계산을 멈추었습니다. 레이블이나 템플릿을 줄여 주세요.",
        "Stopped after {limit} seconds. Please use fewer labels or templates.",
    ),
    "internal": ("문제가 생겨 답하지 못했습니다. 다시 시도해 주세요.", "Something went wrong. Please try again."),
}


class RefusedError(ValueError):
    """An input that the Space refuses. `message(language)` is the reason for the visitor."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values

    def message(self, language: str) -> str:
        """Return the reason in a language."""
        return say(self.key, language, **self.values)


def say(key: str, language: str, **values: object) -> str:
    """Return a text in a language, with its values filled in. An unknown language gives Korean."""
    korean, english = _TEXTS[key]
    text = english if language == "en" else korean
    return text.format(**values) if values else text
