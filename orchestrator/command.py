"""What all commands share: a command line whose mistakes are one line, and how an error ends a command."""

import argparse
import difflib
import errno
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from orchestrator.errors import OrchestratorError, UserError
from orchestrator.redact import redact

READER_GONE = 141  # what a shell says of a command that SIGPIPE ended: 128 + 13


class Parser(argparse.ArgumentParser):
    """argparse with its errors in one line, and a guess at what was meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [o for action in self._actions for o in action.option_strings]
            close = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see `{self.prog} --help`"
            raise UserError(f"{rest[0]}: not known here; {hint}")
        return parsed


def check_threads(threads: int) -> None:
    """Raises UserError for a number that `run --threads` would not take: with 20000, onnxruntime does not come back."""
    if not 1 <= threads <= 1024:
        raise UserError(f"--threads {threads}: out of range; give a whole number from 1 to 1024")


def check_text(flag: str, text: str) -> None:
    """Raises UserError where a flag's text holds bytes that are no UTF-8: it could not be handed on, nor written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {text!a}: not text in UTF-8; give a name that is") from None


def refuse(error: OrchestratorError) -> int:
    """Print the one line of an error; returns the exit status that it ends the command with."""
    print("error:", redact(str(error)).replace("\n", " "), file=sys.stderr)
    return error.exit_status


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command and end its process with its status; quietly where nobody reads on, as in `... | head`.

    The interpreter's last look through all that ray.train has imported, 0.8 s of a core, is left out.
    """
    _open_streams()
    try:
        status = _status_of(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if not [stream for stream in (sys.stdout, sys.stderr) if _reader_gone(stream)]:
            raise  # another pipe broke, which is our bug
        status = READER_GONE
    gc.freeze()
    sys.exit(status)


def _open_streams() -> None:
    """Where one was closed (`>&-`) its text goes nowhere, and what a terminal cannot show is written as an escape."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _to_nobody(number)
            setattr(sys, name, os.fdopen(number, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _status_of(main: Callable[[], int]) -> int:
    """argparse's --help leaves by an exception, and so does Ctrl-C where a command has nothing to put in order."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return refuse(UserError("the working directory is gone; cd to one that exists"))
    try:
        return main()
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # Ray's handler, while it starts
            print("stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _reader_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads (poll(2): POLLERR); what is written then goes nowhere."""
    asked = select.poll()
    asked.register(stream.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if gone:
        _to_nobody(stream.fileno())
    return gone


class Lasting(io.TextIOWrapper):
    """A stream of a command that outlives its reader, and a full disk: what cannot be written is lost, and no more."""

    def write(self, text: str) -> int:
        """See io.TextIOBase."""
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """See io.IOBase."""
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """A pipe without a reader and a terminal that is gone do not come back; room on a disk may."""
        if error.errno in (errno.EPIPE, errno.EIO):
            _to_nobody(self.fileno())


def _to_nobody(descriptor: int) -> None:
    """What is still in a buffer goes somewhere: else the interpreter says so at its end."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    if nobody != descriptor:  # it is where that one was closed
        os.dup2(nobody, descriptor)
        os.close(nobody)
