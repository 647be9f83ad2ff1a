"""Stretches of text files, as the parts of a preparation read them: every document once, and no more than is needed."""

import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import UserError
from workloads.bert import corpus, wordpiece
from workloads.bert.corpus import paragraphs

LINES = ["a", "word", "", "", "longer line", " ", "\t", "\u00fc\u00df"]


@given(st.lists(st.sampled_from(LINES), max_size=30), st.data())
def test_stretches_of_a_file_have_every_document_once(tmp_path_factory, lines, data):
    file = tmp_path_factory.mktemp("text") / "t"
    mark, end = data.draw(st.sampled_from(["", "\ufeff"])), data.draw(st.sampled_from(["\n", "\r\n"]))
    raw = (mark + end.join(lines) + data.draw(st.sampled_from(["", end]))).encode()
    file.write_bytes(raw)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    groups = itertools.groupby(lines, lambda line: bool(line.strip()))
    documents = ["\n".join(group) for is_text, group in groups if is_text]
    found = [d for a, b in itertools.pairwise([0, *cuts, len(raw)]) if a < b for d in paragraphs(file, a, b)]
    assert found == documents
    assert list(paragraphs(file, 0, len(raw))) == documents


@pytest.mark.parametrize("separator", ["\n\n", "\n\n \n\n", "\r\n\r\n"])
def test_only_a_document_may_be_too_long(tmp_path, monkeypatch, separator):
    """Not the text as a whole."""
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", 100)
    file, documents = tmp_path / "t", [f"{n}" * 40 + "\n" + "b" * 50 for n in range(9)]
    file.write_text(separator.join(documents))
    assert list(paragraphs(file, 0, file.stat().st_size)) == documents


@pytest.mark.parametrize("content", ["a" * 101, "word\n" * 21, "short\n\n" + "word\n" * 21, "a\n" * 20 + "b" * 99])
def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", 100)
    file = tmp_path / "t"
    for end in ("", "\n\nAnother one."):
        file.write_text(content + end)
        with pytest.raises(
            UserError, match=rf"^--data: {file} has no blank line .*; blank lines separate documents"
        ) as stop:
            list(paragraphs(file, 0, file.stat().st_size))
        assert "\n" not in str(stop.value)


class Counted(io.FileIO):
    """A file that knows how many bytes of it were read."""

    count = 0

    def readinto(self, into):
        got = super().readinto(into)
        self.count += got
        return got


def read(file: Path, start: int, stop: int) -> tuple[list[str], int]:
    """(the documents of a stretch, bytes that were read for them)"""
    with Counted(file) as raw:
        return list(paragraphs(SimpleNamespace(open=lambda _: io.BufferedReader(raw)), start, stop)), raw.count


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (300_000, 400_000), (999_990, 1_000_000)])
def test_a_stretch_without_a_blank_line_is_read_once(tmp_path, start, stop):
    """By whom its document belongs to; who has the stretch reads to its end, and not to the next document's."""
    file = tmp_path / "t"
    file.write_text("nine more\n" * 100_000)
    found, count = read(file, start, stop)
    assert found == []
    assert count <= stop - start + 2 * io.DEFAULT_BUFFER_SIZE
    assert read(file, 0, 10) == ([("nine more\n" * 100_000).strip()], 1_000_000)


LETTERS = st.sampled_from(
    ["word", "\u00e9te\u0301", "\u732b", "un", "##a", "[MASK]", ".", " ", "  ", "\n", "\u3000", "\t"]
)


@settings(deadline=None)
@given(st.lists(LETTERS, max_size=60).map("".join), st.integers(1, 30))
def test_a_long_document_has_the_tokens_it_has_in_one_piece(text, letters):
    """A line of a hundred megabytes takes no twenty gigabytes: it is cut where no word goes on."""
    words = ["word", "ete", "\u732b", "un", "##a", "##un", ".", "#", "a"]
    tokenizer = wordpiece.build_tokenizer([*wordpiece.SPECIAL, *words])
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    counted = wordpiece._count_words(tokenizer, [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordpiece, "LETTERS_AT_ONCE", letters)
        assert list(wordpiece.token_ids(tokenizer, ["un", text, "word"]))[1] == whole
        assert wordpiece._count_words(tokenizer, [text]) == counted
        parts = list(wordpiece._stretches(text))
        assert "".join(parts) == text
        assert all(len(part) <= letters or not set(part[1:letters]) & set(" \n") for part in parts)
