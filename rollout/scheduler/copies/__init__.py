"""One scheduler for each copy of the model, driven as one."""
