"""The errors that have a meaning to the user, each with the exit status it ends the command with."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line and cut off after `most` characters; its type's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def last_line(error: BaseException) -> str:
    """Of its text, which may be a traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


class OrchestratorError(Exception):
    """Base of what this package raises on purpose; its text is one line for the user."""

    exit_status = 1


class UserError(OrchestratorError):
    """What was given cannot be used: says what was given, what is allowed, what to do. Exit status 2."""

    exit_status = 2


class GoingOnError(UserError):
    """The run is going on already, by another command."""


class TrainingError(OrchestratorError):
    """Training cannot go on, and trying again would end the same way."""


class NonFiniteLossError(TrainingError):
    """A loss is NaN or infinite: names the step, the shards and the sample indices.

    Every worker finds it; `shards` tell whose it is.
    """

    def __init__(self, message: str, shards: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.shards = shards


class NonFiniteWeightsError(TrainingError):
    """A parameter or buffer is NaN or infinite: names it, and the step."""


class DataError(TrainingError):
    """A sample could not be read or decoded during training: names the sample."""


class MachineError(DataError):
    """This machine cannot go on with its part of the data, as where its disk is full; others may: names the folder."""


class CheckpointError(OrchestratorError):
    """A checkpoint is torn, corrupted, or of another run."""


class UnreadableError(CheckpointError):
    """A checkpoint is there and cannot be read, which may be its machine's fault."""


class StorageError(OrchestratorError):
    """Storage could not be reached for as long as one waits for it, or refuses: names it, and how long."""

    is_away = False  # else it has answered
