"""Keep the half of a table that is worth training on, as a step of a pipeline.

Run: python examples/sklearn_pipeline.py   (needs pip install imbalanced-learn)
"""

from imblearn.pipeline import Pipeline
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import datapruning

X, y = load_digits(return_X_y=True, as_frame=True)
X, X_test, y, y_test = train_test_split(X, y, stratify=y, random_state=0)

for method, policy in (("random", "random"), ("el2n", "hardest"), ("el2n", "easiest")):
    selector = datapruning.CoresetSelector(
        method, keep=0.3, policy=policy, class_balanced=True, random_state=0
    )
    pipeline = Pipeline(
        [("scale", StandardScaler()), ("select", selector), ("model", LogisticRegression())]
    )
    accuracy = pipeline.fit(X, y).score(X_test, y_test)
    kept = len(pipeline["select"].sample_indices_)
    print(f"{method} {policy}: {kept} of {len(X)} rows, accuracy {accuracy:.3f}")
