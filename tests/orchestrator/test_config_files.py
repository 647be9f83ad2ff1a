"""--config: every mistake in a file names it, and flags win over it."""

import pytest

from orchestrator.assembly import build
from orchestrator.run import main, read_settings
from workloads.registry import WORKLOADS


@pytest.mark.parametrize("content", ["steps = " + "9" * 5000, "steps = " + "[" * 5000, "steps = 1\x00"])
def test_a_file_that_no_reader_takes_is_one_line(content, tmp_path, capfd):
    file = tmp_path / "settings.toml"
    file.write_text(content)
    assert main(["resnet", "--storage", str(tmp_path / "runs"), "--config", str(file)]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith(f"error: --config {file}: not valid TOML (")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", ["--config", "--faults"])
def test_a_file_without_a_name_is_no_file(name, capfd):
    """As where a variable of the shell is not set: not the defaults instead."""
    assert main(["resnet", name, ""]) == 2
    assert capfd.readouterr().err.startswith(f"error: {name}")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("lr = = 1\n", "not valid TOML"),
        ("\xff\n", "not valid TOML"),
        ("learning_rate = 1.0\n", "learning_rate: no such setting"),
        ("worker = 4\n", "did you mean workers?"),
        ('workload = "bert"\n', "bert"),
        ("lr = -1.0\n", "--lr -1.0"),
        ("lr = nan\n", "--lr nan"),
        ('steps = "many"\n', "--steps many"),
        ("steps = 1.5\n", "--steps 1.5"),
        ("steps = true\n", "--steps True"),
        ("model = 50\n", "--model 50"),
        ("steps = 1\nepochs = 1\n", "give one of them"),
        ("[lr]\npeak = 1\n", "--lr"),
        ("shards = 6\n", "use 4 or 8"),
        ("seed = 2020-01-01\n", "--seed 2020-01-01: not a whole number"),
        (f"lr = 1{'0' * 400}\n", "not a number"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(content, part, tmp_path, capfd):
    file = tmp_path / "settings.toml"
    file.write_bytes(content.encode("latin-1"))
    assert main(["resnet", "--storage", str(tmp_path / "runs"), "--config", str(file)]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith(f"error: --config {file}: ")
    assert part in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "flags", "stays"),
    [
        ('sync = "allreduce"\nstaleness = 2\n', ["--sync", "parameter-server"], ["--staleness", "2"]),
        ('resources_per_worker = "GPU=2"\n', ["--resources-per-worker", "GPU=1"], []),
        ("shards = 6\n", ["--shards", "8"], []),
        ("steps = 10\n", ["--epochs", "2"], []),
        ("steps = 10\nshards = 6\n", ["--epochs", "2", "--shards", "8"], []),
    ],
)
def test_flags_win_over_the_file(content, flags, stays, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(content)
    given, _, _ = read_settings("resnet", ["--config", str(file), *flags])
    plain, _, _ = read_settings("resnet", [*flags, *stays])
    assert build(WORKLOADS["resnet"].config_type(), given) == build(WORKLOADS["resnet"].config_type(), plain)
