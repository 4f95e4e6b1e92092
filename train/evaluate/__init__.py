"""Evaluation on held-out data: retrieval both ways, and zero-shot classification of the subject group.

    python -m train.evaluate runs/emoji

reloads the last whole checkpoint of the run (safetensors and JSON only) and writes evaluation.md and evaluation.json
there. Everything runs in fp32 on white backgrounds, without augmentation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from train import checkpoint, progress
from train.config import Config, ConfigError
from train.data import DataError, Pairs, SetupError, composite, describe_bad, load_pairs, prepare_emoji
from train.data.manifest import read_manifest
from train.files import explain, write_atomically
from train.fingerprint import SHORT, of_data
from train.model import Clip
from train.tokenizer import encode

SPLITS = {"heldout": "held-out drawings", "vendor": "unseen vendor", "concepts": "unseen concepts"}
DEPTHS = (1, 5, 10)
CHUNK = 256
TABLE, FIGURES = "evaluation.md", "evaluation.json"


@dataclass(frozen=True)
class Retrieval:
    """Recalls at DEPTHS, and R@1 of a guess."""

    recall: dict[int, float]
    chance: float


@dataclass(frozen=True)
class SplitResult:
    """``captions``: different canonical captions of the split. ``zero_shot_majority``: share of its largest group."""

    images: int
    captions: int
    image_to_text: Retrieval
    text_to_image: Retrieval
    zero_shot: float
    zero_shot_chance: float
    zero_shot_majority: float


@dataclass(frozen=True)
class Data:
    """The held-out splits by name, each group in words (see describe_groups), and the bad samples that were left out of
    each split and of ``train``, by reason."""

    splits: dict[str, Pairs]
    groups: list[list[str]]
    left_out: dict[str, dict[str, int]]


@torch.no_grad()
def embed_images(model: Clip, images: Tensor) -> Tensor:
    """(n, 4, H, W) uint8 RGBA → (n, E) unit rows."""
    return torch.cat([model(composite(chunk, None), None)[0] for chunk in _watched(images.split(CHUNK))])


@torch.no_grad()
def embed_captions(model: Clip, tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """(n, E) unit rows."""
    tokens = encode(tokenizer, captions, model.text.positions.shape[0])
    return torch.cat([model(None, chunk)[1] for chunk in _watched(tokens.split(CHUNK))])


def _watched(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks, each of which counts as progress."""
    for chunk in chunks:
        progress.tick()
        yield chunk


def describe_groups(train: Pairs) -> list[list[str]]:
    """Each group in words: the labels of its concepts in the training split, or its name where it has none there."""
    words: list[list[str]] = [[] for _ in train.group_names]
    for label, group in sorted(set(zip((texts[0] for texts in train.captions), train.groups.tolist(), strict=True))):
        words[group].append(label)
    return [labels or [name.replace("-", " and ")] for labels, name in zip(words, train.group_names, strict=True)]


def prototypes(model: Clip, tokenizer: Tokenizer, groups: list[list[str]]) -> Tensor:
    """(groups, E): the unit mean embedding of each group's texts (see describe_groups)."""
    means = torch.stack([embed_captions(model, tokenizer, texts).mean(0) for texts in groups])
    return torch.nn.functional.normalize(means, dim=1)


def retrieve(model: Clip, tokenizer: Tokenizer, pairs: Pairs, x: Tensor) -> tuple[Retrieval, Retrieval]:
    """Image → text and text → image, between all images of a split, x (n, E), and the canonical captions of all its
    concepts.

    Several drawings of one concept share its caption: an image has one right caption, a caption one or more right
    images, any of which counts.
    """
    concepts, concept_of = torch.unique(pairs.concepts, return_inverse=True)
    first = {int(concept): index for index, concept in reversed(list(enumerate(concept_of.tolist())))}
    captions = [pairs.captions[first[index]][0] for index in range(len(concepts))]
    similarity = x @ embed_captions(model, tokenizer, captions).T  # (images, captions); a few million entries at most
    positive = torch.nn.functional.one_hot(concept_of, len(concepts)).bool()
    return _retrieval(similarity, positive), _retrieval(similarity.T, positive.T)


def evaluate_split(model: Clip, tokenizer: Tokenizer, pairs: Pairs, groups: Tensor) -> SplitResult:
    """Retrieval, and zero-shot groups: an image goes to the nearest of `groups` (see prototypes)."""
    x = embed_images(model, pairs.images)
    image_to_text, text_to_image = retrieve(model, tokenizer, pairs, x)
    predicted = (x @ groups.T).argmax(1)
    present = torch.bincount(pairs.groups, minlength=len(pairs.group_names))
    return SplitResult(
        images=len(pairs),
        captions=len(pairs.concepts.unique()),
        image_to_text=image_to_text,
        text_to_image=text_to_image,
        zero_shot=float((predicted == pairs.groups).double().mean()),
        zero_shot_chance=1 / len(pairs.group_names),
        zero_shot_majority=float(present.max()) / len(pairs),
    )


def _retrieval(similarity: Tensor, positive: Tensor) -> Retrieval:
    """Rows query columns; the best right column counts. A tie with a wrong column counts as a miss."""
    best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    better = ((similarity >= best) & ~positive).sum(1)
    chance = float(positive.double().mean(1).mean())
    return Retrieval({depth: float((better < depth).double().mean()) for depth in DEPTHS}, chance)


def data_folder(config: Config) -> Path:
    """The prepared data of a run: its own folder, or the emoji set, fetched and drawn if that was never done."""
    if config.data.folder is None:
        return prepare_emoji(size=config.data.image_size, seed=config.data.seed)
    folder = Path(config.data.folder)
    size = read_manifest(folder).size
    if size != config.data.image_size:
        raise ConfigError(
            f"data.image_size={config.data.image_size}, but the pictures of {folder} have {size} pixels a side; "
            f"set data.image_size={size}"
        )
    return folder


def read_data(config: Config, folder: Path, train: Pairs | None = None) -> Data:
    """All that an evaluation needs of a prepared folder. `train`: the training split, if it is in memory already.

    Raises:
        DataError: a split is missing, empty or has too many bad samples.
    """
    missing = sorted(SPLITS.keys() - read_manifest(folder).shards.keys())
    if missing:
        raise DataError(
            f"{folder} lacks the splits {', '.join(missing)}, which the evaluation needs; give data that hold "
            f"{', '.join(SPLITS)} besides train"
        )
    limit = config.data.max_bad_fraction
    splits = {split: load_pairs(folder, split, max_bad_fraction=limit) for split in SPLITS}
    if train is None or train.corrupted.any():  # corrupted captions do not describe the groups of their pictures
        train = load_pairs(folder, "train", max_bad_fraction=limit)
    left_out = {"train": train.bad, **{split: pairs.bad for split, pairs in splits.items()}}
    return Data(splits, describe_groups(train), left_out)


def evaluate_checkpoint(
    folder: Path, data: Data, before_each: Callable[[], None] = lambda: None
) -> dict[str, SplitResult]:
    """The table of one checkpoint folder. `before_each` is called before each split, and may raise to leave."""
    model, tokenizer, _ = checkpoint.read_model(folder)
    groups = prototypes(model, tokenizer, data.groups)
    results = {}
    for split, pairs in data.splits.items():
        before_each()
        results[split] = evaluate_split(model, tokenizer, pairs, groups)
    return results


def table(results: dict[str, SplitResult]) -> str:
    """Markdown; numbers in percent."""
    lines = [
        "| split | images | captions | image → text R@1 / 5 / 10 | text → image R@1 / 5 / 10 | chance R@1 "
        "| zero-shot group | chance | majority |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for split, one in results.items():
        chances = f"{100 * one.image_to_text.chance:.2f} / {100 * one.text_to_image.chance:.2f}"
        recalls = [
            " / ".join(f"{100 * way.recall[depth]:.1f}" for depth in DEPTHS)
            for way in (one.image_to_text, one.text_to_image)
        ]
        lines.append(
            f"| {SPLITS[split]} | {one.images} | {one.captions} | {recalls[0]} | {recalls[1]} | {chances} "
            f"| {100 * one.zero_shot:.1f} | {100 * one.zero_shot_chance:.1f} | {100 * one.zero_shot_majority:.1f} |"
        )
    return "\n".join(lines)


def report(results: dict[str, SplitResult], data: Data) -> str:
    """The table, and what it was not computed on."""
    left_out = "; ".join(f"{SPLITS.get(split, split)}: {describe_bad(bad)}" for split, bad in data.left_out.items())
    return f"{table(results)}\n\nBad samples left out: {left_out}."


def write(run: Path, folder: Path, results: dict[str, SplitResult], data: Data) -> None:
    """evaluation.md and evaluation.json in the run."""
    text = f"# {run.name}, {folder.name}\n\nIn percent; held-out data only.\n\n{report(results, data)}\n"
    write_atomically(run / TABLE, text.encode())
    rows = {
        "checkpoint": folder.name,
        "splits": {split: asdict(one) for split, one in results.items()},
        "left_out": data.left_out,
    }
    write_atomically(run / FIGURES, json.dumps(rows, indent=1).encode())


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description="Evaluate a finished or stopped run.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/emoji")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint.find(options.run, warn=lambda text: print(text, file=sys.stderr))
        config = checkpoint.read_config(folder)
        place = data_folder(config)
        _warn_of_other_data(folder, place)
        data = read_data(config, place)
        results = evaluate_checkpoint(folder, data)
        print(f"{folder}\n\n{report(results, data)}", flush=True)  # first, for the disk may be full
        write(options.run, folder, results, data)
    except (checkpoint.CheckpointError, ConfigError, DataError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _warn_of_other_data(folder: Path, data: Path) -> None:
    """Held-out data are comparable only with the training data that they were held out from."""
    then = checkpoint.read_fingerprint(folder)
    if then is not None and then.data != (now := of_data(data)):
        words = f"{then.data[:SHORT]} then, {now[:SHORT]} in {data}"
        print(f"warning: {folder.name} was trained on other data (fingerprint {words})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
