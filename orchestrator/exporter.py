"""One export: the files of a trained model in fp32 or int8, and the table beside fp32."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.config import to_toml
from orchestrator.errors import TrainingError
from orchestrator.exported import ABOUT, FORMAT, ONNX, PROGRAM
from orchestrator.measured import (
    Candidate,
    Row,
    all_cores,
    compared,
    counted,
    hardware,
    heldout_metrics,
    latencies,
    load_program,
    load_trained,
    onnx_model,
    table,
)
from orchestrator.programs import Program, program_of, save_onnx, save_program
from orchestrator.shards import derive_seed
from workloads.exporting import Exporting
from workloads.workload import Batch, Samples, Workload

EXAMPLES = 4  # samples of the batch that a program is traced with
CALIBRATION_BATCH = 32
FINE_TUNE_BATCH = 64
TOLERANCE = 1e-3  # of the largest output, between torch and onnxruntime in fp32; 1e-6 was seen
NOWHERE = -5000.0  # no output of a model but of words that only fill a vocabulary up, which are far below all others


@dataclass(frozen=True)
class Choices:
    """What the user chose; see the flags of orchestrator.export."""

    quantize: str
    threads: int
    rounds: int
    round_seconds: float
    calibration_samples: int
    accuracy_limit: float
    fine_tune_steps: int
    fine_tune_lr: float


class Exporter:
    """Makes the files and measures them.

    Args:
        name: of the workload.
        config: of the run.
        trained: a folder with the run's model/.
        files: an empty folder that gets what is exported.
        scratch: an empty folder for what is only measured.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        workload: Workload,
        exporting: Exporting,
        choices: Choices,
        trained: Path,
        files: Path,
        scratch: Path,
    ) -> None:
        self._name, self._config, self._workload, self._exporting = name, config, workload, exporting
        self._choices, self._trained, self._files, self._scratch = choices, trained, files, scratch
        self._processes = max(2, choices.threads) if workload.decodes else 0
        self._external = False
        self._metrics: dict[nn.Module, dict[str, float]] = {}
        torch.set_num_threads(choices.threads)

    def export(self, run: str, sha256: str) -> str:
        """Everything, `export.json` included; returns the table for people.

        Args:
            run: where the run is, for the record.
            sha256: of the trained weights.
        """
        model = load_trained(self._exporting, self._trained, sha256)
        heldout = self._workload.samples("heldout")
        batch = heldout.microbatch(np.resize(np.arange(len(heldout)), EXAMPLES), 0)
        example = self._exporting.example(batch)
        fp32 = self._files if self._choices.quantize == "none" else self._scratch
        candidates = self._pair("fp32", program_of(model, example, self._exporting.axes), fp32)
        difference = self._check(model, candidates[1].model, batch)
        if self._choices.quantize == "none":
            for file in self._trained.iterdir():
                shutil.copy(file, self._files / file.name)
        rows = [self._evaluated(candidate) for candidate in candidates]
        if self._choices.quantize == "dynamic":
            candidates += self._dynamic(model, example)
        elif self._choices.quantize == "static":
            candidates += self._static(model, example, rows[1])
        rows += [self._evaluated(candidate) for candidate in candidates[len(rows) :]]
        measured = latencies(
            candidates, heldout, self._exporting.inputs, self._choices.rounds, self._choices.round_seconds
        )
        for row, found in zip(rows, measured, strict=True):
            row.latency_ms.update(found)
        self._copy_needed()
        plain = compared(rows, self._exporting.accuracy)
        self._describe(run, sha256, difference, plain)
        return table(plain, [name for name in rows[0].metrics if name in self._exporting.shown])

    def _pair(self, kind: str, program: Program, folder: Path) -> list[Candidate]:
        """A program as both files, opened."""
        folder.mkdir(exist_ok=True)
        save_program(program, folder / PROGRAM)
        names, axes = self._exporting.inputs, self._exporting.axes
        external = save_onnx(program, names, axes, self._exporting.output, folder / ONNX)
        self._external |= external and folder == self._files
        return [self._from_program(kind, folder), self._from_onnx(kind, folder)]

    def _from_program(self, kind: str, folder: Path) -> Candidate:
        return Candidate(kind, "torch", folder / PROGRAM, load_program(folder / PROGRAM))

    def _from_onnx(self, kind: str, folder: Path) -> Candidate:
        model = onnx_model(folder / ONNX, self._exporting.inputs, self._choices.threads)
        return Candidate(kind, "onnxruntime", folder / ONNX, model)

    @torch.no_grad()
    def _check(self, model: nn.Module, exported: nn.Module, batch: Batch) -> float:
        """The largest difference of onnxruntime's output from the model's; raises TrainingError where it is large."""
        inputs = [batch[name] for name in self._exporting.inputs]
        expected, found = model(*inputs), exported(*inputs)
        real = (expected > NOWHERE) | ~(found <= NOWHERE)
        difference = float((expected - found)[real].abs().max())
        if not difference <= TOLERANCE * float(expected[expected > NOWHERE].abs().max()):
            raise TrainingError(f"onnxruntime's output differs by {difference:g} from the model's: nothing is exported")
        return difference

    def _evaluated(self, candidate: Candidate) -> Row:
        if candidate.model not in self._metrics:
            print(f"evaluating {candidate.kind} with {candidate.engine}", flush=True)
            self._metrics[candidate.model] = heldout_metrics(self._workload, candidate.model, self._processes)
        return Row(candidate.kind, candidate.engine, candidate.file_bytes, self._metrics[candidate.model])

    def _dynamic(self, model: nn.Module, example: tuple[Tensor, ...]) -> list[Candidate]:
        import onnx

        from orchestrator.int8_dynamic import int8_onnx, int8_program

        onnx.save(int8_onnx(onnx.load(self._scratch / ONNX)), self._files / ONNX)
        save_program(int8_program(model, example, self._exporting.axes), self._files / PROGRAM)
        return [self._from_program("int8", self._files), self._from_onnx("int8", self._files)]

    def _static(self, model: nn.Module, example: tuple[Tensor, ...], fp32: Row) -> list[Candidate]:
        """Calibrated, and fine-tuned where that loses too much; the better one stays in the files."""
        from orchestrator.int8_static import calibrate, fine_tune

        choices, axes, accuracy = self._choices, self._exporting.axes, self._exporting.accuracy
        print(f"calibrating with up to {choices.calibration_samples} training samples", flush=True)
        batches = self._drawn("calibration", choices.calibration_samples, CALIBRATION_BATCH)
        inputs = (tuple(batch[name] for name in self._exporting.inputs) for batch in batches)
        found = self._pair("int8", calibrate(model, example, axes, inputs), self._files)
        before = self._evaluated(found[1]).metrics[accuracy]
        lost = 100 * (fp32.metrics[accuracy] - before)
        if lost <= choices.accuracy_limit or not choices.fine_tune_steps:
            return found
        print(f"int8 loses {lost:.2f} points: fine-tuning for {choices.fine_tune_steps} steps", flush=True)
        drawn = self._drawn("fine-tuning", choices.fine_tune_steps * FINE_TUNE_BATCH, FINE_TUNE_BATCH)
        steps = choices.fine_tune_steps
        with all_cores():
            batches = counted(drawn, steps, "fine-tuning: step")
            program = fine_tune(model, example, axes, batches, steps, self._mean_loss, choices.fine_tune_lr)
        if program is None:
            given = f"--fine-tune-lr {choices.fine_tune_lr:g}"
            print(f"{given}: fine-tuning diverged, the calibrated model is kept; give a lower one", flush=True)
            return found
        tuned = self._pair("int8 fine-tuned", program, self._scratch / "tuned")
        if self._evaluated(tuned[1]).metrics[accuracy] < before:
            return found + tuned
        # The calibrated one is measured too, from beside the files that are kept.
        moved = []
        for kept, other in zip(tuned, found, strict=True):
            aside = self._scratch / f"calibrated-{other.file.name}"
            other.file.rename(aside)
            shutil.copy(kept.file, other.file)
            moved.append(dataclasses.replace(other, file=aside))
        return moved + tuned

    def _mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        sums = self._workload.sums(model, batch)
        return sums.loss / sums.count

    def _drawn(self, purpose: str, wanted: int, batch: int) -> Iterator[Batch]:
        """Training samples in an order of the run's seed, as training has them; again from the start where they end."""
        samples: Samples = self._workload.samples("train")
        random = np.random.Generator(np.random.Philox(derive_seed(purpose, self._config.seed)))
        repeat = purpose == "fine-tuning"
        order = random.permutation(len(samples))
        order = np.resize(order, wanted) if repeat else order[:wanted]
        for start in range(0, len(order), batch):
            yield samples.microbatch(order[start : start + batch], 0)

    def _copy_needed(self) -> None:
        for name in self._exporting.files:
            shutil.copy(self._trained / name, self._files / name)

    def _describe(self, run: str, sha256: str, difference: float, rows: list[dict[str, Any]]) -> None:
        record = {
            "format": FORMAT,
            "workload": self._name,
            "quantize": self._choices.quantize,
            "run": run,
            "weights_sha256": sha256,
            "config": to_toml(self._config, self._name),
            "inputs": {
                name: {str(n): free for n, free in axes.items()}
                for name, axes in zip(self._exporting.inputs, self._exporting.axes, strict=True)
            },
            "output": self._exporting.output,
            "about": self._exporting.about(self._config, self._trained),
            "files": list(self._exporting.files),
            "external_data": self._external,
            "onnxruntime_difference": difference,
            "table": rows,
            "measured_on": hardware(self._choices.threads),
        }
        (self._files / ABOUT).write_text(json.dumps(record, indent=1) + "\n")
