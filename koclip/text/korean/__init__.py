"""Korean: Hangul, particles, endings, nouns, Latin letters, and rewritten captions."""
