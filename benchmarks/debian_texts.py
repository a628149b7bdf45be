"""The texts of benchmarks/scale.py and compare.py from Debian's packages: a folder of .txt files for each.

Needs apt-get, dpkg-deb and, for the three whose names begin with sword-, diatheke (package diatheke).

    python benchmarks/debian_texts.py linux-doc python-doc sword-text-web --out texts
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {
    "linux-doc": "linux-doc-6.1",
    "python-doc": "python3.11-doc",
    "perl-doc": "perl-doc",
    "postgresql-doc": "postgresql-doc-15",
    **{name: name for name in ("sword-comm-mhcc", "sword-comm-tdavid", "sword-text-web")},
}
LEAST = 200
"""Characters; shorter documents are headings and redirections."""
VERSE = re.compile(r"((?:[IV]+ )?[A-Z][A-Za-z ]*?) (\d+):\d+: ?(.*)")


class _Words(HTMLParser):
    """The text of a page, with blank lines between its paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "head")
        if tag in ("p", "h1", "h2", "h3", "pre", "div"):
            self.parts.append("\n\n")
        elif tag in ("h4", "li", "tr", "dt", "dd", "table"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in ("script", "style", "head")))
        if tag in ("td", "th"):
            self.parts.append(" ")
        if tag in ("p", "h1", "h2", "h3", "pre"):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def documents(name: str, root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each document of a package that was unpacked into `root`."""
    if name.startswith("sword-"):
        yield from _chapters(root)
        return
    pattern = {
        "linux-doc": "*.rst.gz",
        "python-doc": "_sources/**/*.txt",
        "perl-doc": "*.pod",
        "postgresql-doc": "*.html",
    }
    for path in sorted(root.rglob(pattern[name])):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
            if path.suffix == ".html":
                page = _Words()
                page.feed(text)
                text = "\n".join(line.rstrip() for line in "".join(page.parts).splitlines())
            yield path.relative_to(root).as_posix(), text


def _chapters(root: Path) -> Iterator[tuple[str, str]]:
    """Of a module that diatheke reads; what is said of several verses is kept once in a chapter."""
    (conf,) = root.glob("usr/share/sword/mods.d/*.conf")
    module = re.findall(r"^\[(.+)\]", conf.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)[0]
    command = ["diatheke", "-b", module, "-f", "plain", "-k", "Gen-Rev"]
    environment = {"SWORD_PATH": str(root / "usr/share/sword"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    found = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode("utf-8", "replace")
    chapters: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in found.splitlines():
        if verse := VERSE.fullmatch(line.strip()):
            lines = chapters.setdefault(f"{verse[1]} {verse[2]}", [])
        words = (verse[3] if verse else line).strip()
        if words and words not in lines:
            lines.append(words)
    for number, (chapter, verses) in enumerate(chapters.items()):
        between = " " if max(map(len, verses), default=0) < 1000 else "\n\n"
        yield f"{number:04} {chapter}", re.sub(r" {4,}\*", "\n\n*", between.join(verses))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=list(PACKAGES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name in args.names:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out, prefix=f".{name}.") as temporary:
            folder = Path(temporary) / "texts"
            folder.mkdir()
            subprocess.run(["apt-get", "download", PACKAGES[name]], cwd=temporary, check=True)
            (package,) = Path(temporary).glob("*.deb")
            root = Path(temporary) / "root"
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
            words = 0
            for title, text in documents(name, root):
                text = re.sub(r"\n{3,}", "\n\n", text).strip()
                if len(text) >= LEAST:
                    words += len(text.split())
                    file = folder / (re.sub(r"[^\w.-]+", "_", title) + ".txt")
                    file.write_text(text + "\n", encoding="utf-8")
            count = len(list(folder.iterdir()))
            folder.rename(args.out / name)
        print(f"{name}: {words:,} words in {count} files")


if __name__ == "__main__":
    main()
