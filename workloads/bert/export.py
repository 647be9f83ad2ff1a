"""Saves the trained model as files that transformers' `from_pretrained` loads.

Weights, configuration and tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import orchestrator.vision_ops  # noqa: F401  before transformers, which imports torchvision

# isort: split
import transformers

from workloads.bert.data import Prepared
from workloads.bert.wordpiece import CLS, MASK, PAD, SEP, UNK

NAMES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}


def save(model: Any, prepared: Prepared, sequence_length: int, folder: Path) -> None:
    """Write the weights, the configuration and the tokenizer.

    The files: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, special_tokens_map.json,
    vocab.txt.

    Args:
        model: a transformers model.
        prepared: where the tokenizer is.
        sequence_length: the longest input the model can take, in tokens.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _tokenizer(prepared, sequence_length).save_pretrained(folder)
    # For readers that know no tokenizer.json.
    lines = "".join(token + "\n" for token in prepared.vocabulary.tokens)
    (folder / "vocab.txt").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMES, indent=2))


def _tokenizer(prepared: Prepared, sequence_length: int) -> Any:
    """transformers' BertTokenizer where the text is split as BERT does, else its general tokenizer."""
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(prepared.tokenizer_json)
    core.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(token, core.token_to_id(token)) for token in (CLS, SEP)],
    )
    names = {**NAMES, "model_max_length": sequence_length}
    layout = json.loads(prepared.tokenizer_json)
    normalizer = layout.get("normalizer") or {}
    splitter = (layout.get("pre_tokenizer") or {}).get("type")
    if normalizer.get("type") != "BertNormalizer" or splitter != "BertPreTokenizer":
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    return transformers.BertTokenizer(
        tokenizer_object=core,
        do_lower_case=normalizer["lowercase"],
        strip_accents=normalizer["strip_accents"],
        tokenize_chinese_chars=normalizer["handle_chinese_chars"],
        **names,
    )
