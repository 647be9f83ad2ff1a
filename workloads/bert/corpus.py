"""Documents: where the text comes from, and which documents are held out.

`docs`: the English inside every CPython, the help topics of pydoc and the docstrings of the standard library,
read by parsing its sources (importing them would run them). One module's docstrings make one document.
`text:GLOB`: UTF-8 files in path order; blank lines separate documents, as in the input of BERT's own
pretraining.
"""

import ast
import functools
import glob
import hashlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UserError

DOCUMENT_BYTES = 100 * 10**6  # a longer one is a file whose documents are not separated
HELDOUT_ONE_IN = 16  # documents: a bit more than 6 % of the text
TOPICS = "pydoc_data/topics.py"
# Not part of every installation, or not prose: tests and demonstrations.
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "turtledemo",
        "__pycache__",
    }
)


@dataclass(frozen=True)
class Corpus:
    """Files of one kind, in the order in which they are read."""

    kind: str
    root: Path
    files: tuple[Path, ...]

    def facts(self) -> list[tuple[str, int, int]]:
        """(path, bytes, mtime in ns) of each file: cheap, and different when the text may be different."""
        found = []
        for path in self.files:
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
        return found

    def documents(self) -> Iterator[str]:
        """Every document, stripped and not empty. Raises UserError naming a file that cannot be read."""
        yield from _docs(self.root, self.files) if self.kind == "docs" else _paragraphs(self.files)


def absolute_pattern(pattern: str, is_glob: bool) -> str:
    """The same files from any folder; a working directory with brackets in its name is not part of a pattern."""
    expanded = os.path.expanduser(pattern)
    whole = os.path.abspath(expanded)
    if not is_glob or os.path.isabs(expanded) or os.path.exists(whole):
        return whole
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), expanded))


def find_corpus(data: str) -> Corpus:
    """The files that `--data` names. Raises UserError where it names nothing that can be read."""
    kind, _, pattern = data.partition(":")
    if data == "docs":
        root = Path(sysconfig.get_path("stdlib"))
        files = tuple(_stdlib_sources(root))
        if not files:
            raise UserError(f"--data docs: this Python has no sources in {root}; give text files: --data 'text:GLOB'")
        return Corpus(kind, root, files)
    if kind != "text" or not pattern:
        raise UserError(f"--data {data}: not known; write docs or text:GLOB, such as --data 'text:corpus/*.txt'")
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(name) for name in found if os.path.isfile(name))
    if not files:
        raise UserError(f"--data {data}: no file matches; give a pattern of text files, here or mounted, in quotes")
    return Corpus(kind, Path(), files)


def is_heldout(document: str) -> bool:
    """Whether a document is held out: by its content alone, so equal documents are never on both sides."""
    digest = hashlib.sha256(" ".join(document.split()).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 over the documents in order, as hexadecimal."""
    total = hashlib.sha256()
    for document in corpus.documents():
        raw = document.encode("utf-8")
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


def _stdlib_sources(root: Path) -> Iterator[Path]:
    """The standard library's .py files in an order that is the same on every machine."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        names += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.endswith(".py")]
    return (root / name for name in sorted(names, key=lambda name: name.split(os.sep)))


@functools.lru_cache(maxsize=1)  # preparing reads the documents four times; parsing them takes seconds
def _docs(root: Path, files: tuple[Path, ...]) -> tuple[str, ...]:
    seen: set[str] = set()
    documents: list[str] = []
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            # A few files of the standard library are templates or bad on purpose; they hold no prose.
            continue
        is_topics = path.relative_to(root).as_posix() == TOPICS
        found = _topics(tree) if is_topics else _docstrings(tree)
        # A literal may hold a lone surrogate, which no UTF-8 text can.
        plain = [text.encode("utf-8", "replace").decode() for text in found]
        texts = [text for text in dict.fromkeys(plain) if text not in seen]
        seen.update(texts)
        # A help topic is a document of its own; the docstrings of a module belong together.
        documents += texts if is_topics or not texts else ["\n\n".join(texts)]
    return tuple(documents)


def _topics(tree: ast.Module) -> list[str]:
    """The values of the dictionary `topics`, in the order of its keys."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [text for text in (str(topics[key]).strip() for key in sorted(topics)) if text]
    return []


def _docstrings(tree: ast.Module) -> list[str]:
    """The docstrings of a module, of its classes and of its functions, in the order of the source."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            raw = ast.get_docstring(node, clean=False)
            text = inspect.cleandoc(raw).strip() if raw else ""
            if text:
                found.append((getattr(node, "lineno", 0), text))
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _paragraphs(files: tuple[Path, ...]) -> Iterator[str]:
    for path in files:
        yield from paragraphs(path, 0, sys.maxsize)


def paragraphs(path: Path, start: int, stop: int) -> Iterator[str]:
    """The documents of a stretch of a file, in bytes: cut at the first blank line from `start` on, and from `stop` on.

    So the stretches that make up a file have all its documents, each once.

    Raises UserError naming a file that cannot be read, or has a document of more than DOCUMENT_BYTES.
    """
    lines: list[str] = []
    held = 0  # bytes of the document
    try:
        with path.open("rb") as stream:
            inside = start == 0
            if start:
                stream.seek(start - 1)
                stream.readline(DOCUMENT_BYTES + 1)  # the line that `start` is in belongs to what is before it
            while True:
                at, raw = stream.tell(), stream.readline(DOCUMENT_BYTES + 1)
                if not raw or (at >= stop and not inside):
                    break
                held = held + len(raw) if raw.strip() else 0
                if held > DOCUMENT_BYTES:
                    where = f"has no blank line in the {DOCUMENT_BYTES // 10**6} MB before byte {at + len(raw)}"
                    raise UserError(f"--data: {path} {where}; blank lines separate documents: put one after each")
                line = raw.decode("utf-8-sig" if at == 0 else "utf-8").strip()
                if line and inside:
                    lines.append(line)
                elif not line:
                    held = 0
                    if lines:
                        yield "\n".join(lines)
                        lines = []
                    if at >= stop:
                        return
                    inside = True
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read ({error.strerror}); give files that can be") from None
    except UnicodeDecodeError:
        raise UserError(f"--data: {path} is not UTF-8 text; convert it, or leave it out of the pattern") from None
    if lines:
        yield "\n".join(lines)
