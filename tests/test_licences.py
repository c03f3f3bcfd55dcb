"""What a licence in words asks, and which of several binds a model."""

import pytest

from koclip.publishing.licences import Source, Terms, conclude, terms_of


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Apache-2.0, as koclip", Terms.FREE),
        ("mit", Terms.FREE),
        ("cc-by-4.0", Terms.FREE),
        ("CC-BY-SA-4.0. Names: Unicode-3.0.", Terms.ALIKE),
        ("cc-by-nc-4.0", Terms.RESEARCH),
        ("CC-BY-NC-SA-4.0", Terms.RESEARCH),
        ("ImageNet terms of access, non-commercial research. Korean names: Apache-2.0", Terms.RESEARCH),
        ("Photos: no licence stated, free use customary. Korean names: Apache-2.0", Terms.NONE_STATED),
        ("unstated", Terms.NONE_STATED),
        ("openrail", Terms.OWN),
        ("gemma", Terms.OWN),
        ("CC-BY-4.0 for the captions; pictures under Flickr's terms of use", Terms.OWN),
        ("CC-BY-4.0, the pictures under Flickr's terms of use", Terms.OWN),
        ("cc-by-sa-4.0 captions; pictures under the terms of Getty", Terms.OWN),
        ("Texts: CC-BY-SA-3.0. Pictures: each has a licence of its own.", Terms.OWN),
        ("not MIT: all rights reserved", Terms.NONE_STATED),
        ("not MIT", Terms.OWN),
        ("MIT, except the pictures", Terms.OWN),
        ("Captions: CC-BY-4.0. Pictures have no licence.", Terms.NONE_STATED),
        ("Captions: CC-BY-4.0. Photos: listed by Open Images as CC-BY-2.0, without a promise for each.", Terms.FREE),
        ("OFL-1.1 (image resources Apache-2.0 by its README). blob: Apache-2.0.", Terms.FREE),
        ("mit; apache-2.0", Terms.FREE),
        ("", Terms.NONE_STATED),
    ],
)
def test_terms_of_licences(text, terms):
    assert terms_of(text) == terms


@pytest.mark.parametrize(
    ("licences", "id_", "name"),
    [
        ([], "apache-2.0", None),
        (["mit", "cc-by-4.0"], "apache-2.0", None),
        (["mit", "cc-by-sa-4.0"], "cc-by-sa-4.0", None),
        (["twemoji: CC-BY-4.0. openmoji: CC-BY-SA-4.0. Names: Unicode-3.0."], "cc-by-sa-4.0", None),
        (["mit", "gpl-3.0"], "gpl-3.0", None),
        (["mit", "cc-by-sa-2.0"], "other", "cc-by-sa-2.0"),  # the Hub knows 3.0 and 4.0
        (["agpl"], "other", "agpl"),
        (["mit", "MIT; pictures: ask them"], "other", "terms-of-sources"),
        (["cc-by-sa-3.0", "cc-by-sa-4.0"], "other", "share-alike-sources"),
        (["Texts: CC-BY-SA-3.0. Pictures: CC-BY-SA-4.0."], "other", "share-alike-sources"),
        (["cc-by-sa-4.0", "openrail"], "other", "terms-of-sources"),
        (["mit", "unstated"], "other", "unstated-sources"),
        (["unstated", "research only", "mit"], "other", "non-commercial-research"),
    ],
)
def test_the_strictest_source_decides(licences, id_, name):
    found = conclude([Source("data", f"s{number}", one) for number, one in enumerate(licences)], "apache-2.0")
    assert (found.id, found.name) == (id_, name)
