"""Build the emoji picture world: fetch pinned npm packages, render their drawings, write sprite files.

Example:
    python scripts/data/build_emoji.py --out data/emoji
    python scripts/data/build_emoji.py --out data/emoji --export 1000   # a captioned image folder to look at

Needs npm (to fetch the packages, nothing is installed) and the extra `data` (`pip install -e ".[data]"`).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger("build_emoji")

# style -> (npm package, version, licence, attribution)
PACKAGES: dict[str, tuple[str, str, str, str]] = {
    "fluent-3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji Flat, Microsoft"),
    "high-contrast": (
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Fluent Emoji High Contrast, Microsoft",
    ),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, Google"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji v1, Google"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Firefox OS Emoji, Mozilla"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC BY 4.0", "Twitter Emoji, Twitter"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "CC BY 4.0", "Emoji One, Emoji One"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "CC BY-SA 4.0", "OpenMoji, the OpenMoji project"),
}  # fmt: skip
NAMES_PACKAGE = ("unicode-emoji-json", "0.9.0")
HELD_OUT_STYLE = "openmoji"
Sprite = tuple[np.ndarray, str, str]  # pixels (size, size, 4), name, style

GROUPS = ("Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places")
# Drawings that a 64-pixel picture cannot tell apart, or that show text, numbers or a whole scene.
EXCLUDED = re.compile(
    r"o’clock|-thirty|moon|globe|map|speaker|mailbox|tray|\bbox\b|banknote|envelope|notebook|\bbook\b|bookmark"
    r"|calendar|chart|page|index|folder|ticket|suit\b|mahjong|flower playing|sun behind|cloud with|cityscape|sunrise"
    r"|sunset|bridge|night|post office|department|love hotel|oncoming|bus stop|magnifying|medal|face\b|speedboat"
    r"|railway|metro|light rail|station|departure|arrival|locked|with bell|slash|arrow|musical|level slider|control"
    r"|film|dvd|disk|videocassette|placard|identification|receipt|credit|label|nazar|hamsa|x-ray|dna|petri|prayer"
    r"|hindu|mosque|synagogue|kaaba|shrine|church|castle|wedding|Tokyo|Statue|foggy|hot springs|Japanese|tanabata"
    r"|pine decoration|carp|viewing|red envelope|reminder|performing|framed|stop sign|construction|motorway|fog\b"
    r"|wind|milky|comet|landslide|national park|stadium|derelict|houses|building|bank|hotel|hospital|school|factory"
    r"|convenience|cigarette|coffin|headstone|urn|dagger|bomb|pistol|syringe|drop of blood|pill|crutch|elevator"
    r"|toilet|plunger|mouse trap|razor|microbe|cockroach|worm|guide dog|service dog|front-facing|two-hump|water buffalo"
    r"|stuffed flatbread|fish cake|pouring|clinking|handball|rugby|softball|flying disc|field hockey|lacrosse"
    r"|woman’s|man’s|rescue|sari|briefs|bikini|pager|fax|trackball|abacus|chains|broken|link|hook|clamp|white cane"
    r"|thong|one-piece|with horns|goal net|flag|wheelchair|rickshaw|trolleybus|minibus|tram|monorail|light"
    r"|suspension|cableway|articulated|sport utility|fountain|playground|barber|seat|water wave|empty nest"
    r"|cyclone|rainbow|fireworks|sparkle|camping|desert|mount fuji|e-mail|memo|tornado|safety vest|pushpin|ledger|fork"
    r"|thread|clothes|money with|skis|thermometer|black nib|low battery|hourglass not|snowman without|camera with"
    r"|roller coaster|carousel|droplet|sewing|knot|paperclip|satellite|ice hockey|cricket game|ping pong|badminton"
    r"|with garden|rolled-up|hair pick"
)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder to write (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="sprite size in pixels (default: %(default)s)")
    parser.add_argument(
        "--held-out",
        type=Path,
        default=Path(__file__).parent / "held_out.json",
        help="JSON with the objects that stay out of training (default: beside this script)",
    )
    parser.add_argument(
        "--export", type=int, default=0, metavar="N", help="also write N pictures as a captioned folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the exported pictures")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    options = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    packages = {
        style: fetch(name, version, options.out / "packages") for style, (name, version, *_) in PACKAGES.items()
    }
    names = read_names(fetch(*NAMES_PACKAGE, options.out / "packages"))
    held = held_out_names(json.loads(options.held_out.read_text(encoding="utf-8")), list(names.values()))
    train: list[Sprite] = []
    style_set: list[Sprite] = []
    concepts: list[Sprite] = []
    for style, package in packages.items():
        for name, pixels in draw_style(style, package, names, options.size):
            if style == HELD_OUT_STYLE:
                style_set.append((pixels, name, style))
            else:
                (concepts if name in held else train).append((pixels, name, style))
    for part, rows in (("train", train), ("held_out", concepts), ("style", style_set)):
        write_sprites(options.out / f"{part}.npy", rows)
    write_attributions(options.out / "ATTRIBUTION.md")
    if options.export:
        export_folder(options.out, options.export, options.seed)
    return 0


def fetch(name: str, version: str, folder: Path) -> Path:
    """Fetch and unpack one npm package; returns its folder. Finished packages are not fetched again."""
    target = folder / f"{name.strip('@').replace('/', '-')}-{version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s@%s", name, version)
    packed = subprocess.run(
        ["npm", "pack", f"{name}@{version}", "--silent"], cwd=folder, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        raise SystemExit(f"error: 'npm pack {name}@{version}' failed: {packed.stderr.strip()[-300:]}")
    archive = folder / packed.stdout.strip().splitlines()[-1]
    partial = target.with_suffix(".part")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / "package").rename(target)
    partial.rmdir()
    archive.unlink()
    return target


def read_names(package: Path) -> dict[str, str]:
    """Code points (`1f34e`, joined by `-`, without variation selectors) -> CLDR short name, of the kept objects."""
    table: dict[str, dict[str, Any]] = json.loads((package / "data-by-emoji.json").read_text(encoding="utf-8"))
    names = {}
    for emoji, entry in table.items():
        if entry["group"] in GROUPS and not EXCLUDED.search(entry["name"]):
            names["-".join(f"{ord(c):x}" for c in emoji if ord(c) != 0xFE0F)] = entry["name"].replace("’", "'")
    return names


def held_out_names(held: dict[str, Any], names: list[str]) -> set[str]:
    """Names that contain a held-out word, singular or plural."""
    words = held["objects_for_development"] + held["objects_for_final_figures"]
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})(s|es)?\b")
    return {name for name in names if pattern.search(name)}


def draw_style(style: str, package: Path, names: dict[str, str], size: int) -> list[tuple[str, np.ndarray]]:
    """Every named drawing of one maker: (name, uint8 RGBA (size, size, 4)), cropped to what is drawn."""
    drawings = []
    if (package / "assets").is_dir():
        for path in sorted((package / "assets").glob("*.webp")):
            code = "-".join(part for part in path.stem.split("-") if part != "fe0f")
            if code in names:
                drawings.append((names[code], fit(Image.open(path, formats=("WEBP",)).convert("RGBA"), size)))
    else:
        icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        for code, name in names.items():
            icon = find_icon(package, icons, code, name)
            if icon is not None:
                drawings.append((name, fit(rasterise(icons, icon, 4 * size), size)))
    logger.info("%-14s %4d drawings", style, len(drawings))
    return drawings


def find_icon(package: Path, icons: dict[str, Any], code: str, name: str) -> str | None:
    """Icon of an emoji: by code point where the package has a table, else by its name, spelled as the maker spells."""
    if "_chars" not in icons:
        icons["_chars"] = json.loads((package / "chars.json").read_text(encoding="utf-8"))
        icons["_mashed"] = {re.sub(r"[^a-z0-9]", "", icon): icon for icon in icons["icons"]}
        for alias, entry in icons.get("aliases", {}).items():
            if entry["parent"] in icons["icons"]:
                icons["_mashed"].setdefault(re.sub(r"[^a-z0-9]", "", alias), entry["parent"])
    chars = icons["_chars"]
    for key in (code, f"{code}-fe0f"):
        if chars.get(key) in icons["icons"]:
            return chars[key]
    found: str | None = icons["_mashed"].get(re.sub(r"[^a-z0-9]", "", name.lower()))
    return found


def rasterise(icons: dict[str, Any], icon: str, size: int) -> Image.Image:
    """Draw one SVG icon at `size` pixels."""
    import resvg_py

    entry = icons["icons"][icon]
    width, height = entry.get("width", icons.get("width", 16)), entry.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{entry.get("left", 0)} {entry.get("top", 0)} {width} {height}" color="black">{entry["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA")


def fit(drawing: Image.Image, size: int) -> np.ndarray:
    """Crop to the visible part and centre it on a transparent square of `size` pixels."""
    box = drawing.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box:
        drawing = drawing.crop(box)
    scale = size / max(drawing.size)
    shape = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(shape, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    canvas.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(canvas)


def write_sprites(path: Path, rows: list[Sprite]) -> None:
    """Write `NAME.npy` and `NAME.json` (names and styles in row order)."""
    np.save(path, np.stack([pixels for pixels, _, _ in rows]))
    index = {"names": [name for _, name, _ in rows], "styles": [style for _, _, style in rows]}
    path.with_suffix(".json").write_text(json.dumps(index, indent=0, ensure_ascii=False), encoding="utf-8")
    logger.info("%s: %d drawings of %d objects", path, len(rows), len(set(index["names"])))


def write_attributions(path: Path) -> None:
    """One table of makers, packages and licences."""
    lines = ["# Drawings used", "", "| style | made by | npm package | licence |", "|---|---|---|---|"]
    lines += [f"| {style} | {by} | {name}@{v} | {licence} |" for style, (name, v, licence, by) in PACKAGES.items()]
    lines += ["", f"Names: {NAMES_PACKAGE[0]}@{NAMES_PACKAGE[1]} (MIT), Unicode CLDR short names."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def export_folder(out: Path, count: int, seed: int) -> None:
    """Write `count` composed pictures as PNG with `metadata.jsonl`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ldm.data.emoji import EmojiCompositions, render

    world = EmojiCompositions(out / "train.npy", length=count, seed=seed)
    folder = out / "export"
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for i in range(count):
            scene = world.scene(i)
            Image.fromarray(render(scene, world.sprites, world.size)[0]).save(folder / f"{i:06d}.png")
            lines.write(json.dumps({"file_name": f"{i:06d}.png", "text": scene.caption}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
