"""The pinned packages of the emoji set: who drew what, under which licence."""

from __future__ import annotations

from ..drawn import Package


def _drawings(vendor: str, version: str, author: str, licence: str, icons: str, chars: str) -> Package:
    return Package(f"@iconify-json/{vendor}", version, author, licence, {"icons.json": icons, "chars.json": chars})


VENDOR_PACKAGES: dict[str, Package] = {
    "noto": _drawings(
        "noto",
        "1.2.9",
        "Google Inc",
        "Apache-2.0",
        "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        "91485653ca890bff640f2a6c2d7be62d625a90527b6b4d816b41593675bf5c8f",
    ),
    "twemoji": _drawings(
        "twemoji",
        "1.2.5",
        "Twitter",
        "CC-BY-4.0",
        "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        "8e6a83d5a3ac185b2446154b9c4ee07c983bd4a5b2a21aa4b9ff04af9831eefe",
    ),
    "openmoji": _drawings(
        "openmoji",
        "1.2.29",
        "OpenMoji",
        "CC-BY-SA-4.0",
        "7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c",
        "8583c4c65723c22c043a50a27038c43d3d12de336ad409872b23356f4c3e3825",
    ),
    "emojione": _drawings(
        "emojione",
        "1.2.3",
        "Emoji One",
        "CC-BY-4.0",
        "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
    ),
    "fluent-emoji-flat": _drawings(
        "fluent-emoji-flat",
        "1.2.6",
        "Microsoft Corporation",
        "MIT",
        "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        "7f084c5a95807edb4702a7c9f6f18e74d59026d1c34ceb8cae85df0b9a9f0a10",
    ),
}

EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "Miles Johnson",
    "MIT",
    {
        "en/data.json": "ed014f1049bd370c5794f815850156196ac382850f51c3e9f6a9e83553fb3f01",
        "en/shortcodes/emojibase.json": "db3d41edf2f190bcb81bf171a51b1f889af774eed5dc24d21ad8dfcb998b40d3",
        "meta/groups.json": "3ce4f0a8e5890ed9d746b12e0056b170340928c1936be35cf92bb3e6d83a71e1",
    },
)

CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "The Unicode Consortium",
    "Unicode-3.0",
    {"annotations/en/annotations.json": "f22083cb86dffb63a643d5bacb5d9899f82d2fa5d388ad4f3aed72184acef505"},
)

PACKAGES: tuple[Package, ...] = (*VENDOR_PACKAGES.values(), EMOJIBASE, CLDR)

# Of chars.json where a set has no code points.
NO_CODES = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
# More vendors, to test on: each is fetched and drawn when it is asked for (see vendors).
SHIFT_VENDORS: dict[str, Package] = {
    "fluent-emoji": _drawings(
        "fluent-emoji",
        "1.2.7",
        "Microsoft Corporation",
        "MIT",
        "87f3336be6f46747d40d046a15ffa8b23809ff7a1a280b5d3521d3782fb85de7",
        NO_CODES,
    ),
    "fluent-emoji-high-contrast": _drawings(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "Microsoft Corporation",
        "MIT",
        "c522fb74fef65ccef67b38dfdbf0f3dcd4353339e4b8faec4aa45faf83ed4739",
        "009b82ac0bb2dea23b6f969c223ceff3536de326b259594d7e3dff63318bf1b7",
    ),
    "emojione-monotone": _drawings(
        "emojione-monotone",
        "1.2.1",
        "Emoji One",
        "CC-BY-4.0",
        "7b5627535a13e2aac637dcb8817e65554266da1682b3867050eff3db9862d072",
        NO_CODES,
    ),
    "emojione-v1": _drawings(
        "emojione-v1",
        "1.2.3",
        "Emoji One",
        "CC-BY-SA-4.0",
        "7209a500c5607daff4969e5d5ae25da710ab1877c29efec6199d3611a8d5c942",
        NO_CODES,
    ),
    "noto-v1": _drawings(
        "noto-v1",
        "1.2.5",
        "Google Inc",
        "Apache-2.0",
        "ce70d8aa90345cf389875c3571ecd245bd943401822a0c5a0f62336bf8487333",
        NO_CODES,
    ),
    "fxemoji": _drawings(
        "fxemoji",
        "1.2.2",
        "Mozilla",
        "Apache-2.0",
        "d8ef67b94a32d0abcd314d1c35db56178eaa8fa8ad71130e312f3460e307c2bf",
        NO_CODES,
    ),
    "streamline-emojis": _drawings(
        "streamline-emojis",
        "1.2.4",
        "Streamline",
        "CC-BY-4.0",
        "d3cb7afee48544af5657a92951cff18ffef7b150a13b3df1bb54b8c0757bfad6",
        NO_CODES,
    ),
}
# The training vendor that a set shares its history with, as an older edition or another cut of the same drawings: less
# of a shift than its style suggests.
RELATED = {"emojione-monotone": "emojione", "emojione-v1": "emojione", "noto-v1": "noto"}
