"""Models and optimizers of a run, and how a batch is scored and trained on."""
