"""The WordPiece tokenizer: trained on the training text, or read from files.

The `tokenizers` trainer alone gives another vocabulary in every process: it numbers the "##c" pieces in the
order of a randomly seeded hash table, and breaks ties between merges by these numbers. Handing it every
single-character piece in a fixed order removes the one source of chance.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, one_line

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"  # of a piece that continues a word (Wu et al. 2016, as in Devlin et al. 2019)
WORDS_OF_A_TEXT = 1000
DOCUMENTS_AT_ONCE = 512  # bounds the memory of tokenization
LETTERS_AT_ONCE = 2**20  # likewise: what is known of a text while it is cut takes up to 200 times its bytes
RULES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
ALPHABET_LIMIT = 1000  # characters; bert-base-uncased has 997


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and the five special ones."""

    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def id(self, token: str) -> int:
        return self.tokens.index(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of [PAD], [UNK], [CLS], [SEP], [MASK]."""
        return tuple(self.id(token) for token in SPECIAL)


def build_tokenizer(tokens: Sequence[str], lowercase: bool = True, **rules: bool) -> Any:
    """A `tokenizers.Tokenizer` that splits text as BERT does, with `tokens` by id.

    Without a post-processor: [CLS] and [SEP] are placed by the packing.

    Args:
        rules: others of normalizers.BertNormalizer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix=PREFIX))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **rules)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def train_vocabulary(documents: Iterable[str], vocab_size: int) -> tuple[str, ...]:
    """A WordPiece vocabulary of up to `vocab_size` tokens, the same for every process and thread count.

    Pieces are merged by frequency, ties by the order of the pieces. Characters beyond the most frequent
    ALPHABET_LIMIT (and beyond a quarter of the vocabulary) are left out; words with them become [UNK].
    """
    from tokenizers import trainers

    tokenizer = build_tokenizer(SPECIAL)
    words = _count_words(tokenizer, documents)
    first, following = Counter[str](), Counter[str]()
    for word, count in words.items():
        first.update({word[0]: count})
        for character in word[1:]:
            following[character] += count
    total = first + following
    ranked = sorted(total, key=lambda character: (-total[character], character))
    alphabet = set(ranked[: min(ALPHABET_LIMIT, vocab_size // 4)])
    pieces = sorted(PREFIX + character for character in following if character in alphabet)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *pieces],
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    found = tokenizer.get_vocab(with_added_tokens=False)
    return tuple(sorted(found, key=lambda token: int(found[token])))


def read_tokenizer(path: Path) -> tuple[Any, Vocabulary]:
    """The tokenizer in a vocab.txt, or in a folder with tokenizer.json or vocab.txt, and its vocabulary.

    A vocab.txt with a capital letter in any token is cased, every other one lower-cases the text and takes its accents
    off; a tokenizer_config.json beside it comes first.
    Raises UserError where it cannot be used for masked-language modelling.
    """
    file = tokenizer_file(path)
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
        tokenizer = load_tokenizer(text) if file.suffix == ".json" else _from_vocab(text, rules_beside(file))
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {path}: {file.name} cannot be used ({one_line(error, 200)}); {_WANTED}") from None
    by_token = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIAL if token not in by_token]
    if missing:
        raise UserError(f"--tokenizer {path}: the vocabulary lacks {', '.join(missing)}; {_WANTED}")
    by_id = {number: token for token, number in by_token.items()}
    return tokenizer, Vocabulary(tuple(by_id.get(n, f"[unused-{n}]") for n in range(max(by_id) + 1)))


def tokenizer_file(path: Path) -> Path:
    """The file that `--tokenizer` means. Raises UserError where there is none."""
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"--tokenizer {path}: no such vocabulary; {_WANTED}")


_WANTED = f"give a WordPiece vocab.txt with {' '.join(SPECIAL)}, or a folder with one or with a tokenizer.json"


def rules_beside(file: Path) -> dict[str, bool]:
    """How text is normalized, as tokenizer_config.json beside a vocab.txt says (transformers' BertTokenizer), by
    normalizers.BertNormalizer's names; raises ValueError where it is no JSON.
    """
    beside = file.with_name("tokenizer_config.json")
    said = json.loads(beside.read_text(encoding="utf-8-sig")) if file.suffix != ".json" and beside.is_file() else {}
    found = {RULES[key]: said[key] for key in RULES if isinstance(said, dict) and key in said}
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def _from_vocab(text: str, rules: Mapping[str, bool]) -> Any:
    # Not splitlines(): a vocabulary may hold other line separators as tokens.
    tokens = [token.rstrip("\r") for token in text.split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ValueError(f"token {twice!r} is there twice")
    missing = [token for token in SPECIAL if token not in tokens]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    cased = any(token != token.lower() for token in tokens if not token.startswith("["))
    return build_tokenizer(tokens, **{"lowercase": not cased, **rules})


def load_tokenizer(text: str) -> Any:
    """A WordPiece tokenizer from its tokenizer.json; raises ValueError where it is none."""
    from tokenizers import Tokenizer

    layout = json.loads(text)
    model = layout.get("model") if isinstance(layout, dict) else None
    kind = model.get("type", "unknown") if isinstance(model, dict) else "missing"
    if kind != "WordPiece":
        raise ValueError(f"its model is {kind}, not WordPiece")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the binding raises bare Exception
        raise ValueError(str(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count_words(tokenizer: Any, documents: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in itertools.chain.from_iterable(map(_stretches, documents)):
        normal = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return counts


def _repeated(words: Counter[str]) -> Iterable[str]:
    """Every word as often as it was counted, joined to texts of up to WORDS_OF_A_TEXT words."""
    for word in sorted(words):
        count = words[word]
        while count > 0:
            yield " ".join([word] * min(count, WORDS_OF_A_TEXT))
            count -= WORDS_OF_A_TEXT


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each text, without special ones."""
    for batch in _batches(texts):
        if len(batch[0]) > LETTERS_AT_ONCE:  # it is alone
            encode = functools.partial(tokenizer.encode, add_special_tokens=False)
            yield [number for text in _stretches(batch[0]) for number in encode(text).ids]
            continue
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield encoding.ids


def _stretches(text: str) -> Iterator[str]:
    """A text in stretches of up to LETTERS_AT_ONCE letters, cut before white space: no token of WordPiece has any.

    Where so many have no white space the stretch is longer.
    """
    start = 0
    while len(text) - start > LETTERS_AT_ONCE:
        stop = max(text.rfind(space, start + 1, start + LETTERS_AT_ONCE + 1) for space in " \n")
        if stop < 0:
            after = [text.find(space, start + LETTERS_AT_ONCE) for space in " \n"]
            stop = min((at for at in after if at >= 0), default=len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Some texts at a time, in their order: no more than may be cut into tokens at once, or one."""
    batch: list[str] = []
    letters = 0
    for text in texts:
        if batch and (len(batch) == DOCUMENTS_AT_ONCE or letters + len(text) > LETTERS_AT_ONCE):
            yield batch
            batch, letters = [], 0
        batch.append(text)
        letters += len(text)
    if batch:
        yield batch
