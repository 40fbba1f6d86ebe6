"""Tiny trainings by transformers' Trainer and by Lightning's, real ones, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

NUM_TEXTS, NUM_WORDS = 22, 30


def tiny_bert(seed: int = 0, **settings: Any) -> nn.Module:
    """A text classifier of two classes."""
    import transformers  # noqa: PLC0415

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=NUM_WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, **settings,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(count: int = NUM_TEXTS) -> list[dict[str, Any]]:
    """Tokens as a tokeniser leaves them; the first decides the label."""
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, NUM_WORDS, (count, 6), generator=drawn).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 6, "labels": row[0] % 2} for row in tokens]


def trainer(
    model: nn.Module, data: Any, folder: Path, *, callbacks: list[Any], **settings: Any
) -> Any:
    """transformers' Trainer, silent, for two epochs of batches of 4."""
    import transformers  # noqa: PLC0415

    given = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "logging_strategy": "no", "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given)
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=texts(5), callbacks=callbacks
    )


def lightning_module(net: nn.Module) -> Any:
    """A LightningModule that classifies batches (inputs, labels, ...) by a network."""
    import pytorch_lightning  # noqa: PLC0415

    class Classifier(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, number: int) -> Any:
            logits = self.net(batch[0])
            loss = functional.cross_entropy(logits, batch[1])
            return {"loss": loss, "logits": logits}

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    return Classifier()


def lightning_trainer(folder: Path, *, callbacks: list[Any], **settings: Any) -> Any:
    """Lightning's Trainer, silent, for two epochs."""
    import pytorch_lightning  # noqa: PLC0415

    given = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, **settings,
    }  # fmt: skip
    return pytorch_lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **given)


def loader(data: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 4, "shuffle": True, **settings})
