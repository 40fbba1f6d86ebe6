"""The global model on the server's test data, for the record only."""

from __future__ import annotations

from dataclasses import replace

from fedprune.local.model import LocalModel, Score, open_model
from fedprune.rounds.setup import Setup
from sparsemodel.runtime.state import SparseState

BATCH = 64  # of the runtime: enough for its kernels, little memory


class Evaluator:
    """Evaluates states of the run's network; the model is kept and only its values change."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: LocalModel | None = None
        self._dense = False

    def evaluate(self, state: SparseState) -> Score:
        """Sums over the test samples."""
        dense = state.patterns is None
        if self._model is None or dense != self._dense:
            training = replace(self._setup.config.training, batch_size=BATCH - 1)
            self._model = open_model(self._setup.network, state, training)
            self._dense = dense
        else:
            self._model.load(state)
        test = self._setup.test
        return self._model.evaluate(test.images, test.labels)
