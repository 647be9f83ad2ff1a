"""The settings of BERT pretraining; imports neither torch nor transformers."""

from dataclasses import dataclass

from orchestrator.config import OPTIMIZERS, RunConfig
from orchestrator.errors import UserError
from orchestrator.settings import setting, settings

# (hidden size, layers, heads) by name: tiny to medium from Turc et al. 2019 (arXiv:1908.08962), base and
# large from Devlin et al. 2019 (arXiv:1810.04805).
SIZES = {
    "tiny": (128, 2, 2),
    "mini": (256, 4, 4),
    "small": (512, 4, 8),
    "medium": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
SHORTEST = 8  # tokens of a sequence


@dataclass(frozen=True)
class Architecture:
    """The resolved size of the network."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class BertConfig(RunConfig):
    """Masked-language-model pretraining (Devlin et al. 2019), without next-sentence prediction.

    The defaults are for data="docs": a small model that two cores train in about two minutes. They leave the
    paper's where so short a run asks for it: 32 tokens and a quarter of them masked bring it off the unigram
    plateau early.
    """

    data: str = setting("docs")
    """Training text: docs (the documentation inside this Python), text:GLOB, UTF-8 text files in which
    blank lines separate documents, or parquet:URI (either, prepared by orchestrator.prepare)."""

    model: str = setting("tiny", choices=tuple(SIZES))
    """Model size of Turc et al. 2019; --hidden-size, --layers, --heads and --intermediate-size replace
    single numbers of it."""

    hidden_size: int = setting(0, low=0, high=65536)
    """Width of the network. 0: by model."""

    layers: int = setting(0, low=0, high=1024)
    """Number of transformer layers. 0: by model."""

    heads: int = setting(0, low=0, high=1024)
    """Attention heads per layer; must divide the width. 0: by model."""

    intermediate_size: int = setting(0, low=0, high=1048576)
    """Width inside the feed-forward blocks. 0: four times the network's width."""

    tokenizer: str = setting("")
    """A vocab.txt, or a folder with tokenizer.json or vocab.txt, read as WordPiece. Empty: train one on the
    training text."""

    vocab_size: int = setting(2048, low=256, high=1048576)
    """Size of the WordPiece vocabulary that is trained where no tokenizer is given."""

    vocab_multiple: int = setting(1, low=1, high=1024)
    """Rows of the embedding and of the output layer are a multiple of this; those beyond the vocabulary are never
    predicted. 64 suits matrix units of GPUs: 30,522 become 30,528 (Portes et al. 2023, arXiv:2312.17482)."""

    sequence_length: int = setting(32, low=SHORTEST, high=8192)
    """Tokens per sequence, the two special tokens at its ends included."""

    short_length: int = setting(0, low=0, high=8192)
    """Tokens per sequence in the first part of the run, --short-share of it: a window of each sequence, another every
    epoch. Such steps cost less (Devlin et al. 2019, A.2; Li et al. 2022, arXiv:2108.06084). 0: sequences are whole."""

    short_share: float = setting(0.9, low=0, high=1)
    """Share of the run's steps with --short-length tokens; 0.9, with 128 and then 512, in Devlin et al. 2019, A.2."""

    attention: str = setting("sequence", choices=("sequence", "document"))
    """What a token attends to: its whole sequence, or only its own document where sequences hold several."""

    mask_rate: float = setting(0.25, low=0.01, high=0.9)
    """Share of a sequence's tokens that are to be predicted: 0.15 in the paper; 0.3 learns faster (Wettig et al. 2023,
    arXiv:2202.08005)."""

    dropout: float = setting(0.1, low=0, high=0.9)
    """Dropout rate of hidden states and of attention weights."""

    batch_size: int = setting(64, low=1)
    """Global batch: sequences per step over all workers; a multiple of the shards."""

    steps: int | None = setting(700, low=1)
    """Training length in optimizer steps; give this or --epochs."""

    epochs: int | None = setting(None, low=1)
    """Training length in passes over the training split; give this or --steps."""

    optimizer: str = setting("adamw", choices=OPTIMIZERS)
    """Optimizer; nesterov is sgd with Nesterov's momentum."""

    lr: float = setting(3e-3, low=0)
    """Peak learning rate, for the whole global batch."""

    weight_decay: float = setting(0.01, low=0)
    """Weight decay: L2 for sgd, nesterov and adam, decoupled for adamw."""

    decay: str = setting("matrices", choices=("all", "matrices"))
    """What weight decay applies to: all parameters, or matrices only (as BERT: no biases, no norms)."""

    clip_norm: float = setting(1.0, low=0)
    """Largest global gradient norm, 1 as in BERT; larger gradients are scaled down to it. 0: no clipping."""

    schedule: str = setting("linear", choices=("cosine", "step", "linear", "constant"))
    """Learning rate after warm-up: cosine or linear to 0, step (times 0.1 at 1/3, 2/3 and 8/9 of the run),
    constant."""

    warmup: float = setting(0.1, low=0, high=1)
    """Share of the run in which the learning rate rises linearly from 0."""

    @property
    def arithmetic(self) -> int:
        """See RunConfig: dropout draws by 16 bits since 2, on CPUs."""
        return 2 if self.dropout and self.accelerator not in ("cuda", "tpu") else 1

    def check_lengths(self) -> None:
        """Whether the two lengths of sequences go together; raises UserError with one line."""
        short, share = self.short_length, self.short_share
        if not short and share != settings(type(self))["short_share"].default:
            raise UserError(f"--short-share {share:g}: does nothing without --short-length; leave it out")
        if short and self.sequence_length == SHORTEST:
            raise UserError(f"--short-length {short}: no sequence is shorter than {SHORTEST} tokens; leave it out")
        if short and not SHORTEST <= short < self.sequence_length:
            allowed = f"{SHORTEST} to {self.sequence_length - 1}, less than --sequence-length"
            raise UserError(f"--short-length {short}: out of range; give a number from {allowed}, or 0 for none")

    def check_split(self) -> None:
        """See RunConfig: heads are what tensor splits, layers what a pipeline deals out."""
        parallel, size, parts = self.parallel, self.architecture(), self.parallel.size
        if parallel.kind == "tensor" and (size.heads % parts or size.intermediate_size % parts):
            fitting = [n for n in range(2, size.heads + 1) if not (size.heads % n or size.intermediate_size % n)]
            use = f"use N of {', '.join(map(str, fitting))}" if fitting else "use fsdp"
            raise UserError(
                f"--parallel {parallel}: does not divide {size.heads} heads and the feed-forward width; {use}"
            )
        if parallel.kind == "pipeline" and parts > size.layers + 2:
            raise UserError(
                f"--parallel {parallel}: {size.layers} layers make {size.layers + 2} stages at most; use fewer"
            )
        if parallel.kind == "pipeline" and self.short_length:
            raise UserError(
                f"--short-length {self.short_length}: stages hand on sequences of one length; leave it out, or use "
                "tensor or fsdp"
            )

    def architecture(self) -> Architecture:
        """The network's size: `model`'s, with the numbers that were given in its place."""
        hidden, layers, heads = SIZES[self.model]
        hidden = self.hidden_size or hidden
        return Architecture(
            hidden_size=hidden,
            layers=self.layers or layers,
            heads=self.heads or heads,
            intermediate_size=self.intermediate_size or 4 * hidden,
        )
