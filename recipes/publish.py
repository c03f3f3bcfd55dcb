"""Check a trained model or a curated data set, write its card from its numbers, and push both in one commit.

python recipes/publish.py --model runs/mine/model --repo_id org/name --dry_run   # card and pre-flight; pushes nothing
python recipes/publish.py --model runs/mine/model --repo_id org/name --tag v1.0
python recipes/publish.py --model runs/mine/model --repo_id org/name --space org/name   # and its Space
python recipes/publish.py --data curated --repo_id org/name --dry_run            # a set of koclip curate
python recipes/publish.py --help                                                 # every key and its default
"""

import tempfile
from pathlib import Path

from koclip import config, installation
from koclip.data.transforms import PixelLimit
from koclip.publishing import data_set
from koclip.publishing.card import write_card
from koclip.publishing.card_inputs import gather
from koclip.publishing.checks import CARD, name_base, publishable
from koclip.publishing.formats import int8, onnx, sentence_transformers
from koclip.publishing.preflight import preflight, print_checks, refuse
from koclip.publishing.push import Pushed, Repository, check_base, check_rights, push, push_space


def main(cfg: config.PublishConfig) -> None:
    """Run the recipe: rights, formats, card, pre-flight, push."""
    if cfg.data:
        publish_data(cfg)
        return
    directory = Path(cfg.model)
    publishable(directory)  # fail without a model before asking for a token
    targets = {"repo_id": cfg.repo_id} | ({"space": cfg.space} if cfg.space else {})
    for key, name in targets.items() if not cfg.dry_run else []:
        check_rights(name, key)
    facts = gather(cfg)
    limit = PixelLimit(cfg.max_image_pixels, "max_image_pixels")
    sets = int8.open_sets(cfg.int8_sets, facts.results["data"], limit) if cfg.onnx == "int8" else []
    if cfg.onnx:
        for name, parity in onnx.export(directory, directory, int8=cfg.onnx == "int8").items():
            print(f"{name}: {parity}")
    if sets:
        int8.print_losses(int8.measure(directory, sets, cfg.repo_id))
    if cfg.sentence_transformers:
        sentence_transformers.describe(directory)
    name_base(directory, cfg.clip, cfg.text_encoder)
    write_card(cfg, facts)
    checks = preflight(directory, cfg.repo_id, cfg.adapter)
    print_checks(checks)
    refuse(checks)
    if cfg.dry_run:
        places = " and ".join(targets.values())
        print(f"{directory / CARD} is the card. Nothing was pushed; without --dry_run it goes to {places}")
        return
    if cfg.adapter:
        check_base(directory)
    repo = Repository(cfg.repo_id, private=cfg.private)
    print_push(push(directory, publishable(directory, cfg.adapter), repo, cfg.message, cfg.tag), cfg.tag)
    if cfg.space:
        app, shown = installation.files("space"), Repository(cfg.space, "space", cfg.private)
        print_push(push_space(app, shown, cfg.repo_id, cfg.message))


def publish_data(cfg: config.PublishConfig) -> None:
    """Publish a set of `koclip curate`: rights, card and report, pre-flight, push."""
    data = data_set.read(Path(cfg.data), cfg.licenses, cfg.data_cards)
    if not cfg.dry_run:
        check_rights(cfg.repo_id)
    with tempfile.TemporaryDirectory() as folder:
        files = data_set.stage(data, Path(folder), cfg.repo_id)
        checks = data_set.check_data(data, Path(folder), files, cfg.repo_id)
        print_checks(checks)
        refuse(checks, "data")
        if cfg.dry_run:
            print(data_set.listing(Path(folder), files))
            print(f"Nothing was pushed or written; without --dry_run these files go to {cfg.repo_id}")
            return
        repo = Repository(cfg.repo_id, "dataset", cfg.private)
        print_push(push(Path(folder), files, repo, cfg.message, cfg.tag), cfg.tag)


def print_push(pushed: Pushed, tag: str | None = None) -> None:
    """Print the commit and how many files it changed."""
    added, deleted = len(pushed.changes.added), len(pushed.changes.deleted)
    changed = f"{added} files, {deleted} deleted" if added or deleted else "nothing new"
    print(f"{pushed.url} at commit {pushed.commit[:12]}: {changed}" + (f", tagged {tag}" if tag else ""))


if __name__ == "__main__":
    config.run(main, config.PublishConfig)
