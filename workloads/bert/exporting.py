"""A trained BERT as orchestrator.export sees it: transformers' files read back without transformers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.tables import read_manifest
from workloads.bert import prepared
from workloads.bert.config import Architecture, BertConfig
from workloads.bert.data import PREFIX, prepare
from workloads.bert.model import Bert
from workloads.bert.wordpiece import read_tokenizer
from workloads.bert.workload import BertWorkload
from workloads.workload import Batch

TOKENIZER = "tokenizer.json"
WORDS, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions"


class BertExporting:
    """See workloads.exporting.Exporting."""

    output = "logits"
    accuracy = "masked_accuracy"
    shown = ("masked_lm_loss", "masked_accuracy")
    refused = {
        "static": "calibrated ranges are for convolutions, and linear layers quantize on the fly; "
        "use --quantize dynamic"
    }
    files = (TOKENIZER,)
    asked = "'a text with a [MASK] in it'"

    def __init__(self, config: BertConfig) -> None:
        self._config = config
        self.inputs: tuple[str, ...] = ("input_ids", "masked")
        self.axes: tuple[Mapping[int, str], ...] = ({0: "batch", 1: "tokens"}, {0: "places"})
        if config.attention == "document":
            self.inputs, self.axes = (*self.inputs, "documents"), (*self.axes, self.axes[0])

    def load(self, folder: Path) -> nn.Module:
        """From model.safetensors and config.json."""
        layout = json.loads((folder / "config.json").read_text())
        size = Architecture(
            hidden_size=layout["hidden_size"],
            layers=layout["num_hidden_layers"],
            heads=layout["num_attention_heads"],
            intermediate_size=layout["intermediate_size"],
        )
        model = Bert(size, layout["vocab_size"], layout["max_position_embeddings"], 0.0, layout["pad_token_id"])
        tensors = load_file(folder / "model.safetensors")
        # The file holds tied tensors once.
        tensors[f"{HEAD}.decoder.weight"] = tensors[WORDS]
        tensors[f"{HEAD}.decoder.bias"] = tensors[f"{HEAD}.bias"]
        model.load_state_dict(tensors)
        return model.eval()

    def example(self, batch: Batch) -> tuple[Tensor, ...]:
        """Tokens [B, T - 1], one less than there are positions, and three places in them."""
        input_ids_BT = batch["input_ids"][:, :-1].contiguous()
        masked_K = batch["masked"].new_tensor([1, 2, input_ids_BT.shape[1] + 1])
        more = [batch[name][:, :-1].contiguous() for name in self.inputs[2:]]
        return input_ids_BT, masked_K, *more

    def about(self, config: BertConfig, folder: Path) -> dict[str, Any]:
        """How many tokens an input may have, and whether the model asks which document each is of."""
        tokens = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
        return {"tokens": tokens, "documents": config.attention == "document"}

    def settings_for(self, data: str, about: Mapping[str, Any], folder: Path) -> BertConfig:
        """See Exporting: text is split with the model's tokenizer; prepared data has to have been."""
        known = read_tokenizer(folder / TOKENIZER)[1].tokens
        plain = BertConfig()
        config = dataclasses.replace(  # what concerns training alone is left out
            self._config, short_length=plain.short_length, short_share=plain.short_share
        )
        if data.startswith(PREFIX):
            if data != config.data:
                config = dataclasses.replace(
                    config, data=data, tokenizer="", vocab_size=plain.vocab_size, sequence_length=_length(data, about)
                )
            if prepare(config).vocabulary.tokens != known:
                raise UserError(f"--data {data}: was prepared with another tokenizer than the model's; give the text")
            return config
        own = data == config.data and (not config.tokenizer or Path(config.tokenizer).exists())  # here, and by now
        if own and prepare(config).vocabulary.tokens == known:
            return config
        length = min(config.sequence_length, about["tokens"])
        return dataclasses.replace(config, data=data, tokenizer=str(folder / TOKENIZER), sequence_length=length)

    def workload_for(self, config: RunConfig, about: Mapping[str, Any]) -> BertWorkload:
        """See Exporting."""
        assert isinstance(config, BertConfig)
        return BertWorkload(config)


def _length(data: str, about: Mapping[str, Any]) -> int:
    """Tokens of a prepared sequence; raises UserError where the model takes fewer."""
    length = prepared.about(read_manifest(data.removeprefix(PREFIX), "bert")).sequence_length
    if length > about["tokens"]:
        raise UserError(f"--data {data}: sequences of {length} tokens; the model takes {about['tokens']}")
    return length
