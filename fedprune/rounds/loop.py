"""The round loop: one readable function for every method, engine and kind of trouble."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ClientError
from fedprune.exchange.aggregate import EntryMean, WeightedMean
from fedprune.exchange.messages import (
    ClientInfo,
    Reply,
    Request,
    State,
    TrainReply,
    TrainRequest,
)
from fedprune.local.training import (
    compute_device,
    evaluate,
    train_locally,
)
from fedprune.methods.base import RunState
from fedprune.rounds.folder import MODEL, RunFolder
from fedprune.rounds.workspace import SEED_PRETRAIN, SEED_SAMPLING, Workspace
from prunelab.errors import RunError
from prunelab.networks import float_state, load_float_state_
from prunelab.runs.seeds import generator, stream_seed
from prunelab.runs.threads import computing
from prunelab.runs.version import __version__
from sparsemodel.codec import mask_delta_entropy_bytes
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.checkpoint import save_sparse
from sparsemodel.storage.cost import forward_flops, layer_macs, model_bytes, training_flops
from sparsemodel.storage.meter import peak_rss_bytes


@dataclass
class Traffic:
    """Bytes of the messages really sent since the last `take`, and who was left out."""

    up: list[int]
    down: list[int]
    mask: int
    skipped: list[dict[str, Any]]


class Cohort(Protocol):
    """The clients, as the loop sees them; server.py makes one out of Flower's Grid."""

    clients: dict[int, ClientInfo]

    def ask(
        self, request: Request, *, clients: list[int] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Send to these clients (all, by default) and yield valid replies as they arrive."""
        ...

    def skip(self, client: int, reason: str) -> None:
        """Note that a client's answer could not be used."""
        ...

    def take_traffic(self) -> Traffic:
        """What was sent since the last call."""
        ...


def run(workspace: Workspace, cohort: Cohort, folder: RunFolder) -> RunState:
    """Run, or continue, until the last round; leaves model, metrics and summary in `folder`."""
    config = workspace.config
    with computing(config.training.threads):
        # 1. Where we stand: the last checkpoint, or the method's own start.
        state = folder.state or start(workspace, cohort, folder)
        # A checkpoint keeps names sorted; messages follow the model's order.
        state = replace(state, weights={name: state.weights[name] for name in workspace.shapes})
        while state.round_index < config.training.rounds:
            state = play_round(workspace, cohort, folder, state)
            folder.save(state)
        finish(workspace, cohort, folder, state)
    return state


def pretrain(workspace: Workspace) -> nn.Module:
    """The dense model after brief training on the server's few labelled samples.

    Every method starts from it.
    """
    config, dataset = workspace.config, workspace.dataset
    model = workspace.model().to(compute_device(config.training.device))
    if config.pruning.pretrain_epochs:
        train_locally(
            model,
            dataset.train_images[workspace.server_indices],
            dataset.train_labels[workspace.server_indices],
            mask=None,
            config=config.training,
            lr=config.training.lr,
            epochs=config.pruning.pretrain_epochs,
            seed=stream_seed(SEED_PRETRAIN, config.seed),
            augmented=config.data.augment,
        )
    return model.cpu()


def start(workspace: Workspace, cohort: Cohort, folder: RunFolder) -> RunState:
    """Pre-train, then let the method begin."""
    model = pretrain(workspace)

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        folder.totals.train_flops += _selection_flops(workspace, cohort, request)
        yield from cohort.ask(request)

    first = RunState(round_index=0, weights=float_state(model))
    state = workspace.method.initialise(model, first, ask)
    traffic = cohort.take_traffic()
    _count_bytes(folder, traffic)
    folder.append(
        {
            "event": "start",
            "clients": [
                {
                    "client": info.client,
                    "num_train": info.num_train,
                    "num_dev": info.num_dev,
                    "labels": info.label_histogram,
                }
                for _, info in sorted(cohort.clients.items())
            ],
            "density": state.mask.density if state.mask else 1.0,
            "layer_densities": state.mask.densities() if state.mask else None,
            "bytes_up": sum(traffic.up),
            "bytes_down": sum(traffic.down),
            "skipped": traffic.skipped,
            **state.notes,
        }
    )
    folder.save(state)
    return state


def play_round(
    workspace: Workspace, cohort: Cohort, folder: RunFolder, state: RunState
) -> RunState:
    """One round: sample, send, fold replies in as they arrive, update, evaluate, write down."""
    config, method = workspace.config, workspace.method
    device = compute_device(config.training.device)
    # 1. What is asked of whom.
    growth_counts = method.growth_counts(state)
    chosen = sample_clients(config, sorted(cohort.clients), state.round_index)
    request = TrainRequest(
        round_index=state.round_index,
        weights=state.weights,
        mask=state.mask,
        growth=growth_counts,
        report_resources=state.round_index == config.training.rounds - 1,
    )
    # 2. Replies are folded into the sums one at a time; only the sums are kept.
    mean = WeightedMean(workspace.batch_norms, device=device)
    growth = EntryMean(device=device)
    losses: dict[int, tuple[float, int]] = {}
    for client, reply in cohort.ask(request, clients=chosen):
        assert isinstance(reply, TrainReply)
        try:
            # Tried alone first: a reply is counted in both sums or in neither.
            EntryMean(device=device).add(reply.growth, weight=reply.num_examples)
            mean.add(reply.values, weight=reply.num_examples)
        except ClientError as error:
            cohort.skip(client, str(error))
            continue
        growth.add(reply.growth, weight=reply.num_examples)
        losses[client] = (reply.loss, reply.num_examples)
        folder.totals.state_bytes = max(folder.totals.state_bytes, reply.state_bytes)
        folder.totals.peak_rss_bytes = max(folder.totals.peak_rss_bytes, reply.peak_rss_bytes)
    traffic = cohort.take_traffic()
    if not losses:
        folder.append({"event": "no-reply", "round": state.round_index + 1, **_skips(traffic)})
        reasons = "; ".join(f"client {s['client']}: {s['reason']}" for s in traffic.skipped[:3])
        raise RunError(
            f"round {state.round_index + 1}: no client gave a usable answer ({reasons}); "
            "the last checkpoint is kept, --resume continues from it"
        )
    # 3. The method's own step.
    values = {name: value.cpu() for name, value in mean.result().items()}
    gradients = {name: (at.cpu(), value.cpu()) for name, (at, value) in growth.result().items()}
    updated = method.update(state, mean=to_dense(values, workspace, state.mask), growth=gradients)
    # 4. Evaluate on test data (for the record only) and write the round down.
    model = workspace.model()
    load_float_state_(model, updated.weights)
    result = evaluate(
        model.to(device),
        workspace.dataset.test_images,
        workspace.dataset.test_labels,
    )
    _count_bytes(folder, traffic)
    _count_steady(folder, traffic, request)
    _count_training_flops(workspace, folder, request, [n for _, n in losses.values()])
    folder.totals.test_accuracy = result.accuracy
    samples = sum(n for _, n in losses.values())
    changed = state.mask is not None and updated.mask is not None and updated.mask != state.mask
    folder.append(
        {
            "round": updated.round_index,
            "test_accuracy": result.accuracy,
            "test_loss": result.loss,
            "train_loss": sum(losses[c][0] * losses[c][1] for c in sorted(losses)) / samples,
            "density": updated.mask.density if updated.mask else 1.0,
            "clients": sorted(losses),
            "bytes_up": sum(traffic.up),
            "bytes_down": sum(traffic.down),
            "mask_bytes": traffic.mask,
            "adjusted": sorted(growth_counts) if changed else [],
            "mask_change_entropy_bytes": (
                mask_delta_entropy_bytes(state.mask.csr(), updated.mask.csr())
                if changed and state.mask is not None and updated.mask is not None
                else 0.0
            ),
            **_skips(traffic),
        }
    )
    return updated


def finish(workspace: Workspace, cohort: Cohort, folder: RunFolder, state: RunState) -> None:
    """Write the final model and the summary."""
    config, totals = workspace.config, folder.totals
    save_sparse(
        folder.path / MODEL,
        state.weights,
        state.mask,
        metadata={
            "dataset": workspace.dataset.name,
            "method": config.pruning.method,
            "model": config.model_name,
            "width": str(getattr(workspace.model(), "width", "")),
            "num_classes": str(workspace.dataset.num_classes),
            "input_shape": "x".join(map(str, workspace.dataset.input_shape)),
        },
    )
    reference = workspace.method.build_reference()
    parameters = 4 * sum(p.numel() for p in reference.parameters())
    folder.write_summary(
        {
            "method": config.pruning.method,
            "dataset": config.data.dataset,
            "model": config.model_name,
            "seed": config.seed,
            "rounds": state.round_index,
            "density_target": config.pruning.density if workspace.method.uses_density else 1.0,
            "density": state.mask.density if state.mask else 1.0,
            "test_accuracy": totals.test_accuracy,
            "bytes_up": totals.bytes_up,
            "bytes_down": totals.bytes_down,
            "bytes_up_steady_round": totals.bytes_up_steady_round,
            "bytes_down_steady_round": totals.bytes_down_steady_round,
            "bytes_dense_round": model_bytes(reference),
            "train_flops_ratio": totals.train_flops / totals.dense_flops,
            "state_bytes": totals.state_bytes,
            "state_bytes_dense": 3 * parameters,
            "peak_rss_bytes": max(totals.peak_rss_bytes, peak_rss_bytes()),
            "seconds": round(totals.seconds, 3),
            "version": __version__,
        }
    )


def sample_clients(config: RunConfig, clients: list[int], round_index: int) -> list[int]:
    """The clients of one round: a seeded draw without replacement, ascending."""
    order = torch.randperm(
        len(clients), generator=generator(SEED_SAMPLING, config.seed, round_index)
    )
    return sorted(clients[i] for i in order[: config.clients_per_round].tolist())


def to_dense(values: State, workspace: Workspace, mask: Mask | None) -> State:
    """Sparse-space tensors (active values of masked layers) as dense ones, zeros elsewhere."""
    dense: State = {}
    for name, value in values.items():
        if mask is None or name not in mask:
            dense[name] = value
        else:
            whole = torch.zeros(mask[name].shape)
            whole[mask[name]] = value
            dense[name] = whole
    return dense


def _skips(traffic: Traffic) -> dict[str, Any]:
    return {"skipped": sorted(traffic.skipped, key=lambda entry: int(entry["client"]))}


def _count_bytes(folder: RunFolder, traffic: Traffic) -> None:
    folder.totals.bytes_up += sum(traffic.up)
    folder.totals.bytes_down += sum(traffic.down)


def _count_steady(folder: RunFolder, traffic: Traffic, request: TrainRequest) -> None:
    """A steady round moves values only: bytes of its largest message, in each direction."""
    if traffic.mask == 0 and not request.growth and traffic.down:
        folder.totals.bytes_down_steady_round = max(traffic.down)
    if not request.growth and not request.report_resources and traffic.up:
        folder.totals.bytes_up_steady_round = max(traffic.up)


def _count_training_flops(
    workspace: Workspace, folder: RunFolder, request: TrainRequest, num_examples: list[int]
) -> None:
    """Analytic FLOPs of the clients' training, and what dense training would have taken."""
    config, shape = workspace.config, workspace.dataset.input_shape
    model = workspace.model()
    samples = sum(num_examples) * config.training.local_epochs
    reference = workspace.method.build_reference()
    folder.totals.dense_flops += samples * training_flops(reference, shape)
    folder.totals.train_flops += samples * training_flops(model, shape, mask=request.mask)
    if request.growth:
        # One more mini-batch: forward and input gradient at the mask, and the whole weight
        # gradient of the block's layers.
        macs = layer_macs(model, shape)
        dense_gradient = 2 * sum(macs[name] for name in request.growth)
        once = 2 * forward_flops(model, shape, mask=request.mask) + dense_gradient
        folder.totals.train_flops += once * sum(
            min(n, config.training.batch_size) for n in num_examples
        )


def _selection_flops(workspace: Workspace, cohort: Cohort, request: Request) -> float:
    """Analytic FLOPs of one pass of every candidate over the development splits."""
    assert not isinstance(request, TrainRequest)
    model, shape = workspace.model(), workspace.dataset.input_shape
    samples = sum(info.num_dev for info in cohort.clients.values())
    per_sample = sum(forward_flops(model, shape, mask=mask) for mask in request.pool.masks)
    return float(samples * per_sample)
