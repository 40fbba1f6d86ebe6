"""What a run left, in use: loading it, predicting, evaluating, and handing it to other programs."""
