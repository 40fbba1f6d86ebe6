"""`CoresetSelector` by the checks of scikit-learn and imbalanced-learn, and what it keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from imblearn.pipeline import Pipeline
from imblearn.utils import _tags as imblearn_tags
from imblearn.utils.estimator_checks import estimator_checks_generator
from processes import in_a_process
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import datapruning
from datapruning.scores.error import el2n

SHORT = datapruning.TrainingConfig(epochs=3)


class Tagged(datapruning.CoresetSelector):
    """With the tags by which imbalanced-learn's checks choose themselves."""

    def __sklearn_tags__(self) -> Any:
        return imblearn_tags.Tags(
            estimator_type="sampler",
            target_tags=super().__sklearn_tags__().target_tags,
            transformer_tags=None,
            classifier_tags=None,
            regressor_tags=None,
            input_tags=imblearn_tags.InputTags(dataframe=True),
            sampler_tags=imblearn_tags.SamplerTags(sample_indices=True),
        )


@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_scikit_learn() -> None:
    selector = datapruning.CoresetSelector(training=SHORT, random_state=0)
    results = check_estimator(selector, on_skip=None)
    assert len(results) > 30
    missed = {r["check_name"] for r in results if r["status"] != "passed"}
    assert missed <= {"check_array_api_input"}  # which has to be asked for


NOT_OURS = {
    "check_samplers_fit": "no sampling_strategy: it keeps a share of the rows",
    "check_samplers_pandas_sparse": "frames of sparse columns are refused, as sparse matrices are",
}


@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_imbalanced_learn() -> None:
    selector = Tagged(training=SHORT, random_state=0)
    ran = []
    for estimator, check in estimator_checks_generator(selector):
        name = check.func.__name__
        ran.append(name)
        if name not in NOT_OURS:
            check(estimator)
    assert len(ran) > 10
    assert set(NOT_OURS) <= set(ran)


def iris() -> tuple[Any, Any]:
    return load_iris(return_X_y=True)


def unsure(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -logits.softmax(1).amax(1)


def test_it_keeps_the_rows_of_highest_score() -> None:
    """Against a network given as trained, on features standardised by hand."""
    X, y = iris()
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    selector = datapruning.CoresetSelector("el2n", keep=40, model=network, random_state=0)
    kept, labels = selector.fit_resample(X, y)
    inputs = torch.from_numpy(((X - X.mean(0)) / X.std(0)).astype(np.float32))
    expected = el2n(network(inputs), torch.from_numpy(y)).detach().numpy()
    assert selector.scores_ == pytest.approx(expected, abs=1e-6)
    assert selector.sample_indices_.tolist() == sorted(np.argsort(-expected)[:40])
    assert np.array_equal(kept, X[selector.sample_indices_])
    assert np.array_equal(labels, y[selector.sample_indices_])


@pytest.mark.parametrize(
    "method", ["grand", "forgetting", "aum", "prototypes-supervised", "k-center", "random", unsure]
)
def test_methods_run_on_tables_and_repeat(method: str | Callable[..., Any]) -> None:
    X, y = iris()
    selector = datapruning.CoresetSelector(
        method, keep=0.2, class_balanced=True, training=SHORT, random_state=3
    )
    kept, labels = selector.fit_resample(X, y)
    assert kept.shape == (30, 4)
    assert np.bincount(labels).min() >= 5
    again = clone(selector).fit(X, y)
    assert np.array_equal(again.sample_indices_, selector.sample_indices_)
    assert np.array_equal(again.scores_, selector.scores_)


def test_the_number_to_keep_may_be_numpys() -> None:
    X, y = iris()
    kept = [
        datapruning.CoresetSelector("random", keep=keep, policy="random", random_state=0)
        .fit(X, y)
        .sample_indices_.tolist()
        for keep in (5, np.int64(5))
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 5


def test_wrong_labels_are_dropped() -> None:
    X, y = make_blobs(300, centers=[[0, 0], [9, 9], [0, 9]], random_state=0)
    wrong = np.random.default_rng(0).choice(300, 30, replace=False)
    noisy = y.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 3
    selector = datapruning.CoresetSelector("aum", keep=0.9, policy="easiest", random_state=0).fit(
        X, noisy
    )
    assert not np.isin(selector.sample_indices_, wrong).any()


def test_frames_keep_their_columns_and_index() -> None:
    data = load_iris(as_frame=True)
    names = pd.Series(data.target_names[data.target], index=data.data.index, dtype="category")
    X = data.data.set_index(data.data.index + 1000)
    selector = datapruning.CoresetSelector(keep=10, training=SHORT, random_state=0)
    kept, labels = selector.fit_resample(X, names)
    assert isinstance(kept, pd.DataFrame)
    assert kept.index.tolist() == (selector.sample_indices_ + 1000).tolist()
    assert kept.columns.tolist() == selector.feature_names_in_.tolist() == X.columns.tolist()
    assert isinstance(labels.dtype, pd.CategoricalDtype)
    assert selector.classes_.tolist() == sorted(data.target_names)


def test_in_a_pipeline_and_a_search() -> None:
    """The last step is trained on the kept rows and predicts all of them."""
    X, y = iris()
    selector = datapruning.CoresetSelector(keep=0.5, training=SHORT, random_state=0)
    steps = [("scale", StandardScaler()), ("select", selector), ("model", LogisticRegression())]
    pipeline = Pipeline(steps).fit(X, y)
    scaled = StandardScaler().fit_transform(X)
    alone = LogisticRegression().fit(*clone(selector).fit_resample(scaled, y))
    assert np.array_equal(pipeline["model"].coef_, alone.coef_)
    assert len(pipeline.predict(X)) == 150
    grid = {"select__keep": [0.3, 0.6], "select__method": ["random"]}
    search = GridSearchCV(pipeline, grid, cv=2)
    assert search.fit(X, y).best_score_ > 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "elton"}, "unknown method 'elton'"),
        ({"keep": 2.0}, r"keep = 2\.0 is no share"),
        ({"policy": "hardly"}, "unknown policy 'hardly'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datapruning.CoresetSelector(training=SHORT).set_params(**settings).fit(*iris())


def test_one_class_and_several_a_row_are_refused() -> None:
    X, _ = iris()
    with pytest.raises(ValueError, match="y holds one class, 'a'"):
        datapruning.CoresetSelector().fit(X, ["a"] * 150)
    with pytest.raises(ValueError, match="Multilabel and multioutput"):
        datapruning.CoresetSelector().fit(X, np.ones((150, 3), dtype=int))


def test_imbalanced_learn_is_not_needed() -> None:
    assert in_a_process(without_imbalanced_learn).shape == (2, 4)


def without_imbalanced_learn() -> Any:
    for name in [name for name in sys.modules if name.partition(".")[0] == "imblearn"]:
        del sys.modules[name]
    sys.modules["imblearn"] = None  # type: ignore[assignment] - importing it now fails
    selector = datapruning.CoresetSelector("random", keep=2, policy="random")
    return selector.fit_resample(np.eye(4), [0, 1, 0, 1])[0]
