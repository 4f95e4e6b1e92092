"""The pinned packages of the icon sets: who drew what, under which licence, and what part a set plays.

None of them is animated or holds logos alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..drawn import Package


@dataclass(frozen=True)
class IconSet:
    """One icon set.

    package  its drawings and names, and its categories where iconify has them
    trained  whether it is for training; the others are to test on
    styles   the last words of names that say a style, such as `filled`, the longer ones first
    tags     a package of its makers with more words; None where none is used
    related  a set to train on with which it shares most names and the gist of the drawings: less of a shift
    """

    package: Package
    trained: bool
    styles: tuple[str, ...]
    tags: Package | None = None
    related: str | None = None

    @property
    def packages(self) -> tuple[Package, ...]:
        return (self.package,) if self.tags is None else (self.package, self.tags)


def _package(name: str, version: str, author: str, licence: str, icons: str, categories: str | None = None) -> Package:
    files = {"icons.json": icons} if categories is None else {"icons.json": icons, "metadata.json": categories}
    return Package(f"@iconify-json/{name}", version, author, licence, files)


ICON_SETS: dict[str, IconSet] = {
    "tabler": IconSet(
        _package(
            "tabler",
            "1.2.41",
            "Paweł Kuna",
            "MIT",
            "86699edb64f904a978988b4abe5892820e30da6cfc8a4ff1390dd0adf6bcce00",
        ),
        trained=True,
        styles=("filled",),
        tags=Package(
            "@tabler/icons",
            "3.52.0",
            "Paweł Kuna",
            "MIT",
            {"icons.json": "35e6bc84a8b95fca74e2d56979ddf8974a51015e4f96da8aec42030b9cb1d200"},
        ),
    ),
    "ph": IconSet(
        _package(
            "ph",
            "1.2.2",
            "Phosphor Icons",
            "MIT",
            "cf75b3541b06b3bb40f9e40880d4fb34a648c02c4bc8181f49b7db40e0f53d3c",
        ),
        trained=True,
        styles=("thin", "light", "bold", "fill", "duotone"),
    ),
    "mdi": IconSet(
        _package(
            "mdi",
            "1.2.3",
            "Pictogrammers",
            "Apache-2.0",
            "f38bcea6e945f01004384c1dbb66ddb2a538d81b7f6af3cf6b95fc603603833a",
            "96637eb099d11dd148e5c0ae71f01354cbbb3b5c0f5bfc32363c704dfb83efcf",
        ),
        trained=True,
        styles=("outline",),
    ),
    "ri": IconSet(
        _package(
            "ri",
            "1.2.10",
            "Remix Design",
            "Apache-2.0",
            "4a0e1c82c0faf914881f4776dc1bdfb4efcde4c28f249ceec17bd11c1d749994",
            "7c1d8afe37ece3082504b90e6f3df7116c3ecafc938a4ce450bbe73f8fb938a3",
        ),
        trained=True,
        styles=("line", "fill"),
    ),
    "mingcute": IconSet(
        _package(
            "mingcute",
            "1.2.8",
            "MingCute Design",
            "Apache-2.0",
            "062cd8a1d3bf1f60173784352c0b679a2b747945230aa8dac4d59f66f0787ed7",
        ),
        trained=True,
        styles=("line", "fill"),
    ),
    "boxicons": IconSet(
        _package(
            "boxicons",
            "1.2.0",
            "Boxicons",
            "MIT",
            "b1f5a1c1cbdc1a030f98fbd9b95295fb104574a88320a5e306598c96acca426f",
        ),
        trained=True,
        styles=("filled",),
    ),
    "solar": IconSet(
        _package(
            "solar",
            "1.2.13",
            "480 Design",
            "CC-BY-4.0",
            "2eb44cfa214f8f0cba47cd1d994cb8342b04a12a2b25262feed63efef49b0ca8",
            "c6c92dd94651c61ca4fa185133b372af1e011ae2af593cd51704047ece1902f8",
        ),
        trained=True,
        styles=("bold-duotone", "line-duotone", "broken", "linear", "outline", "bold"),
    ),
    "hugeicons": IconSet(
        _package(
            "hugeicons",
            "1.2.35",
            "Hugeicons",
            "MIT",
            "8d76e777b9a32a3bc17badc6c8213cd4b8155ea3bb7578828e40cf9d6d40385f",
        ),
        trained=True,
        styles=(),
    ),
    "lucide": IconSet(
        _package(
            "lucide",
            "1.2.137",
            "Lucide Contributors",
            "ISC",
            "d7f318d772fabb60549c70939f9b05661afb34ca5aef1b2fa0bc35751219714c",
        ),
        trained=False,
        styles=(),
        tags=Package(
            "lucide-static",
            "1.62.0",
            "Lucide Contributors",
            "ISC",
            {"tags.json": "9af7a675b5ce633fca9dcfee80bd192b3cf54fc8a92fa8a2d1922a4ca24591bd"},
        ),
        related="hugeicons",  # which drew 1,561 of its 1,824 names anew
    ),
    "iconoir": IconSet(
        _package(
            "iconoir",
            "1.2.11",
            "Luca Burgio",
            "MIT",
            "e1788785bf4708ed39bce81df9d9514090b79b1d7b33fc15e969a95a1acf5eb9",
            "2aa3123b5bf7322976caaddfe602215c71865c377f7d439be216fc40549a6d9a",
        ),
        trained=False,
        styles=("solid",),
    ),
    "bi": IconSet(
        _package(
            "bi",
            "1.2.7",
            "The Bootstrap Authors",
            "MIT",
            "556b40afedd827ec5d9889345ac10504c4c334c142fba5bbaaf7175a6d754478",
        ),
        trained=False,
        styles=("fill",),
    ),
    "carbon": IconSet(
        _package(
            "carbon",
            "1.2.29",
            "IBM",
            "Apache-2.0",
            "c42988a63382ac1173e44bf25446df92d366e8262a44d8f4d625d72e9c64f935",
            "d03bff6326803a201e4a17e87b56b59dbc2b1b3d8e2e99d55665237669d4d374",
        ),
        trained=False,
        styles=("filled", "outline", "solid"),
    ),
}
