"""Where a run is logged besides its folder: TensorBoard, MLflow, Weights & Biases, each through its own library.

What a file here holds can be made again from the run folder, and is, whenever a process begins to follow the run:
then no step is there twice. A server goes on where it was.

tensorboard/   event files; `tensorboard --logdir RUN/tensorboard`
mlflow/        mlflow.db; `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`. MLFLOW_TRACKING_URI: there
wandb/         an offline run; `wandb sync RUN/wandb/offline-run-*`. WANDB_MODE=online: at once
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.redact import redact

# mlflow-skinny brings no database of its own, and its plain files are refused from 3.7 on (maintenance mode).
PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
NOT_METRICS = ("step", "time_s", "ledger")
BATCH = 1000  # metrics in one request: MLflow's own limit
Record = Mapping[str, Any]


def need(loggers: Sequence[str]) -> None:
    """Raises UserError, with what to install, where a package of one of the loggers is missing."""
    missing = {name: [p for p in PACKAGES[name] if not _installed(p)] for name in loggers}
    extras = [name for name in loggers if missing[name]]
    if extras:
        packages = ", ".join(package for name in extras for package in missing[name])
        raise UserError(
            f"--log {','.join(extras)}: {packages} not installed; type: pip install -e '.[{','.join(extras)}]' "
            f"(without a checkout: 'elastic-orchestrator[{','.join(extras)}]'), or leave it out"
        )


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name (wandb/) is no package


class Logbook:
    """One run in one logger.

    Attributes:
        newest: the newest step that it has; those up to it are not written again.
        heard: events that it has.
    """

    newest = 0
    heard = 0

    def steps(self, records: Sequence[Record]) -> None:
        """New lines of metrics.jsonl, in order."""
        raise NotImplementedError

    def event(self, number: int, record: Record) -> None:
        """A new line of events.jsonl, counted from 1."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make what was written visible."""

    def close(self, result: Record | None) -> None:
        """The command is over; with its result.json, None where it broke off."""
        raise NotImplementedError


def figures(record: Record) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl."""
    return {key: float(value) for key, value in record.items() if key not in NOT_METRICS and _is_number(value)}


def final(result: Record) -> dict[str, float]:
    """The metrics at the end."""
    return {f"final/{key}": float(value) for key, value in result["metrics"].items()}


def heldout(record: Record) -> dict[str, float]:
    """The metrics of an event; {}: it is about something else."""
    return {
        f"heldout/{key}": float(v) for key, v in record.get("metrics", {}).items() if record["event"] == "evaluated"
    }


def told(record: Record) -> str:
    """An incident in words, keys redacted; "": the event is none."""
    if record["event"] != "incident":
        return ""
    words = f"{record['kind']} after step {record['step']}: {record['workers_before']} to {record['workers_after']}"
    return redact(
        f"{words} workers, {record['steps_lost']} steps lost, {record['recovery_s']:.2f} s. {record['detail']}"
    )


def plain(config: Record) -> dict[str, Any]:
    """The configuration as hyper-parameters."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in config.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class TensorBoard(Logbook):
    """Event files, one event a step; incidents as text, the configuration for the page of hyper-parameters."""

    def __init__(self, root: Path, config: Record, run_id: str, started_s: float) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = root / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer = EventFileWriter(str(folder), max_queue_size=1000)
        self._step, self._time_s = 0, started_s
        self._add(hparams_pb(plain(config), run_id, int(started_s)))

    def _add(self, summary: Any, step: int = 0, time_s: float = 0.0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time_s or self._time_s, step=step, summary=summary))

    def _scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]), step, time_s)

    def steps(self, records: Sequence[Record]) -> None:
        for record in records:
            self._step, self._time_s = record["step"], record["time_s"]
            self._scalars(figures(record), record["step"], record["time_s"])

    def event(self, number: int, record: Record) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        if text := told(record):
            self._add(text_pb("incident", text), record["step"], record["time_s"])
        if metrics := heldout(record):
            self._scalars(metrics, record["step"], record["time_s"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, result: Record | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
        from tensorboard.plugins.text.summary_v2 import text_pb

        if result:
            self._scalars(final(result), self._step, self._time_s)
            self._add(text_pb("weights_sha256", result["weights_sha256"]), self._step)
            self._add(text_pb("status", result["status"]), self._step)
        status = STATUS_SUCCESS if result and result["status"] == "finished" else STATUS_FAILURE
        # As plugins.hparams.summary.session_end_pb, which imports tensorflow.
        ended = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=self._time_s))
        tag, kind = metadata.SESSION_END_INFO_TAG, metadata.create_summary_metadata(ended)
        self._add(Summary(value=[Summary.Value(tag=tag, metadata=kind, tensor=metadata.NULL_TENSOR)]))
        self._writer.close()


class Mlflow(Logbook):
    """A run of MLflow: in a database in the run's folder, or where MLFLOW_TRACKING_URI says; incidents are tags."""

    NAME, STEP, EVENTS = "orchestrator.run", "orchestrator.step", "orchestrator.events"
    ENDS = {"finished": "FINISHED", "failed": "FAILED"}

    def __init__(self, root: Path, config: Record, run_id: str, started_s: float) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._ended: str | None = None
        own = None if os.environ.get("MLFLOW_TRACKING_URI") else root / "mlflow"
        if own:
            own.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(f"sqlite:///{own}/mlflow.db" if own else None)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "elastic-orchestrator"
        known = self._client.get_experiment_by_name(name)
        place = (own / "artifacts").as_uri() if own else None
        experiment = known.experiment_id if known else self._client.create_experiment(name, place)
        found = self._client.search_runs([experiment], f"tags.`{self.NAME}` = '{run_id}'")
        if found:
            run, tags = found[0], found[0].data.tags
            self.newest, self.heard = int(tags.get(self.STEP, 0)), int(tags.get(self.EVENTS, 0))
            self._ended = tags.get("weights_sha256")
            self._client.update_run(run.info.run_id, "RUNNING")
        else:
            run = self._client.create_run(experiment, int(started_s * 1000), {self.NAME: run_id}, config.get("name"))
        self._id, self._newest_ms = run.info.run_id, int(run.info.end_time or 0)
        values = {key: str(value) for key, value in plain(config).items() if key not in run.data.params}
        self._client.log_batch(self._id, params=[Param(key, value) for key, value in values.items()])

    def steps(self, records: Sequence[Record]) -> None:
        from mlflow.entities import RunTag

        size = max(1, BATCH // max(1, max(len(record) for record in records)))
        for i in range(0, len(records), size):
            part = records[i : i + size]
            self._newest_ms = max(self._newest_ms, int(part[-1]["time_s"] * 1000))
            metrics = [metric for r in part for metric in self._metrics(figures(r), r["step"], r["time_s"])]
            # The tag comes last: a batch that was cut off is sent again, and what is there is not taken twice.
            self._client.log_batch(self._id, metrics, tags=[RunTag(self.STEP, str(part[-1]["step"]))])

    def _metrics(self, values: Mapping[str, float], step: int, time_s: float) -> list[Any]:
        from mlflow.entities import Metric

        return [Metric(key, value, int(time_s * 1000), step) for key, value in values.items()]

    def event(self, number: int, record: Record) -> None:
        from mlflow.entities import RunTag

        self._newest_ms = max(self._newest_ms, int(record["time_s"] * 1000))
        text, metrics = told(record), heldout(record)
        if text or metrics:
            tags = [RunTag(f"incident.{number:06d}", text)] if text else []
            values = self._metrics(metrics, record.get("step", 0), record["time_s"])
            self._client.log_batch(self._id, values, tags=[*tags, RunTag(self.EVENTS, str(number))])

    def close(self, result: Record | None) -> None:
        from mlflow.entities import RunTag

        if result:
            known = result["weights_sha256"] == self._ended  # a finished run that is followed again has them
            values = [] if known else self._metrics(final(result), int(result["steps"]), self._newest_ms / 1000)
            tags = [RunTag(key, str(result[key])) for key in ("weights_sha256", "status")]
            self._client.log_batch(self._id, values, tags=tags)
        ended = self.ENDS.get((result or {}).get("status", ""), "KILLED")
        self._client.set_terminated(self._id, ended, self._newest_ms or None)  # it may have been yesterday


class Wandb(Logbook):
    """A run of Weights & Biases: written offline into the run's folder, unless WANDB_MODE says otherwise."""

    def __init__(self, root: Path, config: Record, run_id: str, started_s: float) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        for earlier in (root / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(earlier)
        root.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "elastic-orchestrator",
            id=run_id,
            name=config.get("name"),
            dir=str(root),
            mode=mode,  # type: ignore[arg-type,unused-ignore]
            config=plain(config),
            resume="allow" if mode == "online" else None,
            # Nothing but the run: no code, no git, no terminal, no figures of this machine.
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, disable_git=True, save_code=False,
                x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            ),
        )  # fmt: skip
        self._axes: set[str] = set()
        if self._run.resumed:  # rows of events have a key of their own for the step: this is that of the newest row
            self.newest = int(self._run.summary.get("step") or 0)
            self.heard = int(self._run.summary.get("events") or 0)

    def _row(self, axis: str, step: int, values: Mapping[str, Any]) -> None:
        """A row of the history, drawn over `axis`: W&B's own step only ever rises, and an event may come late."""
        for key in values.keys() - self._axes:
            self._run.define_metric(key, step_metric=axis)
            self._axes.add(key)
        self._run.log({axis: step, **values})

    def steps(self, records: Sequence[Record]) -> None:
        for record in records:
            self._row("step", record["step"], figures(record))

    def event(self, number: int, record: Record) -> None:
        text = told(record)
        if row := {**heldout(record), **({"incident": text} if text else {})}:
            self._row("event_step", record["step"], {**row, "events": number})

    def close(self, result: Record | None) -> None:
        if result:
            self._run.summary.update({**final(result), "status": result["status"]})
            self._run.summary["weights_sha256"] = result["weights_sha256"]
            self._run.summary["incidents"] = len(result["incidents"])
        self._run.finish(exit_code=0 if result and result["status"] == "finished" else 1)
        self._wandb.teardown()


BOOKS: dict[str, type[TensorBoard] | type[Mlflow] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}
