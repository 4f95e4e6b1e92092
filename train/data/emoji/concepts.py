"""What is drawn: the concepts of emojibase, their families and their captions.

Skin-tone variants are left out (they repeat one drawing in five colors under nearly the same words), and so are
emojibase's "component" group and its ungrouped regional letters, which are parts of emoji rather than things.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..drawn import keyword_captions, read_json
from .sources import CLDR, EMOJIBASE

LEFT_OUT_GROUP = "component"
VENDOR_WORDS = re.compile(r"noto|twemoji|twitter|openmoji|emoji ?one|fluent|google|microsoft", re.IGNORECASE)

JOINER, EMOJI_STYLE = "200d", "fe0f"
FEMALE, MALE, RIGHTWARDS = "2640", "2642", "27a1"
PERSON, CHILD = "1f9d1", "1f9d2"
# One concept drawn for a woman, a man and a person differs by these code points alone; each maps to the neutral form.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "1f468": (PERSON,),  # man
    "1f469": (PERSON,),  # woman
    "1f466": (CHILD,),  # boy
    "1f467": (CHILD,),  # girl
    "1f474": ("1f9d3",),  # old man
    "1f475": ("1f9d3",),  # old woman
    "1f934": ("1fac5",),  # prince
    "1f478": ("1fac5",),  # princess
    "1f385": (PERSON, "1f384"),  # Santa Claus
    "1f936": (PERSON, "1f384"),  # Mrs. Claus
    "1f57a": ("1f483",),  # man dancing
    "1f930": ("1fac4",),  # pregnant woman
    "1fac3": ("1fac4",),  # pregnant man
    "1f46b": (PERSON, "1f91d"),  # people holding hands
    "1f46c": (PERSON, "1f91d"),
    "1f46d": (PERSON, "1f91d"),
    "1f48f": (PERSON, "2764", "1f48b"),  # kiss
    "1f491": (PERSON, "2764"),  # couple with heart
    "1f46a": (PERSON, CHILD),  # family
}
_WITH_ARTICLE = {"smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "objects"}


@dataclass(frozen=True)
class Concept:
    """One emoji. `captions[0]` is its label; concepts of one `family` never straddle a concept split."""

    index: int
    hexcode: str
    label: str
    group: int
    family: str
    captions: tuple[str, ...]


def normal_hexcode(hexcode: str) -> str:
    """Lower-case code points without the variation selector FE0F, which vendors write or omit at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != EMOJI_STYLE)


def family_of(hexcode: str) -> str:
    """Key shared by the gender, direction and family-member variants of a concept."""
    parts = [part for part in normal_hexcode(hexcode).split("-") if part != JOINER]
    if len(parts) > 1:
        parts = [part for part in parts if part not in (FEMALE, MALE)]
        if parts[-1] == RIGHTWARDS:
            parts.pop()
    if not any(part in NEUTRAL or part in (PERSON, CHILD) for part in parts):
        return "-".join(parts)  # in their order, which tells the flag of Canada (CA) from that of Ascension Island (AC)
    return "-".join(sorted({new for part in parts for new in NEUTRAL.get(part, (part,))}))


def _phrase(label: str, group: str) -> str:
    """The label as it reads in a sentence: 'flag: Chad' -> 'the flag of Chad', 'apple' -> 'an apple'."""
    if label.startswith("flag: "):
        return f"the flag of {label.removeprefix('flag: ')}"
    if label.startswith("keycap: "):
        return f"the keycap {label.removeprefix('keycap: ')}"
    plain = label.replace(": ", " with ")
    if group in _WITH_ARTICLE and plain[0].islower() and not plain.endswith("s"):
        return f"{'an' if plain[0] in 'aeiou' else 'a'} {plain}"
    return plain


def captions_of(label: str, group: str, keywords: list[str], shortcodes: list[str], seed: int) -> tuple[str, ...]:
    """All captions of a concept, the canonical one (its label) first; the same for each vendor's drawing.

    Keywords are shared between concepts, so that captions and images correspond many to many.
    """
    known = {label.lower()}
    words: list[str] = []
    for word in keywords:
        if word.lower() not in known and re.search("[A-Za-z0-9]", word) and not VENDOR_WORDS.search(word):
            known.add(word.lower())
            words.append(word)
    phrase = _phrase(label, group)
    subject = f"{group.replace('-', ' and ')}: {label.removeprefix('flag: ')}"
    captions = [label, f"a drawing of {phrase}", f"a small picture of {phrase}", subject]
    captions += [code.replace("_", " ").replace("-", " ") for code in shortcodes]
    captions += keyword_captions(label, words, seed)
    kept = [caption for caption in captions if re.search("[A-Za-z0-9]", caption)]
    return tuple(dict.fromkeys(kept if VENDOR_WORDS.search(label) else [c for c in kept if not VENDOR_WORDS.search(c)]))


def _cldr_keywords(packages: Path) -> dict[str, list[str]]:
    """Normal hexcode -> keywords of the CLDR annotations."""
    table = read_json(packages, CLDR, "annotations/en/annotations.json")["annotations"]["annotations"]
    return {
        normal_hexcode("-".join(f"{ord(char):x}" for char in text)): list(entry.get("default", []))
        for text, entry in table.items()
    }


def _shortcodes(packages: Path) -> dict[str, list[str]]:
    table = read_json(packages, EMOJIBASE, "en/shortcodes/emojibase.json")
    return {normal_hexcode(code): [names] if isinstance(names, str) else list(names) for code, names in table.items()}


def read_concepts(packages: Path, seed: int) -> tuple[list[Concept], tuple[str, ...]]:
    """All concepts in emojibase order, and the names their `group` indexes."""
    group_of = {int(k): v for k, v in read_json(packages, EMOJIBASE, "meta/groups.json")["groups"].items()}
    names = tuple(name for _, name in sorted(group_of.items()) if name != LEFT_OUT_GROUP)
    keywords, shortcodes = _cldr_keywords(packages), _shortcodes(packages)
    concepts: list[Concept] = []
    for entry in read_json(packages, EMOJIBASE, "en/data.json"):
        group = group_of.get(entry.get("group", -1))
        if group is None or group == LEFT_OUT_GROUP:
            continue
        code, label = normal_hexcode(entry["hexcode"]), entry["label"].strip()
        words = [*entry.get("tags", []), *keywords.get(code, [])]
        captions = captions_of(label, group, words, shortcodes.get(code, []), seed)
        concepts.append(Concept(len(concepts), code, label, names.index(group), family_of(code), captions))
    return concepts, names
