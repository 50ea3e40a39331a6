"""The frozen set of command-line flags. A new one is a decision: add it here, with its words in --help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
    --model --data --seed --dropout --seq_len --global_batch --micro_batch
    --lr --min_lr --warmup_steps --lr_decay_steps --weight_decay --betas --grad_clip
    --max_steps --num_epochs --steps_per_epoch --eval_freq --eval_batches
    --checkpoint_freq --keep_checkpoints --checkpoint_dir --mirror --mirror_freq --storage_options
    --save_policy --max_save_failures --best_metric --best_mode
    --check_replicas --no_check_replicas --check_snapshots --no_check_snapshots
    --resume --new_run --no_new_run --init_from --list_checkpoints --no_list_checkpoints
    --allow_data_change --no_allow_data_change
    --device --dp_replicate --bf16 --no_bf16 --compile --no_compile --deterministic --no_deterministic
    --log_dir --on_event --grace_secs
"""
RESUME = """
    --reshard --from --dry_run
    --nnodes --node_rank --rdzv_backend --rdzv_endpoint --rdzv_id --rdzv_conf
    --master_addr --master_port --local_addr --max_restarts --monitor_interval --signals_to_handle
"""
PREPARE = "--source --out --tokenizer --val_fraction --shard_tokens --workers --force --no_force"
GENERATE = """
    --from --checkpoint_dir --prompt --max_new_tokens --temperature --top_k --seed --device --storage_options
"""

PRUNE = "--storage_options --rolling --best --best_metric --best_mode --no_epochs --dry_run"

FLAGS = {
    "engine.train": TRAIN,
    "engine.resume": RESUME,
    "data.prepare": PREPARE,
    "engine.checkpoints list": "--json --storage_options --mirror",
    "engine.checkpoints copy": "--storage_options --select",
    "engine.checkpoints show": "--json --storage_options --select",
    "engine.checkpoints verify": "--json --storage_options --quick",
    "engine.checkpoints hold": "--storage_options",
    "engine.checkpoints release": "--storage_options",
    "engine.checkpoints prune": PRUNE,
    "engine.checkpoints export": "--storage_options --to --format --dtype --model_only --select",
    "engine.checkpoints import": "--storage_options --to --trust_pickle",
    "engine.checkpoints merge": "--storage_options --to --weights",
    "engine.checkpoints diff": "--storage_options --json",
    "engine.checkpoints selftest": "--storage_options --json",
    "engine.generate": GENERATE,
}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("program", FLAGS)
def test_the_flags_are_exactly_these(program: str) -> None:
    ran = run(*program.split(), "--help")
    assert ran.returncode == 0, ran.stderr
    # Where an option is explained, not where the prose mentions another program's.
    explained = re.findall(r"^(?:│ | {1,2})((?:--[a-z0-9_]+(?:, )?)+)", ran.stdout, re.MULTILINE)
    offered = {flag for flags in explained for flag in flags.split(", ")}
    assert offered == set(FLAGS[program].split())
    assert not re.search(r"--[a-z0-9]+-[a-z]", ran.stdout), "underscores are shown, dashes are only accepted"


def test_there_is_no_further_subcommand() -> None:
    ran = run("engine.checkpoints", "--help")
    listed = set(re.findall(r"^ {4}([a-z]+) ", ran.stdout, re.MULTILINE))
    assert {f"engine.checkpoints {name}" for name in listed} == {name for name in FLAGS if " " in name}


@pytest.mark.parametrize(
    ("program", "args"),
    [
        ("engine.train", ["--list-checkpoints", "--checkpoint-dir=/no/such/place"]),
        ("engine.resume", ["--dry-run", "--checkpoint-dir=/no/such/place"]),
        ("engine.checkpoints", ["list", "--storage-options", "a=b", "/no/such/place"]),
    ],
)
def test_dashes_are_accepted(program: str, args: list[str]) -> None:
    ran = run(program, *args)
    assert "/no/such/place" in ran.stdout + ran.stderr
    assert "nrecognized" not in ran.stderr
