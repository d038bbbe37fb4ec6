"""The launch files in scripts/accelerate: Accelerate reads them, and the one-line command trains in two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_accelerate_reads_a_launch_file(path):
    """Unknown keys are an error of Accelerate's own."""
    config = load_config_from_file(str(path))
    assert config.distributed_type == ("MULTI_GPU" if path.stem == "ddp" else "FSDP")
    assert config.mixed_precision == "bf16"
    if path.stem != "ddp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is (path.stem == "fsdp2_offload")
        assert str(path.relative_to(ROOT)) in path.read_text()  # the command names the file


def test_the_one_line_command_trains_in_two_processes(llama_config, tmp_path):
    llama_config.vocab_size = 300
    llama_config.save_pretrained(tmp_path)
    lines = [json.dumps({"text": f"fox {n} jumps over {n * n} lazy dogs and runs away"}) for n in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    options = {
        "config_name": tmp_path / "config.json",
        "train_file": tmp_path / "text.jsonl",
        "vocabulary_size": 300,
        "sequence_length": 32,
        "per_device_train_batch_size": 4,
        "validation_fraction": 0.1,
        "max_validation_tokens": 500,
        "max_steps": 2,
        "output_dir": tmp_path / "run",
        "use_cpu": True,
    }
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "scripts/accelerate/ddp.yaml"]
    argv += ["scripts/train.py", "--recipe", "nvfp4", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("converted 21 of 29 linears") == 1  # said by one process
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["training"]["tokens"] == 2 * 2 * 4 * 32  # steps, processes, sequences, tokens
