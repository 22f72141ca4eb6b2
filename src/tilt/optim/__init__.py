"""What turns gradients into steps: AdamW, and the natural step inside a trust region."""
