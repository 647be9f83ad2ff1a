"""`python -m orchestrator.run WORKLOAD`: train, or resume, a run.

Exit status: 0 finished; 2 unusable configuration; 1 failed; 130 stopped on request after a checkpoint.
"""

import argparse
import os
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import toolchain
from orchestrator.assembly import assemble, build
from orchestrator.command import Parser, check_text, leave, refuse
from orchestrator.config import RunConfig, to_toml
from orchestrator.errors import GoingOnError, OrchestratorError, UserError
from orchestrator.failure import resume_command, story
from orchestrator.faults import SERVER, Fault, parse_faults
from orchestrator.logbooks import need
from orchestrator.plan import Plan
from orchestrator.resume import resolve, take_up
from orchestrator.runfolder import CONFIG, RunFolder
from orchestrator.settings import flag, help_texts, settings
from orchestrator.storage import Folder
from workloads.registry import WORKLOADS

REHEARSAL = "ORCHESTRATOR_REHEARSAL"  # set by orchestrator.rehearse, which can add nodes


def workload_parser(workload: str) -> argparse.ArgumentParser:
    """The command line of one workload, made from its configuration's fields."""
    entry = WORKLOADS[workload]
    config_type = entry.config_type()
    parser = Parser(
        prog=f"python -m orchestrator.run {workload}",
        description=f"Train {entry.title}. The number of workers does not change the result.",
        epilog="Settings marked * decide the result; the others only how fast it is computed and what is kept.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings; flags win over it.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the complete plan and stop; no Ray is started, that of --address is asked for its nodes.",
    )
    parser.add_argument("--faults", metavar="FILE", help="TOML schedule of faults to make happen in this run.")
    texts = help_texts(config_type)
    defaults = config_type()
    for name, field in settings(config_type).items():
        meta = field.metadata
        default = getattr(defaults, name)
        shown = "1:SHARDS" if name == "workers" else str(default)
        mark = " *" if meta["result"] else ""
        choices = f" One of: {', '.join(meta['choices'])}." if meta["choices"] else ""
        suffix = f" [{shown}]" if default is not None and shown else ""
        parser.add_argument(
            flag(name),
            metavar=name.split("_")[-1].upper(),
            help=f"{texts[name]}{choices}{suffix}{mark}".replace("%", "%%"),
        )
    return parser


def read_settings(workload: str, arguments: Sequence[str]) -> tuple[dict[str, Any], bool, tuple[Fault, ...]]:
    """(settings given by TOML and flags, whether it is a dry run, faults to rehearse); raises UserError."""
    parsed = vars(workload_parser(workload).parse_args(arguments))
    file, dry, faults = parsed.pop("config"), parsed.pop("dry_run"), read_faults(parsed.pop("faults"))
    flags = {name: text for name, text in parsed.items() if text is not None}
    for name, text in flags.items():
        check_text(flag(name), text)
    given = {} if file is None else _read_toml(Path(file), workload)
    # --steps on the command line replaces the file's epochs, and the other way round.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags and other not in flags:
            given.pop(other, None)
    if file is not None:
        _check_file(Path(file), WORKLOADS[workload].config_type(), given, flags)
    return given | flags, dry, faults


def read_faults(file: str | None) -> tuple[Fault, ...]:
    """The schedule in `file`; none without one. Raises UserError."""
    if file is None:
        return ()
    try:
        faults = parse_faults(Path(file).read_text(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--faults {file}: cannot be read ({error}); give a TOML file") from None
    if any(f.kind == "add-node" for f in faults) and REHEARSAL not in os.environ:
        raise UserError(f"--faults {file}: add-node needs a cluster made for it; use python -m orchestrator.rehearse")
    return faults


def check_faults(config: RunConfig, faults: Sequence[Fault]) -> None:
    """What a schedule cannot do in this run; raises UserError."""
    served = config.sync == "parameter-server"
    if served and (odd := next((f for f in faults if f.during != "step"), None)):
        raise UserError(
            f'--faults: during = "{odd.during}": with --sync parameter-server workers hand over no state and write no '
            'checkpoints; use during = "step"'
        )
    for fault in faults:
        if fault.kind == SERVER and not served:
            raise UserError(f"--faults: {SERVER}: there are none with --sync {config.sync}; leave it out")
        if fault.kind == SERVER and fault.rank >= config.servers:
            raise UserError(f"--faults: {SERVER} {fault.rank}: there are {config.servers} (--servers), from 0 on")


def idle_faults(plan: Plan, faults: Sequence[Fault]) -> list[str]:
    """A line for each fault that cannot happen in this run, by its numbers alone."""
    return never_happen(plan.config, plan.total_steps, faults)


def never_happen(config: RunConfig, total_steps: float, faults: Sequence[Fault]) -> list[str]:
    """See idle_faults; `total_steps` may be infinite where it is not known yet."""
    most, found = config.workers.maximum, []
    for number, fault in enumerate(faults, 1):
        if fault.step > total_steps - (config.sync == "parameter-server"):
            found.append(f"fault {number}: step = {fault.step}: the run has {total_steps}; it will not happen")
        elif fault.kind != SERVER and fault.rank >= most:
            found.append(
                f"fault {number}: rank = {fault.rank}: there are at most {most} workers, from 0; it will not happen"
            )
        elif fault.workers > most:
            found.append(f"fault {number}: workers = {fault.workers}: there are at most {most}; it will not happen")
    return found


def _check_file(file: Path, config_type: type[RunConfig], given: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """What the settings of a file must be together, unless `flags` mend it."""
    try:
        build(config_type, given)
    except UserError as error:
        try:
            build(config_type, {**given, **flags})
        except UserError:
            raise UserError(f"--config {file}: {error}") from None


def _read_toml(file: Path, workload: str) -> dict[str, Any]:
    """The settings in `file`, each checked."""
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror}); give a TOML file") from None
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits, or brackets
        raise UserError(f"--config {file}: not valid TOML ({error})") from None
    content = {key.replace("-", "_"): value for key, value in content.items()}
    for_workload = content.pop("workload", workload)
    if for_workload != workload:
        raise UserError(f"--config {file}: is for the workload {for_workload}; run that, or give another file")
    try:
        assemble(WORKLOADS[workload].config_type(), content)
    except UserError as error:
        raise UserError(f"--config {file}: {error}") from None
    return content


def run(workload: str, arguments: Sequence[str], started_s: float) -> int:
    """The whole command; returns the exit status."""
    given, dry, faults = read_settings(workload, arguments)
    entry = WORKLOADS[workload]
    config = assemble(entry.config_type(), given)
    config = resolve(entry.absolute_paths(config))
    folder = RunFolder(Folder(config.storage).child(config.name))
    try:
        known = folder.config() is not None
        config = take_up(config, given, folder, workload)
    except OSError as error:
        raise UserError(f"--storage {config.storage}: {error.strerror or error}; give one that can be used") from None
    check_faults(config, faults)
    finished = folder.result()
    if finished and finished.get("status") == "finished" and not dry:
        steps, weights = finished.get("steps"), str(finished.get("weights_sha256"))
        print(f"finished already: {folder.uri} ({steps} steps, weights {weights[:12]})")
        print("nothing was changed; give another --name to train again")
        return 0
    need(config.log.names)
    if config.compile and (problem := toolchain.problem()):
        raise UserError(f"--compile true: {problem}")
    summary = entry.check_data(config)
    plan = Plan(workload, config, summary.train_samples, summary.heldout_samples, summary.fingerprint, summary.blocks)
    begun = folder.config() is not None
    if begun and not known:
        raise UserError(f"--name {config.name}: another command has begun it just now; give this one again, or another")
    if begun and (trained := folder.identities()) and plan.identity() not in trained:
        raise UserError(
            f"--name {config.name}: its checkpoints are of other data ({config.data} has changed since), or of another "
            "version of this software; bring that back, or use another --name"
        )
    if dry:
        from orchestrator.dry_run import describe

        print(describe(plan, folder, summary.description))
        return 0
    for line in idle_faults(plan, faults):
        print(f"warning: --faults: {line}", file=sys.stderr, flush=True)
    folder.folder.check_writable()
    if not begun:
        folder.folder.write(CONFIG, to_toml(config, workload).encode())
    try:
        return _train(plan, folder, summary.description, started_s, faults)
    except UserError as error:
        if not begun and not isinstance(error, GoingOnError):  # the cluster has no room for it: the name stays free
            folder.folder.delete(CONFIG)
        raise


def _train(plan: Plan, folder: RunFolder, description: str, started_s: float, faults: tuple[Fault, ...]) -> int:
    from orchestrator.afterword import afterword
    from orchestrator.connect import cluster
    from orchestrator.launch import launch
    from orchestrator.own_ray import MALLOC

    log_file = (
        Path(folder.folder.path("logs/ray.log"))
        if folder.folder.is_local
        else Path(f"/tmp/orchestrator-{os.getuid()}-{plan.config.name}.log")  # another user's run may have that name
    )
    print(f"{plan.workload} on {description}")
    print(f"run folder: {folder.uri}", flush=True)
    try:
        told = (plan.workload, plan.config.storage, plan.config.name)
        with afterword(*told), cluster(plan.config.address, log_file, MALLOC) as own:
            ending = launch(plan, folder, description, started_s, own, faults)
            return _tell(plan, folder, ending)
    except UserError:
        raise
    except Exception as error:  # not the user's: the terminal gets the short story, the log all of it
        from orchestrator.lastwords import command_failed

        print("\n".join(story(command_failed(error, folder, plan), folder.uri)), file=sys.stderr, flush=True)
        return 1


def _tell(plan: Plan, folder: RunFolder, ending: Any) -> int:
    """How it ended, where the results are, and what to type next; returns the exit status."""
    if ending.outcome == "finished":
        print(_summary(ending.result))
        print(f"trained model: {folder.uri}/model")
        print(
            f"next: see {folder.uri}/result.json, or train on: python -m orchestrator.run {plan.workload} --seed 1",
            flush=True,
        )
    elif ending.exit_status == UserError.exit_status:
        return refuse(UserError(ending.message))
    elif ending.failure:
        print("\n".join(story(ending.failure, folder.uri)), file=sys.stderr, flush=True)
    else:
        command = resume_command(plan.workload, plan.config.storage, plan.config.name)
        print(f"{ending.outcome}: {ending.message}", file=sys.stderr)
        print(f"kept: {folder.uri}; resume with: {command}", file=sys.stderr, flush=True)
    return int(ending.exit_status)


def _summary(result: dict[str, Any]) -> str:
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    return (
        f"finished: {result['steps']} steps, {result['samples']} samples in {result['wall_s']:.1f} s "
        f"({result['samples_per_s']:.0f} samples/s)\nheld-out: {metrics}\nweights: {result['weights_sha256']}"
    )


def usage() -> str:
    """What `--help` without a workload prints."""
    names = "\n".join(f"  {name:10} {entry.title}" for name, entry in WORKLOADS.items())
    return (
        f"usage: python -m orchestrator.run WORKLOAD [settings]\n\nworkloads:\n{names}\n\n"
        "`python -m orchestrator.run WORKLOAD --help` shows a workload's settings."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: one line and status 2 for a user's mistake; a traceback for ours while there is no run yet."""
    started_s = time.time()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    try:
        if arguments[0] not in WORKLOADS:
            raise UserError(f"{arguments[0]}: no such workload; choose from {', '.join(WORKLOADS)}")
        return run(arguments[0], arguments[1:], started_s)
    except OrchestratorError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped at once; the run resumes from its last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    leave(main)
