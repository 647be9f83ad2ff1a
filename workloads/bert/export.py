"""Saves the trained model as files that transformers' `from_pretrained` loads.

Weights, configuration and tokenizer; without transformers' BertForMaskedLM, whose import takes 1.6 s of a core.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file

from workloads.bert.data import Prepared
from workloads.bert.model import EPSILON, INITIAL_STD, Bert
from workloads.bert.wordpiece import CLS, MASK, PAD, SEP, UNK

# The head's names for what the embeddings and its bias are already (model.Head); transformers ties them on loading.
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
NAMES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}


def save(model: Bert, prepared: Prepared, folder: Path) -> None:
    """Write the weights, the configuration and the tokenizer.

    The files: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, special_tokens_map.json,
    vocab.txt.

    Args:
        model: what was trained.
        prepared: where the tokenizer is.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    config.save_pretrained(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in TIED}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(prepared, config.max_position_embeddings).save_pretrained(folder)
    # For readers that know no tokenizer.json.
    lines = "".join(token + "\n" for token in prepared.vocabulary.tokens)
    (folder / "vocab.txt").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMES, indent=2))


def config_of(model: Bert) -> Any:
    """transformers' BertConfig of our model."""
    words = model.bert.embeddings.word_embeddings
    return transformers.BertConfig(
        architectures=["BertForMaskedLM"],
        dtype=str(words.weight.dtype).removeprefix("torch."),
        vocab_size=words.num_embeddings,
        hidden_size=model.size.hidden_size,
        num_hidden_layers=model.size.layers,
        num_attention_heads=model.size.heads,
        intermediate_size=model.size.intermediate_size,
        max_position_embeddings=model.bert.embeddings.position_embeddings.num_embeddings,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        initializer_range=INITIAL_STD,
        layer_norm_eps=EPSILON,
        pad_token_id=words.padding_idx,
        tie_word_embeddings=True,
    )


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
