"""`CoresetSelector`: data pruning as a step of scikit-learn's and imbalanced-learn's kind."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d, validate_data
from torch import nn

from datapruning.errors import ScoreError
from datapruning.scoring.methods import Method, Score
from datapruning.scoring.score import score
from datapruning.selection.policies import Policy
from prunelab.data.samples import ImageSamples
from prunelab.networks import Network
from prunelab.training.loop import TrainingConfig

WIDTH = 64


class CoresetSelector(OneToOneFeatureMixin, BaseEstimator):  # type: ignore[misc]
    """Keeps the rows of a table that are worth training on.

    `fit_resample(X, y)` gives the kept rows as they came: arrays, frames of pandas with their
    columns, lists. It follows imbalanced-learn's protocol of samplers, so it is a step of
    `imblearn.pipeline.Pipeline`, where it acts in `fit` alone; scikit-learn's own Pipeline has no
    step that changes the number of rows. imbalanced-learn is not needed otherwise.

    Features are numbers, standardised before a network sees them: encode others in a step before.

    Args:
        method: a score of samples, by name or object: see `datapruning.score`.
        keep: a share of the rows in (0, 1] as a float, or a number of them as an int.
        policy: which of the scored rows are kept: see `ScoreTable.select`.
        class_balanced: whether every class keeps at least half of its fair share.
        model: what scores, by name, function or object; None: a network of one hidden layer.
        training: of the model; None: the defaults of `TrainingConfig`.
        random_state: an int, a RandomState, or None for another result each time.

    Attributes:
        sample_indices_: int64 [K], the kept rows, ascending.
        scores_: float64 [N], high for keep.
        classes_: the labels, sorted.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Raises:
        ValueError: when it is fitted: data that scikit-learn would refuse too, a single class, or
            a method, policy or number to keep that cannot be.

    >>> X, y = np.arange(8.0).reshape(4, 2), ["a", "b", "a", "b"]
    >>> CoresetSelector("random", keep=2, policy="random", random_state=0).fit_resample(X, y)
    (array([[0., 1.],
           [2., 3.]]), ['a', 'b'])
    """

    def __init__(
        self,
        method: str | Method | Score = "el2n",
        *,
        keep: float | int = 0.5,
        policy: str | Policy = "hardest",
        class_balanced: bool = False,
        model: Network | None = None,
        training: TrainingConfig | None = None,
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.keep = keep
        self.policy = policy
        self.class_balanced = class_balanced
        self.model = model
        self.training = training
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's name
        """Score the rows of a table and choose among them.

        Args:
            X: numbers [N, D].
            y: the class of each row, of any type, [N]; or one column of 0 and 1 for each class.
        """
        check_classification_targets(y)
        X, labels = validate_data(self, X, _one_column(y), ensure_min_samples=2)
        self.classes_, classes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ScoreError(f"y holds one class, {self.classes_.tolist()[0]!r}; scores need two")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        samples = ImageSamples(StandardScaler().fit_transform(X).astype(np.float32), classes)
        table = score(
            samples,
            method=self.method,
            model=one_hidden_layer if self.model is None else self.model,
            training=self.training,
            seed=seed,
        )
        kept = table.select(
            keep=self.keep, policy=self.policy, seed=seed, class_balanced=self.class_balanced
        )
        self.scores_, self.sample_indices_ = table.scores.numpy(), kept.ids.numpy()
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Any]:  # noqa: N803
        """The kept rows of a table and their labels, of the types that were given."""
        self.fit(X, y)
        return _taken(X, self.sample_indices_), _taken(y, self.sample_indices_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def one_hidden_layer(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The network that scores tables where none is given."""
    return nn.Sequential(nn.Linear(input_shape[0], WIDTH), nn.ReLU(), nn.Linear(WIDTH, num_classes))


def _one_column(y: Any) -> Any:
    """Labels [N] of what may be one column a class."""
    if type_of_target(y) != "multilabel-indicator":
        return column_or_1d(y)
    columns = np.asarray(y)
    if not (columns.sum(axis=1) == 1).all():
        raise ScoreError("Multilabel and multioutput targets are not supported.")
    return columns.argmax(axis=1)


def _taken(values: Any, rows: Any) -> Any:
    """Some rows of an array, a frame, a series or a list."""
    if hasattr(values, "iloc"):
        return values.iloc[rows]
    if isinstance(values, list | tuple):
        return [values[row] for row in rows]
    return np.asarray(values)[rows]
