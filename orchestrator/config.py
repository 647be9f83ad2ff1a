"""What a run is made of: typed settings, each a command line flag and a TOML key of the same name.

A setting's help text is the docstring under its field. `result=False` marks the settings that cannot change
the result (workers, placement, cadence): a resumed run takes them as they are given now.
"""

import json
from dataclasses import dataclass

from orchestrator.settings import setting, settings
from orchestrator.values import Cadence, Loggers, Pairs, Parallel, Staleness, WorkerRange

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings every workload has; a workload's own configuration extends and re-defaults them."""

    name: str = setting("", result=False)
    """Name of the run and of its folder; the same name on the same storage resumes it. Empty: made from the time."""

    storage: str = setting("", result=False)
    """Where run folders are: a folder or a URI such as s3://bucket/runs. Empty: ./runs; ~/runs in a submitted job."""

    workers: WorkerRange = setting(WorkerRange(1, 8), result=False)
    """Number of workers, N or MIN:MAX; with a range the run takes what the cluster has, grows when there is more and
    waits when fewer than MIN are left. With N it starts with N and goes on with fewer until lost ones are replaced."""

    shards: int = setting(8, low=1, high=65536)
    """Logical shards of each batch, a power of two; at most this many workers can share the work."""

    batch_size: int = setting(64, low=1)
    """Global batch: samples per step over all workers; a multiple of the shards."""

    steps: int | None = setting(None, low=1)
    """Training length in optimizer steps; give this or --epochs."""

    epochs: int | None = setting(None, low=1)
    """Training length in passes over the training split; give this or --steps."""

    seed: int = setting(0, low=0, high=2**63 - 1)
    """Seed of everything random: initial weights, sample order, augmentation, dropout, masking."""

    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Arithmetic of forward and backward; fp16 scales the loss dynamically. auto: measured when the run
    starts, fp32 unless another takes at most 0.7 of its time, and kept in config.toml: resuming does not measure.
    With --compile, parameter servers or a model in parts it is bf16 on GPUs and fp32 elsewhere, unmeasured."""

    data: str = setting("")
    """Training data, as KIND or KIND:PATH."""

    model: str = setting("")
    """Model architecture."""

    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """Optimizer; nesterov is sgd with Nesterov's momentum."""

    lr: float = setting(0.1, low=0)
    """Peak learning rate, for the whole global batch."""

    momentum: float = setting(0.9, low=0, below=1)
    """Momentum of sgd and nesterov, and beta1 of adam and adamw."""

    beta2: float = setting(0.999, low=0, below=1)
    """Second-moment decay of adam and adamw."""

    weight_decay: float = setting(0.0, low=0)
    """Weight decay: L2 for sgd, nesterov and adam, decoupled for adamw."""

    decay: str = setting("all", choices=("all", "matrices"))
    """What weight decay applies to: all parameters, or matrices only (no biases, no normalization)."""

    clip_norm: float = setting(0.0, low=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    schedule: str = setting("cosine", choices=("cosine", "step", "linear", "constant"))
    """Learning rate after warm-up: cosine or linear to 0, step (times 0.1 at 1/3, 2/3 and 8/9 of the run), constant."""

    warmup: float = setting(0.0, low=0, high=1)
    """Share of the run in which the learning rate rises linearly from 0."""

    reduce: str = setting("fixed", choices=("fixed", "ddp"))
    """Gradient reduction: fixed (the same bits for any number of workers) or ddp (DistributedDataParallel)."""

    parallel: Parallel = setting(Parallel(), result=False)
    """How the model is held: ddp (whole by every worker), fsdp (its parameters spread over all), hsdp=N (over groups of
    N), tensor=N (layers split among N), pipeline=N (layers dealt out to N). Last bits may differ but with pipeline."""

    pipeline_schedule: str = setting("1f1b", result=False, choices=("gpipe", "1f1b"))
    """Order of a pipeline's microbatches: all forward then all backward (gpipe), or in turns, with less memory."""

    sync: str = setting("allreduce", choices=("allreduce", "parameter-server", "local-sgd", "diloco"))
    """How workers share what they learn: gradients every step (allreduce), through parameter servers, or parameters
    every --local-steps steps: their average (local-sgd), or an outer Nesterov step along it (diloco)."""

    staleness: Staleness = setting(Staleness())
    """Steps by which a microbatch may be ahead of the oldest unfinished one, with --sync parameter-server. 0: workers
    wait for each other, and the result is that of allreduce; above, or inf: it depends on timing."""

    servers: int = setting(2, result=False, low=1, high=1024)
    """Processes that the parameters are spread over, with --sync parameter-server."""

    local_steps: int = setting(8, low=1, high=100_000)
    """Steps that each shard takes alone between two averages, with --sync local-sgd or diloco."""

    outer_lr: float = setting(0.7, low=0)
    """Learning rate of diloco's outer step along the averaged difference; 0.7 in the paper. In the long run that
    difference is multiplied by outer_lr / (1 - outer_momentum), 1.4 with the defaults."""

    outer_momentum: float = setting(0.5, low=0, below=1)
    """Nesterov momentum of diloco's outer step. 0.9 in the paper, which multiplies by 7: for hundreds of rounds."""

    threads: int = setting(0, low=0, high=1024)
    """CPU threads per worker, which the bits depend on. 0: the CPUs of --resources-per-worker, at least 1."""

    compile: bool = setting(False)
    """Whether forward and backward are compiled (torch.compile; needs a C++ compiler on every node), true or false; the
    result then also depends on the kind of CPU or GPU, and on that compiler."""

    loader_processes: int = setting(-1, result=False, low=-1, high=256)
    """Processes per worker that decode and augment ahead. 0: none, in the training process. -1: none for data that is
    decoded already; else as many as a worker has threads, at least 2."""

    shuffle_window: int = setting(16, low=1)
    """Files of prepared data (parquet:URI) whose samples are mixed at a time; data in memory is mixed as a whole."""

    data_cache: float = setting(20.0, result=False, low=0.1, high=1e6)
    """GB of prepared data that a node keeps on its disk, at least two windows; what was not used longest goes."""

    storage_patience: float = setting(60.0, result=False, low=0, high=1e6)
    """Seconds for which storage or data that does not answer is asked again before the run stops."""

    eval_every: float = setting(0.0, result=False, low=0, high=1e6)
    """Epochs, or a part of one (0.25), between evaluations on the held-out split. 0: at the end only."""

    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "tpu"))
    """What workers compute on, which the bits depend on. auto: what --resources-per-worker says, else GPUs where the
    cluster has some, else TPUs, else CPUs; kept in config.toml when the run starts."""

    accelerator_type: str = setting("", result=False)
    """TPU generation, as Ray names it (TPU-V4, TPU-V6E). Empty: what the cluster's TPU nodes say."""

    topology: str = setting("", result=False)
    """Chips of a TPU slice, such as 2x2x2 or 4x4: slices come and go as a whole. Empty: what the TPU nodes say."""

    placement: str = setting("pack", result=False, choices=("pack", "spread", "strict-pack", "strict-spread"))
    """How workers are put on nodes: few nodes, many nodes, one node, one node each."""

    node_labels: Pairs = setting(Pairs(), result=False)
    """Only nodes with these labels, k=v,... ; a value may be in(a,b) or !c as in Ray's label selectors."""

    resources_per_worker: Pairs = setting(Pairs(), result=False)
    """What each worker reserves, such as GPU=1,CPU=8 or CPU=0.5. Without it CPU=1, and one GPU or TPU chip by
    --accelerator; with it what is named, and that chip. A new run's --threads and --accelerator follow from it where
    they are not given, and so its bits."""

    checkpoint_every: Cadence = setting(Cadence(seconds=60.0), result=False)
    """Checkpoint cadence: steps (100) or seconds (60s)."""

    keep_checkpoints: int = setting(3, result=False, low=1)
    """How many checkpoints are kept."""

    max_incidents: int = setting(100, result=False, low=0)
    """How many incidents a run survives before it stops; workers lost by one generation are one, with parameter servers
    each of them."""

    stall_limit: float = setting(0.0, result=False, low=0)
    """Seconds without a heartbeat, or without progress, until a worker is replaced. 0: without a heartbeat 2 steps, 5
    to 30 s; without progress 20 steps, at least 5 s (first 300).
    One that waits for samples or storage, or evaluates, has 300 s or more, whatever is given here."""

    balance: str = setting("measured", result=False, choices=("measured", "even"))
    """Shards of each worker: by its measured speed (with --reduce fixed), or as even as can be."""

    log: Loggers = setting(Loggers(), result=False)
    """Loggers that the run is written to besides its folder: tensorboard, mlflow, wandb, separated by commas; offline
    in the run folder, unless MLFLOW_TRACKING_URI or WANDB_MODE says otherwise."""

    address: str = setting("", result=False)
    """Ray cluster to use. Empty: RAY_ADDRESS, else the cluster on this machine, else a new local one."""

    @property
    def arithmetic(self) -> int:
        """Counts up where a version of this software computes other numbers from these settings: runs that an earlier
        one began are not gone on with.
        """
        return 1

    def check_split(self) -> None:
        """Whether this model can be held in the parts of --parallel; raises UserError with one line."""


def to_toml(config: RunConfig, workload: str) -> str:
    """The complete configuration as TOML; `python -m orchestrator.run WORKLOAD --config` takes it back."""
    lines = [f"workload = {json.dumps(workload)}"]
    for name in settings(type(config)):
        value = getattr(config, name)
        if value is None:
            continue
        plain = value if isinstance(value, int | float | str) else str(value)
        # JSON's scalars are TOML's, but for surrogate pairs and an unescaped DEL.
        lines.append(f"{name} = {json.dumps(plain, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"
