"""Looking: one step with every intermediate number beside its formula and the function that computed it."""
