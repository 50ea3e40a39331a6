"""The parts of a run, built the same on every rank: data, model, optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import BatchSplit, fit_micro_batch, split_batch
from data.errors import DataError
from data.loader import TokenLoader
from engine.errors import ConfigError
from engine.run.config import TrainConfig
from engine.run.lr import LrSchedule, LrShape
from engine.run.mesh import build_mesh
from engine.run.parallelize import build_model
from engine.run.schedule import last_step
from engine.run.start import Start
from engine.run.world import World
from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import init_weights
from model.optim import decay_groups


@dataclass(slots=True)
class Job:
    """Everything that a step uses. `parameters` are the sharded ones, even after an evaluation."""

    config: TrainConfig
    world: World
    device: torch.device
    split: BatchSplit
    loader: TokenLoader
    val_loader: TokenLoader | None
    model: nn.Module
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    schedule: LrSchedule
    last_step: int

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.config.global_batch * self.loader.seq_len

    def describe(self) -> str:
        """One line: what is trained, and how the batch is divided."""
        millions = sum(parameter.numel() for parameter in self.parameters) / 1e6
        return (
            f"{self.config.model}, {millions:.1f} M parameters, {self.device.type}; global batch "
            f"{self.config.global_batch} = {self.world.world_size} ranks x {self.split.accumulation} x "
            f"{self.split.micro_batch} sequences of {self.loader.seq_len}; {self.last_step} steps, "
            f"{self.loader.steps_per_epoch} per epoch"
        )

    def state(self) -> dict[str, Any]:
        """The state to checkpoint; the engine adds the random number generators."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "loader": self.loader,
            "schedule": self.schedule,
        }

    def apply_flags(self) -> None:
        """After a restore, set the hyperparameters again: explicit flags override the checkpoint's."""
        for group, fresh in zip(self.optimizer.param_groups, _hyperparameters(self.config), strict=True):
            group.update(fresh)


def open_data(config: TrainConfig, world: World) -> tuple[TokenLoader, TokenLoader | None]:
    """The loaders of the training split and, with evaluations, of the validation split. Raises DataError."""
    assert config.seq_len is not None, "complete() comes first"

    def loader(split: str, steps_per_epoch: int | None) -> TokenLoader:
        assert config.seq_len is not None
        return TokenLoader(
            config.data,
            split=split,
            seq_len=config.seq_len,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=world.rank,
            world_size=world.world_size,
            steps_per_epoch=steps_per_epoch,
            allow_data_change=config.allow_data_change,
        )

    train = loader("train", config.steps_per_epoch)
    if not config.eval_freq:
        return train, None
    try:
        return train, loader("val", None)
    except DataError as error:
        raise ConfigError(f"{error}; or turn validation off with --eval_freq 0") from error


def check_data(config: TrainConfig, start: Start, loader: TokenLoader) -> None:
    """Before the restore: raises ConfigError when the checkpoint was trained on other data."""
    if start.fingerprint in (None, loader.fingerprint) or config.allow_data_change:
        return
    raise ConfigError(
        f"--data {config.data} is not the data the checkpoint was trained on ({start.stored.get('data')}): "
        f"its fingerprint is {loader.fingerprint}, the checkpoint has {start.fingerprint} (tokenizer, "
        "sequence length, digest of the shards); restore the data, or accept the change with "
        "--allow_data_change"
    )


def build_job(
    config: TrainConfig,
    world: World,
    device: torch.device,
    loaders: tuple[TokenLoader, TokenLoader | None],
    *,
    model_shape: GPT2Config | None = None,
) -> Job:
    """Build model, optimizer and schedule. Collective. Raises ConfigError for sizes that do not divide.

    `model_shape` replaces the preset that the config names.
    """
    loader, val_loader = loaders
    rows = split_batch(config.global_batch, world.world_size).rows
    split = split_batch(config.global_batch, world.world_size, fit_micro_batch(rows, config.micro_batch))
    last = last_step(config.max_steps, config.num_epochs, loader.steps_per_epoch)
    shape = LrShape(config.lr, config.final_lr, config.warmup_steps, config.lr_decay_steps or last)
    model_shape = model_shape or GPT2Config.preset(
        config.model, vocab_size=loader.vocab_size, dropout=config.dropout
    )
    model = build_model(
        lambda: GPT2(model_shape),
        lambda module: init_weights(module, config.seed),
        device=device,
        mesh=build_mesh(device.type, world.world_size, config.dp_replicate),
        bf16=config.bf16,
        compile=config.compile,
    )
    groups = decay_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return Job(
        config=config,
        world=world,
        device=device,
        split=split,
        loader=loader,
        val_loader=val_loader,
        model=model,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=optimizer,
        schedule=LrSchedule(optimizer, shape),
        last_step=last,
    )


def _hyperparameters(config: TrainConfig) -> list[dict[str, Any]]:
    """One dict per parameter group, in the order of `decay_groups`."""
    return [{"weight_decay": decay, "betas": config.betas} for decay in (config.weight_decay, 0.0)]
