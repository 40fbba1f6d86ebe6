"""The app in one process, without Flower's runtime: python run.py"""

from pathlib import Path

import fedprune

if __name__ == "__main__":
    settings = Path(__file__).with_name("pyproject.toml")
    result = fedprune.run(fedprune.RunConfig.read(settings, {"data.clients": 2}))
    accuracy, density = result.summary["test_accuracy"], result.summary["density"]
    print(f"{accuracy:.1%} of test samples right with {density:.0%} of the weights")
    print(f"report: {result.report}")
