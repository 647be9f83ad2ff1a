"""`python -m orchestrator.run`: every flag has a text, every mistake one line, and a dry run never meets Ray."""

import os
import subprocess
import sys

import pytest

from orchestrator.command import Lasting
from orchestrator.prepare import main as prepare_main
from orchestrator.run import main, workload_parser
from orchestrator.settings import flag, help_texts, settings
from workloads.registry import WORKLOADS

DESIGN_FLAGS = """--name --storage --workers --shards --batch-size --steps --epochs --seed --precision --data --model
--lr --optimizer --placement --node-labels --resources-per-worker --reduce --checkpoint-every --keep-checkpoints
--max-incidents --address --dry-run --config""".split()  # noqa: SIM905


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_flag_of_the_design_is_there_with_its_text(workload):
    shown = workload_parser(workload).format_help()
    config_type = WORKLOADS[workload].config_type()
    texts = help_texts(config_type)
    for name in DESIGN_FLAGS:
        assert f"\n  {name} " in shown, name
    for name, field in settings(config_type).items():
        assert texts[name].endswith((".", ")")), f"{name} has no docstring"
        assert f"\n  {flag(name)} " in shown
        assert all(word in shown for word in field.metadata["choices"])
    assert shown.isascii()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_help_is_printed(workload, capsys):
    with pytest.raises(SystemExit) as ended:
        main([workload, "--help"])
    assert ended.value.code == 0
    assert "--batch-size" in capsys.readouterr().out
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in WORKLOADS)


BAD = {
    "no workload": ([], "usage:"),
    "unknown workload": (["vgg"], "choose from resnet, bert"),
    "unknown flag": (["resnet", "--worker", "4"], "--workers"),
    "unknown flag 2": (["resnet", "--frobnicate"], "--frobnicate"),
    "stray word": (["resnet", "extra"], "extra"),
    "missing value": (["resnet", "--lr"], "--lr"),
    "workers 8:4": (["resnet", "--workers", "8:4"], "--workers 8:4: the minimum exceeds the maximum"),
    "workers 0": (["resnet", "--workers", "0"], "at least 1 worker"),
    "workers 0:3": (["resnet", "--workers", "0:3"], "at least 1 worker"),
    "workers abc": (["resnet", "--workers", "abc"], "--workers abc: write N or MIN:MAX"),
    "workers empty": (["resnet", "--workers", ""], "MIN:MAX"),
    "workers 1:": (["resnet", "--workers", "1:"], "MIN:MAX"),
    "more workers than shards": (["resnet", "--workers", "9"], "use at most 8 workers, or --shards 16"),
    "shards 6": (["resnet", "--shards", "6"], "use 4 or 8"),
    "shards 0": (["resnet", "--shards", "0"], "--shards 0"),
    "batch": (["resnet", "--batch-size", "100"], "use 96 or 104"),
    "batch below shards": (["resnet", "--batch-size", "4"], "use 8"),
    "negative lr": (["resnet", "--lr", "-1"], "--lr -1"),
    "nan lr": (["resnet", "--lr", "nan"], "--lr nan"),
    "inf lr": (["resnet", "--lr", "inf"], "--lr inf"),
    "lr word": (["resnet", "--lr", "fast"], "--lr fast"),
    "steps and epochs": (["resnet", "--steps", "3", "--epochs", "3"], "give one of them"),
    "steps 0": (["resnet", "--steps", "0"], "--steps 0"),
    "steps 1.5": (["resnet", "--steps", "1.5"], "--steps 1.5"),
    "seed": (["resnet", "--seed", "-3"], "--seed -3"),
    "precision": (["resnet", "--precision", "fp8"], "choose from auto, fp32, bf16, fp16"),
    "optimizer": (["resnet", "--optimizer", "lion"], "sgd, nesterov, adam, adamw"),
    "reduce": (["resnet", "--reduce", "ring"], "fixed, ddp"),
    "sync": (["resnet", "--sync", "gossip"], "parameter-server, local-sgd, diloco"),
    "staleness alone": (["resnet", "--staleness", "2"], "use --sync parameter-server"),
    "staleness word": (["resnet", "--sync", "parameter-server", "--staleness", "some"], "or inf"),
    "servers alone": (["resnet", "--sync", "local-sgd", "--servers", "3"], "use --sync parameter-server"),
    "local steps alone": (["resnet", "--local-steps", "4"], "use --sync local-sgd or diloco"),
    "outer of local-sgd": (["resnet", "--sync", "local-sgd", "--outer-lr", "1"], "use --sync diloco"),
    "ddp and diloco": (["resnet", "--sync", "diloco", "--reduce", "ddp"], "--reduce ddp: goes with --sync allreduce"),
    "fp16 served": (["resnet", "--sync", "parameter-server", "--precision", "fp16"], "use fp32 or bf16"),
    "parallel": (["bert", "--parallel", "zero"], "hsdp=N, tensor=N or pipeline=N"),
    "tensor of 1": (["bert", "--parallel", "tensor=1"], "N from 2"),
    "workers in groups": (["bert", "--parallel", "tensor=2", "--workers", "3"], "multiples of 2; use 2"),
    "split and sync": (["bert", "--parallel", "fsdp", "--sync", "diloco"], "use --sync allreduce"),
    "split and reduce": (["bert", "--parallel", "fsdp", "--reduce", "ddp"], "use --reduce fixed"),
    "split and fp16": (["bert", "--parallel", "fsdp", "--precision", "fp16"], "use fp32 or bf16"),
    "hsdp of 3": (["bert", "--parallel", "hsdp=3", "--workers", "3"], "a power of two"),
    "tensor of resnet": (["resnet", "--parallel", "tensor=2"], "use fsdp or pipeline=N"),
    "airbench": (["resnet", "--parallel", "fsdp", "--model", "airbench"], "leave it out"),
    "stages of resnet": (["resnet", "--parallel", "pipeline=6", "--workers", "6"], "5 stages at most"),
    "heads": (["bert", "--parallel", "tensor=4"], "use N of 2"),
    "layers": (["bert", "--parallel", "pipeline=5", "--workers", "5"], "4 stages at most"),
    "a host": (["resnet", "--storage", "file://data/runs"], "--storage file://data/runs: names a host"),
    "no folder": (["resnet", "--storage", "file://"], "--storage file://: names no folder"),
    "no bucket": (["resnet", "--storage", "s3://"], "--storage s3://: names no bucket"),
    "heads first": (["bert", "--parallel", "tensor=3", "--workers", "2"], "use N of 2"),
    "layers first": (["bert", "--parallel", "pipeline=50", "--workers", "2"], "4 stages at most"),
    "lengths": (["bert", "--parallel", "pipeline=2", "--short-length", "64"], "use tensor or fsdp"),
    "schedule alone": (["bert", "--pipeline-schedule", "gpipe"], "--parallel pipeline=N"),
    "loaders served": (["resnet", "--sync", "parameter-server", "--loader-processes", "2"], "--loader-processes 2"),
    "compile word": (["resnet", "--compile", "maybe"], "--compile maybe: write true or false"),
    "compile and ddp": (["resnet", "--compile", "true", "--reduce", "ddp"], "--compile true: goes with --reduce fixed"),
    "compile served": (["resnet", "--compile", "true", "--sync", "parameter-server"], "goes with --sync allreduce"),
    "model": (["resnet", "--model", "vgg16"], "resnet50"),
    "placement": (["resnet", "--placement", "anywhere"], "strict-spread"),
    "cadence": (["resnet", "--checkpoint-every", "often"], "--checkpoint-every often"),
    "cadence 0": (["resnet", "--checkpoint-every", "0"], "--checkpoint-every 0"),
    "cadence 1.5": (["resnet", "--checkpoint-every", "1.5"], "--checkpoint-every 1.5"),
    "cadence minutes": (["resnet", "--checkpoint-every", "5m"], "--checkpoint-every 5m"),
    "keep 0": (["resnet", "--keep-checkpoints", "0"], "--keep-checkpoints 0"),
    "resources word": (["resnet", "--resources-per-worker", "CPU=many"], "--resources-per-worker CPU=many"),
    "resources bare": (["resnet", "--resources-per-worker", "CPU"], "KEY=VALUE"),
    "resources nothing": (["resnet", "--resources-per-worker", "CPU=0"], "reserves nothing"),
    "resources 1.5": (["resnet", "--resources-per-worker", "GPU=1.5"], "whole number"),
    "resources -1": (["resnet", "--resources-per-worker", "CPU=-1"], "CPU=-1"),
    "resources nan": (["resnet", "--resources-per-worker", "CPU=nan"], "CPU=nan"),
    "two GPUs": (["resnet", "--resources-per-worker", "GPU=2"], "one GPU, its own; use GPU=1"),
    "half a GPU": (["resnet", "--resources-per-worker", "GPU=0.5"], "one GPU, its own; use GPU=1"),
    "GPU and TPU": (["resnet", "--resources-per-worker", "GPU=1,TPU=1"], "goes with --accelerator cuda alone"),
    "accelerator": (["resnet", "--accelerator", "npu"], "choose from auto, cpu, cuda, tpu"),
    "cpu and GPU": (["resnet", "--accelerator", "cpu", "--resources-per-worker", "GPU=1"], "--accelerator cuda alone"),
    "cuda without": (["resnet", "--accelerator", "cuda", "--resources-per-worker", "GPU=0,CPU=1"], "reserves none"),
    "cuda and TPU": (["resnet", "--accelerator", "cuda", "--resources-per-worker", "TPU=1"], "--accelerator tpu alone"),
    "four chips": (["resnet", "--accelerator", "tpu", "--resources-per-worker", "TPU=4"], "one TPU chip; use TPU=1"),
    "tpu and ddp": (["resnet", "--accelerator", "tpu", "--reduce", "ddp"], "use --reduce fixed, or --accelerator cpu"),
    "tpu compiled": (["resnet", "--accelerator", "tpu", "--compile", "true"], "use --compile false"),
    "tpu in fp16": (["resnet", "--accelerator", "tpu", "--precision", "fp16"], "TPUs compute in bf16"),
    "tpu and labels": (["resnet", "--accelerator", "tpu", "--node-labels", "a=b"], "where their slice is"),
    "topology alone": (["resnet", "--accelerator", "cpu", "--topology", "4x4"], "goes with --accelerator tpu"),
    "labels": (["resnet", "--node-labels", "zone"], "KEY=VALUE"),
    "loggers": (
        ["resnet", "--log", "tensorboard,visdom"],
        "visdom is not known; write some of tensorboard, mlflow, wandb",
    ),
    "name with a slash": (["resnet", "--name", "a/b"], "--name a/b"),
    "name with dots": (["resnet", "--name", ".."], "--name .."),
    "name with a line end": (["resnet", "--name", "a\nb"], "--name"),
    "no config file": (["resnet", "--config", "/nonexistent.toml"], "cannot be read"),
    "config is a folder": (["resnet", "--config", "/"], "cannot be read"),
    "no image folder": (["resnet", "--data", "imagefolder:/nonexistent"], "/nonexistent"),
    "no cifar": (["resnet", "--data", "cifar10:/nonexistent"], "/nonexistent"),
    "cifar without a folder": (["resnet", "--data", "cifar10"], "--data cifar10"),
    "unknown data": (["resnet", "--data", "pictures"], "--data pictures"),
    "no text": (["bert", "--steps", "2", "--data", "text:/nonexistent/*.txt"], "/nonexistent"),
    "bert workers": (["bert", "--steps", "2", "--workers", "x"], "--workers x"),
    "momentum 1": (["bert", "--momentum", "1"], "--momentum 1: out of range; give a number from 0, less than 1"),
    "beta2 1": (["bert", "--beta2", "1.0"], "--beta2 1.0: out of range"),
    "a label": (["resnet", "--node-labels", "zone=in(a,b),rack"], "KEY=VALUE"),
    "a label's mark": (["resnet", "--node-labels", "zone=in(a;b)"], "zone=in(a;b): write such as zone=a, zone=!a"),
    "Azure's signature": (
        ["resnet", "--storage", "abfs://c@a.dfs.core/r?sv=1&sig=x%2Fy"],
        "keys do not belong in a URI",
    ),
    "bytes": (["resnet", "--data", "imagefolder:/data/\udcff"], "not text in UTF-8"),
    "long storage": (["resnet", "--storage", "/tmp/" + "x" * 300], "--storage /tmp/xxx"),
    "unknown storage": (["resnet", "--storage", "gopher://x/y"], "--storage gopher://x/y"),
}


def test_compiling_without_a_compiler(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert main(["resnet", "--compile", "true", "--storage", str(tmp_path / "runs")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--compile true: the C++ compiler /nonexistent/g++ cannot be run" in line
    assert line.endswith("install one (apt install g++ libpython3-dev), name it in CXX, or leave --compile out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_status_2(case, tmp_path, monkeypatch, capfd):
    arguments, part = BAD[case]
    storage = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    if arguments and "--storage" not in arguments:
        arguments = [arguments[0], "--storage", str(storage), *arguments[1:]]
    assert main(arguments) == 2
    shown = capfd.readouterr()
    if not arguments:
        assert part in shown.out
        return
    assert shown.err.count("\n") == 1, shown.err
    assert shown.err.startswith("error: ")
    assert part in shown.err
    assert not shown.out
    assert not list(tmp_path.iterdir())


def test_a_storage_that_is_a_file_is_refused(tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert main(["resnet", "--storage", str(file), "--name", "x"]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("error: --storage")
    assert shown.count("\n") == 1


def test_the_status_of_the_process_is_2(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "orchestrator.run", "resnet", "--storage", str(tmp_path), "--lr", "nan"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: --lr nan: not a finite number\n"
    assert not ended.stdout


@pytest.mark.parametrize(("name", "status"), [("run", 141), ("score", 0)])  # argparse's own --help passes over it
def test_a_reader_that_goes_away_is_no_error(name, status):
    """As `... --help | head -1`: what a shell says of a command that SIGPIPE ended, and not a word."""
    command = [sys.executable, "-m", f"orchestrator.{name}", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == status


def test_a_stream_outlives_its_reader():
    reading, writing = os.pipe()
    stream = Lasting(os.fdopen(writing, "wb"), encoding="utf-8", line_buffering=True)
    print("heard", file=stream)
    assert os.read(reading, 100) == b"heard\n"
    os.close(reading)
    for _ in range(3):
        print("not heard", file=stream, flush=True)
    stream.close()


@pytest.mark.parametrize(
    ("workload", "given", "words"),
    [
        (
            "resnet",
            ["--steps", "7", "--batch-size", "128", "--shards", "8", "--workers", "3"],
            ["1,437", "worker 2: 5-7", "steps         7 of 128"],
        ),
        (
            "resnet",
            ["--batch-size", "64", "--shards", "4", "--epochs", "2", "--accelerator", "cpu"],
            ["steps         46 of 64", "accelerator   cpu (as given)"],
        ),
        ("bert", ["--steps", "5", "--data", "text:{text}", "--vocab-size", "300"], ["steps         5 of 64"]),
    ],
)
def test_a_dry_run_tells_the_plan_without_ray(workload, given, words, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The cat number {n} sees the dog number {n + 1} run." * 6 for n in range(400)))
    given = [part.replace("{text}", str(text)) for part in given]
    arguments = [workload, "--dry-run", "--storage", str(tmp_path / "runs"), "--name", "dry", *given]
    code = (
        "import sys\nfrom orchestrator.run import main\n"
        f"status = main({arguments!r})\n"
        "print('RAY', sorted(m for m in sys.modules if m == 'ray' or m.startswith('ray.')))\n"
        "sys.exit(status)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr
    for word in ["workers", "shards", "placement", "steps", "parameters", "memory", "data", *words]:
        assert word in ended.stdout
    assert f"run folder    {tmp_path}/runs/dry" in ended.stdout
    assert "RAY []" in ended.stdout
    assert not (tmp_path / "runs").exists()


def test_the_plan_of_a_dry_run_is_a_configuration(tmp_path, capfd):
    """What it prints after the empty line is a file for --config, which gives the same plan."""
    given = ["resnet", "--dry-run", "--storage", str(tmp_path / "runs"), "--name", "dry", "--steps", "7"]
    assert main([*given, "--lr", "0.03", "--shards", "4"]) == 0
    first = capfd.readouterr().out
    file = tmp_path / "again.toml"
    file.write_text(first.partition("\n\n")[2])
    assert main(["resnet", "--dry-run", "--config", str(file)]) == 0
    assert capfd.readouterr().out == first


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--sorce", "digits", "--source", "digits", "--out", "x"], "did you mean --source?"),
        (["--source", "digits"], "--out"),
        (["--source", "digits", "--out", "x", "--file-mb", "much"], "--file-mb"),
        (["--source", "digits", "--out", "x", "--file-mb", "0"], "--file-mb"),
        (["--source", "nothing", "--out", "x"], "no such kind of data"),
    ],
)
def test_mistakes_in_preparing_are_one_line(given, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert prepare_main(["resnet", *given]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
