"""Read and write tokenizer files. Files are checked, so that none can exhaust the memory or end the process.

tokenizer.json has the format of github.com/huggingface/tokenizers. Its components are checked before that library reads
it: ids must be in the text encoder's table, text may grow by a bounded factor, and only components without such a risk
are allowed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors

from longvideo.errors import CheckpointError
from longvideo.files import read_text, write_json, write_text
from longvideo.text import charsmap
from longvideo.text.panics import TokenizerError, guarded
from longvideo.text.sentencepiece import tokenizer_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
PUNCTUATION = ".,;:!?'\"-()"
PROBES = ("", "a", "A red ball\tbounces, 3 times.", "\u4e2d\u6587 \u00e9\u0301\ufb03\U0001f600 \u0000\u200d")
"""Texts that a tokenizer must encode: the empty text, words, and characters that few vocabularies have."""
MAX_GROWTH, MAX_COMPONENTS, MAX_PIECES, MAX_PREFIX = 1024, 16, 16, 16
COMPATIBILITY_GROWTH = 12
"""Largest growth in bytes by NFKC and by SentencePiece's table: 3 bytes become at most 33."""
PLAIN_GROWTH = {
    **dict.fromkeys(("Nmt", "Strip", "StripAccents"), 1),
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), COMPATIBILITY_GROWTH),
    "Lowercase": 2,
    "BertNormalizer": 3,
}


def load_tokenizer(folder: Path, *, rows: int) -> Tokenizer:
    """Read tokenizer.json of a tokenizer folder, such as google/umt5-xxl.

    rows: number of embeddings of the text encoder. Raises CheckpointError, naming the file, if it is not a tokenizer,
    does not end prompts as UMT5's tokenizer does, or is not within bounds.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the tokenizer with save_pretrained of transformers"
        )
    text = read_text(path, what="tokenizer")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: it is not JSON, or nested too deep") from error
    return _checked_tokenizer(values, rows, str(path))


def tokenizer_of_sentencepiece(data: bytes, *, rows: int, name: str) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model, as `load_tokenizer` does. name: of the model, for errors."""
    try:
        values = tokenizer_json(data, end=END)
    except TokenizerError as error:
        raise CheckpointError(f"{name} is not a usable SentencePiece model: {error}") from error
    return _checked_tokenizer(values, rows, name)


def _checked_tokenizer(values: object, rows: int, path: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json. path: name of the file, for errors."""
    try:
        _check(values, rows)
        text = json.dumps(values)  # of repeated keys, only the value that was checked
    except TokenizerError as error:
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is not a tokenizer: it is nested too deep") from error
    try:
        tokenizer = guarded(Tokenizer.from_str, text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids_of_probes = [encode(tokenizer, probe).ids for probe in PROBES]
    except TokenizerError as error:
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from error
    last = max((tokenizer.get_vocab_size() - 1, *tokenizer.get_added_tokens_decoder()))
    if last >= rows:
        raise CheckpointError(
            f"{path} has the id {last}; expected at most {rows - 1}, as the text encoder has {rows} tokens"
        )
    special = (tokenizer.token_to_id(PAD), tokenizer.token_to_id(END))
    if special != (PAD_ID, END_ID):
        raise CheckpointError(f"{path} has {PAD} and {END} at ids {special}; expected ({PAD_ID}, {END_ID}) as UMT5 has")
    for probe, ids in zip(PROBES, ids_of_probes, strict=True):
        if not ids or ids[-1] != END_ID:
            raise CheckpointError(
                f"{path} does not end {probe!r} with {END}; expected {END} at the end, as UMT5 has it"
            )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, text_len: int) -> None:
    """Write tokenizer.json and the configuration with which transformers' AutoTokenizer opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text_len,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    write_json(folder / "tokenizer_config.json", config)


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """Return the tokens of a text. Raises TokenizerError if the tokenizer cannot encode it."""
    return guarded(tokenizer.encode, text)


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Build a tokenizer of whole lowercase words, split at white space and punctuation."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    pieces = {piece for word in words for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word))}
    special = {PAD: PAD_ID, END: END_ID, UNKNOWN: UNKNOWN_ID}
    ordinary = sorted((pieces | set(PUNCTUATION)) - set(special))
    vocabulary = special | {word: index for index, word in enumerate(ordinary, start=len(special))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _check(values: object, rows: int) -> None:
    """Raise TokenizerError for ids of `rows` or more, and for components that make a text too long."""
    values = _mapping(values, "the file")
    _check_model(_mapping(values.get("model"), "model"), rows)
    added = values.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError("added_tokens is not a list")
    for token in added:
        _check_id(_mapping(token, "an added token").get("id"), rows)
    growth = _growth(values.get("normalizer"))
    if growth > MAX_GROWTH:
        raise TokenizerError(
            f"its normalizer may make a text {growth:.0f} times as long; expected at most {MAX_GROWTH}"
        )
    pieces = _pieces(values.get("post_processor"), rows)
    if pieces > MAX_PIECES:
        raise TokenizerError(f"its post-processor joins {pieces} pieces; expected at most {MAX_PIECES}")


def _check_model(model: Mapping[str, Any], rows: int) -> None:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for index in vocabulary.values():
            _check_id(index, rows)
    elif not isinstance(vocabulary, list) or len(vocabulary) > rows:
        size = len(vocabulary) if isinstance(vocabulary, list) else "no"
        raise TokenizerError(
            f"its vocabulary has {size} tokens; expected at most {rows}, as the text encoder has {rows} tokens"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(key) or "")) > MAX_PREFIX:
            raise TokenizerError(f"its {key} has more than {MAX_PREFIX} characters")
    if model.get("dropout"):
        raise TokenizerError("its model has a dropout, so the tokens of a prompt would be random")


def _check_id(index: object, rows: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < rows:
        raise TokenizerError(
            f"it has the id {str(index)[:40]}; expected 0 to {rows - 1}, as the text encoder has {rows} tokens"
        )


def _growth(normalizer: object) -> float:
    """Return an upper bound of the factor by which a normalizer makes a text longer."""
    if normalizer is None:
        return 1.0
    values = _mapping(normalizer, "a normalizer")
    kind = values.get("type")
    if kind == "Sequence":
        growth = 1.0
        for member in _members(values, "normalizers"):
            growth = min(growth * _growth(member), 1e300)
        return growth
    if isinstance(kind, str) and kind in PLAIN_GROWTH:
        return PLAIN_GROWTH[kind]
    if kind == "Prepend":
        return 1.0 + len(str(values.get("prepend", "")).encode("utf-8", "replace"))
    if kind == "Replace":
        content = len(str(values.get("content", "")).encode("utf-8", "replace"))
        pattern = values.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        length = len(literal.encode("utf-8", "replace")) if isinstance(literal, str) else 0
        # a regular expression may match between any two characters, as an empty text does
        return max(1.0, content / length) if length else 1.0 + content
    if kind == "Precompiled":
        if (problem := charsmap.problem(values.get("precompiled_charsmap"))) is not None:
            raise TokenizerError(f"its precompiled_charsmap {problem}")
        return COMPATIBILITY_GROWTH
    raise TokenizerError(f"its normalizer is of the type {str(kind)[:40]!r}, which is not supported")


def _pieces(processor: object, rows: int) -> int:
    """Return the number of pieces in the result of a post-processor, the text itself included."""
    if processor is None:
        return 1
    values = _mapping(processor, "a post-processor")
    kind = values.get("type")
    if kind == "Sequence":
        count = 1
        for member in _members(values, "processors"):
            count = min(count * _pieces(member, rows), 2 * MAX_PIECES)
        return count
    if kind == "ByteLevel":
        return 1
    if kind != "TemplateProcessing":
        raise TokenizerError(f"its post-processor is of the type {str(kind)[:40]!r}; expected TemplateProcessing")
    template = values.get("single")
    if not isinstance(template, list) or len(template) > MAX_PIECES:
        raise TokenizerError(f"its template is not a list of at most {MAX_PIECES} pieces")
    special = _mapping(values.get("special_tokens") or {}, "special_tokens")
    count = 0
    for piece in template:
        piece = _mapping(piece, "a piece of its template")
        if "Sequence" in piece:
            if _mapping(piece["Sequence"], "a piece of its template").get("id") != "A":
                raise TokenizerError("its template for a single text refers to another text")
            count += 1
            continue
        name = _mapping(piece.get("SpecialToken"), "a piece of its template").get("id")
        ids = _mapping(special.get(name) if isinstance(name, str) else None, "a special token").get("ids")
        if not isinstance(ids, list) or len(ids) > MAX_PIECES:
            raise TokenizerError(f"its special token {str(name)[:40]!r} has no list of at most {MAX_PIECES} ids")
        for index in ids:
            _check_id(index, rows)
        count += len(ids)
    return count


def _members(values: Mapping[str, Any], key: str) -> list[Any]:
    members = values.get(key)
    if not isinstance(members, list) or len(members) > MAX_COMPONENTS:
        raise TokenizerError(f"{key} is not a list of at most {MAX_COMPONENTS}")
    return members


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{what} is not a JSON object")
    return value
