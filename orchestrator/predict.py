"""`python -m orchestrator.predict MODEL --input IMAGE-OR-TEXT`: ask an exported model; nothing of training is imported.

MODEL is a folder that orchestrator.export has made. An image gets its five most probable labels, a text its [MASK]
filled with the five most probable tokens. Exit status: 0 answered; 2 refused.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from orchestrator.command import Parser, check_threads, leave, refuse
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.exported import open_exported
from workloads.predicting import Guesses
from workloads.registry import WORKLOADS


def predict(model: str, given: str, threads: int) -> tuple[list[Guesses], str]:
    """The answers, and a last line; raises UserError."""
    exported = open_exported(model, threads)
    if exported.record["workload"] not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise UserError(f"{model}: of the workload {exported.record['workload']}, which is not one of {known}")
    files = {name: exported.file(name) for name in exported.record["files"]}
    asked = WORKLOADS[exported.record["workload"]].predict(exported.record["about"], files)
    answers = asked.answers(exported.run(asked.inputs(given)))
    return answers, asked.closing(answers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(
        prog="python -m orchestrator.predict",
        description="Ask an exported model: labels of an image, or words for [MASK] in a text.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that orchestrator.export has made, or its URI")
    parser.add_argument("--input", required=True, help="an image file, or a text with [MASK] in it")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--json", action="store_true", help="answer as JSON")
    try:
        settings = parser.parse_args(arguments)
        check_threads(settings.threads)
        answers, closing = predict(settings.model, settings.input, settings.threads)
    except OrchestratorError as error:
        return refuse(error)
    if settings.json:
        print(json.dumps([asdict(guesses) for guesses in answers]))
        return 0
    for guesses in answers:
        print(f"{guesses.question}:")
        for name, share in zip(guesses.names, guesses.shares, strict=True):
            print(f"  {share:6.1%}  {name}")
    if closing:
        print(closing)
    return 0


if __name__ == "__main__":
    leave(main)
