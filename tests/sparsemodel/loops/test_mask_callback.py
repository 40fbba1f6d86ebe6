"""`MaskCallback` in real runs of transformers' Trainer and of Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from training_loops import lightning_module, lightning_trainer, loader, texts, tiny_bert, trainer

import sparsemodel
from sparsemodel.errors import MaskError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning"),
]


class Watch:
    """A callback that notes the largest pruned weight at each of some events, and moves nothing."""

    def __init__(self, mask: sparsemodel.Mask) -> None:
        self.mask, self.seen = mask, {}

    def note(self, event: str, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        pruned = [parameters[n].detach()[~self.mask[n]].abs().max() for n in self.mask]
        self.seen.setdefault(event, []).append(max(map(float, pruned)))


def watch_transformers(mask: sparsemodel.Mask) -> tuple[Watch, Any]:
    import transformers  # noqa: PLC0415

    watch = Watch(mask)

    class Callback(transformers.TrainerCallback):
        def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            watch.note("step", model)

        def on_evaluate(self, *_: Any, model: nn.Module, **__: Any) -> None:
            watch.note("evaluation", model)

    return watch, Callback()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1, "max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 3, "bf16": True},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
)
def test_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_bert()
    mask = sparsemodel.prune(model, density=0.1)
    watch, watching = watch_transformers(mask)
    run = trainer(
        model, texts(), tmp_path, callbacks=[watching, sparsemodel.MaskCallback(mask)],
        save_strategy="epoch", eval_strategy="epoch", eval_on_start=True, **settings,
    )  # fmt: skip
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run.train()
    steps = 4 if "gradient_accumulation_steps" in settings else 12
    assert watch.seen == {"step": [0.0] * steps, "evaluation": [0.0] * 3}
    for path in [*tmp_path.glob("checkpoint-*/model.safetensors")]:
        saved = load_file(path)
        assert not any(saved[name][~mask[name]].any() for name in mask)
    trained = model.state_dict()
    assert any(not torch.equal(trained[n][mask[n]], start[n][mask[n]]) for n in mask)
    sparsemodel.sparsify(model, mask)  # no hook is left


def test_transformers_resumes_under_the_same_mask_alone(tmp_path: Path) -> None:
    """To the same weights as in one go; another mask, or a dense checkpoint, is refused."""
    mask = sparsemodel.prune(tiny_bert(), density=0.1)

    def run(mask: sparsemodel.Mask | None, folder: str, **settings: Any) -> Any:
        callbacks = [] if mask is None else [sparsemodel.MaskCallback(mask)]
        return trainer(
            tiny_bert(), texts(), tmp_path / folder, callbacks=callbacks, save_strategy="epoch",
            weight_decay=0.1, **settings,
        )  # fmt: skip

    whole = run(mask, "whole")
    whole.train()
    again = run(mask, "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)

    other = sparsemodel.prune(tiny_bert(1), density=0.1)
    with pytest.raises(MaskError, match="it was trained under another mask, or none"):
        run(other, "whole").train(resume_from_checkpoint=True)
    run(None, "dense").train()
    with pytest.raises(MaskError, match=r"in the checkpoint \d+ weights are not zero"):
        run(mask, "dense").train(resume_from_checkpoint=True)


def test_a_wrong_mask_is_one_clear_error_when_training_begins(tmp_path: Path) -> None:
    mask = sparsemodel.prune(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), density=0.5)
    run = trainer(tiny_bert(), texts(), tmp_path, callbacks=[sparsemodel.MaskCallback(mask)])
    with pytest.raises(MaskError, match="does not fit BertForSequenceClassification"):
        run.train()


def points() -> TensorDataset:
    drawn = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(22, 6, generator=drawn), torch.randint(0, 3, (22,), generator=drawn)
    )


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def watch_lightning(mask: sparsemodel.Mask) -> tuple[Watch, Any]:
    import pytorch_lightning  # noqa: PLC0415

    watch = Watch(mask)

    class Callback(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            watch.note("step", module.net)

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            watch.note("evaluation", module.net)

    return watch, Callback()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 3, "precision": "bf16-mixed"},
    ],
)
def test_lightning(settings: dict[str, Any], tmp_path: Path) -> None:
    net = make_net()
    mask = sparsemodel.prune(net, density=0.3)  # of the network, not of the module around it
    watch, watching = watch_lightning(mask)
    run = lightning_trainer(
        tmp_path, callbacks=[watching, sparsemodel.MaskCallback(mask)], num_sanity_val_steps=1,
        **settings,
    )  # fmt: skip
    run.fit(lightning_module(net), loader(points()), loader(points(), shuffle=False))
    assert watch.seen == {"step": [0.0] * 12, "evaluation": [0.0] * 3}
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert not any(saved[f"net.{name}"][~mask[name]].any() for name in mask)
    sparsemodel.sparsify(net, mask)


def test_lightning_resumes_under_the_same_mask_alone(tmp_path: Path) -> None:
    def fit(mask: sparsemodel.Mask, *, epochs: int, resume: Path | None = None) -> Any:
        module = lightning_module(make_net())
        run = lightning_trainer(
            tmp_path, callbacks=[sparsemodel.MaskCallback(mask)], max_epochs=epochs
        )
        run.fit(module, loader(points(), shuffle=False), ckpt_path=resume, weights_only=False)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    mask = sparsemodel.prune(make_net(), density=0.3)
    whole = fit(mask, epochs=2)
    fit(mask, epochs=1)
    again = fit(mask, epochs=2, resume=tmp_path / "1.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    other = sparsemodel.prune(make_net(1), density=0.3)
    with pytest.raises(MaskError, match="it was trained under another mask, or none"):
        fit(other, epochs=2, resume=tmp_path / "1.ckpt")


def test_lightning_broken_off_leaves_no_hook(tmp_path: Path) -> None:
    net = make_net()
    mask = sparsemodel.prune(net, density=0.3)
    module = lightning_module(net)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of coffee")

    module.training_step = fail
    run = lightning_trainer(tmp_path, callbacks=[sparsemodel.MaskCallback(mask)])
    with pytest.raises(RuntimeError, match="coffee"):
        run.fit(module, loader(points()))
    sparsemodel.sparsify(net, mask)
